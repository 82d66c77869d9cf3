//! Attention without a score matrix in memory: strided q, k, v -> mixed values.
