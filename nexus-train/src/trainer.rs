//! The way into a run: a recipe and the sources of the program -> the part of the model that it trains, and its run.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::Arc,
};

use burn::tensor::{Device, FloatDType};
use nexus::{DeviceError, Error, diagnose};
use nexus_core::config::ConfigError;
use nexus_data::BoxedSource;
use nexus_diffusion::{EditingDecoder, GenerationDecoder};
use serde_json::Value;

use crate::{
    LabelClasses, PartRecipe, Phase, Recipe, Run, Source, TrainError, TrainObserver, TrainOutcome,
    autoencoder::AutoencoderTraining,
    decoders::DecoderTraining,
    language::{LanguageStart, LanguageTraining},
    optim::TrainStateError,
    recipe::Settings,
    run::{PartRun, drive},
    source::Sources,
    training::PartTraining,
};

/// Runs recipes, with the sources of samples that it was given.
///
/// ```no_run
/// use nexus_train::{Recipe, Source, Trainer, unobserved};
///
/// # fn open_pictures(_: &serde_json::Value) -> Result<Box<dyn Source>, Box<dyn std::error::Error + Send + Sync>> { Err("no pictures here".into()) }
/// // A recipe then says `"source": {"pictures": {..}}`.
/// let trainer = Trainer::new().with_source("pictures", open_pictures);
/// let (recipe, device) = (Recipe::read("autoregressive.json")?, nexus::device("cpu")?);
/// trainer.train(&recipe, "models", "runs/ar", &device, &mut unobserved)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Default)]
pub struct Trainer {
    sources: Sources,
}

impl Trainer {
    /// A trainer that knows the source `messages` alone.
    pub fn new() -> Self {
        Self::default()
    }

    /// Knows one more source: the recipe's settings of this name become a source by `open`.
    pub fn with_source(
        mut self,
        name: impl Into<String>,
        open: impl Fn(&Value) -> Result<Box<dyn Source>, BoxedSource> + Send + Sync + 'static,
    ) -> Self {
        self.sources.add(name.into(), Box::new(open));
        self
    }

    /// Runs a recipe with the model in `model` in the directory `run`, or goes on where the run was left.
    ///
    /// # Errors
    /// [`TrainError`], before anything is read if the device does not have a dtype of the recipe; the checkpoints on disk
    /// stay usable. A device that fails is [`TrainError::OutOfDeviceMemory`], or [`Error::DeviceLost`] if it does not
    /// compute any more.
    pub fn train(
        &self,
        recipe: &Recipe,
        model: impl AsRef<Path>,
        run: impl AsRef<Path>,
        device: &Device,
        observer: &mut TrainObserver<'_>,
    ) -> Result<TrainOutcome, TrainError> {
        on_device(device, || drive(self.resume(recipe, model, run, device)?, recipe, observer))
    }

    /// A run that is driven step by step: begun, or where it was left.
    ///
    /// # Errors
    /// [`TrainError`], before anything is read if the device does not have a dtype of the recipe.
    pub fn resume(
        &self,
        recipe: &Recipe,
        model: impl AsRef<Path>,
        run: impl AsRef<Path>,
        device: &Device,
    ) -> Result<Run, TrainError> {
        let (model, run) = (model.as_ref(), run.as_ref());
        check_dtypes(recipe, |dtype| device.supports_dtype(dtype))?;
        recipe.validate()?;
        match &recipe.train {
            PartRecipe::Autoencoder { initial, phases, .. } => {
                let open = |_| AutoencoderTraining::open(initial, phases, model, device);
                self.begin(recipe, phases, run, device, open)
            }
            PartRecipe::VisionEncoder { initial, phases } => {
                let (seed, draws_samples) = (recipe.seed, false);
                let start = |classes| LanguageStart { seed, initial, draws_samples, phases, classes };
                self.begin(recipe, phases, run, device, |classes| LanguageTraining::open(start(classes), model, device))
            }
            PartRecipe::Autoregressive { initial, sample_every, phases } => {
                let (seed, draws_samples) = (recipe.seed, sample_every.is_some());
                let start = |classes| LanguageStart { seed, initial, draws_samples, phases, classes };
                self.begin(recipe, phases, run, device, |classes| LanguageTraining::open(start(classes), model, device))
            }
            PartRecipe::GenerationDecoder { initial, phases, .. } => {
                let open = |_| DecoderTraining::<GenerationDecoder>::open(initial, phases, model, device);
                self.begin(recipe, phases, run, device, open)
            }
            PartRecipe::EditingDecoder { initial, phases, .. } => {
                let open = |_| DecoderTraining::<EditingDecoder>::open(initial, phases, model, device);
                self.begin(recipe, phases, run, device, open)
            }
        }
    }

    fn begin<T: PartTraining<Settings: Clone> + 'static>(
        &self,
        recipe: &Recipe,
        phases: &[Phase<T::Settings>],
        run: &Path,
        device: &Device,
        open: impl FnOnce(LabelClasses) -> Result<T, TrainError>,
    ) -> Result<Run, TrainError> {
        let sources_of =
            |phase: &Phase<T::Settings>| phase.data.iter().map(|data| self.sources.open(&data.source)).collect();
        let sources: Vec<Vec<Arc<dyn Source>>> = phases.iter().map(sources_of).collect::<Result<_, _>>()?;
        let training = open(label_classes(phases, &sources)?)?;
        Ok(Run::new(PartRun::resume(training, recipe, phases.to_vec(), sources, run, device)?))
    }
}

/// Labels that the sources of some phases know, where a phase asks for what is known.
fn label_classes<S: Settings>(
    phases: &[Phase<S>],
    sources: &[Vec<Arc<dyn Source>>],
) -> Result<LabelClasses, ConfigError> {
    let mut all: Option<LabelClasses> = None;
    for (phase, sources) in phases.iter().zip(sources) {
        let Some(field) = phase.settings.asks_for_supervision() else { continue };
        let known: Vec<LabelClasses> = sources.iter().filter_map(|source| source.knows()).collect();
        if known.is_empty() {
            let reason = format!("no source of the phase `{}` knows what its samples show", phase.name);
            return Err(ConfigError::incoherent(field, reason));
        }
        for classes in known {
            if all.get_or_insert_with(|| classes.clone()) != &classes {
                return Err(ConfigError::incoherent(field, "the sources know different labels".to_string()));
            }
        }
    }
    Ok(all.unwrap_or_default())
}

/// Runs what keeps nothing on the device when it ends, and finds out how it failed.
fn on_device<T>(device: &Device, run: impl FnOnce() -> Result<T, TrainError>) -> Result<T, TrainError> {
    let result = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Err(TrainError::Model(error))) => Ok(Err(error)),
        Ok(Err(TrainError::State(TrainStateError::Read { parameter, reason }))) => {
            Ok(Err(Error::of_device(format!("`{parameter}`: {reason}"), device)))
        }
        Ok(result) => return result,
        Err(panic) => Err(panic),
    };
    diagnose(device, || (), result).map_err(|error| match error {
        Error::OutOfDeviceMemory { needed, available, reason } => {
            TrainError::OutOfDeviceMemory { needed, available, reason }
        }
        error => error.into(),
    })
}

/// Weights are kept in f32, which every device has; phases may compute in another dtype.
fn check_dtypes(recipe: &Recipe, supports: impl Fn(FloatDType) -> bool) -> Result<(), TrainError> {
    match recipe.train.compute_dtypes().into_iter().find(|&dtype| !supports(dtype)) {
        Some(dtype) => Err(Error::from(DeviceError::UnsupportedDType { dtype }).into()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_in_a_dtype_that_the_device_does_not_have_is_refused() {
        let recipe = |dtypes: &[&str]| {
            let phase = |dtype: &&str| {
                serde_json::json!({
                    "name": "only", "steps": 1, "batch_size": 1, "learning_rate": 1e-3, "compute_dtype": dtype,
                    "data": [{"source": {"messages": {"path": "data.jsonl"}}, "weight": 1.0}],
                })
            };
            let phases: Vec<_> = dtypes.iter().map(phase).collect();
            serde_json::from_value::<Recipe>(serde_json::json!({
                "command": "", "time": "", "expected": "", "seed": 5,
                "train": {"part": "autoencoder", "phases": phases},
            }))
            .unwrap()
        };
        let only_f32 = |dtype| dtype == FloatDType::F32;
        assert!(check_dtypes(&recipe(&["f32", "f32"]), only_f32).is_ok());
        assert!(check_dtypes(&recipe(&["f32", "bf16"]), |_| true).is_ok());
        let error = check_dtypes(&recipe(&["f32", "bf16"]), only_f32).unwrap_err();
        let expected = DeviceError::UnsupportedDType { dtype: FloatDType::BF16 };
        assert!(matches!(&error, TrainError::Model(Error::Device(found)) if *found == expected), "{error}");
    }
}
