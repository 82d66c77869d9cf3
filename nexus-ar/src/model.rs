//! The model: embeddings and positions -> hidden states -> scores of tokens and predicted image embeddings.
//!
//! Inference and training share the layers, which take embeddings, not ids; see [`ArModel::forward`] and
//! [`ArModel::forward_batch`].

use burn::{
    module::Module,
    tensor::{Device, FloatDType, Tensor},
};
use nexus_checkpoint::{Checkpoint, LoadOptions, load_module};
use nexus_core::{
    ImageEmbeds,
    nn::{DecoderLayer, Embedding, Linear, MultimodalRotary, RmsNorm},
};
use nexus_kernels::{RotaryTable, Visibility, index_tensor, linear};

use crate::{ArConfig, ArError, KvCache, NAMES};

/// Embeddings of one generated image, rows of `image_prefill_embeds`.
pub const NUM_IMAGE_TOKENS: usize = 81;

/// Qwen2.5-VL's language model with Nexus-Gen's vision head and prefill embeddings.
#[derive(Module, Debug)]
pub struct ArModel {
    /// Embedding table, layers and final norm.
    pub model: TextModel,
    /// `[vocab, hidden]`; absent when the embedding table is used instead (`tie_word_embeddings`).
    pub lm_head: Option<Linear>,
    /// `[hidden, hidden]`: hidden states to the shared embedding space.
    pub vision_head: Linear,
    /// `[81, hidden]`: what stands at the positions of an image to be drawn.
    pub image_prefill_embeds: Embedding,
    #[module(skip)]
    config: ArConfig,
    #[module(skip)]
    rotary: MultimodalRotary,
}

/// What [`ArModel`] has from Qwen2.5-VL.
#[derive(Module, Debug)]
struct Qwen2_5Vl {
    model: TextModel,
    lm_head: Option<Linear>,
}

/// The transformer of [`ArModel`].
#[derive(Module, Debug)]
pub struct TextModel {
    /// `[vocab, hidden]`.
    pub embed_tokens: Embedding,
    /// Transformer layers.
    pub layers: Vec<DecoderLayer>,
    /// Norm of the hidden states.
    pub norm: RmsNorm,
}

impl ArModel {
    /// A lazily initialised model.
    ///
    /// # Errors
    /// [`ArError::Config`] if the sizes are incoherent.
    pub fn new(config: &ArConfig, device: &Device) -> Result<Self, ArError> {
        config.validate()?;
        let hidden = config.hidden_size;
        let lm_head = || Linear::without_bias(hidden, config.vocab_size, device);
        Ok(Self {
            model: TextModel {
                embed_tokens: Embedding::new(config.vocab_size, hidden, device),
                layers: (0..config.num_hidden_layers).map(|_| config.layer().init(device)).collect(),
                norm: RmsNorm::new(hidden, config.rms_norm_eps, device),
            },
            lm_head: (!config.tie_word_embeddings).then(lm_head),
            vision_head: Linear::without_bias(hidden, hidden, device),
            image_prefill_embeds: Embedding::new(NUM_IMAGE_TOKENS, hidden, device),
            config: config.clone(),
            rotary: config.rotary(),
        })
    }

    /// Loads everything of the checkpoint but the vision encoder.
    ///
    /// # Errors
    /// [`ArError::Config`] if the sizes are incoherent, [`ArError::Checkpoint`] if a weight is missing, left over, or of
    /// another shape or dtype.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &ArConfig,
        device: &Device,
        options: &LoadOptions,
    ) -> Result<Self, ArError> {
        Ok(load_module(Self::new(config, device)?, checkpoint, &NAMES, options)?)
    }

    /// Loads Qwen2.5-VL, from which the model was trained: everything but the vision encoder, and what Nexus-Gen added,
    /// which stays lazily initialised.
    ///
    /// # Errors
    /// As [`ArModel::load`].
    pub fn load_qwen2_5_vl(
        checkpoint: &Checkpoint,
        config: &ArConfig,
        device: &Device,
        options: &LoadOptions,
    ) -> Result<Self, ArError> {
        let Self { model, lm_head, vision_head, image_prefill_embeds, config, rotary } = Self::new(config, device)?;
        let start = load_module(Qwen2_5Vl { model, lm_head }, checkpoint, &NAMES, options)?;
        let Qwen2_5Vl { model, lm_head } = start;
        Ok(Self { model, lm_head, vision_head, image_prefill_embeds, config, rotary })
    }

    /// Sizes and token ids of the model.
    pub fn config(&self) -> &ArConfig {
        &self.config
    }

    /// Device of the weights.
    pub fn device(&self) -> Device {
        self.model.norm.weight.lazy_device()
    }

    /// Embeddings of a sequence: rows of the table, with those of the images, in order, at the image positions.
    ///
    /// # Shapes
    /// - `images`: each `[1, tokens, hidden]`
    /// - returns: `[1, tokens, hidden]` in `dtype`
    ///
    /// # Errors
    /// [`ArError::EmptyPrompt`], [`ArError::TokenOutOfVocabulary`], [`ArError::ImageTokens`], [`ArError::EmbedWidth`],
    /// [`ArError::EmbedBatch`].
    pub fn embed(&self, token_ids: &[u32], images: &[ImageEmbeds], dtype: FloatDType) -> Result<Tensor<3>, ArError> {
        let (hidden, vocab_size) = (self.config.hidden_size, self.config.vocab_size);
        if token_ids.is_empty() {
            return Err(ArError::EmptyPrompt);
        }
        if let Some(&id) = token_ids.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(ArError::TokenOutOfVocabulary { id, vocab_size });
        }
        if let Some(found) = images.iter().map(|image| image.values.dims()[2]).find(|&width| width != hidden) {
            return Err(ArError::EmbedWidth { found, expected: hidden });
        }
        if let Some(batch) = images.iter().map(|image| image.values.dims()[0]).find(|&batch| batch != 1) {
            return Err(ArError::EmbedBatch { batch });
        }
        let is_image = |id: &u32| *id == self.config.token_ids.image_token_id;
        let positions = token_ids.iter().filter(|id| is_image(id)).count();
        let embeddings = images.iter().map(|image| image.grid.num_merged_tokens()).sum();
        if images.is_empty() {
            return Ok(self.embed_tokens(token_ids, dtype));
        }
        if positions != embeddings {
            return Err(ArError::ImageTokens { positions, embeddings });
        }
        let images = Tensor::cat(images.iter().map(|image| image.values.clone().cast(dtype)).collect(), 1);
        let mut used = 0;
        let runs = token_ids.chunk_by(|a, b| is_image(a) == is_image(b)).map(|run| match is_image(&run[0]) {
            false => self.embed_tokens(run, dtype),
            true => {
                used += run.len();
                images.clone().narrow(1, used - run.len(), run.len())
            }
        });
        Ok(Tensor::cat(runs.collect(), 1))
    }

    fn embed_tokens(&self, token_ids: &[u32], dtype: FloatDType) -> Tensor<3> {
        let ids = index_tensor(token_ids.iter().map(|&id| id as usize), [1, token_ids.len()], &self.device());
        self.model.embed_tokens.forward(ids, dtype)
    }

    /// The embeddings that stand at the positions of an image to be drawn.
    ///
    /// # Shapes
    /// `[1, 81, hidden]` in `dtype`
    pub fn prefill_embeds(&self, dtype: FloatDType) -> Tensor<3> {
        self.image_prefill_embeds.weight.val().cast(dtype).unsqueeze()
    }

    /// Hidden states after the final norm; causal, after the tokens in `cache`, to which the new ones are added.
    ///
    /// # Shapes
    /// - `embeds`: `[1, tokens, hidden]`; its dtype is the compute dtype
    /// - `positions`: one per token
    /// - returns: `[1, tokens, hidden]`
    ///
    /// # Panics
    /// If there are not as many positions as tokens.
    pub fn forward(&self, embeds: Tensor<3>, positions: &[[i64; 3]], cache: Option<&mut KvCache>) -> Tensor<3> {
        let [_, tokens, _] = embeds.dims();
        assert_eq!(positions.len(), tokens, "one position per token");
        let rotary = self.rotary_table(positions, &embeds);
        self.forward_layers(embeds, &rotary, cache)
    }

    /// Table `[1, positions, head_dim / 2]` on the device and in the dtype of the embeddings.
    pub(crate) fn rotary_table(&self, positions: &[[i64; 3]], embeds: &Tensor<3>) -> RotaryTable {
        let positions: Vec<[f32; 3]> = positions.iter().map(|axes| axes.map(|position| position as f32)).collect();
        self.rotary.table(&positions, &embeds.device()).cast(embeds.dtype())
    }

    /// All layers and the final norm; the table is of batch 1 or of the batch of `embeds`.
    pub(crate) fn forward_layers(
        &self,
        embeds: Tensor<3>,
        rotary: &RotaryTable,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let mut unused = KvCache::new();
        let keep = cache.is_some();
        let cache = cache.unwrap_or(&mut unused);
        let mut x = embeds;
        for (layer, entry) in self.model.layers.iter().zip(cache.entries(self.model.layers.len())) {
            x = layer.forward(x, rotary, Visibility::Causal, keep.then_some(entry));
        }
        self.model.norm.forward(x)
    }

    /// Scores of all token ids.
    ///
    /// # Shapes
    /// `[1, tokens, hidden]` to `[1, tokens, vocab]`
    pub fn logits(&self, hidden: Tensor<3>) -> Tensor<3> {
        match &self.lm_head {
            Some(lm_head) => lm_head.forward(hidden),
            None => linear(hidden, self.model.embed_tokens.weight.val(), None),
        }
    }

    /// Predicted embeddings in the space of the vision encoder; position `i` predicts image token `i + 1`.
    ///
    /// # Shapes
    /// `[1, tokens, hidden]` to the same
    pub fn predict_embeds(&self, hidden: Tensor<3>) -> Tensor<3> {
        self.vision_head.forward(hidden)
    }
}
