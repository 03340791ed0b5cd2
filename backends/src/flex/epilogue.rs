//! What is done with the sums of a product before they are written.

use pulp::{Simd, WithSimd};

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

    /// Finishes the sums of rows from `first` on and the columns of a tile, and writes them.
    ///
    /// # Safety
    ///
    /// No other thread may write the same rows and tile of `out`.
    #[allow(unsafe_code)]
    #[inline(always)]
    pub unsafe fn write<S: Simd, const R: usize>(
        &self,
        simd: S,
        sums: [[f32; TILE]; R],
        [first, tile]: [usize; 2],
        out: Output<'_>,
    ) {
        let mut sums = Aligned(sums);
        // A function of its own, compiled once for all numbers of rows.
        simd.vectorize(Write { epilogue: *self, sums: &mut sums.0, first, tile, out });
    }
}

/// Rows that begin where lines of the cache do: none of their registers lies in two.
#[repr(align(64))]
struct Aligned<const R: usize>([[f32; TILE]; R]);

/// What [`Epilogue::write`] does, which promises its safety.
struct Write<'a, 's> {
    epilogue: Epilogue<'a>,
    sums: &'s mut [[f32; TILE]],
    first: usize,
    tile: usize,
    out: Output<'a>,
}

impl WithSimd for Write<'_, '_> {
    type Output = ();

    #[allow(unsafe_code)]
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { epilogue: Epilogue { bias, gelu: form, residual }, sums, first, tile, out } = self;
        let (column, outputs) = (tile * TILE, out.width());
        let columns = TILE.min(outputs - column);
        let bias = bias.map(|bias| tile_of(&bias[column..column + columns]));
        for (row, sums) in (first..).zip(sums) {
            if let Some(bias) = &bias {
                add(sums, bias);
            }
            if let Some(form) = form {
                for chunk in sums.as_chunks_mut::<LANES>().0 {
                    with_width!(simd: S => gelu(chunk, form));
                }
            }
            if let Some(residual) = residual {
                let start = row * outputs + column;
                add(sums, &tile_of(&residual[start..start + columns]));
            }
            // SAFETY: whoever called `write` promises that nobody else writes these columns of these rows.
            let out = unsafe { out.row_part(row, column, columns) };
            match <&mut [f32; TILE]>::try_from(&mut *out) {
                Ok(out) => *out = *sums,
                Err(_) => out.copy_from_slice(&sums[..columns]),
            }
        }
    }
}

/// A row of a tile, zeros behind the last column: a length that is known when this is compiled needs no loop.
#[inline(always)]
fn tile_of(row: &[f32]) -> [f32; TILE] {
    match row.try_into() {
        Ok(row) => row,
        Err(_) => {
            let mut wide = [0.0; TILE];
            wide[..row.len()].copy_from_slice(row);
            wide
        }
    }
}

#[inline(always)]
fn add(sums: &mut [f32; TILE], other: &[f32; TILE]) {
    for column in 0..TILE {
        sums[column] += other[column];
    }
}
