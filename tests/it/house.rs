//! The plan of the house, kept: arrows between the crates, what they must not name, and a first line for every source file.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde::Deserialize;

/// What crates may know of each other: every crate those before it, but no stage another one.
const ORDER: [&[&str]; 6] = [
    &["nexus-kernels", "nexus-checkpoint"],
    &["nexus-core"],
    &["nexus-data", "nexus-vision-encoder", "nexus-ar", "nexus-diffusion"],
    &["nexus"],
    &["nexus-train"],
    &["nexus-cli"],
];

/// Prefix of the crates that are ours alone.
const LAB: &str = "lab-";
/// The code of the book's pages, as a crate.
const BOOK: &str = "nexus-book";

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

/// A member of the workspace, as `cargo metadata` describes it.
#[derive(Deserialize)]
struct Package {
    name: String,
    manifest_path: PathBuf,
    /// Registries that it may be published to; `None` for all, none for a crate that is not published.
    publish: Option<Vec<String>>,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// `None` for what the library itself needs.
    kind: Option<String>,
}

impl Package {
    fn dir(&self) -> &Path {
        self.manifest_path.parent().unwrap()
    }

    fn is_published(&self) -> bool {
        self.publish.as_ref().is_none_or(|registries| !registries.is_empty())
    }
}

fn packages() -> Vec<Package> {
    let arguments = ["metadata", "--format-version", "1", "--no-deps", "--offline"];
    let output = Command::new(env!("CARGO")).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice::<Metadata>(&output.stdout).unwrap().packages
}

#[test]
fn arrows_between_the_crates_point_one_way() {
    let packages = packages();
    let own: BTreeSet<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    for package in packages.iter().filter(|package| package.is_published()) {
        let name = package.name.as_str();
        let level = ORDER.iter().position(|level| level.contains(&name));
        let level = level.unwrap_or_else(|| panic!("{name} has no place in the order of the crates"));
        let before: BTreeSet<&str> = ORDER[..level].iter().flat_map(|level| level.iter().copied()).collect();
        let needed = package.dependencies.iter().filter(|dependency| dependency.kind.is_none());
        for dependency in needed.map(|dependency| dependency.name.as_str()).filter(|name| own.contains(name)) {
            assert!(before.contains(dependency), "{name} must not know {dependency}");
        }
    }
}

#[test]
fn nothing_depends_on_the_lab() {
    for package in packages() {
        let name = &package.name;
        let is_ours = |name: &str| name.starts_with(LAB) || name == BOOK;
        assert_eq!(
            is_ours(name),
            !package.is_published(),
            "{name}: the lab and the book, and they alone, are not published"
        );
        for dependency in package.dependencies.iter().filter(|_| package.is_published()) {
            assert!(!is_ours(&dependency.name), "{name} must not know {}", dependency.name);
        }
    }
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

fn rust_files_of(packages: &[Package]) -> Vec<PathBuf> {
    let mut found = vec![];
    for package in packages {
        for part in ["src", "tests", "examples", "benches"] {
            rust_files(&package.dir().join(part), &mut found);
        }
    }
    found
}

#[test]
fn every_source_file_says_what_it_is_for() {
    let files = rust_files_of(&packages());
    assert!(files.len() > 50, "only {} source files were found", files.len());
    for path in files {
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("//! "), "{} must open with a `//!` line", path.display());
    }
}

#[test]
fn no_crate_below_the_facade_names_backends() {
    let below = ORDER[..3].concat();
    for package in packages().iter().filter(|package| below.contains(&package.name.as_str())) {
        let (name, text) = (package.name.as_str(), fs::read_to_string(&package.manifest_path).unwrap());
        let shipped = text.split("[dev-dependencies]").next().unwrap();
        // The kernels for CPUs are on the flex backend, behind a feature that the facade forwards.
        let flex = if name == "nexus-kernels" { None } else { Some("flex") };
        for backend in ["wgpu", "vulkan", "metal", "cuda", "rocm"].into_iter().chain(flex) {
            assert!(!shipped.contains(backend), "{name} names the backend {backend}");
        }
    }
}

/// Files of a published crate: its sources, manifest and recipes.
fn files_of(package: &Package) -> Vec<PathBuf> {
    let mut files = rust_files_of(std::slice::from_ref(package));
    files.push(package.manifest_path.clone());
    let recipes = fs::read_dir(package.dir().join("recipes"));
    files.extend(recipes.into_iter().flatten().map(|entry| entry.unwrap().path()));
    files
}

#[test]
fn the_toy_stays_in_the_lab() {
    // In two parts, so that this file is not found.
    let word = ["sc", "ene"].concat();
    for package in packages().iter().filter(|package| package.is_published()) {
        for path in files_of(package) {
            let text = fs::read_to_string(&path).unwrap().to_lowercase();
            assert!(!text.contains(&word), "{} speaks of a {word}, which is the lab's word", path.display());
        }
    }
}
