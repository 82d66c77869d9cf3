//! The step of AdamW in one pass: a parameter, its gradient and its moments -> the parameter and moments after it.

use burn::tensor::{DType, Tensor};
use burn_cubecl::{
    Cube,
    cubecl::{
        self, calculate_cube_count_elemwise,
        prelude::{Tensor as Buffer, *},
    },
    kernel::into_contiguous,
    tensor::CubeTensor,
};

use super::{contiguous, cube, downcast, rows::vector, tensor};
use crate::adamw::Factors;

/// Whether this kernel takes a parameter and its gradient.
pub(super) fn takes(tensors: [&Tensor<1>; 2]) -> bool {
    tensors.into_iter().all(|tensor| tensor.dtype() == DType::F32 && cube(tensor).is_some())
}

/// The parameter and its moments after a step, in the same buffers if nobody else uses them.
///
/// # Panics
/// If the lengths differ or the tensors are not f32 that it [`takes`].
pub(crate) fn adamw(
    value: Tensor<1>,
    gradient: &Tensor<1>,
    moments: Option<[Tensor<1>; 2]>,
    step: &Factors,
) -> (Tensor<1>, [Tensor<1>; 2]) {
    let [count] = value.dims();
    assert_eq!(gradient.dims(), [count], "length of a gradient");
    let zeros = || Tensor::zeros([count], (&gradient.device(), DType::F32));
    let [first, second] = moments.unwrap_or_else(|| [zeros(), zeros()]);
    let [value, first, second] = [value, first, second].map(unshared);
    let gradient = contiguous(gradient).expect("a gradient on the GPU");
    let vector = vector(count);
    let (client, total) = (value.client.clone(), count / vector);
    let cube_dim = CubeDim::new(&client, total);
    step_kernel::launch(
        &client,
        calculate_cube_count_elemwise(&client, total, cube_dim),
        cube_dim,
        vector,
        value.clone().into_tensor_arg(),
        gradient.into_tensor_arg(),
        first.clone().into_tensor_arg(),
        second.clone().into_tensor_arg(),
        total,
        step.betas[0],
        step.betas[1],
        step.rest[0],
        step.rest[1],
        1.0 / step.corrections[0],
        1.0 / step.corrections[1],
        step.eps,
        step.decay,
        step.lr,
    );
    (tensor(value), [first, second].map(tensor))
}

/// A tensor in row-major order whose memory nobody else reads.
fn unshared(tensor: Tensor<1>) -> CubeTensor {
    let tensor = tensor.try_into_primitive::<Cube>().ok().and_then(downcast).expect("a tensor on the GPU");
    let tensor: CubeTensor = into_contiguous(tensor);
    if tensor.can_mut() { tensor } else { tensor.copy() }
}

#[cube(launch)]
fn step_kernel<N: Size>(
    value: &mut Buffer<Vector<f32, N>>,
    gradient: &Buffer<Vector<f32, N>>,
    first: &mut Buffer<Vector<f32, N>>,
    second: &mut Buffer<Vector<f32, N>>,
    total: usize,
    beta_1: f32,
    beta_2: f32,
    rest_1: f32,
    rest_2: f32,
    correction_1: f32,
    correction_2: f32,
    eps: f32,
    decay: f32,
    lr: f32,
) {
    if ABSOLUTE_POS >= total {
        terminate!();
    }
    let grad = gradient[ABSOLUTE_POS];
    let mean = first[ABSOLUTE_POS] * Vector::new(beta_1) + grad * Vector::new(rest_1);
    let square = second[ABSOLUTE_POS] * Vector::new(beta_2) + grad * grad * Vector::new(rest_2);
    let root = (square * Vector::new(correction_2)).sqrt() + Vector::new(eps);
    value[ABSOLUTE_POS] =
        value[ABSOLUTE_POS] * Vector::new(decay) - mean * Vector::new(correction_1) / root * Vector::new(lr);
    first[ABSOLUTE_POS] = mean;
    second[ABSOLUTE_POS] = square;
}
