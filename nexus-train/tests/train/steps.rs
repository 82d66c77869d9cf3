//! Steps of training runs: clipping, accumulation, learning rates, and what shows them.

use nexus::{Image, checkpoint::Checkpoint};
use nexus_core::testing::random_models_dir;
use serde_json::{Value, json};

use crate::case::{Case, phase};

/// A recipe of one step that moves each weight by its gradient: far above any gradient, `eps` makes AdamW plain descent.
fn descent(more: Value) -> Case {
    let mut settings = json!({
        "steps": 1, "warmup_steps": 0, "learning_rate": 1e4, "optimizer": {"eps": 1e4, "weight_decay": 0.0},
    });
    settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let mut case = Case::new();
    case.recipe["train"]["phases"] = json!([phase("only", settings)]);
    case
}

/// The gradients of all weights of [`descent`], in order, and the metrics of the step.
fn gradients(more: Value) -> (Vec<f64>, Value) {
    let case = descent(more);
    case.run("run").unwrap();
    let before = Checkpoint::open(random_models_dir().join("FLUX/FLUX.1-dev/ae.safetensors")).unwrap();
    let after = Checkpoint::open(case.checkpoints("run")[0].join("module.safetensors")).unwrap();
    let mut names: Vec<String> = after.entries().map(|entry| entry.name.clone()).collect();
    names.sort();
    let values = |file: &Checkpoint, name: &str| file.data(name).unwrap().try_to_vec_as::<f32>().unwrap();
    let moved = names.iter().flat_map(|name| {
        let pairs = values(&before, name).into_iter().zip(values(&after, name));
        pairs.map(|(before, after)| f64::from(before - after)).collect::<Vec<_>>()
    });
    (moved.collect(), case.metrics("run").remove(0))
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum::<f64>().sqrt()
}

/// Norm of the difference, relative to the expected one.
fn drift(actual: &[f64], expected: &[f64]) -> f64 {
    norm(&actual.iter().zip(expected).map(|(a, e)| a - e).collect::<Vec<_>>()) / norm(expected)
}

#[test]
fn long_gradients_are_scaled_to_the_limit_and_short_ones_stay() {
    let (free, metrics) = gradients(json!({}));
    let length = metrics["grad_norm"].as_f64().unwrap();
    assert!((norm(&free) / length - 1.0).abs() < 1e-3, "{} {length}", norm(&free));
    let limit = 0.3 * length;
    let (clipped, metrics) = gradients(json!({"max_grad_norm": limit}));
    assert_eq!(metrics["grad_norm"].as_f64().unwrap(), length, "the norm is that before clipping");
    let expected: Vec<f64> = free.iter().map(|gradient| 0.3 * gradient).collect();
    assert!(drift(&clipped, &expected) < 1e-3, "{}", drift(&clipped, &expected));
    let (short, _) = gradients(json!({"max_grad_norm": 1.1 * length}));
    assert_eq!(short, free);
}

#[test]
fn accumulated_gradients_are_the_mean() {
    let (whole, whole_metrics) = gradients(json!({"batch_size": 2}));
    let (halves, halves_metrics) = gradients(json!({"batch_size": 1, "accumulation": 2}));
    assert!(drift(&halves, &whole) < 1e-3, "{}", drift(&halves, &whole));
    for part in ["loss", "reconstruction", "gradient", "kl"] {
        let [whole, halves] = [&whole_metrics, &halves_metrics].map(|metrics| metrics[part].as_f64().unwrap());
        assert!((halves / whole - 1.0).abs() < 1e-4, "{part}: {halves} {whole}");
    }
    // One of the samples alone gives something else.
    let (one, _) = gradients(json!({"batch_size": 1}));
    assert!(drift(&one, &whole) > 0.05, "{}", drift(&one, &whole));
}

#[test]
fn every_step_has_the_learning_rate_of_its_schedule() {
    let settings = json!({"steps": 6, "warmup_steps": 2, "schedule": {"cosine": {"end": 0.5}}});
    let mut case = Case::new();
    case.recipe["train"]["phases"] = json!([phase("only", settings)]);
    case.run("run").unwrap();
    let rates: Vec<f64> = case.metrics("run").iter().map(|line| line["learning_rate"].as_f64().unwrap()).collect();
    let fallen = |share: f64| 1e-3 * (0.5 + 0.25 * (1.0 + (std::f64::consts::PI * share).cos()));
    let expected = [0.5e-3, 1e-3, fallen(0.0), fallen(0.25), fallen(0.5), fallen(0.75)];
    assert!(rates.iter().zip(expected).all(|(rate, expected)| (rate - expected).abs() < 1e-12), "{rates:?}");
}

#[test]
fn sheets_show_the_run() {
    let mut case = Case::new();
    case.recipe["train"]["sample_every"] = json!(2);
    case.run("run").unwrap();
    for step in [2, 4, 6] {
        let sheet = Image::open(case.dir.path().join(format!("run/samples/step-{step:08}.png"))).unwrap();
        // Two pictures of 32x32 pixels and what is made of them, 4 pixels apart.
        assert_eq!((sheet.width_px(), sheet.height_px()), (76, 76));
        let darkest = |top: usize| (0..32).flat_map(|y| &sheet.rgb()[3 * 76 * (top + y)..][12..12 + 96]).min().unwrap();
        assert!(*darkest(4) < 64 && *darkest(40) < 255, "{} {}", darkest(4), darkest(40));
    }
    assert!(!case.dir.path().join("run/samples/step-00000003.png").exists());
}
