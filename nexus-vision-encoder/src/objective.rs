//! What a vision encoder is trained for from nothing: embeddings -> the colours and the place that they must tell.
//!
//! Every merged token has to hold a picture of its own 28x28 pixels at half the size and its place in the whole. The
//! head that reads them is thrown away afterwards.

use burn::{
    module::Module,
    tensor::{DType, Device, Tensor, TensorData},
};
use nexus_core::{GridThw, MERGE_SIZE, PATCH_SIZE_PX, nn::Linear};
use nexus_kernels::gelu;
use serde::{Deserialize, Serialize};

/// Colour channels of a patch.
const CHANNELS: usize = 3;

/// Frames of a patch, which are equal for a picture.
const FRAMES: usize = 2;

/// Side of the mean of 2x2 pixels of a patch.
const HALF_PX: usize = PATCH_SIZE_PX / 2;

/// Numbers of a token's picture at half the size: 3 channels of 14x14.
const APPEARANCE: usize = CHANNELS * MERGE_SIZE * HALF_PX * MERGE_SIZE * HALF_PX;

/// Reads the colours and the place of tokens from their embeddings.
#[derive(Module, Debug)]
pub struct AppearanceHead {
    /// `[mid, hidden]`.
    pub fc1: Linear,
    /// `[588, mid]`.
    pub fc2: Linear,
    /// `[2, hidden]`: row and column.
    pub place: Linear,
}

impl AppearanceHead {
    /// A lazily initialised head for embeddings of width `hidden`.
    pub fn new(hidden: usize, mid: usize, device: &Device) -> Self {
        Self {
            fc1: Linear::new(hidden, mid, device),
            fc2: Linear::new(mid, APPEARANCE, device),
            place: Linear::new(hidden, 2, device),
        }
    }

    /// # Shapes
    /// - `embeds`: `[tokens, hidden]`
    /// - returns: colours `[tokens, 588]`, by channel, row, column of 14x14 pixels, normalised as the patches; and
    ///   places `[tokens, 2]`, row and column in 0..1 of the picture's sides
    pub fn forward(&self, embeds: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        let colours = self.fc2.forward(gelu(self.fc1.forward(embeds.clone())));
        (colours, self.place.forward(embeds))
    }
}

/// Weights of the losses beside that of the colours.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AppearanceObjective {
    /// Factor of the loss of places.
    pub position_weight: f64,
    /// Factor of the loss of the embeddings' size.
    pub size_weight: f64,
}

impl Default for AppearanceObjective {
    fn default() -> Self {
        Self { position_weight: 1.0, size_weight: 0.01 }
    }
}

/// What [`AppearanceObjective::loss`] takes.
#[derive(Debug, Clone)]
pub struct AppearanceInput<'a> {
    /// What [`VisionEncoder::forward`](crate::VisionEncoder::forward) makes of the patches: `[1, tokens, hidden]`.
    pub embeds: Tensor<3>,
    /// The patches themselves: `[4 * tokens, 1176]`.
    pub patches: Tensor<2>,
    /// Grids of the pictures.
    pub grids: &'a [GridThw],
    /// Added to the embeddings that the head reads, so that embeddings near each other must look alike:
    /// `[1, tokens, hidden]`.
    pub noise: Tensor<3>,
}

/// Losses of a batch of pictures, in f32.
#[derive(Debug, Clone)]
pub struct AppearanceLoss {
    /// `pixels + position_weight * position + size_weight * size`.
    pub total: Tensor<1>,
    /// Mean squared error of the colours, in normalised units.
    pub pixels: Tensor<1>,
    /// Mean squared error of row and column, in units of the picture's sides.
    pub position: Tensor<1>,
    /// Mean over the tokens of the squared distance of the embedding's mean square from one.
    pub size: Tensor<1>,
}

impl AppearanceObjective {
    /// The losses of pictures; gradients reach the head and the encoder.
    ///
    /// # Panics
    /// If embeddings, patches, grids and noise do not belong together.
    pub fn loss(&self, head: &AppearanceHead, input: AppearanceInput<'_>) -> AppearanceLoss {
        let AppearanceInput { embeds, patches, grids, noise } = input;
        assert_eq!(noise.dims(), embeds.dims(), "noise and embeddings");
        let embeds = embeds.squeeze_dim::<2>(0);
        let (colours, places) = head.forward(embeds.clone() + noise.squeeze_dim(0));
        let error = |found: Tensor<2>, expected: Tensor<2>| (found.cast(DType::F32) - expected).square().mean();
        let pixels = error(colours, appearance(patches));
        let position = error(places, token_places(grids, &embeds.device()));
        let size = (embeds.cast(DType::F32).square().mean_dim(1) - 1.0).square().mean();
        let total = pixels.clone() + position.clone() * self.position_weight + size.clone() * self.size_weight;
        AppearanceLoss { total, pixels, position, size }
    }
}

/// The pictures of tokens at half the size: each number is the mean of 2x2 pixels.
///
/// # Shapes
/// - `patches`: `[4 * tokens, 1176]`, as `nexus-data` orders them
/// - returns: f32 `[tokens, 588]`, by channel, row, column
///
/// # Panics
/// If the patches are not four of 1176 numbers per token.
pub fn appearance(patches: Tensor<2>) -> Tensor<2> {
    let [patch_count, _] = patches.dims();
    let tokens = patch_count / (MERGE_SIZE * MERGE_SIZE);
    let halves = patches
        .cast(DType::F32)
        .reshape([patch_count * CHANNELS, FRAMES, HALF_PX, 2, HALF_PX, 2])
        .narrow(1, 0, 1)
        .mean_dim(5)
        .mean_dim(3);
    halves
        .reshape([tokens, MERGE_SIZE, MERGE_SIZE, CHANNELS, HALF_PX, HALF_PX])
        .permute([0, 3, 1, 4, 2, 5])
        .reshape([tokens, APPEARANCE])
}

/// Row and column of every token's middle, in units of the picture's sides.
///
/// # Shapes
/// f32 `[tokens, 2]`, tokens of all pictures in raster order
fn token_places(grids: &[GridThw], device: &Device) -> Tensor<2> {
    let middle = |index: usize, count: usize| (index as f32 + 0.5) / count as f32;
    let places: Vec<f32> = grids
        .iter()
        .flat_map(|grid| {
            let (rows, cols) = (grid.merged_h(), grid.merged_w());
            (0..grid.num_merged_tokens())
                .flat_map(move |token| [middle(token / cols % rows, rows), middle(token % cols, cols)])
        })
        .collect();
    let tokens = places.len() / 2;
    Tensor::from_data(TensorData::new(places, [tokens, 2]), (device, DType::F32))
}

#[cfg(test)]
mod tests {
    use burn::tensor::Int;
    use nexus_checkpoint::{WeightNames, module_layout};
    use nexus_core::testing::{assert_close, assert_close_tensors, cpu, gradients_by_name, norm, ramp};

    use super::*;
    use crate::{NAMES, VisionConfig, VisionEncoder};

    fn value(tensor: &Tensor<1>) -> f32 {
        tensor.to_data().try_into_vec_as::<f32>().unwrap()[0]
    }

    fn tiny() -> VisionConfig {
        VisionConfig {
            depth: 2,
            hidden_size: 16,
            intermediate_size: 24,
            num_heads: 2,
            window_size: 56,
            out_hidden_size: 12,
            fullatt_block_indexes: vec![1],
            ..VisionConfig::default()
        }
    }

    #[test]
    fn a_token_is_its_square_of_pixels_at_half_the_size() {
        // One cell: the value of a pixel of channel c at (y, x) of its 28x28 is 1000 c + y + x / 100.
        let patches: Vec<f32> = (0..4)
            .flat_map(|patch| {
                (0..CHANNELS * FRAMES * PATCH_SIZE_PX * PATCH_SIZE_PX).map(move |i| {
                    let (channel, pixel) = (i / (FRAMES * 196), i % 196);
                    let (y, x) = (patch / 2 * 14 + pixel / 14, patch % 2 * 14 + pixel % 14);
                    (1000 * channel + y) as f32 + x as f32 / 100.0
                })
            })
            .collect();
        let patches = Tensor::from_data(TensorData::new(patches, [4, 1176]), &cpu());
        let expected: Vec<f32> = (0..APPEARANCE)
            .map(|i| {
                let (channel, y, x) = (i / 196, i % 196 / 14, i % 14);
                (1000 * channel + 2 * y) as f32 + 0.5 + (2.0 * x as f32 + 0.5) / 100.0
            })
            .collect();
        assert_close(&appearance(patches), &expected, 1e-6);
    }

    #[test]
    fn places_are_the_middles_of_tokens() {
        let grids = [GridThw::new(1, 4, 2).unwrap(), GridThw::new(1, 2, 8).unwrap()];
        let expected = [0.25, 0.5, 0.75, 0.5, 0.5, 0.125, 0.5, 0.375, 0.5, 0.625, 0.5, 0.875];
        assert_close(&token_places(&grids, &cpu()), &expected, 1e-6);
    }

    #[test]
    fn a_head_that_knows_everything_pays_for_the_size_alone() {
        let grids = [GridThw::new(1, 2, 2).unwrap()];
        let mut head = AppearanceHead::new(3, 4, &cpu());
        head.fc2.weight = head.fc2.weight.map(|weight| weight * 0.0);
        head.place.weight = head.place.weight.map(|weight| weight * 0.0);
        let patches = ramp([4, 1176], 1);
        head.fc2.bias = head.fc2.bias.map(|bias| bias.map(|_| appearance(patches.clone()).squeeze_dim(0)));
        head.place.bias = head.place.bias.map(|bias| bias.map(|bias| bias * 0.0 + 0.5));
        let embeds = Tensor::from_data([[[1.0, 2.0, 2.0]]], &cpu());
        let input = AppearanceInput { noise: embeds.zeros_like(), embeds, patches, grids: &grids };
        let loss = AppearanceObjective { position_weight: 5.0, size_weight: 0.1 }.loss(&head, input);
        assert_eq!((value(&loss.pixels), value(&loss.position)), (0.0, 0.0));
        assert_close(&loss.size, &[4.0], 1e-6);
        assert_close(&loss.total, &[0.4], 1e-6);
    }

    #[test]
    fn gradients_reach_head_and_encoder_but_not_what_is_frozen() {
        let grids = [GridThw::new(1, 6, 10).unwrap(), GridThw::new(1, 4, 4).unwrap()];
        let device = cpu().autodiff();
        let mut encoder = VisionEncoder::new(&tiny(), &device);
        encoder.patch_embed = encoder.patch_embed.clone().no_grad();
        let head = AppearanceHead::new(12, 10, &device);
        let patches = ramp([76, 1176], 2);
        let embeds = encoder.forward(patches.clone(), &grids);
        let noise = ramp([1, 19, 12], 3) * 0.1;
        let input = AppearanceInput { embeds, patches, grids: &grids, noise };
        let loss = AppearanceObjective::default().loss(&head, input.clone());
        let gradients = gradients_by_name(loss.total.backward(), &encoder, &NAMES);
        assert_eq!(gradients.len(), module_layout(&encoder, &NAMES).len() - 1);
        assert!(norm(&gradients) > 0.0);

        let again = encoder.forward(input.patches.clone(), &grids);
        let names = WeightNames::default();
        let loss = AppearanceObjective::default().loss(&head, AppearanceInput { embeds: again, ..input.clone() });
        assert_eq!(gradients_by_name(loss.total.backward(), &head, &names).len(), 6);
    }

    #[test]
    fn many_pictures_with_gradients_are_what_each_is_alone() {
        let grids = [[6, 10], [4, 4], [6, 10], [2, 6]].map(|[h, w]| GridThw::new(1, h, w).unwrap());
        let encoder = VisionEncoder::new(&tiny(), &cpu().autodiff());
        let patches = ramp([148, 1176], 4);
        let together = encoder.forward(patches.clone(), &grids);
        let mut alone = vec![];
        let mut start = 0;
        for grid in grids {
            let rows = Tensor::<1, Int>::arange(start..start + grid.num_patches() as i64, &cpu());
            alone.push(encoder.forward(patches.clone().select(0, rows), &[grid]));
            start += grid.num_patches() as i64;
        }
        assert_close_tensors(&together, &Tensor::cat(alone, 1), 1e-5);
    }
}
