//! Names and shapes at the released sizes, without weights: they reproduce the published fingerprint.

use md5::{Digest, Md5};
use nexus::{
    ar::{ArConfig, ArModel},
    checkpoint::module_layout,
    vision_encoder::{VisionConfig, VisionEncoder},
};
use nexus_core::testing::cpu;

/// MD5 over the sorted list that holds `key` and `key:shape` of every tensor, as DiffSynth publishes it.
fn fingerprint(layout: &[(String, Vec<usize>)]) -> String {
    let mut items: Vec<String> = layout
        .iter()
        .flat_map(|(name, shape)| {
            let shape: Vec<String> = shape.iter().map(ToString::to_string).collect();
            [name.clone(), format!("{name}:{}", shape.join("_"))]
        })
        .collect();
    items.sort();
    Md5::digest(items.join(",")).iter().map(|byte| format!("{byte:02x}")).collect()
}

// The decoders, the autoencoder and the text encoders are compared in nexus-diffusion.
#[test]
fn vision_encoder_and_language_model_are_the_released_shards() {
    let vision_encoder = VisionEncoder::new(&VisionConfig::default(), &cpu());
    let ar = ArModel::new(&ArConfig::released(), &cpu()).unwrap();
    let mut layout = module_layout(&vision_encoder, &nexus::vision_encoder::NAMES);
    layout.extend(module_layout(&ar, &nexus::ar::NAMES));
    assert_eq!(layout.len(), 731);
    let parameters: usize = layout.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    assert_eq!(parameters / 100_000, 83_053);
    assert_eq!(fingerprint(&layout), "2bd19e845116e4f875a0a048e27fc219");
}
