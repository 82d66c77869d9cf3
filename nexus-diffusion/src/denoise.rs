//! The denoising loop, the only one: a transformer, its conditions and noise -> latents, step by step.

use std::ops::{ControlFlow, Range};

use burn::tensor::Tensor;
use nexus_kernels::RotaryTable;
use serde::{Deserialize, Serialize};

use crate::{
    Conditioning, DiffusionError, LatentSize,
    scheduler::FlowMatchSchedule,
    tiling::{Ramp, Tiling, tiled},
    transformer::{ConstantConditioning, Dit, DitInput, DitModulations, TeaCache},
};

/// How a picture is denoised; the default is that of the original's generation script.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DenoiseOptions {
    /// Steps from noise to picture.
    pub num_steps: usize,
    /// Classifier-free guidance: how far to go from the negative branch to the positive one and beyond; 1 runs the
    /// positive branch alone.
    pub cfg_scale: f64,
    /// The guidance scalar that FLUX.1-dev was distilled to take as an input.
    pub embedded_guidance: f64,
    /// Noise level of the first step, in `0..=1`; below 1 the run starts from a picture.
    pub strength: f64,
    /// Skips steps whose input changed less than this since the last computed one; none: every step is computed.
    pub tea_cache_threshold: Option<f64>,
    /// Runs the transformer on overlapping tiles, for pictures that are too large for it.
    pub tiling: Option<Tiling>,
}

impl Default for DenoiseOptions {
    fn default() -> Self {
        Self {
            num_steps: 50,
            cfg_scale: 3.0,
            embedded_guidance: 3.5,
            strength: 1.0,
            tea_cache_threshold: None,
            tiling: None,
        }
    }
}

impl DenoiseOptions {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`DiffusionError::Option`] naming the option at fault.
    pub fn validate(&self) -> Result<(), DiffusionError> {
        if self.num_steps == 0 {
            return Err(DiffusionError::option("num_steps", self.num_steps, "at least 1"));
        }
        if !self.cfg_scale.is_finite() {
            return Err(DiffusionError::option("cfg_scale", self.cfg_scale, "a finite number"));
        }
        if !self.embedded_guidance.is_finite() {
            return Err(DiffusionError::option("embedded_guidance", self.embedded_guidance, "a finite number"));
        }
        if !(self.strength > 0.0 && self.strength <= 1.0) {
            return Err(DiffusionError::option("strength", self.strength, "over 0 and at most 1"));
        }
        if let Some(threshold) = self.tea_cache_threshold {
            TeaCache::new(self.num_steps, threshold)?;
        }
        Ok(())
    }

    /// Whether a negative branch is run.
    pub fn uses_negative_branch(&self) -> bool {
        self.cfg_scale != 1.0
    }
}

/// What one branch of the guidance is conditioned on.
#[derive(Debug, Clone)]
pub struct Branch {
    /// Condition tokens and their positions.
    pub conditioning: Conditioning,
    /// Pooled text vector: `[1 or batch, pooled]`.
    pub pooled: Tensor<2>,
}

/// Both branches of the classifier-free guidance.
#[derive(Debug, Clone)]
pub struct Branches {
    /// What to draw: the decoder's conditioning and the pooled vector of the empty text.
    pub positive: Branch,
    /// What to stay away from: tokens and pooled vector of the negative prompt. Not used if the scale is 1.
    pub negative: Option<Branch>,
}

/// A run that is ready to start: all that does not change from step to step has been computed.
#[derive(Debug)]
pub struct Denoiser<'a> {
    dit: &'a Dit,
    conditioning: ConstantConditioning,
    positive: Prepared,
    negative: Option<Prepared>,
    size: LatentSize,
    options: DenoiseOptions,
}

/// The constant parts of a branch.
#[derive(Debug)]
struct Prepared {
    context: Tensor<3>,
    rotary: RotaryTable,
    /// Those of the conditioning.
    samples: Range<usize>,
}

/// Where a run is; it can be kept, cloned and continued.
#[derive(Debug, Clone)]
pub struct DenoiseState {
    /// `[batch, channels, height, width]`.
    pub latents: Tensor<4>,
    /// Steps done.
    pub step: usize,
    /// Noise levels.
    pub schedule: FlowMatchSchedule,
    positive_caches: Vec<TeaCache>,
    negative_caches: Vec<TeaCache>,
}

impl DenoiseState {
    /// Whether all steps are done.
    pub fn is_done(&self) -> bool {
        self.step >= self.schedule.num_steps()
    }

    fn event(&self) -> DenoiseEvent<'_> {
        let caches = self.positive_caches.iter().chain(&self.negative_caches);
        let skipped_passes = caches.filter(|cache| cache.has_skipped()).count();
        let num_steps = self.schedule.num_steps();
        DenoiseEvent { step: self.step, num_steps, latents: &self.latents, skipped_passes }
    }
}

/// Progress of a run: sent once before the first step, and after each step.
#[derive(Debug)]
#[non_exhaustive]
pub struct DenoiseEvent<'a> {
    /// Steps done.
    pub step: usize,
    /// Steps in all.
    pub num_steps: usize,
    /// Latents after these steps.
    pub latents: &'a Tensor<4>,
    /// Passes of the latest step, one per branch of the guidance and per tile, whose blocks a cache skipped.
    pub skipped_passes: usize,
}

impl<'a> Denoiser<'a> {
    /// Prepares a run for latents of `size`.
    ///
    /// Conditions and latents must be of one dtype, in which everything is computed.
    ///
    /// # Errors
    /// [`DiffusionError::Option`] for options outside their range, or guidance without a negative branch.
    pub fn new(
        dit: &'a Dit,
        branches: Branches,
        size: LatentSize,
        options: &DenoiseOptions,
    ) -> Result<Self, DiffusionError> {
        options.validate()?;
        let table_size = options.tiling.map_or(size, |tiling| tiling.tile_size(size));
        let prepare = |Conditioning { embeds, text_ids }: Conditioning, samples: Range<usize>| {
            let rotary = dit.rotary(&text_ids, table_size, embeds.dtype(), &embeds.device());
            Prepared { context: dit.context(embeds), rotary, samples }
        };
        let Branch { conditioning, mut pooled } = branches.positive;
        let positive = prepare(conditioning, 0..pooled.dims()[0]);
        let negative = match (branches.negative, options.uses_negative_branch()) {
            (_, false) => None,
            (Some(branch), true) => {
                let samples;
                (pooled, samples) = with_samples(pooled, branch.pooled);
                Some(prepare(branch.conditioning, samples))
            }
            (None, true) => {
                let expected = "1, because there is no negative prompt to guide away from";
                return Err(DiffusionError::option("cfg_scale", options.cfg_scale, expected));
            }
        };
        let conditioning = dit.constant_conditioning(options.embedded_guidance as f32, pooled);
        Ok(Self { dit, conditioning, positive, negative, size, options: options.clone() })
    }

    /// The state before the first step: noise, or a picture with noise mixed in.
    ///
    /// # Shapes
    /// - `noise`: `[batch, channels, height, width]`
    /// - `clean`: latents of the picture to start from, of the same shape
    ///
    /// # Errors
    /// [`DiffusionError::NoiseShape`] if a shape is not that of the run's latents.
    pub fn start(&self, noise: Tensor<4>, clean: Option<Tensor<4>>) -> Result<DenoiseState, DiffusionError> {
        // One set of conditions serves any number of pictures; several conditions need one picture each.
        let ([batch, ..], [conditions, ..]) = (noise.dims(), self.positive.context.dims());
        let batch = if conditions == 1 { batch } else { conditions };
        let expected = [batch, self.dit.latent_channels(), self.size.height, self.size.width];
        for latents in std::iter::once(&noise).chain(&clean) {
            if latents.dims() != expected {
                return Err(DiffusionError::NoiseShape { found: latents.dims(), expected });
            }
        }
        let schedule = FlowMatchSchedule::new(self.options.num_steps, self.options.strength);
        let latents = match clean {
            Some(clean) => schedule.add_noise(0, clean, noise),
            None => noise,
        };
        let negative_caches = if self.negative.is_some() { self.caches()? } else { vec![] };
        Ok(DenoiseState { latents, step: 0, schedule, positive_caches: self.caches()?, negative_caches })
    }

    /// One step: both branches, guidance, and an Euler step.
    ///
    /// # Panics
    /// If all steps are done.
    pub fn step(&self, state: &mut DenoiseState) {
        let timestep = state.schedule.timesteps()[state.step];
        let modulations = self.dit.modulations(&self.dit.conditioning_at(&[timestep], &self.conditioning));
        let positive = self.velocity(&self.positive, &modulations, &state.latents, &mut state.positive_caches);
        let velocity = match &self.negative {
            None => positive,
            Some(branch) => {
                let negative = self.velocity(branch, &modulations, &state.latents, &mut state.negative_caches);
                negative.clone() + (positive - negative) * self.options.cfg_scale
            }
        };
        state.latents = state.schedule.step(state.step, state.latents.clone(), velocity);
        state.step += 1;
    }

    /// Runs the remaining steps; `Break` from the observer ends the run early and is returned.
    pub fn run(
        &self,
        state: &mut DenoiseState,
        observer: &mut dyn FnMut(DenoiseEvent<'_>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        observer(state.event())?;
        while !state.is_done() {
            self.step(state);
            observer(state.event())?;
        }
        ControlFlow::Continue(())
    }

    /// The velocity that one branch predicts, by its samples of the modulations of both.
    fn velocity(
        &self,
        branch: &Prepared,
        modulations: &DitModulations,
        latents: &Tensor<4>,
        caches: &mut [TeaCache],
    ) -> Tensor<4> {
        let modulations = modulations.samples(branch.samples.clone());
        let ([batch, ..], [_, tokens, dim]) = (latents.dims(), branch.context.dims());
        let context = branch.context.clone().expand([batch, tokens, dim]);
        let mut forward = |tile: usize, latents: Tensor<4>| {
            let input =
                DitInput { latents, context: context.clone(), modulations: &modulations, rotary: &branch.rotary };
            self.dit.forward(input, caches.get_mut(tile))
        };
        match self.options.tiling {
            None => forward(0, latents.clone()),
            Some(tiling) => tiled(self.size, tiling, Ramp::InnerSides, 1, |i, tile| forward(i, tile.of(latents, 1))),
        }
    }

    /// One cache per tile, or none.
    fn caches(&self) -> Result<Vec<TeaCache>, DiffusionError> {
        let num_tiles = self.options.tiling.map_or(1, |tiling| tiling.tiles(self.size).len());
        let Some(threshold) = self.options.tea_cache_threshold else { return Ok(vec![]) };
        (0..num_tiles).map(|_| TeaCache::new(self.options.num_steps, threshold)).collect()
    }
}

/// Pooled vectors behind others, and where they are then: among the others if those are the same, so that the branches share
/// what is made of them.
fn with_samples(pooled: Tensor<2>, more: Tensor<2>) -> (Tensor<2>, Range<usize>) {
    let ([count, _], [more_count, _]) = (pooled.dims(), more.dims());
    match (pooled.clone().try_into_data(), more.clone().try_into_data()) {
        (Ok(values), Ok(others)) if values == others => (pooled, 0..count),
        _ => (Tensor::cat(vec![pooled, more], 0), count..count + more_count),
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::DType;
    use nexus_core::testing::{assert_close_tensors, cpu, ramp};

    use super::*;
    use crate::config::DitConfig;

    const SIZE: LatentSize = LatentSize { height: 6, width: 8 };

    fn dit() -> Dit {
        let config = DitConfig {
            dim: 16,
            num_heads: 2,
            num_double: 1,
            num_single: 1,
            in_channels: 8,
            context_dim: 6,
            pooled_dim: 4,
            axes_dim: [2, 2, 4],
            ..DitConfig::default()
        };
        Dit::new(&config, &cpu())
    }

    fn branch(tokens: usize, seed: usize) -> Branch {
        let conditioning = Conditioning::without_positions(ramp([1, tokens, 6], seed));
        Branch { conditioning, pooled: ramp([1, 4], seed + 1) }
    }

    fn branches() -> Branches {
        Branches { positive: branch(5, 1), negative: Some(branch(7, 3)) }
    }

    fn options(cfg_scale: f64) -> DenoiseOptions {
        DenoiseOptions { num_steps: 3, cfg_scale, ..Default::default() }
    }

    fn finished(dit: &Dit, branches: Branches, options: &DenoiseOptions, noise: Tensor<4>) -> Tensor<4> {
        let denoiser = Denoiser::new(dit, branches, SIZE, options).unwrap();
        let mut state = denoiser.start(noise, None).unwrap();
        assert!(denoiser.run(&mut state, &mut |_| ControlFlow::Continue(())).is_continue());
        assert!(state.is_done());
        state.latents
    }

    #[test]
    fn a_scale_of_one_runs_the_positive_branch_alone() {
        let (dit, noise) = (dit(), ramp([1, 2, 6, 8], 5));
        let alone = Branches { negative: None, ..branches() };
        let with = finished(&dit, branches(), &options(1.0), noise.clone());
        assert_close_tensors(&with, &finished(&dit, alone.clone(), &options(1.0), noise.clone()), 0.0);
        let error = Denoiser::new(&dit, alone, SIZE, &options(2.0)).unwrap_err();
        assert!(matches!(error, DiffusionError::Option { option: "cfg_scale", .. }));
        // Equal branches: any scale gives what the positive branch gives.
        let equal = Branches { positive: branch(5, 1), negative: Some(branch(5, 1)) };
        assert_close_tensors(&with, &finished(&dit, equal, &options(4.0), noise), 1e-5);
    }

    #[test]
    fn what_the_branches_share_is_what_each_would_have_alone() {
        let (dit, latents) = (dit(), ramp([2, 2, 6, 8], 5));
        let of_two = |tokens, seed| Branch { pooled: ramp([2, 4], seed), ..branch(tokens, seed) };
        for (positive, negative, samples) in [
            (branch(5, 1), branch(7, 3), 2),
            (branch(5, 1), Branch { pooled: branch(5, 1).pooled, ..branch(7, 3) }, 1),
            (of_two(5, 1), branch(7, 3), 3),
            (of_two(5, 1), of_two(7, 1), 2),
        ] {
            let options = DenoiseOptions { num_steps: 1, ..options(2.0) };
            let branches = Branches { positive: positive.clone(), negative: Some(negative.clone()) };
            let denoiser = Denoiser::new(&dit, branches, SIZE, &options).unwrap();
            let mut state = denoiser.start(latents.clone(), None).unwrap();
            let (schedule, timestep) = (state.schedule.clone(), state.schedule.timesteps()[0]);
            let [positive, negative] = [positive, negative].map(|Branch { conditioning, pooled }| {
                let rotary = dit.rotary(&conditioning.text_ids, SIZE, DType::F32, &cpu());
                let [_, tokens, width] = conditioning.embeds.dims();
                let context = dit.context(conditioning.embeds.expand([2, tokens, width]));
                let timesteps = vec![timestep; pooled.dims()[0]];
                let modulations = dit.modulations(&dit.conditioning(&timesteps, 3.5, pooled));
                let latents = latents.clone();
                dit.forward(DitInput { latents, context, modulations: &modulations, rotary: &rotary }, None)
            });
            let velocity = negative.clone() + (positive - negative) * 2.0;
            denoiser.step(&mut state);
            assert_close_tensors(&state.latents, &schedule.step(0, latents.clone(), velocity), 1e-6);
            assert_eq!(denoiser.conditioning.pooled.dims(), [samples, 16]);
        }
    }

    #[test]
    fn guidance_goes_beyond_the_positive_branch() {
        let (dit, noise) = (dit(), ramp([1, 2, 6, 8], 5));
        let one_step = |cfg_scale| DenoiseOptions { num_steps: 1, ..options(cfg_scale) };
        let [at_0, at_1, at_3] =
            [0.0, 1.0, 3.0].map(|scale| finished(&dit, branches(), &one_step(scale), noise.clone()));
        assert_close_tensors(&at_3, &(at_0.clone() + (at_1 - at_0) * 3.0), 1e-5);
    }

    #[test]
    fn an_observer_hears_every_step_and_can_break_and_go_on() {
        let (dit, noise) = (dit(), ramp([1, 2, 6, 8], 5));
        let denoiser = Denoiser::new(&dit, branches(), SIZE, &options(2.0)).unwrap();
        let mut state = denoiser.start(noise.clone(), None).unwrap();
        let mut heard = vec![];
        let flow = denoiser.run(&mut state, &mut |event| {
            heard.push((event.step, event.num_steps));
            if event.step == 1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(flow.is_break() && !state.is_done());
        assert_eq!(heard, [(0, 3), (1, 3)]);
        assert!(denoiser.run(&mut state, &mut |_| ControlFlow::Continue(())).is_continue());
        assert_close_tensors(&state.latents, &finished(&dit, branches(), &options(2.0), noise), 0.0);
    }

    #[test]
    fn events_tell_the_passes_that_a_cache_skipped() {
        let (dit, noise) = (dit(), ramp([1, 2, 6, 8], 5));
        let skipped = |cfg_scale, tiling, threshold| {
            let options = DenoiseOptions { num_steps: 4, tea_cache_threshold: threshold, tiling, ..options(cfg_scale) };
            let denoiser = Denoiser::new(&dit, branches(), SIZE, &options).unwrap();
            let (mut state, mut skipped) = (denoiser.start(noise.clone(), None).unwrap(), vec![]);
            let flow = denoiser.run(&mut state, &mut |event| {
                skipped.push(event.skipped_passes);
                ControlFlow::Continue(())
            });
            assert!(flow.is_continue());
            skipped
        };
        assert_eq!(skipped(2.0, None, None), [0; 5]);
        assert_eq!(skipped(2.0, None, Some(0.0)), [0; 5]);
        assert_eq!(skipped(1.0, None, Some(1e9)), [0, 0, 1, 1, 0]);
        assert_eq!(skipped(2.0, None, Some(1e9)), [0, 0, 2, 2, 0]);
        let tiling = Tiling::new(4, 2).unwrap();
        let tiles = tiling.tiles(SIZE).len();
        assert_eq!(skipped(2.0, Some(tiling), Some(1e9)), [0, 0, 2 * tiles, 2 * tiles, 0]);
    }

    #[test]
    fn several_pictures_of_one_condition() {
        let (dit, noise) = (dit(), ramp([2, 2, 6, 8], 5));
        let both = finished(&dit, branches(), &options(2.0), noise.clone());
        let single = |i| finished(&dit, branches(), &options(2.0), noise.clone().narrow(0, i, 1));
        assert_close_tensors(&both, &Tensor::cat(vec![single(0), single(1)], 0), 1e-5);
    }

    #[test]
    fn tiles_as_large_as_the_picture_change_nothing_and_small_ones_keep_the_shape() {
        let (dit, noise) = (dit(), ramp([1, 2, 6, 8], 5));
        let whole = finished(&dit, branches(), &options(2.0), noise.clone());
        let tiled = |size, stride, threshold| {
            let tiling = Some(Tiling::new(size, stride).unwrap());
            let options = DenoiseOptions { tiling, tea_cache_threshold: threshold, ..options(2.0) };
            finished(&dit, branches(), &options, noise.clone())
        };
        assert_close_tensors(&tiled(8, 4, None), &whole, 0.0);
        assert_close_tensors(&tiled(8, 4, Some(0.0)), &whole, 1e-6);
        for threshold in [None, Some(10.0)] {
            let small = tiled(4, 2, threshold);
            assert_eq!(small.dims(), [1, 2, 6, 8]);
            assert!(small.sum().into_scalar::<f32>().is_finite());
        }
    }

    #[test]
    fn a_low_strength_stays_near_the_picture() {
        let (dit, noise, clean) = (dit(), ramp([1, 2, 6, 8], 5), ramp([1, 2, 6, 8], 6));
        let options = DenoiseOptions { strength: 0.01, ..options(1.0) };
        let denoiser = Denoiser::new(&dit, branches(), SIZE, &options).unwrap();
        let state = denoiser.start(noise, Some(clean.clone())).unwrap();
        assert_close_tensors(&state.latents, &clean, 0.1);
        let error = denoiser.start(clean.clone(), Some(clean.narrow(2, 0, 4))).unwrap_err();
        assert!(matches!(error, DiffusionError::NoiseShape { found: [1, 2, 4, 8], .. }));
    }

    #[test]
    fn options_out_of_range_are_named() {
        let bad = [
            ("num_steps", DenoiseOptions { num_steps: 0, ..Default::default() }),
            ("cfg_scale", DenoiseOptions { cfg_scale: f64::NAN, ..Default::default() }),
            ("embedded_guidance", DenoiseOptions { embedded_guidance: f64::INFINITY, ..Default::default() }),
            ("strength", DenoiseOptions { strength: 0.0, ..Default::default() }),
            ("strength", DenoiseOptions { strength: 1.1, ..Default::default() }),
            ("tea_cache_threshold", DenoiseOptions { tea_cache_threshold: Some(-1.0), ..Default::default() }),
        ];
        for (name, options) in bad {
            match options.validate() {
                Err(DiffusionError::Option { option, .. }) => assert_eq!(option, name),
                other => panic!("{name}: {other:?}"),
            }
        }
        DenoiseOptions::default().validate().unwrap();
    }
}
