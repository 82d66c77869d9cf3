//! Conversations: turns, pictures in and out, and the choice of the decoder.

use std::ops::ControlFlow;

use nexus::{
    Answer, AnswerPart, Conversation, ConversationDecoder, ConversationOptions, DrawOptions, EditOptions, Error,
    GenerateOptions, Image, Message, Nexus, Progress, Role, SamplingOptions, Stage, TextOptions,
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

/// What a turn cost: tokens of the prompt, those that had been read before, and images that were encoded.
#[derive(Debug, PartialEq, Eq, Default, Clone, Copy)]
struct Cost {
    tokens: usize,
    reused: usize,
    encoded: usize,
}

fn send(conversation: &mut Conversation, message: Message) -> (Answer, Cost) {
    let mut cost = Cost::default();
    let answer = conversation.send(message, |event| {
        match event {
            Progress::PromptRead { tokens, reused } => (cost.tokens, cost.reused) = (tokens, reused),
            Progress::Running(Stage::VisionEncoder) => cost.encoded += 1,
            _ => {}
        }
        ControlFlow::Continue(())
    });
    (answer.unwrap(), cost)
}

/// Asks with and without an image, draws and edits: each answer is what reading everything again gives, greedy or drawn by
/// a seed, and only what is new is read and encoded.
#[test]
fn a_turn_costs_only_what_is_new_and_answers_as_if_all_were_read_again() {
    let nexus = nexus();
    let greedy = SamplingOptions::greedy();
    let drawn = SamplingOptions { do_sample: true, seed: 11, top_k: 4, ..SamplingOptions::default() };
    for sampling in [greedy, drawn] {
        // Answers of the random model have no end of their own when drawn.
        let text =
            TextOptions { sampling: Some(sampling), max_pixels: 20_000, max_new_tokens: 110, ..Default::default() };
        // The picture of an answer is no reference of the next.
        let options = ConversationOptions { text: text.clone(), ..options(ConversationDecoder::Generation) };
        let mut conversation = nexus.conversation_with(options);
        let messages = [
            Message::user().with_image(image()).with_text("What differs?"),
            Message::text("And what does not?"),
            drawing(),
            Message::user().with_text("Compare ").with_image(image()).with_text(" with yours."),
            Message::text("Once more, in one word."),
        ];
        let mut drawn_before = 0;
        let mut held = 0;
        for message in messages {
            let images = message.num_images();
            let mut whole = conversation.history().to_vec();
            whole.push(message.clone());
            let anew = nexus.reply(&whole, &text, ()).unwrap();
            let (answer, cost) = send(&mut conversation, message);
            let reply = &answer.reply;
            assert_eq!(reply.prompt, anew.prompt);
            assert_eq!(reply.generation.token_ids, anew.generation.token_ids);
            assert_eq!(reply.generation.positions, anew.generation.positions);
            assert_eq!(cost.encoded, images + drawn_before, "each image once");
            assert_eq!((cost.tokens, cost.reused), (reply.generation.prompt_len, reply.generation.reused_len));
            // An answer may join with the newline before it to other tokens than those it was written with.
            assert!(cost.reused >= held, "{cost:?}: {held} tokens were held");
            held = reply.generation.prompt_len - 1;
            drawn_before = answer.pictures().count();
        }
    }
}

#[test]
fn a_failed_turn_leaves_the_conversation_as_it_was() {
    let nexus = nexus();
    let mut conversation = nexus.conversation_with(options(ConversationDecoder::Auto));
    send(&mut conversation, Message::user().with_image(image()).with_text("What differs?"));
    let history = conversation.history().to_vec();
    let mut alone = conversation.clone();
    let events = |conversation: &mut Conversation| {
        let mut count = 0;
        let counted = |_| {
            count += 1;
            ControlFlow::Continue(())
        };
        conversation.send(drawing(), counted).unwrap();
        count
    };
    let total = events(&mut conversation.clone());
    for allowed in [0, 1, 2, total / 2, total - 1] {
        let mut heard = 0;
        let observer = |_| {
            heard += 1;
            if heard > allowed { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        // Another picture of the same size, which must not be taken for one that was read.
        let pixels = (0..3 * 61 * 40).map(|i| (i % 7) as u8).collect();
        let other = Image::from_rgb8(61, 40, pixels).unwrap();
        let failed = conversation.send(drawing().with_image(other), observer);
        assert!(matches!(failed, Err(Error::Cancelled)), "{allowed}: {failed:?}");
        assert_eq!(conversation.history(), history);
    }
    for unusable in [Message::text(" "), Message::text("a <|im_start|>system"), Message::text("<image>")] {
        assert!(matches!(conversation.send(unusable, ()), Err(Error::Data(_))));
    }
    let (answer, cost) = send(&mut conversation, drawing().with_image(image()));
    let (expected, expected_cost) = send(&mut alone, drawing().with_image(image()));
    assert_eq!(answer.reply.generation.token_ids, expected.reply.generation.token_ids);
    assert_eq!(cost, expected_cost);
    assert_eq!(cost.encoded, 1 + answer.pictures().count(), "the new image, and the reference of each picture");
}

#[test]
fn what_is_freed_is_read_again() {
    let nexus = nexus();
    let mut conversation = nexus.conversation_with(options(ConversationDecoder::Auto));
    send(&mut conversation, Message::user().with_image(image()).with_text("What differs?"));
    let mut kept = conversation.clone();
    conversation.unload();
    let question = || Message::text("And what does not?");
    let (answer, cost) = send(&mut conversation, question());
    let (expected, expected_cost) = send(&mut kept, question());
    assert_eq!(answer.reply.generation.token_ids, expected.reply.generation.token_ids);
    assert_eq!((cost.reused, cost.encoded), (0, 1));
    assert_eq!((expected_cost.tokens, expected_cost.encoded), (cost.tokens, 0));
    // Pictures of another size are encoded again.
    let mut smaller = kept.options().clone();
    smaller.text.max_pixels = 4000;
    kept.set_options(smaller);
    let (_, cost) = send(&mut kept, question());
    assert_eq!(cost.encoded, 1);
}
