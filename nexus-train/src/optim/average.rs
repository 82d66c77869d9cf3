//! Exponential moving average of weights: the module after each step -> a smoother module.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};

use super::TrainStateError;
use nexus_checkpoint::{Checkpoint, ModulePath, WeightNames, follow_path};

/// `average = decay * average + (1 - decay) * weight` of every trained parameter.
///
/// Early steps use the smaller decay `(1 + n) / (10 + n)`, so that the initial weights do not linger.
#[derive(Debug)]
pub struct WeightAverage {
    decay: f64,
    steps: usize,
    by_name: BTreeMap<String, Tensor<1>>,
}

impl WeightAverage {
    /// An average that has seen nothing.
    pub fn new(decay: f64) -> Self {
        Self { decay, steps: 0, by_name: BTreeMap::new() }
    }

    /// Takes in the weights after a step.
    pub fn update(&mut self, module: &impl Module, names: &WeightNames) {
        let early = (1.0 + self.steps as f64) / (10.0 + self.steps as f64);
        let decay = if self.steps == 0 { 0.0 } else { self.decay.min(early) };
        self.steps += 1;
        module.visit(&mut Updater { names, decay, average: &mut self.by_name, path: ModulePath::default() });
    }

    /// The module with the averaged weights in place of its own.
    pub fn apply<M: Module>(&self, module: M, names: &WeightNames) -> M {
        module.map(&mut Applier { names, average: &self.by_name, path: ModulePath::default() })
    }

    /// The averages as tensors, to be saved, and the number of steps that they have seen.
    ///
    /// # Errors
    /// [`TrainStateError::Read`].
    pub fn state(&self) -> Result<(Vec<(String, TensorData)>, usize), TrainStateError> {
        let read = |(name, average): (&String, &Tensor<1>)| match average.clone().try_into_data() {
            Ok(data) => Ok((name.clone(), data)),
            Err(error) => Err(TrainStateError::Read { parameter: name.clone(), reason: format!("{error:?}") }),
        };
        Ok((self.by_name.iter().map(read).collect::<Result<_, _>>()?, self.steps))
    }

    /// Takes up a saved average.
    ///
    /// # Errors
    /// [`TrainStateError::State`] if a parameter is missing or of another size, [`TrainStateError::Checkpoint`].
    pub fn restore(
        decay: f64,
        steps: usize,
        saved: &Checkpoint,
        sizes: &[(String, usize)],
        device: &Device,
    ) -> Result<Self, TrainStateError> {
        let mut by_name = BTreeMap::new();
        for (name, expected) in sizes {
            let missing = || TrainStateError::State { tensor: name.clone(), expected: *expected };
            if !saved.contains(name) {
                return Err(missing());
            }
            let data = saved.data(name)?;
            if data.shape().num_elements() != *expected {
                return Err(missing());
            }
            by_name.insert(name.clone(), Tensor::from_data(data, (device, DType::F32)));
        }
        Ok(Self { decay, steps, by_name })
    }
}

struct Updater<'a> {
    names: &'a WeightNames,
    decay: f64,
    average: &'a mut BTreeMap<String, Tensor<1>>,
    path: ModulePath,
}

impl ModuleVisitor for Updater<'_> {
    follow_path!();

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        if !value.is_require_grad() {
            return;
        }
        let value = value.inner();
        let count = value.shape().num_elements();
        let value = value.reshape([count]).cast(DType::F32);
        let name = self.path.file_name(self.names);
        let average = match self.average.remove(&name) {
            Some(average) if self.decay > 0.0 => average * self.decay + value * (1.0 - self.decay),
            _ => value,
        };
        self.average.insert(name, average);
    }
}

struct Applier<'a> {
    names: &'a WeightNames,
    average: &'a BTreeMap<String, Tensor<1>>,
    path: ModulePath,
}

impl ModuleMapper for Applier<'_> {
    follow_path!();

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(average) = self.average.get(&self.path.file_name(self.names)) else { return param };
        param.map(|value| {
            let (dims, dtype) = (value.dims(), value.dtype());
            let require_grad = value.is_require_grad();
            Tensor::from_inner(average.clone().reshape(dims).cast(dtype)).set_require_grad(require_grad)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nexus_core::{
        nn::Linear,
        testing::{assert_close, cpu},
    };

    fn layer(value: f32) -> Linear {
        let mut layer = Linear::without_bias(1, 2, &cpu().autodiff());
        layer.weight = Param::from_tensor(Tensor::full([2, 1], value, &cpu().autodiff()).require_grad());
        layer
    }

    #[test]
    fn early_steps_forget_faster() {
        let names = WeightNames::default();
        let mut average = WeightAverage::new(0.5);
        average.update(&layer(1.0), &names);
        assert_close(&average.apply(layer(9.0), &names).weight.val().inner(), &[1.0; 2], 0.0);
        average.update(&layer(2.0), &names);
        let early = 2.0 / 11.0;
        let expected = early * 1.0 + (1.0 - early) * 2.0;
        assert_close(&average.apply(layer(9.0), &names).weight.val().inner(), &[expected; 2], 1e-6);
        for _ in 0..20 {
            average.update(&layer(2.0), &names);
        }
        average.update(&layer(4.0), &names);
        assert_close(&average.apply(layer(9.0), &names).weight.val().inner(), &[3.0; 2], 1e-5);
    }
}
