//! Names of the encoder's weights in `model-*.safetensors`, as data.

use nexus_checkpoint::WeightNames;

/// Module paths -> names in the released checkpoint.
pub const NAMES: WeightNames = WeightNames {
    prefix: "visual.",
    renames: &[("merger.mlp.fc1", "merger.mlp.0"), ("merger.mlp.fc2", "merger.mlp.2")],
    unused: &[
        ("model.", "the language model, loaded by nexus-ar"),
        ("lm_head.", "the language model, loaded by nexus-ar"),
        ("vision_head.", "the language model, loaded by nexus-ar"),
        ("image_prefill_embeds.", "the language model, loaded by nexus-ar"),
    ],
};
