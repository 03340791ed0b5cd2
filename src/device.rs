//! Devices by name, and whether two are one.

use burn::tensor::Device;

use crate::Result;

/// The device of this name, for instance `flex` for the CPU.
///
/// # Errors
///
/// [`Error::Device`](crate::Error::Device) says what there is, and which feature adds a device that is not compiled in.
pub fn device(name: &str) -> Result<Device> {
    Ok(gpt2_burn_backends::device(name)?)
}

/// Whether tensors of the one can be computed with those of the other: the same device, and gradients recorded on both or on
/// none, which burn's own comparison leaves out.
pub(crate) fn is_same_device(left: &Device, right: &Device) -> bool {
    left == right && left.is_autodiff() == right.is_autodiff()
}
