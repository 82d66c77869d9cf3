//! Every stage on a device: inputs of the fixtures -> how far the outputs are from PyTorch's.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use burn::tensor::{DType, Tensor};
use nexus::{
    Device, DrawOptions, EditOptions, GenerateOptions, GridThw, Image, ImageEmbeds, ModelFiles, Nexus, Precision,
    Quantization,
    ar::{ArModel, KvCache},
    checkpoint::{LoadOptions, weight_bytes},
    data::ImageProcessor,
    diffusion::{
        EditingDecoder, GenerationDecoder, LatentSize,
        latents::patchify,
        transformer::{Dit, DitInput},
    },
    vision_encoder::VisionEncoder,
};
use nexus_core::testing::{Fixture, fixtures_dir, relative_drift};

use super::{hashes::hash, limits::Limits};

/// Where and with what the stages run.
#[derive(Clone)]
pub struct Setting {
    /// A model with the weights that the fixtures were made with.
    pub random: PathBuf,
    /// The model that was trained, for the whole way from prompt to picture.
    pub tiny: PathBuf,
    pub device: Device,
    pub precision: Precision,
    /// Of the language model and the transformers.
    pub quantization: Option<Quantization>,
}

/// Result of one stage.
#[derive(Debug, serde::Serialize)]
pub struct Verdict {
    pub stage: &'static str,
    /// Largest difference relative to the largest expected value; absent if the stage failed to run.
    pub drift: Option<f32>,
    pub limit: f32,
    pub seconds: f64,
    /// Why the stage failed to run.
    pub error: Option<String>,
}

impl Verdict {
    pub fn passes(&self) -> bool {
        self.drift.is_some_and(|drift| drift <= self.limit)
    }
}

type Run = fn(&Setting) -> Result<f32>;

/// One line of the certificate.
#[derive(Clone, Copy)]
pub struct Stage {
    pub name: &'static str,
    pub run: Run,
    pub limits: Limits,
}

/// All stages in the order of the data. The numbers are the largest drift measured: in bf16, in f16, with weights of 8 bits
/// and of 4; that of f16 on Mesa's software driver too.
pub const STAGES: [Stage; 15] = [
    Stage { name: "patching", run: patching, limits: Limits::EXACT },
    Stage { name: "vision encoder", run: vision_encoder, limits: Limits::of(1.5e-2, 1.8e-3, 0.0, 0.0) },
    Stage { name: "language model, prefill", run: prefill, limits: Limits::of(1.8e-2, 2.4e-3, 1.4e-2, 2.0e-1) },
    Stage { name: "language model, decoding", run: decoding, limits: Limits::of(2.3e-3, 3.3e-4, 2.2e-3, 5.3e-2) },
    Stage { name: "image block", run: image_block, limits: Limits::of(1.1e-2, 1.7e-3, 1.2e-2, 2.2e-1) },
    Stage { name: "adapter", run: adapter, limits: Limits::of(6.0e-3, 9.5e-4, 8.4e-3, 1.3e-1) },
    Stage { name: "embedding merger", run: merger, limits: Limits::of(9.5e-3, 1.6e-3, 2.4e-2, 2.5e-1) },
    Stage {
        name: "transformer, double blocks",
        run: double_blocks,
        limits: Limits::of(6.6e-3, 1.4e-3, 9.8e-3, 1.4e-1),
    },
    Stage {
        name: "transformer, single blocks",
        run: single_blocks,
        limits: Limits::of(8.1e-3, 9.8e-4, 4.7e-3, 6.7e-2),
    },
    Stage {
        name: "transformer, generation",
        run: generation_transformer,
        limits: Limits::of(7.2e-3, 1.1e-3, 8.4e-3, 1.2e-1),
    },
    Stage {
        name: "transformer, editing",
        run: editing_transformer,
        limits: Limits::of(1.0e-2, 1.1e-3, 8.7e-3, 1.8e-1),
    },
    Stage { name: "autoencoder", run: autoencoder, limits: Limits::of(1.9e-2, 2.1e-3, 0.0, 0.0) },
    Stage { name: "CLIP", run: clip, limits: Limits::of(8.4e-3, 1.0e-3, 0.0, 0.0) },
    Stage { name: "T5", run: t5, limits: Limits::of(1.0e-2, 1.0e-3, 0.0, 0.0) },
    Stage {
        name: "from prompt to picture",
        run: pictures,
        limits: Limits::of(2.0e-3, 1.5e-3, 8.5e-4, 7.0e-3).in_f32(2e-3),
    },
];

/// Runs a stage; what panics in a driver is a failed stage, not the end.
pub fn verify(stage: &Stage, setting: &Setting) -> Verdict {
    let started = Instant::now();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| (stage.run)(setting)));
    let (drift, error) = match result {
        Ok(Ok(drift)) => (Some(drift), None),
        Ok(Err(error)) => (None, Some(format!("{error:#}"))),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            (None, Some(text.unwrap_or_else(|| "panicked".to_string())))
        }
    };
    let limit = stage.limits.limit(setting.precision.compute, setting.quantization);
    Verdict { stage: stage.name, drift, limit, seconds: started.elapsed().as_secs_f64(), error }
}

impl Setting {
    fn options(&self) -> LoadOptions {
        LoadOptions { dtype: self.precision.weights, check_finite: false, quantization: None }
    }

    /// For the language model and the decoders.
    fn quantized(&self) -> LoadOptions {
        LoadOptions { quantization: self.quantization, ..self.options() }
    }

    fn files(&self) -> Result<ModelFiles> {
        Ok(ModelFiles::find(&self.random)?)
    }

    fn tensor<const D: usize>(&self, fixture: &Fixture, name: &str) -> Tensor<D> {
        self.place(fixture.tensor(name))
    }

    fn place<const D: usize>(&self, tensor: Tensor<D>) -> Tensor<D> {
        tensor.to_device(&self.device).cast(self.precision.compute)
    }

    fn embeds(&self, fixture: &Fixture, name: &str, grid: GridThw) -> Result<ImageEmbeds> {
        Ok(ImageEmbeds::new(self.tensor(fixture, name), grid)?)
    }

    fn encoder(&self) -> Result<VisionEncoder> {
        Ok(self.files()?.load_vision_encoder(&self.device, &self.options())?)
    }

    fn model(&self) -> Result<ArModel> {
        Ok(self.files()?.load_ar(&self.device, &self.quantized())?)
    }

    fn generation_decoder(&self) -> Result<GenerationDecoder> {
        Ok(self.files()?.load_generation_decoder(&self.device, &self.quantized())?)
    }

    fn editing_decoder(&self) -> Result<EditingDecoder> {
        Ok(self.files()?.load_editing_decoder(&self.device, &self.quantized())?)
    }
}

fn drift<const D: usize>(actual: Tensor<D>, fixture: &Fixture, name: &str) -> Result<f32> {
    let actual: Vec<f32> = actual.cast(DType::F32).into_data().try_into_vec_as().context("reading the result")?;
    Ok(relative_drift(&actual, &fixture.floats(name)))
}

/// The larger drift; NaN is infinite already.
fn worst(drifts: impl IntoIterator<Item = Result<f32>>) -> Result<f32> {
    drifts.into_iter().try_fold(0.0, |worst: f32, drift| Ok(worst.max(drift?)))
}

fn patching(setting: &Setting) -> Result<f32> {
    let processor = ImageProcessor::open(&setting.files()?.nexus)?;
    let file = fixtures_dir().join("preprocess.json");
    let fixture: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&file).context(file.display().to_string())?)?;
    let case = &fixture["cases"][0];
    let image = Image::open(fixtures_dir().join(case["file"].as_str().context("a picture")?))?;
    for (patches, key) in
        [(processor.reference_patches(&image)?, "reference_504"), (processor.target_patches(&image)?, "target_252")]
    {
        let bytes: Vec<u8> = patches.values.iter().flat_map(|value| value.to_le_bytes()).collect();
        if case[key]["patches"]["sha256"] != hash(&bytes) {
            return Ok(f32::INFINITY);
        }
    }
    Ok(0.0)
}

fn grids(fixture: &Fixture) -> Result<Vec<GridThw>> {
    let rows: Vec<[usize; 3]> = fixture.meta("grid_thw");
    rows.into_iter().map(|[t, h, w]| Ok(GridThw::new(t, h, w)?)).collect()
}

fn vision_encoder(setting: &Setting) -> Result<f32> {
    let encoder = setting.encoder()?;
    worst(["vision_81", "vision_odd"].map(|name| {
        let fixture = Fixture::open(name);
        let images = encoder.encode(setting.tensor(&fixture, "in.pixel_values"), &grids(&fixture)?)?;
        let values = Tensor::cat(images.into_iter().map(|image| image.values).collect(), 1);
        drift(values, &fixture, "out.embeds")
    }))
}

/// `[tokens][3]` of a fixture's `[3, tokens]`.
fn positions(fixture: &Fixture, name: &str) -> Vec<[i64; 3]> {
    let values = fixture.integers(name);
    let tokens = values.len() / 3;
    (0..tokens).map(|token| [0, 1, 2].map(|axis| values[axis * tokens + token])).collect()
}

fn images(setting: &Setting, fixture: &Fixture) -> Result<Vec<ImageEmbeds>> {
    let grids = grids(fixture)?;
    if grids.is_empty() {
        return Ok(vec![]);
    }
    Ok(setting.encoder()?.encode(setting.tensor(fixture, "in.pixel_values"), &grids)?)
}

fn prefill(setting: &Setting) -> Result<f32> {
    let (model, fixture) = (setting.model()?, Fixture::open("lm_forward"));
    let images = images(setting, &fixture)?;
    let embeds = model.embed(&fixture.ids("in.input_ids"), &images, setting.precision.compute)?;
    let hidden = model.forward(embeds, &positions(&fixture, "out.position_ids"), None);
    let [_, tokens, _] = hidden.dims();
    let last = model.logits(hidden.clone().narrow(1, tokens - 1, 1));
    worst([drift(model.predict_embeds(hidden), &fixture, "out.vision_head"), drift(last, &fixture, "out.logits_last")])
}

/// The reference's tokens one by one against the key-value cache, whatever this device would have chosen.
fn decoding(setting: &Setting) -> Result<f32> {
    let (model, fixture) = (setting.model()?, Fixture::open("gen_und"));
    let (prompt, ids) = (fixture.ids("in.input_ids"), fixture.ids("out.sequences"));
    let (images, positions) = (images(setting, &fixture)?, positions(&fixture, "out.positions"));
    let (mut cache, mut scores) = (KvCache::new(), Vec::new());
    for end in prompt.len()..ids.len() {
        let begin = if end == prompt.len() { 0 } else { end - 1 };
        let images = if begin == 0 { &images[..] } else { &[] };
        let embeds = model.embed(&ids[begin..end], images, setting.precision.compute)?;
        let hidden = model.forward(embeds, &positions[begin..end], Some(&mut cache));
        scores.push(model.logits(hidden.narrow(1, end - begin - 1, 1)).cast(DType::F32));
    }
    let scores: Vec<f32> = Tensor::cat(scores, 1).into_data().try_into_vec_as().context("reading the scores")?;
    let expected = fixture.floats("out.text_logits");
    ensure!(scores.len() == expected.len(), "{} scores instead of {}", scores.len(), expected.len());
    // Suppressed tokens are infinite in the reference.
    let (scores, expected): (Vec<f32>, Vec<f32>) =
        scores.into_iter().zip(expected).filter(|(_, expected)| expected.is_finite()).unzip();
    ensure!(!scores.is_empty(), "no scores");
    Ok(relative_drift(&scores, &expected))
}

fn image_block(setting: &Setting) -> Result<f32> {
    let (model, fixture) = (setting.model()?, Fixture::open("gen_t2i"));
    let (ids, positions) = (fixture.ids("out.sequences"), positions(&fixture, "out.positions"));
    let image = model.config().token_ids.image_token_id;
    let first = ids.iter().position(|&id| id == image).context("the fixture draws")?;
    let compute = setting.precision.compute;
    let embeds = Tensor::cat(vec![model.embed(&ids[..first], &[], compute)?, model.prefill_embeds(compute)], 1);
    let hidden = model.forward(embeds, &positions[..first + 81], None);
    drift(model.predict_embeds(hidden.narrow(1, first - 1, 81)), &fixture, "out.image_embeds")
}

fn adapter(setting: &Setting) -> Result<f32> {
    let fixture = Fixture::open("adapter");
    let embeds = setting.embeds(&fixture, "in.embeds", GridThw::GENERATED)?;
    drift(setting.generation_decoder()?.condition(&embeds)?.embeds, &fixture, "out.context")
}

fn merger(setting: &Setting) -> Result<f32> {
    let fixture = Fixture::open("merger");
    let target = setting.embeds(&fixture, "in.embeds", GridThw::GENERATED)?;
    let reference = setting.embeds(&fixture, "in.reference", GridThw::REFERENCE)?;
    let size = LatentSize { height: 64, width: 64 };
    let decoder = setting.editing_decoder()?;
    worst([
        drift(decoder.condition(&target, Some(&reference), size)?.embeds, &fixture, "out.context"),
        drift(decoder.condition(&target, None, size)?.embeds, &fixture, "out.context_without_reference"),
    ])
}

fn text_positions(fixture: &Fixture) -> Vec<[f32; 3]> {
    fixture.floats("in.text_ids").chunks(3).map(|triple| [triple[0], triple[1], triple[2]]).collect()
}

/// bf16 has no 3.5 among its guidances: the reference takes 3504 instead of 3500 there, so f32 computes this part.
fn conditioning(setting: &Setting, dit: &Dit, fixture: &Fixture) -> Tensor<2> {
    let guidance = fixture.meta("guidance");
    let pooled: Tensor<2> = fixture.tensor::<2>("in.pooled").to_device(&setting.device);
    dit.conditioning(&[fixture.meta("timestep")], guidance, pooled).cast(setting.precision.compute)
}

fn velocity(setting: &Setting, dit: &Dit, name: &str) -> Result<f32> {
    let fixture = Fixture::open(name);
    let latents: Tensor<4> = setting.tensor(&fixture, "in.latents");
    let rotary = dit.rotary(&text_positions(&fixture), LatentSize::of(&latents), latents.dtype(), &setting.device);
    let modulations = dit.modulations(&conditioning(setting, dit, &fixture));
    let context = dit.context(setting.tensor::<3>(&fixture, "in.context"));
    let velocity = dit.forward(DitInput { latents, context, modulations: &modulations, rotary: &rotary }, None);
    drift(velocity, &fixture, "out.velocity")
}

fn generation_transformer(setting: &Setting) -> Result<f32> {
    velocity(setting, &setting.generation_decoder()?.dit, "dit_gen")
}

fn editing_transformer(setting: &Setting) -> Result<f32> {
    let dit = setting.editing_decoder()?.dit;
    worst([velocity(setting, &dit, "dit_edit"), velocity(setting, &dit, "dit_edit_noref")])
}

fn double_blocks(setting: &Setting) -> Result<f32> {
    let (dit, fixture) = (setting.generation_decoder()?.dit, Fixture::open("dit_gen"));
    let latents: Tensor<4> = setting.tensor(&fixture, "in.latents");
    let rotary = dit.rotary(&text_positions(&fixture), LatentSize::of(&latents), latents.dtype(), &setting.device);
    let modulations = dit.modulations(&conditioning(setting, &dit, &fixture));
    let mut image = dit.x_embedder.forward(patchify(latents));
    let mut text = dit.context(setting.tensor::<3>(&fixture, "in.context"));
    let mut drifts = Vec::new();
    for (index, block) in dit.blocks.iter().enumerate() {
        (image, text) = block.forward(image, text, &modulations.double[index], &rotary);
        drifts.push(drift(image.clone(), &fixture, &format!("tap.blocks.{index}.image")));
        drifts.push(drift(text.clone(), &fixture, &format!("tap.blocks.{index}.text")));
    }
    worst(drifts)
}

/// Single blocks from what the reference's double blocks gave, so that a fault before them is not theirs.
fn single_blocks(setting: &Setting) -> Result<f32> {
    let (dit, fixture) = (setting.generation_decoder()?.dit, Fixture::open("dit_gen"));
    let size = LatentSize::of(&fixture.tensor::<4>("in.latents"));
    let dtype = DType::from(setting.precision.compute);
    let rotary = dit.rotary(&text_positions(&fixture), size, dtype, &setting.device);
    let modulations = dit.modulations(&conditioning(setting, &dit, &fixture));
    let last = dit.blocks.len() - 1;
    let of = |part: &str| setting.tensor::<3>(&fixture, &format!("tap.blocks.{last}.{part}"));
    let (text, image) = (of("text"), of("image"));
    let ([_, text_tokens, _], [_, image_tokens, _]) = (text.dims(), image.dims());
    let mut joined = Tensor::cat(vec![text, image], 1);
    let mut drifts = Vec::new();
    for (index, block) in dit.single_blocks.iter().enumerate() {
        joined = block.forward(joined, &modulations.single[index], &rotary);
        let (text, image) =
            (joined.clone().narrow(1, 0, text_tokens), joined.clone().narrow(1, text_tokens, image_tokens));
        drifts.push(drift(text, &fixture, &format!("tap.single_blocks.{index}.text")));
        drifts.push(drift(image, &fixture, &format!("tap.single_blocks.{index}.image")));
    }
    worst(drifts)
}

fn autoencoder(setting: &Setting) -> Result<f32> {
    let (files, fixture) = (setting.files()?, Fixture::open("ae"));
    let autoencoder = files.load_autoencoder(&setting.device, &setting.options())?;
    worst([
        drift(autoencoder.encode(setting.tensor(&fixture, "in.image"), None), &fixture, "out.latents"),
        drift(autoencoder.decode(setting.tensor(&fixture, "in.latents"), None), &fixture, "out.image"),
    ])
}

fn clip(setting: &Setting) -> Result<f32> {
    let (files, fixture) = (setting.files()?, Fixture::open("clip"));
    let clip = files.load_clip(&setting.device, &setting.options())?;
    let pooled: Vec<Tensor<2>> = fixture
        .ids("in.input_ids")
        .chunks(77)
        .map(|ids| Ok(clip.pooled(ids, setting.precision.compute)?))
        .collect::<Result<_>>()?;
    drift(Tensor::cat(pooled, 0), &fixture, "out.pooled")
}

fn t5(setting: &Setting) -> Result<f32> {
    let (files, fixture) = (setting.files()?, Fixture::open("t5"));
    let t5 = files.load_t5(&setting.device, &setting.options())?;
    drift(t5.encode(&fixture.ids("in.input_ids"), setting.precision.compute)?, &fixture, "out.hidden")
}

/// What the trained model is asked to draw, and the picture to change.
const PROMPT: &str = "a red circle in the top left and a green square in the bottom right";
const INSTRUCTION: &str = "Change the background to pink.";

/// Files of the pictures that the CPU draws in f32.
pub const PICTURES: [&str; 2] = ["verify_generate.png", "verify_edit.png"];

/// Draws and edits a picture with the trained model.
pub fn draw(setting: &Setting) -> Result<[Image; 2]> {
    let Precision { weights, compute } = setting.precision;
    let mut loader = Nexus::loader(&setting.tiny).weights_dtype(weights).compute_dtype(compute);
    if let Some(quantization) = setting.quantization {
        loader = loader.quantization(quantization);
    }
    let nexus = loader.load(&setting.device, ())?;
    let defaults = nexus.default_options().clone();
    let options = GenerateOptions { draw: DrawOptions { steps: 8, ..defaults.generate.draw }, ..defaults.generate };
    let drawn = nexus.generate(PROMPT, &options, ())?.image;
    let options = EditOptions { draw: DrawOptions { steps: 8, ..defaults.edit.draw }, ..defaults.edit };
    let edited = nexus.edit(&Image::open(setting.tiny.join("sample.png"))?, INSTRUCTION, &options, ())?.image;
    Ok([drawn, edited])
}

/// Bytes that the weights of the trained model's large stages take, by stage.
pub fn weights_in_memory(setting: &Setting) -> Result<Vec<(&'static str, usize)>> {
    let setting = Setting { random: setting.tiny.clone(), ..setting.clone() };
    Ok(vec![
        ("language model", weight_bytes(&setting.model()?)),
        ("generation decoder", weight_bytes(&setting.generation_decoder()?)),
        ("editing decoder", weight_bytes(&setting.editing_decoder()?)),
    ])
}

/// Root mean square difference of the pictures from those of the CPU, relative to the range of a value.
fn pictures(setting: &Setting) -> Result<f32> {
    let drawn = draw(setting)?;
    worst(drawn.iter().zip(PICTURES).map(|(picture, name)| difference(picture, &fixtures_dir().join(name))))
}

fn difference(picture: &Image, expected: &Path) -> Result<f32> {
    let expected = Image::open(expected)?;
    let size = |image: &Image| (image.width_px(), image.height_px());
    ensure!(size(picture) == size(&expected), "a picture of {:?} instead of {:?}", size(picture), size(&expected));
    let squares = picture.rgb().iter().zip(expected.rgb()).map(|(a, b)| (f32::from(*a) - f32::from(*b)).powi(2));
    Ok((squares.sum::<f32>() / picture.rgb().len() as f32).sqrt() / 255.0)
}
