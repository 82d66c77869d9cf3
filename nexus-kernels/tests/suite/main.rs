//! Every operation on every device, in every dtype, over odd shapes, forward and backward, against the plain formulation in
//! f64.
//!
//! A new operation is a row of [`operations`], a new device or dtype one of the lists here. What a device cannot do is in
//! [`skipped`], with the reason, and is reported as ignored.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

mod compare;
mod operations;

use burn::tensor::{DType, Device};
use libtest_mimic::{Arguments, Trial};
use nexus_kernels::testing::{CpuLevel, cpu, device, limit_cpu};

use operations::Operation;

/// Where operations run.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    /// The CPU with instructions of no higher level.
    Cpu(CpuLevel),
    /// The GPU that `BURN_DEVICE` names.
    Gpu,
}

impl Place {
    fn all() -> Vec<Self> {
        CpuLevel::available().map(Self::Cpu).chain([Self::Gpu]).collect()
    }

    fn device(self) -> Device {
        match self {
            Self::Cpu(level) => {
                limit_cpu(level);
                cpu()
            }
            Self::Gpu => device(),
        }
    }
}

/// Dtypes of the first input and of the others.
const DTYPES: [[DType; 2]; 5] = [
    [DType::F32; 2],
    [DType::BF16; 2],
    [DType::F16; 2],
    // Weights as stored, and those of an optimizer.
    [DType::F32, DType::BF16],
    [DType::BF16, DType::F32],
];

/// Why something is not tested, if it is not.
fn skipped(place: Place, dtypes: [DType; 2]) -> Option<&'static str> {
    match place {
        Place::Gpu if device() == cpu() => Some("BURN_DEVICE names no GPU"),
        Place::Cpu(_) if device() != cpu() => Some("the CPU is tested without BURN_DEVICE"),
        Place::Gpu if dtypes.iter().any(|&dtype| !device().supports_dtype(dtype)) => Some("the GPU has no such dtype"),
        _ => None,
    }
}

/// What no kernel does on a device, but burn's operations: how many operations kernels take at least, forward and backward.
fn least_taken(operation: &Operation, place: Place, dtypes: [DType; 2], gradients: bool) -> usize {
    let is_gpu = place == Place::Gpu;
    match operation.name {
        // The product of two activations is rare on a CPU.
        "matmul" if !is_gpu => 0,
        // Nothing trains in f16 on a CPU, nor a bias of scores anywhere.
        _ if !is_gpu && gradients && dtypes.contains(&DType::F16) => 0,
        "attention with bias" if gradients => 0,
        // A picture's norm is a small part of a step.
        "group_norm" | "group_norm with silu" if is_gpu && gradients => 1,
        _ => 1 + usize::from(gradients),
    }
}

fn main() {
    let mut trials = vec![];
    for operation in operations::all() {
        for (place, dtypes) in Place::all().into_iter().flat_map(|place| DTYPES.map(|dtypes| (place, dtypes))) {
            if dtypes[0] != dtypes[1] && !operation.has_weights {
                continue;
            }
            for gradients in [false, true] {
                let least = least_taken(&operation, place, dtypes, gradients);
                let is_burns = gradients && least == 0 && dtypes != [DType::F32; 2];
                let reason =
                    skipped(place, dtypes).or(is_burns.then_some("burn's operations, which round after every step"));
                let what = if gradients { "gradients" } else { "result" };
                let name = format!("{} / {place:?} / {:?} and {:?} / {what}", operation.name, dtypes[0], dtypes[1]);
                let name = reason.map_or(name.clone(), |reason| format!("{name} ({reason})"));
                let operation = operation.clone();
                let run =
                    move || compare::check(&operation, &place.device(), dtypes, gradients, least).map_err(Into::into);
                trials.push(Trial::test(name, run).with_ignored_flag(reason.is_some()));
            }
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
