//! Where the files of a model are: the directory given by the user -> the released file names.

use std::path::{Path, PathBuf};

use nexus_checkpoint::Checkpoint;

use crate::Error;

/// The two places of the original's `models/` directory: `Nexus-GenV2` and `FLUX/FLUX.1-dev`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFiles {
    /// Directory with `config.json`, the language model and the decoders.
    pub nexus: PathBuf,
    /// Directory with the autoencoder and the text encoders.
    pub flux: PathBuf,
    generation_decoder: Option<PathBuf>,
    edit_decoder: Option<PathBuf>,
}

impl ModelFiles {
    /// Finds both places from either `models/` or `models/Nexus-GenV2`.
    ///
    /// # Errors
    /// [`Error::NoSuchDirectory`] if `dir` is absent, [`Error::NoModel`] if it holds no `config.json`.
    pub fn find(dir: impl AsRef<Path>) -> Result<Self, Error> {
        let dir = dir.as_ref();
        if !dir.is_dir() {
            return Err(Error::NoSuchDirectory { path: dir.to_path_buf() });
        }
        let inside = dir.join("Nexus-GenV2");
        let flux_of = |models: &Path| models.join("FLUX").join("FLUX.1-dev");
        if dir.join("config.json").is_file() {
            // `canonicalize` so that the parent of a relative `.` is found too.
            let full = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
            let flux = flux_of(full.parent().unwrap_or(&full));
            return Ok(Self { nexus: dir.to_path_buf(), flux, generation_decoder: None, edit_decoder: None });
        }
        if inside.join("config.json").is_file() {
            return Ok(Self { nexus: inside, flux: flux_of(dir), generation_decoder: None, edit_decoder: None });
        }
        let looked_for = vec![dir.join("config.json"), inside.join("config.json")];
        Err(Error::NoModel { path: dir.to_path_buf(), looked_for })
    }

    /// Takes the FLUX files from another place: the directory itself, or a `models/` directory that holds it.
    ///
    /// # Errors
    /// [`Error::NoSuchDirectory`] if it is absent.
    pub fn set_flux(&mut self, dir: &Path) -> Result<(), Error> {
        if !dir.is_dir() {
            return Err(Error::NoSuchDirectory { path: dir.to_path_buf() });
        }
        let inside = dir.join("FLUX").join("FLUX.1-dev");
        self.flux = if inside.is_dir() { inside } else { dir.to_path_buf() };
        Ok(())
    }

    /// Takes the decoders from other files.
    ///
    /// # Errors
    /// [`Error::FileMissing`] if a given file is absent.
    pub fn override_decoders(
        &mut self,
        generation_decoder: Option<PathBuf>,
        edit_decoder: Option<PathBuf>,
    ) -> Result<(), Error> {
        for (what, path) in [("generation decoder", &generation_decoder), ("editing decoder", &edit_decoder)] {
            if let Some(path) = path.as_ref().filter(|path| !path.is_file()) {
                return Err(Error::FileMissing { what, looked_for: vec![path.clone()] });
            }
        }
        self.generation_decoder = generation_decoder;
        self.edit_decoder = edit_decoder;
        Ok(())
    }

    /// `config.json` of the language model.
    pub fn config(&self) -> PathBuf {
        self.nexus.join("config.json")
    }

    /// `generation_config.json`, which may be absent.
    pub fn generation_config(&self) -> PathBuf {
        self.nexus.join("generation_config.json")
    }

    /// `nexus_options.json`, options that suit the model; the released repository has none.
    pub fn default_options(&self) -> PathBuf {
        self.nexus.join("nexus_options.json")
    }

    /// Weights of the vision encoder and the language model.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming what is wrong.
    pub fn open_language_model(&self) -> Result<Checkpoint, Error> {
        let index = self.nexus.join("model.safetensors.index.json");
        let single = self.nexus.join("model.safetensors");
        Ok(Checkpoint::open(if !index.is_file() && single.is_file() { single } else { index })?)
    }

    /// Weights of the generation decoder, which can be read by name.
    ///
    /// # Errors
    /// [`Error::FileMissing`], [`Error::Checkpoint`] naming what is wrong.
    pub fn open_generation_decoder(&self) -> Result<Checkpoint, Error> {
        Ok(Checkpoint::open(self.generation_decoder()?)?)
    }

    /// Weights of the editing decoder.
    ///
    /// # Errors
    /// As [`ModelFiles::open_generation_decoder`].
    pub fn open_edit_decoder(&self) -> Result<Checkpoint, Error> {
        Ok(Checkpoint::open(self.edit_decoder()?)?)
    }

    /// Weights of the autoencoder.
    ///
    /// # Errors
    /// As [`ModelFiles::open_generation_decoder`].
    pub fn open_autoencoder(&self) -> Result<Checkpoint, Error> {
        Ok(Checkpoint::open(self.autoencoder()?)?)
    }

    /// Weights of the CLIP text encoder.
    ///
    /// # Errors
    /// As [`ModelFiles::open_generation_decoder`].
    pub fn open_text_encoder(&self) -> Result<Checkpoint, Error> {
        Ok(Checkpoint::open(self.text_encoder()?)?)
    }

    /// Weights of the T5 text encoder.
    ///
    /// # Errors
    /// As [`ModelFiles::open_generation_decoder`].
    pub fn open_text_encoder_2(&self) -> Result<Checkpoint, Error> {
        Ok(Checkpoint::open(self.text_encoder_2()?)?)
    }

    /// `generation_decoder.safetensors` or `.bin`.
    ///
    /// # Errors
    /// [`Error::FileMissing`].
    pub fn generation_decoder(&self) -> Result<PathBuf, Error> {
        if let Some(path) = &self.generation_decoder {
            return Ok(path.clone());
        }
        self.first("generation decoder", &self.nexus, &["generation_decoder.safetensors", "generation_decoder.bin"])
    }

    /// `edit_decoder.safetensors` or `.bin`.
    ///
    /// # Errors
    /// [`Error::FileMissing`].
    pub fn edit_decoder(&self) -> Result<PathBuf, Error> {
        if let Some(path) = &self.edit_decoder {
            return Ok(path.clone());
        }
        self.first("editing decoder", &self.nexus, &["edit_decoder.safetensors", "edit_decoder.bin"])
    }

    /// `flux1-dev.safetensors`, from which decoders were trained.
    ///
    /// # Errors
    /// [`Error::FileMissing`].
    pub fn flux1_dev(&self) -> Result<PathBuf, Error> {
        self.first("FLUX.1-dev transformer", &self.flux, &["flux1-dev.safetensors"])
    }

    /// `ae.safetensors`.
    ///
    /// # Errors
    /// [`Error::FileMissing`].
    pub fn autoencoder(&self) -> Result<PathBuf, Error> {
        self.first("FLUX autoencoder", &self.flux, &["ae.safetensors"])
    }

    /// Directory of the CLIP text encoder.
    ///
    /// # Errors
    /// [`Error::FileMissing`].
    pub fn text_encoder(&self) -> Result<PathBuf, Error> {
        self.first("CLIP text encoder", &self.flux, &["text_encoder"])
    }

    /// Directory of the T5 text encoder.
    ///
    /// # Errors
    /// [`Error::FileMissing`].
    pub fn text_encoder_2(&self) -> Result<PathBuf, Error> {
        self.first("T5 text encoder", &self.flux, &["text_encoder_2"])
    }

    /// Where the weights of every stage are, by the stage's name.
    pub fn weights(&self) -> [(&'static str, Result<PathBuf, Error>); 6] {
        [
            ("language_model", self.open_language_model().map(|checkpoint| checkpoint.path().to_path_buf())),
            ("generation_decoder", self.generation_decoder()),
            ("edit_decoder", self.edit_decoder()),
            ("autoencoder", self.autoencoder()),
            ("text_encoder", self.text_encoder()),
            ("text_encoder_2", self.text_encoder_2()),
        ]
    }

    /// Directory of the CLIP tokenizer, by FLUX.1-dev's name or by DiffSynth's.
    ///
    /// # Errors
    /// [`Error::FileMissing`].
    pub fn clip_tokenizer(&self) -> Result<PathBuf, Error> {
        self.first("CLIP tokenizer", &self.flux, &["tokenizer", "tokenizer_1"])
    }

    /// Directory of the T5 tokenizer.
    ///
    /// # Errors
    /// [`Error::FileMissing`].
    pub fn t5_tokenizer(&self) -> Result<PathBuf, Error> {
        self.first("T5 tokenizer", &self.flux, &["tokenizer_2"])
    }

    fn first(&self, what: &'static str, dir: &Path, names: &[&str]) -> Result<PathBuf, Error> {
        let looked_for: Vec<PathBuf> = names.iter().map(|name| dir.join(name)).collect();
        match looked_for.iter().find(|path| path.exists()) {
            Some(path) => Ok(path.clone()),
            None => Err(Error::FileMissing { what, looked_for }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_places_are_found_from_either_directory() {
        let root = tempfile::tempdir().unwrap();
        let nexus = root.path().join("Nexus-GenV2");
        std::fs::create_dir(&nexus).unwrap();
        let empty = ModelFiles::find(root.path()).unwrap_err();
        assert!(matches!(&empty, Error::NoModel { looked_for, .. } if looked_for.len() == 2), "{empty}");
        std::fs::write(nexus.join("config.json"), "{}").unwrap();
        let from_models = ModelFiles::find(root.path()).unwrap();
        let from_nexus = ModelFiles::find(&nexus).unwrap();
        assert_eq!(from_models.nexus, from_nexus.nexus);
        assert!(from_models.flux.ends_with("FLUX/FLUX.1-dev") && from_nexus.flux.ends_with("FLUX/FLUX.1-dev"));
    }

    #[test]
    fn a_missing_file_says_where_it_was_looked_for() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("config.json"), "{}").unwrap();
        let error = ModelFiles::find(root.path()).unwrap().generation_decoder().unwrap_err().to_string();
        assert!(
            error.contains("generation_decoder.safetensors") && error.contains("generation_decoder.bin"),
            "{error}"
        );
    }

    #[test]
    fn a_missing_directory_is_named() {
        let error = ModelFiles::find("no/such/models").unwrap_err();
        assert!(matches!(error, Error::NoSuchDirectory { .. }));
        assert!(error.to_string().starts_with("no/such/models"));
    }
}
