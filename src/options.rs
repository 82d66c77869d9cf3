//! Options of the verbs: plain structs whose defaults are those of the original's scripts.

use burn::tensor::Tensor;
use nexus_ar::{ImagePass, PositionsAfterImage, SamplingOptions};
use nexus_core::ImageEmbeds;
use nexus_data::{Image, Language, MAX_PIXELS_AR};
use nexus_diffusion::Noise;
use serde::{Deserialize, Serialize};

/// How the model reads and writes, in every verb.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TextOptions {
    /// Longest reply in tokens, the 81 of each picture included.
    pub max_new_tokens: usize,
    /// Shortest reply in tokens, its end not counted; if it is that of `max_new_tokens`, the model cannot end it before.
    pub min_new_tokens: usize,
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
            min_new_tokens: 0,
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
    /// The noise that the picture emerges from.
    #[serde(with = "noise_seed")]
    pub noise: Noise,
    /// A picture to start from instead of noise alone; not a part of option files.
    #[serde(skip)]
    pub start: Option<Start>,
    /// How much of that picture is noise at first: over 0, and at most 1, which leaves nothing of it. 1 without one.
    pub strength: f64,
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
            start: None,
            strength: 1.0,
            tea_cache: None,
            tiled: false,
        }
    }
}

/// Options of [`crate::Nexus::generate`]; in a file, those of `draw` stand beside the others.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct GenerateOptions {
    /// How the picture is drawn.
    #[serde(flatten)]
    pub draw: DrawOptions,
    /// Language of the words around the description; `None` follows the description.
    pub language: Option<Language>,
    /// How the model reads and writes.
    pub text: TextOptions,
}

/// Options of [`crate::Nexus::edit`]; in a file, those of `draw` stand beside the others.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
pub struct EditOptions {
    /// How the picture is drawn.
    #[serde(flatten, deserialize_with = "edit_draw")]
    pub draw: DrawOptions,
    /// Which decoder draws.
    pub decoder: EditWith,
    /// How the model reads and writes.
    pub text: TextOptions,
}

impl Default for EditOptions {
    fn default() -> Self {
        Self {
            draw: DrawOptions { cfg_scale: 1.0, noise: Noise::Seed(42), ..DrawOptions::default() },
            decoder: EditWith::default(),
            text: TextOptions::default(),
        }
    }
}

/// Reads options that are those of [`EditOptions::default`] where a file says nothing.
fn edit_draw<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<DrawOptions, D::Error> {
    #[derive(Deserialize)]
    struct Fields {
        cfg_scale: Option<f64>,
        noise: Option<u64>,
        #[serde(flatten)]
        draw: DrawOptions,
    }
    let Fields { cfg_scale, noise, draw } = Fields::deserialize(deserializer)?;
    let defaults = EditOptions::default().draw;
    let noise = noise.map_or(defaults.noise, Noise::Seed);
    Ok(DrawOptions { cfg_scale: cfg_scale.unwrap_or(defaults.cfg_scale), noise, ..draw })
}

/// What a picture starts from: [`DrawOptions::start`].
#[derive(Clone)]
#[allow(clippy::large_enum_variant, reason = "a request has one of them")]
pub enum Start {
    /// A picture, scaled until it covers the size of the new one, and cut.
    Image(Image),
    /// Latents of the size of the new picture, as [`crate::Picture::latents`].
    Latents(Tensor<4>),
}

impl std::fmt::Debug for Start {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Image(image) => image.fmt(f),
            Self::Latents(latents) => write!(f, "Latents({:?} {:?})", latents.dtype(), latents.dims()),
        }
    }
}

/// The decoder that draws a changed picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EditWith {
    /// Sees the predicted embeddings and those of the source image, and keeps what was not to change.
    #[default]
    EditingDecoder,
    /// The editing decoder without the source image: it sees the predicted embeddings alone.
    EditingDecoderWithoutReference,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_a_file_stand_flat_and_the_rest_are_the_defaults_of_the_verb() {
        let text = r#"{"width": 144, "text": {"max_new_tokens": 7}, "noise": 3, "cfg_scale": 2}"#;
        let generate: GenerateOptions = serde_json::from_str(text).unwrap();
        let edit: EditOptions = serde_json::from_str(text).unwrap();
        for (draw, text) in [(&generate.draw, &generate.text), (&edit.draw, &edit.text)] {
            assert_eq!((draw.width, draw.height, draw.cfg_scale, text.max_new_tokens), (144, 512, 2.0, 7));
            assert!(matches!(draw.noise, Noise::Seed(3)));
        }
        let (generate, edit): (GenerateOptions, EditOptions) = (
            serde_json::from_str("{}").unwrap(),
            serde_json::from_str(r#"{"decoder": "generation_decoder"}"#).unwrap(),
        );
        assert!(matches!((generate.draw.cfg_scale, &generate.draw.noise), (3.0, Noise::Seed(52))));
        assert!(matches!((edit.draw.cfg_scale, &edit.draw.noise), (1.0, Noise::Seed(42))));
        assert_eq!(edit.decoder, EditWith::GenerationDecoder);
    }

    #[test]
    fn options_survive_a_file() {
        let options = EditOptions { decoder: EditWith::GenerationDecoder, ..EditOptions::default() };
        let written = serde_json::to_value(&options).unwrap();
        assert_eq!(written["steps"], 50);
        let read: EditOptions = serde_json::from_value(written.clone()).unwrap();
        assert_eq!(serde_json::to_value(&read).unwrap(), written);
    }
}
