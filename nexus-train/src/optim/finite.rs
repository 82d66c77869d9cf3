//! Weights that are no numbers: a module -> the first parameter that holds one.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Int, Tensor};

use super::TrainStateError;
use nexus_checkpoint::{ModulePath, WeightNames, follow_path};

/// Checks that all weights are finite, which a step along finite gradients does not promise.
///
/// # Errors
/// [`TrainStateError::WeightNotFinite`] naming the first parameter at fault, [`TrainStateError::Read`].
pub fn check_weights(module: &impl Module, names: &WeightNames) -> Result<(), TrainStateError> {
    let mut checker = Checker { names, path: ModulePath::default(), parameters: vec![], finite: vec![] };
    module.visit(&mut checker);
    let Checker { parameters, finite, .. } = checker;
    if finite.is_empty() {
        return Ok(());
    }
    // Read together, as a device finishes its work before each reading.
    let data = Tensor::cat(finite, 0).try_into_data().map_err(|error| format!("{error:?}"));
    let finite = data.and_then(|data| data.try_into_vec_as::<i32>().map_err(|error| error.to_string()));
    let finite = finite.map_err(|reason| TrainStateError::Read { parameter: "weights".into(), reason })?;
    match parameters.into_iter().zip(finite).find(|(_, finite)| *finite == 0) {
        Some((parameter, _)) => Err(TrainStateError::WeightNotFinite { parameter }),
        None => Ok(()),
    }
}

struct Checker<'a> {
    names: &'a WeightNames,
    path: ModulePath,
    parameters: Vec<String>,
    /// Ones where all weights of a parameter are finite.
    finite: Vec<Tensor<1, Int>>,
}

impl ModuleVisitor for Checker<'_> {
    follow_path!();

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.parameters.push(self.path.file_name(self.names));
        self.finite.push(param.val().detach().is_finite().all().int());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nexus_core::{nn::Linear, testing::cpu};

    #[test]
    fn the_first_weight_that_is_no_number_is_named() {
        let names = WeightNames { prefix: "layer.", ..WeightNames::default() };
        for device in [cpu(), cpu().autodiff()] {
            let mut layer = Linear::new(3, 2, &device);
            layer.weight = Param::from_tensor(Tensor::full([2, 3], f32::MAX, &device));
            check_weights(&layer, &names).unwrap();
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let rows = [f32::MAX, value].map(|value| Tensor::<2>::full([1, 3], value, &device));
                layer.weight = Param::from_tensor(Tensor::cat(rows.into(), 0));
                let error = check_weights(&layer, &names).unwrap_err();
                let TrainStateError::WeightNotFinite { parameter } = &error else { panic!("{error}") };
                assert_eq!(parameter, "layer.weight");
            }
        }
    }
}
