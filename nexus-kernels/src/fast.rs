//! Whether a kernel took the tensors of an operation, counted for tests.

/// What a kernel made, if it took the tensors.
pub(crate) fn fast<T>(made: Option<T>) -> Option<T> {
    if made.is_some() {
        count();
    }
    made
}

/// What a kernel made, or what is made of the tensors that it gave back.
pub(crate) fn fast_or<T, B>(made: Result<T, B>, plain: impl FnOnce(B) -> T) -> T {
    match made {
        Ok(made) => {
            count();
            made
        }
        Err(back) => plain(back),
    }
}

/// One more operation that a kernel took.
pub(crate) fn count() {
    #[cfg(any(test, feature = "testing"))]
    TAKEN.set(TAKEN.get() + 1);
}

#[cfg(any(test, feature = "testing"))]
thread_local! {
    /// Operations of this thread that kernels took.
    static TAKEN: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Operations that kernels took, forward or backward, while this thread ran something.
#[cfg(any(test, feature = "testing"))]
pub fn taken_by_kernels<T>(run: impl FnOnce() -> T) -> (T, usize) {
    let before = TAKEN.get();
    let result = run();
    (result, TAKEN.get() - before)
}
