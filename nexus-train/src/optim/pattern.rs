//! Name patterns: the words of a recipe -> which parameters they mean.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use nexus_checkpoint::{ModulePath, WeightNames, follow_path};

/// A name of parameters in which `*` stands for any characters, dots included: `visual.*`, `*.bias`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NamePattern(pub String);

impl NamePattern {
    /// Whether a name has this form.
    pub fn matches(&self, name: &str) -> bool {
        let mut parts = self.0.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = name.strip_prefix(first) else { return false };
        let mut parts: Vec<&str> = parts.collect();
        let Some(last) = parts.pop() else { return rest.is_empty() };
        for part in parts {
            match rest.find(part) {
                Some(at) => rest = &rest[at + part.len()..],
                None => return false,
            }
        }
        rest.len() >= last.len() && rest.ends_with(last)
    }
}

/// Makes the parameters that a pattern means constant, and all others trained.
///
/// Returns the module and how many parameters each pattern froze; 0 is most likely a spelling mistake.
pub fn freeze<M: Module>(module: M, names: &WeightNames, frozen: &[NamePattern]) -> (M, Vec<usize>) {
    let mut freezer = Freezer { names, frozen, counts: vec![0; frozen.len()], path: ModulePath::default() };
    let module = module.map(&mut freezer);
    (module, freezer.counts)
}

struct Freezer<'a> {
    names: &'a WeightNames,
    frozen: &'a [NamePattern],
    counts: Vec<usize>,
    path: ModulePath,
}

impl ModuleMapper for Freezer<'_> {
    follow_path!();

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let name = self.path.file_name(self.names);
        let mut is_frozen = false;
        for (pattern, count) in self.frozen.iter().zip(&mut self.counts) {
            if pattern.matches(&name) {
                *count += 1;
                is_frozen = true;
            }
        }
        param.set_require_grad(!is_frozen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nexus_core::{nn::Linear, testing::cpu};

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, name, expected) in [
            ("visual.*", "visual.blocks.0.norm1.weight", true),
            ("visual.*", "model.visual.x", false),
            ("*.bias", "a.b.bias", true),
            ("*.bias", "a.bias.b", false),
            ("a.*.b*", "a.x.y.b", true),
            ("a.*.b", "a.b", false),
            ("a.b", "a.b", true),
            ("a.b", "a.bc", false),
            ("*", "", true),
            ("ab*ba", "aba", false),
            ("", "a", false),
        ] {
            assert_eq!(NamePattern(pattern.into()).matches(name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn frozen_parameters_get_no_gradient() {
        let names = WeightNames { prefix: "head.", ..Default::default() };
        let module = Linear::new(3, 2, &cpu().autodiff());
        let patterns = [NamePattern("head.bias".into()), NamePattern("nothing".into())];
        let (module, counts) = freeze(module, &names, &patterns);
        assert_eq!(counts, [1, 0]);
        assert!(module.weight.val().is_require_grad());
        assert!(!module.bias.as_ref().unwrap().val().is_require_grad());
        let (module, _) = freeze(module, &names, &[]);
        assert!(module.bias.unwrap().val().is_require_grad());
    }
}
