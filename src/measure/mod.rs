//! Measuring: whether decoders agree, what a process holds, and figures of a sample.

mod agree;
mod memory;

pub use crate::summary::{median, quantile};
pub use agree::{Divergence, TIE, Verdict, check_greedy};
pub use memory::{ProcessMemory, process_memory, reset_peak_memory};
