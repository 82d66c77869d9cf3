//! Reading configuration files: one JSON file -> one serde struct, with the path in every error.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Reads a JSON file into the struct that a crate needs; unknown fields are ignored.
///
/// # Errors
/// [`ConfigError::Missing`] if there is no such file, [`ConfigError::Read`] if it cannot be read,
/// [`ConfigError::Parse`] if it is not JSON or a needed field is absent or has the wrong type.
pub fn read_json<T: DeserializeOwned>(path: impl AsRef<Path>) -> Result<T, ConfigError> {
    let path = path.as_ref();
    let text = std::fs::read_to_string(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => ConfigError::Missing { path: path.to_path_buf() },
        _ => ConfigError::Read { path: path.to_path_buf(), source },
    })?;
    serde_json::from_str(&text).map_err(|source| ConfigError::Parse { path: path.to_path_buf(), source })
}

/// What can be wrong with a configuration file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// No such file.
    #[error("{path}: no such configuration file", path = path.display())]
    Missing {
        /// File that was looked for.
        path: PathBuf,
    },
    /// The file cannot be read.
    #[error("{path}: cannot be read: {source}", path = path.display())]
    Read {
        /// File that was read.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not JSON, or a field is absent or of the wrong type.
    #[error("{path}: {source}", path = path.display())]
    Parse {
        /// File that was read.
        path: PathBuf,
        /// What serde said: the field and the place.
        source: serde_json::Error,
    },
    /// The fields contradict each other.
    #[error("configuration `{field}`: {reason}")]
    Incoherent {
        /// Field at fault.
        field: &'static str,
        /// Why it cannot be used.
        reason: String,
    },
}

impl ConfigError {
    /// A field that contradicts another one or is not supported.
    pub fn incoherent(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Incoherent { field, reason: reason.into() }
    }
}

/// Checks that `part` divides `whole`, for head counts and widths.
///
/// # Errors
/// [`ConfigError::Incoherent`] naming `field` if `part` is zero or does not divide.
pub fn check_divides(field: &'static str, part: usize, whole: usize) -> Result<(), ConfigError> {
    if part == 0 || !whole.is_multiple_of(part) {
        return Err(ConfigError::incoherent(field, format!("{part} must be positive and divide {whole}")));
    }
    Ok(())
}
