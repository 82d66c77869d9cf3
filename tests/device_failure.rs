//! What a failing device says, and that it goes on: on the CPU, or on the device that `BURN_DEVICE` names.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may panic")]

use burn::tensor::Tensor;
use nexus_core::{
    failure_reason,
    testing::{cpu, device},
};

#[test]
fn too_little_memory_is_a_reason_with_what_is_held_and_the_device_stays_usable() {
    let device = device();
    if device == cpu() {
        // A CPU has as much memory as the system grants, and keeps no count of it.
        assert_eq!(failure_reason(&"out of memory", &device), "out of memory");
        return;
    }
    let kept = Tensor::<1>::ones([1 << 22], &device);
    let error = Tensor::<1>::ones([1usize << 40], &device).try_into_data().unwrap_err();
    let reason = failure_reason(&error, &device);
    assert!(reason.contains(&(1u64 << 42).to_string()), "bytes asked for: {reason}");
    let held = reason.split("the device holds ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    assert!(held.parse::<u64>().unwrap() >= 16, "{reason}");
    assert_eq!(kept.sum().into_data().try_into_vec_as::<f32>().unwrap(), [(1 << 22) as f32]);
}
