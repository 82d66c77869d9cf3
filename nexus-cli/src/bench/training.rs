//! Training steps as work: loss, gradients of all weights, and a step of AdamW on weights in f32.

use burn::{
    module::Module,
    tensor::{FloatDType, Tensor},
};
use nexus::{
    GridThw, ImageEmbeds,
    ar::{self, ArModel, ArObjective, NUM_IMAGE_TOKENS, TrainingBatch, TrainingSample},
    checkpoint::WeightNames,
    core::nn::Recomputation,
    diffusion::{FlowMatching, FlowMatchingInput, GenerationDecoder, weights::GENERATION_DECODER},
};
use nexus_train::optim::{AdamWOptions, GradientSum, Optimizer};

use super::{
    models::{Weights, ar_config, diffusion_config},
    place::{compute, device, ramp},
    work::{DRAWN, GUIDANCE, PROMPT_TOKENS, Work, read},
};

const LEARNING_RATE: f64 = 1e-5;
/// Tokens before the answer, and those of them that are not learned.
const BEFORE_IMAGE: usize = 200;
const NOT_LEARNED: usize = 180;
/// Level of noise of the picture, as an index into the schedule: all noise, whose timestep bf16 has.
const NOISE_LEVEL: usize = 0;

/// A model that takes steps.
struct Trained<M> {
    /// Always there between two steps.
    model: Option<M>,
    optimizer: Optimizer,
    names: &'static WeightNames,
    /// The parameter whose gradient is compared with that of other programs.
    shown: &'static str,
}

impl<M: Module> Trained<M> {
    fn new(model: M, names: &'static WeightNames, shown: &'static str) -> Self {
        Self { model: Some(model), optimizer: Optimizer::new(AdamWOptions::default()), names, shown }
    }

    fn step(&mut self, loss: impl FnOnce(&M) -> Tensor<1>) -> Vec<f32> {
        let model = self.model.take().unwrap();
        let mut gradients = GradientSum::new();
        gradients.add(loss(&model).backward(), &model, self.names);
        let shown = gradients.get(self.shown).unwrap().clone();
        self.model = Some(self.optimizer.step(model, self.names, gradients, LEARNING_RATE));
        read(shown)
    }
}

/// A step of the language model: one conversation of 300 tokens, 81 of them an answer, whose embeddings are given.
pub struct ArTraining {
    trained: Trained<ArModel>,
    batch: TrainingBatch,
}

impl ArTraining {
    pub fn boxed(weights: Weights<'_>) -> Box<dyn Work> {
        let config = ar_config();
        let token = |index: usize| index as u32 * 97 % 30_000;
        let mut token_ids: Vec<u32> = (0..BEFORE_IMAGE).map(token).collect();
        token_ids.push(config.token_ids.vision_start_token_id);
        token_ids.extend([config.token_ids.image_token_id; NUM_IMAGE_TOKENS]);
        token_ids.push(config.token_ids.vision_end_token_id);
        token_ids.extend((token_ids.len()..PROMPT_TOKENS).map(token));
        let learned = |(index, &id): (usize, &u32)| (index >= NOT_LEARNED).then_some(id);
        let labels = token_ids.iter().enumerate().map(learned).collect();
        let target = ramp([1, NUM_IMAGE_TOKENS, config.hidden_size], 1).cast(FloatDType::F32);
        let targets = vec![ImageEmbeds::new(target, GridThw::GENERATED).unwrap()];
        let sample = TrainingSample { token_ids, labels, inputs: vec![], targets };
        let batch = TrainingBatch::new(vec![sample], &config).unwrap();
        let trained = Trained::new(weights.trained_ar(), &ar::NAMES, "model.layers.0.input_layernorm.weight");
        Box::new(Self { trained, batch })
    }
}

impl Work for ArTraining {
    fn run(&mut self) -> Vec<f32> {
        let Self { trained, batch } = self;
        trained.step(|model| ArObjective::default().loss(model, batch, compute()).unwrap().total)
    }
}

/// A step of the generation decoder: one picture of 512x512 pixels, whose latents are given.
pub struct DitTraining {
    trained: Trained<GenerationDecoder>,
    embeds: ImageEmbeds,
    pooled: Tensor<2>,
    latents: Tensor<4>,
    noise: Tensor<4>,
    flow: FlowMatching,
}

impl DitTraining {
    pub fn boxed(weights: Weights<'_>) -> Box<dyn Work> {
        let config = diffusion_config().dit;
        let latents = [1, config.latent_channels(), DRAWN.height, DRAWN.width];
        let embeds = input([1, NUM_IMAGE_TOKENS, ar_config().hidden_size], 1);
        Box::new(Self {
            trained: Trained::new(weights.trained_decoder(), &GENERATION_DECODER, "pipe.dit.x_embedder.bias"),
            embeds: ImageEmbeds::new(embeds, GridThw::GENERATED).unwrap(),
            pooled: input([1, config.pooled_dim], 2),
            latents: input(latents, 3),
            noise: input(latents, 4),
            flow: FlowMatching::new(),
        })
    }
}

impl Work for DitTraining {
    fn run(&mut self) -> Vec<f32> {
        let Self { trained, embeds, pooled, latents, noise, flow } = self;
        trained.step(|decoder| {
            let input = FlowMatchingInput {
                conditioning: &decoder.condition(embeds).unwrap(),
                pooled: pooled.clone(),
                latents: latents.clone(),
                noise: noise.clone(),
                timestep_indices: &[NOISE_LEVEL],
                embedded_guidance: GUIDANCE as f32,
            };
            flow.loss(&decoder.dit, input, &mut Recomputation::none()).mse
        })
    }
}

/// An input as a constant of the device that tracks gradients.
fn input<const D: usize>(shape: [usize; D], seed: usize) -> Tensor<D> {
    ramp(shape, seed).to_device(&device().autodiff())
}
