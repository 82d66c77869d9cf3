//! Drawing for sheets of samples: image embeddings -> pictures, by parts that are not trained.

use burn::tensor::{DType, Device, FloatDType, Tensor};
use nexus::ModelFiles;
use nexus_ar::{ArModel, ArObjective, TrainingBatch, TrainingSample};
use nexus_checkpoint::LoadOptions;
use nexus_core::{GridThw, ImageEmbeds};
use nexus_data::{Image, clip_empty_ids};
use nexus_diffusion::{
    Autoencoder, Branch, Branches, Conditioning, DenoiseOptions, Denoiser, GenerationDecoder, LatentSize,
    transformer::Dit,
};

use crate::{DecoderSettings, TrainError, optim::Draws, sheet};

/// Steps of the pictures.
const STEPS: usize = 12;

/// Pictures on a sheet of samples.
pub(crate) const SAMPLE_PICTURES: usize = 8;

/// The parts that draw what the language model predicts, on the plain device.
pub(crate) struct Drawing {
    decoder: GenerationDecoder,
    autoencoder: Autoencoder,
    pooled: Tensor<2>,
}

impl Drawing {
    /// The generation decoder and what it needs.
    pub(crate) fn open(files: &ModelFiles, device: &Device, options: &LoadOptions) -> Result<Self, TrainError> {
        Ok(Self {
            decoder: files.load_generation_decoder(device, options)?,
            autoencoder: files.load_autoencoder(device, options)?,
            pooled: empty_prompt(files, device, options)?,
        })
    }

    /// A sheet of the answers of samples, which have some: drawn from their true embeddings, and from those that a
    /// model, on the plain device, predicts.
    pub(crate) fn sheet(
        &self,
        ar: &ArModel,
        prefill: bool,
        settings: &DecoderSettings,
        samples: &[TrainingSample],
    ) -> Result<Image, TrainError> {
        let samples = plain(samples)?;
        let truth: Vec<Tensor<3>> =
            samples.iter().flat_map(|sample| &sample.targets).map(|target| target.values.clone()).collect();
        let batch = TrainingBatch::new(samples, ar.config())?;
        let objective = ArObjective { prefill, ..ArObjective::default() };
        let predicted = objective.predict_answers(ar, &batch, FloatDType::F32)?;
        sheet::rows(&[self.draw(truth, settings)?, self.draw(predicted, settings)?])
    }

    /// # Shapes
    /// - `answers`: `[1, 81, hidden]` each
    /// - returns: `[pictures, 3, picture_px, picture_px]` of the first ones, -1 is black and 1 is white
    fn draw(&self, mut answers: Vec<Tensor<3>>, settings: &DecoderSettings) -> Result<Tensor<4>, TrainError> {
        answers.truncate(SAMPLE_PICTURES);
        let embeds = ImageEmbeds::new(Tensor::cat(answers, 0), GridThw::GENERATED)?;
        let size = LatentSize::from_pixels(settings.picture_px, settings.picture_px)?;
        let conditioning = self.decoder.condition(&embeds)?;
        let guidance = settings.embedded_guidance;
        let latents = sample_latents(&self.decoder.dit, conditioning, &self.pooled, size, guidance)?;
        Ok(self.autoencoder.decode(latents, None))
    }
}

/// Samples without their gradients and in f32, as the frozen parts take them.
fn plain(samples: &[TrainingSample]) -> Result<Vec<TrainingSample>, TrainError> {
    let image = |image: &ImageEmbeds| ImageEmbeds::new(image.values.clone().inner().cast(DType::F32), image.grid);
    let images = |images: &[ImageEmbeds]| images.iter().map(image).collect::<Result<Vec<_>, _>>();
    let plain = |sample: &TrainingSample| {
        let (inputs, targets) = (images(&sample.inputs)?, images(&sample.targets)?);
        Ok(TrainingSample { inputs, targets, ..sample.clone() })
    };
    samples.iter().map(plain).collect()
}

/// Latents of pictures without guidance by a negative prompt, from noise that is always the same.
///
/// # Shapes
/// - `conditioning.embeds`: `[pictures, tokens, context]`
/// - `pooled`: `[1, pooled]`
/// - returns: `[pictures, channels, height, width]`
pub(crate) fn sample_latents(
    dit: &Dit,
    conditioning: Conditioning,
    pooled: &Tensor<2>,
    size: LatentSize,
    guidance: f64,
) -> Result<Tensor<4>, TrainError> {
    let [pictures, _, _] = conditioning.embeds.dims();
    let options =
        DenoiseOptions { num_steps: STEPS, cfg_scale: 1.0, embedded_guidance: guidance, ..DenoiseOptions::default() };
    let positive = Branch { conditioning, pooled: pooled.clone().repeat_dim(0, pictures) };
    let denoiser = Denoiser::new(dit, Branches { positive, negative: None }, size, &options)?;
    let shape = [pictures, dit.latent_channels(), size.height, size.width];
    let mut state = denoiser.start(Draws::new(0, "samples", 0).normal(shape, &pooled.device()), None)?;
    let _ = denoiser.run(&mut state, &mut |_| std::ops::ControlFlow::Continue(()));
    Ok(state.latents)
}

/// What CLIP makes of no text: `[1, pooled]`.
pub(crate) fn empty_prompt(
    files: &ModelFiles,
    device: &Device,
    options: &LoadOptions,
) -> Result<Tensor<2>, TrainError> {
    let (clip, config) = (files.load_clip(device, options)?, files.clip_config()?);
    let ids = clip_empty_ids(config.vocab_size, config.max_position_embeddings);
    Ok(clip.pooled(&ids, FloatDType::F32)?)
}
