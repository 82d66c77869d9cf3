//! Products of matrices with their backward pass: two tracked matrices -> their product.

use burn::tensor::Tensor;

use super::{super::matmul, Operand, gradient, parents, record};

/// The product of two matrices of one dtype, or of batches of them.
///
/// # Shapes
/// `[.., m, k]` and `[.., k, n]` to `[.., m, n]`
pub(in super::super) fn product<const D: usize>(left: &Tensor<D>, right: &Tensor<D>) -> Option<Tensor<D>> {
    let (left, right) = (Operand::of(left)?, Operand::of(right)?);
    let values = [&left, &right].map(|operand| operand.value.clone());
    let result = matmul::product(values[0].clone(), values[1].clone(), left.dtype)?;
    // What nobody needs for a gradient is freed.
    let [of_right, of_left] = [right.tracked, left.tracked];
    let [left_values, right_values] = values;
    let (left_values, right_values) = (of_right.then_some(left_values), of_left.then_some(right_values));
    Some(record(parents![left, right], result, move |upstream: Tensor<D>, [of_left, of_right]| {
        let right = right_values.as_ref().filter(|_| of_left).cloned();
        let left = left_values.as_ref().filter(|_| of_right).cloned();
        [
            right.map(|right| gradient(times(upstream.clone(), turned(right)))),
            // A matrix that was turned, as weights are, has its gradient in the order of its memory.
            left.map(|left| gradient(turned(times(turned(upstream), left)))),
        ]
    }))
}

pub(super) fn turned<const D: usize>(matrix: Tensor<D>) -> Tensor<D> {
    matrix.swap_dims(D - 2, D - 1)
}

/// A product by the kernels, or by burn where a device does not suit them.
fn times<const D: usize>(left: Tensor<D>, right: Tensor<D>) -> Tensor<D> {
    let dtype = left.dtype();
    match matmul::product(left.clone(), right.clone(), dtype) {
        Some(product) => product,
        None => left.matmul(right),
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::module;

    use super::{super::tests::check, *};
    use crate::gpu;

    #[test]
    fn gradients_of_products() {
        for [batch, m, k, n] in [[1, 1, 1, 1], [1, 1, 64, 5], [2, 3, 17, 13], [3, 50, 64, 48], [1, 140, 129, 131]] {
            let shapes = [[batch, m, k], [batch, k, n]];
            check(shapes, |[x, y]| product(&x, &y), |[x, y]| x.matmul(y));
            let shapes = [[batch, m, k], [batch, n, k]];
            check(shapes, |[x, y]| product(&x, &turned(y)), |[x, y]| x.matmul(turned(y)));
        }
    }

    #[test]
    fn gradients_of_linear_layers() {
        for [batch, rows, inputs, outputs] in [[1, 1, 7, 5], [2, 3, 33, 17], [1, 130, 64, 40]] {
            let parts = move |[x, weight, bias]: [Tensor<3>; 3]| {
                (x, weight.reshape([outputs, inputs]), bias.reshape([outputs]))
            };
            check(
                [[batch, rows, inputs], [outputs, inputs, 1], [outputs, 1, 1]],
                |tensors| {
                    let (x, weight, bias) = parts(tensors);
                    cube::linear(&x, &weight, Some(&bias))
                },
                |tensors| {
                    let (x, weight, bias) = parts(tensors);
                    module::linear(x, weight.transpose(), Some(bias))
                },
            );
        }
    }
}
