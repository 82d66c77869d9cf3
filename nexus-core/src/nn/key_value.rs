//! Keys and values that a layer keeps for later tokens: new ones -> all of them, in memory that is reserved ahead.

use burn::tensor::Tensor;

/// Keys and values of the tokens that a layer has seen; the caller owns them.
///
/// New tokens are written in place while the memory lasts; then it is doubled. A clone shares the memory until either of
/// the two is appended to.
#[derive(Debug, Clone, Default)]
pub struct KeyValue {
    /// Keys and values, `[batch, capacity, kv_heads, head_dim]`.
    buffers: Option<[Tensor<4>; 2]>,
    len: usize,
    reserved: usize,
}

impl KeyValue {
    /// Nothing seen yet; memory for this many tokens is taken with the first ones.
    pub fn with_capacity(tokens: usize) -> Self {
        Self { buffers: None, len: 0, reserved: tokens }
    }

    /// Number of tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token has been seen.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets the tokens from this one on; the memory stays.
    pub fn truncate(&mut self, tokens: usize) {
        self.len = self.len.min(tokens);
    }

    /// Adds tokens and returns the keys and values of all.
    ///
    /// # Shapes
    /// - `keys`, `values`: `[batch, tokens, kv_heads, head_dim]`
    /// - returns: `[batch, all tokens, kv_heads, head_dim]` each, as views; while they live, the next call copies
    pub fn append(&mut self, keys: Tensor<4>, values: Tensor<4>) -> [Tensor<4>; 2] {
        let (start, end) = (self.len, self.len + keys.dims()[1]);
        let capacity = self.buffers.as_ref().map_or(0, |[keys, _]| keys.dims()[1]);
        let (new, past) = ([keys, values], self.buffers.take());
        let buffers = match past {
            Some(buffers) if end <= capacity => buffers,
            past => {
                let capacity = end.max(2 * capacity).max(self.reserved);
                let mut buffers = new.each_ref().map(|new| {
                    let [batch, _, kv_heads, head_dim] = new.dims();
                    Tensor::zeros([batch, capacity, kv_heads, head_dim], (&new.device(), new.dtype()))
                });
                if let Some(past) = past {
                    let past = past.map(|past| past.narrow(1, 0, start));
                    buffers = write(buffers, past, 0);
                }
                buffers
            }
        };
        let buffers = write(buffers, new, start);
        let all = buffers.each_ref().map(|buffer| buffer.clone().narrow(1, 0, end));
        (self.buffers, self.len) = (Some(buffers), end);
        all
    }
}

/// Puts tokens into the buffers from `start` on; in place if nobody else holds the buffers.
fn write(buffers: [Tensor<4>; 2], tokens: [Tensor<4>; 2], start: usize) -> [Tensor<4>; 2] {
    let [keys, values] = buffers;
    let [new_keys, new_values] = tokens;
    let assign = |buffer: Tensor<4>, tokens: Tensor<4>| {
        let [batch, count, kv_heads, head_dim] = tokens.dims();
        buffer.slice_assign([0..batch, start..start + count, 0..kv_heads, 0..head_dim], tokens)
    };
    [assign(keys, new_keys), assign(values, new_values)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use nexus_kernels::testing::{address, ramp};

    fn tokens(count: usize, seed: usize) -> Tensor<4> {
        ramp([2, count, 3, 4], seed)
    }

    #[test]
    fn what_is_held_is_what_was_appended() {
        for reserved in [0, 3, 100] {
            let mut held = KeyValue::with_capacity(reserved);
            assert!(held.is_empty());
            let mut expected = vec![];
            for (seed, count) in [2, 1, 1, 5, 1].into_iter().enumerate() {
                let [keys, values] = held.append(tokens(count, seed), tokens(count, seed + 10));
                expected.push((tokens(count, seed), tokens(count, seed + 10)));
                let (all_keys, all_values) = expected.iter().cloned().unzip();
                assert_eq!(keys.into_data(), Tensor::cat(all_keys, 1).into_data());
                assert_eq!(values.into_data(), Tensor::cat(all_values, 1).into_data());
            }
            assert_eq!(held.len(), 10);
        }
    }

    #[test]
    fn what_was_forgotten_is_written_over() {
        let mut held = KeyValue::with_capacity(8);
        held.append(tokens(5, 1), tokens(5, 2));
        held.truncate(9);
        assert_eq!(held.len(), 5);
        held.truncate(2);
        let [keys, values] = held.append(tokens(1, 3), tokens(1, 4));
        let expected = |kept, new| Tensor::cat(vec![tokens(5, kept).narrow(1, 0, 2), tokens(1, new)], 1).into_data();
        assert_eq!((keys.into_data(), values.into_data()), (expected(1, 3), expected(2, 4)));
        held.truncate(0);
        assert!(held.is_empty());
    }

    #[test]
    fn clones_go_their_own_ways() {
        let mut one = KeyValue::with_capacity(8);
        one.append(tokens(2, 1), tokens(2, 2));
        let mut other = one.clone();
        let [kept, _] = one.append(tokens(1, 3), tokens(1, 4));
        other.append(tokens(1, 5), tokens(1, 6));
        assert_eq!(kept.into_data(), Tensor::cat(vec![tokens(2, 1), tokens(1, 3)], 1).into_data());
    }

    #[test]
    fn tokens_are_written_in_place() {
        let mut held = KeyValue::with_capacity(16);
        let mut address = |count| {
            let all = held.append(tokens(count, 1), tokens(count, 2));
            all.map(|all| address(&all))
        };
        assert_eq!(address(3), address(1));
    }
}
