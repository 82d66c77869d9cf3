//! Kernels on the autodiff device: tracked tensors -> the kernel's result, recorded with its backward pass.
//!
//! Tensors are taken apart into plain ones, the plain kernels run on those, and the result becomes a node of the graph
//! with a function from its gradient to the gradients of its parents. Gradients of parents that nobody tracks are not
//! computed. What a kernel does not take is left to burn's own operations, which are differentiable everywhere.

mod attention;
mod conv;
mod elementwise;
mod join;
mod linear;
mod linear_bf16;
mod norm;
mod sums;

use std::{fmt, sync::Arc};

use burn::{
    backend::{
        Autodiff, DispatchDevice, Flex,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::NoCheckpointing},
            grads::Gradients,
            ops::{Backward, NodeGuard, Ops, OpsKind},
        },
    },
    tensor::{Bytes, DType, Tensor},
};
use burn_flex::{FlexTensor, Layout};
use half::bf16;

use super::{
    join::in_one_piece,
    stored::{narrow, widen},
};

pub(super) use attention::attention;
pub(super) use conv::{conv2d, upsample_conv2d};
pub(super) use elementwise::{activate, activate_times, gated_residual, rotate};
pub(super) use join::{cat, split};
pub(super) use linear::linear;
pub(super) use norm::{affine_layer_norm, group_norm, layer_norm, modulated_layer_norm, rms_norm};

/// Whether a tensor is on the autodiff device.
pub(super) fn is_autodiff<const D: usize>(tensor: &Tensor<D>) -> bool {
    matches!(tensor.device().as_dispatch(), DispatchDevice::Autodiff(_))
}

/// A tensor of the autodiff device, of f32 or bf16, taken apart.
struct Operand<const D: usize> {
    /// Its values, on the plain device.
    value: Tensor<D>,
    dtype: DType,
    guard: NodeGuard,
    tracked: bool,
}

impl<const D: usize> Operand<D> {
    /// `None` for other dtypes, devices, and graphs that checkpoint. A tensor of the plain device is a constant.
    fn of(tensor: &Tensor<D>) -> Option<Self> {
        let dtype = tensor.dtype();
        let is_plain = matches!(tensor.device().as_dispatch(), DispatchDevice::Flex(_));
        if ![DType::F32, DType::BF16].contains(&dtype) || !(is_plain || is_autodiff(tensor)) {
            return None;
        }
        let tensor = if is_plain { Tensor::from_inner(tensor.clone()) } else { tensor.clone() };
        let tensor = tensor.try_into_primitive::<Autodiff<Flex>>().ok()?;
        let tracked = tensor.is_tracked();
        let (value, guard) = tensor.into_parts();
        Some(Self { value: Tensor::from_primitive::<Flex>(value), dtype, guard, tracked })
    }

    /// The same with its values in f32.
    fn widened(self) -> Self {
        Self { value: in_dtype(self.value, DType::F32), ..self }
    }
}

/// A plain tensor of f32 or bf16 in the other of these, or as it is.
fn in_dtype<const D: usize>(tensor: Tensor<D>, dtype: DType) -> Tensor<D> {
    if tensor.dtype() == dtype {
        return tensor;
    }
    Tensor::from_primitive::<Flex>(converted(gradient(tensor), dtype))
}

/// [`in_dtype`] for any rank, with all threads.
fn converted(tensor: FlexTensor, dtype: DType) -> FlexTensor {
    if tensor.dtype() == dtype {
        return tensor;
    }
    let tensor = in_one_piece(tensor);
    let (layout, shape) = (tensor.layout(), tensor.layout().shape().clone());
    let values = layout.start_offset()..layout.start_offset() + shape.num_elements();
    let bytes = match dtype {
        DType::BF16 => Bytes::from_elems(narrow::<bf16>(&tensor.storage::<f32>()[values])),
        _ => Bytes::from_elems(widen(&tensor.storage::<bf16>()[values])),
    };
    FlexTensor::new(bytes, Layout::contiguous(shape), dtype)
}

/// A parent of a node, as [`record`] takes it.
struct Parent {
    guard: NodeGuard,
    tracked: bool,
    /// Of the parent, and so of its gradient.
    dtype: DType,
}

/// A gradient of any rank.
type Gradient = FlexTensor;

fn gradient<const D: usize>(tensor: Tensor<D>) -> Gradient {
    let Ok(primitive) = tensor.try_into_primitive::<Flex>() else { unreachable!("a gradient is a plain tensor") };
    primitive
}

/// What [`record`] keeps: the gradient of the result and whose gradients are wanted -> those gradients.
type Function<const N: usize> = dyn Fn(Gradient, [bool; N]) -> [Option<Gradient>; N] + Send + Sync;

/// A backward function that the graph can hold.
struct Kept<const N: usize>(Arc<Function<N>>);

impl<const N: usize> Clone for Kept<N> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<const N: usize> fmt::Debug for Kept<N> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "backward function of {N} parents")
    }
}

/// A node of the graph whose backward pass is its state.
#[derive(Debug)]
struct Node;

impl<const N: usize> Backward<Flex, N> for Node {
    type State = Kept<N>;

    fn backward(self, ops: Ops<Self::State, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let upstream = gradients.consume::<Flex>(&ops.node);
        let wanted = ops.parents.each_ref().map(Option::is_some);
        for (parent, gradient) in ops.parents.into_iter().zip((ops.state.0)(upstream, wanted)) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                gradients.register::<Flex>(parent.id, gradient);
            }
        }
    }
}

/// Puts a result on the autodiff device, in the dtype of the first parent: as a node if a parent is tracked, else as a
/// constant.
///
/// What comes to `backward` has the dtype of the result; what it gives, f32 or bf16, is brought to that of the parent.
fn record<const N: usize, const D: usize>(
    parents: [Parent; N],
    result: Tensor<D>,
    backward: impl Fn(Tensor<D>, [bool; N]) -> [Option<Gradient>; N] + Send + Sync + 'static,
) -> Tensor<D> {
    let result = in_dtype(result, parents[0].dtype);
    if parents.iter().all(|parent| !parent.tracked) {
        return Tensor::from_inner(result);
    }
    let dtypes = parents.each_ref().map(|parent| parent.dtype);
    let function = move |upstream, wanted| {
        let mut gradients = backward(Tensor::from_primitive::<Flex>(upstream), wanted);
        for (gradient, dtype) in gradients.iter_mut().zip(dtypes) {
            *gradient = gradient.take().map(|gradient| converted(gradient, dtype));
        }
        gradients
    };
    let prepared = Backward::<Flex, N>::prepare::<NoCheckpointing>(Node, parents.map(|parent| parent.guard));
    let result = gradient(result);
    let node = match prepared.compute_bound().stateful() {
        OpsKind::Tracked(prepared) => prepared.finish(Kept(Arc::new(function)), result),
        OpsKind::UnTracked(prepared) => prepared.finish(result),
    };
    Tensor::from_primitive::<Autodiff<Flex>>(node)
}

/// The parents of a node as [`record`] takes them.
macro_rules! parents {
    ($($operand:ident),*) => {
        [$(Parent { guard: $operand.guard, tracked: $operand.tracked, dtype: $operand.dtype }),*]
    };
}
use parents;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        kernels::Level,
        testing::{cpu, limit_cpu, ramp, relative_drift},
    };

    fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().try_into_vec_as::<f32>().unwrap()
    }

    /// Slopes of a result, which bf16 has.
    fn slopes<const D: usize>(shape: [usize; D]) -> Tensor<D> {
        ramp(shape, 77).cast(DType::BF16).cast(DType::F32)
    }

    /// The result and the gradients of the inputs that are tracked.
    fn run<const N: usize, const D: usize>(
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
        let weights = Tensor::from_inner(slopes(result.dims())).cast(result.dtype());
        if tracked == [false; N] {
            return (values(result.inner()), vec![]);
        }
        let mut gradients = (result.clone() * weights).sum().backward();
        let gradient = |(input, tracked): (&Tensor<3>, bool)| match tracked {
            true => input.grad_remove(&mut gradients).map(values),
            false => None,
        };
        (values(result.inner()), inputs.iter().zip(tracked).map(gradient).collect())
    }

    /// Compares a kernel on the autodiff device with the plain formulation and with finite differences.
    ///
    /// All inputs are tracked, then all but one, then none, at every level; a second run has the same bits. Then all again
    /// in bf16.
    pub(super) fn check<const N: usize, const D: usize>(
        shapes: [[usize; 3]; N],
        fast: impl Fn([Tensor<3>; N]) -> Tensor<D>,
        plain: impl Fn([Tensor<3>; N]) -> Tensor<D>,
    ) {
        let mut seed = 0;
        let inputs = shapes.map(|shape| {
            seed += 1;
            ramp(shape, seed) + 0.05
        });
        let (expected, expected_gradients) = run(&inputs, [true; N], &plain);
        for level in Level::available() {
            limit_cpu(level);
            for frozen in 0..N + 2 {
                let tracked = std::array::from_fn(|i| i != frozen && frozen != N + 1);
                let (result, gradients) = run(&inputs, tracked, &fast);
                let what = format!("{level:?}, {shapes:?}, tracked {tracked:?}");
                assert!(relative_drift(&result, &expected) < 5e-6, "{what}: result");
                for (i, (gradient, expected)) in gradients.iter().zip(&expected_gradients).enumerate() {
                    assert_eq!(gradient.is_some(), tracked[i], "{what}: input {i}");
                    if let (Some(gradient), Some(expected)) = (gradient, expected) {
                        let drift = scaled_drift(gradient, expected);
                        assert!(drift < 2e-5, "{what}: drift {drift:e} of the gradient of input {i}");
                    }
                }
                assert_eq!((result, gradients), run(&inputs, tracked, &fast), "{what}: a second run");
            }
            check_bf16(level, &inputs, &fast);
            limit_cpu(Level::Avx512);
        }
        differences(&inputs, &fast, &expected_gradients);
    }

    /// Compares a kernel on tensors of bf16 with itself on the same numbers in f32.
    fn check_bf16<const N: usize, const D: usize>(
        level: Level,
        inputs: &[Tensor<3>; N],
        fast: &impl Fn([Tensor<3>; N]) -> Tensor<D>,
    ) {
        let rounded = inputs.each_ref().map(|input| input.clone().cast(DType::BF16));
        let (expected, expected_gradients) =
            run(&rounded.each_ref().map(|input| input.clone().cast(DType::F32)), [true; N], fast);
        let (result, gradients) = run(&rounded, [true; N], fast);
        let drift = relative_drift(&result, &expected);
        assert!(drift < 1e-2, "{level:?}, bf16: drift {drift:e} of the result");
        for (i, (gradient, expected)) in gradients.iter().zip(&expected_gradients).enumerate() {
            let drift = scaled_drift(gradient.as_ref().unwrap(), expected.as_ref().unwrap());
            assert!(drift < 2e-2, "{level:?}, bf16: drift {drift:e} of the gradient of input {i}");
        }
    }

    /// A drift relative to the largest value, or to one thousandth where all values are rounding.
    fn scaled_drift(actual: &[f32], expected: &[f32]) -> f32 {
        let largest = expected.iter().fold(1e-30f32, |largest, value| largest.max(value.abs()));
        relative_drift(actual, expected) * (largest / largest.max(0.05))
    }

    /// Central finite differences at some of the elements of every input.
    fn differences<const N: usize, const D: usize>(
        inputs: &[Tensor<3>; N],
        function: &impl Fn([Tensor<3>; N]) -> Tensor<D>,
        expected: &[Option<Vec<f32>>],
    ) {
        const STEP: f32 = 4e-3;
        let loss = |inputs: &[Tensor<3>; N]| {
            let result = function(inputs.each_ref().map(|input| Tensor::from_inner(input.clone()))).inner();
            let weights = values(slopes(result.dims()));
            values(result).into_iter().zip(weights).map(|(y, w)| f64::from(y) * f64::from(w)).sum::<f64>()
        };
        for (i, expected) in expected.iter().enumerate() {
            let expected = expected.as_ref().unwrap();
            let largest = expected.iter().fold(0.1f32, |largest, value| largest.max(value.abs()));
            for at in (0..expected.len()).step_by(expected.len() / 3 + 1) {
                let moved = |step: f32| {
                    let mut inputs = inputs.clone();
                    let shape = inputs[i].dims();
                    let mut data = values(inputs[i].clone());
                    data[at] += step;
                    inputs[i] = Tensor::from_data(burn::tensor::TensorData::new(data, shape), &cpu());
                    loss(&inputs)
                };
                let difference = (moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP);
                let error = (difference - f64::from(expected[at])).abs() / f64::from(largest);
                assert!(error < 2e-2, "input {i}, element {at}: {difference}, not {}", expected[at]);
            }
        }
    }

    #[test]
    fn gradients_of_one_tensor_in_two_places_are_added() {
        let x: Tensor<2> = Tensor::from_inner(ramp([3, 4], 1)).require_grad();
        let weight: Tensor<2> = Tensor::from_inner(ramp([4, 4], 2));
        let y = linear(&x, &weight, None).unwrap() + linear(&x, &weight, None).unwrap();
        let twice = x.grad(&y.sum().backward()).unwrap();
        let once = x.grad(&linear(&x, &weight, None).unwrap().sum().backward()).unwrap();
        assert_eq!(values(twice), values(once * 2.0));
    }

    #[test]
    fn other_tensors_are_left_to_the_plain_formulation() {
        let weight: Tensor<2> = ramp([4, 4], 2);
        let half = Tensor::<2>::from_inner(weight.clone()).cast(DType::F16).require_grad();
        assert!(linear(&half, &half, None).is_none());
    }

    #[test]
    fn tensors_of_the_plain_device_are_constants() {
        let x: Tensor<2> = Tensor::from_inner(ramp([3, 4], 1)).require_grad();
        let weight: Tensor<2> = ramp([4, 4], 2);
        let gradient = |y: Tensor<2>| (values(y.clone().inner()), values(x.grad(&y.sum().backward()).unwrap()));
        let constant = linear(&x, &Tensor::from_inner(weight.clone()), None).unwrap();
        assert_eq!(gradient(linear(&x, &weight, None).unwrap()), gradient(constant));
    }
}
