//! Images for the models: [`Image`] -> [`Patches`] for the vision encoder, or float pixels for the autoencoder.

use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};
use nexus_core::config::{ConfigError, read_json};
use nexus_core::{GridThw, MERGE_SIZE, PATCH_SIZE_PX};

use crate::error::DataError;
use crate::image::Image;
use crate::resample::{Filter, resize};

/// Smallest area that the vision encoder is shown, in pixels.
pub const MIN_PIXELS: usize = 3136;

/// Largest area of an image in a prompt, in pixels; at most 335 merged tokens.
pub const MAX_PIXELS_AR: usize = 262_640;

/// Largest area that the vision encoder is shown, in pixels.
pub const MAX_PIXELS_PROCESSOR: usize = 12_845_056;

/// Largest ratio of the longer to the shorter side.
pub const MAX_ASPECT_RATIO: usize = 200;

/// Frames in a patch; an image is shown twice.
pub const TEMPORAL_PATCH_SIZE: usize = 2;

/// Values in a patch: 3 channels, 2 frames, 14x14 pixels.
pub const PATCH_LEN: usize = 3 * TEMPORAL_PATCH_SIZE * PATCH_SIZE_PX * PATCH_SIZE_PX;

/// Side of one merged token, in pixels.
const CELL_PX: usize = MERGE_SIZE * PATCH_SIZE_PX;

/// Side of the reference image of the editing decoder, in pixels.
const REFERENCE_PX: usize = GridThw::REFERENCE.h * PATCH_SIZE_PX;

/// Side of a generated image as the vision encoder sees it, in pixels.
const TARGET_PX: usize = GridThw::GENERATED.h * PATCH_SIZE_PX;

/// Height and width in multiples of 28 pixels that keep the aspect ratio nearly, with an area between two bounds.
///
/// # Errors
/// [`DataError::ImageEmpty`] if a side is zero; [`DataError::AspectRatio`] if one side is more than 200 times the other;
/// [`DataError::PixelBudget`] if `max_pixels` has no room for the image at this aspect ratio.
///
/// Source: `smart_resize` of Qwen2-VL (image_processing_qwen2_vl.py).
pub fn smart_resize(
    height_px: usize,
    width_px: usize,
    min_pixels: usize,
    max_pixels: usize,
) -> Result<(usize, usize), DataError> {
    check_aspect_ratio(height_px, width_px)?;
    let cell = CELL_PX as f64;
    let (height, width) = (height_px as f64, width_px as f64);
    let rounded = |side: f64| ((side / cell).round_ties_even() as usize).saturating_mul(CELL_PX).max(CELL_PX);
    let (rounded_height, rounded_width) = (rounded(height), rounded(width));
    let area = rounded_height.saturating_mul(rounded_width);
    let (height, width) = if area > max_pixels {
        let beta = (height * width / max_pixels as f64).sqrt();
        let shrunk = |side: f64| (side / beta / cell).floor() as usize * CELL_PX;
        (shrunk(height), shrunk(width))
    } else if area < min_pixels {
        let beta = (min_pixels as f64 / (height * width)).sqrt();
        let grown = |side: f64| ((side * beta / cell).ceil() as usize).saturating_mul(CELL_PX);
        (grown(height), grown(width))
    } else {
        (rounded_height, rounded_width)
    };
    if height == 0 || width == 0 {
        return Err(DataError::PixelBudget { width_px, height_px, max_pixels });
    }
    Ok((height, width))
}

fn check_aspect_ratio(height_px: usize, width_px: usize) -> Result<(), DataError> {
    let (short, long) = (height_px.min(width_px), height_px.max(width_px));
    if short == 0 {
        return Err(DataError::ImageEmpty { width_px, height_px });
    }
    if long as f64 / short as f64 > MAX_ASPECT_RATIO as f64 {
        return Err(DataError::AspectRatio { width_px, height_px, max_ratio: MAX_ASPECT_RATIO });
    }
    Ok(())
}

/// One image as the vision encoder reads it.
#[derive(Debug, Clone, PartialEq)]
pub struct Patches {
    /// `[patches, 1176]`, normalised pixels.
    ///
    /// Rows: merged 2x2 cells in raster order, and in each the four patches in raster order. Columns: channel, frame,
    /// row, column.
    pub values: Vec<f32>,
    /// Size of the image in patches.
    pub grid: GridThw,
}

impl Patches {
    /// The patches on a device: `[patches, 1176]`, f32.
    pub fn into_tensor(self, device: &Device) -> Tensor<2> {
        let data = TensorData::new(self.values, [self.grid.num_patches(), PATCH_LEN]);
        Tensor::from_data(data, (device, DType::F32))
    }
}

/// Sizes and normalisation of images for the vision encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageProcessor {
    /// Mean of red, green and blue, where white is 1.
    pub mean: [f32; 3],
    /// Standard deviation of red, green and blue.
    pub std: [f32; 3],
    /// Smallest area, in pixels.
    pub min_pixels: usize,
    /// Largest area, in pixels.
    pub max_pixels: usize,
}

impl Default for ImageProcessor {
    /// The values of the published model.
    fn default() -> Self {
        Self {
            mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
            min_pixels: MIN_PIXELS,
            max_pixels: MAX_PIXELS_PROCESSOR,
        }
    }
}

/// `preprocessor_config.json`, as far as it is used; what is absent has the published model's value.
#[derive(serde::Deserialize)]
struct PreprocessorConfig {
    image_mean: Option<[f64; 3]>,
    image_std: Option<[f64; 3]>,
    min_pixels: Option<usize>,
    max_pixels: Option<usize>,
    /// Newer files have the areas here.
    size: Option<Size>,
    patch_size: Option<usize>,
    merge_size: Option<usize>,
    temporal_patch_size: Option<usize>,
}

#[derive(serde::Deserialize)]
struct Size {
    shortest_edge: Option<usize>,
    longest_edge: Option<usize>,
}

impl ImageProcessor {
    /// Reads `preprocessor_config.json`: the file itself, or the one in the folder or in its `processor` subfolder. A
    /// folder without one gives the defaults.
    ///
    /// # Errors
    /// [`DataError::Config`] if the file cannot be read, or describes patches of another kind.
    pub fn open(dir_or_file: impl AsRef<Path>) -> Result<Self, DataError> {
        let path = dir_or_file.as_ref();
        if !path.is_dir() {
            return Self::from_config(read_json(path)?);
        }
        let name = "preprocessor_config.json";
        match [path.join(name), path.join("processor").join(name)].into_iter().find(|file| file.exists()) {
            Some(file) => Self::from_config(read_json(file)?),
            None => Ok(Self::default()),
        }
    }

    fn from_config(config: PreprocessorConfig) -> Result<Self, DataError> {
        for (field, value, supported) in [
            ("patch_size", config.patch_size, PATCH_SIZE_PX),
            ("merge_size", config.merge_size, MERGE_SIZE),
            ("temporal_patch_size", config.temporal_patch_size, TEMPORAL_PATCH_SIZE),
        ] {
            if value.is_some_and(|value| value != supported) {
                return Err(ConfigError::incoherent(field, format!("only {supported} is supported")).into());
            }
        }
        if config.image_std.is_some_and(|std| std.iter().any(|value| value.is_nan() || *value <= 0.0)) {
            return Err(ConfigError::incoherent("image_std", "must be positive").into());
        }
        let default = Self::default();
        let single = |values: [f64; 3]| values.map(|value| value as f32);
        let size = config.size.as_ref();
        let min_pixels = config.min_pixels.or(size.and_then(|size| size.shortest_edge)).unwrap_or(default.min_pixels);
        let max_pixels = config.max_pixels.or(size.and_then(|size| size.longest_edge)).unwrap_or(default.max_pixels);
        if max_pixels < CELL_PX * CELL_PX || max_pixels < min_pixels {
            return Err(ConfigError::incoherent("max_pixels", "leaves no room for an image").into());
        }
        Ok(Self {
            mean: config.image_mean.map_or(default.mean, single),
            std: config.image_std.map_or(default.std, single),
            min_pixels,
            max_pixels,
        })
    }

    /// Resizes an image for a prompt, to at most `max_pixels` and a multiple of 28 pixels per side.
    ///
    /// # Errors
    /// As [`smart_resize`].
    ///
    /// Source: `bound_image` of Nexus-Gen, then the image processor of Qwen2-VL.
    pub fn bound(&self, image: &Image, max_pixels: usize) -> Result<Image, DataError> {
        let bounded = resize_into(image, MIN_PIXELS, max_pixels)?;
        resize_into(&bounded, self.min_pixels, self.max_pixels)
    }

    /// Cuts an image into patches, in the order that the vision encoder reads, and normalises them.
    ///
    /// # Errors
    /// [`DataError::Grid`] if a side is not a multiple of 28 pixels: see [`ImageProcessor::bound`].
    ///
    /// Source: `Qwen2VLImageProcessor` (image_processing_qwen2_vl.py).
    pub fn patches(&self, image: &Image) -> Result<Patches, DataError> {
        let grid = GridThw::from_pixels(image.height_px(), image.width_px())?;
        let normalised = self.normalised();
        let (rgb, row_len) = (image.rgb(), 3 * image.width_px());
        let mut values = Vec::with_capacity(grid.num_patches() * PATCH_LEN);
        for (y, x) in patch_corners(grid) {
            for (channel, of_byte) in normalised.iter().enumerate() {
                for _frame in 0..TEMPORAL_PATCH_SIZE {
                    for row in y..y + PATCH_SIZE_PX {
                        let pixels = &rgb[row * row_len + 3 * x..][..3 * PATCH_SIZE_PX];
                        values.extend(pixels.chunks_exact(3).map(|pixel| of_byte[usize::from(pixel[channel])]));
                    }
                }
            }
        }
        Ok(Patches { values, grid })
    }

    /// For each channel, the normalised value of each byte.
    fn normalised(&self) -> [[f32; 256]; 3] {
        [0, 1, 2].map(|channel| {
            std::array::from_fn(|byte| {
                let scaled = (byte as f64 * (1.0 / 255.0)) as f32;
                (scaled - self.mean[channel]) / self.std[channel]
            })
        })
    }

    /// Patches of an image that is to be edited, for the editing decoder: 504x504 pixels, whatever its aspect ratio.
    ///
    /// # Errors
    /// As [`ImageProcessor::patches`].
    pub fn reference_patches(&self, image: &Image) -> Result<Patches, DataError> {
        self.patches(&resize(image, REFERENCE_PX, REFERENCE_PX, Filter::Bilinear)?)
    }

    /// Patches of an image that the model is to learn to generate: 252x252 pixels, whatever its aspect ratio.
    ///
    /// # Errors
    /// As [`ImageProcessor::patches`].
    pub fn target_patches(&self, image: &Image) -> Result<Patches, DataError> {
        self.patches(&resize(image, TARGET_PX, TARGET_PX, Filter::Bicubic)?)
    }
}

fn resize_into(image: &Image, min_pixels: usize, max_pixels: usize) -> Result<Image, DataError> {
    let (height, width) = smart_resize(image.height_px(), image.width_px(), min_pixels, max_pixels)?;
    resize(image, width, height, Filter::Bicubic)
}

/// Upper left corner of each patch, `(y, x)` in pixels, in the order of [`Patches::values`].
fn patch_corners(grid: GridThw) -> impl Iterator<Item = (usize, usize)> {
    let cells = (0..grid.merged_h()).flat_map(move |y| (0..grid.merged_w()).map(move |x| (y * CELL_PX, x * CELL_PX)));
    cells.flat_map(|(y, x)| {
        let inside = (0..MERGE_SIZE).flat_map(|row| (0..MERGE_SIZE).map(move |column| (row, column)));
        inside.map(move |(row, column)| (y + row * PATCH_SIZE_PX, x + column * PATCH_SIZE_PX))
    })
}

/// Pixels for the autoencoder: the image is scaled until it covers `width_px` x `height_px`, and its middle is cut out.
///
/// Returns `[3, height, width]`, where -1 is black and 1 is white.
///
/// # Errors
/// [`DataError::ImageEmpty`] if a side of the result is zero; [`DataError::AspectRatio`] if one side of the image is
/// more than 200 times the other.
pub fn decoder_image(image: &Image, width_px: usize, height_px: usize) -> Result<Vec<f32>, DataError> {
    check_aspect_ratio(image.height_px(), image.width_px())?;
    if width_px == 0 || height_px == 0 {
        return Err(DataError::ImageEmpty { width_px, height_px });
    }
    let (width, height) = (image.width_px() as f64, image.height_px() as f64);
    let scale = (width_px as f64 / width).max(height_px as f64 / height);
    let scaled = |side: f64, at_least: usize| ((side * scale).round_ties_even() as usize).max(at_least);
    let covering = resize(image, scaled(width, width_px), scaled(height, height_px), Filter::Bilinear)?;
    let margin = |whole: usize, part: usize| ((whole - part) as f64 / 2.0).round_ties_even() as usize;
    let (left, top) = (margin(covering.width_px(), width_px), margin(covering.height_px(), height_px));
    let (rgb, row_len) = (covering.rgb(), 3 * covering.width_px());
    let mut values = Vec::with_capacity(3 * width_px * height_px);
    for channel in 0..3 {
        for y in top..top + height_px {
            let pixels = &rgb[y * row_len + 3 * left..][..3 * width_px];
            values.extend(pixels.chunks_exact(3).map(|pixel| (f32::from(pixel[channel]) / 255.0 - 0.5) / 0.5));
        }
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use nexus_core::testing::cpu;
    use sha2::{Digest, Sha256};

    use super::*;

    fn image(width: usize, height: usize) -> Image {
        Image::from_rgb8(width, height, (0..width * height * 3).map(|i| (i * 37) as u8).collect()).unwrap()
    }

    fn sha256(values: &[f32]) -> String {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn sizes_are_rounded_half_to_even_and_bounded() {
        // smart_resize(height, width, 28, 3136, max_pixels) of qwen_vl_utils 0.0.8
        for (height, width, max_pixels, expected) in [
            (42, 70, MAX_PIXELS_AR, (56, 56)),
            (14, 28, MAX_PIXELS_AR, (56, 84)),
            (98, 126, MAX_PIXELS_AR, (112, 112)),
            (2000, 1920, MAX_PIXELS_AR, (504, 476)),
            (1, 200, MAX_PIXELS_AR, (28, 196)),
            (512, 512, MAX_PIXELS_AR, (504, 504)),
            (10, 10, MAX_PIXELS_AR, (56, 56)),
            (1080, 1920, MAX_PIXELS_PROCESSOR, (1092, 1932)),
        ] {
            assert_eq!(smart_resize(height, width, MIN_PIXELS, max_pixels).unwrap(), expected);
        }
    }

    #[test]
    fn an_absurd_aspect_ratio_is_refused() {
        for (height, width) in [(1, 201), (4021, 20), (usize::MAX, 1)] {
            let result = smart_resize(height, width, MIN_PIXELS, MAX_PIXELS_AR);
            assert!(matches!(result, Err(DataError::AspectRatio { max_ratio: 200, .. })));
        }
        assert!(matches!(decoder_image(&image(1, 201), 8, 8), Err(DataError::AspectRatio { .. })));
        let bounded = ImageProcessor::default().bound(&image(201, 1), MAX_PIXELS_AR);
        assert!(matches!(bounded, Err(DataError::AspectRatio { .. })));
    }

    #[test]
    fn a_zero_side_is_refused() {
        let result = smart_resize(0, 28, MIN_PIXELS, MAX_PIXELS_AR);
        assert!(matches!(result, Err(DataError::ImageEmpty { width_px: 28, height_px: 0 })));
    }

    #[test]
    fn an_area_without_room_is_refused() {
        let result = smart_resize(28, 5000, MIN_PIXELS, 20_000);
        assert!(matches!(result, Err(DataError::PixelBudget { max_pixels: 20_000, .. })));
        assert!(matches!(smart_resize(28, 28, MIN_PIXELS, 0), Err(DataError::PixelBudget { .. })));
    }

    #[test]
    fn patches_are_in_the_order_of_the_vision_encoder() {
        let patches = ImageProcessor::default().patches(&image(56, 28)).unwrap();
        assert_eq!(patches.grid, GridThw { t: 1, h: 2, w: 4 });
        // Bits of pixel_values[row, column] of Qwen2VLImageProcessor on the same picture.
        for (row, column, bits) in [
            (0, 0, 3_219_482_844),
            (0, 1, 3_190_814_231),
            (0, 14, 3_208_494_514),
            (0, 196, 3_219_482_844),
            (0, 392, 3_214_487_824),
            (1, 0, 3_217_278_555),
            (2, 0, 1_071_320_534),
            (3, 1175, 1_059_766_576),
            (4, 0, 3_215_074_267),
            (7, 1175, 1_066_854_212u32),
        ] {
            assert_eq!(patches.values[row * PATCH_LEN + column].to_bits(), bits, "row {row}, column {column}");
        }
        assert_eq!(sha256(&patches.values), "99ab7c829e88b7bdf731fc14ef5640f1c40ec5a2120b65c745813ab8ce0554f5");
    }

    #[test]
    fn patches_of_fixed_size_are_exact() {
        let processor = ImageProcessor::default();
        let reference = processor.reference_patches(&image(20, 13)).unwrap();
        assert_eq!(reference.grid, GridThw::REFERENCE);
        assert_eq!(sha256(&reference.values), "b585f07fec60d60a226f47b47f1bdcd15acedb360aef3d16036ac0bf4df81e92");
        let target = processor.target_patches(&image(20, 13)).unwrap();
        assert_eq!(target.grid, GridThw::GENERATED);
        assert_eq!(sha256(&target.values), "feb1c4c7eb5d7db67c6bfd3e46d0922566f07d860fd570131fdb5e5d3dc91923");
    }

    #[test]
    fn a_tensor_has_one_row_per_patch() {
        let patches = ImageProcessor::default().patches(&image(56, 28)).unwrap();
        let values = patches.values.clone();
        let tensor = patches.into_tensor(&cpu());
        assert_eq!(tensor.dims(), [8, 1176]);
        assert_eq!(tensor.into_data().try_to_vec::<f32>().unwrap(), values);
    }

    #[test]
    fn an_image_must_be_bounded_before_it_is_cut() {
        let processor = ImageProcessor::default();
        assert!(matches!(processor.patches(&image(30, 28)), Err(DataError::Grid(_))));
        let bounded = processor.bound(&image(30, 28), MAX_PIXELS_AR).unwrap();
        assert_eq!((bounded.width_px(), bounded.height_px()), (84, 56));
        assert!(processor.patches(&bounded).is_ok());
    }

    #[test]
    fn the_middle_is_cut_out_for_the_autoencoder() {
        // torch.tensor bits of the covering 3x2 crop, BILINEAR, (x / 255 - 0.5) / 0.5
        let expected = [
            3_200_434_882u32,
            3_184_052_424,
            1_043_641_528,
            1_041_536_152,
            3_176_190_160,
            3_186_157_800,
            3_182_999_736,
            3_197_276_818,
            3_168_854_240,
            1_032_358_032,
            1_028_706_528,
            1_010_876_672,
            1_033_410_720,
            3_178_295_536,
            3_194_283_236,
            3_158_360_256,
            3_174_084_784,
            3_179_841_672,
        ];
        let values = decoder_image(&image(5, 4), 3, 2).unwrap();
        assert_eq!(values.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), expected);
        assert!(matches!(decoder_image(&image(5, 4), 0, 2), Err(DataError::ImageEmpty { .. })));
    }

    fn from_json(json: &str) -> Result<ImageProcessor, DataError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("preprocessor_config.json"), json).unwrap();
        ImageProcessor::open(dir.path())
    }

    #[test]
    fn a_config_changes_what_it_names() {
        assert_eq!(from_json("{}").unwrap(), ImageProcessor::default());
        let json = r#"{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1], "max_pixels": 20000, "patch_size": 14,
            "temporal_patch_size": 2, "merge_size": 2, "do_resize": true}"#;
        let expected = ImageProcessor { mean: [0.5; 3], std: [1.0; 3], min_pixels: MIN_PIXELS, max_pixels: 20_000 };
        assert_eq!(from_json(json).unwrap(), expected);
        let json = r#"{"size": {"shortest_edge": 784, "longest_edge": 90000}}"#;
        let processor = from_json(json).unwrap();
        assert_eq!((processor.min_pixels, processor.max_pixels), (784, 90_000));
    }

    #[test]
    fn a_config_is_looked_for_in_the_processor_subfolder() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(ImageProcessor::open(dir.path()).unwrap(), ImageProcessor::default());
        std::fs::create_dir(dir.path().join("processor")).unwrap();
        std::fs::write(dir.path().join("processor/preprocessor_config.json"), r#"{"max_pixels": 20000}"#).unwrap();
        assert_eq!(ImageProcessor::open(dir.path()).unwrap().max_pixels, 20_000);
    }

    #[test]
    fn an_unusable_config_is_refused() {
        for json in [
            r#"{"patch_size": 16}"#,
            r#"{"merge_size": 1}"#,
            r#"{"temporal_patch_size": 1}"#,
            r#"{"image_std": [0, 1, 1]}"#,
            r#"{"max_pixels": 100}"#,
            r#"{"image_mean": [0.5]}"#,
            "{",
        ] {
            assert!(matches!(from_json(json), Err(DataError::Config(_))), "{json}");
        }
        let absent = ImageProcessor::open("no/such/preprocessor_config.json");
        assert!(matches!(absent, Err(DataError::Config(ConfigError::Missing { .. }))));
    }
}
