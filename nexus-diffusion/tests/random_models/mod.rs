//! The models of the bundled random checkpoint, for the parity tests: weights in bf16, computed with in f32.
#![allow(dead_code, missing_docs)]

use std::path::PathBuf;

use burn::tensor::{FloatDType, Tensor};
use nexus_checkpoint::Checkpoint;
use nexus_core::testing::{Fixture, device, load_options, random_models_dir};
use nexus_diffusion::{
    Autoencoder, ClipTextEncoder, EditingDecoder, GenerationDecoder, T5Encoder,
    config::{AutoencoderConfig, ClipConfig, DiffusionConfig, T5Config},
    connector::TokenPosition,
};

/// Largest accepted difference, relative to the largest expected magnitude.
pub const TOLERANCE: f32 = 2e-5;

fn nexus() -> PathBuf {
    random_models_dir().join("Nexus-GenV2")
}

fn flux() -> PathBuf {
    random_models_dir().join("FLUX/FLUX.1-dev")
}

fn open(path: PathBuf) -> Checkpoint {
    Checkpoint::open(path).unwrap()
}

pub fn config() -> DiffusionConfig {
    DiffusionConfig::read_in(nexus()).unwrap()
}

pub fn generation_decoder() -> GenerationDecoder {
    let weights = open(nexus().join("generation_decoder.bin"));
    GenerationDecoder::load(&weights, &config(), &device(), &load_options()).unwrap()
}

pub fn editing_decoder() -> EditingDecoder {
    let weights = open(nexus().join("edit_decoder.bin"));
    EditingDecoder::load(&weights, &config(), &device(), &load_options()).unwrap()
}

pub fn autoencoder() -> Autoencoder {
    let config = AutoencoderConfig::read_in(flux()).unwrap();
    Autoencoder::load(&open(flux().join("ae.safetensors")), &config, &device(), &load_options()).unwrap()
}

pub fn clip() -> ClipTextEncoder {
    let config = ClipConfig::read(flux().join("text_encoder/config.json")).unwrap();
    ClipTextEncoder::load(&open(flux().join("text_encoder")), &config, &device(), &load_options()).unwrap()
}

pub fn t5() -> T5Encoder {
    let config = T5Config::read(flux().join("text_encoder_2/config.json")).unwrap();
    T5Encoder::load(&open(flux().join("text_encoder_2")), &config, &device(), &load_options()).unwrap()
}

/// Pooled vectors of the texts of the CLIP fixture: the empty text, a negative prompt, a long text.
pub fn pooled(clip: &ClipTextEncoder) -> Vec<Tensor<2>> {
    let ids = Fixture::open("clip").ids("in.input_ids");
    ids.chunks(77).map(|ids| clip.pooled(ids, FloatDType::F32).unwrap()).collect()
}

/// Positions that a fixture holds as `[tokens, 3]`.
pub fn positions(fixture: &Fixture, name: &str) -> Vec<TokenPosition> {
    fixture.floats(name).chunks(3).map(|triple| [triple[0], triple[1], triple[2]]).collect()
}
