//! Training the language model, and the vision encoder together with it: conversations -> losses.

mod losses;
mod samples;

use std::{collections::HashMap, marker::PhantomData, path::Path};

use burn::{
    module::Module,
    tensor::{Device, FloatDType, Tensor},
};
use nexus::ModelFiles;
use nexus_ar::{ArConfig, ArModel, ArOutput, TrainingBatch, TrainingSample};
use nexus_checkpoint::{Checkpoint, WeightNames, save_module_as};
use nexus_core::{config::ConfigError, nn::Recomputation};
use nexus_data::{Image, Processor};
use nexus_vision_encoder::{
    AppearanceHead, AppearanceInput, AppearanceLoss, AppearanceObjective, LabelHead, VisionConfig, VisionEncoder,
};

use crate::{
    LabelClasses, LanguageInitial, Phase, Qwen2_5VlStart, TrainError,
    drawing::{Drawing, SAMPLE_PICTURES},
    optim::{Draws, InitialWeights, initialize},
    training::{Losses, MASTER_WEIGHTS, MicroBatch, PartTraining},
};
use losses::{LanguageLosses, LanguageSettings};
use samples::{KnownInput, KnownSample, Seen};

/// Standard deviation of what Nexus-Gen added to Qwen2.5-VL, whose `initializer_range` it is.
const ADDED_STD: f32 = 0.02;

/// Width of the hidden layer of the throw-away head.
const HEAD_HIDDEN: usize = 512;

/// What is trained: the language model alone, or with the vision encoder and its head.
#[derive(Module, Debug)]
pub(crate) struct LanguageModule {
    ar: ArModel,
    visual: Option<VisionEncoder>,
    appearance_head: Option<AppearanceHead>,
    label_head: Option<LabelHead>,
    input_label_head: Option<LabelHead>,
}

/// Training of [`LanguageModule`].
pub(crate) struct LanguageTraining<S> {
    processor: Processor,
    module: LanguageModule,
    /// The encoder on the plain device, when it is not trained.
    encoder: Option<VisionEncoder>,
    device: Device,
    /// Labels that the sources know.
    classes: LabelClasses,
    /// Whether some phase asks for what is known of samples.
    asks_for_supervision: bool,
    /// Samples that come again, with the images as the frozen encoder sees them; of the phase with this seed.
    encoded: (u64, HashMap<u64, KnownSample>),
    /// What draws the sheets of samples, if they are wanted.
    drawing: Option<Drawing>,
    /// The latest samples that are answered by pictures.
    latest: Vec<TrainingSample>,
    settings: PhantomData<fn() -> S>,
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

/// What a run of the language model begins with.
pub(crate) struct LanguageStart<'a, S> {
    pub(crate) seed: u64,
    pub(crate) initial: &'a LanguageInitial,
    /// Whether sheets of samples are wanted.
    pub(crate) draws_samples: bool,
    pub(crate) phases: &'a [Phase<S>],
    /// Labels that the sources know.
    pub(crate) classes: LabelClasses,
}

impl<S: LanguageSettings> LanguageTraining<S> {
    pub(crate) fn open(start: LanguageStart<'_, S>, model: &Path, device: &Device) -> Result<Self, TrainError> {
        let LanguageStart { seed, initial, draws_samples, phases, classes } = start;
        let files = ModelFiles::find(model)?;
        let config = ArConfig::read(files.config())?;
        let tracked = device.clone().autodiff();
        let losses: Vec<LanguageLosses> = phases.iter().map(|phase| phase.settings.losses()).collect();
        for loss in losses.iter().filter(|loss| !loss.states_read().is_empty()) {
            let layers = loss.layers_needed();
            if layers > config.num_hidden_layers {
                let reason = format!("{layers} layers are needed, the model has {}", config.num_hidden_layers);
                return Err(ConfigError::incoherent("state_layers", reason).into());
            }
        }
        let head = |learns: fn(&LanguageLosses) -> bool, classes: &[usize]| {
            losses.iter().any(learns).then(|| LabelHead::new(config.hidden_size, classes, &tracked))
        };
        let label_head = head(|losses| losses.label_weight > 0.0, &classes.embeds);
        let input_label_head = head(|losses| losses.input_label_weight > 0.0, &classes.all());
        let appearance_head = S::TRAINS_ENCODER.then(|| AppearanceHead::new(config.hidden_size, HEAD_HIDDEN, &tracked));
        let module = match initial {
            LanguageInitial::Random(weights) => {
                let vision_config = VisionConfig::read(files.config())?;
                let module = LanguageModule {
                    ar: ArModel::new(&config, &tracked)?,
                    visual: S::TRAINS_ENCODER.then(|| VisionEncoder::new(&vision_config, &tracked)),
                    appearance_head,
                    label_head,
                    input_label_head,
                };
                initialize(module, &NAMES, weights)
            }
            LanguageInitial::Checkpoint | LanguageInitial::Qwen2_5Vl(_) => {
                let ar = match initial {
                    LanguageInitial::Qwen2_5Vl(start) => qwen2_5_vl(start, &config, &tracked)?,
                    _ => files.load_ar(&tracked, &MASTER_WEIGHTS)?,
                };
                let visual = match S::TRAINS_ENCODER {
                    true => Some(encoder(initial, &files, &tracked)?),
                    false => None,
                };
                let fresh = InitialWeights { seed, gain: 1.0, zero: vec![] };
                let label =
                    |head: Option<LabelHead>, prefix| head.map(|head| initialize(head, &head_names(prefix), &fresh));
                let appearance_head =
                    appearance_head.map(|head| initialize(head, &head_names("appearance_head."), &fresh));
                let label_head = label(label_head, "label_head.");
                let input_label_head = label(input_label_head, "input_label_head.");
                LanguageModule { ar, visual, appearance_head, label_head, input_label_head }
            }
        };
        Ok(Self {
            encoder: match S::TRAINS_ENCODER {
                true => None,
                false => Some(encoder(initial, &files, device)?),
            },
            drawing: draws_samples.then(|| Drawing::open(&files, device, &MASTER_WEIGHTS)).transpose()?,
            processor: Processor::open(&files.nexus)?,
            module,
            device: tracked,
            classes,
            asks_for_supervision: phases.iter().any(|phase| phase.settings.asks_for_supervision().is_some()),
            encoded: Default::default(),
            latest: vec![],
            settings: PhantomData,
        })
    }
}

/// The vision encoder that a language model begins with: Qwen2.5-VL's own, or the one in the model's directory.
fn encoder(initial: &LanguageInitial, files: &ModelFiles, device: &Device) -> Result<VisionEncoder, TrainError> {
    match initial {
        LanguageInitial::Qwen2_5Vl(Qwen2_5VlStart { path, .. }) => {
            let config = VisionConfig::read(files.config())?;
            Ok(VisionEncoder::load(&Checkpoint::open(path)?, &config, device, &MASTER_WEIGHTS)?)
        }
        _ => Ok(files.load_vision_encoder(device, &MASTER_WEIGHTS)?),
    }
}

/// Qwen2.5-VL's language model, with seeded values for what Nexus-Gen added.
fn qwen2_5_vl(start: &Qwen2_5VlStart, config: &ArConfig, device: &Device) -> Result<ArModel, TrainError> {
    let mut ar = ArModel::load_qwen2_5_vl(&Checkpoint::open(&start.path)?, config, device, &MASTER_WEIGHTS)?;
    let gain = ADDED_STD * (config.hidden_size as f32).sqrt();
    let added = InitialWeights { seed: start.seed, gain, zero: vec![] };
    ar.vision_head = initialize(ar.vision_head, &head_names("vision_head."), &added);
    ar.image_prefill_embeds = initialize(ar.image_prefill_embeds, &head_names("image_prefill_embeds."), &added);
    Ok(ar)
}

/// Losses of what the encoder that is trained must tell.
fn add_encoder_losses(
    losses: &mut Losses,
    module: &LanguageModule,
    seen: Seen,
    noise: Tensor<3>,
    (weights, labels): (&LanguageLosses, usize),
) {
    let Seen { embeds, pixels, shown } = seen;
    let grids = shown.grids();
    let noisy = module.label_head.as_ref().map(|head| (head, (embeds.clone() + noise.clone()).squeeze_dim(0)));
    if let Some(head) = &module.appearance_head {
        let input = AppearanceInput { embeds, patches: pixels, grids: &grids, noise };
        let AppearanceLoss { total, pixels, position, .. } = AppearanceObjective::default().loss(head, input);
        losses.total = losses.total.clone() + total * weights.appearance_weight;
        losses.parts.extend([("pixels", pixels), ("position", position)]);
    }
    if let Some((head, noisy)) = noisy {
        losses.add("labels", weights.label_weight, shown.label_loss(head, labels, noisy));
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
    Encoded(Vec<KnownSample>),
    /// For the encoder that is trained.
    Raw(Vec<KnownInput>),
}

impl<S: LanguageSettings> PartTraining for LanguageTraining<S> {
    type Module = LanguageModule;
    type Batch = LanguageBatch;
    type Settings = S;

    fn names(&self) -> WeightNames {
        NAMES
    }

    fn module(&self) -> Result<LanguageModule, TrainError> {
        Ok(self.module.clone())
    }

    fn prepare(&mut self, mut batch: MicroBatch<'_, S>) -> Result<Option<LanguageBatch>, TrainError> {
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
        if let (Some(_), Samples::Encoded(samples)) = (&self.drawing, &samples) {
            let drawn = samples.iter().map(|known| &known.sample).filter(|sample| !sample.targets.is_empty());
            let drawn: Vec<TrainingSample> = drawn.take(SAMPLE_PICTURES).cloned().collect();
            if !drawn.is_empty() {
                self.latest = drawn;
            }
        }
        Ok((!is_empty).then_some(LanguageBatch { seed, first, samples }))
    }

    fn loss<'a>(
        &self,
        module: &'a LanguageModule,
        phase: &Phase<S>,
        LanguageBatch { seed, first, samples }: LanguageBatch,
        blocks: &mut Recomputation<'a>,
    ) -> Result<Losses, TrainError> {
        let (mut samples, seen) = match (samples, &module.visual) {
            (Samples::Raw(inputs), Some(encoder)) => self.trained_samples(encoder, phase, inputs, blocks)?,
            (Samples::Encoded(samples), _) => (samples, None),
            (Samples::Raw(_), None) => unreachable!("inputs stay raw only for an encoder that is trained"),
        };
        // Neighbours of about the same length need less padding.
        samples.sort_by_key(|known| known.sample.token_ids.len());
        let weights = phase.settings.losses();
        let (inputs, answers) = samples::inputs_and_answers(&samples, weights.exclude_unseen);
        let (attended, selected) = samples::looks(&samples);
        let excluded = samples::excluded(&samples);
        let samples = samples.into_iter().map(|known| known.sample).collect();
        let mut batch = TrainingBatch::new(samples, module.ar.config())?;
        batch.exclude(&excluded)?;
        let (layer, dtype) = (weights.state_layers, phase.compute_dtype.into());
        let ArOutput { loss, answers: embeds, states } =
            weights.objective.output(&module.ar, &batch, dtype, weights.states_read(), blocks)?;
        let mut losses = Losses {
            total: loss.total,
            parts: vec![
                ("cross_entropy", loss.cross_entropy),
                ("image", loss.image),
                ("mse", loss.mse),
                ("cosine", loss.cosine),
            ],
        };
        let labels = self.classes.embeds.len();
        if let Some(states) = states.first() {
            if let (Some(head), Some(states)) = (&module.input_label_head, batch.input_states(states)) {
                let all = labels + self.classes.states.len();
                losses.add("input_labels", weights.input_label_weight, inputs.label_loss(head, all, states));
            }
            if weights.attention_weight > 0.0 {
                let attention = module.ar.attention_loss(states, &batch, layer, &attended);
                losses.add("attention", weights.attention_weight, attention);
            }
        }
        if let Some(states) = states.get(1) {
            let selection = module.ar.attention_loss(states, &batch, layer + 1, &selected);
            losses.add("selection", weights.selection_weight, selection);
        }
        match (seen, embeds) {
            (Some(seen), _) => {
                let noise = Draws::new(seed, "embeds noise", first).normal(seen.embeds.dims(), &self.device);
                let noise = noise.cast(seen.embeds.dtype()) * weights.embeds_noise;
                add_encoder_losses(&mut losses, module, seen, noise, (&weights, labels));
            }
            (None, Some(embeds)) => {
                let head = module.label_head.as_ref();
                let loss = head.and_then(|head| answers.answer_label_loss(head, labels, embeds));
                losses.add("labels", weights.label_weight, loss);
            }
            (None, None) => {}
        }
        Ok(losses)
    }

    fn export(&self, module: LanguageModule, dir: &Path, _: MicroBatch<'_, S>) -> Result<(), TrainError> {
        let visual = module.visual.or_else(|| self.encoder.clone());
        let module =
            LanguageModule { ar: module.ar, visual, appearance_head: None, label_head: None, input_label_head: None };
        Ok(save_module_as(&module, &NAMES, &dir.join("model.safetensors"), FloatDType::BF16)?)
    }

    /// What the generation decoder draws from the true embeddings of the latest answers, and from those predicted.
    fn samples(&mut self, module: &LanguageModule, phase: &Phase<S>) -> Result<Option<Image>, TrainError> {
        let Some(drawing) = self.drawing.as_ref().filter(|_| !self.latest.is_empty()) else { return Ok(None) };
        let (prefill, settings) = (phase.settings.losses().objective.prefill, phase.settings.drawn());
        drawing.sheet(&module.ar.valid(), prefill, &settings, &self.latest).map(Some)
    }
}
