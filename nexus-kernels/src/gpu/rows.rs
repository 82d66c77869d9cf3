//! Tensors as rows along their last dimension: any tensor whose rows are whole -> where each row begins.

use burn_cubecl::{kernel::into_contiguous, tensor::CubeTensor};

/// Values that one unit reads at once, at most.
const MOST_VALUES: usize = 4;

/// Values that can be read at once where rows of such a length lie one behind the other.
pub(super) fn vector(len: usize) -> usize {
    [MOST_VALUES, 2].into_iter().find(|&size| len.is_multiple_of(size)).unwrap_or(1)
}

/// Rows of which `inner` neighbours lie `inner_stride` apart, and groups of them `outer_stride`, in values.
pub(super) struct Rows {
    pub tensor: CubeTensor,
    pub count: usize,
    pub width: usize,
    pub inner: usize,
    pub inner_stride: usize,
    pub outer_stride: usize,
}

impl Rows {
    /// Copies the tensor if its rows lie otherwise.
    pub(super) fn of(tensor: CubeTensor) -> Self {
        match Self::in_place(&tensor) {
            Some(rows) => rows,
            None => {
                let tensor = into_contiguous(tensor);
                let width = tensor.meta.shape()[tensor.meta.num_dims() - 1];
                let count = tensor.meta.num_elements() / width;
                Self { tensor, count, width, inner: count, inner_stride: width, outer_stride: 0 }
            }
        }
    }

    fn in_place(tensor: &CubeTensor) -> Option<Self> {
        let (shape, strides) = (tensor.meta.shape(), tensor.meta.strides());
        let last = tensor.meta.num_dims() - 1;
        if strides[last] != 1 {
            return None;
        }
        // Dimensions from the last but one to the first, neighbours that lie evenly taken together.
        let mut levels: Vec<(usize, usize)> = vec![];
        for dim in (0..last).rev().filter(|&dim| shape[dim] > 1) {
            match levels.last_mut() {
                Some((count, stride)) if *count * *stride == strides[dim] => *count *= shape[dim],
                _ => levels.push((shape[dim], strides[dim])),
            }
        }
        let &(inner, inner_stride) = levels.first().unwrap_or(&(1, 0));
        let &(outer, outer_stride) = levels.get(1).unwrap_or(&(1, 0));
        let (width, count) = (shape[last], inner * outer);
        (levels.len() <= 2).then(|| Self { tensor: tensor.clone(), count, width, inner, inner_stride, outer_stride })
    }

    /// Values that can be read at once: they divide the width and all distances.
    pub(super) fn vector(&self) -> usize {
        let whole = |size: &usize| {
            [self.width, self.inner_stride, self.outer_stride].iter().all(|value| value.is_multiple_of(*size))
        };
        [MOST_VALUES, 2, 1].into_iter().find(whole).unwrap_or(1)
    }
}
