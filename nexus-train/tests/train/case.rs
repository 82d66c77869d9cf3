//! A training run of the autoencoder of the bundled random checkpoint, for the tests of runs, steps and recipes.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nexus::{Image, Message, data::MessagesFile};
use nexus_core::testing::{cpu, random_models_dir};
use nexus_train::{Recipe, TrainError, TrainOutcome, train, unobserved};
use serde_json::{Value, json};

/// A recipe, what it is trained on, and the runs of it.
pub struct Case {
    pub dir: tempfile::TempDir,
    pub recipe: Value,
}

impl Case {
    /// The autoencoder of the bundled random checkpoint on a few pictures.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let picture = |seed: usize| {
            let rgb = (0..3 * 32 * 32).map(|i| ((i * (seed + 3)) % 251) as u8).collect();
            vec![
                Message::user().with_image(Image::from_rgb8(32, 32, rgb).unwrap()).with_text("What?"),
                Message::assistant().with_text("Noise."),
            ]
        };
        let conversations: Vec<Vec<Message>> = (0..5).map(picture).collect();
        MessagesFile::write(dir.path().join("data.jsonl"), &conversations).unwrap();
        let recipe = json!({
            "command": "", "time": "", "expected": "",
            "seed": 3, "checkpoint_every": 1, "keep_checkpoints": 2, "log_every": 1, "max_rejected": 2,
            "parallel_micro_batches": 1,
            "train": {"part": "autoencoder", "phases": [
                phase("first", json!({"frozen": ["encoder.conv_in.*"], "ema_decay": 0.9})),
                phase("second", json!({"accumulation": 2, "schedule": {"cosine": {"end": 0.1}}, "max_grad_norm": 0.5})),
            ]},
        });
        Self { dir, recipe }
    }

    pub fn set(mut self, pointer: &str, value: Value) -> Self {
        *self.recipe.pointer_mut(pointer).unwrap() = value;
        self
    }

    pub fn recipe(&self) -> Recipe {
        let path = self.dir.path().join("recipe.json");
        fs::write(&path, self.recipe.to_string()).unwrap();
        Recipe::read(path).unwrap()
    }

    pub fn run(&self, name: &str) -> Result<TrainOutcome, TrainError> {
        train(&self.recipe(), random_models_dir(), self.dir.path().join(name), &cpu(), &mut unobserved)
    }

    pub fn read(&self, path: &str) -> String {
        fs::read_to_string(self.dir.path().join(path)).unwrap()
    }

    /// Metrics, exported weights and exported configuration of a finished run.
    pub fn results(&self, name: &str) -> (String, Vec<u8>, String) {
        let weights = self.dir.path().join(name).join("export/ae.safetensors");
        let config = self.read(&format!("{name}/export/ae_config.json"));
        (self.read(&format!("{name}/metrics.jsonl")), fs::read(weights).unwrap(), config)
    }

    /// The line of metrics of each step.
    pub fn metrics(&self, name: &str) -> Vec<Value> {
        self.read(&format!("{name}/metrics.jsonl")).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Makes a line of the data one whose picture is missing.
    pub fn spoil(&self, lines: std::ops::Range<usize>) {
        let bad = r#"{"messages":[{"role":"user","content":"<image>"},{"role":"assistant","content":"x"}],"images":["no.png"]}"#;
        let data = self.read("data.jsonl");
        let spoilt = data.lines().enumerate().map(|(index, line)| if lines.contains(&index) { bad } else { line });
        fs::write(self.dir.path().join("data.jsonl"), spoilt.collect::<Vec<_>>().join("\n")).unwrap();
    }

    pub fn checkpoints(&self, name: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.dir.path().join(name).join("checkpoints")).unwrap();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths
    }
}

pub fn phase(name: &str, more: Value) -> Value {
    let mut phase = json!({
        "name": name, "steps": 3, "batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 1,
        "data": [{"source": {"messages": {"path": "data.jsonl"}}, "weight": 1.0}],
        "settings": {"picture_px": 32},
    });
    phase.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    phase
}

/// A recipe of one phase, on the weights that are there, with settings of the phase over its usual ones.
pub fn recipe(part: &str, data: Value, phase: Value) -> Recipe {
    let mut first = json!({
        "name": "only", "steps": 2, "batch_size": 2, "learning_rate": 1e-3, "data": [{"source": data, "weight": 1.0}],
    });
    first.as_object_mut().unwrap().extend(phase.as_object().unwrap().clone());
    let recipe = json!({
        "command": "", "time": "", "expected": "", "seed": 5, "checkpoint_every": 1, "log_every": 1, "max_rejected": 0,
        "train": {"part": part, "phases": [first]},
    });
    serde_json::from_value(recipe).unwrap()
}

/// A phase with small pictures, with more settings of the part and of the phase.
pub fn decoder(part: Value, mut phase: Value) -> Value {
    let mut settings = json!({"picture_px": 32});
    settings.as_object_mut().unwrap().extend(part.as_object().unwrap().clone());
    phase["settings"] = settings;
    phase
}

/// A copy of the bundled random checkpoint in a new directory, which is returned.
pub fn copied_models(models: &Path) -> PathBuf {
    let mut dirs = vec![PathBuf::new()];
    while let Some(inside) = dirs.pop() {
        fs::create_dir_all(models.join(&inside)).unwrap();
        for entry in fs::read_dir(random_models_dir().join(&inside)).unwrap() {
            let path = inside.join(entry.unwrap().file_name());
            match random_models_dir().join(&path).is_dir() {
                true => dirs.push(path),
                false => drop(fs::copy(random_models_dir().join(&path), models.join(&path)).unwrap()),
            }
        }
    }
    models.to_path_buf()
}
