//! Names of the model's weights in `model-*.safetensors`, as data.

use nexus_checkpoint::WeightNames;

/// Module paths -> names in the released checkpoint: the same.
pub const NAMES: WeightNames = WeightNames {
    prefix: "",
    renames: &[],
    unused: &[("visual.", "the vision encoder, loaded by nexus-vision-encoder")],
};
