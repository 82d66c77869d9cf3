//! T5 encoder: token ids -> one vector per token.

use burn::{
    module::Module,
    tensor::{Device, FloatDType, Tensor},
};
use nexus_checkpoint::{Checkpoint, LoadOptions, load_module};
use nexus_core::nn::{Embedding, Linear, RmsNorm};
use nexus_kernels::{Attention, attention, gelu_tanh_mul, index_tensor};

use super::checked_ids;
use crate::{DiffusionError, config::T5Config, weights::T5};

/// Longest text, in tokens, that FLUX conditions on.
const MAX_TOKENS: usize = 512;

/// The encoder half of T5 v1.1.
///
/// Padding is attended to like any other token: the original passes no mask.
///
/// Source: transformers (modeling_t5.py, `T5EncoderModel`).
#[derive(Module, Debug)]
pub struct T5Encoder {
    /// `[vocab, d_model]`.
    pub shared: Embedding,
    /// `encoder.block`.
    pub block: Vec<T5Block>,
    /// `encoder.block.0...relative_attention_bias`, used by all blocks: `[buckets, heads]`.
    pub relative_attention_bias: Embedding,
    /// Norm of the output.
    pub final_layer_norm: RmsNorm,
    max_distance: usize,
}

/// A pre-norm block without biases.
#[derive(Module, Debug)]
pub struct T5Block {
    /// `layer.0.SelfAttention`.
    pub self_attention: T5Attention,
    /// `layer.0.layer_norm`.
    pub attention_norm: RmsNorm,
    /// `layer.1.DenseReluDense`.
    pub dense: T5Dense,
    /// `layer.1.layer_norm`.
    pub dense_norm: RmsNorm,
}

/// Projections of a block's attention.
#[derive(Module, Debug)]
pub struct T5Attention {
    /// Queries: `[heads * d_kv, d_model]`.
    pub q: Linear,
    /// Keys: `[heads * d_kv, d_model]`.
    pub k: Linear,
    /// Values: `[heads * d_kv, d_model]`.
    pub v: Linear,
    /// Output: `[d_model, heads * d_kv]`.
    pub o: Linear,
    num_heads: usize,
}

/// `wo(gelu(wi_0(x)) * wi_1(x))`.
#[derive(Module, Debug)]
pub struct T5Dense {
    /// `[d_ff, d_model]`.
    pub wi_0: Linear,
    /// `[d_ff, d_model]`.
    pub wi_1: Linear,
    /// `[d_model, d_ff]`.
    pub wo: Linear,
}

impl T5Encoder {
    /// A lazily initialised encoder.
    pub fn new(config: &T5Config, device: &Device) -> Self {
        Self {
            shared: Embedding::new(config.vocab_size, config.d_model, device),
            block: (0..config.num_layers).map(|_| T5Block::new(config, device)).collect(),
            relative_attention_bias: Embedding::new(config.relative_attention_num_buckets, config.num_heads, device),
            final_layer_norm: RmsNorm::new(config.d_model, config.layer_norm_epsilon, device),
            max_distance: config.relative_attention_max_distance,
        }
    }

    /// Loads the shards of `text_encoder_2`.
    ///
    /// # Errors
    /// [`DiffusionError::Config`] if the configuration is incoherent, [`DiffusionError::Checkpoint`] if the weights do
    /// not fit it.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &T5Config,
        device: &Device,
        options: &LoadOptions,
    ) -> Result<Self, DiffusionError> {
        config.validate()?;
        Ok(load_module(Self::new(config, device), checkpoint, &T5, options)?)
    }

    /// Encodes one text.
    ///
    /// # Shapes
    /// - `ids`: 512 in all known uses: the text, end of text, padding
    /// - returns: `[1, tokens, d_model]` in `dtype`
    ///
    /// # Errors
    /// [`DiffusionError::TokenCount`], [`DiffusionError::TokenOutOfVocabulary`].
    pub fn encode(&self, ids: &[u32], dtype: FloatDType) -> Result<Tensor<3>, DiffusionError> {
        let [vocab_size, _] = self.shared.weight.dims();
        let device = self.shared.weight.device();
        let tokens = checked_ids("the T5 encoder", ids, MAX_TOKENS, vocab_size, &device)?;
        let bias = self.position_bias(ids.len(), dtype, &device);
        let x = self.block.iter().fold(self.shared.forward(tokens, dtype), |x, block| block.forward(x, &bias));
        Ok(self.final_layer_norm.forward(x))
    }

    /// What each pair of positions adds to the scores: `[1, heads, queries, keys]`.
    fn position_bias(&self, tokens: usize, dtype: FloatDType, device: &Device) -> Tensor<4> {
        let [num_buckets, heads] = self.relative_attention_bias.weight.dims();
        let buckets = position_buckets(tokens, num_buckets, self.max_distance);
        let buckets = index_tensor(buckets, [tokens, tokens], device);
        let bias = self.relative_attention_bias.forward(buckets, dtype).permute([2, 0, 1]);
        // The reshape copies, once for all blocks, which read keys side by side.
        bias.reshape([1, heads, tokens, tokens])
    }
}

/// Bucket of each pair (query, key) in row-major order: exact for near keys, logarithmic for far ones, the upper half
/// for keys after the query.
///
/// Source: transformers (modeling_t5.py, `_relative_position_bucket`, bidirectional).
fn position_buckets(tokens: usize, num_buckets: usize, max_distance: usize) -> Vec<usize> {
    let half = num_buckets / 2;
    let exact = half / 2;
    // The original computes in f32; whole quotients of logarithms must fall on the same side here.
    let slope = ((max_distance as f64 / exact as f64).ln() as f32, (half - exact) as f32);
    let bucket_of_distance = |distance: usize| {
        if distance < exact {
            return distance;
        }
        let logarithm = (distance as f32 / exact as f32).ln() / slope.0 * slope.1;
        (exact + logarithm as usize).min(half - 1)
    };
    let buckets: Vec<usize> = (0..tokens).map(bucket_of_distance).collect();
    let bucket = |query: usize, key: usize| buckets[query.abs_diff(key)] + if key > query { half } else { 0 };
    (0..tokens).flat_map(|query| (0..tokens).map(move |key| (query, key))).map(|(q, k)| bucket(q, k)).collect()
}

impl T5Block {
    fn new(config: &T5Config, device: &Device) -> Self {
        let (width, inner) = (config.d_model, config.num_heads * config.d_kv);
        Self {
            self_attention: T5Attention {
                q: Linear::without_bias(width, inner, device),
                k: Linear::without_bias(width, inner, device),
                v: Linear::without_bias(width, inner, device),
                o: Linear::without_bias(inner, width, device),
                num_heads: config.num_heads,
            },
            attention_norm: RmsNorm::new(width, config.layer_norm_epsilon, device),
            dense: T5Dense {
                wi_0: Linear::without_bias(width, config.d_ff, device),
                wi_1: Linear::without_bias(width, config.d_ff, device),
                wo: Linear::without_bias(config.d_ff, width, device),
            },
            dense_norm: RmsNorm::new(width, config.layer_norm_epsilon, device),
        }
    }

    /// # Shapes
    /// - `x`: `[batch, tokens, d_model]`
    /// - `bias`: `[1, heads, tokens, tokens]`
    /// - returns: the same as `x`
    pub fn forward(&self, x: Tensor<3>, bias: &Tensor<4>) -> Tensor<3> {
        let x = x.clone() + self.self_attention.forward(self.attention_norm.forward(x), bias);
        let T5Dense { wi_0, wi_1, wo } = &self.dense;
        let normed = self.dense_norm.forward(x.clone());
        x + wo.forward(gelu_tanh_mul(wi_0.forward(normed.clone()), wi_1.forward(normed)))
    }
}

impl T5Attention {
    /// Attention without the factor `1 / sqrt(d_kv)`.
    ///
    /// # Shapes
    /// As [`T5Block::forward`].
    pub fn forward(&self, x: Tensor<3>, bias: &Tensor<4>) -> Tensor<3> {
        let [batch, tokens, _] = x.dims();
        let heads = |projection: &Linear| {
            let y = projection.forward(x.clone());
            let [_, _, inner] = y.dims();
            y.reshape([batch, tokens, self.num_heads, inner / self.num_heads])
        };
        let (q, k, v) = (heads(&self.q), heads(&self.k), heads(&self.v));
        let options = Attention { bias: Some(bias.clone()), scale: Some(1.0), ..Default::default() };
        self.o.forward(attention(q, k, v, options))
    }
}

#[cfg(test)]
mod tests {
    use nexus_core::testing::{Fixture, cpu};

    use super::*;

    #[test]
    fn near_positions_are_exact_and_far_ones_share_buckets() {
        let buckets = position_buckets(200, 32, 128);
        let at = |query: usize, key: usize| buckets[query * 200 + key];
        assert_eq!([at(5, 5), at(5, 4), at(5, 6), at(7, 0), at(0, 7)], [0, 1, 17, 7, 23]);
        assert_eq!([at(8, 0), at(11, 0), at(12, 0), at(16, 0), at(64, 0)], [8, 8, 9, 10, 14]);
        assert_eq!([at(91, 0), at(128, 0), at(199, 0), at(0, 199)], [15, 15, 15, 31]);
    }

    #[test]
    fn buckets_are_those_of_transformers() {
        let fixture = Fixture::open("t5_512");
        let (rows, expected) = (fixture.ids("in.rows"), fixture.integers("out.bucket_rows"));
        let buckets = position_buckets(512, 32, 128);
        let found: Vec<i64> =
            rows.iter().flat_map(|&row| &buckets[row as usize * 512..][..512]).map(|&bucket| bucket as i64).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn ids_and_lengths_are_checked() {
        let config = T5Config { d_model: 8, d_kv: 2, d_ff: 8, num_heads: 2, num_layers: 1, ..T5Config::v1_1_xxl() };
        let encoder = T5Encoder::new(&T5Config { vocab_size: 5, ..config }, &cpu());
        assert_eq!(encoder.encode(&[1, 4], FloatDType::F32).unwrap().dims(), [1, 2, 8]);
        let outside = encoder.encode(&[5], FloatDType::F32);
        assert!(matches!(outside, Err(DiffusionError::TokenOutOfVocabulary { id: 5, .. })));
        let long = encoder.encode(&[1; 513], FloatDType::F32);
        assert!(matches!(long, Err(DiffusionError::TokenCount { tokens: 513, .. })));
    }
}
