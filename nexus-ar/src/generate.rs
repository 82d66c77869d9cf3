//! The stage: a prompt -> text and images, by a state machine of text steps and image blocks.
//!
//! In a text step the model scores the next token. When the chosen token begins an image, its embedding is fed and
//! predicts image embedding 0; then the 81 prefill embeddings are fed and predict embeddings 1 to 80; then the token
//! that ends an image is forced and text goes on.

use std::{fmt, ops::ControlFlow};

use burn::tensor::{FloatDType, Tensor};
use nexus_core::{GridThw, ImageEmbeds, failure_reason};
use serde::{Deserialize, Serialize};

use crate::{
    ArError, ArModel, Context, NUM_IMAGE_TOKENS, PositionIds, Sampler, SamplingOptions, image_position_ids,
    position_ids,
};

/// New tokens for which memory is taken at the start, if so many are allowed; longer replies take it again.
const MAX_RESERVED_TOKENS: usize = 4096;

/// What the model continues.
#[derive(Debug, Clone, Copy)]
pub struct Prompt<'a> {
    /// Ids of the prompt, image tokens expanded; it may end with the token that begins an image.
    pub token_ids: &'a [u32],
    /// Embeddings of the images in the prompt, in order, each of batch 1.
    pub images: &'a [ImageEmbeds],
}

/// What is fed at the 81 positions of an image, and in how many passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImagePass {
    /// The prefill embeddings, one forward pass for all.
    #[default]
    Parallel,
    /// The prefill embeddings, one forward pass each, the order of the original; the result is that of `Parallel`.
    Sequential,
    /// Each predicted embedding is fed to predict the next: for models trained with
    /// [`ArObjective::prefill`](crate::ArObjective::prefill) off. The released model was not.
    Autoregressive,
}

/// Positions of the text that follows a generated image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PositionsAfterImage {
    /// As the original generates: the image counts as 81 positions.
    #[default]
    Reference,
    /// As the model was trained: the image counts as its longer side, 9 positions.
    Trained,
}

/// Options of [`generate`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GenerateOptions {
    /// Longest reply in tokens, the 81 of each image included.
    pub max_new_tokens: usize,
    /// Shortest reply in tokens, its end not counted: until then no id that ends a reply is chosen.
    pub min_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingOptions,
    /// Ids that end the reply, by default the model's `eos_token_id`; with none, only its length ends it.
    pub eos_token_ids: Option<Vec<u32>>,
    /// How images are computed.
    pub image_pass: ImagePass,
    /// Where text goes on after an image.
    pub positions_after_image: PositionsAfterImage,
    /// Compute dtype of the activations.
    #[serde(skip, default = "default_dtype")]
    pub dtype: FloatDType,
    /// Keeps the scores of every text step in [`Generation::text_steps`].
    pub keep_scores: bool,
}

fn default_dtype() -> FloatDType {
    FloatDType::F32
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: 1024,
            min_new_tokens: 0,
            sampling: SamplingOptions::default(),
            eos_token_ids: None,
            image_pass: ImagePass::default(),
            positions_after_image: PositionsAfterImage::default(),
            dtype: default_dtype(),
            keep_scores: false,
        }
    }
}

/// What happens while a reply is written.
#[derive(Debug)]
#[non_exhaustive]
pub enum GenerateEvent<'a> {
    /// The prompt has been read.
    PromptRead {
        /// Its length.
        tokens: usize,
        /// Tokens at its start that the context held already.
        reused: usize,
    },
    /// A token has been chosen.
    Token {
        /// Its id.
        id: u32,
    },
    /// An image is complete.
    Image {
        /// Its embeddings.
        embeds: &'a ImageEmbeds,
    },
}

/// Why a reply ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended its turn.
    EndOfTurn,
    /// `max_new_tokens` or the context is used up.
    Length,
    /// The observer stopped it.
    Stopped,
}

/// Scores of one text step.
#[derive(Clone)]
pub struct TextStep {
    /// Index of the chosen token in the sequence.
    pub index: usize,
    /// Scores of all ids after masking and penalty.
    pub scores: Vec<f32>,
}

impl fmt::Debug for TextStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TextStep({}, {} scores)", self.index, self.scores.len())
    }
}

/// A reply.
#[derive(Clone)]
pub struct Generation {
    /// Prompt and reply.
    pub token_ids: Vec<u32>,
    /// Length of the prompt.
    pub prompt_len: usize,
    /// Tokens of the prompt that the context held already.
    pub reused_len: usize,
    /// Generated images, in order, each `[1, 81, hidden]`.
    pub images: Vec<ImageEmbeds>,
    /// Embeddings of an image that the end of the reply cut off, `[1, fewer than 81, hidden]`.
    pub unfinished_image: Option<Tensor<3>>,
    /// Positions of all tokens that the model has seen; the last one of a reply is not fed.
    pub positions: Vec<[i64; 3]>,
    /// Why the reply ended.
    pub finish: FinishReason,
    /// Scores of the text steps, if asked for.
    pub text_steps: Vec<TextStep>,
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unfinished = self.unfinished_image.as_ref().map(Tensor::dims);
        f.debug_struct("Generation")
            .field("prompt_len", &self.prompt_len)
            .field("reused_len", &self.reused_len)
            .field("new_token_ids", &self.new_token_ids())
            .field("images", &self.images)
            .field("unfinished_image", &unfinished)
            .field("finish", &self.finish)
            .field("text_steps", &self.text_steps.len())
            .finish_non_exhaustive()
    }
}

impl Generation {
    /// The reply without the prompt.
    pub fn new_token_ids(&self) -> &[u32] {
        &self.token_ids[self.prompt_len..]
    }
}

/// Writes a reply; the observer may stop it after every token.
///
/// # Errors
/// [`ArError::EmptyPrompt`], [`ArError::PromptTooLong`], [`ArError::TokenOutOfVocabulary`], [`ArError::ImageTokens`],
/// [`ArError::ImageCount`], [`ArError::EmbedWidth`] for the prompt, [`ArError::Option`] for an option out of range,
/// [`ArError::NotFinite`] if the scores are not numbers.
///
/// Source: Nexus-Gen (modeling_qwen2_5_vl.py, `_sample`).
/// Differs: the image is one pass by default, a second image works, and so does a prompt with images that ends with the
/// token that begins one.
pub fn generate(
    model: &ArModel,
    prompt: Prompt<'_>,
    options: &GenerateOptions,
    observer: &mut dyn FnMut(GenerateEvent<'_>) -> ControlFlow<()>,
) -> Result<Generation, ArError> {
    generate_in(model, &mut Context::new(), prompt, options, observer)
}

/// [`generate`] in a context: what the prompt shares with it is not read again, and what follows is kept in it.
///
/// The context is of this model and dtype, and its images are the first ones of the prompt. What comes after a predicted
/// image is always read again: a prompt has embeddings of the vision encoder where predicting fed others.
///
/// # Errors
/// As [`generate`]; then the context holds what it shared with the prompt, or all it held if the prompt cannot be used, or
/// nothing if the device failed.
pub fn generate_in(
    model: &ArModel,
    context: &mut Context,
    prompt: Prompt<'_>,
    options: &GenerateOptions,
    observer: &mut dyn FnMut(GenerateEvent<'_>) -> ControlFlow<()>,
) -> Result<Generation, ArError> {
    let (tokens, limit) = (prompt.token_ids.len(), model.config().max_position_embeddings);
    if options.max_new_tokens == 0 {
        return Err(ArError::Option { option: "max_new_tokens", reason: "0 leaves no room for a reply".into() });
    }
    if tokens >= limit {
        return Err(ArError::PromptTooLong { tokens, limit });
    }
    let sampler = Sampler::new(options.sampling.clone())?;
    let ids = model.config().token_ids;
    let grids: Vec<GridThw> = prompt.images.iter().map(|image| image.grid).collect();
    let positions = position_ids(prompt.token_ids, &grids, &ids)?;
    let (reused, reused_images) = context.shared(prompt.token_ids, &positions.axes, &grids, &ids);
    let embeds = model.embed(&prompt.token_ids[reused..], &prompt.images[reused_images..], options.dtype)?;
    // What a backend leaves behind when it panics or fails is not kept.
    let mut kept = std::mem::take(context);
    kept.truncate(reused);
    let own_eos = [ids.eos_token_id];
    let eos = options.eos_token_ids.as_deref().unwrap_or(&own_eos);
    let writer = Writer::new(model, &mut kept, prompt.token_ids, options, eos);
    let result = writer.write(embeds, positions, sampler, observer);
    match &result {
        Ok(_) => {}
        Err(ArError::Device { .. }) => kept = Context::new(),
        Err(_) => kept.truncate(reused),
    }
    *context = kept;
    result
}

/// A reply that is being written, with everything the model has seen.
struct Writer<'a> {
    model: &'a ArModel,
    options: &'a GenerateOptions,
    eos: &'a [u32],
    context: &'a mut Context,
    limit: usize,
    /// Position of a text token minus its index in the sequence.
    delta: i64,
    generation: Generation,
}

impl<'a> Writer<'a> {
    /// A reply of which nothing is written, to a prompt of which the context holds the beginning.
    fn new(
        model: &'a ArModel,
        context: &'a mut Context,
        prompt: &[u32],
        options: &'a GenerateOptions,
        eos: &'a [u32],
    ) -> Self {
        let tokens = prompt.len();
        let limit = model.config().max_position_embeddings.min(tokens.saturating_add(options.max_new_tokens));
        context.cache.reserve(limit.min(tokens + MAX_RESERVED_TOKENS));
        let generation = Generation {
            token_ids: prompt.to_vec(),
            prompt_len: tokens,
            reused_len: context.len(),
            images: vec![],
            unfinished_image: None,
            positions: vec![],
            finish: FinishReason::Length,
            text_steps: vec![],
        };
        Self { model, options, eos, context, limit, delta: 0, generation }
    }

    /// Reads what the context lacks of the prompt, and writes until there is a reason to end.
    fn write(
        mut self,
        embeds: Tensor<3>,
        positions: PositionIds,
        mut sampler: Sampler,
        observer: &mut dyn FnMut(GenerateEvent<'_>) -> ControlFlow<()>,
    ) -> Result<Generation, ArError> {
        let ids = self.model.config().token_ids;
        let mut hidden = self.read_prompt(embeds, positions);
        let Generation { prompt_len: tokens, reused_len: reused, .. } = self.generation;
        if observer(GenerateEvent::PromptRead { tokens, reused }).is_break() {
            return Ok(self.finish(FinishReason::Stopped));
        }
        loop {
            if self.is_full() {
                return Ok(self.finish(FinishReason::Length));
            }
            let id = match self.generation.token_ids.last() {
                Some(&last) if last == ids.vision_start_token_id => {
                    let Some(embeds) = self.image_block(hidden)? else {
                        return Ok(self.finish(FinishReason::Length));
                    };
                    let event = observer(GenerateEvent::Image { embeds: &embeds });
                    self.generation.images.push(embeds);
                    if event.is_break() {
                        return Ok(self.finish(FinishReason::Stopped));
                    }
                    if self.is_full() {
                        return Ok(self.finish(FinishReason::Length));
                    }
                    ids.vision_end_token_id
                }
                _ => self.choose(hidden, &mut sampler)?,
            };
            self.generation.token_ids.push(id);
            if observer(GenerateEvent::Token { id }).is_break() {
                return Ok(self.finish(FinishReason::Stopped));
            }
            if self.eos.contains(&id) {
                return Ok(self.finish(FinishReason::EndOfTurn));
            }
            if self.is_full() {
                return Ok(self.finish(FinishReason::Length));
            }
            hidden = self.feed_token(id)?;
        }
    }

    fn is_full(&self) -> bool {
        self.generation.token_ids.len() >= self.limit
    }

    fn finish(mut self, reason: FinishReason) -> Generation {
        self.generation.finish = reason;
        self.generation.positions = self.context.positions().to_vec();
        self.generation
    }

    /// Feeds the embeddings of the prompt's last tokens; returns the hidden state of the last one, `[1, 1, hidden]`.
    fn read_prompt(&mut self, embeds: Tensor<3>, positions: PositionIds) -> Tensor<3> {
        let reused = self.context.len();
        self.delta = positions.delta;
        self.context.extend(&self.generation.token_ids[reused..], positions.axes[reused..].to_vec(), false);
        let hidden = self.forward(embeds);
        let tokens = hidden.dims()[1];
        hidden.narrow(1, tokens - 1, 1)
    }

    fn feed_token(&mut self, id: u32) -> Result<Tensor<3>, ArError> {
        let embeds = self.model.embed(&[id], &[], self.options.dtype)?;
        let position = self.generation.token_ids.len() as i64 - 1 + self.delta;
        self.context.extend(&[id], vec![[position; 3]], false);
        Ok(self.forward(embeds))
    }

    /// Feeds what stands at image positions that no encoder made.
    fn feed_predicted(&mut self, embeds: Tensor<3>, positions: Vec<[i64; 3]>) -> Tensor<3> {
        let token_ids = vec![self.model.config().token_ids.image_token_id; positions.len()];
        self.context.extend(&token_ids, positions, true);
        self.forward(embeds)
    }

    /// Hidden states of embeddings whose tokens are the last ones that the context notes.
    fn forward(&mut self, embeds: Tensor<3>) -> Tensor<3> {
        let tokens = embeds.dims()[1];
        let Context { positions, cache, .. } = &mut *self.context;
        self.model.forward(embeds, &positions[positions.len() - tokens..], Some(cache))
    }

    fn choose(&mut self, hidden: Tensor<3>, sampler: &mut Sampler) -> Result<u32, ArError> {
        let index = self.generation.token_ids.len();
        let not_finite = ArError::NotFinite { index };
        let data = self.model.logits(hidden).try_into_data();
        let reason = |error| failure_reason(&error, &self.model.device());
        let data = data.map_err(|error| ArError::Device { index, reason: reason(error) })?;
        let Ok(mut scores) = data.try_into_vec_as::<f32>() else { return Err(not_finite) };
        if scores.iter().any(|score| !score.is_finite()) {
            return Err(not_finite);
        }
        // An image only ends after its 81 tokens, where its end is forced.
        scores[self.model.config().token_ids.vision_end_token_id as usize] = f32::NEG_INFINITY;
        if index - self.generation.prompt_len < self.options.min_new_tokens {
            for id in self.eos {
                scores.get_mut(*id as usize).into_iter().for_each(|score| *score = f32::NEG_INFINITY);
            }
        }
        let id = sampler.choose(&mut scores, &self.generation.token_ids);
        if self.options.keep_scores {
            self.generation.text_steps.push(TextStep { index, scores });
        }
        Ok(id)
    }

    /// Feeds the prefill embeddings; `hidden` is the state of the token that begins the image, `[1, 1, hidden]`.
    ///
    /// Returns `None` if the reply is full before the image is complete.
    fn image_block(&mut self, hidden: Tensor<3>) -> Result<Option<ImageEmbeds>, ArError> {
        let grid = GridThw::GENERATED;
        let room = self.limit - self.generation.token_ids.len();
        let tokens = NUM_IMAGE_TOKENS.min(room);
        // As everywhere, the last token of a full reply is not fed.
        let fed = NUM_IMAGE_TOKENS.min(room - 1);
        let start = self.context.positions().last().map_or(0, |position| position[0] + 1);
        let positions: Vec<[i64; 3]> = image_position_ids(start, grid).take(fed).collect();
        let embeds = match self.options.image_pass {
            ImagePass::Autoregressive => self.feed_predictions(hidden, positions, tokens),
            ImagePass::Parallel | ImagePass::Sequential => {
                let mut states = vec![hidden];
                if fed > 0 {
                    states.push(self.feed_prefill(positions));
                }
                // The state of the last prefill embedding predicts what follows the image, not a part of it.
                self.model.predict_embeds(Tensor::cat(states, 1).narrow(1, 0, tokens))
            }
        };
        self.generation.token_ids.extend(vec![self.model.config().token_ids.image_token_id; tokens]);
        if tokens < NUM_IMAGE_TOKENS {
            self.generation.unfinished_image = Some(embeds);
            return Ok(None);
        }
        if self.options.positions_after_image == PositionsAfterImage::Trained {
            self.delta += grid.merged_h().max(grid.merged_w()) as i64 - NUM_IMAGE_TOKENS as i64;
        }
        Ok(Some(ImageEmbeds::new(embeds, grid)?))
    }

    /// Predicts `tokens` embeddings, each from the one before it; `hidden` is the state that predicts the first.
    ///
    /// # Shapes
    /// - `hidden`: `[1, 1, hidden]`
    /// - returns: `[1, tokens, hidden]`
    fn feed_predictions(&mut self, hidden: Tensor<3>, positions: Vec<[i64; 3]>, tokens: usize) -> Tensor<3> {
        let mut predicted = vec![self.model.predict_embeds(hidden)];
        for (index, position) in positions.into_iter().enumerate() {
            let state = self.feed_predicted(predicted[index].clone(), vec![position]);
            if predicted.len() < tokens {
                predicted.push(self.model.predict_embeds(state));
            }
        }
        Tensor::cat(predicted, 1)
    }

    /// Feeds as many prefill embeddings as there are positions; returns their states, `[1, positions, hidden]`.
    fn feed_prefill(&mut self, positions: Vec<[i64; 3]>) -> Tensor<3> {
        let prefill = self.model.prefill_embeds(self.options.dtype).narrow(1, 0, positions.len());
        if self.options.image_pass != ImagePass::Sequential {
            return self.feed_predicted(prefill, positions);
        }
        let step = |(index, position)| self.feed_predicted(prefill.clone().narrow(1, index, 1), vec![position]);
        Tensor::cat(positions.into_iter().enumerate().map(step).collect(), 1)
    }
}
