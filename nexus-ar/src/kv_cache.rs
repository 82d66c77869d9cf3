//! Keys and values of the tokens seen so far; owned by the caller of the model.

use nexus_core::nn::KeyValue;

/// One entry per layer, growing with every forward pass.
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    layers: Vec<KeyValue>,
    capacity: usize,
}

impl KvCache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty cache that takes memory for this many tokens at once; it may grow beyond.
    pub fn with_capacity(tokens: usize) -> Self {
        Self { layers: vec![], capacity: tokens }
    }

    /// The entries of a model with so many layers.
    pub(crate) fn entries(&mut self, layers: usize) -> &mut [KeyValue] {
        self.layers.resize_with(layers, || KeyValue::with_capacity(self.capacity));
        &mut self.layers
    }

    /// Takes memory for this many tokens at once when the first ones come.
    pub(crate) fn reserve(&mut self, tokens: usize) {
        self.capacity = self.capacity.max(tokens);
    }

    /// Forgets the tokens from this one on.
    pub fn truncate(&mut self, tokens: usize) {
        self.layers.iter_mut().for_each(|layer| layer.truncate(tokens));
    }

    /// Number of tokens held.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, KeyValue::len)
    }

    /// Whether no token has been seen.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
