//! Which algorithm multiplies matrices fastest on a GPU? One algorithm in a process: how long its first run takes, which
//! compiles it, how fast it is then, and how far its sums are from those in f64.

use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use burn::tensor::{DType, Device, DeviceType, Distribution, Tensor};
use burn_cubecl::{
    Cube,
    cubecl::ir::{ElemType, FloatKind},
    tensor::CubeTensor,
};
use clap::Parser;
use cubek::{
    matmul::{
        definition::{MatmulElems, MatmulGlobalElems},
        launch::launch_ref,
        multi_level::Strategy,
    },
    std::InputBinding,
};

/// Rounds of timing, of which the shortest counts, and runs in each.
const ROUNDS: [usize; 2] = [5, 5];
/// Columns whose sums are checked.
const CHECKED: usize = 3;

/// Times one product `[m, k] x [n, k]ᵀ`.
#[derive(Parser)]
struct Arguments {
    /// cuda or vulkan
    device: String,
    /// f32, f16 or bf16
    dtype: String,
    /// One of those that an unknown name lists
    algorithm: String,
    m: usize,
    k: usize,
    n: usize,
}

fn main() -> Result<()> {
    let Arguments { device, dtype, algorithm, m, k, n } = Arguments::parse();
    let kind = match device.as_str() {
        #[cfg(feature = "cuda")]
        "cuda" => DeviceType::Cuda,
        #[cfg(feature = "vulkan")]
        "vulkan" => DeviceType::Vulkan,
        _ => return Err(anyhow!("`{device}` is not in this build; features are cuda and vulkan")),
    };
    let device = Device::enumerate(kind).into_iter().next().context("no such device here")?;
    let (dtype, kind) = match dtype.as_str() {
        "bf16" => (DType::BF16, FloatKind::BF16),
        "f16" => (DType::F16, FloatKind::F16),
        "f32" => (DType::F32, FloatKind::F32),
        _ => return Err(anyhow!("`{dtype}` is not f32, f16 or bf16")),
    };
    let strategy = strategy(&algorithm)?;
    let random = |rows| Tensor::<2>::random([rows, k], Distribution::Uniform(-1.0, 1.0), &device).cast(dtype);
    let (x, weight) = (random(m), random(n));
    let y = Tensor::<2>::zeros([m, n], (&device, dtype));
    let cube = |tensor: &Tensor<2>| tensor.clone().try_into_primitive::<Cube>().map_err(|error| anyhow!("{error:?}"));
    let operands = [cube(&x)?, cube(&weight.clone().transpose())?, cube(&y)?];
    let run = || multiply(&strategy, &operands, ElemType::Float(kind));

    device.sync()?;
    let start = Instant::now();
    run()?;
    device.sync()?;
    let first = start.elapsed().as_secs_f64();
    let mut fastest = f64::MAX;
    for _ in 0..ROUNDS[0] {
        let start = Instant::now();
        (0..ROUNDS[1]).try_for_each(|_| run())?;
        device.sync()?;
        fastest = fastest.min(start.elapsed().as_secs_f64() / ROUNDS[1] as f64);
    }
    let rate = 2.0 * (m * k * n) as f64 / fastest / 1e12;
    let drift = drift(&x, &weight, &y)?;
    println!(
        "{algorithm} {m}x{k}x{n} {dtype:?}: first {first:.2} s, {:.3} ms, {rate:.1} TFLOP/s, drift {drift:.1e}",
        fastest * 1e3
    );
    Ok(())
}

fn multiply(strategy: &Strategy, [x, weight, y]: &[CubeTensor; 3], element: ElemType) -> Result<()> {
    let mut elements = MatmulElems::from_globals(&MatmulGlobalElems { lhs: element, rhs: element, out: element });
    let operand = |tensor: &CubeTensor| InputBinding::new(tensor.clone().binding(), element);
    let (left, right, output) = (operand(x), operand(weight), y.clone().binding());
    launch_ref(&strategy.clone().into(), &y.client, left, right, output, &mut elements)
        .map_err(|error| anyhow!("{error:?}"))
}

/// Of the last values of the last row, relative to themselves or to one.
fn drift(x: &Tensor<2>, weight: &Tensor<2>, y: &Tensor<2>) -> Result<f64> {
    let ([m, k], [n, _]) = (x.dims(), weight.dims());
    let checked = CHECKED.min(n);
    let values = |tensor: Tensor<2>| {
        tensor.cast(DType::F32).into_data().try_into_vec::<f32>().map_err(|error| anyhow!("{error:?}"))
    };
    let (row, columns) =
        (values(x.clone().narrow(0, m - 1, 1))?, values(weight.clone().narrow(0, n - checked, checked))?);
    let found = values(y.clone().narrow(0, m - 1, 1).narrow(1, n - checked, checked))?;
    let sums =
        columns.chunks(k).map(|column| row.iter().zip(column).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>());
    Ok(sums.zip(found).map(|(sum, found)| (f64::from(found) - sum).abs() / sum.abs().max(1.0)).fold(0.0, f64::max))
}

fn strategy(name: &str) -> Result<Strategy> {
    macro_rules! algorithms {
        ($($algorithm:ident)*) => {
            match name {
                $(stringify!($algorithm) => Strategy::$algorithm(Default::default()),)*
                _ => return Err(anyhow!("`{name}` is none of {}", [$(stringify!($algorithm)),*].join(", "))),
            }
        };
    }
    Ok(algorithms!(
        SimpleCyclicCmma SimpleCyclicMma SimpleStridedMma SimpleAsyncCyclicMma SimpleTmaCmma SimpleTmaMma
        DoubleCyclicCmma DoubleCyclicMma DoubleTilewiseCmma DoubleHybridMma DoubleAsyncCyclicMma
        DoubleAsyncStridedMma DoubleTmaCmma DoubleTmaMma SpecializedCyclicMma SpecializedStridedMma
        SpecializedTmaCmma SpecializedTmaMma OrderedDoubleCmma OrderedDoubleMma SimpleUnit DoubleUnit SimpleVecMat
        DoubleVecMat GemvUnitPerpendicular Gemm
    ))
}
