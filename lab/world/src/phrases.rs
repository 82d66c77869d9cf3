//! Words for scenes: objects, places and scenes -> phrases in English and Chinese.

use crate::draws::Draws;
use crate::scene::{Background, Object, Place, Scene, Shape, Size, Style, Texture, either};
use nexus_data::Language;

/// Frames around what a picture shows; `{}` is the content.
const FRAMES: [[&str; 7]; 2] = [
    ["{}", "a picture of {}", "draw {}", "an image with {}", "please paint {}", "I would like to see {}", "show me {}"],
    ["{}", "一张图片，上面有{}", "画{}", "请画{}", "我想看到{}", "一幅有{}的图", "给我看{}"],
];

/// Ways to name a background after the content.
const ON_BACKGROUND: [[&str; 3]; 2] =
    [[" on a {} background", " with a {} background", ", {} background"], ["，{}背景", "，背景是{}", "，在{}背景上"]];

/// Ways to ask for outlines after the content.
const OUTLINED: [[&str; 3]; 2] = [
    [", in outlined style", ", with dark outlines", ", everything outlined"],
    ["，描边风格", "，带深色轮廓", "，全部描边"],
];

/// Words for numbers of objects, from 2.
const NUMBERS: [[&str; 3]; 2] = [["two", "three", "four"], ["两个", "三个", "四个"]];

pub(crate) fn at(language: Language) -> usize {
    either(language, 0, 1)
}

/// What of an object is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Detail {
    /// Colour and shape.
    Name,
    /// What differs from a large solid object too.
    Unusual,
    /// Size always, and stripes.
    Full,
}

impl Object {
    /// Its colour and shape in words: `red circle`.
    pub fn name(&self, language: Language) -> String {
        noun(self, Detail::Name, language)
    }

    /// Everything but its place, as descriptions and answers say it: `a large striped red circle`.
    pub fn description(&self, language: Language) -> String {
        one(self, Detail::Full, language)
    }
}

/// Adjectives and noun, without an article: `small striped red circle`.
pub(crate) fn noun(object: &Object, detail: Detail, language: Language) -> String {
    let mut words = vec![];
    let says_size = detail == Detail::Full || (detail == Detail::Unusual && object.size == Size::Small);
    if says_size {
        words.push(object.size.name(language));
    }
    if detail != Detail::Name && object.texture == Texture::Striped {
        words.push(either(language, "striped", "条纹"));
    }
    words.extend([object.colour.name(language), object.shape.name(language)]);
    words.join(either(language, " ", ""))
}

/// With an article or a measure word: `an orange circle`.
pub(crate) fn one(object: &Object, detail: Detail, language: Language) -> String {
    let noun = noun(object, detail, language);
    match language {
        Language::English if noun.starts_with(['a', 'e', 'i', 'o', 'u']) => format!("an {noun}"),
        Language::English => format!("a {noun}"),
        Language::Chinese => format!("一个{noun}"),
    }
}

/// `in the top left`.
pub(crate) fn in_place(place: Place, language: Language) -> String {
    either(language, format!("in the {}", place.name(language)), format!("在{}", place.name(language)))
}

/// Phrases joined by commas and a last `and`.
pub(crate) fn list(phrases: &[String], language: Language) -> String {
    let (comma, and) = either(language, (", ", " and "), ("、", "和"));
    match phrases {
        [] => String::new(),
        [one] => one.clone(),
        [first @ .., last] => format!("{}{and}{last}", first.join(comma)),
    }
}

/// `three red circles`.
pub(crate) fn several(count: usize, object: &Object, language: Language) -> String {
    let number = NUMBERS[at(language)][count.clamp(2, 4) - 2];
    match language {
        Language::English => {
            let noun = noun(object, Detail::Unusual, language);
            let stem = noun.strip_suffix(object.shape.name(language)).unwrap_or_default();
            format!("{number} {stem}{}", object.shape.plural())
        }
        Language::Chinese => format!("{number}{}", noun(object, Detail::Unusual, language)),
    }
}

/// An object and where it is: `a red circle in the top left`.
pub(crate) fn placed(object: &Object, detail: Detail, language: Language) -> String {
    let one = one(object, detail, language);
    match language {
        Language::English => format!("{one} {}", in_place(object.place, language)),
        Language::Chinese => format!("{}的{one}", object.place.name(language)),
    }
}

/// A prompt for content that leaves background and style to be said after it.
pub(crate) fn prompt(content: &str, scene: &Scene, language: Language, draws: &mut Draws) -> String {
    let mut text = draws.one(&FRAMES[at(language)]).replace("{}", content);
    if scene.background != Background::White {
        let form = draws.one(&ON_BACKGROUND[at(language)]);
        text.push_str(&form.replace("{}", scene.background.name(language)));
    }
    if scene.style == Style::Outlined {
        text.push_str(draws.one(&OUTLINED[at(language)]));
    }
    text
}

/// The one full description of a scene, in the order of the places.
pub(crate) fn description(scene: &Scene, language: Language) -> String {
    let mut phrases: Vec<String> = Vec::new();
    for (index, object) in scene.objects.iter().enumerate() {
        let below = index.checked_sub(1).map(|below| &scene.objects[below]);
        match below.filter(|below| below.place == object.place) {
            Some(_) => {
                if let Some(last) = phrases.last_mut() {
                    last.push_str(&on_it(object, language));
                }
            }
            None => phrases.push(placed(object, Detail::Full, language)),
        }
    }
    let background = scene.background.name(language);
    let outlined = scene.style == Style::Outlined;
    match language {
        Language::English => {
            let style = if outlined { ", outlined" } else { "" };
            format!("{} on a {background} background{style}", phrases.join(", "))
        }
        Language::Chinese => {
            let style = if outlined { "，描边" } else { "" };
            format!("{}，{background}背景{style}", phrases.join("，"))
        }
    }
}

/// What lies on the object that was named before.
fn on_it(object: &Object, language: Language) -> String {
    let on = one(object, Detail::Full, language);
    either(language, format!(" with {on} on it"), format!("，上面有{on}"))
}

/// What stands in a place: `a small red circle`, `nothing`.
pub(crate) fn content(scene: &Scene, place: Place, language: Language) -> String {
    let mut here = scene.objects.iter().filter(|object| object.place == place);
    let Some(object) = here.next() else { return either(language, "nothing", "没有").to_string() };
    here.fold(one(object, Detail::Full, language), |text, above| text + &on_it(above, language))
}

/// The objects without a place of their own, as in `which colour is the circle`.
pub(crate) fn the(noun: &str, language: Language) -> String {
    either(language, format!("the {noun}"), noun.to_string())
}

/// `circles`, or the plain word in Chinese.
pub(crate) fn kind_of(shape: Shape, language: Language) -> &'static str {
    either(language, shape.plural(), shape.name(language))
}
