//! Rotary embeddings: heads and tables -> rotated heads.

use burn::tensor::{DType, Tensor};

use super::{
    Level,
    level::with_level,
    rows::{Rows, map_rows},
};
use crate::{RotaryTable, rotary::Pairs};

/// Rotates pairs of features.
///
/// # Shapes
/// - `x`: `[batch, tokens, heads, head_dim]`
/// - `cos`, `sin`: `[1 or batch, tokens, head_dim / 2]`
/// - returns: as `x`
pub(super) fn rotate(x: Tensor<4>, table: &RotaryTable, pairs: Pairs) -> Result<Tensor<4>, Tensor<4>> {
    let RotaryTable { cos, sin } = table;
    let [batch, tokens, heads, head_dim] = x.dims();
    let [tables, table_tokens, table_width] = cos.dims();
    let fits = head_dim.is_multiple_of(2)
        && (tables == 1 || tables == batch)
        && [table_tokens, table_width] == [tokens, head_dim / 2]
        && cos.dims() == sin.dims()
        // A table that is less precise than the heads decides the arithmetic.
        && [DType::F32, x.dtype()].contains(&cos.dtype());
    let (Some(cos), Some(sin)) = (Rows::of(cos).filter(|_| fits), Rows::of(sin)) else { return Err(x) };
    let level = Level::detect();
    map_rows(x, |first, values| {
        for (i, head) in values.chunks_exact_mut(head_dim).enumerate() {
            let token = (first + i) / heads % (tables * tokens);
            rotate_head(level, head, cos.row(token), sin.row(token), pairs);
        }
    })
}

fn rotate_head(level: Level, head: &mut [f32], cos: &[f32], sin: &[f32], pairs: Pairs) {
    with_level!(
        level,
        fn run(head: &mut [f32], cos: &[f32], sin: &[f32], pairs: Pairs) {
            match pairs {
                Pairs::Halves => {
                    let (first, second) = head.split_at_mut(cos.len());
                    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                    }
                }
                Pairs::Neighbours => {
                    for ((pair, cos), sin) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
                        let [a, b] = *pair;
                        *pair = [a * cos - b * sin, a * sin + b * cos];
                    }
                }
            }
        }
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_rotated_at_every_level() {
        for level in Level::available() {
            for half in [0, 1, 7, 8, 16, 17, 40, 64] {
                let head: Vec<f32> = (0..2 * half).map(|i| (i as f32 * 1.7).sin()).collect();
                let (cos, sin): (Vec<f32>, Vec<f32>) =
                    (0..half).map(|i| ((i as f32 * 0.3).cos(), (i as f32 * 0.3).sin())).unzip();
                for pairs in [Pairs::Halves, Pairs::Neighbours] {
                    let mut rotated = head.clone();
                    rotate_head(level, &mut rotated, &cos, &sin, pairs);
                    for i in 0..half {
                        let (a, b) = match pairs {
                            Pairs::Halves => (i, half + i),
                            Pairs::Neighbours => (2 * i, 2 * i + 1),
                        };
                        let at = |i: usize| f64::from(head[i]);
                        let (cos, sin) = (f64::from(cos[i]), f64::from(sin[i]));
                        let errors = [
                            f64::from(rotated[a]) - (at(a) * cos - at(b) * sin),
                            f64::from(rotated[b]) - (at(a) * sin + at(b) * cos),
                        ];
                        assert!(
                            errors.iter().all(|error| error.abs() < 2e-7),
                            "{level:?} {half} {pairs:?}: {errors:?}"
                        );
                    }
                }
            }
        }
    }
}
