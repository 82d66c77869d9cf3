//! Attention as two products with a softmax between them: q, k, v -> mixed values.
//!
//! Scores are f32 and made for a few heads at a time, so that they stay small.

use burn::tensor::{DType, Tensor};
use burn_cubecl::{
    cubecl::{
        self, calculate_cube_count_elemwise,
        ir::ElemType,
        prelude::{Tensor as Buffer, *},
    },
    kernel::into_contiguous,
    tensor::CubeTensor,
};

use super::{
    cube, element, empty_like, joined,
    matmul::product,
    norm::{cube_max, cube_sum},
    tensor,
};

/// Bytes of scores at once.
const SCORE_BYTES: usize = 1 << 30;
/// Keys are padded to a multiple of this, so that products read whole vectors of weights.
const KEYS: usize = 64;
/// Units that share a row of scores.
pub(super) const UNITS: usize = 256;
/// Below any score, and finite: WGSL has no infinity.
pub(super) const LOWEST: f32 = -3.0e38;

/// Mixes values by the softmax of the scores; `None` if the tensors are not for these kernels.
///
/// # Shapes
/// - `q`: `[batch, heads, queries, width]`
/// - `k`, `v`: `[batch, kv_heads, keys, width]`
/// - `bias`: `[1, heads, queries, keys]`
pub(super) fn attend(qkv: [&Tensor<4>; 3], bias: Option<&Tensor<4>>, scale: f64, causal: bool) -> Option<Tensor<4>> {
    in_parts(score_bytes(&cube(qkv[0])?), qkv, bias, scale, causal)
}

/// Bytes of scores at once that the device gives in one piece.
pub(super) fn score_bytes(q: &CubeTensor) -> usize {
    let largest = q.client.properties().memory.max_page_size;
    SCORE_BYTES.min(usize::try_from(largest).unwrap_or(usize::MAX))
}

/// [`attend`] with so many bytes of scores at once, but no less than a row of each sample.
fn in_parts(
    bytes: usize,
    [q, k, v]: [&Tensor<4>; 3],
    bias: Option<&Tensor<4>>,
    scale: f64,
    causal: bool,
) -> Option<Tensor<4>> {
    let ([_, heads, ..], keys) = (q.dims(), k.dims()[2]);
    let (k, v) = (pad(k, heads)?, pad(v, heads)?);
    let mut mixed = vec![];
    for parts in parts(bytes, q.dims(), keys, causal) {
        let mut rows = vec![];
        for part in parts {
            let scores = product(part.queries_of(q), part.keys_of(&k).swap_dims(2, 3), DType::F32)?;
            let bias = bias.map(|bias| part.queries_of(bias).narrow(3, 0, part.keys));
            let weights = softmax(scores, bias, scale, part.keys, causal, q.dtype())?;
            rows.push(product(weights, part.keys_of(&v), q.dtype())?);
        }
        mixed.push(joined(rows, 2));
    }
    Some(joined(mixed, 1))
}

/// Some queries of some heads, and the keys that any of them may see.
pub(super) struct Part {
    head: usize,
    heads: usize,
    query: usize,
    queries: usize,
    /// From the first key on.
    pub(super) keys: usize,
}

impl Part {
    /// Of `[batch, heads, queries, _]`.
    pub(super) fn queries_of(&self, x: &Tensor<4>) -> Tensor<4> {
        x.clone().narrow(1, self.head, self.heads).narrow(2, self.query, self.queries)
    }

    /// Of padded `[batch, heads, keys, _]`, with padding of their own.
    pub(super) fn keys_of(&self, x: &Tensor<4>) -> Tensor<4> {
        x.clone().narrow(1, self.head, self.heads).narrow(2, 0, self.keys.next_multiple_of(KEYS))
    }
}

/// Parts whose scores take so many bytes, but no less than a row of each sample: for some heads each, those of their queries.
///
/// # Shapes
/// `[batch, heads, queries, _]` are the queries'.
pub(super) fn parts(bytes: usize, [batch, heads, queries, _]: [usize; 4], keys: usize, causal: bool) -> Vec<Vec<Part>> {
    let row = batch * keys.next_multiple_of(KEYS) * size_of::<f32>();
    let (heads_at_once, queries_at_once) = at_once(bytes / row, heads, queries);
    let of_heads = |(head, heads)| {
        let of_queries = |(query, count)| {
            // Causal queries are the last ones of their keys, so those after a part's last query are left out.
            let keys = if causal { keys - queries + query + count } else { keys };
            Part { head, heads, query, queries: count, keys }
        };
        ranges(queries, queries_at_once).map(of_queries).collect()
    };
    ranges(heads, heads_at_once).map(of_heads).collect()
}

/// Heads, and queries of each, whose scores are made at once, if there is room for so many rows of scores.
fn at_once(rows: usize, heads: usize, queries: usize) -> (usize, usize) {
    ((rows / queries).clamp(1, heads), rows.clamp(1, queries))
}

/// Starts and lengths of ranges of at most `len`.
fn ranges(total: usize, len: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..total).step_by(len).map(move |start| (start, len.min(total - start)))
}

/// Keys or values for so many heads, each of which serves neighbouring ones, with zeros up to a multiple of [`KEYS`].
pub(super) fn pad(x: &Tensor<4>, heads: usize) -> Option<Tensor<4>> {
    let [batch, found_heads, keys, width] = x.dims();
    let padded = keys.next_multiple_of(KEYS);
    if [found_heads, keys] == [heads, padded] {
        return Some(x.clone());
    }
    let (dtype, x) = (element(x.dtype())?, cube(x)?);
    let vector = [4, 2, 1].into_iter().find(|&size| in_vectors(&x, size));
    let (x, vector) = match vector {
        Some(vector) => (x, vector),
        None => (into_contiguous(x), 1),
    };
    let (client, output) = (x.client.clone(), empty_like(&x, [batch, heads, padded, width], x.dtype));
    let total = batch * heads * padded * width / vector;
    let cube_dim = CubeDim::new(&client, total);
    pad_kernel::launch(
        &client,
        calculate_cube_count_elemwise(&client, total, cube_dim),
        cube_dim,
        vector,
        x.into_tensor_arg(),
        output.clone().into_tensor_arg(),
        total,
        width / vector,
        padded,
        keys,
        heads,
        heads / found_heads,
        vector,
        dtype,
    );
    Some(tensor(output))
}

/// Whether every row along the last dimension can be read so many values at a time.
pub(super) fn in_vectors(x: &CubeTensor, size: usize) -> bool {
    let (shape, strides) = (x.meta.shape(), x.meta.strides());
    strides[3] == 1 && shape[3].is_multiple_of(size) && (0..3).all(|dim| strides[dim].is_multiple_of(size))
}

#[cube(launch)]
fn pad_kernel<F: Float, N: Size>(
    x: &Buffer<Vector<F, N>>,
    output: &mut Buffer<Vector<F, N>>,
    total: usize,
    width: usize,
    padded: usize,
    keys: usize,
    heads: usize,
    group: usize,
    #[comptime] vector: usize,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= total {
        terminate!();
    }
    let key = ABSOLUTE_POS / width % padded;
    let head = ABSOLUTE_POS / width / padded;
    let mut value = Vector::<F, N>::new(F::new(0.0));
    if key < keys {
        let at = head / heads * x.stride(0) + head % heads / group * x.stride(1) + key * x.stride(2);
        value = x[at / vector + ABSOLUTE_POS % width];
    }
    output[ABSOLUTE_POS] = value;
}

/// Softmax of the first `keys` columns of `scale * scores + bias`, those that a query may see; zeros after them.
fn softmax(
    scores: Tensor<4>,
    bias: Option<Tensor<4>>,
    scale: f64,
    keys: usize,
    causal: bool,
    dtype: DType,
) -> Option<Tensor<4>> {
    let [batch, heads, queries, padded] = scores.dims();
    let (scores, scale) = match bias {
        Some(bias) => (scores.narrow(3, 0, keys) * scale + bias.cast(DType::F32), 1.0),
        None => (scores, scale),
    };
    let row = scores.dims()[3];
    let scores = super::contiguous(&scores)?;
    let output = empty_like(&scores, [batch, heads, queries, padded], dtype);
    let (rows, across) = ((batch * heads * queries) as u32, 1 << 15);
    softmax_kernel::launch(
        &scores.client.clone(),
        CubeCount::Static(rows.min(across), rows.div_ceil(across), 1),
        CubeDim::new_1d(UNITS as u32),
        scores.into_tensor_arg(),
        output.clone().into_tensor_arg(),
        rows as usize,
        row,
        padded,
        keys,
        queries,
        scale as f32,
        causal,
        UNITS,
        element(dtype)?,
    );
    Some(tensor(output))
}

#[cube(launch)]
fn softmax_kernel<F: Float>(
    scores: &Buffer<f32>,
    output: &mut Buffer<F>,
    rows: usize,
    row_width: usize,
    padded: usize,
    keys: usize,
    queries: usize,
    scale: f32,
    #[comptime] causal: bool,
    #[comptime] units: usize,
    #[define(F)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let visible = visible_keys(row, keys, queries, causal);
    let start = row * row_width;
    let mut shared = Shared::<[f32]>::new_slice(units);
    let (largest, share) = row_softmax(scores, start, visible, scale, &mut shared, units);
    let mut column = unit;
    while column < padded {
        let mut weight = f32::new(0.0);
        if column < visible {
            weight = (scores[start + column] * scale - largest).exp() * share;
        }
        output[row * padded + column] = F::cast_from(weight);
        column += units;
    }
}

/// Keys that the query of a row may see.
#[cube]
pub(super) fn visible_keys(row: usize, keys: usize, queries: usize, #[comptime] causal: bool) -> usize {
    if causal { keys - queries + row % queries + 1 } else { keys }
}

/// The largest of a row's scaled scores, and the inverse of the sum of the exponentials of their distances from it.
#[cube]
pub(super) fn row_softmax(
    scores: &Buffer<f32>,
    start: usize,
    visible: usize,
    scale: f32,
    shared: &mut Shared<[f32]>,
    #[comptime] units: usize,
) -> (f32, f32) {
    let unit = UNIT_POS as usize;
    let mut largest = f32::new(LOWEST);
    let mut column = unit;
    while column < visible {
        largest = max(largest, scores[start + column] * scale);
        column += units;
    }
    let largest = cube_max(largest, shared, units);
    let mut sum = f32::new(0.0);
    let mut column = unit;
    while column < visible {
        sum += (scores[start + column] * scale - largest).exp();
        column += units;
    }
    let share = 1.0f32 / cube_sum(sum, shared, units);
    (largest, share)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close_tensors, input};

    #[test]
    fn scores_are_made_for_whole_heads_where_there_is_room() {
        assert_eq!([0, 2, 7, 15, 99].map(|rows| at_once(rows, 3, 5)), [(1, 1), (1, 2), (1, 5), (3, 5), (3, 5)]);
    }

    #[test]
    #[ignore = "needs a GPU that BURN_DEVICE names"]
    fn in_however_many_parts_the_scores_are_made_the_result_is_the_same() {
        const ROW: usize = 2 * 64 * size_of::<f32>();
        let [q, k, v] = [(5, 1), (9, 2), (9, 3)].map(|(tokens, seed)| input([2, 3, tokens, 8], seed));
        let bias = input([1, 3, 5, 9], 4);
        for (bias, causal) in [(None, false), (None, true), (Some(&bias), false)] {
            let with = |rows: usize| in_parts(rows * ROW, [&q, &k, &v], bias, 0.5, causal).unwrap();
            let whole = with(15);
            for rows in [0, 2, 7] {
                assert_close_tensors(&with(rows), &whole, 1e-5);
            }
        }
    }
}
