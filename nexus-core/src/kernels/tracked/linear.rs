//! Linear layers with their backward pass: tracked rows and weights -> rows.

use burn::tensor::Tensor;

use super::{
    super::{Level, View, level::with_level, rows::map_rows, wrap},
    Operand, gradient, parents, record,
    sums::column_sums,
};

/// `x Wᵀ + b`; the products are the backend's threaded ones on transposed views, over all rows at once.
///
/// # Shapes
/// As the plain kernel's.
pub(in super::super) fn linear<const D: usize>(
    x: &Tensor<D>,
    weight: &Tensor<2>,
    bias: Option<&Tensor<1>>,
) -> Option<Tensor<D>> {
    let (x, weight) = (Operand::of(x)?, Operand::of(weight)?);
    let bias = match bias {
        Some(bias) => Some(Operand::of(bias)?),
        None => None,
    };
    let ([outputs, inputs], shape) = (weight.value.dims(), x.value.dims());
    assert_eq!(shape[D - 1], inputs, "width of the input of a linear layer");
    let rows = shape.iter().product::<usize>() / inputs.max(1);
    if rows == 0 || inputs == 0 || outputs == 0 {
        return None;
    }
    let mut result_shape = shape;
    result_shape[D - 1] = outputs;
    let flat: Tensor<2> = x.value.clone().reshape([rows, inputs]);
    let mut result = flat.clone().matmul(weight.value.clone().transpose());
    if let Some(bias) = &bias {
        result = add_to_rows(result, &bias.value);
    }
    let result = result.reshape(result_shape);
    let kept = weight.value.clone();
    let with_weight = weight.tracked.then_some(flat);
    let backward = move |upstream: Tensor<D>, of_x: bool, of_weight: bool, of_bias: bool| {
        let upstream: Tensor<2> = upstream.reshape([rows, outputs]);
        let x = of_x.then(|| gradient(upstream.clone().matmul(kept.clone()).reshape(shape)));
        let weight = with_weight.as_ref().filter(|_| of_weight);
        let weight = weight.map(|x| gradient(upstream.clone().transpose().matmul(x.clone())));
        let bias = of_bias.then(|| gradient(sum_rows(&upstream)));
        (x, weight, bias)
    };
    Some(match bias {
        Some(bias) => record(parents![x, weight, bias], result, move |upstream, [of_x, of_weight, of_bias]| {
            let (x, weight, bias) = backward(upstream, of_x, of_weight, of_bias);
            [x, weight, bias]
        }),
        None => record(parents![x, weight], result, move |upstream, [of_x, of_weight]| {
            let (x, weight, _) = backward(upstream, of_x, of_weight, false);
            [x, weight]
        }),
    })
}

fn add_to_rows(rows: Tensor<2>, bias: &Tensor<1>) -> Tensor<2> {
    let [_, width] = rows.dims();
    let level = Level::detect();
    let view = View::f32(bias).map(View::into_contiguous);
    let Some(addends) = view.as_ref().and_then(|view| view.contiguous::<f32>()) else {
        return rows + bias.clone().unsqueeze();
    };
    let added = map_rows(rows, |_, values| {
        with_level!(
            level,
            fn run(values: &mut [f32], width: usize, addends: &[f32]) {
                for row in values.chunks_exact_mut(width) {
                    for (value, addend) in row.iter_mut().zip(addends) {
                        *value += addend;
                    }
                }
            }
        );
    });
    added.unwrap_or_else(|rows| rows + bias.clone().unsqueeze())
}

fn sum_rows(rows: &Tensor<2>) -> Tensor<1> {
    let [_, width] = rows.dims();
    let view = View::f32(rows).map(View::into_contiguous);
    match view.as_ref().and_then(|view| view.contiguous::<f32>()) {
        Some(values) => wrap(column_sums(values, width), [width]),
        None => rows.clone().sum_dim(0).reshape([width]),
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::module;

    use super::*;
    use crate::kernels::tracked::tests::check;

    #[test]
    fn gradients_are_those_of_the_plain_formulation() {
        for [batch, rows, inputs, outputs] in
            [[1, 1, 1, 1], [1, 1, 7, 5], [2, 3, 17, 13], [3, 50, 64, 48], [1, 97, 31, 101]]
        {
            let inner = [[batch, rows, inputs], [outputs, inputs, 1], [outputs, 1, 1]];
            check(
                inner,
                |[x, weight, bias]| {
                    let (weight, bias) = (weight.reshape([outputs, inputs]), bias.reshape([outputs]));
                    linear(&x, &weight, Some(&bias)).unwrap()
                },
                |[x, weight, bias]| {
                    let (weight, bias) = (weight.reshape([outputs, inputs]), bias.reshape([outputs]));
                    module::linear(x, weight.transpose(), Some(bias))
                },
            );
        }
    }

    #[test]
    fn strided_inputs_and_no_bias() {
        check(
            [[4, 3, 9], [5, 4, 1]],
            |[x, weight]| linear(&x.swap_dims(0, 2).narrow(0, 2, 5), &weight.reshape([5, 4]), None).unwrap(),
            |[x, weight]| {
                let weight: Tensor<2> = weight.reshape([5, 4]);
                module::linear(x.swap_dims(0, 2).narrow(0, 2, 5), weight.transpose(), None)
            },
        );
    }
}
