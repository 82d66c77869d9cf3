//! Which fields of a recipe are read: a stage and the part that it trains -> an error for what would be without effect.

use nexus_core::config::ConfigError;

use crate::{DecoderRecipe, LossRecipe, StageRecipe, TrainedPart};

/// Refuses a field of a stage that is set although nothing reads it for this part.
///
/// # Errors
/// [`ConfigError::Incoherent`] naming field and part.
pub(super) fn check_used(stage: &StageRecipe, part: TrainedPart) -> Result<(), ConfigError> {
    use TrainedPart::{Autoencoder, Autoregressive, EditingDecoder, GenerationDecoder, VisionEncoder};
    let (loss, usual) = (&stage.loss, LossRecipe::default());
    let (decoder, plain) = (&stage.decoder, DecoderRecipe::default());
    let language = &[VisionEncoder, Autoregressive][..];
    let decoders = &[GenerationDecoder, EditingDecoder][..];
    // The language model is shown by pictures of what it predicts.
    let (drawing, guided) = (
        &[Autoencoder, Autoregressive, GenerationDecoder, EditingDecoder][..],
        &[Autoregressive, GenerationDecoder, EditingDecoder][..],
    );
    let with_blocks = &[VisionEncoder, Autoregressive, GenerationDecoder, EditingDecoder][..];
    let fields = [
        ("recompute", stage.recompute, with_blocks),
        ("token_weight", loss.token_weight != usual.token_weight, language),
        ("image_weight", loss.image_weight != usual.image_weight, language),
        ("prefill", loss.prefill != usual.prefill, language),
        ("appearance_weight", loss.appearance_weight != usual.appearance_weight, &[VisionEncoder]),
        ("label_weight", loss.label_weight != usual.label_weight, language),
        ("input_label_weight", loss.input_label_weight != usual.input_label_weight, &[Autoregressive]),
        ("attention_weight", loss.attention_weight != usual.attention_weight, &[Autoregressive]),
        ("selection_weight", loss.selection_weight != usual.selection_weight, &[Autoregressive]),
        ("exclude_unseen", loss.exclude_unseen != usual.exclude_unseen, language),
        ("state_layers", loss.state_layers != usual.state_layers, &[Autoregressive]),
        ("embeds_noise", loss.embeds_noise != usual.embeds_noise, &[VisionEncoder]),
        ("gradient_weight", loss.gradient_weight != usual.gradient_weight, &[Autoencoder]),
        ("kl_weight", loss.kl_weight != usual.kl_weight, &[Autoencoder]),
        ("picture_px", decoder.picture_px != plain.picture_px, drawing),
        ("embedded_guidance", decoder.embedded_guidance != plain.embedded_guidance, guided),
        ("condition_dropout", decoder.condition_dropout != plain.condition_dropout, decoders),
        ("predicted_embeds", decoder.predicted_embeds != plain.predicted_embeds, decoders),
    ];
    match fields.into_iter().find(|(_, is_set, parts)| *is_set && !parts.contains(&part)) {
        Some((field, ..)) => Err(ConfigError::incoherent(field, format!("has no meaning for {part:?}"))),
        None => Ok(()),
    }
}
