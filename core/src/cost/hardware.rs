//! [`Hardware`] and its roofline.

use std::borrow::Cow;
use std::fmt;

use super::Work;
use crate::{Error, Result};

/// What bounds inference on a machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Hardware {
    /// Its name.
    pub name: Cow<'static, str>,
    /// Bytes per second from and to memory.
    pub bandwidth: f64,
    /// Floating-point operations per second, in the element type of the work.
    pub flops: f64,
    /// What a model's operations reach of both.
    pub reached: Reached,
    /// Bytes of memory; infinite if it is not known.
    pub memory: f64,
}

/// Rates in a model's own shapes, which [`Cost::seconds`](super::Cost::seconds) reckons with: those of a machine that was
/// measured. Of others they are not known, and taken for the peaks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reached {
    /// Bytes of weights per second that products with a single row read.
    pub weights: f64,
    /// Bytes of results per second that are written into memory of their own, which a system may have to find first.
    pub results: f64,
    /// Floating-point operations per second in products with matrices.
    pub linear: f64,
    /// Floating-point operations per second in attention's scores and values, softmax included.
    pub attention: f64,
}

impl Reached {
    /// The peaks: bytes and floating-point operations per second.
    fn peaks(bandwidth: f64, flops: f64) -> Self {
        Self { weights: bandwidth, results: bandwidth, linear: flops, attention: flops }
    }
}

/// Name for flags, name, GB/s, TFLOP/s dense in 16 bit with accumulation in f32, GB.
const PRESETS: [(&str, &str, f64, f64, f64); 8] = [
    ("t4", "NVIDIA T4", 300.0, 65.0, 16.0),
    ("v100", "NVIDIA V100 SXM2", 900.0, 125.0, 32.0),
    ("l4", "NVIDIA L4", 300.0, 121.0, 24.0),
    ("rtx4090", "NVIDIA GeForce RTX 4090", 1008.0, 165.2, 24.0),
    ("a100-40gb", "NVIDIA A100 SXM 40 GB", 1555.0, 312.0, 40.0),
    ("a100-80gb", "NVIDIA A100 SXM 80 GB", 2039.0, 312.0, 80.0),
    ("h100", "NVIDIA H100 SXM", 3350.0, 989.4, 80.0),
    ("h200", "NVIDIA H200 SXM", 4800.0, 989.4, 141.0),
];

impl Hardware {
    /// A machine of which this is known.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] for a rate that is not a positive number, or a memory that is none.
    pub fn new(name: impl Into<Cow<'static, str>>, bandwidth: f64, flops: f64, memory: f64) -> Result<Self> {
        let positive = |what, value: f64, valid: bool| {
            if valid && value > 0.0 { Ok(()) } else { Err(Error::mismatch(what, "a positive number", value)) }
        };
        positive("bytes per second", bandwidth, bandwidth.is_finite())?;
        positive("FLOPs per second", flops, flops.is_finite())?;
        positive("bytes of memory", memory, true)?;
        Ok(Self { name: name.into(), bandwidth, flops, reached: Reached::peaks(bandwidth, flops), memory })
    }

    /// The same, with what a model's operations reach of its rates.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] for a rate that is not a positive number.
    pub fn with_reached(self, reached: Reached) -> Result<Self> {
        let Reached { weights, results, linear, attention } = reached;
        for (what, rate) in [
            ("bytes of weights per second", weights),
            ("bytes of results per second", results),
            ("FLOPs per second of products", linear),
            ("FLOPs per second of attention", attention),
        ] {
            if !(rate.is_finite() && rate > 0.0) {
                return Err(Error::mismatch(what, "a positive number", rate));
            }
        }
        Ok(Self { reached, ..self })
    }

    /// A machine by the name that [`preset_names`](Self::preset_names) gives it, with the rates of its data sheet: dense,
    /// in 16 bit on matrix units, where those accumulate in f32.
    ///
    /// | name | GB/s | TFLOP/s | GB | source |
    /// |---|---|---|---|---|
    /// | `t4` | 300 | 65 | 16 | NVIDIA T4 Tensor Core GPU Datasheet (2019) |
    /// | `v100` | 900 | 125 | 32 | NVIDIA V100 Tensor Core GPU Datasheet (2020), SXM2 |
    /// | `l4` | 300 | 121 | 24 | NVIDIA L4 Tensor Core GPU Datasheet (2023), half of the figure with sparsity |
    /// | `rtx4090` | 1008 | 165.2 | 24 | NVIDIA Ada GPU Architecture white paper (2022), appendix A |
    /// | `a100-40gb` | 1555 | 312 | 40 | NVIDIA A100 Tensor Core GPU Datasheet (2020) |
    /// | `a100-80gb` | 2039 | 312 | 80 | NVIDIA A100 80GB Datasheet (2021), SXM |
    /// | `h100` | 3350 | 989.4 | 80 | NVIDIA H100 Tensor Core GPU Architecture white paper (2023), table 2, SXM5 |
    /// | `h200` | 4800 | 989.4 | 141 | NVIDIA H200 Datasheet (2023), half of the figure with sparsity |
    pub fn preset(name: &str) -> Option<Self> {
        let &(_, name, bandwidth, flops, memory) = PRESETS.iter().find(|row| row.0 == name)?;
        let (bandwidth, flops, memory) = (bandwidth * 1e9, flops * 1e12, memory * 1e9);
        Some(Self { name: name.into(), bandwidth, flops, reached: Reached::peaks(bandwidth, flops), memory })
    }

    /// The names that [`preset`](Self::preset) knows.
    pub fn preset_names() -> impl Iterator<Item = &'static str> {
        PRESETS.iter().map(|row| row.0)
    }

    /// FLOPs per byte at which computing takes as long as reading: below, the memory is what bounds.
    pub fn ridge_point(&self) -> f64 {
        self.flops / self.bandwidth
    }

    /// The least time for some work (Williams et al., *Roofline*, 2009): reading and computing overlap, the slower one bounds.
    pub fn roofline(&self, work: Work) -> Roofline {
        Roofline { compute_seconds: work.flops / self.flops, memory_seconds: work.bytes / self.bandwidth }
    }
}

/// Seconds that some work takes at least.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Roofline {
    /// If only arithmetic took time.
    pub compute_seconds: f64,
    /// If only memory took time.
    pub memory_seconds: f64,
}

impl Roofline {
    /// The longer of both.
    pub fn seconds(&self) -> f64 {
        self.compute_seconds.max(self.memory_seconds)
    }

    /// Which of both.
    pub fn bound(&self) -> Bound {
        if self.compute_seconds > self.memory_seconds { Bound::Compute } else { Bound::Memory }
    }
}

/// What bounds some work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Arithmetic: the intensity is above the ridge point.
    Compute,
    /// The memory's bandwidth.
    Memory,
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Compute => "compute",
            Self::Memory => "memory",
        })
    }
}
