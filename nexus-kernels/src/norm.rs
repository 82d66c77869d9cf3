//! Normalisations: statistics in f32 whatever the dtype of the activations.

use burn::tensor::{DType, Tensor};

use crate::{
    activation, cast_like,
    place::{at, dispatch},
};

/// What happens along a row.
#[derive(Debug, Clone)]
pub(crate) enum Norm {
    /// By the root of the mean square, then weight.
    Rms { weight: Tensor<1> },
    /// By mean and variance.
    Layer,
    /// By mean and variance, then weight and bias.
    Affine { weight: Tensor<1>, bias: Tensor<1> },
    /// By mean and variance, then `* (1 + scale) + shift`, each `[batch, 1, width]`.
    Modulated { scale: Tensor<3>, shift: Tensor<3> },
}

/// Root-mean-square normalisation over the last dimension: `weight * (x * rsqrt(mean x² + epsilon))`.
///
/// # Shapes
/// - `x`: `[.., width]`
/// - `weight`: `[width]`
/// - returns: as `x`
///
/// Source: Qwen2.5-VL (modeling_qwen2_5_vl.py, `Qwen2RMSNorm`).
/// Differs: kernels round once, after the weight; the original, and burn's operations here, round the normalised value too.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, epsilon: f64) -> Tensor<D> {
    dispatch!(&[at(&x), at(&weight)], normalize(x, Norm::Rms { weight }, epsilon))
}

/// `(x - mean) / sqrt(variance + epsilon)` over the last dimension, without weights, in the dtype of `x`.
pub fn layer_norm<const D: usize>(x: Tensor<D>, epsilon: f64) -> Tensor<D> {
    dispatch!(&[at(&x)], normalize(x, Norm::Layer, epsilon))
}

/// Adaptive layer norm: `layer_norm(x) * (1 + scale) + shift`.
///
/// # Shapes
/// - `x`: `[batch, tokens, width]`
/// - `shift`, `scale`: `[batch, 1, width]`
pub fn modulate(x: Tensor<3>, shift: Tensor<3>, scale: Tensor<3>, epsilon: f64) -> Tensor<3> {
    dispatch!(&[at(&x), at(&shift), at(&scale)], normalize(x, Norm::Modulated { scale, shift }, epsilon))
}

/// `layer_norm(x) * weight + bias`.
///
/// # Shapes
/// - `x`: `[.., width]`
/// - `weight`, `bias`: `[width]`
/// - returns: as `x`
pub fn affine_layer_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, bias: Tensor<1>, epsilon: f64) -> Tensor<D> {
    dispatch!(&[at(&x), at(&weight), at(&bias)], normalize(x, Norm::Affine { weight, bias }, epsilon))
}

/// A norm of rows in burn's operations.
pub(crate) fn plain<const D: usize>(x: Tensor<D>, norm: Norm, epsilon: f64) -> Tensor<D> {
    let dtype = x.dtype();
    match norm {
        Norm::Rms { weight } => {
            let weight = cast_like(weight, &x).unsqueeze();
            let x = to_f32(x);
            let inverse = (x.clone().square().mean_dim(D - 1) + epsilon).sqrt().recip();
            in_dtype(x * inverse, dtype) * weight
        }
        Norm::Layer => in_dtype(centred(to_f32(x), epsilon), dtype),
        Norm::Affine { weight, bias } => {
            let normed = centred(to_f32(x), epsilon);
            let (weight, bias) = (cast_like(weight, &normed).unsqueeze(), cast_like(bias, &normed).unsqueeze());
            in_dtype(normed * weight + bias, dtype)
        }
        Norm::Modulated { scale, shift } => {
            in_dtype(centred(to_f32(x), epsilon), dtype) * (scale + 1.0).unsqueeze() + shift.unsqueeze()
        }
    }
}

/// `(x - mean) / sqrt(variance + epsilon)` over the last dimension.
fn centred<const D: usize>(x: Tensor<D>, epsilon: f64) -> Tensor<D> {
    let centred = x.clone() - x.mean_dim(D - 1);
    let inverse = (centred.clone().square().mean_dim(D - 1) + epsilon).sqrt().recip();
    centred * inverse
}

/// In f32, or in f64 as it is.
fn to_f32<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    in_dtype(x.clone(), if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 })
}

fn in_dtype<const D: usize>(x: Tensor<D>, dtype: DType) -> Tensor<D> {
    if x.dtype() == dtype { x } else { x.cast(dtype) }
}

/// What [`group_norm`] does to pictures.
#[derive(Debug, Clone)]
pub struct GroupNormOptions {
    /// `[channels]`.
    pub weight: Tensor<1>,
    /// `[channels]`.
    pub bias: Tensor<1>,
    /// Groups of neighbouring channels.
    pub num_groups: usize,
    /// Added to the variance.
    pub epsilon: f64,
    /// Whether [`crate::silu`] follows.
    pub silu: bool,
}

/// Group normalisation over channels and positions of pictures.
///
/// # Shapes
/// `[batch, channels, height, width]` to the same.
pub fn group_norm(x: Tensor<4>, options: &GroupNormOptions) -> Tensor<4> {
    dispatch!(&[at(&x), at(&options.weight), at(&options.bias)], group_norm(x, options))
}

/// [`group_norm`] in burn's operations.
pub(crate) fn plain_groups(x: Tensor<4>, options: &GroupNormOptions) -> Tensor<4> {
    let GroupNormOptions { weight, bias, num_groups, epsilon, silu } = options.clone();
    let [batch, channels, height, width] = x.dims();
    let dtype = x.dtype();
    let grouped = to_f32(x).reshape([batch, num_groups, channels / num_groups * height * width]);
    let normed = centred(grouped, epsilon).reshape([batch, channels, height, width]);
    let weight = cast_like(weight, &normed).reshape([1, channels, 1, 1]);
    let bias = cast_like(bias, &normed).reshape([1, channels, 1, 1]);
    let normed = in_dtype(normed * weight + bias, dtype);
    if silu { activation::plain(activation::Function::Silu, normed) } else { normed }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::testing::{assert_close, assert_close_tensors, cpu, device, input, ramp};

    fn ones(width: usize, device: &Device) -> Tensor<1> {
        Tensor::ones([width], device)
    }

    /// Groups on the CPU of weight one and bias zero.
    fn even_groups(num_groups: usize, channels: usize, epsilon: f64) -> GroupNormOptions {
        let bias = Tensor::zeros([channels], &cpu());
        GroupNormOptions { weight: ones(channels, &cpu()), bias, num_groups, epsilon, silu: false }
    }

    #[test]
    fn layer_norm_centres_and_scales() {
        let x = Tensor::<2>::from_floats([[1.0, 2.0, 3.0, 6.0]], &device());
        // mean 3, variance 3.5
        let expected = [-2.0, -1.0, 0.0, 3.0].map(|d: f32| d / 3.5f32.sqrt());
        assert_close(&layer_norm(x, 0.0), &expected, 1e-6);
    }

    #[test]
    fn rms_norm_divides_by_root_mean_square() {
        let x = Tensor::<2>::from_floats([[3.0, 4.0], [0.0, 0.0]], &device());
        let rms = 12.5f32.sqrt();
        assert_close(&rms_norm(x, ones(2, &device()), 1e-6), &[3.0 / rms, 4.0 / rms, 0.0, 0.0], 1e-6);
    }

    #[test]
    fn rms_norm_statistics_do_not_overflow_in_half_precision() {
        let x = Tensor::<2>::from_floats([[300.0, 400.0]], &cpu()).cast(DType::F16);
        let y = rms_norm(x, ones(2, &cpu()), 1e-6);
        assert_eq!(y.dtype(), DType::F16);
        assert_close(&y.cast(DType::F32), &[0.848_528_1, 1.131_370_8], 1e-3);
    }

    #[test]
    fn group_norm_normalises_each_group() {
        let x = Tensor::<1>::from_floats([0.0, 2.0, 10.0, 14.0], &cpu()).reshape([1, 2, 1, 2]);
        assert_close(&group_norm(x, &even_groups(2, 2, 0.0)), &[-1.0, 1.0, -1.0, 1.0], 1e-6);
    }

    /// Activations of one shape, some of them views.
    fn inputs(batch: usize, tokens: usize, width: usize) -> [Tensor<3>; 3] {
        [
            input([batch, tokens, width], 1) * 3.0 + 0.5,
            input([batch, tokens + 2, width + 3], 2).narrow(1, 1, tokens).narrow(2, 2, width),
            input([width, batch, tokens], 3).permute([1, 2, 0]),
        ]
    }

    const SHAPES: [[usize; 3]; 6] = [[1, 1, 1], [1, 1, 3584], [2, 5, 7], [3, 11, 80], [2, 19, 1280], [2, 700, 17]];

    #[test]
    fn norms_of_rows_match_the_plain_formulation() {
        let mut dtypes = vec![DType::F32, DType::BF16, DType::F16];
        dtypes.retain(|&dtype| device().supports_dtype(dtype));
        for ([batch, tokens, width], dtype) in SHAPES.into_iter().zip(dtypes.into_iter().cycle()) {
            let [rms, weight, bias] = [5, 6, 7].map(|seed| input([width], seed).cast(dtype));
            let affine = [weight, bias].map(|vector: Tensor<1>| move || vector.clone());
            let vectors = input([batch, 1, 3 * width], 8);
            let (shift, scale) = (vectors.clone().narrow(2, 0, width), vectors.narrow(2, width, width));
            for x in inputs(batch, tokens, width) {
                let expected = plain(x.clone(), Norm::Rms { weight: rms.clone() }, 1e-6);
                assert_close_tensors(&rms_norm(x.clone(), rms.clone(), 1e-6), &expected, 2e-6);
                let [weight, bias] = &affine;
                let expected = plain(x.clone(), Norm::Affine { weight: weight(), bias: bias() }, 1e-6);
                assert_close_tensors(&affine_layer_norm(x.clone(), weight(), bias(), 1e-6), &expected, 2e-6);
                assert_close_tensors(&layer_norm(x.clone(), 1e-6), &plain(x.clone(), Norm::Layer, 1e-6), 2e-6);
                let expected = plain(x.clone(), Norm::Modulated { scale: scale.clone(), shift: shift.clone() }, 1e-6);
                assert_close_tensors(&modulate(x, shift.clone(), scale.clone(), 1e-6), &expected, 2e-6);
            }
        }
    }

    #[test]
    fn heads_are_normalised_where_they_lie() {
        let q = input([2, 9, 3 * 5, 16], 1).narrow(2, 5, 5);
        let weight: Tensor<1> = input([16], 2);
        let normed = rms_norm(q.clone(), weight.clone(), 1e-6);
        assert_close_tensors(&normed, &plain(q, Norm::Rms { weight }, 1e-6), 2e-6);
    }

    #[test]
    fn group_norms_match_the_plain_formulation() {
        let dtype = if device().supports_dtype(DType::BF16) { DType::BF16 } else { DType::F32 };
        for [batch, channels, height, width] in [[1, 4, 1, 1], [2, 6, 5, 7], [1, 8, 65, 17], [2, 4, 64, 80]] {
            let [weight, bias] = [1, 2].map(|seed| input([channels], seed).cast(dtype));
            for num_groups in [1, 2, channels] {
                let (weight, bias) = (weight.clone(), bias.clone());
                let norm = GroupNormOptions { weight, bias, num_groups, epsilon: 1e-6, silu: false };
                let norm_silu = GroupNormOptions { silu: true, ..norm.clone() };
                let permuted = input([batch, height, width, channels], 4).permute([0, 3, 1, 2]);
                for x in [input([batch, channels, height, width], 3) * 5.0 - 2.0, permuted] {
                    let expected = plain_groups(x.clone(), &norm);
                    assert_close_tensors(&group_norm(x.clone(), &norm), &expected, 2e-6);
                    assert_close_tensors(&group_norm(x, &norm_silu), &crate::silu(expected), 2e-6);
                }
            }
        }
    }

    #[test]
    fn values_that_are_not_finite_spread_as_in_the_plain_formulation() {
        let (weight, bias) = (|| ones(20, &cpu()), || Tensor::zeros([20], &cpu()));
        let groups = even_groups(2, 4, 1e-6);
        let kinds = |x: Tensor<4>| -> Vec<_> {
            let values = x.into_data().try_to_vec::<f32>().unwrap();
            values.into_iter().map(|value| (value.is_nan(), value == f32::INFINITY, value == 0.0)).collect()
        };
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e25] {
            let mut values = ramp([160], 1).into_data().try_to_vec::<f32>().unwrap();
            values[33] = odd;
            let x = Tensor::<1>::from_floats(values.as_slice(), &cpu()).reshape([2, 4, 1, 20]);
            let expected = plain(x.clone(), Norm::Rms { weight: weight() }, 1e-6);
            assert_eq!(kinds(rms_norm(x.clone(), weight(), 1e-6)), kinds(expected), "rms {odd}");
            let expected = plain(x.clone(), Norm::Affine { weight: weight(), bias: bias() }, 1e-6);
            assert_eq!(kinds(affine_layer_norm(x.clone(), weight(), bias(), 1e-6)), kinds(expected), "layer {odd}");
            assert_eq!(kinds(group_norm(x.clone(), &groups)), kinds(plain_groups(x, &groups)), "group {odd}");
        }
    }
}
