//! The step of AdamW in one pass: a parameter, its gradient and its moments -> the parameter and moments after it.
//!
//! The arithmetic of a value is burn-optim's, operation by operation, so the results are the same.

use burn::{backend::Flex, tensor::Tensor};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{Level, View, level::with_level, wrap};
use crate::adamw::Factors;

/// Values that a thread takes at a time.
const CHUNK: usize = 8 * 1024;

/// Whether this kernel takes a parameter and its gradient.
pub(super) fn takes(tensors: [&Tensor<1>; 2]) -> bool {
    tensors.into_iter().all(|tensor| View::f32(tensor).is_some())
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
    // Zeros that the system gives when they are first touched, by all threads; burn's are written twice before.
    let [first, second] = moments.unwrap_or_else(|| [(); 2].map(|()| wrap(vec![0.0f32; count], [count])));
    let mut tensors = [value, first, second].map(unshared);
    let view = View::f32(gradient).map(View::into_contiguous);
    let gradient = view.as_ref().and_then(|view| view.contiguous::<f32>()).expect("an f32 gradient on the CPU");
    let [values, first, second] = tensors.each_mut().map(|tensor| {
        let start = tensor.layout().start_offset();
        &mut tensor.try_storage_mut::<f32>().expect("made unshared")[start..start + count]
    });
    assert_eq!(gradient.len(), count, "length of a gradient");
    let (level, step) = (Level::detect(), *step);
    let chunks = values
        .par_chunks_mut(CHUNK)
        .zip(gradient.par_chunks(CHUNK))
        .zip(first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK)));
    chunks.for_each(|((values, gradient), (first, second))| {
        with_level!(
            level,
            fn run(values: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32], step: Factors) {
                let moments = first.iter_mut().zip(second);
                for ((value, gradient), (first, second)) in values.iter_mut().zip(gradient).zip(moments) {
                    *first = *first * step.betas[0] + gradient * step.rest[0];
                    *second = *second * step.betas[1] + gradient * gradient * step.rest[1];
                    let root = (*second / step.corrections[1]).sqrt() + step.eps;
                    *value = *value * step.decay - *first / step.corrections[0] / root * step.lr;
                }
            }
        );
    });
    let [value, first, second] = tensors.map(Tensor::from_primitive::<Flex>);
    (value, [first, second])
}

/// A tensor in row-major order whose memory nobody else reads.
fn unshared(tensor: Tensor<1>) -> FlexTensor {
    let primitive = |tensor: Tensor<1>| tensor.try_into_primitive::<Flex>().expect("a tensor on the CPU");
    let mut tensor = primitive(tensor);
    if tensor.is_contiguous() && tensor.try_storage_mut::<f32>().is_some() {
        return tensor;
    }
    let tensor = Tensor::<1>::from_primitive::<Flex>(tensor);
    let view = View::f32(&tensor).map(View::into_contiguous);
    let values = view.as_ref().and_then(|view| view.contiguous::<f32>()).expect("an f32 tensor on the CPU");
    primitive(wrap(values.to_vec(), tensor.dims()))
}
