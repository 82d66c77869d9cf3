//! The certificate: it passes as the weights are, and a fault planted in any one stage makes that stage fail.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "a test fails by panicking")]

#[path = "../examples/verify/stages.rs"]
#[allow(dead_code, reason = "the example uses more of it")]
mod stages;

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::{DType, TensorData};
use nexus::{
    FloatDType, Precision, Quantization,
    core::checkpoint::{Checkpoint, LoadDType, write_safetensors},
};
use nexus_core::testing::{cpu, device, random_models_dir};
use stages::{STAGES, Setting, verify, weights_in_memory};

fn setting(random: PathBuf, tiny: PathBuf) -> Setting {
    let precision = Precision::of(&device());
    Setting { random, tiny, device: device(), precision, quantization: None }
}

fn tiny_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/nexus-tiny")
}

/// Stages among these that do not pass, and what they said.
fn failing(setting: &Setting, which: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let run = STAGES.into_iter().filter(|(stage, _)| which(stage));
    let verdicts = run.map(|(stage, run)| verify(stage, run, setting));
    verdicts.filter(|verdict| !verdict.passes()).map(|verdict| verdict.stage).collect()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Makes one tensor of a checkpoint a fifth larger; what is no safetensors file becomes one.
fn plant(file: &Path, tensor: &str) {
    let checkpoint = Checkpoint::open(file).unwrap();
    let names: Vec<String> = checkpoint.entries().map(|entry| entry.name.clone()).collect();
    let tensors: Vec<(String, TensorData)> = names
        .into_iter()
        .map(|name| {
            let data = checkpoint.data(&name).unwrap();
            if name != tensor {
                return (name, data);
            }
            let dtype = data.dtype();
            let shape = data.shape().to_vec();
            let values: Vec<f32> = data.try_into_vec_as::<f32>().unwrap().iter().map(|value| value * 1.2).collect();
            (name, TensorData::new(values, shape).convert_dtype(DType::F32).convert_dtype(dtype))
        })
        .collect();
    assert!(tensors.iter().any(|(name, _)| name == tensor), "{tensor} in {}", file.display());
    drop(checkpoint);
    let planted = file.with_extension("planted");
    write_safetensors(&planted, tensors, None).unwrap();
    fs::remove_file(file).unwrap();
    fs::rename(planted, file.with_extension("safetensors")).unwrap();
}

#[test]
fn every_stage_passes() {
    let setting = setting(random_models_dir(), tiny_dir());
    for (stage, run) in STAGES {
        let verdict = verify(stage, run, &setting);
        assert!(verdict.passes(), "{verdict:?}");
    }
}

#[test]
fn quantised_weights_pass_within_limits_of_their_own() {
    let quantized = ["language model", "image block", "adapter", "embedding merger", "transformer", "from prompt"];
    for (quantization, at_least, packed) in [(Quantization::Q8, 2e-4, 9), (Quantization::Q4, 3e-3, 5)] {
        let setting = Setting { quantization: Some(quantization), ..setting(random_models_dir(), tiny_dir()) };
        for (stage, run) in STAGES {
            let verdict = verify(stage, run, &setting);
            assert!(verdict.passes(), "{quantization:?}: {verdict:?}");
            let drifts = verdict.drift.unwrap() > at_least;
            assert_eq!(drifts, quantized.iter().any(|name| stage.starts_with(name)), "{quantization:?}: {verdict:?}");
        }
        let bytes = weights_in_memory(&setting).unwrap();
        let precision = Precision { weights: LoadDType::Convert(FloatDType::F32), compute: FloatDType::F32 };
        let floats = weights_in_memory(&Setting { quantization: None, precision, ..setting }).unwrap();
        let bits = if device() == cpu() { 9 } else { packed };
        for ((stage, bytes), (_, floats)) in bytes.into_iter().zip(floats) {
            // Tables and norms stay as they are.
            assert!(bytes * 32 > floats * bits && bytes * 32 < floats * (bits + 3), "{stage}: {bytes} of {floats}");
        }
    }
}

#[test]
fn a_planted_fault_fails_its_stage_and_those_that_share_the_weights() {
    const LANGUAGE: &str = "Nexus-GenV2/model-00002-of-00002.safetensors";
    const GENERATION: &str = "Nexus-GenV2/generation_decoder.bin";
    const EDITING: &str = "Nexus-GenV2/edit_decoder.bin";
    const FLUX: &str = "FLUX/FLUX.1-dev";
    let reading = ["vision encoder", "language model, prefill", "language model, decoding"];
    let flux = |name: &str| format!("{FLUX}/{name}");
    for (file, tensor, expected) in [
        ("Nexus-GenV2/model-00001-of-00002.safetensors".into(), "visual.blocks.1.attn.proj.weight", &reading[..]),
        (LANGUAGE.into(), "lm_head.weight", &reading[1..]),
        (LANGUAGE.into(), "image_prefill_embeds.weight", &["image block"]),
        (GENERATION.into(), "adapter.0.weight", &["adapter"]),
        (EDITING.into(), "embedding_merger.projector.0.weight", &["embedding merger"]),
        (
            GENERATION.into(),
            "pipe.dit.blocks.0.attn.a_to_out.weight",
            &["transformer, double blocks", "transformer, generation"],
        ),
        (
            GENERATION.into(),
            "pipe.dit.single_blocks.0.proj_out.weight",
            &["transformer, single blocks", "transformer, generation"],
        ),
        (GENERATION.into(), "pipe.dit.final_proj_out.weight", &["transformer, generation"]),
        (EDITING.into(), "pipe.dit.final_proj_out.weight", &["transformer, editing"]),
        (flux("ae.safetensors"), "decoder.conv_out.weight", &["autoencoder"]),
        (flux("text_encoder/model.safetensors"), "text_model.final_layer_norm.weight", &["CLIP"]),
        (flux("text_encoder_2/model-00002-of-00002.safetensors"), "encoder.final_layer_norm.weight", &["T5"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        copy(&random_models_dir(), dir.path());
        plant(&dir.path().join(&file), tensor);
        let setting = setting(dir.path().to_path_buf(), tiny_dir());
        assert_eq!(failing(&setting, |stage| stage != "from prompt to picture"), expected, "{tensor} of {file}");
    }
}

#[test]
fn faults_in_preprocessing_and_in_the_trained_model_are_seen() {
    let dir = tempfile::tempdir().unwrap();
    let (random, tiny) = (dir.path().join("random"), dir.path().join("tiny"));
    copy(&random_models_dir(), &random);
    copy(&tiny_dir(), &tiny);
    let preprocessor = random.join("Nexus-GenV2/preprocessor_config.json");
    let text = fs::read_to_string(&preprocessor).unwrap();
    assert!(text.contains("0.48145466"));
    fs::write(&preprocessor, text.replace("0.48145466", "0.48145")).unwrap();
    plant(&tiny.join("FLUX/FLUX.1-dev/ae.safetensors"), "decoder.conv_out.weight");
    let setting = setting(random, tiny);
    let faulty = ["patching", "from prompt to picture"];
    assert_eq!(failing(&setting, |stage| faulty.contains(&stage)), faulty);
}

#[test]
fn a_stage_that_cannot_run_fails_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let setting = setting(dir.path().to_path_buf(), tiny_dir());
    let verdict = verify("adapter", STAGES[5].1, &setting);
    assert!(!verdict.passes() && verdict.error.as_ref().unwrap().contains("no Nexus-Gen model here"), "{verdict:?}");
    let verdict = verify("panics", |_| panic!("out of memory"), &setting);
    assert_eq!(verdict.error.as_deref(), Some("out of memory"));
}
