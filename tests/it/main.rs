//! What the library does, one module a subject: one binary, since linking burn takes longer than most of these tests.

mod architecture;
mod bad_input;
mod batch;
mod cache;
mod common;
mod cost;
mod deterministic;
mod devices;
mod generate;
mod kernels;
mod measure;
#[cfg(target_os = "linux")]
mod memory;
mod module;
mod pair;
mod parity;
mod perplexity;
mod pipelines;
mod prefix;
mod prefix_file;
mod shared_data;
mod speculative;
mod speculative_sampling;
mod words;
