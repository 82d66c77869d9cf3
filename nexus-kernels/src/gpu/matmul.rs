//! Matrix products: two matrices -> their product, by an algorithm that suits their sizes and dtype.

use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubek::{
    matmul::{
        definition::{MatmulElems, MatmulGlobalElems},
        launch::launch_ref,
        multi_level::Strategy,
    },
    std::InputBinding,
};

use super::{cube, element, empty_like, tensor};

/// Sizes from which on matrices are worth the algorithms for large ones.
const LARGE: usize = 128;

/// `x wᵀ + bias` for a weight `[out, in]` of the dtype of `x`; `None` if it is not for these kernels.
pub(super) fn linear<const D: usize>(x: &Tensor<D>, weight: &Tensor<2>, bias: Option<&Tensor<1>>) -> Option<Tensor<D>> {
    let [outputs, inputs] = weight.dims();
    let mut shape = x.dims();
    let rows = x.shape().num_elements() / inputs.max(1);
    let y = product(x.clone().reshape([rows, inputs]), weight.clone().transpose(), x.dtype())?;
    let y = match bias {
        Some(bias) => y + bias.clone().unsqueeze(),
        None => y,
    };
    shape[D - 1] = outputs;
    Some(y.reshape(shape))
}

/// The product of two matrices of one dtype, or of batches of them, in a dtype; `None` if it is not for these kernels.
///
/// # Shapes
/// `[.., m, k]` and `[.., k, n]` to `[.., m, n]`
pub(super) fn product<const D: usize>(left: Tensor<D>, right: Tensor<D>, dtype: DType) -> Option<Tensor<D>> {
    if left.dtype() != right.dtype() {
        return None;
    }
    let mut shape = left.dims();
    let (m, k, n) = (shape[D - 2], shape[D - 1], right.dims()[D - 1]);
    shape[D - 1] = n;
    let (left, right) = (cube(&left)?, cube(&right)?);
    let output = empty_like(&left, shape, dtype);
    let strategies = strategies(m, k, n, left.dtype);
    strategies.into_iter().any(|strategy| launch(strategy, &left, &right, &output).is_some()).then(|| tensor(output))
}

/// Algorithms in the order in which they are tried: a device may lack what one needs.
///
/// docs/src/performance.md has how fast they are on an H200. Units multiply f32 as f32; matrix units would round it to 11 bits.
/// Algorithms with copy engines are faster, but some sizes make them fail where it cannot be caught.
fn strategies(m: usize, k: usize, n: usize, dtype: DType) -> Vec<Strategy> {
    let plain = Strategy::SimpleUnit(Default::default());
    let row = || Strategy::Gemm(Default::default());
    let small = || Strategy::SimpleCyclicCmma(Default::default());
    let large = Strategy::DoubleCyclicMma(Default::default());
    match dtype {
        DType::F32 if m == 1 => vec![row(), plain],
        DType::F32 => vec![plain],
        _ if m == 1 => vec![row(), small(), plain],
        _ if [m, k, n].iter().all(|&size| size >= LARGE) => vec![large, small(), plain],
        _ => vec![small(), plain],
    }
}

/// `None` if the device or the sizes do not suit the algorithm.
fn launch(strategy: Strategy, left: &CubeTensor, right: &CubeTensor, output: &CubeTensor) -> Option<()> {
    let (input, result) = (element(left.dtype)?, element(output.dtype)?);
    let mut elements = MatmulElems::from_globals(&MatmulGlobalElems { lhs: input, rhs: input, out: result });
    let operand = |x: &CubeTensor| InputBinding::new(x.clone().binding(), input);
    let (left, right, client) = (operand(left), operand(right), &output.client);
    launch_ref(&strategy.into(), client, left, right, output.clone().binding(), &mut elements).ok()
}
