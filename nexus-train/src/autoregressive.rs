//! Training the language model, and the vision encoder together with it: conversations -> losses.

use std::{collections::HashMap, path::Path};

use burn::{
    module::Module,
    tensor::{Device, FloatDType, Tensor},
};
use nexus_ar::{ArConfig, ArModel, ArObjective, ArOutput, Attended, ExcludedToken, TrainingBatch, TrainingSample};
use nexus_checkpoint::{LoadDType, LoadOptions, WeightNames, save_module_as};
use nexus_core::{
    ImageEmbeds,
    config::ConfigError,
    nn::Recomputation,
    train::{Draws, InitialWeights, initialize},
};
use nexus_data::{
    Image, Patches, Processor, TrainingInput,
    world::{LABEL_CLASSES, Place, Scene},
};
use nexus_vision_encoder::{
    AppearanceHead, AppearanceInput, AppearanceLoss, AppearanceObjective, LabelHead, VisionConfig, VisionEncoder,
};

use crate::{
    ComputeDType, Initial, LossRecipe, Recipe, StageRecipe, TrainError,
    attended::{Looks, looks_of},
    drawing::{Drawing, SAMPLE_PICTURES},
    feed::{Conversation, usable_input},
    labels::{STATE_CLASSES, Shown},
    trainer::{Losses, MicroBatch, Task},
    unseen::unseen_words,
};
use nexus::ModelFiles;

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
pub(crate) struct LanguageTask {
    processor: Processor,
    module: LanguageModule,
    /// The encoder on the plain device, when it is not trained.
    encoder: Option<VisionEncoder>,
    device: Device,
    /// Samples that come again, with the images as the frozen encoder sees them; of the stage with this seed.
    encoded: (u64, HashMap<u64, KnownSample>),
    /// What draws the sheets of samples, if they are wanted.
    drawing: Option<Drawing>,
    /// The latest samples that are answered by pictures.
    latest: Vec<TrainingSample>,
}

/// A sample and what is known of it.
#[derive(Debug, Clone)]
struct KnownSample {
    sample: TrainingSample,
    /// What its images show, inputs before answers.
    shown: Vec<Option<Scene>>,
    /// Tokens of which it is known where they should look.
    looks: Looks,
    /// Tokens that do not compete for a label, with its index.
    excluded: Vec<(usize, u32)>,
}

/// A conversation as tokens and pixels, and what is known of it.
struct KnownInput {
    input: TrainingInput,
    scenes: Vec<Scene>,
    places: Vec<Vec<Place>>,
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
        let tracked = device.clone().autodiff();
        let options =
            LoadOptions { dtype: LoadDType::Convert(FloatDType::F32), check_finite: true, quantization: None };
        let encoder = || {
            let checkpoint = files.open_language_model()?;
            Ok::<_, TrainError>(VisionEncoder::load(&checkpoint, &vision_config, device, &options)?)
        };
        let width = config.hidden_size;
        let learns = |weight: fn(&LossRecipe) -> f64| {
            recipe.stages.iter().map(|stage| &stage.loss).any(|loss| weight(loss) > 0.0)
        };
        for loss in recipe.stages.iter().map(|stage| &stage.loss).filter(|loss| !loss.states_read().is_empty()) {
            let layers = loss.layers_needed();
            if layers > config.num_hidden_layers {
                let reason = format!("{layers} layers are needed, the model has {}", config.num_hidden_layers);
                return Err(ConfigError::incoherent("state_layers", reason).into());
            }
        }
        let labels = |learnt: bool, classes: &[usize]| learnt.then(|| LabelHead::new(width, classes, &tracked));
        let label_head = labels(learns(|loss| loss.label_weight), &LABEL_CLASSES);
        let input_label_head = labels(learns(|loss| loss.input_label_weight), &STATE_CLASSES);
        let appearance_head = trains_encoder.then(|| AppearanceHead::new(width, HEAD_HIDDEN, &tracked));
        let (module, encoder) = match &recipe.initial {
            Initial::Random(weights) => {
                let module = LanguageModule {
                    ar: ArModel::new(&config, &tracked)?,
                    visual: trains_encoder.then(|| VisionEncoder::new(&vision_config, &tracked)),
                    appearance_head,
                    label_head,
                    input_label_head,
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
                let label =
                    |head: Option<LabelHead>, prefix| head.map(|head| initialize(head, &head_names(prefix), &fresh));
                let appearance_head =
                    appearance_head.map(|head| initialize(head, &head_names("appearance_head."), &fresh));
                let label_head = label(label_head, "label_head.");
                let input_label_head = label(input_label_head, "input_label_head.");
                let encoder = if trains_encoder { None } else { Some(encoder()?) };
                (LanguageModule { ar, visual, appearance_head, label_head, input_label_head }, encoder)
            }
        };
        let drawing = match recipe.sample_every {
            Some(_) => Some(Drawing::open(&files, device, &options)?),
            None => None,
        };
        Ok(Self {
            processor: Processor::open(&files.nexus)?,
            module,
            encoder,
            device: tracked,
            encoded: Default::default(),
            drawing,
            latest: vec![],
        })
    }

    /// One sample of a micro-batch, and what its images show where that is known; `None` if it cannot be used.
    fn input(&self, batch: &mut MicroBatch<'_>, number: u64) -> Result<Option<KnownInput>, TrainError> {
        let Some(Conversation { messages, scenes, places }) = batch.feed.conversation(number)? else { return Ok(None) };
        match usable_input(&self.processor, &messages, self.module.ar.config()) {
            Ok(input) => Ok(Some(KnownInput { input, scenes, places })),
            Err(reason) => batch.feed.reject(number, &reason).map(|()| None),
        }
    }

    /// Tokens that do not compete for a label, with its index, if the stage leaves them out.
    fn excluded(
        &self,
        stage: &StageRecipe,
        KnownInput { input, scenes, places }: &KnownInput,
    ) -> Result<Vec<(usize, u32)>, TrainError> {
        if !stage.loss.exclude_unseen {
            return Ok(vec![]);
        }
        let image_token = self.module.ar.config().token_ids.image_token_id;
        Ok(unseen_words(input, places, scenes, image_token, self.processor.tokenizer())?)
    }

    /// Samples with images from the frozen encoder; those that come again are encoded once.
    fn frozen_samples(
        &mut self,
        encoder: &VisionEncoder,
        mut batch: MicroBatch<'_>,
    ) -> Result<Vec<KnownSample>, TrainError> {
        if self.encoded.0 != batch.seed {
            self.encoded = (batch.seed, HashMap::new());
        }
        let (mut samples, mut new) = (Vec::new(), Vec::new());
        for number in batch.samples.clone() {
            let first = batch.feed.first(number);
            match self.encoded.1.get(&first) {
                Some(known) => samples.push((number, known.clone())),
                None => new.extend(self.input(&mut batch, number)?.map(|input| (number, input))),
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
        let image_token = self.module.ar.config().token_ids.image_token_id;
        let encoded = batch.workers.map(new, |(number, known)| {
            let excluded = self.excluded(batch.stage, &known)?;
            let KnownInput { input, scenes, places } = known;
            let looks = looks_of(&input, &places, &scenes, image_token);
            let TrainingInput { token_ids, labels, input_images, answer_images, .. } = input;
            let shown = Shown::scenes_of(scenes, input_images.len() + answer_images.len());
            let (inputs, targets) = (encode(input_images)?, encode(answer_images)?);
            let sample = TrainingSample { token_ids, labels, inputs, targets };
            Ok::<_, TrainError>((number, KnownSample { sample, shown, looks, excluded }))
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
        inputs: Vec<KnownInput>,
        blocks: &mut Recomputation<'_>,
    ) -> Result<(Vec<KnownSample>, Option<Seen>), TrainError> {
        let (mut texts, mut patches) = (Vec::new(), Vec::new());
        let mut shown = Shown { exclude_unseen: stage.loss.exclude_unseen, ..Shown::default() };
        for known in inputs {
            let excluded = self.excluded(stage, &known)?;
            let KnownInput { input, scenes, .. } = known;
            let TrainingInput { token_ids, labels, input_images, answer_images, .. } = input;
            let (num_inputs, num_answers) = (input_images.len(), answer_images.len());
            let scenes = Shown::scenes_of(scenes, num_inputs + num_answers);
            for (image, scene) in input_images.into_iter().chain(answer_images).zip(&scenes) {
                shown.push(image.grid, scene.clone());
                patches.push(image);
            }
            texts.push((token_ids, labels, num_inputs, num_answers, scenes, excluded));
        }
        let seen = (!patches.is_empty()).then(|| {
            let pixels = patches.into_iter().map(|patches| patches.into_tensor(&self.device)).collect();
            let pixels: Tensor<2> = Tensor::cat(pixels, 0);
            let embeds = encoder.forward(pixels.clone().cast(compute_dtype(stage)), &shown.grids);
            // The language model reads them, and so do losses of their own.
            let [embeds] = blocks.enter([embeds]);
            Seen { embeds: embeds.value(), pixels, shown }
        });
        let images = seen.iter().flat_map(Seen::images).collect::<Result<Vec<_>, TrainError>>()?;
        let mut images = images.into_iter();
        let samples = texts.into_iter().map(|(token_ids, labels, num_inputs, num_answers, shown, excluded)| {
            let inputs = images.by_ref().take(num_inputs).collect();
            let targets = images.by_ref().take(num_answers).collect();
            let sample = TrainingSample { token_ids, labels, inputs, targets };
            KnownSample { sample, shown, looks: Looks::default(), excluded }
        });
        Ok((samples.collect(), seen))
    }
}

/// Losses of what the encoder that is trained must tell.
fn add_encoder_losses(
    losses: &mut Losses,
    module: &LanguageModule,
    seen: Seen,
    noise: Tensor<3>,
    weights: &LossRecipe,
) {
    let Seen { embeds, pixels, shown } = seen;
    let noisy = module.label_head.as_ref().map(|head| (head, (embeds.clone() + noise.clone()).squeeze_dim(0)));
    if let Some(head) = &module.appearance_head {
        let input = AppearanceInput { embeds, patches: pixels, grids: &shown.grids, noise };
        let AppearanceLoss { total, pixels, position, .. } = AppearanceObjective::default().loss(head, input);
        losses.total = losses.total.clone() + total * weights.appearance_weight;
        losses.parts.extend([("pixels", pixels), ("position", position)]);
    }
    if let Some((head, noisy)) = noisy {
        losses.add("labels", weights.label_weight, shown.label_loss(head, noisy));
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
    /// For the encoder that is trained, with what the images show where that is known.
    Raw(Vec<KnownInput>),
}

/// Images of a micro-batch as the encoder that is trained sees them.
struct Seen {
    /// `[1, tokens, hidden]` of all images.
    embeds: Tensor<3>,
    /// `[patches, 1176]` of all images.
    pixels: Tensor<2>,
    shown: Shown,
}

impl Seen {
    /// Embeddings of each image.
    fn images(&self) -> impl Iterator<Item = Result<ImageEmbeds, TrainError>> {
        let mut start = 0;
        self.shown.grids.iter().map(move |&grid| {
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
        stage: &StageRecipe,
        LanguageBatch { seed, first, samples }: LanguageBatch,
        blocks: &mut Recomputation<'a>,
    ) -> Result<Losses, TrainError> {
        let (mut samples, seen) = match (samples, &module.visual) {
            (Samples::Raw(inputs), Some(encoder)) => self.trained_samples(encoder, stage, inputs, blocks)?,
            (Samples::Encoded(samples), _) => (samples, None),
            (Samples::Raw(_), None) => unreachable!("inputs stay raw only for an encoder that is trained"),
        };
        // Neighbours of about the same length need less padding.
        samples.sort_by_key(|known| known.sample.token_ids.len());
        let (inputs, answers) = inputs_and_answers(&samples, stage.loss.exclude_unseen);
        let Looks { attended, selected } = looks(&mut samples);
        let excluded = excluded(&samples);
        let samples = samples.into_iter().map(|known| known.sample).collect();
        let mut batch = TrainingBatch::new(samples, module.ar.config())?;
        batch.exclude(&excluded)?;
        let LossRecipe { token_weight, image_weight, prefill, state_layers: layer, .. } = stage.loss;
        let objective = ArObjective { token_weight, image_weight, prefill };
        let ArOutput { loss, answers: embeds, states } =
            objective.output(&module.ar, &batch, compute_dtype(stage), stage.loss.states_read(), blocks)?;
        let mut losses = Losses {
            total: loss.total,
            parts: vec![
                ("cross_entropy", loss.cross_entropy),
                ("image", loss.image),
                ("mse", loss.mse),
                ("cosine", loss.cosine),
            ],
        };
        if let Some(states) = states.first() {
            if let (Some(head), Some(states)) = (&module.input_label_head, batch.input_states(states)) {
                losses.add("input_labels", stage.loss.input_label_weight, inputs.label_and_place_loss(head, states));
            }
            if stage.loss.attention_weight > 0.0 {
                let attention = module.ar.attention_loss(states, &batch, layer, &attended);
                losses.add("attention", stage.loss.attention_weight, attention);
            }
        }
        if let Some(states) = states.get(1) {
            let selection = module.ar.attention_loss(states, &batch, layer + 1, &selected);
            losses.add("selection", stage.loss.selection_weight, selection);
        }
        match (seen, embeds) {
            (Some(seen), _) => {
                let noise = Draws::new(seed, "embeds noise", first).normal(seen.embeds.dims(), &self.device);
                let noise = noise.cast(seen.embeds.dtype());
                add_encoder_losses(&mut losses, module, seen, noise * stage.loss.embeds_noise, &stage.loss);
            }
            (None, Some(embeds)) => {
                let labels = module.label_head.as_ref().and_then(|head| answers.answer_label_loss(head, embeds));
                losses.add("labels", stage.loss.label_weight, labels);
            }
            (None, None) => {}
        }
        Ok(losses)
    }

    fn export(&self, module: LanguageModule, dir: &Path, _: MicroBatch<'_>) -> Result<(), TrainError> {
        let visual = module.visual.or_else(|| self.encoder.clone());
        let module =
            LanguageModule { ar: module.ar, visual, appearance_head: None, label_head: None, input_label_head: None };
        Ok(save_module_as(&module, &NAMES, &dir.join("model.safetensors"), FloatDType::BF16)?)
    }

    /// What the generation decoder draws from the true embeddings of the latest answers, and from those predicted.
    fn samples(&mut self, module: &LanguageModule, stage: &StageRecipe) -> Result<Option<Image>, TrainError> {
        let Some(drawing) = self.drawing.as_ref().filter(|_| !self.latest.is_empty()) else { return Ok(None) };
        drawing.sheet(&module.ar.valid(), stage, &self.latest).map(Some)
    }
}

/// Where the tokens of samples should look, in the order of the samples.
fn looks(samples: &mut [KnownSample]) -> Looks {
    let mut all = Looks::default();
    for (sample, known) in samples.iter_mut().enumerate() {
        let Looks { attended, selected } = std::mem::take(&mut known.looks);
        all.attended.extend(attended.into_iter().map(|attended| Attended { sample, ..attended }));
        all.selected.extend(selected.into_iter().map(|attended| Attended { sample, ..attended }));
    }
    all
}

/// Tokens that do not compete for labels, in the order of the samples.
fn excluded(samples: &[KnownSample]) -> Vec<ExcludedToken> {
    let of = |(sample, known): (usize, &KnownSample)| {
        let excluded = known.excluded.clone().into_iter();
        excluded.map(move |(index, id)| ExcludedToken { sample, index, id })
    };
    samples.iter().enumerate().flat_map(of).collect()
}

/// Images of samples that are given and those that are answers, in order.
fn inputs_and_answers(samples: &[KnownSample], exclude_unseen: bool) -> (Shown, Shown) {
    let none = || Shown { exclude_unseen, ..Shown::default() };
    let (mut inputs, mut answers) = (none(), none());
    for KnownSample { sample, shown, .. } in samples {
        let (shown_inputs, shown_answers) = shown.split_at(sample.inputs.len());
        for (images, scenes, into) in
            [(&sample.inputs, shown_inputs, &mut inputs), (&sample.targets, shown_answers, &mut answers)]
        {
            for (image, scene) in images.iter().zip(scenes) {
                into.push(image.grid, scene.clone());
            }
        }
    }
    (inputs, answers)
}

pub(super) fn compute_dtype(stage: &StageRecipe) -> FloatDType {
    match stage.compute_dtype {
        ComputeDType::F32 => FloatDType::F32,
        ComputeDType::Bf16 => FloatDType::BF16,
    }
}
