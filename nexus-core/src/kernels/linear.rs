//! Linear layers on weights as stored: rows of f32 activations and bf16, f16 or f32 weights -> rows.
//!
//! `y = x Wᵀ + b` with `W` kept `[out, in]`. Few rows (decoding) are dot products that stream the weights once. Many rows
//! are register tiles: activations are packed into panels with rows as lanes, and weights are widened block by block,
//! once for all rows, into a scratch that stays in the cache.
#![allow(unsafe_code)]

use burn::tensor::{DType, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use super::{
    Level, View,
    simd::{Portable, Simd},
    wrap,
};

/// Up to so many rows are computed as dot products.
const MAX_DOT_ROWS: usize = 4;
/// Rows of activations in a panel.
const PANEL: usize = 48;
/// Outputs that a register tile computes.
const TILE_OUTPUTS: usize = 8;
/// Outputs that a task computes.
const TASK_OUTPUTS: usize = 64;
/// Inputs that are widened at a time.
const BLOCK_INPUTS: usize = 512;
/// Outputs of a task when the weights are streamed.
const DOT_TASK_OUTPUTS: usize = 32;

/// `x Wᵀ + b` in f32, or `None` if the tensors are not on the CPU or not of a supported dtype.
///
/// Many rows with f32 weights are left to the backend, whose product is as fast.
///
/// # Shapes
/// - `x`: `[.., in]`, f32
/// - `weight`: `[out, in]`, f32, bf16 or f16, row-major
/// - `bias`: `[out]`
/// - returns: `[.., out]`
pub(crate) fn linear<const D: usize>(x: &Tensor<D>, weight: &Tensor<2>, bias: Option<&Tensor<1>>) -> Option<Tensor<D>> {
    #[cfg(feature = "train")]
    if super::tracked::is_autodiff(x) {
        return super::tracked::linear(x, weight, bias);
    }
    let [outputs, inputs] = weight.dims();
    let mut shape = x.dims();
    assert_eq!(shape[D - 1], inputs, "width of the input of a linear layer");
    let rows = shape.iter().product::<usize>() / inputs.max(1);
    let (few, weight_view) = (rows <= MAX_DOT_ROWS, View::of(weight)?);
    if rows == 0 || inputs == 0 || (weight_view.dtype() == DType::F32 && !few) {
        return None;
    }
    let x = View::f32(x)?.into_contiguous();
    let bias = bias.map(|bias| View::of(bias)?.widened()).map_or(Some(vec![0.0; outputs]), |bias| bias)?;
    let layer = Layer { x: x.contiguous()?, bias: &bias, rows, inputs, outputs };
    let y = match weight_view.dtype() {
        DType::F32 => layer.run(weight_view.contiguous::<f32>()?, Level::detect()),
        DType::BF16 => layer.run(weight_view.contiguous::<bf16>()?, Level::detect()),
        DType::F16 => layer.run(weight_view.contiguous::<f16>()?, Level::detect()),
        _ => return None,
    };
    shape[D - 1] = outputs;
    Some(wrap(y, shape))
}

/// A stored weight.
trait Weight: Copy + Send + Sync {
    /// Reads and widens lanes.
    ///
    /// # Safety
    /// As for [`Simd::load`].
    unsafe fn load<S: Simd>(from: *const Self) -> S;
    /// The value.
    fn widen(self) -> f32;
}

impl Weight for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S {
        // SAFETY: the caller's contract.
        unsafe { S::load(from) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Weight for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S {
        // SAFETY: the caller's contract.
        unsafe { S::load_bf16(from) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Weight for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S {
        // SAFETY: the caller's contract.
        unsafe { S::load_f16(from) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

/// Activations and sizes of one product.
#[derive(Clone, Copy)]
struct Layer<'a> {
    /// `[rows, inputs]`.
    x: &'a [f32],
    /// `[outputs]`.
    bias: &'a [f32],
    rows: usize,
    inputs: usize,
    outputs: usize,
}

impl Layer<'_> {
    fn run<W: Weight>(&self, weight: &[W], level: Level) -> Vec<f32> {
        assert!(self.x.len() == self.rows * self.inputs && self.bias.len() == self.outputs);
        assert_eq!(weight.len(), self.outputs * self.inputs);
        if self.rows <= MAX_DOT_ROWS { self.stream(weight, level) } else { self.tiles(weight, level) }
    }

    /// Dot products: every weight is read once, for all rows.
    fn stream<W: Weight>(&self, weight: &[W], level: Level) -> Vec<f32> {
        // `[outputs, rows]`, so that a task writes a range of its own.
        let mut columns = vec![0.0; self.outputs * self.rows];
        columns.par_chunks_mut(DOT_TASK_OUTPUTS * self.rows).enumerate().for_each(|(task, columns)| {
            let first = task * DOT_TASK_OUTPUTS;
            for (column, output) in columns.chunks_mut(self.rows).zip(first..) {
                let weight = &weight[output * self.inputs..(output + 1) * self.inputs];
                for (value, x) in column.iter_mut().zip(self.x.chunks(self.inputs)) {
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

    /// Register tiles over packed panels.
    fn tiles<W: Weight>(&self, weight: &[W], level: Level) -> Vec<f32> {
        let panels = self.pack();
        let padded_rows = panels.len() / self.inputs;
        let mut y = Vec::<f32>::with_capacity(self.rows * self.outputs);
        let out = Columns { to: y.as_mut_ptr(), rows: self.rows, outputs: self.outputs };
        let tasks = self.outputs.div_ceil(TASK_OUTPUTS);
        (0..tasks).into_par_iter().for_each_init(
            || Scratch::new(padded_rows),
            |scratch, task| {
                let first = task * TASK_OUTPUTS;
                let count = TASK_OUTPUTS.min(self.outputs - first);
                scratch.sums.fill(0.0);
                for start in (0..self.inputs).step_by(BLOCK_INPUTS) {
                    let block = BLOCK_INPUTS.min(self.inputs - start);
                    for (row, output) in scratch.weights.chunks_mut(BLOCK_INPUTS).zip(first..first + count) {
                        let stored = &weight[output * self.inputs + start..][..block];
                        widen(stored, row, level);
                    }
                    for (panel, values) in panels.chunks(PANEL * self.inputs).enumerate() {
                        let values = &values[start * PANEL..(start + block) * PANEL];
                        let lanes = (self.rows - panel * PANEL).min(PANEL);
                        for tile in (0..count).step_by(TILE_OUTPUTS) {
                            let weights = &scratch.weights[tile * BLOCK_INPUTS..(tile + TILE_OUTPUTS) * BLOCK_INPUTS];
                            let sums = &mut scratch.sums[tile * padded_rows + panel * PANEL..];
                            multiply_add(values, weights, sums, padded_rows, lanes, level);
                        }
                    }
                }
                out.write(first, &scratch.sums[..count * padded_rows], padded_rows, &self.bias[first..first + count]);
            },
        );
        // SAFETY: the tasks cover all outputs, and each wrote its outputs of every row.
        unsafe { y.set_len(self.rows * self.outputs) };
        y
    }

    /// Panels of [`PANEL`] rows, `[panels, inputs, PANEL]`; rows that are missing in the last one are zero.
    fn pack(&self) -> Vec<f32> {
        let panel_len = PANEL * self.inputs;
        let mut panels = vec![0.0; self.rows.div_ceil(PANEL) * panel_len];
        panels.par_chunks_mut(panel_len).zip(self.x.par_chunks(panel_len)).for_each(|(panel, rows)| {
            for start in (0..self.inputs).step_by(16) {
                let block = 16.min(self.inputs - start);
                for (lane, row) in rows.chunks(self.inputs).enumerate() {
                    for (index, value) in row[start..start + block].iter().enumerate() {
                        panel[(start + index) * PANEL + lane] = *value;
                    }
                }
            }
        });
        panels
    }
}

/// What one thread needs besides its inputs.
struct Scratch {
    /// Widened weights of a block, `[TASK_OUTPUTS, BLOCK_INPUTS]`.
    weights: Vec<f32>,
    /// `[TASK_OUTPUTS, padded rows]`.
    sums: Vec<f32>,
}

impl Scratch {
    fn new(padded_rows: usize) -> Self {
        Self { weights: vec![0.0; TASK_OUTPUTS * BLOCK_INPUTS], sums: vec![0.0; TASK_OUTPUTS * padded_rows] }
    }
}

/// The output, `[rows, outputs]`, written by tasks that own different columns.
struct Columns {
    to: *mut f32,
    rows: usize,
    outputs: usize,
}

// SAFETY: the pointer is only used by `write`, whose callers own different columns.
unsafe impl Sync for Columns {}

impl Columns {
    /// Writes the columns from `first` on: `sums` is `[bias.len(), padded_rows]`.
    fn write(&self, first: usize, sums: &[f32], padded_rows: usize, bias: &[f32]) {
        assert!(first + bias.len() <= self.outputs && self.rows <= padded_rows);
        for start in (0..self.rows).step_by(16) {
            for (index, (column, bias)) in sums.chunks(padded_rows).zip(bias).enumerate() {
                let end = self.rows.min(start + 16);
                for (row, sum) in (start..end).zip(&column[start..end]) {
                    // SAFETY: `row` and the column are inside of the allocation of `rows * outputs` elements, and no
                    // other task writes this column.
                    unsafe { self.to.add(row * self.outputs + first + index).write(sum + bias) };
                }
            }
        }
    }
}

/// Calls a function for the vectors of a level, compiled with its instructions.
macro_rules! for_level {
    ($level:expr, $name:ident::<$($generic:ident),*>($($arg:ident: $ty:ty),*) $(-> $out:ty)? where $($bound:tt)*) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<$($bound)*>($($arg: $ty),*) $(-> $out)? {
            // SAFETY: this function has the instructions, and the callee checks its slices.
            unsafe { $name::<Avx2, $($generic),*>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512<$($bound)*>($($arg: $ty),*) $(-> $out)? {
            // SAFETY: as above.
            unsafe { $name::<Avx512, $($generic),*>($($arg),*) }
        }
        match $level {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: levels come from `Level::detect`, so the CPU has these instructions.
            Level::Avx512 => unsafe { avx512::<$($generic),*>($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx2 => unsafe { avx2::<$($generic),*>($($arg),*) },
            // SAFETY: every CPU has what this needs.
            _ => unsafe { $name::<Portable, $($generic),*>($($arg),*) },
        }
    }};
}

fn dot<W: Weight>(x: &[f32], weight: &[W], level: Level) -> f32 {
    for_level!(level, dot_with::<W>(x: &[f32], weight: &[W]) -> f32 where W: Weight)
}

/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
unsafe fn dot_with<S: Simd, W: Weight>(x: &[f32], weight: &[W]) -> f32 {
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

/// Widens as many values as are stored.
fn widen<W: Weight>(stored: &[W], wide: &mut [f32], level: Level) {
    assert!(stored.len() <= wide.len());
    for_level!(level, widen_with::<W>(stored: &[W], wide: &mut [f32]) where W: Weight)
}

/// # Safety
/// The CPU has the instructions of `S`, and `wide` is no shorter than `stored`.
#[inline(always)]
unsafe fn widen_with<S: Simd, W: Weight>(stored: &[W], wide: &mut [f32]) {
    let whole = stored.len() - stored.len() % S::LANES;
    for index in (0..whole).step_by(S::LANES) {
        // SAFETY: reads and writes end at or before `whole`, which is inside of both slices.
        unsafe { W::load::<S>(stored.as_ptr().add(index)).store(wide.as_mut_ptr().add(index)) };
    }
    for (wide, stored) in wide[whole..].iter_mut().zip(&stored[whole..]) {
        *wide = stored.widen();
    }
}

/// Adds the product of a panel and [`TILE_OUTPUTS`] rows of weights to `sums`, `[TILE_OUTPUTS, stride]`, for `lanes` rows
/// of the panel, rounded up to whole vectors.
///
/// - `values`: `[inputs, PANEL]`
/// - `weights`: `[TILE_OUTPUTS, BLOCK_INPUTS]`
fn multiply_add(values: &[f32], weights: &[f32], sums: &mut [f32], stride: usize, lanes: usize, level: Level) {
    assert!(values.len().is_multiple_of(PANEL) && values.len() / PANEL <= BLOCK_INPUTS && lanes <= PANEL);
    assert!(weights.len() >= TILE_OUTPUTS * BLOCK_INPUTS && sums.len() >= (TILE_OUTPUTS - 1) * stride + PANEL);
    for_level!(level, multiply_add_with::<>(values: &[f32], weights: &[f32], sums: &mut [f32], stride: usize, lanes: usize) where)
}

/// # Safety
/// The CPU has the instructions of `S`, and the slices are as [`multiply_add`] checks.
#[inline(always)]
unsafe fn multiply_add_with<S: Simd>(values: &[f32], weights: &[f32], sums: &mut [f32], stride: usize, lanes: usize) {
    // As many accumulators as the registers hold: 3 x 8 of 32 for AVX-512, 2 x 4 of 16 for eight lanes.
    match S::LANES {
        16 => {
            for start in (0..lanes).step_by(3 * S::LANES) {
                // SAFETY: the caller's contract; the lanes end at or before `PANEL`.
                unsafe {
                    match (lanes - start).div_ceil(S::LANES) {
                        1 => tile::<S, 1, 8>(values, weights, sums, stride, start, 0),
                        2 => tile::<S, 2, 8>(values, weights, sums, stride, start, 0),
                        _ => tile::<S, 3, 8>(values, weights, sums, stride, start, 0),
                    }
                }
            }
        }
        _ => {
            for start in (0..lanes).step_by(2 * S::LANES) {
                for output in (0..TILE_OUTPUTS).step_by(4) {
                    // SAFETY: as above; `PANEL` is a multiple of two vectors of eight lanes.
                    unsafe { tile::<S, 2, 4>(values, weights, sums, stride, start, output) };
                }
            }
        }
    }
}

/// `VECTORS` vectors of rows from `lane` on, times `OUTPUTS` rows of weights from `output` on.
///
/// # Safety
/// As [`multiply_add_with`], with `lane + VECTORS * S::LANES <= PANEL` and `output + OUTPUTS <= TILE_OUTPUTS`.
#[inline(always)]
unsafe fn tile<S: Simd, const VECTORS: usize, const OUTPUTS: usize>(
    values: &[f32],
    weights: &[f32],
    sums: &mut [f32],
    stride: usize,
    lane: usize,
    output: usize,
) {
    let inputs = values.len() / PANEL;
    let values = values.as_ptr();
    let weights = weights[output * BLOCK_INPUTS..].as_ptr();
    let sums = sums[output * stride + lane..].as_mut_ptr();
    // SAFETY: reads of `values` stay below `inputs * PANEL`, those of `weights` below `OUTPUTS * BLOCK_INPUTS`, and
    // `sums` is accessed below `(OUTPUTS - 1) * stride + PANEL - lane`.
    unsafe {
        let mut totals = [[S::zero(); VECTORS]; OUTPUTS];
        for (output, totals) in totals.iter_mut().enumerate() {
            for (vector, total) in totals.iter_mut().enumerate() {
                *total = S::load(sums.add(output * stride + vector * S::LANES));
            }
        }
        for input in 0..inputs {
            let mut x = [S::zero(); VECTORS];
            for (vector, x) in x.iter_mut().enumerate() {
                *x = S::load(values.add(input * PANEL + lane + vector * S::LANES));
            }
            for (output, totals) in totals.iter_mut().enumerate() {
                let weight = S::splat(*weights.add(output * BLOCK_INPUTS + input));
                for (total, x) in totals.iter_mut().zip(x) {
                    *total = x.mul_add(weight, *total);
                }
            }
        }
        for (output, totals) in totals.iter().enumerate() {
            for (vector, total) in totals.iter().enumerate() {
                total.store(sums.add(output * stride + vector * S::LANES));
            }
        }
    }
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

    fn check<W: Weight>(rows: usize, inputs: usize, outputs: usize, narrow: impl Fn(f32) -> W) {
        let (x, bias) = (values([rows, inputs], 1), values([1, outputs], 3));
        let weight: Vec<W> = values([outputs, inputs], 2).into_iter().map(narrow).collect();
        let wide: Vec<f32> = weight.iter().map(|w| w.widen()).collect();
        let expected = expected(&x, &wide, &bias, inputs);
        for level in Level::available() {
            let layer = Layer { x: &x, bias: &bias, rows, inputs, outputs };
            let drift = relative_drift(&layer.run(&weight, level), &expected);
            assert!(drift < 2e-6, "{level:?}, {rows} x {inputs} -> {outputs}: drift {drift:e}");
        }
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
            (48, 513, 8),
            (49, 100, 71),
            (97, 1031, 66),
        ] {
            check(rows, inputs, outputs, |w| w);
            check(rows, inputs, outputs, bf16::from_f32);
            check(rows, inputs, outputs, f16::from_f32);
        }
    }

    #[test]
    fn nan_and_infinity_pass_through() {
        for rows in [1, 60] {
            let mut x = values([rows, 40], 1);
            x[3] = f32::NAN;
            let mut weight: Vec<bf16> = values([20, 40], 2).into_iter().map(bf16::from_f32).collect();
            weight[7 * 40 + 1] = bf16::INFINITY;
            for level in Level::available() {
                let layer = Layer { x: &x, bias: &[0.0; 20], rows, inputs: 40, outputs: 20 };
                let y = layer.run(&weight, level);
                assert!(y[..20].iter().all(|value| value.is_nan()), "{level:?}");
                if rows > 1 {
                    assert!(y[20..].chunks(20).all(|row| row[7].is_infinite() && row[6].is_finite()), "{level:?}");
                }
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
