//! Names of the weights in the released files, as data: module path -> tensor name.

use std::sync::Once;

use nexus_checkpoint::WeightNames;

/// Renames of both decoders: `GenerationDecoder` and `EditingDecoder` share all but the connector.
const DECODER_RENAMES: &[(&str, &str)] = &[
    ("adapter.linear_in", "adapter.0"),
    ("adapter.norm_in", "adapter.1"),
    ("adapter.linear_out", "adapter.3"),
    ("adapter.norm_out", "adapter.4"),
    ("projector.norm_in", "projector.0"),
    ("projector.linear_in", "projector.1"),
    ("projector.norm_hidden", "projector.2"),
    ("projector.linear_out", "projector.4"),
    ("projector.norm_out", "projector.5"),
    ("dit.time_embedder", "pipe.dit.time_embedder.timestep_embedder"),
    ("dit.guidance_embedder", "pipe.dit.guidance_embedder.timestep_embedder"),
    ("dit", "pipe.dit"),
    ("in_layer", "0"),
    ("out_layer", "2"),
];

/// `generation_decoder.bin`, for [`GenerationDecoder`](crate::GenerationDecoder).
pub const GENERATION_DECODER: WeightNames = WeightNames { prefix: "", renames: DECODER_RENAMES, unused: &[] };

/// `edit_decoder.bin`, for [`EditingDecoder`](crate::EditingDecoder).
pub const EDITING_DECODER: WeightNames = WeightNames { prefix: "", renames: DECODER_RENAMES, unused: &[] };

/// `flux1-dev.safetensors`, for [`Dit`](crate::transformer::Dit); the rows of `final_layer.adaLN_modulation.1` are
/// `[shift, scale]` there, see [`Dit::load_flux1_dev`](crate::transformer::Dit::load_flux1_dev).
pub const FLUX1_DEV: WeightNames = WeightNames {
    prefix: "",
    renames: &[
        ("time_embedder", "time_in"),
        ("guidance_embedder", "guidance_in"),
        ("pooled_text_embedder", "vector_in"),
        ("x_embedder", "img_in"),
        ("context_embedder", "txt_in"),
        ("blocks.*.norm1_a.linear", "double_blocks.*.img_mod.lin"),
        ("blocks.*.norm1_b.linear", "double_blocks.*.txt_mod.lin"),
        ("blocks.*.attn.a_to_qkv", "double_blocks.*.img_attn.qkv"),
        ("blocks.*.attn.b_to_qkv", "double_blocks.*.txt_attn.qkv"),
        ("blocks.*.attn.norm_q_a.weight", "double_blocks.*.img_attn.norm.query_norm.scale"),
        ("blocks.*.attn.norm_k_a.weight", "double_blocks.*.img_attn.norm.key_norm.scale"),
        ("blocks.*.attn.norm_q_b.weight", "double_blocks.*.txt_attn.norm.query_norm.scale"),
        ("blocks.*.attn.norm_k_b.weight", "double_blocks.*.txt_attn.norm.key_norm.scale"),
        ("blocks.*.attn.a_to_out", "double_blocks.*.img_attn.proj"),
        ("blocks.*.attn.b_to_out", "double_blocks.*.txt_attn.proj"),
        ("blocks.*.ff_a.in_layer", "double_blocks.*.img_mlp.0"),
        ("blocks.*.ff_a.out_layer", "double_blocks.*.img_mlp.2"),
        ("blocks.*.ff_b.in_layer", "double_blocks.*.txt_mlp.0"),
        ("blocks.*.ff_b.out_layer", "double_blocks.*.txt_mlp.2"),
        ("single_blocks.*.norm.linear", "single_blocks.*.modulation.lin"),
        ("single_blocks.*.to_qkv_mlp", "single_blocks.*.linear1"),
        ("single_blocks.*.proj_out", "single_blocks.*.linear2"),
        ("single_blocks.*.norm_q_a.weight", "single_blocks.*.norm.query_norm.scale"),
        ("single_blocks.*.norm_k_a.weight", "single_blocks.*.norm.key_norm.scale"),
        ("final_norm_out.linear", "final_layer.adaLN_modulation.1"),
        ("final_proj_out", "final_layer.linear"),
    ],
    unused: &[],
};

/// Layer 0 of Qwen2.5-VL's language model, for the layer of [`EmbeddingMerger`](crate::connector::EmbeddingMerger).
pub const QWEN2_5_VL_LAYER_0: WeightNames = WeightNames {
    prefix: "model.layers.0.",
    renames: &[],
    unused: &[
        ("model.", "the rest of the language model"),
        ("lm_head.", "scores of tokens"),
        ("visual.", "the vision encoder"),
    ],
};

/// `ae.safetensors`, for [`Autoencoder`](crate::Autoencoder).
pub const AUTOENCODER: WeightNames = WeightNames { prefix: "", renames: &[], unused: &[] };

/// `text_encoder/model.safetensors`, for [`ClipTextEncoder`](crate::ClipTextEncoder).
pub const CLIP: WeightNames = WeightNames {
    prefix: "text_model.",
    renames: &[("layers", "encoder.layers")],
    unused: &[("text_model.embeddings.position_ids", "a counter that old exports store")],
};

/// `text_encoder_2/model.safetensors.index.json`, for [`T5Encoder`](crate::T5Encoder).
pub const T5: WeightNames = WeightNames {
    prefix: "",
    renames: &[
        ("block.*.self_attention", "encoder.block.*.layer.0.SelfAttention"),
        ("block.*.attention_norm", "encoder.block.*.layer.0.layer_norm"),
        ("block.*.dense", "encoder.block.*.layer.1.DenseReluDense"),
        ("block.*.dense_norm", "encoder.block.*.layer.1.layer_norm"),
        ("relative_attention_bias", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
        ("final_layer_norm", "encoder.final_layer_norm"),
    ],
    unused: &[("encoder.embed_tokens.weight", "a copy of `shared.weight` that some exports store")],
};

/// Says once per process what the weights being loaded are licensed under, if they have FLUX.1-dev's sizes.
pub(crate) fn notice_flux_licence<C: Default + PartialEq>(config: &C) {
    static NOTICE: Once = Once::new();
    if *config != C::default() {
        return;
    }
    NOTICE.call_once(|| {
        log::warn!(
            "these weights are FLUX.1 [dev] or derive from it, under the FLUX.1 [dev] Non-Commercial License 1.1.1: they are \
             for non-commercial purposes, which use with effect on end users is not (1c); outputs are not derivatives \
             (1a) and may be used for any purpose except as expressly prohibited (2d); 4a prohibits commercial or \
             production use of the model, its derivatives \"or any data produced by\" it; 2e asks for content filters or \
             review, 3b for a notice with what is distributed. Read the text, and ask the licensor where it leaves doubt: \
             https://github.com/black-forest-labs/flux/blob/main/model_licenses/LICENSE-FLUX1-dev"
        );
    });
}

#[cfg(test)]
mod tests {
    use burn::module::Module;
    use md5::{Digest, Md5};
    use nexus_checkpoint::module_layout;
    use nexus_core::testing::cpu;

    use super::*;
    use crate::{
        Autoencoder, ClipTextEncoder, EditingDecoder, GenerationDecoder, T5Encoder,
        config::{
            AutoencoderConfig, ClipConfig, DiffusionConfig, DitConfig, MergerConfig, MergerVisionConfig, RopeScaling,
            T5Config,
        },
        transformer::Dit,
    };

    /// The language model's sizes, as the released `config.json` states them.
    fn released() -> DiffusionConfig {
        DiffusionConfig {
            merger: MergerConfig {
                hidden_size: 3584,
                intermediate_size: 18_944,
                num_attention_heads: 28,
                num_key_value_heads: 4,
                rms_norm_eps: 1e-6,
                rope_theta: 1e6,
                rope_scaling: RopeScaling { mrope_section: [16, 24, 24] },
                vision_config: MergerVisionConfig { spatial_merge_size: 2, tokens_per_second: 2 },
            },
            dit: DitConfig::default(),
        }
    }

    /// Number of tensors, number of weights, and the MD5 by which DiffSynth recognises a file: over the sorted names
    /// and names with shapes, joined by commas.
    fn fingerprint(module: &impl Module, names: &WeightNames) -> (usize, usize, String) {
        let layout = module_layout(module, names);
        let weights = layout.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        let mut lines = vec![];
        for (name, shape) in &layout {
            let shape: Vec<String> = shape.iter().map(usize::to_string).collect();
            lines.push(format!("{name}:{}", shape.join("_")));
            lines.push(name.clone());
        }
        lines.sort();
        let digest = Md5::digest(lines.join(","));
        (layout.len(), weights, digest.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    #[track_caller]
    fn check(module: &impl Module, names: &WeightNames, tensors: usize, millions: usize, md5: &str) {
        let (count, weights, digest) = fingerprint(module, names);
        assert_eq!(
            (count, (weights + 50_000) / 100_000 * 100_000, digest.as_str()),
            (tensors, millions * 100_000, md5)
        );
    }

    #[test]
    fn generation_decoder_has_the_released_layout() {
        let decoder = GenerationDecoder::new(&released(), &cpu());
        check(&decoder, &GENERATION_DECODER, 788, 119_329, "3e6c61b0f9471135fc9c6d6a98e98b6d");
    }

    #[test]
    fn editing_decoder_has_the_released_layout() {
        let decoder = EditingDecoder::new(&released(), &cpu());
        check(&decoder, &EDITING_DECODER, 799, 122_603, "63c969fd37cce769a90aa781fbff5f81");
    }

    #[test]
    fn flux1_dev_has_the_released_layout() {
        let dit = Dit::new(&DitConfig::default(), &cpu());
        check(&dit, &FLUX1_DEV, 780, 119_014, "a29710fea6dddb0314663ee823598e50");
    }

    #[test]
    fn autoencoder_has_the_released_layout() {
        let autoencoder = Autoencoder::new(&AutoencoderConfig::default(), &cpu());
        check(&autoencoder, &AUTOENCODER, 244, 838, "21ea55f476dfc4fd135587abb59dfe5d");
    }

    #[test]
    fn clip_has_the_released_layout() {
        let encoder = ClipTextEncoder::new(&ClipConfig::vit_large(), &cpu());
        check(&encoder, &CLIP, 196, 1231, "94eefa3dac9cec93cb1ebaf1747d7b78");
    }

    #[test]
    fn t5_has_the_released_layout() {
        let encoder = T5Encoder::new(&T5Config::v1_1_xxl(), &cpu());
        check(&encoder, &T5, 219, 47_623, "22540b49eaedbc2f2784b2091a234c7c");
    }
}
