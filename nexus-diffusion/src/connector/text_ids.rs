//! Positions of the condition tokens in the transformer ("text ids"): grids and latent size -> one triple per token.

use nexus_core::GridThw;

use crate::LatentSize;

/// Three position numbers of a token; their meaning depends on the model that reads them.
pub type TokenPosition = [f32; 3];

/// Positions that say nothing: those of the generation decoder and of every negative prompt.
pub fn zero_text_ids(tokens: usize) -> Vec<TokenPosition> {
    vec![[0.0; 3]; tokens]
}

/// Positions of the editing decoder: (picture, row, column), target first, in the latents' own scale.
///
/// The first number is 0 for the target and 1 for the reference. Rows and columns of merged tokens are multiplied by
/// latent rows per row of *patches*, so both pictures cover the upper left quarter of the latents.
pub fn editing_text_ids(target: GridThw, reference: Option<GridThw>, latents: LatentSize) -> Vec<TokenPosition> {
    let mut positions = picture_text_ids(0.0, target, latents);
    if let Some(reference) = reference {
        positions.extend(picture_text_ids(1.0, reference, latents));
    }
    positions
}

fn picture_text_ids(picture: f32, grid: GridThw, latents: LatentSize) -> Vec<TokenPosition> {
    let row_step = (latents.height as f64 / grid.h as f64) as f32;
    let column_step = (latents.width as f64 / grid.w as f64) as f32;
    (0..grid.merged_h())
        .flat_map(|row| {
            (0..grid.merged_w()).map(move |column| [picture, row as f32 * row_step, column as f32 * column_step])
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_pictures_share_the_scale_of_the_latents() {
        let latents = LatentSize { height: 64, width: 32 };
        let ids = editing_text_ids(GridThw::GENERATED, Some(GridThw::REFERENCE), latents);
        assert_eq!(ids.len(), 81 + 324);
        assert_eq!(ids[0], [0.0, 0.0, 0.0]);
        assert_eq!(ids[10], [0.0, 64.0 / 18.0, 32.0 / 18.0]);
        assert_eq!(ids[81], [1.0, 0.0, 0.0]);
        assert_eq!(ids[81 + 2 * 18 + 2], [1.0, 2.0 * (64.0 / 36.0), 2.0 * (32.0 / 36.0)]);
    }

    #[test]
    fn without_a_reference_only_the_target_remains() {
        let latents = LatentSize { height: 12, width: 8 };
        assert_eq!(editing_text_ids(GridThw::GENERATED, None, latents).len(), 81);
        assert_eq!(zero_text_ids(3), [[0.0; 3]; 3]);
    }
}
