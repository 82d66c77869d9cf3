//! Stored values: names and sizes of dtypes; mapped bytes -> aligned copies, other float dtypes, counts of NaN and
//! infinity.

use std::num::NonZero;

use burn::tensor::{BoolStore, Bytes, DType, TensorData, bf16, f16};
use half::slice::HalfFloatSliceExt;

/// Native booleans: one byte, 0 or 1.
pub(super) const BOOL: DType = DType::Bool(BoolStore::Native);

/// What a file's dtype name means to us.
pub(super) enum Named {
    /// A dtype that burn has.
    Supported(DType),
    /// A dtype that the format defines and burn cannot hold.
    Unsupported,
    /// Not a dtype.
    Unknown,
}

/// Reads a dtype as safetensors spells it.
///
/// Source: safetensors 0.8, `Dtype`.
pub(super) fn dtype_from_name(name: &str) -> Named {
    Named::Supported(match name {
        "F64" => DType::F64,
        "F32" => DType::F32,
        "F16" => DType::F16,
        "BF16" => DType::BF16,
        "I64" => DType::I64,
        "I32" => DType::I32,
        "I16" => DType::I16,
        "I8" => DType::I8,
        "U64" => DType::U64,
        "U32" => DType::U32,
        "U16" => DType::U16,
        "U8" => DType::U8,
        "BOOL" => BOOL,
        "F8_E4M3" | "F8_E5M2" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" | "F6_E2M3" | "F6_E3M2" | "F4" | "C64" => {
            return Named::Unsupported;
        }
        _ => return Named::Unknown,
    })
}

/// Spells a dtype as safetensors does; `None` if the format has no such dtype.
pub(super) fn dtype_name(dtype: DType) -> Option<&'static str> {
    Some(match dtype {
        DType::F64 => "F64",
        DType::F32 | DType::Flex32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        DType::I64 => "I64",
        DType::I32 => "I32",
        DType::I16 => "I16",
        DType::I8 => "I8",
        DType::U64 => "U64",
        DType::U32 => "U32",
        DType::U16 => "U16",
        DType::U8 => "U8",
        DType::Bool(BoolStore::Native) => "BOOL",
        DType::Bool(_) | DType::QFloat(_) => return None,
    })
}

/// Bytes of a tensor; `None` if they cannot be counted.
pub(super) fn num_bytes(shape: &[usize], dtype: DType) -> Option<usize> {
    shape.iter().try_fold(1usize, |product, &side| product.checked_mul(side))?.checked_mul(dtype.size())
}

/// Copies bytes once, to an address that suits elements of `element` bytes.
pub(super) fn copy_aligned(bytes: &[u8], element: usize) -> Bytes {
    match element {
        2 => Bytes::from_elems(bytemuck::pod_collect_to_vec::<u8, u16>(bytes)),
        4 => Bytes::from_elems(bytemuck::pod_collect_to_vec::<u8, u32>(bytes)),
        8 => Bytes::from_elems(bytemuck::pod_collect_to_vec::<u8, u64>(bytes)),
        _ => Bytes::from_elems(bytes.to_vec()),
    }
}

/// Puts strided values in row-major order.
///
/// `bytes` must reach to the last element; `shape` and `strides` have the same length.
pub(super) fn gather(bytes: &[u8], shape: &[usize], strides: &[usize], element: usize) -> Vec<u8> {
    let count: usize = shape.iter().product();
    let mut out = Vec::with_capacity(count * element);
    let mut index = vec![0; shape.len()];
    for _ in 0..count {
        let at: usize = index.iter().zip(strides).map(|(i, stride)| i * stride).sum();
        out.extend_from_slice(&bytes[at * element..(at + 1) * element]);
        for (i, side) in index.iter_mut().zip(shape).rev() {
            *i += 1;
            if *i < *side {
                break;
            }
            *i = 0;
        }
    }
    out
}

/// Converts float data to another float dtype, rounding to nearest even.
///
/// The common pairs are vectorised and use all cores; the others go through burn.
///
/// # Errors
/// What burn says about data that it cannot convert.
pub(super) fn convert(data: TensorData, dtype: DType) -> Result<TensorData, String> {
    if data.dtype() == dtype {
        return Ok(data);
    }
    let shape = data.shape().clone();
    let text = |source: burn::tensor::DataError| source.to_string();
    let converted = match (data.dtype(), dtype) {
        (DType::BF16, DType::F32) => {
            let widen = |x: &bf16| f32::from_bits(u32::from(x.to_bits()) << 16);
            TensorData::new(each_block(data.as_slice::<bf16>().map_err(text)?, |x, out| map(x, out, widen)), shape)
        }
        (DType::F32, DType::BF16) => {
            let narrow = |x: &f32| bf16::from_bits(round_to_bf16(x.to_bits()));
            TensorData::new(each_block(data.as_slice::<f32>().map_err(text)?, |x, out| map(x, out, narrow)), shape)
        }
        (DType::F16, DType::F32) => {
            let widen = |x: &[f16], out: &mut [f32]| x.convert_to_f32_slice(out);
            TensorData::new(each_block(data.as_slice::<f16>().map_err(text)?, widen), shape)
        }
        (DType::F32, DType::F16) => {
            let narrow = |x: &[f32], out: &mut [f16]| out.convert_from_f32_slice(x);
            TensorData::new(each_block(data.as_slice::<f32>().map_err(text)?, narrow), shape)
        }
        _ => data.try_cast(dtype).map_err(text)?,
    };
    Ok(converted)
}

fn map<A, B>(x: &[A], out: &mut [B], f: impl Fn(&A) -> B) {
    for (x, out) in x.iter().zip(out) {
        *out = f(x);
    }
}

/// The upper half of an f32, rounded to nearest even; NaN stays NaN. Without branches, so that it is vectorised.
fn round_to_bf16(bits: u32) -> u16 {
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet_nan = bits >> 16 | 0x40;
    (if bits & 0x7fff_ffff > 0x7f80_0000 { quiet_nan } else { rounded }) as u16
}

/// Fills a vector from blocks of the input, on as many cores as it is worth.
fn each_block<A: Sync, B: Default + Copy + Send>(x: &[A], f: impl Fn(&[A], &mut [B]) + Sync) -> Vec<B> {
    const WORTH_A_THREAD: usize = 1 << 18;
    let mut out = vec![B::default(); x.len()];
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    let block = x.len().div_ceil(threads).max(WORTH_A_THREAD);
    if x.len() <= block {
        f(x, &mut out);
    } else {
        std::thread::scope(|scope| {
            for (x, out) in x.chunks(block).zip(out.chunks_mut(block)) {
                scope.spawn(|| f(x, out));
            }
        });
    }
    out
}

/// Values that are NaN or infinite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NonFinite {
    /// How many there are.
    pub count: usize,
    /// Index of the first; 0 if there is none.
    pub first_index: usize,
}

/// Counts the values that are NaN or infinite; integers and booleans have none.
///
/// `bytes` may be at any address.
pub(super) fn non_finite(bytes: &[u8], dtype: DType) -> NonFinite {
    match dtype {
        DType::F64 => scan(bytes, |b: [u8; 8]| u64::from_le_bytes(b) & 0x7ff0_0000_0000_0000 == 0x7ff0_0000_0000_0000),
        DType::F32 | DType::Flex32 => scan(bytes, |b: [u8; 4]| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000),
        DType::F16 => scan(bytes, |b: [u8; 2]| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        DType::BF16 => scan(bytes, |b: [u8; 2]| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        _ => NonFinite { count: 0, first_index: 0 },
    }
}

fn scan<const N: usize>(bytes: &[u8], is_non_finite: impl Fn([u8; N]) -> bool) -> NonFinite {
    let (values, _) = bytes.as_chunks::<N>();
    // Counting in blocks with a narrow counter lets the compiler keep it in vector registers.
    let count =
        values.chunks(4096).map(|block| block.iter().map(|b| u32::from(is_non_finite(*b))).sum::<u32>() as usize);
    let count = count.sum();
    let first_index = match count {
        0 => 0,
        _ => values.iter().position(|b| is_non_finite(*b)).unwrap_or_default(),
    };
    NonFinite { count, first_index }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn non_finite_values_are_counted_in_every_float_dtype() {
        let values = [1.0f32, f32::MAX, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE];
        let expected = NonFinite { count: 3, first_index: 3 };
        let data = TensorData::new(values.to_vec(), [values.len()]);
        assert_eq!(non_finite(data.as_bytes(), DType::F32), expected);
        assert_eq!(non_finite(data.clone().try_cast(DType::F64).unwrap().as_bytes(), DType::F64), expected);
        let small = TensorData::new(vec![1.0f32, 2.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.5], [7]);
        for dtype in [DType::F16, DType::BF16] {
            assert_eq!(non_finite(convert(small.clone(), dtype).unwrap().as_bytes(), dtype), expected);
        }
        assert_eq!(non_finite(&[0xff; 16], DType::I32).count, 0);
        let clean = vec![0u8; 4 * 10_000];
        assert_eq!(non_finite(&clean, DType::F32), NonFinite { count: 0, first_index: 0 });
    }

    #[test]
    fn conversion_agrees_with_burn() {
        // Every exponent with mantissas on both sides of every rounding decision, NaN aside, and a large tensor.
        let edges = (0..=0xffffu32).flat_map(|high| [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| high << 16 | low));
        let edges: Vec<f32> = edges.map(f32::from_bits).filter(|x| !x.is_nan()).collect();
        let large: Vec<f32> = (0..700_001).map(|i| (i as f32 - 350_000.0) * 0.37).collect();
        for values in [edges, large] {
            let len = values.len();
            let f32s = TensorData::new(values, [1, len]);
            for dtype in [DType::BF16, DType::F16, DType::F64] {
                let ours = convert(f32s.clone(), dtype).unwrap();
                assert!(ours == f32s.clone().try_cast(dtype).unwrap(), "{dtype:?}");
                assert!(convert(ours.clone(), DType::F32).unwrap() == ours.try_cast(DType::F32).unwrap(), "{dtype:?}");
            }
        }
        let nan = TensorData::new(vec![f32::NAN, f32::from_bits(0x7f80_0001)], [2]);
        assert!(convert(nan, DType::BF16).unwrap().as_slice::<bf16>().unwrap().iter().all(|x| x.is_nan()));
    }

    #[test]
    fn gather_transposes() {
        // Stored [3, 2], read as its transpose [2, 3].
        assert_eq!(gather(&[1, 2, 3, 4, 5, 6], &[2, 3], &[1, 2], 1), [1, 3, 5, 2, 4, 6]);
        assert!(gather(&[], &[0, 3], &[1, 2], 1).is_empty());
    }
}
