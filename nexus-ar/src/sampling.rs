//! Choosing a token: scores of all ids -> one id.

use rand_mt::Mt;
use serde::{Deserialize, Serialize};

use crate::{ArError, GenerationConfig};

/// How a token is chosen, named as in `generation_config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingOptions {
    /// Draws at random instead of taking the likeliest token.
    pub do_sample: bool,
    /// Divides the scores before drawing; above 0.
    pub temperature: f32,
    /// Draws only among this many likeliest tokens; 0 is no limit.
    pub top_k: usize,
    /// Draws only among the likeliest tokens that together have this probability; above 0, at most 1.
    pub top_p: f32,
    /// Divides positive and multiplies negative scores of ids that have occurred, prompt included; 1 is off.
    pub repetition_penalty: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self::from_config(&GenerationConfig::default(), 0)
    }
}

impl SamplingOptions {
    /// The released model's settings with a seed.
    pub fn from_config(config: &GenerationConfig, seed: u64) -> Self {
        Self {
            do_sample: config.do_sample,
            temperature: config.temperature,
            top_k: config.top_k,
            top_p: config.top_p,
            repetition_penalty: config.repetition_penalty,
            seed,
        }
    }

    /// The likeliest token, always.
    pub fn greedy() -> Self {
        Self { do_sample: false, repetition_penalty: 1.0, ..Self::default() }
    }

    fn validate(&self) -> Result<(), ArError> {
        let check =
            |ok: bool, option, reason: String| if ok { Ok(()) } else { Err(ArError::Option { option, reason }) };
        let (temperature, top_p, penalty) = (self.temperature, self.top_p, self.repetition_penalty);
        check(temperature > 0.0 && temperature.is_finite(), "temperature", format!("{temperature} must be above 0"))?;
        check(top_p > 0.0 && top_p <= 1.0, "top_p", format!("{top_p} must be above 0 and at most 1"))?;
        check(penalty > 0.0 && penalty.is_finite(), "repetition_penalty", format!("{penalty} must be above 0"))
    }
}

/// Chooses tokens with its own stream of random numbers.
///
/// Source: transformers (generation/logits_process.py); the order is penalty, temperature, top-k, top-p.
/// Differs: the random stream is MT19937 with inverse-transform sampling, not `torch.multinomial`'s.
pub struct Sampler {
    options: SamplingOptions,
    random: Mt,
}

impl Sampler {
    /// # Errors
    /// [`ArError::Option`] if an option is out of range.
    pub fn new(options: SamplingOptions) -> Result<Self, ArError> {
        options.validate()?;
        let random = Mt::new((options.seed ^ options.seed >> 32) as u32);
        Ok(Self { options, random })
    }

    /// Applies the penalty to `logits`, which then are the scores that the choice is made on, and chooses.
    ///
    /// Scores of minus infinity are never chosen while another one is finite.
    ///
    /// # Panics
    /// If `logits` is empty.
    pub fn choose(&mut self, logits: &mut [f32], seen: &[u32]) -> u32 {
        self.penalise(logits, seen);
        if !self.options.do_sample {
            return argmax(logits);
        }
        let ranked = self.rank(logits);
        let total: f64 = ranked.iter().map(|(_, weight)| weight).sum();
        let mut draw = self.uniform() * total;
        for (id, weight) in &ranked {
            draw -= weight;
            if draw < 0.0 {
                return *id;
            }
        }
        ranked[0].0
    }

    /// The ids that [`Sampler::choose`] may draw, likeliest first, with their probabilities.
    pub fn probabilities(&self, logits: &mut [f32], seen: &[u32]) -> Vec<(u32, f64)> {
        self.penalise(logits, seen);
        let mut ranked = self.rank(logits);
        let total: f64 = ranked.iter().map(|(_, weight)| weight).sum();
        for (_, weight) in &mut ranked {
            *weight /= total;
        }
        ranked
    }

    /// Ids after temperature, top-k and top-p, with weights that are 1 for the likeliest.
    fn rank(&self, logits: &[f32]) -> Vec<(u32, f64)> {
        let mut ranked: Vec<(u32, f32)> =
            (0..).zip(logits.iter().map(|score| score / self.options.temperature)).collect();
        // Ids with the same score as the last of the top k stay; a vocabulary is long, so only what stays is sorted.
        if self.options.top_k > 0 && self.options.top_k < ranked.len() {
            let (_, (_, smallest), _) = ranked.select_nth_unstable_by(self.options.top_k - 1, likelier);
            let smallest = *smallest;
            ranked.retain(|(_, score)| *score >= smallest);
        }
        ranked.sort_unstable_by(likelier);
        let largest = ranked[0].1;
        let mut weights: Vec<(u32, f64)> =
            ranked.iter().map(|(id, score)| (*id, f64::from(score - largest).exp())).collect();
        weights.truncate(self.nucleus(&weights));
        weights
    }

    fn penalise(&self, logits: &mut [f32], seen: &[u32]) {
        let penalty = self.options.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let mut ids = seen.to_vec();
        ids.sort_unstable();
        ids.dedup();
        for id in ids {
            if let Some(score) = logits.get_mut(id as usize) {
                *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
            }
        }
    }

    /// How many of the ranked tokens are needed to reach probability `top_p`; at least one.
    fn nucleus(&self, weights: &[(u32, f64)]) -> usize {
        if self.options.top_p >= 1.0 {
            return weights.len();
        }
        let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
        let mut sum = 0.0;
        weights
            .iter()
            .position(|(_, weight)| {
                sum += weight;
                sum >= f64::from(self.options.top_p) * total
            })
            .map_or(weights.len(), |last| last + 1)
    }

    fn uniform(&mut self) -> f64 {
        let (high, low) = (self.random.next_u32() >> 5, self.random.next_u32() >> 6);
        (f64::from(high) * f64::from(1u32 << 26) + f64::from(low)) / (1u64 << 53) as f64
    }
}

/// Order of ids by score, likeliest first; of equal ones the smaller id comes first.
fn likelier(one: &(u32, f32), other: &(u32, f32)) -> std::cmp::Ordering {
    other.1.total_cmp(&one.1).then(one.0.cmp(&other.0))
}

fn argmax(scores: &[f32]) -> u32 {
    let mut best = 0;
    for (index, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = index;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(change: impl Fn(&mut SamplingOptions)) -> Sampler {
        let mut options = SamplingOptions { do_sample: true, top_k: 0, ..SamplingOptions::greedy() };
        change(&mut options);
        Sampler::new(options).unwrap()
    }

    fn frequencies(sampler: &mut Sampler, logits: &[f32]) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for _ in 0..20_000 {
            counts[sampler.choose(&mut logits.to_vec(), &[]) as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    /// Scores whose probabilities are 0.5, 0.3, 0.15 and 0.05.
    fn logits() -> [f32; 4] {
        [0.3f32.ln(), 0.5f32.ln(), 0.05f32.ln(), 0.15f32.ln()]
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let found = frequencies(&mut sampler(|_| {}), &logits());
        for (found, expected) in found.iter().zip([0.3, 0.5, 0.05, 0.15]) {
            assert!((found - expected).abs() < 0.015, "{found} instead of {expected}");
        }
    }

    #[test]
    fn top_k_and_top_p_drop_the_tail() {
        let found = frequencies(&mut sampler(|options| options.top_k = 2), &logits());
        assert_eq!((found[2], found[3]), (0.0, 0.0));
        assert!((found[1] - 0.625).abs() < 0.015);
        let found = frequencies(&mut sampler(|options| options.top_p = 0.81), &logits());
        assert_eq!(found[2], 0.0);
        assert!(found[3] > 0.1);
        let found = frequencies(&mut sampler(|options| options.top_p = 0.01), &logits());
        assert_eq!((found[0], found[2], found[3]), (0.0, 0.0, 0.0));
    }

    /// What [`Sampler::rank`] gives, by sorting everything first.
    fn ranked_by_sorting(options: &SamplingOptions, logits: &[f32]) -> Vec<(u32, f64)> {
        let mut ranked: Vec<(u32, f32)> = (0..).zip(logits.iter().map(|score| score / options.temperature)).collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if options.top_k > 0 && options.top_k < ranked.len() {
            let smallest = ranked[options.top_k - 1].1;
            ranked.retain(|(_, score)| *score >= smallest);
        }
        let largest = ranked[0].1;
        ranked.iter().map(|(id, score)| (*id, f64::from(score - largest).exp())).collect()
    }

    #[test]
    fn selecting_before_sorting_ranks_as_sorting_does() {
        let mut random = Mt::new(7);
        for case in 0..300 {
            let len = 1 + random.next_u32() as usize % 400;
            // Few different scores make many ties; some are zeros of both signs, some are excluded.
            let kinds = [3, 20, 1 << 20][case % 3];
            let mut score = || match random.next_u32() % kinds {
                0 => -0.0,
                1 => f32::NEG_INFINITY,
                kind => (kind - 2) as f32 * 0.37 - 3.0 * 0.37,
            };
            let mut logits: Vec<f32> = (0..len).map(|_| score()).collect();
            logits[0] = 0.0;
            for top_k in [0, 1, 2, 3, 20, len.saturating_sub(1), len, len + 1] {
                let sampler = sampler(|options| (options.top_k, options.temperature) = (top_k, 0.7));
                assert_eq!(sampler.rank(&logits), ranked_by_sorting(&sampler.options, &logits), "{len} {top_k}");
            }
        }
    }

    #[test]
    fn low_temperature_approaches_the_likeliest() {
        assert!(frequencies(&mut sampler(|options| options.temperature = 0.05), &logits())[1] > 0.99);
    }

    #[test]
    fn the_same_seed_draws_the_same() {
        let draw = |seed| {
            let mut sampler = sampler(|options| options.seed = seed);
            (0..64).map(|_| sampler.choose(&mut logits().to_vec(), &[])).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn penalty_divides_positive_and_multiplies_negative_scores_once() {
        let mut sampler =
            Sampler::new(SamplingOptions { repetition_penalty: 2.0, ..SamplingOptions::greedy() }).unwrap();
        let mut scores = [3.0, -1.0, 2.0, f32::NEG_INFINITY];
        assert_eq!(sampler.choose(&mut scores, &[0, 1, 0, 3, 99]), 2);
        assert_eq!(scores, [1.5, -2.0, 2.0, f32::NEG_INFINITY]);
    }

    #[test]
    fn options_out_of_range_are_named() {
        for (option, options) in [
            ("temperature", SamplingOptions { temperature: 0.0, ..SamplingOptions::default() }),
            ("temperature", SamplingOptions { temperature: f32::NAN, ..SamplingOptions::default() }),
            ("top_p", SamplingOptions { top_p: 1.5, ..SamplingOptions::default() }),
            ("repetition_penalty", SamplingOptions { repetition_penalty: 0.0, ..SamplingOptions::default() }),
        ] {
            let error = Sampler::new(options).err().unwrap().to_string();
            assert!(error.contains(option), "{error}");
        }
    }
}
