//! One operation on one device, next to itself in f64, where no kernel takes it.

use burn::tensor::{DType, Device, Tensor, TensorData};
use nexus_kernels::testing::{cpu, ramp, relative_drift, scaled_drift, taken_by_kernels};

use crate::operations::{Case, Operation};

/// Largest accepted drifts of a result of the dtype of the first input, and of gradients, which have those of their inputs.
fn tolerances(device: &Device, dtypes: [DType; 2]) -> (f32, [f32; 2]) {
    let [exact, exact_gradients] = if *device == cpu() { [5e-6, 2e-5] } else { [2e-5, 5e-5] };
    match dtypes.map(|dtype| dtype == DType::F32) {
        [true, true] => (exact, [exact_gradients; 2]),
        [true, false] => (exact, [exact_gradients, 2e-2]),
        [false, _] => (1e-2, [2e-2; 2]),
    }
}

/// Compares every case of an operation: results, or gradients of all inputs and of all but one. Kernels take so many of the
/// operations at least, and none in f64.
pub fn check(
    operation: &Operation,
    device: &Device,
    dtypes: [DType; 2],
    gradients: bool,
    least_taken: usize,
) -> Result<(), String> {
    let (of_result, of_gradients) = tolerances(device, dtypes);
    for case in &operation.cases {
        let what = |text: String| format!("{}: {text}", case.name);
        let inputs: Vec<Vec<f32>> =
            case.inputs.iter().enumerate().map(|(i, input)| values(i, input.len, dtypes)).collect();
        let tensors = |device: &Device, dtype: &dyn Fn(usize) -> DType| -> Vec<Tensor<1>> {
            let tensor = |(i, values): (usize, &Vec<f32>)| {
                Tensor::from_data(TensorData::new(values.clone(), [values.len()]), (device, dtype(i)))
            };
            inputs.iter().enumerate().map(tensor).collect()
        };
        let dtype = |i: usize| if case.inputs[i].is_constant { DType::F32 } else { dtypes[usize::from(i > 0)] };
        let here = tensors(device, &dtype);
        let exact = tensors(&cpu(), &|_| DType::F64);
        let count = case.inputs.len();
        let all: Vec<bool> = case.inputs.iter().map(|input| !input.is_constant).collect();
        if !gradients {
            let (expected, none) = taken_by_kernels(|| read((case.run)(exact)));
            let (result, taken) = taken_by_kernels(|| read((case.run)(here.clone())));
            if none != 0 || taken < least_taken {
                return Err(what(format!("kernels took {taken} operations, and {none} in f64")));
            }
            let drift = relative_drift(&result, &expected);
            if drift > of_result || result != read((case.run)(here)) {
                return Err(what(format!("drift {drift:e} of the result, or a second run differs")));
            }
            continue;
        }
        let (expected, expected_gradients) = pass(case, &exact, &all);
        for frozen in 0..count + 1 {
            let tracked: Vec<bool> = all.iter().enumerate().map(|(i, &all)| all && i != frozen).collect();
            if !tracked.contains(&true) {
                continue;
            }
            let ((result, gradients), taken) = taken_by_kernels(|| pass(case, &here, &tracked));
            if taken < least_taken {
                return Err(what(format!("kernels took {taken} operations, forward and backward")));
            }
            let drift = relative_drift(&result, &expected);
            if drift > of_result {
                return Err(what(format!("drift {drift:e} of the result, tracked {tracked:?}")));
            }
            for (i, (gradient, expected)) in gradients.iter().zip(&expected_gradients).enumerate() {
                let Some(gradient) = gradient else {
                    match tracked[i] {
                        true => return Err(what(format!("no gradient of input {i}, tracked {tracked:?}"))),
                        false => continue,
                    }
                };
                let drift = scaled_drift(gradient, expected.as_ref().unwrap());
                if drift > of_gradients[usize::from(i > 0)] {
                    return Err(what(format!("drift {drift:e} of the gradient of input {i}, tracked {tracked:?}")));
                }
            }
        }
    }
    Ok(())
}

/// Numbers that the dtypes have.
fn values(input: usize, len: usize, dtypes: [DType; 2]) -> Vec<f32> {
    let values = ramp([len], input + 1) + 0.05;
    read(values.cast(dtypes[usize::from(input > 0)]))
}

/// The result, and the gradients of the tracked inputs for a gradient of the result that every dtype has.
fn pass(case: &Case, inputs: &[Tensor<1>], tracked: &[bool]) -> (Vec<f32>, Vec<Option<Vec<f32>>>) {
    let leaf = |(input, tracked): (&Tensor<1>, &bool)| {
        let input = Tensor::from_inner(input.clone());
        if *tracked { input.require_grad() } else { input }
    };
    let inputs: Vec<Tensor<1>> = inputs.iter().zip(tracked).map(leaf).collect();
    let result = (case.run)(inputs.clone());
    let plain = result.clone().inner();
    let grad =
        ramp([plain.dims()[0]], 77).cast(DType::BF16).cast(DType::F32).to_device(&plain.device()).cast(plain.dtype());
    let mut all = (result * Tensor::from_inner(grad)).sum().backward();
    let gradients = inputs
        .iter()
        .zip(tracked)
        .map(|(input, tracked)| tracked.then(|| input.grad_remove(&mut all)).flatten().map(read));
    (read(plain), gradients.collect())
}

fn read(tensor: Tensor<1>) -> Vec<f32> {
    tensor.into_data().try_into_vec_as::<f32>().unwrap()
}
