//! The transformer itself: modulations, rotary tables and condition tokens are made by functions of their own, so
//! that what does not change from step to step is computed once.

use burn::{
    module::Module,
    tensor::{DType, Device, Tensor},
};
use nexus_checkpoint::{Checkpoint, LoadOptions, load_module};
use nexus_core::nn::{Linear, Recomputation};
use nexus_kernels::RotaryTable;

use super::{
    AdaNorm, DitModulations, DoubleBlock, EMBEDDED_WIDTH, Mlp, SingleBlock, TeaCache,
    inputs::{axes_rotary, image_positions, rounded, sinusoid},
};
use crate::{
    DiffusionError,
    config::DitConfig,
    connector::TokenPosition,
    latents::{LatentSize, patchify, unpatchify},
    weights::{FLUX1_DEV, notice_flux_licence},
};

/// FLUX.1 with the fields of the decoders' files.
///
/// Source: FLUX (model.py, `Flux`), DiffSynth (flux_dit.py, `FluxDiT`).
#[derive(Module, Debug)]
pub struct Dit {
    /// `pooled_text_embedder`: of the pooled text vector.
    pub pooled_text_embedder: Mlp,
    /// `time_embedder.timestep_embedder`: of the timestep.
    pub time_embedder: Mlp,
    /// `guidance_embedder.timestep_embedder`: of the embedded guidance.
    pub guidance_embedder: Option<Mlp>,
    /// Of the condition tokens: `[dim, context]`.
    pub context_embedder: Linear,
    /// Of the latents: `[dim, in_channels]`.
    pub x_embedder: Linear,
    /// Double-stream blocks.
    pub blocks: Vec<DoubleBlock>,
    /// Single-stream blocks.
    pub single_blocks: Vec<SingleBlock>,
    /// Modulation before the last projection; rows `[scale, shift]`.
    pub final_norm_out: AdaNorm,
    /// `[in_channels, dim]`.
    pub final_proj_out: Linear,
    axes_dim: [usize; 3],
    theta: f64,
}

/// The part of the conditioning vector that no timestep changes, as [`Dit::constant_conditioning`] makes it.
#[derive(Debug, Clone)]
pub struct ConstantConditioning {
    /// `[batch, dim]`.
    pub(crate) pooled: Tensor<2>,
    /// `[1, dim]`.
    guidance: Option<Tensor<2>>,
}

/// What [`Dit::forward`] takes.
#[derive(Debug, Clone)]
pub struct DitInput<'a> {
    /// Noisy latents: `[batch, channels, height, width]`, even sides.
    pub latents: Tensor<4>,
    /// Condition tokens as [`Dit::context`] makes them: `[batch, text tokens, dim]`.
    pub context: Tensor<3>,
    /// As [`Dit::modulations`] makes them.
    pub modulations: &'a DitModulations,
    /// As [`Dit::rotary`] makes it.
    pub rotary: &'a RotaryTable,
}

impl Dit {
    /// A lazily initialised transformer.
    ///
    /// # Panics
    /// If the configuration is incoherent; see [`DitConfig::validate`].
    pub fn new(config: &DitConfig, device: &Device) -> Self {
        let DitConfig { dim, num_heads, in_channels, .. } = *config;
        Self {
            pooled_text_embedder: Mlp::new(config.pooled_dim, dim, device),
            time_embedder: Mlp::new(EMBEDDED_WIDTH, dim, device),
            guidance_embedder: config.guidance_embed.then(|| Mlp::new(EMBEDDED_WIDTH, dim, device)),
            context_embedder: Linear::new(config.context_dim, dim, device),
            x_embedder: Linear::new(in_channels, dim, device),
            blocks: (0..config.num_double).map(|_| DoubleBlock::new(dim, num_heads, device)).collect(),
            single_blocks: (0..config.num_single).map(|_| SingleBlock::new(dim, num_heads, device)).collect(),
            final_norm_out: AdaNorm::new(dim, 2, device),
            final_proj_out: Linear::new(dim, in_channels, device),
            axes_dim: config.axes_dim,
            theta: config.theta,
        }
    }

    /// Loads `flux1-dev.safetensors`, from which the decoders were trained.
    ///
    /// Shift and scale of the output modulation change places, to the order of the decoders' files.
    ///
    /// # Errors
    /// [`DiffusionError::Config`] if the configuration is incoherent, [`DiffusionError::Checkpoint`] if the weights do
    /// not fit it.
    pub fn load_flux1_dev(
        checkpoint: &Checkpoint,
        config: &DitConfig,
        device: &Device,
        options: &LoadOptions,
    ) -> Result<Self, DiffusionError> {
        config.validate()?;
        notice_flux_licence(config);
        let mut dit = load_module(Self::new(config, device), checkpoint, &FLUX1_DEV, options)?;
        dit.final_norm_out = dit.final_norm_out.with_halves_swapped();
        Ok(dit)
    }

    /// Channels of the latents.
    pub fn latent_channels(&self) -> usize {
        let [_, patch] = self.x_embedder.weight.dims();
        patch / 4
    }

    /// The vector that all modulations come from, in the dtype of `pooled`.
    ///
    /// Timesteps are used in f32; `guidance * 1000` is rounded to the dtype of `pooled`, so that 3.5 acts as 3.504 in
    /// bf16, as in the original.
    ///
    /// # Shapes
    /// - `timesteps`: one per sample, in `0..=1000`
    /// - `pooled`: `[batch, pooled]`
    /// - returns: `[batch, dim]`
    ///
    /// # Panics
    /// If there is not one timestep per sample.
    pub fn conditioning(&self, timesteps: &[f32], guidance: f32, pooled: Tensor<2>) -> Tensor<2> {
        let [batch, _] = pooled.dims();
        assert_eq!(timesteps.len(), batch, "timesteps of a batch of {batch}");
        self.conditioning_at(timesteps, &self.constant_conditioning(guidance, pooled))
    }

    /// What [`Dit::conditioning`] adds to the timesteps, the same at every step.
    ///
    /// # Shapes
    /// - `pooled`: `[batch, pooled]`
    pub fn constant_conditioning(&self, guidance: f32, pooled: Tensor<2>) -> ConstantConditioning {
        let (dtype, device) = (pooled.dtype(), pooled.device());
        let guidance = rounded(rounded(guidance, dtype) * 1000.0, dtype);
        let embedder = self.guidance_embedder.as_ref();
        let guidance = embedder.map(|embedder| embedder.forward(sinusoid(&[guidance], dtype, &device)));
        ConstantConditioning { pooled: self.pooled_text_embedder.forward(pooled), guidance }
    }

    /// [`Dit::conditioning`] from its constant part.
    ///
    /// # Shapes
    /// - `timesteps`: one per sample, or one for all
    /// - returns: `[batch, dim]`
    ///
    /// # Panics
    /// For any other number of timesteps.
    pub fn conditioning_at(&self, timesteps: &[f32], constant: &ConstantConditioning) -> Tensor<2> {
        let ConstantConditioning { pooled, guidance } = constant;
        let [batch, _] = pooled.dims();
        assert!([1, batch].contains(&timesteps.len()), "{} timesteps of a batch of {batch}", timesteps.len());
        let time = self.time_embedder.forward(sinusoid(timesteps, pooled.dtype(), &pooled.device()));
        let conditioning = time + pooled.clone();
        match guidance {
            Some(guidance) => conditioning + guidance.clone(),
            None => conditioning,
        }
    }

    /// The modulations of all blocks.
    ///
    /// # Shapes
    /// - `conditioning`: `[batch, dim]`
    pub fn modulations(&self, conditioning: &Tensor<2>) -> DitModulations {
        DitModulations {
            double: self.blocks.iter().map(|block| block.modulation(conditioning)).collect(),
            single: self.single_blocks.iter().map(|block| block.modulation(conditioning)).collect(),
            output: self.final_norm_out.output(conditioning),
        }
    }

    /// Condition tokens in the transformer's width.
    ///
    /// # Shapes
    /// - `embeds`: `[batch, text tokens, context]`
    /// - returns: `[batch, text tokens, dim]`
    pub fn context(&self, embeds: Tensor<3>) -> Tensor<3> {
        self.context_embedder.forward(embeds)
    }

    /// The rotary table of condition tokens and image tokens, in this order; positions are rounded to `dtype`.
    ///
    /// # Shapes
    /// - `text_ids`: one per condition token
    /// - returns: f32 tables `[1, text tokens + image tokens, head_dim / 2]`
    pub fn rotary(&self, text_ids: &[TokenPosition], size: LatentSize, dtype: DType, device: &Device) -> RotaryTable {
        let positions = text_ids.iter().copied().chain(image_positions(size));
        let positions = positions.map(|position| position.map(|number| rounded(number, dtype)));
        axes_rotary(positions, self.axes_dim, self.theta, device)
    }

    /// Predicts the velocity of the latents, from clean picture to noise.
    ///
    /// With a cache, a step whose input hardly changed skips the blocks.
    ///
    /// # Shapes
    /// - returns: `[batch, channels, height, width]`
    ///
    /// # Panics
    /// If a side of the latents is odd, or the parts of the input do not belong together.
    pub fn forward(&self, input: DitInput<'_>, cache: Option<&mut TeaCache>) -> Tensor<4> {
        let size = LatentSize::of(&input.latents);
        let image = self.x_embedder.forward(patchify(input.latents));
        let image = match cache {
            None => self.run_blocks(image, input.context, input.modulations, input.rotary),
            Some(cache) => {
                let modulation = &input.modulations.double[0].image.attention;
                let skips = cache.skips(modulation.modulate(image.clone()));
                match cache.residual() {
                    Some(residual) if skips => image + residual.clone(),
                    _ => {
                        let mixed = self.run_blocks(image.clone(), input.context, input.modulations, input.rotary);
                        cache.store(mixed.clone() - image);
                        mixed
                    }
                }
            }
        };
        unpatchify(self.final_proj_out.forward(input.modulations.output.modulate(image)), size)
    }

    /// [`Dit::forward`] for training, from the conditioning vector: the blocks are those of the recomputation, and each
    /// makes its modulation itself.
    ///
    /// # Shapes
    /// - `latents`: `[batch, channels, height, width]`
    /// - `context`: `[batch, text tokens, dim]`
    /// - `conditioning`: `[batch, dim]`
    /// - returns: as `latents`
    ///
    /// # Panics
    /// As [`Dit::forward`].
    pub fn forward_recomputed<'a>(
        &'a self,
        latents: Tensor<4>,
        context: Tensor<3>,
        conditioning: Tensor<2>,
        rotary: &RotaryTable,
        blocks: &mut Recomputation<'a>,
    ) -> Tensor<4> {
        let size = LatentSize::of(&latents);
        let vector = |conditioning: Tensor<3>| conditioning.squeeze_dim::<2>(1);
        let entering = [self.x_embedder.forward(patchify(latents)), context, conditioning.unsqueeze_dim(1)];
        let [mut image, mut text, shared] = blocks.enter(entering);
        let ([_, image_tokens, _], [_, text_tokens, _]) = (image.value().dims(), text.value().dims());
        assert_eq!(rotary.cos.dims()[1], text_tokens + image_tokens, "rotary table and tokens");
        for block in &self.blocks {
            let rotary = rotary.clone();
            let run = move |block: &DoubleBlock, [image, text, conditioning]: [Tensor<3>; 3]| {
                <[_; 2]>::from(block.forward(image, text, &block.modulation(&vector(conditioning)), &rotary))
            };
            [image, text] = blocks.run(block, [&image, &text, &shared], run);
        }
        let [mut joined] = blocks.enter([Tensor::cat(vec![text.value(), image.value()], 1)]);
        for block in &self.single_blocks {
            let rotary = rotary.clone();
            let run = move |block: &SingleBlock, [joined, conditioning]: [Tensor<3>; 2]| {
                [block.forward(joined, &block.modulation(&vector(conditioning)), &rotary)]
            };
            [joined] = blocks.run(block, [&joined, &shared], run);
        }
        let modulation = self.final_norm_out.output(&vector(shared.value()));
        let image = joined.value().narrow(1, text_tokens, image_tokens);
        unpatchify(self.final_proj_out.forward(modulation.modulate(image)), size)
    }

    /// All blocks.
    ///
    /// # Shapes
    /// - `image`: `[batch, image tokens, dim]`
    /// - `text`: `[batch, text tokens, dim]`
    /// - returns: `[batch, image tokens, dim]`
    fn run_blocks(
        &self,
        mut image: Tensor<3>,
        mut text: Tensor<3>,
        modulations: &DitModulations,
        rotary: &RotaryTable,
    ) -> Tensor<3> {
        let ([_, image_tokens, _], [_, text_tokens, _]) = (image.dims(), text.dims());
        assert_eq!(rotary.cos.dims()[1], text_tokens + image_tokens, "rotary table and tokens");
        for (block, modulation) in self.blocks.iter().zip(&modulations.double) {
            (image, text) = block.forward(image, text, modulation, rotary);
        }
        let mut joined = Tensor::cat(vec![text, image], 1);
        for (block, modulation) in self.single_blocks.iter().zip(&modulations.single) {
            joined = block.forward(joined, modulation, rotary);
        }
        joined.narrow(1, text_tokens, image_tokens)
    }
}
