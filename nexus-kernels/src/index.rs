//! Indices for lookups, and scores that are left out of a softmax: numbers on the host -> tensors.

use burn::tensor::{Device, Int, Tensor, TensorData};

/// Token ids or positions for a lookup, in the integer dtype that the device prefers: not every GPU has 64 bits.
///
/// # Panics
/// If there are not as many values as the shape holds.
pub fn index_tensor<const D: usize>(
    values: impl IntoIterator<Item = usize>,
    shape: [usize; D],
    device: &Device,
) -> Tensor<D, Int> {
    let values: Vec<i64> = values.into_iter().map(|value| value as i64).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// Scores in f32 of which some, each a row and a column, are so low that a softmax over the columns leaves nothing for them and
/// gives them no gradient.
///
/// # Panics
/// If a row or a column is out of range.
pub fn without_scores(scores: Tensor<2>, excluded: impl IntoIterator<Item = (usize, usize)>) -> Tensor<2> {
    let [rows, columns] = scores.dims();
    let mut mask = vec![0f32; rows * columns];
    for (row, column) in excluded {
        assert!(row < rows && column < columns, "[{row}, {column}] of {rows} x {columns} scores");
        mask[row * columns + column] = EXCLUDED_SCORE;
    }
    let mask = Tensor::from_data(TensorData::new(mask, [rows, columns]), (&scores.device(), scores.dtype()));
    scores + mask
}

/// Added to scores that are left out: finite, so that no difference of two infinities can arise.
pub(crate) const EXCLUDED_SCORE: f32 = -1e30;
