//! Conversations: turns, pictures in and out, and the choice of the decoder.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, missing_docs, reason = "a test may panic and print")]

use nexus::{
    AnswerPart, ConversationDecoder, ConversationOptions, DrawOptions, EditOptions, Error, GenerateOptions, Image,
    Message, Nexus, Role, TextOptions,
};
use nexus_core::testing::{cpu, fixtures_dir, random_models_dir};

fn options(decoder: ConversationDecoder) -> ConversationOptions {
    let draw = DrawOptions { width: 32, height: 32, steps: 1, cfg_scale: 1.0, ..DrawOptions::default() };
    ConversationOptions {
        text: TextOptions { max_pixels: 20_000, ..TextOptions::default() },
        generate: GenerateOptions { draw: draw.clone(), ..GenerateOptions::default() },
        edit: EditOptions { draw, ..EditOptions::default() },
        decoder,
    }
}

fn nexus() -> Nexus {
    Nexus::load(random_models_dir(), &cpu()).unwrap()
}

fn image() -> Image {
    Image::open(fixtures_dir().join("images/photo_61x40.png")).unwrap()
}

fn drawing() -> Message {
    Message::text("Generate an image according to the following description: A red fox under a pine")
}

#[test]
fn pictures_and_text_come_in_order_and_stay_in_the_history() {
    let nexus = nexus();
    let mut conversation = nexus.conversation_with(options(ConversationDecoder::Auto));
    let parts = conversation.send(drawing(), ()).unwrap().parts;
    let [AnswerPart::Text(before), AnswerPart::Image(first), AnswerPart::Text(after)] = &parts[..] else {
        panic!("{parts:?}")
    };
    assert_eq!((before.as_str(), after.as_str()), ("Here is the image:", " Done."));
    assert!(first.reference.is_none(), "nothing could be edited");
    assert_eq!(conversation.history().len(), 2);
    assert_eq!(conversation.history()[1].role, Role::Assistant);
    assert_eq!(conversation.history()[1].images().collect::<Vec<_>>(), [&first.image]);

    let parts = conversation.send(Message::text("Paint it at night"), ()).unwrap().parts;
    let second = parts.iter().find_map(|part| if let AnswerPart::Image(picture) = part { Some(picture) } else { None });
    let second = second.expect("a second picture");
    assert!(second.reference.is_some(), "the first picture is edited");
    assert_eq!(conversation.history().len(), 4);
}

#[test]
fn a_message_with_an_image_is_edited_and_a_question_is_answered() {
    let nexus = nexus();
    let mut conversation = nexus.conversation_with(options(ConversationDecoder::Auto));
    let edit = Message::user().with_image(image()).with_text(" Turn the sky into a sunset.");
    let parts = conversation.send(edit, ()).unwrap().parts;
    let pictures: Vec<_> = parts
        .iter()
        .filter_map(|part| if let AnswerPart::Image(picture) = part { Some(picture) } else { None })
        .collect();
    assert_eq!(pictures.len(), 1);
    assert!(pictures[0].reference.is_some());
    let mut conversation = nexus.conversation_with(options(ConversationDecoder::Auto));
    let parts = conversation.send(Message::user().with_image(image()).with_text("What differs?"), ()).unwrap().parts;
    assert!(matches!(&parts[..], [AnswerPart::Text(text)] if text == "This is noise."), "{parts:?}");
}

#[test]
fn the_decoder_can_be_chosen() {
    let nexus = nexus();
    let mut conversation = nexus.conversation_with(options(ConversationDecoder::Editing));
    assert!(matches!(conversation.send(drawing(), ()), Err(Error::NothingToEdit)));
    assert!(conversation.history().is_empty(), "a failed turn leaves no trace");
    let mut conversation = nexus.conversation_with(options(ConversationDecoder::Generation));
    let edit = Message::user().with_image(image()).with_text(" Turn the sky into a sunset.");
    let parts = conversation.send(edit, ()).unwrap().parts;
    assert!(parts.iter().any(|part| matches!(part, AnswerPart::Image(picture) if picture.reference.is_none())));
}
