//! How a picture is drawn, and what is said of it: options -> those of the library; a picture -> its file and a report.

use std::{
    hash::{BuildHasher, RandomState},
    path::Path,
};

use anyhow::Result;
use nexus::{DrawOptions, Noise, Picture};
use serde_json::json;

use crate::{Output, watch::Seconds};

/// Options of drawing.
#[derive(clap::Args)]
#[command(next_help_heading = "Drawing")]
pub struct DrawArgs {
    /// Width in pixels, rounded up to a multiple of 16 [default: the model's, or 512]
    #[arg(long, value_name = "PX")]
    width: Option<usize>,
    /// Height in pixels, rounded up to a multiple of 16 [default: the model's, or 512]
    #[arg(long, value_name = "PX")]
    height: Option<usize>,
    /// Denoising steps [default: the model's, or 50]
    #[arg(long, alias = "num_inference_steps", value_name = "COUNT")]
    steps: Option<usize>,
    /// Seed of the noise that the picture starts from: a number, or `random` [default: the model's]
    #[arg(long, value_parser = seed, allow_hyphen_values = true)]
    seed: Option<u64>,
    /// What the picture should not show; used if --cfg-scale is not 1
    #[arg(long, value_name = "TEXT")]
    negative_prompt: Option<String>,
    /// Classifier-free guidance; 1 is off and twice as fast [default: the model's, or 3 for new and 1 for changed pictures]
    #[arg(long, value_name = "SCALE")]
    cfg_scale: Option<f64>,
    /// Guidance that is embedded into the transformer [default: the model's, or 3.5]
    #[arg(long, alias = "guidance", value_name = "SCALE")]
    embedded_guidance: Option<f64>,
    /// Draw in overlapping tiles, for large pictures
    #[arg(long)]
    tiled: bool,
}

impl DrawArgs {
    /// Puts what was given on the command line over the model's options.
    pub fn apply(&self, options: &mut DrawOptions) {
        options.width = self.width.unwrap_or(options.width);
        options.height = self.height.unwrap_or(options.height);
        options.steps = self.steps.unwrap_or(options.steps);
        options.cfg_scale = self.cfg_scale.unwrap_or(options.cfg_scale);
        options.embedded_guidance = self.embedded_guidance.unwrap_or(options.embedded_guidance);
        if let Some(negative_prompt) = &self.negative_prompt {
            options.negative_prompt.clone_from(negative_prompt);
        }
        if let Some(seed) = self.seed {
            options.noise = Noise::Seed(seed);
        }
        options.tiled |= self.tiled;
    }
}

/// A number, or one that nobody can know before.
fn seed(text: &str) -> Result<u64, String> {
    match text {
        // Short enough that every reader of JSON keeps it.
        "random" | "-1" => Ok(RandomState::new().hash_one(std::process::id()) >> 16),
        number => number.parse().map_err(|error| format!("{error}: give a number, or `random`")),
    }
}

/// What is said about a picture.
pub struct PictureReport<'a> {
    pub command: &'static str,
    pub path: &'a Path,
    pub picture: &'a Picture,
    pub draw: &'a DrawOptions,
    /// What was asked for.
    pub prompt: &'a str,
    /// Pictures that were given.
    pub images: Vec<&'a Path>,
    pub model: &'a Path,
    pub device: &'a str,
    pub seconds: Seconds,
}

impl PictureReport<'_> {
    /// For a person, or for a program.
    pub fn show(&self, output: &Output) -> Result<()> {
        let Self { command, path, picture, draw, prompt, images, model, device, seconds } = self;
        let (width_px, height_px) = (picture.image.width_px(), picture.image.height_px());
        let reply = picture.reply.as_ref().map_or("", |reply| reply.text.as_str());
        let seed = match draw.noise {
            Noise::Seed(seed) => Some(seed),
            _ => None,
        };
        if !reply.is_empty() {
            output.say(reply);
        }
        let seed_text = seed.map_or_else(String::new, |seed| format!(", seed {seed}"));
        output.say(format!("picture: {} ({width_px}x{height_px}{seed_text})", path.display()));
        output.object(&json!({
            "command": command,
            "picture": path,
            "width_px": width_px,
            "height_px": height_px,
            "seed": seed,
            "steps": draw.steps,
            "prompt": prompt,
            "images": images,
            "reply": reply,
            "model": model,
            "device": device,
            "seconds": seconds,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_numbers_or_random() {
        assert_eq!(seed("7"), Ok(7));
        assert!(seed("random").unwrap() < 1 << 48);
        assert_ne!(seed("-1"), seed("random"));
        for wrong in ["-2", "1.5", "", "rand"] {
            assert!(seed(wrong).unwrap_err().contains("`random`"), "{wrong}");
        }
    }
}
