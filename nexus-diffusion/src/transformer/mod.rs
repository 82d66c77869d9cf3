//! The FLUX diffusion transformer: noisy latents, condition tokens and a timestep -> the velocity of the latents.

mod dit;
mod double_block;
mod inputs;
mod modulation;
mod single_block;
mod teacache;

pub use dit::{ConstantConditioning, Dit, DitInput};
pub use double_block::{DoubleBlock, FeedForward, JointAttention};
pub use inputs::{EMBEDDED_WIDTH, Mlp, image_positions, rounded, sinusoid};
pub use modulation::{AdaNorm, DitModulations, DoubleModulation, Modulation, ScaleShift, StreamModulation};
pub use single_block::SingleBlock;
pub use teacache::TeaCache;

/// Epsilon of every norm of the transformer.
const NORM_EPS: f64 = 1e-6;
