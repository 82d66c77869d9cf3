//! Recipes: those of the released model are read, wrong ones are refused by field.

use std::{fs, path::Path};

use nexus_train::{Recipe, TrainError};
use serde_json::json;

use crate::case::{Case, phase};

#[test]
fn the_recipes_of_the_released_model_are_read_and_say_their_own_command() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let (mut dirs, mut count) = (vec![root.join("nexus-train/recipes")], 0);
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
    assert_eq!(count, 3);
}

#[test]
fn wrong_recipes_are_refused() {
    for (pointer, value, expected) in [
        ("/train/phases/0/name", json!(7), "expected a string"),
        ("/train/phases/0/learning_rate", json!(-1.0), "learning_rate"),
        ("/train/phases/0/data", json!([]), "data"),
        ("/train/phases/0/data", json!([{"source": {}, "weight": 1.0}]), "one name with its settings"),
        (
            "/train/phases/0/data",
            json!([{"source": {"messages": {"file": "a"}}, "weight": 1.0}]),
            "unknown field `file`",
        ),
        ("/train/phases/0/warmup_steps", json!(9), "warmup_steps"),
        ("/train/phases/0/settings", json!({"picture_px": 33}), "picture_px"),
        ("/train/phases/0/settings", json!({"size": 33}), "size"),
        ("/train/phases/0/ema_decay", json!(1.5), "ema_decay"),
        ("/train/phases/0", phase("first", json!({"muon": {"matrices": ["*.weight"], "momentum": 1.0}})), "momentum"),
        ("/train/phases", json!([]), "phases"),
        ("/parallel_micro_batches", json!(0), "parallel_micro_batches"),
        ("/train/part", json!("tokenizer"), "tokenizer"),
    ] {
        let error = refused(&Case::new().set(pointer, value));
        assert!(error.contains(expected), "{pointer}: {error}");
    }
    let mut case = Case::new();
    case.recipe["stages"] = json!(1);
    assert!(refused(&case).contains("unknown field `stages`"));
}

/// Why a recipe cannot be read.
fn refused(case: &Case) -> String {
    let path = case.dir.path().join("recipe.json");
    fs::write(&path, case.recipe.to_string()).unwrap();
    Recipe::read(&path).unwrap_err().to_string()
}

#[test]
fn a_field_of_another_part_is_refused() {
    for (part, field, value) in [
        ("autoencoder", "prefill", json!(false)),
        ("autoencoder", "token_weight", json!(1.0)),
        ("autoencoder", "label_weight", json!(1.0)),
        ("autoencoder", "attention_weight", json!(1.0)),
        ("autoencoder", "exclude_unseen", json!(true)),
        ("autoencoder", "embeds_noise", json!(0.1)),
        ("autoencoder", "state_layers", json!(1)),
        ("autoencoder", "condition_dropout", json!(0.1)),
        ("autoencoder", "embedded_guidance", json!(1.0)),
        ("autoencoder", "recompute", json!(true)),
        ("vision_encoder", "picture_px", json!(32)),
        ("vision_encoder", "selection_weight", json!(1.0)),
        ("generation_decoder", "kl_weight", json!(1e-5)),
        ("editing_decoder", "appearance_weight", json!(2.0)),
        ("autoregressive", "gradient_weight", json!(2.0)),
        ("autoregressive", "condition_dropout", json!(0.1)),
    ] {
        let mut case = Case::new().set("/train/part", json!(part));
        case.recipe["train"]["phases"] = json!([phase("only", json!({"settings": {field: value}}))]);
        let error = refused(&case);
        assert!(error.contains(&format!("unknown field `{field}`")), "{part}: {error}");
    }
    let mut case = Case::new().set("/train/part", json!("vision_encoder"));
    case.recipe["train"]["phases"] = json!([phase("only", json!({"settings": {}}))]);
    case.recipe["train"]["sample_every"] = json!(5);
    let error = refused(&case);
    assert!(error.contains("sample_every"), "it draws no pictures: {error}");
    let mut case = Case::new().set("/train/part", json!("autoregressive"));
    case.recipe["train"]["initial"] = json!({"generation_decoder": {"seed": 1}});
    case.recipe["train"]["phases"] = json!([phase("only", json!({"settings": {}}))]);
    let error = refused(&case);
    assert!(error.contains("unknown variant `generation_decoder`"), "only the editing decoder begins so: {error}");
}

#[test]
fn patterns_that_mean_no_parameter_are_refused() {
    let case = Case::new().set("/train/phases/0/frozen", json!(["encodre.*"]));
    let error = case.run("run").unwrap_err();
    assert!(matches!(&error, TrainError::UnknownPattern { pattern, .. } if pattern == "encodre.*"), "{error}");
    let misspelt = json!({"muon": {"matrices": ["*.weight", "*.wieght"]}});
    let case = Case::new().set("/train/phases/0", phase("first", misspelt));
    let error = case.run("run").unwrap_err();
    assert!(matches!(&error, TrainError::UnknownPattern { pattern, .. } if pattern == "*.wieght"), "{error}");
    let case = Case::new().set("/train/phases/0/frozen", json!(["*"]));
    assert!(matches!(case.run("run").unwrap_err(), TrainError::NothingTrained { .. }));
}
