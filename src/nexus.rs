//! The model as a whole: a handle with the verbs, each of which runs a request through the stages.

use std::{ops::ControlFlow, path::Path, sync::Arc};

use burn::tensor::{Device, FloatDType};
use nexus_ar::{ArModel, Context, GenerateEvent, Generation, GenerationConfig, Prompt, SamplingOptions};
use nexus_core::ImageEmbeds;
use nexus_data::{
    Alpha, Image, Language, Message, ModelInput, Patches, ProcessOptions, Processor, edit_prompt, generation_prompt,
};
use nexus_diffusion::{Autoencoder, EditingDecoder, GenerationDecoder, LatentSize};
use nexus_vision_encoder::VisionEncoder;

use crate::{
    Conversation, ConversationOptions, DrawOptions, DrawWith, EditOptions, EditWith, Error, GenerateOptions, Images,
    Loader, ModelFiles, Observer, Picture, Progress, Reply, Stage, TextOptions, progress::emit, stages::Stages,
};

/// A model that understands, generates and edits images.
///
/// This is a handle: a clone shares the weights, and any thread may use it at any time. What belongs to one request or to
/// one conversation is a value of its own. Every verb takes an [`Observer`] last, `()` for none.
#[derive(Clone)]
pub struct Nexus {
    model: Arc<Model>,
}

/// What all clones of a handle share.
pub(crate) struct Model {
    pub(crate) processor: Processor,
    pub(crate) stages: Stages,
    pub(crate) generation_config: GenerationConfig,
    pub(crate) default_options: ConversationOptions,
    pub(crate) max_picture_pixels: usize,
}

impl Nexus {
    /// Loads a model from `models/` or `models/Nexus-GenV2` and keeps its stages in memory.
    ///
    /// # Errors
    /// As [`Loader::load`].
    pub fn load(dir: impl AsRef<Path>, device: &Device) -> Result<Self, Error> {
        Self::loader(dir).load(device, ())
    }

    /// Chooses how a model is loaded.
    pub fn loader(dir: impl AsRef<Path>) -> Loader {
        Loader::new(dir.as_ref())
    }

    pub(crate) fn new(model: Model) -> Self {
        Self { model: Arc::new(model) }
    }

    /// Answers a question about one or several images, given before it unless `<image>` marks in the question say
    /// where they go.
    ///
    /// Transparent images are put on white.
    ///
    /// # Errors
    /// [`Error::Data`] for an empty question, marks that do not match the images, or an unusable image;
    /// [`Error::Ar`] for a prompt longer than the context or an option out of range; [`Error::Cancelled`].
    pub fn understand<'i>(
        &self,
        images: impl Into<Images<'i>>,
        question: &str,
        options: &TextOptions,
        observer: impl Observer,
    ) -> Result<Reply, Error> {
        if question.trim().is_empty() {
            return Err(nexus_data::DataError::EmptyPrompt.into());
        }
        let images: Images<'i> = images.into();
        let mut message = Message::user();
        for image in images.0 {
            message = message.with_image(image.to_rgb(Alpha::OnWhite));
        }
        self.reply(&[message.with_text(question)], options, observer)
    }

    /// Draws a picture of what the prompt describes.
    ///
    /// # Errors
    /// [`Error::NoImage`] if the model answers with text only; [`Error::Data`] for an empty prompt;
    /// [`Error::Diffusion`] and [`Error::PictureTooLarge`] for options out of range; [`Error::FileMissing`] if a decoder
    /// is not there; [`Error::OutOfDeviceMemory`], [`Error::DeviceLost`] and [`Error::Read`] if the device fails;
    /// [`Error::Cancelled`]; otherwise the stages' errors.
    pub fn generate(
        &self,
        prompt: &str,
        options: &GenerateOptions,
        mut observer: impl Observer,
    ) -> Result<Picture, Error> {
        let observer: &mut dyn Observer = &mut observer;
        self.check_drawing(&options.draw)?;
        self.files().generation_decoder()?;
        let language = options.language.unwrap_or_else(|| Language::detect(prompt));
        let message = Message::text(generation_prompt(prompt, language)?);
        let reply = self.reply(&[message], &options.text, &mut *observer)?;
        let embeds = first_image(&reply)?;
        let picture = self.draw(&embeds, DrawWith::GenerationDecoder, &options.draw, observer)?;
        Ok(Picture { reply: Some(reply), ..picture })
    }

    /// Changes a picture as the instruction says.
    ///
    /// An alpha channel is dropped. The result has the size of the options, not of the source.
    ///
    /// # Errors
    /// As [`Nexus::generate`].
    pub fn edit(
        &self,
        image: &Image,
        instruction: &str,
        options: &EditOptions,
        mut observer: impl Observer,
    ) -> Result<Picture, Error> {
        let observer: &mut dyn Observer = &mut observer;
        self.check_drawing(&options.draw)?;
        match options.decoder {
            EditWith::EditingDecoder | EditWith::EditingDecoderWithoutReference => self.files().edit_decoder()?,
            EditWith::GenerationDecoder => self.files().generation_decoder()?,
        };
        let message = Message::user().with_text(edit_prompt(instruction)?).with_image(image.clone());
        let reply = self.reply(&[message], &options.text, &mut *observer)?;
        let embeds = first_image(&reply)?;
        let reference;
        let with = match options.decoder {
            EditWith::EditingDecoder => {
                reference = self.reference(image, &mut *observer)?;
                DrawWith::EditingDecoder { reference: Some(&reference) }
            }
            EditWith::EditingDecoderWithoutReference => DrawWith::EditingDecoder { reference: None },
            EditWith::GenerationDecoder => DrawWith::GenerationDecoder,
        };
        Ok(Picture { reply: Some(reply), ..self.draw(&embeds, with, &options.draw, observer)? })
    }

    /// Begins a conversation with the model's default options.
    pub fn conversation(&self) -> Conversation {
        self.conversation_with(self.model.default_options.clone())
    }

    /// Begins a conversation.
    pub fn conversation_with(&self, options: ConversationOptions) -> Conversation {
        Conversation::new(self.clone(), options, vec![])
    }

    /// The model's answer to a conversation: text, and embeddings of pictures that are not drawn yet.
    ///
    /// # Errors
    /// As [`Nexus::understand`].
    pub fn reply(&self, messages: &[Message], options: &TextOptions, observer: impl Observer) -> Result<Reply, Error> {
        self.reply_to(self.prompt(messages, options)?, options, observer)
    }

    /// What the model reads of a conversation that it is to answer.
    pub(crate) fn prompt(&self, messages: &[Message], options: &TextOptions) -> Result<ModelInput, Error> {
        let process = ProcessOptions { max_pixels: options.max_pixels, ..ProcessOptions::default() };
        Ok(self.model.processor.process(messages, true, &process)?)
    }

    /// The model's answer to a prompt that was prepared by [`Nexus::processor`], for example one that ends with the
    /// token that begins an image.
    ///
    /// # Errors
    /// As [`Nexus::understand`].
    pub fn reply_to(
        &self,
        input: ModelInput,
        options: &TextOptions,
        mut observer: impl Observer,
    ) -> Result<Reply, Error> {
        Ok(self.reply_in(&mut Context::new(), input, options, &mut observer)?.0)
    }

    /// The answer to a prompt that may begin as the context does, and the embeddings of the prompt's images. If it fails,
    /// the context holds nothing that it did not hold before.
    pub(crate) fn reply_in(
        &self,
        context: &mut Context,
        input: ModelInput,
        options: &TextOptions,
        observer: &mut dyn Observer,
    ) -> Result<(Reply, Vec<ImageEmbeds>), Error> {
        let ModelInput { text: prompt, token_ids, images } = input;
        let Model { processor, stages, .. } = &*self.model;
        let (generation, images) = stages.run(|| {
            let images = stages.encode(images, observer)?;
            let prompt = Prompt { token_ids: &token_ids, images: &images };
            Ok((self.generate_tokens(context, prompt, options, observer)?, images))
        })?;
        let text = processor.decode_reply(generation.new_token_ids())?;
        Ok((Reply { text, prompt, generation }, images))
    }

    /// Embeddings of an image as the language model sees it, at most `max_pixels` large.
    ///
    /// # Errors
    /// [`Error::Data`] if the image cannot be used; [`Error::Cancelled`].
    pub fn embed(&self, image: &Image, max_pixels: usize, observer: impl Observer) -> Result<ImageEmbeds, Error> {
        let processor = self.model.processor.image_processor();
        self.encode(processor.patches(&processor.bound(image, max_pixels)?)?, observer)
    }

    /// Embeddings of an image as the editing decoder sees it: 324, whatever its size and shape.
    ///
    /// # Errors
    /// [`Error::Data`] if the image cannot be used; [`Error::Cancelled`].
    pub fn reference(&self, image: &Image, observer: impl Observer) -> Result<ImageEmbeds, Error> {
        self.encode(self.model.processor.image_processor().reference_patches(image)?, observer)
    }

    fn encode(&self, patches: Patches, mut observer: impl Observer) -> Result<ImageEmbeds, Error> {
        let stages = &self.model.stages;
        stages.run(|| stages.encode_one(patches, &mut observer))
    }

    /// Draws embeddings: predicted ones, or those of an image.
    ///
    /// They, and start noise that is given, may be on any device and in any dtype of floats.
    ///
    /// # Errors
    /// As [`Nexus::generate`].
    pub fn draw(
        &self,
        embeds: &ImageEmbeds,
        with: DrawWith<'_>,
        options: &DrawOptions,
        mut observer: impl Observer,
    ) -> Result<Picture, Error> {
        let size = self.check_drawing(options)?;
        let (height, width) = size.pixels();
        if (options.width, options.height) != (width, height) {
            let asked = (options.width, options.height);
            log::warn!("{}x{} is not a multiple of 16 pixels: drawing {width}x{height}", asked.0, asked.1);
            emit(&mut observer, Progress::SizeRounded { asked, used: (width, height) })?;
        }
        let stages = &self.model.stages;
        let (latents, image) = stages.run(|| {
            let latents = stages.denoise(embeds, with, size, options, &mut observer)?;
            let image = stages.decode(latents.clone(), options.tiled, &mut observer)?;
            Ok((latents, image))
        })?;
        let reference = match with {
            DrawWith::EditingDecoder { reference } => reference.cloned(),
            DrawWith::GenerationDecoder => None,
        };
        Ok(Picture { image, embeds: embeds.clone(), reference, latents, reply: None })
    }

    /// The vision encoder, loaded if it is not in memory.
    ///
    /// With [`Residency::OneStageAtATime`](crate::Residency), it is in memory beside another stage for as long as it is
    /// kept; so are the other stages below.
    ///
    /// # Errors
    /// As [`Loader::load`].
    pub fn vision_encoder(&self, mut observer: impl Observer) -> Result<Arc<VisionEncoder>, Error> {
        self.model.stages.run(|| Ok(self.model.stages.vision_encoder(&mut observer)?.into_inner()))
    }

    /// The autoregressive model, for its hidden states and the scores of a prompt.
    ///
    /// # Errors
    /// As [`Loader::load`].
    pub fn ar(&self, mut observer: impl Observer) -> Result<Arc<ArModel>, Error> {
        self.model.stages.run(|| Ok(self.model.stages.ar(&mut observer)?.into_inner()))
    }

    /// The generation decoder.
    ///
    /// # Errors
    /// As [`Loader::load`], and [`Error::FileMissing`].
    pub fn generation_decoder(&self, mut observer: impl Observer) -> Result<Arc<GenerationDecoder>, Error> {
        self.model.stages.run(|| Ok(self.model.stages.generation_decoder(&mut observer)?.into_inner()))
    }

    /// The editing decoder.
    ///
    /// # Errors
    /// As [`Loader::load`], and [`Error::FileMissing`].
    pub fn editing_decoder(&self, mut observer: impl Observer) -> Result<Arc<EditingDecoder>, Error> {
        self.model.stages.run(|| Ok(self.model.stages.editing_decoder(&mut observer)?.into_inner()))
    }

    /// The autoencoder, for the latents of a picture and the picture of latents.
    ///
    /// # Errors
    /// As [`Loader::load`], and [`Error::FileMissing`].
    pub fn autoencoder(&self, mut observer: impl Observer) -> Result<Arc<Autoencoder>, Error> {
        self.model.stages.run(|| Ok(self.model.stages.autoencoder(&mut observer)?.into_inner()))
    }

    /// What the model computes in, on which device.
    pub fn device(&self) -> (&Device, FloatDType) {
        (&self.model.stages.device, self.model.stages.compute_dtype)
    }

    /// Tokenizer and image processor of the model.
    pub fn processor(&self) -> &Processor {
        &self.model.processor
    }

    /// Where the model's files are.
    pub fn files(&self) -> &ModelFiles {
        &self.model.stages.files
    }

    /// Options that suit the model: what `nexus_options.json` says, or those of the original's scripts without it.
    pub fn default_options(&self) -> &ConversationOptions {
        &self.model.default_options
    }

    /// What `generation_config.json` says.
    pub fn generation_config(&self) -> &GenerationConfig {
        &self.model.generation_config
    }

    /// The stages that are in memory, with the bytes of their weights; on a CPU these are in the mapped files.
    pub fn loaded(&self) -> Vec<(Stage, usize)> {
        self.model.stages.loaded()
    }

    /// Frees every stage and the prompts that were kept; they are loaded and encoded again when needed. What a request
    /// on another thread uses stays until that is done.
    pub fn unload(&self) {
        self.model.stages.unload();
    }

    fn check_drawing(&self, options: &DrawOptions) -> Result<LatentSize, Error> {
        let DrawOptions { width, height, .. } = *options;
        options.denoise().validate()?;
        if options.start.is_none() && options.strength != 1.0 {
            return Err(Error::NothingToStartFrom { strength: options.strength });
        }
        let size = LatentSize::from_pixels(height, width)?;
        let (used_height, used_width) = size.pixels();
        let max_pixels = self.model.max_picture_pixels;
        if used_height.saturating_mul(used_width) > max_pixels {
            return Err(Error::PictureTooLarge { width, height, max_pixels });
        }
        Ok(size)
    }

    fn generate_tokens(
        &self,
        context: &mut Context,
        prompt: Prompt<'_>,
        options: &TextOptions,
        observer: &mut dyn Observer,
    ) -> Result<Generation, Error> {
        let Model { processor, stages, generation_config: config, .. } = &*self.model;
        let from_config = || SamplingOptions::from_config(config, 0);
        let generate_options = nexus_ar::GenerateOptions {
            max_new_tokens: options.max_new_tokens,
            min_new_tokens: options.min_new_tokens,
            sampling: options.sampling.clone().unwrap_or_else(from_config),
            eos_token_ids: Some(config.eos_token_id.clone()).filter(|ids| !ids.is_empty()),
            image_pass: options.image_pass,
            positions_after_image: options.positions_after_image,
            dtype: stages.compute_dtype,
            keep_scores: options.keep_scores,
        };
        let ar = stages.ar(observer)?;
        emit(observer, Progress::Running(Stage::Ar))?;
        let mut text = processor.tokenizer().decode_stream(true);
        let mut num_images = 0;
        let mut failed = None;
        let mut hear = |event: GenerateEvent<'_>| {
            let progress = match event {
                GenerateEvent::PromptRead { tokens, reused } => Progress::PromptRead { tokens, reused },
                GenerateEvent::Token { id } => match text.push(id) {
                    Ok(Some(piece)) => Progress::Text(piece),
                    Ok(None) => return ControlFlow::Continue(()),
                    Err(error) => {
                        failed = Some(error);
                        return ControlFlow::Break(());
                    }
                },
                GenerateEvent::Image { .. } => {
                    num_images += 1;
                    Progress::ImagePredicted { index: num_images - 1 }
                }
                _ => return ControlFlow::Continue(()),
            };
            observer.hear(progress)
        };
        let generation = nexus_ar::generate_in(&ar, context, prompt, &generate_options, &mut hear)?;
        if generation.finish == nexus_ar::FinishReason::Stopped {
            context.truncate(generation.reused_len);
            return Err(failed.map_or(Error::Cancelled, Error::from));
        }
        Ok(generation)
    }
}

fn first_image(reply: &Reply) -> Result<ImageEmbeds, Error> {
    reply.generation.images.first().cloned().ok_or_else(|| Error::NoImage { reply: reply.text.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_goes_to_any_thread() {
        fn shared<T: Clone + Send + Sync + 'static>() {}
        shared::<Nexus>();
        shared::<crate::Conversation>();
    }
}
