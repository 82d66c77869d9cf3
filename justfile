# Short names for what developers do often; `just --list` shows them.

# Everything that a change must pass.
ci:
    .ci/run

# Formats all code.
fmt:
    cargo fmt --all

# Tests one crate, or all without an argument.
test crate="":
    cargo test {{ if crate == "" { "--workspace" } else { "-p " + crate } }}

# Stage benches on the CPU.
bench:
    cargo bench --bench stages

# Stages next to PyTorch (needs lab/bench/requirements.txt); `just compare --docs` rewrites docs/src/performance.md.
compare *arguments:
    python lab/bench/compare.py {{ arguments }}

# Makes the bundled random checkpoint and the parity fixtures again (needs lab/parity/requirements.txt).
fixtures:
    python lab/parity/make_fixtures.py --out .

# The tests of the kernels under valgrind.
memcheck:
    tools/memcheck.sh

# The tests that compute on a device, on WGPU or its software driver.
gpu-tests:
    tools/gpu_tests.sh

# Proves, measures and trains on a GPU: `just gpu-check cuda`; everything goes into gpu-report/.
gpu-check device out="gpu-report":
    tools/gpu_check.sh {{ device }} {{ out }}

# Checks licences and advisories of the dependencies (needs cargo-deny).
deny:
    cargo deny check
