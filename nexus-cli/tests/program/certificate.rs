//! The certificate: it passes as the weights are, and a fault planted in any one stage makes that stage fail.
use std::{
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::{DType, TensorData};
use nexus::{
    FloatDType, ModelFiles, Precision, Quantization,
    checkpoint::{Checkpoint, LoadDType, Manifest, write_safetensors},
};
use nexus_cli::verify::{
    hashes::hash,
    limits::Limits,
    model::{compare, released_layout},
    stages::{STAGES, Setting, Stage, verify, weights_in_memory},
};
use nexus_core::testing::{cpu, device, fixtures_dir, load_options, random_models_dir};

use super::{Ran, nexus, root, tiny_dir};

const FLUX: &str = "FLUX/FLUX.1-dev";

/// In f32, whatever the device computes in by default.
fn setting(random: PathBuf, tiny: PathBuf) -> Setting {
    let precision = Precision { weights: load_options().dtype, compute: FloatDType::F32 };
    Setting { random, tiny, device: device(), precision, quantization: None }
}

/// In every dtype that the device has, its default among them, and with weights of 8 bits.
fn settings(random: &Path, tiny: &Path) -> Vec<Setting> {
    let plain = setting(random.to_path_buf(), tiny.to_path_buf());
    let half = [FloatDType::BF16, FloatDType::F16].into_iter().filter(|&dtype| device().supports_dtype(dtype));
    let half = half.map(|compute| Precision { weights: LoadDType::Convert(compute), compute });
    let mut settings: Vec<Setting> = half.map(|precision| Setting { precision, ..plain.clone() }).collect();
    settings.push(Setting { quantization: Some(Quantization::Q8), ..plain.clone() });
    settings.insert(0, plain);
    settings
}

/// Stages among these that do not pass.
fn failing(setting: &Setting, which: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let run = STAGES.iter().filter(|stage| which(stage.name));
    let verdicts = run.map(|stage| verify(stage, setting));
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
fn every_stage_passes_in_every_dtype_of_the_device() {
    let settings = settings(&random_models_dir(), &tiny_dir()).into_iter();
    for setting in settings.filter(|setting| setting.quantization.is_none()) {
        for stage in &STAGES {
            let verdict = verify(stage, &setting);
            assert!(verdict.passes(), "{:?}: {verdict:?}", setting.precision);
        }
    }
}

#[test]
fn quantised_weights_pass_within_limits_of_their_own() {
    let quantized = ["language model", "image block", "adapter", "embedding merger", "transformer", "from prompt"];
    for (quantization, at_least, packed) in [(Quantization::Q8, 2e-4, 9), (Quantization::Q4, 3e-3, 5)] {
        let setting = Setting { quantization: Some(quantization), ..setting(random_models_dir(), tiny_dir()) };
        for stage in &STAGES {
            let verdict = verify(stage, &setting);
            assert!(verdict.passes(), "{quantization:?}: {verdict:?}");
            let drifts = verdict.drift.unwrap() > at_least;
            let expected = quantized.iter().any(|name| stage.name.starts_with(name));
            assert_eq!(drifts, expected, "{quantization:?}: {verdict:?}");
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
    let reading = ["vision encoder", "language model, prefill", "language model, decoding"];
    let flux = |name: &str| format!("{FLUX}/{name}");
    for (file, tensor, expected) in [
        ("Nexus-GenV2/model-00001-of-00002.safetensors".into(), "visual.blocks.1.attn.proj.weight", &reading[..]),
        (LANGUAGE.into(), "lm_head.weight", &reading[1..]),
        (LANGUAGE.into(), "image_prefill_embeds.weight", &["image block"]),
        (GENERATION.into(), "adapter.0.weight", &["adapter"]),
        (EDITING.into(), "embedding_merger.projector.5.weight", &["embedding merger"]),
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
        for setting in settings(dir.path(), &tiny_dir()) {
            let failing = failing(&setting, |stage| stage != "from prompt to picture");
            let Setting { precision, quantization, .. } = &setting;
            assert_eq!(failing, expected, "{tensor} of {file} in {precision:?} {quantization:?}");
        }
    }
}

/// 4 bits round random weights by as much as a fault changes them: it is seen where the errors of many weights cancel out.
#[test]
fn a_fault_in_the_last_layer_is_seen_in_4_bits() {
    let dir = tempfile::tempdir().unwrap();
    copy(&random_models_dir(), dir.path());
    plant(&dir.path().join("Nexus-GenV2/model-00002-of-00002.safetensors"), "lm_head.weight");
    let setting = Setting { quantization: Some(Quantization::Q4), ..setting(dir.path().to_path_buf(), tiny_dir()) };
    assert!(failing(&setting, |stage| stage.starts_with("language model")).contains(&"language model, decoding"));
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
    let verdict = verify(&STAGES[5], &setting);
    assert!(!verdict.passes() && verdict.error.as_ref().unwrap().contains("no Nexus-Gen model here"), "{verdict:?}");
    let panics = Stage { name: "panics", run: |_| panic!("out of memory"), limits: Limits::EXACT };
    let verdict = verify(&panics, &setting);
    assert_eq!(verdict.error.as_deref(), Some("out of memory"));
}

/// Runs the program in f32 on the CPU with more arguments; what it ends with, and its certificate.
fn certify(arguments: &[&str]) -> (i32, serde_json::Value) {
    let dir = tempfile::tempdir().unwrap();
    let all = ["verify", "--device", "cpu", "--dtype", "f32", "-o", "certificate.json", "--json"];
    let Ran { code, stdout, stderr } = nexus(dir.path(), &[&all, arguments].concat());
    assert_eq!(stderr, "");
    let file: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.path().join("certificate.json")).unwrap()).unwrap();
    assert_eq!(file, serde_json::from_str::<serde_json::Value>(&stdout).unwrap());
    (code, file)
}

#[test]
fn the_program_writes_what_it_found_and_what_it_was_found_with() {
    let (code, certificate) = certify(&[]);
    assert_eq!((code, &certificate["passes"]), (0, &true.into()));
    let text = |field: &str| certificate[field].as_str().unwrap();
    assert_eq!([text("device"), text("dtype"), text("weights_dtype")], ["cpu", "F32", "F32"]);
    assert_eq!([text("nexus"), text("burn")], [env!("CARGO_PKG_VERSION"), "0.22.1"]);
    assert!(certificate["features"].as_array().unwrap().contains(&"cpu".into()));
    assert!(certificate["model"].is_null());
    let names: Vec<&str> = STAGES.iter().map(|stage| stage.name).collect();
    let stages = certificate["stages"].as_array().unwrap();
    assert_eq!(stages.iter().map(|stage| stage["stage"].as_str().unwrap()).collect::<Vec<_>>(), names);
    assert!(stages.iter().all(|stage| stage["drift"].as_f64().unwrap() <= stage["limit"].as_f64().unwrap()));
    for (list, name, path) in [
        (
            "weights",
            "assets/nexus-random/FLUX/FLUX.1-dev/ae.safetensors",
            random_models_dir().join(FLUX).join("ae.safetensors"),
        ),
        ("fixtures", "tests/fixtures/adapter.safetensors", fixtures_dir().join("adapter.safetensors")),
    ] {
        let hashed = certificate[list].as_array().unwrap().iter().find(|file| file["name"] == name).unwrap();
        assert_eq!(hashed["sha256"], hash(&fs::read(path).unwrap()), "{name}");
    }
}

#[test]
fn a_model_is_compared_with_its_manifests() {
    let dir = tempfile::tempdir().unwrap();
    let (model, manifests) = (dir.path().join("model"), dir.path().join("manifests"));
    copy(&random_models_dir(), &model);
    fs::create_dir(&manifests).unwrap();
    for (stage, path) in ModelFiles::find(&model).unwrap().weights() {
        let checkpoint = Checkpoint::open(path.unwrap()).unwrap();
        Manifest::of(&checkpoint, &mut |_| ()).unwrap().save(manifests.join(format!("{stage}.json"))).unwrap();
    }
    fs::remove_file(manifests.join("text_encoder.json")).unwrap();
    let arguments = ["--model", model.to_str().unwrap(), "--manifest", manifests.to_str().unwrap()];
    let stages = |certificate: &serde_json::Value| -> Vec<(String, bool, bool)> {
        let stages = certificate["model"]["stages"].as_array().unwrap();
        let of = |stage: &serde_json::Value| {
            (stage["stage"].as_str().unwrap().to_string(), !stage["against"].is_null(), stage["error"].is_null())
        };
        stages.iter().map(of).collect()
    };
    let (code, certificate) = certify(&arguments);
    let expected = |wrong: &[&str]| -> Vec<(String, bool, bool)> {
        let names =
            ["language_model", "generation_decoder", "edit_decoder", "autoencoder", "text_encoder", "text_encoder_2"];
        names.map(|name| (name.to_string(), name != "text_encoder", !wrong.contains(&name))).to_vec()
    };
    assert_eq!((code, stages(&certificate)), (0, expected(&[])));
    let files = &certificate["model"]["stages"][0]["files"];
    assert_eq!(files.as_array().unwrap().len(), 2, "shards of the language model");
    let shard = model.join("Nexus-GenV2").join(files[0]["name"].as_str().unwrap());
    assert_eq!(files[0]["sha256"], hash(&fs::read(shard).unwrap()));

    plant(&model.join(FLUX).join("ae.safetensors"), "decoder.conv_out.weight");
    fs::remove_file(model.join("Nexus-GenV2/edit_decoder.bin")).unwrap();
    let (code, certificate) = certify(&arguments);
    assert_eq!((code, stages(&certificate)), (1, expected(&["edit_decoder", "autoencoder"])));
    assert_eq!((&certificate["passes"], &certificate["model"]["passes"]), (&false.into(), &false.into()));
    let error = |stage: usize| certificate["model"]["stages"][stage]["error"].as_str().unwrap();
    assert!(error(2).contains("edit_decoder.bin"), "{}", error(2));
    assert!(error(3).contains("decoder.conv_out.weight: other values"), "{}", error(3));
    // The stages themselves compute right.
    let right = |stage: &serde_json::Value| stage["drift"].as_f64() <= stage["limit"].as_f64();
    assert!(certificate["stages"].as_array().unwrap().iter().all(right));
}

#[test]
fn a_model_alone_is_compared_with_the_released_layout() {
    let (code, certificate) = certify(&["--model", random_models_dir().to_str().unwrap()]);
    assert_eq!((code, &certificate["passes"]), (1, &false.into()));
    for stage in certificate["model"]["stages"].as_array().unwrap() {
        assert_eq!(stage["against"], "released layout");
        assert!(stage["error"].as_str().unwrap().contains("differences from the released layout"), "{stage}");
        assert!(!stage["files"].as_array().unwrap().is_empty());
    }

    // A file of the released size takes no space where no byte was written.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ae.safetensors");
    let mut layout = released_layout().unwrap().remove("autoencoder").unwrap();
    let (mut header, mut bytes) = (serde_json::Map::new(), 0);
    for (name, shape) in &layout {
        let begin = bytes;
        bytes += 2 * shape.iter().product::<usize>();
        let entry = serde_json::json!({ "dtype": "BF16", "shape": shape, "data_offsets": [begin, bytes] });
        header.insert(name.clone(), entry);
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    let start = [&(header.len() as u64).to_le_bytes()[..], &header].concat();
    fs::write(&file, &start).unwrap();
    fs::OpenOptions::new().write(true).open(&file).unwrap().set_len((start.len() + bytes) as u64).unwrap();
    let checkpoint = Checkpoint::open(&file).unwrap();
    compare(&checkpoint, &layout).unwrap();
    layout.remove("decoder.conv_in.bias");
    layout.insert("decoder.conv_in.weight".into(), vec![512, 16, 1, 1]);
    layout.insert("decoder.conv_mid.weight".into(), vec![1]);
    let error = compare(&checkpoint, &layout).unwrap_err().to_string();
    for expected in [
        "3 differences",
        "decoder.conv_in.bias: not in the released file",
        "decoder.conv_in.weight: released with shape [512, 16, 1, 1], found [512, 16, 3, 3]",
        "decoder.conv_mid.weight: missing",
    ] {
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn manifests_of_no_stage_are_an_error_that_writes_nothing() {
    let empty = tempfile::tempdir().unwrap();
    let model = random_models_dir().display().to_string();
    let arguments =
        ["verify", "--model", &model, "--manifest", empty.path().to_str().unwrap(), "-o", "certificate.json"];
    nexus(empty.path(), &arguments).assert_error(1, "no manifest of a stage");
    assert_eq!(fs::read_dir(empty.path()).unwrap().count(), 0);
}

#[test]
fn a_person_reads_a_table_and_a_verdict() {
    let ran = nexus(root(), &["verify", "--dtype", "f32"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    assert!(ran.stdout.starts_with("cpu in F32, weights Convert(F32)\n"), "{}", ran.stdout);
    assert!(STAGES.iter().all(|stage| ran.stdout.contains(stage.name)), "{}", ran.stdout);
    assert!(ran.stdout.ends_with("PASS: every stage computes the right thing here\n"), "{}", ran.stdout);
}
