//! nexus: one model that understands, generates and edits images, in Rust.
//!
//! [`Nexus`] runs Nexus-Gen (arXiv 2504.21356) from its released checkpoints: a language model reads text and images
//! and, to draw, predicts 81 embeddings in the space of its own vision encoder; a FLUX-based diffusion transformer,
//! conditioned on them, draws the pixels.
//!
//! ```no_run
//! use nexus::{DrawOptions, EditOptions, GenerateOptions, Image, Message, Nexus, TextOptions};
//!
//! # fn main() -> Result<(), nexus::Error> {
//! let device = nexus::device("cpu")?;
//! let nexus = Nexus::load("models", &device)?;
//! let cat = Image::open("cat.png")?;
//! println!("{}", nexus.understand(&cat, "What is this?", &TextOptions::default(), ())?);
//! let draw = DrawOptions { steps: 30, ..DrawOptions::default() };
//! nexus.generate("A cute cat", &GenerateOptions { draw, ..Default::default() }, ())?.save("new.png")?;
//! nexus.edit(&cat, "Add a pair of sunglasses", &EditOptions::default(), ())?.save("edited.png")?;
//! let mut conversation = nexus.conversation();
//! let answer = conversation.send(Message::text("Describe it, then draw it at night").with_image(cat), ())?;
//! println!("{}, and {} pictures", answer.text(), answer.pictures().count());
//! # Ok(())
//! # }
//! ```
//!
//! `models` is the original's directory: `Nexus-GenV2/` and `FLUX/FLUX.1-dev/` with the released file names.
//!
//! # The stages
//! Each stage is a crate of its own that can be used alone; the facade only chooses, orders and reports. Between them
//! goes one type, [`ImageEmbeds`]: it can be saved, loaded, compared and drawn again.
//!
//! | crate | data in -> data out |
//! |---|---|
//! | [`data`] | messages -> token ids and pixel patches |
//! | [`vision_encoder`] | pixel patches -> [`ImageEmbeds`] |
//! | [`ar`] | token ids and [`ImageEmbeds`] -> text and new [`ImageEmbeds`] |
//! | [`diffusion`] | [`ImageEmbeds`] -> pixels |
//! | [`core`] | what they share: embeddings, configuration files, neural-network blocks |
//! | [`checkpoint`] | files of weights <-> modules |
//!
//! # Features
//! Backends; any set can be compiled into one program, and [`device`] chooses at run time.
//!
//! | feature | devices |
//! |---|---|
//! | `cpu` (default) | CPU: `cpu` |
//! | `wgpu` | GPUs through WebGPU: `wgpu:0` |
//! | `vulkan` | GPUs through Vulkan: `vulkan:0` |
//! | `metal` | Apple GPUs: `metal:0` |
//! | `cuda`, `cuda-nvrtc` | NVIDIA GPUs, their kernels compiled by LLVM or by NVRTC: `cuda:0` |
//! | `rocm` | AMD GPUs: `rocm:0` |
//!
//! Beside them: `gif` and `webp` (default) read pictures in these formats too, `manifest` lets [`checkpoint`] record and
//! compare hashes of weights.
//!
//! What a device computes in, unless the [`Loader`] is told otherwise ([`Precision`]):
//!
//! | device | weights | activations | inside norms |
//! |---|---|---|---|
//! | CPU | as stored, mapped from the file | f32 | f32 |
//! | with bf16 | bf16 | bf16 | f32 |
//! | without bf16 | f32 | f32 | f32 |
//!
//! Training is a crate that one adds: `nexus-train`.

mod conversation;
mod conversation_file;
mod device;
mod error;
mod failure;
mod files;
mod images;
mod licences;
mod loader;
mod nexus;
mod options;
mod parts;
mod progress;
mod reply;
mod running;
mod slot;
mod stages;

pub use burn;
pub use burn::tensor::{Device, FloatDType};
pub use conversation::{Answer, AnswerPart, Conversation, ConversationDecoder, ConversationOptions};
pub use device::{DeviceError, DeviceInfo, Precision, device, devices};
pub use error::Error;
pub use files::ModelFiles;
pub use images::Images;
pub use licences::{Clause, LICENCES, WeightsLicence};
pub use loader::Loader;
pub use nexus::Nexus;
pub use nexus_ar::{GenerationConfig, ImagePass, PositionsAfterImage, SamplingOptions};
pub use nexus_checkpoint::Quantization;
pub use nexus_core::{GridThw, ImageEmbeds};
pub use nexus_data::{Image, ImageLimits, Language, Message, Part, Role};
pub use nexus_diffusion::Noise;
pub use options::{DrawOptions, DrawWith, EditOptions, EditWith, GenerateOptions, Start, TextOptions};
pub use progress::{Observer, Progress, Stage};
pub use reply::{Picture, Reply};
pub use stages::Residency;

#[doc(hidden)]
pub use error::{amounts, read};
#[doc(hidden)]
pub use failure::diagnose;

pub use nexus_ar as ar;
pub use nexus_checkpoint as checkpoint;
pub use nexus_core as core;
pub use nexus_data as data;
pub use nexus_diffusion as diffusion;
pub use nexus_vision_encoder as vision_encoder;
