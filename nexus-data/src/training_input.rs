//! Conversations to learn from: messages -> token ids, their labels, and the pixels that go in and that are to come out.

use nexus_core::GridThw;

use crate::error::DataError;
use crate::image_processor::Patches;
use crate::message::{Message, Part, Role};
use crate::processor::{ProcessOptions, Processor};
use crate::prompt::{IMAGE_PAD, default_system, expand_image_pads, render_turn, turn_header};

/// What the language model is trained on for one conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingInput {
    /// The rendered conversation, with one `<|image_pad|>` per image.
    pub text: String,
    /// Token ids of the conversation, with one `<|image_pad|>` per merged token of each image.
    pub token_ids: Vec<u32>,
    /// As long as `token_ids`: the id at the same place (nothing is shifted) where the assistant speaks, `None`
    /// elsewhere.
    ///
    /// The assistant's words, its `<|im_end|>` and the brackets around its images have labels, and so have its images:
    /// an `<|image_pad|>` with a label is a place of [`TrainingInput::answer_images`], one without is a place of
    /// [`TrainingInput::input_images`].
    pub labels: Vec<Option<u32>>,
    /// As long as `token_ids`: the byte of `text` where the token begins. All tokens of an image begin at its marker.
    pub starts: Vec<usize>,
    /// The images that the model is shown, in the order of the conversation.
    pub input_images: Vec<Patches>,
    /// The images that the model is to draw, in the order of the conversation; 81 merged tokens each.
    pub answer_images: Vec<Patches>,
    /// Sizes of all images in the order of the conversation, whoever they are from.
    pub grids: Vec<GridThw>,
}

impl Processor {
    /// Renders a whole conversation and says which of its tokens are to be learnt: those of the assistant's turns.
    ///
    /// Images of the assistant are resized to 252x252 pixels, whatever their aspect ratio; images of the user are
    /// prepared as by [`Processor::process`].
    ///
    /// # Errors
    /// [`DataError::AnswerMissing`], [`DataError::AnswerNotLast`] or [`DataError::AnswerEmpty`] if there is nothing to
    /// learn; [`DataError::ImageInSystem`] if a system message has an image; [`DataError::PixelsMissing`] if a message has
    /// embeddings; otherwise as [`Processor::process`].
    ///
    /// Source: supervised fine-tuning of Nexus-Gen with ms-swift.
    pub fn training_input(&self, messages: &[Message], options: &ProcessOptions) -> Result<TrainingInput, DataError> {
        check(messages)?;
        let first = messages.first().ok_or(DataError::EmptyPrompt)?;
        let mut input = TrainingInput {
            text: default_system(first),
            token_ids: Vec::new(),
            labels: Vec::new(),
            starts: Vec::new(),
            input_images: Vec::new(),
            answer_images: Vec::new(),
            grids: Vec::new(),
        };
        (input.token_ids, input.starts) = self.tokenizer().encode_with_starts(&input.text)?.into_iter().unzip();
        input.labels = vec![None; input.token_ids.len()];
        for message in messages {
            self.push_turn(&mut input, message, options)?;
        }
        Ok(input)
    }

    /// Adds one turn. It begins with a special token and ends with a newline before the next one; special tokens split
    /// a text before anything else happens to it, so turns can be tokenised one by one.
    fn push_turn(
        &self,
        input: &mut TrainingInput,
        message: &Message,
        options: &ProcessOptions,
    ) -> Result<(), DataError> {
        let is_answer = message.role == Role::Assistant;
        let text = render_turn(message)?;
        let patches = message.images().map(|image| match is_answer {
            true => self.image_processor().target_patches(&image.to_rgb(options.alpha)),
            false => self.input_patches(image, options),
        });
        let patches = patches.collect::<Result<Vec<_>, _>>()?;
        let grids: Vec<GridThw> = patches.iter().map(|patches| patches.grid).collect();
        let expanded = expand_image_pads(&text, &grids)?;
        // An answer that begins with a newline shares a token with the header; at inference that token cannot come.
        let learnt = turn_header(message.role).len()..expanded.len() - "\n".len();
        let (image, mut repeated, mut last) = (self.tokenizer().special_tokens().image, 0, None);
        for (id, start) in self.tokenizer().encode_with_starts(&expanded)? {
            repeated += if id == image && last == Some(image) { IMAGE_PAD.len() } else { 0 };
            last = Some(id);
            input.token_ids.push(id);
            input.labels.push((is_answer && learnt.contains(&start)).then_some(id));
            input.starts.push(input.text.len() + start - repeated);
        }
        input.text.push_str(&text);
        input.grids.extend(grids);
        if is_answer { &mut input.answer_images } else { &mut input.input_images }.extend(patches);
        Ok(())
    }
}

fn check(messages: &[Message]) -> Result<(), DataError> {
    let last = messages.last().ok_or(DataError::EmptyPrompt)?;
    if messages.iter().all(|message| message.role != Role::Assistant) {
        return Err(DataError::AnswerMissing);
    }
    if last.role != Role::Assistant {
        return Err(DataError::AnswerNotLast);
    }
    for (i, message) in messages.iter().enumerate() {
        let has_image = message.images().next().is_some();
        if message.role == Role::System && has_image {
            return Err(DataError::ImageInSystem);
        }
        if message.role == Role::Assistant && !has_image && message.texts().all(|text| text.trim().is_empty()) {
            return Err(DataError::AnswerEmpty { message: i });
        }
        if message.parts.iter().any(|part| matches!(part, Part::Embeds(_))) {
            return Err(DataError::PixelsMissing { message: i });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Alpha, Image};
    use crate::prompt::{IM_END, IM_START, render_chat};
    use crate::tokenizer::testing::write_byte_tokenizer;

    const IMG: u32 = 534;

    /// The processor of the bundled checkpoint.
    fn processor() -> Processor {
        Processor::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/nexus-random/Nexus-GenV2")).unwrap()
    }

    fn grey(width: usize, height: usize) -> Image {
        Image::from_rgb8(width, height, vec![128; 3 * width * height]).unwrap()
    }

    fn input(messages: &[Message]) -> Result<TrainingInput, DataError> {
        processor().training_input(messages, &ProcessOptions::default())
    }

    fn learnt(input: &TrainingInput) -> Vec<u32> {
        input.labels.iter().copied().flatten().collect()
    }

    #[test]
    fn the_words_of_the_answer_and_its_end_are_learnt() {
        let system: &[u32] = &[523, 430, 429, 397, 198, 384, 84, 344, 261, 336, 409, 403, 75, 261, 433, 13, 524, 198];
        let user: &[u32] = &[523, 437, 198, 280, 317, 13, 524, 198];
        let (header, answer, newline): (&[u32], &[u32], &[u32]) = (&[523, 281, 368, 198], &[375, 68, 13, 524], &[198]);
        let input = input(&[Message::text("Hello."), Message::assistant().with_text("Done.")]).unwrap();
        // From `tokenizers` in Python.
        assert_eq!(input.token_ids, [system, user, header, answer, newline].concat());
        let is_learnt: Vec<bool> = input.labels.iter().map(Option::is_some).collect();
        assert_eq!(is_learnt, [vec![false; 30], vec![true; 4], vec![false]].concat());
        assert_eq!(learnt(&input), answer);
        assert!(input.input_images.is_empty() && input.answer_images.is_empty() && input.grids.is_empty());
    }

    #[test]
    fn an_image_of_the_answer_is_learnt_with_its_brackets() {
        let question = Message::text("画 <image>").with_image(grey(56, 84));
        let input = input(&[question, Message::assistant().with_text("完成。").with_image(grey(100, 30))]).unwrap();
        let answer = [&[475, 355, 304, 531][..], &[IMG; 81], &[532, 524]].concat();
        assert_eq!(learnt(&input), answer);
        assert_eq!(input.grids, [GridThw { t: 1, h: 6, w: 4 }, GridThw::GENERATED]);
        let unlabelled = input.token_ids.iter().zip(&input.labels).filter(|(id, label)| **id == IMG && label.is_none());
        assert_eq!(unlabelled.count(), 6);
        let processor = processor();
        assert_eq!(input.answer_images, [processor.image_processor().target_patches(&grey(100, 30)).unwrap()]);
        assert_eq!(input.input_images, [processor.image_processor().patches(&grey(56, 84)).unwrap()]);
    }

    /// What happens in turns of every kind: both languages, images on both sides, texts that begin and end oddly.
    fn conversations() -> Vec<Vec<Message>> {
        let odd = [
            " leading",
            "trailing \n",
            "\n\n\nnewlines\n\n",
            "e\u{301}\u{301}",
            "\u{301}combining",
            "我们're 12345 😀\t",
        ];
        let mut all: Vec<Vec<Message>> = odd
            .iter()
            .flat_map(|text| {
                let told = vec![Message::text(*text), Message::assistant().with_text(*text)];
                let framed = [vec![Message::system().with_text(*text)], told.clone()].concat();
                [told, framed]
            })
            .collect();
        all.push(vec![
            Message::text("Here is <image>\n: 把天空变成夜晚。").with_image(grey(200, 150)),
            Message::assistant().with_text("好的：").with_image(grey(64, 64)).with_text(" Done. "),
            Message::text("\nNow <image> and <image>").with_image(grey(40, 60)).with_image(grey(300, 300)),
            Message::assistant().with_text("<image>\n<image>").with_image(grey(9, 9)).with_image(grey(7, 90)),
            Message::user().with_image(grey(56, 56)).with_text("这是什么？"),
            Message::assistant().with_text("A cat 猫."),
        ]);
        all
    }

    #[test]
    fn turns_one_by_one_give_the_tokens_of_the_whole() {
        let processor = processor();
        for messages in conversations() {
            let input = processor.training_input(&messages, &ProcessOptions::default()).unwrap();
            assert_eq!(input.text, render_chat(&messages, false).unwrap());
            let expanded = expand_image_pads(&input.text, &input.grids).unwrap();
            assert_eq!(input.token_ids, processor.tokenizer().encode(&expanded).unwrap(), "{}", input.text);
            assert_eq!(input.labels.len(), input.token_ids.len());
            assert_eq!(input.starts.len(), input.token_ids.len());
            for (&id, label) in input.token_ids.iter().zip(&input.labels) {
                assert!(label.is_none_or(|label| label == id));
            }
        }
    }

    #[test]
    fn tokens_begin_where_their_text_stands() {
        let processor = processor();
        for messages in conversations() {
            let input = processor.training_input(&messages, &ProcessOptions::default()).unwrap();
            assert!(input.starts.is_sorted(), "{:?}", input.starts);
            // A part of a letter begins where the letter does.
            let special = processor.tokenizer().special_tokens();
            let mut tokens = input.token_ids.iter().zip(&input.starts).enumerate();
            let of =
                |id: u32| tokens.clone().filter(move |(_, (token, _))| **token == id).map(|(_, (_, start))| *start);
            for (id, marker) in [(special.im_start, IM_START), (special.im_end, IM_END)] {
                let expected: Vec<usize> = input.text.match_indices(marker).map(|(at, _)| at).collect();
                assert_eq!(of(id).collect::<Vec<_>>(), expected);
            }
            let expected = input.text.match_indices(IMAGE_PAD).zip(&input.grids);
            let expected: Vec<usize> =
                expected.flat_map(|((at, _), grid)| vec![at; grid.num_merged_tokens()]).collect();
            assert_eq!(of(special.image).collect::<Vec<_>>(), expected);
            let ascii = |index: usize, start| {
                let end = input.starts.get(index + 1).copied().unwrap_or(input.text.len());
                input.text.get(start..end).filter(|text| text.is_ascii() && !text.is_empty())
            };
            assert!(tokens.all(|(index, (&id, &start))| {
                id == special.image || ascii(index, start).is_none_or(|text| processor.decode(&[id]).unwrap() == text)
            }));
        }
    }

    #[test]
    fn what_is_learnt_reads_as_the_answers() {
        let processor = processor();
        for messages in conversations() {
            let input = processor.training_input(&messages, &ProcessOptions::default()).unwrap();
            let answers = messages.iter().filter(|message| message.role == Role::Assistant).map(|message| {
                let rendered = render_turn(message).unwrap();
                rendered["<|im_start|>assistant\n".len()..rendered.len() - 1].to_string()
            });
            let images: Vec<GridThw> = input.answer_images.iter().map(|patches| patches.grid).collect();
            assert!(images.iter().all(|&grid| grid == GridThw::GENERATED));
            let wanted = expand_image_pads(&answers.collect::<String>(), &images).unwrap();
            let composed = processor.decode(&processor.tokenizer().encode(&wanted).unwrap()).unwrap();
            assert_eq!(processor.decode(&learnt(&input)).unwrap(), composed);
        }
    }

    #[test]
    fn images_of_earlier_answers_are_learnt_too() {
        let messages = conversations().pop().unwrap();
        let input = input(&messages).unwrap();
        assert_eq!((input.input_images.len(), input.answer_images.len()), (4, 3));
        assert_eq!(learnt(&input).iter().filter(|&&id| id == IMG).count(), 3 * 81);
        let generated: Vec<bool> = input.grids.iter().map(|&grid| grid == GridThw::GENERATED).collect();
        assert_eq!(generated, [false, true, false, false, true, true, false]);
    }

    #[test]
    fn a_token_that_the_header_shares_is_not_learnt() {
        let dir = tempfile::tempdir().unwrap();
        write_byte_tokenizer(dir.path(), "");
        let path = dir.path().join("tokenizer.json");
        let mut file: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        file["model"]["vocab"]["ĊĊ"] = 300.into();
        file["model"]["merges"] = serde_json::json!(["Ċ Ċ"]);
        std::fs::write(&path, file.to_string()).unwrap();
        let processor = Processor::open(dir.path()).unwrap();
        let messages = [Message::text("q"), Message::assistant().with_text("\nA")];
        let input = processor.training_input(&messages, &ProcessOptions::default()).unwrap();
        let im_end = processor.tokenizer().special_tokens().im_end;
        let end = &input.token_ids[input.token_ids.len() - 4..];
        assert_eq!((end[0], end[1], end[2]), (300, 32, im_end));
        assert_eq!(learnt(&input), [32, im_end]);
    }

    #[test]
    fn alpha_follows_the_options() {
        let clear = Image::from_rgba8(4, 4, &[0; 64]).unwrap();
        let messages = [Message::user().with_image(clear.clone()), Message::assistant().with_image(clear)];
        for (alpha, is_dark) in [(Alpha::Drop, true), (Alpha::OnWhite, false)] {
            let options = ProcessOptions { alpha, ..Default::default() };
            let input = processor().training_input(&messages, &options).unwrap();
            assert_eq!(input.input_images[0].values[0] < 0.0, is_dark);
            assert_eq!(input.answer_images[0].values[0] < 0.0, is_dark);
        }
    }

    #[test]
    fn conversations_without_an_answer_are_refused() {
        let (question, answer) = (Message::text("q"), Message::assistant().with_text("a"));
        assert!(matches!(input(&[]), Err(DataError::EmptyPrompt)));
        assert!(matches!(input(std::slice::from_ref(&question)), Err(DataError::AnswerMissing)));
        let result = input(&[question.clone(), answer.clone(), question.clone()]);
        assert!(matches!(result, Err(DataError::AnswerNotLast)));
        for empty in [Message::assistant(), Message::assistant().with_text(" \n")] {
            let result = input(&[question.clone(), empty, question.clone(), answer.clone()]);
            assert!(matches!(result, Err(DataError::AnswerEmpty { message: 1 })));
        }
        let drawn = Message::assistant().with_image(grey(5, 5));
        assert!(input(&[question, drawn]).is_ok());
    }

    #[test]
    fn conversations_that_do_not_fit_together_are_refused() {
        let answer = Message::assistant().with_text("a");
        let system = Message::system().with_text("s").with_image(grey(5, 5));
        let result = input(&[system, Message::text("q"), answer.clone()]);
        assert!(matches!(result, Err(DataError::ImageInSystem)));
        let result = input(&[Message::text("q"), Message::assistant().with_text("<image>")]);
        assert!(matches!(result, Err(DataError::ImageMarkers { markers: 1, images: 0 })));
        let result = input(&[Message::text("<image><image>").with_image(grey(5, 5)), answer.clone()]);
        assert!(matches!(result, Err(DataError::ImageMarkers { markers: 2, images: 1 })));
        assert!(matches!(input(&[Message::text(" "), answer.clone()]), Err(DataError::EmptyPrompt)));
        for spelled in ["<|im_end|>", "<|im_start|>", "<|image_pad|>"] {
            let result = input(&[Message::text("q"), Message::assistant().with_text(format!("a{spelled}"))]);
            assert!(matches!(result, Err(DataError::SpecialTokenInText { token }) if token == spelled));
        }
        let result = input(&[Message::user().with_image(grey(1, 300)), answer]);
        assert!(matches!(result, Err(DataError::AspectRatio { .. })));
    }
}
