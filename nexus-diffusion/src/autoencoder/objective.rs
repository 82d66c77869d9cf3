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

#[cfg(test)]
mod tests {
    use nexus_checkpoint::module_layout;
    use nexus_core::testing::{assert_close, assert_close_tensors, cpu, gradients_by_name, norm, ramp};

    use super::*;
    use crate::{config::AutoencoderConfig, weights::AUTOENCODER};

    fn autoencoder() -> Autoencoder {
        let config = AutoencoderConfig { ch: 4, num_res_blocks: 1, z_channels: 2, groups: 2, ..Default::default() };
        Autoencoder::new(&config, &cpu().autodiff())
    }

    fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
        tensor.to_data().try_into_vec_as::<f32>().unwrap()
    }

    #[test]
    fn losses_are_those_of_the_formulas() {
        let (autoencoder, picture) = (autoencoder(), ramp([2, 3, 16, 8], 1));
        let noise = ramp([2, 2, 2, 1], 2);
        let objective = AutoencoderObjective { gradient_weight: 0.5, kl_weight: 0.25 };
        let loss = objective.loss(&autoencoder, picture.clone(), noise.clone());
        let (mean, log_variance) = autoencoder.moments(picture.clone());
        let sampled: Vec<f32> = values(&mean)
            .iter()
            .zip(values(&log_variance))
            .zip(values(&noise))
            .map(|((mean, log), noise)| mean + (log / 2.0).exp() * noise)
            .collect();
        let sampled = Tensor::from_data(burn::tensor::TensorData::new(sampled, [2, 2, 2, 1]), &cpu());
        let difference = values(&(autoencoder.decoder.forward(sampled) - picture));
        let count = difference.len() as f32;
        let reconstruction = difference.iter().map(|d| d.abs() + d * d).sum::<f32>() / count;
        assert_close(&loss.reconstruction, &[reconstruction], 1e-5);
        let at = |plane: usize, y: usize, x: usize| difference[(plane * 16 + y) * 8 + x];
        let (mut down, mut right) = (0.0, 0.0);
        for plane in 0..6 {
            for y in 0..16 {
                for x in 0..8 {
                    down += if y < 15 { (at(plane, y + 1, x) - at(plane, y, x)).abs() } else { 0.0 };
                    right += if x < 7 { (at(plane, y, x + 1) - at(plane, y, x)).abs() } else { 0.0 };
                }
            }
        }
        assert_close(&loss.gradient, &[down / (6 * 15 * 8) as f32 + right / (6 * 16 * 7) as f32], 1e-5);
        let of_normal = |(mean, log): (f32, f32)| 0.5 * (mean * mean + log.exp() - 1.0 - log);
        let kl: Vec<f32> = values(&mean).into_iter().zip(values(&log_variance)).map(of_normal).collect();
        assert_close(&loss.kl, &[kl.iter().sum::<f32>() / kl.len() as f32], 1e-4);
        let [gradient, kl] = [&loss.gradient, &loss.kl].map(|part| values(part)[0]);
        assert_close(&loss.total, &[reconstruction + 0.5 * gradient + 0.25 * kl], 1e-5);
    }

    #[test]
    fn the_encoded_picture_is_the_scaled_mean() {
        let (autoencoder, picture) = (autoencoder(), ramp([1, 3, 8, 8], 3));
        let (mean, log_variance) = autoencoder.moments(picture.clone());
        assert_eq!(log_variance.dims(), [1, 2, 1, 1]);
        assert_close_tensors(&autoencoder.encode(picture, None), &((mean - 0.1159) * 0.3611), 1e-6);
    }

    #[test]
    fn gradients_reach_every_weight() {
        let autoencoder = autoencoder();
        let loss = AutoencoderObjective::default().loss(&autoencoder, ramp([1, 3, 16, 16], 1), ramp([1, 2, 2, 2], 2));
        let gradients = gradients_by_name(loss.total.backward(), &autoencoder, &AUTOENCODER);
        assert_eq!(gradients.len(), module_layout(&autoencoder, &AUTOENCODER).len());
        assert!(norm(&gradients) > 0.0);
    }
}
