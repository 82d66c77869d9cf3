//! Judging pictures: a picture and the truth -> what is different.

use crate::reader::{Reading, read_scene};
use crate::render::SIDE_PX;
use crate::scene::{Background, Colour, Object, Place, Scene, Style};
use nexus_data::{Image, Language};

/// What a picture shows otherwise than it should.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Difference {
    /// No scene explains the picture; the residual is in levels of 255.
    Unreadable {
        /// Root mean square difference of the worst place from its best explanation.
        residual: f32,
    },
    /// Another background.
    Background {
        /// The truth.
        expected: Background,
        /// What the picture shows.
        found: Background,
    },
    /// Another style.
    Style {
        /// The truth.
        expected: Style,
        /// What the picture shows.
        found: Style,
    },
    /// Other objects in a place.
    Place {
        /// Where.
        place: Place,
        /// The truth.
        expected: Vec<Object>,
        /// What the picture shows.
        found: Vec<Object>,
    },
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unreadable { residual } => write!(f, "not readable (residual {residual:.0})"),
            Self::Background { expected, found } => write!(f, "{found:?} background instead of {expected:?}"),
            Self::Style { expected, found } => write!(f, "{found:?} instead of {expected:?}"),
            Self::Place { place, expected, found } => {
                let words = |objects: &[Object]| match objects {
                    [] => "nothing".to_string(),
                    _ => objects.iter().map(words).collect::<Vec<_>>().join(" with "),
                };
                write!(f, "{}: {} instead of {}", place.name(Language::English), words(found), words(expected))
            }
        }
    }
}

fn words(object: &Object) -> String {
    let Object { shape, colour, size, texture, .. } = object;
    format!("{size:?} {texture:?} {colour:?} {shape:?}").to_lowercase()
}

/// Whether a picture shows what it should.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// Whether there is no difference.
    pub correct: bool,
    /// How far what was read is from being read otherwise: 0 is exact, 1 could be either ([`Reading::ambiguity`]).
    ///
    /// [`Reading::ambiguity`]: super::Reading::ambiguity
    pub ambiguity: f32,
    /// All differences.
    pub differences: Vec<Difference>,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.correct {
            return f.write_str("right");
        }
        let differences: Vec<String> = self.differences.iter().map(Difference::to_string).collect();
        f.write_str(&differences.join("; "))
    }
}

/// Compares what a picture shows with the truth.
pub fn judge(picture: &Image, truth: &Scene) -> Verdict {
    let Reading { scene, residual, ambiguity, .. } = read_scene(picture);
    let Some(found) = scene else {
        return Verdict { correct: false, ambiguity, differences: vec![Difference::Unreadable { residual }] };
    };
    let mut differences = vec![];
    if found.background != truth.background {
        differences.push(Difference::Background { expected: truth.background, found: found.background });
    }
    if found.style != truth.style {
        differences.push(Difference::Style { expected: truth.style, found: found.style });
    }
    for place in Place::ALL {
        let at = |scene: &Scene| scene.objects.iter().filter(|object| object.place == place).copied().collect();
        let (expected, found): (Vec<Object>, Vec<Object>) = (at(truth), at(&found));
        if expected != found {
            differences.push(Difference::Place { place, expected, found });
        }
    }
    Verdict { correct: differences.is_empty(), ambiguity, differences }
}

/// Pixels around a change that count as changed too: edges are drawn over them.
const MARGIN_PX: usize = 3;

/// Where two scenes differ, with a margin of 3 pixels: `[height, width]`, row by row.
pub fn changed_region(before: &Scene, after: &Scene) -> Vec<bool> {
    let (before, after) = (before.levels(Colour::rgb), after.levels(Colour::rgb));
    let pixels = before.chunks_exact(3).zip(after.chunks_exact(3));
    let differs: Vec<bool> =
        pixels.map(|(before, after)| before.iter().zip(after).any(|(a, b)| (a - b).abs() > 0.5)).collect();
    let near = |index: usize| {
        let (x, y) = (index % SIDE_PX, index / SIDE_PX);
        let range = |at: usize| at.saturating_sub(MARGIN_PX)..(at + MARGIN_PX + 1).min(SIDE_PX);
        range(y).any(|y| range(x).any(|x| differs[y * SIDE_PX + x]))
    };
    (0..differs.len()).map(near).collect()
}

/// Peak signal-to-noise ratio in dB over the pixels outside a region; infinite if they are equal or there are none.
///
/// # Panics
/// If the pictures are not of the world's size, or the region has another one.
pub fn psnr_outside(picture: &Image, truth: &Image, region: &[bool]) -> f32 {
    for picture in [picture, truth] {
        assert_eq!((picture.width_px(), picture.height_px()), (SIDE_PX, SIDE_PX), "size of a picture of the world");
    }
    assert_eq!(region.len(), SIDE_PX * SIDE_PX, "size of the region");
    let pairs = picture.rgb().chunks_exact(3).zip(truth.rgb().chunks_exact(3)).zip(region);
    let (mut sum, mut count) = (0.0f64, 0u32);
    for ((a, b), _) in pairs.filter(|(_, changed)| !**changed) {
        sum += a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>();
        count += 3;
    }
    if sum == 0.0 { f32::INFINITY } else { (10.0 * (255.0 * 255.0 * f64::from(count) / sum).log10()) as f32 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Colour, Shape, Size, Texture};

    fn scene() -> Scene {
        let object =
            |shape, colour, size, place| Object { shape, colour, size, texture: Texture::Solid, place: Place(place) };
        Scene {
            background: Background::White,
            style: Style::Flat,
            objects: vec![
                object(Shape::Circle, Colour::Red, Size::Large, 0),
                object(Shape::Square, Colour::Blue, Size::Small, 5),
            ],
        }
    }

    #[test]
    fn every_kind_of_mistake_is_found() {
        let truth = scene();
        assert!(judge(&truth.render(), &truth).correct);
        type Mistake = (&'static str, fn(&mut Scene));
        let wrong: [Mistake; 7] = [
            ("colour", |scene| scene.objects[0].colour = Colour::Orange),
            ("shape", |scene| scene.objects[1].shape = Shape::Circle),
            ("size", |scene| scene.objects[1].size = Size::Large),
            ("missing", |scene| scene.objects.truncate(1)),
            ("swapped", |scene| (scene.objects[0].place, scene.objects[1].place) = (Place(5), Place(0))),
            ("background", |scene| scene.background = Background::Pink),
            ("style", |scene| scene.style = Style::Outlined),
        ];
        for (what, change) in wrong {
            let mut other = truth.clone();
            change(&mut other);
            let verdict = judge(&other.render(), &truth);
            assert!(!verdict.correct, "{what}");
            assert!(!matches!(verdict.differences[0], Difference::Unreadable { .. }), "{what}: {verdict}");
        }
    }

    #[test]
    fn a_shape_between_two_is_ambiguous() {
        let truth = scene();
        assert!(judge(&truth.render(), &truth).ambiguity < 1e-3);
        let mut other = truth.clone();
        other.objects[0].shape = Shape::Square;
        let (a, b) = (truth.render(), other.render());
        let between = |share: f32| {
            let mixed = a
                .rgb()
                .iter()
                .zip(b.rgb())
                .map(|(a, b)| (f32::from(*a) * (1.0 - share) + f32::from(*b) * share).round() as u8);
            judge(&Image::from_rgb8(SIDE_PX, SIDE_PX, mixed.collect()).unwrap(), &truth)
        };
        // Errors grow with the square of the share: (0.25 / 0.75)² and (0.45 / 0.55)².
        for (share, expected) in [(0.25, 0.111), (0.45, 0.669)] {
            let verdict = between(share);
            assert!(verdict.correct && (verdict.ambiguity - expected).abs() < 0.02, "{share}: {verdict:?}");
        }
        assert!(!between(0.6).correct);
    }

    #[test]
    fn the_outside_of_a_change_is_measured() {
        let before = scene();
        let mut after = before.clone();
        after.objects[0].colour = Colour::Green;
        let region = changed_region(&before, &after);
        let changed = region.iter().filter(|changed| **changed).count();
        assert!((1200..2800).contains(&changed), "{changed}");
        assert_eq!(psnr_outside(&before.render(), &after.render(), &region), f32::INFINITY);
        let mut bytes = after.render().rgb().to_vec();
        for byte in &mut bytes {
            *byte = byte.saturating_sub(8);
        }
        let darker = Image::from_rgb8(SIDE_PX, SIDE_PX, bytes).unwrap();
        let decibels = psnr_outside(&darker, &after.render(), &region);
        assert!((decibels - 30.07).abs() < 0.1, "{decibels}");
    }
}
