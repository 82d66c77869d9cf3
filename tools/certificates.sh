#!/usr/bin/env bash
# The certificate in every dtype, in floats and with fewer bits, on the CPU and on WGPU (a GPU or Mesa's software driver): what a
# change is tested with is a part of it, and all of it takes too long for every change.
#
#   tools/certificates.sh            # cpu and wgpu
#   tools/certificates.sh wgpu:1     # other devices of the build
set -euo pipefail
cd "$(dirname "$0")/.."

[ $# -gt 0 ] || set -- cpu wgpu
cargo build --locked --package nexus-cli --features verify,wgpu
failed=0
for device in "$@"; do
    for dtype in f32 bf16 f16; do
        # WGPU has no bf16 on most devices; where it is missing there is nothing to certify.
        [[ "$device $dtype" != wgpu*\ bf16 ]] || continue
        for bits in "" q8 q4; do
            arguments=(verify --device "$device" --dtype "$dtype" ${bits:+--quantize "$bits"})
            echo "== ${arguments[*]}"
            "${CARGO_TARGET_DIR:-target}/debug/nexus" "${arguments[@]}" || failed=1
        done
    done
done
exit "$failed"
