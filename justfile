# Short names for what developers and CI do; `just --list` shows them.

# Those that no test here runs; with DOCS_RS the build script of LLVM downloads nothing.
backends := "cuda-nvrtc,metal,rocm,vulkan,wgpu"

# Everything that a change must pass, one after the other.
ci:
    .ci/run

# Formats all code.
fmt:
    cargo fmt --all

# Formatting, lints of every backend in one build, and documentation, with warnings denied.
lint:
    cargo fmt --all --check
    DOCS_RS=1 cargo clippy --workspace --all-targets --locked --features {{ backends }} -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked

# Tests one crate, or all without an argument.
test crate="":
    cargo test --locked {{ if crate == "" { "--workspace" } else { "-p " + crate } }}

# Everything is checked with the oldest Rust that is promised.
msrv:
    cargo "+$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)" check --workspace --locked

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

# The certificate in every dtype that CI leaves out.
certificates:
    tools/certificates.sh

# Checks licences and advisories of the dependencies (needs cargo-deny).
deny:
    cargo deny check

# Compares what the crates promise with docs/public-api (needs cargo-public-api and a nightly toolchain).
public-api:
    tools/public_api.sh check

# Writes docs/public-api anew, for a change that means to change what is promised.
public-api-update:
    tools/public_api.sh update

# The pages of the book in target/book (needs mdbook).
book:
    mdbook build docs

# The code and the links of the book, then its commands.
book-tests:
    cargo test --locked --package nexus-book
    docs/check.sh
