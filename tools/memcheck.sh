#!/usr/bin/env bash
# The tests of the kernels under valgrind, which sees every read and write outside of allocated memory, and every branch
# that depends on memory that nobody wrote. It knows AVX2 and no AVX-512, so the kernels choose up to AVX2 there.
#
#   tools/memcheck.sh
set -euo pipefail
cd "$(dirname "$0")/.."

host=$(rustc -vV | sed -n 's/^host: //p' | tr a-z- A-Z_)
env "CARGO_TARGET_${host}_RUNNER=valgrind -q --error-exitcode=9" cargo test --workspace --locked --lib cpu::
