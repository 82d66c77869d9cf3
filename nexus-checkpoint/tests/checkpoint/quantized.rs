//! Quantised weights and checkpoints: what is quantised while it is loaded, and what a quantised module cannot do.

use burn::module::{Initializer, Module, Param, Quantizer};
use burn::tensor::quantization::{Calibration, QuantScheme, QuantValue};
use burn::tensor::{DType, Device, Tensor, TensorData};
use nexus_checkpoint::{
    Checkpoint, CheckpointError, LoadOptions, Quantization, WeightNames, load_module, save_module, write_safetensors,
};

#[derive(Module, Debug)]
struct Linear {
    weight: Param<Tensor<2>>,
    bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    fn new(inputs: usize, outputs: usize, device: &Device) -> Self {
        let bias = Initializer::Uniform { min: -1.0, max: 1.0 }.init([outputs], device);
        // As small as weights of models are, which the tolerances below are for.
        let weight = Initializer::Normal { mean: 0.0, std: 0.02 }.init([outputs, inputs], device);
        Self { weight, bias: Some(bias) }
    }
}

#[derive(Module, Debug)]
struct Embedding {
    weight: Param<Tensor<2>>,
}

fn matrix(shape: [usize; 2], device: &Device) -> Param<Tensor<2>> {
    Initializer::Uniform { min: -1.0, max: 1.0 }.init(shape, device)
}

#[test]
fn quantises_the_weights_of_linear_layers_alone() {
    #[derive(Module, Debug)]
    struct Layers {
        table: Embedding,
        linear: Linear,
        short: Linear,
        matrix: Param<Tensor<2>>,
    }
    let device = Device::flex();
    let layers = Layers {
        table: Embedding { weight: matrix([4, 64], &device) },
        linear: Linear::new(64, 6, &device),
        short: Linear::new(7, 6, &device),
        matrix: matrix([3, 64], &device),
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layers.safetensors");
    save_module(&layers, &WeightNames::default(), &path, None).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    for (quantization, tolerance) in [(Quantization::Q8, 1e-3), (Quantization::Q4, 1e-2)] {
        let options = LoadOptions { quantization: Some(quantization), ..Default::default() };
        let loaded = load_module(layers.clone(), &checkpoint, &WeightNames::default(), &options).unwrap();
        let quantized = loaded.linear.weight.val();
        let (DType::QFloat(found), scheme) = (quantized.dtype(), quantization.scheme(64).unwrap()) else {
            panic!("{:?}", quantized.dtype());
        };
        assert_eq!((found.value, found.block_size()), (scheme.value, scheme.block_size()));
        let difference = (quantized.dequantize() - layers.linear.weight.val()).abs().max().into_scalar::<f32>();
        assert!(difference > 0.0 && difference < tolerance, "{difference}");
        for (kept, original) in [
            (loaded.table.weight.val(), layers.table.weight.val()),
            (loaded.short.weight.val(), layers.short.weight.val()),
            (loaded.matrix.val(), layers.matrix.val()),
        ] {
            assert_eq!(kept.into_data(), original.into_data());
        }
        let bias = |layers: &Layers| layers.linear.bias.as_ref().unwrap().val().into_data();
        assert_eq!(bias(&loaded), bias(&layers));
    }
}

#[test]
fn loads_into_a_quantised_module_and_refuses_to_save_one() {
    #[derive(Module, Debug)]
    struct One {
        w: Param<Tensor<2>>,
    }
    let device = Device::flex();
    let scheme = QuantScheme::default().with_value(QuantValue::Q8S);
    let mut quantizer = Quantizer::new(Calibration::MinMax, scheme);
    let module = One { w: matrix([8, 32], &device) }.quantize_weights(&mut quantizer);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("w.safetensors");
    let saved = save_module(&module, &WeightNames::default(), &path, None);
    assert!(matches!(saved, Err(CheckpointError::UnsupportedDType { .. })), "{saved:?}");
    let values = TensorData::new((0..8 * 32).map(|value| value as f32).collect(), [8, 32]);
    write_safetensors(&path, vec![("w".to_string(), values.clone())], None).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let loaded = load_module(module, &checkpoint, &WeightNames::default(), &LoadOptions::default()).unwrap();
    assert_eq!(loaded.w.val().into_data(), values);
}
