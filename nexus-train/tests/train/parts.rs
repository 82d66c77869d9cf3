//! Training of every part of the model on the bundled random checkpoint: stopped and resumed, and what each begins with.

use std::{fs, ops::ControlFlow, path::Path};

use nexus::{Image, Message, checkpoint::Checkpoint, data::MessagesFile};
use nexus_core::testing::{cpu, random_models_dir};
use nexus_train::{Recipe, TrainEvent, TrainOutcome, train, unobserved};
use serde_json::{Value, json};

fn recipe(part: &str, initial: Value, data: Value, stage: Value) -> Recipe {
    let mut first = json!({
        "name": "only", "steps": 2, "batch_size": 2, "learning_rate": 1e-3, "data": [{"source": data, "weight": 1.0}],
    });
    first.as_object_mut().unwrap().extend(stage.as_object().unwrap().clone());
    let draws = ["autoencoder", "generation_decoder", "editing_decoder"].contains(&part);
    let recipe = json!({
        "command": "", "time": "", "expected": "", "part": part, "seed": 5, "initial": initial, "checkpoint_every": 1,
        "log_every": 1, "sample_every": draws.then_some(2), "max_rejected": 0, "stages": [first],
    });
    serde_json::from_value(recipe).unwrap()
}

fn world(task: &str) -> Value {
    json!({"world": {"seed": 1, "task": task}})
}

/// A stage of a decoder for small pictures, with more settings of the decoder and of the stage.
fn decoder(decoder: Value, stage: Value) -> Value {
    let mut settings = json!({"picture_px": 32});
    settings.as_object_mut().unwrap().extend(decoder.as_object().unwrap().clone());
    let mut whole = json!({"decoder": settings});
    whole.as_object_mut().unwrap().extend(stage.as_object().unwrap().clone());
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
    let outcome = train(recipe, random_models_dir(), &whole, &cpu(), &mut unobserved).unwrap();
    assert!(matches!(outcome, TrainOutcome::Finished(_)));
    let mut stop = |event: TrainEvent<'_>| match event {
        TrainEvent::Step { metrics, .. } if metrics.step == 1 => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let outcome = train(recipe, random_models_dir(), &stopped, &cpu(), &mut stop).unwrap();
    assert!(matches!(outcome, TrainOutcome::Stopped(_)));
    train(recipe, random_models_dir(), &stopped, &cpu(), &mut unobserved).unwrap();
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
    train(recipe, random_models_dir(), dir.path(), &cpu(), &mut unobserved).unwrap();
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
        json!({"loss": weights})
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
        let loss = json!({"loss": {loss: 1.0, "state_layers": 99}});
        let recipe = recipe("autoregressive", json!("checkpoint"), world("editing"), loss);
        let dir = tempfile::tempdir().unwrap();
        let error = train(&recipe, random_models_dir(), dir.path(), &cpu(), &mut unobserved).unwrap_err().to_string();
        assert!(error.contains("state_layers") && error.contains(needed), "{error}");
    }
}

#[test]
fn a_sheet_shows_what_the_language_model_predicts() {
    // With pictures to be edited, and what the encoder gives in bf16.
    let settings = decoder(json!({}), json!({"distinct_samples": 2, "compute_dtype": "bf16"}));
    let mut recipe = recipe("autoregressive", json!("checkpoint"), world("editing"), settings);
    recipe.sample_every = Some(1);
    let dir = tempfile::tempdir().unwrap();
    train(&recipe, random_models_dir(), dir.path(), &cpu(), &mut unobserved).unwrap();
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
        "loss": {"label_weight": 1.0, "image_weight": 0.0},
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
            let settings = json!({"loss": {weight: 1.0, "exclude_unseen": exclude}});
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

/// Metrics of the only step, and the largest change of a weight by it.
fn one_step(part: &str, data: Value, stage: Value, more: Value) -> (Value, Vec<f32>) {
    let mut stage = stage;
    stage.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    stage["steps"] = json!(1);
    let recipe = recipe(part, json!("checkpoint"), data, stage);
    let dir = tempfile::tempdir().unwrap();
    train(&recipe, random_models_dir(), dir.path(), &cpu(), &mut unobserved).unwrap();
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
    let everything = json!({"loss": {"input_label_weight": 1.0, "attention_weight": 1.0, "state_layers": 0}});
    [
        ("autoregressive", world("editing"), everything),
        ("vision_encoder", world("understanding"), json!({})),
        ("generation_decoder", world("generation"), decoder(guidance(), json!({}))),
        ("editing_decoder", world("editing"), decoder(guidance(), json!({}))),
    ]
}

#[test]
fn recomputed_activations_give_the_same_step() {
    for (part, data, stage) in parts_with_blocks() {
        let [kept, again] =
            [false, true].map(|recompute| one_step(part, data.clone(), stage.clone(), json!({"recompute": recompute})));
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
    for (part, data, stage) in
        parts_with_blocks().into_iter().chain([("autoencoder", world("generation"), decoder(json!({}), json!({})))])
    {
        let [full, half] =
            ["f32", "bf16"].map(|dtype| one_step(part, data.clone(), stage.clone(), json!({"compute_dtype": dtype})).0);
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
        train(&recipe, random_models_dir(), &run, &cpu(), &mut unobserved).unwrap();
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
    train(&recipe, random_models_dir(), dir.path().join("run"), &cpu(), &mut unobserved).unwrap();
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

#[test]
fn distinct_samples_are_all_that_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let picture = || Image::from_rgb8(32, 32, vec![90; 3 * 32 * 32]).unwrap();
    let drawn = vec![Message::text("Draw grey."), Message::assistant().with_image(picture())];
    let spoken = vec![Message::text("Say grey."), Message::assistant().with_text("Grey.")];
    let file = dir.path().join("data.jsonl");
    let conversations: Vec<Vec<Message>> =
        (0..8).map(|i| if i % 2 == 0 { drawn.clone() } else { spoken.clone() }).collect();
    MessagesFile::write(&file, &conversations).unwrap();
    let data = json!({"messages": {"path": file}});
    let run = |name: &str, stage: Value, seed: u64| {
        let data = data.clone();
        let mut recipe = recipe("generation_decoder", json!("checkpoint"), data, decoder(json!({}), stage));
        (recipe.seed, recipe.stages[0].steps) = (seed, 4);
        let run = dir.path().join(format!("{name}-{seed}"));
        train(&recipe, random_models_dir(), run, &cpu(), &mut unobserved)
    };
    // The first sample has a picture or not, by the seed; all eight always hold some without one.
    let mut finished = 0;
    for seed in 0..4 {
        let error = run("all", json!({}), seed).unwrap_err();
        assert!(error.to_string().contains("rejected.jsonl"), "{error}");
        finished += usize::from(run("first", json!({"distinct_samples": 1}), seed).is_ok());
    }
    assert!((1..4).contains(&finished), "{finished} of 4");

    // Four of eight are bad, and they count once although all come three times.
    let settings = decoder(json!({}), json!({"distinct_samples": 8}));
    let mut recipe = recipe("generation_decoder", json!("checkpoint"), data, settings);
    (recipe.max_rejected, recipe.stages[0].steps, recipe.stages[0].batch_size) = (4, 3, 8);
    let again = dir.path().join("again");
    train(&recipe, random_models_dir(), &again, &cpu(), &mut unobserved).unwrap();
    assert_eq!(fs::read_to_string(again.join("rejected.jsonl")).unwrap().lines().count(), 4);
}

/// A copy of the bundled random checkpoint with another length of the context.
fn models_with_context(dir: &Path, tokens: usize) -> std::path::PathBuf {
    let models = dir.join("models");
    let mut dirs = vec![std::path::PathBuf::new()];
    while let Some(inside) = dirs.pop() {
        fs::create_dir_all(models.join(&inside)).unwrap();
        for entry in fs::read_dir(random_models_dir().join(&inside)).unwrap() {
            let path = inside.join(entry.unwrap().file_name());
            match random_models_dir().join(&path).is_dir() {
                true => dirs.push(path),
                false => drop(fs::copy(random_models_dir().join(&path), models.join(&path)).unwrap()),
            }
        }
    }
    let config = models.join("Nexus-GenV2/config.json");
    let mut changed: Value = serde_json::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
    changed["max_position_embeddings"] = json!(tokens);
    fs::write(&config, changed.to_string()).unwrap();
    models
}

/// Reasons of the samples that a run set aside, in the order of the alphabet.
fn reasons(run: &Path) -> Vec<String> {
    let Ok(lines) = fs::read_to_string(run.join("rejected.jsonl")) else { return vec![] };
    let reason = |line: &str| serde_json::from_str::<Value>(line).unwrap()["reason"].as_str().unwrap().to_string();
    let mut reasons: Vec<String> = lines.lines().map(reason).collect();
    reasons.sort();
    reasons
}

#[test]
fn conversations_longer_than_the_context_are_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let models = models_with_context(dir.path(), 120);
    let picture = || Image::from_rgb8(56, 56, vec![90; 3 * 56 * 56]).unwrap();
    let seen =
        |words: &str| vec![Message::text("Say it.").with_image(picture()), Message::assistant().with_text(words)];
    let file = dir.path().join("data.jsonl");
    MessagesFile::write(&file, [seen("Grey."), seen(&"grey ".repeat(200)), seen("Dark."), seen("It is grey.")])
        .unwrap();
    for part in ["autoregressive", "vision_encoder"] {
        for (name, settings) in [("new", json!({})), ("distinct", json!({"distinct_samples": 4}))] {
            let run = dir.path().join(format!("{part}-{name}"));
            let mut recipe = recipe(part, json!("checkpoint"), json!({"messages": {"path": file}}), settings);
            (recipe.max_rejected, recipe.stages[0].steps) = (1, 2);
            train(&recipe, &models, &run, &cpu(), &mut unobserved).unwrap();
            let reasons = reasons(&run);
            assert!(reasons.len() == 1 && reasons[0].contains("the model's context holds 120"), "{part}: {reasons:?}");
        }
    }
}

#[test]
fn pictures_that_the_language_model_cannot_predict_are_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let models = models_with_context(dir.path(), 160);
    let grey = |width: usize, height: usize| Image::from_rgb8(width, height, vec![90; 3 * width * height]).unwrap();
    let drawn = |question: Message| vec![question, Message::assistant().with_image(grey(32, 32))];
    let mut goes_on = drawn(Message::text("Draw grey."));
    goes_on.push(Message::text("Thanks."));
    let conversations = [
        drawn(Message::text("Draw grey.")),
        goes_on,
        drawn(Message::text("Draw <|im_end|>.")),
        drawn(Message::text("Like this.").with_image(grey(300, 1))),
        drawn(Message::text("grey ".repeat(200))),
        drawn(Message::text("Draw a grey one.")),
    ];
    let file = dir.path().join("data.jsonl");
    MessagesFile::write(&file, &conversations).unwrap();
    // What is drawn to be predicted makes no difference to what is set aside.
    for (predicted, expected) in [(1.0, 4), (0.01, 4), (0.0, 0)] {
        let run = dir.path().join(predicted.to_string());
        let settings = decoder(json!({"predicted_embeds": predicted}), json!({"distinct_samples": 6, "steps": 6}));
        let data = json!({"messages": {"path": file}});
        let mut recipe = recipe("generation_decoder", json!("checkpoint"), data, settings);
        recipe.max_rejected = 4;
        train(&recipe, &models, &run, &cpu(), &mut unobserved).unwrap();
        let reasons = reasons(&run);
        assert_eq!(reasons.len(), expected, "{reasons:?}");
        for part in ["context holds 160", "<|im_end|>", "aspect ratio", "last message"].iter().take(expected) {
            assert!(reasons.iter().any(|reason| reason.contains(part)), "no {part} in {reasons:?}");
        }
    }
}

#[test]
fn only_the_editing_decoder_begins_with_another() {
    let recipe = recipe("autoregressive", json!({"generation_decoder": {"seed": 1}}), world("generation"), json!({}));
    let error = recipe.validate().unwrap_err().to_string();
    assert!(error.contains("initial") && error.contains("editing decoder"), "{error}");
}
