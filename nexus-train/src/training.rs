//! What a part of the model needs to be trained: samples -> a micro-batch -> losses, and weights -> files.

use std::{ops::Range, path::Path};

use burn::{
    module::Module,
    tensor::{FloatDType, Tensor},
};
use nexus_checkpoint::{LoadDType, LoadOptions, WeightNames};
use nexus_core::nn::Recomputation;
use nexus_data::Image;

use crate::{Phase, TrainError, feed::Feed, recipe::Settings, workers::Workers};

/// How weights are loaded: in f32, which is what the optimizer steps, and checked.
pub(crate) const MASTER_WEIGHTS: LoadOptions =
    LoadOptions { dtype: LoadDType::Convert(FloatDType::F32), check_finite: true, quantization: None };

/// A part of the model in training: a module, its names, and how a batch becomes a loss.
pub(crate) trait PartTraining: Sync {
    /// Everything that has trained or frozen parameters.
    type Module: Module;

    /// A micro-batch, ready for the module.
    type Batch: Send;

    /// What a phase says beside data and optimizer.
    type Settings: Settings;

    /// Names of the module's parameters in checkpoints and patterns.
    fn names(&self) -> WeightNames;

    /// The module as the recipe begins it, on the autodiff device.
    fn module(&self) -> Result<Self::Module, TrainError>;

    /// Some samples of a phase, ready for the module; `None` if none of them can be used.
    fn prepare(&mut self, micro_batch: MicroBatch<'_, Self::Settings>) -> Result<Option<Self::Batch>, TrainError>;

    /// The losses of a micro-batch; `blocks` gives their gradients.
    fn loss<'a>(
        &self,
        module: &'a Self::Module,
        phase: &Phase<Self::Settings>,
        batch: Self::Batch,
        blocks: &mut Recomputation<'a>,
    ) -> Result<Losses, TrainError>;

    /// Writes the module under the released file names; what it must know of the data depends on `seen` alone, the
    /// samples of the last phase.
    fn export(&self, module: Self::Module, dir: &Path, seen: MicroBatch<'_, Self::Settings>) -> Result<(), TrainError>;

    /// A sheet of pictures that shows what the module can do, if it draws.
    fn samples(&mut self, module: &Self::Module, phase: &Phase<Self::Settings>) -> Result<Option<Image>, TrainError>;
}

/// Which samples to compute with.
pub(crate) struct MicroBatch<'a, S> {
    pub(crate) phase: &'a Phase<S>,
    pub(crate) feed: &'a mut Feed,
    pub(crate) workers: &'a Workers,
    /// Seed of everything random, which together with the number of a sample names its draws.
    pub(crate) seed: u64,
    /// Numbers of the samples in the phase.
    pub(crate) samples: Range<u64>,
}

/// A loss and what it is made of.
pub(crate) struct Losses {
    pub(crate) total: Tensor<1>,
    pub(crate) parts: Vec<(&'static str, Tensor<1>)>,
}

impl Losses {
    /// Adds a part with its weight, if there is something that it could be computed from.
    pub(crate) fn add(&mut self, name: &'static str, weight: f64, part: Option<Tensor<1>>) {
        if let Some(part) = part {
            self.total = self.total.clone() + part.clone() * weight;
            self.parts.push((name, part));
        }
    }
}
