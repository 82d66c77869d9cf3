//! The operations and the shapes that they are tested with: rows of a name, inputs as flat values, and what is done.

use std::sync::Arc;

use burn::tensor::Tensor;
use nexus_kernels::{
    Attention, Filter, GroupNormOptions, RotaryTable, Visibility, affine_layer_norm, attention, cat, conv2d,
    gated_residual, gelu, gelu_tanh, gelu_tanh_mul, group_norm, layer_norm, linear, matmul, modulate, quick_gelu,
    rms_norm, rotate_half, rotate_interleaved, silu, silu_mul, split, upsample_conv2d,
};

/// An operation with its cases.
#[derive(Clone)]
pub struct Operation {
    pub name: &'static str,
    /// Whether inputs after the first may have another dtype.
    pub has_weights: bool,
    pub cases: Vec<Case>,
}

/// Values of one input.
#[derive(Clone, Copy)]
pub struct Input {
    pub len: usize,
    /// In f32 and without gradient.
    pub is_constant: bool,
}

#[derive(Clone)]
pub struct Case {
    pub name: String,
    pub inputs: Vec<Input>,
    pub run: Arc<dyn Fn(Vec<Tensor<1>>) -> Tensor<1> + Send + Sync>,
}

fn case<const N: usize>(
    name: impl std::fmt::Debug,
    lens: [usize; N],
    run: impl Fn([Tensor<1>; N]) -> Tensor<1> + Send + Sync + 'static,
) -> Case {
    let run = move |inputs: Vec<Tensor<1>>| match inputs.try_into() {
        Ok(inputs) => run(inputs),
        Err(_) => unreachable!("as many as there are lengths"),
    };
    let inputs = lens.map(|len| Input { len, is_constant: false }).to_vec();
    Case { name: format!("{name:?}"), inputs, run: Arc::new(run) }
}

impl Case {
    /// The same with inputs from one on that are constants.
    fn with_constants_from(mut self, first: usize) -> Self {
        self.inputs[first..].iter_mut().for_each(|input| input.is_constant = true);
        self
    }
}

fn flat<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    x.flatten(0, D - 1)
}

fn operation(name: &'static str, cases: Vec<Case>) -> Operation {
    Operation { name, has_weights: false, cases }
}

fn with_weights(name: &'static str, cases: Vec<Case>) -> Operation {
    Operation { name, has_weights: true, cases }
}

pub fn all() -> Vec<Operation> {
    [products(), activations(), norms(), rotations(), mixes(), pictures(), joins()].concat()
}

fn products() -> Vec<Operation> {
    const LAYERS: [[usize; 4]; 8] = [
        [1, 1, 1, 1],
        [1, 1, 7, 5],
        [2, 3, 33, 17],
        [1, 1, 256, 130],
        [3, 50, 64, 48],
        [1, 130, 64, 40],
        [3, 50, 136, 129],
        [1, 97, 31, 101],
    ];
    let layers = LAYERS.map(|[batch, rows, inputs, outputs]| {
        let name = [batch, rows, inputs, outputs];
        case(name, [batch * rows * inputs, outputs * inputs, outputs], move |[x, weight, bias]| {
            flat(linear::<3>(x.reshape([batch, rows, inputs]), weight.reshape([outputs, inputs]), Some(bias)))
        })
    });
    let strided = case("strided, without bias", [4 * 3 * 9, 5 * 4], |[x, weight]| {
        let x: Tensor<3> = x.reshape([4, 3, 9]).swap_dims(0, 2).narrow(0, 2, 5);
        flat(linear(x, weight.reshape([5, 4]), None))
    });
    let matrices = [[1, 1, 1, 1], [1, 1, 64, 5], [2, 3, 17, 13], [3, 50, 64, 48], [1, 140, 129, 131]];
    let matrices = matrices.map(|[batch, m, k, n]| {
        case([batch, m, k, n], [batch * m * k, batch * k * n], move |[left, right]| {
            let right: Tensor<3> = right.reshape([batch, n, k]).swap_dims(1, 2);
            flat(matmul(left.reshape([batch, m, k]), right))
        })
    });
    vec![with_weights("linear", layers.into_iter().chain([strided]).collect()), operation("matmul", matrices.into())]
}

/// Batches, tokens and widths.
const ROWS: [[usize; 3]; 5] = [[1, 1, 1], [2, 5, 7], [1, 13, 131], [3, 100, 67], [2, 19, 1280]];

fn activations() -> Vec<Operation> {
    type Activation = fn(Tensor<3>) -> Tensor<3>;
    type Product = fn(Tensor<3>, Tensor<3>) -> Tensor<3>;
    let activations: [(&str, Activation); 4] =
        [("silu", silu), ("gelu", gelu), ("gelu_tanh", gelu_tanh), ("quick_gelu", quick_gelu)];
    let products: [(&str, Product); 2] = [("silu_mul", silu_mul), ("gelu_tanh_mul", gelu_tanh_mul)];
    let mut operations = vec![];
    for (name, activation) in activations {
        let cases = ROWS.map(|shape| {
            let [batch, tokens, width] = shape;
            case(shape, [batch * tokens * width], move |[x]| {
                flat(activation(x.reshape([tokens, batch, width]).swap_dims(0, 1) * 3.0))
            })
        });
        operations.push(operation(name, cases.into()));
    }
    for (name, product) in products {
        let cases = ROWS.map(|shape| {
            let [batch, tokens, width] = shape;
            case(shape, [batch * tokens * width, batch * tokens * (width + 3)], move |[x, y]| {
                let y: Tensor<3> = y.reshape([batch, tokens, width + 3]).narrow(2, 2, width);
                flat(product(x.reshape([tokens, batch, width]).swap_dims(0, 1), y))
            })
        });
        operations.push(operation(name, cases.into()));
    }
    let cases = ROWS.map(|shape| {
        let [batch, tokens, width] = shape;
        let len = batch * tokens * width;
        case(shape, [len, batch * 3 * width, len], move |[x, gate, y]| {
            let gate: Tensor<3> = gate.reshape([batch, 1, 3 * width]).narrow(2, width, width);
            flat(gated_residual(x.reshape(shape), gate, y.reshape(shape)))
        })
    });
    operations.push(operation("gated_residual", cases.into()));
    operations
}

const EPSILON: f64 = 1e-3;

fn norms() -> Vec<Operation> {
    let rows = |x: Tensor<1>, [batch, tokens, width]: [usize; 3]| -> Tensor<3> {
        x.reshape([tokens, batch, width]).swap_dims(0, 1)
    };
    let rms = ROWS.map(|shape| {
        let [batch, tokens, width] = shape;
        case(shape, [batch * tokens * width, width], move |[x, weight]| flat(rms_norm(rows(x, shape), weight, EPSILON)))
    });
    let heads = case("heads where they lie", [2 * 9 * 15 * 16, 16], |[x, weight]| {
        let heads: Tensor<4> = x.reshape([2, 9, 15, 16]).narrow(2, 5, 5);
        flat(rms_norm(heads, weight, EPSILON))
    });
    let wide = ROWS.into_iter().filter(|[.., width]| *width > 1);
    let layer = wide
        .clone()
        .map(|shape| case(shape, [shape.iter().product()], move |[x]| flat(layer_norm(rows(x, shape), EPSILON))));
    let affine = wide.clone().map(|shape| {
        let [batch, tokens, width] = shape;
        case(shape, [batch * tokens * width, width, width], move |[x, weight, bias]| {
            flat(affine_layer_norm(rows(x, shape), weight, bias, EPSILON))
        })
    });
    let modulated = wide.map(|shape| {
        let [batch, tokens, width] = shape;
        case(shape, [batch * tokens * width, batch * width, batch * width], move |[x, shift, scale]| {
            let vector = |vector: Tensor<1>| vector.reshape([batch, 1, width]);
            flat(modulate(rows(x, shape), vector(shift), vector(scale), EPSILON))
        })
    });
    let groups = |silu: bool| {
        let shapes = [([1, 1, 1, 2], 1), ([2, 6, 3, 5], 3), ([1, 4, 37, 29], 2), ([2, 4, 64, 80], 4)];
        let cases = shapes.map(|(shape, num_groups)| {
            let [batch, channels, height, width] = shape;
            case(shape, [batch * channels * height * width, channels, channels], move |[x, weight, bias]| {
                let x: Tensor<4> = x.reshape([batch, height, width, channels]).permute([0, 3, 1, 2]);
                flat(group_norm(x, &GroupNormOptions { weight, bias, num_groups, epsilon: EPSILON, silu }))
            })
        });
        with_weights(if silu { "group_norm with silu" } else { "group_norm" }, cases.into())
    };
    vec![
        with_weights("rms_norm", rms.into_iter().chain([heads]).collect()),
        operation("layer_norm", layer.collect()),
        with_weights("affine_layer_norm", affine.collect()),
        operation("modulate", modulated.collect()),
        groups(false),
        groups(true),
    ]
}

fn rotations() -> Vec<Operation> {
    type Rotation = fn(Tensor<4>, &RotaryTable) -> Tensor<4>;
    let rotations: [(&str, Rotation); 2] = [("rotate_half", rotate_half), ("rotate_interleaved", rotate_interleaved)];
    let operations = rotations.map(|(name, rotation)| {
        let shapes = [[1, 1, 1, 1], [2, 5, 3, 8], [1, 7, 2, 17], [1, 131, 5, 64]];
        let cases = shapes.map(|shape| {
            let [batch, tokens, heads, pairs] = shape;
            let run = move |[x, cos, sin]: [Tensor<1>; 3]| {
                let table = RotaryTable { cos: cos.reshape([1, tokens, pairs]), sin: sin.reshape([1, tokens, pairs]) };
                let x: Tensor<4> = x.reshape([batch, heads, tokens, 2 * pairs]).swap_dims(1, 2);
                flat(rotation(x, &table))
            };
            case(shape, [batch * tokens * heads * 2 * pairs, tokens * pairs, tokens * pairs], run)
                .with_constants_from(1)
        });
        operation(name, cases.into())
    });
    operations.into()
}

fn mixes() -> Vec<Operation> {
    /// Batch, queries, keys, key/value heads, query heads of each, and width.
    fn mix(shape: [usize; 6], visibility: Visibility<'static>, with_bias: bool) -> Case {
        let [batch, queries, keys, kv_heads, group, width] = shape;
        let heads = kv_heads * group;
        let lens = [batch * queries * heads * width, batch * keys * kv_heads * width, batch * keys * kv_heads * width];
        let run = move |[q, k, v]: [Tensor<1>; 3], bias: Option<Tensor<1>>| {
            // Heads first, so that the inputs are read through strides.
            let part = |x: Tensor<1>, tokens: usize, heads: usize| -> Tensor<4> {
                x.reshape([batch, heads, tokens, width]).swap_dims(1, 2)
            };
            let bias = bias.map(|bias| bias.reshape([1, heads, queries, keys]));
            let options = Attention { visibility, bias, scale: None };
            flat(attention(
                part(q * 2.0, queries, heads),
                part(k * 2.0, keys, kv_heads),
                part(v, keys, kv_heads),
                options,
            ))
        };
        match with_bias {
            false => case(shape, lens, move |qkv| run(qkv, None)),
            true => case(shape, [lens[0], lens[1], lens[2], heads * queries * keys], move |[q, k, v, bias]| {
                run([q, k, v], Some(bias))
            })
            .with_constants_from(3),
        }
    }
    let full = [[1, 1, 1, 1, 1, 5], [2, 5, 7, 2, 1, 8], [1, 13, 67, 2, 3, 17], [2, 31, 150, 1, 2, 32]];
    let causal = [[1, 1, 5, 1, 1, 6], [2, 7, 7, 2, 2, 8], [1, 29, 53, 1, 3, 16], [1, 101, 290, 1, 1, 10]];
    const SEGMENTS: Visibility<'static> = Visibility::Segments(&[0, 1, 18, 41]);
    vec![
        operation("attention", full.map(|shape| mix(shape, Visibility::All, false)).into()),
        operation("causal attention", causal.map(|shape| mix(shape, Visibility::Causal, false)).into()),
        operation("attention in segments", vec![mix([1, 41, 41, 2, 2, 8], SEGMENTS, false)]),
        operation("attention with bias", full.map(|shape| mix(shape, Visibility::All, true)).into()),
    ]
}

fn pictures() -> Vec<Operation> {
    let shapes = [
        ([1, 1, 1, 1, 1], 1, 1, (0, 0)),
        ([2, 3, 5, 7, 9], 3, 1, (1, 1)),
        ([1, 4, 4, 33, 19], 3, 1, (1, 1)),
        ([2, 5, 3, 6, 11], 1, 1, (0, 0)),
        ([2, 3, 4, 8, 6], 3, 2, (0, 1)),
        ([1, 2, 7, 9, 7], 3, 2, (1, 1)),
        ([1, 3, 6, 8, 8], 4, 4, (0, 0)),
        ([1, 2, 3, 9, 10], 5, 1, (2, 2)),
    ];
    let convolutions = shapes.map(|(shape, kernel, stride, padding)| {
        let [batch, inputs, outputs, height, width] = shape;
        let lens = [batch * inputs * height * width, outputs * inputs * kernel * kernel, outputs];
        case((shape, kernel, stride, padding), lens, move |[x, weight, bias]| {
            // Rows and columns swapped, so that the picture is read through strides.
            let x: Tensor<4> = x.reshape([batch, inputs, width, height]).swap_dims(2, 3);
            let weight = weight.reshape([outputs, inputs, kernel, kernel]);
            flat(conv2d(x, &Filter { weight, bias, stride, padding }))
        })
    });
    let doubled = [[1, 1, 1, 1, 1], [2, 3, 5, 4, 7]].map(|shape| {
        let [batch, inputs, outputs, height, width] = shape;
        case(shape, [batch * inputs * height * width, outputs * inputs * 9, outputs], move |[x, weight, bias]| {
            let weight = weight.reshape([outputs, inputs, 3, 3]);
            let x: Tensor<4> = x.reshape([batch, inputs, height, width]);
            flat(upsample_conv2d(x, &Filter { weight, bias, stride: 1, padding: (1, 1) }))
        })
    });
    vec![with_weights("conv2d", convolutions.into()), with_weights("upsample_conv2d", doubled.into())]
}

fn joins() -> Vec<Operation> {
    let shapes = [(0, [[2, 3, 5], [1, 3, 5]]), (1, [[2, 3, 5], [2, 4, 5]]), (2, [[2, 3, 5], [2, 3, 1]])];
    let cats = shapes.map(|(dim, [first, second])| {
        let lens = [first.iter().product(), second.iter().product()];
        case((dim, first, second), lens, move |[x, y]| {
            flat(silu(cat::<3>(vec![x.reshape(first), y.reshape(second)], dim)))
        })
    });
    // Parts that are used once, often or not at all.
    let splits = [(0, [1, 2, 1, 3]), (1, [2, 2, 1, 2]), (2, [1, 1, 4, 1])].map(|(dim, sizes)| {
        case((dim, sizes), [7 * 7 * 7], move |[x]| {
            let [first, second, third, _] = split::<3, 4>(x.reshape([7, 7, 7]), dim, sizes);
            let sums = first.sum_dim(dim) * second.clone().sum_dim(dim);
            flat(silu(sums + second.sum_dim(dim) * third.sum_dim(dim)))
        })
    });
    vec![operation("cat", cats.into()), operation("split", splits.into())]
}
