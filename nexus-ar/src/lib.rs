//! The autoregressive model of Nexus-Gen: token ids and image embeddings -> text and new image embeddings.
//!
//! The model is Qwen2.5-VL's language model with two additions: a vision head, which predicts embeddings in the space
//! of the vision encoder, and 81 learned prefill embeddings that stand at the positions of an image to be drawn. All
//! 81 are fed in one causal pass, so that no prediction depends on an earlier, imperfect one.
//!
//! ```no_run
//! use std::ops::ControlFlow;
//!
//! use burn::tensor::Device;
//! use nexus_ar::{ArConfig, ArModel, GenerateOptions, Prompt, generate};
//! use nexus_checkpoint::{Checkpoint, LoadOptions};
//!
//! # fn main() -> Result<(), nexus_ar::ArError> {
//! let device = Device::default();
//! let config = ArConfig::read("models/Nexus-GenV2/config.json")?;
//! let checkpoint = Checkpoint::open("models/Nexus-GenV2")?;
//! let model = ArModel::load(&checkpoint, &config, &device, &LoadOptions::default())?;
//! let prompt = Prompt { token_ids: &[151644, 872, 198], images: &[] };
//! let options = GenerateOptions::default();
//! let generation = generate(&model, prompt, &options, &mut |_event| ControlFlow::Continue(()))?;
//! println!("{} new tokens, {} images", generation.new_token_ids().len(), generation.images.len());
//! # Ok(())
//! # }
//! ```
//!
//! Strings and pixels never come here; the KV cache belongs to the caller.

mod attended;
mod config;
mod context;
mod error;
mod generate;
mod kv_cache;
mod model;
mod objective;
mod position;
mod sampling;
mod training_batch;
mod weights;

pub use attended::Attended;
pub use config::{ArConfig, GenerationConfig, RopeScaling, TokenIds};
pub use context::Context;
pub use error::ArError;
pub use generate::{
    FinishReason, GenerateEvent, GenerateOptions, Generation, ImagePass, PositionsAfterImage, Prompt, TextStep,
    generate, generate_in,
};
pub use kv_cache::KvCache;
pub use model::{ArModel, NUM_IMAGE_TOKENS, TextModel};
pub use objective::{AnswerEmbeds, ArLoss, ArObjective, ArOutput};
pub use position::{PositionIds, image_position_ids, position_ids};
pub use sampling::{Sampler, SamplingOptions};
pub use training_batch::{ExcludedToken, SampleOutline, TrainingBatch, TrainingSample};
pub use weights::NAMES;
