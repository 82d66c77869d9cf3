//! Activations and gated products: slices -> slices.
