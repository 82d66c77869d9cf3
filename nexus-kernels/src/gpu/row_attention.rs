//! Attention of few queries, as in decoding, without a score matrix: strided q, k, v -> mixed values.
//!
//! Keys and values are read where they lie, once for each query head; the softmax is corrected from tile to tile of keys.

use burn::tensor::Tensor;
use burn_cubecl::cubecl::{
    self,
    ir::ElemType,
    prelude::{Tensor as Buffer, *},
};

use super::{
    attention::{LOWEST, in_vectors},
    cube, element, empty_like,
    norm::{cube_max, cube_sum},
    tensor,
};

/// Most queries for which a product for each, instead of one for all, is worth it.
const MOST_QUERIES: usize = 4;
/// Units of a cube, which has one query of one head.
const UNITS: usize = 256;
/// Keys of a tile, whose weights the units of a cube share.
const TILE: usize = 1024;

/// Attention without bias; `None` for more queries, and for tensors that are not for this kernel.
///
/// # Shapes
/// - `q`: `[batch, queries, heads, head_dim]`
/// - `k`, `v`: `[batch, keys, kv_heads, head_dim]`
/// - returns: `[batch, queries, heads * head_dim]`
pub(super) fn row_attention([q, k, v]: [&Tensor<4>; 3], scale: f64, causal: bool) -> Option<Tensor<3>> {
    let ([batch, queries, heads, dim], [_, keys, kv_heads, _]) = (q.dims(), k.dims());
    let fits = queries <= MOST_QUERIES.min(keys) && k.dims() == v.dims() && k.dims() == [batch, keys, kv_heads, dim];
    if !fits || [k.dtype(), v.dtype()] != [q.dtype(); 2] {
        return None;
    }
    let tensors = [cube(q)?, cube(k)?, cube(v)?];
    let vector = [4, 2, 1].into_iter().find(|&size| tensors.iter().all(|x| in_vectors(x, size)))?;
    let lanes = dim / vector;
    if lanes > UNITS {
        return None;
    }
    let [q, k, v] = tensors;
    let (client, output) = (q.client.clone(), empty_like(&q, [batch, queries, heads * dim], q.dtype));
    let (count, across, dtype) = ((batch * queries * heads) as u32, 1 << 15, element(q.dtype)?);
    row_kernel::launch(
        &client,
        CubeCount::Static(count.min(across), count.div_ceil(across), 1),
        CubeDim::new_1d(UNITS as u32),
        vector,
        q.into_tensor_arg(),
        k.into_tensor_arg(),
        v.into_tensor_arg(),
        output.clone().into_tensor_arg(),
        count as usize,
        queries,
        heads,
        heads / kv_heads,
        keys,
        scale as f32,
        causal,
        lanes,
        vector,
        dtype,
    );
    Some(tensor(output))
}

#[cube(launch)]
fn row_kernel<F: Float, N: Size>(
    q: &Buffer<Vector<F, N>>,
    k: &Buffer<Vector<F, N>>,
    v: &Buffer<Vector<F, N>>,
    output: &mut Buffer<Vector<F, N>>,
    count: usize,
    queries: usize,
    heads: usize,
    group: usize,
    keys: usize,
    scale: f32,
    #[comptime] causal: bool,
    #[comptime] lanes: usize,
    #[comptime] vector: usize,
    #[define(F)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= count {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let head = row % heads;
    let query = row / heads % queries;
    let batch = row / heads / queries;
    let of_query = (batch * q.stride(0) + query * q.stride(1) + head * q.stride(2)) / vector;
    let of_keys = (batch * k.stride(0) + head / group * k.stride(2)) / vector;
    let of_values = (batch * v.stride(0) + head / group * v.stride(2)) / vector;
    let key_stride = k.stride(1) / vector;
    let value_stride = v.stride(1) / vector;
    let mut visible = keys;
    if causal {
        visible = keys - queries + query + 1;
    }
    // Values are mixed by groups of units, each for some of the keys; a unit has one vector of the result.
    let groups = comptime!(UNITS / lanes);
    let lane = unit % lanes;
    let first = unit / lanes;
    let mut weights = Shared::<[f32]>::new_slice(TILE);
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    let mut largest = f32::new(LOWEST);
    let mut total = f32::new(0.0);
    let mut mixed = Vector::<f32, N>::new(0.0f32);
    let mut start = 0usize;
    while start < visible {
        let tile = min(visible - start, TILE);
        sync_cube();
        let mut found = f32::new(LOWEST);
        let mut key = unit;
        while key < tile {
            let at = of_keys + (start + key) * key_stride;
            let mut products = Vector::<f32, N>::new(0.0f32);
            for column in 0..lanes {
                products += Vector::<f32, N>::cast_from(q[of_query + column]) * Vector::cast_from(k[at + column]);
            }
            let score = products.vector_sum() * scale;
            weights[key] = score;
            found = max(found, score);
            key += UNITS;
        }
        let before = largest;
        largest = max(before, cube_max(found, &mut shared, UNITS));
        let mut sum = f32::new(0.0);
        let mut key = unit;
        while key < tile {
            let weight = (weights[key] - largest).exp();
            weights[key] = weight;
            sum += weight;
            key += UNITS;
        }
        // Whoever reads a weight waits for it in here.
        let sum = cube_sum(sum, &mut shared, UNITS);
        let correction = (before - largest).exp();
        total = total * correction + sum;
        mixed *= Vector::new(correction);
        if first < groups {
            let mut key = first;
            while key < tile {
                let at = of_values + (start + key) * value_stride + lane;
                mixed += Vector::new(weights[key]) * Vector::cast_from(v[at]);
                key += groups;
            }
        }
        start += TILE;
    }
    let mut parts = Shared::<[Vector<f32, N>]>::new_slice(UNITS);
    parts[unit] = mixed;
    sync_cube();
    if unit < lanes {
        let mut sum = parts[unit];
        for other in 1..groups {
            sum += parts[other * lanes + unit];
        }
        output[row * lanes + unit] = Vector::cast_from(sum / Vector::new(total));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        attention::tests::naive,
        testing::{assert_close, input},
    };

    #[test]
    #[ignore = "needs a GPU that BURN_DEVICE names"]
    fn few_queries_of_views_match_loops_in_f64() {
        for [batch, queries, keys, kv_heads, group, dim] in [
            [1, 1, 1, 1, 1, 1],
            [2, 1, 7, 2, 3, 6],
            [1, 4, 300, 2, 2, 16],
            [2, 3, 2500, 1, 2, 20],
            [1, 2, 65, 1, 1, 129],
        ] {
            let heads = kv_heads * group;
            let q = input([batch, heads, queries, dim], 1).swap_dims(1, 2) * 2.0;
            // Of a longer cache, and of a tensor that has keys and values.
            let k = input([batch, keys + 9, kv_heads, dim], 2).narrow(1, 0, keys) * 2.0;
            let v = input([batch, keys, 2 * kv_heads, dim], 3).narrow(2, kv_heads, kv_heads);
            for causal in [false, true] {
                let sees = |query, key| !causal || key <= keys - queries + query;
                let expected = naive([&q, &k, &v], sees, |_, _, _| 0.0, 0.3);
                assert_close(&row_attention([&q, &k, &v], 0.3, causal).unwrap(), &expected, 1e-5);
            }
        }
        let many = input([1, MOST_QUERIES + 1, 1, 4], 1);
        assert!(row_attention([&many; 3], 0.5, false).is_none());
    }
}
