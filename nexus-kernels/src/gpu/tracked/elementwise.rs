//! Activations, gated products, gated residuals and rotations with their backward passes.

use burn::tensor::Tensor;
use burn_cubecl::cubecl::{
    self, calculate_cube_count_elemwise,
    ir::ElemType,
    prelude::{Tensor as Buffer, *},
};

use super::{
    super::{contiguous, cube, element, elementwise as plain, empty_like, rotary, rows::Rows, tensor},
    Operand, gradient, parents, record,
    sums::{Factor, sums},
};
use crate::{Function, Pairs};

const TWO_SQRT_2_OVER_PI: f32 = 1.595_769;
const DENSITY_AT_ZERO: f32 = 0.398_942_3;

/// The function of every value.
pub(in super::super) fn activate<const D: usize>(function: Function, x: &Tensor<D>) -> Option<Tensor<D>> {
    let x = Operand::of(x)?;
    let values = x.value.clone();
    let result = plain::activate(function, values.clone()).ok()?;
    Some(record(parents![x], result, move |upstream, _| {
        let [slopes, _] = slopes(function, &values, None, &upstream);
        [slopes.map(gradient)]
    }))
}

/// The function of every value, times `up`.
pub(in super::super) fn activate_times<const D: usize>(
    function: Function,
    gate: &Tensor<D>,
    up: &Tensor<D>,
) -> Option<Tensor<D>> {
    let (gate, up) = (Operand::of(gate)?, Operand::of(up)?);
    let values = [gate.value.clone(), up.value.clone()];
    let result = plain::activate_times(function, values[0].clone(), values[1].clone()).ok()?;
    Some(record(parents![gate, up], result, move |upstream, [of_gate, of_up]| {
        let [gate, up] = slopes(function, &values[0], Some(&values[1]), &upstream);
        [gate.filter(|_| of_gate).map(gradient), up.filter(|_| of_up).map(gradient)]
    }))
}

/// Gradients of the input of an activation, and of the factor that its result is multiplied by.
fn slopes<const D: usize>(
    function: Function,
    x: &Tensor<D>,
    up: Option<&Tensor<D>>,
    upstream: &Tensor<D>,
) -> [Option<Tensor<D>>; 2] {
    let rows = |x| Rows::of(cube(x).unwrap_or_else(|| unreachable!("the forward kernel took it")));
    let (x_rows, factor) = (rows(x), rows(up.unwrap_or(x)));
    let upstream = contiguous(upstream).unwrap_or_else(|| unreachable!("a gradient is on the device of its tensor"));
    let vector = x_rows.vector().min(factor.vector());
    let client = upstream.client.clone();
    // A kernel has all its outputs; the second of these is not written without a factor.
    let shapes = [x.shape(), if up.is_some() { x.shape() } else { [vector].into() }];
    let outputs = shapes.map(|shape| empty_like(&upstream, shape, x.dtype()));
    let total = x_rows.count * x_rows.width / vector;
    let cube_dim = CubeDim::new(&client, total);
    slopes_kernel::launch(
        &client,
        calculate_cube_count_elemwise(&client, total, cube_dim),
        cube_dim,
        vector,
        x_rows.tensor.into_tensor_arg(),
        factor.tensor.into_tensor_arg(),
        upstream.into_tensor_arg(),
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
        element(x.dtype()).unwrap_or_else(|| unreachable!("the forward kernel took it")),
    );
    let [of_x, of_up] = outputs;
    [Some(tensor(of_x)), up.map(|_| tensor(of_up))]
}

#[cube(launch)]
fn slopes_kernel<F: Float, N: Size>(
    x: &Buffer<Vector<F, N>>,
    up: &Buffer<Vector<F, N>>,
    upstream: &Buffer<Vector<F, N>>,
    of_x: &mut Buffer<Vector<F, N>>,
    of_up: &mut Buffer<Vector<F, N>>,
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
    let mut slope = Vector::<f32, N>::cast_from(upstream[ABSOLUTE_POS]);
    if times {
        of_up[ABSOLUTE_POS] = Vector::cast_from(slope * plain::activated::<N>(value, function));
        let at = row / up_inner * up_outer_stride + row % up_inner * up_inner_stride + column;
        slope *= Vector::cast_from(up[at]);
    }
    of_x[ABSOLUTE_POS] = Vector::cast_from(slope * slope_at::<N>(value, function));
}

/// The slope of an activation.
#[cube]
fn slope_at<N: Size>(x: Vector<f32, N>, #[comptime] function: Function) -> Vector<f32, N> {
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
            // Beyond these the slope is 0 or 1, and the cube of more would overflow.
            let x = max(min(x, Vector::new(100.0f32)), Vector::new(-100.0f32));
            let inner = (x + x * x * x * Vector::new(0.044715f32)) * Vector::new(-TWO_SQRT_2_OVER_PI);
            let sigmoid = one / (one + inner.exp());
            let slope = Vector::new(TWO_SQRT_2_OVER_PI) * (one + x * x * Vector::new(0.134145f32));
            sigmoid + x * sigmoid * (one - sigmoid) * slope
        }
        Function::QuickGelu => {
            let steep = x * Vector::new(1.702f32);
            let sigmoid = one / (one + (-steep).exp());
            sigmoid * (one + steep * (one - sigmoid))
        }
    }
}

/// `x + y * gate`.
///
/// # Shapes
/// As the plain kernel's.
pub(in super::super) fn gated_residual(x: &Tensor<3>, gate: &Tensor<3>, y: &Tensor<3>) -> Option<Tensor<3>> {
    let (x, gate, y) = (Operand::of(x)?, Operand::of(gate)?, Operand::of(y)?);
    let values = [gate.value.clone(), y.value.clone()];
    let result = plain::gated_residual(&x.value, &values[0], values[1].clone()).ok()?;
    Some(record(parents![x, gate, y], result, move |upstream: Tensor<3>, [of_x, of_gate, of_y]| {
        let ([gate, y], [batch, tokens, width]) = (&values, upstream.dims());
        let of_gate = of_gate.then(|| {
            let (products, _) = sums(&upstream, Factor::Values(y), tokens, false);
            gradient(products.reshape([batch, 1, width]))
        });
        let of_y = of_y.then(|| gradient(upstream.clone() * gate.clone()));
        [of_x.then(|| gradient(upstream)), of_gate, of_y]
    }))
}

/// Rotates pairs of features; the tables are constants.
///
/// # Shapes
/// As the plain kernel's.
pub(in super::super) fn rotate(x: &Tensor<4>, cos: &Tensor<3>, sin: &Tensor<3>, pairs: Pairs) -> Option<Tensor<4>> {
    let (x, cos, sin) = (Operand::of(x)?, Operand::of(cos)?, Operand::of(sin)?);
    if cos.tracked || sin.tracked {
        return None;
    }
    let (cos, sin) = (cos.value, sin.value);
    let result = rotary::rotate(x.value.clone(), &cos, &sin, pairs).ok()?;
    Some(record(parents![x], result, move |upstream, _| {
        // The inverse of a rotation is its transpose.
        let back = rotary::rotate(upstream, &cos, &sin.clone().neg(), pairs);
        [Some(gradient(back.unwrap_or_else(|_| unreachable!("a gradient is shaped as its tensor"))))]
    }))
}

#[cfg(test)]
mod tests {
    use burn::tensor::activation;

    use super::{super::tests::check, *};
    use crate::testing::{cpu, device, input};

    const SHAPES: [[usize; 3]; 4] = [[1, 1, 1], [2, 5, 7], [1, 13, 132], [3, 100, 67]];
    const KINDS: [Function; 4] = [Function::Silu, Function::Gelu, Function::GeluTanh, Function::QuickGelu];

    fn formula(kind: Function, x: Tensor<3>) -> Tensor<3> {
        match kind {
            Function::Silu => activation::silu(x),
            Function::Gelu => activation::gelu(x),
            Function::GeluTanh => {
                let inner = (x.clone() + x.clone().powi_scalar(3) * 0.044_715) * 0.797_884_560_802_865_4;
                x * 0.5 * (inner.tanh() + 1.0)
            }
            Function::QuickGelu => x.clone() * activation::sigmoid(x * 1.702),
        }
    }

    #[test]
    fn gradients_of_activations_and_products() {
        for kind in KINDS {
            for shape in SHAPES {
                check([shape], |[x]| activate(kind, &(x * 3.0)), |[x]| formula(kind, x * 3.0));
                check(
                    [shape, shape],
                    |[x, y]| activate_times(kind, &x.swap_dims(0, 1), &y.swap_dims(0, 1)),
                    |[x, y]| formula(kind, x.swap_dims(0, 1)) * y.swap_dims(0, 1),
                );
            }
        }
    }

    #[test]
    fn slopes_far_from_zero_are_finite() {
        for kind in KINDS {
            let x = Tensor::<1>::from_floats([-1e4, -150.0, 150.0, 1e4], &device().autodiff()).require_grad();
            let Some(y) = activate(kind, &x) else {
                assert_eq!(device(), cpu());
                return;
            };
            let slopes = crate::graph::tests::values(x.grad(&y.sum().backward()).unwrap());
            assert_eq!(slopes, [0.0, 0.0, 1.0, 1.0], "{kind:?}");
        }
    }

    #[test]
    fn gradients_of_gated_residuals() {
        for [batch, tokens, width] in SHAPES {
            check(
                [[batch, tokens, width], [batch, 1, width], [batch, tokens, width]],
                |[x, gate, y]| gated_residual(&x, &gate, &y),
                |[x, gate, y]| x + gate * y,
            );
        }
    }

    #[test]
    fn gradients_of_rotations() {
        for [batch, tokens, heads, half] in [[1, 1, 1, 1], [2, 5, 3, 8], [1, 7, 2, 17]] {
            let angles = input([1, tokens, half], 9) * 4.0;
            let tables = [angles.clone().cos(), angles.sin()];
            let split = |x: Tensor<3>| -> Tensor<4> { x.reshape([batch, heads, tokens, 2 * half]).swap_dims(1, 2) };
            let plain: [fn(Tensor<4>, &crate::RotaryTable) -> Tensor<4>; 2] =
                [crate::rotary::plain_rotate_half, crate::rotary::plain_rotate_interleaved];
            for (pairs, plain) in [Pairs::Halves, Pairs::Neighbours].into_iter().zip(plain) {
                check(
                    [[batch, heads, tokens * 2 * half]],
                    |[x]| {
                        let [cos, sin] = tables.clone().map(Tensor::from_inner);
                        rotate(&split(x), &cos, &sin, pairs)
                    },
                    |[x]| {
                        let [cos, sin] = tables.clone().map(|table| Tensor::from_inner(table.to_device(&cpu())));
                        plain(split(x), &crate::RotaryTable { cos, sin })
                    },
                );
            }
        }
    }
}
