//! Against the fixtures of `lab/parity`: tokenizers, prompts and image preprocessing, all equal to the last bit.
// Helpers outside of test functions may unwrap too.
#![allow(clippy::unwrap_used, clippy::panic)]

use nexus_core::GridThw;
use nexus_core::testing::{fixtures_dir, random_models_dir};
use nexus_data::{
    Alpha, ClipTokenizer, DataError, Filter, Image, ImageProcessor, Language, Message, Patches, T5Tokenizer, Tokenizer,
    clean_reply, decoder_image, edit_prompt, expand_image_pads, generation_prompt, render_chat, resize, smart_resize,
};
use serde_json::Value;
use sha2::{Digest, Sha256};

fn fixture(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixtures_dir().join(format!("{name}.json"))).unwrap()).unwrap()
}

fn rows(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn number(value: &Value) -> usize {
    usize::try_from(value.as_u64().unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn grid(value: &Value) -> GridThw {
    let [t, h, w] = serde_json::from_value(value.clone()).unwrap();
    GridThw { t, h, w }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sha256_of_floats(values: &[f32]) -> String {
    sha256(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
}

fn qwen() -> Tokenizer {
    Tokenizer::open(random_models_dir().join("Nexus-GenV2")).unwrap()
}

#[test]
fn texts_and_token_ids() {
    let (tokenizer, fixture) = (qwen(), fixture("tokenizer"));
    for row in rows(&fixture["texts"]) {
        let expected = ids(&row["ids"]);
        assert_eq!(tokenizer.encode(text(&row["text"])).unwrap(), expected, "{row}");
        assert_eq!(tokenizer.decode(&expected, false).unwrap(), text(&row["decoded"]));
        assert_eq!(tokenizer.decode(&expected, true).unwrap(), text(&row["decoded_without_special"]));
    }
    for row in rows(&fixture["pieces"]) {
        assert_eq!(tokenizer.decode(&ids(&row["ids"]), false).unwrap(), text(&row["decoded"]));
    }
    for row in rows(&fixture["answers"]) {
        assert_eq!(clean_reply(text(&row["raw"])), text(&row["shown"]));
    }
    let special = tokenizer.special_tokens();
    for (token, id) in [
        ("<|vision_start|>", special.boi),
        ("<|vision_end|>", special.eoi),
        ("<|image_pad|>", special.image),
        ("<|im_start|>", special.im_start),
        ("<|im_end|>", special.im_end),
        ("<|endoftext|>", special.endoftext),
    ] {
        assert_eq!(number(&fixture["special_ids"][token]), id as usize);
    }
}

#[test]
fn conversations() {
    let image = Image::from_rgb8(1, 1, vec![0; 3]).unwrap();
    for row in rows(&fixture("tokenizer")["chats"]) {
        let messages: Vec<Message> = rows(&row["messages"])
            .iter()
            .map(|message| {
                let empty = match text(&message["role"]) {
                    "system" => Message::system(),
                    "user" => Message::user(),
                    _ => Message::assistant(),
                };
                match &message["content"] {
                    Value::String(content) => empty.with_text(content),
                    parts => rows(parts).iter().fold(empty, |message, part| match text(&part["type"]) {
                        "image" => message.with_image(image.clone()),
                        _ => message.with_text(text(&part["text"])),
                    }),
                }
            })
            .collect();
        let rendered = render_chat(&messages, row["add_generation_prompt"].as_bool().unwrap()).unwrap();
        assert_eq!(rendered, text(&row["text"]));
    }
}

#[test]
fn prompts() {
    let tokenizer = qwen();
    let image = Image::from_rgb8(1, 1, vec![0; 3]).unwrap();
    for row in rows(&fixture("tokenizer")["prompts"]) {
        let (kind, given) = (text(&row["kind"]), text(&row["given"]));
        let grids: Vec<GridThw> = rows(&row["grids"]).iter().map(grid).collect();
        let with_images = |message| grids.iter().fold(message, |message: Message, _| message.with_image(image.clone()));
        let message = match kind.split('_').next().unwrap() {
            "generation" => Message::text(generation_prompt(given, Language::detect(given)).unwrap()),
            "editing" => with_images(Message::text(edit_prompt(given).unwrap())),
            "understanding" => with_images(Message::user()).with_text(given),
            other => panic!("unknown kind {other}"),
        };
        let rendered = render_chat(&[message], true).unwrap();
        assert_eq!(rendered, text(&row["text"]), "{kind}");
        let expanded = expand_image_pads(&rendered, &grids).unwrap();
        assert_eq!(tokenizer.encode(&expanded).unwrap(), ids(&row["ids"]), "{kind}");
    }
}

#[test]
fn flux_tokenizers() {
    let folder = random_models_dir().join("FLUX/FLUX.1-dev");
    let clip = ClipTokenizer::open(folder.join("tokenizer")).unwrap();
    let t5 = T5Tokenizer::open(folder.join("tokenizer_2")).unwrap();
    for row in rows(&fixture("flux_tokenizers")["texts"]) {
        assert_eq!(clip.encode_padded(text(&row["text"])).unwrap(), ids(&row["clip_77"]), "CLIP of {}", row["text"]);
        assert_eq!(t5.encode_padded(text(&row["text"])).unwrap(), ids(&row["t5_512"]), "T5 of {}", row["text"]);
    }
}

#[test]
fn sizes() {
    let fixture = fixture("smart_resize");
    for row in rows(&fixture["sizes"]) {
        for (name, limits) in fixture["limits"].as_object().unwrap() {
            let (height, width) = (number(&row["height"]), number(&row["width"]));
            let size = smart_resize(height, width, number(&limits[0]), number(&limits[1]));
            match &row[name] {
                Value::Null => assert!(matches!(size, Err(DataError::PixelBudget { .. })), "{row} {name}"),
                expected => assert_eq!(size.unwrap(), (number(&expected[0]), number(&expected[1])), "{row} {name}"),
            }
        }
    }
    for row in rows(&fixture["refused"]) {
        let size = smart_resize(number(&row["height"]), number(&row["width"]), 3136, 262_640);
        assert!(matches!(size, Err(DataError::AspectRatio { .. })), "{row}");
    }
}

#[test]
fn pictures() {
    let processor = ImageProcessor::default();
    for case in rows(&fixture("preprocess")["cases"]) {
        let alpha = if case["on_white"].as_bool().unwrap() { Alpha::OnWhite } else { Alpha::Drop };
        let image = Image::open(fixtures_dir().join(text(&case["file"]))).unwrap().to_rgb(alpha);
        let check_picture = |picture: &Image, key: &str| {
            let expected = &case[key];
            assert_eq!(picture.width_px(), number(&expected["width"]), "{} {key}", case["file"]);
            assert_eq!(picture.height_px(), number(&expected["height"]), "{} {key}", case["file"]);
            assert_eq!(sha256(picture.rgb()), text(&expected["sha256"]), "{} {key}", case["file"]);
        };
        let check_patches = |patches: &Patches, key: &str| {
            assert_eq!(patches.grid, grid(&case[key]["grid_thw"]), "{} {key}", case["file"]);
            let expected = text(&case[key]["patches"]["sha256"]);
            assert_eq!(sha256_of_floats(&patches.values), expected, "{} {key}", case["file"]);
        };
        check_picture(&image, "rgb");
        for (key, max_pixels) in [("bounded", 262_640), ("bounded_20000", 20_000)] {
            let bounded = processor.bound(&image, max_pixels).unwrap();
            check_picture(&bounded, key);
            check_patches(&processor.patches(&bounded).unwrap(), key);
        }
        check_picture(&resize(&image, 504, 504, Filter::Bilinear).unwrap(), "reference_504");
        check_patches(&processor.reference_patches(&image).unwrap(), "reference_504");
        check_picture(&resize(&image, 252, 252, Filter::Bicubic).unwrap(), "target_252");
        check_patches(&processor.target_patches(&image).unwrap(), "target_252");
        for (key, width, height) in [("covered_64x48", 64, 48), ("covered_48x80", 48, 80)] {
            let values = decoder_image(&image, width, height).unwrap();
            assert_eq!(sha256_of_floats(&values), text(&case[key]["tensor"]["sha256"]), "{} {key}", case["file"]);
        }
    }
}
