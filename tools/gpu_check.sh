#!/usr/bin/env bash
# What a person with a GPU runs: builds one backend, proves that every stage is right there, measures it, takes a few
# training steps, and puts everything into one folder, whose `report.md` has all of it in one file. Parts that fail do not
# keep the others back; then it ends with FAIL and 1.
#
#   tools/gpu_check.sh cuda                     # or vulkan, wgpu, metal, rocm
#   tools/gpu_check.sh wgpu:1 report            # the second device, into the folder `report`
#   FEATURE=cuda-nvrtc tools/gpu_check.sh cuda  # the feature of the build, where it has another name than the backend
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

device="${1:?which device: cuda, vulkan, wgpu, metal or rocm, with :N for the N-th of several}"
out="${2:-gpu-report}"
feature="${FEATURE:-${device%%:*}}"
nexus=target/release/nexus
mkdir -p "$out" || exit 1
# What an earlier check left must not look like a result of this one.
rm -rf "$out"/{report.md,certificate-f32.json,certificate.json,backends.json,backends.md,backends.svg,run}

verdicts=""
failed=0
body="$(mktemp)"
trap 'rm -f "$body"' EXIT

# part NAME FILE COMMAND...: runs a part, keeps what it says in FILE and in the report.
part() {
    local name="$1" log="$out/$2" verdict=pass
    shift 2
    echo "== $name"
    "$@" 2>&1 | tee "$log" || verdict=FAIL
    [ "$verdict" = pass ] || failed=1
    verdicts+="| $name | $verdict |"$'\n'
    { printf '\n## %s: %s\n\n```\n' "$name" "$verdict"; cat "$log"; printf '```\n'; } >> "$body"
    [ "$verdict" = pass ]
}

if part build build.txt cargo build --release --locked \
    -p nexus-cli -p lab-tiny --features "$feature,verify,bench"; then
    part devices devices.txt "$nexus" devices
    part "certificate in f32" certificate-f32.txt \
        "$nexus" verify --device "$device" --dtype f32 -o "$out/certificate-f32.json"
    part certificate certificate.txt "$nexus" verify --device "$device" -o "$out/certificate.json"
    part benches benches.txt "$nexus" bench --devices "cpu,$device" -o "$out"
    # A minute of training, which ends with an error if a loss is no number.
    part training training.txt "$(dirname "$nexus")/lab-tiny" train --recipe lab/tiny/recipes/generation_decoder.json \
        --model assets/nexus-tiny --run "$out/run" --device "$device" --seconds 60
fi

word=PASS
[ "$failed" = 0 ] || word=FAIL
{
    printf '# %s: %s with the feature %s\n\ncommit %s, %s, %s\n\n| part | verdict |\n|---|---|\n%s' "$word" "$device" \
        "$feature" "$(git describe --always --dirty)" "$(date -u +%F)" "$(uname -sm)" "$verdicts"
    cat "$body"
    if [ -f "$out/backends.md" ]; then printf '\n## times\n\n'; cat "$out/backends.md"; fi
} > "$out/report.md"
echo "$word: see $out/report.md"
exit "$failed"
