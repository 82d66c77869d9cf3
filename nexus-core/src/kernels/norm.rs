//! Normalisations, fused with what follows them: rows -> rows.
