//! Blocks whose activations are not kept: inputs of every block -> outputs, and the blocks once more in the backward pass.

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::Tensor,
};

/// What a training step keeps of the blocks that it ran.
///
/// With [`Recomputation::of_blocks`] a block keeps its inputs alone; [`Recomputation::backward`] computes it again, one
/// block at a time, so that the activations of a single block are in memory. Losses and gradients are those without it,
/// for the time of one more forward pass. With [`Recomputation::none`] blocks run as they are, and the backward pass is
/// that of burn.
#[derive(Default)]
pub struct Recomputation<'a> {
    on: bool,
    /// Leaves in the place of what was computed before them, where the graph is cut.
    leaves: Vec<Tensor<3>>,
    /// What was done, in order.
    events: Vec<Event<'a>>,
}

/// A tensor that goes into blocks or comes out of one.
#[derive(Debug, Clone)]
pub struct Activation {
    value: Tensor<3>,
    /// Which leaf it is.
    leaf: Option<usize>,
}

impl Activation {
    /// The tensor, tracked; what is computed from it outside of blocks has a gradient as usual.
    pub fn value(&self) -> Tensor<3> {
        self.value.clone()
    }
}

#[cfg_attr(not(feature = "autodiff"), allow(dead_code, reason = "only the backward pass reads it"))]
enum Event<'a> {
    /// Tensors that entered together, with the leaves in their place.
    Entered { sources: Vec<Tensor<3>>, leaves: Vec<usize> },
    /// A block ran; leaves in and out.
    Ran { inputs: Vec<usize>, outputs: Vec<usize>, block: Box<dyn Fn(Vec<Tensor<3>>) -> Vec<Tensor<3>> + 'a> },
}

impl<'a> Recomputation<'a> {
    /// Everything is kept.
    pub fn none() -> Self {
        Self::default()
    }

    /// Of each block the inputs are kept.
    pub fn of_blocks() -> Self {
        Self { on: true, ..Self::default() }
    }

    /// Tensors that blocks may take.
    ///
    /// What they were computed from together must enter together, and must not be used again: the graph before them is
    /// gone through once. Whatever else needs it takes [`Activation::value`].
    pub fn enter<const N: usize>(&mut self, tensors: [Tensor<3>; N]) -> [Activation; N] {
        if !self.on {
            return tensors.map(|value| Activation { value, leaf: None });
        }
        let mut leaves = vec![];
        let activations = tensors.each_ref().map(|tensor| {
            let (activation, leaf) = self.cut(tensor.clone().inner());
            leaves.push(leaf);
            activation
        });
        self.events.push(Event::Entered { sources: tensors.into(), leaves });
        activations
    }

    /// Runs a block; `block` gets the module and the inputs, and must compute the same every time.
    ///
    /// # Panics
    /// If an input was not made by this recomputation.
    pub fn run<M: Module + 'a, const I: usize, const O: usize>(
        &mut self,
        module: &'a M,
        inputs: [&Activation; I],
        block: impl Fn(&M, [Tensor<3>; I]) -> [Tensor<3>; O] + 'a,
    ) -> [Activation; O] {
        if !self.on {
            return block(module, inputs.map(Activation::value)).map(|value| Activation { value, leaf: None });
        }
        module.visit(&mut Initialize);
        // Burn keeps the graph of what is dropped until the next backward pass, so none is made.
        let constants = inputs.map(|input| Tensor::from_inner(input.value().inner()));
        let mut outputs = vec![];
        let activations = block(&module.clone().no_grad(), constants).map(|output| {
            let (activation, leaf) = self.cut(output.inner());
            outputs.push(leaf);
            activation
        });
        let inputs = inputs.map(|input| input.leaf.expect("an activation of this recomputation")).to_vec();
        let block = move |inputs: Vec<Tensor<3>>| {
            let Ok(inputs) = inputs.try_into() else { unreachable!("as many as were given") };
            block(module, inputs).to_vec()
        };
        self.events.push(Event::Ran { inputs, outputs, block: Box::new(block) });
        activations
    }

    /// A leaf with these values, and its number.
    fn cut(&mut self, value: Tensor<3>) -> (Activation, usize) {
        let value = Tensor::from_inner(value).require_grad();
        self.leaves.push(value.clone());
        let leaf = self.leaves.len() - 1;
        (Activation { value, leaf: Some(leaf) }, leaf)
    }
}

/// Makes parameters that are still lazy, because a clone of such a one gets values of its own.
struct Initialize;

impl ModuleVisitor for Initialize {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let _ = param.val();
    }
}

#[cfg(feature = "autodiff")]
impl Recomputation<'_> {
    /// The gradients of a loss, in parts: those of what follows the blocks, of each block from the last on, and of what
    /// comes before them. A parameter's gradient is the sum over the parts.
    pub fn backward(self, loss: &Tensor<1>, mut take: impl FnMut(burn::tensor::Gradients)) {
        let Self { leaves, events, .. } = self;
        let mut upstream: Vec<Option<Tensor<3>>> = vec![None; leaves.len()];
        let mut pass = |loss: &Tensor<1>, upstream: &mut [Option<Tensor<3>>]| {
            let mut gradients = loss.backward();
            for (leaf, sum) in leaves.iter().zip(upstream) {
                if let Some(gradient) = leaf.grad_remove(&mut gradients) {
                    *sum = Some(match sum.take() {
                        Some(earlier) => earlier + gradient,
                        None => gradient,
                    });
                }
            }
            take(gradients);
        };
        pass(loss, &mut upstream);
        for event in events.into_iter().rev() {
            let (outputs, numbers) = match event {
                Event::Entered { sources, leaves } => (sources, leaves),
                Event::Ran { outputs, .. } if outputs.iter().all(|&leaf| upstream[leaf].is_none()) => continue,
                Event::Ran { inputs, outputs, block } => {
                    (block(inputs.into_iter().map(|leaf| leaves[leaf].clone()).collect()), outputs)
                }
            };
            let gradients = numbers.into_iter().map(|leaf| upstream[leaf].take());
            if let Some(product) = product(outputs, gradients) {
                pass(&product, &mut upstream);
            }
        }
    }
}

/// The sum of tensors times their gradients, whose gradient is the chain rule's; `None` if there is no gradient.
#[cfg(feature = "autodiff")]
fn product(outputs: Vec<Tensor<3>>, gradients: impl Iterator<Item = Option<Tensor<3>>>) -> Option<Tensor<1>> {
    let terms = outputs.into_iter().zip(gradients).filter(|(output, _)| output.is_tracked());
    let terms = terms.filter_map(|(output, gradient)| Some((output * Tensor::from_inner(gradient?)).sum()));
    terms.reduce(|sum, term| sum + term)
}

#[cfg(test)]
#[cfg(feature = "autodiff")]
mod tests {
    use std::collections::BTreeMap;

    use burn::module::Module;

    use super::*;
    use crate::{
        nn::Linear,
        testing::{assert_close_tensors, cpu, gradients_by_name, ramp},
    };
    use nexus_checkpoint::WeightNames;
    use nexus_kernels::gelu;

    #[derive(Module, Debug)]
    struct Model {
        before: Linear,
        blocks: Vec<Linear>,
        after: Linear,
    }

    impl Model {
        fn new() -> Self {
            let layer = || Linear::new(6, 6, &cpu().autodiff());
            Self { before: layer(), blocks: (0..3).map(|_| layer()).collect(), after: layer() }
        }

        /// Two streams; the second goes into every block, the state after the first block is read besides.
        fn loss<'a>(&'a self, blocks: &mut Recomputation<'a>) -> Tensor<1> {
            let input = |seed| Tensor::from_inner(ramp([2, 5, 6], seed));
            let before = self.before.forward(input(1));
            let [mut x, mut y, constant] = blocks.enter([before.clone(), before * 0.5, input(2)]);
            let mut read = Tensor::zeros([1], &cpu().autodiff());
            for layer in &self.blocks {
                [x, y] = blocks.run(layer, [&x, &y, &constant], |layer, [x, y, constant]| {
                    let mixed = gelu(layer.forward(x.clone() + y.clone() * constant));
                    [x + mixed.clone(), y * mixed]
                });
                read = read + x.value().square().mean();
            }
            let [mut joined] = blocks.enter([self.after.forward(x.value()) * y.value()]);
            for layer in &self.blocks[1..] {
                [joined] = blocks.run(layer, [&joined], |layer, [joined]| [gelu(layer.forward(joined))]);
            }
            read + joined.value().sum()
        }
    }

    fn gradients<'a>(
        model: &'a Model,
        mut blocks: Recomputation<'a>,
    ) -> (Tensor<1>, BTreeMap<String, Tensor<1>>, usize) {
        let loss = model.loss(&mut blocks);
        let (mut sums, mut parts) = (BTreeMap::<String, Tensor<1>>::new(), 0);
        blocks.backward(&loss, |gradients| {
            for (name, gradient) in gradients_by_name(gradients, model, &WeightNames::default()) {
                let sum = match sums.remove(&name) {
                    Some(sum) => sum + gradient,
                    None => gradient,
                };
                sums.insert(name, sum);
            }
            parts += 1;
        });
        (loss.inner(), sums, parts)
    }

    fn assert_equal(model: &Model, count: usize) {
        let (loss, kept, one) = gradients(model, Recomputation::none());
        let (again, recomputed, parts) = gradients(model, Recomputation::of_blocks());
        assert_eq!(loss.into_data(), again.into_data());
        assert_eq!((kept.len(), recomputed.len()), (count, count));
        for (name, gradient) in &kept {
            assert_close_tensors(recomputed.get(name).unwrap(), gradient, 1e-6);
        }
        // After, before, between, and five blocks.
        assert_eq!((one, parts), (1, 8));
    }

    #[test]
    fn gradients_are_those_of_kept_activations() {
        assert_equal(&Model::new(), 10);
    }

    #[test]
    fn frozen_blocks_pass_gradients_on() {
        let mut model = Model::new();
        model.blocks[1] = model.blocks[1].clone().no_grad();
        assert_equal(&model, 8);
    }

    #[test]
    fn nothing_before_the_blocks_has_a_gradient_if_it_is_frozen() {
        let mut model = Model::new();
        model.before = model.before.clone().no_grad();
        let (_, recomputed, parts) = gradients(&model, Recomputation::of_blocks());
        assert_eq!((recomputed.len(), parts), (8, 7));
    }
}
