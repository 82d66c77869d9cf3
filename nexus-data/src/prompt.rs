//! Prompts: messages -> the text that the language model reads, and its reply -> the text that a person reads.
//!
//! [`render_chat`] is the chat template; [`generation_prompt`] and [`edit_prompt`] are the wordings that the model was
//! trained on, as the text of a user message (a question is asked word for word, after its images); [`expand_image_pads`]
//! makes room for the embeddings of the images.

use nexus_core::GridThw;

use crate::error::DataError;
use crate::message::{Message, Part, Role};

/// Marks the place of an image in the text of a message.
pub const IMAGE_MARKER: &str = "<image>";

/// Begins an image in a rendered prompt.
pub const VISION_START: &str = "<|vision_start|>";

/// Ends an image in a rendered prompt.
pub const VISION_END: &str = "<|vision_end|>";

/// Stands for an image in a rendered prompt, and for each of its merged tokens in an expanded one.
pub const IMAGE_PAD: &str = "<|image_pad|>";

/// Stands for a video in prompts of related models; not supported here.
pub const VIDEO_PAD: &str = "<|video_pad|>";

pub(crate) const IM_START: &str = "<|im_start|>";
pub(crate) const IM_END: &str = "<|im_end|>";
const DEFAULT_SYSTEM: &str = "You are a helpful assistant.";
/// Tokens that a text may not spell: it would show pixels that do not exist, or speak in another role.
const RESERVED: [&str; 6] = [IMAGE_PAD, VISION_START, VISION_END, VIDEO_PAD, IM_START, IM_END];

/// Language of the wording around a description.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Language {
    /// English.
    #[default]
    English,
    /// Chinese.
    Chinese,
}

impl Language {
    /// Chinese if the text has a CJK ideograph (so for Japanese kanji too), English otherwise.
    ///
    /// Differs: the original scripts choose the wording by a flag.
    pub fn detect(text: &str) -> Self {
        if text.chars().any(is_cjk_ideograph) { Self::Chinese } else { Self::English }
    }
}

/// The unified ideographs, their extensions and the compatibility forms.
fn is_cjk_ideograph(c: char) -> bool {
    matches!(
        u32::from(c),
        0x4E00..=0x9FFF
            | 0x3400..=0x4DBF
            | 0x20000..=0x2A6DF
            | 0x2A700..=0x2B73F
            | 0x2B740..=0x2B81F
            | 0x2B820..=0x2CEAF
            | 0xF900..=0xFAFF
            | 0x2F800..=0x2FA1F
    )
}

/// The user text that asks for a new image.
///
/// # Errors
/// [`DataError::EmptyPrompt`] if the description is blank.
pub fn generation_prompt(description: &str, language: Language) -> Result<String, DataError> {
    check_not_blank(description)?;
    Ok(match language {
        Language::English => format!("Generate an image according to the following description: {description}"),
        Language::Chinese => format!("根据以下描述生成一张图像：{description}"),
    })
}

/// The user text that asks for a change of an image; goes into a message together with the image.
///
/// The instruction may say with `<image>` where the image goes; otherwise the image comes first.
///
/// # Errors
/// [`DataError::EmptyPrompt`] if the instruction is blank.
pub fn edit_prompt(instruction: &str) -> Result<String, DataError> {
    check_not_blank(&instruction.replace(IMAGE_MARKER, ""))?;
    if instruction.contains(IMAGE_MARKER) {
        return Ok(instruction.to_string());
    }
    Ok(format!("{IMAGE_MARKER} {instruction}"))
}

/// Renders a conversation with the chat template; every image becomes one `<|image_pad|>` between its two brackets.
///
/// A default system message comes first unless the conversation begins with one. `add_generation_prompt` opens the
/// model's answer.
///
/// # Errors
/// [`DataError::EmptyPrompt`] if there is no message, or if a user message has neither text nor image;
/// [`DataError::ImageMarkers`] if a message has `<image>` markers but not as many images;
/// [`DataError::SpecialTokenInText`] if a text spells a token that stands for an image, or begins or ends a turn.
///
/// Source: Qwen2.5-VL chat template (`chat_template.json`).
pub fn render_chat(messages: &[Message], add_generation_prompt: bool) -> Result<String, DataError> {
    let mut rendered = default_system(messages.first().ok_or(DataError::EmptyPrompt)?);
    for message in messages {
        rendered.push_str(&render_turn(message)?);
    }
    if add_generation_prompt {
        rendered.push_str(&turn_header(Role::Assistant));
    }
    Ok(rendered)
}

/// The turn that comes before a conversation that starts with this message; empty if that is a system message.
pub(crate) fn default_system(first: &Message) -> String {
    match first.role {
        Role::System => String::new(),
        _ => block(Role::System, DEFAULT_SYSTEM),
    }
}

/// One message with its header and its end. [`render_chat`] joins these and adds nothing between them.
pub(crate) fn render_turn(message: &Message) -> Result<String, DataError> {
    Ok(block(message.role, &render_content(message)?))
}

/// What comes before the content of a message.
pub(crate) fn turn_header(role: Role) -> String {
    [IM_START, role.as_str(), "\n"].concat()
}

fn block(role: Role, content: &str) -> String {
    [&turn_header(role), content, IM_END, "\n"].concat()
}

fn render_content(message: &Message) -> Result<String, DataError> {
    if let Some(token) = message.texts().find_map(|text| RESERVED.into_iter().find(|token| text.contains(token))) {
        return Err(DataError::SpecialTokenInText { token });
    }
    let images = message.num_images();
    if message.role == Role::User && images == 0 && message.texts().all(|text| text.trim().is_empty()) {
        return Err(DataError::EmptyPrompt);
    }
    let markers: usize = message.texts().map(|text| text.matches(IMAGE_MARKER).count()).sum();
    if markers > 0 && markers != images {
        return Err(DataError::ImageMarkers { markers, images });
    }
    let picture = [VISION_START, IMAGE_PAD, VISION_END].concat();
    let content = message.parts.iter().map(|part| match part {
        Part::Text(text) => text.replace(IMAGE_MARKER, &picture),
        Part::Image(_) | Part::Embeds(_) if markers > 0 => String::new(),
        Part::Image(_) | Part::Embeds(_) => picture.clone(),
    });
    Ok(content.collect())
}

fn check_not_blank(text: &str) -> Result<(), DataError> {
    if text.trim().is_empty() { Err(DataError::EmptyPrompt) } else { Ok(()) }
}

/// Repeats each `<|image_pad|>` of a rendered prompt once per merged token of its image.
///
/// # Errors
/// [`DataError::ImageMarkers`] if there are not as many `<|image_pad|>` as grids.
pub fn expand_image_pads(rendered: &str, grids: &[GridThw]) -> Result<String, DataError> {
    let markers = rendered.matches(IMAGE_PAD).count();
    if markers != grids.len() {
        return Err(DataError::ImageMarkers { markers, images: grids.len() });
    }
    let mut pieces = rendered.split(IMAGE_PAD);
    let mut expanded = pieces.next().unwrap_or_default().to_string();
    for (grid, piece) in grids.iter().zip(pieces) {
        expanded.push_str(&IMAGE_PAD.repeat(grid.num_merged_tokens()));
        expanded.push_str(piece);
    }
    Ok(expanded)
}

/// Makes a reply readable: each image, brackets included, becomes `<image>`, and `<|im_end|>` goes away.
pub fn clean_reply(text: &str) -> String {
    let mut cleaned = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, image)) = rest.split_once(VISION_START) {
        let Some((_, after)) = image.split_once(VISION_END) else { break };
        cleaned.push_str(before);
        cleaned.push_str(IMAGE_MARKER);
        rest = after;
    }
    cleaned.push_str(rest);
    cleaned.replace(IM_END, "")
}

/// A text without the tokens that no message may spell, so that what a model wrote can be a message.
pub fn without_reserved_tokens(text: &str) -> String {
    let mut text = text.to_string();
    // What is left may join to a token again.
    while let Some(token) = RESERVED.into_iter().find(|token| text.contains(token)) {
        text = text.replace(token, "");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Image;

    const SYSTEM: &str = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n";

    fn image() -> Image {
        Image::from_rgb8(1, 1, vec![0; 3]).unwrap()
    }

    fn user(content: &str) -> String {
        format!("{SYSTEM}<|im_start|>user\n{content}<|im_end|>\n")
    }

    #[test]
    fn a_default_system_message_comes_first() {
        assert_eq!(render_chat(&[Message::text("hi")], false).unwrap(), user("hi"));
        let opened = render_chat(&[Message::text("hi")], true).unwrap();
        assert_eq!(opened, user("hi") + "<|im_start|>assistant\n");
    }

    #[test]
    fn an_own_system_message_replaces_the_default() {
        let messages =
            [Message::system().with_text("Be brief."), Message::text("hi"), Message::assistant().with_text("yo")];
        assert_eq!(
            render_chat(&messages, false).unwrap(),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
        );
    }

    #[test]
    fn images_stand_where_their_part_stands() {
        let message = Message::text("a").with_image(image()).with_text("b").with_image(image());
        let picture = "<|vision_start|><|image_pad|><|vision_end|>";
        assert_eq!(render_chat(&[message], false).unwrap(), user(&format!("a{picture}b{picture}")));
    }

    #[test]
    fn markers_say_where_images_go() {
        let message = Message::text("Put <image> into <image>.").with_image(image()).with_image(image());
        let picture = "<|vision_start|><|image_pad|><|vision_end|>";
        assert_eq!(render_chat(&[message], false).unwrap(), user(&format!("Put {picture} into {picture}.")));
    }

    #[test]
    fn markers_must_match_the_images() {
        let too_few = Message::text("<image> and <image>").with_image(image());
        assert!(matches!(render_chat(&[too_few], true), Err(DataError::ImageMarkers { markers: 2, images: 1 })));
        let none = Message::text("a page with an <image> tag");
        assert!(matches!(render_chat(&[none], true), Err(DataError::ImageMarkers { markers: 1, images: 0 })));
    }

    #[test]
    fn markers_count_per_message() {
        let messages = [Message::text("<image>"), Message::user().with_image(image())];
        assert!(matches!(render_chat(&messages, true), Err(DataError::ImageMarkers { markers: 1, images: 0 })));
    }

    #[test]
    fn empty_conversations_are_refused() {
        assert!(matches!(render_chat(&[], true), Err(DataError::EmptyPrompt)));
        assert!(matches!(render_chat(&[Message::user()], true), Err(DataError::EmptyPrompt)));
        assert!(matches!(render_chat(&[Message::text(" \n\u{3000}")], true), Err(DataError::EmptyPrompt)));
        assert!(render_chat(&[Message::user().with_image(image())], true).is_ok());
        assert!(render_chat(&[Message::text("hi"), Message::assistant()], true).is_ok());
    }

    #[test]
    fn texts_can_spell_neither_an_image_nor_a_turn() {
        for token in
            ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>"]
        {
            for message in [Message::user(), Message::system(), Message::assistant()] {
                let result = render_chat(&[message.with_text(format!("a{token}b"))], true);
                assert!(matches!(result, Err(DataError::SpecialTokenInText { token: found }) if found == token));
            }
        }
    }

    #[test]
    fn embeddings_stand_where_an_image_would() {
        let values = burn::tensor::Tensor::zeros([1, 2, 4], &nexus_core::testing::cpu());
        let embeds = nexus_core::ImageEmbeds::new(values, GridThw { t: 1, h: 2, w: 4 }).unwrap();
        let picture = "<|vision_start|><|image_pad|><|vision_end|>";
        let message = Message::text("a").with_embeds(embeds.clone()).with_text("b").with_image(image());
        assert_eq!(render_chat(&[message], false).unwrap(), user(&format!("a{picture}b{picture}")));
        let message = Message::text("Put <image> into <image>.").with_image(image()).with_embeds(embeds);
        assert_eq!(render_chat(&[message], false).unwrap(), user(&format!("Put {picture} into {picture}.")));
    }

    #[test]
    fn generation_wording_follows_the_language() {
        let description = "A cute cat";
        assert_eq!(
            generation_prompt(description, Language::detect(description)).unwrap(),
            "Generate an image according to the following description: A cute cat"
        );
        let description = "一只可爱的猫";
        assert_eq!(
            generation_prompt(description, Language::detect(description)).unwrap(),
            "根据以下描述生成一张图像：一只可爱的猫"
        );
        assert!(matches!(generation_prompt(" ", Language::English), Err(DataError::EmptyPrompt)));
    }

    #[test]
    fn languages_are_told_by_ideographs() {
        for (text, language) in [
            ("", Language::English),
            ("café ελληνικά", Language::English),
            ("한국어", Language::English),
            ("draw 猫", Language::Chinese),
            ("\u{20000}", Language::Chinese),
        ] {
            assert_eq!(Language::detect(text), language, "{text}");
        }
    }

    #[test]
    fn edits_put_the_image_first_unless_told_otherwise() {
        assert_eq!(edit_prompt("Add a hat.").unwrap(), "<image> Add a hat.");
        assert_eq!(edit_prompt("Make <image> blue").unwrap(), "Make <image> blue");
        for blank in ["", " ", "<image>", " <image> "] {
            assert!(matches!(edit_prompt(blank), Err(DataError::EmptyPrompt)));
        }
        let message = Message::text(edit_prompt("Add a hat.").unwrap()).with_image(image());
        let expected = user("<|vision_start|><|image_pad|><|vision_end|> Add a hat.");
        assert_eq!(render_chat(&[message], false).unwrap(), expected);
    }

    #[test]
    fn image_pads_are_repeated_once_per_merged_token() {
        let grids = [GridThw { t: 1, h: 2, w: 4 }, GridThw { t: 1, h: 2, w: 2 }];
        let expanded = expand_image_pads("a<|image_pad|>b<|image_pad|>", &grids).unwrap();
        assert_eq!(expanded, "a<|image_pad|><|image_pad|>b<|image_pad|>");
        assert_eq!(expand_image_pads("text", &[]).unwrap(), "text");
        let result = expand_image_pads("a<|image_pad|>", &grids);
        assert!(matches!(result, Err(DataError::ImageMarkers { markers: 1, images: 2 })));
    }

    #[test]
    fn what_a_model_wrote_can_be_a_message() {
        let text = without_reserved_tokens("a <|vision_start|><|image_pad|><|im_start|>b<|endoftext|>");
        assert_eq!(text, "a b<|endoftext|>");
        assert_eq!(without_reserved_tokens("<|im_<|im_end|>start|>."), ".");
        assert!(render_chat(&[Message::assistant().with_text(text)], false).is_ok());
    }

    #[test]
    fn replies_are_made_readable() {
        for (raw, shown) in [
            ("Here:<|vision_start|><|image_pad|><|image_pad|><|vision_end|> Done.<|im_end|>", "Here:<image> Done."),
            ("a<|vision_start|>\n<|vision_end|>b<|vision_start|>x<|vision_end|>", "a<image>b<image>"),
            ("<|vision_start|>1<|vision_start|>2<|vision_end|>3<|vision_end|>", "<image>3<|vision_end|>"),
            ("cut <|vision_start|><|image_pad|>", "cut <|vision_start|><|image_pad|>"),
            ("<|vision_end|>no<|im_end|><|im_end|>", "<|vision_end|>no"),
            ("", ""),
        ] {
            assert_eq!(clean_reply(raw), shown);
        }
    }
}
