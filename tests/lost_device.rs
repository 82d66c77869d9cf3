//! A GPU that is lost while it is in use: an error, and the process goes on with another device.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may panic")]

use burn::tensor::Device;
use nexus::{DeviceInfo, Error, FloatDType, GenerateOptions, Image, Nexus, checkpoint::LoadDType};
use nexus_core::testing::random_models_dir;

#[test]
#[ignore = "needs an adapter for WGPU; tools/gpu_tests.sh runs this"]
fn a_lost_adapter_is_an_error_and_the_process_stays_usable() {
    let (device, setup) = Device::wgpu_options().init_with_setup().unwrap();
    let adapter = setup.adapter.get_info();
    let DeviceInfo { name, driver } = DeviceInfo::of(&device);
    assert_eq!(name, adapter.name);
    assert_eq!(driver.unwrap(), format!("{} {}", adapter.driver, adapter.driver_info).trim());

    let image = Image::from_rgb8(56, 56, (0..3 * 56 * 56).map(|i| (i % 251) as u8).collect()).unwrap();
    let embed = |nexus: &Nexus| nexus.embed(&image, 56 * 56, ());
    // The default of a GPU may be bf16, which would hide what the comparison is for.
    let load = |device: &Device| {
        let loader = Nexus::loader(random_models_dir()).compute_dtype(FloatDType::F32);
        loader.weights_dtype(LoadDType::Convert(FloatDType::F32)).load(device, ()).unwrap()
    };
    let nexus = load(&device);
    let before = embed(&nexus).unwrap().values.into_data().try_into_vec_as::<f32>().unwrap();
    setup.device.destroy();
    for _ in 0..2 {
        let error = nexus.generate("a red circle", &GenerateOptions::default(), ()).unwrap_err();
        assert!(matches!(error, Error::DeviceLost { .. }), "{error}");
        assert!(error.to_string().contains("another device"), "{error}");
    }
    let nexus = load(&nexus::device("cpu").unwrap());
    let after = embed(&nexus).unwrap().values.into_data().try_into_vec_as::<f32>().unwrap();
    let apart = before.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(before.len() == after.len() && apart < 1e-3, "{apart}");
}
