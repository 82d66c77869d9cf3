//! Rotary embeddings: heads and tables -> rotated heads.
