//! What is measured: one piece of work per stage, made from weights, run as often as one likes.

use burn::tensor::{DType, Tensor};
use nexus::{
    GridThw, Noise,
    ar::{ArConfig, ArModel, KvCache, NUM_IMAGE_TOKENS, image_position_ids},
    core::nn::DecoderLayer,
    diffusion::{
        Autoencoder, Branch, Branches, Conditioning, DenoiseOptions, DenoiseState, Denoiser, LatentSize,
        config::DitConfig,
        connector::{editing_text_ids, zero_text_ids},
        transformer::{Dit, DoubleBlock, SingleBlock},
    },
    vision_encoder::VisionEncoder,
};
use nexus_kernels::{RotaryTable, Visibility};

use super::{
    models::{Weights, diffusion_config},
    place::{compute, device, ramp},
};

pub const PROMPT_TOKENS: usize = 300;
const DECODED_TOKENS: usize = 16;
pub const DRAWN: LatentSize = LatentSize { height: 64, width: 64 };
/// Its thousandfold is the same in bf16, where the usual 3.5 acts as 3.504 in the original and here.
pub const GUIDANCE: f64 = 2.0;

/// The side of the released transformer's usual picture.
const RELEASED: LatentSize = LatentSize { height: 128, width: 128 };

/// Group of the stages whose weights take steps.
pub const TRAINING: &str = "training";
/// Group of the models of the released size, which take tens of gigabytes.
pub const RELEASED_MODELS: &str = "released_models";

/// Something that takes time.
pub trait Work {
    /// What has to be there before each run, and is not measured.
    fn prepare(&mut self) {}

    /// The measured part; the values are those that the other programs compute too.
    fn run(&mut self) -> Vec<f32>;

    /// How many equal parts a run has: its time is divided by this.
    fn parts(&self) -> usize {
        1
    }
}

/// A stage with its name in reports.
pub struct Stage {
    /// The crate or model it belongs to.
    pub group: &'static str,
    /// Unique.
    pub name: &'static str,
    /// Loads what the stage needs.
    pub load: fn(Weights<'_>) -> Box<dyn Work>,
}

/// All stages, in the order of the pipeline, then training steps, then layers and models of the released size.
pub const STAGES: &[Stage] = &[
    Stage { group: "ar", name: "prefill_300", load: |weights| Text::boxed(weights.ar(), Passage::Prefill) },
    Stage { group: "ar", name: "decode_token", load: |weights| Text::boxed(weights.ar(), Passage::Decode) },
    Stage { group: "ar", name: "image_block_81", load: |weights| Text::boxed(weights.ar(), Passage::ImageBlock) },
    Stage { group: "vision_encoder", name: "vision_252", load: |weights| Vision::boxed(weights, GridThw::GENERATED) },
    Stage { group: "vision_encoder", name: "vision_504", load: |weights| Vision::boxed(weights, GridThw::REFERENCE) },
    Stage { group: "diffusion", name: "dit_step_generation", load: |weights| Step::middle(weights, None) },
    Stage {
        group: "diffusion",
        name: "dit_step_editing",
        load: |weights| Step::middle(weights, Some(GridThw::REFERENCE)),
    },
    Stage { group: "autoencoder", name: "ae_decode_256", load: |weights| Decode::boxed(weights, 32) },
    Stage { group: "autoencoder_512", name: "ae_decode_512", load: |weights| Decode::boxed(weights, 64) },
    #[cfg(feature = "train")]
    Stage { group: TRAINING, name: "ar_training_step", load: super::training::ArTraining::boxed },
    #[cfg(feature = "train")]
    Stage { group: TRAINING, name: "dit_training_step", load: super::training::DitTraining::boxed },
    Stage { group: "released_layers", name: "llm_layer_300", load: |weights| Box::new(Layer::new(weights)) },
    Stage { group: "released_layers", name: "dit_double_block", load: |weights| Box::new(Double::new(weights)) },
    Stage { group: "released_layers", name: "dit_single_block", load: |weights| Box::new(Single::new(weights)) },
    Stage {
        group: RELEASED_MODELS,
        name: "released_prefill_300",
        load: |_| Text::boxed(Weights::released_ar(), Passage::Prefill),
    },
    Stage {
        group: RELEASED_MODELS,
        name: "released_decode_token",
        load: |_| Text::boxed(Weights::released_ar(), Passage::Decode),
    },
    Stage {
        group: RELEASED_MODELS,
        name: "released_image_block_81",
        load: |_| Text::boxed(Weights::released_ar(), Passage::ImageBlock),
    },
    Stage {
        group: RELEASED_MODELS,
        name: "released_dit_step_1024",
        load: |_| Step::boxed(Weights::released_dit(), &DitConfig::default(), RELEASED, None),
    },
    Stage { group: RELEASED_MODELS, name: "released_ae_decode_1024", load: |weights| Decode::boxed(weights, 128) },
];

/// Waits for a result, which backends may compute lazily, and reads it.
pub fn read<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.cast(DType::F32).into_data().try_into_vec_as::<f32>().unwrap()
}

fn text_positions(start: usize, tokens: usize) -> Vec<[i64; 3]> {
    (start..start + tokens).map(|position| [position as i64; 3]).collect()
}

enum Passage {
    Prefill,
    Decode,
    ImageBlock,
}

/// The language model: a prompt of 300 tokens and what may come after it.
struct Text {
    model: ArModel,
    cache: KvCache,
    passage: Passage,
}

impl Text {
    fn boxed(model: ArModel, passage: Passage) -> Box<dyn Work> {
        Box::new(Self { model, cache: KvCache::new(), passage })
    }

    /// Feeds tokens; returns the scores after the last one.
    fn feed(&mut self, token_ids: &[u32], start: usize) -> Vec<f32> {
        let embeds = self.model.embed(token_ids, &[], compute()).unwrap();
        let hidden = self.model.forward(embeds, &text_positions(start, token_ids.len()), Some(&mut self.cache));
        read(self.model.logits(hidden.narrow(1, token_ids.len() - 1, 1)))
    }

    fn prefill(&mut self) -> Vec<f32> {
        self.cache = KvCache::new();
        let prompt: Vec<u32> = (0..PROMPT_TOKENS as u32).map(|i| i * 97 % 30_000).collect();
        self.feed(&prompt, 0)
    }
}

impl Work for Text {
    fn prepare(&mut self) {
        if !matches!(self.passage, Passage::Prefill) {
            self.prefill();
        }
    }

    fn run(&mut self) -> Vec<f32> {
        match self.passage {
            Passage::Prefill => self.prefill(),
            // The likeliest token is looked for, but the next one is fixed: all programs must do the same work.
            Passage::Decode => (0..DECODED_TOKENS).fold(vec![], |_, i| {
                let scores = self.feed(&[1000 + i as u32], PROMPT_TOKENS + i);
                std::hint::black_box(scores.iter().copied().reduce(f32::max));
                scores
            }),
            Passage::ImageBlock => {
                let positions: Vec<_> = image_position_ids(PROMPT_TOKENS as i64, GridThw::GENERATED).collect();
                let embeds = self.model.prefill_embeds(compute());
                let hidden = self.model.forward(embeds, &positions[..NUM_IMAGE_TOKENS], Some(&mut self.cache));
                read(self.model.predict_embeds(hidden))
            }
        }
    }

    fn parts(&self) -> usize {
        if matches!(self.passage, Passage::Decode) { DECODED_TOKENS } else { 1 }
    }
}

/// One picture through the vision encoder.
struct Vision {
    encoder: VisionEncoder,
    patches: Tensor<2>,
    grid: GridThw,
}

impl Vision {
    fn boxed(weights: Weights<'_>, grid: GridThw) -> Box<dyn Work> {
        let encoder = weights.vision_encoder();
        let patches = ramp([grid.num_patches(), encoder.config().patch_values()], 1);
        Box::new(Self { encoder, patches, grid })
    }
}

impl Work for Vision {
    fn run(&mut self) -> Vec<f32> {
        read(self.encoder.forward(self.patches.clone(), &[self.grid]))
    }
}

/// The only step of a run, from noise to picture, without guidance by a negative prompt.
struct Step {
    denoiser: Denoiser<'static>,
    start: DenoiseState,
}

impl Step {
    fn middle(weights: Weights<'_>, reference: Option<GridThw>) -> Box<dyn Work> {
        Self::boxed(weights.decoder().dit, &diffusion_config().dit, DRAWN, reference)
    }

    /// Generation, or editing with a reference.
    fn boxed(dit: Dit, config: &DitConfig, size: LatentSize, reference: Option<GridThw>) -> Box<dyn Work> {
        // The denoiser borrows the transformer, which lives as long as the process.
        let dit: &'static Dit = Box::leak(Box::new(dit));
        let text_ids = match reference {
            None => zero_text_ids(NUM_IMAGE_TOKENS),
            Some(_) => editing_text_ids(GridThw::GENERATED, reference, size),
        };
        let conditioning = Conditioning { embeds: ramp([1, text_ids.len(), config.context_dim], 1), text_ids };
        let positive = Branch { conditioning, pooled: ramp([1, config.pooled_dim], 2) };
        let options =
            DenoiseOptions { num_steps: 1, cfg_scale: 1.0, embedded_guidance: GUIDANCE, ..DenoiseOptions::default() };
        let denoiser = Denoiser::new(dit, Branches { positive, negative: None }, size, &options).unwrap();
        let noise = Noise::Latents(ramp([1, config.latent_channels(), size.height, size.width], 3));
        let noise = noise.into_latents(config.latent_channels(), size, compute(), &device()).unwrap();
        let start = denoiser.start(noise, None).unwrap();
        Box::new(Self { denoiser, start })
    }
}

impl Work for Step {
    fn run(&mut self) -> Vec<f32> {
        let mut state = self.start.clone();
        self.denoiser.step(&mut state);
        read(state.latents)
    }
}

/// The released autoencoder draws a square.
struct Decode {
    autoencoder: Autoencoder,
    latents: Tensor<4>,
}

impl Decode {
    fn boxed(weights: Weights<'_>, side: usize) -> Box<dyn Work> {
        Box::new(Self { autoencoder: weights.autoencoder(), latents: ramp([1, 16, side, side], 1) })
    }
}

impl Work for Decode {
    fn run(&mut self) -> Vec<f32> {
        read(self.autoencoder.decode(self.latents.clone(), None))
    }
}

/// A layer of the released language model over a prompt.
struct Layer {
    layer: DecoderLayer,
    x: Tensor<3>,
    rotary: RotaryTable,
}

impl Layer {
    fn new(weights: Weights<'_>) -> Self {
        let config = ArConfig::released();
        let positions: Vec<[f32; 3]> = (0..PROMPT_TOKENS).map(|position| [position as f32; 3]).collect();
        let rotary = config.rotary().table(&positions, &device()).cast(compute().into());
        Self { layer: weights.decoder_layer(), x: ramp([1, PROMPT_TOKENS, config.hidden_size], 1), rotary }
    }
}

impl Work for Layer {
    fn run(&mut self) -> Vec<f32> {
        read(self.layer.forward(self.x.clone(), &self.rotary, Visibility::Causal, None))
    }
}

/// What the blocks of the released transformer see at 512x512 pixels.
struct Streams {
    image: Tensor<3>,
    text: Tensor<3>,
    conditioning: Tensor<2>,
    rotary: RotaryTable,
}

impl Streams {
    fn new() -> Self {
        let config = DitConfig { num_double: 1, num_single: 0, ..DitConfig::default() };
        let image: Tensor<3> = ramp([1, DRAWN.num_tokens(), config.dim], 1);
        let rotary =
            Dit::new(&config, &device()).rotary(&zero_text_ids(NUM_IMAGE_TOKENS), DRAWN, image.dtype(), &device());
        let text = ramp([1, NUM_IMAGE_TOKENS, config.dim], 2);
        Self { image, text, conditioning: ramp([1, config.dim], 3), rotary }
    }
}

/// A double-stream block of the released transformer.
struct Double {
    block: DoubleBlock,
    streams: Streams,
}

impl Double {
    fn new(weights: Weights<'_>) -> Self {
        Self { block: weights.double_block(), streams: Streams::new() }
    }
}

impl Work for Double {
    fn run(&mut self) -> Vec<f32> {
        let Streams { image, text, conditioning, rotary } = &self.streams;
        let modulation = self.block.modulation(conditioning);
        let (image, _) = self.block.forward(image.clone(), text.clone(), &modulation, rotary);
        read(image)
    }
}

/// A single-stream block of the released transformer.
struct Single {
    block: SingleBlock,
    streams: Streams,
}

impl Single {
    fn new(weights: Weights<'_>) -> Self {
        Self { block: weights.single_block(), streams: Streams::new() }
    }
}

impl Work for Single {
    fn run(&mut self) -> Vec<f32> {
        let Streams { image, text, conditioning, rotary } = &self.streams;
        let joined = Tensor::cat(vec![text.clone(), image.clone()], 1);
        read(self.block.forward(joined, &self.block.modulation(conditioning), rotary))
    }
}
