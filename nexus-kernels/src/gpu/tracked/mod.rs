//! Kernels of GPUs on the autodiff device: tracked tensors -> the kernel's result, recorded with its backward pass.

mod attention;
mod conv;
mod elementwise;
mod matmul;
mod norm;
mod sums;

use burn::{
    backend::{DispatchDevice, ops::FloatTensorOps},
    tensor::{DType, Tensor},
};
use burn_cubecl::Cube;

use crate::graph::{self, Graphed, parents, record};

pub(super) use attention::attention;
pub(super) use conv::conv2d;
pub(super) use elementwise::{activate, activate_times, gated_residual, rotate};
pub(super) use matmul::product;
pub(super) use norm::normalize;

/// A tensor of the autodiff device taken apart.
type Operand<const D: usize> = graph::Operand<Cube, D>;

/// A gradient of any rank.
type Gradient = graph::Gradient<Cube>;

fn gradient<const D: usize>(tensor: Tensor<D>) -> Gradient {
    graph::gradient::<Cube, D>(tensor)
}

/// [`graph::split`] of tensors of a GPU.
pub(crate) fn split<const D: usize, const N: usize>(
    x: &Tensor<D>,
    dim: usize,
    sizes: [usize; N],
) -> Option<[Tensor<D>; N]> {
    graph::split::<Cube, D, N>(x, dim, sizes)
}

impl Graphed for Cube {
    const DTYPES: &'static [DType] = &[DType::F32, DType::BF16, DType::F16];

    fn owns(device: &DispatchDevice) -> bool {
        matches!(device, DispatchDevice::Cube(_))
    }

    fn converted(tensor: Gradient, dtype: DType) -> Gradient {
        Cube::float_cast(tensor, dtype.into())
    }

    fn joined(tensors: Vec<Gradient>, dim: usize) -> Gradient {
        Cube::float_cat(tensors, dim)
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        graph::tests::{run, scaled_drift},
        testing::{cpu, device, input, relative_drift},
    };

    use super::*;

    /// Compares a kernel on the autodiff device with burn's formulation on the CPU: all inputs are tracked, then all but one,
    /// then none. Then all in half precision, with itself on the same numbers in f32.
    pub(super) fn check<const N: usize, const D: usize>(
        shapes: [[usize; 3]; N],
        fast: impl Fn([Tensor<3>; N]) -> Option<Tensor<D>>,
        plain: impl Fn([Tensor<3>; N]) -> Tensor<D>,
    ) {
        if device() == cpu() {
            return;
        }
        let mut seed = 0;
        let inputs = shapes.map(|shape| {
            seed += 1;
            input(shape, seed) + 0.05
        });
        let on_cpu = inputs.each_ref().map(|input| input.clone().to_device(&cpu()));
        let (expected, expected_gradients) = run(&on_cpu, [true; N], &plain);
        let fast = |tensors| fast(tensors).expect("a kernel for these tensors");
        for frozen in 0..N + 2 {
            let tracked = std::array::from_fn(|i| i != frozen && frozen != N + 1);
            let (result, gradients) = run(&inputs, tracked, &fast);
            let what = format!("{shapes:?}, tracked {tracked:?}");
            let drift = relative_drift(&result, &expected);
            assert!(drift < 2e-5, "{what}: drift {drift:e} of the result");
            compare(&gradients, tracked, &expected_gradients, 5e-5, &what);
        }
        for dtype in [DType::BF16, DType::F16] {
            if !device().supports_dtype(dtype) {
                continue;
            }
            let rounded = inputs.each_ref().map(|input| input.clone().cast(dtype));
            let wide = rounded.each_ref().map(|input| input.clone().cast(DType::F32));
            let (expected, expected_gradients) = run(&wide, [true; N], &fast);
            let (result, gradients) = run(&rounded, [true; N], &fast);
            let what = format!("{shapes:?}, {dtype:?}");
            let drift = relative_drift(&result, &expected);
            assert!(drift < 1e-2, "{what}: drift {drift:e} of the result");
            compare(&gradients, [true; N], &expected_gradients, 2e-2, &what);
        }
    }

    fn compare<const N: usize>(
        gradients: &[Option<Vec<f32>>],
        tracked: [bool; N],
        expected: &[Option<Vec<f32>>],
        tolerance: f32,
        what: &str,
    ) {
        for (i, (gradient, expected)) in gradients.iter().zip(expected).enumerate() {
            assert_eq!(gradient.is_some(), tracked[i], "{what}: gradient of input {i}");
            if let (Some(gradient), Some(expected)) = (gradient, expected) {
                let drift = scaled_drift(gradient, expected);
                assert!(drift < tolerance, "{what}: drift {drift:e} of the gradient of input {i}");
            }
        }
    }

    #[test]
    fn gradients_of_parts_are_joined() {
        let mix = |[first, second, _]: [Tensor<3>; 3]| first.sum_dim(1) * second.clone() + second;
        check(
            [[2, 7, 5]],
            |[x]| split(&x, 1, [1, 1, 5]).map(mix),
            |[x]| mix([(0, 1), (1, 1), (2, 5)].map(|(start, len)| x.clone().narrow(1, start, len))),
        );
    }

    #[test]
    fn gradients_of_one_tensor_in_two_places_are_added() {
        if device() == cpu() {
            return;
        }
        let x: Tensor<3> = Tensor::from_inner(input([1, 3, 4], 1)).require_grad();
        let weight: Tensor<3> = Tensor::from_inner(input([1, 4, 4], 2));
        let gradient = |y: Tensor<3>| crate::graph::tests::values(x.grad(&y.sum().backward()).unwrap());
        let times = || product(&x, &weight).unwrap();
        let twice = gradient(times() + times());
        assert_eq!(twice, gradient(times() * 2.0));
    }
}
