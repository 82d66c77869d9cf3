//! Tensors as rows along their last dimension: strided rows to read, and the threaded replacement of all rows.

use burn::{
    backend::{DispatchDevice, Flex},
    tensor::{DType, Tensor},
};
use half::{bf16, f16};
use rayon::prelude::*;

use super::{Floats, Level, join::contiguous, stored::Stored, wrap};

/// Values that a thread takes at a time: few enough to stay in its cache while they are read more than once.
const CHUNK: usize = 16 * 1024;

/// Where rows start in the storage of a tensor.
pub(super) struct Starts {
    /// Size and stride of all dimensions but the last, without those of size one; neighbours are joined where they can.
    dims: Vec<(usize, usize)>,
}

impl Starts {
    /// `None` if the values of a row are not neighbours, or if they lie backwards.
    pub(super) fn of(dims: &[usize], strides: &[isize]) -> Option<Self> {
        let (&width, dims) = dims.split_last()?;
        let (&step, strides) = strides.split_last()?;
        if step != 1 && width != 1 {
            return None;
        }
        let mut joined: Vec<(usize, usize)> = vec![];
        for (&dim, &stride) in dims.iter().zip(strides).filter(|(dim, _)| **dim != 1) {
            let stride = usize::try_from(stride).ok()?;
            match joined.last_mut() {
                Some(outer) if outer.1 == dim * stride => *outer = (outer.0 * dim, stride),
                _ => joined.push((dim, stride)),
            }
        }
        Some(Self { dims: joined })
    }

    #[inline]
    pub(super) fn of_row(&self, mut row: usize) -> usize {
        let mut start = 0;
        for &(dim, stride) in self.dims.iter().rev() {
            start += row % dim * stride;
            row /= dim;
        }
        start
    }
}

/// Rows of a float tensor, in row-major order of its other dimensions, read in place if they are f32.
pub(crate) struct Rows {
    floats: Floats,
    starts: Starts,
    width: usize,
}

impl Rows {
    /// `None` if the tensor does not hold floats on the CPU.
    pub(crate) fn of<const D: usize>(tensor: &Tensor<D>) -> Option<Self> {
        let (mut floats, dims) = (Floats::of(tensor)?, tensor.dims());
        if Starts::of(&dims, floats.strides()).is_none() {
            floats = floats.into_contiguous();
        }
        let starts = Starts::of(&dims, floats.strides())?;
        Some(Self { floats, starts, width: dims[D - 1] })
    }

    #[inline]
    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.floats.values()[self.starts.of_row(row)..][..self.width]
    }
}

/// Replaces the rows of a tensor by what `function` makes of them, in the same buffer if nobody else uses it.
///
/// `function` gets the number of the first of some rows and their values as f32, one row after the other. The tensor
/// comes back as an error if it does not hold floats on the CPU.
pub(crate) fn map_rows<const D: usize>(
    x: Tensor<D>,
    function: impl Fn(usize, &mut [f32]) + Sync,
) -> Result<Tensor<D>, Tensor<D>> {
    let on_cpu = matches!(x.device().as_dispatch(), DispatchDevice::Flex(_));
    if !on_cpu || x.dims().contains(&0) {
        return Err(x);
    }
    match x.dtype() {
        DType::F32 => Ok(map_rows_of::<f32, D>(x, function)),
        DType::BF16 => Ok(map_rows_of::<bf16, D>(x, function)),
        DType::F16 => Ok(map_rows_of::<f16, D>(x, function)),
        _ => Err(x),
    }
}

/// [`map_rows`] of a tensor on the CPU that stores `E` and is not empty.
fn map_rows_of<E: Stored, const D: usize>(x: Tensor<D>, function: impl Fn(usize, &mut [f32]) + Sync) -> Tensor<D> {
    let (level, dims) = (Level::detect(), x.dims());
    let (count, width) = (dims.iter().product::<usize>(), dims[D - 1]);
    let Ok(mut x) = x.try_into_primitive::<Flex>() else { unreachable!("a tensor of the flex backend") };
    let starts = match Starts::of(&dims, x.layout().strides()) {
        Some(starts) => starts,
        None => {
            x = contiguous(x);
            Starts { dims: vec![(count / width, width)] }
        }
    };
    let rows = (CHUNK / width).max(1);
    let first = x.layout().start_offset();
    let map = |chunk: usize, values: &mut [E]| E::in_f32(level, values, |values| function(chunk * rows, values));
    if x.is_contiguous()
        && let Some(values) = x.try_storage_mut::<E>()
    {
        each_chunk(&mut values[first..first + count], rows * width, map);
        return Tensor::from_primitive::<Flex>(x);
    }
    let values = &x.storage::<E>()[first..];
    let mut copy = Vec::with_capacity(count);
    each_chunk(&mut copy.spare_capacity_mut()[..count], rows * width, |chunk, copy| {
        for (i, copy) in copy.chunks_exact_mut(width).enumerate() {
            copy.write_copy_of_slice(&values[starts.of_row(chunk * rows + i)..][..width]);
        }
        #[allow(unsafe_code)]
        // SAFETY: a chunk is a whole number of rows, and each has just been written.
        map(chunk, unsafe { copy.assume_init_mut() });
    });
    #[allow(unsafe_code)]
    // SAFETY: the chunks cover the first `count` values of the capacity, and each was written in full.
    unsafe {
        copy.set_len(count);
    }
    wrap(copy, dims)
}

/// Runs `function` on every chunk with its number; a single chunk is not worth another thread.
fn each_chunk<T: Send>(values: &mut [T], chunk: usize, function: impl Fn(usize, &mut [T]) + Sync) {
    if values.len() <= chunk {
        function(0, values);
    } else {
        values.par_chunks_mut(chunk).enumerate().for_each(|(i, values)| function(i, values));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{cpu, ramp};

    fn values<const D: usize>(x: &Tensor<D>) -> Vec<f32> {
        x.to_data().try_into_vec_as::<f32>().unwrap()
    }

    /// Tensors of one shape whose values lie in every way that views can give.
    fn layouts() -> Vec<Tensor<3>> {
        vec![
            ramp([5, 7, 11], 1),
            ramp([5, 9, 11], 2).narrow(1, 1, 7),
            ramp([5, 7, 30], 3).narrow(2, 13, 11),
            ramp([7, 5, 11], 4).swap_dims(0, 1),
            ramp([11, 7, 5], 5).swap_dims(0, 2),
            ramp([5, 7, 11], 6).flip([0, 2]),
            ramp([1, 7, 11], 7).expand([5, 7, 11]),
            ramp([5, 7, 1], 8).expand([5, 7, 11]),
        ]
    }

    #[test]
    fn rows_of_any_layout_are_those_of_the_tensor() {
        for x in layouts() {
            let rows = Rows::of(&x).unwrap();
            let read: Vec<f32> = (0..35).flat_map(|i| rows.row(i).to_vec()).collect();
            assert_eq!(read, values(&x));
        }
    }

    #[test]
    fn every_row_is_mapped_once_and_a_shared_tensor_is_left_alone() {
        let add_row = |first: usize, values: &mut [f32]| {
            for (i, row) in values.chunks_exact_mut(11).enumerate() {
                row.iter_mut().for_each(|x| *x += (first + i) as f32);
            }
        };
        for x in layouts() {
            let before = values(&x);
            let expected: Vec<f32> = before.iter().enumerate().map(|(i, x)| x + (i / 11) as f32).collect();
            assert_eq!(values(&map_rows(x.clone(), add_row).unwrap()), expected);
            assert_eq!(values(&x), before);
            assert_eq!(values(&map_rows(x, add_row).unwrap()), expected);
        }
    }

    #[test]
    fn many_chunks_know_their_rows() {
        for (rows, width) in [(40_000, 1), (3, CHUNK + 1), (5000, 17)] {
            let number = |first: usize, values: &mut [f32]| {
                for (i, row) in values.chunks_exact_mut(width).enumerate() {
                    row.fill((first + i) as f32);
                }
            };
            let y = map_rows(Tensor::<2>::zeros([rows, width], &cpu()), number).unwrap();
            let expected: Vec<f32> = (0..rows * width).map(|i| (i / width) as f32).collect();
            assert_eq!(values(&y), expected);
        }
    }

    #[test]
    fn halves_are_mapped_as_f32_and_rounded_once() {
        let third = |_: usize, values: &mut [f32]| values.iter_mut().for_each(|x| *x /= 3.0);
        for x in layouts() {
            for dtype in [DType::BF16, DType::F16] {
                let x = x.clone().cast(dtype);
                let wide = map_rows(x.clone().cast(DType::F32), third).unwrap();
                assert_eq!(map_rows(x.clone(), third).unwrap().into_data(), wide.cast(dtype).into_data());
                let rows = Rows::of(&x).unwrap();
                let read: Vec<f32> = (0..35).flat_map(|i| rows.row(i).to_vec()).collect();
                assert_eq!(read, values(&x.cast(DType::F32)));
            }
        }
    }

    #[test]
    fn other_tensors_come_back() {
        let nothing = |_: usize, _: &mut [f32]| {};
        assert!(map_rows(Tensor::<2>::zeros([0, 3], &cpu()), nothing).is_err());
        let tracked = Tensor::<2>::zeros([2, 3], &cpu().autodiff());
        assert!(map_rows(tracked, nothing).is_err());
    }
}
