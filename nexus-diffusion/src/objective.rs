//! What the decoders are trained for: clean latents, noise and noise levels -> flow-matching loss.

use burn::tensor::{DType, Tensor, TensorData};
use nexus_core::nn::Recomputation;

use crate::{Conditioning, FlowMatchSchedule, LatentSize, transformer::Dit};

/// Noise levels that are trained.
const NUM_TRAIN_STEPS: usize = 1000;

/// The schedule of training with the weight of each of its levels.
#[derive(Debug, Clone, PartialEq)]
pub struct FlowMatching {
    schedule: FlowMatchSchedule,
    weights: Vec<f32>,
}

impl Default for FlowMatching {
    fn default() -> Self {
        Self::new()
    }
}

/// What [`FlowMatching::loss`] takes.
#[derive(Debug, Clone)]
pub struct FlowMatchingInput<'a> {
    /// What the decoder makes of the image embeddings: condition tokens `[batch, tokens, context]` and positions.
    pub conditioning: &'a Conditioning,
    /// Pooled text vectors: `[batch, pooled]`; their dtype is the compute dtype, as of all other tensors.
    pub pooled: Tensor<2>,
    /// Clean latents as [`Autoencoder::encode`](crate::Autoencoder::encode) makes them:
    /// `[batch, channels, height, width]`, even sides.
    pub latents: Tensor<4>,
    /// Standard normal noise of the shape of the latents.
    pub noise: Tensor<4>,
    /// Noise level of each sample, below [`FlowMatching::num_steps`]; 0 is pure noise.
    pub timestep_indices: &'a [usize],
    /// The guidance scalar that FLUX.1-dev takes as an input; the original trains with 3.5.
    pub embedded_guidance: f32,
}

/// Losses of a batch, in f32.
#[derive(Debug, Clone)]
pub struct FlowLoss {
    /// Mean over the samples of each one's error times the weight of its noise level.
    pub total: Tensor<1>,
    /// Mean squared error of the velocity, without weights.
    pub mse: Tensor<1>,
}

impl FlowMatching {
    /// The schedule of the original's training.
    pub fn new() -> Self {
        let schedule = FlowMatchSchedule::new(NUM_TRAIN_STEPS, 1.0);
        let weights = schedule.training_weights();
        Self { schedule, weights }
    }

    /// Number of noise levels, of which each sample draws one uniformly.
    pub fn num_steps(&self) -> usize {
        self.weights.len()
    }

    /// The noise levels.
    pub fn schedule(&self) -> &FlowMatchSchedule {
        &self.schedule
    }

    /// Weight of the loss at each noise level.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// Clean latents with each sample's noise mixed in.
    ///
    /// # Shapes
    /// - `clean`, `noise`: `[batch, channels, height, width]`
    /// - returns: the same
    ///
    /// # Panics
    /// If there is not one index per sample, or one is not below [`FlowMatching::num_steps`].
    pub fn add_noise(&self, timestep_indices: &[usize], clean: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
        let sigmas: Vec<f32> = self.sigmas(timestep_indices);
        let kept = per_sample(sigmas.iter().map(|sigma| 1.0 - sigma).collect(), &clean);
        let mixed_in = per_sample(sigmas, &clean);
        clean * kept + noise * mixed_in
    }

    /// The loss of a batch; gradients reach the transformer and, through the condition tokens, the connector. The blocks
    /// of the transformer are those of the recomputation, whose `backward` gives the gradients.
    ///
    /// # Panics
    /// If the parts of the input are not of one batch, an index is not below [`FlowMatching::num_steps`], or a side of
    /// the latents is odd.
    ///
    /// Source: Nexus-Gen (train_decoder.py), DiffSynth (flow_match.py, `training_target` and `training_weight`).
    /// Differs: batches, of which each sample has a noise level of its own.
    pub fn loss<'a>(&self, dit: &'a Dit, input: FlowMatchingInput<'_>, blocks: &mut Recomputation<'a>) -> FlowLoss {
        let FlowMatchingInput { conditioning, pooled, latents, noise, timestep_indices, embedded_guidance } = input;
        let [batch, channels, height, width] = latents.dims();
        assert_eq!(noise.dims(), latents.dims(), "noise and latents");
        assert_eq!(conditioning.embeds.dims()[0], batch, "batch of the condition tokens");

        let (dtype, device) = (latents.dtype(), latents.device());
        let target = noise.clone().cast(DType::F32) - latents.clone().cast(DType::F32);
        let timesteps: Vec<f32> = timestep_indices.iter().map(|&index| self.schedule.timesteps()[index]).collect();
        let vector = dit.conditioning(&timesteps, embedded_guidance, pooled);
        let rotary = dit.rotary(&conditioning.text_ids, LatentSize { height, width }, dtype, &device);
        let context = dit.context(conditioning.embeds.clone());
        let noisy = self.add_noise(timestep_indices, latents, noise);
        let velocity = dit.forward_recomputed(noisy, context, vector, &rotary, blocks);

        let error = (velocity.cast(DType::F32) - target).square();
        let of_samples = error.reshape([batch, channels * height * width]).mean_dim(1).squeeze_dim::<1>(1);
        let weights = timestep_indices.iter().map(|&index| self.weights[index]).collect();
        let weights = Tensor::from_data(TensorData::new(weights, [batch]), (&device, DType::F32));
        FlowLoss { total: (of_samples.clone() * weights).mean(), mse: of_samples.mean() }
    }

    fn sigmas(&self, timestep_indices: &[usize]) -> Vec<f32> {
        timestep_indices.iter().map(|&index| self.schedule.sigmas()[index]).collect()
    }
}

/// One factor per sample, as `[batch, 1, 1, 1]` in the dtype of `like`.
fn per_sample(factors: Vec<f32>, like: &Tensor<4>) -> Tensor<4> {
    let [batch, _, _, _] = like.dims();
    assert_eq!(factors.len(), batch, "one noise level per sample");
    let factors: Tensor<4> =
        Tensor::from_data(TensorData::new(factors, [batch, 1, 1, 1]), (&like.device(), DType::F32));
    factors.cast(like.dtype())
}

#[cfg(test)]
mod tests {
    use burn::module::Module;
    use nexus_checkpoint::{WeightNames, module_layout};
    use nexus_core::testing::{assert_close, cpu, gradients_by_name, ramp};

    use super::*;
    use crate::{
        GenerationDecoder,
        config::{DiffusionConfig, DitConfig, MergerConfig, MergerVisionConfig, RopeScaling},
        weights::GENERATION_DECODER,
    };

    fn tiny() -> DiffusionConfig {
        DiffusionConfig {
            merger: MergerConfig {
                hidden_size: 16,
                intermediate_size: 8,
                num_attention_heads: 2,
                num_key_value_heads: 1,
                rms_norm_eps: 1e-6,
                rope_theta: 1e6,
                rope_scaling: RopeScaling { mrope_section: [2, 1, 1] },
                vision_config: MergerVisionConfig::default(),
            },
            dit: DitConfig {
                dim: 16,
                num_heads: 2,
                num_double: 1,
                num_single: 1,
                context_dim: 6,
                pooled_dim: 4,
                in_channels: 8,
                axes_dim: [2, 2, 4],
                ..DitConfig::default()
            },
        }
    }

    fn values(tensor: &Tensor<1>) -> f32 {
        tensor.to_data().try_into_vec_as::<f32>().unwrap()[0]
    }

    /// Samples `from..from + count` of a batch of three.
    fn loss(decoder: &GenerationDecoder, from: usize, count: usize, indices: &[usize]) -> FlowLoss {
        let part = |x: Tensor<4>| x.narrow(0, from, count);
        let embeds = decoder.adapter.forward(ramp([3, 5, 16], 1).narrow(0, from, count));
        let conditioning = Conditioning::without_positions(embeds);
        let input = FlowMatchingInput {
            conditioning: &conditioning,
            pooled: ramp([3, 4], 2).narrow(0, from, count),
            latents: part(ramp([3, 2, 4, 6], 3)),
            noise: part(ramp([3, 2, 4, 6], 4)),
            timestep_indices: indices,
            embedded_guidance: 3.5,
        };
        FlowMatching::new().loss(&decoder.dit, input, &mut Recomputation::none())
    }

    #[test]
    fn a_batch_is_the_mean_of_its_samples() {
        let decoder = GenerationDecoder::new(&tiny(), &cpu().autodiff());
        let indices = [10, 500, 930];
        let batch = loss(&decoder, 0, 3, &indices);
        let alone: Vec<FlowLoss> = (0..3).map(|i| loss(&decoder, i, 1, &indices[i..=i])).collect();
        let mean = |part: fn(&FlowLoss) -> &Tensor<1>| alone.iter().map(|loss| values(part(loss))).sum::<f32>() / 3.0;
        assert_close(&batch.total, &[mean(|loss| &loss.total)], 1e-5);
        assert_close(&batch.mse, &[mean(|loss| &loss.mse)], 1e-5);
        let weights = FlowMatching::new();
        for (index, loss) in indices.into_iter().zip(&alone) {
            assert_close(&loss.total, &[weights.weights()[index] * values(&loss.mse)], 1e-5);
        }
        assert!(values(&alone[0].mse) != values(&alone[1].mse));
    }

    #[test]
    fn each_sample_has_its_own_noise_level() {
        let objective = FlowMatching::new();
        let (clean, noise) = (ramp([2, 1, 2, 2], 1), ramp([2, 1, 2, 2], 2));
        let noisy = objective.add_noise(&[0, 999], clean.clone(), noise.clone());
        let [low, high] = [0, 999].map(|index| objective.schedule().sigmas()[index]);
        assert_eq!(low, 1.0);
        let mixed = |sample: usize, sigma: f32| {
            let part = |x: &Tensor<4>| x.clone().narrow(0, sample, 1);
            part(&clean) * (1.0 - sigma) + part(&noise) * sigma
        };
        let expected = Tensor::cat(vec![mixed(0, low), mixed(1, high)], 0);
        assert_close(&noisy, &expected.into_data().try_to_vec::<f32>().unwrap(), 1e-7);
    }

    #[test]
    fn gradients_reach_the_adapter_unless_it_is_frozen() {
        let decoder = GenerationDecoder::new(&tiny(), &cpu().autodiff());
        let count = module_layout(&decoder, &GENERATION_DECODER).len();
        let gradients = |decoder: &GenerationDecoder| {
            gradients_by_name(loss(decoder, 0, 2, &[300, 600]).total.backward(), decoder, &GENERATION_DECODER)
        };
        assert_eq!(gradients(&decoder).len(), count);
        let adapter = module_layout(&decoder.adapter, &WeightNames::default()).len();
        let decoder = GenerationDecoder { adapter: decoder.adapter.clone().no_grad(), ..decoder };
        let gradients = gradients(&decoder);
        assert_eq!(gradients.len(), count - adapter);
        assert!(!gradients.contains_key("adapter.0.weight") && gradients.contains_key("pipe.dit.x_embedder.weight"));
    }
}
