//! Conversations to learn from: messages -> token ids, their labels, and the pixels that go in and that are to come out.

use nexus_core::GridThw;

use crate::error::DataError;
use crate::image_processor::Patches;
use crate::message::{Message, Role};
use crate::processor::{ProcessOptions, Processor};
use crate::prompt::{IM_END, IM_START, default_system, expand_image_pads, render_turn, turn_header};

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
    /// learn; [`DataError::ImageInSystem`] if a system message has an image; [`DataError::SpecialTokenInText`] if a text
    /// spells a token that begins or ends a turn; otherwise as [`Processor::process`].
    ///
    /// Source: supervised fine-tuning of Nexus-Gen with ms-swift.
    pub fn training_input(&self, messages: &[Message], options: &ProcessOptions) -> Result<TrainingInput, DataError> {
        check(messages)?;
        let first = messages.first().ok_or(DataError::EmptyPrompt)?;
        let mut input = TrainingInput {
            text: default_system(first),
            token_ids: Vec::new(),
            labels: Vec::new(),
            input_images: Vec::new(),
            answer_images: Vec::new(),
            grids: Vec::new(),
        };
        input.token_ids = self.tokenizer().encode(&input.text)?;
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
        for (id, start) in self.tokenizer().encode_with_starts(&expanded)? {
            input.token_ids.push(id);
            input.labels.push((is_answer && learnt.contains(&start)).then_some(id));
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
        let spelled = |text: &str| [IM_START, IM_END].into_iter().find(|token| text.contains(token));
        if let Some(token) = message.texts().find_map(spelled) {
            return Err(DataError::SpecialTokenInText { token });
        }
    }
    Ok(())
}
