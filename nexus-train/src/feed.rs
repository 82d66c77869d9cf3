//! Samples of a phase: the number of a sample -> a conversation, or a reason why it was set aside.

use std::{fmt::Display, sync::Arc};

use nexus_ar::{ArConfig, SampleOutline};
use nexus_data::{BoxedSource, Message, Mixture, Pick, ProcessOptions, Processor, RejectedSamples, TrainingInput};

use crate::{Phase, REJECTED, Recipe, RunDir, Sample, Source, TrainError};

/// The sources of one phase, mixed.
pub(crate) struct Feed {
    mixture: Mixture,
    sources: Vec<Arc<dyn Source>>,
    rejected: RejectedSamples,
    /// Samples after which the first comes again.
    distinct: Option<u64>,
    /// See [`Feed::round`].
    round: Option<u64>,
}

impl Feed {
    /// Mixes the sources of a phase, which are in the order of its data.
    pub(crate) fn new<S>(
        phase: &Phase<S>,
        sources: Vec<Arc<dyn Source>>,
        recipe: &Recipe,
        index: usize,
        dir: &RunDir,
        rejected: u64,
    ) -> Result<Self, TrainError> {
        let shares: Vec<(f64, Option<u64>)> =
            phase.data.iter().zip(&sources).map(|(data, source)| (data.weight, source.len())).collect();
        let mixture = Mixture::new(recipe.seed.wrapping_add(index as u64), &shares)?;
        let rejected = RejectedSamples::new(dir.path().join(REJECTED), recipe.max_rejected)?.with_count(rejected)?;
        let distinct = phase.distinct_samples;
        Ok(Self { mixture, sources, rejected, distinct, round: distinct.or_else(|| round(&shares)) })
    }

    /// Number of samples among which every one of the data is; `None` if the data have no end.
    pub(crate) fn round(&self) -> Option<u64> {
        self.round
    }

    /// The first sample that is the same as this one.
    pub(crate) fn first(&self, number: u64) -> u64 {
        self.distinct.map_or(number, |distinct| number % distinct)
    }

    /// A sample; `None` if it was set aside.
    pub(crate) fn sample(&mut self, number: u64) -> Result<Option<Sample>, TrainError> {
        match self.read(number) {
            Ok(sample) => Ok(Some(sample)),
            Err(error) => self.reject(number, &error).map(|()| None),
        }
    }

    /// A sample, which is not set aside if it cannot be read.
    pub(crate) fn read(&self, number: u64) -> Result<Sample, BoxedSource> {
        let Pick { source, index } = self.mixture.pick(self.first(number));
        self.sources[source].sample(index)
    }

    /// Sets a sample aside; one that comes again counts once.
    pub(crate) fn reject(&mut self, number: u64, reason: &dyn Display) -> Result<(), TrainError> {
        let Pick { source, index } = self.mixture.pick(self.first(number));
        Ok(self.rejected.reject(&self.sources[source].name(), index, reason)?)
    }

    /// The error that none of the data can be used.
    pub(crate) fn no_samples<S>(&self, phase: &Phase<S>) -> TrainError {
        TrainError::NoSamples { phase: phase.name.clone(), rejected: self.rejected.path().to_path_buf() }
    }

    /// Samples set aside so far.
    pub(crate) fn rejected(&self) -> u64 {
        self.rejected.count()
    }
}

/// Number of samples in which sources with these weights and lengths all come to an end; `None` if one has no end.
fn round(shares: &[(f64, Option<u64>)]) -> Option<u64> {
    let whole: f64 = shares.iter().map(|(weight, _)| weight).sum();
    let of_source = |&(weight, len): &(f64, Option<u64>)| {
        // Any stretch of twice the length holds a whole visit, and a mixture is wrong by less than a sample per source.
        len.map(|len| ((2 * len + shares.len() as u64) as f64 * (whole / weight)).ceil() as u64)
    };
    shares.iter().map(of_source).try_fold(0, |longest, samples| Some(longest.max(samples?)))
}

/// A conversation as tokens and pixels, or why a model with this configuration cannot learn from it.
pub(crate) fn usable_input(
    processor: &Processor,
    messages: &[Message],
    config: &ArConfig,
) -> Result<TrainingInput, String> {
    let input = processor.training_input(messages, &ProcessOptions::default()).map_err(|error| error.to_string())?;
    let [inputs, targets] = [&input.input_images, &input.answer_images]
        .map(|images| images.iter().map(|patches| patches.grid).collect::<Vec<_>>());
    let outline =
        SampleOutline { token_ids: &input.token_ids, labels: &input.labels, inputs: &inputs, targets: &targets };
    outline.check(config).map_err(|error| error.to_string())?;
    Ok(input)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_round_holds_every_sample() {
        let shares = [(0.2, Some(3)), (5.0, Some(40)), (1.0, Some(1))];
        let round_of_all = round(&shares).unwrap();
        assert!((3 * 31..400).contains(&round_of_all), "{round_of_all}");
        for (seed, start) in [(0, 0), (1, 17), (2, 12_345)] {
            let mixture = Mixture::new(seed, &shares).unwrap();
            let picks = (start..start + round_of_all).map(|number| mixture.pick(number));
            let found: BTreeSet<_> = picks.map(|pick| (pick.source, pick.index)).collect();
            assert_eq!(found.len(), 44);
        }
        assert_eq!(round(&[(1.0, Some(3)), (1.0, None)]), None);
    }
}
