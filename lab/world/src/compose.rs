//! Composing scenes: choices -> scenes with a phrase that determines them, and canonical layouts.

use crate::draws::Draws;
use crate::phrases::{Detail, description, list, one, placed, prompt, several};
use crate::render::Variation;
use crate::scene::{Background, Colour, Object, Place, Scene, Shape, Size, Style, Texture, either, is_held_out};
use crate::{Emphasis, Kind, Split};
use nexus_data::Language;

/// Places of so many objects of which nothing is said, in the order in which they are named.
pub fn canonical_places(count: usize) -> &'static [Place] {
    const PLACES: [&[Place]; 5] = [
        &[],
        &[Place(4)],
        &[Place(3), Place(5)],
        &[Place(3), Place(4), Place(5)],
        &[Place(0), Place(2), Place(6), Place(8)],
    ];
    PLACES[count.min(4)]
}

/// What scenes are composed by.
#[derive(Clone, Copy)]
pub(crate) struct Rules {
    /// [`Split::HeldOut`]: the first pair of colour and shape is one that training has not, the others any.
    pub(crate) split: Split,
    pub(crate) emphasis: Option<Emphasis>,
    /// Pictures show shades of the colours, but for those of edits.
    pub(crate) shades: bool,
}

impl Rules {
    /// How a picture is drawn, with so much noise.
    pub(crate) fn variation(self, noise: u8, draws: &mut Draws) -> Variation {
        let varies = noise > 0 || self.shades;
        Variation { noise, shades: self.shades, seed: if varies { draws.below(1 << 30) as u64 } else { 0 } }
    }

    /// Whether this is what the samples are to be full of.
    pub(crate) fn emphasises(self, emphasis: Emphasis) -> bool {
        self.emphasis == Some(emphasis)
    }
}

/// All pairs of colour and shape that are held out, or all others.
pub(crate) fn all_pairs(held_out: bool) -> Vec<(Colour, Shape)> {
    let all = Colour::ALL.into_iter().flat_map(|colour| Shape::ALL.map(|shape| (colour, shape)));
    all.filter(|&(colour, shape)| is_held_out(colour, shape) == held_out).collect()
}

/// Distinct pairs of colour and shape.
pub(crate) fn pairs(count: usize, rules: Rules, draws: &mut Draws) -> Vec<(Colour, Shape)> {
    let mut seen = all_pairs(false);
    let mut pairs = match rules.split {
        Split::Train => draws.some(&seen, if rules.emphasises(Emphasis::Lookalikes) { 1 } else { count }),
        Split::HeldOut => draws.some(&all_pairs(true), 1),
    };
    if rules.emphasises(Emphasis::Lookalikes) {
        let (colour, shape) = pairs[0];
        seen.retain(|other| *other != pairs[0] && (other.0 == colour || other.1 == shape));
    }
    pairs.extend(draws.some(&seen, count - pairs.len()));
    pairs
}

/// A large solid object in the middle.
pub(crate) fn usual((colour, shape): (Colour, Shape)) -> Object {
    Object { shape, colour, size: Size::Large, texture: Texture::Solid, place: Place(4) }
}

/// Background and style; white and flat more often than not.
pub(crate) fn surroundings(draws: &mut Draws) -> (Background, Style) {
    let background = if draws.percent(50) { Background::White } else { draws.one(&Background::ALL) };
    let style = if draws.percent(20) { Style::Outlined } else { Style::Flat };
    (background, style)
}

/// A scene of one to four objects with any sizes, textures and places, now and then with one on top of another.
pub(crate) fn free_scene(count: usize, rules: Rules, draws: &mut Draws) -> Scene {
    let places = draws.some(&Place::ALL, count);
    let objects = pairs(count, rules, draws).into_iter().zip(places).map(|(pair, place)| {
        let size = if draws.percent(35) { Size::Small } else { Size::Large };
        let texture = if draws.percent(20) { Texture::Striped } else { Texture::Solid };
        Object { size, texture, place, ..usual(pair) }
    });
    let mut objects: Vec<Object> = objects.collect();
    if count >= 2 && (draws.percent(12) || rules.emphasises(Emphasis::Stacked)) {
        let place = objects[0].place;
        objects[0] = Object { size: Size::Large, texture: Texture::Solid, ..objects[0] };
        objects[1] = Object { size: Size::Small, texture: Texture::Solid, place, ..objects[1] };
        if objects[0].colour == objects[1].colour {
            objects[1].place =
                *Place::ALL.iter().find(|place| objects.iter().all(|o| o.place != **place)).unwrap_or(&place);
        }
    }
    let (background, style) = surroundings(draws);
    Scene { background, style, objects }.sorted()
}

/// A scene and a prompt that determines it.
pub(crate) fn generation(kind: Kind, language: Language, rules: Rules, draws: &mut Draws) -> (String, Scene) {
    let (background, style) = surroundings(draws);
    let mut scene = Scene { background, style, objects: vec![] };
    if draws.percent(12) && kind == Kind::Position {
        let count = 1 + draws.below(3);
        let scene = free_scene(count, rules, draws);
        return (description(&scene, language), scene);
    }
    let content = match kind {
        Kind::SingleObject => {
            let mut object = usual(pairs(1, rules, draws)[0]);
            if draws.percent(25) {
                object.size = Size::Small;
            }
            if draws.percent(15) {
                object.texture = Texture::Striped;
            }
            scene.objects = vec![object];
            one(&object, Detail::Unusual, language)
        }
        Kind::Counting => {
            let count = 2 + draws.below(3);
            let mut object = usual(pairs(1, rules, draws)[0]);
            if draws.percent(25) {
                object.size = Size::Small;
            }
            let places = canonical_places(count);
            scene.objects = places.iter().map(|&place| Object { place, ..object }).collect();
            several(count, &object, language)
        }
        Kind::Colours => {
            let count = 3 + draws.below(2);
            row(&mut scene, pairs(count, rules, draws).into_iter().map(usual).collect(), language)
        }
        Kind::AttributeBinding => {
            let mut objects: Vec<Object> = pairs(2, rules, draws).into_iter().map(usual).collect();
            let small = draws.below(2);
            objects[small].size = Size::Small;
            if draws.percent(50) {
                objects[draws.below(2)].texture = Texture::Striped;
            }
            if draws.percent(50) {
                objects.swap(0, 1);
            }
            scene.objects =
                objects.iter().zip(canonical_places(2)).map(|(object, &place)| Object { place, ..*object }).collect();
            let phrases: Vec<String> = objects.iter().map(|object| one(object, Detail::Full, language)).collect();
            list(&phrases, language)
        }
        Kind::Position => position(&mut scene, rules, language, draws),
        _ => row(&mut scene, pairs(2, rules, draws).into_iter().map(usual).collect(), language),
    };
    (prompt(&content, &scene, language, draws), scene.sorted())
}

/// Objects in their canonical places.
fn row(scene: &mut Scene, objects: Vec<Object>, language: Language) -> String {
    let places = canonical_places(objects.len());
    scene.objects = objects.iter().zip(places).map(|(object, &place)| Object { place, ..*object }).collect();
    let phrases: Vec<String> = objects.iter().map(|object| one(object, Detail::Unusual, language)).collect();
    list(&phrases, language)
}

/// Objects whose places are said, one by one or by how they stand to each other.
fn position(scene: &mut Scene, rules: Rules, language: Language, draws: &mut Draws) -> String {
    let mut objects: Vec<Object> = pairs(2, rules, draws).into_iter().map(usual).collect();
    if draws.percent(50) {
        objects.swap(0, 1);
    }
    let form = if rules.emphasises(Emphasis::Stacked) { 3 } else { draws.below(4) };
    match form {
        0 => {
            let places = draws.some(&Place::ALL, 2);
            let first = if rules.split == Split::HeldOut {
                objects.iter().position(|object| is_held_out(object.colour, object.shape)).unwrap_or(0)
            } else {
                0
            };
            scene.objects = vec![Object { place: places[0], ..objects[first] }];
            placed(&scene.objects[0], Detail::Unusual, language)
        }
        1 => {
            let places = draws.some(&Place::ALL, 2);
            scene.objects = objects.iter().zip(places).map(|(object, place)| Object { place, ..*object }).collect();
            let phrases: Vec<String> =
                scene.objects.iter().map(|object| placed(object, Detail::Unusual, language)).collect();
            list(&phrases, language)
        }
        2 => {
            let (english, chinese, places) = draws.one(&[
                ("above", "上面", [1, 7]),
                ("below", "下面", [7, 1]),
                ("to the left of", "左侧", [3, 5]),
                ("to the right of", "右侧", [5, 3]),
            ]);
            scene.objects =
                objects.iter().zip(places).map(|(object, place)| Object { place: Place(place), ..*object }).collect();
            let [first, second] = [0, 1].map(|i| one(&scene.objects[i], Detail::Unusual, language));
            either(language, format!("{first} {english} {second}"), format!("{second}，它的{chinese}有{first}"))
        }
        _ => {
            let mut on = objects[1];
            if on.colour == objects[0].colour {
                on.place = Place(5);
                objects[0].place = Place(3);
                scene.objects = vec![objects[0], on];
                let phrases: Vec<String> = scene.objects.iter().map(|o| one(o, Detail::Unusual, language)).collect();
                return list(&phrases, language);
            }
            on.size = Size::Small;
            scene.objects = vec![objects[0], on];
            let [below, above] = [objects[0], on].map(|object| one(&object, Detail::Full, language));
            either(language, format!("{above} on top of {below}"), format!("{below}，上面放着{above}"))
        }
    }
}
