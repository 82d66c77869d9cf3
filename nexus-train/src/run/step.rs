//! One step: samples of a phase -> gradients and losses of its micro-batches, one after the other or side by side.

use burn::{module::Module, tensor::Tensor};
use nexus::read;
use nexus_core::nn::Recomputation;

use super::StepMetrics;
use crate::{
    Phase, TrainError,
    optim::GradientSum,
    recipe::Settings,
    training::{Losses, MicroBatch, PartTraining},
    workers::Workers,
};

/// Gradients and losses of all samples of a step, summed over its micro-batches; of none if no sample can be used.
pub(super) fn backward_step<T: PartTraining>(
    training: &mut T,
    module: &T::Module,
    MicroBatch { phase, feed, workers, seed, samples }: MicroBatch<'_, T::Settings>,
) -> Result<(GradientSum, LossSums), TrainError> {
    let (mut gradients, mut sums) = (GradientSum::new(), LossSums::default());
    let firsts: Vec<u64> = samples.step_by(phase.batch_size).collect();
    for side_by_side in firsts.chunks(workers.count()) {
        let mut batches = Vec::new();
        for &first in side_by_side {
            let samples = first..first + phase.batch_size as u64;
            batches.extend(training.prepare(MicroBatch { phase, feed: &mut *feed, workers, seed, samples })?);
        }
        for micro_batch in backward_all(training, module, phase, batches, workers) {
            let (values, parts) = micro_batch?;
            sums.add(values);
            gradients.merge(parts);
        }
    }
    Ok((gradients, sums))
}

/// Values and gradients of the losses of some micro-batches, in order.
fn backward_all<T: PartTraining>(
    training: &T,
    module: &T::Module,
    phase: &Phase<T::Settings>,
    batches: Vec<T::Batch>,
    workers: &Workers,
) -> Vec<Result<(LossValues, GradientSum), TrainError>> {
    // Gradients of one graph wait for each other, so each micro-batch has parameters of its own.
    let forks = batches.into_iter().enumerate().map(|(index, batch)| {
        let module = module.clone();
        let device = module.devices().into_iter().next().filter(|_| index > 0);
        (
            match device {
                Some(device) => module.fork(&device),
                None => module,
            },
            batch,
        )
    });
    workers.map(forks.collect(), |(module, batch)| {
        let mut blocks = if phase.settings.recompute() { Recomputation::of_blocks() } else { Recomputation::none() };
        let losses = training.loss(&module, phase, batch, &mut blocks)?;
        let (values, mut gradients) = (LossValues::read(&losses)?, GradientSum::new());
        // Samples may not reach what is trained, such as text alone with a vision head.
        if losses.total.is_tracked() {
            blocks.backward(&losses.total, |part| gradients.add(part, &module, &training.names()));
        }
        Ok((values, gradients))
    })
}

/// A loss and its parts as numbers.
struct LossValues {
    total: f64,
    parts: Vec<(&'static str, f64)>,
}

impl LossValues {
    fn read(losses: &Losses) -> Result<Self, TrainError> {
        let value =
            |loss: &Tensor<1>| Ok::<f64, TrainError>(read(loss.clone())?.first().copied().unwrap_or(f32::NAN).into());
        let parts = losses.parts.iter().map(|(name, part)| Ok((*name, value(part)?)));
        Ok(Self { total: value(&losses.total)?, parts: parts.collect::<Result<_, TrainError>>()? })
    }
}

/// Losses of the micro-batches of a step.
#[derive(Default)]
pub(super) struct LossSums {
    pub(super) count: usize,
    pub(super) total: f64,
    parts: Vec<(&'static str, f64)>,
}

impl LossSums {
    fn add(&mut self, losses: LossValues) {
        self.count += 1;
        self.total += losses.total;
        for (name, value) in losses.parts {
            match self.parts.iter_mut().find(|(known, _)| *known == name) {
                Some((_, sum)) => *sum += value,
                None => self.parts.push((name, value)),
            }
        }
    }

    pub(super) fn metrics(&self, step: usize, phase: &str, learning_rate: f64, grad_norm: f64) -> StepMetrics {
        let mean = |sum: f64| sum / self.count as f64;
        let parts = self.parts.iter().map(|(name, sum)| (name.to_string(), mean(*sum))).collect();
        StepMetrics { step, phase: phase.to_string(), loss: mean(self.total), parts, learning_rate, grad_norm }
    }
}
