//! Copies by all threads: tensors, strided or not -> one tensor in row-major order, one behind the other along a dimension.
#![allow(unsafe_code)]

use burn::{
    backend::Flex,
    tensor::{Bytes, DType, Shape, Tensor},
};
use burn_flex::{FlexTensor, Layout};
use half::{bf16, f16};
use rayon::prelude::*;

use super::{View, rows::Starts, stored::Stored};

/// Values that a thread copies at a time.
const CHUNK: usize = 64 * 1024;

/// Tensors one behind the other; `None` if they are not floats on the CPU or do not fit.
///
/// Tracked tensors are joined two at a time, others are left to burn.
pub(crate) fn cat<const D: usize>(tensors: &[Tensor<D>], dim: usize) -> Option<Tensor<D>> {
    let views: Vec<View> = tensors.iter().map(View::of).collect::<Option<_>>()?;
    let parts: Vec<&FlexTensor> = views.iter().map(View::tensor).collect();
    Some(Tensor::from_primitive::<Flex>(joined(&parts, dim)?))
}

/// [`cat`] for any rank.
pub(super) fn joined(parts: &[&FlexTensor], dim: usize) -> Option<FlexTensor> {
    let first = parts.first()?;
    let mut shape: Vec<usize> = first.layout().shape().to_vec();
    *shape.get_mut(dim)? = parts.iter().map(|part| part.layout().shape().get(dim)).sum::<Option<usize>>()?;
    let fits = |part: &&FlexTensor| {
        let dims = part.layout().shape();
        let others = |(at, (x, y)): (usize, (&usize, &usize))| at == dim || x == y;
        part.dtype() == first.dtype() && dims.len() == shape.len() && dims.iter().zip(&shape).enumerate().all(others)
    };
    if !parts.iter().all(fits) || shape.contains(&0) {
        return None;
    }
    let bytes = match first.dtype() {
        DType::F32 => Bytes::from_elems(join::<f32>(parts, &shape, dim)),
        DType::BF16 => Bytes::from_elems(join::<bf16>(parts, &shape, dim)),
        DType::F16 => Bytes::from_elems(join::<f16>(parts, &shape, dim)),
        _ => return None,
    };
    Some(FlexTensor::new(bytes, Layout::contiguous(Shape::from(shape)), first.dtype()))
}

/// A tensor with its values in row-major order from some element on.
pub(super) fn contiguous(tensor: FlexTensor) -> FlexTensor {
    if tensor.layout().contiguous_offsets().is_some() {
        return tensor;
    }
    joined(&[&tensor], 0).unwrap_or_else(|| tensor.to_contiguous())
}

/// Values of the result, written by threads that own different ranges.
struct Target<E> {
    to: *mut E,
    len: usize,
}

// SAFETY: the pointer is only used by `put`, whose callers own different ranges.
unsafe impl<E: Send> Sync for Target<E> {}

impl<E: Copy> Target<E> {
    /// # Safety
    /// Nobody else uses the range meanwhile.
    unsafe fn put(&self, at: usize, values: &[E]) {
        assert!(at + values.len() <= self.len);
        // SAFETY: inside of the allocation, and the caller's condition.
        unsafe { values.as_ptr().copy_to_nonoverlapping(self.to.add(at), values.len()) };
    }
}

/// The values of parts that fit into `shape`.
fn join<E: Stored>(parts: &[&FlexTensor], shape: &[usize], dim: usize) -> Vec<E> {
    let len = shape.iter().product();
    let mut strides = vec![1isize; shape.len()];
    for at in (1..shape.len()).rev() {
        strides[at - 1] = strides[at] * shape[at] as isize;
    }
    let mut values = Vec::<E>::with_capacity(len);
    let target = Target { to: values.as_mut_ptr(), len };
    let mut offset = 0;
    for part in parts.iter().filter(|part| part.layout().shape()[dim] > 0) {
        copy(part, &strides, offset, dim, &target);
        offset += part.layout().shape()[dim] * strides[dim] as usize;
    }
    // SAFETY: the parts cover the result along `dim`, and each was copied in full.
    unsafe { values.set_len(len) };
    values
}

/// Copies a part to where it begins at `offset`, with the strides of the result.
fn copy<E: Stored>(part: &FlexTensor, to_strides: &[isize], offset: usize, dim: usize, target: &Target<E>) {
    let layout = part.layout();
    let (dims, strides, last) = (layout.shape(), layout.strides(), to_strides.len() - 1);
    // Dimensions whose elements lie in one piece on both sides are a row.
    let (mut split, mut width) = (last, dims[last]);
    while split > dim + 1 && (dims[split - 1] == 1 || strides[split - 1] == width as isize) {
        split -= 1;
        width *= dims[split];
    }
    let row_dims: Vec<usize> = dims[..split].iter().copied().chain([width]).collect();
    let starts = |strides: &[isize], step| {
        let strides: Vec<isize> = strides[..split].iter().copied().chain([step]).collect();
        Starts::of(&row_dims, &strides)
    };
    let (Some(from), Some(to)) = (starts(strides, strides[last]), starts(to_strides, 1)) else {
        return copy(&part.to_contiguous(), to_strides, offset, dim, target);
    };
    let values = &part.storage::<E>()[layout.start_offset()..];
    let (rows, step) = (dims[..split].iter().product::<usize>(), (CHUNK / width).max(1));
    (0..rows.div_ceil(step)).into_par_iter().for_each(|chunk| {
        for row in chunk * step..rows.min((chunk + 1) * step) {
            // SAFETY: rows of a part, and parts along `dim`, lie beside each other in the result.
            unsafe { target.put(offset + to.of_row(row), &values[from.of_row(row)..][..width]) };
        }
    });
}
