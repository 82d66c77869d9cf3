//! Image embeddings, the space that all stages share: vision encoder -> [`ImageEmbeds`] -> AR model and diffusion.

use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};

use nexus_checkpoint::{Checkpoint, CheckpointError, write_safetensors};

/// Side of one patch of the vision encoder, in pixels.
pub const PATCH_SIZE_PX: usize = 14;

/// Patches along one side of a merged token.
pub const MERGE_SIZE: usize = 2;

/// Size of an image as the vision encoder sees it, counted in patches of [`PATCH_SIZE_PX`] pixels.
///
/// `t` frames (1 for an image), `h` rows and `w` columns of patches; rows and columns are even, so that every
/// [`MERGE_SIZE`]² patches make one merged token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct GridThw {
    /// Frames; 1 for an image.
    pub t: usize,
    /// Rows of patches.
    pub h: usize,
    /// Columns of patches.
    pub w: usize,
}

impl GridThw {
    /// Grid of a generated image: 18x18 patches, 81 merged tokens.
    pub const GENERATED: Self = Self { t: 1, h: 18, w: 18 };

    /// Grid of the reference image of the editing decoder: 36x36 patches, 324 merged tokens.
    pub const REFERENCE: Self = Self { t: 1, h: 36, w: 36 };

    /// Checks that a grid is usable.
    ///
    /// # Errors
    /// [`EmbedsError::Grid`] if a side is zero or odd, or if the number of patches does not fit in memory.
    pub fn new(t: usize, h: usize, w: usize) -> Result<Self, EmbedsError> {
        let even = |side: usize| side > 0 && side.is_multiple_of(MERGE_SIZE);
        let countable = t.checked_mul(h).and_then(|n| n.checked_mul(w)).is_some();
        if t == 0 || !even(h) || !even(w) || !countable {
            return Err(EmbedsError::Grid { t, h, w });
        }
        Ok(Self { t, h, w })
    }

    /// Grid of an image of `height` x `width` pixels.
    ///
    /// # Errors
    /// [`EmbedsError::Pixels`] if a side is not a positive multiple of 28 pixels.
    pub fn from_pixels(height: usize, width: usize) -> Result<Self, EmbedsError> {
        let cell_px = PATCH_SIZE_PX * MERGE_SIZE;
        if height == 0 || width == 0 || !height.is_multiple_of(cell_px) || !width.is_multiple_of(cell_px) {
            return Err(EmbedsError::Pixels { height, width });
        }
        Ok(Self { t: 1, h: height / PATCH_SIZE_PX, w: width / PATCH_SIZE_PX })
    }

    /// Number of patches.
    pub fn num_patches(&self) -> usize {
        self.t * self.h * self.w
    }

    /// Rows of merged tokens.
    pub fn merged_h(&self) -> usize {
        self.h / MERGE_SIZE
    }

    /// Columns of merged tokens.
    pub fn merged_w(&self) -> usize {
        self.w / MERGE_SIZE
    }

    /// Number of merged tokens, which is the number of image positions in the language model.
    pub fn num_merged_tokens(&self) -> usize {
        self.t * self.merged_h() * self.merged_w()
    }

    /// Height and width in pixels.
    pub fn pixels(&self) -> (usize, usize) {
        (self.h * PATCH_SIZE_PX, self.w * PATCH_SIZE_PX)
    }
}

impl std::fmt::Display for GridThw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}x{}", self.t, self.h, self.w)
    }
}

/// Embeddings of one image (or of a batch of images of one size) in the space shared by all stages.
///
/// The vision encoder makes them from pixels, the AR model reads them and predicts new ones, and the decoders draw
/// them. Merged tokens are in raster order.
#[derive(Clone)]
pub struct ImageEmbeds {
    /// `[batch, tokens, hidden]`, where `tokens == grid.num_merged_tokens()`.
    pub values: Tensor<3>,
    /// Size of the image in patches.
    pub grid: GridThw,
}

impl std::fmt::Debug for ImageEmbeds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ImageEmbeds({} patches, {:?} {:?})", self.grid, self.values.dtype(), self.values.dims())
    }
}

impl ImageEmbeds {
    /// Joins values and grid.
    ///
    /// # Errors
    /// [`EmbedsError::Tokens`] if the number of tokens is not the grid's.
    pub fn new(values: Tensor<3>, grid: GridThw) -> Result<Self, EmbedsError> {
        let [_, tokens, _] = values.dims();
        if tokens != grid.num_merged_tokens() {
            return Err(EmbedsError::Tokens { tokens, grid, expected: grid.num_merged_tokens() });
        }
        Ok(Self { values, grid })
    }

    /// Writes the embeddings as a safetensors file with the tensors `values` and `grid_thw`.
    ///
    /// # Errors
    /// [`EmbedsError::Checkpoint`] if the file cannot be written; no partial file is left.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), EmbedsError> {
        let GridThw { t, h, w } = self.grid;
        let grid = TensorData::new(vec![t as i64, h as i64, w as i64], [3]);
        let (path, name) = (path.as_ref(), "values".to_string());
        let values = self.values.clone().try_into_data().map_err(|error| CheckpointError::Values {
            path: path.to_path_buf(),
            name: name.clone(),
            reason: format!("cannot be read from the device: {error}"),
        })?;
        Ok(write_safetensors(path, vec![("grid_thw".to_string(), grid), (name, values)], None)?)
    }

    /// Reads what [`ImageEmbeds::save`] wrote, in the dtype of the file, or in f32 where the device has not got it.
    ///
    /// # Errors
    /// [`EmbedsError::Checkpoint`] if the file is absent or malformed; [`EmbedsError::File`] if it holds no embeddings.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self, EmbedsError> {
        let path = path.as_ref();
        let file = Checkpoint::open(path)?;
        let bad = |reason: &str| EmbedsError::File { path: path.to_path_buf(), reason: reason.to_string() };
        let grid: Vec<i64> = file.data("grid_thw")?.try_to_vec().map_err(|e| bad(&e.to_string()))?;
        let [t, h, w] = grid[..] else { return Err(bad("`grid_thw` must hold three integers")) };
        let side = |n: i64| usize::try_from(n).map_err(|_| bad("`grid_thw` holds a negative number"));
        let grid = GridThw::new(side(t)?, side(h)?, side(w)?)?;
        let values = file.data("values")?;
        if values.rank() != 3 {
            return Err(bad("`values` must be [batch, tokens, hidden]"));
        }
        if !values.dtype().is_float() {
            return Err(bad("`values` must be floats"));
        }
        let dtype = if device.supports_dtype(values.dtype()) { values.dtype() } else { DType::F32 };
        Self::new(Tensor::from_data(values, (device, dtype)), grid)
    }
}

/// What can be wrong with image embeddings or grids.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmbedsError {
    /// A grid with a zero or odd side.
    #[error(
        "grid {t}x{h}x{w} is not usable: frames must be at least 1, rows and columns positive even numbers of patches"
    )]
    Grid {
        /// Frames.
        t: usize,
        /// Rows of patches.
        h: usize,
        /// Columns of patches.
        w: usize,
    },
    /// An image size that is not a whole number of merged tokens.
    #[error(
        "an image of {height}x{width} pixels is not a whole number of 28x28 cells: resize it with smart_resize first"
    )]
    Pixels {
        /// Height in pixels.
        height: usize,
        /// Width in pixels.
        width: usize,
    },
    /// The number of embeddings does not fit the grid.
    #[error("{tokens} embeddings do not fit grid {grid}, which has {expected} merged tokens")]
    Tokens {
        /// Number of embeddings given.
        tokens: usize,
        /// Grid they should fill.
        grid: GridThw,
        /// Number that the grid needs.
        expected: usize,
    },
    /// The file is a checkpoint but holds no embeddings.
    #[error("{path}: no image embeddings: {reason}", path = path.display())]
    File {
        /// File that was read.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Reading or writing failed.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}
