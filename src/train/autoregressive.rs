//! Training the language model, and the vision encoder together with it: conversations -> losses.

use std::path::Path;

use burn::{
    module::Module,
    tensor::{Device, FloatDType, Tensor},
};
use nexus_ar::{ArConfig, ArModel, ArObjective, TrainingBatch, TrainingSample};
use nexus_core::{
    GridThw, ImageEmbeds,
    checkpoint::{LoadDType, LoadOptions, WeightNames, save_module_as},
    train::{Draws, InitialWeights, initialize},
};
use nexus_data::{Image, Patches, ProcessOptions, Processor, TrainingInput};
use nexus_vision_encoder::{AppearanceHead, AppearanceInput, AppearanceObjective, VisionConfig, VisionEncoder};

use super::{
    ComputeDType, Initial, LossRecipe, Recipe, StageRecipe, TrainError,
    trainer::{Losses, MicroBatch, Task},
};
use crate::ModelFiles;

/// Width of the hidden layer of the throw-away head.
const HEAD_HIDDEN: usize = 512;

/// What is trained: the language model alone, or with the vision encoder and its head.
#[derive(Module, Debug)]
pub(crate) struct LanguageModule {
    ar: ArModel,
    visual: Option<VisionEncoder>,
    appearance_head: Option<AppearanceHead>,
}

/// Training of [`LanguageModule`].
pub(crate) struct LanguageTask {
    processor: Processor,
    module: LanguageModule,
    /// The encoder on the plain device, when it is not trained.
    encoder: Option<VisionEncoder>,
    device: Device,
}

/// Released names, and those of the head that no file keeps.
const NAMES: WeightNames = WeightNames {
    prefix: "",
    renames: &[
        ("ar", ""),
        ("visual.merger.mlp.fc1", "visual.merger.mlp.0"),
        ("visual.merger.mlp.fc2", "visual.merger.mlp.2"),
    ],
    unused: &[],
};

/// Names of the head alone, as in [`NAMES`].
const HEAD_NAMES: WeightNames = WeightNames { prefix: "appearance_head.", renames: &[], unused: &[] };

impl LanguageTask {
    pub(crate) fn open(
        recipe: &Recipe,
        model: &Path,
        device: &Device,
        trains_encoder: bool,
    ) -> Result<Self, TrainError> {
        let files = ModelFiles::find(model)?;
        let config = ArConfig::read(files.config())?;
        let vision_config = VisionConfig::read(files.config())?;
        let tracked = training_device(recipe, device);
        let options = LoadOptions { dtype: LoadDType::Convert(FloatDType::F32), check_finite: true };
        let encoder = || {
            let checkpoint = files.open_language_model()?;
            Ok::<_, TrainError>(VisionEncoder::load(&checkpoint, &vision_config, device, &options)?)
        };
        let head = |width| AppearanceHead::new(width, HEAD_HIDDEN, &tracked);
        let (module, encoder) = match &recipe.initial {
            Initial::Random(weights) => {
                let module = LanguageModule {
                    ar: ArModel::new(&config, &tracked)?,
                    visual: trains_encoder.then(|| VisionEncoder::new(&vision_config, &tracked)),
                    appearance_head: trains_encoder.then(|| head(config.hidden_size)),
                };
                let encoder = if trains_encoder { None } else { Some(encoder()?) };
                (initialize(module, &NAMES, weights), encoder)
            }
            Initial::Checkpoint | Initial::GenerationDecoder(_) => {
                let checkpoint = files.open_language_model()?;
                let ar = ArModel::load(&checkpoint, &config, &tracked, &options)?;
                let visual = match trains_encoder {
                    true => Some(VisionEncoder::load(&checkpoint, &vision_config, &tracked, &options)?),
                    false => None,
                };
                let fresh = InitialWeights { seed: recipe.seed, gain: 1.0, zero: vec![] };
                let appearance_head = trains_encoder.then(|| initialize(head(config.hidden_size), &HEAD_NAMES, &fresh));
                let encoder = if trains_encoder { None } else { Some(encoder()?) };
                (LanguageModule { ar, visual, appearance_head }, encoder)
            }
        };
        Ok(Self { processor: Processor::open(&files.nexus)?, module, encoder, device: tracked })
    }

    /// The samples of a micro-batch that can be used.
    fn inputs(&self, batch: MicroBatch<'_>) -> Result<Vec<TrainingInput>, TrainError> {
        let mut inputs = Vec::new();
        for number in batch.samples {
            let Some(messages) = batch.feed.conversation(number)? else { continue };
            match self.processor.training_input(&messages, &ProcessOptions::default()) {
                Ok(input) => inputs.push(input),
                Err(error) => batch.feed.reject(number, &error)?,
            }
        }
        Ok(inputs)
    }

    /// Embeddings of many images in one pass, with what is needed to look at their pixels again.
    fn encode(&self, module: &LanguageModule, patches: Vec<Patches>, dtype: FloatDType) -> Result<Encoded, TrainError> {
        let grids: Vec<GridThw> = patches.iter().map(|patches| patches.grid).collect();
        if grids.is_empty() {
            return Ok(Encoded { embeds: vec![], all: None, grids });
        }
        let (encoder, device) = match (&module.visual, &self.encoder) {
            (Some(encoder), _) => (encoder, self.device.clone()),
            (None, Some(encoder)) => (encoder, self.device.clone().inner()),
            (None, None) => return Ok(Encoded { embeds: vec![], all: None, grids }),
        };
        let pixels = Tensor::cat(patches.into_iter().map(|patches| patches.into_tensor(&device)).collect(), 0);
        let mut values = encoder.forward(pixels.clone().cast(dtype), &grids);
        let mut pixels = pixels;
        if module.visual.is_none() {
            (values, pixels) = (Tensor::from_inner(values), Tensor::from_inner(pixels));
        }
        let mut start = 0;
        let embeds = grids.iter().map(|&grid| {
            let tokens = grid.num_merged_tokens();
            start += tokens;
            Ok(ImageEmbeds::new(values.clone().narrow(1, start - tokens, tokens), grid)?)
        });
        Ok(Encoded { embeds: embeds.collect::<Result<_, TrainError>>()?, all: Some((values, pixels)), grids })
    }
}

struct Encoded {
    embeds: Vec<ImageEmbeds>,
    /// `[1, tokens, hidden]` of all images, and their patches.
    all: Option<(Tensor<3>, Tensor<2>)>,
    grids: Vec<GridThw>,
}

impl Task for LanguageTask {
    type Module = LanguageModule;

    fn names(&self) -> WeightNames {
        NAMES
    }

    fn module(&self) -> Result<LanguageModule, TrainError> {
        Ok(self.module.clone())
    }

    fn loss(&mut self, module: &LanguageModule, batch: MicroBatch<'_>) -> Result<Option<Losses>, TrainError> {
        let (stage, seed, first) = (batch.stage, batch.seed, batch.samples.start);
        let (weights, dtype) = (stage.loss, compute_dtype(stage));
        let inputs = self.inputs(batch)?;
        if inputs.is_empty() {
            return Ok(None);
        }
        let mut patches = Vec::new();
        let mut samples = Vec::with_capacity(inputs.len());
        for input in inputs {
            let TrainingInput { token_ids, labels, input_images, answer_images, .. } = input;
            samples.push((token_ids, labels, input_images.len(), answer_images.len()));
            patches.extend(input_images.into_iter().chain(answer_images));
        }
        let encoded = self.encode(module, patches, dtype)?;
        let mut embeds = encoded.embeds.into_iter();
        let samples = samples.into_iter().map(|(token_ids, labels, num_inputs, num_answers)| {
            let inputs = embeds.by_ref().take(num_inputs).collect();
            TrainingSample { token_ids, labels, inputs, targets: embeds.by_ref().take(num_answers).collect() }
        });
        let batch = TrainingBatch::new(samples.collect(), module.ar.config())?;
        let LossRecipe { token_weight, image_weight, prefill, appearance_weight, embeds_noise, .. } = weights;
        let loss = ArObjective { token_weight, image_weight, prefill }.loss(&module.ar, &batch, dtype)?;
        let mut losses = Losses {
            total: loss.total,
            parts: vec![
                ("cross_entropy", loss.cross_entropy),
                ("image", loss.image),
                ("mse", loss.mse),
                ("cosine", loss.cosine),
            ],
        };
        if let (Some(head), Some((embeds, pixels))) = (&module.appearance_head, encoded.all) {
            let noise = Draws::new(seed, "embeds noise", first).normal(embeds.dims(), &self.device) * embeds_noise;
            let appearance = AppearanceObjective::default()
                .loss(head, AppearanceInput { embeds, patches: pixels, grids: &encoded.grids, noise });
            losses.total = losses.total + appearance.total * appearance_weight;
            losses.parts.extend([("pixels", appearance.pixels), ("position", appearance.position)]);
        }
        Ok(Some(losses))
    }

    fn export(&self, module: LanguageModule, dir: &Path) -> Result<(), TrainError> {
        let visual = module.visual.or_else(|| self.encoder.clone());
        let module = LanguageModule { ar: module.ar, visual, appearance_head: None };
        Ok(save_module_as(&module, &NAMES, &dir.join("model.safetensors"), FloatDType::BF16)?)
    }

    fn samples(&mut self, _: &LanguageModule, _: &StageRecipe) -> Result<Option<Image>, TrainError> {
        Ok(None)
    }
}

/// The device on which gradients are tracked.
pub(super) fn training_device(recipe: &Recipe, device: &Device) -> Device {
    match recipe.stages.iter().any(|stage| stage.recompute) {
        true => device.clone().autodiff().gradient_checkpointing(),
        false => device.clone().autodiff(),
    }
}

pub(super) fn compute_dtype(stage: &StageRecipe) -> FloatDType {
    match stage.compute_dtype {
        ComputeDType::F32 => FloatDType::F32,
        ComputeDType::Bf16 => FloatDType::BF16,
    }
}
