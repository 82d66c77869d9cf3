//! What is heard while a request runs: events -> a bar on the terminal, seconds per stage, and a stop after Ctrl-C.

use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use nexus::{Observer, Progress};

use crate::{Output, interrupt::Interrupt, output::show_bar};

const WAITING: &str = "{spinner} {msg}";
const STEPPING: &str = "{spinner} {msg} {wide_bar} {pos}/{len} steps, {eta} left";

/// Seconds by what was at work: `load`, then the stages, and `total`.
pub type Seconds = BTreeMap<String, f64>;

/// An observer of requests, and a clock that runs from the first thing that it hears.
pub struct Watch<'a> {
    interrupt: &'a Interrupt,
    output: &'a Output,
    at_work: Option<AtWork>,
    seconds: Seconds,
}

struct AtWork {
    bar: ProgressBar,
    /// What the model wrote.
    text: String,
    started: Instant,
    /// The open span of time.
    span: Option<(String, Instant)>,
}

impl<'a> Watch<'a> {
    pub fn new(output: &'a Output, interrupt: &'a Interrupt) -> Self {
        Self { interrupt, output, at_work: None, seconds: Seconds::new() }
    }

    /// To be handed to a request.
    pub fn observer(&mut self) -> &mut dyn Observer {
        self
    }

    /// Opens a span of time, and ends the one before.
    pub fn begin(&mut self, what: &str) {
        self.at_work();
        self.close();
        self.at_work().span = Some((what.to_string(), Instant::now()));
    }

    /// Takes the bar away; what was at work, and for how long.
    pub fn rest(&mut self) -> Seconds {
        self.close();
        if let Some(AtWork { bar, started, .. }) = self.at_work.take() {
            show_bar(None);
            bar.finish_and_clear();
            self.seconds.insert("total".to_string(), started.elapsed().as_secs_f64());
        }
        std::mem::take(&mut self.seconds)
    }

    fn at_work(&mut self) -> &mut AtWork {
        let is_quiet = self.output.is_quiet();
        self.at_work.get_or_insert_with(|| {
            let bar = if is_quiet { ProgressBar::hidden() } else { ProgressBar::no_length() };
            style(&bar, WAITING);
            bar.enable_steady_tick(Duration::from_millis(100));
            show_bar(Some(bar.clone()));
            AtWork { bar, text: String::new(), started: Instant::now(), span: None }
        })
    }

    fn show(&mut self, message: String) {
        self.at_work().bar.set_message(message);
    }

    fn close(&mut self) {
        if let Some((what, since)) = self.at_work.as_mut().and_then(|at_work| at_work.span.take()) {
            *self.seconds.entry(what).or_default() += since.elapsed().as_secs_f64();
        }
    }
}

/// Shows the events; breaks after Ctrl-C.
impl Observer for Watch<'_> {
    fn hear(&mut self, event: Progress) -> ControlFlow<()> {
        match event {
            Progress::Loading(stage) => {
                self.begin("load");
                self.show(format!("loading the {stage}"));
            }
            Progress::Running(stage) => {
                self.begin(&stage.to_string().replace(' ', "_"));
                self.show(stage.to_string());
            }
            Progress::PromptRead { tokens, .. } => self.show(format!("{tokens} prompt tokens read")),
            Progress::Text(piece) => {
                let text = &mut self.at_work().text;
                text.push_str(&piece);
                let line = text.replace('\n', " ");
                self.show(line);
            }
            Progress::Step { done, total } => {
                let bar = &self.at_work().bar;
                if done == 0 {
                    bar.set_length(total as u64);
                    style(bar, STEPPING);
                }
                bar.set_position(done as u64);
                if done == total {
                    style(bar, WAITING);
                }
            }
            _ => {}
        }
        if self.interrupt.is_asked() {
            self.output.note("stopping; Ctrl-C once more ends the program at once");
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.rest();
    }
}

fn style(bar: &ProgressBar, template: &str) {
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
}
