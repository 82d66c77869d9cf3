//! Recipes: one JSON file -> what is trained, from what, on which data, in which stages.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use nexus_core::{
    config::{ConfigError, read_json},
    train::{AdamWOptions, InitialWeights, MuonOptions, NamePattern},
};
use nexus_data::world;
use serde::{Deserialize, Serialize};

use crate::recipe_fields::check_used;

/// What a run trains and how.
///
/// Unknown fields are refused: a misspelt one would otherwise train with a default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Command line that runs the recipe; for readers.
    pub command: String,
    /// How long it takes on which machine; for readers.
    pub time: String,
    /// What comes out of it; for readers.
    pub expected: String,
    /// The part of the model that is trained.
    pub part: TrainedPart,
    /// Seed of data order, noise and drop-out.
    pub seed: u64,
    /// What the weights begin with.
    #[serde(default)]
    pub initial: Initial,
    /// Steps between two checkpoints.
    #[serde(default = "five_hundred")]
    pub checkpoint_every: usize,
    /// Checkpoints that are kept.
    #[serde(default = "two")]
    pub keep_checkpoints: usize,
    /// Steps between two lines of metrics.
    #[serde(default = "ten")]
    pub log_every: usize,
    /// Steps between two sheets of sample pictures; never if absent. The language model is shown by what the generation
    /// decoder of the model draws from its predictions; not for the vision encoder.
    #[serde(default)]
    pub sample_every: Option<usize>,
    /// Micro-batches of a step that are computed side by side, each with its share of the CPU's threads; their losses
    /// are the same as one after the other. Small models are faster, and take as many times the memory of activations.
    #[serde(default = "one")]
    pub parallel_micro_batches: usize,
    /// Bad samples after which the run stops.
    #[serde(default = "hundred")]
    pub max_rejected: u64,
    /// Stages, one after the other; each begins with a fresh optimizer.
    pub stages: Vec<StageRecipe>,
}

/// A part of the model that is trained on its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum TrainedPart {
    /// FLUX's autoencoder, by reconstruction.
    Autoencoder,
    /// The vision encoder, together with the language model and a head that draws its embeddings, which is thrown away.
    VisionEncoder,
    /// The language model with vision head and prefill embeddings.
    Autoregressive,
    /// Adapter and transformer of the generation decoder.
    GenerationDecoder,
    /// Merger and transformer of the editing decoder.
    EditingDecoder,
}

/// What the weights of a run begin with.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Initial {
    /// The weights in the model's directory.
    #[default]
    Checkpoint,
    /// Seeded random values; the directory needs only the configuration of this part.
    Random(InitialWeights),
    /// For the editing decoder: the transformer of the generation decoder, and seeded random values for the merger.
    GenerationDecoder(InitialWeights),
}

/// One stage of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageRecipe {
    /// Name for progress and metrics.
    pub name: String,
    /// Optimizer steps.
    pub steps: usize,
    /// Samples of one forward pass.
    pub batch_size: usize,
    /// Forward passes of one step; their gradients are averaged.
    #[serde(default = "one")]
    pub accumulation: usize,
    /// Sources and their shares.
    pub data: Vec<DataRecipe>,
    /// Number of samples that are seen again and again; frozen parts encode them once and keep that in memory. Without
    /// it, every sample is new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distinct_samples: Option<u64>,
    /// Parameters that stay as they are, by their names in the released files.
    #[serde(default)]
    pub frozen: Vec<NamePattern>,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Steps over which the learning rate rises from zero.
    #[serde(default)]
    pub warmup_steps: usize,
    /// What it does afterwards.
    #[serde(default)]
    pub schedule: Schedule,
    /// Settings of AdamW.
    #[serde(default)]
    pub optimizer: AdamWOptions,
    /// Matrices that Muon steps instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub muon: Option<MuonOptions>,
    /// Largest norm of all gradients together; longer ones are scaled down to it.
    #[serde(default)]
    pub max_grad_norm: Option<f64>,
    /// Decay of the averaged weights, which are exported instead of the last ones.
    #[serde(default)]
    pub ema_decay: Option<f64>,
    /// Dtype of the activations; the weights of the optimizer are f32 always.
    #[serde(default)]
    pub compute_dtype: ComputeDType,
    /// Keeps the input alone of every layer of the language model and of every block of a transformer, and computes the
    /// rest again in the backward pass: less memory, the time of one more forward pass. Not for the autoencoder.
    #[serde(default)]
    pub recompute: bool,
    /// What the losses weigh.
    #[serde(default)]
    pub loss: LossRecipe,
    /// Settings of the decoders' stages.
    #[serde(default)]
    pub decoder: DecoderRecipe,
}

/// A source of samples and its share.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataRecipe {
    /// Where the samples come from.
    pub source: Source,
    /// Share among the sources of the stage.
    pub weight: f64,
}

/// Where samples come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Source {
    /// Scenes of [`nexus_data::world`]: unlimited.
    World {
        /// Seed of the world.
        seed: u64,
        /// What the samples ask for.
        task: world::Task,
        /// Kinds of samples within the task; all if empty.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        kinds: Vec<world::Kind>,
        /// What the samples are full of.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        emphasis: Option<world::Emphasis>,
        /// Whether pictures, but for those of edits, show shades of the colours.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        shades: bool,
    },
    /// A JSON-lines file of conversations; a relative path is looked for beside the recipe.
    Messages {
        /// The file.
        path: PathBuf,
    },
}

/// Course of the learning rate after warming up.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// Stays.
    #[default]
    Constant,
    /// Falls along half a cosine to this share of the highest rate.
    Cosine {
        /// Share that is left at the end, in `0..=1`.
        end: f64,
    },
}

/// Dtype of the activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ComputeDType {
    /// 32 bits.
    #[default]
    F32,
    /// bfloat16.
    Bf16,
}

/// What the parts of the losses weigh; a field that a part of the model does not read must not be set for it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossRecipe {
    /// Vision encoder and autoregressive: cross-entropy of text.
    pub token_weight: f64,
    /// Vision encoder and autoregressive: error of predicted embeddings.
    pub image_weight: f64,
    /// Vision encoder and autoregressive: whether image positions hold prefill embeddings (the model's way) or the true
    /// embedding before.
    pub prefill: bool,
    /// Vision encoder: reconstruction of pixels and positions from embeddings.
    pub appearance_weight: f64,
    /// Vision encoder and autoregressive: classes of what every token shows, where the source knows them; from embeddings
    /// of the encoder, or from predicted ones.
    pub label_weight: f64,
    /// Autoregressive: classes of what every token of an input image shows, and its place, from hidden states.
    pub input_label_weight: f64,
    /// Autoregressive: attention to what is meant, where the source knows it, in the layer that takes those hidden states:
    /// of the token before an answer, of names in questions, of words that describe, and of what is drawn.
    pub attention_weight: f64,
    /// Autoregressive: attention of the tokens that draw what an edit changes, and of no others, to that first token, in
    /// the layer after it.
    pub selection_weight: f64,
    /// Vision encoder and autoregressive: whether pairs of colour and shape that training never shows stay out of cross
    /// entropy and labels, where the source knows what is shown. The model then does not learn that they cannot be.
    pub exclude_unseen: bool,
    /// Autoregressive: number of layers after which those hidden states are read.
    pub state_layers: usize,
    /// Vision encoder: noise on the embeddings before reconstruction and labels, relative to their size.
    pub embeds_noise: f64,
    /// Autoencoder: differences of neighbouring pixels.
    pub gradient_weight: f64,
    /// Autoencoder: divergence of the latents from the normal distribution.
    pub kl_weight: f64,
}

impl LossRecipe {
    /// Numbers of layers after which losses read the hidden states.
    pub(crate) fn states_read(&self) -> Range<usize> {
        let first = self.input_label_weight > 0.0 || self.attention_weight > 0.0;
        let count = if self.selection_weight > 0.0 { 2 } else { usize::from(first) };
        self.state_layers..self.state_layers + count
    }

    /// Number of layers that the losses need.
    pub(crate) fn layers_needed(&self) -> usize {
        self.states_read().end - usize::from(self.attention_weight == 0.0 && self.selection_weight == 0.0)
    }
}

impl Default for LossRecipe {
    fn default() -> Self {
        Self {
            token_weight: 3.0,
            image_weight: 3.0,
            prefill: true,
            appearance_weight: 1.0,
            label_weight: 0.0,
            input_label_weight: 0.0,
            attention_weight: 0.0,
            selection_weight: 0.0,
            exclude_unseen: false,
            state_layers: 2,
            embeds_noise: 0.2,
            gradient_weight: 1.0,
            kl_weight: 1e-6,
        }
    }
}

/// What the decoders' stages need; of this, the autoencoder's read the size of the pictures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DecoderRecipe {
    /// Side of the pictures, in pixels, a multiple of 16.
    pub picture_px: usize,
    /// FLUX's embedded guidance.
    pub embedded_guidance: f64,
    /// Share of samples that see no condition (all zeros).
    pub condition_dropout: f64,
    /// Share of samples that are conditioned on the autoregressive model's prediction instead of the true embeddings.
    pub predicted_embeds: f64,
}

impl Default for DecoderRecipe {
    fn default() -> Self {
        Self { picture_px: 512, embedded_guidance: 3.5, condition_dropout: 0.0, predicted_embeds: 0.0 }
    }
}

impl Recipe {
    /// Reads and checks a recipe; relative paths in it are looked for in its directory.
    ///
    /// # Errors
    /// [`ConfigError`] with the path and the field at fault.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let path = path.as_ref();
        let mut recipe: Self = read_json(path)?;
        let dir = path.parent().filter(|dir| *dir != Path::new("")).unwrap_or(Path::new("."));
        recipe.stages = recipe.stages_beside(dir);
        recipe.validate()?;
        Ok(recipe)
    }

    /// Checks the fields against each other.
    ///
    /// # Errors
    /// [`ConfigError::Incoherent`] naming the field at fault.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let positive = |field: &'static str, value: usize| match value {
            0 => Err(ConfigError::incoherent(field, "must be positive".to_string())),
            _ => Ok(()),
        };
        positive("stages", self.stages.len())?;
        positive("checkpoint_every", self.checkpoint_every)?;
        positive("keep_checkpoints", self.keep_checkpoints)?;
        positive("log_every", self.log_every)?;
        positive("parallel_micro_batches", self.parallel_micro_batches)?;
        positive("sample_every", self.sample_every.unwrap_or(1))?;
        if matches!(self.initial, Initial::GenerationDecoder(_)) && self.part != TrainedPart::EditingDecoder {
            let reason = format!("only the editing decoder begins with the generation decoder, not {:?}", self.part);
            return Err(ConfigError::incoherent("initial", reason));
        }
        if self.sample_every.is_some() && self.part == TrainedPart::VisionEncoder {
            let reason = format!("has no meaning for {:?}, which draws no pictures", self.part);
            return Err(ConfigError::incoherent("sample_every", reason));
        }
        for stage in &self.stages {
            positive("steps", stage.steps)?;
            positive("batch_size", stage.batch_size)?;
            positive("accumulation", stage.accumulation)?;
            positive("data", stage.data.len())?;
            stage.validate(self.part)?;
        }
        Ok(())
    }

    /// Steps of all stages.
    pub fn num_steps(&self) -> usize {
        self.stages.iter().map(|stage| stage.steps).sum()
    }

    /// The stages with the paths of their files as the file system has them, however they were typed; relative ones are
    /// looked for in `dir`. A file that is not there keeps its path.
    fn stages_beside(&self, dir: &Path) -> Vec<StageRecipe> {
        let resolved = |path: PathBuf| path.canonicalize().unwrap_or(path);
        let mut stages = self.stages.clone();
        for data in stages.iter_mut().flat_map(|stage| &mut stage.data) {
            if let Source::Messages { path } = &mut data.source {
                *path = resolved(resolved(dir.to_path_buf()).join(&path));
            }
        }
        stages
    }

    /// The first field in which this recipe would train otherwise than another one; notes, how often things are
    /// written and what is computed side by side make no difference.
    pub fn differs_from(&self, other: &Self) -> Option<&'static str> {
        let Self { part, seed, initial, .. } = self;
        let here = Path::new(".");
        let checks = [
            ("part", *part == other.part),
            ("seed", *seed == other.seed),
            ("initial", *initial == other.initial),
            ("stages", self.stages_beside(here) == other.stages_beside(here)),
        ];
        checks.into_iter().find(|(_, same)| !same).map(|(field, _)| field)
    }
}

impl StageRecipe {
    fn validate(&self, part: TrainedPart) -> Result<(), ConfigError> {
        let wrong = |field, reason: String| Err(ConfigError::incoherent(field, reason));
        if self.data.iter().any(|data| !(data.weight.is_finite() && data.weight > 0.0)) {
            return wrong("weight", "every source needs a positive share".to_string());
        }
        for data in &self.data {
            if let Source::World { task, kinds, .. } = &data.source
                && let Some(kind) = kinds.iter().find(|&&kind| !task.accepts(kind))
            {
                return wrong("kinds", format!("{kind:?} is none of {task:?}: {:?}", task.kinds()));
            }
        }
        if !(self.learning_rate.is_finite() && self.learning_rate > 0.0) {
            return wrong("learning_rate", format!("{} must be positive", self.learning_rate));
        }
        if self.warmup_steps > self.steps {
            return wrong("warmup_steps", format!("{} are more than the {} steps", self.warmup_steps, self.steps));
        }
        if let Schedule::Cosine { end } = self.schedule
            && !(0.0..=1.0).contains(&end)
        {
            return wrong("schedule", format!("the end {end} must lie in 0..=1"));
        }
        let AdamWOptions { betas, eps, weight_decay } = self.optimizer;
        if betas.iter().any(|beta| !(0.0..1.0).contains(beta)) || eps.is_nan() || eps <= 0.0 || weight_decay < 0.0 {
            return wrong("optimizer", "betas must lie in 0..1, eps above 0, weight_decay not below 0".to_string());
        }
        if self.muon.as_ref().is_some_and(|muon| !(0.0..1.0).contains(&muon.momentum)) {
            return wrong("muon", "momentum must lie in 0..1".to_string());
        }
        if self.max_grad_norm.is_some_and(|norm| norm.is_nan() || norm <= 0.0) {
            return wrong("max_grad_norm", "must be positive; leave it out for no limit".to_string());
        }
        if self.ema_decay.is_some_and(|decay| !(0.0..1.0).contains(&decay)) {
            return wrong("ema_decay", "must lie in 0..1".to_string());
        }
        let DecoderRecipe { picture_px, condition_dropout, predicted_embeds, .. } = self.decoder;
        if picture_px == 0 || picture_px % 16 != 0 {
            return wrong("picture_px", format!("{picture_px} must be a multiple of 16"));
        }
        for (field, share) in [("condition_dropout", condition_dropout), ("predicted_embeds", predicted_embeds)] {
            if !(0.0..=1.0).contains(&share) {
                return wrong(field, format!("{share} must lie in 0..=1"));
            }
        }
        if self.distinct_samples == Some(0) {
            return wrong("distinct_samples", "must be positive; leave it out for no limit".to_string());
        }
        check_used(self, part)?;
        let LossRecipe { label_weight, input_label_weight, attention_weight, selection_weight, .. } = self.loss;
        for (field, asked) in [
            ("label_weight", label_weight > 0.0),
            ("input_label_weight", input_label_weight > 0.0),
            ("attention_weight", attention_weight > 0.0),
            ("selection_weight", selection_weight > 0.0),
            ("exclude_unseen", self.loss.exclude_unseen),
        ] {
            if asked && !self.data.iter().any(|data| matches!(data.source, Source::World { .. })) {
                return wrong(field, "no source of the stage knows what its pictures show".to_string());
            }
        }
        Ok(())
    }

    /// Learning rate of a step, counted from 0.
    pub fn learning_rate_at(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return self.learning_rate * (step + 1) as f64 / self.warmup_steps as f64;
        }
        match self.schedule {
            Schedule::Constant => self.learning_rate,
            Schedule::Cosine { end } => {
                let length = (self.steps - self.warmup_steps).max(1) as f64;
                let done = (step - self.warmup_steps) as f64 / length;
                let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos());
                self.learning_rate * (end + (1.0 - end) * cosine)
            }
        }
    }
}

fn one() -> usize {
    1
}

fn two() -> usize {
    2
}

fn ten() -> usize {
    10
}

fn hundred() -> u64 {
    100
}

fn five_hundred() -> usize {
    500
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn learning_rates_rise_and_fall() {
        let stage = |schedule| {
            let stage = json!({
                "name": "", "steps": 110, "batch_size": 1, "data": [], "learning_rate": 2.0, "warmup_steps": 10,
                "schedule": schedule,
            });
            serde_json::from_value::<StageRecipe>(stage).unwrap()
        };
        let cosine = stage(json!({"cosine": {"end": 0.1}}));
        let expected = [
            (0, 0.2),
            (4, 1.0),
            (9, 2.0),
            (10, 2.0),
            (35, 2.0 * (0.1 + 0.9 * 0.5 * (1.0 + 0.5f64.sqrt()))),
            (60, 1.1),
            (85, 2.0 * (0.1 + 0.9 * 0.5 * (1.0 - 0.5f64.sqrt()))),
            (110, 0.2),
            (200, 0.2),
        ];
        for (step, rate) in expected {
            assert!((cosine.learning_rate_at(step) - rate).abs() < 1e-12, "{step}: {}", cosine.learning_rate_at(step));
        }
        let constant = stage(json!("constant"));
        assert_eq!([0, 4, 9, 10, 60, 109].map(|step| constant.learning_rate_at(step)), [0.2, 1.0, 2.0, 2.0, 2.0, 2.0]);
    }
}
