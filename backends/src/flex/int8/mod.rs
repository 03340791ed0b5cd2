//! `x W + b` with weights of eight bits.
//!
//! Of each column, [`GROUP`] consecutive weights have a scale in common; so have as many numbers of a row of `x`, which are
//! rounded to eight bits too. The products within a group are whole numbers, added without rounding; from group to group one
//! chain of fused multiply-adds runs, as in [`linear`](super::linear). So here, too, the bits of an element do not depend on
//! the number of rows or threads, nor on the instructions that multiply.

mod dot;
mod linear;
mod rows;
mod weights;

pub(super) use crate::ops::{GROUP, QUAD};
pub use dot::Multiplier;
pub use linear::linear;
pub use weights::{Quantized, quantize};

/// Quads of a group.
const QUADS: usize = GROUP / QUAD;
