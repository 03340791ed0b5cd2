//! Each kernel beside what the machine can do: its bandwidth, measured by reading a large buffer, and its multiplications,
//! measured by burn's product of two large square matrices.
//!
//!     cargo bench -p gpt2-burn
//!     cargo bench -p gpt2-burn -- "768 to 3072, f16"
//!
//! Weights and caches are taken in turns from more copies than any processor's cache holds, as a decode step finds them.

use std::hint::black_box;
use std::time::Instant;

use comfy_table::{CellAlignment, Table, presets};
use gpt2_burn::backends::{AttentionMetadata, PackedMatrix, PackedRow, PagedRow, attend, attend_pages, int8_width};
use gpt2_burn::burn::tensor::{DType, Device, Distribution, Shape, Tensor};
use gpt2_burn::measure::median;
use gpt2_burn::{Threads, WeightFormat};
use rayon::prelude::*;

/// Bytes that no processor's cache holds.
const MEMORY: usize = 256 << 20;

/// Seconds that are spent on each line.
const SECONDS: f64 = 0.5;

struct Machine {
    bytes_per_second: f64,
    operations_per_second: f64,
}

fn main() {
    let only = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    // `cargo bench -p gpt2-burn` passes `--bench`, `cargo test --benches` does not: then one repetition of everything is enough.
    let seconds = if std::env::args().any(|argument| argument == "--bench") { SECONDS } else { 0.0 };
    let threads = Threads::current();
    Threads::enter(|| {
        let machine = Machine {
            bytes_per_second: MEMORY as f64 / time(seconds, reading()),
            operations_per_second: 2.0 * 1536_f64.powi(3) / time(seconds, multiplying()),
        };
        let (bytes, operations) = (machine.bytes_per_second, machine.operations_per_second);
        println!("{threads} threads read {:.1} GB/s and multiply {:.0} GFLOP/s\n", bytes / 1e9, operations / 1e9);
        println!("{}\n", linear(&machine, seconds, &only));
        println!("{}\n", attention(&machine, seconds, &only));
        println!("{}", attention_over_pages(&machine, seconds, &only));
    });
}

/// Median seconds of a repetition.
fn time(seconds: f64, mut work: impl FnMut()) -> f64 {
    work();
    let (started, mut all) = (Instant::now(), Vec::new());
    while all.is_empty() || started.elapsed().as_secs_f64() < seconds {
        let started = Instant::now();
        work();
        all.push(started.elapsed().as_secs_f64());
    }
    median(&all).unwrap_or(f64::NAN)
}

fn reading() -> impl FnMut() {
    let buffer = vec![1_u64; MEMORY / 8];
    let part = buffer.len() / (8 * Threads::current());
    move || {
        let sums = buffer.par_chunks(part).map(|part| part.iter().fold(0_u64, |sum, x| sum.wrapping_add(*x)));
        black_box(sums.reduce(|| 0, u64::wrapping_add));
    }
}

fn multiplying() -> impl FnMut() {
    let [left, right] = [0, 1].map(|_| random([1536, 1536]));
    move || {
        black_box(left.clone().matmul(right.clone()));
    }
}

fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(Shape::new(shape), Distribution::Uniform(-1.0, 1.0), &Device::flex())
}

fn table(header: [&str; 6]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(header);
    table
}

fn aligned(mut table: Table) -> Table {
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table
}

fn cells(name: String, seconds: f64, bytes: f64, operations: f64, machine: &Machine) -> Vec<String> {
    let percent = |rate: f64, max: f64| format!("{:.0}%", 100.0 * rate / max);
    vec![
        name,
        format!("{:.3}", seconds * 1e3),
        format!("{:.1}", bytes / seconds / 1e9),
        percent(bytes / seconds, machine.bytes_per_second),
        format!("{:.0}", operations / seconds / 1e9),
        percent(operations / seconds, machine.operations_per_second),
    ]
}

const COLUMNS: [&str; 5] = ["ms", "GB/s", "of bandwidth", "GFLOP/s", "of burn's product"];

fn header(first: &str) -> [&str; 6] {
    let [a, b, c, d, e] = COLUMNS;
    [first, a, b, c, d, e]
}

fn linear(machine: &Machine, seconds: f64, only: &str) -> Table {
    let mut table = table(header("linear"));
    let shapes = [(768, 2304), (768, 768), (768, 3072), (3072, 768), (768, 50_257)];
    for format in [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16, WeightFormat::Int8] {
        for (inputs, outputs) in shapes {
            let name = |rows: usize| format!("{inputs} to {outputs}, {format:?}, {rows} rows").to_lowercase();
            let wanted = |rows: &usize| rows * outputs <= 4_000_000 && name(*rows).contains(only);
            let all_rows: Vec<usize> = [1, 5, 8, 16, 32, 512].into_iter().filter(wanted).collect();
            if all_rows.is_empty() {
                continue;
            }
            let first = PackedMatrix::new(random([inputs, outputs]), format);
            let bytes = first.bytes();
            let count = (MEMORY / 2).div_ceil(bytes).min(40);
            let others = (1..count).map(|_| PackedMatrix::new(random([inputs, outputs]), format));
            let copies: Vec<PackedMatrix> = std::iter::once(first).chain(others).collect();
            let bias = Tensor::zeros([outputs], &Device::flex());
            for rows in all_rows {
                let x = random([rows, inputs]);
                let mut turn = 0;
                let spent = time(seconds, || {
                    turn = (turn + 1) % copies.len();
                    black_box(copies[turn].linear(x.clone(), bias.clone(), None));
                });
                let operations = 2.0 * (rows * inputs * outputs) as f64;
                table.add_row(cells(name(rows), spent, bytes as f64, operations, machine));
            }
        }
    }
    aligned(table)
}

fn attention(machine: &Machine, seconds: f64, only: &str) -> Table {
    let mut table = table(header("attention, 12 heads of 64"));
    let (heads, head_dim) = (12, 64);
    for dtype in [DType::F32, DType::F16] {
        for (batch, time_steps, context_len) in
            [(1, 1, 127), (1, 1, 511), (1, 1, 999), (1, 5, 507), (8, 1, 127), (1, 512, 0), (1, 1000, 0)]
        {
            let keys = context_len + time_steps;
            let name = format!("batch {batch}, {time_steps} new of {keys}, {dtype:?}").to_lowercase();
            if !name.contains(only) {
                continue;
            }
            let bytes = 2 * batch * heads * keys * head_dim * dtype.size();
            let shape = [batch, heads, keys, head_dim];
            let copies: Vec<[Tensor<4>; 2]> =
                (0..(MEMORY / 2).div_ceil(bytes).min(100)).map(|_| [0, 1].map(|_| random(shape).cast(dtype))).collect();
            let query = random([batch * time_steps, heads, head_dim]);
            let row = |slot: usize| PackedRow { slot, context_len, query_len: time_steps };
            let metadata = AttentionMetadata::new((0..batch).map(row).collect(), &Device::flex());
            let mut turn = 0;
            let spent = time(seconds, || {
                turn = (turn + 1) % copies.len();
                let [keys, values] = copies[turn].clone();
                black_box(attend(query.clone(), keys, values, &metadata));
            });
            let seen: usize = (0..time_steps).map(|t| context_len + t + 1).sum();
            let operations = 4.0 * (batch * heads * seen * head_dim) as f64;
            table.add_row(cells(name, spent, bytes as f64, operations, machine));
        }
    }
    aligned(table)
}

/// What is new is written to its pages, and attends. Bytes are those of the positions that are seen, the shared ones once.
fn attention_over_pages(machine: &Machine, seconds: f64, only: &str) -> Table {
    const PAGE: usize = 64;
    let mut table = table(header("attention over pages, 12 heads of 64"));
    let (heads, head_dim) = (12, 64);
    for dtype in [DType::F32, DType::F16, DType::I8] {
        for (batch, new_len, context_len, shared) in [
            (1_usize, 1_usize, 127_usize, 0_usize),
            (1, 1, 511, 0),
            (1, 1, 999, 0),
            (1, 5, 507, 0),
            (8, 1, 127, 0),
            (32, 1, 32, 0),
            (32, 1, 911, 0),
            (32, 1, 911, 896),
            (1, 512, 0, 0),
            (1, 960, 0, 0),
        ] {
            let keys = context_len + new_len;
            let name = format!("batch {batch}, {new_len} new of {keys}, {shared} shared, {dtype:?}").to_lowercase();
            if !name.contains(only) {
                continue;
            }
            let own = keys.div_ceil(PAGE) - shared / PAGE;
            let row = |row: usize| {
                let first = 1 + shared / PAGE + row * own;
                let pages = (1..1 + shared / PAGE).chain(first..first + own).map(|page| page as u32).collect();
                PagedRow { pages, context_len, new_len, query_len: new_len }
            };
            let rows: Vec<PagedRow> = (0..batch).map(row).collect();
            // Integers, and their scales, stand in words of f32.
            let (width, stored) = match dtype {
                DType::I8 => (int8_width(head_dim), DType::F32),
                dtype => (head_dim, dtype),
            };
            let bytes = 2 * (shared + batch * (keys - shared)) * heads * width * stored.size();
            let shape = [1 + shared / PAGE + batch * own, heads, PAGE, width];
            let mut copies: Vec<Option<[Tensor<4>; 2]>> = (0..(MEMORY / 2).div_ceil(bytes).min(100))
                .map(|_| Some([0, 1].map(|_| random(shape).cast(stored))))
                .collect();
            let new = random([batch * new_len, heads, head_dim]);
            let (rows, mut turn) = (std::sync::Arc::<[PagedRow]>::from(rows), 0);
            let spent = time(seconds, || {
                turn = (turn + 1) % copies.len();
                // Taken out, so that they are written in place.
                let Some(pages) = copies[turn].take() else { return };
                let (out, pages) = attend_pages(new.clone(), [new.clone(), new.clone()], pages, rows.clone());
                copies[turn] = Some(pages);
                black_box(out);
            });
            let seen: usize = (0..new_len).map(|t| context_len + t + 1).sum();
            let operations = 4.0 * (batch * heads * seen * head_dim) as f64;
            table.add_row(cells(name, spent, bytes as f64, operations, machine));
        }
    }
    aligned(table)
}
