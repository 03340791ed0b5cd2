//! What is done with the sums of a product before they are written.

use pulp::Simd;

use super::gelu::gelu;
use super::lanes::{LANES, with_width};
use super::output::Output;
use crate::ops::{Gelu, TILE};

/// What is done with a sum before it is written.
#[derive(Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// Added to each row: `[outputs]`.
    pub bias: Option<&'a [f32]>,
    /// Put through GELU.
    pub gelu: Option<Gelu>,
    /// Added in the end: `[rows, outputs]`.
    pub residual: Option<&'a [f32]>,
}

impl Epilogue<'_> {
    /// # Panics
    ///
    /// If a length is not that of a result `[rows, outputs]`.
    pub fn check(&self, rows: usize, outputs: usize) {
        assert!(self.bias.is_none_or(|bias| bias.len() == outputs), "length of the bias");
        assert!(self.residual.is_none_or(|residual| residual.len() == rows * outputs), "length of the residual");
    }

    /// Finishes the sums of rows `first..first + R` and the columns of a tile, and writes them.
    ///
    /// # Safety
    ///
    /// No other thread may write the same rows and tile of `out`.
    #[allow(unsafe_code)]
    #[inline(always)]
    pub unsafe fn write<S: Simd, const R: usize>(
        &self,
        simd: S,
        mut sums: [[f32; TILE]; R],
        [first, tile]: [usize; 2],
        out: Output<'_>,
    ) {
        let (column, outputs) = (tile * TILE, out.width());
        let columns = TILE.min(outputs - column);
        for row in 0..R {
            let sums = &mut sums[row];
            if let Some(bias) = self.bias {
                add(sums, &bias[column..column + columns]);
            }
            if let Some(form) = self.gelu {
                for chunk in sums.as_chunks_mut::<LANES>().0 {
                    with_width!(simd: S => gelu(chunk, form));
                }
            }
            if let Some(residual) = self.residual {
                let start = (first + row) * outputs + column;
                add(sums, &residual[start..start + columns]);
            }
            // SAFETY: the caller promises that nobody else writes these columns of these rows.
            let out = unsafe { out.row_part(first + row, column, columns) };
            out.copy_from_slice(&sums[..columns]);
        }
    }
}

#[inline(always)]
fn add(sums: &mut [f32; TILE], other: &[f32]) {
    for column in 0..other.len() {
        sums[column] += other[column];
    }
}
