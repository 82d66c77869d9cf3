//! AdamW, and Muon for chosen matrices, over a module: gradients by name -> the module after one step.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, Param};
use burn::optim::{AdamWState, AdaptiveMomentumState};
use burn::tensor::{DType, Device, Tensor, TensorData};
use nexus_kernels::{AdamWStep, adamw};
use serde::{Deserialize, Serialize};

use super::{GradientSum, MuonOptions, TrainStateError, muon::Muon};
use nexus_checkpoint::{Checkpoint, ModulePath, WeightNames, follow_path};

/// Names of the moments in a saved state, as PyTorch calls them.
const MOMENTS: [&str; 2] = ["exp_avg.", "exp_avg_sq."];

/// Name of Muon's momentum in a saved state, as PyTorch calls it.
const VELOCITY: &str = "momentum_buffer.";

/// Name of the number of steps of each parameter in a saved state.
const STEP: &str = "step.";

/// Settings of AdamW; the defaults are PyTorch's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWOptions {
    /// Decay rates of the moments.
    pub betas: [f32; 2],
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        Self { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01 }
    }
}

/// AdamW and Muon with the moments of every parameter, by name.
pub struct Optimizer {
    options: AdamWOptions,
    states: BTreeMap<String, AdamWState<1>>,
    muon: Option<Muon>,
}

impl Optimizer {
    /// An optimizer that has seen no step.
    pub fn new(options: AdamWOptions) -> Self {
        Self { options, states: BTreeMap::new(), muon: None }
    }

    /// Lets matrices take steps of Muon; none has taken one yet.
    pub fn with_muon(mut self, muon: Option<MuonOptions>) -> Self {
        self.muon = muon.map(|muon| Muon::new(muon, self.options.weight_decay));
        self
    }

    /// Its settings.
    pub fn options(&self) -> AdamWOptions {
        self.options
    }

    /// The module after one step along the gradients; parameters without a gradient stay as they are.
    pub fn step<M: Module>(&mut self, module: M, names: &WeightNames, gradients: GradientSum, lr: f64) -> M {
        module.map(&mut Stepper { optimizer: self, names, gradients, lr, path: ModulePath::default() })
    }

    /// One parameter's step.
    fn step_of(&mut self, name: String, dims: &[usize], lr: f64, value: Tensor<1>, gradient: Tensor<1>) -> Tensor<1> {
        if let (Some(muon), &[rows, cols]) = (&mut self.muon, dims)
            && muon.takes(&name)
        {
            return muon.update(name, [rows, cols], lr, value, gradient);
        }
        let state = self.states.remove(&name);
        let (value, state) = self.update(lr, value, gradient, state);
        self.states.insert(name, state);
        value
    }

    /// One parameter's step of AdamW.
    fn update(
        &self,
        lr: f64,
        value: Tensor<1>,
        gradient: Tensor<1>,
        state: Option<AdamWState<1>>,
    ) -> (Tensor<1>, AdamWState<1>) {
        let (number, moments) = match state {
            Some(AdamWState { momentum }) => (momentum.time + 1, Some([momentum.moment_1, momentum.moment_2])),
            None => (1, None),
        };
        let AdamWOptions { betas, eps, weight_decay } = self.options;
        let step = AdamWStep { betas, eps, weight_decay, lr, number };
        let (value, [moment_1, moment_2]) = adamw(value, gradient, moments, &step);
        let momentum = AdaptiveMomentumState { time: number, moment_1, moment_2, max_moment_2: None };
        (value, AdamWState { momentum })
    }

    /// The moments as tensors, to be saved.
    ///
    /// # Errors
    /// [`TrainStateError::Read`].
    pub fn state(&self) -> Result<Vec<(String, TensorData)>, TrainStateError> {
        let mut tensors = Vec::with_capacity(3 * self.states.len());
        for (name, state) in &self.states {
            let AdaptiveMomentumState { time, moment_1, moment_2, .. } = &state.momentum;
            for (prefix, moment) in MOMENTS.into_iter().zip([moment_1, moment_2]) {
                let read = |error| TrainStateError::Read { parameter: name.clone(), reason: format!("{error:?}") };
                tensors.push((format!("{prefix}{name}"), moment.clone().try_into_data().map_err(read)?));
            }
            tensors.push((format!("{STEP}{name}"), TensorData::new(vec![*time as i64], [1])));
        }
        for (name, velocity) in self.muon.iter().flat_map(|muon| &muon.velocities) {
            let read = |error| TrainStateError::Read { parameter: name.clone(), reason: format!("{error:?}") };
            tensors.push((format!("{VELOCITY}{name}"), velocity.clone().try_into_data().map_err(read)?));
        }
        Ok(tensors)
    }

    /// Takes up the moments of a saved state; `sizes` are the names and numbers of elements of the trained parameters.
    ///
    /// A parameter that had no gradient yet has no moments.
    ///
    /// # Errors
    /// [`TrainStateError::State`] if a part of a parameter's state is missing or of another size,
    /// [`TrainStateError::Checkpoint`].
    pub fn restore(
        options: AdamWOptions,
        muon: Option<MuonOptions>,
        saved: &Checkpoint,
        sizes: &[(String, usize)],
        device: &Device,
    ) -> Result<Self, TrainStateError> {
        let mut optimizer = Self::new(options).with_muon(muon);
        let has_state =
            |name: &str| [MOMENTS[0], MOMENTS[1], STEP].iter().any(|of| saved.contains(&format!("{of}{name}")));
        let read = |prefix: &str, name: &str, expected: usize| {
            let tensor = format!("{prefix}{name}");
            match saved.contains(&tensor) {
                true => Ok(saved.data(&tensor)?).and_then(|data| match data.shape().num_elements() == expected {
                    true => Ok(data),
                    false => Err(TrainStateError::State { tensor, expected }),
                }),
                false => Err(TrainStateError::State { tensor, expected }),
            }
        };
        if let Some(muon) = &mut optimizer.muon {
            for (name, expected) in sizes.iter().filter(|(name, _)| saved.contains(&format!("{VELOCITY}{name}"))) {
                let velocity = Tensor::from_data(read(VELOCITY, name, *expected)?, (device, DType::F32));
                muon.velocities.insert(name.clone(), velocity);
            }
        }
        for (name, expected) in sizes.iter().filter(|(name, _)| has_state(name)) {
            let [moment_1, moment_2] = MOMENTS.map(|prefix| -> Result<Tensor<1>, TrainStateError> {
                Ok(Tensor::from_data(read(prefix, name, *expected)?, (device, DType::F32)))
            });
            let (moment_1, moment_2) = (moment_1?, moment_2?);
            let time = read(STEP, name, 1)?.try_to_vec_as::<i64>().ok().and_then(|time| usize::try_from(time[0]).ok());
            let Some(time) = time else {
                return Err(TrainStateError::State { tensor: format!("{STEP}{name}"), expected: 1 });
            };
            let momentum = AdaptiveMomentumState { time, moment_1, moment_2, max_moment_2: None };
            optimizer.states.insert(name.clone(), AdamWState { momentum });
        }
        Ok(optimizer)
    }
}

struct Stepper<'a> {
    optimizer: &'a mut Optimizer,
    names: &'a WeightNames,
    gradients: GradientSum,
    lr: f64,
    path: ModulePath,
}

impl ModuleMapper for Stepper<'_> {
    follow_path!();

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let name = self.path.file_name(self.names);
        let Some(gradient) = self.gradients.by_name.remove(&name) else { return param };
        let (id, value, mapper) = param.consume();
        let dims = value.dims();
        let strategy = value.gradient_checkpointing_strategy();
        let flat = value.inner().reshape([gradient.dims()[0]]);
        let flat = self.optimizer.step_of(name, &dims, self.lr, flat, gradient);
        let mut value: Tensor<D> = Tensor::from_inner(flat.reshape(dims));
        if let Some(strategy) = strategy {
            value = value.with_gradient_checkpointing_strategy(strategy);
        }
        Param::from_mapped_value(id, value.require_grad(), mapper)
    }
}

#[cfg(test)]
mod tests {
    use burn::optim::{AdamWConfig, Optimizer as _};

    use super::*;
    use crate::optim::NamePattern;
    use nexus_checkpoint::write_safetensors;
    use nexus_core::{
        nn::Linear,
        testing::{assert_close, cpu, ramp},
    };

    const NAMES: WeightNames = WeightNames { prefix: "layer.", renames: &[], unused: &[] };

    fn layer() -> Linear {
        let mut layer = Linear::without_bias(2, 2, &cpu().autodiff());
        layer.weight = Param::from_tensor(Tensor::from_inner(ramp([2, 2], 3)).require_grad());
        layer
    }

    fn gradients(layer: &Linear, seed: usize) -> GradientSum {
        let loss = layer.forward(Tensor::<2>::from_inner(ramp([3, 2], seed))).powi_scalar(2).sum();
        let mut sum = GradientSum::new();
        sum.add(loss.backward(), layer, &NAMES);
        sum
    }

    fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().try_to_vec().unwrap()
    }

    /// PyTorch's formula, in f64.
    #[test]
    fn steps_are_those_of_decoupled_weight_decay() {
        let options = AdamWOptions { betas: [0.8, 0.95], eps: 1e-3, weight_decay: 0.1 };
        let (mut optimizer, mut layer) = (Optimizer::new(options), layer());
        let mut expected: Vec<f64> = values(layer.weight.val()).into_iter().map(f64::from).collect();
        let (mut first, mut second) = (vec![0.0; 4], vec![0.0; 4]);
        for step in 1..=3 {
            let sum = gradients(&layer, step);
            let gradient = values(sum.get("layer.weight").unwrap().clone());
            layer = optimizer.step(layer, &NAMES, sum, 0.01);
            for i in 0..4 {
                let gradient = f64::from(gradient[i]);
                first[i] = 0.8 * first[i] + 0.2 * gradient;
                second[i] = 0.95 * second[i] + 0.05 * gradient * gradient;
                let (m, v) =
                    (first[i] / (1.0 - 0.8f64.powi(step as i32)), second[i] / (1.0 - 0.95f64.powi(step as i32)));
                expected[i] = expected[i] * (1.0 - 0.01 * 0.1) - 0.01 * m / (v.sqrt() + 1e-3);
            }
            let expected: Vec<f32> = expected.iter().map(|&value| value as f32).collect();
            assert_close(&layer.weight.val().inner(), &expected, 1e-6);
        }
        assert!(layer.weight.val().is_require_grad());
    }

    #[test]
    fn the_kernel_gives_the_values_of_burn() {
        let options = AdamWOptions { betas: [0.9, 0.99], eps: 1e-6, weight_decay: 0.05 };
        let optimizer = Optimizer::new(options);
        let burn =
            AdamWConfig::new().with_beta_1(0.9).with_beta_2(0.99).with_epsilon(1e-6).with_weight_decay(0.05).build();
        for count in [1, 17, 70_001] {
            let value: Tensor<1> = ramp([count], 1);
            let (mut fast, mut plain) = ((value.clone(), None), (value, None));
            for step in 1..=4 {
                let gradient: Tensor<1> = ramp([count], 10 + step) * 0.3;
                let (value, state) = optimizer.update(0.02, fast.0, gradient.clone(), fast.1);
                fast = (value, Some(state));
                plain = burn.step(0.02, plain.0, gradient, plain.1);
                assert_close(&fast.0, &values(plain.0.clone()), 1e-6);
                let moments = |state: &Option<AdamWState<1>>| {
                    let momentum = &state.as_ref().unwrap().momentum;
                    (momentum.time, values(momentum.moment_1.clone()), values(momentum.moment_2.clone()))
                };
                assert_eq!(moments(&fast.1), moments(&plain.1));
            }
        }
    }

    #[test]
    fn a_restored_optimizer_goes_on_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("optimizer.safetensors");
        let options = AdamWOptions::default();
        let mut optimizer = Optimizer::new(options);
        let first = layer();
        let sum = gradients(&first, 1);
        let first = optimizer.step(first, &NAMES, sum, 0.01);
        write_safetensors(&path, optimizer.state().unwrap(), None).unwrap();
        let sizes = [("layer.weight".to_string(), 4)];
        let saved = Checkpoint::open(&path).unwrap();
        let mut restored = Optimizer::restore(options, None, &saved, &sizes, &cpu()).unwrap();
        let went_on = optimizer.step(first.clone(), &NAMES, gradients(&first, 2), 0.01);
        let resumed = restored.step(first.clone(), &NAMES, gradients(&first, 2), 0.01);
        assert_eq!(values(went_on.weight.val()), values(resumed.weight.val()));
        let other = [("layer.weight".to_string(), 5)];
        let error = Optimizer::restore(options, None, &saved, &other, &cpu()).err().unwrap();
        assert!(matches!(error, TrainStateError::State { expected: 5, .. }), "{error}");
        let mut parts = optimizer.state().unwrap();
        parts.pop();
        write_safetensors(&path, parts, None).unwrap();
        let error = Optimizer::restore(options, None, &Checkpoint::open(&path).unwrap(), &sizes, &cpu()).err().unwrap();
        assert!(matches!(error, TrainStateError::State { expected: 1, .. }), "{error}");
    }

    #[test]
    fn a_restored_momentum_goes_on_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("optimizer.safetensors");
        let muon = Some(MuonOptions { matrices: vec![NamePattern("*.weight".into())], momentum: 0.9 });
        let options = AdamWOptions::default();
        let mut optimizer = Optimizer::new(options).with_muon(muon.clone());
        let first = layer();
        let sum = gradients(&first, 1);
        let first = optimizer.step(first, &NAMES, sum, 0.01);
        let names: Vec<String> = optimizer.state().unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["momentum_buffer.layer.weight"]);
        write_safetensors(&path, optimizer.state().unwrap(), None).unwrap();
        let saved = Checkpoint::open(&path).unwrap();
        let restore = |sizes: usize| {
            let sizes = [("layer.weight".to_string(), sizes)];
            Optimizer::restore(options, muon.clone(), &saved, &sizes, &cpu())
        };
        let went_on = optimizer.step(first.clone(), &NAMES, gradients(&first, 2), 0.01);
        let resumed = restore(4).unwrap().step(first.clone(), &NAMES, gradients(&first, 2), 0.01);
        assert_eq!(values(went_on.weight.val()), values(resumed.weight.val()));
        assert!(matches!(restore(5).err().unwrap(), TrainStateError::State { expected: 5, .. }));
    }

    #[test]
    fn a_parameter_without_a_gradient_has_no_moments() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("optimizer.safetensors");
        let options = AdamWOptions::default();
        write_safetensors(&path, Optimizer::new(options).state().unwrap(), None).unwrap();
        let sizes = [("layer.weight".to_string(), 4)];
        let mut restored =
            Optimizer::restore(options, None, &Checkpoint::open(&path).unwrap(), &sizes, &cpu()).unwrap();
        let layer = layer();
        let [new, resumed] = [&mut Optimizer::new(options), &mut restored]
            .map(|optimizer| values(optimizer.step(layer.clone(), &NAMES, gradients(&layer, 1), 0.01).weight.val()));
        assert_eq!(new, resumed);
    }
}
