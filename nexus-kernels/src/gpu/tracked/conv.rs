//! Convolutions with their backward pass: tracked pictures and weights -> pictures.
//!
//! The gradient of the picture is a convolution with the flipped weights of a picture whose pixels lie a stride apart; that of
//! the weights is a product over places.

use burn::tensor::{DType, Tensor};

use super::{
    super::{
        contiguous,
        conv::{self, Patches},
        matmul::product,
        tensor,
    },
    Operand, gradient,
    matmul::turned,
    parents, record,
};

/// The convolution of a picture.
///
/// # Shapes
/// As the plain kernel's.
pub(in super::super) fn conv2d(
    x: &Tensor<4>,
    weight: &Tensor<4>,
    bias: &Tensor<1>,
    stride: usize,
    padding: (usize, usize),
) -> Option<Tensor<4>> {
    let (x, weight, bias) = (Operand::of(x)?, Operand::of(weight)?, Operand::of(bias)?);
    let [_, _, kernel, kernel_width] = weight.value.dims();
    if kernel != kernel_width || padding.0 >= kernel {
        return None;
    }
    let (values, filter) = (x.value.clone(), weight.value.clone());
    let result = conv::conv2d(&values, &filter, &bias.value, stride, padding)?;
    let patches = Patches::new(values.dims(), kernel, stride, padding);
    Some(record(parents![x, weight, bias], result, move |upstream, [of_x, of_weight, of_bias]| {
        let of_x = of_x.then(|| {
            let [_, _, height, width] = values.dims();
            let flipped = filter.clone().swap_dims(0, 1).flip([2, 3]);
            let slopes = patches.back([height, width]).times(&flipped, &upstream);
            gradient(slopes.unwrap_or_else(|| unreachable!("the forward kernel took these")))
        });
        let of_weight = of_weight.then(|| {
            let slopes = weight_slopes(patches, &values, &upstream);
            let slopes = slopes.unwrap_or_else(|| unreachable!("the forward kernel took these"));
            gradient::<4>(slopes.reshape(filter.shape()))
        });
        let of_bias = of_bias.then(|| {
            let [batch, outputs, height, width] = upstream.dims();
            let planes = upstream.reshape([batch, outputs, height * width]);
            gradient(planes.cast(DType::F32).sum_dim(2).sum_dim(0).reshape([outputs]))
        });
        [of_x, of_weight, of_bias]
    }))
}

/// `[outputs, inputs * kernel * kernel]`, in f32.
fn weight_slopes(patches: Patches, x: &Tensor<4>, upstream: &Tensor<4>) -> Option<Tensor<2>> {
    let [batch, outputs, _, width] = upstream.dims();
    // Copied here if it has to be, and not for every part.
    let x = &tensor(contiguous(x)?);
    let mut sum: Option<Tensor<2>> = None;
    for sample in 0..batch {
        for (row, rows) in patches.parts(x)? {
            let slopes = upstream.clone().narrow(0, sample, 1).narrow(2, row, rows).reshape([outputs, rows * width]);
            let part = product(slopes, turned(patches.columns(x, sample, row, rows)?), DType::F32)?;
            sum = Some(match sum {
                Some(sum) => sum + part,
                None => part,
            });
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use burn::tensor::{module, ops::ConvOptions};

    use super::{super::tests::check, *};

    #[test]
    fn gradients_of_convolutions() {
        for ([batch, inputs, outputs, side], kernel, stride, padding) in [
            ([2, 3, 5, 7], 3, 1, (1, 1)),
            ([1, 4, 2, 6], 1, 1, (0, 0)),
            ([2, 2, 3, 8], 3, 2, (0, 1)),
            ([1, 2, 3, 7], 3, 2, (1, 1)),
            ([1, 3, 4, 8], 4, 4, (0, 0)),
        ] {
            let parts = move |[x, weight, bias]: [Tensor<3>; 3]| {
                let x: Tensor<4> = x.reshape([batch, inputs, side, side]);
                (x, weight.reshape([outputs, inputs, kernel, kernel]), bias.reshape([outputs]))
            };
            check(
                [[batch, inputs, side * side], [outputs, inputs, kernel * kernel], [1, 1, outputs]],
                |tensors| {
                    let (x, weight, bias) = parts(tensors);
                    conv2d(&x, &weight, &bias, stride, padding)
                },
                |tensors| {
                    let (x, weight, bias) = parts(tensors);
                    let x = x.pad((padding.0, padding.1, padding.0, padding.1), 0.0f32);
                    module::conv2d(x, weight, Some(bias), ConvOptions::new([stride; 2], [0; 2], [1; 2], 1))
                },
            );
        }
    }
}
