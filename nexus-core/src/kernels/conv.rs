//! Convolutions: pictures and kernels -> pictures.
