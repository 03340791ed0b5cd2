//! The devices that [`gpt2-burn`](https://docs.rs/gpt2-burn) runs on.
//!
//! Which burn backend computes is decided by the [`Device`] that a tensor lives on. This crate turns the names that
//! users type into devices, checks what a device can hold, and is the place for everything that is specific to one
//! backend.
//!
//! ```
//! # #[cfg(feature = "flex")] {
//! let device = gpt2_burn_backends::device("flex").unwrap();
//! assert!(gpt2_burn_backends::device("abacus").is_err());
//! # }
//! ```

#![deny(clippy::print_stdout, clippy::print_stderr)]

mod cached;
mod capabilities;
mod captured;
#[cfg(feature = "cube")]
mod cube;
mod devices;
mod elements;
#[cfg(feature = "flex")]
mod flex;
mod matrix;
mod metadata;
#[cfg_attr(not(any(feature = "flex", feature = "cube")), allow(unused_variables))]
// nothing is dispatched to where there is no backend
mod ops;
mod paged;
#[cfg(all(test, feature = "flex"))]
mod paged_tests;
mod pages;
mod rows;
#[cfg(all(test, feature = "flex"))]
mod tests;
mod threads;

use burn::tensor::{DType, Device};

pub use cached::{append, attend};
pub use capabilities::{
    allow_fast_f32, has_kernels, has_page_kernels, is_asynchronous, is_fast_f32_allowed, kernels_launched,
    largest_buffer, max_rows,
};
pub use captured::CapturedStep;
pub use devices::{available, check_dtype, describe, device};
pub use matrix::{PackedMatrix, WeightFormat};
pub use metadata::{AttentionMetadata, PackedRow, RowGroup};
pub use ops::{Gelu, Gpt2Ops};
pub use paged::{PagedRow, append_pages, attend_pages, copy_pages, int8_width, new_pages, read_pages};
pub use rows::{DecodeState, advance, argmax, layer_norm};
pub use threads::Threads;

/// A device that cannot be had, or cannot do what is asked of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// No device has this name.
    #[error("there is no device `{name}` (this program was built with: {})", .available.join(", "))]
    Unknown {
        /// The name as given.
        name: String,
        /// The names that this build knows.
        available: Vec<&'static str>,
    },

    /// The device exists, but was not compiled in.
    #[error("the device `{name}` is not compiled in: build with `--features {feature}`")]
    NotCompiledIn {
        /// The name as given.
        name: String,
        /// The cargo feature that adds it.
        feature: &'static str,
    },

    /// The device is compiled in, but this machine does not have it, or no driver for it.
    #[error("the device `{name}` is not available on this machine: {reason}")]
    Unavailable {
        /// The name as given.
        name: String,
        /// What was missing.
        reason: String,
    },

    /// The device cannot compute in this element type.
    #[error("the device `{device}` does not support {dtype:?}")]
    DType {
        /// The device.
        device: String,
        /// The element type asked for.
        dtype: DType,
    },

    /// Only kernels compute with such weights, and the device has none.
    #[error("the device `{device}` has no kernels for {format:?} weights: load the model in a float type")]
    NoKernels {
        /// The device.
        device: String,
        /// The format asked for.
        format: WeightFormat,
    },

    /// The threads asked for could not be started.
    #[error("cannot start {threads} threads: {reason}")]
    Threads {
        /// The number asked for.
        threads: usize,
        /// The system's complaint.
        reason: String,
    },
}

/// Checks that a model can be packed on `device` in `format`.
///
/// # Errors
///
/// [`DeviceError::DType`] if the device does not compute in a float format, [`DeviceError::NoKernels`] if it has no kernels
/// for one that is not.
pub fn check_format(device: &Device, format: WeightFormat) -> Result<(), DeviceError> {
    if format == WeightFormat::Int8 && !has_kernels(device) {
        return Err(DeviceError::NoKernels { device: describe(device), format });
    }
    check_dtype(device, format.float())
}
