//! Scores of a model on held-out scenes, whose truth is known -> `report.json`, `report.md` and a contact sheet of pictures
//! for each task.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use lab_tiny::{
    model::ModelArgs,
    score::{Report, Score},
};
use lab_world::{Kind, Sample, Split, Task, World, changed_region, judge, psnr_outside};
use nexus::{Image, Language, Message, Nexus, Role, TextOptions};

use crate::contact_sheet::{self, Entry};

/// Scores a model on held-out scenes.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Samples of each task
    #[arg(long, default_value_t = 500)]
    count: u64,
    /// Tasks to score
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Scored::Understanding, Scored::Generation, Scored::Editing, Scored::Consistency])]
    tasks: Vec<Scored>,
    /// Seed of the scenes; training uses others
    #[arg(long, default_value_t = 900)]
    seed: u64,
    /// Scenes with compositions that training has seen, to see what is lost on new ones
    #[arg(long)]
    seen: bool,
    /// Denoising steps; the model's own number if left out
    #[arg(long)]
    steps: Option<usize>,
    /// Pictures on each contact sheet
    #[arg(long, default_value_t = 48)]
    shown: usize,
    /// Where the report goes
    #[arg(long, default_value = "evaluation")]
    out: PathBuf,
}

/// What is scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scored {
    /// Answers to questions about pictures
    Understanding,
    /// Pictures of descriptions
    Generation,
    /// Changed pictures
    Editing,
    /// Answers about pictures that the model drew itself
    Consistency,
}

impl Scored {
    fn task(self) -> Task {
        match self {
            Self::Understanding => Task::Understanding,
            Self::Generation => Task::Generation,
            Self::Editing => Task::Editing,
            Self::Consistency => Task::MultiTurn,
        }
    }
}

/// Scores the model.
pub fn run(args: &Args) -> Result<()> {
    let nexus = args.model.load()?;
    fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let split = if args.seen { Split::Train } else { Split::HeldOut };
    let world = World::new(args.seed);
    let mut report = Report::new(args.seed, split);
    for task in &args.tasks {
        let bar = ProgressBar::new(args.count);
        if let Ok(style) = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len}, {eta} left  {msg}") {
            bar.set_style(style);
        }
        bar.set_prefix(format!("{task:?}"));
        let (mut score, mut entries) = (Score::default(), Vec::new());
        let mut index = 0;
        while score.count() < args.count {
            let sample = world.sample(task.task(), split, index);
            index += 1;
            if *task == Scored::Consistency && sample.kind != Kind::GenerateThenUnderstand {
                continue;
            }
            let entry = match task {
                Scored::Understanding => understanding(&nexus, &sample, &mut score)?,
                Scored::Generation => generation(&nexus, &sample, args.steps, &mut score)?,
                Scored::Editing => editing(&nexus, &sample, args.steps, &mut score)?,
                Scored::Consistency => consistency(&nexus, &sample, args.steps, &mut score)?,
            };
            if entries.len() < args.shown {
                entries.push(entry);
            }
            bar.inc(1);
            bar.set_message(format!("{:.3}", score.overall()));
        }
        bar.finish();
        let name = format!("{task:?}").to_lowercase();
        println!("{name}: {:.3} of {}", score.overall(), score.count());
        contact_sheet::write(&args.out, &name, &entries)?;
        report.add(name, score);
        report.write(&args.out)?;
    }
    println!("report: {}", args.out.join("report.md").display());
    Ok(())
}

/// The last answer of the model in a conversation, as text.
fn answer(messages: &[Message]) -> String {
    let last = messages.iter().rev().find(|message| message.role == Role::Assistant);
    last.map(|message| message.texts().collect::<String>()).unwrap_or_default().trim().to_string()
}

fn images(messages: &[Message]) -> Vec<Image> {
    messages.iter().flat_map(Message::images).cloned().collect()
}

fn groups(sample: &Sample) -> Vec<String> {
    let mut groups = vec![format!("{:?}", sample.kind)];
    if sample.language == Language::Chinese {
        groups.push("Chinese".to_string());
    }
    groups
}

fn ask(nexus: &Nexus, image: &Image, question: &str) -> Result<String> {
    let options = TextOptions { max_new_tokens: 96, ..nexus.default_options().text.clone() };
    Ok(nexus.understand(image, question, &options, ())?.text)
}

fn understanding(nexus: &Nexus, sample: &Sample, score: &mut Score) -> Result<Entry> {
    let image = images(&sample.messages).pop().context("a question has an image")?;
    let expected = answer(&sample.messages);
    let given = ask(nexus, &image, &sample.prompt)?;
    let correct = given.trim() == expected;
    score.add(&groups(sample), correct);
    let verdict = if correct { given } else { format!("{given} | expected: {expected}") };
    Ok(Entry { prompt: sample.prompt.clone(), pictures: vec![image], verdict, correct })
}

fn generation(nexus: &Nexus, sample: &Sample, steps: Option<usize>, score: &mut Score) -> Result<Entry> {
    let mut options = nexus.default_options().generate.clone();
    options.draw.steps = steps.unwrap_or(options.draw.steps);
    let truth = sample.scenes.first().context("a description has a scene")?;
    let shown = images(&sample.messages).pop().context("a description has a picture")?;
    let (picture, correct, verdict) = match nexus.generate(&sample.prompt, &options, ()) {
        Ok(picture) => {
            let verdict = judge(&picture.image, truth);
            score.add_verdict(&verdict);
            (Some(picture.image), verdict.correct, verdict.to_string())
        }
        Err(error @ nexus::Error::NoImage { .. }) => (None, false, error.to_string()),
        Err(error) => return Err(error.into()),
    };
    score.add(&groups(sample), correct);
    let pictures = std::iter::once(shown).chain(picture).collect();
    Ok(Entry { prompt: sample.prompt.clone(), pictures, verdict, correct })
}

fn editing(nexus: &Nexus, sample: &Sample, steps: Option<usize>, score: &mut Score) -> Result<Entry> {
    let mut options = nexus.default_options().edit.clone();
    options.draw.steps = steps.unwrap_or(options.draw.steps);
    let [before, after] = sample.scenes.as_slice() else { anyhow::bail!("an edit has two scenes") };
    let pictures = images(&sample.messages);
    let [source, truth] = pictures.as_slice() else { anyhow::bail!("an edit has two pictures") };
    let (picture, correct, verdict) = match nexus.edit(source, &sample.prompt, &options, ()) {
        Ok(picture) => {
            let verdict = judge(&picture.image, after);
            score.add_verdict(&verdict);
            let outside = psnr_outside(&picture.image, truth, &changed_region(before, after));
            if outside.is_finite() {
                score.add_psnr(f64::from(outside));
            }
            (Some(picture.image), verdict.correct, format!("{verdict}; {outside:.1} dB outside"))
        }
        Err(error @ nexus::Error::NoImage { .. }) => (None, false, error.to_string()),
        Err(error) => return Err(error.into()),
    };
    score.add(&groups(sample), correct);
    let pictures = [source.clone(), truth.clone()].into_iter().chain(picture).collect();
    Ok(Entry { prompt: sample.prompt.clone(), pictures, verdict, correct })
}

/// Draws, and asks about what was drawn.
fn consistency(nexus: &Nexus, sample: &Sample, steps: Option<usize>, score: &mut Score) -> Result<Entry> {
    let mut options = nexus.default_options().generate.clone();
    options.draw.steps = steps.unwrap_or(options.draw.steps);
    let expected = answer(&sample.messages);
    let last_user = sample.messages.iter().rev().find(|message| message.role == Role::User);
    let question: String = last_user.map(|message| message.texts().collect()).unwrap_or_default();
    let (pictures, correct, verdict) = match nexus.generate(&sample.prompt, &options, ()) {
        Ok(picture) => {
            let given = ask(nexus, &picture.image, &question)?;
            let correct = given.trim() == expected;
            (vec![picture.image], correct, format!("{question} {given} | expected: {expected}"))
        }
        Err(error @ nexus::Error::NoImage { .. }) => (vec![], false, error.to_string()),
        Err(error) => return Err(error.into()),
    };
    score.add(&groups(sample), correct);
    Ok(Entry { prompt: sample.prompt.clone(), pictures, verdict, correct })
}
