//! What a model has read and written, kept from one reply to the next: tokens, positions, keys and values.

use nexus_core::GridThw;

use crate::{KvCache, TokenIds};

/// The tokens that a model has seen, with their positions and what its layers keep of them.
///
/// A prompt that begins as the context does is read from where they part; see [`generate_in`](crate::generate_in).
#[derive(Debug, Clone, Default)]
pub struct Context {
    token_ids: Vec<u32>,
    pub(crate) positions: Vec<[i64; 3]>,
    /// Index of the first token that stands for a predicted embedding; a prompt has others at its image positions.
    first_predicted: Option<usize>,
    pub(crate) cache: KvCache,
}

impl Context {
    /// Nothing seen yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of tokens seen.
    pub fn len(&self) -> usize {
        self.token_ids.len()
    }

    /// Whether no token has been seen.
    pub fn is_empty(&self) -> bool {
        self.token_ids.is_empty()
    }

    /// Ids of the tokens seen, image tokens expanded.
    pub fn token_ids(&self) -> &[u32] {
        &self.token_ids
    }

    /// Temporal, row and column position of each token seen.
    pub fn positions(&self) -> &[[i64; 3]] {
        &self.positions
    }

    /// Forgets the tokens from this one on.
    pub fn truncate(&mut self, tokens: usize) {
        self.token_ids.truncate(tokens);
        self.positions.truncate(tokens);
        self.first_predicted = self.first_predicted.filter(|first| *first < tokens);
        self.cache.truncate(tokens);
    }

    /// Notes tokens that the model is about to see.
    pub(crate) fn extend(&mut self, token_ids: &[u32], positions: Vec<[i64; 3]>, predicted: bool) {
        if predicted {
            self.first_predicted.get_or_insert(self.token_ids.len());
        }
        self.token_ids.extend_from_slice(token_ids);
        self.positions.extend(positions);
    }

    /// How many tokens of a prompt need not be read, and how many of its images are among them. The last token is
    /// always read, and no image in part.
    pub(crate) fn shared(
        &self,
        token_ids: &[u32],
        positions: &[[i64; 3]],
        grids: &[GridThw],
        ids: &TokenIds,
    ) -> (usize, usize) {
        let seen = self.token_ids.iter().zip(&self.positions).take(self.first_predicted.unwrap_or(usize::MAX));
        let same = token_ids.iter().zip(positions).zip(seen).take_while(|(one, other)| one == other).count();
        let mut tokens = same.min(token_ids.len().saturating_sub(1));
        let begins_image = |pair: &[u32]| pair[0] == ids.vision_start_token_id && pair[1] == ids.image_token_id;
        let starts =
            token_ids.windows(2).enumerate().filter(|(_, pair)| begins_image(pair)).map(|(index, _)| index + 1);
        let mut images = 0;
        for (start, grid) in starts.zip(grids) {
            if start + grid.num_merged_tokens() <= tokens {
                images += 1;
            } else {
                tokens = tokens.min(start);
            }
        }
        (tokens, images)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position_ids;

    const IDS: TokenIds = TokenIds {
        vision_start_token_id: 90,
        vision_end_token_id: 91,
        image_token_id: 92,
        eos_token_id: 93,
        bos_token_id: 94,
    };

    fn grid(h: usize, w: usize) -> GridThw {
        GridThw::new(1, h, w).unwrap()
    }

    /// What is shared by a context that has read one prompt, and another prompt.
    fn shared(seen: (&[u32], &[GridThw]), prompt: (&[u32], &[GridThw])) -> (usize, usize) {
        let mut context = Context::new();
        context.extend(seen.0, position_ids(seen.0, seen.1, &IDS).unwrap().axes, false);
        context.shared(prompt.0, &position_ids(prompt.0, prompt.1, &IDS).unwrap().axes, prompt.1, &IDS)
    }

    #[test]
    fn a_prompt_shares_what_comes_before_the_first_difference() {
        assert_eq!(shared((&[], &[]), (&[1, 2], &[])), (0, 0));
        assert_eq!(shared((&[1, 2, 3], &[]), (&[1, 2, 4, 3], &[])), (2, 0));
        assert_eq!(shared((&[1, 2, 3], &[]), (&[1, 2, 3, 4], &[])), (3, 0));
    }

    #[test]
    fn the_last_token_is_read_again() {
        assert_eq!(shared((&[1, 2, 3], &[]), (&[1, 2, 3], &[])), (2, 0));
        assert_eq!(shared((&[1, 2, 3], &[]), (&[1, 2], &[])), (1, 0));
    }

    #[test]
    fn images_are_shared_whole_or_not_at_all() {
        let (small, large) = (grid(2, 4), grid(4, 4));
        let one = [1, 90, 92, 92, 91];
        assert_eq!(shared((&one, &[small]), (&[1, 90, 92, 92, 91, 5], &[small])), (5, 1));
        assert_eq!(shared((&one, &[small]), (&[1, 90, 92, 92, 92, 92, 91], &[large])), (2, 0));
        assert_eq!(shared((&one, &[small]), (&[1, 90, 92, 92], &[small])), (2, 0));
        let two = [90, 92, 92, 91, 90, 92, 92, 91, 6];
        assert_eq!(shared((&[90, 92, 92, 91, 3], &[small]), (&two, &[small, small])), (4, 1));
    }

    #[test]
    fn a_predicted_image_is_no_image_of_a_prompt() {
        let prompt = [1, 90, 92, 92, 91];
        let positions = position_ids(&prompt, &[grid(2, 4)], &IDS).unwrap().axes;
        let mut context = Context::new();
        context.extend(&prompt[..2], positions[..2].to_vec(), false);
        context.extend(&prompt[2..4], positions[2..4].to_vec(), true);
        context.extend(&prompt[4..], positions[4..].to_vec(), false);
        assert_eq!(context.shared(&prompt, &positions, &[grid(2, 4)], &IDS), (2, 0));
        context.truncate(2);
        context.extend(&prompt[2..], positions[2..].to_vec(), false);
        assert_eq!(context.shared(&prompt, &positions, &[grid(2, 4)], &IDS), (4, 1));
        assert_eq!((context.token_ids(), context.positions()), (&prompt[..], &positions[..]));
    }
}
