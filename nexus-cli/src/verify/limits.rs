//! Limits of the certificate: drift that was measured, dtype and bits of the weights -> the largest drift that passes.

use nexus::{FloatDType, Quantization};

/// Drift that passes in half precision, over the one that was measured: other devices add in other orders.
const ROOM: f32 = 3.5;
/// Drift that passes in fewer bits, over the one that was measured: the weights are rounded to the same values everywhere.
const ROOM_OF_BITS: f32 = 1.5;

/// What a stage may drift by, so that rounding passes and a wrong stage does not.
#[derive(Clone, Copy)]
pub struct Limits {
    f32: f32,
    bf16: f32,
    f16: f32,
    /// More of it by weights of 8 bits, and of 4.
    q8: f32,
    q4: f32,
}

impl Limits {
    /// Of what has no rounding.
    pub const EXACT: Self = Self::of(0.0, 0.0, 0.0, 0.0).in_f32(0.0);

    /// From the drift that was measured in bf16 and f16, and in f32 with weights of 8 and 4 bits.
    pub const fn of(bf16: f32, f16: f32, q8: f32, q4: f32) -> Self {
        Self { f32: 1e-4, bf16: ROOM * bf16, f16: ROOM * f16, q8: ROOM_OF_BITS * q8, q4: ROOM_OF_BITS * q4 }
    }

    /// The same with another limit in f32.
    pub const fn in_f32(self, f32: f32) -> Self {
        Self { f32, ..self }
    }

    /// Largest drift that passes.
    pub fn limit(&self, compute: FloatDType, quantization: Option<Quantization>) -> f32 {
        let of_dtype = match compute {
            FloatDType::BF16 => self.bf16,
            FloatDType::F16 => self.f16,
            _ => self.f32,
        };
        let of_bits = match quantization {
            None => 0.0,
            Some(Quantization::Q8) => self.q8,
            Some(Quantization::Q4) => self.q4,
        };
        of_dtype + of_bits
    }
}
