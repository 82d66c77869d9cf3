//! Sources of the program that trains: found by name, with what they know of their samples; and runs driven step by step.

use std::{fs, path::Path};

use nexus::{
    Image, Message,
    data::{BoxedSource, DataError, Tokenizer, TrainingInput},
};
use nexus_core::testing::{cpu, random_models_dir};
use nexus_train::{
    LabelClasses, PossibleClass, PossibleToken, Recipe, Sample, Source, Supervision, TokenLabels, TokenLooks,
    TrainError, TrainOutcome, Trainer, Truth, unobserved,
};
use serde_json::{Value, json};

use crate::case::recipe;

/// Pictures in one of three greys, which the answer names.
struct Greys {
    /// Classes of the label that tells the grey.
    classes: usize,
}

const NAMES: [&str; 3] = ["Dark.", "Grey.", "Light."];

impl Source for Greys {
    fn name(&self) -> String {
        "greys".to_string()
    }

    fn len(&self) -> Option<u64> {
        None
    }

    fn knows(&self) -> Option<LabelClasses> {
        Some(LabelClasses { embeds: vec![self.classes], states: vec![2] })
    }

    fn sample(&self, number: u64) -> Result<Sample, BoxedSource> {
        let grey = (number % 3) as u8;
        let picture = Image::from_rgb8(56, 56, vec![40 + 80 * grey; 3 * 56 * 56])?;
        let asked = Message::user().with_image(picture).with_text("Which grey?");
        let messages = vec![asked, Message::assistant().with_text(NAMES[usize::from(grey)])];
        Ok(Sample { messages, truth: Some(Box::new(Grey(grey))) })
    }
}

struct Grey(u8);

impl Truth for Grey {
    fn supervision(&self, input: &TrainingInput, tokenizer: &Tokenizer) -> Result<Supervision, DataError> {
        let is_image = |id: &u32| *id == tokenizer.special_tokens().image;
        let image: Vec<usize> = (0..input.token_ids.len()).filter(|&index| is_image(&input.token_ids[index])).collect();
        let first = input.labels.iter().position(Option::is_some).unwrap();
        let looks = vec![TokenLooks { queries: vec![first - 1], tokens: image.clone() }];
        let classes = (0..image.len()).flat_map(|token| [self.0, u8::from(token >= image.len() / 2)]).collect();
        let possible = vec![PossibleClass { token: 0, label: 0, class: (self.0 + 1) % 3 }];
        let others = (0..100).filter(|&id| input.labels[first] != Some(id));
        Ok(Supervision {
            images: vec![Some(TokenLabels { classes, possible })],
            attended: looks.clone(),
            selected: looks,
            possible: others.map(|id| PossibleToken { index: first, id }).collect(),
        })
    }
}

fn trainer() -> Trainer {
    Trainer::new().with_source("greys", |settings: &Value| {
        let classes = settings["classes"].as_u64().ok_or("`classes` is missing")?;
        Ok(Box::new(Greys { classes: classes as usize }) as Box<dyn Source>)
    })
}

fn train(recipe: &Recipe, run: &Path) -> Result<TrainOutcome, TrainError> {
    trainer().train(recipe, random_models_dir(), run, &cpu(), &mut unobserved)
}

fn greys(settings: Value) -> Recipe {
    recipe("autoregressive", json!({"greys": {"classes": 3}}), json!({"settings": settings}))
}

fn metrics(run: &Path) -> Value {
    let lines = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    serde_json::from_str(lines.lines().next().unwrap()).unwrap()
}

#[test]
fn what_a_source_knows_becomes_losses() {
    let dir = tempfile::tempdir().unwrap();
    let weights = |weight: f64| {
        json!({
            "input_label_weight": weight, "attention_weight": 2.0 * weight, "selection_weight": 3.0 * weight,
            "state_layers": 0,
        })
    };
    let [with, without] = [0.5, 0.0].map(|weight| {
        let run = dir.path().join(weight.to_string());
        train(&greys(weights(weight)), &run).unwrap();
        metrics(&run)
    });
    let parts = ["input_labels", "attention", "selection"];
    let [labels, attention, selection] = parts.map(|part| with[part].as_f64().unwrap());
    // Heads that know nothing yet: the mean of the logarithms of 3 and of 2.
    let chance = (3f64.ln() + 2f64.ln()) / 2.0;
    assert!((labels - chance).abs() < 0.3 && attention > 0.0 && selection > 0.0, "{with}");
    let expected = without["loss"].as_f64().unwrap() + 0.5 * labels + attention + 1.5 * selection;
    let loss = with["loss"].as_f64().unwrap();
    assert!((loss - expected).abs() < 1e-4 * expected, "{loss} {expected}");
    assert!(parts.iter().all(|&part| without.get(part).is_none()), "{without}");
}

#[test]
fn what_must_not_be_ruled_out_does_not_compete() {
    let dir = tempfile::tempdir().unwrap();
    for (part, weight, labels) in
        [("autoregressive", "input_label_weight", "input_labels"), ("vision_encoder", "label_weight", "labels")]
    {
        let [with, without] = [true, false].map(|exclude| {
            let settings = json!({"settings": {weight: 1.0, "exclude_unseen": exclude}});
            let run = dir.path().join(format!("{part}-{exclude}"));
            train(&recipe(part, json!({"greys": {"classes": 3}}), settings), &run).unwrap();
            ["cross_entropy", labels].map(|name| metrics(&run)[name].as_f64().unwrap())
        });
        assert!(with.iter().zip(&without).all(|(with, without)| with < without), "{part}: {with:?} {without:?}");
    }
}

#[test]
fn sources_are_found_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |data: Value, settings: Value| {
        let recipe = recipe("autoregressive", data, json!({"settings": settings}));
        train(&recipe, dir.path()).unwrap_err().to_string()
    };
    let error = refused(json!({"grays": {"classes": 3}}), json!({}));
    assert!(error.contains("`grays`") && error.contains("`messages`, `greys`"), "{error}");
    let error = refused(json!({"greys": {}}), json!({}));
    assert!(error.contains("greys") && error.contains("`classes` is missing"), "{error}");
}

#[test]
fn losses_of_what_nobody_knows_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("data.jsonl");
    let messages = vec![Message::text("Say it."), Message::assistant().with_text("It.")];
    nexus::data::MessagesFile::write(&file, [messages]).unwrap();
    for (field, value) in
        [("label_weight", json!(1.0)), ("attention_weight", json!(1.0)), ("exclude_unseen", json!(true))]
    {
        let settings = json!({"settings": {field: value}});
        let recipe = recipe("autoregressive", json!({"messages": {"path": file}}), settings);
        let error = train(&recipe, &dir.path().join("run")).unwrap_err().to_string();
        assert!(error.contains(field) && error.contains("no source of the phase `only`"), "{error}");
    }
    let data = [3, 4].map(|classes| json!({"source": {"greys": {"classes": classes}}, "weight": 1.0}));
    let recipe = recipe(
        "autoregressive",
        json!({"greys": {"classes": 3}}),
        json!({"data": data, "settings": {"label_weight": 1.0}}),
    );
    let error = train(&recipe, &dir.path().join("run")).unwrap_err().to_string();
    assert!(error.contains("different labels"), "{error}");
}

#[test]
fn a_run_is_driven_step_by_step() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = greys(json!({"attention_weight": 1.0}));
    let whole = dir.path().join("whole");
    train(&recipe, &whole).unwrap();

    let (trainer, run) = (trainer(), dir.path().join("driven"));
    let resume = || trainer.resume(&recipe, random_models_dir(), &run, &cpu()).unwrap();
    let mut driven = resume();
    assert!(driven.resumed_from().is_none());
    let first = driven.step().unwrap().unwrap();
    assert_eq!((first.metrics.step, first.samples, first.ends_phase), (1, 2, false));
    let checkpoint = driven.checkpoint().unwrap();
    // Lost, as it is not in a checkpoint.
    driven.step().unwrap();
    drop(driven);

    let mut driven = resume();
    assert_eq!((driven.resumed_from(), driven.state().steps), (Some(checkpoint.as_path()), 1));
    assert!(driven.step().unwrap().unwrap().ends_phase);
    assert!(driven.step().unwrap().is_none());
    assert!(driven.draw_samples().unwrap().is_none(), "no sheets were asked for");
    let export = driven.export().unwrap();
    let weights = |dir: &Path| fs::read(dir.join("model.safetensors")).unwrap();
    assert!(weights(&export) == weights(&whole.join("export")), "exported weights differ");
    let lines = |run: &Path| fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    assert_eq!(lines(&run), lines(&whole));
}
