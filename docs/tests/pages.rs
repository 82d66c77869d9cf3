//! The pages of the book: all are in the summary, every link leads somewhere, and guides keep to plain words.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "a test may panic")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

fn book() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn pages() -> BTreeSet<PathBuf> {
    let files = fs::read_dir(book()).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|extension| extension == "md")).collect()
}

/// A page without its blocks of code.
fn prose(page: &Path) -> String {
    let text = fs::read_to_string(page).unwrap();
    text.split("\n```").step_by(2).collect::<Vec<_>>().join("\n")
}

/// Targets of all links and pictures.
fn links(text: &str) -> Vec<&str> {
    text.split("](").skip(1).filter_map(|rest| rest.split(')').next()).collect()
}

/// What mdbook and GitHub make of a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase().replace(' ', "-");
    kept.chars().filter(|letter| letter.is_alphanumeric() || "-_".contains(*letter)).collect()
}

#[test]
fn every_page_is_in_the_summary_once() {
    let summary = fs::read_to_string(book().join("SUMMARY.md")).unwrap();
    let listed: Vec<PathBuf> = links(&summary).into_iter().map(|link| book().join(link)).collect();
    let mut expected = pages();
    expected.remove(&book().join("SUMMARY.md"));
    assert_eq!(listed.iter().cloned().collect::<BTreeSet<_>>(), expected);
    assert_eq!(listed.len(), expected.len(), "a page is listed twice");
}

#[test]
fn every_link_within_the_book_leads_somewhere() {
    for page in pages() {
        let text = prose(&page);
        for link in links(&text).into_iter().filter(|link| !link.contains("://")) {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { page.clone() } else { book().join(file) };
            let inside = target.starts_with(book()) && !file.starts_with("../");
            assert!(inside && target.is_file(), "{}: no file for the link {link}", page.display());
            if !heading.is_empty() {
                let headings = prose(&target);
                let found = headings.lines().filter_map(|line| line.strip_prefix('#'));
                let found: Vec<String> = found.map(|line| anchor(line.trim_start_matches('#'))).collect();
                assert!(found.iter().any(|anchor| anchor == heading), "{}: no heading for {link}", page.display());
            }
        }
    }
}

/// What there is to read outside of the book.
fn other_documents() -> Vec<PathBuf> {
    let names = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md"].map(|name| repository().join(name));
    let mut found = names.to_vec();
    for folder in ["assets", "fuzz", "lab"] {
        markdown_files(&repository().join(folder), &mut found);
    }
    found
}

fn markdown_files(dir: &Path, found: &mut Vec<PathBuf>) {
    for path in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            markdown_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "md") {
            found.push(path);
        }
    }
}

#[test]
fn every_link_of_other_documents_leads_somewhere() {
    for document in other_documents() {
        let text = prose(&document);
        for link in links(&text).into_iter().filter(|link| !link.contains("://") && !link.starts_with('#')) {
            let target = document.parent().unwrap().join(link.split('#').next().unwrap());
            assert!(target.exists(), "{}: no file for the link {link}", document.display());
        }
    }
}

/// A name without a star or a blank, of a folder that the repository has.
fn names_a_file(name: &str) -> bool {
    const FOLDERS: [&str; 9] =
        ["lab/", "tools/", "examples/", "benches/", "assets/", "tests/", "docs/", "fuzz/fuzz_targets/", ".ci/"];
    let ours = FOLDERS.iter().any(|folder| name.starts_with(folder));
    let of_a_crate = name.starts_with("nexus-") && name.contains('/');
    (ours || of_a_crate) && !name.contains([' ', '*', '<'])
}

#[test]
fn files_that_documents_name_are_there() {
    for document in pages().into_iter().chain(other_documents()) {
        let text = prose(&document);
        for name in text.split('`').skip(1).step_by(2).filter(|name| names_a_file(name)) {
            assert!(repository().join(name).exists(), "{} names `{name}`, which is not there", document.display());
        }
    }
}

#[test]
fn pages_are_in_plain_english() {
    const NOT_ENGLISH: [&str; 8] = [
        "has not got",
        "have not got",
        "had not got",
        "are not to be had",
        "cannot be had",
        "in one piece",
        "in several goes",
        "for the which",
    ];
    for page in pages() {
        // Lines are wrapped, phrases are not.
        let text = fs::read_to_string(&page).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
        for phrase in NOT_ENGLISH {
            assert!(!text.contains(phrase), "{}: \"{phrase}\"", page.display());
        }
    }
}
