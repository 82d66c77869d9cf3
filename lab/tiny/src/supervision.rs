//! What is known of a conversation of the world, in its tokens.

mod attended;
mod unseen;

use lab_world::{Place, Scene, token_places, unseen_labels};
use nexus_data::{DataError, Tokenizer, TrainingInput};
use nexus_train::{PossibleClass, Supervision, TokenLabels};

use attended::{Looks, looks_of};
use unseen::unseen_words;

/// Everything that is known: what tokens show, where they should look, and which pairs of colour and shape, that training
/// never shows, must not be ruled out.
///
/// `scenes` has what each image shows, `places` what each answer is about.
pub(crate) fn supervision(
    input: &TrainingInput,
    scenes: &[Scene],
    places: &[Vec<Place>],
    tokenizer: &Tokenizer,
) -> Result<Supervision, DataError> {
    let image_token = tokenizer.special_tokens().image;
    let Looks { attended, selected } = looks_of(input, places, scenes, image_token);
    let images = input.input_images.iter().chain(&input.answer_images);
    let images =
        images.zip(scenes).map(|(image, scene)| Some(labels_of(scene, image.grid.merged_h(), image.grid.merged_w())));
    let possible = unseen_words(input, places, scenes, image_token, tokenizer)?;
    Ok(Supervision { images: images.collect(), attended, selected, possible })
}

/// What the tokens of a picture show, and the place of each as a last label.
fn labels_of(scene: &Scene, rows: usize, columns: usize) -> TokenLabels {
    let mut labels = TokenLabels::default();
    let tokens = scene.token_labels(rows, columns).into_iter().zip(token_places(rows, columns));
    for (token, (known, place)) in tokens.enumerate() {
        let possible = unseen_labels(&known).into_iter();
        labels.possible.extend(possible.map(|(label, class)| PossibleClass { token, label, class }));
        labels.classes.extend(known);
        labels.classes.push(place.0);
    }
    labels
}
