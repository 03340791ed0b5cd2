//! New keys and values into the buffers of a cache, in place.

use burn::tensor::ElementConversion;
use rayon::prelude::*;

use super::attend::View;
use super::element::Element;
use crate::PackedRow;
use crate::metadata::firsts;

/// Elements from which on several threads copy.
const WORTH_THREADS: usize = 1 << 16;

/// Copies `new`, `[1, H, N, D]`, to where it belongs in `buffer`, which has slots of heads, capacity and width of a head as in
/// `shape`: the tokens of each row, one row after the other, to the positions of its slot that follow its context.
///
/// # Panics
///
/// If they do not fit.
pub fn append<E: Element>(
    buffer: &mut [E],
    [heads, capacity, head_dim]: [usize; 3],
    new: View<'_, E>,
    rows: &[PackedRow],
) {
    if buffer.is_empty() {
        return;
    }
    let of_slot = heads * capacity * head_dim;
    let mut by_slot = vec![None; buffer.len() / of_slot];
    for (row, first) in rows.iter().zip(firsts(rows)) {
        by_slot[row.slot] = Some((row, first));
    }
    let copied = heads * head_dim * rows.iter().map(|row| row.query_len).sum::<usize>();
    let of_thread = if copied < WORTH_THREADS { usize::MAX } else { 1 };
    buffer.par_chunks_exact_mut(capacity * head_dim).enumerate().with_min_len(of_thread).for_each(|(at, buffer)| {
        let (slot, head) = (at / heads, at % heads);
        let Some((row, first)) = by_slot[slot] else { return };
        let to = &mut buffer[row.context_len * head_dim..row.seq_len() * head_dim];
        for (t, to) in to.chunks_exact_mut(head_dim).enumerate() {
            to.copy_from_slice(new.position(0, head, first + t, head_dim));
            // As `ops::default::rounded` says.
            if E::OVERFLOWS {
                to.iter_mut().filter(|x| E::widen(&[**x])[0].is_infinite()).for_each(|x| *x = f32::NAN.elem());
            }
        }
    });
}
