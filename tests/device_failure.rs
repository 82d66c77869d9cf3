//! What a failing device says, what is freed, and that it goes on: on the CPU, or on the device that `BURN_DEVICE` names.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "a test may panic")]

use std::{
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind},
};

use burn::{module::Param, tensor::Tensor};
use nexus::{
    DrawOptions, DrawWith, Error, FloatDType, Image, ImageEmbeds, Nexus, Noise, Picture, Progress, Stage,
    checkpoint::LoadDType,
    core::{OutOfMemory, check_arrived, failure_reason, nn::Linear},
};
use nexus_core::testing::{cpu, device, random_models_dir};

/// What a drawing loads when nothing is in memory: CLIP and T5, and what draws.
const ALL: [Stage; 4] = [Stage::TextEncoders, Stage::TextEncoders, Stage::GenerationDecoder, Stage::Autoencoder];

/// A model that has drawn, with what it drew.
struct Drawn {
    nexus: Nexus,
    embeds: ImageEmbeds,
    picture: Picture,
}

impl Drawn {
    fn new() -> Self {
        let loader = Nexus::loader(random_models_dir()).compute_dtype(FloatDType::F32);
        let nexus = loader.weights_dtype(LoadDType::Convert(FloatDType::F32)).load(&device(), ()).unwrap();
        let pixels = (0..3 * 252 * 252).map(|i| (i % 251) as u8).collect();
        let embeds = nexus.embed(&Image::from_rgb8(252, 252, pixels).unwrap(), 252 * 252, ()).unwrap();
        let picture = nexus.draw(&embeds, DrawWith::GenerationDecoder, &options(), ()).unwrap();
        Self { nexus, embeds, picture }
    }

    /// Draws again, with an observer that does something at the first step, and says what was loaded.
    fn draw(
        &self,
        options: &DrawOptions,
        at_step: impl Fn() -> ControlFlow<()>,
    ) -> (Result<Picture, Error>, Vec<Stage>) {
        let mut loaded = vec![];
        let observer = |event| {
            match event {
                Progress::Loading(stage) => loaded.push(stage),
                Progress::Step { done: 1, .. } => return at_step(),
                _ => {}
            }
            ControlFlow::Continue(())
        };
        let result = self.nexus.draw(&self.embeds, DrawWith::GenerationDecoder, options, observer);
        (result, loaded)
    }

    /// Draws what it drew at first, and nothing else than `loads` is loaded.
    fn assert_draws(&self, loads: &[Stage]) {
        let (result, loaded) = self.draw(&options(), || ControlFlow::Continue(()));
        assert_eq!(result.unwrap().image, self.picture.image);
        assert_eq!(loaded, loads);
    }
}

/// With a negative prompt, so that all text encoders are needed.
fn options() -> DrawOptions {
    DrawOptions { width: 32, height: 32, steps: 2, cfg_scale: 2.0, ..DrawOptions::default() }
}

/// A CPU has as much memory as the system grants, and keeps no count of it.
#[test]
fn a_reason_of_a_cpu_says_nothing_of_memory_that_is_held() {
    assert_eq!(failure_reason(&"out of memory", &cpu()), "out of memory");
    let expected = OutOfMemory { needed: None, available: None };
    assert_eq!(OutOfMemory::of("out of memory", &cpu()), Some(expected));
}

#[test]
#[ignore = "needs a device with memory of its own: BURN_DEVICE names it, and tools/gpu_tests.sh runs this"]
fn too_little_memory_is_a_reason_with_what_is_held_and_the_device_stays_usable() {
    let device = device();
    assert_ne!(device, cpu(), "BURN_DEVICE must name a device with memory of its own");
    let kept = Tensor::<1>::ones([1 << 22], &device);
    let huge = || Tensor::<2>::ones([1 << 20, 1 << 20], &device);
    let layer = Linear { weight: Param::from_tensor(huge()), bias: None };
    for error in [huge().try_into_data().unwrap_err(), check_arrived(&layer).unwrap_err()] {
        let reason = failure_reason(&error, &device);
        assert!(reason.contains(&(1u64 << 42).to_string()), "bytes asked for: {reason}");
        let held = reason.split("the device holds ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
        assert!(held.parse::<u64>().unwrap() >= 16, "{reason}");
        let OutOfMemory { needed, available } = OutOfMemory::of(&reason, &device).unwrap();
        assert_eq!(needed, Some(1 << 42));
        assert!(available.is_some_and(|bytes| bytes > 0 && bytes < 1 << 42), "{available:?}");
    }
    assert_eq!(kept.sum().into_data().try_into_vec_as::<f32>().unwrap(), [(1 << 22) as f32]);
}

#[test]
fn a_backend_that_panics_for_want_of_memory_is_an_error_and_everything_is_freed() {
    let drawn = Drawn::new();
    drawn.assert_draws(&[]);
    let fail = || panic!("An IO error happened\nCaused by:\n  out of device memory allocating 12345678901 bytes");
    let (result, _) = drawn.draw(&options(), fail);
    let error = result.unwrap_err();
    let Error::OutOfDeviceMemory { needed, available, .. } = &error else { panic!("{error}") };
    assert_eq!(*needed, Some(12_345_678_901));
    assert_eq!(available.is_none(), device() == cpu());
    for part in ["11774 MiB asked for", "smaller picture", "quantised", "one stage at a time"] {
        assert!(error.to_string().contains(part), "{error} without {part}");
    }
    drawn.assert_draws(&ALL);
    drawn.assert_draws(&[]);
}

#[test]
fn another_panic_goes_on_and_the_model_stays_usable() {
    let drawn = Drawn::new();
    let panic = catch_unwind(AssertUnwindSafe(|| drawn.draw(&options(), || panic!("the observer is wrong"))));
    assert_eq!(panic.map(drop).unwrap_err().downcast_ref::<&str>(), Some(&"the observer is wrong"));
    drawn.assert_draws(&ALL);
}

#[test]
fn what_is_not_the_devices_fault_frees_nothing() {
    let drawn = Drawn::new();
    let (cancelled, _) = drawn.draw(&options(), || ControlFlow::Break(()));
    assert!(matches!(cancelled, Err(Error::Cancelled)));
    drawn.assert_draws(&[]);
    let noise = Noise::Latents(Tensor::zeros([1, 1, 1, 1], &device()));
    let (refused, _) = drawn.draw(&DrawOptions { noise, ..options() }, || ControlFlow::Continue(()));
    assert!(matches!(refused, Err(Error::Diffusion(_))));
    drawn.assert_draws(&[]);
}

#[test]
fn unloading_frees_the_prompts_too() {
    let drawn = Drawn::new();
    drawn.nexus.unload();
    drawn.assert_draws(&ALL);
}
