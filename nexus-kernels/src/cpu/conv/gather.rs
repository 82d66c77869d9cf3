//! Convolutions of any size and stride, by gathering the pixels under each weight: pictures -> panels -> pictures.

use rayon::prelude::*;

use super::{
    Geometry,
    product::{COLS, ROWS, product},
    work::{Output, Run, for_each_task},
};
use crate::cpu::{
    Level,
    stored::{Stored, widen_slice},
};

/// Products that are added up one by one; sums of more are sums of such sums, which round less.
const CHUNK: usize = 512;

/// Reorders weights `[out, depth]` as blocks of output channels `[blocks, depth, ROWS]`, with zeros after the last.
pub(super) fn pack(weights: &[f32], depth: usize) -> Vec<f32> {
    let outputs = weights.len() / depth;
    let mut packed = vec![0.0; outputs.div_ceil(ROWS) * depth * ROWS];
    let blocks = packed.par_chunks_mut(depth * ROWS).zip(weights.par_chunks(depth * ROWS));
    blocks.for_each(|(block, weights)| {
        for (lane, weights) in weights.chunks(depth).enumerate() {
            for (to, &weight) in block[lane..].iter_mut().step_by(ROWS).zip(weights) {
                *to = weight;
            }
        }
    });
    packed
}

/// # Shapes
/// - `x`: `[batch, in, height, width]` of `geometry`
/// - `weights`: from [`pack`]
/// - `bias`: `[out]`
/// - `out`: `[batch, out, ..]`, all of it is written
pub(super) fn convolve<E: Stored>(
    level: Level,
    x: &[E],
    geometry: &Geometry,
    weights: &[f32],
    bias: &[f32],
    out: &Output<E>,
) {
    let depth = geometry.inputs * geometry.kernel * geometry.kernel;
    let [batch, outputs, height, width] = out.shape();
    let scratch = || (vec![0.0; depth * COLS], [0.0; ROWS * COLS], [0.0; ROWS * COLS]);
    for_each_task([batch, height, width], outputs, scratch, |(panel, sums, part), task| {
        for run in &task.runs {
            gather(level, x, geometry, *run, panel);
        }
        for block in task.blocks.clone() {
            sums.fill(0.0);
            let weights = &weights[block * depth * ROWS..][..depth * ROWS];
            for (weights, panel) in weights.chunks(CHUNK * ROWS).zip(panel.chunks(CHUNK * COLS)) {
                product(level, weights, panel, part);
                sums.iter_mut().zip(&*part).for_each(|(sum, part)| *sum += part);
            }
            for (lane, sums) in sums.chunks_exact_mut(COLS).enumerate() {
                let channel = block * ROWS + lane;
                let Some(bias) = bias.get(channel) else { break };
                sums.iter_mut().for_each(|sum| *sum += bias);
                for run in &task.runs {
                    // SAFETY: tasks share neither positions nor channels.
                    #[allow(unsafe_code)]
                    unsafe {
                        out.write(level, [run.picture, channel, run.row, run.col], &sums[run.at..][..run.len]);
                    }
                }
            }
        }
    });
}

/// Copies the pixels under every weight, for the output positions of a run, into their columns of `[depth, COLS]`.
fn gather<E: Stored>(level: Level, x: &[E], geometry: &Geometry, run: Run, panel: &mut [f32]) {
    let &Geometry { inputs, height, width, kernel, stride, before } = geometry;
    let mut rows = panel.chunks_exact_mut(COLS);
    for input in 0..inputs {
        let picture = &x[(run.picture * inputs + input) * height * width..][..height * width];
        for dy in 0..kernel {
            let y = (run.row * stride + dy).checked_sub(before).filter(|&y| y < height);
            for (dx, row) in (0..kernel).zip(&mut rows) {
                let to = &mut row[run.at..][..run.len];
                let Some(y) = y else {
                    to.fill(0.0);
                    continue;
                };
                let from = &picture[y * width..][..width];
                // Positions from `first` to `last` have their pixel inside the picture.
                let first = before.saturating_sub(dx).div_ceil(stride).saturating_sub(run.col).min(run.len);
                let last = (width + before).saturating_sub(dx).div_ceil(stride).saturating_sub(run.col);
                let last = last.clamp(first, run.len);
                to[..first].fill(0.0);
                to[last..].fill(0.0);
                if first == last {
                    continue;
                }
                let from = &from[(run.col + first) * stride + dx - before..];
                match stride {
                    1 => widen_slice(level, &from[..last - first], &mut to[first..last]),
                    _ => {
                        to[first..last].iter_mut().zip(from.iter().step_by(stride)).for_each(|(to, x)| *to = x.widen())
                    }
                }
            }
        }
    }
}
