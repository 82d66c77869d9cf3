//! Gradients by name: a loss -> sums over micro-batches -> their common norm.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Gradients, Tensor};

use super::TrainStateError;
use nexus_checkpoint::{ModulePath, WeightNames, follow_path};

/// Gradients of the trained parameters, summed over the micro-batches of a step, in f32.
#[derive(Debug, Default)]
pub struct GradientSum {
    pub(crate) by_name: BTreeMap<String, Tensor<1>>,
}

impl GradientSum {
    /// No gradients.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a loss's gradients of all parameters of the module that require them, and adds them to the sum.
    pub fn add(&mut self, mut gradients: Gradients, module: &impl Module, names: &WeightNames) {
        let path = ModulePath::default();
        module.visit(&mut Collector { gradients: &mut gradients, names, path, sum: self });
    }

    /// Adds the gradients of another sum.
    pub fn merge(&mut self, other: Self) {
        for (name, gradient) in other.by_name {
            self.add_one(name, gradient);
        }
    }

    fn add_one(&mut self, name: String, gradient: Tensor<1>) {
        let sum = match self.by_name.remove(&name) {
            Some(earlier) => earlier + gradient,
            None => gradient,
        };
        self.by_name.insert(name, sum);
    }

    /// Number of parameters that have a gradient.
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether no parameter has a gradient.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// The gradient of one parameter, flattened.
    pub fn get(&self, name: &str) -> Option<&Tensor<1>> {
        self.by_name.get(name)
    }

    /// Multiplies all gradients, for means over micro-batches and for clipping.
    pub fn scale(&mut self, factor: f64) {
        if factor != 1.0 {
            for gradient in self.by_name.values_mut() {
                *gradient = gradient.clone() * factor;
            }
        }
    }

    /// Euclidean norm over all parameters together.
    ///
    /// # Errors
    /// [`TrainStateError::NotFinite`] naming the first parameter at fault, [`TrainStateError::Read`].
    pub fn norm(&self) -> Result<f64, TrainStateError> {
        let squares = self.by_name.values().map(|gradient| (gradient.clone() * gradient.clone()).sum());
        let squares: Vec<Tensor<1>> = squares.collect();
        if squares.is_empty() {
            return Ok(0.0);
        }
        // Read together, as a device finishes its work before each reading.
        let data = Tensor::cat(squares, 0).try_into_data().map_err(|error| format!("{error:?}"));
        let squares = data.and_then(|data| data.try_into_vec_as::<f32>().map_err(|error| error.to_string()));
        let squares =
            squares.map_err(|reason| TrainStateError::Read { parameter: "norms of gradients".into(), reason })?;
        let mut total = 0.0;
        for (name, square) in self.by_name.keys().zip(squares) {
            if !square.is_finite() {
                return Err(TrainStateError::NotFinite { parameter: name.clone() });
            }
            total += f64::from(square);
        }
        Ok(total.sqrt())
    }
}

struct Collector<'a> {
    gradients: &'a mut Gradients,
    names: &'a WeightNames,
    path: ModulePath,
    sum: &'a mut GradientSum,
}

impl ModuleVisitor for Collector<'_> {
    follow_path!();

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        // A parameter that is not tracked has no gradient to ask for; asking panics.
        if !value.is_require_grad() {
            return;
        }
        let Some(gradient) = value.grad_remove(self.gradients) else { return };
        let count = gradient.shape().num_elements();
        let gradient = gradient.reshape([count]).cast(DType::F32);
        self.sum.add_one(self.path.file_name(self.names), gradient);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nexus_core::{
        nn::Linear,
        testing::{assert_close, cpu, ramp},
    };

    /// `sum(x Wᵀ)` for rows of ones has the gradient `rows` at every weight.
    fn gradients(layer: &Linear, rows: usize) -> Gradients {
        let x = Tensor::<2>::ones([rows, 3], &cpu().autodiff());
        layer.forward(x).sum().backward()
    }

    #[test]
    fn gradients_add_up_and_have_one_norm() {
        let names = WeightNames::default();
        let layer = Linear::new(3, 2, &cpu().autodiff());
        let mut sum = GradientSum::new();
        sum.add(gradients(&layer, 4), &layer, &names);
        let mut other = GradientSum::new();
        other.add(gradients(&layer, 2), &layer, &names);
        sum.merge(other);
        assert_eq!(sum.len(), 2);
        assert_close(sum.get("weight").unwrap(), &[6.0; 6], 0.0);
        sum.scale(0.5);
        assert_close(sum.get("bias").unwrap(), &[3.0; 2], 0.0);
        assert!((sum.norm().unwrap() - (8.0f64 * 9.0).sqrt()).abs() < 1e-6);
    }

    #[test]
    fn a_gradient_that_is_not_finite_is_named() {
        let names = WeightNames::default();
        let layer = Linear::without_bias(3, 2, &cpu().autodiff());
        let x = Tensor::<2>::from_inner(ramp([1, 3], 1) / 0.0);
        let mut sum = GradientSum::new();
        sum.add(layer.forward(x).sum().backward(), &layer, &names);
        let error = sum.norm().unwrap_err();
        assert!(matches!(&error, TrainStateError::NotFinite { parameter } if parameter == "weight"), "{error}");
    }
}
