//! Activations, gated products and gated residuals, each in one pass: tensors -> tensor of the same shape.

use burn::tensor::Tensor;
use burn_cubecl::cubecl::{
    self, calculate_cube_count_elemwise,
    ir::ElemType,
    prelude::{Tensor as Buffer, *},
};

use super::{contiguous, cube, element, empty_like, rows::Rows, tensor};
use crate::activation::Function;

/// Of the tanh approximation of GELU.
const MINUS_TWO_SQRT_2_OVER_PI: f32 = -1.595_769_121_605_730_7_f64 as f32;

/// The function of every value, times `up` if there is one; `None` for tensors that are not for these kernels.
pub(super) fn activate<const D: usize>(function: Function, x: &Tensor<D>, up: Option<&Tensor<D>>) -> Option<Tensor<D>> {
    if up.is_some_and(|up| up.dims() != x.dims() || up.dtype() != x.dtype()) {
        return None;
    }
    let rows = Rows::of(cube(x)?);
    let factor = Rows::of(cube(up.unwrap_or(x))?);
    let vector = rows.vector().min(factor.vector());
    let (client, output) = (rows.tensor.client.clone(), empty_like(&rows.tensor, x.shape(), x.dtype()));
    let total = rows.count * rows.width / vector;
    let cube_dim = CubeDim::new(&client, total);
    activate_kernel::launch(
        &client,
        calculate_cube_count_elemwise(&client, total, cube_dim),
        cube_dim,
        vector,
        rows.tensor.into_tensor_arg(),
        factor.tensor.into_tensor_arg(),
        output.clone().into_tensor_arg(),
        total,
        rows.width / vector,
        rows.inner,
        rows.inner_stride / vector,
        rows.outer_stride / vector,
        factor.inner,
        factor.inner_stride / vector,
        factor.outer_stride / vector,
        function,
        up.is_some(),
        element(x.dtype())?,
    );
    Some(tensor(output))
}

#[cube(launch)]
fn activate_kernel<F: Float, N: Size>(
    x: &Buffer<Vector<F, N>>,
    up: &Buffer<Vector<F, N>>,
    output: &mut Buffer<Vector<F, N>>,
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
    let mut y = activated::<N>(Vector::cast_from(x[at]), function);
    if times {
        let at = row / up_inner * up_outer_stride + row % up_inner * up_inner_stride + column;
        y *= Vector::cast_from(up[at]);
    }
    output[ABSOLUTE_POS] = Vector::cast_from(y);
}

/// The function of a value.
#[cube]
pub(super) fn activated<N: Size>(x: Vector<f32, N>, #[comptime] function: Function) -> Vector<f32, N> {
    let one = Vector::new(1.0f32);
    match function {
        Function::Silu => x / (one + (-x).exp()),
        Function::Gelu => x * Vector::new(0.5f32) * (one + (x * Vector::new(0.707_106_77f32)).erf()),
        // tanh written with an exponential that overflows to the right limit.
        Function::GeluTanh => {
            let inner = (x + x * x * x * Vector::new(0.044715f32)) * Vector::new(MINUS_TWO_SQRT_2_OVER_PI);
            x / (one + inner.exp())
        }
        Function::QuickGelu => x / (one + (x * Vector::new(-1.702f32)).exp()),
    }
}

/// `x + y * gate`; `None` for tensors that are not for these kernels.
///
/// # Shapes
/// - `x`, `y`: `[batch, tokens, width]`
/// - `gate`: `[batch, 1, width]`
pub(super) fn gated_residual(x: &Tensor<3>, gate: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
    let [batch, tokens, width] = x.dims();
    let fits = y.dims() == x.dims() && gate.dims() == [batch, 1, width];
    if !fits || [gate.dtype(), y.dtype()] != [x.dtype(); 2] {
        return None;
    }
    let (dtype, x, y, gate) = (element(x.dtype())?, contiguous(x)?, contiguous(y)?, Rows::of(cube(gate)?));
    let vector = gate.vector();
    let (client, output) = (x.client.clone(), empty_like(&x, [batch, tokens, width], x.dtype));
    let total = batch * tokens * width / vector;
    let cube_dim = CubeDim::new(&client, total);
    residual_kernel::launch(
        &client,
        calculate_cube_count_elemwise(&client, total, cube_dim),
        cube_dim,
        vector,
        x.into_tensor_arg(),
        gate.tensor.into_tensor_arg(),
        y.into_tensor_arg(),
        output.clone().into_tensor_arg(),
        total,
        width / vector,
        tokens,
        gate.inner_stride / vector,
        dtype,
    );
    Some(tensor(output))
}

#[cube(launch)]
fn residual_kernel<F: Float, N: Size>(
    x: &Buffer<Vector<F, N>>,
    gate: &Buffer<Vector<F, N>>,
    y: &Buffer<Vector<F, N>>,
    output: &mut Buffer<Vector<F, N>>,
    total: usize,
    width: usize,
    tokens: usize,
    gate_stride: usize,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= total {
        terminate!();
    }
    let gate = gate[ABSOLUTE_POS / width / tokens * gate_stride + ABSOLUTE_POS % width];
    let scaled = Vector::<f32, N>::cast_from(y[ABSOLUTE_POS]) * Vector::cast_from(gate);
    output[ABSOLUTE_POS] = Vector::cast_from(Vector::<f32, N>::cast_from(x[ABSOLUTE_POS]) + scaled);
}
