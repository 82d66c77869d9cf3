//! Models for measuring: sizes -> modules with random bf16 weights, made in memory or read from files that were written
//! once under the released names.

use std::{collections::HashMap, fs, io, path::Path};

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{DType, Distribution, Tensor, TensorData},
};
use half::bf16;
use nexus::{
    Precision,
    ar::{ArConfig, ArModel, RopeScaling, TokenIds},
    checkpoint::{
        Checkpoint, CheckpointError, LoadDType, LoadOptions, WeightNames, load_module, module_layout, save_module,
    },
    core::nn::DecoderLayer,
    diffusion::{
        Autoencoder, GenerationDecoder,
        config::{AutoencoderConfig, DiffusionConfig, DitConfig, MergerConfig, MergerVisionConfig},
        transformer::{Dit, DoubleBlock, SingleBlock},
        weights::{AUTOENCODER, FLUX1_DEV, GENERATION_DECODER},
    },
    vision_encoder::{VisionConfig, VisionEncoder},
};
use serde_json::json;

use super::place::device;

const LANGUAGE_MODEL: &str = "Nexus-GenV2";
const VISION_SHARD: &str = "model-00001-of-00002.safetensors";
const AR_SHARD: &str = "model-00002-of-00002.safetensors";
const DECODER: &str = "Nexus-GenV2/generation_decoder.safetensors";
const FLUX: &str = "FLUX/FLUX.1-dev/flux1-dev.safetensors";
const AE: &str = "FLUX/FLUX.1-dev/ae.safetensors";
const DECODER_LAYER: &str = "layers/decoder_layer.safetensors";
const DOUBLE_BLOCK: &str = "layers/double_block.safetensors";
const SINGLE_BLOCK: &str = "layers/single_block.safetensors";

#[cfg(feature = "train")]
/// Dtype of weights that take steps.
const TRAINED: LoadDType = LoadDType::Convert(burn::tensor::FloatDType::F32);

/// Names of single layers: those inside a block, as the decoders' files have them.
const LAYER: WeightNames = WeightNames { prefix: "", renames: &[("in_layer", "0"), ("out_layer", "2")], unused: &[] };

/// The language model: a seventh of the released width, 8 of 28 layers.
pub fn ar_config() -> ArConfig {
    ArConfig {
        hidden_size: 1024,
        intermediate_size: 4096,
        num_hidden_layers: 8,
        num_attention_heads: 8,
        num_key_value_heads: 2,
        vocab_size: 32_000,
        rope_scaling: RopeScaling { mrope_section: [16, 24, 24] },
        token_ids: TokenIds {
            vision_start_token_id: 31_009,
            vision_end_token_id: 31_010,
            image_token_id: 31_012,
            eos_token_id: 31_002,
            bos_token_id: 31_000,
        },
        ..ArConfig::released()
    }
}

/// The vision encoder: half of the released width, 8 of 32 blocks, two of them with full attention.
pub fn vision_config() -> VisionConfig {
    VisionConfig {
        depth: 8,
        hidden_size: 640,
        intermediate_size: 1712,
        num_heads: 8,
        out_hidden_size: ar_config().hidden_size,
        fullatt_block_indexes: vec![3, 7],
        ..VisionConfig::default()
    }
}

/// The diffusion transformer: a third of the released width, 4 of 19 double blocks, 8 of 38 single ones.
pub fn diffusion_config() -> DiffusionConfig {
    let ar = ar_config();
    DiffusionConfig {
        merger: MergerConfig {
            hidden_size: ar.hidden_size,
            intermediate_size: ar.intermediate_size,
            num_attention_heads: ar.num_attention_heads,
            num_key_value_heads: ar.num_key_value_heads,
            rms_norm_eps: ar.rms_norm_eps,
            rope_theta: ar.rope_theta,
            rope_scaling: nexus::diffusion::config::RopeScaling { mrope_section: ar.rope_scaling.mrope_section },
            vision_config: MergerVisionConfig::default(),
        },
        dit: DitConfig {
            dim: 1024,
            num_heads: 8,
            num_double: 4,
            num_single: 8,
            context_dim: 1024,
            ..DitConfig::default()
        },
    }
}

/// Where weights come from.
#[derive(Debug, Clone, Copy)]
pub enum Weights<'a> {
    /// Made in memory.
    Random,
    /// Read from a folder that [`write`] made.
    Files(&'a Path),
}

impl Weights<'_> {
    pub fn ar(&self) -> ArModel {
        self.fill(ArModel::new(&ar_config(), &device()).unwrap(), LANGUAGE_MODEL, &nexus::ar::NAMES)
    }

    pub fn vision_encoder(&self) -> VisionEncoder {
        let encoder = VisionEncoder::new(&vision_config(), &device());
        self.fill(encoder, LANGUAGE_MODEL, &nexus::vision_encoder::NAMES)
    }

    pub fn decoder(&self) -> GenerationDecoder {
        self.fill(GenerationDecoder::new(&diffusion_config(), &device()), DECODER, &GENERATION_DECODER)
    }

    /// At the released size.
    pub fn autoencoder(&self) -> Autoencoder {
        self.fill(Autoencoder::new(&AutoencoderConfig::default(), &device()), AE, &AUTOENCODER)
    }

    /// One layer of the language model at the released size.
    pub fn decoder_layer(&self) -> DecoderLayer {
        self.fill(ArConfig::released().layer().init(&device()), DECODER_LAYER, &LAYER)
    }

    /// One double-stream block of the transformer at the released size.
    pub fn double_block(&self) -> DoubleBlock {
        let DitConfig { dim, num_heads, .. } = DitConfig::default();
        self.fill(DoubleBlock::new(dim, num_heads, &device()), DOUBLE_BLOCK, &LAYER)
    }

    /// One single-stream block of the transformer at the released size.
    pub fn single_block(&self) -> SingleBlock {
        let DitConfig { dim, num_heads, .. } = DitConfig::default();
        self.fill(SingleBlock::new(dim, num_heads, &device()), SINGLE_BLOCK, &LAYER)
    }

    /// The released language model, its random weights made on the device: 15 GB in bf16.
    pub fn released_ar() -> ArModel {
        ArModel::new(&ArConfig::released(), &device()).unwrap().map(&mut RandomOnDevice::new())
    }

    /// The released transformer, its random weights made on the device: 24 GB in bf16.
    pub fn released_dit() -> Dit {
        Dit::new(&DitConfig::default(), &device()).map(&mut RandomOnDevice::new())
    }

    #[cfg(feature = "train")]
    /// The language model in f32, with gradients.
    pub fn trained_ar(&self) -> ArModel {
        let model = ArModel::new(&ar_config(), &device().autodiff()).unwrap();
        self.fill_as(model, LANGUAGE_MODEL, &nexus::ar::NAMES, TRAINED)
    }

    #[cfg(feature = "train")]
    /// The decoder in f32, with gradients.
    pub fn trained_decoder(&self) -> GenerationDecoder {
        let decoder = GenerationDecoder::new(&diffusion_config(), &device().autodiff());
        self.fill_as(decoder, DECODER, &GENERATION_DECODER, TRAINED)
    }

    fn fill<M: Module>(&self, module: M, file: &str, names: &WeightNames) -> M {
        self.fill_as(module, file, names, Precision::of(&device()).weights)
    }

    fn fill_as<M: Module>(&self, module: M, file: &str, names: &WeightNames, dtype: LoadDType) -> M {
        match self {
            Self::Random => module.map(&mut RandomBf16 { state: file.len() as u64, dtype }),
            Self::Files(dir) => {
                let checkpoint = Checkpoint::open(dir.join(file)).unwrap();
                load_module(module, &checkpoint, names, &LoadOptions { dtype, ..LoadOptions::default() }).unwrap()
            }
        }
    }
}

/// Writes all models with random weights, in the released layout, for this program and others to read.
pub fn write(dir: &Path) -> Result<(), CheckpointError> {
    let io = |path: &Path, result: io::Result<()>| result.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let language_model = dir.join(LANGUAGE_MODEL);
    for folder in [LANGUAGE_MODEL, "FLUX/FLUX.1-dev", "layers"].map(|name| dir.join(name)) {
        io(&folder, fs::create_dir_all(&folder));
    }
    let save_json = |name: &str, value: serde_json::Value| {
        let path = language_model.join(name);
        io(&path, fs::write(&path, value.to_string()));
    };
    let weights = Weights::Random;
    let (encoder, ar) = (weights.vision_encoder(), weights.ar());
    let shard = |name: &'static str, layout: Vec<(String, Vec<usize>)>| {
        layout.into_iter().map(move |(tensor, _)| (tensor, name)).collect::<HashMap<_, _>>()
    };
    let mut weight_map = shard(VISION_SHARD, module_layout(&encoder, &nexus::vision_encoder::NAMES));
    weight_map.extend(shard(AR_SHARD, module_layout(&ar, &nexus::ar::NAMES)));
    save_json("model.safetensors.index.json", json!({ "metadata": {}, "weight_map": weight_map }));
    let mut config = json!(ar_config());
    config["vision_config"] = json!(vision_config());
    save_json("config.json", config);
    save_json("decoder_config.json", json!(diffusion_config().dit));
    save_module(&encoder, &nexus::vision_encoder::NAMES, &language_model.join(VISION_SHARD), None)?;
    save_module(&ar, &nexus::ar::NAMES, &language_model.join(AR_SHARD), None)?;
    let decoder = weights.decoder();
    save_module(&decoder, &GENERATION_DECODER, &dir.join(DECODER), None)?;
    // The same transformer under the names that other FLUX programs know, but with our order of the last modulation.
    save_module(&decoder.dit, &FLUX1_DEV, &dir.join(FLUX), None)?;
    save_module(&weights.autoencoder(), &AUTOENCODER, &dir.join(AE), None)?;
    save_module(&weights.decoder_layer(), &LAYER, &dir.join(DECODER_LAYER), None)?;
    save_module(&weights.double_block(), &LAYER, &dir.join(DOUBLE_BLOCK), None)?;
    save_module(&weights.single_block(), &LAYER, &dir.join(SINGLE_BLOCK), None)?;
    write_released(&dir.join("released"));
    Ok(())
}

/// What other programs need to make random weights of the released models: names, shapes, configurations.
fn write_released(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    let save = |name: &str, value: serde_json::Value| fs::write(dir.join(name), value.to_string()).unwrap();
    let shapes = |layout: Vec<(String, Vec<usize>)>| json!(layout.into_iter().collect::<HashMap<_, _>>());
    let config = DiffusionConfig { dit: DitConfig::default(), ..diffusion_config() };
    let mut dit = module_layout(&GenerationDecoder::new(&config, &device()), &GENERATION_DECODER);
    dit.retain(|(name, _)| name.starts_with("pipe.dit."));
    save("ar.json", shapes(module_layout(&ArModel::new(&ArConfig::released(), &device()).unwrap(), &nexus::ar::NAMES)));
    save("dit.json", shapes(dit));
    save("config.json", json!(ArConfig::released()));
    save("decoder_config.json", json!(DitConfig::default()));
}

/// Gives every matrix values that keep the size of activations, made where they are used; vectors stay as they begin.
struct RandomOnDevice {
    dtype: DType,
}

impl RandomOnDevice {
    fn new() -> Self {
        let dtype = match Precision::of(&device()).weights {
            LoadDType::Convert(dtype) => dtype.into(),
            LoadDType::AsStored => DType::BF16,
        };
        Self { dtype }
    }
}

impl ModuleMapper for RandomOnDevice {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (shape, device, id) = (param.lazy_shape(), param.lazy_device(), param.id);
        let values = if D == 1 {
            param.val()
        } else {
            let limit = (3.0 / shape.as_slice()[1..].iter().product::<usize>() as f64).sqrt();
            Tensor::random(shape, Distribution::Uniform(-limit, limit), &device)
        };
        param.transform_for_load(values.cast(self.dtype), id)
    }
}

/// Gives every parameter values and the dtype of the released files: matrices that keep the size of activations, and
/// vectors (biases, weights of norms) that differ a little from what they start with.
struct RandomBf16 {
    state: u64,
    /// What the values are stored in.
    dtype: LoadDType,
}

impl RandomBf16 {
    /// Uniform in -1..1 (SplitMix64).
    fn next(&mut self) -> f32 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

impl ModuleMapper for RandomBf16 {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (shape, device, id) = (param.lazy_shape(), param.lazy_device(), param.id);
        let values: Vec<bf16> = match D {
            1 => {
                let start = param.val().into_data().try_into_vec::<f32>().unwrap();
                start.into_iter().map(|value| bf16::from_f32(value + 0.1 * self.next())).collect()
            }
            _ => {
                let inputs: usize = shape.as_slice()[1..].iter().product();
                let limit = (3.0 / inputs as f32).sqrt();
                (0..shape.num_elements()).map(|_| bf16::from_f32(limit * self.next())).collect()
            }
        };
        let data = TensorData::new(values, shape);
        let dtype = match self.dtype {
            LoadDType::Convert(dtype) => dtype.into(),
            LoadDType::AsStored if device.supports_dtype(DType::BF16) => DType::BF16,
            LoadDType::AsStored => DType::F32,
        };
        param.transform_for_load(Tensor::from_data(data.convert_dtype(dtype), (&device, dtype)), id)
    }
}
