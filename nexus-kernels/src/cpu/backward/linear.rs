//! Linear layers with their backward pass: tracked rows and weights -> rows.

#![allow(unsafe_code)]

use burn::{
    backend::Flex,
    tensor::{DType, Tensor},
};
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::super::simd::{Avx2, Avx512};
use super::{
    super::{
        Instructions, Level, View,
        gemm::{Left, Right, multiply_add},
        level::with_level,
        linear::{ColumnMajor, Layer, MAX_DOT_ROWS, RowMajor, tiles},
        rows::map_rows,
        simd::Portable,
        wrap,
    },
    in_dtype, linear_bf16,
    sums::column_sums,
    to_f32,
};
use crate::{
    backward::{Layer as Kept, LayerGradients},
    fast::count,
    ops::Ops,
};

/// Most elements that a product in place, which packs nothing, passes over again and again: beyond, tiles are faster.
const MAX_SMALL: usize = 3 << 14;
/// Rows of a task.
const BLOCK_ROWS: usize = 96;
/// Inner elements that are multiplied while a panel of the right matrix stays in the nearest cache.
const BLOCK_INNER: usize = 128;

/// `x Wᵀ + b`, over all rows at once, and the matrices of its backward pass.
pub(super) fn forward(x: Tensor<2>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> (Tensor<2>, Kept) {
    if x.shape().num_elements() == 0 || weight.dims()[0] == 0 {
        let weight = crate::cast_like(weight, &x);
        return (<Flex as Ops>::linear(x.clone(), weight.clone(), bias), [x, weight]);
    }
    count();
    let dtype = x.dtype();
    if dtype == DType::BF16 && Level::detect().multiplies_bf16() {
        return linear_bf16::forward(x, weight, bias);
    }
    let (x, weight) = (to_f32(x), to_f32(weight));
    let mut result = multiply(&x, &weight, Transposed::Right);
    if let Some(bias) = bias {
        result = add_to_rows(result, &to_f32(bias));
    }
    (in_dtype(result, dtype), [x, weight])
}

/// The gradients of the rows, the weight and the bias.
pub(super) fn backward(layer: [Option<Tensor<2>>; 2], grad: Tensor<2>, wants_bias: bool) -> LayerGradients {
    let in_pairs = layer.iter().flatten().any(|matrix| matrix.dtype() == DType::BF16);
    if in_pairs {
        return linear_bf16::backward(layer, grad, wants_bias);
    }
    let ([x, weight], grad) = (layer, to_f32(grad));
    (
        weight.map(|weight| multiply(&grad, &weight, Transposed::Neither)),
        x.map(|x| multiply(&grad, &x, Transposed::Left)),
        wants_bias.then(|| sum_rows(&grad)),
    )
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
    match level.instructions() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a level has only instructions of this CPU.
        Instructions::Avx512 => unsafe { avx512(shape, left, right, sums) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Instructions::Avx2 => unsafe { avx2(shape, left, right, sums) },
        // SAFETY: every CPU has what this needs.
        _ => unsafe { multiply_add::<Portable, f32, 1>(shape, left, right, sums, shape[1]) },
    }
}

/// `left rightᵀ`, `leftᵀ right` or `left right`.
#[derive(Clone, Copy, PartialEq)]
enum Transposed {
    Neither,
    Left,
    Right,
}

/// A product of matrices: of a small one in place, where its columns are whole vectors, else by the plain kernel's tiles.
fn multiply(left: &Tensor<2>, right: &Tensor<2>, transposed: Transposed) -> Tensor<2> {
    let ([rows, columns], [right_rows, right_columns]) = (left.dims(), right.dims());
    let (m, k) = if transposed == Transposed::Left { (columns, rows) } else { (rows, columns) };
    let n = if transposed == Transposed::Right { right_rows } else { right_columns };
    let views = [left, right].map(|tensor| View::f32(tensor).map(View::into_contiguous));
    let slices = views.each_ref().map(|view| view.as_ref().and_then(|view| view.contiguous::<f32>()));
    let [Some(left_values), Some(right_values)] = slices else {
        let transpose = |tensor: &Tensor<2>, yes: bool| if yes { tensor.clone().transpose() } else { tensor.clone() };
        return transpose(left, transposed == Transposed::Left)
            .matmul(transpose(right, transposed == Transposed::Right));
    };
    // What stays near is the right matrix, or the result where that is of few weights.
    let near = n * if transposed == Transposed::Left { m.min(k) } else { k };
    if !n.is_multiple_of(16) || near > MAX_SMALL || m.min(k) <= MAX_DOT_ROWS {
        let layer = Layer { bias: &vec![0.0; n], rows: m, inputs: k, outputs: n };
        let rows = |values| RowMajor { values, inputs: k };
        let columns = |values, rows| ColumnMajor { values, rows };
        let level = Level::detect();
        let result = match transposed {
            Transposed::Neither => tiles::<f32, f32>(&layer, &rows(left_values), &columns(right_values, n), level),
            Transposed::Left => tiles::<f32, f32>(&layer, &columns(left_values, m), &columns(right_values, n), level),
            Transposed::Right => tiles::<f32, f32>(&layer, &rows(left_values), &rows(right_values), level),
        };
        return wrap(result, [m, n]);
    }
    let strides = if transposed == Transposed::Left { [1, columns] } else { [columns, 1] };
    let left = Left { values: left_values, strides };
    if transposed != Transposed::Right {
        return wrap(product([m, n, k], left, right_values), [m, n]);
    }
    let mut columns = vec![0.0; k * n];
    for (row, values) in right_values.chunks_exact(k).enumerate() {
        for (value, to) in values.iter().zip(columns[row..].iter_mut().step_by(n)) {
            *to = *value;
        }
    }
    wrap(product([m, n, k], left, &columns), [m, n])
}
