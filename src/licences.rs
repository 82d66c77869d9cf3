//! Licences of the released weights: the files of a model -> what each of their parts is licensed under, and where it says so.
//!
//! Facts with their source, for people and for programs that have to list what they ship; no advice.

use nexus_ar::ArConfig;
use nexus_core::config::ConfigError;
use nexus_diffusion::config::{AutoencoderConfig, DitConfig};
use serde::Serialize;

use crate::ModelFiles;

/// What some of the released weights are licensed under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct WeightsLicence {
    /// The weights, by the name of their authors.
    pub weights: &'static str,
    /// The parts of a model that are these weights or derive from them, as [`ModelFiles::weights`] names them.
    pub covers: &'static [&'static str],
    /// Name of the licence, with its version where it has one.
    pub licence: &'static str,
    /// Identifier in the SPDX licence list; none if the list does not have the licence.
    pub spdx: Option<&'static str>,
    /// Where the text of the licence is.
    pub link: &'static str,
    /// Who says that the weights are under this licence.
    pub stated_by: &'static str,
    /// Clauses that a user should have read, in the order of the text.
    pub clauses: &'static [Clause],
}

/// One clause of a licence, in short; the text of the licence decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Clause {
    /// Number in the text: `1a`.
    pub number: &'static str,
    /// What it says.
    pub says: &'static str,
}

const fn clause(number: &'static str, says: &'static str) -> Clause {
    Clause { number, says }
}

/// Licences of all released weights that nexus reads.
///
/// The decoders are listed twice: Nexus-Gen's authors publish them under a licence of their own, and they were trained from
/// FLUX.1 \[dev\], whose licence calls fine-tuned versions derivatives (1a).
pub const LICENCES: [WeightsLicence; 3] = [
    WeightsLicence {
        weights: "Qwen2.5-VL-7B-Instruct, from which the vision encoder and the language model were trained",
        covers: &["language_model"],
        licence: "Apache License 2.0",
        spdx: Some("Apache-2.0"),
        link: "https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct/blob/main/LICENSE",
        stated_by: "its model card, https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct",
        clauses: &[],
    },
    WeightsLicence {
        weights: "Nexus-Gen",
        covers: &["language_model", "generation_decoder", "edit_decoder"],
        licence: "Apache License 2.0",
        spdx: Some("Apache-2.0"),
        link: "https://www.apache.org/licenses/LICENSE-2.0",
        stated_by: "the model card of the first version, https://huggingface.co/modelscope/Nexus-Gen; that of V2 was not read",
        clauses: &[],
    },
    WeightsLicence {
        weights: "FLUX.1 [dev]: its files, and the decoders, which were trained from it",
        covers: &["generation_decoder", "edit_decoder", "autoencoder", "text_encoder", "text_encoder_2"],
        licence: "FLUX.1 [dev] Non-Commercial License 1.1.1",
        spdx: None,
        link: "https://github.com/black-forest-labs/flux/blob/main/model_licenses/LICENSE-FLUX1-dev",
        stated_by: "its repository, https://github.com/black-forest-labs/flux",
        clauses: &[
            clause("1a", "Fine-tuned and otherwise modified versions of the model are derivatives. Outputs are not."),
            clause(
                "1c",
                "What non-commercial purposes are. Activity that earns revenue is none, nor is use that interacts with end \
                 users or has an impact on them.",
            ),
            clause("2b", "The model and its derivatives may be used for non-commercial purposes alone."),
            clause(
                "2d",
                "Outputs may be used for any purpose, commercial ones too, except as expressly prohibited in the licence, and \
                 not to train a competing model.",
            ),
            clause("2e", "Who uses the model has to filter content or to review outputs."),
            clause("3b", "Who distributes the model or derivatives has to show the notice that stands there."),
            clause(
                "4a",
                "Prohibits commercial and production use of the model, of its derivatives \"or any data produced by\" the \
                 model.",
            ),
        ],
    },
];

impl ModelFiles {
    /// Licences of the weights that are there, if their sizes are the released ones; weights of other sizes are no released
    /// ones.
    ///
    /// Weights of the released sizes that were trained from nothing cannot be told from the released ones by this.
    ///
    /// # Errors
    /// [`ConfigError`] if a configuration file cannot be read.
    pub fn licences(&self) -> Result<Vec<&'static WeightsLicence>, ConfigError> {
        let language_model = ArConfig::read(self.config())?;
        let dit = DitConfig::read_in(&self.nexus)?;
        let autoencoder = AutoencoderConfig::read_in(&self.flux)?;
        let released_decoders = dit == DitConfig::default();
        let released = |part: &str| match part {
            "language_model" => (language_model.hidden_size, language_model.num_hidden_layers) == (3584, 28),
            "generation_decoder" | "edit_decoder" => released_decoders,
            // The text encoders of a model are as large as its decoders need them.
            "text_encoder" | "text_encoder_2" => released_decoders,
            _ => autoencoder == AutoencoderConfig::default(),
        };
        let parts = self.weights();
        let present = |part: &str| parts.iter().any(|(name, path)| *name == part && path.is_ok());
        let applies = |licence: &&WeightsLicence| licence.covers.iter().any(|part| present(part) && released(part));
        Ok(LICENCES.iter().filter(applies).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;

    fn bundled(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("assets").join(name)
    }

    #[test]
    fn every_licence_covers_parts_that_a_model_has() {
        let files = ModelFiles::find(bundled("nexus-tiny")).unwrap();
        let parts: Vec<&str> = files.weights().iter().map(|(name, _)| *name).collect();
        for licence in &LICENCES {
            assert!(
                !licence.covers.is_empty() && licence.covers.iter().all(|part| parts.contains(part)),
                "{licence:?}"
            );
            assert!(licence.link.starts_with("https://") && licence.stated_by.contains("https://"), "{licence:?}");
        }
        let covered = |part| LICENCES.iter().any(|licence| licence.covers.contains(part));
        assert!(parts.iter().all(covered), "a part has no licence");
    }

    #[test]
    fn models_of_our_own_sizes_are_under_no_licence_of_others() {
        for name in ["nexus-tiny", "nexus-random"] {
            let files = ModelFiles::find(bundled(name)).unwrap();
            assert_eq!(files.licences().unwrap(), [] as [&WeightsLicence; 0], "{name}");
        }
    }

    #[test]
    fn an_autoencoder_of_the_released_size_is_under_the_licence_of_flux() {
        let root = tempfile::tempdir().unwrap();
        let (nexus, flux) = (root.path().join("Nexus-GenV2"), root.path().join("FLUX/FLUX.1-dev"));
        std::fs::create_dir_all(&nexus).unwrap();
        std::fs::create_dir_all(&flux).unwrap();
        for name in ["config.json", "decoder_config.json"] {
            std::fs::copy(bundled("nexus-tiny/Nexus-GenV2").join(name), nexus.join(name)).unwrap();
        }
        std::fs::write(flux.join("ae.safetensors"), "").unwrap();
        let licences = ModelFiles::find(root.path()).unwrap().licences().unwrap();
        assert_eq!(licences.len(), 1);
        assert!(licences[0].spdx.is_none() && licences[0].covers.contains(&"autoencoder"));
        let json = serde_json::to_string(&licences).unwrap();
        assert!(json.contains("Non-Commercial License 1.1.1") && json.contains("\"number\":\"4a\""), "{json}");
    }
}
