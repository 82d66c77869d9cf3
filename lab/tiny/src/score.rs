//! Scores: right and wrong answers by group -> `report.json` and `report.md`.

use std::{collections::BTreeMap, fmt::Write, path::Path};

use anyhow::Result;
use lab_world::{Split, Verdict};
use serde::Serialize;

use crate::model::write_whole;

/// Largest ambiguity of a picture that is clear.
const CLEAR: f32 = 0.5;

/// Right ones among all, in all and by group.
#[derive(Debug, Default, Serialize)]
pub struct Score {
    all: Share,
    groups: BTreeMap<String, Share>,
    /// Mean PSNR outside the changed region, in dB, over edits that are not perfect there.
    #[serde(skip_serializing_if = "Option::is_none")]
    psnr_outside_db: Option<f64>,
    /// Share of those edits with at least 24 dB there.
    #[serde(skip_serializing_if = "Option::is_none")]
    psnr_at_least_24_db: Option<f64>,
    /// Pictures among the right ones in which what the best explanation of a place leaves is less than half of what the
    /// best other one leaves, as a sum of squares.
    #[serde(skip_serializing_if = "Option::is_none")]
    clear: Option<Share>,
    #[serde(skip)]
    psnr: Vec<f64>,
}

#[derive(Debug, Default, Clone, Copy, Serialize)]
struct Share {
    right: u64,
    count: u64,
}

impl Share {
    fn add(&mut self, correct: bool) {
        self.count += 1;
        self.right += u64::from(correct);
    }

    fn value(self) -> f64 {
        self.right as f64 / self.count.max(1) as f64
    }

    /// Half the width of the 95 % Wilson interval.
    fn margin(self) -> f64 {
        let (n, p, z) = (self.count.max(1) as f64, self.value(), 1.96);
        z / (1.0 + z * z / n) * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt()
    }
}

impl Score {
    /// One more answer, which counts in all and in its groups.
    pub fn add(&mut self, groups: &[String], correct: bool) {
        self.all.add(correct);
        for group in groups {
            self.groups.entry(group.clone()).or_default().add(correct);
        }
    }

    /// One more edit, by how near it is to the truth outside the changed region.
    pub fn add_psnr(&mut self, decibels: f64) {
        self.psnr.push(decibels);
        let count = self.psnr.len() as f64;
        self.psnr_outside_db = Some(self.psnr.iter().sum::<f64>() / count);
        self.psnr_at_least_24_db = Some(self.psnr.iter().filter(|&&decibels| decibels >= 24.0).count() as f64 / count);
    }

    /// What the judge says of a picture: of right ones it is counted how many are clear.
    pub fn add_verdict(&mut self, verdict: &Verdict) {
        if verdict.correct {
            self.clear.get_or_insert_default().add(verdict.ambiguity < CLEAR);
        }
    }

    /// Number of answers.
    pub fn count(&self) -> u64 {
        self.all.count
    }

    /// Share of right ones.
    pub fn overall(&self) -> f64 {
        self.all.value()
    }

    /// Half the width of the 95 % interval of the overall share.
    pub fn margin(&self) -> f64 {
        self.all.margin()
    }
}

/// Scores of all tasks.
#[derive(Serialize)]
pub struct Report {
    command: String,
    seed: u64,
    scenes: String,
    tasks: BTreeMap<String, Score>,
}

impl Report {
    /// A report without scores yet.
    pub fn new(seed: u64, split: Split) -> Self {
        let command = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
        let command = format!("cargo run --release -p lab-tiny -- {command}");
        Self { command, seed, scenes: format!("{split:?}"), tasks: BTreeMap::new() }
    }

    /// One more task.
    pub fn add(&mut self, task: String, score: Score) {
        self.tasks.insert(task, score);
    }

    /// Writes `report.json` and `report.md`.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let mut table = format!("`{}`\n\nScenes: {}, seed {}.\n\n", self.command, self.scenes, self.seed);
        table.push_str("| task | kind | right | of | share | +- |\n|---|---|---|---|---|---|\n");
        for (task, score) in &self.tasks {
            let mut row = |kind: &str, share: Share| {
                let (right, of, value, margin) = (share.right, share.count, share.value(), share.margin());
                writeln!(table, "| {task} | {kind} | {right} | {of} | {value:.3} | {margin:.3} |")
            };
            row("all", score.all)?;
            for (kind, share) in &score.groups {
                row(kind, *share)?;
            }
        }
        for (task, score) in &self.tasks {
            if let (Some(decibels), Some(share)) = (score.psnr_outside_db, score.psnr_at_least_24_db) {
                writeln!(table, "\n{task}: {decibels:.1} dB PSNR outside the changed region, mean.")?;
                writeln!(table, "\n{task}: {share:.3} of them with at least 24 dB.")?;
            }
            if let Some(clear) = score.clear {
                writeln!(table, "\n{task}: {:.3} of the right pictures are clear.", clear.value())?;
            }
        }
        write_whole(&dir.join("report.json"), &serde_json::to_vec_pretty(self)?)?;
        write_whole(&dir.join("report.md"), table.as_bytes())
    }
}
