//! Paths that a person gives: where results go without taking the place of others, and what was typed or pasted.

use std::{
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
};

use anyhow::Result;

use crate::failure::usage;

/// Extensions of the pictures that are written.
const WRITTEN: [&str; 3] = ["png", "jpg", "jpeg"];
/// Extensions of pictures.
const PICTURES: [&str; 6] = ["png", "jpg", "jpeg", "webp", "bmp", "gif"];

/// Where a picture goes.
#[derive(clap::Args)]
pub struct PictureArgs {
    /// File of the picture, PNG or JPEG, or a directory for it [default: a name that is not taken]
    #[arg(short, long, alias = "result_path", value_name = "PATH", help_heading = "Result")]
    output: Option<PathBuf>,
    /// Let the picture take the place of a file that is there
    #[arg(long, help_heading = "Result")]
    pub overwrite: bool,
}

impl PictureArgs {
    /// The file of the picture, which can be written; found out before the work begins.
    pub fn resolve(&self, default: &str) -> Result<PathBuf> {
        let path = match &self.output {
            None => free_name(Path::new("."), default, self.overwrite),
            Some(dir) if dir.is_dir() => free_name(dir, default, self.overwrite),
            Some(path) => path.clone(),
        };
        if !has_extension(&path, &WRITTEN) {
            return Err(usage(format!("{}: a picture is written as .png, .jpg or .jpeg", path.display())));
        }
        check_writable(&path, self.overwrite)?;
        Ok(path)
    }
}

/// Fails if a file cannot be written, or may not be because it is there.
pub fn check_writable(path: &Path, overwrite: bool) -> Result<()> {
    if path.exists() && !overwrite {
        return Err(usage(format!("{}: already there; give another path, or add --overwrite", path.display())));
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let trial = folder.join(format!(".nexus-{}.unfinished", std::process::id()));
    let written = OpenOptions::new().write(true).create_new(true).open(&trial).and_then(|_| fs::remove_file(&trial));
    written.map_err(|error| usage(format!("{}: nothing can be written there: {error}", path.display())))
}

/// `picture.png`, or the first of `picture-2.png`, `picture-3.png`, ... that is not there.
pub fn free_name(dir: &Path, name: &str, overwrite: bool) -> PathBuf {
    let dir = if dir == Path::new(".") { Path::new("") } else { dir };
    let first = dir.join(name);
    if overwrite || !first.exists() {
        return first;
    }
    let (stem, extension) = name.rsplit_once('.').unwrap_or((name, "png"));
    let mut numbered = (2_usize..).map(|number| dir.join(format!("{stem}-{number}.{extension}")));
    numbered.find(|path| !path.exists()).unwrap_or(first)
}

/// Writes a file beside its place and puts it there whole.
#[cfg(any(feature = "bench", feature = "train", feature = "verify"))]
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    use anyhow::Context;

    let beside = path.with_added_extension("unfinished");
    fs::write(&beside, bytes).and_then(|()| fs::rename(&beside, path)).with_context(|| path.display().to_string())
}

/// Pictures and a text from what was given without options: the last word is the text unless it is a file.
pub fn pictures_and_text(mut words: Vec<String>, text: Option<String>) -> Result<(Vec<PathBuf>, Option<String>)> {
    let text = match text {
        Some(text) => Some(text),
        None => words.pop_if(|last| !Path::new(last).is_file()),
    };
    // A path that was mistyped is no question.
    match &text {
        Some(path) if !path.contains(char::is_whitespace) && has_extension(Path::new(path), &PICTURES) => {
            Err(usage(format!("{path}: no such file")))
        }
        _ => Ok((words.into_iter().map(PathBuf::from).collect(), text)),
    }
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    let found = path.extension().and_then(|extension| extension.to_str()).map(str::to_ascii_lowercase);
    found.is_some_and(|found| extensions.contains(&found.as_str()))
}

/// A path as people type it, paste it, or drag it into a terminal: quoted, escaped, from `~`, or as a `file://` address.
pub fn typed(text: &str) -> PathBuf {
    let text = text.trim();
    let quoted = ['"', '\''].iter().find_map(|&quote| text.strip_prefix(quote)?.strip_suffix(quote));
    let plain = match quoted {
        Some(inside) => inside.to_string(),
        None if Path::new(text).exists() || cfg!(windows) => text.to_string(),
        None => unescape(text),
    };
    let plain = plain.strip_prefix("file://").map_or(plain.as_str(), |path| path);
    match (plain.strip_prefix("~/"), std::env::home_dir()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => PathBuf::from(plain),
    }
}

/// Without the backslashes that keep characters from a shell.
fn unescape(text: &str) -> String {
    let mut characters = text.chars();
    let mut plain = String::new();
    while let Some(character) = characters.next() {
        plain.push(if character == '\\' { characters.next().unwrap_or('\\') } else { character });
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_found_as_people_give_them() {
        for (given, expected) in [
            ("my cat.png", "my cat.png"),
            (" cat.png ", "cat.png"),
            ("\"my cat.png\"", "my cat.png"),
            ("'my cat.png'", "my cat.png"),
            ("my\\ cat\\ \\(1\\).png", "my cat (1).png"),
            ("file:///pictures/cat.png", "/pictures/cat.png"),
            ("it's.png", "it's.png"),
        ] {
            assert_eq!(typed(given), Path::new(expected), "{given}");
        }
        let home = std::env::home_dir().unwrap();
        assert_eq!(typed("~/cat.png"), home.join("cat.png"));
        assert_eq!(typed("'~/my cat.png'"), home.join("my cat.png"));
    }

    #[test]
    fn names_count_on() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a.png", "a-2.png", "a-3.png"] {
            let path = free_name(dir.path(), "a.png", false);
            assert_eq!(path, dir.path().join(name));
            fs::write(path, "").unwrap();
        }
        assert_eq!(free_name(dir.path(), "a.png", true), dir.path().join("a.png"));
    }

    #[test]
    fn the_last_word_is_the_text_unless_it_is_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.png").display().to_string();
        fs::write(&file, "").unwrap();
        let split = |words: &[&str], text: Option<&str>| {
            let words = words.iter().map(ToString::to_string).collect();
            pictures_and_text(words, text.map(str::to_string)).map(|(files, text)| (files.len(), text))
        };
        let is = |text: &str| Some(text.to_string());
        assert_eq!(split(&[&file, &file, "what?"], None).unwrap(), (2, is("what?")));
        assert_eq!(split(&[&file], None).unwrap(), (1, None));
        assert_eq!(split(&["what?"], None).unwrap(), (0, is("what?")));
        assert_eq!(split(&["b.png"], Some("what?")).unwrap(), (1, is("what?")));
        assert_eq!(split(&[], None).unwrap(), (0, None));
        assert_eq!(split(&["What is in b.png"], None).unwrap(), (0, is("What is in b.png")));
        assert!(split(&["b.png"], None).unwrap_err().to_string().contains("b.png: no such file"));
    }
}
