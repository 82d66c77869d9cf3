#!/usr/bin/env bash
# Runs cargo for CUDA where LLVM cannot be downloaded, with the feature `cuda-nvrtc`: kernels are compiled by NVRTC when they
# are first used, so the functions of LLVM that burn links are never called, and empty ones take their place. The programs
# run where the NVIDIA driver and the CUDA toolkit are, which this machine need not have.
#
#   tools/cuda_without_llvm.sh build --release -p nexus-cli --features verify,bench
#   CUDARC_CUDA_VERSION=12080 tools/cuda_without_llvm.sh build --release -p nexus-cli --features verify   # of the toolkit there
set -euo pipefail
cd "$(dirname "$0")/.."

# The build scripts of LLVM do nothing where only documentation is made.
export DOCS_RS=1 CUDARC_CUDA_VERSION="${CUDARC_CUDA_VERSION:-13000}"
where="${CARGO_TARGET_DIR:-target}/without-llvm"
mkdir -p "$where"
where="$(cd "$where" && pwd)"
bindings=$(cargo metadata --locked --format-version 1 --features cuda-nvrtc |
    grep -o '"manifest_path":"[^"]*/llvm-sys-[^"]*/Cargo.toml"' | head -1 | cut -d '"' -f 4)
{
    echo '#include <stdlib.h>'
    { grep -rhoE '\bfn LLVM\w+' "$(dirname "$bindings")/src" | cut -d ' ' -f 2
      printf '%s\n' cubecl_link_device_bitcode cubecl_free_message cubecl_set_llvm_option; } |
        sort -u | sed 's/.*/void &(void) { abort(); }/'
} > "$where/llvm.c"
cc -fno-builtin -w -c "$where/llvm.c" -o "$where/llvm.o"
rm -f "$where/libllvm.a"
ar rcs "$where/libllvm.a" "$where/llvm.o"
printf '#!/bin/sh\nexec cc "$@" "%s/libllvm.a"\n' "$where" > "$where/cc"
chmod +x "$where/cc"

target=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
export "CARGO_TARGET_${target}_LINKER=$where/cc"
exec cargo "$1" --locked --features cuda-nvrtc "${@:2}"
