//! Token embeddings: ids -> rows of a table.

use burn::{
    module::{Module, Param},
    tensor::{Device, FloatDType, Int, Tensor},
};

use super::normal_param;

/// A table with one row per id.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[rows, width]`.
    pub weight: Param<Tensor<2>>,
}

impl Embedding {
    /// A lazily initialised table.
    pub fn new(rows: usize, width: usize, device: &Device) -> Self {
        Self { weight: normal_param([rows, width], device) }
    }

    /// Looks rows up; only the rows asked for are cast to `dtype`.
    ///
    /// # Shapes
    /// - `ids`: `[batch, tokens]`, each below the number of rows
    /// - returns: `[batch, tokens, width]`
    pub fn forward(&self, ids: Tensor<2, Int>, dtype: FloatDType) -> Tensor<3> {
        let [batch, tokens] = ids.dims();
        let [_, width] = self.weight.dims();
        self.weight.val().select(0, ids.reshape([batch * tokens])).cast(dtype).reshape([batch, tokens, width])
    }
}
