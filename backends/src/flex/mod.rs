//! Kernels for the CPU, on plain slices.

pub mod attend;
pub mod element;
mod gelu;
mod lanes;
pub mod linear;
mod ops;
mod output;
#[cfg(test)]
mod tests;
