//! Losses, gradients and one optimizer step against PyTorch on the bundled random checkpoint.

use std::{collections::BTreeMap, path::PathBuf};

use burn::{
    module::Module,
    tensor::{DType, Device, FloatDType, Gradients, Tensor},
};
use nexus::{
    ar::{ArConfig, ArModel, ArObjective, NAMES, TrainingBatch, TrainingSample},
    checkpoint::{Checkpoint, LoadDType, LoadOptions, WeightNames, module_layout},
    core::{GridThw, ImageEmbeds, nn::Recomputation},
    diffusion::{
        Conditioning, EditingDecoder, FlowMatching, FlowMatchingInput, GenerationDecoder, LatentSize,
        config::DiffusionConfig,
        transformer::Dit,
        weights::{EDITING_DECODER, GENERATION_DECODER},
    },
    vision_encoder::{NAMES as VISION_NAMES, VisionConfig, VisionEncoder},
};
use nexus_core::testing::{Fixture, assert_close, device, random_models_dir};
use nexus_train::optim::{AdamWOptions, GradientSum, NamePattern, Optimizer, freeze};

const LOSS_TOLERANCE: f32 = 1e-5;
const GRADIENT_TOLERANCE: f32 = 1e-4;

/// Weights to train: as master weights in f32.
const OPTIONS: LoadOptions =
    LoadOptions { dtype: LoadDType::Convert(FloatDType::F32), check_finite: false, quantization: None };

fn trained() -> Device {
    device().autodiff()
}

fn dir() -> PathBuf {
    random_models_dir().join("Nexus-GenV2")
}

fn checkpoint(file: &str) -> Checkpoint {
    Checkpoint::open(dir().join(file)).unwrap()
}

fn ar_config() -> ArConfig {
    ArConfig::read(dir().join("config.json")).unwrap()
}

fn ar_model() -> ArModel {
    ArModel::load(&checkpoint(""), &ar_config(), &trained(), &OPTIONS).unwrap()
}

fn vision_encoder() -> VisionEncoder {
    let config = VisionConfig::read(dir().join("config.json")).unwrap();
    VisionEncoder::load(&checkpoint(""), &config, &trained(), &OPTIONS).unwrap()
}

fn diffusion_config() -> DiffusionConfig {
    DiffusionConfig::read_in(dir()).unwrap()
}

fn value(tensor: &Tensor<1>) -> f32 {
    tensor.to_data().try_into_vec_as::<f32>().unwrap()[0]
}

fn gradient_sum(gradients: Gradients, module: &impl Module, names: &WeightNames) -> GradientSum {
    let mut sum = GradientSum::new();
    sum.add(gradients, module, names);
    sum
}

/// Every gradient that the fixture holds, and the norms of all of them; nothing else may have a gradient.
#[track_caller]
fn check_gradients(sum: &GradientSum, fixture: &Fixture, whole: &[&str], layout: &[(String, Vec<usize>)]) {
    for name in whole {
        assert_close(sum.get(name).unwrap(), &fixture.floats(&format!("out.grad.{name}")), GRADIENT_TOLERANCE);
    }
    let mut norms: BTreeMap<String, f64> = fixture.meta("gradient_norms");
    assert_eq!(sum.len(), norms.len(), "parameters with a gradient");
    for (name, _) in layout {
        let Some(gradient) = sum.get(name) else { continue };
        let expected = norms.remove(name).unwrap_or_else(|| panic!("`{name}` has a gradient of its own"));
        let norm = f64::from(value(&gradient.clone().square().sum().sqrt()));
        assert!((norm - expected).abs() <= f64::from(GRADIENT_TOLERANCE) * expected, "{name}: {norm}, not {expected}");
    }
    assert!(norms.is_empty(), "without a gradient: {norms:?}");
}

/// The samples of the fixture: an edit and a generation, of which the first is longer.
fn ar_samples(fixture: &Fixture, encoder: &VisionEncoder) -> Vec<TrainingSample> {
    let grids: Vec<[usize; 3]> = fixture.meta("grid_thw");
    let grids: Vec<GridThw> = grids.into_iter().map(|[t, h, w]| GridThw::new(t, h, w).unwrap()).collect();
    let mut images = encoder.encode(fixture.tensor::<2>("in.pixel_values").autodiff(), &grids).unwrap().into_iter();
    let width = fixture.shape("in.input_ids")[1];
    let [ids, labels, seen] = ["in.input_ids", "in.labels", "in.attention_mask"].map(|name| fixture.integers(name));
    let mut sample = |row: usize, num_inputs: usize| {
        let row = row * width..(row + 1) * width;
        let length = seen[row.clone()].iter().sum::<i64>() as usize;
        TrainingSample {
            token_ids: ids[row.clone()][..length].iter().map(|&id| id as u32).collect(),
            labels: labels[row][..length].iter().map(|&label| u32::try_from(label).ok()).collect(),
            inputs: images.by_ref().take(num_inputs).collect(),
            targets: images.by_ref().take(1).collect(),
        }
    };
    vec![sample(0, 1), sample(1, 0)]
}

#[test]
fn the_autoregressive_objective_and_its_gradients() {
    let fixture = Fixture::open("objective_ar");
    let (encoder, frozen) = freeze(vision_encoder(), &VISION_NAMES, &[NamePattern("visual.*".into())]);
    assert!(frozen[0] > 0);
    let (model, config) = (ar_model(), ar_config());
    let batch = TrainingBatch::new(ar_samples(&fixture, &encoder), &config).unwrap();
    assert_eq!((batch.num_samples(), batch.num_image_labels()), (2, 162));
    assert_eq!(gradient_sum(loss_again(&model, &batch), &encoder, &VISION_NAMES).len(), 0);
    let whole = [
        "model.norm.weight",
        "vision_head.weight",
        "image_prefill_embeds.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.3.mlp.down_proj.weight",
    ];
    for mut layers in [Recomputation::none(), Recomputation::of_blocks()] {
        let loss = ArObjective::default().output(&model, &batch, FloatDType::F32, 0..0, &mut layers).unwrap().loss;
        for (part, name) in [
            (&loss.cross_entropy, "cross_entropy"),
            (&loss.mse, "mse"),
            (&loss.cosine, "cosine"),
            (&loss.image, "image_loss"),
            (&loss.total, "loss"),
        ] {
            assert_close(part, &fixture.floats(&format!("out.{name}")), LOSS_TOLERANCE);
        }
        let mut sum = GradientSum::new();
        layers.backward(&loss.total, |part| sum.add(part, &model, &NAMES));
        check_gradients(&sum, &fixture, &whole, &module_layout(&model, &NAMES));
    }
}

fn loss_again(model: &ArModel, batch: &TrainingBatch) -> Gradients {
    ArObjective::default().loss(model, batch, FloatDType::F32).unwrap().total.backward()
}

/// Gradients of activations in bf16 point where those in f32 do, and are as long.
#[track_caller]
fn check_bf16(rounded: &GradientSum, exact: &GradientSum, layout: &[(String, Vec<usize>)]) {
    assert!(!exact.is_empty());
    for (name, _) in layout {
        assert_eq!(rounded.get(name).is_some(), exact.get(name).is_some(), "{name}");
        let (Some(rounded), Some(exact)) = (rounded.get(name), exact.get(name)) else { continue };
        assert_eq!(rounded.dtype(), DType::F32, "{name}");
        let dot = |a: &Tensor<1>, b: &Tensor<1>| f64::from(value(&(a.clone() * b.clone()).sum()));
        let (rounded_norm, norm) = (dot(rounded, rounded).sqrt(), dot(exact, exact).sqrt());
        let cosine = dot(rounded, exact) / (rounded_norm * norm);
        assert!(cosine > 0.995 && (rounded_norm / norm - 1.0).abs() < 0.05, "{name}: {cosine}, {rounded_norm}, {norm}");
    }
}

#[test]
fn activations_in_bf16_give_nearly_the_same_gradients_of_the_language_model() {
    let fixture = Fixture::open("objective_ar");
    let (encoder, _) = freeze(vision_encoder(), &VISION_NAMES, &[NamePattern("visual.*".into())]);
    let (model, config) = (ar_model(), ar_config());
    let batch = TrainingBatch::new(ar_samples(&fixture, &encoder), &config).unwrap();
    let exact = gradient_sum(loss_again(&model, &batch), &model, &NAMES);
    for mut layers in [Recomputation::none(), Recomputation::of_blocks()] {
        let loss = ArObjective::default().output(&model, &batch, FloatDType::BF16, 0..0, &mut layers).unwrap().loss;
        assert_close(&loss.total, &fixture.floats("out.loss"), 2e-2);
        let mut rounded = GradientSum::new();
        layers.backward(&loss.total, |part| rounded.add(part, &model, &NAMES));
        check_bf16(&rounded, &exact, &module_layout(&model, &NAMES));
    }
}

#[test]
fn activations_in_bf16_give_nearly_the_same_gradients_of_a_decoder() {
    let flow = Flow::open("objective_edit");
    let weights = checkpoint("edit_decoder.bin");
    let decoder = EditingDecoder::load(&weights, &diffusion_config(), &trained(), &OPTIONS).unwrap();
    // Timesteps and guidance are rounded to bf16 too, in the original as here: these lose next to nothing by it.
    let lost = |timestep: f32| (half::bf16::from_f32(timestep).to_f32() - timestep).abs();
    let timesteps = flow.objective.schedule().timesteps();
    let index = (300..700).min_by(|a, b| lost(timesteps[*a]).total_cmp(&lost(timesteps[*b]))).unwrap();
    let gradients = |dtype: FloatDType| {
        let mut blocks = Recomputation::none();
        let embeds = |name, grid| {
            let embeds = flow.embeds(name, grid);
            ImageEmbeds::new(embeds.values.cast(dtype), embeds.grid).unwrap()
        };
        let (drawn, reference) = (embeds("in.embeds", GridThw::GENERATED), embeds("in.reference", GridThw::REFERENCE));
        let conditioning = decoder.condition(&drawn, Some(&reference), flow.size()).unwrap();
        let input = FlowMatchingInput {
            conditioning: &conditioning,
            pooled: flow.fixture.tensor::<2>("in.pooled").cast(dtype),
            latents: flow.fixture.tensor::<4>("in.latents").cast(dtype),
            noise: flow.fixture.tensor::<4>("in.noise").cast(dtype),
            timestep_indices: &[index],
            embedded_guidance: 2.0,
        };
        let loss = flow.objective.loss(&decoder.dit, input, &mut blocks);
        let mut sum = GradientSum::new();
        blocks.backward(&loss.total, |part| sum.add(part, &decoder, &EDITING_DECODER));
        (value(&loss.mse), sum)
    };
    let ((loss, rounded), (exact_loss, exact)) = (gradients(FloatDType::BF16), gradients(FloatDType::F32));
    assert!((loss / exact_loss - 1.0).abs() < 2e-2, "{loss}, not {exact_loss}");
    check_bf16(&rounded, &exact, &module_layout(&decoder, &EDITING_DECODER));
}

#[test]
fn a_trained_vision_encoder_learns_from_input_images_but_not_from_answers() {
    let fixture = Fixture::open("objective_ar");
    let (encoder, model) = (vision_encoder(), ar_model());
    let samples = ar_samples(&fixture, &encoder);
    let drawing = TrainingBatch::new(vec![samples[1].clone()], &ar_config()).unwrap();
    assert!(gradient_sum(loss_again(&model, &drawing), &encoder, &VISION_NAMES).is_empty());
    let editing = TrainingBatch::new(vec![samples[0].clone()], &ar_config()).unwrap();
    let sum = gradient_sum(loss_again(&model, &editing), &encoder, &VISION_NAMES);
    assert_eq!(sum.len(), module_layout(&encoder, &VISION_NAMES).len());
    assert!(sum.norm().unwrap() > 0.0);
}

#[test]
fn padding_changes_no_loss() {
    let fixture = Fixture::open("objective_ar");
    let (encoder, model, config) = (vision_encoder(), ar_model(), ar_config());
    let samples = ar_samples(&fixture, &encoder);
    let losses = |samples: &[TrainingSample]| {
        let batch = TrainingBatch::new(samples.to_vec(), &config).unwrap();
        let loss = ArObjective::default().loss(&model, &batch, FloatDType::F32).unwrap();
        (
            value(&loss.cross_entropy),
            value(&loss.image),
            batch.num_text_labels() as f32,
            batch.num_image_labels() as f32,
        )
    };
    let both = losses(&samples);
    let [edit, drawing] = [losses(&samples[..1]), losses(&samples[1..])];
    let cross_entropy = (edit.0 * edit.2 + drawing.0 * drawing.2) / both.2;
    let image = (edit.1 * edit.3 + drawing.1 * drawing.3) / both.3;
    assert!((both.0 - cross_entropy).abs() < 1e-5 * cross_entropy, "{} and {cross_entropy}", both.0);
    assert!((both.1 - image).abs() < 1e-5 * image, "{} and {image}", both.1);
}

/// The parts of a flow-matching fixture that both decoders share.
struct Flow {
    fixture: Fixture,
    objective: FlowMatching,
    index: usize,
}

impl Flow {
    fn open(name: &str) -> Self {
        let fixture = Fixture::open(name);
        let (objective, index) = (FlowMatching::new(), fixture.meta::<usize>("timestep_index"));
        let schedule = objective.schedule();
        assert_eq!([schedule.sigmas()[index]], fixture.floats("out.sigma")[..]);
        assert_eq!([schedule.timesteps()[index]], fixture.floats("out.timestep")[..]);
        assert!((objective.weights()[index] - fixture.floats("out.weight")[0]).abs() < 1e-6);
        Self { fixture, objective, index }
    }

    fn embeds(&self, name: &str, grid: GridThw) -> ImageEmbeds {
        ImageEmbeds::new(self.fixture.tensor::<3>(name).autodiff(), grid).unwrap()
    }

    fn size(&self) -> LatentSize {
        LatentSize::of(&self.fixture.tensor::<4>("in.latents"))
    }

    /// The gradients of a decoder whose transformer and condition tokens these are.
    fn gradients<'a>(
        &self,
        (decoder, names): (&impl Module, &WeightNames),
        dit: &'a Dit,
        conditioning: &Conditioning,
        mut blocks: Recomputation<'a>,
    ) -> GradientSum {
        let text_ids: Vec<f32> = conditioning.text_ids.iter().flatten().copied().collect();
        assert_eq!(text_ids, self.fixture.floats("in.text_ids"));
        let [latents, noise] = ["in.latents", "in.noise"].map(|name| self.fixture.tensor::<4>(name));
        let noisy = self.objective.add_noise(&[self.index], latents.clone(), noise.clone());
        assert_close(&noisy, &self.fixture.floats("out.noisy"), 1e-6);
        let input = FlowMatchingInput {
            conditioning,
            pooled: self.fixture.tensor("in.pooled"),
            latents,
            noise,
            timestep_indices: &[self.index],
            embedded_guidance: self.fixture.meta("guidance"),
        };
        let loss = self.objective.loss(dit, input, &mut blocks);
        assert_close(&loss.total, &self.fixture.floats("out.loss"), LOSS_TOLERANCE);
        let weight = self.objective.weights()[self.index];
        assert_close(&(loss.mse * weight), &self.fixture.floats("out.loss"), LOSS_TOLERANCE);
        let mut sum = GradientSum::new();
        blocks.backward(&loss.total, |part| sum.add(part, decoder, names));
        sum
    }

    /// Compares the gradients, and the parameters of the connector after one step of AdamW.
    fn check<M: Module>(&self, decoder: M, names: &WeightNames, sum: GradientSum, connector: &[&str]) {
        const DIT: [&str; 4] = [
            "pipe.dit.x_embedder.bias",
            "pipe.dit.blocks.0.attn.norm_q_a.weight",
            "pipe.dit.single_blocks.2.to_qkv_mlp.bias",
            "pipe.dit.final_norm_out.linear.bias",
        ];
        let whole: Vec<&str> = connector.iter().chain(&DIT).copied().collect();
        check_gradients(&sum, &self.fixture, &whole, &module_layout(&decoder, names));

        #[derive(serde::Deserialize)]
        struct AdamW {
            lr: f64,
            betas: [f32; 2],
            eps: f32,
            weight_decay: f32,
        }
        let AdamW { lr, betas, eps, weight_decay } = self.fixture.meta("adamw");
        let options = AdamWOptions { betas, eps, weight_decay };
        assert_eq!(options, AdamWOptions::default());
        let decoder = Optimizer::new(options).step(decoder, names, sum, lr);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stepped.safetensors");
        nexus::checkpoint::save_module(&decoder, names, &path, None).unwrap();
        let stepped = Checkpoint::open(&path).unwrap();
        for name in connector {
            let weights: Vec<f32> = stepped.data(name).unwrap().try_into_vec_as().unwrap();
            let expected = self.fixture.floats(&format!("out.adamw.{name}"));
            let gradient = self.fixture.floats(&format!("out.grad.{name}"));
            let largest = gradient.iter().fold(0f32, |max, value| max.max(value.abs()));
            // The first step has the size of the learning rate whatever the gradient is: where that is all rounding,
            // so is its direction.
            for ((weight, expected), gradient) in weights.iter().zip(expected).zip(gradient) {
                let allowed = if gradient.abs() > 1e-3 * largest { 1e-6 } else { 2.0 * lr as f32 };
                assert!((weight - expected).abs() <= allowed, "{name}: {weight}, not {expected}, along {gradient}");
            }
        }
    }
}

#[test]
fn the_generation_decoder_learns_as_in_pytorch() {
    let flow = Flow::open("objective_gen");
    let config = diffusion_config();
    let weights = checkpoint("generation_decoder.bin");
    let decoder = GenerationDecoder::load(&weights, &config, &trained(), &OPTIONS).unwrap();
    for blocks in [Recomputation::none(), Recomputation::of_blocks()] {
        let conditioning = decoder.condition(&flow.embeds("in.embeds", GridThw::GENERATED)).unwrap();
        let sum = flow.gradients((&decoder, &GENERATION_DECODER), &decoder.dit, &conditioning, blocks);
        flow.check(decoder.clone(), &GENERATION_DECODER, sum, &["adapter.0.weight", "adapter.4.bias"]);
    }
}

#[test]
fn the_editing_decoder_learns_as_in_pytorch() {
    let flow = Flow::open("objective_edit");
    let config = diffusion_config();
    let weights = checkpoint("edit_decoder.bin");
    let decoder = EditingDecoder::load(&weights, &config, &trained(), &OPTIONS).unwrap();
    let embeds = flow.embeds("in.embeds", GridThw::GENERATED);
    let reference = flow.embeds("in.reference", GridThw::REFERENCE);
    let connector = [
        "embedding_merger.layers.0.self_attn.q_proj.weight",
        "embedding_merger.layers.0.self_attn.q_proj.bias",
        "embedding_merger.projector.0.weight",
        "embedding_merger.projector.5.weight",
    ];
    for blocks in [Recomputation::none(), Recomputation::of_blocks()] {
        let conditioning = decoder.condition(&embeds, Some(&reference), flow.size()).unwrap();
        let sum = flow.gradients((&decoder, &EDITING_DECODER), &decoder.dit, &conditioning, blocks);
        flow.check(decoder.clone(), &EDITING_DECODER, sum, &connector);
    }
}
