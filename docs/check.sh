#!/usr/bin/env bash
# Runs the commands of the guides that are walked through from the first to the last: each block that begins with ```sh, in the
# order in which they stand, each page in a copy of the repository's tracked files, so that nothing is left behind. What is built is
# kept in the target directory. The tests of the program hold the commands of its page to what it takes.
#
#   docs/check.sh             # all of them
#   docs/check.sh train       # one
set -euo pipefail
cd "$(dirname "$0")/.."

export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

[ $# -gt 0 ] || set -- start train
for page in "$@"; do
    echo "== $page"
    mkdir -p "$work/$page/nexus"
    git ls-files -z | xargs -0 cp --parents -t "$work/$page/nexus"
    # The guide for an app begins beside the clone, the others in it.
    beside="$work/$page"
    [ "$page" = start ] || beside="$work/$page/nexus"
    { echo 'set -euxo pipefail'; awk '/^```sh$/ {inside = 1; next} /^```$/ {inside = 0} inside' "docs/src/$page.md"; } > "$work/$page.sh"
    (cd "$beside" && bash "$work/$page.sh")
done
echo "all commands ran"
