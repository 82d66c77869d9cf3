//! Scaled dot-product attention: q, k, v with heads beside tokens -> mixed values.

use burn::tensor::{Bool, DType, Tensor, activation::softmax, module, ops::AttentionModuleOptions};

use crate::{
    index::{EXCLUDED_SCORE, index_tensor},
    ops::Ops,
    place::{at, dispatch},
};

/// Which keys a query may see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Visibility<'a> {
    /// Every key.
    #[default]
    All,
    /// The queries are the last ones of the keys' sequence; each sees itself and what came before.
    Causal,
    /// Tokens see the tokens of their own segment; segment `i` is `bounds[i]..bounds[i + 1]`.
    Segments(&'a [usize]),
}

/// What [`attention`] does besides `softmax(q kᵀ / sqrt(head_dim)) v`.
#[derive(Debug, Clone, Default)]
pub struct Attention<'a> {
    /// Which keys a query may see.
    pub visibility: Visibility<'a>,
    /// Added to the scores: `[1, heads, queries, keys]`.
    pub bias: Option<Tensor<4>>,
    /// Factor of the scores; `None` is `1 / sqrt(head_dim)`.
    pub scale: Option<f64>,
}

/// Mixes values by the softmax of the scores.
///
/// Key and value heads may be fewer than query heads (grouped-query attention): each serves
/// `heads / kv_heads` neighbouring query heads.
///
/// # Shapes
/// - `q`: `[batch, queries, heads, head_dim]`
/// - `k`, `v`: `[batch, keys, kv_heads, head_dim]`
/// - returns: `[batch, queries, heads * head_dim]`
///
/// # Panics
/// If `kv_heads` does not divide `heads`, or the segments do not cover the tokens.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: Attention<'_>) -> Tensor<3> {
    let places: Vec<_> = [&q, &k, &v].into_iter().chain(&options.bias).map(at).collect();
    dispatch!(&places, attention(q, k, v, &options))
}

/// [`attention`] by [`Ops::attend`]: of all segments of one length at once.
pub(crate) fn in_heads<O: Ops + ?Sized>(qkv: [Tensor<4>; 3], options: &Attention<'_>) -> Tensor<3> {
    let [batch, queries, heads, head_dim] = qkv[0].dims();
    let [_, _, kv_heads, _] = qkv[1].dims();
    assert!(heads.is_multiple_of(kv_heads), "{kv_heads} key/value heads do not divide {heads} heads");
    let qkv = qkv.map(|x| x.swap_dims(1, 2));
    let scale = options.scale.unwrap_or(1.0 / (head_dim as f64).sqrt());
    let attend = |qkv: [Tensor<4>; 3], causal| O::attend(qkv, options.bias.clone(), scale, causal);
    let mixed = match options.visibility {
        Visibility::All => attend(qkv, false),
        Visibility::Causal => attend(qkv, queries > 1),
        Visibility::Segments(bounds) => {
            assert_eq!((bounds.first(), bounds.last()), (Some(&0), Some(&queries)), "segments must cover the tokens");
            let plan = SegmentPlan::new(bounds);
            let device = qkv[0].device();
            let order = |indices: &[usize]| index_tensor(indices.iter().copied(), [queries], &device);
            let sorted = |x: Tensor<4>| if plan.is_sorted { x } else { x.select(2, order(&plan.order)) };
            let qkv = qkv.map(sorted);
            let mut start = 0;
            let groups = plan.groups.iter().map(|&(count, length)| {
                let part = |x: &Tensor<4>| segments_as_batch(x.clone().narrow(2, start, count * length), count);
                let mixed = attend(qkv.each_ref().map(part), false);
                start += count * length;
                mixed.reshape([batch, count, heads, length, head_dim]).swap_dims(1, 2).reshape([
                    batch,
                    heads,
                    count * length,
                    head_dim,
                ])
            });
            let mixed = Tensor::cat(groups.collect(), 2);
            if plan.is_sorted { mixed } else { mixed.select(2, order(&plan.places)) }
        }
    };
    mixed.swap_dims(1, 2).reshape([batch, queries, heads * head_dim])
}

/// [`Ops::attend`] in burn's operations, on repeated heads.
pub(crate) fn plain([q, k, v]: [Tensor<4>; 3], bias: Option<Tensor<4>>, scale: f64, causal: bool) -> Tensor<4> {
    let heads = q.dims()[1];
    let [k, v] = [k, v].map(|x| repeat_heads(x, heads));
    if ![DType::F32, DType::F64].contains(&q.dtype()) {
        return with_softmax_in_f32([q, k, v], bias, scale, causal);
    }
    let options = AttentionModuleOptions { scale: Some(scale), softcap: None, is_causal: causal };
    module::attention(q, k, v, None, bias, options)
}

/// Attention of heads with their own keys: burn's has the softmax in the dtype of the queries.
fn with_softmax_in_f32([q, k, v]: [Tensor<4>; 3], bias: Option<Tensor<4>>, scale: f64, causal: bool) -> Tensor<4> {
    let ([batch, heads, queries, _], keys, dtype) = (q.dims(), k.dims()[2], q.dtype());
    let device = q.device();
    let mut scores = q.matmul(k.swap_dims(2, 3)).cast(DType::F32) * scale;
    if let Some(bias) = bias {
        scores = scores + bias.cast(DType::F32);
    }
    if causal {
        let past = keys.cast_signed() - queries.cast_signed();
        let hidden = Tensor::<2, Bool>::tril_mask([queries, keys], past as i64, &device);
        scores = scores.mask_fill(hidden.unsqueeze::<4>().expand([batch, heads, queries, keys]), EXCLUDED_SCORE);
    }
    softmax(scores, 3).cast(dtype).matmul(v)
}

/// Segments sorted by length, so that those of one length are one batch and not one call each.
struct SegmentPlan {
    /// Tokens in the order of the groups.
    order: Vec<usize>,
    /// Place of each token in `order`.
    places: Vec<usize>,
    is_sorted: bool,
    /// Number and length of the segments of each length.
    groups: Vec<(usize, usize)>,
}

impl SegmentPlan {
    fn new(bounds: &[usize]) -> Self {
        let mut segments: Vec<(usize, usize)> = bounds.windows(2).map(|pair| (pair[1] - pair[0], pair[0])).collect();
        segments.retain(|(length, _)| *length > 0);
        segments.sort_unstable();
        let order: Vec<usize> = segments.iter().flat_map(|&(length, start)| start..start + length).collect();
        let mut places = vec![0; order.len()];
        for (place, &token) in order.iter().enumerate() {
            places[token] = place;
        }
        let of_one_length = segments.chunk_by(|a, b| a.0 == b.0);
        let groups = of_one_length.map(|segments| (segments.len(), segments[0].0)).collect();
        Self { is_sorted: order.is_sorted(), order, places, groups }
    }
}

/// `[batch, heads, count * length, head_dim]` to `[batch * count, heads, length, head_dim]`.
fn segments_as_batch(x: Tensor<4>, count: usize) -> Tensor<4> {
    let [batch, heads, tokens, head_dim] = x.dims();
    let length = tokens / count;
    x.reshape([batch, heads, count, length, head_dim]).swap_dims(1, 2).reshape([batch * count, heads, length, head_dim])
}

/// Keys or values of heads of their own, `[batch, kv_heads, keys, head_dim]` to `[batch, heads, keys, head_dim]`.
pub(crate) fn repeat_heads(x: Tensor<4>, heads: usize) -> Tensor<4> {
    let [batch, kv_heads, keys, head_dim] = x.dims();
    if kv_heads == heads {
        return x;
    }
    x.unsqueeze_dim::<5>(2)
        .expand([batch, kv_heads, heads / kv_heads, keys, head_dim])
        .reshape([batch, heads, keys, head_dim])
}

#[cfg(test)]
pub(crate) mod tests {
    use burn::tensor::TensorData;

    use super::*;
    use crate::{
        ops::Plain,
        testing::{assert_close, device, input},
    };

    /// Attention written out with loops in f64: `visible(query, key)`, `bias(head, query, key)`.
    pub(crate) fn naive(
        [q, k, v]: [&Tensor<4>; 3],
        visible: impl Fn(usize, usize) -> bool,
        bias: impl Fn(usize, usize, usize) -> f64,
        scale: f64,
    ) -> Vec<f32> {
        let [batch, queries, heads, dim] = q.dims();
        let [_, keys, kv_heads, _] = k.dims();
        let [q, k, v] = [q, k, v].map(|x| x.to_data().try_to_vec::<f32>().unwrap());
        let mut values = vec![];
        for b in 0..batch {
            for i in 0..queries {
                for h in 0..heads {
                    let kv = h / (heads / kv_heads);
                    let query = &q[((b * queries + i) * heads + h) * dim..][..dim];
                    let row = |x: &[f32], j: usize, d: usize| f64::from(x[((b * keys + j) * kv_heads + kv) * dim + d]);
                    let dot = |j| (0..dim).map(|d| f64::from(query[d]) * row(&k, j, d)).sum::<f64>();
                    let score = |j| if visible(i, j) { dot(j) * scale + bias(h, i, j) } else { f64::NEG_INFINITY };
                    let scores: Vec<f64> = (0..keys).map(score).collect();
                    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    let mixed = |d| weights.iter().enumerate().map(|(j, w)| w * row(&v, j, d)).sum::<f64>() / total;
                    values.extend((0..dim).map(|d| mixed(d) as f32));
                }
            }
        }
        values
    }

    /// Compares [`attention`], which may be a kernel, and the plain formulation.
    fn check(qkv: [Tensor<4>; 3], options: &Attention<'_>, expected: &[f32]) {
        let [q, k, v] = qkv.clone();
        assert_close(&attention(q, k, v, options.clone()), expected, 1e-5);
        assert_close(&in_heads::<Plain>(qkv, options), expected, 1e-5);
    }

    fn qkv(batch: usize, queries: usize, keys: usize, heads: usize, kv_heads: usize) -> [Tensor<4>; 3] {
        let dim = 6;
        [
            input([batch, queries, heads, dim], 1) * 2.0,
            input([batch, keys, kv_heads, dim], 2) * 2.0,
            input([batch, keys, kv_heads, dim], 3),
        ]
    }

    #[test]
    fn half_precision_has_its_softmax_in_f32() {
        let dtype = if device().supports_dtype(DType::BF16) { DType::BF16 } else { DType::F16 };
        let half = |x: Tensor<4>| x.cast(dtype);
        let [q, k, v] = qkv(2, 5, 70, 6, 2).map(half);
        let wide = [&q, &k, &v].map(|x| x.clone().cast(DType::F32));
        let bias = input([1, 6, 5, 70], 4);
        let of_bias = bias.to_data().try_to_vec::<f32>().unwrap();
        for visibility in [Visibility::All, Visibility::Causal] {
            let sees = |query, key| visibility == Visibility::All || key <= query + 65;
            let bias_at = |head, query, key| f64::from(of_bias[(head * 5 + query) * 70 + key]);
            let expected = naive(wide.each_ref(), sees, bias_at, 0.5);
            let options = Attention { visibility, bias: Some(bias.clone()), scale: Some(0.5) };
            let mixed = in_heads::<Plain>([q.clone(), k.clone(), v.clone()], &options);
            assert_eq!(mixed.dtype(), dtype);
            assert_close(&mixed.cast(DType::F32), &expected, 1e-2);
        }
    }

    #[test]
    fn full_attention_with_grouped_heads() {
        let [q, k, v] = qkv(2, 5, 7, 6, 2);
        let expected = naive([&q, &k, &v], |_, _| true, |_, _, _| 0.0, 1.0 / 6f64.sqrt());
        check([q, k, v], &Attention::default(), &expected);
    }

    #[test]
    fn causal_attention_of_a_chunk_sees_the_cache() {
        for queries in [1, 3, 7] {
            let [q, k, v] = qkv(1, queries, 7, 4, 2);
            let past = 7 - queries;
            let expected = naive([&q, &k, &v], |i, j| j <= past + i, |_, _, _| 0.0, 1.0 / 6f64.sqrt());
            let options = Attention { visibility: Visibility::Causal, ..Default::default() };
            check([q, k, v], &options, &expected);
        }
    }

    #[test]
    fn segments_do_not_see_each_other() {
        for (batch, bounds) in [(1, vec![0, 2, 3, 8]), (2, vec![0, 3, 5, 8]), (2, vec![0, 2, 4, 6, 8]), (1, vec![0, 8])]
        {
            let segment = |i: usize| bounds.iter().rposition(|&start| start <= i).unwrap();
            let [q, k, v] = qkv(batch, 8, 8, 4, 2);
            let expected = naive([&q, &k, &v], |i, j| segment(i) == segment(j), |_, _, _| 0.0, 1.0 / 6f64.sqrt());
            let options = Attention { visibility: Visibility::Segments(&bounds), ..Default::default() };
            check([q, k, v], &options, &expected);
        }
    }

    #[test]
    fn bias_and_scale_enter_the_scores() {
        let [q, k, v] = qkv(1, 4, 4, 2, 2);
        let bias = |h: usize, i: usize, j: usize| (h as f64 + 1.0) * (i as f64 - j as f64) * 0.3;
        let values: Vec<f32> = (0..32).map(|n| bias(n / 16, n / 4 % 4, n % 4) as f32).collect();
        let tensor = Tensor::from_data(TensorData::new(values, [1, 2, 4, 4]), &device());
        let expected = naive([&q, &k, &v], |_, _| true, bias, 1.0);
        let options = Attention { bias: Some(tensor), scale: Some(1.0), ..Default::default() };
        check([q, k, v], &options, &expected);
    }
}
