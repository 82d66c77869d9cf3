//! Quantised weights of linear layers: floats -> small integers, with one scale for every few inputs of an output.

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{
        DType, Tensor,
        quantization::{QuantScheme, QuantStore, QuantValue, ScaleDtype, params_shape},
    },
};
use serde::{Deserialize, Serialize};

/// Largest and smallest number of inputs that share a scale; the smallest fills 32 bits with weights of 4.
const BLOCKS: [usize; 2] = [32, 8];

/// How the weights of linear layers are kept on a device; they become floats again layer by layer, as they are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantization {
    /// 8 bits a weight, and 1 for its share of the scale.
    Q8,
    /// 4 bits a weight, and 1 for its share of the scale; on a CPU no fewer than with 8 bits.
    Q4,
}

impl Quantization {
    /// How burn keeps a weight `[out, in]`: symmetric, packed into words of 32 bits, which every device has, with an f32
    /// scale for every 32 inputs, or for 16 or 8 if `inputs` is no multiple of 32; `None` if it is no multiple of 8.
    pub fn scheme(self, inputs: usize) -> Option<QuantScheme> {
        let [largest, smallest] = BLOCKS;
        let block = 1 << inputs.trailing_zeros().min(largest.trailing_zeros());
        let value = match self {
            Self::Q8 => QuantValue::Q8S,
            Self::Q4 => QuantValue::Q4S,
        };
        let scheme = QuantScheme::default().with_value(value).per_block([1, block as u8], ScaleDtype::F32);
        (block >= smallest && inputs > 0).then_some(scheme)
    }

    /// A weight `[out, in]` in fewer bits; as it is if it has no scheme.
    pub fn quantize<const D: usize>(self, weight: Tensor<D>) -> Tensor<D> {
        match self.scheme(weight.dims()[D - 1]) {
            Some(scheme) => weight.quantize_dynamic(&scheme),
            None => weight,
        }
    }
}

/// Bytes of the float and quantised weights of a module, scales included; lazy ones are made by this.
pub fn weight_bytes(module: &impl Module) -> usize {
    let mut counter = Counter(0);
    module.visit(&mut counter);
    counter.0
}

struct Counter(usize);

impl ModuleVisitor for Counter {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let (shape, dtype) = (param.base().shape(), param.base().dtype());
        let values = shape.num_elements();
        self.0 += match dtype {
            DType::QFloat(scheme) => {
                let scales = params_shape(&shape, &scheme).num_elements();
                // A CPU keeps one weight in a byte, however few of its bits are used.
                let bits = if scheme.store == QuantStore::Native { 8 } else { scheme.size_bits_value() };
                values * bits / 8 + scales * size_of::<f32>()
            }
            _ => values * dtype.size(),
        };
    }
}
