//! The strict report of a load: what the module needs and what the files have -> every difference, readable.

use std::fmt::{self, Display, Write};
use std::path::PathBuf;

use burn::tensor::DType;

/// Findings of each kind that are printed; the rest is counted.
const SHOWN: usize = 10;
/// Findings of each kind for which the nearest name is searched: comparing names is quadratic.
const SEARCHED: usize = 50;
/// Similarity below which two names are not worth mentioning together.
const PLAUSIBLE: f64 = 0.6;

/// Everything that keeps a checkpoint from being loaded into a module.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct LoadReport {
    /// Files of the checkpoint.
    pub files: Vec<PathBuf>,
    /// Parameters of the module that the files do not have.
    pub missing: Vec<Missing>,
    /// Tensors of the files that the module does not use and that are not allowed to be unused.
    pub unused: Vec<Unused>,
    /// Tensors of another shape than the parameter.
    pub wrong_shape: Vec<WrongShape>,
    /// Tensors of a dtype that cannot become the parameter.
    pub wrong_dtype: Vec<WrongDType>,
}

/// A parameter that the files do not have.
#[derive(Debug, Clone)]
pub struct Missing {
    /// Name that the files should have.
    pub name: String,
    /// Shape of the parameter.
    pub shape: Vec<usize>,
    /// The most similar name among the tensors that nothing uses.
    pub nearest: Option<String>,
}

/// A tensor that the module does not use.
#[derive(Debug, Clone)]
pub struct Unused {
    /// Name in the files.
    pub name: String,
    /// The most similar name among the missing ones.
    pub nearest: Option<String>,
}

/// A tensor whose shape is not the parameter's.
#[derive(Debug, Clone)]
pub struct WrongShape {
    /// Name in the files.
    pub name: String,
    /// Shape of the parameter.
    pub expected: Vec<usize>,
    /// Shape in the files.
    pub found: Vec<usize>,
}

/// A tensor whose dtype cannot become the parameter's.
#[derive(Debug, Clone)]
pub struct WrongDType {
    /// Name in the files.
    pub name: String,
    /// What would have been accepted.
    pub expected: &'static str,
    /// Dtype in the files, or the dtype it was to be converted to.
    pub found: DType,
}

impl LoadReport {
    /// Whether nothing was found, so that the checkpoint can be loaded.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unused.is_empty() && self.wrong_shape.is_empty() && self.wrong_dtype.is_empty()
    }

    /// Fills in the nearest names: missing ones against `leftover` (tensors that nothing uses), unused ones against
    /// the missing ones.
    pub(super) fn find_nearest(&mut self, leftover: &[&str]) {
        for missing in self.missing.iter_mut().take(SEARCHED) {
            missing.nearest = nearest(&missing.name, leftover.iter().copied());
        }
        for unused in self.unused.iter_mut().take(SEARCHED) {
            unused.nearest = nearest(&unused.name, self.missing.iter().map(|missing| missing.name.as_str()));
        }
    }
}

impl Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.files.as_slice() {
            [file] => write!(f, "{}", file.display())?,
            [first, .., last] => write!(f, "{} to {} ({} files)", first.display(), last.display(), self.files.len())?,
            [] => f.write_str("the checkpoint")?,
        }
        f.write_str(" cannot be loaded into this module; no weight was changed")?;
        section(f, &self.missing, "needed by the module and not in the files", |f, item| {
            write!(f, "{} {:?}{}", item.name, item.shape, Nearest(&item.nearest))
        })?;
        section(f, &self.unused, "in the files and not used by the module", |f, item| {
            write!(f, "{}{}", item.name, Nearest(&item.nearest))
        })?;
        section(f, &self.wrong_shape, "of another shape", |f, item| {
            write!(f, "{}: expected {:?}, found {:?}", item.name, item.expected, item.found)
        })?;
        section(f, &self.wrong_dtype, "of a dtype that does not fit", |f, item| {
            write!(f, "{}: expected {}, found {}", item.name, item.expected, item.found.name())
        })
    }
}

fn section<T>(
    f: &mut fmt::Formatter<'_>,
    items: &[T],
    title: &str,
    line: impl Fn(&mut dyn Write, &T) -> fmt::Result,
) -> fmt::Result {
    if items.is_empty() {
        return Ok(());
    }
    write!(f, "\n{} {title}:", items.len())?;
    write_some(f, items, |out, item| {
        out.write_str("\n  ")?;
        line(out, item)
    })
}

/// Writes the first few items and how many more there are.
pub(super) fn write_some<T>(
    out: &mut dyn Write,
    items: &[T],
    line: impl Fn(&mut dyn Write, &T) -> fmt::Result,
) -> fmt::Result {
    for item in items.iter().take(SHOWN) {
        line(out, item)?;
    }
    match items.len().saturating_sub(SHOWN) {
        0 => Ok(()),
        more => write!(out, "\n  and {more} more"),
    }
}

struct Nearest<'a>(&'a Option<String>);

impl Display for Nearest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(name) => write!(f, " (nearest: {name})"),
            None => Ok(()),
        }
    }
}

/// The candidate most similar to `name`, if one is similar enough to be a plausible misspelling or renaming.
///
/// A candidate that ends in the same segment (`weight`, `bias`) is preferred; the first of equals wins.
pub(super) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<String> {
    let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_string();
    let wanted = last(name);
    let mut best: Option<(f64, &str)> = None;
    for candidate in candidates {
        let bonus = if last(candidate) == wanted { 0.1 } else { 0.0 };
        let score = strsim::normalized_levenshtein(name, candidate) + bonus;
        if score >= PLAUSIBLE && best.is_none_or(|(top, _)| score > top) {
            best = Some((score, candidate));
        }
    }
    best.map(|(_, candidate)| candidate.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_prefers_the_same_last_segment() {
        let candidates = ["blocks.0.attn.q.bias", "blocks.0.attn.qq.weight", "unrelated"];
        assert_eq!(nearest("blocks.0.attn.q.weight", candidates.into_iter()).as_deref(), Some(candidates[1]));
        assert_eq!(nearest("zzz", candidates.into_iter()), None);
    }

    #[test]
    fn long_lists_are_cut() {
        let missing = (0..25).map(|i| Missing { name: format!("w{i}"), shape: vec![i], nearest: None }).collect();
        let text = LoadReport { missing, ..Default::default() }.to_string();
        assert!(text.contains("25 needed by the module"), "{text}");
        assert!(text.contains("w9 [9]") && !text.contains("w10") && text.contains("and 15 more"), "{text}");
    }
}
