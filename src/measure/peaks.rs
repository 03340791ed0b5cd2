//! What the machine can do, measured on the spot: the roofline that everything else is held against.

use std::hint::black_box;
use std::thread;

use burn::tensor::{DType, Device, Distribution, Int, Shape, Tensor};
use gpt2_burn_backends::{PackedMatrix, attend, has_kernels};

use super::clock::Repeats;
use super::memory::machine_memory;
use crate::WeightFormat;
use crate::cost::{Hardware, Reached};
use crate::{Gpt2Config, Result, Threads};

/// Bytes that no processor's cache holds.
const BUFFER: usize = 256 << 20;

/// Inputs and outputs of a matrix in f32 that takes as much.
const MATRIX: [usize; 2] = [4096, 16_384];

/// Width of the square matrices that are multiplied: large enough to be bound by arithmetic, small enough for a second.
const WIDTH: usize = 1536;

/// Tokens of a prompt, for products.
const ROWS: usize = 128;

/// The same for attention.
const KEYS: usize = 512;

/// Most copies of a matrix.
const MOST_COPIES: usize = 64;

/// The device as hardware for [`cost`](crate::cost), each of its rates measured `repeats` times: its [bandwidth](read_bandwidth), its
/// [multiplications](multiply_rate), what a model of this shape reaches of them in its [products](linear_rate) and its
/// [attention](attention_rate), all in f32, and its memory if that is known. Of a CPU it is what [`Threads::current`]
/// threads can do.
///
/// # Errors
///
/// [`Error::Config`](crate::Error::Config) for a shape that no model can have;
/// [`Error::Execution`](crate::Error::Execution) if the device fails.
pub fn peaks(device: &Device, config: &Gpt2Config, repeats: Repeats) -> Result<Hardware> {
    config.validate()?;
    let (bandwidth, square) = (read_bandwidth(device, repeats)?, multiply_rate(device, repeats)?);
    let linear = linear_rate(device, [config.n_embd, config.inner()], repeats)?;
    let attention = attention_rate(device, config.n_head, config.head_dim(), repeats)?;
    let (name, memory) = match is_cpu(device) {
        true => (format!("this machine ({} threads)", Threads::current()), machine_memory()),
        false => (format!("{device:?}"), None),
    };
    let memory = memory.map_or(f64::INFINITY, |bytes| bytes as f64);
    Hardware::new(name, bandwidth, square.max(linear), memory)?.with_reached(Reached { linear, attention })
}

/// Bytes per second that the device reads from its memory: a buffer that no cache holds, read from end to end by all
/// threads, by a plain loop or as a kernel reads a matrix, whichever is faster. The median of the runs counts.
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
        let seconds = timing.median().min(kernel_reading_seconds(device, repeats)?.unwrap_or(f64::INFINITY));
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
    Ok(BUFFER as f64 / reading.median().min(copying.median() / 2.0))
}

/// Seconds in which a kernel multiplies a vector by a matrix of the buffer's size; none without kernels. It asks for
/// memory ahead of time, which a plain loop leaves to the processor.
fn kernel_reading_seconds(device: &Device, repeats: Repeats) -> Result<Option<f64>> {
    if !has_kernels(device) {
        return Ok(None);
    }
    let matrix = PackedMatrix::new(Tensor::ones(MATRIX, (device, DType::F32)), WeightFormat::F32);
    let [inputs, outputs] = MATRIX;
    let (x, bias) = (Tensor::ones([1, inputs], device), Tensor::zeros([outputs], device));
    let timing = repeats.time(device, || {
        black_box(matrix.linear(x.clone(), bias.clone(), None));
        Ok(())
    })?;
    Ok(Some(timing.median()))
}

/// Floating-point operations per second of products of large square matrices, in f32: burn's, or the kernel's if that is
/// faster. The median of the runs counts.
///
/// # Errors
///
/// [`Error::Execution`](crate::Error::Execution) if the device fails.
pub fn multiply_rate(device: &Device, repeats: Repeats) -> Result<f64> {
    let (left, right) = (random([WIDTH, WIDTH], device), random([WIDTH, WIDTH], device));
    let product = repeats.time(device, || {
        black_box(left.clone().matmul(right.clone()));
        Ok(())
    })?;
    let flops = 2.0 * (WIDTH as f64).powi(3) / product.median();
    Ok(flops.max(product_rate(device, left, vec![right], repeats)?))
}

/// Floating-point operations per second of the product of 128 rows with a matrix `[inputs, outputs]`, as a model prepared for
/// the device computes it, in f32. Matrices are taken in turns from more than a processor's cache holds, as a model finds
/// them. The median of the runs counts.
///
/// # Errors
///
/// [`Error::Execution`](crate::Error::Execution) if the device fails.
pub fn linear_rate(device: &Device, [inputs, outputs]: [usize; 2], repeats: Repeats) -> Result<f64> {
    let bytes = inputs.saturating_mul(outputs).saturating_mul(size_of::<f32>()).max(1);
    let copies = (BUFFER / 2).div_ceil(bytes).clamp(1, MOST_COPIES);
    let weights = (0..copies).map(|_| Tensor::ones([inputs, outputs], device)).collect();
    product_rate(device, random([ROWS, inputs], device), weights, repeats)
}

/// That of `x W` by a kernel, or by burn where there is none, with one weight after the other.
fn product_rate(device: &Device, x: Tensor<2>, weights: Vec<Tensor<2>>, repeats: Repeats) -> Result<f64> {
    let ([rows, inputs], [_, outputs]) = (x.dims(), weights[0].dims());
    let bias = Tensor::zeros([outputs], device);
    let product: Vec<Box<dyn Fn() -> Tensor<2>>> = weights
        .into_iter()
        .map(|weight| -> Box<dyn Fn() -> Tensor<2>> {
            let (x, bias) = (x.clone(), bias.clone());
            match has_kernels(device) {
                true => {
                    let packed = PackedMatrix::new(weight, WeightFormat::F32);
                    Box::new(move || packed.linear(x.clone(), bias.clone(), None))
                }
                false => Box::new(move || x.clone().matmul(weight.clone())),
            }
        })
        .collect();
    let mut turn = 0;
    let timing = repeats.time(device, || {
        turn = (turn + 1) % product.len();
        black_box(product[turn]());
        Ok(())
    })?;
    Ok(2.0 * rows as f64 * inputs as f64 * outputs as f64 / timing.median())
}

/// Floating-point operations per second of attention over a prompt of 512 tokens, in f32: those of the pairs that the mask
/// does not hide. The median of the runs counts.
///
/// # Errors
///
/// [`Error::Execution`](crate::Error::Execution) if the device fails.
pub fn attention_rate(device: &Device, heads: usize, head_dim: usize, repeats: Repeats) -> Result<f64> {
    let shape = [1, heads, KEYS, head_dim];
    let (query, keys, values) = (random(shape, device), random(shape, device), random(shape, device));
    let past = Tensor::<1, Int>::zeros([1], device);
    let timing = repeats.time(device, || {
        black_box(attend(query.clone(), keys.clone(), values.clone(), past.clone()));
        Ok(())
    })?;
    let pairs = (KEYS * (KEYS + 1) / 2) as f64;
    Ok(4.0 * pairs * (heads * head_dim) as f64 / timing.median())
}

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(Shape::new(shape), Distribution::Uniform(-1.0, 1.0), device)
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

    #[test]
    fn every_byte_is_read_once() {
        for length in [1, 2, 1000, 4097] {
            let buffer: Vec<u64> = (1..=length).collect();
            assert_eq!(read_by_all(&buffer), length * (length + 1) / 2);
        }
    }

    #[test]
    fn a_machine_is_measured_with_one_run() {
        let (device, once) = (Device::flex(), Repeats::once());
        let rates = [
            read_bandwidth(&device, once),
            multiply_rate(&device, once),
            linear_rate(&device, [64, 256], once),
            attention_rate(&device, 2, 32, once),
        ];
        for rate in rates {
            // No machine that this runs on is a thousand times slower or faster than a desktop computer.
            assert!((1e6..1e16).contains(&rate.unwrap()));
        }
        let wrong = Gpt2Config { n_head: 5, ..Gpt2Config::default() };
        assert!(matches!(peaks(&device, &wrong, once), Err(crate::Error::Config { .. })));
    }
}
