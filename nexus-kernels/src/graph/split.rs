//! Splitting with its backward pass, which copies every element once: a tracked tensor -> its parts.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::{backend::DispatchTensor, tensor::Tensor};

use super::{Convertible, Gradient, Graphed, Operand, gradient, is_autodiff, parents, record};

/// Views of neighbouring parts along a dimension, or `None` for tensors of no autodiff device, of which burn makes views as well,
/// and others that [`Operand`] does not take.
///
/// A view alone would have a gradient as large as the whole tensor, zero elsewhere, and all of them would be added. Here
/// the backward passes of the parts leave their gradients to that of a node below them, which joins them.
pub(crate) fn split<B: Graphed, const D: usize, const N: usize>(
    x: &Tensor<D>,
    dim: usize,
    sizes: [usize; N],
) -> Option<[Tensor<D>; N]>
where
    DispatchTensor: Convertible<B>,
{
    if !is_autodiff(x) {
        return None;
    }
    let x = Operand::<B, D>::of(x)?;
    let (value, dtype, dims) = (x.value.clone(), x.dtype, x.value.dims());
    if dims.contains(&0) || sizes.contains(&0) || sizes.iter().sum::<usize>() != dims[dim] {
        return None;
    }
    let gradients: Arc<Mutex<[Option<Gradient<B>>; N]>> = Arc::new(Mutex::new([const { None }; N]));
    let (collected, device) = (gradients.clone(), value.device());
    let below = record(parents![x], value.clone(), move |_: Tensor<D>, _| {
        let collected = std::mem::replace(&mut *locked(&collected), [const { None }; N]);
        let zeros = |size| {
            let mut dims = dims;
            dims[dim] = size;
            gradient::<B, D>(Tensor::zeros(dims, (&device, dtype)))
        };
        let parts: Vec<_> =
            collected.into_iter().zip(sizes).map(|(part, size)| part.unwrap_or_else(|| zeros(size))).collect();
        [Some(B::joined(parts, dim))]
    });
    let (mut start, mut number) = (0, 0);
    let mut part = |size| {
        let below = Operand::<B, D>::of(&below)?;
        let (view, at, gradients, device) =
            (value.clone().narrow(dim, start, size), number, gradients.clone(), value.device());
        (start, number) = (start + size, number + 1);
        Some(record(parents![below], view, move |upstream: Tensor<D>, _| {
            locked(&gradients)[at] = Some(gradient(upstream));
            // Nobody reads it, but the node below runs only if it has a gradient.
            [Some(gradient::<B, D>(Tensor::zeros([1; D], (&device, dtype))))]
        }))
    };
    let parts: Vec<Tensor<D>> = sizes.into_iter().map(&mut part).collect::<Option<_>>()?;
    parts.try_into().ok()
}

/// The content of a lock; a thread that panicked cannot have left half a write.
fn locked<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}
