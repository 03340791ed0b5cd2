//! Measuring: time, memory, what the machine can do, and whether decoders agree.
//!
//! ```
//! use gpt2_burn::measure::Repeats;
//!
//! let device = gpt2_burn::device("flex")?;
//! let timing = Repeats { warm_up: 1, min_runs: 3, seconds: 0.0 }.time(&device, || Ok(()))?;
//! println!("{} s, usually {:?}", timing.median(), timing.spread());
//! # Ok::<(), gpt2_burn::Error>(())
//! ```

mod agree;
mod clock;
mod fit;
mod memory;
mod peaks;

pub use crate::summary::{median, quantile};
pub use agree::{Divergence, TIE, Verdict, check_greedy, check_greedy_against, logit_drift};
pub use clock::{Clock, Repeats, Timing};
pub use fit::{CurveFit, Growth};
pub use memory::{DeviceMemory, MemoryWatch, ProcessMemory, device_memory, process_memory, reset_peak_memory};
pub use peaks::{ProductRates, attention_rate, multiply_rate, peaks, product_rates, read_bandwidth, write_rate};
