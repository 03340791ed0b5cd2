//! What [`gpt2-burn`](https://docs.rs/gpt2-burn) decides without a tensor.
//!
//! Nothing here knows of burn, tensors or devices: it is arithmetic and bookkeeping, which compiles in seconds and is tested in
//! seconds. Programs that run models use it through `gpt2-burn`, where all of it is in modules of the same names.
//!
//! ```
//! use gpt2_burn_core::sampling::{Purpose, Sampling, uniform};
//!
//! let sampling = Sampling { top_k: Some(2), ..Sampling::default() };
//! let distribution = sampling.distribution(&[1.0, 3.0, 2.0], &[])?;
//! let id = distribution.sample(uniform(7, 0, 0, Purpose::Token));
//! assert!([1, 2].contains(&id));
//! # Ok::<(), gpt2_burn_core::Error>(())
//! ```

#![deny(missing_docs, clippy::print_stdout, clippy::print_stderr)]

pub mod cost;
mod error;
pub mod pages;
pub mod prefix;
pub mod sampling;
pub mod schedule;
mod shape;
pub mod speculative;
pub mod summary;

pub use error::{Error, Result};
pub use shape::ModelShape;
