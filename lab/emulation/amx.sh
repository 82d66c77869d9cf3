#!/usr/bin/env bash
# The tests of the kernels on an emulated CPU with AMX and AVX-512 (Bochs' model of Sapphire Rapids), for machines that have none.
#
#   lab/emulation/amx.sh BOCHS VMLINUZ
#
# BOCHS is the unpacked source of Bochs 3.0, which is changed and built; VMLINUZ a kernel from 5.16 on with a serial console and
# initial ram disks built in, such as that of Debian's linux-image-cloud-amd64. Takes two minutes once the tests are built, and
# needs g++, make, cpio, xorriso, and Debian's packages isolinux, syslinux-common, seabios and busybox-static.
set -euo pipefail
bochs=$(realpath "$1") kernel=$(realpath "$2")
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Linux lets no process use AMX on a CPU without XFD, which Bochs lacks; Bochs saves half of each tile when processes take turns,
# and reads VDPBF16PS's second factor from the wrong address where it is given with an offset.
if ! grep -q ia32_xfd "$bochs/cpu/cpu.h"; then
    cpu="$bochs/cpu" this=BX_CPU_THIS_PTR disabled='(BX_CPU_THIS_PTR msr.ia32_xfd \& (1 << 18))'
    msr() { echo "    case BX_MSR_IA32_XFD: $1 break;\n    case BX_MSR_IA32_XFD_ERROR: $2 break;\n    case (BX_MSR_XSS):"; }
    read=$(msr "val64 = $this msr.ia32_xfd;" "val64 = $this msr.ia32_xfd_err;")
    write=$(msr "$this msr.ia32_xfd = val_64; handleAvxModeChange();" "$this msr.ia32_xfd_err = val_64;")
    sed -i 's/^  Bit64u ia32_xss;/&\n  Bit64u ia32_xfd, ia32_xfd_err;/' "$cpu/cpu.h"
    sed -i "s/XTILEDATA_MASK)) != 0)/XTILEDATA_MASK)) != 0 || $disabled)/
        s/^  if (.*BX_XCR0_XTILEDATA_MASK))\$/  if $disabled { $this msr.ia32_xfd_err |= 1 << 18; exception(BX_NM_EXCEPTION, 0); }\n&/" \
        "$cpu/proc_ctrl.cc"
    sed -i "0,/^    case BX_MSR_XSS:/s//$read/" "$cpu/msr.cc"
    sed -i "0,/^    case BX_MSR_XSS:/s//$write/" "$cpu/msr.cc"
    sed -i 's/^  msr_desc\[BX_MSR_XSS\].*/&\n  msr_desc[BX_MSR_IA32_XFD] = new MSR_Descriptor("XFD", BX_ISA_XSAVES);\n  msr_desc[BX_MSR_IA32_XFD_ERROR] = new MSR_Descriptor("XFD_ERR", BX_ISA_XSAVES);/' \
        "$cpu/msr.cc"
    sed -i "s/^  $this xcr0_suppmask = .*/&\n  $this msr.ia32_xfd = $this msr.ia32_xfd_err = 0;/" "$cpu/init.cc"
    sed -i 's/leaf->eax |= (1<<3);$/leaf->eax |= (1 << 3) | (1 << 4);/
        s/^      leaf->ecx = (cpu->ia32_xss_suppmask.*/&\n      leaf->ecx |= (subfunction == 18) << 2;/' "$cpu/cpuid.cc"
    sed -i 's/row < BX_TILE_REGISTERS/row < BX_TILE_MAX_ROWS/' "$cpu/xsave.cc"
    sed -i '/"vdpbf16ps"/s/OP_mVdq32/OP_mVdq/' "$cpu/decoder/ia_opcodes_evex.def"
fi
(
    cd "$bochs"
    ./configure --enable-x86-64 --enable-cpu-level=6 --enable-avx --enable-evex --enable-amx --enable-all-optimizations \
        --enable-pci --with-nogui --disable-docbook CXXFLAGS='-O2 -w'
    make -j"$(nproc)"
) > "$work/bochs.txt" 2>&1 || { tail "$work/bochs.txt"; exit 1; }

# A ram disk with the tests and what they link to.
tests=$(cargo test --release --locked --workspace --lib --no-run 2>&1 | sed -n 's/.*(\(.*nexus_kernels-.*\))$/\1/p')
mkdir -p "$work/disk/bin" "$work/iso/isolinux"
strip -o "$work/disk/bin/tests" "$tests"
cp "$(command -v busybox)" "$work/disk/bin/"
ldd "$tests" | grep -o '/[^ ]*' | while read -r library; do install -D "$library" "$work/disk$library"; done
cat > "$work/disk/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/tests cpu:: --test-threads 1 --nocapture && echo ALL PASSED
/bin/busybox sleep 5
/bin/busybox poweroff -f
INIT
chmod +x "$work/disk/init"
(cd "$work/disk" && find . | cpio -o -H newc --quiet | gzip -1 > "$work/iso/initrd.gz")
cp "$kernel" "$work/iso/vmlinuz"
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$work/iso/isolinux/"
# Without what makes Linux stop early on this emulator.
options='console=ttyS0 quiet mitigations=off nokaslr no_timer_check noapic lpj=1000000 tsc=reliable ibt=off no5lvl nopku nosmap nosmep'
options+=' nopcid noinvpcid nosgx nofsgsbase clearcpuid=580,590 apparmor=0 lsm=capability'
printf 'DEFAULT tests\nLABEL tests\n KERNEL /vmlinuz\n APPEND initrd=/initrd.gz %s\n' "$options" > "$work/iso/isolinux/isolinux.cfg"
xorriso -as mkisofs -quiet -o "$work/boot.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot -boot-load-size 4 \
    -boot-info-table "$work/iso" 2> /dev/null
cat > "$work/bochsrc" <<BOCHS
cpu: model=sapphire_rapids, ips=50000000
memory: guest=1024, host=1024
romimage: file=/usr/share/seabios/bios.bin
vgaromimage: file=/usr/share/seabios/vgabios-stdvga.bin
ata0-master: type=cdrom, path=$work/boot.iso, status=inserted
boot: cdrom
display_library: nogui
com1: enabled=1, mode=file, dev=$work/serial.txt
log: $work/log.txt
panic: action=fatal
clock: sync=none, time0=utc
BOCHS
timeout 1800 "$bochs/bochs" -q -f "$work/bochsrc" > /dev/null 2>&1 || true
grep -a '^test \|AMX: \|panicked\|drift\|ALL PASSED' "$work/serial.txt"
grep -qa '^ALL PASSED' "$work/serial.txt" && grep -qa 'AMX: true' "$work/serial.txt"
