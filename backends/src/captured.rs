//! [`CapturedStep`]: a decode step that a device does again without being told each launch of it.

#![allow(unsafe_code)]

use std::thread::{self, ThreadId};

use burn::backend::{Backend, BackendGraph, Dispatch, ExecutionError};
use burn::tensor::{Device, Int, Tensor};

use crate::DecodeState;

/// The keys and values of each layer of a cache.
type Buffers = Vec<(Tensor<4>, Tensor<4>)>;

/// What was launched while one step was taken, to be done again in one launch: a decode step of a small model costs the host
/// more time to launch than the device to compute. CUDA calls it a graph.
pub struct CapturedStep<M> {
    graph: BackendGraph<Dispatch>,
    device: Device,
    /// The thread on whose stream it was captured.
    thread: ThreadId,
    state: DecodeState,
    /// Everything else that the step reads and writes, so that it stays where it is.
    _buffers: Buffers,
    _model: M,
}

impl<M> CapturedStep<M> {
    /// Whether a device captures at all.
    pub fn is_possible(device: &Device) -> bool {
        #[cfg(all(feature = "cube", not(feature = "fusion")))]
        if let burn::backend::DispatchDevice::Cube(device) = device.as_dispatch() {
            return matches!(device, cubecl::Device::Cuda(_) | cubecl::Device::Hip(_));
        }
        let _ = device;
        false
    }

    /// Prepares the device for what follows: the step taken once, and then [captured](Self::new).
    ///
    /// # Errors
    ///
    /// If the device refuses.
    pub fn prepare(device: &Device) -> Result<(), ExecutionError> {
        Dispatch::graph_prepare(device.as_dispatch())
    }

    /// Captures what `step` launches, without doing it. It makes the next state of `state`, with what it finds in the model
    /// and in the cache, whose tensors are `buffers`: it captures nothing from around it, so that all that it uses is kept. It
    /// must not read from the device nor write to it from the host, nor allocate more than the same step did before.
    ///
    /// # Errors
    ///
    /// If the device cannot capture it, or if the step did not write the state and the buffers in place: then each replay would
    /// begin with the same tokens. Nothing of it has been done then, and the device may refuse to read what the step was to
    /// write.
    pub fn new<C>(
        device: &Device,
        model: M,
        cache: &mut C,
        state: DecodeState,
        step: fn(&M, &mut C, DecodeState) -> DecodeState,
        buffers: fn(&C) -> Buffers,
    ) -> Result<Self, ExecutionError> {
        let refused = |reason: &str| ExecutionError::WithContext { reason: reason.to_owned() };
        let before = addresses(&state, &buffers(cache));
        let before = before.ok_or_else(|| refused("the device does not say where its tensors lie"))?;
        Dispatch::graph_start_capture(device.as_dispatch())?;
        let open = Open(device);
        let state = step(&model, cache, state);
        let graph = open.close()?;
        let buffers = buffers(cache);
        if addresses(&state, &buffers) != Some(before) {
            return Err(refused("the captured step did not write in place what the next one reads"));
        }
        let thread = thread::current().id();
        Ok(Self { graph, device: device.clone(), thread, state, _buffers: buffers, _model: model })
    }

    /// What each [replay](Self::replay) reads and writes: where the last one left it.
    pub fn state(&self) -> &DecodeState {
        &self.state
    }

    /// Does it again.
    ///
    /// # Errors
    ///
    /// If the device refuses, or on another thread than the one that captured it.
    pub fn replay(&self) -> Result<(), ExecutionError> {
        if self.thread != thread::current().id() {
            let reason = "a captured step is replayed by the thread that captured it".to_owned();
            return Err(ExecutionError::WithContext { reason });
        }
        // SAFETY: every tensor that the step used is alive. It had them from the model, the cache and the state, since a `fn`
        // has nothing else; the model and the state are kept here as they were, and so is every buffer that the cache named.
        // Should a step have used another (one that the cache did not name, or its own intermediate results), then CubeCL keeps
        // the pages of all memory that a captured launch was given from being handed to anybody else for as long as the graph
        // lives. The replay goes to the stream on which it was captured, that of this thread, as has just been checked: what this
        // thread launches before and behind it is in order with it. What is kept here has a second handle, so no other thread
        // writes it in place; one that reads it meanwhile finds numbers of before or behind the step, and any are valid. What
        // the step brought from the host, CubeCL keeps with the graph too.
        unsafe { Dispatch::graph_replay(self.device.as_dispatch(), &self.graph) }
    }
}

impl<M> std::fmt::Debug for CapturedStep<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CapturedStep").field("device", &self.device).finish_non_exhaustive()
    }
}

/// A device that captures, and does so no longer when this is dropped: also if the step panics.
struct Open<'a>(&'a Device);

impl Open<'_> {
    fn close(self) -> Result<BackendGraph<Dispatch>, ExecutionError> {
        let device = self.0.as_dispatch();
        std::mem::forget(self);
        Dispatch::graph_stop_capture(device)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        // Whatever it says: the panic that leads here says more.
        let _ = Dispatch::graph_stop_capture(self.0.as_dispatch());
    }
}

/// An allocation, and the bytes of it that a tensor has.
pub(crate) type Address = [u64; 3];

/// Where everything is that a step writes and the next one reads; none if a device does not say.
fn addresses(state: &DecodeState, buffers: &Buffers) -> Option<Vec<Address>> {
    let of_state = [of_ints(&state.ids), of_ints(&state.context_lens), of_ints(&state.chosen)];
    let of_buffers = buffers.iter().flat_map(|(keys, values)| [of_floats(keys), of_floats(values)]);
    of_state.into_iter().chain(of_buffers).collect()
}

/// Where a tensor is; none if a device does not say.
#[cfg(all(feature = "cube", not(feature = "fusion")))]
pub(crate) fn of_floats<const D: usize>(tensor: &Tensor<D>) -> Option<Address> {
    tensor.clone().try_into_primitive::<burn_cubecl::CubeBackend>().ok().map(of_tensor)
}

#[cfg(all(feature = "cube", not(feature = "fusion")))]
fn of_ints<const D: usize>(tensor: &Tensor<D, Int>) -> Option<Address> {
    tensor.clone().try_into_primitive::<burn_cubecl::CubeBackend>().ok().map(of_tensor)
}

#[cfg(all(feature = "cube", not(feature = "fusion")))]
fn of_tensor(tensor: burn_cubecl::tensor::CubeTensor) -> Address {
    let (allocation, start, end) = tensor.handle.binding().claim_key();
    [allocation.value as u64, start, end]
}

#[cfg(not(all(feature = "cube", not(feature = "fusion"))))]
pub(crate) fn of_floats<const D: usize>(_: &Tensor<D>) -> Option<Address> {
    None
}

#[cfg(not(all(feature = "cube", not(feature = "fusion"))))]
fn of_ints<const D: usize>(_: &Tensor<D, Int>) -> Option<Address> {
    None
}
