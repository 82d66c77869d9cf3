//! Connector of the generation decoder: image embeddings -> condition tokens, one by one.

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};
use nexus_core::nn::{LayerNorm, Linear};
use nexus_kernels::relu;

const LAYER_NORM_EPS: f64 = 1e-5;

/// Two linear layers with layer norms.
///
/// Source: Nexus-Gen (generation decoder, `adapter`).
#[derive(Module, Debug)]
pub struct Adapter {
    /// `adapter.0`: `[context, hidden]`.
    pub linear_in: Linear,
    /// `adapter.1`.
    pub norm_in: LayerNorm,
    /// `adapter.3`: `[context, context]`.
    pub linear_out: Linear,
    /// `adapter.4`.
    pub norm_out: LayerNorm,
}

impl Adapter {
    /// A lazily initialised adapter from image embeddings of width `hidden` to condition tokens of width `context`.
    pub fn new(hidden: usize, context: usize, device: &Device) -> Self {
        Self {
            linear_in: Linear::new(hidden, context, device),
            norm_in: LayerNorm::new(context, LAYER_NORM_EPS, device),
            linear_out: Linear::new(context, context, device),
            norm_out: LayerNorm::new(context, LAYER_NORM_EPS, device),
        }
    }

    /// # Shapes
    /// - `embeds`: `[batch, tokens, hidden]`
    /// - returns: `[batch, tokens, context]`
    pub fn forward(&self, embeds: Tensor<3>) -> Tensor<3> {
        let x = relu(self.norm_in.forward(self.linear_in.forward(embeds)));
        self.norm_out.forward(self.linear_out.forward(x))
    }
}
