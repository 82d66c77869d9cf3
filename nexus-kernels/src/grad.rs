//! Operations in the graph of autodiff: tracked tensors -> plain ones -> a result, recorded with its backward pass.
//!
//! Tensors are taken apart into plain ones, the backend's own [`Ops`] run on those, and the result becomes a node of the
//! graph that calls the [`Backward`](crate::backward::Backward) of the same backend. Gradients of parents that nobody tracks
//! are not computed.

mod ops;
mod split;

use std::{fmt, sync::Arc};

use burn::{
    backend::{
        Autodiff, DispatchTensor,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::NoCheckpointing},
            grads::Gradients,
            ops::{Backward as Step, NodeGuard, Ops as Prepared, OpsKind},
        },
    },
    tensor::{DType, Tensor},
};

use crate::backward::{Backward, Convertible, Gradient, gradient};

/// A tensor of the autodiff device taken apart.
struct Operand<const D: usize> {
    /// Its values, on the plain device.
    value: Tensor<D>,
    tracked: bool,
    guard: NodeGuard,
}

impl<const D: usize> Operand<D> {
    /// A tensor of the plain device is a constant.
    fn of<B: Backward>(tensor: Tensor<D>) -> Self
    where
        DispatchTensor: Convertible<B>,
    {
        let tensor = if tensor.device().is_autodiff() { tensor } else { Tensor::from_inner(tensor) };
        let Ok(tensor) = tensor.try_into_primitive::<Autodiff<B>>() else {
            unreachable!("the tensors of an operation are on one device")
        };
        let tracked = tensor.is_tracked();
        let (value, guard) = tensor.into_parts();
        Self { value: Tensor::from_primitive::<B>(value), tracked, guard }
    }
}

/// A parent of a node, as [`record`] takes it.
struct Parent {
    guard: NodeGuard,
    tracked: bool,
    /// Of the parent, and so of its gradient.
    dtype: DType,
}

impl<const D: usize> From<Operand<D>> for Parent {
    fn from(operand: Operand<D>) -> Self {
        let Operand { value, tracked, guard } = operand;
        Self { guard, tracked, dtype: value.dtype() }
    }
}

/// What [`record`] keeps: the gradient of the result and whose gradients are wanted -> those gradients.
type Function<B, const N: usize> = dyn Fn(Gradient<B>, [bool; N]) -> [Option<Gradient<B>>; N] + Send + Sync;

/// A backward function that the graph can hold.
struct Kept<B: Backward, const N: usize>(Arc<Function<B, N>>)
where
    DispatchTensor: Convertible<B>;

impl<B: Backward, const N: usize> Clone for Kept<B, N>
where
    DispatchTensor: Convertible<B>,
{
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B: Backward, const N: usize> fmt::Debug for Kept<B, N>
where
    DispatchTensor: Convertible<B>,
{
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "backward function of {N} parents")
    }
}

/// A node of the graph whose backward pass is its state.
#[derive(Debug)]
struct Node;

impl<B: Backward, const N: usize> Step<B, N> for Node
where
    DispatchTensor: Convertible<B>,
{
    type State = Kept<B, N>;

    fn backward(self, ops: Prepared<Self::State, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let upstream = gradients.consume::<B>(&ops.node);
        let wanted = ops.parents.each_ref().map(Option::is_some);
        for (parent, gradient) in ops.parents.into_iter().zip((ops.state.0)(upstream, wanted)) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                gradients.register::<B>(parent.id, gradient);
            }
        }
    }
}

/// Puts a result on the autodiff device: as a node if a parent is tracked, else as a constant.
///
/// What comes to `backward` has the dtype of the result; what it gives is brought to that of the parent.
fn record<B: Backward, const N: usize, const D: usize>(
    parents: [Parent; N],
    result: Tensor<D>,
    backward: impl Fn(Tensor<D>, [bool; N]) -> [Option<Gradient<B>>; N] + Send + Sync + 'static,
) -> Tensor<D>
where
    DispatchTensor: Convertible<B>,
{
    if parents.iter().all(|parent| !parent.tracked) {
        return Tensor::from_inner(result);
    }
    let dtypes = parents.each_ref().map(|parent| parent.dtype);
    let function = move |upstream, wanted| {
        let mut gradients = backward(Tensor::from_primitive::<B>(upstream), wanted);
        for (gradient, dtype) in gradients.iter_mut().zip(dtypes) {
            *gradient = gradient.take().map(|gradient| in_dtype::<B>(gradient, dtype));
        }
        gradients
    };
    let prepared = Step::<B, N>::prepare::<NoCheckpointing>(Node, parents.map(|parent| parent.guard));
    let result = gradient::<B, D>(result);
    let node = match prepared.compute_bound().stateful() {
        OpsKind::Tracked(prepared) => prepared.finish(Kept(Arc::new(function)), result),
        OpsKind::UnTracked(prepared) => prepared.finish(result),
    };
    Tensor::from_primitive::<Autodiff<B>>(node)
}

/// [`record`] where a last parent may be missing.
fn record_with<B: Backward, const D: usize>(
    parents: [Parent; 2],
    last: Option<Parent>,
    result: Tensor<D>,
    backward: impl Fn(Tensor<D>, [bool; 3]) -> [Option<Gradient<B>>; 3] + Send + Sync + 'static,
) -> Tensor<D>
where
    DispatchTensor: Convertible<B>,
{
    let [first, second] = parents;
    match last {
        Some(last) => record([first, second, last], result, backward),
        None => record([first, second], result, move |grad, [wants_first, wants_second]| {
            let [first, second, _] = backward(grad, [wants_first, wants_second, false]);
            [first, second]
        }),
    }
}

fn in_dtype<B: Backward>(tensor: Gradient<B>, dtype: DType) -> Gradient<B>
where
    DispatchTensor: Convertible<B>,
{
    if burn::backend::TensorMetadata::dtype(&tensor) == dtype { tensor } else { B::convert(tensor, dtype) }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;

    use crate::{
        gelu, linear, split,
        testing::{assert_close_tensors, device, input, taken_by_kernels},
    };

    fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().try_into_vec_as::<f32>().unwrap()
    }

    fn tracked<const D: usize>(shape: [usize; D], seed: usize) -> Tensor<D> {
        Tensor::from_inner(input(shape, seed)).require_grad()
    }

    #[test]
    fn gradients_of_one_tensor_in_two_places_are_added() {
        let (x, weight): (Tensor<2>, Tensor<2>) = (tracked([3, 4], 1), Tensor::from_inner(input([4, 4], 2)));
        let layer = || linear(x.clone(), weight.clone(), None);
        let twice = x.grad(&(layer() + layer()).sum().backward()).unwrap();
        let once = x.grad(&layer().sum().backward()).unwrap();
        assert_eq!(values(twice), values(once * 2.0));
    }

    #[test]
    fn tensors_of_the_plain_device_are_constants() {
        let (x, weight): (Tensor<2>, Tensor<2>) = (tracked([3, 4], 1), input([4, 4], 2));
        let gradient = |y: Tensor<2>| (values(y.clone().inner()), values(x.grad(&y.sum().backward()).unwrap()));
        let constant = linear(x.clone(), Tensor::from_inner(weight.clone()), None);
        assert_eq!(gradient(linear(x.clone(), weight, None)), gradient(constant));
    }

    #[test]
    fn graphs_that_checkpoint_are_left_to_burn() {
        let x: Tensor<2> = input([3, 4], 1);
        let checkpointed =
            Tensor::<2>::from_data(x.to_data(), &device().autodiff().gradient_checkpointing()).require_grad();
        let (y, taken) = taken_by_kernels(|| gelu(checkpointed));
        assert_eq!(taken, 0);
        assert_close_tensors(&y.inner(), &gelu(x), 1e-6);
    }

    #[test]
    fn a_tensor_that_is_split_twice_has_the_sum_of_both_gradients() {
        let x: Tensor<3> = tracked([2, 3, 4], 1);
        let [first, _] = split(x.clone(), 2, [1, 3]);
        let [_, second] = split(x.clone(), 1, [1, 2]);
        let gradient = x.grad(&(first.sum() * 2.0 + second.sum()).backward()).unwrap();
        let expected: Vec<f32> =
            (0..24).map(|i| if i % 4 == 0 { 2.0 } else { 0.0 } + if i / 4 % 3 > 0 { 1.0 } else { 0.0 }).collect();
        assert_eq!(values(gradient), expected);
    }
}
