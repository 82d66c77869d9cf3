#!/usr/bin/env bash
# The tests that compute on a device, on WGPU: on a GPU, or on Mesa's software driver for Vulkan, which root gets installed
# where no adapter computes right (that of OpenGL does not).
#
#   tools/gpu_tests.sh
#
# They are the programs that `cargo test --workspace` builds, run again. The certificate is in f32 and in one half precision;
# tools/certificates.sh has the others. Left out are the tests of what is the CPU's on every device (files, runs of training),
# and the faults planted in single weights, which take minutes on a software driver and say nothing about a device. Without any
# adapter it ends with 77, and nothing was tested; with GPU_REQUIRED=1 that is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

# A build that fails must not look like a missing adapter.
cargo test --quiet --workspace --locked --no-run
adapters() { "${CARGO_TARGET_DIR:-target}/debug/nexus" devices | grep '^wgpu'; }

if ! adapters; then
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        { apt-get update && apt-get install -y --no-install-recommends mesa-vulkan-drivers libvulkan1; } > /dev/null || true
    fi
    if ! adapters; then
        echo "SKIPPED: no adapter for WGPU here; mesa-vulkan-drivers and libvulkan1 would be one" >&2
        [ -z "${GPU_REQUIRED:-}" ] || exit 1
        exit 77
    fi
fi

export BURN_DEVICE=wgpu
cargo test --workspace --locked --test it -- ar:: device_inputs:: pipeline::

# WGPU has no bf16.
cargo test --workspace --locked --test parity --test parity_networks --test parity_sampling \
    -- --skip transformer_in_bf16

cargo test --workspace --locked --test device_failure --test lost_device -- --include-ignored

cargo test --workspace --locked --test program -- certificate:: \
    --skip a_planted_fault --skip a_fault_in --skip faults_in_preprocessing --skip the_program --skip a_model --skip a_person

cargo test --workspace --locked --test train -- objectives:: --skip activations_in_bf16

# Every operation on the GPU, next to its plain formulation in f64 on the CPU; then what only a GPU has, and the blocks.
cargo test --workspace --locked --test suite -- Gpu
cargo test --workspace --locked --lib -- --include-ignored gpu::
cargo test --workspace --locked --lib -- nn:: activation:: adamw:: attention:: conv:: grad:: \
    join:: linear:: norm:: rotary::
