//! Latents: sizes in pixels -> sizes in latent positions, and latents `[b, c, h, w]` <-> tokens of 2x2 positions.

use burn::tensor::Tensor;

use crate::DiffusionError;

/// Side of one latent position, in pixels.
pub const LATENT_PX: usize = 8;

/// Pictures are drawn in multiples of this many pixels: two latent positions, one token of the transformer.
pub const SIZE_MULTIPLE_PX: usize = 16;

/// The next multiple of 16 pixels, the smallest size that can be drawn and holds `side`.
pub fn round_up_to_16(side: usize) -> usize {
    side.next_multiple_of(SIZE_MULTIPLE_PX)
}

/// Height and width of latents, both even.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LatentSize {
    /// Rows of latent positions of 8 pixels.
    pub height: usize,
    /// Columns of latent positions of 8 pixels.
    pub width: usize,
}

impl LatentSize {
    /// Size of the latents of a picture, rounded up to multiples of 16 pixels.
    ///
    /// # Errors
    /// [`DiffusionError::ImageSize`] if a side is zero or too large to be counted.
    pub fn from_pixels(height: usize, width: usize) -> Result<Self, DiffusionError> {
        const LIMIT_PX: usize = 1 << 20;
        if height == 0 || width == 0 || height > LIMIT_PX || width > LIMIT_PX {
            return Err(DiffusionError::ImageSize { height, width });
        }
        Ok(Self { height: round_up_to_16(height) / LATENT_PX, width: round_up_to_16(width) / LATENT_PX })
    }

    /// Size of a tensor of latents.
    ///
    /// # Shapes
    /// - `latents`: `[batch, channels, height, width]`
    pub fn of(latents: &Tensor<4>) -> Self {
        let [_, _, height, width] = latents.dims();
        Self { height, width }
    }

    /// Height and width of the picture in pixels.
    pub fn pixels(self) -> (usize, usize) {
        (self.height * LATENT_PX, self.width * LATENT_PX)
    }

    /// Number of 2x2 patches, which is the number of image tokens of the transformer.
    pub fn num_tokens(self) -> usize {
        self.height / 2 * (self.width / 2)
    }
}

/// Makes one token of each 2x2 square of latent positions.
///
/// # Shapes
/// - `latents`: `[batch, channels, height, width]`
/// - returns: `[batch, height / 2 * width / 2, channels * 4]`; tokens in raster order, columns by channel, row, column
///
/// # Panics
/// If height or width is odd.
pub fn patchify(latents: Tensor<4>) -> Tensor<3> {
    let [batch, channels, height, width] = latents.dims();
    assert!(height.is_multiple_of(2) && width.is_multiple_of(2), "latents of {height}x{width} have odd sides");
    latents.reshape([batch, channels, height / 2, 2, width / 2, 2]).permute([0, 2, 4, 1, 3, 5]).reshape([
        batch,
        height / 2 * (width / 2),
        channels * 4,
    ])
}

/// Undoes [`patchify`].
///
/// # Shapes
/// - `tokens`: `[batch, height / 2 * width / 2, channels * 4]`
/// - returns: `[batch, channels, height, width]`
///
/// # Panics
/// If the number of tokens is not that of `size`.
pub fn unpatchify(tokens: Tensor<3>, size: LatentSize) -> Tensor<4> {
    let [batch, count, columns] = tokens.dims();
    assert_eq!(count, size.num_tokens(), "tokens of latents {size:?}");
    let LatentSize { height, width } = size;
    tokens.reshape([batch, height / 2, width / 2, columns / 4, 2, 2]).permute([0, 3, 1, 4, 2, 5]).reshape([
        batch,
        columns / 4,
        height,
        width,
    ])
}

#[cfg(test)]
mod tests {
    use nexus_core::testing::{assert_close_tensors, ramp};

    use super::*;

    #[test]
    fn sizes_are_rounded_up_to_16_pixels() {
        let size = |height, width| LatentSize::from_pixels(height, width).unwrap();
        assert_eq!(size(512, 512), LatentSize { height: 64, width: 64 });
        assert_eq!(size(1, 17), LatentSize { height: 2, width: 4 });
        assert_eq!(size(500, 513).pixels(), (512, 528));
        for (height, width) in [(0, 16), (16, 0), (usize::MAX, 16)] {
            assert!(matches!(LatentSize::from_pixels(height, width), Err(DiffusionError::ImageSize { .. })));
        }
    }

    #[test]
    fn patches_are_in_raster_order_and_columns_by_channel() {
        let latents = Tensor::<1, burn::tensor::Int>::arange(0..32, &nexus_core::testing::cpu()).float();
        let tokens = patchify(latents.reshape([1, 2, 4, 4]));
        let second: Vec<f32> = tokens.narrow(1, 1, 1).into_data().try_to_vec().unwrap();
        assert_eq!(second, [2.0, 3.0, 6.0, 7.0, 18.0, 19.0, 22.0, 23.0]);
    }

    #[test]
    fn unpatchify_undoes_patchify() {
        let latents = ramp([2, 3, 4, 6], 1);
        let size = LatentSize::of(&latents);
        assert_close_tensors(&unpatchify(patchify(latents.clone()), size), &latents, 0.0);
    }
}
