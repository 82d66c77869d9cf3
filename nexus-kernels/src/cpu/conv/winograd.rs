//! 3x3 convolutions that keep the size, in Winograd's form: tiles of 4x4 pixels -> products -> tiles of 2x2 pixels.
//!
//! Along one side, four pixels `d` and three weights `g` give two outputs with four products instead of six:
//! `Aᵀ((G g) ∘ (Bᵀ d))`, where `Bᵀ d = [d0 - d2, d1 + d2, d2 - d1, d1 - d3]`. Over two sides that is 16 products for 36,
//! and each of the 16 is a matrix product over the channels. A picture doubled by repeating pixels has tiles with
//! `d1 = d2`, so one product of four is zero and 9 are left; their pixels are read from the picture that was not doubled.
//!
//! Rounding stays within a few units of direct summation. What is not finite, or overflows in a difference, spreads over the
//! whole tile, so callers are told and take the direct sum.
//!
//! Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", F(2x2, 3x3).

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rayon::prelude::*;

use super::{
    product::{COLS, ROWS, product},
    work::{Output, Run, Task, for_each_task},
};
use crate::cpu::{
    Level,
    level::with_level,
    stored::{Stored, widen_slice},
};

/// Values of one row or column of a tile for all tiles of a panel.
type Lane = [f32; COLS];

/// What the tiles are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Picture {
    /// The picture itself.
    Plain,
    /// The picture with every pixel repeated in a square of 2x2.
    Doubled,
}

impl Picture {
    /// Products along a side, as indices into `Bᵀ d`.
    fn products(self) -> &'static [usize] {
        match self {
            Self::Plain => &[0, 1, 2, 3],
            Self::Doubled => &[0, 1, 3],
        }
    }

    /// Products of a tile.
    fn count(self) -> usize {
        self.products().len().pow(2)
    }

    /// The 4x4 pixels of all tiles.
    fn tile(self, tiles: &[[Lane; 4]; 4]) -> [[&Lane; 4]; 4] {
        let index = match self {
            Self::Plain => [0, 1, 2, 3],
            Self::Doubled => [0, 1, 1, 2],
        };
        index.map(|row| index.map(|col| &tiles[row][col]))
    }
}

/// Transforms weights `[out, in, 3, 3]` to `[blocks, products, in, ROWS]`, with zeros after the last output.
pub(super) fn pack(level: Level, picture: Picture, weights: &[f32], inputs: usize) -> Vec<f32> {
    let outputs = weights.len() / (inputs * 9);
    let side = picture.products();
    let block_len = picture.count() * inputs * ROWS;
    let mut packed = vec![0.0; outputs.div_ceil(ROWS) * block_len];
    let blocks = packed.par_chunks_mut(block_len).zip(weights.par_chunks(inputs * 9 * ROWS));
    blocks.for_each(|(block, weights)| {
        for input in 0..inputs {
            let mut taps = [[0.0; ROWS]; 9];
            for (lane, weights) in weights.chunks_exact(inputs * 9).enumerate() {
                for (tap, &weight) in taps.iter_mut().zip(&weights[input * 9..][..9]) {
                    tap[lane] = weight;
                }
            }
            let taps = &taps;
            let transformed: [[f32; ROWS]; 16] = with_level!(
                level,
                fn transform(taps: &[[f32; ROWS]; 9]) -> [[f32; ROWS]; 16] {
                    let [t0, t1, t2] = [0, 1, 2].map(|col| spread([taps[col], taps[3 + col], taps[6 + col]]));
                    let rows = [0, 1, 2, 3].map(|row| spread([t0[row], t1[row], t2[row]]));
                    std::array::from_fn(|i| rows[i / 4][i % 4])
                }
            );
            let kept = side.iter().flat_map(|row| side.iter().map(move |col| transformed[row * 4 + col]));
            for (product, values) in kept.enumerate() {
                block[(product * inputs + input) * ROWS..][..ROWS].copy_from_slice(&values);
            }
        }
    });
    packed
}

/// `G g`.
#[inline(always)]
fn spread([g0, g1, g2]: [[f32; ROWS]; 3]) -> [[f32; ROWS]; 4] {
    let mut out = [[0.0; ROWS]; 4];
    for lane in 0..ROWS {
        let outer = g0[lane] + g2[lane];
        out[0][lane] = g0[lane];
        out[1][lane] = 0.5 * (outer + g1[lane]);
        out[2][lane] = 0.5 * (outer - g1[lane]);
        out[3][lane] = g2[lane];
    }
    out
}

/// Memory of one thread.
struct Scratch {
    /// Pixels of the tiles by row and column of the tile; of a doubled picture the rows and columns that differ.
    tiles: [[Lane; 4]; 4],
    /// Transformed tiles, `[products, in, COLS]`.
    panels: Vec<f32>,
    /// Their products with the weights, `[blocks, products, ROWS, COLS]`.
    sums: Vec<f32>,
}

/// Whether all results are finite; if not, some may be infinite or NaN that the direct sum would not have.
///
/// # Shapes
/// - `x`: `[batch, in, height, width]`, sizes without the batch as given
/// - `weights`: from [`pack`]
/// - `bias`: `[out]`
/// - `out`: `[batch, out, height, width]`, twice the sides if the picture is doubled; all of it is written
pub(super) fn convolve<E: Stored>(
    level: Level,
    picture: Picture,
    (x, [inputs, height, width]): (&[E], [usize; 3]),
    weights: &[f32],
    bias: &[f32],
    out: &Output<E>,
) -> bool {
    let all_finite = AtomicBool::new(true);
    let [batch, outputs, out_height, out_width] = out.shape();
    let (side, products) = (picture.products(), picture.count());
    let blocks = outputs.div_ceil(ROWS);
    let scratch = || Scratch {
        tiles: [[[0.0; COLS]; 4]; 4],
        panels: vec![0.0; products * inputs * COLS],
        sums: vec![0.0; blocks * products * ROWS * COLS],
    };
    let grid = [batch, out_height.div_ceil(2), out_width.div_ceil(2)];
    for_each_task(grid, outputs, scratch, |Scratch { tiles, panels, sums }, task| {
        for input in 0..inputs {
            for run in &task.runs {
                let pixels = &x[(run.picture * inputs + input) * height * width..][..height * width];
                match picture {
                    Picture::Plain => read_tiles(level, pixels, [height, width], *run, tiles),
                    Picture::Doubled => read_doubled_tiles(level, pixels, [height, width], *run, tiles),
                }
            }
            let (tiles, panels, stride) = (picture.tile(tiles), &mut panels[input * COLS..], inputs * COLS);
            split(level, tiles, side, panels, stride);
        }
        for (p, panel) in panels.chunks_exact(inputs * COLS).enumerate() {
            for block in task.blocks.clone() {
                let weights = &weights[(block * products + p) * inputs * ROWS..][..inputs * ROWS];
                product(level, weights, panel, &mut sums[(block * products + p) * ROWS * COLS..][..ROWS * COLS]);
            }
        }
        for block in task.blocks.clone() {
            let sums = &sums[block * products * ROWS * COLS..][..products * ROWS * COLS];
            for lane in 0..ROWS {
                let channel = block * ROWS + lane;
                let Some(&bias) = bias.get(channel) else { break };
                let rows = join(level, picture, &sums[lane * COLS..], bias);
                if !are_finite(level, &rows) {
                    all_finite.store(false, Relaxed);
                }
                write_rows(level, &rows, channel, task, out);
            }
        }
    });
    all_finite.into_inner()
}

fn are_finite(level: Level, rows: &[[f32; 2 * COLS]; 2]) -> bool {
    with_level!(
        level,
        fn all_finite(rows: &[[f32; 2 * COLS]; 2]) -> bool {
            rows.iter().flatten().fold(true, |all, value| all & value.is_finite())
        }
    )
}

/// Reads the pixels of the tiles of a run, whose first row and column stand one before their outputs.
fn read_tiles<E: Stored>(
    level: Level,
    pixels: &[E],
    [height, width]: [usize; 2],
    run: Run,
    tiles: &mut [[Lane; 4]; 4],
) {
    let mut row = [0.0; 2 * COLS + 4];
    // The picture begins at column 1 of the row if the run begins at its left side.
    let skip = usize::from(run.col == 0);
    let first = (2 * run.col + skip) - 1;
    let len = (2 * run.len + 2 - skip).min(width - first);
    for (dy, tiles) in tiles.iter_mut().enumerate() {
        match (2 * run.row + dy).checked_sub(1).filter(|&y| y < height) {
            Some(y) => widen_slice(level, &pixels[y * width + first..][..len], &mut row[skip..]),
            None => row.fill(0.0),
        }
        let (row, run) = (&row, &run);
        with_level!(
            level,
            fn deinterleave(row: &[f32; 2 * COLS + 4], run: &Run, tiles: &mut [Lane; 4]) {
                for (dx, tiles) in tiles.iter_mut().enumerate() {
                    let pixels = &row[dx..][..2 * run.len];
                    for (to, from) in tiles[run.at..].iter_mut().zip(pixels.chunks_exact(2)) {
                        *to = from[0];
                    }
                }
            }
        );
    }
}

/// Reads the pixels of the tiles of a run on the picture before doubling: 3x3 different ones.
fn read_doubled_tiles<E: Stored>(
    level: Level,
    pixels: &[E],
    [height, width]: [usize; 2],
    run: Run,
    tiles: &mut [[Lane; 4]; 4],
) {
    for (dy, tiles) in tiles.iter_mut().take(3).enumerate() {
        let y = (run.row + dy).checked_sub(1).filter(|&y| y < height);
        for (dx, tiles) in tiles.iter_mut().take(3).enumerate() {
            let to = &mut tiles[run.at..][..run.len];
            to.fill(0.0);
            let Some(y) = y else { continue };
            let skip = usize::from(run.col + dx == 0);
            let first = run.col + dx + skip - 1;
            let len = (run.len - skip).min(width - first);
            widen_slice(level, &pixels[y * width + first..][..len], &mut to[skip..]);
        }
    }
}

/// `Bᵀ d B` of all tiles, as rows of the panels of the products that are kept.
fn split(level: Level, tiles: [[&Lane; 4]; 4], side: &[usize], panels: &mut [f32], stride: usize) {
    /// `Bᵀ d`: two indices into `d` and the sign of the second.
    const TERMS: [(usize, usize, f32); 4] = [(0, 2, -1.0), (1, 2, 1.0), (2, 1, -1.0), (1, 3, -1.0)];
    with_level!(
        level,
        fn split_tiles(tiles: [[&Lane; 4]; 4], side: &[usize], panels: &mut [f32], stride: usize) {
            for (i, &p) in side.iter().enumerate() {
                let (a, b, sign) = TERMS[p];
                let mut lines = [[0.0; COLS]; 4];
                for (col, line) in lines.iter_mut().enumerate() {
                    for lane in 0..COLS {
                        line[lane] = tiles[a][col][lane] + sign * tiles[b][col][lane];
                    }
                }
                for (j, &q) in side.iter().enumerate() {
                    let (c, d, sign) = TERMS[q];
                    let panel = &mut panels[(i * side.len() + j) * stride..][..COLS];
                    for lane in 0..COLS {
                        panel[lane] = lines[c][lane] + sign * lines[d][lane];
                    }
                }
            }
        }
    );
}

/// `Aᵀ m A` of all tiles: products `[products, ROWS, COLS]` of one output channel to two rows of pixels, with bias.
fn join(level: Level, picture: Picture, sums: &[f32], bias: f32) -> [[f32; 2 * COLS]; 2] {
    let side = picture.products();
    let mut m = [[&[0.0; COLS]; 4]; 4];
    for (i, &p) in side.iter().enumerate() {
        for (j, &q) in side.iter().enumerate() {
            m[p][q] = lane(&sums[(i * side.len() + j) * ROWS * COLS..]);
        }
    }
    with_level!(
        level,
        fn join_tiles(m: [[&Lane; 4]; 4], bias: f32) -> [[f32; 2 * COLS]; 2] {
            let mut rows = [[0.0; 2 * COLS]; 2];
            for lane in 0..COLS {
                let (mut upper, mut lower) = ([0.0; 4], [0.0; 4]);
                for col in 0..4 {
                    upper[col] = m[0][col][lane] + m[1][col][lane] + m[2][col][lane];
                    lower[col] = m[1][col][lane] - m[2][col][lane] - m[3][col][lane];
                }
                for (row, s) in rows.iter_mut().zip([upper, lower]) {
                    row[2 * lane] = s[0] + s[1] + s[2] + bias;
                    row[2 * lane + 1] = s[1] - s[2] - s[3] + bias;
                }
            }
            rows
        }
    )
}

fn lane(values: &[f32]) -> &Lane {
    values.first_chunk().expect("a whole row of a panel")
}

/// Writes the pixels that are inside the picture.
fn write_rows<E: Stored>(level: Level, rows: &[[f32; 2 * COLS]; 2], channel: usize, task: &Task, out: &Output<E>) {
    let [_, _, height, width] = out.shape();
    for run in &task.runs {
        let len = (2 * run.len).min(width - 2 * run.col);
        for (y, row) in (2 * run.row..height).zip(rows) {
            // SAFETY: tasks share neither tiles nor channels.
            #[allow(unsafe_code)]
            unsafe {
                out.write(level, [run.picture, channel, y, 2 * run.col], &row[2 * run.at..][..len]);
            }
        }
    }
}
