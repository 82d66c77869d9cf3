//! Joining and splitting with their backward passes, which copy every element once.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::tensor::Tensor;

use super::{super::join, Gradient, Operand, Parent, gradient, parents, record};

/// Two tensors one behind the other, or `None` as the plain kernel.
pub(in super::super) fn cat<const D: usize>([x, y]: [&Tensor<D>; 2], dim: usize) -> Option<Tensor<D>> {
    let (x, y) = (Operand::of(x)?, Operand::of(y)?);
    let joined = join::cat(&[x.value.clone(), y.value.clone()], dim)?;
    let (of_x, of_y) = (x.value.dims()[dim], y.value.dims()[dim]);
    Some(record(parents![x, y], joined, move |upstream, [x, y]| {
        let part = |start, len| gradient(upstream.clone().narrow(dim, start, len));
        [x.then(|| part(0, of_x)), y.then(|| part(of_x, of_y))]
    }))
}

/// Views of neighbouring parts along a dimension, or `None` for other tensors than [`Operand`] takes.
///
/// A view alone would have a gradient as large as the whole tensor, zero elsewhere, and all of them would be added. Here
/// the backward passes of the parts leave their gradients to that of a node below them, which joins them.
pub(in super::super) fn split<const D: usize, const N: usize>(
    x: &Tensor<D>,
    dim: usize,
    sizes: [usize; N],
) -> Option<[Tensor<D>; N]> {
    let x = Operand::of(x)?;
    let (value, dtype, dims) = (x.value.clone(), x.dtype, x.value.dims());
    if dims.contains(&0) || sizes.contains(&0) || sizes.iter().sum::<usize>() != dims[dim] {
        return None;
    }
    let gradients: Arc<Mutex<[Option<Gradient>; N]>> = Arc::new(Mutex::new([const { None }; N]));
    let (collected, device) = (gradients.clone(), value.device());
    let below = record(parents![x], value.clone(), move |_: Tensor<D>, _| {
        let collected = std::mem::replace(&mut *locked(&collected), [const { None }; N]);
        let zeros = |size| {
            let mut dims = dims;
            dims[dim] = size;
            gradient(Tensor::<D>::zeros(dims, (&device, dtype)))
        };
        let parts: Vec<_> =
            collected.into_iter().zip(sizes).map(|(part, size)| part.unwrap_or_else(|| zeros(size))).collect();
        let joined = join::joined(&parts.iter().collect::<Vec<_>>(), dim);
        [Some(joined.unwrap_or_else(|| unreachable!("gradients of parts of one tensor")))]
    });
    let (mut start, mut number) = (0, 0);
    let mut part = |size| {
        let below = Operand::of(&below)?;
        let (view, at, gradients, device) =
            (value.clone().narrow(dim, start, size), number, gradients.clone(), value.device());
        (start, number) = (start + size, number + 1);
        Some(record(parents![below], view, move |upstream: Tensor<D>, _| {
            locked(&gradients)[at] = Some(gradient(upstream));
            // Nobody reads it, but the node below runs only if it has a gradient.
            [Some(gradient(Tensor::<D>::zeros([1; D], (&device, dtype))))]
        }))
    };
    let parts: Vec<Tensor<D>> = sizes.into_iter().map(&mut part).collect::<Option<_>>()?;
    parts.try_into().ok()
}

/// The content of a lock; a thread that panicked cannot have left half a write.
fn locked<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::{super::tests::check, *};

    #[test]
    fn gradients_of_joined_tensors() {
        for (dim, shapes) in [(0, [[2, 3, 5], [1, 3, 5]]), (1, [[2, 3, 5], [2, 4, 5]]), (2, [[2, 3, 5], [2, 3, 1]])] {
            check(shapes, |tensors| cat(tensors.each_ref(), dim).unwrap(), |tensors| Tensor::cat(tensors.into(), dim));
        }
    }

    #[test]
    fn gradients_of_parts_that_are_used_once_often_or_not_at_all() {
        for (dim, sizes) in [(0, [1, 2, 1, 3]), (1, [2, 2, 1, 2]), (2, [1, 1, 4, 1])] {
            let mix = |[first, second, third, _]: [Tensor<3>; 4]| {
                first.sum_dim(dim) * second.clone().sum_dim(dim) + second.sum_dim(dim) * third.sum_dim(dim)
            };
            let narrowed = |x: &Tensor<3>| {
                let mut start = 0;
                sizes.map(|size| {
                    start += size;
                    x.clone().narrow(dim, start - size, size)
                })
            };
            check([[7, 7, 7]], |[x]| mix(split(&x, dim, sizes).unwrap()), |[x]| mix(narrowed(&x)));
        }
    }

    #[test]
    fn a_tensor_that_is_split_twice_has_the_sum_of_both_gradients() {
        let x = Tensor::<3>::from_inner(crate::testing::ramp([2, 3, 4], 1)).require_grad();
        let [first, _] = split(&x, 2, [1, 3]).unwrap();
        let [_, second] = split(&x, 1, [1, 2]).unwrap();
        let gradient = x.grad(&(first.sum() * 2.0 + second.sum()).backward()).unwrap();
        let expected: Vec<f32> =
            (0..24).map(|i| if i % 4 == 0 { 2.0 } else { 0.0 } + if i / 4 % 3 > 0 { 1.0 } else { 0.0 }).collect();
        assert_eq!(gradient.into_data().try_into_vec_as::<f32>().unwrap(), expected);
    }

    #[test]
    fn other_sizes_are_left_to_burn() {
        let x = Tensor::<2>::from_inner(crate::testing::ramp([2, 3], 1)).require_grad();
        assert!(split(&x, 1, [1, 1]).is_none());
        assert!(cat([&x, &x.clone().narrow(1, 0, 2)], 0).is_none());
    }
}
