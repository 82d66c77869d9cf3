//! First weights of a model that starts from nothing: names and shapes -> seeded values.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::{Draws, NamePattern};
use nexus_checkpoint::{ModulePath, WeightNames, follow_path};

/// How weights begin.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InitialWeights {
    /// Seed of all values; a parameter's values depend on it and on the parameter's name alone.
    pub seed: u64,
    /// Factor of the standard deviation `1 / sqrt(inputs)` of matrices and convolutions.
    #[serde(default = "one")]
    pub gain: f32,
    /// Parameters that begin at zero, such as those of modulations and last projections.
    #[serde(default)]
    pub zero: Vec<NamePattern>,
}

fn one() -> f32 {
    1.0
}

/// Gives every float parameter its first values.
///
/// Matrices and convolutions are normal with the standard deviation `gain / sqrt(inputs)`; vectors keep the values that
/// their layer begins with (norms at one, biases at zero).
pub fn initialize<M: Module>(module: M, names: &WeightNames, weights: &InitialWeights) -> M {
    module.map(&mut Initializer { names, weights, path: ModulePath::default() })
}

struct Initializer<'a> {
    names: &'a WeightNames,
    weights: &'a InitialWeights,
    path: ModulePath,
}

impl ModuleMapper for Initializer<'_> {
    follow_path!();

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let name = self.path.file_name(self.names);
        let shape = param.lazy_shape();
        let is_zero = self.weights.zero.iter().any(|pattern| pattern.matches(&name));
        if D < 2 && !is_zero {
            return param;
        }
        let count = shape.num_elements();
        let values = if is_zero {
            vec![0.0; count]
        } else {
            let inputs: usize = shape.as_slice()[1..].iter().product();
            let deviation = self.weights.gain / (inputs.max(1) as f32).sqrt();
            let draws = Draws::new(self.weights.seed, &name, 0).normal_values(count);
            draws.into_iter().map(|value| value * deviation).collect()
        };
        let device = param.lazy_device();
        let id = param.id;
        param.transform_for_load(Tensor::from_data(TensorData::new(values, shape), (&device, DType::F32)), id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nexus_core::{nn::Linear, testing::cpu};

    #[test]
    fn values_depend_on_seed_and_name() {
        let names = |prefix| WeightNames { prefix, renames: &[], unused: &[] };
        let weights = |seed| InitialWeights { seed, gain: 2.0, zero: vec![NamePattern("zero.*".into())] };
        let values = |prefix, seed| {
            let layer = initialize(Linear::new(64, 50, &cpu()), &names(prefix), &weights(seed));
            let bias = layer.bias.unwrap().val().into_data().try_to_vec::<f32>().unwrap();
            assert!(bias.iter().all(|&value| value == 0.0));
            layer.weight.val().into_data().try_to_vec::<f32>().unwrap()
        };
        assert_eq!(values("a.", 1), values("a.", 1));
        assert_ne!(values("a.", 1), values("a.", 2));
        assert_ne!(values("a.", 1), values("b.", 1));
        assert!(values("zero.", 1).iter().all(|&value| value == 0.0));
        let square = values("a.", 1).iter().map(|x| x * x).sum::<f32>() / 3200.0;
        assert!((square - 4.0 / 64.0).abs() < 0.004, "{square}");
    }
}
