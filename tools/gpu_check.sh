#!/usr/bin/env bash
# What a person with a GPU runs: builds one backend, proves that every stage is right there, measures it, takes a few
# training steps, and puts everything into one folder.
#
#   tools/gpu_check.sh cuda            # or vulkan, wgpu, metal, rocm
#   tools/gpu_check.sh wgpu:1 report   # the second device, into the folder `report`
set -euo pipefail
cd "$(dirname "$0")/.."

device="${1:?which device: cuda, vulkan, wgpu, metal or rocm, with :N for the N-th of several}"
out="${2:-gpu-report}"
feature="${device%%:*}"
mkdir -p "$out"

cargo build --release --features "$feature" --example devices --example verify --example bench_backends --example train
bin=target/release/examples

"$bin/devices" | tee "$out/devices.txt"
failed=0
"$bin/verify" --device "$device" --dtype f32 --json "$out/certificate-f32.json" | tee "$out/certificate-f32.txt" || failed=1
"$bin/verify" --device "$device" --json "$out/certificate.json" | tee "$out/certificate.txt" || failed=1
"$bin/bench_backends" --devices "cpu,$device" --out "$out"

# A minute of training, which ends with an error if a loss is no number.
rm -rf "$out/run"
"$bin/train" --recipe recipes/nexus-tiny/generation_decoder.json --model assets/nexus-tiny --run "$out/run" \
    --device "$device" --seconds 60 2>&1 | tee "$out/training.txt" || failed=1

if [ "$failed" = 0 ]; then echo "PASS: see $out"; else echo "FAIL: see $out"; exit 1; fi
