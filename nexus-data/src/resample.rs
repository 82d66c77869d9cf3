//! Resizing that is bit-equal to Pillow's: [`Image`] -> [`Image`] of another size.
//!
//! Antialiased: when an image shrinks, the filter grows with the factor, so that every source pixel counts. Two passes,
//! one along each axis, with 8-bit pixels between them and weights in fixed point.
//!
//! Source: Pillow 13 `src/libImaging/Resample.c`.

use std::borrow::Cow;

use crate::error::DataError;
use crate::image::Image;

/// Fraction bits of a weight: 32 bits less 8 for the pixel and 2 for overshoot.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// How pixels between pixels are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Filter {
    /// Triangle, two source pixels wide.
    Bilinear,
    /// Cubic convolution with a = -0.5, four source pixels wide.
    Bicubic,
}

impl Filter {
    /// Half the width, in source pixels at scale 1.
    fn support(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        let x = x.abs();
        match self {
            Self::Bilinear if x < 1.0 => 1.0 - x,
            Self::Bicubic if x < 1.0 => {
                const A: f64 = -0.5;
                ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
            }
            Self::Bicubic if x < 2.0 => {
                const A: f64 = -0.5;
                (((x - 5.0) * x + 8.0) * x - 4.0) * A
            }
            _ => 0.0,
        }
    }
}

/// Resizes the colours of an image to `width_px` x `height_px`, whatever its aspect ratio; an alpha channel is dropped.
///
/// # Errors
/// [`DataError::ImageEmpty`] if a side of the result is zero; [`DataError::BufferLength`] if it cannot be addressed.
pub fn resize(image: &Image, width_px: usize, height_px: usize, filter: Filter) -> Result<Image, DataError> {
    if width_px == 0 || height_px == 0 {
        return Err(DataError::ImageEmpty { width_px, height_px });
    }
    if width_px.checked_mul(height_px.max(image.height_px())).and_then(|area| area.checked_mul(3)).is_none() {
        return Err(DataError::BufferLength { width_px, height_px, found: image.rgb().len() });
    }
    let mut pixels = Cow::Borrowed(image.rgb());
    let (mut width, mut height) = (image.width_px(), image.height_px());
    let passes = if vertical_first(image, width_px, height_px) {
        [Pass::Vertical, Pass::Horizontal]
    } else {
        [Pass::Horizontal, Pass::Vertical]
    };
    for pass in passes {
        match pass {
            Pass::Horizontal if width != width_px => {
                pixels = Cow::Owned(resize_rows(&pixels, width, &Weights::new(width, width_px, filter)));
                width = width_px;
            }
            Pass::Vertical if height != height_px => {
                pixels = Cow::Owned(resize_columns(&pixels, width, &Weights::new(height, height_px, filter)));
                height = height_px;
            }
            _ => {}
        }
    }
    Image::from_rgb8(width_px, height_px, pixels.into_owned())
}

enum Pass {
    Horizontal,
    Vertical,
}

/// Whether the vertical pass comes first, which changes how values are rounded between the passes.
///
/// It does when the height loses more than twice as many pixels as the width, so that the horizontal pass has less to
/// do. Differs: releases of Pillow before 13 always begin with the horizontal pass.
fn vertical_first(image: &Image, width_px: usize, height_px: usize) -> bool {
    let lost = |from: usize, to: usize| from as i128 - to as i128;
    let lost_rows = lost(image.height_px(), height_px);
    lost_rows > 0 && lost_rows > 2 * lost(image.width_px(), width_px)
}

/// For each output pixel: where its source pixels begin, and their weights.
struct Weights {
    starts: Vec<usize>,
    /// End of the weights of each output pixel in `values`.
    ends: Vec<usize>,
    /// Fixed point, [`PRECISION_BITS`] fraction bits.
    values: Vec<i32>,
}

impl Weights {
    fn new(source_size: usize, size: usize, filter: Filter) -> Self {
        let scale = source_size as f64 / size as f64;
        let stretch = scale.max(1.0);
        let support = filter.support() * stretch;
        let mut weights = Self { starts: Vec::with_capacity(size), ends: Vec::with_capacity(size), values: Vec::new() };
        for i in 0..size {
            let center = (i as f64 + 0.5) * scale;
            // A cast truncates toward zero, and a negative number becomes 0.
            let start = (center - support + 0.5) as usize;
            let end = ((center + support + 0.5) as usize).min(source_size);
            let raw = |x: usize| filter.weight((x as f64 - center + 0.5) * (1.0 / stretch));
            let sum: f64 = (start..end).map(raw).sum();
            let normalised = (start..end).map(|x| if sum == 0.0 { raw(x) } else { raw(x) / sum });
            weights.starts.push(start);
            weights.values.extend(normalised.map(to_fixed_point));
            weights.ends.push(weights.values.len());
        }
        weights
    }

    /// Start in the source and weights, for each output pixel.
    fn iter(&self) -> impl Iterator<Item = (usize, &[i32])> {
        let begins = std::iter::once(0).chain(self.ends.iter().copied());
        begins.zip(&self.ends).zip(&self.starts).map(|((begin, &end), &start)| (start, &self.values[begin..end]))
    }

    fn len(&self) -> usize {
        self.starts.len()
    }
}

fn to_fixed_point(weight: f64) -> i32 {
    let scaled = weight * f64::from(1 << PRECISION_BITS);
    (if weight < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
}

const ONE_HALF: i32 = 1 << (PRECISION_BITS - 1);

fn to_byte(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// Horizontal pass over `[height, source_width, 3]`.
fn resize_rows(source: &[u8], source_width: usize, weights: &Weights) -> Vec<u8> {
    let mut resized = Vec::with_capacity(source.len() / source_width * weights.len());
    for row in source.chunks_exact(3 * source_width) {
        for (start, weights) in weights.iter() {
            let mut sums = [ONE_HALF; 3];
            for (pixel, &weight) in row[3 * start..].chunks_exact(3).zip(weights) {
                for (sum, &value) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(value) * weight;
                }
            }
            resized.extend(sums.map(to_byte));
        }
    }
    resized
}

/// Vertical pass over `[source_height, width, 3]`, a whole row at a time.
fn resize_columns(source: &[u8], width: usize, weights: &Weights) -> Vec<u8> {
    let row_length = 3 * width;
    let mut resized = Vec::with_capacity(row_length * weights.len());
    let mut sums = vec![ONE_HALF; row_length];
    for (start, weights) in weights.iter() {
        sums.fill(ONE_HALF);
        for (row, &weight) in source[row_length * start..].chunks_exact(row_length).zip(weights) {
            for (sum, &value) in sums.iter_mut().zip(row) {
                *sum += i32::from(value) * weight;
            }
        }
        resized.extend(sums.iter().copied().map(to_byte));
    }
    resized
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(width: usize, height: usize) -> Image {
        Image::from_rgb8(width, height, (0..width * height * 3).map(|i| (i * 37) as u8).collect()).unwrap()
    }

    /// Expected bytes: `np.asarray(Image.fromarray(a).resize((W, H), f)).reshape(-1).tolist()` with Pillow 13 and
    /// `a = np.array([i * 37 % 256 for i in range(w * h * 3)], np.uint8).reshape(h, w, 3)`.
    fn check(from: [usize; 2], to: [usize; 2], filter: Filter, expected: &[u8]) {
        let resized = resize(&image(from[0], from[1]), to[0], to[1], filter).unwrap();
        assert_eq!((resized.width_px(), resized.height_px()), (to[0], to[1]));
        assert_eq!(resized.rgb(), expected);
    }

    #[test]
    fn shrinking_is_pillows() {
        let bicubic = [72, 113, 137, 114, 89, 125, 154, 122, 95, 151, 135, 124, 127, 141, 120, 107, 130, 124];
        check([5, 4], [3, 2], Filter::Bicubic, &bicubic);
        let bilinear = [79, 116, 137, 115, 91, 120, 150, 124, 99, 146, 136, 126, 121, 134, 122, 113, 129, 119];
        check([5, 4], [3, 2], Filter::Bilinear, &bilinear);
    }

    #[test]
    fn growing_is_pillows() {
        let bicubic = [
            0, 24, 60, 28, 77, 121, 106, 143, 197, 194, 54, 98, 243, 0, 23, 35, 68, 114, 78, 121, 107, 150, 187, 96,
            144, 98, 84, 131, 35, 77, 74, 111, 168, 128, 164, 93, 193, 230, 0, 93, 141, 70, 19, 74, 131,
        ];
        check([3, 2], [5, 3], Filter::Bicubic, &bicubic);
        let bilinear = [
            0, 37, 74, 44, 81, 118, 111, 148, 185, 178, 61, 98, 222, 3, 40, 39, 76, 113, 83, 120, 106, 150, 187, 96,
            140, 100, 86, 133, 42, 79, 77, 114, 151, 121, 158, 93, 188, 225, 6, 101, 138, 73, 43, 80, 117,
        ];
        check([3, 2], [5, 3], Filter::Bilinear, &bilinear);
    }

    #[test]
    fn the_vertical_pass_comes_first_when_it_saves_work() {
        let expected = [
            93, 99, 140, 98, 134, 110, 115, 132, 95, 132, 94, 105, 135, 101, 138, 146, 106, 148, 128, 123, 133, 92,
            140, 103,
        ];
        check([3, 6], [4, 2], Filter::Bicubic, &expected);
        for (from, to, first) in [
            ([10, 10], [10, 9], true),
            ([10, 10], [9, 8], false),
            ([10, 10], [9, 7], true),
            ([10, 10], [20, 10], false),
            ([10, 10], [20, 9], true),
        ] {
            assert_eq!(vertical_first(&image(from[0], from[1]), to[0], to[1]), first, "{from:?} -> {to:?}");
        }
    }

    #[test]
    fn a_side_that_keeps_its_size_is_left_alone() {
        let rows_only = [
            69, 106, 43, 80, 127, 164, 201, 72, 109, 46, 83, 130, 151, 188, 125, 162, 33, 70, 107, 154, 191, 128, 165,
            36,
        ];
        check([4, 3], [4, 2], Filter::Bicubic, &rows_only);
        let columns_only = [79, 80, 117, 144, 71, 108, 121, 158, 85, 76, 113, 150, 163, 90, 127, 154, 155, 82];
        check([4, 3], [2, 3], Filter::Bilinear, &columns_only);
        assert_eq!(resize(&image(7, 5), 7, 5, Filter::Bicubic).unwrap(), image(7, 5));
    }

    #[test]
    fn a_flat_image_stays_flat() {
        let flat = Image::from_rgb8(13, 9, vec![200; 13 * 9 * 3]).unwrap();
        for filter in [Filter::Bilinear, Filter::Bicubic] {
            for (width, height) in [(1, 1), (5, 40), (100, 3)] {
                let resized = resize(&flat, width, height, filter).unwrap();
                assert!(resized.rgb().iter().all(|&value| value == 200));
            }
        }
    }

    #[test]
    fn empty_and_unaddressable_results_are_refused() {
        let result = resize(&image(2, 2), 0, 3, Filter::Bicubic);
        assert!(matches!(result, Err(DataError::ImageEmpty { width_px: 0, height_px: 3 })));
        let result = resize(&image(2, 2), usize::MAX / 2, 1, Filter::Bicubic);
        assert!(matches!(result, Err(DataError::BufferLength { .. })));
    }
}
