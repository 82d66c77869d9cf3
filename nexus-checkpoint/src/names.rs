//! Names as data: the path of a parameter in a module -> the name of its tensor in the files.

/// How the parameters of a module are called in the released files.
///
/// A module path is what burn's traversal gives: field names, indices for `Vec`, arrays and tuples, nothing for
/// `Option`, and the variant's name for enums, joined by dots (`layers.3.self_attn.q_proj.weight`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WeightNames {
    /// Put before every name as it is, usually ending in a dot.
    pub prefix: &'static str,
    /// Pairs of (segments of the module path, segments in the file), separated by dots.
    ///
    /// Whole segments are compared. At each position from left to right the first pair that matches replaces what it
    /// matched, and the search goes on behind it. A `*` matches one segment, which takes the place of the `*` of the
    /// replacement; an empty replacement removes the segments.
    pub renames: &'static [(&'static str, &'static str)],
    /// Tensors of the files that may stay unused: (full name, or prefix that ends in a dot; the reason).
    pub unused: &'static [(&'static str, &'static str)],
}

impl WeightNames {
    /// Name in the files of the parameter at a module path.
    pub fn file_name(&self, module_path: &str) -> String {
        let path: Vec<&str> = module_path.split('.').collect();
        let mut renamed: Vec<&str> = Vec::with_capacity(path.len());
        let mut at = 0;
        while at < path.len() {
            let rest = &path[at..];
            match self.renames.iter().find(|(pattern, _)| matches(pattern, rest)) {
                Some((pattern, replacement)) => {
                    let len = pattern.split('.').count();
                    replace(pattern, replacement, &rest[..len], &mut renamed);
                    at += len;
                }
                None => {
                    renamed.push(path[at]);
                    at += 1;
                }
            }
        }
        format!("{}{}", self.prefix, renamed.join("."))
    }

    /// Whether a tensor of the files may stay unused.
    pub fn may_be_unused(&self, name: &str) -> bool {
        self.unused.iter().any(|(pattern, _)| match pattern.ends_with('.') {
            true => name.starts_with(pattern),
            false => name == *pattern,
        })
    }
}

/// Whether the path begins with the segments of the pattern.
fn matches(pattern: &str, path: &[&str]) -> bool {
    let mut path = path.iter();
    pattern.split('.').all(|segment| path.next().is_some_and(|found| segment == "*" || segment == *found))
}

/// Appends the replacement, with each `*` filled by the segment that the pattern's `*` of the same rank matched.
fn replace<'a>(pattern: &str, replacement: &'a str, matched: &[&'a str], out: &mut Vec<&'a str>) {
    let stars = pattern.split('.').zip(matched).filter(|(segment, _)| *segment == "*");
    let mut stars = stars.map(|(_, found)| *found);
    let segments = replacement.split('.').filter(|segment| !segment.is_empty());
    out.extend(segments.map(|segment| if segment == "*" { stars.next().unwrap_or(segment) } else { segment }));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_name(renames: &'static [(&'static str, &'static str)], path: &str) -> String {
        WeightNames { prefix: "p.", renames, unused: &[] }.file_name(path)
    }

    #[test]
    fn renames() {
        type Renames = &'static [(&'static str, &'static str)];
        let cases: &[(Renames, &str, &str)] = &[
            (&[], "a.b.weight", "p.a.b.weight"),
            (&[("mlp.fc1", "mlp.0")], "blocks.0.mlp.fc1.weight", "p.blocks.0.mlp.0.weight"),
            (&[("mlp.fc1", "mlp.0")], "blocks.0.mlp.fc12.weight", "p.blocks.0.mlp.fc12.weight"),
            (&[("self_attn", "SelfAttention")], "self_attn.my_self_attn.q", "p.SelfAttention.my_self_attn.q"),
            (&[("double_blocks.*.img", "blocks.*.a")], "double_blocks.7.img.w", "p.blocks.7.a.w"),
            (&[("double_blocks.*.img", "blocks.*.a")], "double_blocks.7.txt.w", "p.double_blocks.7.txt.w"),
            (&[("a.*.b.*", "x.*.*")], "a.1.b.2.w", "p.x.1.2.w"),
            (&[("inner", "")], "outer.inner.w", "p.outer.w"),
            (&[("a", "b"), ("b", "c")], "a.b.w", "p.b.c.w"),
            (&[("a.b", "first"), ("a", "second")], "a.b.a.w", "p.first.second.w"),
            (&[("a", "second"), ("a.b", "first")], "a.b.w", "p.second.b.w"),
            (&[("a.b.c.d.e", "x")], "a.b", "p.a.b"),
        ];
        for (renames, path, expected) in cases {
            assert_eq!(file_name(renames, path), *expected, "{renames:?} {path}");
        }
    }

    #[test]
    fn unused_is_a_full_name_or_a_prefix_with_a_dot() {
        let names =
            WeightNames { unused: &[("lm_head.weight", "tied"), ("visual.", "other stage")], ..Default::default() };
        assert!(names.may_be_unused("lm_head.weight") && names.may_be_unused("visual.blocks.0.w"));
        assert!(!names.may_be_unused("lm_head.weight2") && !names.may_be_unused("visual_head"));
    }
}
