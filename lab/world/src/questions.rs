//! Questions about scenes: a scene -> a question and its one right answer.

use crate::Kind;
use crate::compose::{Rules, all_pairs, free_scene, usual};
use crate::draws::Draws;
use crate::phrases::{Detail, at, content, description, kind_of, noun, the};
use crate::scene::{Colour, Object, Place, Scene, Shape, either};
use nexus_data::Language;

/// Questions of one kind; `{}` is what is asked about.
const DESCRIBE: [[&str; 5]; 2] = [
    [
        "Describe the image.",
        "What do you see?",
        "What is in the picture?",
        "Please describe this picture.",
        "What does the image show?",
    ],
    ["描述这张图片。", "你看到了什么？", "图片里有什么？", "请描述这幅图。", "这张图显示了什么？"],
];
const COUNT: [[&str; 5]; 2] = [
    [
        "How many {} are there?",
        "Count the {}.",
        "How many {} do you see?",
        "What is the number of {}?",
        "How many {} does the picture show?",
    ],
    ["有几个{}？", "数一数{}。", "你看到几个{}？", "{}的数量是多少？", "图里有多少个{}？"],
];
const COLOUR: [[&str; 5]; 2] = [
    [
        "What colour is {}?",
        "Which colour does {} have?",
        "What is the colour of {}?",
        "Tell me the colour of {}.",
        "{} is of which colour?",
    ],
    ["{}是什么颜色？", "{}的颜色是什么？", "告诉我{}的颜色。", "请问{}是哪种颜色？", "{}有什么颜色？"],
];
const WHERE: [[&str; 5]; 2] = [
    ["Where is {}?", "In which place is {}?", "Where do you see {}?", "Where can {} be found?", "Tell me where {} is."],
    ["{}在哪里？", "{}在什么位置？", "你在哪里看到{}？", "告诉我{}的位置。", "请问{}在哪儿？"],
];
const SHAPE: [[&str; 5]; 2] = [
    [
        "Which shape is {}?",
        "What shape is the {} one?",
        "Which shape has the colour {}?",
        "What is the shape of the {} one?",
        "Tell me which shape is {}.",
    ],
    ["{}的是什么图形？", "哪个图形是{}？", "{}图形是什么形状？", "告诉我{}的是什么图形。", "请问哪种图形是{}？"],
];
const CONTENT: [[&str; 5]; 2] = [
    [
        "What is in the {}?",
        "What do you see in the {}?",
        "What does the {} show?",
        "What can be seen in the {}?",
        "Tell me what is in the {}.",
    ],
    ["{}有什么？", "你在{}看到什么？", "{}显示了什么？", "{}是什么？", "告诉我{}有什么。"],
];
const PRESENCE: [[&str; 5]; 2] = [
    [
        "Is there any {}?",
        "Is any {} in the image?",
        "Do you see any {}?",
        "Does the picture show any {}?",
        "Can any {} be seen?",
    ],
    ["有{}吗？", "图里有{}吗？", "你看到{}吗？", "图片显示{}吗？", "能看到{}吗？"],
];
const LARGER: [[&str; 5]; 2] = [
    [
        "Is {a} larger than {b}?",
        "Is {a} bigger than {b}?",
        "Compared with {b}, is {a} larger?",
        "Does {a} look larger than {b}?",
        "Is {a} the larger one, compared with {b}?",
    ],
    ["{a}比{b}大吗？", "{a}是不是比{b}大？", "和{b}相比，{a}更大吗？", "{a}看起来比{b}大吗？", "比起{b}，{a}更大吗？"],
];
const FURTHER_LEFT: [[&str; 5]; 2] = [
    [
        "Is {a} further left than {b}?",
        "Is {a} to the left of {b}?",
        "Does {a} stand left of {b}?",
        "Compared with {b}, is {a} further left?",
        "Is {a} on the left side of {b}?",
    ],
    [
        "{a}在{b}左侧吗？",
        "{a}比{b}更靠左吗？",
        "{a}是不是在{b}左侧？",
        "和{b}相比，{a}更靠左吗？",
        "比起{b}，{a}更靠左吗？",
    ],
];
const MORE: [[&str; 5]; 2] = [
    [
        "Are there more {a} than {b}?",
        "Do you see more {a} than {b}?",
        "Does the picture show more {a} than {b}?",
        "Is the number of {a} larger than that of {b}?",
        "Compared with {b}, are there more {a}?",
    ],
    ["{a}比{b}多吗？", "{a}是不是比{b}多？", "图里{a}比{b}多吗？", "{a}的数量比{b}大吗？", "和{b}相比，{a}更多吗？"],
];

/// A scene for a question.
pub(crate) fn scene(rules: Rules, draws: &mut Draws) -> Scene {
    let count = 1 + draws.below(4);
    let mut scene = free_scene(count, rules, draws);
    // Now and then several of a kind, so that there is something to count.
    if scene.objects.len() > 1 && draws.percent(30) {
        let objects = &mut scene.objects;
        let held_out = objects.iter().position(|object| super::is_held_out(object.colour, object.shape)).unwrap_or(0);
        let (first, on_top) = (objects[held_out], objects.windows(2).any(|pair| pair[0].place == pair[1].place));
        if !on_top {
            let from = draws.below(objects.len());
            for object in &mut objects[from..] {
                (object.colour, object.shape) = (first.colour, first.shape);
            }
        }
    }
    scene
}

/// A question with its one right answer.
pub(crate) struct Asked {
    /// Kind of the question; another one than was wanted if the scene has nothing to ask of that kind.
    pub(crate) kind: Kind,
    pub(crate) question: String,
    pub(crate) answer: String,
    /// Places of what the question asks about; none if that is not a matter of single things.
    pub(crate) places: Vec<Place>,
}

/// A question of a kind about a scene, and its answer.
pub(crate) fn ask(kind: Kind, scene: &Scene, language: Language, draws: &mut Draws) -> Asked {
    let form = |forms: &[[&'static str; 5]; 2], draws: &mut Draws| -> &'static str { draws.one(&forms[at(language)]) };
    let truth = |is: bool| either(language, if is { "yes" } else { "no" }, if is { "是" } else { "否" }).to_string();
    let objects = &scene.objects;
    let places_of = |asked: &dyn Fn(&Object) -> bool| -> Vec<Place> {
        objects.iter().filter(|object| asked(object)).map(|object| object.place).collect()
    };
    let (question, answer, places) = match kind {
        Kind::Describe => (form(&DESCRIBE, draws).to_string(), description(scene, language), vec![]),
        Kind::Count => {
            let any = draws.one(objects);
            let shape = if draws.percent(75) { any.shape } else { draws.one(&Shape::ALL) };
            let colour = if draws.percent(75) { any.colour } else { draws.one(&Colour::ALL) };
            let (what, places) = match draws.below(3) {
                0 => (either(language, "shapes", "图形").to_string(), places_of(&|_| true)),
                1 => (kind_of(shape, language).to_string(), places_of(&|object| object.shape == shape)),
                _ => {
                    let what = either(
                        language,
                        format!("{} shapes", colour.name(language)),
                        format!("{}图形", colour.name(language)),
                    );
                    (what, places_of(&|object| object.colour == colour))
                }
            };
            (form(&COUNT, draws).replace("{}", &what), places.len().to_string(), places)
        }
        Kind::Colour => match unique(objects, |object| object.shape).first() {
            Some(object) => {
                let what = the(object.shape.name(language), language);
                let colour = object.colour.name(language).to_string();
                (capital(&form(&COLOUR, draws).replace("{}", &what)), colour, vec![object.place])
            }
            None => return ask(Kind::Presence, scene, language, draws),
        },
        Kind::Where => match whereabouts(objects, language, draws) {
            None => return ask(Kind::Count, scene, language, draws),
            Some((what, place)) => {
                (capital(&form(&WHERE, draws).replace("{}", &what)), place.name(language).to_string(), vec![place])
            }
        },
        Kind::Shape => match unique(objects, |object| object.colour).as_slice() {
            [] => return ask(Kind::Content, scene, language, draws),
            found => {
                let object = draws.one(found);
                let text = form(&SHAPE, draws).replace("{}", object.colour.name(language));
                (capital(&text), object.shape.name(language).to_string(), vec![object.place])
            }
        },
        Kind::Content => {
            let place = if draws.percent(70) { draws.one(objects).place } else { draws.one(&Place::ALL) };
            let text = form(&CONTENT, draws).replace("{}", place.name(language));
            (capital(&text), content(scene, place, language), vec![place])
        }
        Kind::Compare => {
            let (question, answer) = compare(scene, language, draws);
            (question, answer, vec![])
        }
        _ => {
            let (what, is) = presence(objects, language, draws);
            (form(&PRESENCE, draws).replace("{}", &what), truth(is), vec![])
        }
    };
    Asked { kind, question, answer, places }
}

/// A name that only one object has, by colour, by shape or by both, and where that object is.
fn whereabouts(objects: &[Object], language: Language, draws: &mut Draws) -> Option<(String, Place)> {
    let by = draws.below(4);
    let found = match by {
        0 => unique(objects, |object| object.shape),
        1 => unique(objects, |object| object.colour),
        _ => unique(objects, |object| (object.colour, object.shape)),
    };
    let object = (!found.is_empty()).then(|| draws.one(&found))?;
    let name = match by {
        0 => object.shape.name(language).to_string(),
        1 => colour_shape(&object, language),
        _ => noun(&object, Detail::Name, language),
    };
    Some((the(&name, language), object.place))
}

/// An object by its colour alone: `red shape`.
fn colour_shape(object: &Object, language: Language) -> String {
    let colour = object.colour.name(language);
    either(language, format!("{colour} shape"), format!("{colour}图形"))
}

/// Something that may be there, and whether it is: a shape, a colour, or both.
fn presence(objects: &[Object], language: Language, draws: &mut Draws) -> (String, bool) {
    let near = draws.one(objects);
    let other = usual(draws.one(&all_pairs(false)));
    let asked = if draws.percent(50) {
        near
    } else {
        // The right shape in another colour or the other way round, as often as something quite different.
        let mixed = [Object { colour: other.colour, ..near }, Object { shape: other.shape, ..near }, other];
        let mixed = draws.one(&mixed);
        if super::is_held_out(mixed.colour, mixed.shape) { other } else { mixed }
    };
    match draws.below(4) {
        0 => {
            let shape = if asked == near { near.shape } else { other.shape };
            (shape.name(language).to_string(), objects.iter().any(|object| object.shape == shape))
        }
        1 => {
            let colour = if asked == near { near.colour } else { other.colour };
            let asked = Object { colour, ..asked };
            (colour_shape(&asked, language), objects.iter().any(|object| object.colour == colour))
        }
        _ => {
            let is = objects.iter().any(|object| (object.colour, object.shape) == (asked.colour, asked.shape));
            (noun(&asked, Detail::Name, language), is)
        }
    }
}

fn compare(scene: &Scene, language: Language, draws: &mut Draws) -> (String, String) {
    let truth = |is: bool| either(language, if is { "yes" } else { "no" }, if is { "是" } else { "否" }).to_string();
    let fill = |form: &str, a: &str, b: &str| capital(&form.replace("{a}", a).replace("{b}", b));
    let named = unique(&scene.objects, |object| (object.colour, object.shape));
    let [a, b] = match draws.some(&named, 2).as_slice() {
        [a, b] => [*a, *b],
        _ => {
            let shapes = draws.some(&Shape::ALL, 2);
            let count = |shape| scene.objects.iter().filter(|object| object.shape == shape).count();
            let form = draws.one(&MORE[at(language)]);
            let text = fill(form, kind_of(shapes[0], language), kind_of(shapes[1], language));
            return (text, truth(count(shapes[0]) > count(shapes[1])));
        }
    };
    let [name_a, name_b] = [a, b].map(|object| the(&noun(&object, Detail::Name, language), language));
    match draws.below(2) {
        0 => (fill(draws.one(&LARGER[at(language)]), &name_a, &name_b), truth(a.size > b.size)),
        _ => {
            let is = a.place.column() < b.place.column();
            (fill(draws.one(&FURTHER_LEFT[at(language)]), &name_a, &name_b), truth(is))
        }
    }
}

/// Objects that no other one of the scene has this in common with.
pub(crate) fn unique<K: PartialEq>(objects: &[Object], key: impl Fn(&Object) -> K) -> Vec<Object> {
    let alone = |object: &&Object| objects.iter().filter(|other| key(other) == key(object)).count() == 1;
    objects.iter().filter(alone).copied().collect()
}

/// The text with a capital first letter.
fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}
