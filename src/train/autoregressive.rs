//! Training the language model, and the vision encoder together with it: conversations -> losses.

use std::{collections::HashMap, path::Path};

use burn::{
    module::Module,
    tensor::{Device, FloatDType, Int, Tensor},
};
use nexus_ar::{ArConfig, ArModel, ArObjective, TrainingBatch, TrainingSample};
use nexus_core::{
    GridThw, ImageEmbeds,
    checkpoint::{LoadDType, LoadOptions, WeightNames, save_module_as},
    train::{Draws, InitialWeights, initialize},
};
use nexus_data::{
    Image, Patches, ProcessOptions, Processor, TrainingInput,
    world::{LABEL_CLASSES, Scene},
};
use nexus_vision_encoder::{
    AppearanceHead, AppearanceInput, AppearanceObjective, LabelHead, VisionConfig, VisionEncoder,
};

use super::{
    ComputeDType, Initial, LossRecipe, Recipe, StageRecipe, TrainError,
    feed::Conversation,
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
    label_head: Option<LabelHead>,
}

/// Training of [`LanguageModule`].
pub(crate) struct LanguageTask {
    processor: Processor,
    module: LanguageModule,
    /// The encoder on the plain device, when it is not trained.
    encoder: Option<VisionEncoder>,
    device: Device,
    /// Samples that come again, with the images as the frozen encoder sees them; of the stage with this seed.
    encoded: (u64, HashMap<u64, TrainingSample>),
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

/// Names of one head alone, as in [`NAMES`].
const fn head_names(prefix: &'static str) -> WeightNames {
    WeightNames { prefix, renames: &[], unused: &[] }
}

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
        let width = config.hidden_size;
        let learns_labels = trains_encoder && recipe.stages.iter().any(|stage| stage.loss.label_weight > 0.0);
        let appearance_head = trains_encoder.then(|| AppearanceHead::new(width, HEAD_HIDDEN, &tracked));
        let label_head = learns_labels.then(|| LabelHead::new(width, &LABEL_CLASSES, &tracked));
        let (module, encoder) = match &recipe.initial {
            Initial::Random(weights) => {
                let module = LanguageModule {
                    ar: ArModel::new(&config, &tracked)?,
                    visual: trains_encoder.then(|| VisionEncoder::new(&vision_config, &tracked)),
                    appearance_head,
                    label_head,
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
                let appearance_head =
                    appearance_head.map(|head| initialize(head, &head_names("appearance_head."), &fresh));
                let label_head = label_head.map(|head| initialize(head, &head_names("label_head."), &fresh));
                let encoder = if trains_encoder { None } else { Some(encoder()?) };
                (LanguageModule { ar, visual, appearance_head, label_head }, encoder)
            }
        };
        Ok(Self {
            processor: Processor::open(&files.nexus)?,
            module,
            encoder,
            device: tracked,
            encoded: Default::default(),
        })
    }

    /// One sample of a micro-batch, and what its images show where that is known; `None` if it cannot be used.
    fn input(
        &self,
        batch: &mut MicroBatch<'_>,
        number: u64,
    ) -> Result<Option<(TrainingInput, Vec<Scene>)>, TrainError> {
        let Some(Conversation { messages, scenes }) = batch.feed.conversation(number)? else { return Ok(None) };
        match self.processor.training_input(&messages, &ProcessOptions::default()) {
            Ok(input) => Ok(Some((input, scenes))),
            Err(error) => batch.feed.reject(number, &error).map(|()| None),
        }
    }

    /// Samples with images from the frozen encoder; those that come again are encoded once.
    fn frozen_samples(
        &mut self,
        encoder: &VisionEncoder,
        mut batch: MicroBatch<'_>,
    ) -> Result<Vec<TrainingSample>, TrainError> {
        if self.encoded.0 != batch.seed {
            self.encoded = (batch.seed, HashMap::new());
        }
        let (mut samples, mut new) = (Vec::new(), Vec::new());
        for number in batch.samples.clone() {
            let first = batch.feed.first(number);
            match self.encoded.1.get(&first) {
                Some(known) => samples.push((number, known.clone())),
                None => new.extend(self.input(&mut batch, number)?.map(|(input, _)| (number, input))),
            }
        }
        let (dtype, device) = (compute_dtype(batch.stage), self.device.clone().inner());
        let encode = |images: Vec<Patches>| {
            let encode_one = |patches: Patches| {
                let grid = patches.grid;
                let values = encoder.forward(patches.into_tensor(&device).cast(dtype), &[grid]);
                Ok(ImageEmbeds::new(Tensor::from_inner(values), grid)?)
            };
            images.into_iter().map(encode_one).collect::<Result<Vec<_>, TrainError>>()
        };
        let encoded = batch.workers.map(new, |(number, input)| {
            let TrainingInput { token_ids, labels, input_images, answer_images, .. } = input;
            let (inputs, targets) = (encode(input_images)?, encode(answer_images)?);
            Ok::<_, TrainError>((number, TrainingSample { token_ids, labels, inputs, targets }))
        });
        for encoded in encoded {
            let (number, sample) = encoded?;
            if batch.stage.distinct_samples.is_some() {
                self.encoded.1.insert(batch.feed.first(number), sample.clone());
            }
            samples.push((number, sample));
        }
        // What was known must make no difference: a run that goes on knows less.
        samples.sort_by_key(|(number, _)| *number);
        Ok(samples.into_iter().map(|(_, sample)| sample).collect())
    }

    /// Samples with images from the encoder that is trained, in one pass, and what is needed to look at them again.
    fn trained_samples(
        &self,
        encoder: &VisionEncoder,
        stage: &StageRecipe,
        inputs: Vec<(TrainingInput, Vec<Scene>)>,
    ) -> Result<(Vec<TrainingSample>, Option<Seen>), TrainError> {
        let (mut texts, mut patches, mut shown) = (Vec::new(), Vec::new(), Vec::new());
        for (input, scenes) in inputs {
            let TrainingInput { token_ids, labels, input_images, answer_images, .. } = input;
            let images = input_images.len() + answer_images.len();
            shown.extend(if scenes.len() == images {
                scenes.into_iter().map(Some).collect()
            } else {
                vec![None; images]
            });
            texts.push((token_ids, labels, input_images.len(), answer_images.len()));
            patches.extend(input_images.into_iter().chain(answer_images));
        }
        let grids: Vec<GridThw> = patches.iter().map(|patches| patches.grid).collect();
        let seen = (!grids.is_empty()).then(|| {
            let pixels = patches.into_iter().map(|patches| patches.into_tensor(&self.device)).collect();
            let pixels: Tensor<2> = Tensor::cat(pixels, 0);
            let embeds = encoder.forward(pixels.clone().cast(compute_dtype(stage)), &grids);
            Seen { embeds, pixels, grids, shown }
        });
        let images = seen.iter().flat_map(Seen::images).collect::<Result<Vec<_>, TrainError>>()?;
        let mut images = images.into_iter();
        let samples = texts.into_iter().map(|(token_ids, labels, num_inputs, num_answers)| {
            let inputs = images.by_ref().take(num_inputs).collect();
            TrainingSample { token_ids, labels, inputs, targets: images.by_ref().take(num_answers).collect() }
        });
        Ok((samples.collect(), seen))
    }
}

/// A micro-batch of conversations.
pub(crate) struct LanguageBatch {
    seed: u64,
    /// Number of the first sample.
    first: u64,
    samples: Samples,
}

enum Samples {
    /// With images as the frozen encoder sees them.
    Encoded(Vec<TrainingSample>),
    /// For the encoder that is trained, with what the images show where that is known.
    Raw(Vec<(TrainingInput, Vec<Scene>)>),
}

/// Images of a micro-batch as the encoder that is trained sees them.
struct Seen {
    /// `[1, tokens, hidden]` of all images.
    embeds: Tensor<3>,
    /// `[patches, 1176]` of all images.
    pixels: Tensor<2>,
    grids: Vec<GridThw>,
    /// The truth of every image, where it is known.
    shown: Vec<Option<Scene>>,
}

impl Seen {
    /// Embeddings of each image.
    fn images(&self) -> impl Iterator<Item = Result<ImageEmbeds, TrainError>> {
        let mut start = 0;
        self.grids.iter().map(move |&grid| {
            let tokens = grid.num_merged_tokens();
            start += tokens;
            Ok(ImageEmbeds::new(self.embeds.clone().narrow(1, start - tokens, tokens), grid)?)
        })
    }
}

impl Task for LanguageTask {
    type Module = LanguageModule;
    type Batch = LanguageBatch;

    fn names(&self) -> WeightNames {
        NAMES
    }

    fn module(&self) -> Result<LanguageModule, TrainError> {
        Ok(self.module.clone())
    }

    fn prepare(&mut self, mut batch: MicroBatch<'_>) -> Result<Option<LanguageBatch>, TrainError> {
        let (seed, first) = (batch.seed, batch.samples.start);
        let samples = match self.encoder.clone() {
            Some(encoder) => Samples::Encoded(self.frozen_samples(&encoder, batch)?),
            None => {
                let inputs = batch.samples.clone().map(|number| self.input(&mut batch, number));
                Samples::Raw(inputs.filter_map(Result::transpose).collect::<Result<_, _>>()?)
            }
        };
        let is_empty = match &samples {
            Samples::Encoded(samples) => samples.is_empty(),
            Samples::Raw(inputs) => inputs.is_empty(),
        };
        Ok((!is_empty).then_some(LanguageBatch { seed, first, samples }))
    }

    fn loss(
        &self,
        module: &LanguageModule,
        stage: &StageRecipe,
        LanguageBatch { seed, first, samples }: LanguageBatch,
    ) -> Result<Losses, TrainError> {
        let (mut samples, seen) = match (samples, &module.visual) {
            (Samples::Raw(inputs), Some(encoder)) => self.trained_samples(encoder, stage, inputs)?,
            (Samples::Encoded(samples), _) => (samples, None),
            (Samples::Raw(_), None) => unreachable!("inputs stay raw only for an encoder that is trained"),
        };
        // Neighbours of about the same length need less padding.
        samples.sort_by_key(|sample| sample.token_ids.len());
        let batch = TrainingBatch::new(samples, module.ar.config())?;
        let LossRecipe { token_weight, image_weight, prefill, appearance_weight, label_weight, embeds_noise, .. } =
            stage.loss;
        let loss =
            ArObjective { token_weight, image_weight, prefill }.loss(&module.ar, &batch, compute_dtype(stage))?;
        let mut losses = Losses {
            total: loss.total,
            parts: vec![
                ("cross_entropy", loss.cross_entropy),
                ("image", loss.image),
                ("mse", loss.mse),
                ("cosine", loss.cosine),
            ],
        };
        if let (Some(head), Some(Seen { embeds, pixels, grids, shown })) = (&module.appearance_head, seen) {
            let noise = Draws::new(seed, "embeds noise", first).normal(embeds.dims(), &self.device) * embeds_noise;
            let noisy = module.label_head.as_ref().map(|head| (head, embeds.clone() + noise.clone()));
            let appearance = AppearanceObjective::default()
                .loss(head, AppearanceInput { embeds, patches: pixels, grids: &grids, noise });
            losses.total = losses.total + appearance.total * appearance_weight;
            losses.parts.extend([("pixels", appearance.pixels), ("position", appearance.position)]);
            if let Some(labels) = noisy.and_then(|(head, noisy)| label_loss(head, noisy, &grids, &shown)) {
                losses.total = losses.total + labels.clone() * label_weight;
                losses.parts.push(("labels", labels));
            }
        }
        Ok(losses)
    }

    fn export(&self, module: LanguageModule, dir: &Path) -> Result<(), TrainError> {
        let visual = module.visual.or_else(|| self.encoder.clone());
        let module = LanguageModule { ar: module.ar, visual, appearance_head: None, label_head: None };
        Ok(save_module_as(&module, &NAMES, &dir.join("model.safetensors"), FloatDType::BF16)?)
    }

    fn samples(&mut self, _: &LanguageModule, _: &StageRecipe) -> Result<Option<Image>, TrainError> {
        Ok(None)
    }
}

/// Cross entropy of what the tokens of known scenes show; `None` if there is nothing to learn it from.
///
/// # Shapes
/// - `embeds`: `[1, tokens, hidden]` of all images
fn label_loss(head: &LabelHead, embeds: Tensor<3>, grids: &[GridThw], shown: &[Option<Scene>]) -> Option<Tensor<1>> {
    let (mut rows, mut labels, mut start) = (Vec::new(), Vec::new(), 0);
    for (grid, scene) in grids.iter().zip(shown) {
        let end = start + grid.num_merged_tokens() as i64;
        if let Some(scene) = scene {
            rows.extend(start..end);
            labels.extend(scene.token_labels(grid.merged_h(), grid.merged_w()).into_iter().flatten());
        }
        start = end;
    }
    if rows.is_empty() {
        return None;
    }
    let rows = Tensor::<1, Int>::from_data(rows.as_slice(), &embeds.device());
    Some(head.loss(embeds.squeeze_dim::<2>(0).select(0, rows), &labels))
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
