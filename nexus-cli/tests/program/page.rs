//! The page of the program in the book: it names what the help names, and its commands can be carried out.

use std::{collections::BTreeSet, ffi::OsString, fs};

use super::{nexus, root};

fn page() -> String {
    fs::read_to_string(root().join("docs/src/program.md")).unwrap()
}

/// Options of several letters in a text, as `--steps`.
fn options(text: &str) -> BTreeSet<String> {
    let rest = text.split("--").skip(1);
    let names = rest.map(|rest| rest.split(|c: char| !c.is_ascii_alphanumeric() && !"-_".contains(c)).next().unwrap());
    names.filter(|name| !name.is_empty() && !name.starts_with('-')).map(|name| name.replace('_', "-")).collect()
}

#[test]
fn the_page_explains_every_option_and_no_other() {
    let page = page();
    let sections: Vec<&str> = page.split("\n## ").collect();
    let shared = sections.iter().find(|section| section.starts_with("What all subcommands share")).unwrap();
    for name in ["generate", "edit", "understand", "chat", "inspect", "devices", "verify", "train", "bench"] {
        let help = nexus(root(), &[name, "--help"]).stdout;
        let section = sections.iter().find(|section| section.starts_with(&format!("nexus {name}\n"))).unwrap();
        let explained = &options(section) | &options(shared);
        for option in options(help.split("Examples:").next().unwrap()) {
            assert!(explained.contains(&option), "docs/src/program.md does not explain --{option} of {name}");
        }
        let rows: String = section.lines().filter(|line| line.starts_with("| `-")).collect();
        for option in options(&rows) {
            assert!(help.contains(&format!("--{option}")), "{name} has no --{option}");
        }
    }
}

/// Words as a shell makes them; quotes are all that commands here have of a shell.
fn words(command: &str) -> Vec<OsString> {
    let mut words = vec![];
    for (index, part) in command.split('"').enumerate() {
        if index % 2 == 1 {
            words.push(part.into());
        } else {
            words.extend(part.split_whitespace().map(OsString::from));
        }
    }
    words
}

/// Commands of the program in the fenced blocks of a page.
fn commands(page: &str) -> Vec<Vec<OsString>> {
    let blocks = page.split("```").skip(1).step_by(2);
    let blocks = blocks.filter(|block| ["\n", "sh\n", "text\n"].iter().any(|start| block.starts_with(*start)));
    let lines = blocks.flat_map(str::lines).map(|line| line.split(" #").next().unwrap().trim());
    let of_ours = lines.filter_map(|line| match line.split_once(" -- ") {
        Some((cargo, rest))
            if cargo.starts_with("cargo run") && ["--example", "-p "].iter().all(|other| !cargo.contains(other)) =>
        {
            Some(format!("nexus {rest}"))
        }
        _ => line.starts_with("nexus ").then(|| line.to_string()),
    });
    of_ours.map(|line| words(&line)).collect()
}

#[test]
fn commands_of_the_docs_can_be_parsed() {
    let mut pages = vec![root().join("README.md")];
    pages.extend(fs::read_dir(root().join("docs/src")).unwrap().map(|entry| entry.unwrap().path()));
    let mut count = 0;
    for path in pages.iter().filter(|path| path.extension().is_some_and(|extension| extension == "md")) {
        for command in commands(&fs::read_to_string(path).unwrap()) {
            count += 1;
            assert!(nexus_cli::Cli::from_arguments(command.clone()).is_ok(), "{}: {command:?}", path.display());
        }
    }
    assert!(count > 20, "only {count} commands were found");
}

#[test]
fn the_first_commands_of_the_page_do_what_they_say() {
    let dir = tempfile::tempdir().unwrap();
    let first = &commands(&page())[..3];
    for command in first {
        let words: Vec<&str> = command[1..].iter().map(|word| word.to_str().unwrap()).collect();
        let ran = nexus(dir.path(), &words);
        assert_eq!(ran.code, 0, "{words:?}: {}", ran.stderr);
    }
    assert!(dir.path().join("circle.png").is_file() && dir.path().join("yellow.png").is_file());
}
