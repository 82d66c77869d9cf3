//! The SiLU-gated feed-forward block of the Qwen models.

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};

use nexus_kernels::silu_mul;

use super::Linear;

/// `down(silu(gate(x)) * up(x))`.
#[derive(Module, Debug)]
pub struct GatedMlp {
    /// `[intermediate, hidden]`.
    pub gate_proj: Linear,
    /// `[intermediate, hidden]`.
    pub up_proj: Linear,
    /// `[hidden, intermediate]`.
    pub down_proj: Linear,
}

impl GatedMlp {
    /// A block with biases (vision encoder).
    pub fn new(hidden: usize, intermediate: usize, device: &Device) -> Self {
        Self {
            gate_proj: Linear::new(hidden, intermediate, device),
            up_proj: Linear::new(hidden, intermediate, device),
            down_proj: Linear::new(intermediate, hidden, device),
        }
    }

    /// A block without biases (language model).
    pub fn without_bias(hidden: usize, intermediate: usize, device: &Device) -> Self {
        Self {
            gate_proj: Linear::without_bias(hidden, intermediate, device),
            up_proj: Linear::without_bias(hidden, intermediate, device),
            down_proj: Linear::without_bias(intermediate, hidden, device),
        }
    }

    /// # Shapes
    /// `[batch, tokens, hidden]` to the same.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.down_proj.forward(silu_mul(self.gate_proj.forward(x.clone()), self.up_proj.forward(x)))
    }
}
