//! What the machine can do, measured on the spot: the roofline that everything else is held against.

use std::hint::black_box;
use std::thread;

use burn::tensor::{DType, Device, Distribution, Int, Shape, Tensor};
use gpt2_burn_backends::{PackedMatrix, attend, has_kernels};

use super::clock::Repeats;
use super::memory::machine_memory;
use crate::cost::Hardware;
use crate::{Result, Threads};

/// Bytes that no processor's cache holds.
const BUFFER: usize = 256 << 20;

/// Inputs and outputs of a matrix in f32 that takes as much.
const MATRIX: [usize; 2] = [4096, 16_384];

/// Width of the square matrices that are multiplied: large enough to be bound by arithmetic, small enough for a second.
const WIDTH: usize = 1536;

/// The device as hardware for [`cost`](crate::cost): its [bandwidth](read_bandwidth), its [multiplications](multiply_rate)
/// and its [attention](attention_rate) in f32, measured in some seconds, and its memory if that is known. Of a CPU it is what
/// [`Threads::current`] threads can do.
///
/// # Errors
///
/// [`Error::Execution`](crate::Error::Execution) if the device fails.
pub fn peaks(device: &Device) -> Result<Hardware> {
    let repeats = Repeats::default();
    let (bandwidth, flops) = (read_bandwidth(device, repeats)?, multiply_rate(device, repeats)?);
    let (name, memory) = match is_cpu(device) {
        true => (format!("this machine ({} threads)", Threads::current()), machine_memory()),
        false => (format!("{device:?}"), None),
    };
    let memory = memory.map_or(f64::INFINITY, |bytes| bytes as f64);
    Hardware::new(name, bandwidth, flops, memory)?.with_attention(attention_rate(device, repeats)?)
}

/// Bytes per second that the device reads from its memory: a buffer that no cache holds, read from end to end by all
/// threads, by a plain loop or as a kernel reads a matrix, whichever is faster. The best of the runs counts.
///
/// # Errors
///
/// [`Error::Execution`](crate::Error::Execution) if the device fails.
pub fn read_bandwidth(device: &Device, repeats: Repeats) -> Result<f64> {
    if is_cpu(device) {
        let buffer = vec![1_u64; BUFFER / size_of::<u64>()];
        let timing = repeats.time(device, || {
            black_box(read_by_all(black_box(&buffer)));
            Ok(())
        })?;
        drop(buffer);
        let seconds = timing.least().min(kernel_reading_seconds(device, repeats)?.unwrap_or(f64::INFINITY));
        return Ok(BUFFER as f64 / seconds);
    }
    let buffer = Tensor::<1>::ones([BUFFER / size_of::<f32>()], (device, DType::F32));
    let reading = repeats.time(device, || {
        black_box(buffer.clone().sum());
        Ok(())
    })?;
    let copying = repeats.time(device, || {
        black_box(buffer.clone() + 1.0);
        Ok(())
    })?;
    Ok(BUFFER as f64 / reading.least().min(copying.least() / 2.0))
}

/// Least seconds in which a kernel multiplies a vector by a matrix of the buffer's size; none without kernels. It asks for
/// memory ahead of time, which a plain loop leaves to the processor.
fn kernel_reading_seconds(device: &Device, repeats: Repeats) -> Result<Option<f64>> {
    if !has_kernels(device) {
        return Ok(None);
    }
    let matrix = PackedMatrix::new(Tensor::ones(MATRIX, (device, DType::F32)), DType::F32);
    let [inputs, outputs] = MATRIX;
    let (x, bias) = (Tensor::ones([1, inputs], device), Tensor::zeros([outputs], device));
    let timing = repeats.time(device, || {
        black_box(matrix.linear(x.clone(), bias.clone(), None));
        Ok(())
    })?;
    Ok(Some(timing.least()))
}

/// Floating-point operations per second of products of large square matrices, in f32: burn's, or the kernel's if that is
/// faster. The best of the runs counts.
///
/// # Errors
///
/// [`Error::Execution`](crate::Error::Execution) if the device fails.
pub fn multiply_rate(device: &Device, repeats: Repeats) -> Result<f64> {
    let random = || Tensor::<2>::random(Shape::new([WIDTH, WIDTH]), Distribution::Uniform(-1.0, 1.0), device);
    let (left, right) = (random(), random());
    let product = repeats.time(device, || {
        black_box(left.clone().matmul(right.clone()));
        Ok(())
    })?;
    let mut seconds = product.least();
    if has_kernels(device) {
        let (packed, bias) = (PackedMatrix::new(right, DType::F32), Tensor::zeros([WIDTH], device));
        let kernel = repeats.time(device, || {
            black_box(packed.linear(left.clone(), bias.clone(), None));
            Ok(())
        })?;
        seconds = seconds.min(kernel.least());
    }
    Ok(2.0 * (WIDTH as f64).powi(3) / seconds)
}

/// Floating-point operations per second of attention over a prompt of 512 tokens with 12 heads of 64, GPT-2's, in f32: those
/// of the pairs that the mask does not hide. The best of the runs counts.
///
/// # Errors
///
/// [`Error::Execution`](crate::Error::Execution) if the device fails.
pub fn attention_rate(device: &Device, repeats: Repeats) -> Result<f64> {
    let (heads, time, head_dim) = (12, 512, 64);
    let random = || Tensor::random(Shape::new([1, heads, time, head_dim]), Distribution::Uniform(-1.0, 1.0), device);
    let [query, keys, values]: [Tensor<4>; 3] = [random(), random(), random()];
    let past = Tensor::<1, Int>::zeros([1], device);
    let timing = repeats.time(device, || {
        black_box(attend(query.clone(), keys.clone(), values.clone(), past.clone()));
        Ok(())
    })?;
    let pairs = (time * (time + 1) / 2) as f64;
    Ok(4.0 * pairs * (heads * head_dim) as f64 / timing.least())
}

fn is_cpu(device: &Device) -> bool {
    crate::device("flex").is_ok_and(|cpu| cpu == *device)
}

/// The sum of all, each part read by a thread of its own, as many as kernels use.
fn read_by_all(buffer: &[u64]) -> u64 {
    let sum = |part: &[u64]| part.iter().fold(0_u64, |sum, x| sum.wrapping_add(*x));
    let parts = buffer.chunks(buffer.len().div_ceil(Threads::current()));
    thread::scope(|scope| {
        let threads: Vec<_> = parts
            .map(|part| match thread::Builder::new().spawn_scoped(scope, move || sum(part)) {
                Ok(thread) => Ok(thread),
                // Where no thread is to be had, this one does its work.
                Err(_) => Err(sum(part)),
            })
            .collect();
        let sums = threads.into_iter().map(|thread| thread.map_or_else(|sum| sum, |thread| thread.join().unwrap_or(0)));
        sums.fold(0, u64::wrapping_add)
    })
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::cost::Work;

    #[test]
    fn every_byte_is_read_once() {
        for length in [1, 2, 1000, 4097] {
            let buffer: Vec<u64> = (1..=length).collect();
            assert_eq!(read_by_all(&buffer), length * (length + 1) / 2);
        }
    }

    #[test]
    fn a_machine_is_measured_with_one_run() {
        let device = Device::flex();
        let bandwidth = read_bandwidth(&device, Repeats::once()).unwrap();
        let flops = multiply_rate(&device, Repeats::once()).unwrap();
        let attention = attention_rate(&device, Repeats::once()).unwrap();
        let machine = Hardware::new("machine", bandwidth, flops, f64::INFINITY).unwrap().with_attention(attention);
        let machine = machine.unwrap();
        // No machine that this runs on is a thousand times slower or faster than a desktop computer.
        assert!((1e7..1e14).contains(&bandwidth) && (1e7..1e16).contains(&flops), "{machine:?}");
        assert!(machine.roofline(Work { flops: 1.0, bytes: 1.0 }).seconds() > 0.0);
    }
}
