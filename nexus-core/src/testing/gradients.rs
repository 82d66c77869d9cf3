//! Gradients of a module for tests: a backward pass -> the gradient of every parameter, by name.

use std::collections::BTreeMap;

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{DType, Gradients, Tensor},
};
use nexus_checkpoint::{ModulePath, WeightNames, follow_path};

/// Gradients of the parameters that have one, in f32, by their names in the files.
pub fn gradients_by_name(
    mut gradients: Gradients,
    module: &impl Module,
    names: &WeightNames,
) -> BTreeMap<String, Tensor<1>> {
    let path = ModulePath::default();
    let mut collector = Collector { gradients: &mut gradients, names, path, found: BTreeMap::new() };
    module.visit(&mut collector);
    collector.found
}

/// The norm of all gradients together.
pub fn norm(gradients: &BTreeMap<String, Tensor<1>>) -> f32 {
    let squares = gradients.values().map(|gradient| gradient.clone().square().sum().into_scalar::<f32>());
    squares.sum::<f32>().sqrt()
}

struct Collector<'a> {
    gradients: &'a mut Gradients,
    names: &'a WeightNames,
    path: ModulePath,
    found: BTreeMap<String, Tensor<1>>,
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
        self.found.insert(self.path.file_name(self.names), gradient.reshape([count]).cast(DType::F32));
    }
}
