//! The gradients of convolutions.
//!
//! The gradient of the picture is a convolution with the flipped weights of a picture whose pixels lie a stride apart; that of
//! the weights is a product over places.

use burn::tensor::{DType, Tensor};

use super::{
    super::{contiguous, conv::Patches, matmul::product, tensor},
    Gradient, gradient,
};
use crate::{Filter, backward::transposed, cast_like};

/// Gradients of the picture, the weights and the bias; `None` for tensors that are not for these kernels.
pub(super) fn backward(
    x: &Tensor<4>,
    filter: &Filter,
    grad: &Tensor<4>,
    [wants_x, wants_weight, wants_bias]: [bool; 3],
) -> Option<[Option<Gradient>; 3]> {
    let [_, _, kernel, kernel_width] = filter.weight.dims();
    if kernel != kernel_width || filter.padding.0 >= kernel {
        return None;
    }
    let weight = cast_like(filter.weight.clone(), x);
    let patches = Patches::new(x.dims(), kernel, filter.stride, filter.padding);
    let grad_x = match wants_x {
        true => {
            let [_, _, height, width] = x.dims();
            let flipped = weight.clone().swap_dims(0, 1).flip([2, 3]);
            Some(gradient(patches.back([height, width]).times(&flipped, grad)?))
        }
        false => None,
    };
    let grad_weight = match wants_weight {
        true => Some(gradient::<4>(weight_grad(patches, x, grad)?.reshape(weight.shape()))),
        false => None,
    };
    let grad_bias = wants_bias.then(|| {
        let [batch, outputs, height, width] = grad.dims();
        let planes = grad.clone().reshape([batch, outputs, height * width]);
        gradient(planes.cast(DType::F32).sum_dim(2).sum_dim(0).reshape([outputs]))
    });
    Some([grad_x, grad_weight, grad_bias])
}

/// `[outputs, inputs * kernel * kernel]`, in f32.
fn weight_grad(patches: Patches, x: &Tensor<4>, grad: &Tensor<4>) -> Option<Tensor<2>> {
    let [batch, outputs, _, width] = grad.dims();
    // Copied here if it has to be, and not for every part.
    let x = &tensor(contiguous(x)?);
    let mut sum: Option<Tensor<2>> = None;
    for sample in 0..batch {
        for (row, rows) in patches.parts(x)? {
            let grads = grad.clone().narrow(0, sample, 1).narrow(2, row, rows).reshape([outputs, rows * width]);
            let part = product(grads, transposed(patches.columns(x, sample, row, rows)?), DType::F32)?;
            sum = Some(match sum {
                Some(sum) => sum + part,
                None => part,
            });
        }
    }
    sum
}
