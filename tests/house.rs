//! The plan of the house, kept: arrows between the crates, and one line in ARCHITECTURE.md for every source file.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, missing_docs, reason = "a test may panic and print")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

const STAGES: [&str; 4] = ["nexus-data", "nexus-vision-encoder", "nexus-ar", "nexus-diffusion"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Our own crates among the `[dependencies]` of a manifest.
fn own_dependencies(manifest: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(manifest).unwrap();
    let section = text.split("\n[").find(|section| section.starts_with("dependencies]")).unwrap();
    let names = section.lines().filter_map(|line| line.split(['.', ' ', '=']).next());
    names.filter(|name| name.starts_with("nexus-")).map(str::to_string).collect()
}

#[test]
fn arrows_between_the_crates_form_a_star() {
    let core = BTreeSet::from(["nexus-core".to_string()]);
    assert_eq!(own_dependencies(&root().join("nexus-core/Cargo.toml")), BTreeSet::new());
    for stage in STAGES {
        assert_eq!(own_dependencies(&root().join(stage).join("Cargo.toml")), core, "{stage} may know nexus-core alone");
    }
    let all = STAGES.iter().chain(&["nexus-core"]).map(ToString::to_string).collect();
    assert_eq!(own_dependencies(&root().join("Cargo.toml")), all, "the facade knows all");
}

fn rust_files(dir: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn all_rust_files() -> Vec<PathBuf> {
    let crates = STAGES.iter().chain(&["nexus-core", "."]);
    let mut found = vec![];
    for dir in crates.flat_map(|name| ["src", "tests", "examples", "benches"].map(|part| root().join(name).join(part)))
    {
        rust_files(&dir, &mut found);
    }
    assert!(found.len() > 50, "only {} source files were found", found.len());
    found
}

#[test]
fn every_source_file_says_what_it_is_for() {
    for path in all_rust_files() {
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("//! "), "{} must open with a `//!` line", path.display());
    }
}

#[test]
fn every_source_file_has_a_line_in_the_architecture() {
    let architecture = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let named: BTreeSet<&str> = architecture.split('`').skip(1).step_by(2).collect();
    for path in all_rust_files() {
        let relative = path.strip_prefix(root()).unwrap().to_string_lossy().replace("./", "");
        assert!(named.contains(relative.as_str()), "ARCHITECTURE.md has no line for `{relative}`");
    }
    for name in named.iter().filter(|name| name.ends_with(".rs")) {
        assert!(root().join(name).is_file(), "ARCHITECTURE.md names `{name}`, which is not there");
    }
}

#[test]
fn only_the_facade_names_backends() {
    for crate_name in STAGES.iter().chain(&["nexus-core"]) {
        let text = fs::read_to_string(root().join(crate_name).join("Cargo.toml")).unwrap();
        let shipped = text.split("[dev-dependencies]").next().unwrap();
        // The CPU kernels of nexus-core need the flex backend, by a feature that the facade forwards.
        let flex = if *crate_name == "nexus-core" { None } else { Some("flex") };
        for backend in ["wgpu", "vulkan", "metal", "cuda", "rocm"].into_iter().chain(flex) {
            assert!(!shipped.contains(backend), "{crate_name} names the backend {backend}");
        }
    }
}
