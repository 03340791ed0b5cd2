//! [`Recording`]: launches that a device does again without being told each.

#![allow(unsafe_code)]

use burn::backend::{Backend, BackendGraph, Dispatch, ExecutionError};
use burn::tensor::Device;

/// What was launched while some work was done, to be done again in one launch: a decode step of a small model costs the host
/// more time to launch than the device to compute. CUDA calls it a graph.
pub struct Recording<K> {
    graph: BackendGraph<Dispatch>,
    device: Device,
    /// Everything that the work reads and writes, so that it stays where it is.
    _kept: K,
}

impl<K> Recording<K> {
    /// Whether a device records at all.
    pub fn is_possible(device: &Device) -> bool {
        #[cfg(all(feature = "cube", not(feature = "fusion")))]
        if let burn::backend::DispatchDevice::Cube(device) = device.as_dispatch() {
            return matches!(device, cubecl::Device::Cuda(_) | cubecl::Device::Hip(_));
        }
        let _ = device;
        false
    }

    /// Prepares the device for what follows: the work done once, and then [recorded](Self::new).
    ///
    /// # Errors
    ///
    /// If the device refuses.
    pub fn prepare(device: &Device) -> Result<(), ExecutionError> {
        Dispatch::graph_prepare(device.as_dispatch())
    }

    /// Records what `work` launches, without doing it. It must not read from the device nor write to it from the host, nor
    /// allocate more than the same work did before, and it writes in place what it gives to the next round. `kept` has to hold
    /// all tensors that it uses: each [replay](Self::replay) reads and writes those, wherever they are.
    ///
    /// # Errors
    ///
    /// If the device cannot record it. Nothing of it has been done then, and the device may refuse to read what the work was to
    /// write.
    pub fn new(device: &Device, work: impl FnOnce() -> K) -> Result<Self, ExecutionError> {
        Dispatch::graph_start_capture(device.as_dispatch())?;
        let kept = work();
        let graph = Dispatch::graph_stop_capture(device.as_dispatch())?;
        Ok(Self { graph, device: device.clone(), _kept: kept })
    }

    /// Does it again.
    ///
    /// # Errors
    ///
    /// If the device refuses.
    pub fn replay(&self) -> Result<(), ExecutionError> {
        // SAFETY: the tensors that the work uses are kept, and what it allocated is the recording's own. They are used by
        // this thread's stream alone: whoever records goes on on the same thread. No memory of the host is written.
        unsafe { Dispatch::graph_replay(self.device.as_dispatch(), &self.graph) }
    }
}

impl<K> std::fmt::Debug for Recording<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recording").field("device", &self.device).finish_non_exhaustive()
    }
}
