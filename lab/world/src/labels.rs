//! What every token of a picture shows: a scene -> classes, for heads that are trained on them.

use crate::scene::{Colour, Place, Scene, Shape, is_held_out};

/// Number of classes of every label, in the order of [`Labels`].
pub const LABEL_CLASSES: [usize; 9] = [5, 9, 3, 3, 5, 9, 3, 4, 2];

/// Shape, colour, size and texture of the object in the token's place; shape, colour and texture of the one on top of
/// it; background and style. Class 0 of an object's labels means that there is none.
pub type Labels = [u8; LABEL_CLASSES.len()];

const SHAPE: usize = 0;
const COLOUR: usize = 1;
const TOP_SHAPE: usize = 4;
const TOP_COLOUR: usize = 5;

/// The place that the middle of every token lies in, for a grid of tokens over a picture, in raster order.
pub fn token_places(rows: usize, cols: usize) -> Vec<Place> {
    let third = |index: usize, count: usize| ((2 * index + 1) * 3 / (2 * count)) as u8;
    (0..rows * cols).map(|index| Place(3 * third(index / cols, rows) + third(index % cols, cols))).collect()
}

/// Classes that training never shows beside a token's other labels, each with the index of its label: the shape that no
/// object of its colour has, and the colour that no object of its shape has ([`is_held_out`]).
pub fn unseen_labels(labels: &Labels) -> Vec<(usize, u8)> {
    let mut unseen = Vec::new();
    for (at_shape, at_colour) in [(SHAPE, COLOUR), (TOP_SHAPE, TOP_COLOUR)] {
        let colour = Colour::ALL.into_iter().find(|&colour| colour as u8 + 1 == labels[at_colour]);
        let shape = Shape::ALL.into_iter().find(|&shape| shape as u8 + 1 == labels[at_shape]);
        let (Some(colour), Some(shape)) = (colour, shape) else { continue };
        let shapes = Shape::ALL.into_iter().filter(|&other| other != shape && is_held_out(colour, other));
        unseen.extend(shapes.map(|other| (at_shape, other as u8 + 1)));
        let colours = Colour::ALL.into_iter().filter(|&other| other != colour && is_held_out(other, shape));
        unseen.extend(colours.map(|other| (at_colour, other as u8 + 1)));
    }
    unseen
}

impl Scene {
    /// Labels of a grid of tokens over the picture, in raster order.
    ///
    /// A token has the labels of its place ([`token_places`]), whether it shows the object itself or what is beside it.
    pub fn token_labels(&self, rows: usize, cols: usize) -> Vec<Labels> {
        token_places(rows, cols).into_iter().map(|place| self.labels_of(place)).collect()
    }

    fn labels_of(&self, place: Place) -> Labels {
        let mut here = self.objects.iter().filter(|object| object.place == place);
        let [shape, colour, size, texture] = here.next().map_or([0; 4], |object| {
            [object.shape as u8, object.colour as u8, object.size as u8, object.texture as u8].map(|class| class + 1)
        });
        let [top_shape, top_colour, top_texture] = here.next().map_or([0; 3], |object| {
            [object.shape as u8, object.colour as u8, object.texture as u8].map(|class| class + 1)
        });
        let (background, style) = (self.background as u8, self.style as u8);
        [shape, colour, size, texture, top_shape, top_colour, top_texture, background, style]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Background, Colour, Object, Shape, Size, Split, Style, Task, Texture, World};

    #[test]
    fn nine_tokens_of_a_place_tell_its_objects() {
        let below = Object {
            shape: Shape::Square,
            colour: Colour::Orange,
            size: Size::Large,
            texture: Texture::Striped,
            place: Place(5),
        };
        let above = Object { shape: Shape::Circle, colour: Colour::Red, size: Size::Small, ..below };
        let scene = Scene { background: Background::Mint, style: Style::Outlined, objects: vec![below, above] };
        let labels = scene.token_labels(9, 9);
        assert_eq!(labels.len(), 81);
        let places = token_places(9, 9);
        assert!(
            [(0, 0), (2, 0), (3, 1), (9 * 3, 3), (9 * 4 + 7, 5), (80, 8)].iter().all(|&(i, p)| places[i] == Place(p))
        );
        for (index, labels) in labels.iter().enumerate() {
            let inside = (3..6).contains(&(index / 9)) && (6..9).contains(&(index % 9));
            let expected = if inside { [2, 7, 2, 2, 1, 1, 2, 3, 1] } else { [0, 0, 0, 0, 0, 0, 0, 3, 1] };
            assert_eq!(*labels, expected, "token {index}");
        }
        assert_eq!(scene.token_labels(18, 18)[18 * 11 + 17], [2, 7, 2, 2, 1, 1, 2, 3, 1]);
        assert_eq!(scene.token_labels(18, 18)[18 * 12 + 17][..7], [0; 7]);
    }

    #[test]
    fn what_training_never_shows_is_unseen() {
        let class = |colour: Colour, shape: Shape| [shape as u8 + 1, colour as u8 + 1];
        let labels = |[shape, colour]: [u8; 2], [top_shape, top_colour]: [u8; 2]| {
            [shape, colour, 2, 1, top_shape, top_colour, 1, 0, 0]
        };
        let circle = Shape::Circle as u8 + 1;
        let labels_of_a_square = labels(class(Colour::Cyan, Shape::Square), [0, 0]);
        assert_eq!(unseen_labels(&labels_of_a_square), [(0, circle), (1, Colour::Blue as u8 + 1)]);
        let of_two = labels(class(Colour::Red, Shape::Triangle), class(Colour::Cyan, Shape::Cross));
        let expected = [(1, Colour::Black as u8 + 1), (4, circle), (5, Colour::Purple as u8 + 1)];
        assert_eq!(unseen_labels(&of_two), expected);
        // Of a pair that is held out itself only what else is.
        assert_eq!(unseen_labels(&labels(class(Colour::Cyan, Shape::Circle), [0, 0])), []);
        assert_eq!(unseen_labels(&labels([0, 0], [0, 0])), []);
    }

    #[test]
    fn labels_are_below_the_number_of_their_classes_and_each_occurs() {
        let mut seen = LABEL_CLASSES.map(|count| vec![false; count]);
        for index in 0..400 {
            let sample = World::new(3).sample(Task::Understanding, Split::Train, index);
            for labels in sample.scenes[0].token_labels(3, 3) {
                for (seen, label) in seen.iter_mut().zip(labels) {
                    seen[usize::from(label)] = true;
                }
            }
        }
        // What lies on another is never striped in a sample.
        seen[6][2] = true;
        assert!(seen.iter().flatten().all(|&seen| seen), "{seen:?}");
    }
}
