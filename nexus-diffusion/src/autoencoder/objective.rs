//! What an autoencoder is trained for before any decoder: pictures -> reconstruction losses and a mild prior.

use burn::tensor::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::Autoencoder;

/// Bounds of the logarithm of the variance, for exponentials that stay finite.
const LOG_VARIANCE: std::ops::RangeInclusive<f32> = -30.0..=20.0;

/// Weights of the losses of an autoencoder that is trained from nothing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AutoencoderObjective {
    /// Factor of the loss of differences between neighbouring pixels, which keeps edges sharp.
    pub gradient_weight: f64,
    /// Factor of the divergence of the latents from a standard normal distribution.
    pub kl_weight: f64,
}

impl Default for AutoencoderObjective {
    fn default() -> Self {
        Self { gradient_weight: 1.0, kl_weight: 1e-4 }
    }
}

/// Losses of a batch of pictures, in f32.
#[derive(Debug, Clone)]
pub struct AutoencoderLoss {
    /// `reconstruction + gradient_weight * gradient + kl_weight * kl`.
    pub total: Tensor<1>,
    /// Mean absolute plus mean squared error of the pixels.
    pub reconstruction: Tensor<1>,
    /// Mean absolute error of the differences between pixels and their right and lower neighbours.
    pub gradient: Tensor<1>,
    /// Mean divergence of a latent number from the standard normal distribution.
    pub kl: Tensor<1>,
}

impl AutoencoderObjective {
    /// The losses of pictures that are encoded, sampled with the given noise, and drawn again.
    ///
    /// # Shapes
    /// - `picture`: `[batch, 3, height, width]` in -1..1, sides multiples of 8 pixels
    /// - `noise`: `[batch, z_channels, height / 8, width / 8]`, standard normal; zeros train the mean alone
    ///
    /// # Panics
    /// If the noise is not of that shape.
    pub fn loss(&self, autoencoder: &Autoencoder, picture: Tensor<4>, noise: Tensor<4>) -> AutoencoderLoss {
        let (mean, log_variance) = autoencoder.moments(picture.clone());
        assert_eq!(noise.dims(), mean.dims(), "noise and latents");
        let log_variance = log_variance.clamp(*LOG_VARIANCE.start(), *LOG_VARIANCE.end());
        let sampled = mean.clone() + (log_variance.clone() * 0.5).exp() * noise;
        let drawn = autoencoder.decoder.forward(sampled).cast(DType::F32);
        let picture = picture.cast(DType::F32);

        let difference = drawn - picture;
        let reconstruction = difference.clone().abs().mean() + difference.clone().square().mean();
        let gradient = neighbour_differences(difference.clone(), 2).abs().mean()
            + neighbour_differences(difference, 3).abs().mean();
        let (mean, log_variance) = (mean.cast(DType::F32), log_variance.cast(DType::F32));
        let kl = (mean.square() + log_variance.clone().exp() - log_variance - 1.0).mean() * 0.5;
        let total = reconstruction.clone() + gradient.clone() * self.gradient_weight + kl.clone() * self.kl_weight;
        AutoencoderLoss { total, reconstruction, gradient, kl }
    }
}

/// Each pixel's next neighbour along a side, minus the pixel.
fn neighbour_differences(picture: Tensor<4>, side: usize) -> Tensor<4> {
    let pairs = picture.dims()[side] - 1;
    picture.clone().narrow(side, 1, pairs) - picture.narrow(side, 0, pairs)
}
