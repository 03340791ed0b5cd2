//! New keys and values into the buffers of a cache, in place.

use burn::tensor::ElementConversion;
use rayon::prelude::*;

use super::attend::View;
use super::element::Element;

/// Elements from which on several threads copy.
const WORTH_THREADS: usize = 1 << 16;

/// Of each row of `new`, `[B, H, T, D]`, copies the first `counts[row]` positions to those from `starts[row]` on of `buffer`,
/// which has heads, capacity and width of a head as in `shape`.
///
/// # Panics
///
/// If they do not fit.
pub fn append<E: Element>(
    buffer: &mut [E],
    [heads, capacity, head_dim]: [usize; 3],
    new: View<'_, E>,
    starts: &[usize],
    counts: &[usize],
) {
    assert_eq!(buffer.len(), starts.len() * heads * capacity * head_dim, "elements of the buffer");
    if buffer.is_empty() {
        return;
    }
    let copied = heads * head_dim * counts.iter().sum::<usize>();
    let of_thread = if copied < WORTH_THREADS { usize::MAX } else { 1 };
    buffer.par_chunks_exact_mut(capacity * head_dim).enumerate().with_min_len(of_thread).for_each(|(at, buffer)| {
        let (row, head) = (at / heads, at % heads);
        let positions = buffer[starts[row] * head_dim..].chunks_exact_mut(head_dim).take(counts[row]);
        assert!(starts[row] + counts[row] <= capacity, "{} behind {} of {capacity}", counts[row], starts[row]);
        for (position, to) in positions.enumerate() {
            to.copy_from_slice(new.position(row, head, position, head_dim));
            // As `ops::default::rounded` says.
            if E::OVERFLOWS {
                to.iter_mut().filter(|x| E::widen(&[**x])[0].is_infinite()).for_each(|x| *x = f32::NAN.elem());
            }
        }
    });
}
