//! Image files: a file or its bytes -> [`Image`], and back.
//!
//! Pixels are what Pillow's `Image.open(..).convert("RGB")` gives: EXIF orientation is not applied, colour profiles are
//! ignored, palettes are looked up, and of an animation the first frame counts. Two differences are known: 16-bit grey
//! keeps its high byte, where Pillow saturates, and JPEG is decoded by another library, which rounds some values
//! differently.

use std::path::{Path, PathBuf};

use image::{ColorType, DynamicImage, ImageDecoder, ImageEncoder, ImageFormat, ImageReader};

use crate::error::{BoxedSource, DataError};
use crate::image::Image;

/// Quality of the JPEG files that [`Image::save`] writes, of 100.
const JPEG_QUALITY: u8 = 95;

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
    /// Reads a PNG, JPEG or BMP file, or, with the features `webp` and `gif`, a WebP or GIF file, within the default
    /// [`ImageLimits`]. The content decides, not the name.
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
        let (width, height) = (self.width_px() as u32, self.height_px() as u32);
        match self.alpha() {
            None => encoder.write_image(self.rgb(), width, height, ColorType::Rgb8.into())?,
            Some(alpha) => {
                let pixels = self.rgb().chunks_exact(3).zip(alpha.iter());
                let rgba: Vec<u8> = pixels.flat_map(|(p, &alpha)| [p[0], p[1], p[2], alpha]).collect();
                encoder.write_image(&rgba, width, height, ColorType::Rgba8.into())?;
            }
        }
        Ok(bytes)
    }

    fn encode_jpeg(&self) -> Result<Vec<u8>, image::ImageError> {
        let mut bytes = Vec::new();
        let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY);
        let (width, height) = (self.width_px() as u32, self.height_px() as u32);
        encoder.write_image(self.rgb(), width, height, ColorType::Rgb8.into())?;
        Ok(bytes)
    }
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
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = path.with_file_name(format!(".{name}.{}.part", std::process::id()));
    let written = std::fs::write(&beside, bytes).and_then(|()| std::fs::rename(&beside, path));
    if written.is_err() {
        // The first error is the one to report; the leftover may not exist.
        std::fs::remove_file(&beside).ok();
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(width: usize, height: usize) -> Image {
        let mut state = 1u32;
        let mut byte = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        Image::from_rgb8(width, height, (0..width * height * 3).map(|_| byte()).collect()).unwrap()
    }

    fn png_chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
        let body = [kind, data].concat();
        let crc = body.iter().fold(u32::MAX, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0xEDB8_8320 } else { 0 })
        });
        [&(data.len() as u32).to_be_bytes()[..], &body, &(!crc).to_be_bytes()].concat()
    }

    /// A PNG file with this header and whatever follows it; the pixels, if any, are stored without compression.
    fn png(
        width: u32,
        height: u32,
        bit_depth: u8,
        color_type: u8,
        chunks: &[(&[u8; 4], &[u8])],
        rows: &[u8],
    ) -> Vec<u8> {
        let [width, height] = [width, height].map(u32::to_be_bytes);
        let header = [&width[..], &height, &[bit_depth, color_type, 0, 0, 0]].concat();
        let adler = rows.iter().fold((1u32, 0u32), |(a, b), &byte| {
            let a = (a + u32::from(byte)) % 65_521;
            (a, (b + a) % 65_521)
        });
        let length = (rows.len() as u16).to_le_bytes();
        let not_length = (!(rows.len() as u16)).to_le_bytes();
        let adler = ((adler.1 << 16) | adler.0).to_be_bytes();
        let zlib = [&[0x78, 0x01, 0x01], &length[..], &not_length, rows, &adler].concat();
        let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
        file.extend(png_chunk(b"IHDR", &header));
        for (kind, data) in chunks {
            file.extend(png_chunk(kind, data));
        }
        file.extend(png_chunk(b"IDAT", &zlib));
        file.extend(png_chunk(b"IEND", b""));
        file
    }

    #[test]
    fn grey_and_palette_files_become_rgb() {
        let grey = png(2, 1, 8, 0, &[], &[0, 7, 200]);
        assert_eq!(Image::from_bytes(&grey).unwrap().rgb(), [7, 7, 7, 200, 200, 200]);
        let bits = png(3, 1, 1, 0, &[], &[0, 0b1010_0000]);
        assert_eq!(Image::from_bytes(&bits).unwrap().rgb(), [255, 255, 255, 0, 0, 0, 255, 255, 255]);
        let palette = png(2, 1, 8, 3, &[(b"PLTE", &[1, 2, 3, 4, 5, 6])], &[0, 1, 0]);
        assert_eq!(Image::from_bytes(&palette).unwrap().rgb(), [4, 5, 6, 1, 2, 3]);
    }

    #[test]
    fn sixteen_bits_lose_their_low_byte() {
        let rgb = png(1, 1, 16, 2, &[], &[0, 1, 255, 128, 0, 255, 254]);
        assert_eq!(Image::from_bytes(&rgb).unwrap().rgb(), [1, 128, 255]);
        let grey = png(1, 1, 16, 0, &[], &[0, 9, 200]);
        assert_eq!(Image::from_bytes(&grey).unwrap().rgb(), [9, 9, 9]);
    }

    #[test]
    fn only_what_pillow_opens_as_rgba_keeps_its_alpha() {
        let rgba = png(1, 1, 8, 6, &[], &[0, 1, 2, 3, 4]);
        assert_eq!(Image::from_bytes(&rgba).unwrap().alpha().unwrap(), [4]);
        let grey_alpha_16 = png(1, 1, 16, 4, &[], &[0, 9, 1, 8, 2]);
        assert_eq!(Image::from_bytes(&grey_alpha_16).unwrap().alpha().unwrap(), [8]);
        let grey_alpha = png(1, 1, 8, 4, &[], &[0, 9, 8]);
        assert_eq!(Image::from_bytes(&grey_alpha).unwrap(), Image::from_rgb8(1, 1, vec![9; 3]).unwrap());
        let clear_palette = png(1, 1, 8, 3, &[(b"PLTE", &[1, 2, 3]), (b"tRNS", &[0])], &[0, 0]);
        assert_eq!(Image::from_bytes(&clear_palette).unwrap(), Image::from_rgb8(1, 1, vec![1, 2, 3]).unwrap());
    }

    #[test]
    fn files_survive_the_round_trip() {
        let dir = tempfile::tempdir().unwrap();
        let image = noise(9, 5);
        let path = dir.path().join("a.PNG");
        image.save(&path).unwrap();
        assert_eq!(Image::open(&path).unwrap(), image);
        let clear = Image::from_rgba8(1, 2, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        clear.save(&path).unwrap();
        assert_eq!(Image::open(&path).unwrap(), clear);
        let flat = Image::from_rgb8(16, 8, vec![90; 16 * 8 * 3]).unwrap();
        for name in ["b.jpg", "b.jpeg"] {
            flat.save(dir.path().join(name)).unwrap();
            let reopened = Image::open(dir.path().join(name)).unwrap();
            assert!(reopened.rgb().iter().all(|value| value.abs_diff(90) <= 1));
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
    }

    #[test]
    fn the_content_decides_about_the_format() {
        let dir = tempfile::tempdir().unwrap();
        noise(3, 3).save(dir.path().join("a.png")).unwrap();
        std::fs::rename(dir.path().join("a.png"), dir.path().join("a.jpg")).unwrap();
        assert_eq!(Image::open(dir.path().join("a.jpg")).unwrap(), noise(3, 3));
    }

    #[test]
    fn an_unknown_extension_is_refused() {
        for name in ["a", "a.bmp", "a.png.txt"] {
            let result = noise(1, 1).save(name);
            assert!(matches!(result, Err(DataError::ImageExtension { path }) if path == Path::new(name)));
        }
    }

    #[test]
    fn an_unwritable_place_is_named_and_left_clean() {
        let dir = tempfile::tempdir().unwrap();
        let absent = dir.path().join("absent/a.png");
        let result = noise(1, 1).save(&absent);
        assert!(matches!(result, Err(DataError::ImageWrite { path, .. }) if path == absent));
        let taken = dir.path().join("taken.png");
        std::fs::create_dir_all(taken.join("inside")).unwrap();
        assert!(matches!(noise(1, 1).save(&taken), Err(DataError::ImageWrite { .. })));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_absent_file_is_named() {
        let error = Image::open("no/such/cat.png").unwrap_err();
        assert!(matches!(&error, DataError::ImageMissing { path } if path == Path::new("no/such/cat.png")));
        assert_eq!(error.to_string(), "no/such/cat.png: no such image file");
    }

    #[test]
    fn a_folder_cannot_be_read() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Image::open(dir.path()), Err(DataError::ImageRead { .. })));
    }

    #[test]
    fn what_is_not_an_image_is_refused() {
        // The last one is the start of a TIFF file.
        for bytes in [&b""[..], b"x", b"Hello, I am a text file.", b"II*\0\x08\0\0\0"] {
            assert!(matches!(Image::from_bytes(bytes), Err(DataError::NotAnImage { path: None })));
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.png");
        std::fs::write(&path, "text").unwrap();
        let error = Image::open(&path).unwrap_err();
        assert!(matches!(error, DataError::NotAnImage { path: Some(named) } if named == path));
    }

    #[test]
    fn a_damaged_image_is_refused() {
        let garbage = [&b"\x89PNG\r\n\x1a\n"[..], &[7; 100]].concat();
        assert!(matches!(Image::from_bytes(&garbage), Err(DataError::ImageDecode { .. })));
        let mut flipped = noise(8, 8).encode_png().unwrap();
        let at = flipped.len() - 40;
        flipped[at] ^= 0xFF;
        assert!(matches!(Image::from_bytes(&flipped), Err(DataError::ImageDecode { .. })));
    }

    #[test]
    fn a_truncated_image_is_refused() {
        let image = noise(40, 40);
        for file in [image.encode_png().unwrap(), image.encode_jpeg().unwrap()] {
            assert!(Image::from_bytes(&file).is_ok());
            for length in [file.len() / 2, file.len() - 20] {
                let error = Image::from_bytes(&file[..length]).unwrap_err();
                assert!(matches!(error, DataError::ImageTruncated { .. }), "{error}");
            }
            assert!(Image::from_bytes(&file[..30]).is_err());
        }
    }

    #[test]
    fn the_end_of_a_jpeg_is_found_after_its_scans() {
        let scan = [0xFF, 0xD8, 0xFF, 0xE0, 0, 4, 0xFF, 0xD9, 0xFF, 0xDA, 0, 2, 1, 0xFF, 0, 0xFF, 0xD3, 2];
        assert!(!has_end_of_jpeg(&scan));
        assert!(has_end_of_jpeg(&[&scan[..], &[0xFF, 0xD9]].concat()));
        assert!(has_end_of_jpeg(&[&scan[..], &[0xFF, 0xFF, 0xD9, 9, 9]].concat()));
        assert!(!has_end_of_jpeg(&[0xFF, 0xD8, 0xFF, 0xE0, 0xFF]));
        assert!(!has_end_of_jpeg(&[0xFF]));
    }

    #[test]
    fn a_zero_sized_file_is_refused() {
        assert!(Image::from_bytes(&png(0, 5, 8, 2, &[], &[])).is_err());
        assert!(Image::from_bytes(&png(5, 0, 8, 2, &[], &[])).is_err());
    }

    #[test]
    fn a_bomb_is_refused_before_it_is_decoded() {
        let error = Image::from_bytes(&png(100_000, 100_000, 8, 2, &[], &[0])).unwrap_err();
        assert!(matches!(error, DataError::ImageTooLarge { width_px: 100_000, height_px: 100_000, .. }), "{error}");
        let long = Image::from_bytes(&png(1, 70_000, 8, 0, &[], &[0]));
        assert!(matches!(long, Err(DataError::ImageTooLarge { .. })));
    }

    #[test]
    fn limits_are_the_callers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.png");
        noise(8, 4).save(&path).unwrap();
        let with = |max_side_px, max_pixels, max_file_bytes| {
            Image::open_with(&path, &ImageLimits { max_side_px, max_pixels, max_file_bytes })
        };
        let size = std::fs::metadata(&path).unwrap().len();
        assert!(with(8, 32, size).is_ok());
        assert!(matches!(with(7, 32, size), Err(DataError::ImageTooLarge { max_side_px: 7, .. })));
        assert!(matches!(with(8, 31, size), Err(DataError::ImageTooLarge { max_pixels: 31, .. })));
        assert!(matches!(with(8, 32, size - 1), Err(DataError::ImageFileTooLarge { .. })));
    }
}
