//! The stage: pixel patches and their grids -> image embeddings.

use burn::{
    module::{Module, Param},
    tensor::{Device, Tensor},
};
use nexus_checkpoint::{Checkpoint, CheckpointError, LoadOptions, load_module};
use nexus_core::{
    EmbedsError, GridThw, ImageEmbeds,
    config::ConfigError,
    nn::{inverse_frequencies, normal_param},
};
use nexus_kernels::{RotaryTable, index_tensor, linear};

use crate::{NAMES, PatchMerger, VisionBlock, VisionConfig, WindowLayout, window::patch_coordinates};

const ROTARY_THETA: f64 = 10_000.0;

/// The vision encoder of Qwen2.5-VL: windowed attention with a few blocks of full attention.
#[derive(Module, Debug)]
pub struct VisionEncoder {
    /// Projection of raw patches.
    pub patch_embed: PatchEmbed,
    /// Transformer blocks.
    pub blocks: Vec<VisionBlock>,
    /// Pooling to the language model's width.
    pub merger: PatchMerger,
    #[module(skip)]
    config: VisionConfig,
}

/// Projection of raw patches, stored as a 3-D convolution.
#[derive(Module, Debug)]
pub struct PatchEmbed {
    /// The convolution.
    pub proj: PatchProjection,
}

/// Kernel of [`PatchEmbed`].
#[derive(Module, Debug)]
pub struct PatchProjection {
    /// `[hidden, channels, frames, height, width]`; kernel and stride are one patch, so it is a matrix product.
    pub weight: Param<Tensor<5>>,
}

impl VisionEncoder {
    /// A lazily initialised encoder.
    pub fn new(config: &VisionConfig, device: &Device) -> Self {
        let VisionConfig { hidden_size, in_channels, temporal_patch_size, patch_size, .. } = *config;
        let kernel = [hidden_size, in_channels, temporal_patch_size, patch_size, patch_size];
        Self {
            patch_embed: PatchEmbed { proj: PatchProjection { weight: normal_param(kernel, device) } },
            blocks: (0..config.depth).map(|_| VisionBlock::new(config, device)).collect(),
            merger: PatchMerger::new(config, device),
            config: config.clone(),
        }
    }

    /// Loads the `visual.*` weights.
    ///
    /// # Errors
    /// [`VisionEncoderError::Config`] if the sizes are incoherent, [`VisionEncoderError::Checkpoint`] if a weight is
    /// missing, left over, or of another shape or dtype.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &VisionConfig,
        device: &Device,
        options: &LoadOptions,
    ) -> Result<Self, VisionEncoderError> {
        config.validate()?;
        Ok(load_module(Self::new(config, device), checkpoint, &NAMES, options)?)
    }

    /// Sizes of the encoder.
    pub fn config(&self) -> &VisionConfig {
        &self.config
    }

    /// Encodes one or several images; images do not see each other.
    ///
    /// # Shapes
    /// - `patches`: `[patches, 1176]`, normalised pixels of all images one after the other, as `nexus-data` orders
    ///   them; their dtype is the compute dtype
    /// - returns: one `[1, tokens, out_hidden]` per grid, tokens in raster order
    ///
    /// # Errors
    /// [`VisionEncoderError::Patches`] if the number or the width of the patches does not fit the grids.
    pub fn encode(&self, patches: Tensor<2>, grids: &[GridThw]) -> Result<Vec<ImageEmbeds>, VisionEncoderError> {
        let [found, width] = patches.dims();
        let expected: usize = grids.iter().map(GridThw::num_patches).sum();
        if (found, width) != (expected, self.config.patch_values()) || expected == 0 {
            let expected_width = self.config.patch_values();
            return Err(VisionEncoderError::Patches { found, width, expected, expected_width });
        }
        let embeds = self.forward(patches, grids);
        let mut start = 0;
        grids
            .iter()
            .map(|&grid| {
                let tokens = grid.num_merged_tokens();
                let values = embeds.clone().narrow(1, start, tokens);
                start += tokens;
                Ok(ImageEmbeds::new(values, grid)?)
            })
            .collect()
    }

    /// The forward pass behind [`VisionEncoder::encode`].
    ///
    /// # Shapes
    /// - `patches`: `[patches, 1176]`
    /// - returns: `[1, patches / 4, out_hidden]`, tokens of all images in raster order
    ///
    /// # Panics
    /// If the patches do not fit the grids.
    pub fn forward(&self, patches: Tensor<2>, grids: &[GridThw]) -> Tensor<3> {
        let device = patches.device();
        let layout = WindowLayout::new(grids, self.config.window_cells());
        let rotary = self.rotary(grids, &layout, &device);
        let mut x = reorder(self.patch_embed.forward(patches), &layout.cell_order);
        for (index, block) in self.blocks.iter().enumerate() {
            let full = self.config.fullatt_block_indexes.contains(&index);
            x = block.forward(x, &rotary, if full { &layout.frame_bounds } else { &layout.window_bounds });
        }
        reorder(self.merger.forward(x), &layout.cell_places)
    }

    /// Rotary tables of the patches in window order: half of the angles follow the row, half the column.
    ///
    /// # Shapes
    /// f32 tables `[1, patches, head_dim / 2]`
    pub fn rotary(&self, grids: &[GridThw], layout: &WindowLayout, device: &Device) -> RotaryTable {
        let pairs = self.config.head_dim() / 2;
        let frequencies = inverse_frequencies(pairs, ROTARY_THETA);
        let coordinates: Vec<[usize; 2]> = patch_coordinates(grids).collect();
        let cell = coordinates.len() / layout.cell_order.len();
        let angles: Vec<f32> = layout
            .cell_order
            .iter()
            .flat_map(|&index| &coordinates[index * cell..(index + 1) * cell])
            .flat_map(|position| position.iter().flat_map(|&p| frequencies.iter().map(move |f| p as f32 * f)))
            .collect();
        RotaryTable::from_f32(&angles, coordinates.len(), pairs, device)
    }
}

impl PatchEmbed {
    /// # Shapes
    /// - `patches`: `[patches, channels * frames * height * width]`
    /// - returns: `[1, patches, hidden]`
    pub fn forward(&self, patches: Tensor<2>) -> Tensor<3> {
        let weight = self.proj.weight.val();
        let [hidden, channels, frames, height, width] = weight.dims();
        linear(patches, weight.reshape([hidden, channels * frames * height * width]), None).unsqueeze()
    }
}

/// Puts the cells (equal runs of tokens) of `x` in another order: place `i` gets cell `order[i]`.
fn reorder(x: Tensor<3>, order: &[usize]) -> Tensor<3> {
    let [batch, tokens, width] = x.dims();
    let indices = index_tensor(order.iter().copied(), [order.len()], &x.device());
    let cells = x.reshape([batch, order.len(), tokens / order.len() * width]);
    cells.select(1, indices).reshape([batch, tokens, width])
}

/// What can go wrong in the vision encoder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VisionEncoderError {
    /// The configuration is absent, malformed or incoherent.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights cannot be read or do not fit.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A grid is not usable.
    #[error(transparent)]
    Embeds(#[from] EmbedsError),
    /// Patches and grids disagree.
    #[error("{found} patches of {width} values were given, but the grids need {expected} of {expected_width}")]
    Patches {
        /// Number of patches given.
        found: usize,
        /// Values in a given patch.
        width: usize,
        /// Number of patches that the grids need.
        expected: usize,
        /// Values that a patch needs.
        expected_width: usize,
    },
}
