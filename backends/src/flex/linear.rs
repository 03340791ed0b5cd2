//! `x W + b` for any number of rows, with one order of adding.
//!
//! The weights lie in tiles of 32 columns, a tile's elements in the order in which they are read, so that a product
//! streams them once from end to end. A tile is multiplied with as many rows at a time as registers hold sums of (12 with
//! AVX-512, 3 with AVX2 or NEON), over the whole length of the columns. So each element of the result is one chain of
//! fused multiply-adds from the first to the last input, whatever the number of rows or threads: its bits do not depend
//! on the company it is computed in. With one row the memory is the limit, with many the multipliers; nothing else is
//! written for either case.

use std::cell::RefCell;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::element::Element;
use super::epilogue::Epilogue;
use super::output::Output;
use super::prefetch::prefetch_behind;
use super::schedule::{Group, for_tiles, split};
use crate::ops::TILE;
use crate::pages::zeroed;

/// Rows of `x` that are multiplied at a time: as many sums as there are registers for.
const MAX_ROWS: usize = 12;

/// Inputs of which the elements of a group of rows lie in the nearest cache while their panel is packed.
const PANEL_BLOCK: usize = 256;

/// Most numbers that are kept for the panels of the next product: 512 rows of GPT-2's widest activations, 6 MB.
const MAX_KEPT: usize = 512 * 4 * 768;

/// Groups of rows from which on a tile of halves is widened once for all of them, and not in each of their products.
const WORTH_WIDENING: usize = 6;

/// Below as many multiplications threads cost more than they bring.
const WORTH_THREADS: usize = 200_000;

/// Number of elements of `[inputs, outputs]` in tiles.
pub fn packed_len(inputs: usize, outputs: usize) -> usize {
    outputs.div_ceil(TILE) * TILE * inputs
}

/// Puts a matrix into tiles: `at(input, output)` is an element; columns behind the last are 0.
pub fn pack<E: Element>(inputs: usize, outputs: usize, at: impl Fn(usize, usize) -> E + Sync) -> Vec<E> {
    let mut tiles = zeroed(packed_len(inputs, outputs));
    tiles.par_chunks_exact_mut(TILE * inputs.max(1)).enumerate().for_each(|(tile, elements)| {
        let columns = TILE.min(outputs - tile * TILE);
        for (input, row) in elements.chunks_exact_mut(TILE).enumerate() {
            for (column, element) in row[..columns].iter_mut().enumerate() {
                *element = at(input, tile * TILE + column);
            }
        }
    });
    tiles
}

/// A matrix in tiles.
#[derive(Clone, Copy)]
pub struct Packed<'a, E> {
    tiles: &'a [E],
    inputs: usize,
    outputs: usize,
}

impl<'a, E: Element> Packed<'a, E> {
    /// What [`pack`] made of `[inputs, outputs]`.
    ///
    /// # Panics
    ///
    /// If there are not as many elements.
    pub fn new(tiles: &'a [E], inputs: usize, outputs: usize) -> Self {
        assert_eq!(tiles.len(), packed_len(inputs, outputs), "elements of a packed [{inputs}, {outputs}]");
        Self { tiles, inputs, outputs }
    }

    /// Column `output` of the matrix, an element for each input.
    pub fn column(&self, output: usize) -> impl Iterator<Item = E> + 'a {
        let tile = &self.tiles[output / TILE * TILE * self.inputs..][..TILE * self.inputs];
        tile.iter().skip(output % TILE).step_by(TILE).copied()
    }
}

/// `out = x W`, and what `epilogue` says; `x` is `[rows, inputs]`, `out` is `[rows, outputs]`.
///
/// # Panics
///
/// If the lengths do not fit together.
pub fn linear<E: Element>(arch: Arch, x: &[f32], weights: Packed<'_, E>, epilogue: Epilogue<'_>, out: &mut [f32]) {
    let Packed { inputs, outputs, .. } = weights;
    if outputs == 0 {
        return assert!(out.is_empty(), "length of the result");
    }
    let rows = out.len() / outputs;
    assert_eq!((x.len(), out.len()), (rows * inputs, rows * outputs), "lengths of x and of the result");
    epilogue.check(rows, outputs);
    if rows == 0 {
        return;
    }
    let groups = split(rows, arch.dispatch(MaxRows));
    let out = Output::new(out, outputs);
    // A weight costs about as much to read as to multiply with three rows.
    let worth_threads = inputs * outputs * (rows + 3) >= WORTH_THREADS;
    with_panels(x, &groups, inputs, |panels| {
        for_tiles(outputs, &groups, worth_threads, |tile, groups| {
            arch.dispatch(Tile { tile, weights, groups, panels, epilogue, out });
        });
    });
}

thread_local! {
    /// What [`pack_panel`] makes, again and again: memory that is asked for anew is cleared by the system, page by page.
    static PANEL_BUFFER: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Does `work` with `x` in groups of rows that are multiplied together: the first inputs of all rows of a group, then the
/// second ones...
fn with_panels(x: &[f32], groups: &[Group], inputs: usize, work: impl FnOnce(&[f32])) {
    let size = groups.first().map_or(1, |group| group.rows);
    if size == 1 || inputs == 0 {
        return work(x);
    }
    // Taken out, since a thread that waits may take up another product.
    let mut elements = PANEL_BUFFER.take();
    elements.resize(elements.len().max(x.len()), 0.0);
    let parts = elements[..x.len()].par_chunks_mut(size * inputs).zip(x.par_chunks(size * inputs));
    parts.for_each(|(to, from)| pack_panel(from, inputs, to));
    work(&elements[..x.len()]);
    if elements.len() <= MAX_KEPT {
        PANEL_BUFFER.set(elements);
    }
}

/// A group's rows, one behind the other in `from`.
fn pack_panel(from: &[f32], inputs: usize, to: &mut [f32]) {
    macro_rules! for_rows {
        ($($rows:literal)*) => {
            match from.len() / inputs {
                $($rows => {
                    let (to, _) = to.as_chunks_mut::<$rows>();
                    for (block, to) in to.chunks_mut(PANEL_BLOCK).enumerate() {
                        let part = |row| &from[row * inputs + block * PANEL_BLOCK..][..to.len()];
                        let parts: [&[f32]; $rows] = std::array::from_fn(part);
                        for (input, to) in to.iter_mut().enumerate() {
                            for row in 0..$rows {
                                to[row] = parts[row][input];
                            }
                        }
                    }
                })*
                rows => unreachable!("{rows} rows at a time"),
            }
        };
    }
    for_rows!(1 2 3 4 5 6 7 8 9 10 11 12);
}

/// How many rows' sums fit the registers.
const fn max_rows<S: Simd>() -> usize {
    match S::F32_LANES {
        16 => MAX_ROWS,
        8 | 4 => 3,
        _ => 1,
    }
}

struct MaxRows;

impl WithSimd for MaxRows {
    type Output = usize;

    fn with_simd<S: Simd>(self, _: S) -> usize {
        max_rows::<S>()
    }
}

/// One tile of the weights with the rows of some groups.
struct Tile<'a, E> {
    tile: usize,
    weights: Packed<'a, E>,
    groups: &'a [Group],
    panels: &'a [f32],
    epilogue: Epilogue<'a>,
    out: Output<'a>,
}

impl<E: Element> WithSimd for Tile<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { tile, weights: Packed { tiles, inputs, .. }, groups, panels, epilogue, out } = self;
        let (weights, _) = tiles[tile * TILE * inputs..][..TILE * inputs].as_chunks::<TILE>();
        if groups.len() >= WORTH_WIDENING && size_of::<E>() < size_of::<f32>() {
            // Widened once for all rows, into what stays in a near cache.
            let mut wide = Vec::with_capacity(inputs);
            for row in weights {
                wide.push(E::widen_with(simd, row));
            }
            return simd.vectorize(Products { tile, weights: &wide[..], groups, panels, epilogue, out });
        }
        simd.vectorize(Products { tile, weights, groups, panels, epilogue, out });
    }
}

/// The product of a tile, whose elements are `W`, with each group of rows: a function of its own for each `W`, also for that to
/// which others are widened.
struct Products<'a, 't, W> {
    tile: usize,
    weights: &'t [[W; TILE]],
    groups: &'a [Group],
    panels: &'a [f32],
    epilogue: Epilogue<'a>,
    out: Output<'a>,
}

impl<W: Element> WithSimd for Products<'_, '_, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match S::F32_LANES {
            16 => products::<S, W, 2>(simd, self),
            8 => products::<S, W, 4>(simd, self),
            4 => products::<S, W, 8>(simd, self),
            _ => products::<S, W, TILE>(simd, self),
        }
    }
}

/// `V` registers hold a row of the tile.
#[allow(unsafe_code)]
#[inline(always)]
fn products<S: Simd, W: Element, const V: usize>(simd: S, task: Products<'_, '_, W>) {
    let inputs = task.weights.len();
    for (turn, group) in task.groups.iter().enumerate() {
        let x = &task.panels[group.first * inputs..][..group.rows * inputs];
        macro_rules! for_rows {
            ($($rows:literal)*) => {
                match group.rows {
                    // Only what is asked for is compiled: few of them without wide registers.
                    $($rows if const { $rows <= max_rows::<S>() && V * S::F32_LANES == TILE } => {
                        let sums = match turn {
                            0 => product::<S, W, V, $rows, true>(simd, x.as_chunks().0, task.weights),
                            // By now the tile is near.
                            _ => product::<S, W, V, $rows, false>(simd, x.as_chunks().0, task.weights),
                        };
                        // SAFETY: tasks differ in their tile or in their groups of rows.
                        unsafe { task.epilogue.write(simd, sums, [group.first, task.tile], task.out) };
                    })*
                    rows => unreachable!("{rows} rows at a time"),
                }
            };
        }
        for_rows!(1 2 3 4 5 6 7 8 9 10 11 12);
    }
}

/// Sums of `R` rows and the columns of a tile, in the order of the inputs.
#[inline(always)]
fn product<S: Simd, E: Element, const V: usize, const R: usize, const FROM_MEMORY: bool>(
    simd: S,
    x: &[[f32; R]],
    weights: &[[E; TILE]],
) -> [[f32; TILE]; R] {
    let mut sums = [[simd.splat_f32s(0.0); V]; R];
    for (x, weights) in x.iter().zip(weights) {
        if FROM_MEMORY {
            prefetch_behind(weights);
        }
        let weights = E::widen_with(simd, weights);
        let (weights, _) = S::as_simd_f32s(&weights);
        for row in 0..R {
            let x = simd.splat_f32s(x[row]);
            for v in 0..V {
                sums[row][v] = simd.mul_add_f32s(weights[v], x, sums[row][v]);
            }
        }
    }
    let mut out = [[0.0; TILE]; R];
    for row in 0..R {
        let (out, _) = S::as_mut_simd_f32s(&mut out[row]);
        out[..V].copy_from_slice(&sums[row]);
    }
    out
}
