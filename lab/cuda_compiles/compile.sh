#!/usr/bin/env bash
# Compiles the kernels of certificates, training steps and the released sizes for CUDA where there is no GPU: programs run with
# NVIDIA's NVRTC over a stand-in for the driver (driver.c), which launches nothing, and ptxas assembles what
# NVRTC made. It says nothing about values: those are tested on other devices, from the same source of kernels.
#
#   lab/cuda_compiles/compile.sh
#
# It takes NVRTC, the headers and ptxas from PyPI (CUDA 12.8), and the build of `tools/cuda_without_llvm.sh`, which takes half
# an hour from nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."

target="${CARGO_TARGET_DIR:-target}"
where="$target/cuda-compiles"
rm -rf "$where/modules" "$where/run"
mkdir -p "$where/lib" "$where/modules" "$where/wheels"
where="$(cd "$where" && pwd)"

toolkit="$where/toolkit/nvidia"
if [ ! -d "$toolkit" ]; then
    python3 -m pip download --quiet --no-deps --dest "$where/wheels" \
        "nvidia-cuda-nvrtc-cu12==12.8.*" "nvidia-cuda-runtime-cu12==12.8.*" "nvidia-cuda-nvcc-cu12==12.8.*"
    for wheel in "$where"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$where/toolkit"; done
    cp -r "$toolkit/cuda_nvcc/include/crt" "$toolkit/cuda_runtime/include/"
    chmod +x "$toolkit/cuda_nvcc/bin/ptxas"
fi
ln -sf "$toolkit"/cuda_nvrtc/lib/*.so.* "$where/lib/"
ln -sf "$toolkit/cuda_nvrtc/lib/libnvrtc.so.12" "$where/lib/libnvrtc.so"
cc -w -shared -fPIC -o "$where/lib/libcuda.so" lab/cuda_compiles/driver.c

# Speed is of no use here.
quick=(--config 'profile.dev.package."*".opt-level=1' --config 'profile.dev.package.nexus-kernels.opt-level=1')
tools/cuda_without_llvm.sh build -p nexus-cli -p lab-tiny --features bench,verify "${quick[@]}"

export LD_LIBRARY_PATH="$where/lib" CUDA_PATH="$toolkit/cuda_runtime" MODULES="$where/modules"
export BURN_DEVICE=cuda
failed=0
# compiles WHAT PROGRAM SUBCOMMAND ARGUMENTS: its numbers are wrong; what it must not say is that a kernel could not be compiled or launched.
compiles() {
    local log="$where/log.txt" before after
    before=$(find "$where/modules" -type f | wc -l)
    "$target/debug/$2" "${@:3}" > "$log" 2>&1 || true
    after=$(find "$where/modules" -type f | wc -l)
    if [ "$after" = "$before" ] || grep -qiE 'compilation error|launch error|panicked' "$log"; then
        failed=1
        echo "FAIL: $1"
        head -40 "$log"
    else
        echo "$((after - before)) kernels: $1"
    fi
}
for options in "--dtype f32" "--dtype bf16" "--dtype f16" "--dtype bf16 --quantize q8" "--dtype bf16 --quantize q4"; do
    # shellcheck disable=SC2086
    compiles "certificate $options" nexus verify --device cuda $options
done
for part in autoencoder vision_encoder autoregressive generation_decoder editing_decoder; do
    for dtype in f32 bf16; do
        rm -rf "$where/run"
        sed "s/\"steps\":/\"compute_dtype\": \"$dtype\", \"steps\":/" "lab/tiny/recipes/$part.json" > "$where/recipe.json"
        compiles "training, $part, $dtype" \
            lab-tiny train --device cuda --recipe "$where/recipe.json" --model assets/nexus-tiny --run "$where/run" --seconds 5
    done
done
# Large matrices take other algorithms. Weights that nobody reads take no memory.
for stage in released_prefill_300 released_decode_token released_image_block_81 released_dit_step_1024; do
    for dtype in f32 bf16; do
        compiles "$stage, $dtype" nexus bench run "$stage" --device cuda --dtype "$dtype" --runs 1
    done
done

# Programs share most of their kernels.
for module in "$where"/modules/*.ptx; do
    mv "$module" "$where/modules/$(sha256sum < "$module" | cut -d ' ' -f 1).unique"
done
echo "ptxas: $(find "$where/modules" -name '*.unique' | wc -l) different kernels"
export PTXAS="$toolkit/cuda_nvcc/bin/ptxas"
find "$where/modules" -name '*.unique' -print0 |
    xargs -0 -P "$(nproc)" -I{} sh -c '"$PTXAS" -arch=sm_90a -O1 -o /dev/null "{}" || exit 255' || failed=1
[ "$failed" = 0 ] && echo PASS || echo FAIL
exit "$failed"
