//! The directory of a run: one process at a time, checkpoints that are whole or not there, and the metrics so far.
//!
//! ```text
//! run/
//!   recipe.json        what is trained
//!   lock               held while a process trains
//!   metrics.jsonl      one line per logged step
//!   rejected.jsonl     samples that were set aside, with reasons
//!   samples/           pictures drawn on the way
//!   checkpoints/step-00000500/
//!     module.safetensors  optimizer.safetensors  average.safetensors  state.json  history.jsonl
//! ```

use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Recipe, TrainError};

/// Where a run is; with the weights, all that is needed to go on.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunState {
    /// Seed of the recipe.
    pub seed: u64,
    /// Phase of the recipe, from 0.
    pub phase: usize,
    /// Steps done in this phase.
    pub phase_steps: usize,
    /// Steps done in all.
    pub steps: usize,
    /// Samples of this phase that were used or could not be, which is where the data go on.
    pub cursor: u64,
    /// Samples that were set aside.
    pub rejected: u64,
    /// Steps in the averaged weights.
    pub average_steps: usize,
}

/// A run's directory, locked by this process.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    metrics: File,
    _lock: File,
}

const RECIPE: &str = "recipe.json";
const METRICS: &str = "metrics.jsonl";
const HISTORY: &str = "history.jsonl";
const STATE: &str = "state.json";
const CHECKPOINTS: &str = "checkpoints";
const UNFINISHED: &str = ".unfinished-";

impl RunDir {
    /// Creates the directory of a run, or opens it to go on.
    ///
    /// What a killed process left unfinished is removed, and the metrics go back to those of the latest checkpoint.
    ///
    /// # Errors
    /// [`TrainError::Busy`] if another process trains here, [`TrainError::OtherRecipe`] if the run was begun with
    /// another recipe, [`TrainError::RunFile`].
    pub fn open(path: &Path, recipe: &Recipe) -> Result<(Self, Option<(PathBuf, RunState)>), TrainError> {
        let checkpoints = path.join(CHECKPOINTS);
        fs::create_dir_all(&checkpoints).map_err(TrainError::file(&checkpoints))?;
        let lock_path = path.join("lock");
        let lock = File::create(&lock_path).map_err(TrainError::file(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(TrainError::Busy { path: path.to_path_buf() }),
            Err(TryLockError::Error(source)) => return Err(TrainError::file(&lock_path)(source)),
        }
        let recipe_path = path.join(RECIPE);
        match recipe_path.is_file() {
            true => {
                let begun: Recipe = nexus_core::config::read_json(&recipe_path)?;
                if let Some(field) = recipe.differs_from(&begun) {
                    return Err(TrainError::OtherRecipe { path: path.to_path_buf(), field });
                }
            }
            false => write_whole(&recipe_path, &to_json(recipe, &recipe_path)?)?,
        }
        for entry in list(&checkpoints)? {
            if name_of(&entry).starts_with(UNFINISHED) {
                fs::remove_dir_all(&entry).map_err(TrainError::file(&entry))?;
            }
        }
        let latest = latest(&checkpoints)?;
        if latest.as_ref().is_some_and(|(_, state)| state.seed != recipe.seed) {
            return Err(TrainError::OtherRecipe { path: path.to_path_buf(), field: "seed" });
        }
        let history = match &latest {
            Some((checkpoint, _)) => {
                let history = checkpoint.join(HISTORY);
                fs::read(&history).map_err(TrainError::file(&history))?
            }
            None => Vec::new(),
        };
        let metrics_path = path.join(METRICS);
        write_whole(&metrics_path, &history)?;
        let metrics = File::options().append(true).open(&metrics_path).map_err(TrainError::file(&metrics_path))?;
        Ok((Self { path: path.to_path_buf(), metrics, _lock: lock }, latest))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a line to the metrics.
    ///
    /// # Errors
    /// [`TrainError::RunFile`].
    pub fn log(&mut self, line: &impl Serialize) -> Result<(), TrainError> {
        let path = self.path.join(METRICS);
        let mut line = to_json_line(line, &path)?;
        line.push(b'\n');
        self.metrics.write_all(&line).map_err(TrainError::file(&path))
    }

    /// The metrics so far, as JSON lines.
    ///
    /// # Errors
    /// [`TrainError::RunFile`].
    pub fn metrics(&self) -> Result<String, TrainError> {
        let path = self.path.join(METRICS);
        fs::read_to_string(&path).map_err(TrainError::file(&path))
    }

    /// Writes a checkpoint: `fill` puts the weights into a directory that becomes visible only when all is on disk.
    ///
    /// Older checkpoints beyond `keep` are removed afterwards.
    ///
    /// # Errors
    /// [`TrainError::RunFile`], and what `fill` returns; the unfinished directory is removed and older checkpoints
    /// stay.
    pub fn checkpoint(
        &mut self,
        state: &RunState,
        keep: usize,
        fill: impl FnOnce(&Path) -> Result<(), TrainError>,
    ) -> Result<PathBuf, TrainError> {
        let checkpoints = self.path.join(CHECKPOINTS);
        let unfinished = checkpoints.join(format!("{UNFINISHED}{}", state.steps));
        let finished = checkpoints.join(format!("step-{:08}", state.steps));
        let written = self.fill(state, &unfinished, fill).and_then(|()| {
            if finished.exists() {
                fs::remove_dir_all(&finished).map_err(TrainError::file(&finished))?;
            }
            fs::rename(&unfinished, &finished).map_err(TrainError::file(&finished))?;
            sync_dir(&checkpoints)
        });
        if let Err(error) = written {
            // The first error is the one to report.
            let _ = fs::remove_dir_all(&unfinished);
            return Err(error);
        }
        let mut steps: Vec<PathBuf> = list(&checkpoints)?;
        steps.retain(|path| step_of(path).is_some());
        steps.sort();
        let old = steps.len().saturating_sub(keep.max(1));
        for path in &steps[..old] {
            fs::remove_dir_all(path).map_err(TrainError::file(path))?;
        }
        Ok(finished)
    }

    fn fill(
        &mut self,
        state: &RunState,
        dir: &Path,
        fill: impl FnOnce(&Path) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        fs::create_dir_all(dir).map_err(TrainError::file(dir))?;
        fill(dir)?;
        let path = self.path.join(METRICS);
        self.metrics.sync_all().map_err(TrainError::file(&path))?;
        let history = fs::read(&path).map_err(TrainError::file(&path))?;
        write_whole(&dir.join(HISTORY), &history)?;
        let path = dir.join(STATE);
        write_whole(&path, &to_json(state, &path)?)?;
        sync_dir(dir)
    }
}

/// Latest finished checkpoint and its state.
fn latest(checkpoints: &Path) -> Result<Option<(PathBuf, RunState)>, TrainError> {
    let newest = list(checkpoints)?.into_iter().filter(|path| step_of(path).is_some()).max();
    let Some(path) = newest else { return Ok(None) };
    let state = nexus_core::config::read_json(path.join(STATE))?;
    Ok(Some((path, state)))
}

fn step_of(path: &Path) -> Option<usize> {
    name_of(path).strip_prefix("step-")?.parse().ok()
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn list(dir: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let entries = fs::read_dir(dir).map_err(TrainError::file(dir))?;
    entries.map(|entry| Ok(entry.map_err(TrainError::file(dir))?.path())).collect()
}

/// Writes a file beside its place, syncs it and renames it.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    let beside = path.with_file_name(format!("{UNFINISHED}{}", name_of(path)));
    let write = || {
        let mut file = File::create(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    write().map_err(|source| {
        // The first error is the one to report.
        let _ = fs::remove_file(&beside);
        TrainError::file(path)(source)
    })
}

fn sync_dir(dir: &Path) -> Result<(), TrainError> {
    // Directories cannot be opened as files everywhere; there, renaming is as durable as the system makes it.
    match File::open(dir) {
        Ok(file) if cfg!(unix) => file.sync_all().map_err(TrainError::file(dir)),
        _ => Ok(()),
    }
}

fn to_json(value: &impl Serialize, path: &Path) -> Result<Vec<u8>, TrainError> {
    serde_json::to_vec_pretty(value).map_err(|error| TrainError::file(path)(error.into()))
}

fn to_json_line(value: &impl Serialize, path: &Path) -> Result<Vec<u8>, TrainError> {
    serde_json::to_vec(value).map_err(|error| TrainError::file(path)(error.into()))
}
