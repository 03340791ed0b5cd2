#![doc = include_str!("../README.md")]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod batch;
pub mod cache;
pub mod checkpoint;
pub mod config;
pub mod cost;
mod device;
mod error;
pub mod generate;
mod guard;
pub mod measure;
mod memory;
pub mod model;
pub mod perplexity;
pub mod prefix;
mod runner;
pub mod speculative;
pub mod tokenizer;

pub use burn;
pub use cache::{CacheStorage, KvCache, KvCacheConfig, KvSegment};
pub use checkpoint::Checkpoint;
pub use config::{Activation, Gpt2Config};
pub use device::device;
pub use error::{Error, Result};
pub use gpt2_burn_backends as backends;
pub use gpt2_burn_backends::{Threads, WeightFormat};
#[doc(inline)]
pub use gpt2_burn_core::sampling;
use gpt2_burn_core::schedule;
use gpt2_burn_core::summary;
pub use gpt2_burn_core::{Error as CoreError, ModelShape};
pub use memory::{MemoryLimit, available_memory};
pub use model::{Gpt2, Logits, TokenBatch};
