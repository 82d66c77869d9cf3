//! The vision encoder of Nexus-Gen (Qwen2.5-VL's): pixel patches -> [`nexus_core::ImageEmbeds`].
//!
//! ```no_run
//! use burn::tensor::{Device, DeviceType, Tensor};
//! use nexus_checkpoint::{Checkpoint, LoadOptions};
//! use nexus_core::GridThw;
//! use nexus_vision_encoder::{VisionConfig, VisionEncoder};
//!
//! # fn main() -> Result<(), nexus_vision_encoder::VisionEncoderError> {
//! let device = Device::default();
//! let checkpoint = Checkpoint::open("models/Nexus-GenV2")?;
//! let config = VisionConfig::read("models/Nexus-GenV2/config.json")?;
//! let encoder = VisionEncoder::load(&checkpoint, &config, &device, &LoadOptions::default())?;
//! let patches = Tensor::<2>::zeros([18 * 18, 1176], &device);
//! let images = encoder.encode(patches, &[GridThw::GENERATED])?;
//! assert_eq!(images[0].values.dims(), [1, 81, config.out_hidden_size]);
//! # Ok(())
//! # }
//! ```
//!
//! Resizing and patching happen in `nexus-data`; nothing here reads a picture or a text.

mod block;
mod config;
mod encoder;
mod labels;
mod merger;
mod objective;
mod weights;
mod window;

pub use block::{VisionAttention, VisionBlock};
pub use config::VisionConfig;
pub use encoder::{PatchEmbed, PatchProjection, VisionEncoder, VisionEncoderError};
pub use labels::{ExcludedClass, LabelHead};
pub use merger::{MergerMlp, PatchMerger};
pub use objective::{AppearanceHead, AppearanceInput, AppearanceLoss, AppearanceObjective, appearance};
pub use weights::NAMES;
pub use window::WindowLayout;
