//! Linear layers with their backward pass: tracked rows and weights -> rows.

#![allow(unsafe_code)]

use burn::tensor::{DType, Tensor};
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::super::simd::{Avx2, Avx512};
use super::{
    super::{
        Level, View,
        gemm::{Left, Right, multiply_add},
        level::with_level,
        linear::{ColumnMajor, Layer, MAX_DOT_ROWS, RowMajor, tiles},
        rows::map_rows,
        simd::Portable,
        wrap,
    },
    Operand, gradient, in_dtype, linear_bf16,
    sums::column_sums,
};
use crate::graph::record_affine;

/// Most elements that a product in place, which packs nothing, passes over again and again: beyond, tiles are faster.
const MAX_SMALL: usize = 3 << 14;
/// Rows of a task.
const BLOCK_ROWS: usize = 96;
/// Inner elements that are multiplied while a panel of the right matrix stays in the nearest cache.
const BLOCK_INNER: usize = 128;

/// `x Wᵀ + b`, over all rows at once.
///
/// # Shapes
/// As the plain kernel's.
pub(in super::super) fn linear<const D: usize>(
    x: &Tensor<D>,
    weight: &Tensor<2>,
    bias: Option<&Tensor<1>>,
) -> Option<Tensor<D>> {
    let (x, weight) = (Operand::of(x)?, Operand::of(weight)?);
    let bias = match bias {
        Some(bias) => Some(Operand::of(bias)?.widened()),
        None => None,
    };
    let ([outputs, inputs], shape) = (weight.value.dims(), x.value.dims());
    assert_eq!(shape[D - 1], inputs, "width of the input of a linear layer");
    let rows = shape.iter().product::<usize>() / inputs.max(1);
    if rows == 0 || inputs == 0 || outputs == 0 {
        return None;
    }
    if x.dtype == DType::BF16 && Level::detect().multiplies_bf16() {
        return linear_bf16::linear(x, weight, bias);
    }
    let (x, weight) = (x.widened(), weight.widened());
    let mut result_shape = shape;
    result_shape[D - 1] = outputs;
    let flat: Tensor<2> = x.value.clone().reshape([rows, inputs]);
    let mut result = multiply(&flat, &weight.value, Turned::Right);
    if let Some(bias) = &bias {
        result = add_to_rows(result, &bias.value);
    }
    let result = result.reshape(result_shape);
    let kept = weight.value.clone();
    let with_weight = weight.tracked.then_some(flat);
    Some(record_affine(x, weight, bias, result, move |upstream: Tensor<D>, [of_x, of_weight, of_bias]| {
        let upstream: Tensor<2> = in_dtype(upstream, DType::F32).reshape([rows, outputs]);
        let x = of_x.then(|| gradient(multiply(&upstream, &kept, Turned::Neither).reshape(shape)));
        let weight = with_weight.as_ref().filter(|_| of_weight);
        let weight = weight.map(|x| gradient(multiply(&upstream, x, Turned::Left)));
        let bias = of_bias.then(|| gradient(sum_rows(&upstream)));
        [x, weight, bias]
    }))
}

fn add_to_rows(rows: Tensor<2>, bias: &Tensor<1>) -> Tensor<2> {
    let [_, width] = rows.dims();
    let level = Level::detect();
    let view = View::f32(bias).map(View::into_contiguous);
    let Some(addends) = view.as_ref().and_then(|view| view.contiguous::<f32>()) else {
        return rows + bias.clone().unsqueeze();
    };
    let added = map_rows(rows, |_, values| {
        with_level!(
            level,
            fn run(values: &mut [f32], width: usize, addends: &[f32]) {
                for row in values.chunks_exact_mut(width) {
                    for (value, addend) in row.iter_mut().zip(addends) {
                        *value += addend;
                    }
                }
            }
        );
    });
    added.unwrap_or_else(|rows| rows + bias.clone().unsqueeze())
}

pub(super) fn sum_rows(rows: &Tensor<2>) -> Tensor<1> {
    let [_, width] = rows.dims();
    let view = View::f32(rows).map(View::into_contiguous);
    match view.as_ref().and_then(|view| view.contiguous::<f32>()) {
        Some(values) => wrap(column_sums(values, width), [width]),
        None => rows.clone().sum_dim(0).reshape([width]),
    }
}

/// `left` times `right`, `[k, n]`, with the first of `[m, n, k]` divided among threads; `n` is whole vectors.
fn product([m, n, k]: [usize; 3], left: Left<'_>, right: &[f32]) -> Vec<f32> {
    let level = Level::detect();
    let mut result = vec![0.0f32; m * n];
    let rows = m.div_ceil(2 * rayon::current_num_threads()).next_multiple_of(6).min(BLOCK_ROWS);
    result.par_chunks_mut(rows * n).enumerate().for_each(|(block, sums)| {
        let shape = [sums.len() / n, n];
        let values = &left.values[block * rows * left.strides[0]..];
        for first in (0..k).step_by(BLOCK_INNER) {
            let inner = BLOCK_INNER.min(k - first);
            let left = Left { values: &values[first * left.strides[1]..], strides: left.strides };
            let right = Right { values: &right[first * n..(first + inner) * n], stride: n };
            add_product(level, [shape[0], n, inner], left, right, sums);
        }
    });
    result
}

fn add_product(level: Level, shape: [usize; 3], left: Left<'_>, right: Right<'_>, sums: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn avx2(shape: [usize; 3], left: Left<'_>, right: Right<'_>, sums: &mut [f32]) {
        // SAFETY: this function has the instructions.
        unsafe { multiply_add::<Avx2, f32, 2>(shape, left, right, sums, shape[1]) }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    fn avx512(shape: [usize; 3], left: Left<'_>, right: Right<'_>, sums: &mut [f32]) {
        // SAFETY: this function has the instructions.
        unsafe { multiply_add::<Avx512, f32, 4>(shape, left, right, sums, shape[1]) }
    }
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: levels come from `Level::detect`, so the CPU has these instructions.
        Level::Avx512 => unsafe { avx512(shape, left, right, sums) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { avx2(shape, left, right, sums) },
        // SAFETY: every CPU has what this needs.
        _ => unsafe { multiply_add::<Portable, f32, 1>(shape, left, right, sums, shape[1]) },
    }
}

/// `left rightᵀ`, `leftᵀ right` or `left right`.
#[derive(Clone, Copy, PartialEq)]
enum Turned {
    Neither,
    Left,
    Right,
}

/// A product of matrices: of a small one in place, where its columns are whole vectors, else by the plain kernel's tiles.
fn multiply(left: &Tensor<2>, right: &Tensor<2>, turned: Turned) -> Tensor<2> {
    let ([rows, columns], [right_rows, right_columns]) = (left.dims(), right.dims());
    let (m, k) = if turned == Turned::Left { (columns, rows) } else { (rows, columns) };
    let n = if turned == Turned::Right { right_rows } else { right_columns };
    let views = [left, right].map(|tensor| View::f32(tensor).map(View::into_contiguous));
    let slices = views.each_ref().map(|view| view.as_ref().and_then(|view| view.contiguous::<f32>()));
    let [Some(left_values), Some(right_values)] = slices else {
        let turn = |tensor: &Tensor<2>, yes: bool| if yes { tensor.clone().transpose() } else { tensor.clone() };
        return turn(left, turned == Turned::Left).matmul(turn(right, turned == Turned::Right));
    };
    // What stays near is the right matrix, or the result where that is of few weights.
    let near = n * if turned == Turned::Left { m.min(k) } else { k };
    if !n.is_multiple_of(16) || near > MAX_SMALL || m.min(k) <= MAX_DOT_ROWS {
        let layer = Layer { bias: &vec![0.0; n], rows: m, inputs: k, outputs: n };
        let rows = |values| RowMajor { values, inputs: k };
        let columns = |values, rows| ColumnMajor { values, rows };
        let level = Level::detect();
        let result = match turned {
            Turned::Neither => tiles::<f32, f32>(&layer, &rows(left_values), &columns(right_values, n), level),
            Turned::Left => tiles::<f32, f32>(&layer, &columns(left_values, m), &columns(right_values, n), level),
            Turned::Right => tiles::<f32, f32>(&layer, &rows(left_values), &rows(right_values), level),
        };
        return wrap(result, [m, n]);
    }
    let strides = if turned == Turned::Left { [1, columns] } else { [columns, 1] };
    let left = Left { values: left_values, strides };
    if turned != Turned::Right {
        return wrap(product([m, n, k], left, right_values), [m, n]);
    }
    let mut transposed = vec![0.0; k * n];
    for (row, values) in right_values.chunks_exact(k).enumerate() {
        for (value, to) in values.iter().zip(transposed[row..].iter_mut().step_by(n)) {
            *to = *value;
        }
    }
    wrap(product([m, n, k], left, &transposed), [m, n])
}

#[cfg(test)]
mod tests {
    use burn::tensor::module;

    use super::*;
    use crate::cpu::tracked::tests::check;

    #[test]
    fn gradients_are_those_of_the_plain_formulation() {
        for [batch, rows, inputs, outputs] in
            [[1, 1, 1, 1], [1, 1, 7, 5], [2, 3, 17, 13], [3, 50, 64, 48], [1, 97, 31, 101]]
        {
            let inner = [[batch, rows, inputs], [outputs, inputs, 1], [outputs, 1, 1]];
            check(
                inner,
                |[x, weight, bias]| {
                    let (weight, bias) = (weight.reshape([outputs, inputs]), bias.reshape([outputs]));
                    linear(&x, &weight, Some(&bias)).unwrap()
                },
                |[x, weight, bias]| {
                    let (weight, bias) = (weight.reshape([outputs, inputs]), bias.reshape([outputs]));
                    module::linear(x, weight.transpose(), Some(bias))
                },
            );
        }
    }

    #[test]
    fn strided_inputs_and_no_bias() {
        check(
            [[4, 3, 9], [5, 4, 1]],
            |[x, weight]| linear(&x.swap_dims(0, 2).narrow(0, 2, 5), &weight.reshape([5, 4]), None).unwrap(),
            |[x, weight]| {
                let weight: Tensor<2> = weight.reshape([5, 4]);
                module::linear(x.swap_dims(0, 2).narrow(0, 2, 5), weight.transpose(), None)
            },
        );
    }
}
