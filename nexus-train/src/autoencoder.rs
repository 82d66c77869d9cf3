//! Training the autoencoder, which the original takes from FLUX: pictures -> reconstruction losses.

use std::path::Path;

use burn::{
    module::Module,
    tensor::{DType, Device, FloatDType, Tensor, TensorData},
};
use nexus_checkpoint::{WeightNames, module_layout, save_module_as};
use nexus_core::nn::Recomputation;
use nexus_data::{Image, Message, Role, decoder_image};
use nexus_diffusion::{
    Autoencoder, AutoencoderLoss, AutoencoderObjective, LatentSize,
    config::{AUTOENCODER_CONFIG_FILE, AutoencoderConfig},
    weights::AUTOENCODER,
};

use crate::{
    AutoencoderSettings, Initial, Phase, TrainError,
    optim::{Draws, initialize},
    run_dir::write_whole,
    sheet,
    training::{Losses, MASTER_WEIGHTS, MicroBatch, PartTraining},
};
use nexus::{ModelFiles, read};

/// Training of the autoencoder.
pub(crate) struct AutoencoderTraining {
    module: Autoencoder,
    device: Device,
    config: AutoencoderConfig,
    /// Whether all phases leave the latents as the model's configuration describes them.
    keeps_latents: bool,
    /// Pictures of the latest micro-batch, for the sheet of samples.
    latest: Option<Tensor<4>>,
}

/// Pictures over which scale and shift of the latents are measured.
const MEASURED_PICTURES: usize = 64;

impl AutoencoderTraining {
    pub(crate) fn open(
        initial: &Initial,
        phases: &[Phase<AutoencoderSettings>],
        model: &Path,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let files = ModelFiles::find(model)?;
        let config = AutoencoderConfig::read_in(&files.flux)?;
        let device = device.clone().autodiff();
        let module = match initial {
            Initial::Random(weights) => initialize(Autoencoder::new(&config, &device), &AUTOENCODER, weights),
            Initial::Checkpoint => files.load_autoencoder(&device, &MASTER_WEIGHTS)?,
        };
        let layout = module_layout(&module, &AUTOENCODER);
        let mut encoder = layout.iter().map(|(name, _)| name).filter(|name| name.starts_with("encoder."));
        let keeps_latents = !matches!(initial, Initial::Random(_))
            && encoder.all(|name| phases.iter().all(|phase| phase.freezes(name)));
        Ok(Self { module, device, config, keeps_latents, latest: None })
    }

    /// Mean and variance of the latents before they are shifted and scaled, of the first pictures that can be used.
    fn measure(&self, module: &Autoencoder, seen: MicroBatch<'_, AutoencoderSettings>) -> Result<[f64; 2], TrainError> {
        let side = seen.phase.settings.picture_px;
        let samples = seen.samples.filter_map(|number| seen.feed.read(number).ok());
        let pictures = samples.filter_map(|sample| picture(&sample.messages, side).ok());
        let latents = pictures.take(MEASURED_PICTURES).map(|pixels| {
            // One by one: pictures may be so large that a batch has just one of them.
            let pixels = tensor(pixels, [1, 3, side, side], &self.device.clone().inner());
            module.encode(pixels, None)
        });
        let latents: Vec<Tensor<4>> = latents.collect();
        if latents.is_empty() {
            return Err(seen.feed.no_samples(seen.phase));
        }
        let means = Tensor::cat(latents, 0) / self.config.scale_factor + self.config.shift_factor;
        let (variance, mean) = means.reshape([-1]).var_mean_bias(0);
        let number = |value: Tensor<1>| read(value).map(|values| f64::from(values[0]));
        Ok([number(mean)?, number(variance)?])
    }
}

impl PartTraining for AutoencoderTraining {
    type Module = Autoencoder;
    /// Pictures, and noise for their latents.
    type Batch = (Tensor<4>, Tensor<4>);
    type Settings = AutoencoderSettings;

    fn names(&self) -> WeightNames {
        AUTOENCODER
    }

    fn module(&self) -> Result<Autoencoder, TrainError> {
        Ok(self.module.clone())
    }

    fn prepare(&mut self, batch: MicroBatch<'_, AutoencoderSettings>) -> Result<Option<Self::Batch>, TrainError> {
        let MicroBatch { phase, feed, seed, samples, .. } = batch;
        let side = phase.settings.picture_px;
        let (mut pictures, mut noise) = (Vec::new(), Vec::new());
        let size = LatentSize::from_pixels(side, side)?;
        for number in samples {
            let Some(sample) = feed.sample(number)? else { continue };
            match picture(&sample.messages, side) {
                Ok(values) => pictures.extend(values),
                Err(reason) => {
                    feed.reject(number, &reason)?;
                    continue;
                }
            }
            let count = self.config.z_channels * size.height * size.width;
            noise.extend(Draws::new(seed, "latents", number).normal_values(count));
        }
        let count = pictures.len() / (3 * side * side);
        if count == 0 {
            return Ok(None);
        }
        let dtype: FloatDType = phase.compute_dtype.into();
        let pictures = tensor(pictures, [count, 3, side, side], &self.device).cast(dtype);
        let noise = tensor(noise, [count, self.config.z_channels, size.height, size.width], &self.device).cast(dtype);
        self.latest = Some(pictures.clone().inner());
        Ok(Some((pictures, noise)))
    }

    fn loss<'a>(
        &self,
        module: &'a Autoencoder,
        phase: &Phase<AutoencoderSettings>,
        (pictures, noise): Self::Batch,
        _: &mut Recomputation<'a>,
    ) -> Result<Losses, TrainError> {
        let AutoencoderSettings { gradient_weight, kl_weight, .. } = phase.settings;
        let objective = AutoencoderObjective { gradient_weight, kl_weight };
        let AutoencoderLoss { total, reconstruction, gradient, kl } = objective.loss(module, pictures, noise);
        Ok(Losses { total, parts: vec![("reconstruction", reconstruction), ("gradient", gradient), ("kl", kl)] })
    }

    fn export(
        &self,
        module: Autoencoder,
        dir: &Path,
        seen: MicroBatch<'_, AutoencoderSettings>,
    ) -> Result<(), TrainError> {
        save_module_as(&module, &AUTOENCODER, &dir.join("ae.safetensors"), FloatDType::BF16)?;
        let mut config = self.config.clone();
        if !self.keeps_latents {
            // Latents of mean 0 and variance 1 are what flow matching is made for.
            let [mean, variance] = self.measure(&module.valid(), seen)?;
            (config.shift_factor, config.scale_factor) = (mean, 1.0 / variance.max(1e-12).sqrt());
        }
        let path = dir.join(AUTOENCODER_CONFIG_FILE);
        let json = serde_json::to_vec_pretty(&config).map_err(|error| TrainError::file(&path)(error.into()))?;
        write_whole(&path, &json)
    }

    fn samples(&mut self, module: &Autoencoder, _: &Phase<AutoencoderSettings>) -> Result<Option<Image>, TrainError> {
        let Some(pictures) = self.latest.clone() else { return Ok(None) };
        let shown = pictures.dims()[0].min(8);
        let pictures = Tensor::from_inner(pictures.narrow(0, 0, shown));
        let drawn = module.decode(module.encode(pictures.clone(), None), None);
        Ok(Some(sheet::rows(&[pictures.inner(), drawn.inner()])?))
    }
}

/// Values of the last image of a conversation, or why there are none.
fn picture(messages: &[Message], side: usize) -> Result<Vec<f32>, String> {
    let image = images(messages).pop().ok_or("no image")?;
    decoder_image(&image, side, side).map_err(|error| error.to_string())
}

/// Images of a conversation, in order.
pub(crate) fn images(messages: &[Message]) -> Vec<Image> {
    messages.iter().flat_map(Message::images).cloned().collect()
}

/// The last image that the model is to draw, and the last one before it.
pub(crate) fn answer_and_source(messages: &[Message]) -> Option<(Image, Option<Image>)> {
    let answer =
        messages.iter().rposition(|message| message.role == Role::Assistant && message.images().count() > 0)?;
    let image = messages[answer].images().last()?.clone();
    Some((image, images(&messages[..answer]).pop()))
}

pub(crate) fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}
