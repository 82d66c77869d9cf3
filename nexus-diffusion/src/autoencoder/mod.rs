//! The FLUX autoencoder: pictures in -1..1 <-> latents with one position for 8x8 pixels.

mod blocks;
mod objective;
mod paths;

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};

use nexus_checkpoint::{Checkpoint, LoadOptions, load_module};

pub use blocks::{AttentionBlock, Middle, Resample, ResnetBlock};
pub use objective::{AutoencoderLoss, AutoencoderObjective};
pub use paths::{DownLevel, DownPath, UpLevel, UpPath};

use crate::{
    DiffusionError,
    config::AutoencoderConfig,
    latents::{LATENT_PX, LatentSize},
    tiling::{Ramp, Tiling, tiled},
    weights::{AUTOENCODER, notice_flux_licence},
};

/// Encoder and decoder with the names of `ae.safetensors`.
///
/// Source: FLUX (autoencoder.py, `AutoEncoder`).
#[derive(Module, Debug)]
pub struct Autoencoder {
    /// Picture to moments.
    pub encoder: DownPath,
    /// Latents to picture.
    pub decoder: UpPath,
    z_channels: usize,
    scale_factor: f64,
    shift_factor: f64,
}

impl Autoencoder {
    /// A lazily initialised autoencoder.
    ///
    /// # Panics
    /// If the configuration is incoherent; see [`AutoencoderConfig::validate`].
    pub fn new(config: &AutoencoderConfig, device: &Device) -> Self {
        assert_eq!(config.downscale(), LATENT_PX, "pixels of a latent position");
        Self {
            encoder: DownPath::new(config, device),
            decoder: UpPath::new(config, device),
            z_channels: config.z_channels,
            scale_factor: config.scale_factor,
            shift_factor: config.shift_factor,
        }
    }

    /// Loads `ae.safetensors`.
    ///
    /// # Errors
    /// [`DiffusionError::Config`] if the configuration is incoherent, [`DiffusionError::Checkpoint`] if the weights do
    /// not fit it.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &AutoencoderConfig,
        device: &Device,
        options: &LoadOptions,
    ) -> Result<Self, DiffusionError> {
        config.validate()?;
        notice_flux_licence(config);
        Ok(load_module(Self::new(config, device), checkpoint, &AUTOENCODER, options)?)
    }

    /// Encodes a picture: the mean of the posterior, which is never sampled, scaled as the transformer expects it.
    ///
    /// # Shapes
    /// - `image`: `[batch, 3, height, width]` in -1..1, sides multiples of 8 pixels
    /// - returns: `[batch, z_channels, height / 8, width / 8]`
    ///
    /// # Panics
    /// If a side is not a multiple of 8 pixels.
    pub fn encode(&self, image: Tensor<4>, tiling: Option<Tiling>) -> Tensor<4> {
        let [_, _, height, width] = image.dims();
        assert!(height.is_multiple_of(LATENT_PX) && width.is_multiple_of(LATENT_PX), "an image of {height}x{width}");
        match tiling {
            None => self.encode_whole(image),
            Some(tiling) => {
                let picture = LatentSize { height: height / LATENT_PX, width: width / LATENT_PX };
                tiled(picture, tiling, Ramp::AllSides, 1, |_, tile| self.encode_whole(tile.of(&image, LATENT_PX)))
            }
        }
    }

    /// Draws latents.
    ///
    /// # Shapes
    /// - `latents`: `[batch, z_channels, height, width]`
    /// - returns: `[batch, 3, 8 * height, 8 * width]`, about -1..1 but not clamped
    pub fn decode(&self, latents: Tensor<4>, tiling: Option<Tiling>) -> Tensor<4> {
        match tiling {
            None => self.decode_whole(latents),
            Some(tiling) => tiled(LatentSize::of(&latents), tiling, Ramp::AllSides, LATENT_PX, |_, tile| {
                self.decode_whole(tile.of(&latents, 1))
            }),
        }
    }

    /// Both halves of the encoder's output: mean and logarithm of the variance of each latent number, not scaled as
    /// [`Autoencoder::encode`] scales the mean.
    ///
    /// # Shapes
    /// - `image`: `[batch, 3, height, width]` in -1..1, sides multiples of 8 pixels
    /// - returns: two of `[batch, z_channels, height / 8, width / 8]`
    pub fn moments(&self, image: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let moments = self.encoder.forward(image);
        let half = |part: usize| moments.clone().narrow(1, part * self.z_channels, self.z_channels);
        (half(0), half(1))
    }

    fn encode_whole(&self, image: Tensor<4>) -> Tensor<4> {
        let (mean, _) = self.moments(image);
        (mean - self.shift_factor) * self.scale_factor
    }

    fn decode_whole(&self, latents: Tensor<4>) -> Tensor<4> {
        self.decoder.forward(latents / self.scale_factor + self.shift_factor)
    }
}
