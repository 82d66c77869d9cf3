//! Training of every part of the bundled random checkpoint on the world: stopped and resumed, and what each begins with.

use std::{fs, ops::ControlFlow, path::Path};

use lab_tiny::trainer;
use nexus::{Image, checkpoint::Checkpoint};
use nexus_core::testing::{cpu, random_models_dir};
use nexus_train::{Recipe, TrainError, TrainEvent, TrainObserver, TrainOutcome, unobserved};
use serde_json::{Value, json};

/// A recipe of one phase, with settings of the phase over its usual ones.
fn recipe_json(part: &str, initial: Value, data: Value, phase: Value) -> Value {
    let mut first = json!({
        "name": "only", "steps": 2, "batch_size": 2, "learning_rate": 1e-3, "data": [{"source": data, "weight": 1.0}],
    });
    first.as_object_mut().unwrap().extend(phase.as_object().unwrap().clone());
    let mut recipe = json!({
        "command": "", "time": "", "expected": "", "seed": 5, "checkpoint_every": 1, "log_every": 1, "max_rejected": 0,
        "train": {"part": part, "initial": initial, "phases": [first]},
    });
    if ["autoencoder", "generation_decoder", "editing_decoder"].contains(&part) {
        recipe["train"]["sample_every"] = json!(2);
    }
    recipe
}

fn recipe(part: &str, initial: Value, data: Value, phase: Value) -> Recipe {
    serde_json::from_value(recipe_json(part, initial, data, phase)).unwrap()
}

/// Runs a recipe on the bundled random checkpoint.
fn train(recipe: &Recipe, run: impl AsRef<Path>, observer: &mut TrainObserver<'_>) -> Result<TrainOutcome, TrainError> {
    trainer().train(recipe, random_models_dir(), run, &cpu(), observer)
}

fn world(task: &str) -> Value {
    json!({"world": {"seed": 1, "task": task}})
}

/// A phase with small pictures, with more settings of the part and of the phase.
fn decoder(part: Value, phase: Value) -> Value {
    let mut settings = json!({"picture_px": 32});
    settings.as_object_mut().unwrap().extend(part.as_object().unwrap().clone());
    let mut whole = json!({"settings": settings});
    whole.as_object_mut().unwrap().extend(phase.as_object().unwrap().clone());
    whole
}

/// Metrics and exported weights of a run that is done.
fn results(run: &Path) -> (String, Vec<u8>) {
    let export = fs::read_dir(run.join("export")).unwrap().next().unwrap().unwrap().path();
    (fs::read_to_string(run.join("metrics.jsonl")).unwrap(), fs::read(export).unwrap())
}

fn values(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    checkpoint.data(name).unwrap().try_to_vec_as::<f32>().unwrap()
}

/// Runs a recipe whole, and again with a stop after its first step.
fn check_resumes(recipe: &Recipe) {
    let dir = tempfile::tempdir().unwrap();
    let (whole, stopped) = (dir.path().join("whole"), dir.path().join("stopped"));
    let outcome = train(recipe, &whole, &mut unobserved).unwrap();
    assert!(matches!(outcome, TrainOutcome::Finished(_)));
    let mut stop = |event: TrainEvent<'_>| match event {
        TrainEvent::Step { metrics, .. } if metrics.step == 1 => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let outcome = train(recipe, &stopped, &mut stop).unwrap();
    assert!(matches!(outcome, TrainOutcome::Stopped(_)));
    train(recipe, &stopped, &mut unobserved).unwrap();
    let (whole, stopped) = (results(&whole), results(&stopped));
    assert_eq!(whole.0, stopped.0);
    assert!(whole.1 == stopped.1, "exported weights differ");
}

#[test]
fn the_language_model_resumes() {
    check_resumes(&recipe("autoregressive", json!("checkpoint"), world("multi_turn"), json!({"ema_decay": 0.9})));
}

#[test]
fn the_language_model_resumes_with_samples_that_it_sees_again() {
    let settings = json!({"distinct_samples": 3, "steps": 3});
    check_resumes(&recipe("autoregressive", json!("checkpoint"), world("editing"), settings));
}

/// Metrics of the first step that is written.
fn first_metrics(recipe: &Recipe) -> Value {
    let dir = tempfile::tempdir().unwrap();
    train(recipe, dir.path(), &mut unobserved).unwrap();
    let metrics = fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
    serde_json::from_str(metrics.lines().next().unwrap()).unwrap()
}

#[test]
fn the_language_model_resumes_with_labels_attention_and_selection() {
    let loss = |weight: f64| {
        let weights = json!({
            "label_weight": weight, "input_label_weight": 2.0 * weight, "attention_weight": 3.0 * weight,
            "selection_weight": 4.0 * weight, "state_layers": 0,
        });
        json!({"settings": weights})
    };
    let lookalikes = json!({"world": {"seed": 4, "task": "editing", "kinds": ["remove"], "emphasis": "lookalikes"}});
    let recipe = |labels| recipe("autoregressive", json!("checkpoint"), lookalikes.clone(), loss(labels));
    check_resumes(&recipe(0.5));
    let (with, without) = (first_metrics(&recipe(0.5)), first_metrics(&recipe(0.0)));
    let parts = ["labels", "input_labels", "attention", "selection"];
    let [labels, input_labels, attention, selection] = parts.map(|part| with[part].as_f64().unwrap());
    assert!(labels > 1.0 && input_labels > 1.0 && attention > 0.5 && selection > 0.2, "{with}");
    let expected = without["loss"].as_f64().unwrap() + 0.5 * labels + input_labels + 1.5 * attention + 2.0 * selection;
    let loss = with["loss"].as_f64().unwrap();
    assert!((loss - expected).abs() < 1e-4 * expected, "{loss} {expected}");
    assert!(parts.iter().all(|&part| without.get(part).is_none()), "{without}");
}

#[test]
fn states_after_more_layers_than_there_are_are_refused() {
    for (loss, needed) in
        [("input_label_weight", "99 layers"), ("attention_weight", "100"), ("selection_weight", "101")]
    {
        let loss = json!({"settings": {loss: 1.0, "state_layers": 99}});
        let recipe = recipe("autoregressive", json!("checkpoint"), world("editing"), loss);
        let dir = tempfile::tempdir().unwrap();
        let error = train(&recipe, dir.path(), &mut unobserved).unwrap_err().to_string();
        assert!(error.contains("state_layers") && error.contains(needed), "{error}");
    }
}

#[test]
fn a_sheet_shows_what_the_language_model_predicts() {
    // With pictures to be edited, and what the encoder gives in bf16.
    let settings = decoder(json!({}), json!({"distinct_samples": 2, "compute_dtype": "bf16"}));
    let mut recipe = recipe_json("autoregressive", json!("checkpoint"), world("editing"), settings);
    recipe["train"]["sample_every"] = json!(1);
    let recipe: Recipe = serde_json::from_value(recipe).unwrap();
    let dir = tempfile::tempdir().unwrap();
    train(&recipe, dir.path(), &mut unobserved).unwrap();
    let [first, second] = [1, 2].map(|step| {
        let sheet = Image::open(dir.path().join(format!("samples/step-{step:08}.png"))).unwrap();
        // Two pictures of 32x32 pixels from the true embeddings, and two from the predicted ones, 4 pixels apart.
        assert_eq!((sheet.width_px(), sheet.height_px()), (76, 76));
        let picture = |left: usize, top: usize| -> Vec<u8> {
            (0..32).flat_map(|y| sheet.rgb()[3 * (76 * (top + y) + left)..][..96].to_vec()).collect()
        };
        let mut truth = [picture(4, 4), picture(40, 4)];
        // The two samples may come in either order.
        truth.sort();
        let mut predicted = [picture(4, 40), picture(40, 40)];
        predicted.sort();
        (truth, predicted)
    });
    assert!(first.0 == second.0, "the true embeddings are the same");
    assert!(first.1 != second.1 && first.0 != first.1, "predictions are other than the truth, and change");
}

#[test]
fn the_vision_encoder_resumes() {
    let initial = json!({"random": {"seed": 2}});
    check_resumes(&recipe("vision_encoder", initial, world("understanding"), json!({"max_grad_norm": 1.0})));
}

#[test]
fn the_vision_encoder_resumes_with_labels_and_muon() {
    let settings = json!({
        "muon": {"matrices": ["visual.blocks.*.weight", "model.layers.*"]},
        "settings": {"label_weight": 1.0, "image_weight": 0.0},
    });
    let recipe = recipe("vision_encoder", json!("checkpoint"), world("multi_turn"), settings);
    check_resumes(&recipe);
    let first = first_metrics(&recipe);
    // Heads that know nothing yet: about the mean of the logarithms of the numbers of classes.
    let labels = first["labels"].as_f64().unwrap();
    assert!((1.0..2.2).contains(&labels), "{labels}");
}

#[test]
fn what_training_never_shows_stays_out_of_the_losses() {
    for (part, labels) in [("vision_encoder", "labels"), ("autoregressive", "input_labels")] {
        let [with, without] = [true, false].map(|exclude| {
            let weight = if part == "vision_encoder" { "label_weight" } else { "input_label_weight" };
            let settings = json!({"settings": {weight: 1.0, "exclude_unseen": exclude}});
            let describe = json!({"world": {"seed": 4, "task": "understanding", "kinds": ["describe"]}});
            let first = first_metrics(&recipe(part, json!("checkpoint"), describe, settings));
            ["cross_entropy", labels].map(|name| first[name].as_f64().unwrap())
        });
        for (with, without) in with.into_iter().zip(without) {
            // Nearly all tokens and labels keep all that they compete with.
            assert!(with < without && with > 0.9 * without, "{part}: {with} {without}");
        }
    }
}

/// Metrics of the only step, and all weights after it.
fn one_step(part: &str, data: Value, mut phase: Value, compute_dtype: &str, recompute: bool) -> (Value, Vec<f32>) {
    (phase["steps"], phase["compute_dtype"]) = (json!(1), json!(compute_dtype));
    if recompute {
        phase["settings"]["recompute"] = json!(true);
    }
    let recipe = recipe(part, json!("checkpoint"), data, phase);
    let dir = tempfile::tempdir().unwrap();
    train(&recipe, dir.path(), &mut unobserved).unwrap();
    let metrics = fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
    let module = Checkpoint::open(dir.path().join("checkpoints/step-00000001/module.safetensors")).unwrap();
    let names: Vec<String> = module.entries().map(|entry| entry.name.clone()).collect();
    let weights = names.iter().flat_map(|name| values(&module, name)).collect();
    (serde_json::from_str(metrics.lines().next().unwrap()).unwrap(), weights)
}

/// Every part that has blocks, with a source of data and settings.
fn parts_with_blocks() -> [(&'static str, Value, Value); 4] {
    // A guidance whose thousandfold bf16 can tell: 3.5 would be 3.504.
    let guidance = || json!({"embedded_guidance": 2.0});
    let everything = json!({"settings": {"input_label_weight": 1.0, "attention_weight": 1.0, "state_layers": 0}});
    [
        ("autoregressive", world("editing"), everything),
        ("vision_encoder", world("understanding"), json!({})),
        ("generation_decoder", world("generation"), decoder(guidance(), json!({}))),
        ("editing_decoder", world("editing"), decoder(guidance(), json!({}))),
    ]
}

#[test]
fn recomputed_activations_give_the_same_step() {
    for (part, data, phase) in parts_with_blocks() {
        let [kept, again] = [false, true].map(|again| one_step(part, data.clone(), phase.clone(), "f32", again));
        assert_eq!(kept.0["loss"], again.0["loss"], "{part}");
        let norms = [&kept, &again].map(|(metrics, _)| metrics["grad_norm"].as_f64().unwrap());
        assert!((norms[0] - norms[1]).abs() < 1e-5 * norms[0], "{part}: {norms:?}");
        // AdamW's first step is as long for the smallest gradient as for the largest: where a sum of rounding errors
        // decides on the sign, weights may differ by two steps.
        let different = kept.1.iter().zip(&again.1).filter(|(a, b)| (*a - *b).abs() > 1e-4).count();
        assert!(different * 1000 < kept.1.len(), "{part}: {different} of {} weights", kept.1.len());
    }
}

#[test]
fn activations_in_bf16_give_about_the_same_losses() {
    for (part, data, phase) in
        parts_with_blocks().into_iter().chain([("autoencoder", world("generation"), decoder(json!({}), json!({})))])
    {
        let [full, half] = ["f32", "bf16"].map(|dtype| one_step(part, data.clone(), phase.clone(), dtype, false).0);
        for name in ["loss", "grad_norm"] {
            let [full, half] = [&full, &half].map(|metrics| metrics[name].as_f64().unwrap());
            assert!(full != half && (full - half).abs() < 0.05 * full, "{part}: {name} {full}, in bf16 {half}");
        }
    }
}

/// Runs a recipe with micro-batches one after the other, and side by side.
fn check_side_by_side(recipe: Recipe) {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = [1, 2].map(|parallel_micro_batches| {
        let recipe = Recipe { parallel_micro_batches, ..recipe.clone() };
        let run = dir.path().join(parallel_micro_batches.to_string());
        train(&recipe, &run, &mut unobserved).unwrap();
        results(&run)
    });
    assert_eq!(one.0, two.0);
    assert!(one.1 == two.1, "exported weights differ");
}

#[test]
fn micro_batches_side_by_side_make_no_difference() {
    let settings = json!({"accumulation": 3, "batch_size": 1});
    check_side_by_side(recipe("autoregressive", json!("checkpoint"), world("editing"), settings.clone()));
    check_side_by_side(recipe("vision_encoder", json!("checkpoint"), world("understanding"), settings));
    let settings = decoder(json!({}), json!({"accumulation": 3, "batch_size": 1, "distinct_samples": 2}));
    check_side_by_side(recipe("editing_decoder", json!("checkpoint"), world("editing"), settings.clone()));
    check_side_by_side(recipe("autoencoder", json!({"random": {"seed": 1}}), world("generation"), settings));
}

#[test]
fn the_generation_decoder_resumes() {
    let settings = json!({"predicted_embeds": 0.5, "condition_dropout": 0.3});
    check_resumes(&recipe(
        "generation_decoder",
        json!("checkpoint"),
        world("generation"),
        decoder(settings, json!({})),
    ));
}

#[test]
fn the_editing_decoder_resumes_with_samples_that_it_sees_again() {
    let settings = decoder(json!({"predicted_embeds": 0.5}), json!({"distinct_samples": 3}));
    check_resumes(&recipe("editing_decoder", json!("checkpoint"), world("editing"), settings));
}

#[test]
fn an_editing_decoder_begins_with_the_transformer_of_the_generation_decoder() {
    let dir = tempfile::tempdir().unwrap();
    let initial = json!({"generation_decoder": {"seed": 9}});
    // Too small a step to be seen in bf16.
    let settings = decoder(json!({}), json!({"distinct_samples": 1, "steps": 1, "learning_rate": 1e-12}));
    let recipe = recipe("editing_decoder", initial, world("editing"), settings);
    train(&recipe, dir.path().join("run"), &mut unobserved).unwrap();
    let begun = Checkpoint::open(dir.path().join("run/export/edit_decoder.safetensors")).unwrap();
    let models = random_models_dir().join("Nexus-GenV2");
    let generation = Checkpoint::open(models.join("generation_decoder.bin")).unwrap();
    let editing = Checkpoint::open(models.join("edit_decoder.bin")).unwrap();
    let transformer = "pipe.dit.single_blocks.0.to_qkv_mlp.weight";
    assert_eq!(values(&begun, transformer), values(&generation, transformer));
    assert_ne!(values(&begun, transformer), values(&editing, transformer));
    let merger = "embedding_merger.layers.0.self_attn.q_proj.weight";
    assert_ne!(values(&begun, merger), values(&editing, merger), "the merger is random");
}
