//! Products of activations with a weight: weights as stored, activations in theirs.

use burn::tensor::{DType, Tensor, module};

use crate::{
    cast_like,
    place::{at, dispatch},
};

/// `x Wᵀ + b` in the dtype of `x`.
///
/// # Shapes
/// - `x`: `[.., in]`
/// - `weight`: `[out, in]`, in any dtype of floats or quantised
/// - `bias`: `[out]`
/// - returns: `[.., out]`
///
/// # Panics
/// If the shapes do not belong together.
pub fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    assert_eq!(x.dims()[D - 1], weight.dims()[1], "width of the input of a linear layer");
    let weight = match weight.dtype() {
        DType::QFloat(_) => weight.dequantize(),
        _ => weight,
    };
    let places: Vec<_> = [at(&x), at(&weight)].into_iter().chain(bias.as_ref().map(at)).collect();
    dispatch!(&places, linear(x, weight, bias))
}

/// The product of two matrices of one dtype, or of batches of them.
///
/// # Shapes
/// `[.., m, k]` and `[.., k, n]` to `[.., m, n]`
pub fn matmul<const D: usize>(left: Tensor<D>, right: Tensor<D>) -> Tensor<D> {
    dispatch!(&[at(&left), at(&right)], matmul(left, right))
}

/// [`linear`] in burn's operations.
pub(crate) fn plain<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    let (weight, bias) = (cast_like(weight, &x), bias.map(|bias| cast_like(bias, &x)));
    module::linear(x, weight.transpose(), bias)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, input};

    #[test]
    fn a_layer_is_the_sum_of_products_and_the_bias() {
        for [batch, rows, inputs, outputs] in
            [[1, 1, 7, 5], [2, 3, 33, 17], [1, 130, 64, 40], [1, 1, 256, 130], [3, 50, 136, 129]]
        {
            let (x, weight, bias) = (input([batch, rows, inputs], 1), input([outputs, inputs], 2), input([outputs], 3));
            let values = |x: Tensor<1>| x.into_data().try_into_vec::<f32>().unwrap();
            let [a, w, b] = [x.clone().flatten::<1>(0, 2), weight.clone().flatten::<1>(0, 1), bias.clone()].map(values);
            let dot =
                |row: &[f32], w: &[f32]| row.iter().zip(w).map(|(a, w)| f64::from(*a) * f64::from(*w)).sum::<f64>();
            let row = |row: &[f32]| {
                w.chunks(inputs).zip(&b).map(|(w, b)| (dot(row, w) + f64::from(*b)) as f32).collect::<Vec<_>>()
            };
            let expected: Vec<f32> = a.chunks(inputs).flat_map(row).collect();
            assert_close(&linear(x, weight, Some(bias)), &expected, 1e-5);
        }
    }
}
