//! Rotary embeddings in one pass: heads and tables -> rotated heads.

use burn::tensor::Tensor;
use burn_cubecl::cubecl::{
    self, calculate_cube_count_elemwise,
    ir::ElemType,
    prelude::{Tensor as Buffer, *},
};

use super::{contiguous, cube, element, empty_like, tensor};
use crate::{RotaryTable, rotary::Pairs};

/// Rotates every pair; `None` for tensors that are not for these kernels.
///
/// # Shapes
/// - `x`: `[batch, tokens, heads, 2 * pairs]`
/// - `cos`, `sin`: `[batch or 1, tokens, pairs]`
pub(super) fn rotate(x: &Tensor<4>, table: &RotaryTable, pairs: Pairs) -> Option<Tensor<4>> {
    let RotaryTable { cos, sin } = table;
    let [batch, tokens, heads, width] = x.dims();
    let [tables, _, half] = cos.dims();
    let fits = sin.dims() == cos.dims() && cos.dims()[1] == tokens && 2 * half == width && [1, batch].contains(&tables);
    if !fits || cos.dtype() != sin.dtype() {
        return None;
    }
    let dtypes = [element(x.dtype())?, element(cos.dtype())?];
    let (shape, dtype) = (x.shape(), x.dtype());
    let (x, cos, sin) = (cube(x)?, contiguous(cos)?, contiguous(sin)?);
    let (client, output) = (x.client.clone(), empty_like(&x, shape, dtype));
    let total = batch * tokens * heads * half;
    let cube_dim = CubeDim::new(&client, total);
    rotate_kernel::launch(
        &client,
        calculate_cube_count_elemwise(&client, total, cube_dim),
        cube_dim,
        x.into_tensor_arg(),
        cos.into_tensor_arg(),
        sin.into_tensor_arg(),
        output.clone().into_tensor_arg(),
        total,
        half,
        heads,
        tokens,
        if tables == 1 { 0 } else { tokens },
        pairs,
        dtypes,
    );
    Some(tensor(output))
}

#[cube(launch)]
fn rotate_kernel<F: Float, T: Float>(
    x: &Buffer<F>,
    cos: &Buffer<T>,
    sin: &Buffer<T>,
    output: &mut Buffer<F>,
    total: usize,
    half: usize,
    heads: usize,
    tokens: usize,
    table_tokens: usize,
    #[comptime] pairs: Pairs,
    #[define(F, T)] _dtypes: [ElemType; 2],
) {
    if ABSOLUTE_POS >= total {
        terminate!();
    }
    let pair = ABSOLUTE_POS % half;
    let row = ABSOLUTE_POS / half;
    let head = row % heads;
    let token = row / heads % tokens;
    let batch = row / heads / tokens;
    let start = batch * x.stride(0) + token * x.stride(1) + head * x.stride(2);
    let mut first = pair;
    let mut second = pair + half;
    if comptime!(pairs == Pairs::Neighbours) {
        first = 2 * pair;
        second = 2 * pair + 1;
    }
    let table = (batch * table_tokens + token) * half + pair;
    let cos = f32::cast_from(cos[table]);
    let sin = f32::cast_from(sin[table]);
    let a = f32::cast_from(x[start + first * x.stride(3)]);
    let b = f32::cast_from(x[start + second * x.stride(3)]);
    output[row * 2 * half + first] = F::cast_from(a * cos - b * sin);
    output[row * 2 * half + second] = F::cast_from(b * cos + a * sin);
}
