//! Drawing scenes: a scene -> 144x144 pixels, the same bytes every time.
//!
//! Backgrounds are lit: red rises from left to right and blue from top to bottom. The vision encoder of the model knows
//! relative positions alone, and the generation decoder gives its condition tokens no positions at all, so a patch of
//! plain background could not say where it lies; light that depends on the place lets every patch say so.

use crate::draws::Draws;
use crate::scene::{Colour, Object, Scene, Shape, Size, Style, Texture};
use nexus_data::Image;

/// Side of a picture, in pixels.
pub const SIDE_PX: usize = 144;

/// Side of a place, in pixels.
pub const PLACE_PX: usize = SIDE_PX / 3;

/// Change of red along x and of blue along y, from the middle to an edge, in levels of 255.
const LIGHT: f32 = 14.0;

const OUTLINE_PX: f32 = 3.0;
const OUTLINE_RGB: [f32; 3] = [60.0, 52.0, 48.0];

/// How a picture differs from the plain drawing of its scene; the default does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Variation {
    /// Largest change of every value, in levels of 255.
    pub noise: u8,
    /// Whether every object has a shade of its colour ([`Colour::nearest`]) instead of the colour.
    pub shades: bool,
    /// Seed of the noise and of the shades.
    pub seed: u64,
}

impl Scene {
    /// Draws the scene.
    pub fn render(&self) -> Image {
        self.render_with(Variation::default())
    }

    /// Draws the scene with a variation.
    pub fn render_with(&self, Variation { noise, shades, seed }: Variation) -> Image {
        let mut shading = Draws::new(seed, 0x7368_6164_6573, 0);
        let mut levels = self.levels(|colour| if shades { shade(colour, &mut shading) } else { colour.rgb() });
        if noise > 0 {
            let mut draws = Draws::new(seed, 0x006e_6f69_7365, 0);
            for level in &mut levels {
                *level += draws.below(2 * usize::from(noise) + 1) as f32 - f32::from(noise);
            }
        }
        let bytes = levels.into_iter().map(|level| level.clamp(0.0, 255.0).round() as u8).collect();
        // The buffer has the size of the picture, so this cannot fail.
        Image::from_rgb8(SIDE_PX, SIDE_PX, bytes).unwrap_or_else(|_| unreachable!("a buffer of the picture's size"))
    }

    /// `[height, width, 3]`, in levels of 255; every object is painted in what `paint` makes of its colour.
    pub(crate) fn levels(&self, mut paint: impl FnMut(Colour) -> [u8; 3]) -> Vec<f32> {
        let mut levels = Vec::with_capacity(3 * SIDE_PX * SIDE_PX);
        for y in 0..SIDE_PX {
            for x in 0..SIDE_PX {
                levels.extend(background_level(self.background.rgb(), x, y));
            }
        }
        for object in &self.objects {
            draw(&mut levels, object, paint(object.colour), self.style);
        }
        levels
    }
}

/// Background of one pixel with its light.
pub(crate) fn background_level(rgb: [u8; 3], x: usize, y: usize) -> [f32; 3] {
    let light = |at: usize| LIGHT * (2.0 * at as f32 / (SIDE_PX - 1) as f32 - 1.0);
    let [red, green, blue] = rgb.map(f32::from);
    [red + light(x), green, blue + light(y)]
}

/// A mix of the colour with any other that is still nearest to it.
fn shade(colour: Colour, draws: &mut Draws) -> [u8; 3] {
    loop {
        let share = draws.below(101) as f32 / 100.0;
        let mixed =
            colour.rgb().map(|level| (f32::from(level) + share * (draws.below(256) as f32 - f32::from(level))).round());
        let mixed = mixed.map(|level| level as u8);
        if Colour::nearest(mixed) == colour {
            return mixed;
        }
    }
}

/// Lays an object over the levels.
pub(crate) fn draw(levels: &mut [f32], object: &Object, rgb: [u8; 3], style: Style) {
    let place_px = PLACE_PX as f32;
    let centre = |at: u8| (f32::from(at) + 0.5) * place_px - 0.5;
    let (centre_x, centre_y) = (centre(object.place.column()), centre(object.place.row()));
    let scale = match object.size {
        Size::Large => 1.0,
        Size::Small => 0.56,
    };
    let colour = rgb.map(f32::from);
    let light = colour.map(|level| level + 0.62 * (255.0 - level));
    let period = if object.size == Size::Large { 10.0 } else { 7.0 };
    let (left, top) = (usize::from(object.place.column()) * PLACE_PX, usize::from(object.place.row()) * PLACE_PX);
    for y in top..top + PLACE_PX {
        for x in left..left + PLACE_PX {
            let (dx, dy) = (x as f32 - centre_x, y as f32 - centre_y);
            let distance = distance(object.shape, dx / scale, dy / scale) * scale;
            let pixel = &mut levels[3 * (y * SIDE_PX + x)..][..3];
            let fill = match object.texture {
                Texture::Solid => colour,
                Texture::Striped => {
                    // A stripe of the colour in the middle; its edges are one pixel wide.
                    let phase = (dy / period + 0.25).rem_euclid(1.0) * period;
                    let share = (period / 4.0 - (phase - period / 4.0).abs() + 0.5).clamp(0.0, 1.0);
                    [0, 1, 2].map(|i| light[i] + share * (colour[i] - light[i]))
                }
            };
            if style == Style::Outlined {
                mix(pixel, OUTLINE_RGB, coverage(distance));
                mix(pixel, fill, coverage(distance + OUTLINE_PX));
            } else {
                mix(pixel, fill, coverage(distance));
            }
        }
    }
}

fn mix(pixel: &mut [f32], over: [f32; 3], share: f32) {
    for (level, over) in pixel.iter_mut().zip(over) {
        *level += share * (over - *level);
    }
}

/// Share of a pixel that lies inside an edge at this distance.
fn coverage(distance: f32) -> f32 {
    (0.5 - distance).clamp(0.0, 1.0)
}

/// Distance from the edge of a large shape, in pixels; negative inside.
fn distance(shape: Shape, x: f32, y: f32) -> f32 {
    let bar = |x: f32, y: f32, half_x: f32, half_y: f32| (x.abs() - half_x).max(y.abs() - half_y);
    match shape {
        Shape::Circle => x.hypot(y) - 20.5,
        Shape::Square => bar(x, y, 18.5, 18.5),
        Shape::Cross => bar(x, y, 21.0, 7.0).min(bar(x, y, 7.0, 21.0)),
        Shape::Triangle => {
            // Two sides that rise 2 to 1, and the base.
            let side = (x.abs() * 2.0 - (y + 21.0)) / 5.0f32.sqrt();
            side.max(y - 19.0)
        }
    }
}
