//! Linear layers on weights as stored: rows of f32 activations and bf16, f16 or f32 weights -> rows.
