//! The stages of the model: which are in memory, and who uses them.

use std::{
    ops::Deref,
    sync::{Arc, Mutex, MutexGuard},
};

use burn::{
    module::Module,
    tensor::{Device, FloatDType, Tensor},
};
use nexus_ar::ArModel;
use nexus_checkpoint::LoadOptions;
use nexus_core::{check_arrived, failure_reason};
use nexus_diffusion::{Autoencoder, Branch, EditingDecoder, GenerationDecoder};
use nexus_vision_encoder::VisionEncoder;
use serde::{Deserialize, Serialize};

use crate::{
    Error, ModelFiles, Observer, Progress, Stage,
    device::is_cpu,
    progress::emit,
    slot::{Slot, lock},
};

/// Which stages stay in memory between requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Residency {
    /// Every stage stays once it has been used; the text encoders never do.
    #[default]
    KeepAll,
    /// A stage is freed before the next one is loaded.
    OneStageAtATime,
}

/// Files, settings, and the stages that are in memory.
pub(crate) struct Stages {
    pub(crate) files: ModelFiles,
    pub(crate) compute_dtype: FloatDType,
    pub(crate) device: Device,
    options: LoadOptions,
    residency: Residency,
    vision_encoder: Slot<VisionEncoder>,
    ar: Slot<ArModel>,
    generation_decoder: Slot<GenerationDecoder>,
    editing_decoder: Slot<EditingDecoder>,
    autoencoder: Slot<Autoencoder>,
    pub(crate) empty_prompt: Mutex<Option<Tensor<2>>>,
    pub(crate) negative_prompt: Mutex<Option<(String, Branch)>>,
    /// Held by who uses a stage, with [`Residency::OneStageAtATime`]: the other requests wait for their turn.
    turn: Mutex<()>,
}

/// A stage in use.
pub(crate) struct Lease<'a, T> {
    stage: Arc<T>,
    _turn: Option<MutexGuard<'a, ()>>,
}

impl<T> Lease<'_, T> {
    /// The stage beyond its turn.
    pub(crate) fn into_inner(self) -> Arc<T> {
        self.stage
    }
}

impl<T> Deref for Lease<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.stage
    }
}

impl Stages {
    /// Stages of which none is in memory.
    pub(crate) fn new(
        files: ModelFiles,
        device: &Device,
        options: LoadOptions,
        compute_dtype: FloatDType,
        residency: Residency,
    ) -> Self {
        Self {
            files,
            compute_dtype,
            device: device.clone(),
            options,
            residency,
            vision_encoder: Slot::empty(),
            ar: Slot::empty(),
            generation_decoder: Slot::empty(),
            editing_decoder: Slot::empty(),
            autoencoder: Slot::empty(),
            empty_prompt: Mutex::new(None),
            negative_prompt: Mutex::new(None),
            turn: Mutex::new(()),
        }
    }

    /// How the small stages are loaded: all but the language model and the decoders.
    pub(crate) fn unquantized(&self) -> LoadOptions {
        LoadOptions { quantization: None, ..self.options }
    }

    /// Frees everything on the device: every stage, and the prompts that were kept.
    pub(crate) fn unload(&self) {
        *lock(&self.empty_prompt) = None;
        *lock(&self.negative_prompt) = None;
        self.free_stages();
    }

    fn free_stages(&self) {
        self.vision_encoder.free();
        self.ar.free();
        self.generation_decoder.free();
        self.editing_decoder.free();
        self.autoencoder.free();
        self.device.memory_cleanup();
    }

    /// The stages that are in memory, with the bytes of their weights.
    pub(crate) fn loaded(&self) -> Vec<(Stage, usize)> {
        let all = [
            (Stage::VisionEncoder, self.vision_encoder.num_bytes()),
            (Stage::Ar, self.ar.num_bytes()),
            (Stage::GenerationDecoder, self.generation_decoder.num_bytes()),
            (Stage::EditingDecoder, self.editing_decoder.num_bytes()),
            (Stage::Autoencoder, self.autoencoder.num_bytes()),
        ];
        all.into_iter().filter(|(_, bytes)| *bytes > 0).collect()
    }

    /// Waits until no other request uses a stage, if only one may be in memory.
    pub(crate) fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        (self.residency == Residency::OneStageAtATime).then(|| lock(&self.turn))
    }

    /// Says what is loaded next, and makes room for it.
    pub(crate) fn announce(&self, stage: Stage, observer: &mut dyn Observer) -> Result<(), Error> {
        if self.residency == Residency::OneStageAtATime {
            self.free_stages();
        }
        emit(observer, Progress::Loading(stage))
    }

    /// A stage for the time of its use, loaded if it is not in memory.
    fn lease<'a, T: Module>(
        &'a self,
        stage: Stage,
        slot: &Slot<T>,
        observer: &mut dyn Observer,
        load: impl FnOnce() -> Result<T, Error>,
    ) -> Result<Lease<'a, T>, Error> {
        let turn = self.turn();
        let loaded = match slot.get() {
            Some(loaded) => loaded,
            None => {
                self.announce(stage, observer)?;
                slot.get_or_load(|| self.arrived(load()?))?
            }
        };
        Ok(Lease { stage: loaded, _turn: turn })
    }

    /// A module that was loaded, once all of its weights are on the device. On a CPU they are in the mapped file.
    pub(crate) fn arrived<M: Module>(&self, module: M) -> Result<M, Error> {
        if !is_cpu(&self.device) {
            let of_device = |error| Error::of_device(failure_reason(&error, &self.device), &self.device);
            check_arrived(&module).map_err(of_device)?;
        }
        Ok(module)
    }

    pub(crate) fn vision_encoder(&self, observer: &mut dyn Observer) -> Result<Lease<'_, VisionEncoder>, Error> {
        self.lease(Stage::VisionEncoder, &self.vision_encoder, observer, || {
            self.files.load_vision_encoder(&self.device, &self.unquantized())
        })
    }

    pub(crate) fn ar(&self, observer: &mut dyn Observer) -> Result<Lease<'_, ArModel>, Error> {
        self.lease(Stage::Ar, &self.ar, observer, || self.files.load_ar(&self.device, &self.options))
    }

    pub(crate) fn generation_decoder(
        &self,
        observer: &mut dyn Observer,
    ) -> Result<Lease<'_, GenerationDecoder>, Error> {
        self.files.generation_decoder()?;
        self.lease(Stage::GenerationDecoder, &self.generation_decoder, observer, || {
            self.files.load_generation_decoder(&self.device, &self.options)
        })
    }

    pub(crate) fn editing_decoder(&self, observer: &mut dyn Observer) -> Result<Lease<'_, EditingDecoder>, Error> {
        self.files.edit_decoder()?;
        self.lease(Stage::EditingDecoder, &self.editing_decoder, observer, || {
            self.files.load_editing_decoder(&self.device, &self.options)
        })
    }

    pub(crate) fn autoencoder(&self, observer: &mut dyn Observer) -> Result<Lease<'_, Autoencoder>, Error> {
        self.files.autoencoder()?;
        self.lease(Stage::Autoencoder, &self.autoencoder, observer, || {
            self.files.load_autoencoder(&self.device, &self.unquantized())
        })
    }
}
