//! How one request runs through the stages: prompt -> reply -> picture, with progress and cancelling.

use std::{
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind},
};

use nexus_core::ImageEmbeds;
use nexus_data::{
    Alpha, Image, Language, Message, ModelInput, Patches, ProcessOptions, edit_prompt, generation_prompt,
};

use crate::{
    Chat, ChatOptions, DrawOptions, DrawWith, EditOptions, EditWith, Error, GenerateOptions, Nexus, Observer, Picture,
    Progress, Reply, TextOptions,
};

/// The verbs of [`Nexus`] with an observer that hears progress and may cancel; made by [`Nexus::with_progress`].
pub struct Session<'a> {
    pub(crate) nexus: &'a mut Nexus,
    pub(crate) observer: Box<Observer<'a>>,
}

impl<'a> Session<'a> {
    /// See [`Nexus::understand`].
    ///
    /// # Errors
    /// As [`Nexus::understand`], and [`Error::Cancelled`].
    pub fn understand<'i>(
        &mut self,
        images: impl Into<Images<'i>>,
        question: &str,
        options: &TextOptions,
    ) -> Result<Reply, Error> {
        if question.trim().is_empty() {
            return Err(nexus_data::DataError::EmptyPrompt.into());
        }
        let images: Images<'i> = images.into();
        let mut message = Message::user();
        for image in images.0 {
            message = message.with_image(image.to_rgb(Alpha::OnWhite));
        }
        self.reply(&[message.with_text(question)], options)
    }

    /// See [`Nexus::generate`].
    ///
    /// # Errors
    /// As [`Nexus::generate`], and [`Error::Cancelled`].
    pub fn generate(&mut self, prompt: &str, options: &GenerateOptions) -> Result<Picture, Error> {
        let draw = DrawOptions::from(options);
        self.nexus.check_drawing(&draw)?;
        self.nexus.stages.files.generation_decoder()?;
        let language = options.language.unwrap_or_else(|| Language::detect(prompt));
        let reply = self.reply(&[Message::text(generation_prompt(prompt, language)?)], &options.text)?;
        let embeds = first_image(&reply)?;
        Ok(Picture { reply: Some(reply), ..self.draw(&embeds, DrawWith::GenerationDecoder, &draw)? })
    }

    /// See [`Nexus::edit`].
    ///
    /// # Errors
    /// As [`Nexus::edit`], and [`Error::Cancelled`].
    pub fn edit(&mut self, image: &Image, instruction: &str, options: &EditOptions) -> Result<Picture, Error> {
        let draw = DrawOptions::from(options);
        self.nexus.check_drawing(&draw)?;
        match options.decoder {
            EditWith::EditingDecoder => self.nexus.stages.files.edit_decoder()?,
            EditWith::GenerationDecoder => self.nexus.stages.files.generation_decoder()?,
        };
        let message = Message::user().with_text(edit_prompt(instruction)?).with_image(image.clone());
        let reply = self.reply(&[message], &options.text)?;
        let embeds = first_image(&reply)?;
        let reference;
        let with = match options.decoder {
            EditWith::EditingDecoder => {
                reference = self.reference(image)?;
                DrawWith::EditingDecoder { reference: Some(&reference) }
            }
            EditWith::GenerationDecoder => DrawWith::GenerationDecoder,
        };
        Ok(Picture { reply: Some(reply), ..self.draw(&embeds, with, &draw)? })
    }

    /// See [`Nexus::reply`].
    ///
    /// # Errors
    /// As [`Nexus::reply`], and [`Error::Cancelled`].
    pub fn reply(&mut self, messages: &[Message], options: &TextOptions) -> Result<Reply, Error> {
        let process = ProcessOptions { max_pixels: options.max_pixels, ..ProcessOptions::default() };
        let input = self.nexus.processor.process(messages, true, &process)?;
        self.reply_to(input, options)
    }

    /// See [`Nexus::reply_to`].
    ///
    /// # Errors
    /// As [`Nexus::reply_to`], and [`Error::Cancelled`].
    pub fn reply_to(&mut self, input: ModelInput, options: &TextOptions) -> Result<Reply, Error> {
        let ModelInput { text, token_ids, images } = input;
        let generation = self.on_device(|nexus, observer| {
            let images = nexus.stages.encode(images, observer)?;
            nexus.generate_tokens(&token_ids, &images, options, observer)
        })?;
        let text_of_reply = self.nexus.processor.decode_reply(generation.new_token_ids())?;
        Ok(Reply { text: text_of_reply, prompt: text, generation })
    }

    /// See [`Nexus::embed`].
    ///
    /// # Errors
    /// As [`Nexus::embed`], and [`Error::Cancelled`].
    pub fn embed(&mut self, image: &Image, max_pixels: usize) -> Result<ImageEmbeds, Error> {
        let processor = self.nexus.processor.image_processor();
        let patches = processor.patches(&processor.bound(image, max_pixels)?)?;
        self.encode(patches)
    }

    /// See [`Nexus::reference`].
    ///
    /// # Errors
    /// As [`Nexus::reference`], and [`Error::Cancelled`].
    pub fn reference(&mut self, image: &Image) -> Result<ImageEmbeds, Error> {
        let patches = self.nexus.processor.image_processor().reference_patches(image)?;
        self.encode(patches)
    }

    fn encode(&mut self, patches: Patches) -> Result<ImageEmbeds, Error> {
        self.on_device(|nexus, observer| nexus.stages.encode_one(patches, observer))
    }

    /// See [`Nexus::draw`].
    ///
    /// # Errors
    /// As [`Nexus::draw`], and [`Error::Cancelled`].
    pub fn draw(&mut self, embeds: &ImageEmbeds, with: DrawWith<'_>, options: &DrawOptions) -> Result<Picture, Error> {
        let size = self.nexus.check_drawing(options)?;
        let (height, width) = size.pixels();
        if (options.width, options.height) != (width, height) {
            let asked = (options.width, options.height);
            log::warn!("{}x{} is not a multiple of 16 pixels: drawing {width}x{height}", asked.0, asked.1);
            emit(&mut self.observer, Progress::SizeRounded { asked, used: (width, height) })?;
        }
        let (latents, image) = self.on_device(|nexus, observer| {
            let latents = nexus.stages.denoise(embeds, with, size, options, observer)?;
            let image = nexus.stages.decode(latents.clone(), options.tiled, observer)?;
            Ok((latents, image))
        })?;
        let reference = match with {
            DrawWith::EditingDecoder { reference } => reference.cloned(),
            DrawWith::GenerationDecoder => None,
        };
        Ok(Picture { image, embeds: embeds.clone(), reference, latents, reply: None })
    }

    /// See [`Nexus::chat`]; the observer hears every turn.
    pub fn chat(self, options: ChatOptions) -> Chat<'a> {
        Chat::new(self, options)
    }

    /// Runs a part of a request that computes.
    fn on_device<T>(
        &mut self,
        part: impl FnOnce(&mut Nexus, &mut Observer<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let Self { nexus, observer } = self;
        let result = catch_unwind(AssertUnwindSafe(|| part(nexus, &mut **observer)));
        nexus.stages.judge(result)
    }
}

/// Passes an event on; a break becomes [`Error::Cancelled`].
pub(crate) fn emit(observer: &mut Observer<'_>, event: Progress) -> Result<(), Error> {
    match observer(event) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Cancelled),
    }
}

fn first_image(reply: &Reply) -> Result<ImageEmbeds, Error> {
    reply.generation.images.first().cloned().ok_or_else(|| Error::NoImage { reply: reply.text.clone() })
}

/// One or several images, from `&image`, `&[image, ..]` or `&vec`; none for a question without a picture.
#[derive(Debug, Clone, Copy)]
pub struct Images<'a>(pub(crate) &'a [Image]);

impl<'a> From<&'a Image> for Images<'a> {
    fn from(image: &'a Image) -> Self {
        Self(std::slice::from_ref(image))
    }
}

impl<'a> From<&'a [Image]> for Images<'a> {
    fn from(images: &'a [Image]) -> Self {
        Self(images)
    }
}

impl<'a> From<&'a Vec<Image>> for Images<'a> {
    fn from(images: &'a Vec<Image>) -> Self {
        Self(images)
    }
}

impl<'a, const N: usize> From<&'a [Image; N]> for Images<'a> {
    fn from(images: &'a [Image; N]) -> Self {
        Self(images)
    }
}
