//! Splitting with its backward pass, which copies every element once: a tracked tensor -> its parts.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::{backend::DispatchTensor, tensor::Tensor};

use super::{Operand, record};
use crate::{
    backward::{Backward, Convertible, gradient},
    join::views,
};

/// Views of neighbouring parts along a dimension.
///
/// A view alone would have a gradient as large as the whole tensor, zero elsewhere, and all of them would be added. Here
/// the backward passes of the parts leave their gradients to that of a node below them, which joins them.
pub(super) fn split<B: Backward, const D: usize, const N: usize>(
    x: Tensor<D>,
    dim: usize,
    sizes: [usize; N],
) -> [Tensor<D>; N]
where
    DispatchTensor: Convertible<B>,
{
    let dims = x.dims();
    if dims.contains(&0) || sizes.contains(&0) {
        return views(&x, dim, sizes);
    }
    let x = Operand::of::<B>(x);
    let (value, dtype) = (x.value.clone(), x.value.dtype());
    let grads: Arc<Mutex<[Option<Tensor<D>>; N]>> = Arc::new(Mutex::new([const { None }; N]));
    let (collected, device) = (grads.clone(), value.device());
    let below = record::<B, 1, D>([x.into()], value.clone(), move |_, _| {
        let collected = std::mem::replace(&mut *locked(&collected), [const { None }; N]);
        let zeros = |size| {
            let mut dims = dims;
            dims[dim] = size;
            Tensor::zeros(dims, (&device, dtype))
        };
        let parts = collected.into_iter().zip(sizes).map(|(part, size)| part.unwrap_or_else(|| zeros(size)));
        [Some(gradient(B::cat(parts.collect(), dim)))]
    });
    let mut number = 0;
    views(&value, dim, sizes).map(|view| {
        let (below, grads, device, at) = (Operand::of::<B>(below.clone()), grads.clone(), value.device(), number);
        number += 1;
        record::<B, 1, D>([below.into()], view, move |grad, _| {
            locked(&grads)[at] = Some(grad);
            // Nobody reads it, but the node below runs only if it has a gradient.
            [Some(gradient::<B, D>(Tensor::zeros([1; D], (&device, dtype))))]
        })
    })
}

/// The content of a lock; a thread that panicked cannot have left half a write.
fn locked<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}
