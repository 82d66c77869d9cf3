//! Training runs: killed and resumed, on full disks, and with bad samples.

use std::{
    fs,
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use burn::tensor::{FloatDType, Tensor, TensorData};
use nexus::{
    checkpoint::{Checkpoint, LoadDType, LoadOptions},
    data::{MessagesFile, decoder_image},
    diffusion::{Autoencoder, config::AutoencoderConfig},
};
use nexus_core::testing::{cpu, random_models_dir};
use nexus_train::{Recipe, RunDir, TrainError, TrainEvent, TrainOutcome, train, unobserved};
use serde_json::{Value, json};

use crate::case::{Case, phase};

/// Set in the process that is killed: the directory of recipe and run.
const CHILD: &str = "NEXUS_TEST_TRAIN";

#[test]
#[ignore = "the process that other tests start and kill"]
fn child() {
    let dir = std::env::var_os(CHILD).expect("another test starts this one, with a directory");
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
    command.arg("-c").arg(format!("{limit} exec '{}' --exact runs::child --ignored --test-threads 1", exe.display()));
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
    assert_eq!((state.phase, state.phase_steps, state.steps, state.cursor), (1, 1, 4, 4));
    case.run("run").unwrap();
    assert_eq!(case.results("undisturbed"), case.results("run"));
}

#[test]
fn frozen_parameters_stay_and_others_move() {
    // Only the first phase, in which the encoder is frozen.
    let mut case = Case::new();
    case.recipe["train"]["phases"].as_array_mut().unwrap().truncate(1);
    case.run("run").unwrap();
    let read = |path: &Path, name: &str| {
        let data = nexus_checkpoint::Checkpoint::open(path).unwrap().data(name).unwrap();
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
    let case = case.set("/train/phases/0/learning_rate", json!(2e-3)).set("/command", json!("another note"));
    let error = case.run("run").unwrap_err();
    assert!(matches!(error, TrainError::OtherRecipe { field: "phases", .. }), "{error}");
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
    case.recipe["train"]["initial"] = json!({"random": {"seed": 1}});
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
fn a_device_without_memory_ends_a_run_that_then_goes_on() {
    let case = Case::new();
    case.run("undisturbed").unwrap();
    let run = case.dir.path().join("run");
    let begin = |says: &'static str| {
        let mut observer = |event: TrainEvent<'_>| match event {
            TrainEvent::Step { metrics, .. } if metrics.step == 5 => panic!("{says}"),
            _ => ControlFlow::Continue(()),
        };
        catch_unwind(AssertUnwindSafe(|| train(&case.recipe(), random_models_dir(), &run, &cpu(), &mut observer)))
    };
    let error = begin("An error\nCaused by:\n  out of device memory allocating 123456789 bytes").unwrap().unwrap_err();
    assert!(matches!(error, TrainError::OutOfDeviceMemory { needed: Some(123_456_789), .. }), "{error}");
    for part in ["118 MiB asked for", "`batch_size`", "`recompute`", "checkpoint is intact"] {
        assert!(error.to_string().contains(part), "{error} without {part}");
    }
    let panic = begin("the observer is wrong").unwrap_err();
    assert_eq!(panic.downcast_ref::<String>().unwrap(), "the observer is wrong");
    case.run("run").unwrap();
    assert_eq!(case.results("undisturbed"), case.results("run"));
}

#[test]
fn a_loss_that_is_no_number_stops_with_step_and_parameter() {
    let case =
        Case::new().set("/train/phases/0/learning_rate", json!(1e30)).set("/train/phases/0/warmup_steps", json!(0));
    let error = case.run("run").unwrap_err();
    let TrainError::NotFinite { step, parameter } = &error else { panic!("{error}") };
    assert!(*step >= 2 && parameter.contains("coder"), "{error}");
}

#[test]
fn weights_that_are_no_numbers_never_reach_a_checkpoint() {
    // More than f32 holds, so that the first step of the second phase spoils weights that its loss does not show.
    let case =
        Case::new().set("/train/phases/1/learning_rate", json!(1e39)).set("/train/phases/1/warmup_steps", json!(0));
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
    let case = case.set("/train/phases/1/learning_rate", json!(1e-3));
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
    let config = |dir: &Path| AutoencoderConfig::read_in(dir).unwrap();
    let flux = random_models_dir().join("FLUX/FLUX.1-dev");
    let frozen = json!(["encoder.*"]);
    let case = Case::new().set("/train/phases/0/frozen", frozen.clone());
    let case = case.set("/train/phases/1", phase("second", json!({"frozen": frozen})));
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
    let one = |name| phase(name, json!({"batch_size": 1, "steps": 4}));
    let case = Case::new().set("/max_rejected", json!(3));
    let case = case.set("/train/phases/0", one("first")).set("/train/phases/1", one("second"));
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
        let case = Case::new().set("/max_rejected", json!(1_000_000)).set("/train/phases/0", phase("first", more));
        case.spoil(0..5);
        let error = case.run("run").unwrap_err();
        let TrainError::NoSamples { phase, rejected } = &error else { panic!("{error}") };
        assert!(phase == "first" && rejected.ends_with("run/rejected.jsonl"), "{error}");
        assert!((2..=5).contains(&case.read("run/rejected.jsonl").lines().count()));
    }
}
