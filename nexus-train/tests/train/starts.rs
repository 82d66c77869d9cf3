//! Where the authors began: names and shapes of those files at the released sizes, and a first step from a tiny one of each.

use std::fs;

use nexus::{
    Image, Message,
    ar::{ArConfig, ArModel},
    checkpoint::{Checkpoint, module_layout, save_module, write_safetensors},
    data::MessagesFile,
    diffusion::{
        config::{MergerConfig, MergerVisionConfig, RopeScaling},
        connector::EmbeddingMerger,
        weights::{FLUX1_DEV, QWEN2_5_VL_LAYER_0},
    },
    vision_encoder::{VisionConfig, VisionEncoder},
};
use nexus_core::testing::{cpu, random_models_dir};
use nexus_train::{Recipe, train, unobserved};
use serde_json::{Value, json};

use crate::case::{copied_models, decoder, recipe};

/// What Nexus-Gen added to Qwen2.5-VL.
const ADDED: [&str; 2] = ["vision_head.weight", "image_prefill_embeds.weight"];

/// Names and shapes of the language model at the released sizes, without what was added.
fn language_model() -> Vec<(String, Vec<usize>)> {
    let ar = ArModel::new(&ArConfig::released(), &cpu()).unwrap();
    let mut layout = module_layout(&ar, &nexus::ar::NAMES);
    layout.retain(|(name, _)| !ADDED.contains(&name.as_str()));
    layout
}

#[test]
fn the_language_model_begins_with_the_files_of_qwen2_5_vl_7b() {
    let mut layout = language_model();
    let vision_encoder = VisionEncoder::new(&VisionConfig::default(), &cpu());
    layout.extend(module_layout(&vision_encoder, &nexus::vision_encoder::NAMES));
    // Those of Qwen2.5-VL-7B-Instruct: 16,584,333,312 bytes of bf16 in 729 tensors.
    assert_eq!(layout.len(), 729);
    let parameters: usize = layout.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    assert_eq!(2 * parameters, 16_584_333_312);
}

#[test]
fn the_layer_of_the_merger_is_a_layer_of_the_language_model() {
    let config = MergerConfig {
        hidden_size: 3584,
        intermediate_size: 18_944,
        num_attention_heads: 28,
        num_key_value_heads: 4,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        rope_scaling: RopeScaling { mrope_section: [16, 24, 24] },
        vision_config: MergerVisionConfig { spatial_merge_size: 2, tokens_per_second: 2 },
    };
    let merger = EmbeddingMerger::new(&config, 4096, &cpu());
    let layer = module_layout(&merger.layers[0], &QWEN2_5_VL_LAYER_0);
    let mut expected = language_model();
    expected.retain(|(name, _)| name.starts_with("model.layers.0."));
    let sorted = |mut layout: Vec<(String, Vec<usize>)>| {
        layout.sort();
        layout
    };
    assert_eq!(layer.len(), 12);
    assert_eq!(sorted(layer), sorted(expected));
}

/// A copy of the bundled random checkpoint with the files that came before it beside it.
struct Starts {
    dir: tempfile::TempDir,
}

impl Starts {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let models = copied_models(&dir.path().join("models"));
        let released = Checkpoint::open(models.join("Nexus-GenV2/model.safetensors.index.json")).unwrap();
        let kept = released.entries().filter(|entry| !ADDED.contains(&entry.name.as_str()));
        let tensors = kept.map(|entry| (entry.name.clone(), released.data(&entry.name).unwrap())).collect();
        fs::create_dir(dir.path().join("qwen")).unwrap();
        write_safetensors(&dir.path().join("qwen/model.safetensors"), tensors, None).unwrap();
        let files = nexus::ModelFiles::find(&models).unwrap();
        let decoder = files.load_generation_decoder(&cpu(), &Default::default()).unwrap();
        save_module(&decoder.dit, &FLUX1_DEV, &files.flux.join("flux1-dev.safetensors"), None).unwrap();
        let picture = || Image::from_rgb8(32, 32, vec![90; 3 * 32 * 32]).unwrap();
        let edited = vec![
            Message::text("Make it grey.").with_image(picture()),
            Message::assistant().with_text("Here:").with_image(picture()),
        ];
        MessagesFile::write(dir.path().join("data.jsonl"), [edited]).unwrap();
        Self { dir }
    }

    /// Exported weights after a step that is too small to be seen in them.
    fn begin(&self, part: &str, initial: Value, phase: Value) -> Checkpoint {
        let data = json!({"messages": {"path": "data.jsonl"}});
        let mut phase = phase;
        (phase["steps"], phase["batch_size"], phase["learning_rate"]) = (json!(1), json!(1), json!(1e-12));
        let mut recipe = serde_json::to_value(recipe(part, data, phase)).unwrap();
        recipe["train"]["initial"] = initial;
        let path = self.dir.path().join("recipe.json");
        fs::write(&path, recipe.to_string()).unwrap();
        let (recipe, run) = (Recipe::read(path).unwrap(), self.dir.path().join(part));
        train(&recipe, self.dir.path().join("models"), &run, &cpu(), &mut unobserved).unwrap();
        let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let metrics: Value = serde_json::from_str(&metrics).unwrap();
        assert!(metrics["loss"].as_f64().unwrap() > 0.0 && metrics["grad_norm"].as_f64().unwrap() > 0.0, "{metrics}");
        let export = fs::read_dir(run.join("export")).unwrap().next().unwrap().unwrap().path();
        Checkpoint::open(export).unwrap()
    }
}

fn values(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    checkpoint.data(name).unwrap().try_to_vec_as::<f32>().unwrap()
}

fn at(path: &str) -> Checkpoint {
    Checkpoint::open(random_models_dir().join("Nexus-GenV2").join(path)).unwrap()
}

#[test]
fn a_language_model_begins_with_qwen2_5_vl() {
    let starts = Starts::new();
    let initial = json!({"qwen2_5_vl": {"path": "qwen", "seed": 4}});
    let begun = starts.begin("autoregressive", initial.clone(), json!({}));
    let released = at("model.safetensors.index.json");
    assert_eq!(begun.entries().count(), released.entries().count());
    for name in ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "visual.merger.mlp.0.weight"] {
        assert_eq!(values(&begun, name), values(&released, name), "{name}");
    }
    for name in ADDED {
        let added = values(&begun, name);
        assert_eq!(added.len(), values(&released, name).len());
        let deviation = (added.iter().map(|value| value * value).sum::<f32>() / added.len() as f32).sqrt();
        assert!((deviation - 0.02).abs() < 0.002, "{name}: {deviation}");
    }
    // The same with the encoder in training.
    let begun = starts.begin("vision_encoder", initial, json!({}));
    assert_eq!(values(&begun, "visual.merger.mlp.0.weight"), values(&released, "visual.merger.mlp.0.weight"));
}

#[test]
fn decoders_begin_with_flux1_dev() {
    let starts = Starts::new();
    let transformer = "pipe.dit.single_blocks.0.to_qkv_mlp.weight";
    let generation = at("generation_decoder.bin");
    let initial = json!({"flux1_dev": {"seed": 3}});
    let begun = starts.begin("generation_decoder", initial, decoder(json!({}), json!({})));
    assert_eq!(values(&begun, transformer), values(&generation, transformer));
    assert_ne!(values(&begun, "adapter.0.weight"), values(&generation, "adapter.0.weight"), "the adapter is random");

    let initial = json!({"flux1_dev": {"language_model": "qwen", "projector": {"seed": 3}}});
    let begun = starts.begin("editing_decoder", initial, decoder(json!({}), json!({})));
    let (editing, language_model) = (at("edit_decoder.bin"), at("model.safetensors.index.json"));
    assert_eq!(values(&begun, transformer), values(&generation, transformer));
    for name in ["self_attn.q_proj.weight", "self_attn.k_proj.bias", "mlp.up_proj.weight", "input_layernorm.weight"] {
        let [merger, layer] = ["embedding_merger.layers.0.", "model.layers.0."].map(|prefix| format!("{prefix}{name}"));
        assert_eq!(values(&begun, &merger), values(&language_model, &layer), "{name}");
    }
    let projector = "embedding_merger.projector.1.weight";
    assert_ne!(values(&begun, projector), values(&editing, projector), "the projector is random");
}

#[test]
fn files_to_begin_with_that_are_not_there_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |part: &str, initial: Value| {
        let data = json!({"messages": {"path": "data.jsonl"}});
        let mut recipe = serde_json::to_value(recipe(part, data, json!({}))).unwrap();
        recipe["train"]["initial"] = initial;
        let path = dir.path().join("recipe.json");
        fs::write(&path, recipe.to_string()).unwrap();
        fs::write(dir.path().join("data.jsonl"), r#"{"messages":[{"role":"user","content":"x"}]}"#).unwrap();
        let recipe = Recipe::read(path).unwrap();
        train(&recipe, random_models_dir(), dir.path().join(part), &cpu(), &mut unobserved).unwrap_err().to_string()
    };
    let error = refused("autoregressive", json!({"qwen2_5_vl": {"path": "absent", "seed": 1}}));
    assert!(error.contains("absent"), "{error}");
    let error = refused("generation_decoder", json!({"flux1_dev": {"seed": 1}}));
    assert!(error.contains("flux1-dev.safetensors"), "{error}");
}
