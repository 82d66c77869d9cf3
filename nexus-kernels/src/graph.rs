//! Kernels in the graph of autodiff: tracked tensors -> plain ones -> a result, recorded with its backward pass.
//!
//! Tensors are taken apart into plain ones, the plain kernels run on those, and the result becomes a node of the graph
//! with a function from its gradient to the gradients of its parents. Gradients of parents that nobody tracks are not
//! computed. What a kernel does not take is left to burn's own operations, which are differentiable everywhere.

mod split;

use std::{fmt, sync::Arc};

use burn::{
    backend::{
        Autodiff, Backend, DispatchDevice, DispatchKindConversion, DispatchTensor,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::NoCheckpointing},
            grads::Gradients,
            ops::{Backward, NodeGuard, Ops, OpsKind},
        },
    },
    tensor::{DType, Tensor},
};

pub(crate) use split::split;

/// A backend whose kernels have backward passes.
pub(crate) trait Graphed: Backend {
    /// Dtypes of tensors that are taken apart.
    const DTYPES: &'static [DType];

    /// Whether tensors of a device are this backend's.
    fn owns(device: &DispatchDevice) -> bool;

    /// The same values in another dtype.
    fn converted(tensor: Gradient<Self>, dtype: DType) -> Gradient<Self>;

    /// Tensors that differ in one dimension at most, one behind the other along it.
    fn joined(tensors: Vec<Gradient<Self>>, dim: usize) -> Gradient<Self>;
}

/// A plain tensor of any rank.
pub(crate) type Gradient<B> = <B as burn::backend::BackendTypes>::FloatTensorPrimitive;

/// Tensors of a backend and tracked ones of it can be taken out of burn's and put back.
pub(crate) trait Convertible<B: Graphed>:
    DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B>>
{
}

impl<B: Graphed, T: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B>>> Convertible<B> for T {}

/// Whether a tensor is on an autodiff device.
pub(crate) fn is_autodiff<const D: usize>(tensor: &Tensor<D>) -> bool {
    matches!(tensor.device().as_dispatch(), DispatchDevice::Autodiff(_))
}

/// A tensor of the autodiff device taken apart.
pub(crate) struct Operand<B: Graphed, const D: usize> {
    /// Its values, on the plain device.
    pub(crate) value: Tensor<D>,
    pub(crate) dtype: DType,
    pub(crate) tracked: bool,
    guard: NodeGuard,
    backend: std::marker::PhantomData<B>,
}

impl<B: Graphed, const D: usize> Operand<B, D>
where
    DispatchTensor: Convertible<B>,
{
    /// `None` for dtypes and devices that are not the backend's, and graphs that checkpoint. A tensor of the plain device is a
    /// constant.
    pub(crate) fn of(tensor: &Tensor<D>) -> Option<Self> {
        let dtype = tensor.dtype();
        let is_plain = B::owns(tensor.device().as_dispatch());
        if !B::DTYPES.contains(&dtype) || !(is_plain || is_autodiff(tensor)) {
            return None;
        }
        let tensor = if is_plain { Tensor::from_inner(tensor.clone()) } else { tensor.clone() };
        let tensor = tensor.try_into_primitive::<Autodiff<B>>().ok()?;
        let tracked = tensor.is_tracked();
        let (value, guard) = tensor.into_parts();
        Some(Self { value: Tensor::from_primitive::<B>(value), dtype, tracked, guard, backend: Default::default() })
    }
}

/// A parent of a node, as [`record`] takes it.
pub(crate) struct Parent<B: Graphed> {
    guard: NodeGuard,
    tracked: bool,
    /// Of the parent, and so of its gradient.
    dtype: DType,
    backend: std::marker::PhantomData<B>,
}

impl<B: Graphed, const D: usize> From<Operand<B, D>> for Parent<B> {
    fn from(operand: Operand<B, D>) -> Self {
        let Operand { dtype, tracked, guard, backend, .. } = operand;
        Self { guard, tracked, dtype, backend }
    }
}

/// The parents of a node as [`record`] takes them.
macro_rules! parents {
    ($($operand:ident),*) => {
        [$($crate::graph::Parent::from($operand)),*]
    };
}
pub(crate) use parents;

/// A plain tensor as a gradient.
pub(crate) fn gradient<B: Graphed, const D: usize>(tensor: Tensor<D>) -> Gradient<B>
where
    DispatchTensor: Convertible<B>,
{
    tensor.try_into_primitive::<B>().unwrap_or_else(|_| unreachable!("a gradient is a plain tensor"))
}

/// What [`record`] keeps: the gradient of the result and whose gradients are wanted -> those gradients.
type Function<B, const N: usize> = dyn Fn(Gradient<B>, [bool; N]) -> [Option<Gradient<B>>; N] + Send + Sync;

/// A backward function that the graph can hold.
struct Kept<B: Graphed, const N: usize>(Arc<Function<B, N>>);

impl<B: Graphed, const N: usize> Clone for Kept<B, N> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B: Graphed, const N: usize> fmt::Debug for Kept<B, N> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "backward function of {N} parents")
    }
}

/// A node of the graph whose backward pass is its state.
#[derive(Debug)]
struct Node;

impl<B: Graphed, const N: usize> Backward<B, N> for Node {
    type State = Kept<B, N>;

    fn backward(self, ops: Ops<Self::State, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let upstream = gradients.consume::<B>(&ops.node);
        let wanted = ops.parents.each_ref().map(Option::is_some);
        for (parent, gradient) in ops.parents.into_iter().zip((ops.state.0)(upstream, wanted)) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                gradients.register::<B>(parent.id, gradient);
            }
        }
    }
}

/// Puts a result on the autodiff device, in the dtype of the first parent: as a node if a parent is tracked, else as a
/// constant.
///
/// What comes to `backward` has the dtype of the result; what it gives is brought to that of the parent.
pub(crate) fn record<B: Graphed, const N: usize, const D: usize>(
    parents: [Parent<B>; N],
    result: Tensor<D>,
    backward: impl Fn(Tensor<D>, [bool; N]) -> [Option<Gradient<B>>; N] + Send + Sync + 'static,
) -> Tensor<D>
where
    DispatchTensor: Convertible<B>,
{
    let result = in_dtype::<B, D>(result, parents[0].dtype);
    if parents.iter().all(|parent| !parent.tracked) {
        return Tensor::from_inner(result);
    }
    let dtypes = parents.each_ref().map(|parent| parent.dtype);
    let function = move |upstream, wanted| {
        let mut gradients = backward(Tensor::from_primitive::<B>(upstream), wanted);
        for (gradient, dtype) in gradients.iter_mut().zip(dtypes) {
            *gradient = gradient.take().map(|gradient| B::converted(gradient, dtype));
        }
        gradients
    };
    let prepared = Backward::<B, N>::prepare::<NoCheckpointing>(Node, parents.map(|parent| parent.guard));
    let result = gradient::<B, D>(result);
    let node = match prepared.compute_bound().stateful() {
        OpsKind::Tracked(prepared) => prepared.finish(Kept(Arc::new(function)), result),
        OpsKind::UnTracked(prepared) => prepared.finish(result),
    };
    Tensor::from_primitive::<Autodiff<B>>(node)
}

/// [`record`] for factors of a tensor and addends, which there may be or not.
pub(crate) fn record_affine<B: Graphed, const D: usize, const F: usize, const A: usize>(
    x: Operand<B, D>,
    factors: Operand<B, F>,
    addends: Option<Operand<B, A>>,
    result: Tensor<D>,
    backward: impl Fn(Tensor<D>, [bool; 3]) -> [Option<Gradient<B>>; 3] + Send + Sync + 'static,
) -> Tensor<D>
where
    DispatchTensor: Convertible<B>,
{
    match addends {
        Some(addends) => record(parents![x, factors, addends], result, backward),
        None => record(parents![x, factors], result, move |upstream, [of_x, of_factors]| {
            let [x, factors, _] = backward(upstream, [of_x, of_factors, false]);
            [x, factors]
        }),
    }
}

/// A plain tensor in another dtype, or as it is.
pub(crate) fn in_dtype<B: Graphed, const D: usize>(tensor: Tensor<D>, dtype: DType) -> Tensor<D>
where
    DispatchTensor: Convertible<B>,
{
    if tensor.dtype() == dtype {
        return tensor;
    }
    Tensor::from_primitive::<B>(B::converted(gradient::<B, D>(tensor), dtype))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::testing::{ramp, relative_drift};

    pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().try_into_vec_as::<f32>().unwrap()
    }

    /// Slopes of a result, which bf16 has.
    pub(crate) fn slopes<const D: usize>(shape: [usize; D]) -> Tensor<D> {
        ramp(shape, 77).cast(DType::BF16).cast(DType::F32)
    }

    /// The result and the gradients of the inputs that are tracked.
    pub(crate) fn run<const N: usize, const D: usize>(
        inputs: &[Tensor<3>; N],
        tracked: [bool; N],
        function: &impl Fn([Tensor<3>; N]) -> Tensor<D>,
    ) -> (Vec<f32>, Vec<Option<Vec<f32>>>) {
        let mut index = 0;
        let inputs = inputs.each_ref().map(|input| {
            let input = Tensor::from_inner(input.clone());
            index += 1;
            if tracked[index - 1] { input.require_grad() } else { input }
        });
        let result = function(inputs.clone());
        if tracked == [false; N] {
            return (values(result.inner()), vec![]);
        }
        let plain = result.clone().inner();
        let weights = slopes(result.dims()).to_device(&plain.device()).cast(plain.dtype());
        let mut gradients = (result * Tensor::from_inner(weights)).sum().backward();
        let gradient = |(input, tracked): (&Tensor<3>, bool)| match tracked {
            true => input.grad_remove(&mut gradients).map(values),
            false => None,
        };
        (values(plain), inputs.iter().zip(tracked).map(gradient).collect())
    }

    /// A drift relative to the largest value, or to one twentieth where all values are rounding.
    pub(crate) fn scaled_drift(actual: &[f32], expected: &[f32]) -> f32 {
        let largest = expected.iter().fold(1e-30f32, |largest, value| largest.max(value.abs()));
        relative_drift(actual, expected) * (largest / largest.max(0.05))
    }
}
