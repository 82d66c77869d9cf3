//! The patch merger: four patches -> one embedding of the language model's width.

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};
use nexus_core::{
    MERGE_SIZE,
    nn::{Linear, RmsNorm},
};
use nexus_kernels::gelu;

use crate::VisionConfig;

/// Pools each 2x2 square of patches into one token of the language model's width.
///
/// Source: Qwen2.5-VL (modeling_qwen2_5_vl.py, `Qwen2_5_VLPatchMerger`).
#[derive(Module, Debug)]
pub struct PatchMerger {
    /// Norm of single patches.
    pub ln_q: RmsNorm,
    /// Two-layer perceptron over the joined patches.
    pub mlp: MergerMlp,
}

/// Perceptron of [`PatchMerger`]; the checkpoint calls the layers `0` and `2`.
#[derive(Module, Debug)]
pub struct MergerMlp {
    /// `[4 * hidden, 4 * hidden]`.
    pub fc1: Linear,
    /// `[out_hidden, 4 * hidden]`.
    pub fc2: Linear,
}

impl PatchMerger {
    /// A lazily initialised merger.
    pub fn new(config: &VisionConfig, device: &Device) -> Self {
        let joined = config.hidden_size * MERGE_SIZE * MERGE_SIZE;
        Self {
            ln_q: RmsNorm::new(config.hidden_size, 1e-6, device),
            mlp: MergerMlp {
                fc1: Linear::new(joined, joined, device),
                fc2: Linear::new(joined, config.out_hidden_size, device),
            },
        }
    }

    /// # Shapes
    /// - `x`: `[1, patches, hidden]`, the four patches of a cell side by side
    /// - returns: `[1, patches / 4, out_hidden]`, same order
    ///
    /// # Panics
    /// If `patches` is not a multiple of 4.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, patches, hidden] = x.dims();
        let cell = MERGE_SIZE * MERGE_SIZE;
        let joined = self.ln_q.forward(x).reshape([batch, patches / cell, cell * hidden]);
        self.mlp.fc2.forward(gelu(self.mlp.fc1.forward(joined)))
    }
}
