//! The inner loops of attention: packed queries, a packed tile of keys and values -> running softmax and mixed values.
//!
//! Both products are outer products over registers: a query's (or weight's) lane is broadcast and multiplied with
//! [`Shape`] vectors of neighbouring keys (or value columns), for [`ROWS`] rows at once. A lane holds what a [`Packed`] float
//! says; whatever that is, its bits travel as those of an f32.
#![allow(unsafe_code)]

use super::super::{
    packed::Packed,
    simd::{Simd, exp2},
};

/// Rows of scores that are computed together.
pub(super) const ROWS: usize = 6;
/// Keys of a tile; whole panels at every level.
pub(super) const KEYS: usize = 64;

/// Lengths in the packed layouts of one call.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Shape {
    /// Lanes of a head's elements.
    pub(in super::super) lanes: usize,
    /// Elements of a head, rounded up to whole vectors.
    pub(in super::super) padded_dim: usize,
    /// Keys in a panel of packed keys, and columns in a panel of packed values.
    pub(in super::super) panel: usize,
}

/// A packed tile of keys and values; what is beyond the keys and the head is any number.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    /// `[KEYS / panel, lanes, panel]`.
    pub(super) keys: &'a [f32],
    /// `[KEYS / PER_LANE, panel]` for each panel of columns; the last one may be narrower.
    pub(super) values: &'a [f32],
}

/// What is kept of up to [`ROWS`] queries between tiles.
pub(super) struct Rows<'a> {
    /// `[rows, lanes]`.
    pub(super) queries: &'a [f32],
    /// Largest score so far, one per row.
    pub(super) largest: &'a mut [f32],
    /// Sum of the weights so far, one per row.
    pub(super) total: &'a mut [f32],
    /// Weighted sum of values so far, `[rows, padded_dim]`.
    pub(super) mixed: &'a mut [f32],
}

/// What a task needs besides its inputs; see [`Tile`] and [`Rows`].
pub(super) struct Scratch<'a> {
    pub(super) queries: &'a mut [f32],
    pub(super) keys: &'a mut [f32],
    pub(super) values: &'a mut [f32],
    pub(super) scores: &'a mut [f32],
    pub(super) largest: &'a mut [f32],
    pub(super) total: &'a mut [f32],
    pub(super) mixed: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    /// [`parts`] for tasks of one shape.
    pub(super) fn new(memory: &'a mut Vec<f32>, shape: Shape, rows: usize) -> Self {
        let lens = [
            rows * shape.lanes,
            KEYS * shape.lanes,
            KEYS * shape.padded_dim,
            KEYS * ROWS,
            rows,
            rows,
            rows * shape.padded_dim,
        ];
        let [queries, keys, values, scores, largest, total, mixed] = parts(memory, lens);
        Self { queries, keys, values, scores, largest, total, mixed }
    }
}

/// Parts of `memory`, which grows as needed, each from a cache line on; their content is whatever was there.
pub(in super::super) fn parts<const N: usize>(memory: &mut Vec<f32>, lens: [usize; N]) -> [&mut [f32]; N] {
    /// Elements of a cache line.
    const LINE: usize = 16;
    let needed = lens.iter().map(|len| len.next_multiple_of(LINE)).sum::<usize>() + LINE;
    if memory.len() < needed {
        *memory = vec![0.0; needed];
    }
    let start = memory.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
    let mut rest = &mut memory[start..];
    lens.map(|len| {
        let (part, after) = std::mem::take(&mut rest).split_at_mut(len.next_multiple_of(LINE));
        rest = after;
        &mut part[..len]
    })
}

/// Writes keys, `[head_dim]` each, as [`Tile::keys`].
///
/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
pub(in super::super) unsafe fn pack_keys<'k, S: Simd, E: Packed>(
    shape: Shape,
    keys: usize,
    key: impl Fn(usize) -> &'k [E],
    to: &mut [f32],
) {
    assert!(to.len() >= keys.next_multiple_of(shape.panel) * shape.lanes && shape.panel.is_multiple_of(8));
    let transposed = shape.lanes - shape.lanes % 8;
    for first in (0..keys).step_by(8) {
        // A missing key repeats the last one: nobody sees it.
        let key = |row: usize| key((first + row).min(keys - 1))[..shape.lanes * E::PER_LANE].as_ptr().cast::<f32>();
        let rows: [*const f32; 8] = std::array::from_fn(key);
        let to = &mut to[first / shape.panel * shape.panel * shape.lanes + first % shape.panel..];
        for lane in (0..transposed).step_by(8) {
            let to = &mut to[lane * shape.panel..][..7 * shape.panel + 8];
            // SAFETY: the caller's condition; each row has eight lanes from `lane` on, and `to` ends with the eighth
            // column. Neither needs to be aligned.
            unsafe { S::transpose_8x8(rows.map(|row| row.add(lane)), to.as_mut_ptr(), shape.panel) };
        }
        for lane in transposed..shape.lanes {
            for (to, row) in to[lane * shape.panel..].iter_mut().zip(rows) {
                // SAFETY: each row has `lanes` lanes, and any bits are an f32.
                *to = unsafe { row.add(lane).read_unaligned() };
            }
        }
    }
}

/// Scores of a tile times `scale`, `[R, KEYS]`.
///
/// # Safety
/// The CPU has the instructions of `S`, and what [`Packed::multiply_add`] asks for.
#[inline(always)]
pub(super) unsafe fn scores<S: Simd, E: Packed, const C: usize, const R: usize>(
    shape: Shape,
    queries: &[f32],
    tile: Tile<'_>,
    keys: usize,
    scale: f32,
    scores: &mut [f32],
) {
    debug_assert_eq!(shape.panel, C * S::LANES);
    assert!(keys <= KEYS && R <= ROWS);
    for (panel, packed) in tile.keys.chunks(shape.panel * shape.lanes).take(keys.div_ceil(shape.panel)).enumerate() {
        let factors = Factors { values: queries, row: shape.lanes };
        // SAFETY: the caller's condition.
        unsafe {
            let mut sums = multiply_add::<S, E, C, R>([[S::zero(); C]; R], factors, packed, shape.panel, shape.lanes);
            // Not `map`, which would not be compiled with the instructions.
            for sum in sums.as_flattened_mut() {
                *sum = sum.mul(S::splat(scale));
            }
            store(sums, &mut scores[panel * shape.panel..], KEYS);
        }
    }
}

/// Turns scores into weights relative to the largest score so far, and returns the factors of what was summed before.
///
/// Scores are in units of log2. Row `r` sees the first `visible[r]` keys; the weights up to the next whole vector after
/// `keys` are zero. Their sum is of what they are before they are rounded.
///
/// # Safety
/// The CPU has the instructions of `S`, and what [`Packed::round`] asks for.
#[inline(always)]
pub(super) unsafe fn softmax<S: Simd, E: Packed, const R: usize>(
    rows: &mut Rows<'_>,
    scores: &mut [f32],
    visible: &[usize; ROWS],
    keys: usize,
) -> [f32; ROWS] {
    let padded = keys.next_multiple_of(S::LANES);
    assert!(padded <= KEYS && scores.len() >= R * KEYS && R <= ROWS);
    let mut factors = [0.0; 16];
    // SAFETY: the caller's condition; reads and writes of a row end at `padded`, of `factors` at 16, the most lanes.
    unsafe {
        for row in 0..R {
            let scores = &mut scores[row * KEYS..][..padded];
            scores[visible[row]..].fill(f32::NEG_INFINITY);
            let mut largest = S::splat(f32::NEG_INFINITY);
            for start in (0..padded).step_by(S::LANES) {
                largest = S::load(scores.as_ptr().add(start)).max(largest);
            }
            let largest = f32::max(rows.largest[row], largest.largest());
            factors[row] = rows.largest[row] - largest;
            rows.largest[row] = largest;
        }
        exp2(S::load(factors.as_ptr())).store(factors.as_mut_ptr());
        for row in 0..R {
            let scores = &mut scores[row * KEYS..][..padded];
            let (largest, mut total) = (S::splat(rows.largest[row]), S::zero());
            for start in (0..padded).step_by(S::LANES) {
                let weight = exp2(S::load(scores.as_ptr().add(start)).sub(largest));
                weight.store(scores.as_mut_ptr().add(start));
                total = total.add(weight);
            }
            rows.total[row] = rows.total[row] * factors[row] + total.sum();
            E::round::<S>(scores);
        }
    }
    std::array::from_fn(|row| factors[row])
}

/// Adds the values of a tile, weighted, to what was summed before times `factors`.
///
/// # Safety
/// The CPU has the instructions of `S`, and what [`Packed::multiply_add`] asks for.
#[inline(always)]
pub(super) unsafe fn mix<S: Simd, E: Packed, const C: usize, const R: usize>(
    shape: Shape,
    weights: &[f32],
    factors: &[f32; ROWS],
    tile: Tile<'_>,
    keys: usize,
    mixed: &mut [f32],
) {
    assert!(keys <= KEYS && R <= ROWS);
    let weights = Factors { values: weights, row: KEYS };
    let terms = keys.div_ceil(E::PER_LANE);
    for column in (0..shape.padded_dim).step_by(shape.panel) {
        let width = shape.panel.min(shape.padded_dim - column);
        let values = &tile.values[column * KEYS / E::PER_LANE..][..width * KEYS / E::PER_LANE];
        let mixed = &mut mixed[column..];
        // SAFETY: the caller's condition.
        unsafe {
            if width == C * S::LANES {
                let sums = load_scaled::<S, C, R>(mixed, shape.padded_dim, factors);
                store(multiply_add::<S, E, C, R>(sums, weights, values, width, terms), mixed, shape.padded_dim);
                continue;
            }
            for start in (0..width).step_by(S::LANES) {
                let (values, mixed) = (&values[start..], &mut mixed[start..]);
                let sums = load_scaled::<S, 1, R>(mixed, shape.padded_dim, factors);
                store(multiply_add::<S, E, 1, R>(sums, weights, values, width, terms), mixed, shape.padded_dim);
            }
        }
    }
}

/// Lanes that are broadcast: that of term `n` for row `r` is at `r * row + n`.
#[derive(Clone, Copy)]
struct Factors<'a> {
    values: &'a [f32],
    row: usize,
}

/// `sums[r][c] += factors[r][n] * vectors[n][c]` over `terms`; a term of `vectors` is `stride` lanes long.
///
/// # Safety
/// The CPU has the instructions of `S`, and what [`Packed::multiply_add`] asks for.
#[inline(always)]
unsafe fn multiply_add<S: Simd, E: Packed, const C: usize, const R: usize>(
    mut sums: [[S; C]; R],
    factors: Factors<'_>,
    vectors: &[f32],
    stride: usize,
    terms: usize,
) -> [[S; C]; R] {
    if terms == 0 {
        return sums;
    }
    assert!(factors.values.len() >= (R - 1) * factors.row + terms);
    assert!(vectors.len() >= (terms - 1) * stride + C * S::LANES);
    let mut vector = vectors.as_ptr();
    for term in 0..terms {
        // SAFETY: the caller's condition; the last term is inside of both slices, as asserted above.
        unsafe {
            let mut vectors = [S::zero(); C];
            for (column, value) in vectors.iter_mut().enumerate() {
                *value = S::load(vector.add(column * S::LANES));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let factor = S::splat(*factors.values.as_ptr().add(row * factors.row + term));
                for (sum, vector) in sums.iter_mut().zip(vectors) {
                    *sum = E::multiply_add(factor, vector, *sum);
                }
            }
        }
        vector = vector.wrapping_add(stride);
    }
    sums
}

/// Rows of `C` vectors, `stride` elements apart, each times its factor.
///
/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
unsafe fn load_scaled<S: Simd, const C: usize, const R: usize>(
    from: &[f32],
    stride: usize,
    factors: &[f32; ROWS],
) -> [[S; C]; R] {
    assert!(from.len() >= (R - 1) * stride + C * S::LANES);
    // SAFETY: the caller's condition; the last row is inside of the slice.
    let mut sums = unsafe { [[S::zero(); C]; R] };
    for (row, sums) in sums.iter_mut().enumerate() {
        for (column, sum) in sums.iter_mut().enumerate() {
            // SAFETY: as above.
            *sum = unsafe { S::load(from.as_ptr().add(row * stride + column * S::LANES)).mul(S::splat(factors[row])) };
        }
    }
    sums
}

/// Writes rows of `C` vectors, `stride` elements apart.
///
/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
unsafe fn store<S: Simd, const C: usize, const R: usize>(sums: [[S; C]; R], to: &mut [f32], stride: usize) {
    assert!(to.len() >= (R - 1) * stride + C * S::LANES);
    for (row, sums) in sums.into_iter().enumerate() {
        for (column, sum) in sums.into_iter().enumerate() {
            // SAFETY: the caller's condition; the last row is inside of the slice.
            unsafe { sum.store(to.as_mut_ptr().add(row * stride + column * S::LANES)) };
        }
    }
}
