//! Conversations in files: what was said goes on, with pictures, transparency and embeddings; other files are refused.

use std::collections::HashMap;

use nexus::{
    ConversationDecoder, ConversationOptions, DrawOptions, Error, GenerateOptions, Image, Message, Nexus, Noise,
    TextOptions,
    burn::tensor::{Tensor, TensorData},
    checkpoint::write_safetensors,
};
use nexus_core::testing::{cpu, fixtures_dir, random_models_dir};

fn options() -> ConversationOptions {
    let draw = DrawOptions { width: 32, height: 32, steps: 1, cfg_scale: 1.0, ..DrawOptions::default() };
    ConversationOptions {
        text: TextOptions { max_pixels: 20_000, ..TextOptions::default() },
        generate: GenerateOptions { draw, ..GenerateOptions::default() },
        decoder: ConversationDecoder::Generation,
        ..ConversationOptions::default()
    }
}

#[test]
fn a_conversation_goes_on_from_its_file() {
    let nexus = Nexus::load(random_models_dir(), &cpu()).unwrap();
    let image = Image::open(fixtures_dir().join("images/photo_61x40.png")).unwrap();
    let clear = Image::from_rgba8(30, 30, &[7; 4 * 30 * 30]).unwrap();
    let mut conversation = nexus.conversation_with(options());
    let embeds = nexus.embed(&image, 20_000, ()).unwrap();
    let first =
        Message::user().with_image(image).with_text("What differs, 一只猫?").with_image(clear).with_embeds(embeds);
    conversation.send(first, ()).unwrap();
    let prompt = "Generate an image according to the following description: A red fox under a pine";
    conversation.send(Message::text(prompt), ()).unwrap();

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("conversation.safetensors");
    conversation.save(&path).unwrap();
    let mut loaded = nexus.load_conversation(&path).unwrap();
    assert_eq!(loaded.history(), conversation.history());
    assert_eq!(format!("{:?}", loaded.options()), format!("{:?}", conversation.options()));
    let question = || Message::text("And what does not?");
    let (one, other) = (conversation.send(question(), ()).unwrap(), loaded.send(question(), ()).unwrap());
    assert_eq!(one.reply.generation.token_ids, other.reply.generation.token_ids);
}

#[test]
fn a_conversation_of_which_nothing_was_said_is_one_too() {
    let nexus = Nexus::load(random_models_dir(), &cpu()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new.safetensors");
    nexus.conversation_with(options()).save(&path).unwrap();
    assert!(nexus.load_conversation(&path).unwrap().history().is_empty());
}

#[test]
fn files_that_hold_no_conversation_are_refused() {
    let nexus = Nexus::load(random_models_dir(), &cpu()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("other.safetensors");
    assert!(matches!(nexus.load_conversation(&path).err().unwrap(), Error::Checkpoint(_)));
    let refused = |json: Option<&str>| {
        let metadata = json.map(|json| HashMap::from([("nexus_conversation".to_string(), json.to_string())]));
        let numbers = TensorData::new(vec![1f32; 12], [2, 2, 3]);
        write_safetensors(&path, vec![("part.0".to_string(), numbers)], metadata).unwrap();
        nexus.load_conversation(&path).err().unwrap()
    };
    let with = |part: &str| {
        format!(r#"{{"version": 1, "options": {{}}, "messages": [{{"role": "user", "parts": [{part}]}}]}}"#)
    };
    for json in [
        None,
        Some("{"),
        Some("{}"),
        Some(r#"{"version": 2, "options": {}, "messages": []}"#),
        Some(&*with(r#"{"image": "part.0"}"#)),
        Some(&*with(r#"{"sound": "part.0"}"#)),
    ] {
        let error = refused(json);
        assert!(matches!(&error, Error::ConversationFile { path: named, .. } if *named == path), "{json:?}: {error}");
        assert!(error.to_string().contains("other.safetensors"), "{error}");
    }
    assert!(matches!(refused(Some(&with(r#"{"image": "part.1"}"#))), Error::Checkpoint(_)));
    for grid in [r#"{"t": 1, "h": 3, "w": 4}"#, r#"{"t": 1, "h": 4, "w": 4}"#] {
        let embeds = format!(r#"{{"embeds": {{"values": "part.0", "grid": {grid}}}}}"#);
        assert!(matches!(refused(Some(&with(&embeds))), Error::Embeds(_)));
    }

    let mut latents = options();
    latents.generate.draw.noise = Noise::Latents(Tensor::zeros([1, 16, 4, 4], &cpu()));
    let error = nexus.conversation_with(latents).save(&path).unwrap_err();
    assert!(matches!(&error, Error::ConversationFile { reason, .. } if reason.contains("seed")), "{error}");
}
