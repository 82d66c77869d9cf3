//! Samples that cannot be used: which are set aside, by every part of the model alike, and how often they count.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nexus::{Image, Message, data::MessagesFile};
use nexus_core::testing::{cpu, random_models_dir};
use nexus_train::{Recipe, train, unobserved};
use serde_json::{Value, json};

use crate::case::{copied_models, decoder, recipe};

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
    let run = |name: &str, phase: Value, seed: u64| {
        let data = data.clone();
        let mut phase = decoder(json!({}), phase);
        phase["steps"] = json!(4);
        let recipe = Recipe { seed, ..recipe("generation_decoder", data, phase) };
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
    let phase = decoder(json!({}), json!({"distinct_samples": 8, "steps": 3, "batch_size": 8}));
    let recipe = Recipe { max_rejected: 4, ..recipe("generation_decoder", data, phase) };
    let again = dir.path().join("again");
    train(&recipe, random_models_dir(), &again, &cpu(), &mut unobserved).unwrap();
    assert_eq!(fs::read_to_string(again.join("rejected.jsonl")).unwrap().lines().count(), 4);
}

/// A copy of the bundled random checkpoint with another length of the context.
fn models_with_context(dir: &Path, tokens: usize) -> PathBuf {
    let models = copied_models(&dir.join("models"));
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
            let data = json!({"messages": {"path": file}});
            let recipe = Recipe { max_rejected: 1, ..recipe(part, data, settings) };
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
        let recipe = Recipe { max_rejected: 4, ..recipe("generation_decoder", data, settings) };
        train(&recipe, &models, &run, &cpu(), &mut unobserved).unwrap();
        let reasons = reasons(&run);
        assert_eq!(reasons.len(), expected, "{reasons:?}");
        for part in ["context holds 160", "<|im_end|>", "aspect ratio", "last message"].iter().take(expected) {
            assert!(reasons.iter().any(|reason| reason.contains(part)), "no {part} in {reasons:?}");
        }
    }
}
