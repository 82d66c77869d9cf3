//! Recipes: those of the repository are read, wrong ones are refused by field.

use std::{fs, path::Path};

use nexus_train::{Recipe, TrainError};
use serde_json::json;

use crate::case::{Case, stage};

#[test]
fn the_recipes_of_the_repository_are_read_and_say_their_own_command() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let (mut dirs, mut count) = (vec![root.join("recipes")], 0);
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "json") {
                let recipe = Recipe::read(&path).unwrap_or_else(|error| panic!("{error}"));
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/");
                assert!(recipe.command.contains(&format!("--recipe {name} ")), "{name}: {}", recipe.command);
                count += 1;
            }
        }
    }
    assert!(count > 15, "only {count} recipes were found");
}

#[test]
fn wrong_recipes_are_refused() {
    for (pointer, value, expected) in [
        ("/stages/0/name", json!(7), "expected a string"),
        ("/stages/0/learning_rate", json!(-1.0), "learning_rate"),
        ("/stages/0/data", json!([]), "data"),
        ("/stages/0/warmup_steps", json!(9), "warmup_steps"),
        ("/stages/0/decoder", json!({"picture_px": 33}), "picture_px"),
        ("/stages/0/decoder", json!({"size": 33}), "size"),
        ("/stages/0/ema_decay", json!(1.5), "ema_decay"),
        (
            "/stages/0/data",
            json!([{"source": {"world": {"seed": 1, "task": "generation", "kinds": ["describe"]}}, "weight": 1.0}]),
            "Describe is none of Generation",
        ),
        ("/stages/0", stage("first", json!({"muon": {"matrices": ["*.weight"], "momentum": 1.0}})), "momentum"),
        ("/stages/0", stage("first", json!({"loss": {"label_weight": 1.0}})), "label_weight"),
        ("/stages/0", stage("first", json!({"loss": {"attention_weight": 1.0}})), "attention_weight"),
        ("/stages/0", stage("first", json!({"loss": {"exclude_unseen": true}})), "exclude_unseen"),
        ("/stages/0", stage("first", json!({"loss": {"prefill": false}})), "prefill`: has no meaning for Autoencoder"),
        ("/stages/0", stage("first", json!({"loss": {"token_weight": 1.0}})), "token_weight"),
        ("/stages/0", stage("first", json!({"loss": {"embeds_noise": 0.1}})), "embeds_noise"),
        ("/stages/0", stage("first", json!({"loss": {"state_layers": 1}})), "state_layers"),
        ("/stages/0/decoder", json!({"picture_px": 32, "condition_dropout": 0.1}), "condition_dropout"),
        ("/stages/0/decoder", json!({"picture_px": 32, "embedded_guidance": 1.0}), "embedded_guidance"),
        ("/part", json!("vision_encoder"), "picture_px"),
        ("/parallel_micro_batches", json!(0), "parallel_micro_batches"),
        ("/part", json!("tokenizer"), "tokenizer"),
    ] {
        let case = Case::new().set(pointer, value);
        let path = case.dir.path().join("recipe.json");
        fs::write(&path, case.recipe.to_string()).unwrap();
        let error = Recipe::read(&path).unwrap_err().to_string();
        assert!(error.contains(expected), "{pointer}: {error}");
    }
    for (part, settings, expected) in [
        ("generation_decoder", json!({"loss": {"kl_weight": 1e-5}}), "kl_weight"),
        ("autoencoder", json!({"recompute": true}), "recompute"),
        ("editing_decoder", json!({"loss": {"appearance_weight": 2.0}}), "appearance_weight"),
        ("vision_encoder", json!({"decoder": {}, "loss": {"selection_weight": 1.0}}), "selection_weight"),
        ("autoregressive", json!({"decoder": {}, "loss": {"gradient_weight": 2.0}}), "gradient_weight"),
        ("autoregressive", json!({"decoder": {"condition_dropout": 0.1}}), "condition_dropout"),
    ] {
        let mut case = Case::new().set("/part", json!(part));
        case.recipe["stages"] = json!([stage("only", settings)]);
        let path = case.dir.path().join("recipe.json");
        fs::write(&path, case.recipe.to_string()).unwrap();
        let error = Recipe::read(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("{expected}`: has no meaning for")), "{part}: {error}");
    }
    let mut case = Case::new().set("/part", json!("vision_encoder"));
    case.recipe["stages"] = json!([stage("only", json!({"decoder": {}}))]);
    case.recipe["sample_every"] = json!(5);
    let path = case.dir.path().join("recipe.json");
    fs::write(&path, case.recipe.to_string()).unwrap();
    let error = Recipe::read(&path).unwrap_err().to_string();
    assert!(error.contains("sample_every") && error.contains("VisionEncoder"), "{error}");
    let case = Case::new().set("/stages/0/frozen", json!(["encodre.*"]));
    let error = case.run("run").unwrap_err();
    assert!(matches!(&error, TrainError::UnknownPattern { pattern, .. } if pattern == "encodre.*"), "{error}");
    let misspelt = json!({"muon": {"matrices": ["*.weight", "*.wieght"]}});
    let case = Case::new().set("/stages/0", stage("first", misspelt));
    let error = case.run("run").unwrap_err();
    assert!(matches!(&error, TrainError::UnknownPattern { pattern, .. } if pattern == "*.wieght"), "{error}");
    let case = Case::new().set("/stages/0/frozen", json!(["*"]));
    assert!(matches!(case.run("run").unwrap_err(), TrainError::NothingTrained { .. }));
}
