//! The step of AdamW in one pass: a parameter, its gradient and its moments -> the parameter and moments after it.
//!
//! The arithmetic of a value is burn-optim's, operation by operation, so the results are the same.

use burn::{
    backend::{DispatchDevice, Flex},
    tensor::{DType, Tensor},
};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{Level, View, level::with_level, wrap};

/// Values that a thread takes at a time.
const CHUNK: usize = 8 * 1024;

/// Settings of one step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdamWStep {
    /// Learning rate.
    pub(crate) lr: f64,
    /// Decay rates of the moments.
    pub(crate) betas: [f32; 2],
    /// Added to the root of the second moment.
    pub(crate) eps: f32,
    /// Decoupled weight decay.
    pub(crate) weight_decay: f32,
    /// Number of this step, from one on.
    pub(crate) time: usize,
}

impl AdamWStep {
    /// Whether [`adamw`] can step this parameter.
    pub(crate) fn takes(value: &Tensor<1>, gradient: &Tensor<1>) -> bool {
        [value, gradient].into_iter().all(|tensor| {
            tensor.dtype() == DType::F32 && matches!(tensor.device().as_dispatch(), DispatchDevice::Flex(_))
        })
    }
}

/// The parameter and its moments after a step, in the same buffers if nobody else uses them.
///
/// # Panics
/// If the lengths differ or [`AdamWStep::takes`] says no.
pub(crate) fn adamw(
    value: Tensor<1>,
    gradient: &Tensor<1>,
    moments: [Tensor<1>; 2],
    step: &AdamWStep,
) -> (Tensor<1>, [Tensor<1>; 2]) {
    let [count] = value.dims();
    let [first, second] = moments;
    let mut tensors = [value, first, second].map(unshared);
    let view = View::f32(gradient).map(View::into_contiguous);
    let gradient = view.as_ref().and_then(|view| view.contiguous::<f32>()).expect("an f32 gradient on the CPU");
    let [values, first, second] = tensors.each_mut().map(|tensor| {
        let start = tensor.layout().start_offset();
        &mut tensor.try_storage_mut::<f32>().expect("made unshared")[start..start + count]
    });
    assert_eq!(gradient.len(), count, "length of a gradient");
    let (level, factors) = (Level::detect(), Factors::of(step));
    let chunks = values
        .par_chunks_mut(CHUNK)
        .zip(gradient.par_chunks(CHUNK))
        .zip(first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK)));
    chunks.for_each(|((values, gradient), (first, second))| {
        with_level!(
            level,
            fn run(values: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32], factors: Factors) {
                let moments = first.iter_mut().zip(second);
                for ((value, gradient), (first, second)) in values.iter_mut().zip(gradient).zip(moments) {
                    *first = *first * factors.betas[0] + gradient * factors.rest[0];
                    *second = *second * factors.betas[1] + gradient * gradient * factors.rest[1];
                    let root = (*second / factors.corrections[1]).sqrt() + factors.eps;
                    *value = *value * factors.decay - *first / factors.corrections[0] / root * factors.lr;
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

/// Numbers of a step in the precision in which they meet the values.
#[derive(Clone, Copy)]
struct Factors {
    betas: [f32; 2],
    /// One minus each beta.
    rest: [f32; 2],
    /// Sums of the weights of all gradients in each moment.
    corrections: [f32; 2],
    eps: f32,
    decay: f32,
    lr: f32,
}

impl Factors {
    fn of(step: &AdamWStep) -> Self {
        let time = i32::try_from(step.time).unwrap_or(i32::MAX);
        Self {
            betas: step.betas,
            rest: step.betas.map(|beta| 1.0 - beta),
            corrections: step.betas.map(|beta| 1.0 - beta.powi(time)),
            eps: step.eps,
            decay: (1.0 - step.lr * f64::from(step.weight_decay)) as f32,
            lr: step.lr as f32,
        }
    }
}
