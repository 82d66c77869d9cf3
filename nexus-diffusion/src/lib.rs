//! Drawing: image embeddings -> pixels, with the FLUX-based decoders of Nexus-Gen.
//!
//! Data flow: [`ImageEmbeds`](nexus_core::ImageEmbeds) (and those of a reference picture) ->
//! [`GenerationDecoder::condition`] or [`EditingDecoder::condition`] -> [`Denoiser`], which turns noise into latents
//! step by step -> [`Autoencoder::decode`] -> a picture in -1..1.
//!
//! Messages are unknown here, and token ids are known to [`text_encoder`] alone. Weights keep the dtype of the file;
//! the dtype of the inputs decides in which dtype everything is computed. Nothing is hidden: device, dtype, seed and
//! options are arguments, and the state of a run belongs to the caller.
//!
//! ```no_run
//! use std::{ops::ControlFlow, path::Path};
//!
//! use burn::tensor::{DType, Device, FloatDType};
//! use nexus_checkpoint::{Checkpoint, LoadOptions};
//! use nexus_core::ImageEmbeds;
//! use nexus_diffusion::{
//!     Autoencoder, Branch, Branches, ClipTextEncoder, DenoiseOptions, Denoiser, GenerationDecoder, LatentSize, Noise,
//!     config::{AutoencoderConfig, ClipConfig, DiffusionConfig},
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::default();
//! let (nexus, flux) = (Path::new("models/Nexus-GenV2"), Path::new("models/FLUX/FLUX.1-dev"));
//! let options = LoadOptions::default();
//! let config = DiffusionConfig::read_in(nexus)?;
//! let weights = Checkpoint::open(nexus.join("generation_decoder.bin"))?;
//! let decoder = GenerationDecoder::load(&weights, &config, &device, &options)?;
//! let weights = Checkpoint::open(flux.join("ae.safetensors"))?;
//! let autoencoder = Autoencoder::load(&weights, &AutoencoderConfig::read_in(flux)?, &device, &options)?;
//! let clip_config = ClipConfig::read(&flux.join("text_encoder/config.json"))?;
//! let weights = Checkpoint::open(flux.join("text_encoder"))?;
//! let clip = ClipTextEncoder::load(&weights, &clip_config, &device, &options)?;
//!
//! let embeds = ImageEmbeds::load("cat.safetensors", &device)?;
//! let mut empty_text = vec![49_407; 77];
//! empty_text[0] = 49_406;
//! let pooled = clip.pooled(&empty_text, FloatDType::F32)?;
//! let positive = Branch { conditioning: decoder.condition(&embeds)?, pooled };
//! let size = LatentSize::from_pixels(512, 512)?;
//! let options = DenoiseOptions { cfg_scale: 1.0, ..Default::default() };
//! let denoiser = Denoiser::new(&decoder.dit, Branches { positive, negative: None }, size, &options)?;
//! let noise = Noise::Seed(52).into_latents(config.dit.latent_channels(), size, FloatDType::F32, &device)?;
//! let mut state = denoiser.start(noise, None)?;
//! let _ = denoiser.run(&mut state, &mut |event| {
//!     println!("{} of {}", event.step, event.num_steps);
//!     ControlFlow::Continue(())
//! });
//! let picture = autoencoder.decode(state.latents, None);
//! # Ok(())
//! # }
//! ```

pub mod autoencoder;
pub mod config;
pub mod connector;
mod decoder;
mod denoise;
mod error;
pub mod latents;
mod noise;
mod objective;
mod scheduler;
pub mod text_encoder;
mod tiling;
pub mod transformer;
pub mod weights;

pub use autoencoder::{Autoencoder, AutoencoderLoss, AutoencoderObjective};
pub use decoder::{Conditioning, EditingDecoder, GenerationDecoder};
pub use denoise::{Branch, Branches, DenoiseEvent, DenoiseOptions, DenoiseState, Denoiser};
pub use error::DiffusionError;
pub use latents::LatentSize;
pub use noise::{Noise, torch_randn};
pub use objective::{FlowLoss, FlowMatching, FlowMatchingInput};
pub use scheduler::FlowMatchSchedule;
pub use text_encoder::{ClipTextEncoder, T5Encoder};
pub use tiling::Tiling;
