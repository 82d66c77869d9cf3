//! Reading pictures: pixels -> the scene that explains them best, or nothing if none explains them well.
//!
//! It draws what could stand in each place and compares; it shares no code with any model.

use crate::render::{PLACE_PX, SIDE_PX, background_level, draw};
use crate::scene::{Background, Colour, Object, Place, Scene, Shape, Size, Style, Texture};
use nexus_data::{Filter, Image, resize};

/// Largest difference of a channel at which a pixel counts as background, in levels of 255.
const BACKGROUND_LEVELS: f32 = 30.0;

/// Smallest share of the picture that must be background.
const BACKGROUND_SHARE: f32 = 0.4;

/// Largest root mean square difference of a place from its best explanation, in levels of 255.
const PLACE_RESIDUAL: f32 = 34.0;

/// Mean square difference from plain background below which a place is empty.
const EMPTY_SQUARE: f32 = 60.0;

/// Share of its best rival's error that an explanation may have and still count as clear.
const CLEAR: f32 = 0.97;

const PLACE_VALUES: usize = 3 * PLACE_PX * PLACE_PX;

/// What a picture was read as.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// The scene; `None` if no scene explains the picture.
    pub scene: Option<Scene>,
    /// Largest root mean square difference of a place from its best explanation, in levels of 255.
    pub residual: f32,
    /// How far objects are from being something else: the largest share, over the places with objects, that the error of
    /// the best explanation has of the error of the best other one. 0 is exact, 1 could be either.
    pub ambiguity: f32,
    /// Share of the picture that is background.
    pub background_share: f32,
}

/// Reads a picture of the world; other sizes are resized first.
pub fn read_scene(picture: &Image) -> Reading {
    let levels = levels(picture);
    let (background, background_share) = background_of(&levels);
    let [flat, outlined] = [Style::Flat, Style::Outlined].map(|style| explain(&levels, background, style));
    // Without an object both explain alike, and flat is the default.
    let best = if outlined.error < CLEAR * flat.error { outlined } else { flat };
    let explained = background_share >= BACKGROUND_SHARE && best.residual <= PLACE_RESIDUAL;
    let scene = Scene { background, style: best.style, objects: best.objects };
    let (residual, ambiguity) = (best.residual, best.ambiguity);
    Reading { scene: explained.then(|| scene.sorted()), residual, ambiguity, background_share }
}

/// `[height, width, 3]` in levels of 255, of the world's size.
fn levels(picture: &Image) -> Vec<f32> {
    let of = |picture: &Image| picture.rgb().iter().map(|&byte| f32::from(byte)).collect();
    if (picture.width_px(), picture.height_px()) == (SIDE_PX, SIDE_PX) {
        return of(picture);
    }
    match resize(picture, SIDE_PX, SIDE_PX, Filter::Bicubic) {
        Ok(resized) => of(&resized),
        // A picture that cannot be resized shows nothing.
        Err(_) => vec![0.0; 3 * SIDE_PX * SIDE_PX],
    }
}

/// The background that most pixels have, and their share.
fn background_of(levels: &[f32]) -> (Background, f32) {
    let share = |background: Background| {
        let fits = |(index, pixel): (usize, &[f32])| {
            let expected = background_level(background.rgb(), index % SIDE_PX, index / SIDE_PX);
            pixel.iter().zip(expected).all(|(level, expected)| (level - expected).abs() <= BACKGROUND_LEVELS)
        };
        levels.chunks_exact(3).enumerate().filter(|&(index, pixel)| fits((index, pixel))).count()
    };
    let error = |background: Background| {
        let squares = levels.chunks_exact(3).enumerate().map(|(index, pixel)| {
            let expected = background_level(background.rgb(), index % SIDE_PX, index / SIDE_PX);
            let square: f32 = pixel.iter().zip(expected).map(|(level, expected)| (level - expected).powi(2)).sum();
            square.min(3.0 * BACKGROUND_LEVELS * BACKGROUND_LEVELS)
        });
        squares.sum::<f32>()
    };
    let best = Background::ALL.into_iter().min_by(|&a, &b| error(a).total_cmp(&error(b)));
    let best = best.unwrap_or(Background::White);
    (best, share(best) as f32 / (SIDE_PX * SIDE_PX) as f32)
}

/// The best explanation of a picture in one style.
struct Explanation {
    style: Style,
    objects: Vec<Object>,
    error: f32,
    residual: f32,
    ambiguity: f32,
}

fn explain(levels: &[f32], background: Background, style: Style) -> Explanation {
    let mut canvas = Canvas::new(levels, background, style);
    let (mut objects, mut error, mut worst, mut ambiguity) = (vec![], 0.0, 0.0f32, 0.0f32);
    for place in Place::ALL {
        let PlaceExplanation { objects: found, error: square, rival } = canvas.explain(place);
        error += square;
        worst = worst.max(square);
        if !found.is_empty() {
            ambiguity = ambiguity.max(square / rival);
        }
        objects.extend(found);
    }
    Explanation { style, objects, error, residual: (worst / PLACE_VALUES as f32).sqrt(), ambiguity }
}

/// The best explanation of a place.
struct PlaceExplanation {
    objects: Vec<Object>,
    /// Sum of squares that it leaves.
    error: f32,
    /// What the best other explanation leaves.
    rival: f32,
}

/// A picture, and a copy of its background to draw explanations on.
struct Canvas<'a> {
    levels: &'a [f32],
    background: Background,
    style: Style,
    drawn: Vec<f32>,
}

impl<'a> Canvas<'a> {
    fn new(levels: &'a [f32], background: Background, style: Style) -> Self {
        let empty = Scene { background, style, objects: vec![] };
        Self { levels, background, style, drawn: empty.levels(Colour::rgb) }
    }

    fn explain(&mut self, place: Place) -> PlaceExplanation {
        let nothing = self.error(place, &[]);
        if nothing < EMPTY_SQUARE * PLACE_VALUES as f32 {
            return PlaceExplanation { objects: vec![], error: nothing, rival: f32::INFINITY };
        }
        let mut singles: Vec<(f32, Object)> = vec![];
        for size in [Size::Small, Size::Large] {
            for texture in [Texture::Solid, Texture::Striped] {
                for (shape, colour) in all_pairs() {
                    let object = Object { shape, colour, size, texture, place };
                    singles.push((self.error(place, &[object]), object));
                }
            }
        }
        singles.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (mut best_error, mut best, mut rival) = (singles[0].0, vec![singles[0].1], singles[1].0);
        if nothing <= best_error {
            (best_error, best, rival) = (nothing, vec![], best_error);
        }
        let large = |object: &Object| object.size == Size::Large && object.texture == Texture::Solid;
        let below: Vec<Object> = singles.iter().map(|(_, object)| *object).filter(large).take(3).collect();
        for below in below {
            for (shape, colour) in all_pairs().filter(|(_, colour)| *colour != below.colour) {
                let on = Object { shape, colour, size: Size::Small, texture: Texture::Solid, place };
                let error = self.error(place, &[below, on]);
                // One more object must explain clearly more.
                let needed = if best.len() == 2 { best_error } else { 0.8 * best_error };
                if error < needed {
                    (best_error, best, rival) = (error, vec![below, on], best_error);
                } else if best.len() == 2 {
                    rival = rival.min(error);
                }
            }
        }
        PlaceExplanation { objects: best, error: best_error, rival }
    }

    /// Sum of squares between the picture and some objects in a place.
    fn error(&mut self, place: Place, objects: &[Object]) -> f32 {
        let (left, top) = (usize::from(place.column()) * PLACE_PX, usize::from(place.row()) * PLACE_PX);
        for y in top..top + PLACE_PX {
            for x in left..left + PLACE_PX {
                let level = background_level(self.background.rgb(), x, y);
                self.drawn[3 * (y * SIDE_PX + x)..][..3].copy_from_slice(&level);
            }
        }
        for object in objects {
            draw(&mut self.drawn, object, object.colour.rgb(), self.style);
        }
        let row = |y: usize| 3 * (y * SIDE_PX + left)..3 * (y * SIDE_PX + left + PLACE_PX);
        let squares = (top..top + PLACE_PX).map(|y| {
            let pairs = self.levels[row(y)].iter().zip(&self.drawn[row(y)]);
            pairs.map(|(level, drawn)| (level - drawn) * (level - drawn)).sum::<f32>()
        });
        squares.sum()
    }
}

fn all_pairs() -> impl Iterator<Item = (Shape, Colour)> {
    Shape::ALL.into_iter().flat_map(|shape| Colour::ALL.map(|colour| (shape, colour)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Split, Task, Variation, World};

    fn scenes(count: u64) -> impl Iterator<Item = Scene> {
        let world = World::new(77);
        (0..count).flat_map(move |index| {
            let task = [Task::Understanding, Task::Generation, Task::Editing][index as usize % 3];
            let split = if index % 2 == 0 { Split::Train } else { Split::HeldOut };
            world.sample(task, split, index).scenes
        })
    }

    /// Share of pictures that are read as what they show.
    fn share_read(count: u64, picture: impl Fn(&Scene) -> Image) -> f64 {
        let (mut right, mut all) = (0, 0);
        for scene in scenes(count) {
            all += 1;
            let reading = read_scene(&picture(&scene));
            if reading.scene.as_ref() == Some(&scene) {
                right += 1;
            } else if all - right < 6 {
                eprintln!("{scene:?}\n  read as {reading:?}");
            }
        }
        f64::from(right) / f64::from(all)
    }

    #[test]
    fn clean_and_noisy_pictures_are_read() {
        assert!(share_read(600, Scene::render) >= 0.995);
        let noise = Variation { noise: 12, seed: 5, ..Variation::default() };
        assert!(share_read(200, |scene| scene.render_with(noise)) >= 0.99);
    }

    #[test]
    fn blurred_and_tinted_pictures_are_read() {
        let blurred = |scene: &Scene| {
            let small = resize(&scene.render(), 96, 96, Filter::Bicubic).unwrap();
            let rgb = small.rgb().iter().map(|&byte| (f32::from(byte) * 0.95 + 6.0) as u8).collect();
            Image::from_rgb8(96, 96, rgb).unwrap()
        };
        assert!(share_read(150, blurred) >= 0.97);
    }

    #[test]
    fn pictures_of_nothing_known_are_not_read() {
        let filled = |f: &dyn Fn(usize) -> u8| {
            Image::from_rgb8(SIDE_PX, SIDE_PX, (0..3 * SIDE_PX * SIDE_PX).map(f).collect()).unwrap()
        };
        let noise = filled(&|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8);
        let uniform = filled(&|i| [120, 40, 200][i % 3]);
        let black = filled(&|_| 0);
        let stripes = filled(&|i| if i / (3 * SIDE_PX) % 6 < 3 { 250 } else { 60 });
        for picture in [noise, uniform, black, stripes] {
            let reading = read_scene(&picture);
            assert_eq!(reading.scene, None, "{reading:?}");
        }
    }
}
