//! Contact sheets: prompts, pictures and verdicts -> one PNG to look at, and an HTML page with all texts.

use std::{fmt::Write, fs, path::Path};

use anyhow::Result;
use nexus::Image;
use unifont::Glyph;

/// One sample as a person looks at it.
pub struct Entry {
    pub prompt: String,
    /// Truth first, what the model drew last.
    pub pictures: Vec<Image>,
    pub verdict: String,
    pub correct: bool,
}

const COLUMNS: usize = 4;
const GAP_PX: usize = 8;
const LINE_PX: usize = 17;
const LINES: usize = 6;
const GREEN: [u8; 3] = [30, 150, 60];
const RED: [u8; 3] = [200, 40, 40];
const BLACK: [u8; 3] = [20, 20, 20];

/// Writes `<name>.png`, `<name>.html` and the pictures that the page shows.
pub fn write(dir: &Path, name: &str, entries: &[Entry]) -> Result<()> {
    let side = |of: fn(&Image) -> usize| entries.iter().flat_map(|entry| &entry.pictures).map(of).max().unwrap_or(1);
    let (width, height) = (side(Image::width_px), side(Image::height_px));
    let pictures = entries.iter().map(|entry| entry.pictures.len()).max().unwrap_or(1).max(2);
    let (cell_width, cell_height) = (pictures * (width + 2) + GAP_PX, height + LINES * LINE_PX + GAP_PX);
    let rows = entries.len().div_ceil(COLUMNS).max(1);
    let mut canvas = Canvas::new(COLUMNS * cell_width + GAP_PX, rows * cell_height + GAP_PX);
    for (index, entry) in entries.iter().enumerate() {
        let (left, top) = (GAP_PX + index % COLUMNS * cell_width, GAP_PX + index / COLUMNS * cell_height);
        for (at, picture) in entry.pictures.iter().enumerate() {
            canvas.picture(left + at * (width + 2), top, picture);
        }
        let colour = if entry.correct { GREEN } else { RED };
        let mut y = top + height + 2;
        for (text, colour, lines) in [(&entry.prompt, BLACK, LINES / 2), (&entry.verdict, colour, LINES / 2)] {
            for line in wrap(text, cell_width - GAP_PX).into_iter().take(lines) {
                canvas.text(left, y, &line, colour);
                y += LINE_PX;
            }
        }
    }
    canvas.into_image()?.save(dir.join(format!("{name}.png")))?;
    page(dir, name, entries)
}

fn page(dir: &Path, name: &str, entries: &[Entry]) -> Result<()> {
    let pictures = dir.join(name);
    fs::create_dir_all(&pictures)?;
    let mut html = String::from("<!doctype html><meta charset=utf-8><style>img{image-rendering:pixelated}</style>\n");
    for (index, entry) in entries.iter().enumerate() {
        write!(html, "<p>")?;
        for (at, picture) in entry.pictures.iter().enumerate() {
            let file = format!("{index:04}-{at}.png");
            picture.save(pictures.join(&file))?;
            write!(html, "<img src=\"{name}/{file}\"> ")?;
        }
        let mark = if entry.correct { "&#10003;" } else { "&#10007;" };
        writeln!(html, "<br>{}<br>{mark} {}</p>", escape(&entry.prompt), escape(&entry.verdict))?;
    }
    Ok(fs::write(dir.join(format!("{name}.html")), html)?)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// Breaks a text into lines of at most so many pixels, after spaces and Chinese characters.
fn wrap(text: &str, width_px: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for part in text.split_inclusive(|character: char| character.is_whitespace() || glyph(character).is_fullwidth()) {
        let last = lines.len() - 1;
        if text_px(&lines[last]) + text_px(part.trim_end()) > width_px && !lines[last].is_empty() {
            lines.push(part.to_string());
        } else {
            lines[last].push_str(part);
        }
    }
    lines
}

fn text_px(text: &str) -> usize {
    text.chars().map(|character| glyph(character).get_width()).sum()
}

/// A character's glyph, 16 pixels high, or an empty one where there is none.
fn glyph(character: char) -> &'static Glyph {
    unifont::get_glyph(character).unwrap_or(&Glyph::Halfwidth([0; 16]))
}

struct Canvas {
    width: usize,
    height: usize,
    rgb: Vec<u8>,
}

impl Canvas {
    fn new(width: usize, height: usize) -> Self {
        Self { width, height, rgb: vec![255; 3 * width * height] }
    }

    fn set(&mut self, x: usize, y: usize, colour: &[u8]) {
        if x < self.width && y < self.height {
            self.rgb[3 * (y * self.width + x)..][..3].copy_from_slice(colour);
        }
    }

    fn picture(&mut self, left: usize, top: usize, picture: &Image) {
        for (index, pixel) in picture.rgb().chunks_exact(3).enumerate() {
            self.set(left + index % picture.width_px(), top + index / picture.width_px(), pixel);
        }
    }

    fn text(&mut self, mut left: usize, top: usize, text: &str, colour: [u8; 3]) {
        for glyph in text.chars().map(glyph) {
            let width = glyph.get_width();
            for (row, column) in (0..16).flat_map(|row| (0..width).map(move |column| (row, column))) {
                if glyph.get_pixel(column, row) {
                    self.set(left + column, top + row, &colour);
                }
            }
            left += width;
        }
    }

    fn into_image(self) -> Result<Image> {
        Ok(Image::from_rgb8(self.width, self.height, self.rgb)?)
    }
}
