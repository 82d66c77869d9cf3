//! What becomes of a part of a request that failed: an error or a panic -> an error that says whether the device is to
//! blame, with its memory freed if it is.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    thread,
};

use burn::tensor::Device;
use nexus_ar::ArError;

use crate::{
    Error,
    device::{panic_text, probe},
    stages::Stages,
};

/// What ended a part of a request: an error, or a panic of a backend or of the observer.
enum Failure {
    Error(Error),
    Panic(Box<dyn Any + Send>),
}

impl Stages {
    /// Runs a part of a request that computes; if the device fails, every stage and every prompt that was kept is freed.
    pub(crate) fn run<T>(&self, part: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        diagnose(&self.device, || self.unload(), catch_unwind(AssertUnwindSafe(part)))
    }
}

/// The result of a part of a request.
///
/// A device that failed may hold tensors that were never written, and has no memory to spare: `free` lets go of what is
/// kept there. If it does not compute any more after that, this is the error. Panics that say that memory was not enough
/// are errors; others go on.
pub fn diagnose<T>(device: &Device, free: impl FnOnce(), result: thread::Result<Result<T, Error>>) -> Result<T, Error> {
    let failure = match result {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(Error::Cancelled)) => return Err(Error::Cancelled),
        Ok(Err(error)) => Failure::Error(error),
        Err(panic) => Failure::Panic(panic),
    };
    let reason = match &failure {
        Failure::Error(
            Error::Read { reason }
            | Error::OutOfDeviceMemory { reason, .. }
            | Error::Ar(ArError::Device { reason, .. }),
        ) => Some(reason.clone()),
        Failure::Error(_) => None,
        Failure::Panic(panic) => Some(panic_text(&**panic)),
    };
    let mut out_of_memory = None;
    if let Some(reason) = reason {
        // Before anything is freed, so that it says what there was.
        let error = Error::of_device(reason, device);
        out_of_memory = matches!(error, Error::OutOfDeviceMemory { .. }).then_some(error);
        // A lost device may panic when its memory is freed.
        let _ = catch_unwind(AssertUnwindSafe(free));
    }
    if let Err(reason) = probe(device)
        && !matches!(Error::of_device(reason.clone(), device), Error::OutOfDeviceMemory { .. })
    {
        return Err(Error::DeviceLost { reason });
    }
    match (failure, out_of_memory) {
        (Failure::Error(error @ Error::OutOfDeviceMemory { .. }), _) | (_, Some(error)) => Err(error),
        (Failure::Error(error), None) => Err(error),
        (Failure::Panic(panic), None) => resume_unwind(panic),
    }
}
