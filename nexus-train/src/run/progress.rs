//! What a phase keeps besides the module: optimizer and averaged weights, as files of a checkpoint and back.

use std::path::Path;

use burn::{module::Module, tensor::Device};
use nexus_checkpoint::{Checkpoint, WeightNames, module_layout, save_module, write_safetensors};

use crate::{
    Phase, RunState, TrainError,
    optim::{Optimizer, WeightAverage},
};

/// File of a checkpoint with all parameters of the module.
pub(super) const MODULE: &str = "module.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const AVERAGE: &str = "average.safetensors";

/// Optimizer and averaged weights of a phase.
pub(super) struct PhaseProgress {
    pub(super) optimizer: Optimizer,
    pub(super) average: Option<WeightAverage>,
}

impl PhaseProgress {
    /// The progress of a phase that begins, or that a checkpoint was taken in.
    pub(super) fn begin<S>(
        module: &impl Module,
        names: &WeightNames,
        phase: &Phase<S>,
        state: &RunState,
        saved: Option<&Path>,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let Some(saved) = saved.filter(|_| state.phase_steps > 0) else {
            let average = phase.ema_decay.map(WeightAverage::new);
            return Ok(Self { optimizer: Optimizer::new(phase.optimizer).with_muon(phase.muon.clone()), average });
        };
        let layout = module_layout(module, names).into_iter().filter(|(name, _)| !phase.freezes(name));
        let sizes: Vec<(String, usize)> = layout.map(|(name, shape)| (name, shape.iter().product())).collect();
        let file = Checkpoint::open(saved.join(OPTIMIZER))?;
        let optimizer = Optimizer::restore(phase.optimizer, phase.muon.clone(), &file, &sizes, device)?;
        let average = match phase.ema_decay {
            Some(decay) => {
                let file = Checkpoint::open(saved.join(AVERAGE))?;
                Some(WeightAverage::restore(decay, state.average_steps, &file, &sizes, device)?)
            }
            None => None,
        };
        Ok(Self { optimizer, average })
    }

    /// The module with averaged weights, if the phase averages them.
    pub(super) fn averaged<M: Module>(&self, module: &M, names: &WeightNames) -> M {
        match &self.average {
            Some(average) => average.apply(module.clone(), names),
            None => module.clone(),
        }
    }

    pub(super) fn save(&self, module: &impl Module, names: &WeightNames, dir: &Path) -> Result<(), TrainError> {
        save_module(module, names, &dir.join(MODULE), None)?;
        write_safetensors(&dir.join(OPTIMIZER), self.optimizer.state()?, None)?;
        if let Some(average) = &self.average {
            write_safetensors(&dir.join(AVERAGE), average.state()?.0, None)?;
        }
        Ok(())
    }
}
