//! Pictures: image files and buffers -> [`Image`], 8-bit RGB in memory -> image files.
//!
//! Pixels are what Pillow's `Image.open(..).convert("RGB")` gives: EXIF orientation is not applied, colour profiles are
//! ignored, palettes are looked up, and of an animation the first frame counts. Two differences are known: 16-bit grey
//! keeps its high byte, where Pillow saturates, and JPEG and lossy WebP are decoded by another library, which may round
//! a value differently.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::{ColorType, DynamicImage, ImageDecoder, ImageFormat, ImageReader};

use crate::error::{BoxedSource, DataError};

/// Quality of the JPEG files that [`Image::save`] writes, of 100.
const JPEG_QUALITY: u8 = 95;

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

/// What is refused before it is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct ImageLimits {
    /// Largest width and height, in pixels.
    pub max_side_px: usize,
    /// Largest area, in pixels.
    pub max_pixels: usize,
    /// Largest file, in bytes.
    pub max_file_bytes: u64,
}

impl Default for ImageLimits {
    /// Pillow's limit of 179 million pixels, and files of 256 MiB.
    fn default() -> Self {
        Self { max_side_px: 65_535, max_pixels: 178_956_970, max_file_bytes: 256 << 20 }
    }
}

impl Image {
    /// Reads a PNG, JPEG, WebP, BMP or GIF file, within the default [`ImageLimits`]. The content decides, not the name.
    ///
    /// # Errors
    /// As [`Image::open_with`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DataError> {
        Self::open_with(path, &ImageLimits::default())
    }

    /// Reads an image file within limits.
    ///
    /// # Errors
    /// [`DataError::ImageMissing`] or [`DataError::ImageRead`] if there is no readable file;
    /// [`DataError::ImageFileTooLarge`] or [`DataError::ImageTooLarge`] if it is over a limit;
    /// [`DataError::NotAnImage`], [`DataError::ImageDecode`], [`DataError::ImageTruncated`] or
    /// [`DataError::ImageEmpty`] if its content is not a whole image.
    pub fn open_with(path: impl AsRef<Path>, limits: &ImageLimits) -> Result<Self, DataError> {
        let path = path.as_ref();
        let bytes = read_within(path, limits.max_file_bytes).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => DataError::ImageMissing { path: path.to_path_buf() },
            _ => DataError::ImageRead { path: path.to_path_buf(), source },
        })?;
        decode(&bytes, Some(path), limits)
    }

    /// Decodes the bytes of an image file, within the default [`ImageLimits`].
    ///
    /// # Errors
    /// As [`Image::open_with`], without the errors of files.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DataError> {
        decode(bytes, None, &ImageLimits::default())
    }

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

    /// Writes a `.png` (lossless, with the alpha channel if there is one) or a `.jpg`/`.jpeg` file.
    ///
    /// The file appears whole or not at all: it is written under another name in the same folder first.
    ///
    /// # Errors
    /// [`DataError::ImageExtension`] if the name has another extension; [`DataError::ImageWrite`] if it cannot be
    /// written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), DataError> {
        let path = path.as_ref();
        let extension = path.extension().and_then(|extension| extension.to_str()).map(str::to_ascii_lowercase);
        let encoded = match extension.as_deref() {
            Some("png") => self.encode_png(),
            Some("jpg" | "jpeg") => self.encode_jpeg(),
            _ => return Err(DataError::ImageExtension { path: path.to_path_buf() }),
        };
        let written =
            encoded.map_err(BoxedSource::from).and_then(|bytes| write_whole(path, &bytes).map_err(Into::into));
        written.map_err(|source| DataError::ImageWrite { path: path.to_path_buf(), source })
    }

    fn encode_png(&self) -> Result<Vec<u8>, image::ImageError> {
        let mut bytes = Vec::new();
        let encoder = image::codecs::png::PngEncoder::new(&mut bytes);
        let (width, height) = (self.width_px as u32, self.height_px as u32);
        match &self.alpha {
            None => image::ImageEncoder::write_image(encoder, &self.rgb, width, height, ColorType::Rgb8.into())?,
            Some(alpha) => {
                let pixels = self.rgb.chunks_exact(3).zip(alpha.iter());
                let rgba: Vec<u8> = pixels.flat_map(|(p, &alpha)| [p[0], p[1], p[2], alpha]).collect();
                image::ImageEncoder::write_image(encoder, &rgba, width, height, ColorType::Rgba8.into())?;
            }
        }
        Ok(bytes)
    }

    fn encode_jpeg(&self) -> Result<Vec<u8>, image::ImageError> {
        let mut bytes = Vec::new();
        let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY);
        let (width, height) = (self.width_px as u32, self.height_px as u32);
        image::ImageEncoder::write_image(encoder, &self.rgb, width, height, ColorType::Rgb8.into())?;
        Ok(bytes)
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

/// Reads a file, and one byte more than allowed at most.
fn read_within(path: &Path, max_bytes: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path)?;
    std::io::Read::read_to_end(&mut std::io::Read::take(file, max_bytes.saturating_add(1)), &mut bytes)?;
    Ok(bytes)
}

fn decode(bytes: &[u8], path: Option<&Path>, limits: &ImageLimits) -> Result<Image, DataError> {
    let path = || path.map(Path::to_path_buf);
    if bytes.len() as u64 > limits.max_file_bytes {
        return Err(DataError::ImageFileTooLarge { path: path(), max_bytes: limits.max_file_bytes });
    }
    let failed = |source: image::ImageError| decode_error(source, path());
    let mut reader = ImageReader::new(std::io::Cursor::new(bytes));
    let format = image::guess_format(bytes).map_err(|_| DataError::NotAnImage { path: path() })?;
    if !format.reading_enabled() {
        return Err(DataError::NotAnImage { path: path() });
    }
    reader.set_format(format);
    // The size is in the header and is checked here; the codec's own limit would hide it.
    reader.no_limits();
    let decoder = reader.into_decoder().map_err(failed)?;
    let (width, height) = decoder.dimensions();
    let (width_px, height_px) = (width as usize, height as usize);
    if width_px == 0 || height_px == 0 {
        return Err(DataError::ImageEmpty { width_px, height_px });
    }
    let ImageLimits { max_side_px, max_pixels, .. } = *limits;
    let area = width_px.saturating_mul(height_px);
    if width_px > max_side_px || height_px > max_side_px || area > max_pixels {
        return Err(DataError::ImageTooLarge { path: path(), width_px, height_px, max_side_px, max_pixels });
    }
    // The JPEG codec fills what is missing with grey.
    if format == ImageFormat::Jpeg && !has_end_of_jpeg(bytes) {
        return Err(DataError::ImageTruncated { path: path() });
    }
    let keeps_alpha = match format {
        ImageFormat::Png => is_rgba_png(bytes),
        ImageFormat::Gif => false,
        _ => true,
    };
    let pixels = DynamicImage::from_decoder(decoder).map_err(failed)?;
    if keeps_alpha && pixels.color().has_alpha() {
        Image::from_rgba8(width_px, height_px, &to_8_bit(pixels).into_rgba8())
    } else {
        Image::from_rgb8(width_px, height_px, to_8_bit(pixels).into_rgb8().into_raw())
    }
}

fn decode_error(source: image::ImageError, path: Option<PathBuf>) -> DataError {
    match source {
        image::ImageError::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            DataError::ImageTruncated { path }
        }
        source => DataError::ImageDecode { path, source: source.into() },
    }
}

/// Keeps the high byte of 16-bit channels; the codec's own conversion would round.
fn to_8_bit(pixels: DynamicImage) -> DynamicImage {
    fn high_bytes<P, Q>(from: image::ImageBuffer<P, Vec<u16>>) -> image::ImageBuffer<Q, Vec<u8>>
    where
        P: image::Pixel<Subpixel = u16>,
        Q: image::Pixel<Subpixel = u8>,
    {
        let (width, height) = from.dimensions();
        let bytes = from.into_raw().into_iter().map(|value| (value >> 8) as u8).collect();
        // Both buffers have the same size and number of channels.
        image::ImageBuffer::from_raw(width, height, bytes).unwrap_or_default()
    }
    match pixels {
        DynamicImage::ImageLuma16(pixels) => DynamicImage::ImageLuma8(high_bytes(pixels)),
        DynamicImage::ImageLumaA16(pixels) => DynamicImage::ImageLumaA8(high_bytes(pixels)),
        DynamicImage::ImageRgb16(pixels) => DynamicImage::ImageRgb8(high_bytes(pixels)),
        DynamicImage::ImageRgba16(pixels) => DynamicImage::ImageRgba8(high_bytes(pixels)),
        pixels => pixels,
    }
}

/// Whether Pillow opens this PNG in mode RGBA; grey with alpha, palettes and colour keys it does not composite.
fn is_rgba_png(bytes: &[u8]) -> bool {
    // Bit depth and colour type in the header chunk.
    matches!(bytes.get(24..26), Some([_, 6] | [16, 4]))
}

/// Whether the scans of a JPEG file are followed by the end-of-image marker.
fn has_end_of_jpeg(bytes: &[u8]) -> bool {
    let (start_of_scan, end_of_image) = (0xDA, 0xD9);
    let mut at = 2;
    let mut in_scan = false;
    while let Some(&[first, marker]) = bytes.get(at..at + 2) {
        let stuffed_or_restart = matches!(marker, 0x00 | 0xD0..=0xD7);
        if first != 0xFF || marker == 0xFF || (in_scan && stuffed_or_restart) {
            at += 1;
        } else if marker == end_of_image {
            return true;
        } else {
            let Some(&[high, low]) = bytes.get(at + 2..at + 4) else { return false };
            at += 2 + usize::from(u16::from_be_bytes([high, low]));
            in_scan = marker == start_of_scan;
        }
    }
    false
}

/// Writes a file under another name in the same folder, then renames it.
fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = path.with_file_name(format!(".{name}.{}.part", std::process::id()));
    let written = std::fs::write(&beside, bytes).and_then(|()| std::fs::rename(&beside, path));
    if written.is_err() {
        // The first error is the one to report; the leftover may not exist.
        std::fs::remove_file(&beside).ok();
    }
    written
}
