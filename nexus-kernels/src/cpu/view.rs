//! Between burn and kernels: a tensor on the CPU -> its values as a slice with strides, and back.

use burn::{
    backend::{DispatchDevice, Flex},
    tensor::{Bytes, DType, Element, Shape, Tensor},
};
use burn_flex::{FlexTensor, Layout};
use half::{bf16, f16};

use super::{
    join::contiguous,
    stored::{Stored, widen},
};

/// A tensor whose values can be read in place.
pub(crate) struct View {
    tensor: FlexTensor,
}

impl View {
    /// `None` if the tensor is on another backend or is tracked by autodiff.
    pub(crate) fn of<const D: usize>(tensor: &Tensor<D>) -> Option<Self> {
        if !matches!(tensor.device().as_dispatch(), DispatchDevice::Flex(_)) {
            return None;
        }
        Some(Self { tensor: tensor.clone().try_into_primitive::<Flex>().ok()? })
    }

    /// Like [`View::of`], for f32 tensors alone.
    pub(crate) fn f32<const D: usize>(tensor: &Tensor<D>) -> Option<Self> {
        if tensor.dtype() == DType::F32 { Self::of(tensor) } else { None }
    }

    /// Dtype of the values.
    pub(crate) fn dtype(&self) -> DType {
        self.tensor.dtype()
    }

    /// Distances in elements between neighbours along each dimension.
    pub(crate) fn strides(&self) -> &[isize] {
        self.tensor.layout().strides()
    }

    /// The values from the first element of the tensor to the end of the storage; strides count from here.
    pub(crate) fn values<E: Element + bytemuck::Pod>(&self) -> &[E] {
        &self.tensor.storage::<E>()[self.tensor.layout().start_offset()..]
    }

    /// The values in row-major order, if they lie so.
    pub(crate) fn contiguous<E: Element + bytemuck::Pod>(&self) -> Option<&[E]> {
        let (start, end) = self.tensor.layout().contiguous_offsets()?;
        Some(&self.tensor.storage::<E>()[start..end])
    }

    /// The values in row-major order, as f32; a copy. `None` for dtypes that are not floats.
    pub(crate) fn into_f32(self) -> Option<Vec<f32>> {
        let view = self.into_contiguous();
        match view.dtype() {
            DType::F32 => view.contiguous::<f32>().map(<[f32]>::to_vec),
            DType::BF16 => view.contiguous::<bf16>().map(widen),
            DType::F16 => view.contiguous::<f16>().map(widen),
            _ => None,
        }
    }

    /// The same tensor with its values in row-major order, copied if they do not lie so.
    pub(crate) fn into_contiguous(self) -> Self {
        Self { tensor: contiguous(self.tensor) }
    }

    /// The tensor itself.
    #[cfg(feature = "autodiff")]
    pub(super) fn into_tensor(self) -> FlexTensor {
        self.tensor
    }

    /// The tensor.
    pub(super) fn tensor(&self) -> &FlexTensor {
        &self.tensor
    }
}

/// The values of a float tensor on the CPU as f32: in place if they are f32, or else widened.
pub(crate) enum Floats {
    /// With the strides of the tensor.
    InPlace(View),
    /// In row-major order.
    Widened { values: Vec<f32>, strides: Vec<isize> },
}

impl Floats {
    /// `None` if the tensor is on another backend, tracked by autodiff, or not of floats.
    pub(crate) fn of<const D: usize>(tensor: &Tensor<D>) -> Option<Self> {
        let view = View::of(tensor)?;
        if view.dtype() == DType::F32 {
            return Some(Self::InPlace(view));
        }
        let mut strides = vec![1; D];
        for dim in (1..D).rev() {
            strides[dim - 1] = strides[dim] * tensor.dims()[dim] as isize;
        }
        Some(Self::Widened { values: view.into_f32()?, strides })
    }

    /// Distances in elements between neighbours along each dimension.
    pub(crate) fn strides(&self) -> &[isize] {
        match self {
            Self::InPlace(view) => view.strides(),
            Self::Widened { strides, .. } => strides,
        }
    }

    /// The values from the first element on; strides count from here, and more values may follow the last element.
    pub(crate) fn values(&self) -> &[f32] {
        match self {
            Self::InPlace(view) => view.values(),
            Self::Widened { values, .. } => values,
        }
    }

    /// The values in row-major order, if they lie so.
    pub(crate) fn contiguous(&self) -> Option<&[f32]> {
        match self {
            Self::InPlace(view) => view.contiguous(),
            Self::Widened { values, .. } => Some(values),
        }
    }

    /// The same with its values in row-major order, copied if they do not lie so.
    pub(crate) fn into_contiguous(self) -> Self {
        match self {
            Self::InPlace(view) => Self::InPlace(view.into_contiguous()),
            widened @ Self::Widened { .. } => widened,
        }
    }
}

/// A tensor of new values in row-major order.
///
/// # Panics
/// If there are not as many values as the shape says.
pub(crate) fn wrap<E: Element + bytemuck::Pod, const D: usize>(values: Vec<E>, shape: [usize; D]) -> Tensor<D> {
    let shape = Shape::from(shape);
    assert_eq!(values.len(), shape.num_elements(), "values of a new tensor");
    let tensor = FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape), E::dtype());
    Tensor::from_primitive::<Flex>(tensor)
}

/// [`wrap`] for what a kernel computed from a tensor of `dtype`, which the result has too.
///
/// # Panics
/// As [`wrap`], and if the dtype is none that [`Floats`] takes.
pub(crate) fn wrap_as<const D: usize>(dtype: DType, values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
    match dtype {
        DType::F32 => wrap(values, shape),
        DType::BF16 => wrap(bf16::narrow(values), shape),
        DType::F16 => wrap(f16::narrow(values), shape),
        _ => unreachable!("kernels take floats alone"),
    }
}
