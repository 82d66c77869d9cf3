//! Linear layers of bf16 with their backward pass, where the CPU multiplies bf16: rows and weights -> rows.
//!
//! All three products are those of the plain kernel, of matrices that are transposed where they need to be. Weights of the
//! optimizer, in f32, are rounded once; their gradients are f32.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use burn::{
    backend::Flex,
    tensor::{DType, Tensor},
};
use half::bf16;
use rayon::prelude::*;

use super::{
    super::{
        Level, View,
        linear::Layer,
        simd::{Simd, for_simd, pair},
        stored::Stored,
        wrap,
    },
    in_dtype,
    linear::sum_rows,
    to_f32,
};
use crate::backward::{Layer as Kept, LayerGradients};

/// Columns that a task transposes.
const TASK_COLUMNS: usize = 64;

/// As [`super::linear`], for rows of bf16.
pub(super) fn forward(x: Tensor<2>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> (Tensor<2>, Kept) {
    let ([rows, _], [outputs, _]) = (x.dims(), weight.dims());
    let (x, weight) = (Matrix::of(x), Matrix::of(weight));
    let addends = bias.map(|bias| View::of(&bias).and_then(View::into_f32).expect("a bias on the CPU"));
    let result: Vec<bf16> = x.times_transposed(&weight, addends.as_deref());
    (wrap(result, [rows, outputs]), [x, weight].map(Matrix::into_tensor))
}

pub(super) fn backward(layer: [Option<Tensor<2>>; 2], grad: Tensor<2>, wants_bias: bool) -> LayerGradients {
    let [rows, outputs] = grad.dims();
    let grad_bias = wants_bias.then(|| sum_rows(&to_f32(grad.clone())));
    let ([x, weight], grad) = (layer.map(|matrix| matrix.map(Matrix::of)), Matrix::of(grad));
    let grad_x =
        weight.map(|weight| wrap(grad.times_transposed::<bf16>(&weight.transposed(), None), [rows, weight.dims[1]]));
    let grad_weight =
        x.map(|x| wrap(grad.transposed().times_transposed::<f32>(&x.transposed(), None), [outputs, x.dims[1]]));
    (grad_x, grad_weight, grad_bias)
}

/// A matrix of bf16 in row-major order.
struct Matrix {
    view: View,
    dims: [usize; 2],
}

impl Matrix {
    fn of(tensor: Tensor<2>) -> Self {
        let dims = tensor.dims();
        let view = View::of(&in_dtype(tensor, DType::BF16)).map(View::into_contiguous);
        Self { view: view.unwrap_or_else(|| unreachable!("a matrix on the CPU")), dims }
    }

    fn values(&self) -> &[bf16] {
        self.view.contiguous().unwrap_or_else(|| unreachable!("made contiguous"))
    }

    fn into_tensor(self) -> Tensor<2> {
        Tensor::from_primitive::<Flex>(self.view.into_tensor())
    }

    /// `self otherᵀ`, with `bias` added to every row.
    fn times_transposed<Y: Stored>(&self, other: &Self, bias: Option<&[f32]>) -> Vec<Y> {
        let ([rows, inputs], [outputs, _]) = (self.dims, other.dims);
        let none = vec![0.0; if bias.is_none() { outputs } else { 0 }];
        let layer = Layer { bias: bias.unwrap_or(&none), rows, inputs, outputs };
        layer.on_bf16(self.values(), other.values(), Level::detect())
    }

    fn transposed(&self) -> Self {
        let [rows, columns] = self.dims;
        Self::of(wrap(transposed(Level::detect(), self.values(), self.dims), [columns, rows]))
    }
}

/// The transpose of a matrix, `[rows, columns]`.
fn transposed(level: Level, values: &[bf16], [rows, columns]: [usize; 2]) -> Vec<bf16> {
    assert!(values.len() == rows * columns);
    let mut transposed = Vec::with_capacity(values.len());
    let spare = transposed.spare_capacity_mut()[..values.len()].par_chunks_mut(TASK_COLUMNS * rows);
    spare.enumerate().for_each(|(task, to)| {
        let values = &values[task * TASK_COLUMNS..];
        for_simd!(level, transpose::<>(values: &[bf16], columns: usize, rows: usize, to: &mut [MaybeUninit<bf16>]) where)
    });
    // SAFETY: the tasks cover all columns, and each wrote all rows of its own.
    unsafe { transposed.set_len(values.len()) };
    transposed
}

/// Transposes the first columns of rows that are `columns` apart, as many as `to` has rows, all of which it writes.
///
/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
unsafe fn transpose<S: Simd>(values: &[bf16], columns: usize, rows: usize, to: &mut [MaybeUninit<bf16>]) {
    /// Columns, and pairs of rows, that are transposed at once.
    const SQUARE: usize = 8;
    let count = to.len() / rows;
    let (whole_rows, whole_columns) = (rows - rows % (2 * SQUARE), count - count % SQUARE);
    for row in (0..whole_rows).step_by(2 * SQUARE) {
        for column in (0..whole_columns).step_by(SQUARE) {
            // Pairs of neighbours in a column are lanes of a row.
            let (mut pairs, mut lanes) = ([[0u32; SQUARE]; SQUARE], [[bf16::ZERO; 2 * SQUARE]; SQUARE]);
            for (i, pairs) in pairs.iter_mut().enumerate() {
                let first = &values[(row + 2 * i) * columns + column..][..SQUARE];
                let second = &values[(row + 2 * i + 1) * columns + column..][..SQUARE];
                for ((lane, first), second) in pairs.iter_mut().zip(first).zip(second) {
                    *lane = pair(*first, *second);
                }
            }
            // SAFETY: the caller's condition; both squares have eight times eight lanes of four bytes.
            unsafe {
                let from = pairs.each_ref().map(|pairs| pairs.as_ptr().cast::<f32>());
                S::transpose_8x8(from, lanes.as_mut_ptr().cast::<f32>(), SQUARE);
            }
            for (i, lanes) in lanes.iter().enumerate() {
                to[(column + i) * rows + row..][..2 * SQUARE].write_copy_of_slice(lanes);
            }
        }
    }
    for (column, to) in to.chunks_exact_mut(rows).enumerate() {
        let first = if column < whole_columns { whole_rows } else { 0 };
        for (row, to) in to.iter_mut().enumerate().skip(first) {
            to.write(values[row * columns + column]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transposed_matrix_has_its_rows_as_columns() {
        for [rows, columns] in [[1, 1], [1, 70], [7, 3], [16, 8], [17, 64], [33, 65], [48, 130]] {
            let values: Vec<bf16> = (0..rows * columns).map(|i| bf16::from_bits(i as u16 ^ 0x5a5a)).collect();
            for level in Level::available() {
                let transposed = transposed(level, &values, [rows, columns]);
                for (i, value) in transposed.iter().enumerate() {
                    let (column, row) = (i / rows, i % rows);
                    assert_eq!(value.to_bits(), values[row * columns + column].to_bits(), "{level:?} {rows} {columns}");
                }
            }
        }
    }
}
