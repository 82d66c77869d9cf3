//! Convolutions with their backward passes: tracked pictures and kernels -> pictures.
//!
//! The gradient of the picture is a convolution with the flipped kernel. That of the kernel is a product over pixels
//! with pixels as lanes: each weight's sum runs over rows of the gradient and rows of the picture, shifted.
#![allow(unsafe_code)]

use burn::tensor::Tensor;
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::super::simd::{Avx2, Avx512};
use super::{
    super::{
        Instructions, Level, View, conv as forward,
        level::with_level,
        norm::sum,
        simd::{Portable, Simd},
        wrap,
    },
    Gradient, gradient, to_f32,
};
use crate::Filter;

/// Outputs of a register tile.
const TILE_OUTPUTS: usize = 4;
/// Columns of a register tile.
const TILE_COLUMNS: usize = 3;
/// Elements of shifted rows that a task keeps in the cache.
const BLOCK_ELEMENTS: usize = 128 * 1024;
/// Most sums that are kept as whole vectors.
const MAX_VECTOR_SUMS: usize = 32 * 1024;
/// Elements of all partial sums together, which bounds the number of tasks.
const PARTIAL_ELEMENTS: usize = 8 * 1024 * 1024;

/// The gradients of a convolution of a picture, doubled before or not: of the picture, the weight and the bias; `None` if the
/// kernel does not take the tensors.
pub(super) fn backward(
    x: &Tensor<4>,
    filter: &Filter,
    grad: &Tensor<4>,
    [wants_x, wants_weight, wants_bias]: [bool; 3],
    doubled: bool,
) -> Option<[Option<Gradient>; 3]> {
    let [outputs, inputs, kernel, kernel_width] = filter.weight.dims();
    let fits = filter.padding.0 < kernel && kernel == kernel_width && (!doubled || filter.keeps_size_3x3());
    let empty = [x.shape(), grad.shape(), filter.weight.shape()].iter().any(|shape| shape.num_elements() == 0);
    if !fits || empty || x.dims()[1] != inputs || filter.bias.dims() != [outputs] {
        return None;
    }
    let (x, grad) = (to_f32(x.clone()), to_f32(grad.clone()));
    let filter = Filter { weight: to_f32(filter.weight.clone()), ..filter.clone() };
    Some([
        wants_x.then(|| gradient(picture_grad(&grad, &filter, x.dims(), doubled))),
        wants_weight.then(|| gradient(weight_grad(&grad, &filter, &x, doubled))),
        wants_bias.then(|| gradient(plane_sums(&grad))),
    ])
}

/// Gradient of the picture.
fn picture_grad(grad: &Tensor<4>, filter: &Filter, shape: [usize; 4], doubled: bool) -> Tensor<4> {
    let [_, inputs, height, width] = shape;
    let [_, _, kernel, _] = filter.weight.dims();
    let mut back = Filter {
        weight: filter.weight.clone().swap_dims(0, 1).flip([2, 3]),
        bias: Tensor::zeros([inputs], &grad.device()),
        stride: 1,
        padding: (0, 0),
    };
    let keeps_size = filter.stride == 1 && filter.padding == (kernel / 2, kernel / 2) && kernel % 2 == 1;
    let grads = if keeps_size {
        back.padding = filter.padding;
        forward::conv2d(grad, &back)
    } else {
        let sides = [height + kernel - 1, width + kernel - 1];
        forward::conv2d(&spread(grad, sides, filter.stride, kernel - 1 - filter.padding.0), &back)
    };
    let grads = grads.unwrap_or_else(|| unreachable!("pictures of f32 on the CPU"));
    if doubled { halved(&grads) } else { grads }
}

/// A picture with its pixels `stride` apart from `before` on, and zeros between them.
fn spread(x: &Tensor<4>, [to_height, to_width]: [usize; 2], stride: usize, before: usize) -> Tensor<4> {
    let [batch, channels, height, width] = x.dims();
    let view = contiguous(x);
    let values = slice(&view);
    let mut spread = vec![0.0; batch * channels * to_height * to_width];
    spread.par_chunks_exact_mut(to_height * to_width).zip(values.par_chunks_exact(height * width)).for_each(
        |(to, from)| {
            let rows = to.chunks_exact_mut(to_width).skip(before).step_by(stride);
            for (to, from) in rows.zip(from.chunks_exact(width)) {
                for (to, value) in to.iter_mut().skip(before).step_by(stride).zip(from) {
                    *to = *value;
                }
            }
        },
    );
    wrap(spread, [batch, channels, to_height, to_width])
}

/// Sums of squares of 2x2 pixels.
fn halved(x: &Tensor<4>) -> Tensor<4> {
    let [batch, channels, height, width] = x.dims();
    let view = contiguous(x);
    let values = slice(&view);
    let mut sums = vec![0.0; values.len() / 4];
    sums.par_chunks_exact_mut(width / 2).zip(values.par_chunks_exact(2 * width)).for_each(|(to, from)| {
        let (above, below) = from.split_at(width);
        let pairs = above.as_chunks::<2>().0.iter().zip(below.as_chunks::<2>().0);
        for (to, ([a, b], [c, d])) in to.iter_mut().zip(pairs) {
            *to = (a + b) + (c + d);
        }
    });
    wrap(sums, [batch, channels, height / 2, width / 2])
}

/// Gradient of the bias.
fn plane_sums(grad: &Tensor<4>) -> Tensor<1> {
    let [batch, outputs, height, width] = grad.dims();
    let (level, view) = (Level::detect(), contiguous(grad));
    let of_plane = |plane: &[f32]| {
        with_level!(
            level,
            fn run(plane: &[f32]) -> f32 {
                sum(plane, |x| x)
            }
        )
    };
    let planes: Vec<f32> = slice(&view).par_chunks_exact(height * width).map(of_plane).collect();
    let total = |output: usize| (0..batch).map(|i| planes[i * outputs + output]).sum::<f32>();
    wrap((0..outputs).map(total).collect(), [outputs])
}

fn contiguous(tensor: &Tensor<4>) -> View {
    View::f32(tensor).unwrap_or_else(|| unreachable!("pictures of f32 on the CPU")).into_contiguous()
}

fn slice(view: &View) -> &[f32] {
    view.contiguous().unwrap_or_else(|| unreachable!("made contiguous"))
}

/// Gradient of the kernel.
fn weight_grad(grad: &Tensor<4>, filter: &Filter, x: &Tensor<4>, doubled: bool) -> Tensor<4> {
    let (level, of_y, of_x) = (Level::detect(), contiguous(grad), contiguous(x));
    let [batch, outputs, out_height, out_width] = grad.dims();
    let [_, inputs, height, width] = x.dims();
    let [_, _, kernel, _] = filter.weight.dims();
    let (stride, columns) = (filter.stride, inputs * kernel);
    let padded = out_width.next_multiple_of(16);
    let block = (BLOCK_ELEMENTS / (columns * padded * stride)).clamp(1, out_height);
    let count = outputs * columns * kernel;
    let call = Call {
        grads: slice(&of_y),
        pixels: slice(&of_x),
        outputs,
        inputs,
        kernel,
        stride,
        before: filter.padding.0,
        sides: [height, width],
        out_sides: [out_height, out_width],
        padded,
        block,
        doubled,
        kept: if count <= MAX_VECTOR_SUMS { 16 } else { 1 },
    };
    let blocks = out_height.div_ceil(block);
    let units = batch * blocks;
    let tasks = (PARTIAL_ELEMENTS / (count * call.kept)).clamp(4, 32).min(units);
    let partial: Vec<Vec<f32>> = (0..tasks)
        .into_par_iter()
        .map(|task| {
            let mut sums = vec![0.0; count * call.kept];
            let mut memory = vec![0.0; call.memory()];
            for unit in units * task / tasks..units * (task + 1) / tasks {
                let (image, first) = (unit / blocks, unit % blocks * block);
                let rows = block.min(out_height - first);
                call.pack(image, first, rows, &mut memory);
                call.add(level, rows, &memory, &mut sums);
            }
            sums.chunks_exact(call.kept).map(|lanes| lanes.iter().sum()).collect()
        })
        .collect();
    let total = |index: usize| -> f32 {
        // From `[outputs, inputs, kernel, kernel]` to `[outputs, kernel, inputs * kernel]`.
        let [column, row] = [index % kernel, index / kernel % kernel];
        let [input, output] = [index / (kernel * kernel) % inputs, index / (kernel * kernel * inputs)];
        let at = (output * kernel + row) * columns + input * kernel + column;
        partial.iter().map(|partial| partial[at]).sum()
    };
    wrap((0..count).map(total).collect(), filter.weight.dims())
}

/// Inputs and sizes of the gradient of one kernel.
struct Call<'a> {
    /// `[batch, outputs, out_sides]`.
    grads: &'a [f32],
    /// `[batch, inputs, sides]`.
    pixels: &'a [f32],
    outputs: usize,
    inputs: usize,
    kernel: usize,
    stride: usize,
    before: usize,
    sides: [usize; 2],
    out_sides: [usize; 2],
    /// Width of the output, rounded up to whole vectors.
    padded: usize,
    /// Rows of the output in a block.
    block: usize,
    /// Whether the convolution reads the picture doubled.
    doubled: bool,
    /// Lanes that are kept of each sum: 16 or one.
    kept: usize,
}

impl Call<'_> {
    /// Rows of the picture under a block.
    fn picture_rows(&self, rows: usize) -> usize {
        (rows - 1) * self.stride + self.kernel
    }

    /// Elements of a packed block: `[outputs, block, padded]`, then `[picture rows, inputs * kernel, padded]`.
    fn memory(&self) -> usize {
        (self.outputs * self.block + self.picture_rows(self.block) * self.inputs * self.kernel) * self.padded
    }

    /// Packs rows of the gradient, and the picture's rows shifted by each column of the kernel.
    fn pack(&self, image: usize, first: usize, rows: usize, memory: &mut [f32]) {
        let ([height, width], [out_height, out_width]) = (self.sides, self.out_sides);
        let (grads, shifted) = memory.split_at_mut(self.outputs * self.block * self.padded);
        for output in 0..self.outputs {
            for row in 0..rows {
                let from = ((image * self.outputs + output) * out_height + first + row) * out_width;
                let to = (output * self.block + row) * self.padded;
                grads[to..][..out_width].copy_from_slice(&self.grads[from..][..out_width]);
            }
        }
        let scale = if self.doubled { 2 } else { 1 };
        let mut to = shifted.chunks_exact_mut(self.padded);
        for row in 0..self.picture_rows(rows) {
            let y = (first * self.stride + row).checked_sub(self.before).filter(|y| *y < scale * height);
            for (input, column) in (0..self.inputs).flat_map(|i| (0..self.kernel).map(move |column| (i, column))) {
                let Some(to) = to.next() else { return };
                let to = &mut to[..out_width];
                let Some(y) = y else {
                    to.fill(0.0);
                    continue;
                };
                let from = &self.pixels[((image * self.inputs + input) * height + y / scale) * width..][..width];
                if self.stride == 1 && scale == 1 {
                    let zeros = self.before.saturating_sub(column).min(out_width);
                    let start = (column + zeros).saturating_sub(self.before);
                    let count = width.saturating_sub(start).min(out_width - zeros);
                    to[..zeros].fill(0.0);
                    to[zeros..zeros + count].copy_from_slice(&from[start..start + count]);
                    to[zeros + count..].fill(0.0);
                    continue;
                }
                for (x, to) in to.iter_mut().enumerate() {
                    let at = (x * self.stride + column).checked_sub(self.before).map(|at| at / scale);
                    *to = at.and_then(|at| from.get(at)).copied().unwrap_or(0.0);
                }
            }
        }
    }

    /// Adds the products of a packed block to `[outputs, kernel, inputs * kernel, kept]`.
    fn add(&self, level: Level, rows: usize, memory: &[f32], sums: &mut [f32]) {
        assert!(memory.len() >= self.memory() && rows <= self.block);
        assert_eq!(sums.len(), self.outputs * self.kernel * self.inputs * self.kernel * self.kept);
        match level.instructions() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a level has only instructions of this CPU.
            Instructions::Avx512 => unsafe { self.avx512(rows, memory, sums) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Instructions::Avx2 => unsafe { self.avx2(rows, memory, sums) },
            // SAFETY: every CPU has what this needs.
            _ => unsafe { self.add_with::<Portable>(rows, memory, sums) },
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn avx2(&self, rows: usize, memory: &[f32], sums: &mut [f32]) {
        // SAFETY: this function has the instructions.
        unsafe { self.add_with::<Avx2>(rows, memory, sums) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    fn avx512(&self, rows: usize, memory: &[f32], sums: &mut [f32]) {
        // SAFETY: this function has the instructions.
        unsafe { self.add_with::<Avx512>(rows, memory, sums) }
    }

    /// # Safety
    /// The CPU has the instructions of `S`, and the slices are those that [`Call::add`] has checked.
    #[inline(always)]
    unsafe fn add_with<S: Simd>(&self, rows: usize, memory: &[f32], sums: &mut [f32]) {
        let columns = self.inputs * self.kernel;
        for row in 0..self.kernel {
            for column in (0..columns).step_by(TILE_COLUMNS) {
                for output in (0..self.outputs).step_by(TILE_OUTPUTS) {
                    let at = [output, row, column];
                    macro_rules! tiles {
                        ($(($outputs:literal, $columns:literal))*) => {
                            match ((self.outputs - output).min(TILE_OUTPUTS), (columns - column).min(TILE_COLUMNS)) {
                                // SAFETY: the caller's condition; the tile is inside of the sums.
                                $(($outputs, $columns) => unsafe {
                                    self.tile::<S, $outputs, $columns>(at, rows, memory, sums);
                                })*
                                _ => unreachable!("no larger tile"),
                            }
                        };
                    }
                    tiles!((1, 1)(1, 2)(1, 3)(2, 1)(2, 2)(2, 3)(3, 1)(3, 2)(3, 3)(4, 1)(4, 2)(4, 3));
                }
            }
        }
    }

    /// # Safety
    /// As [`Call::add_with`], with `O` outputs and `C` columns from `output` and `column` on.
    #[inline(always)]
    unsafe fn tile<S: Simd, const O: usize, const C: usize>(
        &self,
        [output, kernel_row, column]: [usize; 3],
        rows: usize,
        memory: &[f32],
        sums: &mut [f32],
    ) {
        let columns = self.inputs * self.kernel;
        let shifted = self.outputs * self.block * self.padded;
        // SAFETY: rows are below `block`, so both reads stay inside of what `Call::memory` counts, and the sums are
        // those of outputs and columns that there are.
        unsafe {
            let mut totals = [[S::zero(); C]; O];
            for row in 0..rows {
                let grads = memory.as_ptr().add((output * self.block + row) * self.padded);
                let picture_row = row * self.stride + kernel_row;
                let pixels = memory.as_ptr().add(shifted + (picture_row * columns + column) * self.padded);
                for lane in (0..self.padded).step_by(S::LANES) {
                    let mut x = [S::zero(); C];
                    for (j, x) in x.iter_mut().enumerate() {
                        *x = S::load(pixels.add(j * self.padded + lane));
                    }
                    for (i, totals) in totals.iter_mut().enumerate() {
                        let value = S::load(grads.add(i * self.block * self.padded + lane));
                        for (total, x) in totals.iter_mut().zip(x) {
                            *total = x.mul_add(value, *total);
                        }
                    }
                }
            }
            for (i, totals) in totals.iter().enumerate() {
                for (j, total) in totals.iter().enumerate() {
                    let at = ((output + i) * self.kernel + kernel_row) * columns + column + j;
                    let to = sums.as_mut_ptr().add(at * self.kept);
                    if self.kept == 1 {
                        *to += total.sum();
                    } else {
                        total.add(S::load(to)).store(to);
                    }
                }
            }
        }
    }
}
