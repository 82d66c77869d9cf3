//! Connector of the editing decoder: embeddings of the edited picture and of the reference -> condition tokens.

use burn::{
    module::Module,
    tensor::{DType, Device, Tensor},
};
use nexus_checkpoint::{Checkpoint, LoadOptions, load_module};
use nexus_core::{
    GridThw, ImageEmbeds,
    nn::{DecoderLayer, DecoderLayerConfig, Linear, MultimodalRotary, RmsNorm},
};
use nexus_kernels::{RotaryTable, Visibility, silu};

use super::TokenPosition;
use crate::{DiffusionError, config::MergerConfig, weights::QWEN2_5_VL_LAYER_0};

/// Side of the square, in patches, onto which the positions of every grid are scaled.
pub const MERGER_BASE_GRID: usize = 72;

/// Width of the projector's hidden layer, as a multiple of its output.
const EXPANSION: usize = 4;

/// One layer of the language model over both pictures, every token seeing every other, and a projector.
///
/// A target token and the reference token at the same place get the same position, and nothing else tells the two
/// pictures apart.
///
/// Source: Nexus-Gen (editing decoder, `ImageEmbeddingMerger`).
#[derive(Module, Debug)]
pub struct EmbeddingMerger {
    /// Transformer layers; the released model has one.
    pub layers: Vec<DecoderLayer>,
    /// From the language model's width to the transformer's.
    pub projector: Projector,
    #[module(skip)]
    rotary: MultimodalRotary,
    tokens_per_second: usize,
}

/// Two linear layers with norms, `embedding_merger.projector`.
#[derive(Module, Debug)]
pub struct Projector {
    /// `projector.0`.
    pub norm_in: RmsNorm,
    /// `projector.1`: `[4 * context, hidden]`.
    pub linear_in: Linear,
    /// `projector.2`.
    pub norm_hidden: RmsNorm,
    /// `projector.4`: `[context, 4 * context]`.
    pub linear_out: Linear,
    /// `projector.5`.
    pub norm_out: RmsNorm,
}

impl EmbeddingMerger {
    /// A lazily initialised merger whose condition tokens are `context` wide.
    ///
    /// # Panics
    /// If the configuration is incoherent; see [`MergerConfig::validate`].
    pub fn new(config: &MergerConfig, context: usize, device: &Device) -> Self {
        let (hidden, epsilon) = (config.hidden_size, config.rms_norm_eps);
        let layer = DecoderLayerConfig {
            hidden_size: hidden,
            intermediate_size: config.intermediate_size,
            num_attention_heads: config.num_attention_heads,
            num_key_value_heads: config.num_key_value_heads,
            rms_norm_eps: epsilon,
        };
        Self {
            layers: vec![layer.init(device)],
            projector: Projector {
                norm_in: RmsNorm::new(hidden, epsilon, device),
                linear_in: Linear::new(hidden, context * EXPANSION, device),
                norm_hidden: RmsNorm::new(context * EXPANSION, epsilon, device),
                linear_out: Linear::new(context * EXPANSION, context, device),
                norm_out: RmsNorm::new(context, epsilon, device),
            },
            rotary: MultimodalRotary::new(config.head_dim(), config.rope_theta, config.rope_scaling.mrope_section),
            tokens_per_second: config.vision_config.tokens_per_second,
        }
    }

    /// The merger with layer 0 of the language model of Qwen2.5-VL, from which it was trained.
    ///
    /// # Errors
    /// [`DiffusionError::Checkpoint`] if the file lacks a weight of that layer, or has another shape of it.
    pub fn with_qwen2_5_vl_layer(
        mut self,
        checkpoint: &Checkpoint,
        options: &LoadOptions,
    ) -> Result<Self, DiffusionError> {
        let layers = std::mem::take(&mut self.layers).into_iter();
        let load = |layer| Ok(load_module(layer, checkpoint, &QWEN2_5_VL_LAYER_0, options)?);
        self.layers = layers.map(load).collect::<Result<_, DiffusionError>>()?;
        Ok(self)
    }

    /// Width of the image embeddings that it takes.
    pub fn hidden_size(&self) -> usize {
        let [_, hidden] = self.projector.linear_in.weight.dims();
        hidden
    }

    /// Merges the pictures; the tokens of the reference follow those of the target.
    ///
    /// # Shapes
    /// - `target`, `reference`: `[batch, tokens, hidden]`
    /// - returns: `[batch, target tokens + reference tokens, context]`
    pub fn forward(&self, target: &ImageEmbeds, reference: Option<&ImageEmbeds>) -> Tensor<3> {
        let pictures = || std::iter::once(target).chain(reference);
        let positions: Vec<TokenPosition> = pictures().flat_map(|picture| self.positions(picture.grid)).collect();
        let x = Tensor::cat(pictures().map(|picture| picture.values.clone()).collect(), 1);
        let rotary = self.rotary(&positions, x.dtype(), &x.device());
        self.projector.forward(self.transform(x, &rotary))
    }

    /// Temporal, row and column position of each merged token of a grid, in raster order.
    ///
    /// Rows and columns are scaled so that every grid covers 72x72 positions.
    pub fn positions(&self, grid: GridThw) -> Vec<TokenPosition> {
        let row_step = (MERGER_BASE_GRID as f64 / grid.h as f64) as f32;
        let column_step = (MERGER_BASE_GRID as f64 / grid.w as f64) as f32;
        let frame = |t: usize| {
            (0..grid.merged_h()).flat_map(move |row| {
                (0..grid.merged_w()).map(move |column| {
                    [(t * self.tokens_per_second) as f32, row as f32 * row_step, column as f32 * column_step]
                })
            })
        };
        (0..grid.t).flat_map(frame).collect()
    }

    /// The rotary table of the layers.
    ///
    /// In bf16 the original also rounds the frequencies, which are a buffer of its module.
    pub fn rotary(&self, positions: &[TokenPosition], dtype: DType, device: &Device) -> RotaryTable {
        let rotary = match dtype {
            DType::BF16 => self.rotary.clone().with_bf16_frequencies(),
            _ => self.rotary.clone(),
        };
        rotary.table(positions, device).cast(dtype)
    }

    /// The layers without the projector.
    ///
    /// # Shapes
    /// - `x`: `[batch, tokens, hidden]`
    /// - returns: the same
    pub fn transform(&self, x: Tensor<3>, rotary: &RotaryTable) -> Tensor<3> {
        self.layers.iter().fold(x, |x, layer| layer.forward(x, rotary, Visibility::All, None))
    }
}

impl Projector {
    /// # Shapes
    /// - `x`: `[batch, tokens, hidden]`
    /// - returns: `[batch, tokens, context]`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let x = self.linear_in.forward(self.norm_in.forward(x));
        let x = self.linear_out.forward(silu(self.norm_hidden.forward(x)));
        self.norm_out.forward(x)
    }
}
