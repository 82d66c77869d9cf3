//! What each stage does with its input: pixels -> embeddings, embeddings -> latents -> pixels, prompts -> conditions.

use std::ops::ControlFlow;

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use nexus_core::ImageEmbeds;
use nexus_data::{
    ClipTokenizer, Image, Patches, PromptImage, T5_LEN, T5Tokenizer, clip_empty_ids, decoder_image, t5_empty_ids,
};
use nexus_diffusion::{Branch, Branches, Conditioning, DenoiseOptions, Denoiser, LatentSize, Noise, Tiling};

use crate::{
    DrawOptions, DrawWith, Error, Observer, Progress, Stage, Start,
    error::{read, read_data},
    progress::emit,
    slot::lock,
    stages::Stages,
};

impl Stages {
    /// Embeddings of the images of a prompt, each encoded on its own; none without loading anything.
    pub(crate) fn encode(
        &self,
        images: Vec<PromptImage>,
        observer: &mut dyn Observer,
    ) -> Result<Vec<ImageEmbeds>, Error> {
        let encode = |image| match image {
            PromptImage::Patches(patches) => self.encode_one(patches, observer),
            PromptImage::Embeds(embeds) => self.adopt(&embeds),
        };
        images.into_iter().map(encode).collect()
    }

    /// Embeddings made anywhere, on this device and in the dtype of the activations.
    fn adopt(&self, embeds: &ImageEmbeds) -> Result<ImageEmbeds, Error> {
        Ok(ImageEmbeds::new(adopt(&embeds.values, &self.device, self.compute_dtype)?, embeds.grid)?)
    }

    pub(crate) fn encode_one(&self, patches: Patches, observer: &mut dyn Observer) -> Result<ImageEmbeds, Error> {
        let (device, dtype) = (self.device.clone(), self.compute_dtype);
        let encoder = self.vision_encoder(observer)?;
        emit(observer, Progress::Running(Stage::VisionEncoder))?;
        let grid = patches.grid;
        let values = encoder.encode(patches.into_tensor(&device).cast(dtype), &[grid])?.remove(0).values;
        Ok(ImageEmbeds::new(values, grid)?)
    }

    /// Draws latents from embeddings.
    pub(crate) fn denoise(
        &self,
        embeds: &ImageEmbeds,
        with: DrawWith<'_>,
        size: LatentSize,
        options: &DrawOptions,
        observer: &mut dyn Observer,
    ) -> Result<Tensor<4>, Error> {
        let denoise = options.denoise();
        let pooled = self.empty_prompt(observer)?;
        let negative = match denoise.uses_negative_branch() {
            true => Some(self.negative_prompt(&options.negative_prompt, observer)?),
            false => None,
        };
        let (device, dtype) = (self.device.clone(), self.compute_dtype);
        let start = options.start.as_ref().map(|start| self.start(start, size, options, observer)).transpose()?;
        let embeds = self.adopt(embeds)?;
        let noise = match &options.noise {
            Noise::Latents(latents) => Noise::Latents(adopt(latents, &device, dtype)?),
            seed @ Noise::Seed(_) => seed.clone(),
        };
        let (generation, editing);
        let (conditioning, dit, stage) = match with {
            DrawWith::GenerationDecoder => {
                generation = self.generation_decoder(observer)?;
                let decoder = &*generation;
                (decoder.condition(&embeds)?, &decoder.dit, Stage::GenerationDecoder)
            }
            DrawWith::EditingDecoder { reference } => {
                let reference = reference.map(|reference| self.adopt(reference)).transpose()?;
                editing = self.editing_decoder(observer)?;
                let decoder = &*editing;
                (decoder.condition(&embeds, reference.as_ref(), size)?, &decoder.dit, Stage::EditingDecoder)
            }
        };
        emit(observer, Progress::Running(stage))?;
        let branches = Branches { positive: Branch { conditioning, pooled }, negative };
        let denoiser = Denoiser::new(dit, branches, size, &denoise)?;
        let noise = noise.into_latents(dit.latent_channels(), size, dtype, &device)?;
        let mut state = denoiser.start(noise, start)?;
        let flow = denoiser.run(&mut state, &mut |event| {
            let (done, total, passes) = (event.step, event.num_steps, event.skipped_passes);
            if passes > 0 {
                observer.hear(Progress::StepSkipped { step: done, passes })?;
            }
            observer.hear(Progress::Step { done, total })
        });
        match flow {
            ControlFlow::Continue(()) => Ok(state.latents),
            ControlFlow::Break(()) => Err(Error::Cancelled),
        }
    }

    /// Latents of what a picture starts from.
    fn start(
        &self,
        start: &Start,
        size: LatentSize,
        options: &DrawOptions,
        observer: &mut dyn Observer,
    ) -> Result<Tensor<4>, Error> {
        let image = match start {
            Start::Latents(latents) => return adopt(latents, &self.device, self.compute_dtype),
            Start::Image(image) => image,
        };
        let (height, width) = size.pixels();
        let pixels = TensorData::new(decoder_image(image, width, height)?, [1, 3, height, width]);
        let pixels = Tensor::from_data(pixels, (&self.device, DType::from(self.compute_dtype)));
        let autoencoder = self.autoencoder(observer)?;
        emit(observer, Progress::Running(Stage::Autoencoder))?;
        Ok(autoencoder.encode(pixels, options.tiled.then(Tiling::default)))
    }

    /// Pixels of latents, truncated to 8 bits as in the original.
    pub(crate) fn decode(&self, latents: Tensor<4>, tiled: bool, observer: &mut dyn Observer) -> Result<Image, Error> {
        let (height, width) = LatentSize::of(&latents).pixels();
        let autoencoder = self.autoencoder(observer)?;
        emit(observer, Progress::Running(Stage::Autoencoder))?;
        let decoded = autoencoder.decode(latents, tiled.then(Tiling::default));
        Ok(Image::from_decoded(&read(decoded)?, height, width)?)
    }

    /// Pooled vector of the empty prompt, which the original gives to every positive branch.
    fn empty_prompt(&self, observer: &mut dyn Observer) -> Result<Tensor<2>, Error> {
        if let Some(pooled) = &*lock(&self.empty_prompt) {
            return Ok(pooled.clone());
        }
        let pooled = self.clip("", observer)?;
        Ok(lock(&self.empty_prompt).insert(pooled).clone())
    }

    /// What a negative prompt is to the transformer; the latest one is kept.
    fn negative_prompt(&self, prompt: &str, observer: &mut dyn Observer) -> Result<Branch, Error> {
        if let Some((kept, branch)) = &*lock(&self.negative_prompt)
            && kept == prompt
        {
            return Ok(branch.clone());
        }
        let pooled = if prompt.is_empty() { self.empty_prompt(observer)? } else { self.clip(prompt, observer)? };
        let conditioning = Conditioning::without_positions(self.t5(prompt, observer)?);
        let branch = Branch { conditioning, pooled };
        *lock(&self.negative_prompt) = Some((prompt.to_string(), branch.clone()));
        Ok(branch)
    }

    fn clip(&self, prompt: &str, observer: &mut dyn Observer) -> Result<Tensor<2>, Error> {
        let config = self.files.clip_config()?;
        let ids = match prompt.is_empty() {
            true => clip_empty_ids(config.vocab_size, config.max_position_embeddings),
            false => ClipTokenizer::open(self.files.clip_tokenizer()?)?.encode_padded(prompt)?,
        };
        let _turn = self.turn();
        self.announce(Stage::TextEncoders, observer)?;
        let clip = self.arrived(self.files.load_clip(&self.device, &self.unquantized())?)?;
        Ok(clip.pooled(&ids, self.compute_dtype)?)
    }

    fn t5(&self, prompt: &str, observer: &mut dyn Observer) -> Result<Tensor<3>, Error> {
        self.files.text_encoder_2()?;
        let ids = match prompt.is_empty() {
            true => t5_empty_ids(T5_LEN),
            false => T5Tokenizer::open(self.files.t5_tokenizer()?)?.encode_padded(prompt)?,
        };
        let _turn = self.turn();
        self.announce(Stage::TextEncoders, observer)?;
        let t5 = self.arrived(self.files.load_t5(&self.device, &self.unquantized())?)?;
        Ok(t5.encode(&ids, self.compute_dtype)?)
    }
}

/// Values made anywhere, on this device and in this dtype; from elsewhere they go through the memory of the host, because a
/// device need not have their dtype.
fn adopt<const D: usize>(values: &Tensor<D>, device: &Device, dtype: FloatDType) -> Result<Tensor<D>, Error> {
    let from = values.device();
    if from == *device && from.is_autodiff() == device.is_autodiff() {
        return Ok(values.clone().cast(dtype));
    }
    Ok(Tensor::from_data(read_data(values.clone())?, (device, DType::from(dtype))))
}

impl DrawOptions {
    /// The options of the denoising loop.
    pub(crate) fn denoise(&self) -> DenoiseOptions {
        DenoiseOptions {
            num_steps: self.steps,
            cfg_scale: self.cfg_scale,
            embedded_guidance: self.embedded_guidance,
            strength: self.strength,
            tea_cache_threshold: self.tea_cache,
            tiling: self.tiled.then(Tiling::default),
        }
    }
}
