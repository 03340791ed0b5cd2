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

#[cfg(feature = "flex")]
mod flex;
mod matrix;
#[cfg_attr(not(feature = "flex"), allow(unused_variables))] // nothing is dispatched to where there is no backend
mod ops;
mod pages;
mod threads;

use burn::tensor::{DType, Device};

pub use matrix::{PackedMatrix, WeightFormat, append, attend, attend_shared, has_kernels};
pub use ops::{Gelu, Gpt2Ops};
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

/// Names of the devices in this build.
pub fn available() -> Vec<&'static str> {
    let mut names = Vec::new();
    if cfg!(feature = "flex") {
        names.push("flex");
    }
    names
}

/// The device of this name: `flex` is the CPU.
///
/// # Errors
///
/// [`DeviceError::NotCompiledIn`] names the feature that is missing; [`DeviceError::Unknown`] lists what there is.
pub fn device(name: &str) -> Result<Device, DeviceError> {
    match name {
        #[cfg(feature = "flex")]
        "flex" => Ok(Device::flex()),
        #[cfg(not(feature = "flex"))]
        "flex" => Err(DeviceError::NotCompiledIn { name: name.to_owned(), feature: "flex" }),
        _ => Err(DeviceError::Unknown { name: name.to_owned(), available: available() }),
    }
}

/// Checks that a model can be computed on `device` in `dtype`: f32, f16 or bf16, if the device has it.
///
/// # Errors
///
/// [`DeviceError::DType`] if it does not.
pub fn check_dtype(device: &Device, dtype: DType) -> Result<(), DeviceError> {
    let is_weight_type = matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
    if is_weight_type && device.supports_dtype(dtype) {
        return Ok(());
    }
    Err(DeviceError::DType { device: format!("{device:?}"), dtype })
}

/// Checks that a model can be prepared on `device` in `format`.
///
/// # Errors
///
/// [`DeviceError::DType`] if the device does not compute in a float format, [`DeviceError::NoKernels`] if it has no kernels
/// for one that is not.
pub fn check_format(device: &Device, format: WeightFormat) -> Result<(), DeviceError> {
    if format == WeightFormat::Int8 && !has_kernels(device) {
        return Err(DeviceError::NoKernels { device: format!("{device:?}"), format });
    }
    check_dtype(device, format.float())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_device_lists_the_known_ones() {
        let message = device("abacus").unwrap_err().to_string();
        for name in available() {
            assert!(message.contains(name), "{message}");
        }
    }

    #[test]
    #[cfg(feature = "flex")]
    fn models_compute_in_three_element_types() {
        let device = device("flex").unwrap();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            check_dtype(&device, dtype).unwrap();
        }
        for dtype in [DType::F64, DType::Flex32, DType::I32, DType::I64, DType::U8] {
            assert!(matches!(check_dtype(&device, dtype), Err(DeviceError::DType { .. })), "{dtype:?}");
        }
    }
}
