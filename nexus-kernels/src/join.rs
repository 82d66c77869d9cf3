//! Tensors one behind the other along a dimension, and the parts of one.

use burn::tensor::Tensor;

use crate::place::{at, dispatch};

/// Tensors one behind the other along a dimension.
///
/// As [`Tensor::cat`], by all threads on a CPU.
///
/// # Panics
/// If there are none, or they differ in another dimension.
pub fn cat<const D: usize>(tensors: Vec<Tensor<D>>, dim: usize) -> Tensor<D> {
    let places: Vec<_> = tensors.iter().map(at).collect();
    dispatch!(&places, cat(tensors, dim))
}

/// All parts of a tensor along a dimension, as views.
///
/// For training this is better than a view of each part: the gradient of the tensor is joined from those of the parts
/// once.
///
/// # Panics
/// If a size is zero, or they are not those of the tensor together.
pub fn split<const D: usize, const N: usize>(x: Tensor<D>, dim: usize, sizes: [usize; N]) -> [Tensor<D>; N] {
    assert_eq!(sizes.iter().sum::<usize>(), x.dims()[dim], "sizes of the parts of a tensor");
    dispatch!(&[at(&x)], split(x, dim, sizes))
}

/// Views of all parts of a tensor.
pub(crate) fn views<const D: usize, const N: usize>(x: &Tensor<D>, dim: usize, sizes: [usize; N]) -> [Tensor<D>; N] {
    let mut end = 0;
    sizes.map(|size| {
        end += size;
        x.clone().narrow(dim, end - size, size)
    })
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Tensor};

    use super::*;
    use crate::testing::ramp;

    #[test]
    fn tensors_of_any_layout_are_joined_as_burn_joins_them() {
        let layouts: [Tensor<3>; 6] = [
            ramp([5, 7, 11], 1),
            ramp([5, 9, 11], 2).narrow(1, 1, 7),
            ramp([5, 7, 30], 3).narrow(2, 13, 11),
            ramp([7, 5, 11], 4).swap_dims(0, 1),
            ramp([11, 7, 5], 5).swap_dims(0, 2),
            ramp([5, 7, 1], 6).expand([5, 7, 11]),
        ];
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let layouts = layouts.each_ref().map(|x| x.clone().cast(dtype));
            for dim in 0..3 {
                for first in &layouts {
                    for second in &layouts {
                        let tensors = vec![first.clone(), second.clone(), first.clone().narrow(dim, 1, 2)];
                        let joined = cat(tensors.clone(), dim);
                        assert_eq!(joined.into_data(), Tensor::cat(tensors, dim).into_data());
                    }
                }
            }
        }
    }

    #[test]
    fn empty_parts_add_nothing() {
        let x: Tensor<2> = ramp([3, 4], 1);
        for dim in 0..2 {
            let empty = x.clone().narrow(dim, 0, 1).slice_dim(dim, 0..0);
            for tensors in [vec![empty.clone(), x.clone()], vec![x.clone(), empty.clone(), x.clone(), empty.clone()]] {
                assert_eq!(cat(tensors.clone(), dim).into_data(), Tensor::cat(tensors, dim).into_data());
            }
        }
        let x: Tensor<1> = ramp([5], 1);
        assert_eq!(cat(vec![x.clone().slice_dim(0, 0..0), x.clone()], 0).into_data(), x.into_data());
    }

    #[test]
    fn many_values_are_joined_by_several_threads() {
        for dim in 0..2 {
            let (x, y): (Tensor<2>, Tensor<2>) = (ramp([400, 700], 1), ramp([400, 700], 2));
            let tensors = vec![x.clone(), y.clone().swap_dims(0, 1).reshape([400, 700])];
            assert_eq!(cat(tensors.clone(), dim).into_data(), Tensor::cat(tensors, dim).into_data());
        }
    }

    #[test]
    fn parts_are_those_of_the_tensor() {
        let x: Tensor<3> = ramp([2, 9, 4], 1);
        let parts = split(x.clone(), 1, [2, 6, 1]);
        assert_eq!(parts.each_ref().map(|part| part.dims()[1]), [2, 6, 1]);
        assert_eq!(Tensor::cat(parts.into(), 1).into_data(), x.into_data());
    }

    #[test]
    #[should_panic = "sizes of the parts"]
    fn parts_that_leave_something_are_a_fault_of_the_caller() {
        split(ramp::<2>([2, 9], 1), 1, [4, 4]);
    }
}
