//! The stage: image embeddings -> what the transformer is conditioned on, for each of the two trained decoders.

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};
use nexus_checkpoint::{Checkpoint, LoadOptions, load_module};
use nexus_core::ImageEmbeds;

use crate::{
    DiffusionError, LatentSize,
    config::DiffusionConfig,
    connector::{Adapter, EmbeddingMerger, TokenPosition, editing_text_ids, zero_text_ids},
    transformer::Dit,
    weights::{EDITING_DECODER, GENERATION_DECODER, notice_flux_licence},
};

/// Condition tokens and their positions.
#[derive(Debug, Clone)]
pub struct Conditioning {
    /// `[batch, tokens, context]`.
    pub embeds: Tensor<3>,
    /// One per token.
    pub text_ids: Vec<TokenPosition>,
}

impl Conditioning {
    /// Condition tokens of a prompt, which have no positions: those of T5 for the negative branch.
    ///
    /// # Shapes
    /// - `embeds`: `[batch, tokens, context]`
    pub fn without_positions(embeds: Tensor<3>) -> Self {
        let [_, tokens, _] = embeds.dims();
        Self { embeds, text_ids: zero_text_ids(tokens) }
    }
}

/// Draws what image embeddings describe.
#[derive(Module, Debug)]
pub struct GenerationDecoder {
    /// Image embeddings to condition tokens.
    pub adapter: Adapter,
    /// `pipe.dit`.
    pub dit: Dit,
}

impl GenerationDecoder {
    /// A lazily initialised decoder.
    ///
    /// # Panics
    /// If the configuration is incoherent.
    pub fn new(config: &DiffusionConfig, device: &Device) -> Self {
        Self {
            adapter: Adapter::new(config.merger.hidden_size, config.dit.context_dim, device),
            dit: Dit::new(&config.dit, device),
        }
    }

    /// Loads `generation_decoder.bin`, or the same tensors from another kind of file.
    ///
    /// # Errors
    /// [`DiffusionError::Config`] if the configuration is incoherent, [`DiffusionError::Checkpoint`] if the weights do
    /// not fit it.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &DiffusionConfig,
        device: &Device,
        options: &LoadOptions,
    ) -> Result<Self, DiffusionError> {
        config.validate()?;
        notice_flux_licence(&config.dit);
        Ok(load_module(Self::new(config, device), checkpoint, &GENERATION_DECODER, options)?)
    }

    /// What the transformer is conditioned on, in the dtype of the embeddings.
    ///
    /// # Errors
    /// [`DiffusionError::EmbedsWidth`], [`DiffusionError::Frames`].
    pub fn condition(&self, embeds: &ImageEmbeds) -> Result<Conditioning, DiffusionError> {
        let [_, hidden] = self.adapter.linear_in.weight.dims();
        check_embeds(embeds, hidden)?;
        Ok(Conditioning::without_positions(self.adapter.forward(embeds.values.clone())))
    }
}

/// Draws what image embeddings describe, faithful to a reference picture.
#[derive(Module, Debug)]
pub struct EditingDecoder {
    /// Embeddings of both pictures to condition tokens.
    pub embedding_merger: EmbeddingMerger,
    /// `pipe.dit`.
    pub dit: Dit,
}

impl EditingDecoder {
    /// A lazily initialised decoder.
    ///
    /// # Panics
    /// If the configuration is incoherent.
    pub fn new(config: &DiffusionConfig, device: &Device) -> Self {
        Self {
            embedding_merger: EmbeddingMerger::new(&config.merger, config.dit.context_dim, device),
            dit: Dit::new(&config.dit, device),
        }
    }

    /// Loads `edit_decoder.bin`, or the same tensors from another kind of file.
    ///
    /// # Errors
    /// [`DiffusionError::Config`] if the configuration is incoherent, [`DiffusionError::Checkpoint`] if the weights do
    /// not fit it.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &DiffusionConfig,
        device: &Device,
        options: &LoadOptions,
    ) -> Result<Self, DiffusionError> {
        config.validate()?;
        notice_flux_licence(&config.dit);
        Ok(load_module(Self::new(config, device), checkpoint, &EDITING_DECODER, options)?)
    }

    /// What the transformer is conditioned on, in the dtype of the embeddings.
    ///
    /// The condition tokens of the reference follow those of the picture to be drawn; without a reference there are
    /// only the latter.
    ///
    /// # Errors
    /// [`DiffusionError::EmbedsWidth`], [`DiffusionError::Frames`], [`DiffusionError::ReferenceBatch`].
    pub fn condition(
        &self,
        embeds: &ImageEmbeds,
        reference: Option<&ImageEmbeds>,
        size: LatentSize,
    ) -> Result<Conditioning, DiffusionError> {
        let hidden = self.embedding_merger.hidden_size();
        check_embeds(embeds, hidden)?;
        if let Some(reference) = reference {
            check_embeds(reference, hidden)?;
            let ([embeds, ..], [reference, ..]) = (embeds.values.dims(), reference.values.dims());
            if embeds != reference {
                return Err(DiffusionError::ReferenceBatch { reference, embeds });
            }
        }
        let text_ids = editing_text_ids(embeds.grid, reference.map(|reference| reference.grid), size);
        Ok(Conditioning { embeds: self.embedding_merger.forward(embeds, reference), text_ids })
    }
}

fn check_embeds(embeds: &ImageEmbeds, expected: usize) -> Result<(), DiffusionError> {
    let [_, _, found] = embeds.values.dims();
    if found != expected {
        return Err(DiffusionError::EmbedsWidth { found, expected });
    }
    if embeds.grid.t != 1 {
        return Err(DiffusionError::Frames { grid: embeds.grid });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use nexus_core::{
        GridThw,
        testing::{cpu, ramp},
    };

    use super::*;
    use crate::config::{DitConfig, MergerConfig, MergerVisionConfig, RopeScaling};

    fn tiny() -> DiffusionConfig {
        DiffusionConfig {
            merger: MergerConfig {
                hidden_size: 16,
                intermediate_size: 8,
                num_attention_heads: 2,
                num_key_value_heads: 1,
                rms_norm_eps: 1e-6,
                rope_theta: 1e6,
                rope_scaling: RopeScaling { mrope_section: [2, 1, 1] },
                vision_config: MergerVisionConfig::default(),
            },
            dit: DitConfig {
                dim: 8,
                num_heads: 1,
                num_double: 1,
                num_single: 1,
                context_dim: 6,
                pooled_dim: 4,
                axes_dim: [2, 2, 4],
                ..DitConfig::default()
            },
        }
    }

    fn embeds(batch: usize, width: usize, grid: GridThw) -> ImageEmbeds {
        ImageEmbeds::new(ramp([batch, grid.num_merged_tokens(), width], 1), grid).unwrap()
    }

    #[test]
    fn embeddings_of_other_models_are_refused() {
        let size = LatentSize { height: 4, width: 4 };
        let (generation, editing) = (GenerationDecoder::new(&tiny(), &cpu()), EditingDecoder::new(&tiny(), &cpu()));
        let grid = GridThw::new(1, 4, 4).unwrap();
        let wide = embeds(1, 18, grid);
        let error = generation.condition(&wide).unwrap_err();
        assert!(matches!(error, DiffusionError::EmbedsWidth { found: 18, expected: 16 }));
        assert!(matches!(editing.condition(&wide, None, size), Err(DiffusionError::EmbedsWidth { .. })));
        let film = embeds(1, 16, GridThw::new(2, 2, 2).unwrap());
        assert!(matches!(generation.condition(&film), Err(DiffusionError::Frames { .. })));
        let result = editing.condition(&embeds(1, 16, grid), Some(&embeds(2, 16, grid)), size);
        assert!(matches!(result, Err(DiffusionError::ReferenceBatch { reference: 2, embeds: 1 })));
    }

    #[test]
    fn one_position_per_condition_token() {
        let size = LatentSize { height: 4, width: 6 };
        let (target, reference) = (embeds(2, 16, GridThw::GENERATED), embeds(2, 16, GridThw::new(1, 4, 6).unwrap()));
        let generated = GenerationDecoder::new(&tiny(), &cpu()).condition(&target).unwrap();
        assert_eq!((generated.embeds.dims(), generated.text_ids.len()), ([2, 81, 6], 81));
        let edited = EditingDecoder::new(&tiny(), &cpu()).condition(&target, Some(&reference), size).unwrap();
        assert_eq!((edited.embeds.dims(), edited.text_ids.len()), ([2, 87, 6], 87));
    }
}
