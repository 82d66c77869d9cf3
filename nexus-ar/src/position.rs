//! Position ids, integers only: token ids and grids -> temporal, row and column position of every token.

use nexus_core::GridThw;

use crate::{ArError, TokenIds};

/// Positions of a sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PositionIds {
    /// Temporal, row and column position of each token.
    pub axes: Vec<[i64; 3]>,
    /// Position of the next text token minus its index in the sequence.
    pub delta: i64,
}

/// Positions of a prompt: text advances all three axes together; an image advances rows and columns inside a square
/// that starts after the text before it, and the text after it starts behind the longer side.
///
/// Every begin-of-image token that is followed by an image token takes the next grid.
///
/// # Errors
/// [`ArError::ImageCount`] if there are more or fewer images than grids; [`ArError::ImageTokens`] if an image has too
/// few image tokens for its grid.
///
/// Source: Qwen2.5-VL (modeling_qwen2_5_vl.py, `get_rope_index`).
pub fn position_ids(token_ids: &[u32], grids: &[GridThw], ids: &TokenIds) -> Result<PositionIds, ArError> {
    let begins_image = |pair: &[u32]| pair[0] == ids.vision_start_token_id && pair[1] == ids.image_token_id;
    let markers = token_ids.windows(2).filter(|pair| begins_image(pair)).count();
    if markers != grids.len() {
        return Err(ArError::ImageCount { markers, grids: grids.len() });
    }
    let mut axes = Vec::with_capacity(token_ids.len());
    let mut grids = grids.iter();
    let mut next = 0;
    while axes.len() < token_ids.len() {
        let index = axes.len();
        let grid = match index > 0 && begins_image(&token_ids[index - 1..=index]) {
            true => grids.next(),
            false => None,
        };
        match grid {
            None => {
                axes.push([next; 3]);
                next += 1;
            }
            Some(grid) => {
                let tokens = grid.num_merged_tokens();
                let available = token_ids[index..].iter().take_while(|&&id| id == ids.image_token_id).count();
                if available < tokens {
                    return Err(ArError::ImageTokens { positions: available, embeddings: tokens });
                }
                axes.extend(image_position_ids(next, *grid));
                next += grid.merged_h().max(grid.merged_w()) as i64;
            }
        }
    }
    Ok(PositionIds { delta: next - axes.len() as i64, axes })
}

/// Positions of one image whose first position is `start`: `(start, start + row, start + column)` in raster order.
pub fn image_position_ids(start: i64, grid: GridThw) -> impl Iterator<Item = [i64; 3]> {
    let (rows, cols) = (grid.merged_h() as i64, grid.merged_w() as i64);
    (0..grid.t as i64 * rows * cols).map(move |k| [start, start + k / cols % rows, start + k % cols])
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDS: TokenIds = TokenIds {
        vision_start_token_id: 90,
        vision_end_token_id: 91,
        image_token_id: 92,
        eos_token_id: 93,
        bos_token_id: 94,
    };

    fn prompt(parts: &[&[u32]]) -> Vec<u32> {
        parts.concat()
    }

    fn grid(h: usize, w: usize) -> GridThw {
        GridThw::new(1, h, w).unwrap()
    }

    #[test]
    fn text_advances_all_axes() {
        let positions = position_ids(&[1, 2, 3], &[], &IDS).unwrap();
        assert_eq!(positions, PositionIds { axes: vec![[0; 3], [1; 3], [2; 3]], delta: 0 });
    }

    #[test]
    fn text_after_an_image_starts_behind_its_longer_side() {
        let ids = prompt(&[&[1, 90], &[92; 6], &[91, 2]]);
        let positions = position_ids(&ids, &[grid(4, 6)], &IDS).unwrap();
        assert_eq!(positions.axes[2..8], [[2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4]]);
        assert_eq!(positions.axes[8..], [[5; 3], [6; 3]]);
        assert_eq!(positions.delta, 7 - 10);
    }

    #[test]
    fn a_marker_at_the_end_of_the_prompt_takes_no_grid() {
        let ids = prompt(&[&[90], &[92; 1], &[91, 90]]);
        let positions = position_ids(&ids, &[grid(2, 2)], &IDS).unwrap();
        assert_eq!(positions.axes, [[0; 3], [1; 3], [2; 3], [3; 3]]);
    }

    #[test]
    fn images_and_grids_must_match() {
        let one = prompt(&[&[90], &[92; 2], &[91]]);
        assert!(matches!(position_ids(&one, &[], &IDS), Err(ArError::ImageCount { markers: 1, grids: 0 })));
        let two = [grid(2, 4), grid(2, 2)];
        assert!(matches!(position_ids(&one, &two, &IDS), Err(ArError::ImageCount { markers: 1, grids: 2 })));
        let short = position_ids(&one, &[grid(4, 4)], &IDS);
        assert!(matches!(short, Err(ArError::ImageTokens { positions: 2, embeddings: 4 })));
    }
}
