//! What the CPU can do: features found at run time -> the widest version of each kernel.

/// Vector instructions; later ones include the earlier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Instructions {
    /// What every CPU of the target has.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
}

/// Instructions that this CPU has: only detection makes such a value, so that whoever holds one may use them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Level(Instructions);

impl Level {
    /// The highest level of this CPU.
    pub(crate) fn detect() -> Self {
        #[cfg(any(test, feature = "testing"))]
        return Self::detect_cpu().at_most(LIMIT.get());
        #[cfg(not(any(test, feature = "testing")))]
        Self::detect_cpu()
    }

    fn detect_cpu() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = has!("avx2") && has!("fma") && has!("f16c");
            if avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
                return Self(Instructions::Avx512);
            }
            if avx2 {
                return Self(Instructions::Avx2);
            }
        }
        Self(Instructions::Portable)
    }

    /// What it is made of.
    pub(crate) fn instructions(self) -> Instructions {
        self.0
    }

    /// The same, or a lower one.
    #[cfg(any(test, feature = "testing", target_arch = "x86_64"))]
    pub(crate) fn at_most(self, instructions: Instructions) -> Self {
        Self(self.0.min(instructions))
    }

    /// Whether the CPU multiplies pairs of bf16 at this level.
    pub(crate) fn multiplies_bf16(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0 == Instructions::Avx512 && std::arch::is_x86_feature_detected!("avx512bf16");
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Whether the CPU multiplies tiles of bf16 at this level (AMX), and the system lets this process do it.
    #[cfg(any(test, target_arch = "x86_64"))]
    pub(crate) fn multiplies_bf16_tiles(self) -> bool {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        return self.0 == Instructions::Avx512 && *amx::AVAILABLE;
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
        false
    }

    /// Every level that this CPU can run.
    #[cfg(test)]
    pub(crate) fn available() -> impl Iterator<Item = Self> {
        Instructions::available().map(Self)
    }
}

#[cfg(any(test, feature = "testing"))]
impl Instructions {
    /// What this CPU has, from the least on.
    pub fn available() -> impl Iterator<Item = Self> {
        let all = [Self::Portable, Self::Avx2, Self::Avx512];
        all.into_iter().filter(|instructions| *instructions <= Level::detect_cpu().0)
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[allow(unsafe_code)]
mod amx {
    use std::{
        arch::{
            asm,
            x86_64::{__cpuid_count, _xgetbv},
        },
        sync::LazyLock,
    };

    /// Asked once, for all threads of the process.
    pub(super) static AVAILABLE: LazyLock<bool> =
        LazyLock::new(|| is_x86_feature_detected!("avx512f") && cpu_has_it() && is_permitted());

    /// AMX-TILE and AMX-BF16, and registers that the system saves; for a CPU with AVX-512.
    fn cpu_has_it() -> bool {
        const TILE_AND_BF16: u32 = 1 << 24 | 1 << 22;
        const SAVED: u64 = 1 << 17 | 1 << 18;
        #[target_feature(enable = "xsave")]
        fn saved() -> u64 {
            // SAFETY: register 0 is there where XGETBV is.
            unsafe { _xgetbv(0) }
        }
        // SAFETY: AVX-512 is detected by leaf 7 and by XGETBV, so the CPU has both.
        __cpuid_count(7, 0).edx & TILE_AND_BF16 == TILE_AND_BF16 && unsafe { saved() } & SAVED == SAVED
    }

    /// Linux saves the registers of those who ask for it.
    fn is_permitted() -> bool {
        const ARCH_PRCTL: isize = 158;
        const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
        const TILE_DATA: usize = 18;
        let result: isize;
        // SAFETY: the call takes two numbers and touches no memory; the kernel overwrites RCX and R11.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") ARCH_PRCTL => result,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") TILE_DATA,
                out("rcx") _,
                out("r11") _,
                options(nostack),
            );
        }
        result == 0
    }
}

#[cfg(any(test, feature = "testing"))]
thread_local! {
    static LIMIT: std::cell::Cell<Instructions> = const { std::cell::Cell::new(Instructions::Avx512) };
}

/// Kernels that this thread calls from now on use no other instructions, as if the CPU had none.
///
/// Products that burn does choose their instructions themselves.
#[cfg(any(test, feature = "testing"))]
pub fn limit_cpu(instructions: Instructions) {
    LIMIT.set(instructions);
}

/// Compiles a function once per level and calls the version for the level given first.
///
/// `with_level!(level, fn name(arg: Type, ..) -> Out { body })` runs `body`, compiled with the instructions of `level`.
/// The arguments are variables of these names at the call. Calls inside `body` are vectorised too if they are
/// `#[inline(always)]`.
macro_rules! with_level {
    ($level:expr, fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $out:ty)? $body:block) => {{
        #[inline(always)]
        fn $name($($arg: $ty),*) $(-> $out)? $body
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2($($arg: $ty),*) $(-> $out)? { $name($($arg),*) }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512($($arg: $ty),*) $(-> $out)? { $name($($arg),*) }
        let level: $crate::cpu::Level = $level;
        match level.instructions() {
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            // SAFETY: a level has only instructions of this CPU.
            $crate::cpu::Instructions::Avx512 => unsafe { avx512($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            // SAFETY: as above.
            $crate::cpu::Instructions::Avx2 => unsafe { avx2($($arg),*) },
            _ => $name($($arg),*),
        }
    }};
}
pub(crate) use with_level;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_runs_the_same_body() {
        for level in Level::available() {
            let values: &[f32] = &(0..37).map(|i| i as f32).collect::<Vec<_>>();
            let sum = with_level!(
                level,
                fn sum(values: &[f32]) -> f32 {
                    values.iter().sum()
                }
            );
            assert_eq!(sum, 666.0);
        }
    }
}
