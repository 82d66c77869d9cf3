//! Tensors that come from elsewhere: embeddings and noise of other devices and dtypes, drawn and read from files.

use burn::tensor::{DType, FloatDType, Tensor, TensorData};
use nexus::{
    DrawOptions, DrawWith, GridThw, Image, ImageEmbeds, Nexus, Noise,
    checkpoint::{LoadDType, write_safetensors},
    core::EmbedsError,
};
use nexus_core::testing::{cpu, device, ramp, random_models_dir};

/// The same values as another tensor would have them.
struct Elsewhere {
    what: &'static str,
    embeds: fn(TensorData) -> Tensor<3>,
    noise: fn(TensorData) -> Tensor<4>,
}

/// Makes a tensor of any rank on a device in a dtype.
macro_rules! elsewhere {
    ($what:literal, $device:expr, $dtype:expr) => {
        Elsewhere {
            what: $what,
            embeds: |data| Tensor::from_data(data, (&$device, $dtype)),
            noise: |data| Tensor::from_data(data, (&$device, $dtype)),
        }
    };
}

#[test]
fn embeddings_and_noise_are_drawn_wherever_they_were_made() {
    let loader = Nexus::loader(random_models_dir()).compute_dtype(FloatDType::F32);
    let nexus = loader.weights_dtype(LoadDType::Convert(FloatDType::F32)).load(&device(), ()).unwrap();
    let image = Image::from_rgb8(252, 252, (0..3 * 252 * 252).map(|i| (i % 251) as u8).collect()).unwrap();
    // Values that every dtype below holds exactly.
    let rounded = |data: TensorData| data.convert_dtype(DType::BF16).convert_dtype(DType::F32);
    let embeds = nexus.embed(&image, 252 * 252, ()).unwrap();
    let reference = nexus.reference(&image, ()).unwrap();
    let options = DrawOptions { width: 32, height: 32, steps: 1, ..DrawOptions::default() };
    let first = nexus.draw(&embeds, DrawWith::GenerationDecoder, &options, ()).unwrap();
    let noise = rounded(ramp(first.latents.dims(), 3).into_data());
    let [values, reference_values] = [&embeds, &reference].map(|embeds| rounded(embeds.values.to_data()));

    let draw = |from: &Elsewhere| {
        let values = (from.embeds)(values.clone());
        let (dtype, place) = (values.dtype(), values.device());
        let embeds = ImageEmbeds::new(values, embeds.grid).unwrap();
        let reference = ImageEmbeds::new((from.embeds)(reference_values.clone()), reference.grid).unwrap();
        let options = DrawOptions { noise: Noise::Latents((from.noise)(noise.clone())), ..options.clone() };
        let with = DrawWith::EditingDecoder { reference: Some(&reference) };
        let pictures = [DrawWith::GenerationDecoder, with].map(|with| nexus.draw(&embeds, with, &options, ()).unwrap());
        for picture in &pictures {
            assert_eq!((picture.embeds.values.dtype(), picture.embeds.values.device()), (dtype, place.clone()));
            assert_eq!((picture.latents.dtype(), picture.latents.device()), (DType::F32, device()));
        }
        pictures.map(|picture| (picture.latents.into_data(), picture.image))
    };
    let expected = draw(&elsewhere!("where the model is", device(), DType::F32));
    assert_ne!(expected[0].1, expected[1].1);
    for from in [
        elsewhere!("the CPU, f32", cpu(), DType::F32),
        elsewhere!("the CPU, f64", cpu(), DType::F64),
        elsewhere!("the CPU, bf16", cpu(), DType::BF16),
        elsewhere!("the autodiff device, f32", device().autodiff(), DType::F32),
        elsewhere!("the autodiff CPU, f64", cpu().autodiff(), DType::F64),
    ] {
        assert!(draw(&from) == expected, "{}", from.what);
    }
}

#[test]
fn embeddings_of_a_file_keep_their_dtype_where_the_device_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("embeds.safetensors");
    let grid = TensorData::from([1i64, 2, 4]);
    let values = TensorData::new((0..2 * 3).map(|i| i as f32 / 4.0).collect(), [1, 2, 3]);
    let write = |dtype| {
        let tensors = [("grid_thw", grid.clone()), ("values", values.clone().convert_dtype(dtype))];
        write_safetensors(&path, tensors.map(|(name, data)| (name.to_string(), data)).into(), None).unwrap();
        ImageEmbeds::load(&path, &device())
    };
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        let embeds = write(dtype).unwrap();
        let kept = if device().supports_dtype(dtype) { dtype } else { DType::F32 };
        assert_eq!((embeds.values.dtype(), embeds.grid), (kept, GridThw { t: 1, h: 2, w: 4 }));
        assert_eq!(embeds.values.into_data().convert_dtype(DType::F32), values);
    }
    let error = write(DType::I64).unwrap_err();
    assert!(matches!(error, EmbedsError::File { .. }) && error.to_string().contains("floats"), "{error}");
}
