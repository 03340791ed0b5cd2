//! Kernels for GPUs, one source for CUDA, ROCm, Metal, Vulkan and WebGPU: written in Rust, compiled by CubeCL for the device
//! that it finds.
//!
//! A launch costs the host more than a small model's work costs the device, so what follows itself in a layer is one kernel: a
//! product with its bias, GELU and residual; appending keys and values; attention over the cache. None of them is compiled
//! anew while a sequence grows: what changes from step to step is read from the shapes and from a buffer of lengths.

#![allow(unsafe_code)]

mod append;
mod argmax;
mod attend;
mod checks;
mod columns;
mod gelu;
mod int8;
mod linear;
mod many;
mod norm;
mod ops;
mod paged;
mod product;
#[cfg(test)]
mod tests;
mod units;
mod weight;

use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::{ElemType, FloatKind, IntKind};
use cubecl::prelude::*;

/// Threads of a workgroup, where nothing speaks for another number.
const THREADS: usize = 256;

/// A tensor beside `other`, one row after the other, with nothing in it yet.
fn empty_beside<const D: usize>(other: &CubeTensor, shape: [usize; D], dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(other.client.clone(), other.device.clone(), Shape::new(shape), dtype)
}

/// How wide an index has to be to reach all elements of these tensors.
fn address_type(tensors: &[&CubeTensor]) -> AddressType {
    tensors.iter().map(|tensor| tensor.required_address_type()).max().unwrap_or_default()
}

/// A type of weights, keys or values as kernels are compiled for it.
///
/// # Panics
///
/// For other types, which [`checks`] keeps away.
fn element_type(dtype: DType) -> ElemType {
    match dtype {
        DType::F32 => ElemType::Float(FloatKind::F32),
        DType::F16 => ElemType::Float(FloatKind::F16),
        DType::BF16 => ElemType::Float(FloatKind::BF16),
        DType::I32 => ElemType::Int(IntKind::I32),
        _ => panic!("no kernel reads {dtype:?}"),
    }
}

/// As many workgroups of a thread an element, spread over the axes that a device has.
fn one_thread_each(client: &Client, elements: usize) -> (CubeCount, CubeDim) {
    let dim = CubeDim::new_1d(THREADS as u32);
    (cubecl::calculate_cube_count_elemwise(client, elements, dim), dim)
}

/// A buffer that nothing else refers to: itself, or a copy.
fn writable(buffer: CubeTensor) -> CubeTensor {
    if buffer.can_mut() && buffer.is_nonoverlapping() { buffer } else { buffer.copy() }
}

/// In memory so that vectors of `width` elements of the last dimension can be read; of those before it, any strides.
fn readable(tensor: CubeTensor, width: usize) -> CubeTensor {
    let is_readable = match tensor.meta.strides().split_last() {
        Some((last, others)) => *last == 1 && others.iter().all(|stride| stride % width == 0),
        None => true,
    };
    if is_readable { tensor } else { into_contiguous(tensor) }
}
