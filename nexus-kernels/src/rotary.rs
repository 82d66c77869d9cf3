//! Rotary position embeddings: queries or keys and a table of cosines and sines -> the same, rotated.

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::place::{at, dispatch};

/// Which two features of a head are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Pairs {
    /// Those half a head apart.
    Halves,
    /// Neighbours.
    Neighbours,
}

/// Cosines and sines of the rotation angles, one per token and pair of features.
#[derive(Debug, Clone)]
pub struct RotaryTable {
    /// `[batch, tokens, head_dim / 2]`.
    pub cos: Tensor<3>,
    /// `[batch, tokens, head_dim / 2]`.
    pub sin: Tensor<3>,
}

impl RotaryTable {
    /// A table from angles in radians, in token order; computed in f64, stored as f32.
    ///
    /// # Panics
    /// If `angles` does not hold `tokens` rows of `pairs` angles.
    pub fn from_f64(angles: &[f64], tokens: usize, pairs: usize, device: &Device) -> Self {
        assert_eq!(angles.len(), tokens * pairs, "{tokens} tokens of {pairs} pairs");
        let table =
            |values: Vec<f32>| Tensor::from_data(TensorData::new(values, [1, tokens, pairs]), (device, DType::F32));
        Self {
            cos: table(angles.iter().map(|angle| angle.cos() as f32).collect()),
            sin: table(angles.iter().map(|angle| angle.sin() as f32).collect()),
        }
    }

    /// A table from f32 angles, in token order.
    ///
    /// # Panics
    /// If `angles` does not hold `tokens` rows of `pairs` angles.
    pub fn from_f32(angles: &[f32], tokens: usize, pairs: usize, device: &Device) -> Self {
        let angles: Vec<f64> = angles.iter().map(|&angle| f64::from(angle)).collect();
        Self::from_f64(&angles, tokens, pairs, device)
    }

    /// The same table in another dtype, for models that rotate in their compute dtype.
    pub fn cast(self, dtype: DType) -> Self {
        if self.cos.dtype() == dtype {
            return self;
        }
        Self { cos: self.cos.cast(dtype), sin: self.sin.cast(dtype) }
    }

    /// Tables of tokens that follow each other.
    pub fn cat(tables: Vec<Self>) -> Self {
        let (cos, sin) = tables.into_iter().map(|table| (table.cos, table.sin)).unzip();
        Self { cos: Tensor::cat(cos, 1), sin: Tensor::cat(sin, 1) }
    }
}

/// Rotates pairs of features that lie half a head apart, in the dtype of the table.
///
/// # Shapes
/// - `x`: `[batch, tokens, heads, head_dim]`
/// - returns: the same, in the dtype of `x`
///
/// Source: Qwen2.5-VL (modeling_qwen2_5_vl.py, `rotate_half`).
pub fn rotate_half(x: Tensor<4>, table: &RotaryTable) -> Tensor<4> {
    rotate(x, table, Pairs::Halves)
}

/// Rotates neighbouring pairs of features, in the dtype of the table.
///
/// # Shapes
/// - `x`: `[batch, tokens, heads, head_dim]`
/// - returns: the same, in the dtype of `x`
///
/// Source: FLUX (math.py, `apply_rope`).
pub fn rotate_interleaved(x: Tensor<4>, table: &RotaryTable) -> Tensor<4> {
    rotate(x, table, Pairs::Neighbours)
}

fn rotate(x: Tensor<4>, table: &RotaryTable, pairs: Pairs) -> Tensor<4> {
    dispatch!(&[at(&x), at(&table.cos), at(&table.sin)], rotate(x, table, pairs))
}

/// Rotates in burn's operations.
pub(crate) fn plain(x: Tensor<4>, table: &RotaryTable, pairs: Pairs) -> Tensor<4> {
    let [batch, tokens, heads, head_dim] = x.dims();
    let dtype = x.dtype();
    let x = if dtype == table.cos.dtype() { x } else { x.cast(table.cos.dtype()) };
    let (cos, sin) = (table.cos.clone().unsqueeze_dim::<4>(2), table.sin.clone().unsqueeze_dim::<4>(2));
    let rotated = match pairs {
        Pairs::Halves => {
            let first = x.clone().narrow(3, 0, head_dim / 2);
            let second = x.narrow(3, head_dim / 2, head_dim / 2);
            let rotated = first.clone() * cos.clone() - second.clone() * sin.clone();
            Tensor::cat(vec![rotated, second * cos + first * sin], 3)
        }
        Pairs::Neighbours => {
            let x = x.reshape([batch, tokens, heads, head_dim / 2, 2]);
            let even = x.clone().narrow(4, 0, 1).squeeze_dim::<4>(4);
            let odd = x.narrow(4, 1, 1).squeeze_dim::<4>(4);
            let rotated = even.clone() * cos.clone() - odd.clone() * sin.clone();
            let rotated: Tensor<5> = Tensor::stack(vec![rotated, even * sin + odd * cos], 4);
            rotated.reshape([batch, tokens, heads, head_dim])
        }
    };
    if rotated.dtype() == dtype { rotated } else { rotated.cast(dtype) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_close_tensors, cpu, device, input, ramp};

    fn quarter_turn() -> RotaryTable {
        RotaryTable::from_f64(&[std::f64::consts::FRAC_PI_2, 0.0], 1, 2, &device())
    }

    #[test]
    fn rotations_pair_the_right_features() {
        let x = Tensor::<1>::from_floats([1.0, 2.0, 3.0, 4.0], &device()).reshape([1, 1, 1, 4]);
        assert_close(&rotate_half(x.clone(), &quarter_turn()), &[-3.0, 2.0, 1.0, 4.0], 1e-6);
        assert_close(&rotate_interleaved(x, &quarter_turn()), &[-2.0, 1.0, 3.0, 4.0], 1e-6);
    }

    #[test]
    fn rotations_of_views_match_the_plain_formulation() {
        for [batch, tables, tokens, heads, pairs] in
            [[1, 1, 1, 1, 1], [2, 1, 5, 3, 8], [2, 2, 7, 4, 17], [3, 3, 1, 2, 40], [1, 1, 131, 5, 64]]
        {
            let angles = input([tables, tokens, pairs + 1], 1).narrow(2, 1, pairs) * 50.0;
            let table = RotaryTable { cos: angles.clone().cos(), sin: angles.sin() };
            let joined = input([batch, tokens, 3 * heads, 2 * pairs], 2);
            let heads_first = input([batch, heads, tokens, 2 * pairs], 3).swap_dims(1, 2);
            let widths_first = input([2 * pairs, tokens, heads, batch], 4).swap_dims(0, 3);
            for x in [joined.narrow(2, heads, heads), heads_first, widths_first] {
                assert_close_tensors(&rotate_half(x.clone(), &table), &plain(x.clone(), &table, Pairs::Halves), 1e-6);
                let expected = plain(x.clone(), &table, Pairs::Neighbours);
                assert_close_tensors(&rotate_interleaved(x, &table), &expected, 1e-6);
            }
        }
    }

    #[test]
    fn a_table_of_another_dtype_decides_the_arithmetic() {
        let x = ramp([1, 1, 3, 4], 2);
        let table = RotaryTable::from_f64(&[std::f64::consts::FRAC_PI_2, 0.0], 1, 2, &cpu()).cast(DType::BF16);
        let y = rotate_half(x.clone(), &table);
        assert_eq!(y.dtype(), DType::F32);
        assert_close_tensors(&y, &plain(x, &table, Pairs::Halves), 0.0);
    }
}
