//! Activations, gated products, gated residuals and rotations with their backward passes.

use burn::tensor::Tensor;
use burn_cubecl::cubecl::{
    self, calculate_cube_count_elemwise,
    ir::ElemType,
    prelude::{Tensor as Buffer, *},
};

use super::{
    super::{contiguous, cube, element, elementwise as forward, empty_like, rows::Rows, tensor},
    Gradient, gradient,
    sums::{Factor, sums},
};
use crate::activation::Function;

const TWO_SQRT_2_OVER_PI: f32 = 1.595_769;
const DENSITY_AT_ZERO: f32 = 0.398_942_3;

/// Gradients of the input of an activation, and of the factor that its result is multiplied by, if there is one; `None` for
/// tensors that are not for these kernels.
pub(super) fn activate<const D: usize>(
    function: Function,
    x: &Tensor<D>,
    up: Option<&Tensor<D>>,
    grad: &Tensor<D>,
) -> Option<[Option<Tensor<D>>; 2]> {
    let alike = |other: &Tensor<D>| other.dims() == x.dims() && other.dtype() == x.dtype();
    if !alike(grad) || up.is_some_and(|up| !alike(up)) {
        return None;
    }
    let (x_rows, factor) = (Rows::of(cube(x)?), Rows::of(cube(up.unwrap_or(x))?));
    let grad = contiguous(grad)?;
    let vector = x_rows.vector().min(factor.vector());
    let client = grad.client.clone();
    // A kernel has all its outputs; the second of these is not written without a factor.
    let shapes = [x.shape(), if up.is_some() { x.shape() } else { [vector].into() }];
    let outputs = shapes.map(|shape| empty_like(&grad, shape, x.dtype()));
    let total = x_rows.count * x_rows.width / vector;
    let cube_dim = CubeDim::new(&client, total);
    derivative_kernel::launch(
        &client,
        calculate_cube_count_elemwise(&client, total, cube_dim),
        cube_dim,
        vector,
        x_rows.tensor.into_tensor_arg(),
        factor.tensor.into_tensor_arg(),
        grad.into_tensor_arg(),
        outputs[0].clone().into_tensor_arg(),
        outputs[1].clone().into_tensor_arg(),
        total,
        x_rows.width / vector,
        x_rows.inner,
        x_rows.inner_stride / vector,
        x_rows.outer_stride / vector,
        factor.inner,
        factor.inner_stride / vector,
        factor.outer_stride / vector,
        function,
        up.is_some(),
        element(x.dtype())?,
    );
    let [grad_x, grad_up] = outputs;
    Some([Some(tensor(grad_x)), up.map(|_| tensor(grad_up))])
}

#[cube(launch)]
fn derivative_kernel<F: Float, N: Size>(
    x: &Buffer<Vector<F, N>>,
    up: &Buffer<Vector<F, N>>,
    upstream: &Buffer<Vector<F, N>>,
    grad_x: &mut Buffer<Vector<F, N>>,
    grad_up: &mut Buffer<Vector<F, N>>,
    total: usize,
    width: usize,
    inner: usize,
    inner_stride: usize,
    outer_stride: usize,
    up_inner: usize,
    up_inner_stride: usize,
    up_outer_stride: usize,
    #[comptime] function: Function,
    #[comptime] times: bool,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= total {
        terminate!();
    }
    let row = ABSOLUTE_POS / width;
    let column = ABSOLUTE_POS % width;
    let at = row / inner * outer_stride + row % inner * inner_stride + column;
    let value = Vector::<f32, N>::cast_from(x[at]);
    let mut grad = Vector::<f32, N>::cast_from(upstream[ABSOLUTE_POS]);
    if times {
        grad_up[ABSOLUTE_POS] = Vector::cast_from(grad * forward::activated::<N>(value, function));
        let at = row / up_inner * up_outer_stride + row % up_inner * up_inner_stride + column;
        grad *= Vector::cast_from(up[at]);
    }
    grad_x[ABSOLUTE_POS] = Vector::cast_from(grad * derivative_at::<N>(value, function));
}

/// The derivative of an activation.
#[cube]
fn derivative_at<N: Size>(x: Vector<f32, N>, #[comptime] function: Function) -> Vector<f32, N> {
    let one = Vector::new(1.0f32);
    match function {
        Function::Silu => {
            let sigmoid = one / (one + (-x).exp());
            sigmoid * (one + x * (one - sigmoid))
        }
        Function::Gelu => {
            let normal = Vector::new(0.5f32) * (one + (x * Vector::new(0.707_106_77f32)).erf());
            normal + x * Vector::new(DENSITY_AT_ZERO) * (x * x * Vector::new(-0.5f32)).exp()
        }
        Function::GeluTanh => {
            // Beyond these the derivative is 0 or 1, and the cube of more would overflow.
            let x = max(min(x, Vector::new(100.0f32)), Vector::new(-100.0f32));
            let inner = (x + x * x * x * Vector::new(0.044715f32)) * Vector::new(-TWO_SQRT_2_OVER_PI);
            let sigmoid = one / (one + inner.exp());
            let inner_derivative = Vector::new(TWO_SQRT_2_OVER_PI) * (one + x * x * Vector::new(0.134145f32));
            sigmoid + x * sigmoid * (one - sigmoid) * inner_derivative
        }
        Function::QuickGelu => {
            let steep = x * Vector::new(1.702f32);
            let sigmoid = one / (one + (-steep).exp());
            sigmoid * (one + steep * (one - sigmoid))
        }
    }
}

/// Gradients of `x`, the gate and `y` of `x + y * gate`; `None` for tensors that are not for these kernels.
pub(super) fn gated_residual(
    gate: &Tensor<3>,
    y: &Tensor<3>,
    grad: &Tensor<3>,
    [wants_x, wants_gate, wants_y]: [bool; 3],
) -> Option<[Option<Gradient>; 3]> {
    let [batch, tokens, width] = grad.dims();
    if y.dims() != grad.dims() || gate.dims() != [batch, 1, width] || gate.dtype() != grad.dtype() {
        return None;
    }
    let grad_gate = match wants_gate {
        true => Some(gradient(sums(grad, Factor::Values(y), tokens, false)?.0.reshape([batch, 1, width]))),
        false => None,
    };
    let grad_y = wants_y.then(|| gradient(grad.clone() * gate.clone()));
    Some([wants_x.then(|| gradient(grad.clone())), grad_gate, grad_y])
}
