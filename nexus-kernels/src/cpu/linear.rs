//! Linear layers on weights as stored: rows of activations and bf16, f16 or f32 weights -> rows.
//!
//! `y = x Wᵀ + b` with `W` kept `[out, in]`. Few rows (decoding) are dot products that stream the weights once; many rows
//! go through register tiles.
#![allow(unsafe_code)]

#[cfg(any(test, target_arch = "x86_64"))]
mod amx;
mod columns;
mod factors;
mod tiles;

use burn::tensor::{DType, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

#[cfg(any(test, feature = "autodiff"))]
pub(super) use self::factors::ColumnMajor;
use self::tiles::Pair;
pub(super) use self::{factors::RowMajor, tiles::tiles};
use super::{
    Level, View,
    simd::{Simd, for_simd},
    stored::{Stored, widen},
    wrap,
};

/// Up to so many rows are computed as dot products.
pub(super) const MAX_DOT_ROWS: usize = 4;
/// Outputs of a task when the weights are streamed.
const DOT_TASK_OUTPUTS: usize = 32;

/// `x Wᵀ + b` in the dtype of `x`, or `None` if the tensors are not on the CPU or not of floats.
///
/// Sums are of f32. bf16 activations and weights are multiplied as such where the CPU does that; all others are widened.
///
/// # Shapes
/// - `x`: `[.., in]`
/// - `weight`: `[out, in]`, row-major
/// - `bias`: `[out]`
/// - returns: `[.., out]`
pub(crate) fn linear<const D: usize>(x: &Tensor<D>, weight: &Tensor<2>, bias: Option<&Tensor<1>>) -> Option<Tensor<D>> {
    let [outputs, inputs] = weight.dims();
    let mut shape = x.dims();
    assert_eq!(shape[D - 1], inputs, "width of the input of a linear layer");
    let rows = shape.iter().product::<usize>() / inputs.max(1);
    if rows == 0 || inputs == 0 || outputs == 0 {
        return None;
    }
    let weight = View::of(weight)?;
    let x = View::of(x)?.into_contiguous();
    let bias = bias.map(|bias| View::of(bias)?.into_f32()).map_or(Some(vec![0.0; outputs]), |bias| bias)?;
    let layer = Layer { bias: &bias, rows, inputs, outputs };
    shape[D - 1] = outputs;
    let level = Level::detect();
    match x.dtype() {
        DType::F32 => Some(wrap(layer.on_stored::<f32>(x.contiguous()?, &weight, level)?, shape)),
        DType::BF16 if weight.dtype() == DType::BF16 && level.multiplies_bf16() => {
            Some(wrap(layer.on_bf16::<bf16>(x.contiguous()?, weight.contiguous()?, level), shape))
        }
        DType::BF16 => Some(wrap(layer.on_stored::<bf16>(&widen(x.contiguous::<bf16>()?), &weight, level)?, shape)),
        DType::F16 => Some(wrap(layer.on_stored::<f16>(&widen(x.contiguous::<f16>()?), &weight, level)?, shape)),
        _ => None,
    }
}

/// Bias and sizes of one product.
#[derive(Clone, Copy)]
pub(super) struct Layer<'a> {
    /// `[outputs]`.
    pub(super) bias: &'a [f32],
    pub(super) rows: usize,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
}

impl Layer<'_> {
    fn factor<'a, E>(&self, values: &'a [E]) -> RowMajor<'a, E> {
        RowMajor { values, inputs: self.inputs }
    }

    /// The result for weights of any dtype, stored as `Y`; `None` if they are not floats or not row-major.
    fn on_stored<Y: Stored>(&self, x: &[f32], weight: &View, level: Level) -> Option<Vec<Y>> {
        match weight.dtype() {
            DType::F32 => Some(self.run(x, weight.contiguous::<f32>()?, level)),
            DType::BF16 => Some(self.run(x, weight.contiguous::<bf16>()?, level)),
            DType::F16 => Some(self.run(x, weight.contiguous::<f16>()?, level)),
            _ => None,
        }
    }

    /// The result of products of bf16, for a CPU that has them.
    pub(super) fn on_bf16<Y: Stored>(&self, x: &[bf16], weight: &[bf16], level: Level) -> Vec<Y> {
        if self.rows <= MAX_DOT_ROWS {
            return self.run(&widen(x), weight, level);
        }
        #[cfg(target_arch = "x86_64")]
        if self.rows >= amx::MIN_ROWS && level.multiplies_bf16_tiles() {
            // SAFETY: the CPU has just been asked, and only products open the unit, while they take no other work.
            return unsafe { amx::product::<amx::Amx, Y>(self, x, weight, level) };
        }
        tiles::<Pair, Y>(self, &self.factor(x), &self.factor(weight), level)
    }

    fn run<W: Stored, Y: Stored>(&self, x: &[f32], weight: &[W], level: Level) -> Vec<Y> {
        assert!(x.len() == self.rows * self.inputs && self.bias.len() == self.outputs);
        assert_eq!(weight.len(), self.outputs * self.inputs);
        if self.rows <= MAX_DOT_ROWS {
            Y::narrow(self.stream(x, weight, level))
        } else {
            tiles::<f32, Y>(self, &self.factor(x), &self.factor(weight), level)
        }
    }

    /// Dot products: every weight is read once, for all rows.
    fn stream<W: Stored>(&self, x: &[f32], weight: &[W], level: Level) -> Vec<f32> {
        // `[outputs, rows]`, so that a task writes a range of its own.
        let mut columns = vec![0.0; self.outputs * self.rows];
        columns.par_chunks_mut(DOT_TASK_OUTPUTS * self.rows).enumerate().for_each(|(task, columns)| {
            let first = task * DOT_TASK_OUTPUTS;
            for (column, output) in columns.chunks_mut(self.rows).zip(first..) {
                let weight = &weight[output * self.inputs..(output + 1) * self.inputs];
                for (value, x) in column.iter_mut().zip(x.chunks(self.inputs)) {
                    *value = dot(x, weight, level) + self.bias[output];
                }
            }
        });
        if self.rows == 1 {
            return columns;
        }
        let value = |index: usize| columns[index % self.outputs * self.rows + index / self.outputs];
        (0..columns.len()).map(value).collect()
    }
}

fn dot<W: Stored>(x: &[f32], weight: &[W], level: Level) -> f32 {
    for_simd!(level, dot_with::<W>(x: &[f32], weight: &[W]) -> f32 where W: Stored)
}

/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
unsafe fn dot_with<S: Simd, W: Stored>(x: &[f32], weight: &[W]) -> f32 {
    const STREAMS: usize = 4;
    let len = x.len().min(weight.len());
    let step = STREAMS * S::LANES;
    let whole = len - len % step;
    // SAFETY: every read ends at or before `whole`, which is inside of both slices.
    let mut sum = unsafe {
        let mut sums = [S::zero(); STREAMS];
        for start in (0..whole).step_by(step) {
            for (stream, sum) in sums.iter_mut().enumerate() {
                let index = start + stream * S::LANES;
                *sum = S::load(x.as_ptr().add(index)).mul_add(W::load(weight.as_ptr().add(index)), *sum);
            }
        }
        sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum()
    };
    for (x, weight) in x[whole..len].iter().zip(&weight[whole..len]) {
        sum += x * weight.widen();
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{cpu, ramp, relative_drift};

    fn expected(x: &[f32], weight: &[f32], bias: &[f32], inputs: usize) -> Vec<f32> {
        let dot = |x: &[f32], weight: &[f32]| x.iter().zip(weight).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
        x.chunks(inputs)
            .flat_map(|x| {
                weight.chunks(inputs).zip(bias).map(move |(w, bias)| {
                    let sum: f64 = dot(x, w);
                    (sum + f64::from(*bias)) as f32
                })
            })
            .collect()
    }

    fn values(shape: [usize; 2], seed: usize) -> Vec<f32> {
        ramp(shape, seed).into_data().try_into_vec_as::<f32>().unwrap()
    }

    /// `[rows, inputs]` as `[inputs, rows]`.
    fn transposed(values: &[f32], inputs: usize) -> Vec<f32> {
        (0..inputs).flat_map(|input| values.iter().skip(input).step_by(inputs).copied()).collect()
    }

    /// f32 at every level, with either factor transposed and both.
    fn check_transposed(rows: usize, inputs: usize, outputs: usize) {
        let (x, weight, bias) = (values([rows, inputs], 1), values([outputs, inputs], 2), values([1, outputs], 3));
        let expected = expected(&x, &weight, &bias, inputs);
        let layer = Layer { bias: &bias, rows, inputs, outputs };
        let (transposed_x, transposed_weight) = (transposed(&x, inputs), transposed(&weight, inputs));
        let transposed_x = ColumnMajor { values: &transposed_x, rows };
        let transposed_weight = ColumnMajor { values: &transposed_weight, rows: outputs };
        for level in Level::available() {
            let products: [Vec<f32>; 3] = [
                tiles(&layer, &transposed_x, &layer.factor(&weight), level),
                tiles(&layer, &layer.factor(&x), &transposed_weight, level),
                tiles(&layer, &transposed_x, &transposed_weight, level),
            ];
            for (which, y) in products.iter().enumerate() {
                let drift = relative_drift(y, &expected);
                assert!(drift < 2e-6, "{level:?}, {rows} x {inputs} -> {outputs}, {which}: drift {drift:e}");
            }
        }
    }

    fn check<W: Stored>(rows: usize, inputs: usize, outputs: usize, narrow: impl Fn(f32) -> W) {
        let (x, bias) = (values([rows, inputs], 1), values([1, outputs], 3));
        let weight: Vec<W> = values([outputs, inputs], 2).into_iter().map(narrow).collect();
        let wide: Vec<f32> = weight.iter().map(|w| w.widen()).collect();
        let expected = expected(&x, &wide, &bias, inputs);
        let layer = Layer { bias: &bias, rows, inputs, outputs };
        for level in Level::available() {
            let drift = relative_drift(&layer.run::<W, f32>(&x, &weight, level), &expected);
            assert!(drift < 2e-6, "{level:?}, {rows} x {inputs} -> {outputs}: drift {drift:e}");
        }
    }

    /// Drift of a sum of f32.
    pub(super) const NEAR: f32 = 5e-6;

    /// bf16 rows and weights, and their product.
    pub(super) struct Example {
        pub(super) x: Vec<bf16>,
        pub(super) weight: Vec<bf16>,
        pub(super) expected: Vec<f32>,
        bias: Vec<f32>,
        sizes: [usize; 3],
    }

    impl Example {
        pub(super) fn of(rows: usize, inputs: usize, outputs: usize) -> Self {
            let half = |shape, seed| values(shape, seed).into_iter().map(bf16::from_f32).collect::<Vec<_>>();
            let (x, weight, bias) = (half([rows, inputs], 1), half([outputs, inputs], 2), values([1, outputs], 3));
            let expected = expected(&widen(&x), &widen(&weight), &bias, inputs);
            Self { x, weight, expected, bias, sizes: [rows, inputs, outputs] }
        }

        pub(super) fn layer(&self) -> Layer<'_> {
            let [rows, inputs, outputs] = self.sizes;
            Layer { bias: &self.bias, rows, inputs, outputs }
        }
    }

    /// bf16 at every level, as pairs and in tiles: other CPUs do in several steps what some have an instruction for.
    fn check_bf16(rows: usize, inputs: usize, outputs: usize) {
        let example = Example::of(rows, inputs, outputs);
        for (name, y) in products_of_bf16(&example.layer(), &example.x, &example.weight) {
            let drift = relative_drift(&y, &example.expected);
            assert!(drift < NEAR, "{name}, {rows} x {inputs} -> {outputs}: drift {drift:e}");
        }
    }

    fn products_of_bf16(layer: &Layer<'_>, x: &[bf16], weight: &[bf16]) -> Vec<(String, Vec<f32>)> {
        let levels = Level::available()
            .filter(|level| level.instructions() != crate::cpu::Instructions::Avx512 || level.multiplies_bf16());
        let pairs = levels.map(|level| {
            (format!("pairs, {level:?}"), tiles::<Pair, f32>(layer, &layer.factor(x), &layer.factor(weight), level))
        });
        pairs.chain(amx::tests::products(layer, x, weight)).collect()
    }

    #[test]
    fn odd_shapes_match_the_sum_at_every_level() {
        for (rows, inputs, outputs) in [
            (1, 1, 1),
            (1, 63, 5),
            (1, 1040, 67),
            (3, 65, 130),
            (4, 17, 31),
            (5, 1, 9),
            (5, 13, 64),
            (17, 512, 65),
            (18, 40, 50),
            (35, 1030, 49),
            (52, 513, 9),
            (48, 513, 8),
            (49, 100, 71),
            (33, 257, 49),
            (97, 1031, 66),
        ] {
            check(rows, inputs, outputs, |w| w);
            check(rows, inputs, outputs, bf16::from_f32);
            check(rows, inputs, outputs, f16::from_f32);
            check_transposed(rows, inputs, outputs);
            check_bf16(rows, inputs, outputs);
        }
    }

    #[test]
    fn rows_of_several_tasks_match_the_sum() {
        for rows in (100..200).step_by(7).chain([1392, 1395, 1409, 2801]) {
            check(rows, 3, 70, bf16::from_f32);
            check_transposed(rows, 5, 66);
            check_bf16(rows, 5, 9);
        }
    }

    #[test]
    fn results_larger_than_the_caches_match_the_sum() {
        check(1030, 3, 2112, |w| w);
        check(1031, 2, 2059, |w| w);
    }

    #[test]
    fn nan_and_infinity_pass_through() {
        for rows in [1, 50, 60] {
            let mut x = values([rows, 40], 1);
            x[3] = f32::NAN;
            let mut weight: Vec<bf16> = values([20, 40], 2).into_iter().map(bf16::from_f32).collect();
            weight[7 * 40 + 1] = bf16::INFINITY;
            let layer = Layer { bias: &[0.0; 20], rows, inputs: 40, outputs: 20 };
            let half: Vec<bf16> = x.iter().copied().map(bf16::from_f32).collect();
            let of_floats = Level::available().map(|level| (format!("{level:?}"), layer.run(&x, &weight, level)));
            for (name, y) in of_floats.chain(products_of_bf16(&layer, &half, &weight)) {
                assert!(y[..20].iter().all(|value: &f32| value.is_nan()), "{name}");
                if rows > 1 {
                    assert!(y[20..].chunks(20).all(|row| row[7].is_infinite() && row[6].is_finite()), "{name}");
                }
            }
        }
    }

    #[test]
    fn half_activations_give_what_the_plain_formulation_gives_in_f32_rounded_once() {
        for (dtype, unit) in [(DType::BF16, 8e-3), (DType::F16, 1e-3)] {
            for (weight_dtype, rows) in
                [DType::F32, DType::BF16, DType::F16].into_iter().flat_map(|w| [(w, 1), (w, 70)])
            {
                let (x, bias) = (ramp([2, rows, 45], 1).cast(dtype), ramp([67], 3).cast(dtype));
                let weight: Tensor<2> = ramp([67, 45], 2).cast(weight_dtype);
                let y = linear(&x, &weight, Some(&bias)).unwrap();
                assert_eq!((y.dtype(), y.dims()), (dtype, [2, rows, 67]));
                let wide = |x: Tensor<2>| x.cast(DType::F32);
                let bias = bias.cast(DType::F32);
                let plain = burn::tensor::module::linear(x.cast(DType::F32), wide(weight).transpose(), Some(bias));
                crate::testing::assert_close_tensors(&y.cast(DType::F32), &plain, unit);
            }
        }
    }

    #[test]
    fn strided_activations_are_read_right() {
        let x: Tensor<3> = ramp([2, 3, 40], 1);
        let weight: Tensor<2> = ramp([9, 16], 2).cast(DType::BF16);
        let narrowed = x.narrow(2, 5, 16).swap_dims(0, 1);
        let wide = weight.clone().cast(DType::F32);
        let plain = burn::tensor::module::linear(narrowed.clone(), wide.transpose(), None);
        let fast = linear(&narrowed, &weight, None).unwrap();
        assert_eq!(fast.device(), cpu());
        crate::testing::assert_close_tensors(&fast, &plain, 2e-6);
    }
}
