//! Linear layers of bf16 with their backward pass, where the CPU multiplies bf16: rows and weights -> rows.
//!
//! All three products are those of the plain kernel, of matrices that are turned where they need to be. Weights of the
//! optimizer, in f32, are rounded once; their gradients are f32.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use burn::tensor::{DType, Tensor};
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
    Operand, gradient, in_dtype,
    linear::sum_rows,
};
use crate::graph::record_affine;

/// Columns that a task turns.
const TASK_COLUMNS: usize = 64;

/// As [`super::linear`], for rows of bf16 and a bias of f32.
pub(super) fn linear<const D: usize>(x: Operand<D>, weight: Operand<2>, bias: Option<Operand<1>>) -> Option<Tensor<D>> {
    let ([outputs, inputs], shape) = (weight.value.dims(), x.value.dims());
    let rows = shape.iter().product::<usize>() / inputs;
    let mut result_shape = shape;
    result_shape[D - 1] = outputs;
    let kept = Matrix::of(x.value.clone().reshape([rows, inputs]))?;
    let kept_weight = Matrix::of(weight.value.clone())?;
    let addends = match &bias {
        Some(bias) => Some(View::of(&bias.value)?.widened()?),
        None => None,
    };
    let result: Vec<bf16> = kept.times_turned(&kept_weight, addends.as_deref());
    let kept = weight.tracked.then_some(kept);
    Some(record_affine(
        x,
        weight,
        bias,
        wrap(result, result_shape),
        move |upstream: Tensor<D>, [of_x, of_weight, of_bias]| {
            let rows: Tensor<2> = upstream.reshape([rows, outputs]);
            let bias = of_bias.then(|| gradient(sum_rows(&in_dtype(rows.clone(), DType::F32))));
            let rows = Matrix::of(rows).unwrap_or_else(|| unreachable!("a gradient on the CPU"));
            let of_x = of_x.then(|| gradient(wrap::<bf16, D>(rows.times_turned(&kept_weight.turned(), None), shape)));
            let kept = kept.as_ref().filter(|_| of_weight);
            let of_weight = kept
                .map(|x| gradient(wrap::<f32, 2>(rows.turned().times_turned(&x.turned(), None), [outputs, inputs])));
            [of_x, of_weight, bias]
        },
    ))
}

/// A matrix of bf16 in row-major order.
struct Matrix {
    view: View,
    dims: [usize; 2],
}

impl Matrix {
    fn of(tensor: Tensor<2>) -> Option<Self> {
        let dims = tensor.dims();
        let view = View::of(&in_dtype(tensor, DType::BF16))?.into_contiguous();
        view.contiguous::<bf16>()?;
        Some(Self { view, dims })
    }

    fn values(&self) -> &[bf16] {
        self.view.contiguous().unwrap_or_else(|| unreachable!("checked when it was made"))
    }

    /// `self otherᵀ`, with `bias` added to every row.
    fn times_turned<Y: Stored>(&self, other: &Self, bias: Option<&[f32]>) -> Vec<Y> {
        let ([rows, inputs], [outputs, _]) = (self.dims, other.dims);
        let none = vec![0.0; if bias.is_none() { outputs } else { 0 }];
        let layer = Layer { bias: bias.unwrap_or(&none), rows, inputs, outputs };
        layer.on_bf16(self.values(), other.values(), Level::detect())
    }

    fn turned(&self) -> Self {
        let [rows, columns] = self.dims;
        let turned: Tensor<2> = wrap(turned(Level::detect(), self.values(), self.dims), [columns, rows]);
        Self::of(turned).unwrap_or_else(|| unreachable!("a tensor of bf16 on the CPU"))
    }
}

/// The transpose of a matrix, `[rows, columns]`.
fn turned(level: Level, values: &[bf16], [rows, columns]: [usize; 2]) -> Vec<bf16> {
    assert!(values.len() == rows * columns);
    let mut turned = Vec::with_capacity(values.len());
    let spare = turned.spare_capacity_mut()[..values.len()].par_chunks_mut(TASK_COLUMNS * rows);
    spare.enumerate().for_each(|(task, to)| {
        let values = &values[task * TASK_COLUMNS..];
        for_simd!(level, turn::<>(values: &[bf16], columns: usize, rows: usize, to: &mut [MaybeUninit<bf16>]) where)
    });
    // SAFETY: the tasks cover all columns, and each wrote all rows of its own.
    unsafe { turned.set_len(values.len()) };
    turned
}

/// Turns the first columns of rows that are `columns` apart, as many as `to` has rows, all of which it writes.
///
/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
unsafe fn turn<S: Simd>(values: &[bf16], columns: usize, rows: usize, to: &mut [MaybeUninit<bf16>]) {
    /// Columns, and pairs of rows, that are turned at once.
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
    use crate::testing::{limit_cpu, ramp, relative_drift};

    #[test]
    fn a_turned_matrix_has_its_rows_as_columns() {
        for [rows, columns] in [[1, 1], [1, 70], [7, 3], [16, 8], [17, 64], [33, 65], [48, 130]] {
            let values: Vec<bf16> = (0..rows * columns).map(|i| bf16::from_bits(i as u16 ^ 0x5a5a)).collect();
            for level in Level::available() {
                let turned = turned(level, &values, [rows, columns]);
                for (i, value) in turned.iter().enumerate() {
                    let (column, row) = (i / rows, i % rows);
                    assert_eq!(value.to_bits(), values[row * columns + column].to_bits(), "{level:?} {rows} {columns}");
                }
            }
        }
    }

    /// Result and gradients of x, weight and bias.
    fn run(x: &Tensor<3>, weight: &Tensor<2>, bias: &Tensor<1>) -> [Vec<f32>; 4] {
        let x = Tensor::from_inner(x.clone()).require_grad();
        let weight: Tensor<2> = Tensor::from_inner(weight.clone()).require_grad();
        let bias: Tensor<1> = Tensor::from_inner(bias.clone()).require_grad();
        let y: Tensor<3> = super::super::linear(&x, &weight, Some(&bias)).unwrap();
        assert_eq!(y.dtype(), x.dtype());
        let slopes: Tensor<3> = ramp(y.dims(), 7).cast(DType::BF16).cast(y.dtype());
        let mut gradients = (y.clone() * Tensor::from_inner(slopes)).sum().backward();
        let of_x = x.grad_remove(&mut gradients).unwrap();
        let of_weight = weight.grad_remove(&mut gradients).unwrap();
        let of_bias = bias.grad_remove(&mut gradients).unwrap();
        assert_eq!([of_x.dtype(), of_weight.dtype()], [x.dtype(), weight.dtype()]);
        let read = |data: burn::tensor::TensorData| data.try_into_vec_as::<f32>().unwrap();
        [y.inner().into_data(), of_x.into_data(), of_weight.into_data(), of_bias.into_data()].map(read)
    }

    #[test]
    fn gradients_are_those_of_the_layer_in_f32_on_rounded_numbers() {
        for [batch, rows, inputs, outputs] in
            [[1, 1, 1, 1], [2, 3, 17, 13], [1, 2, 64, 48], [3, 50, 65, 49], [1, 97, 31, 101]]
        {
            let rounded = |x: Tensor<3>| x.cast(DType::BF16);
            let x = rounded(ramp([batch, rows, inputs], 1));
            let weight: Tensor<2> = ramp([outputs, inputs], 2).cast(DType::BF16).cast(DType::F32);
            let bias: Tensor<1> = ramp([outputs], 3);
            let expected = run(&x.clone().cast(DType::F32), &weight, &bias);
            let names = ["result", "gradient of x", "gradient of the weight", "gradient of the bias"];
            for level in Level::available() {
                limit_cpu(level);
                for (i, (actual, expected)) in run(&x, &weight, &bias).iter().zip(&expected).enumerate() {
                    let drift = relative_drift(actual, expected);
                    let most = if i < 2 { 4e-3 } else { 2e-5 };
                    assert!(
                        drift < most,
                        "{level:?}, {rows} x {inputs} -> {outputs}: drift {drift:e} of the {}",
                        names[i]
                    );
                }
            }
            limit_cpu(Level::Avx512);
        }
    }
}
