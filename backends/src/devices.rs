//! Names of devices, and what is behind them: burn's constructors are lazy, so whether a device is really there is asked here.

#![allow(unused_imports, unused_variables)] // a build may have no device at all

use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device};

use crate::DeviceError;

/// The part of a name before its colon, the cargo feature behind it, and whether that is in this build.
const KINDS: &[(&str, bool)] = &[
    ("flex", cfg!(feature = "flex")),
    ("ndarray", cfg!(feature = "ndarray")),
    ("wgpu", cfg!(feature = "wgpu")),
    ("vulkan", cfg!(feature = "vulkan")),
    ("metal", cfg!(feature = "metal")),
    ("cuda", cfg!(feature = "cuda")),
    ("rocm", cfg!(feature = "rocm")),
];

/// Names of the devices in this build; whether the machine has them, [`device`] says.
pub fn available() -> Vec<&'static str> {
    KINDS.iter().filter(|(_, is_compiled_in)| *is_compiled_in).map(|(name, _)| *name).collect()
}

/// The device of this name.
///
/// | name | computes on |
/// |---|---|
/// | `flex` | the CPU |
/// | `ndarray` | the CPU, with burn's older backend, which has no kernels here |
/// | `wgpu` | the GPU that WebGPU's API prefers, through Vulkan, Metal, DirectX or OpenGL |
/// | `vulkan`, `metal` | the same through this one, with its own shaders |
/// | `cuda`, `rocm` | a GPU of NVIDIA's, of AMD's |
///
/// A number behind a colon picks one of several: `cuda:1`, and of `wgpu`, `vulkan` and `metal` the discrete GPUs, from 0 on;
/// there `wgpu:integrated` and `wgpu:cpu` name others.
///
/// Kernels for `cuda` need NVIDIA's driver and `libdevice.10.bc`, a file of the CUDA toolkit, which is looked for in
/// `$CUDA_PATH/nvvm/libdevice` or, if `CUDA_PATH` is not set, in that folder of `/usr/local/cuda`, `/opt/cuda`, `/usr/lib/cuda` and
/// `/usr`. The Python package `nvidia-cuda-nvcc` brings it too (`CUDA_PATH` is then the folder `nvidia/cu13` of the installed
/// packages), and so does `nvidia-cuda-nvcc-cu12` (`nvidia/cuda_nvcc`).
///
/// # Errors
///
/// [`DeviceError::NotCompiledIn`] names the feature that is missing; [`DeviceError::Unknown`] lists what there is;
/// [`DeviceError::Unavailable`] if the machine does not have it, or no driver for it.
pub fn device(name: &str) -> Result<Device, DeviceError> {
    let (kind, which) = name.split_once(':').map_or((name, None), |(kind, which)| (kind, Some(which)));
    let unknown = || DeviceError::Unknown { name: name.to_owned(), available: available() };
    let (kind, is_compiled_in) = KINDS.iter().find(|(known, _)| *known == kind).ok_or_else(unknown)?;
    if !is_compiled_in {
        return Err(DeviceError::NotCompiledIn { name: name.to_owned(), feature: kind });
    }
    match *kind {
        #[cfg(feature = "flex")]
        "flex" if which.is_none() => Ok(Device::flex()),
        #[cfg(feature = "ndarray")]
        #[allow(deprecated)] // it is wanted, to be compared with
        "ndarray" if which.is_none() => Ok(Device::ndarray()),
        #[cfg(feature = "cube")]
        kind if !matches!(kind, "flex" | "ndarray") => gpu::device(name, kind, which).ok_or_else(unknown)?,
        _ => Err(unknown()),
    }
}

/// What a device is, for reports: its name and, of a GPU, the interface that it is used through and what its kernels are compiled
/// to, such as `wgpu<spirv>`, which is Vulkan's, or `cuda`.
#[allow(unreachable_patterns)] // a build may have one kind of device only
pub fn describe(device: &Device) -> String {
    match device.as_dispatch() {
        #[cfg(feature = "cube")]
        DispatchDevice::Cube(device) => {
            let client = device.client();
            format!("{} ({})", client.properties().identity.name, client.name())
        }
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => "the CPU (flex)".to_owned(),
        other => format!("{other:?}"),
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
    Err(DeviceError::DType { device: describe(device), dtype })
}

#[cfg(feature = "cube")]
mod gpu {
    use std::collections::HashMap;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::{LazyLock, Mutex, PoisonError};

    use burn::tensor::{Device, Tensor};
    use cubecl::device::{DeviceUnavailable, WgpuDeviceKind};

    use crate::DeviceError;

    /// What was found out about the names asked for.
    static PROBED: LazyLock<Mutex<HashMap<String, Result<(), DeviceError>>>> = LazyLock::new(Mutex::default);

    /// None: `which` means nothing for this kind.
    pub fn device(name: &str, kind: &str, which: Option<&str>) -> Option<Result<Device, DeviceError>> {
        let index = which.map(|which| which.parse::<usize>().ok());
        let number = || index.unwrap_or(Some(0));
        let adapter = match (which, index) {
            (None, _) => Some(WgpuDeviceKind::DefaultDevice),
            (Some("integrated"), _) => Some(WgpuDeviceKind::IntegratedGpu(0)),
            (Some("cpu"), _) => Some(WgpuDeviceKind::Cpu),
            (_, Some(Some(index))) => Some(WgpuDeviceKind::DiscreteGpu(index)),
            _ => None,
        };
        let found = match kind {
            "cuda" => cubecl::Device::cuda(number()?),
            "rocm" => cubecl::Device::rocm(number()?),
            "vulkan" => cubecl::Device::vulkan(adapter?),
            "metal" => cubecl::Device::metal_msl(adapter?),
            _ => cubecl::Device::wgpu(adapter?),
        };
        Some(found.map_err(|reason| unavailable(name, reason)).and_then(|found| {
            let device = Device::new(found);
            let mut probed = PROBED.lock().unwrap_or_else(PoisonError::into_inner);
            probed.entry(name.to_owned()).or_insert_with(|| probe(name, kind, &device)).clone().map(|()| device)
        }))
    }

    fn unavailable(name: &str, reason: DeviceUnavailable) -> DeviceError {
        DeviceError::Unavailable { name: name.to_owned(), reason: reason.to_string() }
    }

    /// Computes something: a driver that is missing or too old shows only then, and as a panic. The exponential is what every
    /// model needs and what not every device has instructions for: of CUDA's, it is in a library of the toolkit.
    fn probe(name: &str, kind: &str, device: &Device) -> Result<(), DeviceError> {
        let two = || (Tensor::<1>::zeros([1], device).exp() + 1.0).try_into_vec_as::<f32>();
        let failed =
            |reason: String| DeviceError::Unavailable { name: name.to_owned(), reason: with_needs(kind, reason) };
        match catch_unwind(AssertUnwindSafe(two)) {
            Ok(Ok(found)) if matches!(found[..], [two] if (two - 2.0).abs() < 1e-5) => Ok(()),
            Ok(Ok(found)) => Err(failed(format!("it takes exp 0 + 1 for {found:?}"))),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
                Err(failed(text.unwrap_or("its driver fails").to_owned()))
            }
        }
    }

    /// What went wrong, and what a device of this kind needs.
    fn with_needs(kind: &str, reason: String) -> String {
        match kind {
            "cuda" => format!(
                "{reason} (kernels need NVIDIA's driver, and libdevice.10.bc of the CUDA toolkit or of the Python package \
                 nvidia-cuda-nvcc, which is looked for in $CUDA_PATH/nvvm/libdevice or, if CUDA_PATH is not set, in that folder \
                 of /usr/local/cuda, /opt/cuda, /usr/lib/cuda and /usr)"
            ),
            _ => reason,
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn the_error_of_cuda_says_where_libdevice_is_looked_for() {
            let found = with_needs("cuda", "libdevice.10.bc was not found".to_owned());
            for part in ["libdevice.10.bc was not found", "$CUDA_PATH/nvvm/libdevice", "/usr/local/cuda", "driver"] {
                assert!(found.contains(part), "{found}");
            }
            assert_eq!(with_needs("wgpu", "no adapter".to_owned()), "no adapter");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_device_lists_the_known_ones() {
        for name in ["abacus", "flex:1", "cuda:one"] {
            let Err(error) = device(name) else { panic!("{name} is no device") };
            if name != "cuda:one" || cfg!(feature = "cuda") {
                let message = error.to_string();
                assert!(available().iter().all(|known| message.contains(known)), "{message}");
            }
        }
    }

    #[test]
    fn a_device_that_is_not_compiled_in_says_which_feature_to_add() {
        for (kind, is_compiled_in) in KINDS {
            if !is_compiled_in {
                let error = device(kind).unwrap_err();
                assert!(error.to_string().contains(&format!("--features {kind}")), "{error}");
            }
        }
    }

    /// On a machine without the GPU in question; with it, the device is there.
    #[test]
    fn a_device_that_the_machine_lacks_is_an_error_and_no_panic() {
        for name in available() {
            match device(name) {
                Ok(device) => assert!(!describe(&device).is_empty()),
                Err(error) => assert!(matches!(error, DeviceError::Unavailable { .. }), "{error}"),
            }
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
