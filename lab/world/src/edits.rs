//! Changes of scenes: a scene -> an instruction and the scene after it.

use crate::compose::{Rules, all_pairs, pairs, usual};
use crate::draws::Draws;
use crate::phrases::{Detail, at, in_place, noun, one, the};
use crate::questions::unique;
use crate::scene::{Background, Colour, Object, Place, Scene, Shape, Size, Style, Texture, either, is_held_out};
use crate::{Emphasis, Kind};
use nexus_data::Language;

/// Instructions of one kind; `{}` is the object, `{to}` what becomes of it.
type Forms = [[&'static str; 5]; 2];

const ADD: Forms = [
    ["Add {} {to}.", "Put {} {to}.", "Place {} {to}.", "Draw {} {to}.", "Insert {} {to}."],
    ["{to}加上{}。", "{to}放{}。", "请{to}添加{}。", "{to}画{}。", "{to}插入{}。"],
];
const REMOVE: Forms = [
    ["Remove {}.", "Delete {}.", "Take {} away.", "Erase {}.", "Get rid of {}."],
    ["去掉{}。", "删除{}。", "把{}拿走。", "擦掉{}。", "请移除{}。"],
];
const RECOLOUR: Forms = [
    ["Make {} {to}.", "Change the colour of {} to {to}.", "Paint {} {to}.", "Turn {} {to}.", "Colour {} {to}."],
    ["把{}变成{to}。", "将{}的颜色改为{to}。", "把{}涂成{to}。", "让{}变为{to}。", "请把{}改成{to}。"],
];
const RESHAPE: Forms = [
    [
        "Turn {} into a {to}.",
        "Replace {} by a {to}.",
        "Change {} to a {to}.",
        "Make a {to} of {}.",
        "Transform {} into a {to}.",
    ],
    ["把{}换成{to}。", "将{}替换为{to}。", "把{}变形为{to}。", "让{}变成一个{to}。", "请把{}改为{to}形状。"],
];
const RESIZE: Forms = [
    [
        "Make {} {to}.",
        "Change the size of {} to {to}.",
        "Resize {} to {to}.",
        "{} should be {to}.",
        "Let {} become {to}.",
    ],
    ["把{}变{to}。", "将{}的大小改为{to}。", "调整{}为{to}。", "{}应该是{to}。", "让{}变{to}。"],
];
const BACKGROUND: Forms = [
    [
        "Change the background to {to}.",
        "Make the background {to}.",
        "Use a {to} background.",
        "Put everything on a {to} background.",
        "Turn the background {to}.",
    ],
    ["把背景改成{to}。", "将背景变为{to}。", "使用{to}背景。", "换成{to}背景。", "让背景变成{to}。"],
];
const MOVE: Forms = [
    [
        "Move {} to the {to}.",
        "Shift {} to the {to}.",
        "Bring {} to the {to}.",
        "Relocate {} to the {to}.",
        "Let {} go to the {to}.",
    ],
    ["把{}移到{to}。", "将{}移动到{to}。", "把{}放到{to}。", "让{}到{to}去。", "请把{}挪到{to}。"],
];
const OUTLINE: Forms = [
    [
        "Give everything a dark outline.",
        "Draw it in outlined style.",
        "Add dark outlines.",
        "Change to outlined style.",
        "Outline all shapes.",
    ],
    ["给所有图形加上深色轮廓。", "画成描边风格。", "加上深色轮廓。", "改为描边风格。", "给全部图形描边。"],
];
const FLATTEN: Forms = [
    [
        "Remove the outlines.",
        "Draw it in flat style.",
        "Take the dark outlines away.",
        "Change to flat style.",
        "No outlines, please.",
    ],
    ["去掉轮廓。", "画成平面风格。", "把深色轮廓去掉。", "改为平面风格。", "请不要轮廓。"],
];

/// A scene that can be changed: objects of different names, none on another, and a free place.
pub(crate) fn scene(rules: Rules, draws: &mut Draws) -> Scene {
    let count = if rules.emphasises(Emphasis::Lookalikes) { 2 + draws.below(2) } else { 1 + draws.below(3) };
    let places = draws.some(&Place::ALL, count);
    let objects = pairs(count, rules, draws).into_iter().zip(places).map(|(pair, place)| {
        let size = if draws.percent(35) { Size::Small } else { Size::Large };
        let texture = if draws.percent(15) { Texture::Striped } else { Texture::Solid };
        Object { size, texture, place, ..usual(pair) }
    });
    let objects = objects.collect();
    let (background, style) = super::compose::surroundings(draws);
    Scene { background, style, objects }.sorted()
}

/// A change of a scene.
pub(crate) struct Change {
    /// Kind of the change; another one than was wanted if the scene cannot be changed in that way.
    pub(crate) kind: Kind,
    pub(crate) instruction: String,
    pub(crate) after: Scene,
}

/// An instruction of a kind and the scene after it.
///
/// Nothing of the result is held out but what was before.
pub(crate) fn change(kind: Kind, before: &Scene, language: Language, draws: &mut Draws) -> Change {
    let mut after = before.clone();
    let form = |forms: &Forms, draws: &mut Draws| -> &'static str { draws.one(&forms[at(language)]) };
    let named = unique(&before.objects, |object| (object.colour, object.shape));
    let Some(object) = (!named.is_empty()).then(|| draws.one(&named)) else {
        return change(Kind::Background, before, language, draws);
    };
    let index = before.objects.iter().position(|other| *other == object).unwrap_or(0);
    let what = the(&noun(&object, Detail::Name, language), language);
    let others = |colour, shape| before.objects.iter().any(|other| (other.colour, other.shape) == (colour, shape));
    let allowed = |colour, shape| !is_held_out(colour, shape) && !others(colour, shape);
    let free: Vec<Place> =
        Place::ALL.into_iter().filter(|place| before.objects.iter().all(|other| other.place != *place)).collect();
    let filled = |form: &str, what: &str, to: &str| {
        let text = form.replace("{to}", to).replace("{}", what);
        let mut letters = text.chars();
        letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect::<String>())
    };
    let kind = if kind == Kind::Remove && before.objects.len() == 1 { Kind::Recolour } else { kind };
    let instruction = match kind {
        Kind::Add => {
            let pair = draws.some(&all_pairs(false), 8).into_iter().find(|&(colour, shape)| !others(colour, shape));
            let mut added = usual(pair.unwrap_or((Colour::Red, Shape::Circle)));
            added.place = draws.one(&free);
            if draws.percent(30) {
                added.size = Size::Small;
            }
            after.objects.push(added);
            filled(form(&ADD, draws), &one(&added, Detail::Unusual, language), &in_place(added.place, language))
        }
        Kind::Remove => {
            after.objects.remove(index);
            filled(form(&REMOVE, draws), &what, "")
        }
        Kind::Recolour => {
            let colours: Vec<Colour> =
                Colour::ALL.into_iter().filter(|&colour| allowed(colour, object.shape)).collect();
            after.objects[index].colour = draws.one(&colours);
            filled(form(&RECOLOUR, draws), &what, after.objects[index].colour.name(language))
        }
        Kind::Reshape => {
            let shapes: Vec<Shape> = Shape::ALL.into_iter().filter(|&shape| allowed(object.colour, shape)).collect();
            if shapes.is_empty() {
                return change(Kind::Resize, before, language, draws);
            }
            after.objects[index].shape = draws.one(&shapes);
            filled(form(&RESHAPE, draws), &what, after.objects[index].shape.name(language))
        }
        Kind::Resize => {
            let size = if object.size == Size::Small { Size::Large } else { Size::Small };
            after.objects[index].size = size;
            let to = either(language, size.name(language), if size == Size::Small { "小" } else { "大" });
            filled(form(&RESIZE, draws), &what, to)
        }
        Kind::Move => {
            let to = draws.one(&free);
            after.objects[index].place = to;
            filled(form(&MOVE, draws), &what, to.name(language))
        }
        Kind::Restyle => {
            let (style, forms) = match before.style {
                Style::Flat => (Style::Outlined, &OUTLINE),
                Style::Outlined => (Style::Flat, &FLATTEN),
            };
            after.style = style;
            form(forms, draws).to_string()
        }
        _ => {
            let others: Vec<Background> =
                Background::ALL.into_iter().filter(|other| *other != before.background).collect();
            after.background = draws.one(&others);
            filled(form(&BACKGROUND, draws), "", after.background.name(language))
        }
    };
    Change { kind, instruction, after: after.sorted() }
}
