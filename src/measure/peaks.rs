//! What the machine can do, measured on the spot: the roofline that everything else is held against.

use std::hint::black_box;
use std::thread;

use burn::tensor::{DType, Device, Distribution, Shape, Tensor, activation, module};
use gpt2_burn_backends::{AttentionMetadata, Gelu, PackedMatrix, PackedRow, attend, has_kernels};

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

/// The device as hardware for [`cost`](crate::cost), each of its rates measured `repeats` times: its [bandwidth](read_bandwidth), its
/// [multiplications](multiply_rate), what a model of this shape reaches of them in [products](product_rates), in
/// [attention](attention_rate) and in [writing](write_rate) what it computed, and its memory if that is known. Of a CPU it is
/// what [`Threads::current`] threads can do.
///
/// The rates are those of a model that was [packed](crate::Gpt2::pack) in `format`; none: of burn's operations, in f32.
///
/// # Errors
///
/// [`Error::Config`](crate::Error::Config) for a shape that no model can have;
/// [`Error::Execution`](crate::Error::Execution) if the device fails.
pub fn peaks(device: &Device, config: &Gpt2Config, format: Option<WeightFormat>, repeats: Repeats) -> Result<Hardware> {
    config.validate()?;
    let (bandwidth, square) = (read_bandwidth(device, repeats)?, multiply_rate(device, repeats)?);
    let ProductRates { weights, linear } = product_rates(device, config, format, repeats)?;
    let attention = attention_rate(device, config, format, repeats)?;
    let results = write_rate(device, config, repeats)?;
    let (name, memory) = match is_cpu(device) {
        true => (format!("this machine ({} threads)", Threads::current()), machine_memory()),
        false => (format!("{device:?}"), None),
    };
    let memory = memory.map_or(f64::INFINITY, |bytes| bytes as f64);
    let machine = Hardware::new(name, bandwidth.max(weights), square.max(linear), memory)?;
    Ok(machine.with_reached(Reached { weights, results, linear, attention })?)
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
    let seconds = |format| -> Result<f64> {
        let product = Product::new(right.clone(), format, device);
        let timing = repeats.time(device, || {
            black_box(product.of(left.clone(), None));
            Ok(())
        })?;
        Ok(timing.median())
    };
    Ok(2.0 * (WIDTH as f64).powi(3) / seconds(None)?.min(seconds(Some(WeightFormat::F32))?))
}

/// What the products of a model reach.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct ProductRates {
    /// Bytes of weights per second, with a single row: a decode step's.
    pub weights: f64,
    /// Floating-point operations per second, with 128 rows: a prompt's.
    pub linear: f64,
}

/// The rates of the four products of a block, biases and GELU included, as a model of this shape computes them that was
/// packed in `format`; none: by burn's operations, in f32. A run goes through as many blocks as the model has, or as no
/// processor's cache holds. The medians of the runs count.
///
/// # Errors
///
/// [`Error::Config`](crate::Error::Config) for a shape that no model can have;
/// [`Error::Execution`](crate::Error::Execution) if the device fails.
pub fn product_rates(
    device: &Device,
    config: &Gpt2Config,
    format: Option<WeightFormat>,
    repeats: Repeats,
) -> Result<ProductRates> {
    config.validate()?;
    let (d, inner) = (config.n_embd, config.inner());
    let shapes = config.linears().map(|linear| linear.shape);
    let weights: usize = shapes.iter().map(|[inputs, outputs]| inputs * outputs).sum();
    let bytes = weights * format.map_or(size_of::<f32>(), bytes_of_weight);
    let copies = (BUFFER / 2).div_ceil(bytes).clamp(1, config.n_layer);
    let block = |_| shapes.map(|shape| Product::new(Tensor::ones(shape, device), format, device));
    let blocks: Vec<[Product; 4]> = (0..copies).map(block).collect();
    let seconds = |rows: usize| -> Result<f64> {
        let (narrow, wide) = (random([rows, d], device), random([rows, inner], device));
        let timing = repeats.time(device, || {
            for [c_attn, attention_c_proj, c_fc, mlp_c_proj] in &blocks {
                black_box(c_attn.of(narrow.clone(), None));
                black_box(attention_c_proj.of(narrow.clone(), None));
                black_box(c_fc.of(narrow.clone(), Some(Gelu::Tanh)));
                black_box(mlp_c_proj.of(wide.clone(), None));
            }
            Ok(())
        })?;
        Ok(timing.median() / blocks.len() as f64)
    };
    Ok(ProductRates { weights: bytes as f64 / seconds(1)?, linear: 2.0 * (ROWS * weights) as f64 / seconds(ROWS)? })
}

/// Bytes of a weight, the scales of whole numbers aside.
fn bytes_of_weight(format: WeightFormat) -> usize {
    match format {
        WeightFormat::Int8 => 1,
        format => format.float().size(),
    }
}

/// Bytes per second of the results of a block that a prompt of 512 tokens makes, in f32, each written into memory of its own: a
/// CPU's system clears every page that it had taken back before it gives it out again. They are as large, come in the same
/// order and last as long as a block's, so that an allocator does with them what it does with a model's. The median of the
/// runs counts.
///
/// # Errors
///
/// [`Error::Config`](crate::Error::Config) for a shape that no model can have;
/// [`Error::Execution`](crate::Error::Execution) if the device fails.
pub fn write_rate(device: &Device, config: &Gpt2Config, repeats: Repeats) -> Result<f64> {
    config.validate()?;
    let (d, inner) = (config.n_embd, config.inner());
    let written = |width: usize| black_box(Tensor::<2>::ones([KEYS, width], (device, DType::F32)));
    let mut residual = written(d);
    let timing = repeats.time(device, || {
        let normed = written(d);
        let qkv = written(3 * d);
        drop(normed);
        let attended = written(d);
        drop(qkv);
        residual = written(d);
        drop(attended);
        let normed = written(d);
        let hidden = written(inner);
        drop(normed);
        residual = written(d);
        drop(hidden);
        Ok(())
    })?;
    drop(residual);
    Ok((KEYS * (8 * d + inner) * size_of::<f32>()) as f64 / timing.median())
}

/// `x W + b`, by a kernel or by burn.
#[allow(clippy::large_enum_variant)] // all of a block are of one kind
enum Product {
    Kernel(PackedMatrix, Tensor<1>),
    Burn(Tensor<2>, Tensor<1>),
}

impl Product {
    /// Burn's, where there are no kernels or no format is asked for.
    fn new(weight: Tensor<2>, format: Option<WeightFormat>, device: &Device) -> Self {
        let bias = Tensor::zeros([weight.dims()[1]], device);
        match format.filter(|_| has_kernels(device)) {
            Some(format) => Self::Kernel(PackedMatrix::new(weight, format), bias),
            None => Self::Burn(weight, bias),
        }
    }

    fn of(&self, x: Tensor<2>, gelu: Option<Gelu>) -> Tensor<2> {
        match self {
            Self::Kernel(matrix, bias) => matrix.linear(x, bias.clone(), gelu),
            Self::Burn(weight, bias) => {
                let y = module::linear(x, weight.clone(), Some(bias.clone()));
                if gelu.is_some() { activation::gelu_approximate(y) } else { y }
            }
        }
    }
}

/// Floating-point operations per second of attention over a prompt of 512 tokens, in f32: those of the pairs that the mask
/// does not hide, softmax included, as a model computes them that was packed in a `format`; none: those of all pairs in
/// burn's two products. The median of the runs counts.
///
/// # Errors
///
/// [`Error::Config`](crate::Error::Config) for a shape that no model can have;
/// [`Error::Execution`](crate::Error::Execution) if the device fails.
pub fn attention_rate(
    device: &Device,
    config: &Gpt2Config,
    format: Option<WeightFormat>,
    repeats: Repeats,
) -> Result<f64> {
    config.validate()?;
    let (heads, head_dim) = (config.n_head, config.head_dim());
    let [keys, values] = [0, 1].map(|_| random([1, heads, KEYS, head_dim], device));
    // A part of what `c_attn` gives.
    let query = random([KEYS, 3 * heads, head_dim], device).narrow(1, 0, heads);
    let of_heads = query.clone().reshape([1, KEYS, heads, head_dim]).swap_dims(1, 2); // [1, H, T, D]
    let metadata = AttentionMetadata::new(vec![PackedRow { slot: 0, context_len: 0, query_len: KEYS }], device);
    let timing = repeats.time(device, || {
        let (keys, values) = (keys.clone(), values.clone());
        match format {
            Some(_) => drop(black_box(attend(query.clone(), keys, values, &metadata))),
            None => drop(black_box(of_heads.clone().matmul(keys.swap_dims(2, 3)).matmul(values))),
        }
        Ok(())
    })?;
    let pairs = if format.is_some() { KEYS * (KEYS + 1) / 2 } else { KEYS * KEYS };
    Ok(4.0 * (pairs * config.n_embd) as f64 / timing.median())
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
                // Where no thread is available, this one does its work.
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
        let small = Gpt2Config { n_embd: 64, n_head: 2, ..Gpt2Config::default() };
        let formats = [None, Some(WeightFormat::F32), Some(WeightFormat::Int8)];
        let of_formats = formats.into_iter().flat_map(|format| {
            let products = product_rates(&device, &small, format, once).unwrap();
            [products.weights, products.linear, attention_rate(&device, &small, format, once).unwrap()]
        });
        let of_machine =
            [read_bandwidth(&device, once), multiply_rate(&device, once), write_rate(&device, &small, once)];
        let rates = of_formats.chain(of_machine.map(|rate| rate.unwrap()));
        for rate in rates {
            // No machine that this runs on is a thousand times slower or faster than a desktop computer.
            assert!((1e6..1e16).contains(&rate), "{rate}");
        }
        let wrong = Gpt2Config { n_head: 5, ..Gpt2Config::default() };
        for failed in [
            peaks(&device, &wrong, None, once).map(|machine| machine.flops),
            product_rates(&device, &wrong, None, once).map(|rates| rates.linear),
            attention_rate(&device, &wrong, None, once),
            write_rate(&device, &wrong, once),
        ] {
            assert!(matches!(failed, Err(crate::Error::Config { .. })));
        }
    }
}
