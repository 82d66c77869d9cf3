//! Overlapping tiles: a large picture -> tiles that fit in memory -> one picture, blended where tiles overlap.

use std::ops::Range;

use burn::tensor::{DType, Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::{DiffusionError, LatentSize};

/// Side and step of square tiles, in latent positions of 8 pixels.
///
/// The tile at the end of a row or column is moved back to the border, so that every position is covered whatever the
/// size of the picture; a tile larger than the picture is the picture.
///
/// Differs: the original divides zero by zero where the step does not divide what is left of the picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "SizeAndStride", into = "SizeAndStride")]
pub struct Tiling {
    size: usize,
    stride: usize,
}

#[derive(Serialize, Deserialize)]
struct SizeAndStride {
    size: usize,
    stride: usize,
}

impl Default for Tiling {
    /// 128 positions (1024 pixels) every 64.
    fn default() -> Self {
        Self { size: 128, stride: 64 }
    }
}

impl TryFrom<SizeAndStride> for Tiling {
    type Error = DiffusionError;

    fn try_from(raw: SizeAndStride) -> Result<Self, DiffusionError> {
        Self::new(raw.size, raw.stride)
    }
}

impl From<Tiling> for SizeAndStride {
    fn from(tiling: Tiling) -> Self {
        Self { size: tiling.size, stride: tiling.stride }
    }
}

impl Tiling {
    /// Tiles of `size` x `size` latent positions, one every `stride`.
    ///
    /// # Errors
    /// [`DiffusionError::Option`] if a number is zero or odd, or if the tiles would leave gaps.
    pub fn new(size: usize, stride: usize) -> Result<Self, DiffusionError> {
        let even = |number: usize| number > 0 && number.is_multiple_of(2);
        if !even(size) {
            return Err(DiffusionError::option("tiling.size", size, "a positive even number of latent positions"));
        }
        if !even(stride) || stride > size {
            let expected = "a positive even number of latent positions, at most the tile's size";
            return Err(DiffusionError::option("tiling.stride", stride, expected));
        }
        Ok(Self { size, stride })
    }

    /// Side of a tile in latent positions.
    pub fn size(self) -> usize {
        self.size
    }

    /// Latent positions from one tile to the next.
    pub fn stride(self) -> usize {
        self.stride
    }

    /// Size of every tile of a picture.
    pub(crate) fn tile_size(self, picture: LatentSize) -> LatentSize {
        LatentSize { height: self.size.min(picture.height), width: self.size.min(picture.width) }
    }

    /// The tiles of a picture in raster order; all have the same size.
    pub(crate) fn tiles(self, picture: LatentSize) -> Vec<Tile> {
        let size = self.tile_size(picture);
        let rows = starts(picture.height, size.height, self.stride);
        let columns = starts(picture.width, size.width, self.stride);
        rows.iter().flat_map(|&row| columns.iter().map(move |&column| Tile { row, column, size })).collect()
    }
}

/// Where the tiles along one side begin.
fn starts(length: usize, size: usize, stride: usize) -> Vec<usize> {
    let last = length - size;
    (0..last).step_by(stride).chain([last]).collect()
}

/// One tile, in latent positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tile {
    row: usize,
    column: usize,
    size: LatentSize,
}

impl Tile {
    /// Rows and columns of the tile in a tensor with `scale` numbers per latent position.
    fn ranges(self, scale: usize) -> [Range<usize>; 2] {
        let range = |start: usize, length: usize| start * scale..(start + length) * scale;
        [range(self.row, self.size.height), range(self.column, self.size.width)]
    }

    /// The tile's part of a tensor with `scale` numbers per latent position and side.
    ///
    /// # Shapes
    /// - `x`: `[batch, channels, height * scale, width * scale]`
    pub(crate) fn of(self, x: &Tensor<4>, scale: usize) -> Tensor<4> {
        let [rows, columns] = self.ranges(scale);
        x.clone().narrow(2, rows.start, rows.len()).narrow(3, columns.start, columns.len())
    }
}

/// How the weight of a tile falls towards its sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ramp {
    /// On all four sides, over half a stride (the autoencoder's).
    ///
    /// Source: DiffSynth (tiler.py, `TileWorker`).
    AllSides,
    /// On the sides inside the picture, over half the tile (the transformer's).
    ///
    /// Source: DiffSynth (flux_image.py, `FastTileWorker`).
    InnerSides,
}

/// Runs `forward` on each tile and blends the results.
///
/// # Shapes
/// - `forward`: number of the tile, tile -> `[batch, channels, tile height * scale, tile width * scale]`
/// - returns: `[batch, channels, picture height * scale, picture width * scale]`
pub(crate) fn tiled(
    picture: LatentSize,
    tiling: Tiling,
    ramp: Ramp,
    scale: usize,
    mut forward: impl FnMut(usize, Tile) -> Tensor<4>,
) -> Tensor<4> {
    let tiles = tiling.tiles(picture);
    if let [tile] = tiles[..] {
        return forward(0, tile);
    }
    let blend = Blend::new(picture, tiling, ramp, scale, &tiles);
    let mut sum: Option<Tensor<4>> = None;
    for (i, tile) in tiles.into_iter().enumerate() {
        let part = forward(i, tile);
        let [batch, channels, _, _] = part.dims();
        let (device, dtype) = (part.device(), part.dtype());
        let weight = blend.weight_tensor(tile, dtype, &device);
        let whole = sum.take().unwrap_or_else(|| {
            Tensor::zeros([batch, channels, picture.height * scale, picture.width * scale], (&device, dtype))
        });
        let [rows, columns] = tile.ranges(scale);
        let range = [0..batch, 0..channels, rows, columns];
        let blended = tile.of(&whole, scale) + part * weight;
        sum = Some(whole.slice_assign(range, blended));
    }
    sum.unwrap_or_else(|| Tensor::zeros([0; 4], &Device::default()))
}

/// The weights of all tiles of a picture.
struct Blend {
    ramp: Ramp,
    scale: usize,
    picture: LatentSize,
    /// Length of the ramp in output positions, for [`Ramp::AllSides`].
    border: usize,
    /// Sum of the ramps at each output position.
    total: Vec<f32>,
}

impl Blend {
    fn new(picture: LatentSize, tiling: Tiling, ramp: Ramp, scale: usize, tiles: &[Tile]) -> Self {
        let border = tiling.stride / 2 * scale;
        let mut blend = Self { ramp, scale, picture, border, total: vec![] };
        let width = picture.width * scale;
        let mut total = vec![0.0; picture.height * scale * width];
        for &tile in tiles {
            blend.for_each(tile, |row, column, ramp| total[row * width + column] += ramp);
        }
        blend.total = total;
        blend
    }

    /// Visits the output positions of a tile in raster order with the tile's ramp there.
    fn for_each(&self, tile: Tile, mut visit: impl FnMut(usize, usize, f32)) {
        let [rows, columns] = tile.ranges(self.scale);
        let border = match self.ramp {
            Ramp::AllSides => self.border.max(1),
            Ramp::InnerSides => ((rows.len() + columns.len()) / 4).max(1),
        };
        let outer = self.ramp == Ramp::AllSides;
        let distance = |position: usize, range: &Range<usize>, length: usize| {
            let before = if outer || range.start > 0 { position - range.start + 1 } else { border };
            let after = if outer || range.end < length { range.end - position } else { border };
            before.min(after)
        };
        for row in rows.clone() {
            let from_row = distance(row, &rows, self.picture.height * self.scale);
            for column in columns.clone() {
                let from_column = distance(column, &columns, self.picture.width * self.scale);
                visit(row, column, from_row.min(from_column).min(border) as f32 / border as f32);
            }
        }
    }

    /// The share of a tile at each of its output positions: `[1, 1, height, width]`.
    fn weight_tensor(&self, tile: Tile, dtype: DType, device: &Device) -> Tensor<4> {
        let [rows, columns] = tile.ranges(self.scale);
        let width = self.picture.width * self.scale;
        let mut weights = Vec::with_capacity(rows.len() * columns.len());
        self.for_each(tile, |row, column, ramp| weights.push(ramp / self.total[row * width + column]));
        let weights = TensorData::new(weights, [1, 1, rows.len(), columns.len()]);
        Tensor::<4>::from_data(weights, (device, DType::F32)).cast(dtype)
    }
}

#[cfg(test)]
mod tests {
    use nexus_core::testing::{assert_close_tensors, cpu, ramp};

    use super::*;

    #[test]
    fn tiles_cover_every_position_of_any_size() {
        for (size, stride) in [(2, 2), (8, 4), (8, 6), (8, 8), (10, 2), (128, 64)] {
            let tiling = Tiling::new(size, stride).unwrap();
            for length in (2..70).step_by(2) {
                let picture = LatentSize { height: length, width: (length * 7 % 40).max(2) / 2 * 2 };
                let tiles = tiling.tiles(picture);
                let mut covered = vec![false; picture.height * picture.width];
                for tile in &tiles {
                    let [rows, columns] = tile.ranges(1);
                    assert!(rows.end <= picture.height && columns.end <= picture.width);
                    assert_eq!((rows.len(), columns.len()), (size.min(picture.height), size.min(picture.width)));
                    rows.for_each(|row| columns.clone().for_each(|c| covered[row * picture.width + c] = true));
                }
                assert!(covered.iter().all(|&covered| covered), "{tiling:?} {picture:?}");
            }
        }
    }

    #[test]
    fn tiles_are_where_the_original_puts_them() {
        let rows = |length, size, stride| starts(length, size, stride);
        assert_eq!(rows(12, 8, 4), [0, 4]);
        assert_eq!(rows(14, 8, 4), [0, 4, 6]);
        assert_eq!(rows(8, 8, 4), [0]);
        assert_eq!(rows(16, 8, 8), [0, 8]);
    }

    #[test]
    fn blending_equal_tiles_gives_the_picture_without_nan() {
        for ramps in [Ramp::AllSides, Ramp::InnerSides] {
            for (height, width) in [(2, 2), (8, 10), (14, 22), (18, 6), (40, 12)] {
                for (size, stride) in [(8, 4), (8, 6), (6, 6), (4, 2), (64, 32)] {
                    for scale in [1, 3] {
                        let x = ramp([1, 2, height * scale, width * scale], 5);
                        let picture = LatentSize { height, width };
                        let tiling = Tiling::new(size, stride).unwrap();
                        let y = tiled(picture, tiling, ramps, scale, |_, tile| tile.of(&x, scale));
                        assert_close_tensors(&y, &x, 1e-6);
                    }
                }
            }
        }
    }

    #[test]
    fn tiles_blend_as_in_the_original() {
        // Two tiles of 4x4 below each other share two rows; each tile is filled with its own number.
        let picture = LatentSize { height: 6, width: 4 };
        let column = |ramps, scale| {
            let fill = |i: usize, _| Tensor::full([1, 1, 4 * scale, 4 * scale], i as f32, &cpu());
            let blended = tiled(picture, Tiling::new(4, 2).unwrap(), ramps, scale, fill);
            blended.narrow(3, 1, 1).into_data().try_to_vec::<f32>().unwrap()
        };
        let third = 1.0 / 3.0;
        // Ramps of two positions on the inner sides: weights 1, 1, 1, 1/2 and 1/2, 1, 1, 1.
        assert_near(&column(Ramp::InnerSides, 1), &[0.0, 0.0, third, 2.0 * third, 1.0, 1.0]);
        // Ramps of one position: no ramp at all.
        assert_near(&column(Ramp::AllSides, 1), &[0.0, 0.0, 0.5, 0.5, 1.0, 1.0]);
        // Ramps of three positions, of which the side of the picture leaves the column two: both tiles weigh the same
        // but at their edges.
        let expected =
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, third, 0.5, 0.5, 0.5, 0.5, 2.0 * third, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
        assert_near(&column(Ramp::AllSides, 3), &expected);
    }

    #[track_caller]
    fn assert_near(actual: &[f32], expected: &[f32]) {
        assert_eq!(actual.len(), expected.len());
        assert!(actual.iter().zip(expected).all(|(a, e)| (a - e).abs() < 1e-6), "{actual:?}");
    }

    #[test]
    fn tiles_are_numbered_in_order() {
        let x = ramp([1, 1, 14, 14], 1);
        let mut numbers = vec![];
        tiled(LatentSize::of(&x), Tiling::new(8, 4).unwrap(), Ramp::InnerSides, 1, |i, tile| {
            numbers.push(i);
            tile.of(&x, 1)
        });
        assert_eq!(numbers, [0, 1, 2, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn gaps_and_odd_numbers_are_refused() {
        for (size, stride) in [(0, 2), (8, 0), (7, 2), (8, 3), (8, 10)] {
            assert!(matches!(Tiling::new(size, stride), Err(DiffusionError::Option { .. })), "{size} {stride}");
        }
        assert!(serde_json::from_str::<Tiling>(r#"{"size": 8, "stride": 10}"#).is_err());
        let json = serde_json::to_string(&Tiling::default()).unwrap();
        assert_eq!(serde_json::from_str::<Tiling>(&json).unwrap(), Tiling::default());
    }
}
