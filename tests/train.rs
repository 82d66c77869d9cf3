//! Training runs: killed and resumed, on full disks, with bad samples and wrong recipes.
#![cfg(feature = "train")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use burn::tensor::{FloatDType, Tensor, TensorData};
use nexus::{
    Image, Message,
    core::checkpoint::{Checkpoint, LoadDType, LoadOptions},
    data::{MessagesFile, decoder_image},
    diffusion::{Autoencoder, config::AutoencoderConfig},
    train::{Recipe, RunDir, TrainError, TrainEvent, TrainOutcome, train, unobserved},
};
use nexus_core::testing::{cpu, random_models_dir};
use serde_json::{Value, json};

/// Set in the process that is killed: the directory of recipe and run.
const CHILD: &str = "NEXUS_TEST_TRAIN";

struct Case {
    dir: tempfile::TempDir,
    recipe: Value,
}

impl Case {
    /// The autoencoder of the bundled random checkpoint on a few pictures.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let picture = |seed: usize| {
            let rgb = (0..3 * 32 * 32).map(|i| ((i * (seed + 3)) % 251) as u8).collect();
            vec![
                Message::user().with_image(Image::from_rgb8(32, 32, rgb).unwrap()).with_text("What?"),
                Message::assistant().with_text("Noise."),
            ]
        };
        let conversations: Vec<Vec<Message>> = (0..5).map(picture).collect();
        MessagesFile::write(dir.path().join("data.jsonl"), &conversations).unwrap();
        let recipe = json!({
            "command": "", "time": "", "expected": "",
            "part": "autoencoder", "seed": 3, "checkpoint_every": 1, "keep_checkpoints": 2, "log_every": 1,
            "max_rejected": 2, "parallel_micro_batches": 1,
            "stages": [
                stage("first", json!({"frozen": ["encoder.conv_in.*"], "ema_decay": 0.9})),
                stage("second", json!({"accumulation": 2, "schedule": {"cosine": {"end": 0.1}}, "max_grad_norm": 0.5})),
            ],
        });
        Self { dir, recipe }
    }

    fn set(mut self, pointer: &str, value: Value) -> Self {
        *self.recipe.pointer_mut(pointer).unwrap() = value;
        self
    }

    fn recipe(&self) -> Recipe {
        let path = self.dir.path().join("recipe.json");
        fs::write(&path, self.recipe.to_string()).unwrap();
        Recipe::read(path).unwrap()
    }

    fn run(&self, name: &str) -> Result<TrainOutcome, TrainError> {
        train(&self.recipe(), random_models_dir(), self.dir.path().join(name), &cpu(), &mut unobserved)
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.dir.path().join(path)).unwrap()
    }

    /// Metrics, exported weights and exported configuration of a finished run.
    fn results(&self, name: &str) -> (String, Vec<u8>, String) {
        let weights = self.dir.path().join(name).join("export/ae.safetensors");
        let config = self.read(&format!("{name}/export/ae_config.json"));
        (self.read(&format!("{name}/metrics.jsonl")), fs::read(weights).unwrap(), config)
    }

    /// The line of metrics of each step.
    fn metrics(&self, name: &str) -> Vec<Value> {
        self.read(&format!("{name}/metrics.jsonl")).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Makes a line of the data one whose picture is missing.
    fn spoil(&self, lines: std::ops::Range<usize>) {
        let bad = r#"{"messages":[{"role":"user","content":"<image>"},{"role":"assistant","content":"x"}],"images":["no.png"]}"#;
        let data = self.read("data.jsonl");
        let spoilt = data.lines().enumerate().map(|(index, line)| if lines.contains(&index) { bad } else { line });
        fs::write(self.dir.path().join("data.jsonl"), spoilt.collect::<Vec<_>>().join("\n")).unwrap();
    }

    fn checkpoints(&self, name: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.dir.path().join(name).join("checkpoints")).unwrap();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths
    }
}

fn stage(name: &str, more: Value) -> Value {
    let mut stage = json!({
        "name": name, "steps": 3, "batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 1,
        "data": [{"source": {"messages": {"path": "data.jsonl"}}, "weight": 1.0}],
        "decoder": {"picture_px": 32},
    });
    stage.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    stage
}

/// Not a test of its own: the process that the others start and kill.
#[test]
fn child() {
    let Some(dir) = std::env::var_os(CHILD) else { return };
    let dir = Path::new(&dir);
    let recipe = Recipe::read(dir.join("recipe.json")).unwrap();
    match train(&recipe, random_models_dir(), dir.join("run"), &cpu(), &mut unobserved) {
        Ok(_) => {}
        Err(error) => {
            fs::write(dir.join("error.txt"), error.to_string()).unwrap();
            std::process::exit(3);
        }
    }
}

fn child_command(case: &Case, limit_blocks: Option<usize>) -> Command {
    let limit = limit_blocks.map_or(String::new(), |blocks| format!("trap '' XFSZ; ulimit -f {blocks};"));
    let mut command = Command::new("sh");
    let exe = std::env::current_exe().unwrap();
    command.arg("-c").arg(format!("{limit} exec '{}' --exact child --test-threads 1", exe.display()));
    command.env(CHILD, case.dir.path()).env("RAYON_NUM_THREADS", "2").stdout(Stdio::null()).stderr(Stdio::null());
    command
}

#[test]
#[cfg(unix)]
fn a_killed_run_goes_on_bit_for_bit() {
    let case = Case::new();
    case.recipe();
    let started = std::time::Instant::now();
    assert!(child_command(&case, None).status().unwrap().success());
    let whole = started.elapsed();
    fs::rename(case.dir.path().join("run"), case.dir.path().join("undisturbed")).unwrap();
    let undisturbed = case.results("undisturbed");
    assert_eq!(undisturbed.0.lines().count(), 6);

    let mut killed = 0;
    for attempt in 0u32.. {
        let mut child = child_command(&case, None).spawn().unwrap();
        // Moments spread over the run by the golden ratio, and later ones as it goes on, so that it ends.
        let share = 0.2 + (f64::from(attempt) * 0.618).fract() * 0.5 + f64::from(attempt) * 0.02;
        std::thread::sleep(whole.mul_f64(share).max(Duration::from_millis(20)));
        child.kill().unwrap();
        if child.wait().unwrap().success() {
            break;
        }
        killed += 1;
        assert!(killed < 60, "the run makes no progress between kills");
    }
    assert!(killed > 0);
    let resumed = case.results("run");
    assert_eq!(undisturbed.0, resumed.0);
    assert!(undisturbed.1 == resumed.1, "exported weights differ");
    assert_eq!(undisturbed.2, resumed.2);
    assert!(case.checkpoints("run").len() <= 2);
}

#[test]
fn an_observer_stops_a_run_that_then_goes_on() {
    let case = Case::new();
    assert!(matches!(case.run("undisturbed").unwrap(), TrainOutcome::Finished(_)));
    let mut stop = |event: TrainEvent<'_>| match event {
        TrainEvent::Step { metrics, .. } if metrics.step == 4 => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let run = case.dir.path().join("run");
    let outcome = train(&case.recipe(), random_models_dir(), &run, &cpu(), &mut stop).unwrap();
    let TrainOutcome::Stopped(state) = outcome else { panic!("{outcome:?}") };
    assert_eq!((state.stage, state.stage_steps, state.steps, state.cursor), (1, 1, 4, 4));
    case.run("run").unwrap();
    assert_eq!(case.results("undisturbed"), case.results("run"));
}

#[test]
fn frozen_parameters_stay_and_others_move() {
    // Only the first stage, in which the encoder is frozen.
    let mut case = Case::new();
    case.recipe["stages"].as_array_mut().unwrap().truncate(1);
    case.run("run").unwrap();
    let read = |path: &Path, name: &str| {
        let data = nexus_core::checkpoint::Checkpoint::open(path).unwrap().data(name).unwrap();
        data.try_to_vec_as::<f32>().unwrap()
    };
    let before = random_models_dir().join("FLUX/FLUX.1-dev/ae.safetensors");
    let after = case.dir.path().join("run/export/ae.safetensors");
    assert_eq!(read(&before, "encoder.conv_in.weight"), read(&after, "encoder.conv_in.weight"));
    assert_ne!(read(&before, "decoder.conv_out.weight"), read(&after, "decoder.conv_out.weight"));
}

#[test]
#[cfg(unix)]
fn a_full_disk_is_an_error_and_the_run_goes_on_later() {
    let case = Case::new();
    case.recipe();
    // 512-byte blocks: metrics and recipe fit, a checkpoint does not.
    let status = child_command(&case, Some(64)).status().unwrap();
    assert_eq!(status.code(), Some(3));
    let error = case.read("error.txt");
    assert!(error.contains("checkpoints"), "{error}");
    assert!(case.checkpoints("run").is_empty(), "{:?}", case.checkpoints("run"));
    assert!(child_command(&case, None).status().unwrap().success());
    case.run("undisturbed").unwrap();
    assert_eq!(case.results("run"), case.results("undisturbed"));
}

#[test]
fn a_directory_in_use_is_refused() {
    let case = Case::new();
    let recipe = case.recipe();
    let (held, latest) = RunDir::open(&case.dir.path().join("run"), &recipe).unwrap();
    assert!(latest.is_none());
    let error = case.run("run").unwrap_err();
    assert!(matches!(&error, TrainError::Busy { path } if path.ends_with("run")), "{error}");
    drop(held);
    case.run("run").unwrap();
}

#[test]
fn another_recipe_is_refused_and_names_what_differs() {
    let case = Case::new();
    case.run("run").unwrap();
    let case = case.set("/stages/0/learning_rate", json!(2e-3)).set("/command", json!("another note"));
    let error = case.run("run").unwrap_err();
    assert!(matches!(error, TrainError::OtherRecipe { field: "stages", .. }), "{error}");
}

#[test]
fn a_path_may_be_typed_in_another_way() {
    let case = Case::new();
    case.run("run").unwrap();
    fs::create_dir(case.dir.path().join("sub")).unwrap();
    let recipe = Recipe::read(case.dir.path().join("sub/../recipe.json")).unwrap();
    let outcome = train(&recipe, random_models_dir(), case.dir.path().join("run"), &cpu(), &mut unobserved);
    assert!(matches!(outcome.unwrap(), TrainOutcome::Finished(_)));
}

#[test]
fn a_checkpoint_of_another_seed_is_refused() {
    let case = Case::new();
    case.run("run").unwrap();
    let state = fs::read_to_string(case.checkpoints("run").last().unwrap().join("state.json")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&state).unwrap()["seed"], json!(3));
    fs::remove_file(case.dir.path().join("run/recipe.json")).unwrap();
    let error = case.set("/seed", json!(4)).run("run").unwrap_err();
    assert!(matches!(error, TrainError::OtherRecipe { field: "seed", .. }), "{error}");
}

#[test]
fn a_checkpoint_of_another_architecture_is_refused_by_name_and_shape() {
    let mut case = Case::new();
    case.recipe["initial"] = json!({"random": {"seed": 1}});
    case.run("run").unwrap();
    let config = "FLUX/FLUX.1-dev/ae_config.json";
    let models = case.dir.path().join("models");
    for path in ["Nexus-GenV2/config.json", config] {
        fs::create_dir_all(models.join(path).parent().unwrap()).unwrap();
        fs::copy(random_models_dir().join(path), models.join(path)).unwrap();
    }
    let mut wider: Value = serde_json::from_str(&fs::read_to_string(models.join(config)).unwrap()).unwrap();
    wider["ch"] = json!(16);
    fs::write(models.join(config), wider.to_string()).unwrap();
    let run = case.dir.path().join("run");
    let error = train(&case.recipe(), models, run, &cpu(), &mut unobserved).unwrap_err().to_string();
    for part in ["step-00000006", "module.safetensors", "encoder.conv_in.weight", "[16, 3, 3, 3]", "[8, 3, 3, 3]"] {
        assert!(error.contains(part), "no {part} in {error}");
    }
}

#[test]
fn a_loss_that_is_no_number_stops_with_step_and_parameter() {
    let case = Case::new().set("/stages/0/learning_rate", json!(1e30)).set("/stages/0/warmup_steps", json!(0));
    let error = case.run("run").unwrap_err();
    let TrainError::NotFinite { step, parameter } = &error else { panic!("{error}") };
    assert!(*step >= 2 && parameter.contains("coder"), "{error}");
}

#[test]
fn weights_that_are_no_numbers_never_reach_a_checkpoint() {
    // More than f32 holds, so that the first step of the second stage spoils weights that its loss does not show.
    let case = Case::new().set("/stages/1/learning_rate", json!(1e39)).set("/stages/1/warmup_steps", json!(0));
    let error = case.run("run").unwrap_err();
    let TrainError::NotFinite { step: 4, parameter } = &error else { panic!("{error}") };
    assert!(parameter.contains("coder."), "{error}");
    let kept = case.checkpoints("run").pop().unwrap();
    assert!(kept.ends_with("step-00000003"), "{kept:?}");
    let module = Checkpoint::open(kept.join("module.safetensors")).unwrap();
    for entry in module.entries() {
        let values = module.data(&entry.name).unwrap().try_to_vec_as::<f32>().unwrap();
        assert!(values.iter().all(|value| value.is_finite()), "{}", entry.name);
    }
    // With a rate that fits, the run goes on from there.
    fs::remove_file(case.dir.path().join("run/recipe.json")).unwrap();
    let case = case.set("/stages/1/learning_rate", json!(1e-3));
    let mut resumed = None;
    let mut observer = |event: TrainEvent<'_>| {
        if let TrainEvent::Resumed { steps, .. } = event {
            resumed = Some(steps);
        }
        ControlFlow::Continue(())
    };
    train(&case.recipe(), random_models_dir(), case.dir.path().join("run"), &cpu(), &mut observer).unwrap();
    assert_eq!(resumed, Some(3));
    assert_eq!(case.metrics("run").len(), 6);
}

#[test]
fn an_export_that_was_cut_off_is_written_again() {
    let case = Case::new();
    case.run("run").unwrap();
    let whole = case.results("run");
    fs::remove_dir_all(case.dir.path().join("run/export")).unwrap();
    case.run("run").unwrap();
    assert_eq!(case.results("run"), whole);
}

#[test]
fn latents_are_measured_unless_the_encoder_stays() {
    let config = |dir: &Path| AutoencoderConfig::read_beside(dir).unwrap();
    let flux = random_models_dir().join("FLUX/FLUX.1-dev");
    let frozen = json!(["encoder.*"]);
    let case = Case::new().set("/stages/0/frozen", frozen.clone());
    let case = case.set("/stages/1", stage("second", json!({"frozen": frozen})));
    case.run("run").unwrap();
    assert_eq!(config(&case.dir.path().join("run/export")), config(&flux));

    let case = Case::new();
    case.run("run").unwrap();
    let export = case.dir.path().join("run/export");
    let measured = config(&export);
    assert_ne!(measured, config(&flux));
    let options = LoadOptions { dtype: LoadDType::Convert(FloatDType::F32), ..LoadOptions::default() };
    let weights = Checkpoint::open(export.join("ae.safetensors")).unwrap();
    let autoencoder = Autoencoder::load(&weights, &measured, &cpu(), &options).unwrap();
    let data = MessagesFile::open(case.dir.path().join("data.jsonl")).unwrap();
    let latents = (0..5).flat_map(|index| {
        let image = data.get(index).unwrap()[0].images().next().unwrap().clone();
        let pixels = TensorData::new(decoder_image(&image, 32, 32).unwrap(), [1, 3, 32, 32]);
        autoencoder.encode(Tensor::from_data(pixels, &cpu()), None).into_data().try_to_vec_as::<f32>().unwrap()
    });
    let latents: Vec<f32> = latents.collect();
    let mean = latents.iter().sum::<f32>() / latents.len() as f32;
    let variance = latents.iter().map(|value| (value - mean).powi(2)).sum::<f32>() / latents.len() as f32;
    // The run saw some of the five pictures once more than others.
    assert!(mean.abs() < 0.05 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
}

#[test]
fn bad_samples_are_set_aside_until_the_limit() {
    let case = Case::new().set("/max_rejected", json!(1));
    case.spoil(0..1);
    case.run("run").unwrap();
    let rejected = case.read("run/rejected.jsonl");
    // Its line comes in every round over the five, and counts once.
    assert!(rejected.lines().count() == 1 && rejected.contains("no.png"), "{rejected}");
    let case = case.set("/max_rejected", json!(0));
    let error = case.run("strict").unwrap_err().to_string();
    assert!(error.contains("rejected.jsonl"), "{error}");
}

#[test]
fn steps_without_a_usable_sample_are_passed_over() {
    let one = |name| stage(name, json!({"batch_size": 1, "steps": 4}));
    let case = Case::new().set("/max_rejected", json!(3));
    let case = case.set("/stages/0", one("first")).set("/stages/1", one("second"));
    case.spoil(1..4);
    case.run("undisturbed").unwrap();
    assert_eq!(case.metrics("undisturbed").len(), 8);
    let rejected = case.read("undisturbed/rejected.jsonl");
    assert_eq!(rejected.lines().count(), 3, "{rejected}");
    let run = case.dir.path().join("run");
    for last in [2, 3, 5] {
        let mut stop = |event: TrainEvent<'_>| match event {
            TrainEvent::Step { metrics, .. } if metrics.step == last => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        };
        train(&case.recipe(), random_models_dir(), &run, &cpu(), &mut stop).unwrap();
    }
    case.run("run").unwrap();
    assert_eq!(case.results("run"), case.results("undisturbed"));
    assert_eq!(case.read("run/rejected.jsonl"), rejected);
}

#[test]
fn data_of_which_nothing_is_usable_end_with_an_error() {
    for more in [json!({}), json!({"distinct_samples": 3}), json!({"accumulation": 2})] {
        let case = Case::new().set("/max_rejected", json!(1_000_000)).set("/stages/0", stage("first", more));
        case.spoil(0..5);
        let error = case.run("run").unwrap_err();
        let TrainError::NoSamples { stage, rejected } = &error else { panic!("{error}") };
        assert!(stage == "first" && rejected.ends_with("run/rejected.jsonl"), "{error}");
        assert!((2..=5).contains(&case.read("run/rejected.jsonl").lines().count()));
    }
}

/// A recipe of one step that moves each weight by its gradient: far above any gradient, `eps` makes AdamW plain descent.
fn descent(more: Value) -> Case {
    let mut settings = json!({
        "steps": 1, "warmup_steps": 0, "learning_rate": 1e4, "optimizer": {"eps": 1e4, "weight_decay": 0.0},
    });
    settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let mut case = Case::new();
    case.recipe["stages"] = json!([stage("only", settings)]);
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
    case.recipe["stages"] = json!([stage("only", settings)]);
    case.run("run").unwrap();
    let rates: Vec<f64> = case.metrics("run").iter().map(|line| line["learning_rate"].as_f64().unwrap()).collect();
    let fallen = |share: f64| 1e-3 * (0.5 + 0.25 * (1.0 + (std::f64::consts::PI * share).cos()));
    let expected = [0.5e-3, 1e-3, fallen(0.0), fallen(0.25), fallen(0.5), fallen(0.75)];
    assert!(rates.iter().zip(expected).all(|(rate, expected)| (rate - expected).abs() < 1e-12), "{rates:?}");
}

#[test]
fn curves_and_sheets_show_the_run() {
    let mut case = Case::new();
    case.recipe["sample_every"] = json!(2);
    case.run("run").unwrap();
    let curves = case.read("run/curves.svg");
    assert!(curves.contains("<svg") && curves.matches("<polyline").count() >= 4, "{curves}");
    for name in ["loss", "reconstruction", "gradient", "kl"] {
        assert!(curves.lines().any(|line| line.trim() == name), "no {name} in {curves}");
    }
    assert!(!curves.contains("grad_norm") && !curves.contains("learning_rate"));
    for step in [2, 4, 6] {
        let sheet = Image::open(case.dir.path().join(format!("run/samples/step-{step:08}.png"))).unwrap();
        // Two pictures of 32x32 pixels and what is made of them, 4 pixels apart.
        assert_eq!((sheet.width_px(), sheet.height_px()), (76, 76));
        let darkest = |top: usize| (0..32).flat_map(|y| &sheet.rgb()[3 * 76 * (top + y)..][12..12 + 96]).min().unwrap();
        assert!(*darkest(4) < 64 && *darkest(40) < 255, "{} {}", darkest(4), darkest(40));
    }
    assert!(!case.dir.path().join("run/samples/step-00000003.png").exists());
}

#[test]
fn the_recipes_of_the_repository_are_read_and_say_their_own_command() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
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
