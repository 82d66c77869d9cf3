//! Modulations: the conditioning vector -> shifts, scales and gates of every block.

use std::ops::Range;

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};
use nexus_core::nn::Linear;
use nexus_kernels::{modulate, silu};

use super::NORM_EPS;

/// The linear layer behind one adaptive norm.
#[derive(Module, Debug)]
pub struct AdaNorm {
    /// `[outputs * dim, dim]`.
    pub linear: Linear,
}

impl AdaNorm {
    /// A lazily initialised layer of `outputs` vectors.
    pub fn new(dim: usize, outputs: usize, device: &Device) -> Self {
        Self { linear: Linear::new(dim, dim * outputs, device) }
    }

    /// The vectors of this norm.
    ///
    /// # Shapes
    /// - `conditioning`: `[batch, dim]`
    /// - returns: `OUTPUTS` tensors `[batch, 1, dim]`
    fn vectors<const OUTPUTS: usize>(&self, conditioning: &Tensor<2>) -> [Tensor<3>; OUTPUTS] {
        let [_, dim] = conditioning.dims();
        let all = self.linear.forward(silu(conditioning.clone())).unsqueeze_dim::<3>(1);
        std::array::from_fn(|i| all.clone().narrow(2, i * dim, dim))
    }

    /// Shift, scale and gate of a single-stream block.
    pub fn single(&self, conditioning: &Tensor<2>) -> Modulation {
        let [shift, scale, gate] = self.vectors(conditioning);
        Modulation { shift, scale, gate }
    }

    /// Both modulations of one stream of a double-stream block.
    pub fn stream(&self, conditioning: &Tensor<2>) -> StreamModulation {
        let [shift, scale, gate, mlp_shift, mlp_scale, mlp_gate] = self.vectors(conditioning);
        StreamModulation {
            attention: Modulation { shift, scale, gate },
            mlp: Modulation { shift: mlp_shift, scale: mlp_scale, gate: mlp_gate },
        }
    }

    /// The output modulation, whose rows the decoders' files hold as `[scale, shift]`.
    pub fn output(&self, conditioning: &Tensor<2>) -> ScaleShift {
        let [scale, shift] = self.vectors(conditioning);
        ScaleShift { scale, shift }
    }

    /// The same layer with the two halves of its rows in the other order.
    pub(super) fn with_halves_swapped(self) -> Self {
        let Linear { weight, bias } = self.linear;
        let weight = weight.map(swap_halves);
        Self { linear: Linear { weight, bias: bias.map(|bias| bias.map(swap_halves)) } }
    }
}

/// The other order of the halves, as a weight that is trained if it was one.
fn swap_halves<const D: usize>(rows: Tensor<D>) -> Tensor<D> {
    let (half, is_trained) = (rows.dims()[0] / 2, rows.is_require_grad());
    // Detached alone it would still be trained, and so what is made of it a part of its graph.
    let rows = rows.detach().set_require_grad(false);
    let swapped = Tensor::cat(vec![rows.clone().narrow(0, half, half), rows.narrow(0, 0, half)], 0);
    if is_trained { swapped.require_grad() } else { swapped }
}

/// What one residual branch does to its input and output; `[batch, 1, dim]` each.
#[derive(Debug, Clone)]
pub struct Modulation {
    /// Added to the normalised input.
    pub shift: Tensor<3>,
    /// One less than the factor of the normalised input.
    pub scale: Tensor<3>,
    /// Factor of the branch's output.
    pub gate: Tensor<3>,
}

impl Modulation {
    /// `layer_norm(x) * (1 + scale) + shift`.
    ///
    /// # Shapes
    /// `[batch, tokens, dim]` to the same.
    pub fn modulate(&self, x: Tensor<3>) -> Tensor<3> {
        modulate(x, self.shift.clone(), self.scale.clone(), NORM_EPS)
    }
}

/// Modulations of one stream of a double-stream block.
#[derive(Debug, Clone)]
pub struct StreamModulation {
    /// Of attention.
    pub attention: Modulation,
    /// Of the feed-forward block.
    pub mlp: Modulation,
}

/// Modulations of a double-stream block.
#[derive(Debug, Clone)]
pub struct DoubleModulation {
    /// Of the image stream.
    pub image: StreamModulation,
    /// Of the text stream.
    pub text: StreamModulation,
}

/// Modulation before the last projection; `[batch, 1, dim]` each.
#[derive(Debug, Clone)]
pub struct ScaleShift {
    /// One less than the factor of the normalised input.
    pub scale: Tensor<3>,
    /// Added to the normalised input.
    pub shift: Tensor<3>,
}

impl ScaleShift {
    /// `layer_norm(x) * (1 + scale) + shift`.
    ///
    /// # Shapes
    /// `[batch, tokens, dim]` to the same.
    pub fn modulate(&self, x: Tensor<3>) -> Tensor<3> {
        modulate(x, self.shift.clone(), self.scale.clone(), NORM_EPS)
    }
}

/// The modulations of a whole transformer for one conditioning vector.
///
/// They depend on the timestep, the guidance and the pooled vector, not on the picture.
#[derive(Debug, Clone)]
pub struct DitModulations {
    /// One per double-stream block.
    pub double: Vec<DoubleModulation>,
    /// One per single-stream block.
    pub single: Vec<Modulation>,
    /// Before the last projection.
    pub output: ScaleShift,
}

impl DitModulations {
    /// The modulations of some samples of the batch.
    ///
    /// # Panics
    /// If there are not so many samples.
    pub fn samples(&self, samples: Range<usize>) -> Self {
        let [batch, ..] = self.output.scale.dims();
        if samples == (0..batch) {
            // Hundreds of views of the whole, each of which may be a copy on a GPU.
            return self.clone();
        }
        let part = |x: &Tensor<3>| x.clone().narrow(0, samples.start, samples.len());
        let branch = |x: &Modulation| Modulation { shift: part(&x.shift), scale: part(&x.scale), gate: part(&x.gate) };
        let stream = |x: &StreamModulation| StreamModulation { attention: branch(&x.attention), mlp: branch(&x.mlp) };
        let double = |x: &DoubleModulation| DoubleModulation { image: stream(&x.image), text: stream(&x.text) };
        Self {
            double: self.double.iter().map(double).collect(),
            single: self.single.iter().map(branch).collect(),
            output: ScaleShift { scale: part(&self.output.scale), shift: part(&self.output.shift) },
        }
    }
}
