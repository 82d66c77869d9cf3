//! Numbers that enter the transformer: timesteps and guidance -> sinusoids, positions -> rotary tables, rounded where
//! the original rounds them to the compute dtype.

use std::f64::consts::LN_10;

use burn::{
    module::Module,
    tensor::{DType, Device, FloatDType, Tensor, TensorData},
};
use half::{bf16, f16};
use nexus_core::nn::Linear;
use nexus_kernels::{RotaryTable, silu};

use crate::{LatentSize, connector::TokenPosition};

/// Width of the sinusoids.
pub const EMBEDDED_WIDTH: usize = 256;

/// Linear, SiLU, linear: turns a sinusoid or a pooled vector into conditioning.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[out, in]`.
    pub in_layer: Linear,
    /// `[out, out]`.
    pub out_layer: Linear,
}

impl Mlp {
    /// A lazily initialised block.
    pub fn new(inputs: usize, outputs: usize, device: &Device) -> Self {
        Self { in_layer: Linear::new(inputs, outputs, device), out_layer: Linear::new(outputs, outputs, device) }
    }

    /// # Shapes
    /// - `x`: `[batch, in]`
    /// - returns: `[batch, out]`
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.out_layer.forward(silu(self.in_layer.forward(x)))
    }
}

/// `[cos(t f), sin(t f)]` with 128 frequencies `f` from 1 down to almost 1/10000, computed in f32.
///
/// # Shapes
/// - `values`: timesteps in `0..=1000`, or guidance times 1000, one per sample
/// - returns: `[batch, 256]` in `dtype`
///
/// Source: FLUX (layers.py, `timestep_embedding`).
pub fn sinusoid(values: &[f32], dtype: DType, device: &Device) -> Tensor<2> {
    const HALF: usize = EMBEDDED_WIDTH / 2;
    let exponent = |i: usize| -(4.0 * LN_10) as f32 * i as f32 / HALF as f32;
    let frequencies: Vec<f32> = (0..HALF).map(|i| f64::from(exponent(i)).exp() as f32).collect();
    let mut features = Vec::with_capacity(values.len() * EMBEDDED_WIDTH);
    for value in values {
        let angles = frequencies.iter().map(|frequency| f64::from(value * frequency));
        features.extend(angles.clone().map(|angle| angle.cos() as f32));
        features.extend(angles.map(|angle| angle.sin() as f32));
    }
    let features = Tensor::from_data(TensorData::new(features, [values.len(), EMBEDDED_WIDTH]), (device, DType::F32));
    if dtype == DType::F32 { features } else { features.cast(FloatDType::from(dtype)) }
}

/// A number as the compute dtype holds it.
pub fn rounded(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => bf16::from_f32(value).to_f32(),
        DType::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// Positions of the image tokens: (0, row, column) in raster order.
pub fn image_positions(size: LatentSize) -> Vec<TokenPosition> {
    let (rows, columns) = (size.height / 2, size.width / 2);
    (0..rows).flat_map(|row| (0..columns).map(move |column| [0.0, row as f32, column as f32])).collect()
}

/// Rotation angles of tokens: each axis turns its own share of a head's features.
///
/// # Shapes
/// - `positions`: in token order
/// - `axes`: features per axis
/// - returns: f32 tables `[1, tokens, sum(axes) / 2]`; angles are computed in f64
///
/// Source: FLUX (math.py, `rope`).
pub(super) fn axes_rotary(
    positions: impl Iterator<Item = TokenPosition>,
    axes: [usize; 3],
    theta: f64,
    device: &Device,
) -> RotaryTable {
    let axis = |(axis, features): (usize, usize)| {
        (0..features / 2).map(move |i| (axis, theta.powf(-((2 * i) as f64) / features as f64)))
    };
    let frequencies: Vec<(usize, f64)> = axes.into_iter().enumerate().flat_map(axis).collect();
    let angles: Vec<f64> = positions
        .flat_map(|position| frequencies.iter().map(move |(axis, frequency)| f64::from(position[*axis]) * frequency))
        .collect();
    RotaryTable::from_f64(&angles, angles.len() / frequencies.len(), frequencies.len(), device)
}

#[cfg(test)]
mod tests {
    use nexus_core::testing::{assert_close, cpu};

    use super::*;

    #[test]
    fn guidance_rounds_as_the_original_rounds_it() {
        assert_eq!(rounded(3500.0, DType::BF16), 3504.0);
        assert_eq!(rounded(3500.0, DType::F32), 3500.0);
        assert_eq!(rounded(32.0 / 9.0, DType::BF16), 3.5625);
    }

    #[test]
    fn sinusoids_hold_cosines_then_sines() {
        let values: Vec<f32> = sinusoid(&[0.0, 2.0], DType::F32, &cpu()).into_data().try_to_vec().unwrap();
        assert_eq!(values[..EMBEDDED_WIDTH / 2], [1.0; EMBEDDED_WIDTH / 2]);
        assert_eq!(values[EMBEDDED_WIDTH / 2..EMBEDDED_WIDTH], [0.0; EMBEDDED_WIDTH / 2]);
        assert_eq!(values[EMBEDDED_WIDTH], 2f32.cos());
        let slowest = 2.0 * 10_000f32.powf(-127.0 / 128.0);
        assert!((values[2 * EMBEDDED_WIDTH - 1] - slowest.sin()).abs() < 1e-9);
    }

    #[test]
    fn each_axis_turns_its_share() {
        let table = axes_rotary([[1.0, 2.0, 3.0]].into_iter(), [2, 2, 4], 100.0, &cpu());
        let angles = [1.0f32, 2.0, 3.0, 0.3];
        assert_close(&table.cos, &angles.map(f32::cos), 1e-6);
        assert_close(&table.sin, &angles.map(f32::sin), 1e-6);
    }

    #[test]
    fn image_tokens_are_counted_in_raster_order() {
        let positions = image_positions(LatentSize { height: 4, width: 6 });
        assert_eq!(positions.len(), 6);
        assert_eq!(positions[4], [0.0, 1.0, 1.0]);
    }
}
