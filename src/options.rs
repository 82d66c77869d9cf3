//! Options of the verbs: plain structs whose defaults are those of the original's scripts.

use nexus_ar::{ImagePass, PositionsAfterImage, SamplingOptions};
use nexus_core::ImageEmbeds;
use nexus_data::{Language, MAX_PIXELS_AR};
use nexus_diffusion::Noise;
use serde::{Deserialize, Serialize};

/// How the model reads and writes, in every verb.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TextOptions {
    /// Longest reply in tokens, the 81 of each picture included.
    pub max_new_tokens: usize,
    /// How tokens are chosen; `None` takes `generation_config.json` with seed 0.
    pub sampling: Option<SamplingOptions>,
    /// Largest area of an input image as the language model sees it, in pixels.
    pub max_pixels: usize,
    /// How the 81 positions of a picture are computed.
    pub image_pass: ImagePass,
    /// Where text goes on after a picture.
    pub positions_after_image: PositionsAfterImage,
    /// Keeps the scores of every text step in the reply.
    pub keep_scores: bool,
}

impl Default for TextOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: 1024,
            sampling: None,
            max_pixels: MAX_PIXELS_AR,
            image_pass: ImagePass::default(),
            positions_after_image: PositionsAfterImage::default(),
            keep_scores: false,
        }
    }
}

/// How a picture is drawn from its embeddings: options of [`crate::Nexus::draw`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
pub struct DrawOptions {
    /// Width in pixels; rounded up to a multiple of 16.
    pub width: usize,
    /// Height in pixels; rounded up to a multiple of 16.
    pub height: usize,
    /// Denoising steps.
    pub steps: usize,
    /// Classifier-free guidance: how far to move away from the negative prompt; 1 is off and twice as fast.
    pub cfg_scale: f64,
    /// FLUX's guidance, embedded into the transformer.
    pub embedded_guidance: f64,
    /// What the picture should not show; used if `cfg_scale` is not 1.
    pub negative_prompt: String,
    /// What the picture starts from.
    #[serde(with = "noise_seed")]
    pub noise: Noise,
    /// TeaCache: skips steps whose input hardly changes, up to this accumulated change.
    pub tea_cache: Option<f64>,
    /// Draws and decodes in overlapping tiles, for large pictures.
    pub tiled: bool,
}

impl Default for DrawOptions {
    fn default() -> Self {
        Self {
            width: 512,
            height: 512,
            steps: 50,
            cfg_scale: 3.0,
            embedded_guidance: 3.5,
            negative_prompt: String::new(),
            noise: Noise::Seed(52),
            tea_cache: None,
            tiled: false,
        }
    }
}

/// Options of [`crate::Nexus::generate`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
pub struct GenerateOptions {
    /// Width in pixels; rounded up to a multiple of 16.
    pub width: usize,
    /// Height in pixels; rounded up to a multiple of 16.
    pub height: usize,
    /// Denoising steps.
    pub steps: usize,
    /// Classifier-free guidance: how far to move away from the negative prompt; 1 is off and twice as fast.
    pub cfg_scale: f64,
    /// FLUX's guidance, embedded into the transformer.
    pub embedded_guidance: f64,
    /// What the picture should not show; used if `cfg_scale` is not 1.
    pub negative_prompt: String,
    /// What the picture starts from.
    #[serde(with = "noise_seed")]
    pub noise: Noise,
    /// TeaCache: skips steps whose input hardly changes, up to this accumulated change.
    pub tea_cache: Option<f64>,
    /// Draws and decodes in overlapping tiles, for large pictures.
    pub tiled: bool,
    /// Language of the words around the description; `None` follows the description.
    pub language: Option<Language>,
    /// How the model reads and writes.
    pub text: TextOptions,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        let DrawOptions {
            width,
            height,
            steps,
            cfg_scale,
            embedded_guidance,
            negative_prompt,
            noise,
            tea_cache,
            tiled,
        } = DrawOptions::default();
        Self {
            width,
            height,
            steps,
            cfg_scale,
            embedded_guidance,
            negative_prompt,
            noise,
            tea_cache,
            tiled,
            language: None,
            text: TextOptions::default(),
        }
    }
}

impl From<&GenerateOptions> for DrawOptions {
    fn from(options: &GenerateOptions) -> Self {
        let GenerateOptions { width, height, steps, cfg_scale, embedded_guidance, tea_cache, tiled, .. } = *options;
        let (negative_prompt, noise) = (options.negative_prompt.clone(), options.noise.clone());
        Self { width, height, steps, cfg_scale, embedded_guidance, negative_prompt, noise, tea_cache, tiled }
    }
}

/// Options of [`crate::Nexus::edit`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
pub struct EditOptions {
    /// Width in pixels; rounded up to a multiple of 16.
    pub width: usize,
    /// Height in pixels; rounded up to a multiple of 16.
    pub height: usize,
    /// Denoising steps.
    pub steps: usize,
    /// Classifier-free guidance: how far to move away from the negative prompt; 1 is off and twice as fast.
    pub cfg_scale: f64,
    /// FLUX's guidance, embedded into the transformer.
    pub embedded_guidance: f64,
    /// What the picture should not show; used if `cfg_scale` is not 1.
    pub negative_prompt: String,
    /// What the picture starts from.
    #[serde(with = "noise_seed")]
    pub noise: Noise,
    /// TeaCache: skips steps whose input hardly changes, up to this accumulated change.
    pub tea_cache: Option<f64>,
    /// Draws and decodes in overlapping tiles, for large pictures.
    pub tiled: bool,
    /// Which decoder draws.
    pub decoder: EditWith,
    /// How the model reads and writes.
    pub text: TextOptions,
}

impl Default for EditOptions {
    fn default() -> Self {
        let DrawOptions { width, height, steps, embedded_guidance, negative_prompt, tea_cache, tiled, .. } =
            DrawOptions::default();
        Self {
            width,
            height,
            steps,
            cfg_scale: 1.0,
            embedded_guidance,
            negative_prompt,
            noise: Noise::Seed(42),
            tea_cache,
            tiled,
            decoder: EditWith::default(),
            text: TextOptions::default(),
        }
    }
}

impl From<&EditOptions> for DrawOptions {
    fn from(options: &EditOptions) -> Self {
        let EditOptions { width, height, steps, cfg_scale, embedded_guidance, tea_cache, tiled, .. } = *options;
        let (negative_prompt, noise) = (options.negative_prompt.clone(), options.noise.clone());
        Self { width, height, steps, cfg_scale, embedded_guidance, negative_prompt, noise, tea_cache, tiled }
    }
}

/// The decoder that draws a changed picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EditWith {
    /// Sees the predicted embeddings and those of the source image, and keeps what was not to change.
    #[default]
    EditingDecoder,
    /// Sees the predicted embeddings alone.
    GenerationDecoder,
}

/// What draws embeddings: the argument of [`crate::Nexus::draw`].
#[derive(Debug, Clone, Copy)]
pub enum DrawWith<'a> {
    /// The generation decoder.
    GenerationDecoder,
    /// The editing decoder, with the embeddings of a source picture or without.
    EditingDecoder {
        /// From [`crate::Nexus::reference`].
        reference: Option<&'a ImageEmbeds>,
    },
}

/// Noise in option files: its seed.
mod noise_seed {
    use super::{Deserialize, Noise};

    pub(super) fn serialize<S: serde::Serializer>(noise: &Noise, serializer: S) -> Result<S::Ok, S::Error> {
        match noise {
            Noise::Seed(seed) => serializer.serialize_u64(*seed),
            Noise::Latents(_) => Err(serde::ser::Error::custom("latents cannot be written as an option; use a seed")),
        }
    }

    pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Noise, D::Error> {
        Ok(Noise::Seed(u64::deserialize(deserializer)?))
    }
}
