#!/usr/bin/env bash
# What the published crates promise, kept as files: the list of their public items as cargo-public-api prints it. `check` fails if
# it is no longer what the files say, `update` writes them anew. Needs cargo-public-api and the nightly toolchain that it asks for.
#
#   tools/public_api.sh check
#   tools/public_api.sh update
set -euo pipefail
cd "$(dirname "$0")/.."

what="${1:?check or update}"
crates=$(cargo metadata --no-deps --locked --format-version 1 | python3 -c '
import json, sys
for package in json.load(sys.stdin)["packages"]:
    kinds = {kind for target in package["targets"] for kind in target["kind"]}
    # The library of a program is its own.
    if package["publish"] is None and "lib" in kinds and "bin" not in kinds:
        print(package["name"])')
failed=0
mkdir -p docs/public-api
for crate in $crates; do
    kept="docs/public-api/$crate.txt"
    now="$(mktemp)"
    # Implementations that the compiler gives or derives say nothing about intent.
    cargo public-api --package "$crate" --omit blanket-impls,auto-trait-impls,auto-derived-impls > "$now"
    if [ "$what" = update ]; then
        mv "$now" "$kept"
        chmod 644 "$kept"
    elif ! diff -u "$kept" "$now"; then
        failed=1
        echo "$crate promises something else than $kept says; if that is meant: tools/public_api.sh update" >&2
    fi
done
exit "$failed"
