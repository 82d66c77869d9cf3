//! Kernels of the CPU on the autodiff device: tracked tensors -> the kernel's result, recorded with its backward pass.

mod attention;
mod conv;
mod elementwise;
mod join;
mod linear;
mod linear_bf16;
mod norm;
mod sums;

use burn::{
    backend::{DispatchDevice, Flex},
    tensor::{Bytes, DType, Tensor},
};
use burn_flex::{FlexTensor, Layout};
use half::bf16;

use super::{
    join::{in_one_piece, joined},
    stored::{narrow, widen},
};
use crate::graph::{self, Graphed, parents, record};

pub(super) use crate::graph::is_autodiff;
pub(super) use attention::attention;
pub(super) use conv::{conv2d, upsample_conv2d};
pub(super) use elementwise::{activate, activate_times, gated_residual, rotate};
pub(super) use join::cat;
pub(super) use linear::linear;
pub(super) use norm::{affine_layer_norm, group_norm, layer_norm, modulated_layer_norm, rms_norm};

/// A tensor of the autodiff device, of f32 or bf16, taken apart.
type Operand<const D: usize> = graph::Operand<Flex, D>;

impl<const D: usize> Operand<D> {
    /// The same with its values in f32.
    fn widened(mut self) -> Self {
        self.value = in_dtype(self.value.clone(), DType::F32);
        self
    }
}

/// A gradient of any rank.
type Gradient = graph::Gradient<Flex>;

fn gradient<const D: usize>(tensor: Tensor<D>) -> Gradient {
    graph::gradient::<Flex, D>(tensor)
}

/// A plain tensor of f32 or bf16 in the other of these, or as it is.
fn in_dtype<const D: usize>(tensor: Tensor<D>, dtype: DType) -> Tensor<D> {
    graph::in_dtype::<Flex, D>(tensor, dtype)
}

impl Graphed for Flex {
    const DTYPES: &'static [DType] = &[DType::F32, DType::BF16];

    fn owns(device: &DispatchDevice) -> bool {
        matches!(device, DispatchDevice::Flex(_))
    }

    /// With all threads.
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

    /// With all threads.
    fn joined(tensors: Vec<FlexTensor>, dim: usize) -> FlexTensor {
        let joined = joined(&tensors.iter().collect::<Vec<_>>(), dim);
        joined.unwrap_or_else(|| unreachable!("gradients of one dtype, of parts of one tensor"))
    }
}

/// [`graph::split`] of tensors of the CPU.
pub(crate) fn split<const D: usize, const N: usize>(
    x: &Tensor<D>,
    dim: usize,
    sizes: [usize; N],
) -> Option<[Tensor<D>; N]> {
    graph::split::<Flex, D, N>(x, dim, sizes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cpu::Level,
        graph::tests::{run, scaled_drift, slopes, values},
        testing::{cpu, limit_cpu, ramp, relative_drift},
    };

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
