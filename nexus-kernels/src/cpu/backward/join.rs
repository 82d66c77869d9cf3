//! Joining with its backward pass, which copies every element once.

use burn::tensor::Tensor;

use super::{super::join, Operand, gradient, parents, record};

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

#[cfg(test)]
mod tests {
    use super::{
        super::{split, tests::check},
        *,
    };

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
