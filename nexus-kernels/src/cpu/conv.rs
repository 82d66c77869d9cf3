//! Convolutions: pictures and kernels -> pictures.
//!
//! 3x3 kernels that keep the size, plain or on a doubled picture, go through Winograd's form; all others gather the
//! pixels under each weight, and so does what Winograd's form finds not to be finite. Either way the work is a product of a
//! small block of weights with a panel of pixels. Results do not depend on the number of threads.

mod gather;
mod product;
mod winograd;
mod work;

use burn::tensor::{DType, Tensor};
use half::{bf16, f16};

use self::{winograd::Picture, work::Output};
use super::{Floats, Level, View, stored::Stored, wrap};
use crate::Filter;

/// Sizes of the input and of the kernel over it.
struct Geometry {
    inputs: usize,
    height: usize,
    width: usize,
    kernel: usize,
    stride: usize,
    /// Zeros before each spatial dimension.
    before: usize,
}

/// Convolves pictures on the flex backend; `None` for any other tensor or kernel.
///
/// # Shapes
/// - `x`: `[batch, in, height, width]`
/// - returns: `[batch, out, ..]`, sides `(side + padding - kernel) / stride + 1`
pub(crate) fn conv2d(x: &Tensor<4>, filter: &Filter) -> Option<Tensor<4>> {
    conv2d_at(Level::detect(), x, filter)
}

/// [`conv2d`] of the picture with every pixel repeated in a square of 2x2, for 3x3 kernels that keep the size.
///
/// # Shapes
/// - `x`: `[batch, in, height, width]`
/// - returns: `[batch, out, 2 * height, 2 * width]`
pub(crate) fn upsample_conv2d(x: &Tensor<4>, filter: &Filter) -> Option<Tensor<4>> {
    upsample_conv2d_at(Level::detect(), x, filter)
}

fn conv2d_at(level: Level, x: &Tensor<4>, filter: &Filter) -> Option<Tensor<4>> {
    if filter.keeps_size_3x3()
        && let Some(y) = winograd_at(level, Picture::Plain, x, filter)
    {
        return Some(y);
    }
    let operands = Operands::of(x, filter)?;
    match x.dtype() {
        DType::F32 => operands.gathered::<f32>(level, filter),
        DType::BF16 => operands.gathered::<bf16>(level, filter),
        DType::F16 => operands.gathered::<f16>(level, filter),
        _ => None,
    }
}

fn upsample_conv2d_at(level: Level, x: &Tensor<4>, filter: &Filter) -> Option<Tensor<4>> {
    if filter.keeps_size_3x3() { winograd_at(level, Picture::Doubled, x, filter) } else { None }
}

/// `None` also if not all of the result is finite.
fn winograd_at(level: Level, picture: Picture, x: &Tensor<4>, filter: &Filter) -> Option<Tensor<4>> {
    let operands = Operands::of(x, filter)?;
    match x.dtype() {
        DType::F32 => operands.tiled::<f32>(level, picture),
        DType::BF16 => operands.tiled::<bf16>(level, picture),
        DType::F16 => operands.tiled::<f16>(level, picture),
        _ => None,
    }
}

impl Filter {
    pub(super) fn keeps_size_3x3(&self) -> bool {
        let [_, _, height, width] = self.weight.dims();
        (height, width, self.stride, self.padding) == (3, 3, 1, (1, 1))
    }
}

/// What a kernel reads, in row-major order: pictures as they are stored, the rest in f32.
struct Operands {
    x: View,
    /// Of the pictures.
    dims: [usize; 4],
    weight: Floats,
    /// Side of the kernel.
    kernel: usize,
    bias: Floats,
}

impl Operands {
    fn of(x: &Tensor<4>, filter: &Filter) -> Option<Self> {
        let (dims, [outputs, weight_inputs, kernel, kernel_width]) = (x.dims(), filter.weight.dims());
        let is_empty = x.shape().num_elements() == 0 || filter.weight.shape().num_elements() == 0;
        if is_empty || dims[1] != weight_inputs || kernel != kernel_width || filter.bias.dims() != [outputs] {
            return None;
        }
        let weight = Floats::of(&filter.weight)?.into_contiguous();
        let bias = Floats::of(&filter.bias)?.into_contiguous();
        Some(Self { x: View::of(x)?.into_contiguous(), dims, weight, kernel, bias })
    }

    /// The convolution by gathering pixels.
    fn gathered<E: Stored>(&self, level: Level, filter: &Filter) -> Option<Tensor<4>> {
        let &Self { dims: [batch, inputs, height, width], kernel, .. } = self;
        let (weight, bias) = (self.weight.contiguous()?, self.bias.contiguous()?);
        let (before, after) = filter.padding;
        let side = |side: usize| Some((side + before + after).checked_sub(kernel)? / filter.stride + 1);
        let shape = [batch, bias.len(), side(height)?, side(width)?];
        let mut geometry = Geometry { inputs, height, width, kernel, stride: filter.stride, before };
        let mut grid = shape;
        if kernel == 1 && filter.stride == 1 && filter.padding == (0, 0) {
            // Rows do not matter: a single long one fills the panels without seams.
            (geometry.height, geometry.width) = (1, height * width);
            (grid[2], grid[3]) = (1, height * width);
        }
        let x = self.x.contiguous::<E>()?;
        let weights = gather::pack(weight, inputs * kernel * kernel);
        let fill = |out: &Output<E>| gather::convolve(level, x, &geometry, &weights, bias, out);
        // SAFETY: `convolve` writes all of it.
        #[allow(unsafe_code)]
        let values = unsafe { Output::collect(grid, fill) };
        Some(wrap(values, shape))
    }

    /// The convolution in Winograd's form, if all of it is finite.
    fn tiled<E: Stored>(&self, level: Level, picture: Picture) -> Option<Tensor<4>> {
        let [batch, inputs, height, width] = self.dims;
        let scale = if picture == Picture::Doubled { 2 } else { 1 };
        let (weight, bias) = (self.weight.contiguous()?, self.bias.contiguous()?);
        let shape = [batch, bias.len(), scale * height, scale * width];
        let weights = winograd::pack(level, picture, weight, inputs);
        let pixels = (self.x.contiguous::<E>()?, [inputs, height, width]);
        let mut all_finite = true;
        let fill = |out: &Output<E>| all_finite = winograd::convolve(level, picture, pixels, &weights, bias, out);
        // SAFETY: `convolve` writes all of it.
        #[allow(unsafe_code)]
        let values = unsafe { Output::collect(shape, fill) };
        all_finite.then(|| wrap(values, shape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        conv::{plain, upsample_conv2d as upsampled_or_plain, upsample_nearest_2x},
        testing::{cpu, limit_cpu, ramp, relative_drift},
    };

    const TOLERANCE: f32 = 2e-6;

    #[derive(Debug, Clone, Copy)]
    struct Config {
        inputs: usize,
        outputs: usize,
        kernel_size: usize,
        stride: usize,
        padding: (usize, usize),
    }

    impl Config {
        /// Height and width stay.
        fn same(inputs: usize, outputs: usize, kernel_size: usize) -> Self {
            let half = kernel_size / 2;
            Self { inputs, outputs, kernel_size, stride: 1, padding: (half, half) }
        }

        fn halving(channels: usize) -> Self {
            Self { inputs: channels, outputs: channels, kernel_size: 3, stride: 2, padding: (0, 1) }
        }
    }

    fn filter(config: Config, dtype: DType) -> Filter {
        let Config { inputs, outputs, kernel_size, stride, padding } = config;
        let weight = ramp([outputs, inputs, kernel_size, kernel_size], 1).cast(dtype);
        Filter { weight, bias: ramp([outputs], 2).cast(dtype), stride, padding }
    }

    /// The sum over all pixels under the kernel, in f64.
    fn direct(x: &Tensor<4>, filter: &Filter) -> Vec<f32> {
        let values = |x: Tensor<1>| x.cast(DType::F32).to_data().try_to_vec::<f32>().unwrap();
        let [batch, inputs, height, width] = x.dims();
        let [_, _, kernel, _] = filter.weight.dims();
        let (before, after) = filter.padding;
        let out = |side: usize| (side + before + after - kernel) / filter.stride + 1;
        let (x, weight) = (values(x.clone().flatten(0, 3)), values(filter.weight.clone().flatten(0, 3)));
        let bias = values(filter.bias.clone());
        let mut sums = vec![];
        for picture in 0..batch {
            for (o, bias) in bias.iter().enumerate() {
                for (row, col) in (0..out(height)).flat_map(|row| (0..out(width)).map(move |col| (row, col))) {
                    let mut sum = f64::from(*bias);
                    for (i, tap) in (0..inputs).flat_map(|i| (0..kernel * kernel).map(move |tap| (i, tap))) {
                        let y = (row * filter.stride + tap / kernel).checked_sub(before).filter(|y| *y < height);
                        let x_ = (col * filter.stride + tap % kernel).checked_sub(before).filter(|x| *x < width);
                        if let (Some(y), Some(x_)) = (y, x_) {
                            let pixel = x[((picture * inputs + i) * height + y) * width + x_];
                            sum += f64::from(pixel) * f64::from(weight[(o * inputs + i) * kernel * kernel + tap]);
                        }
                    }
                    sums.push(sum as f32);
                }
            }
        }
        sums
    }

    #[track_caller]
    fn assert_direct(actual: &Tensor<4>, x: &Tensor<4>, filter: &Filter, case: &str) {
        let drift = relative_drift(&actual.to_data().try_to_vec::<f32>().unwrap(), &direct(x, filter));
        assert!(drift <= TOLERANCE, "{case}: drift {drift:e}");
    }

    /// Inputs, outputs, height and width.
    const SIZES: [[usize; 4]; 9] = [
        [1, 1, 1, 1],
        [3, 5, 2, 3],
        [5, 3, 3, 1],
        [16, 17, 5, 17],
        [17, 16, 17, 5],
        [32, 9, 3, 33],
        [3, 32, 33, 2],
        [1, 3, 3, 129],
        [2, 130, 4, 6],
    ];

    #[test]
    fn every_kind_matches_the_sum_at_every_level() {
        for [inputs, outputs, height, width] in SIZES {
            let x = ramp([2, inputs, height, width], 3);
            let halving = Config { outputs, ..Config::halving(inputs) };
            let wide = Config { inputs, outputs, kernel_size: 5, stride: 3, padding: (3, 2) };
            for config in [Config::same(inputs, outputs, 3), Config::same(inputs, outputs, 1), halving, wide] {
                if height + config.padding.1 < config.kernel_size || width + config.padding.1 < config.kernel_size {
                    continue;
                }
                let filter = filter(config, DType::F32);
                for level in Level::available() {
                    let y = conv2d_at(level, &x, &filter).unwrap();
                    assert_direct(&y, &x, &filter, &format!("{level:?} {config:?} {height}x{width}"));
                }
            }
        }
    }

    #[test]
    fn sums_over_many_channels_stay_exact() {
        let x = ramp([1, 512, 3, 4], 3).abs();
        for config in [Config::same(512, 3, 3), Config { outputs: 3, ..Config::halving(512) }] {
            let filter = filter(config, DType::F32);
            for level in Level::available() {
                let y = conv2d_at(level, &x, &filter).unwrap();
                assert_direct(&y, &x, &filter, &format!("{level:?} {config:?}"));
            }
        }
    }

    #[test]
    fn doubled_pictures_match_the_sum_at_every_level() {
        for [inputs, outputs, height, width] in SIZES {
            let x = ramp([2, inputs, height, width], 3);
            let filter = filter(Config::same(inputs, outputs, 3), DType::F32);
            let doubled = upsample_nearest_2x(x.clone());
            for level in Level::available() {
                let y = upsample_conv2d_at(level, &x, &filter).unwrap();
                assert_eq!(y.dims(), [2, outputs, 2 * height, 2 * width]);
                assert_direct(&y, &doubled, &filter, &format!("{level:?} {inputs}x{outputs} {height}x{width}"));
            }
        }
    }

    #[test]
    fn shapes_are_those_of_the_plain_version() {
        for (height, width) in [(2, 3), (3, 2), (5, 17), (17, 33), (32, 8)] {
            for config in [Config::halving(3), Config::same(3, 3, 1), Config::same(3, 3, 3)] {
                let (x, filter) = (ramp([1, 3, height, width], 4), filter(config, DType::F32));
                assert_eq!(conv2d(&x, &filter).unwrap().dims(), plain(x, &filter).dims());
            }
        }
    }

    #[test]
    fn half_weights_are_widened() {
        let x = ramp([1, 5, 6, 7], 5);
        for dtype in [DType::BF16, DType::F16] {
            for config in [Config::same(5, 9, 3), Config::same(5, 9, 1), Config::halving(5)] {
                let filter = filter(config, dtype);
                assert_direct(&conv2d(&x, &filter).unwrap(), &x, &filter, &format!("{dtype:?} {config:?}"));
            }
        }
    }

    #[test]
    fn strided_pictures_are_read_in_order() {
        let x = ramp([2, 7, 6, 5], 6).swap_dims(1, 3).narrow(2, 1, 4);
        for config in [Config::same(5, 3, 3), Config::same(5, 3, 1), Config::halving(5)] {
            let filter = filter(config, DType::F32);
            assert_direct(&conv2d(&x, &filter).unwrap(), &x, &filter, &format!("{config:?}"));
        }
    }

    #[test]
    fn what_is_not_finite_reaches_the_outputs_that_read_it_and_no_others() {
        let configs = [Config::same(2, 3, 3), Config::same(2, 3, 1), Config::halving(2)];
        for pixel in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
            let mut values = ramp([1, 2, 9, 9], 7).to_data().try_to_vec::<f32>().unwrap();
            values[4 * 9 + 5] = pixel;
            let x = Tensor::<1>::from_floats(values.as_slice(), &cpu()).reshape([1, 2, 9, 9]);
            let check = |actual: Tensor<4>, expected: &[f32], case: &str| {
                let actual = actual.to_data().try_to_vec::<f32>().unwrap();
                let same = |(a, e): (&f32, &f32)| a.is_nan() == e.is_nan() && (e.is_finite() == a.is_finite());
                assert!(actual.iter().zip(expected).all(same), "{pixel} {case}");
                let infinite = actual.iter().zip(expected).filter(|(a, _)| a.is_infinite());
                assert!(infinite.clone().all(|(a, e)| a == e), "{pixel} {case}");
            };
            for level in Level::available() {
                for config in configs {
                    let (case, filter) = (format!("{level:?} {config:?}"), filter(config, DType::F32));
                    check(conv2d_at(level, &x, &filter).unwrap(), &direct(&x, &filter), &case);
                }
                // Four of the largest pixels are too much in f32, though not in the f64 of the direct sum.
                if pixel == f32::MAX {
                    continue;
                }
                limit_cpu(level.instructions());
                let filter = filter(Config::same(2, 3, 3), DType::F32);
                let expected = direct(&upsample_nearest_2x(x.clone()), &filter);
                check(upsampled_or_plain(x.clone(), &filter), &expected, &format!("{level:?}, doubled"));
            }
        }
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        let x = ramp([1, 6, 20, 21], 8);
        let filter = filter(Config::same(6, 130, 3), DType::F32);
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| conv2d(&x, &filter).unwrap().to_data())
        };
        assert_eq!(with(1), with(7));
    }

    #[test]
    fn half_pictures_are_those_of_f32_rounded_once() {
        for dtype in [DType::BF16, DType::F16] {
            for config in [Config::same(5, 9, 3), Config::same(5, 9, 1), Config::halving(5)] {
                let (x, filter) = (ramp([1, 5, 6, 7], 5).cast(dtype), filter(config, dtype));
                let wide = conv2d(&x.clone().cast(DType::F32), &filter).unwrap();
                assert_eq!(conv2d(&x, &filter).unwrap().into_data(), wide.cast(dtype).into_data());
            }
        }
    }

    #[test]
    fn tracked_pictures_of_f16_are_left_to_the_plain_version() {
        let filter = filter(Config::same(2, 3, 3), DType::F32);
        assert!(conv2d(&ramp([1, 2, 4, 4], 9).cast(DType::F16).autodiff(), &filter).is_none());
    }
}
