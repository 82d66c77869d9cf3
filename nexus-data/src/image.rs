//! Pictures in memory: buffers of bytes or floats -> [`Image`], 8-bit RGB with what is known of its alpha channel.

use std::sync::Arc;

use crate::error::DataError;

/// A picture of 8-bit RGB pixels; cheap to clone.
///
/// A picture that was stored with an alpha channel keeps it aside until [`Image::to_rgb`] is told what to do with it;
/// everything else looks at the colours alone.
#[derive(Clone, PartialEq, Eq)]
pub struct Image {
    width_px: usize,
    height_px: usize,
    /// `[height, width, 3]`.
    rgb: Arc<[u8]>,
    /// `[height, width]`.
    alpha: Option<Arc<[u8]>>,
}

/// What becomes of an alpha channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Alpha {
    /// It is dropped; the colours of transparent pixels become visible. For generation and editing.
    #[default]
    Drop,
    /// The picture is laid on white. For understanding.
    OnWhite,
}

impl Image {
    /// Takes a buffer of RGB pixels, `[height, width, 3]`, row by row.
    ///
    /// # Errors
    /// [`DataError::ImageEmpty`] if a side is zero; [`DataError::BufferLength`] if the buffer has another length.
    pub fn from_rgb8(width_px: usize, height_px: usize, rgb: Vec<u8>) -> Result<Self, DataError> {
        check_length(width_px, height_px, 3, rgb.len())?;
        Ok(Self { width_px, height_px, rgb: rgb.into(), alpha: None })
    }

    /// Takes a buffer of RGBA pixels, `[height, width, 4]`, row by row; alpha is not premultiplied.
    ///
    /// # Errors
    /// [`DataError::ImageEmpty`] if a side is zero; [`DataError::BufferLength`] if the buffer has another length.
    pub fn from_rgba8(width_px: usize, height_px: usize, rgba: &[u8]) -> Result<Self, DataError> {
        check_length(width_px, height_px, 4, rgba.len())?;
        let rgb = rgba.chunks_exact(4).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect();
        let alpha = rgba.chunks_exact(4).map(|pixel| pixel[3]).collect();
        Ok(Self { width_px, height_px, rgb, alpha: Some(alpha) })
    }

    /// Takes a decoded picture: `values` `[3, height, width]`, where -1 is black and 1 is white.
    ///
    /// Values outside are clipped, and bytes are truncated rather than rounded, as the original does.
    ///
    /// # Errors
    /// [`DataError::ImageEmpty`] if a side is zero; [`DataError::BufferLength`] if `values` has another length;
    /// [`DataError::NotFinite`] if a value is NaN or infinite.
    pub fn from_decoded(values: &[f32], height_px: usize, width_px: usize) -> Result<Self, DataError> {
        check_length(width_px, height_px, 3, values.len())?;
        let count = values.iter().filter(|value| !value.is_finite()).count();
        if count > 0 {
            return Err(DataError::NotFinite { count });
        }
        let num_pixels = height_px * width_px;
        let byte = |value: f32| ((value / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0) as u8;
        let rgb = (0..num_pixels).flat_map(|i| [0, 1, 2].map(|channel| byte(values[channel * num_pixels + i])));
        Ok(Self { width_px, height_px, rgb: rgb.collect(), alpha: None })
    }

    /// Width in pixels; at least 1.
    pub fn width_px(&self) -> usize {
        self.width_px
    }

    /// Height in pixels; at least 1.
    pub fn height_px(&self) -> usize {
        self.height_px
    }

    /// The colours, `[height, width, 3]`, row by row.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// The alpha channel that the picture was stored with, `[height, width]`; 255 is opaque.
    pub fn alpha(&self) -> Option<&[u8]> {
        self.alpha.as_deref()
    }

    /// The picture without alpha channel.
    ///
    /// Source: Pillow `Image.paste` with a mask, for [`Alpha::OnWhite`].
    #[must_use]
    pub fn to_rgb(&self, choice: Alpha) -> Self {
        let rgb = match (&self.alpha, choice) {
            (Some(alpha), Alpha::OnWhite) => {
                let pixels = self.rgb.chunks_exact(3).zip(alpha.iter());
                pixels.flat_map(|(pixel, &alpha)| [0, 1, 2].map(|i| on_white(pixel[i], alpha))).collect()
            }
            _ => Arc::clone(&self.rgb),
        };
        Self { rgb, alpha: None, ..*self }
    }
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let channels = if self.alpha.is_some() { "rgba" } else { "rgb" };
        write!(f, "Image({}x{} px, {channels})", self.width_px, self.height_px)
    }
}

/// One channel of a pixel on white: `(value * alpha + 255 * (255 - alpha)) / 255`, rounded, without a division.
fn on_white(value: u8, alpha: u8) -> u8 {
    let sum = u32::from(value) * u32::from(alpha) + 255 * (255 - u32::from(alpha)) + 128;
    (((sum >> 8) + sum) >> 8) as u8
}

fn check_length(width_px: usize, height_px: usize, channels: usize, found: usize) -> Result<(), DataError> {
    if width_px == 0 || height_px == 0 {
        return Err(DataError::ImageEmpty { width_px, height_px });
    }
    // Sides must also fit the 32 bits of the codecs.
    let fits = width_px <= u32::MAX as usize && height_px <= u32::MAX as usize;
    let needed = width_px.checked_mul(height_px).and_then(|area| area.checked_mul(channels));
    if !fits || needed != Some(found) {
        return Err(DataError::BufferLength { width_px, height_px, found });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `bg = Image.new("RGB", im.size, (255, 255, 255)); bg.paste(im, mask=im.split()[3])` with Pillow 13.
    #[test]
    fn white_shows_through_as_with_pillow() {
        let rgba = [10, 20, 30, 0, 10, 20, 30, 1, 10, 20, 30, 128, 200, 100, 0, 254, 7, 8, 9, 255];
        let image = Image::from_rgba8(5, 1, &rgba).unwrap();
        let on_white = image.to_rgb(Alpha::OnWhite);
        assert_eq!(on_white.rgb(), [255, 255, 255, 254, 254, 254, 132, 137, 142, 200, 101, 1, 7, 8, 9]);
        let dropped = image.to_rgb(Alpha::Drop);
        assert_eq!(dropped.rgb(), [10, 20, 30, 10, 20, 30, 10, 20, 30, 200, 100, 0, 7, 8, 9]);
        assert_eq!((on_white.alpha(), dropped.alpha()), (None, None));
        assert_eq!(image.alpha().unwrap(), [0, 1, 128, 254, 255]);
    }

    #[test]
    fn decoded_pictures_are_clipped_and_truncated() {
        // torch: ((x / 2 + 0.5).clip(0, 1) * 255).to(torch.uint8)
        let values = [-2.0, -1.0, -0.999, 0.0, 0.5, 0.9999, 1.0, 3.0, 0.003_92, -0.003_93, 0.1, 0.2];
        let image = Image::from_decoded(&values, 2, 2).unwrap();
        // Channels come last now.
        assert_eq!(image.rgb(), [0, 191, 127, 0, 254, 126, 0, 255, 140, 127, 255, 153]);
    }

    #[test]
    fn decoded_pictures_with_nan_are_refused() {
        let result = Image::from_decoded(&[0.0, f32::NAN, f32::INFINITY], 1, 1);
        assert!(matches!(result, Err(DataError::NotFinite { count: 2 })));
        let result = Image::from_decoded(&[0.0; 4], 1, 1);
        assert!(matches!(result, Err(DataError::BufferLength { found: 4, .. })));
    }

    #[test]
    fn buffers_must_fit_their_size() {
        assert!(matches!(Image::from_rgb8(0, 3, vec![]), Err(DataError::ImageEmpty { width_px: 0, height_px: 3 })));
        assert!(matches!(Image::from_rgb8(2, 2, vec![0; 11]), Err(DataError::BufferLength { found: 11, .. })));
        assert!(matches!(Image::from_rgba8(2, 2, &[0; 12]), Err(DataError::BufferLength { found: 12, .. })));
        assert!(matches!(Image::from_rgb8(usize::MAX, 2, vec![]), Err(DataError::BufferLength { .. })));
    }
}
