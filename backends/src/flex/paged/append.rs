//! New keys and values into pages.
#![allow(unsafe_code)] // pages of a slab that other threads have, too

use super::{PageElement, Paged, Slab};
use crate::flex::lanes::LANES;

/// Writes one head's keys and values of a row's new tokens, of which `first` is the first among all, to its pages.
///
/// # Panics
///
/// If a page is not there.
///
/// # Safety
///
/// Meanwhile nobody else may use this head's part of the pages that are written, and the two slabs may not overlap.
#[inline(always)] // with the vector instructions of whoever calls it
pub unsafe fn append_row<E: PageElement>(
    paged: &Paged<'_>,
    slabs: [Slab<'_, E>; 2],
    index: usize,
    head: usize,
    first: usize,
) {
    let (row, [_, head_dim], page_len) = (&paged.rows[index], paged.shape, paged.page_len);
    let mut position = row.context_len;
    // As they are in pages.
    let mut new = vec![E::zeroed(); LANES.min(row.new_len) * head_dim];
    let (mut key_scales, mut value_scales) = ([0.0; LANES], [0.0; LANES]);
    while position < row.seq_len() {
        let (page, slot) = (row.pages[position / page_len], position % page_len);
        // Up to the end of the lanes that this position is in.
        let count = (LANES - slot % LANES).min(row.seq_len() - position);
        let token = |t: usize| first + position - row.context_len + t;
        // SAFETY: nobody else uses these parts, as the caller promises, and the slabs do not overlap.
        let [keys, values] = slabs.map(|slab| unsafe { slab.part_mut(page, head) });
        let (group, _) = keys[slot / LANES * LANES * head_dim..][..LANES * head_dim].as_chunks_mut::<LANES>();
        for t in 0..count {
            let key = paged.new_keys.position(0, head, token(t), head_dim);
            key_scales[t] = E::write(key, &mut new[t * head_dim..][..head_dim]);
        }
        match count {
            // A whole line at a time, and not a line for each element.
            LANES => {
                for (d, line) in group.iter_mut().enumerate() {
                    *line = std::array::from_fn(|t| new[t * head_dim + d]);
                }
            }
            _ => {
                for (t, key) in new.chunks_exact(head_dim).take(count).enumerate() {
                    for (line, key) in group.iter_mut().zip(key) {
                        line[slot % LANES + t] = *key;
                    }
                }
            }
        }
        for t in 0..count {
            let value = paged.new_values.position(0, head, token(t), head_dim);
            value_scales[t] = E::write(value, &mut values[(slot + t) * head_dim..][..head_dim]);
        }
        for (part, scales) in [(keys, key_scales), (values, value_scales)] {
            if let Some(to) = E::scales_mut(part, page_len).get_mut(slot..slot + count) {
                to.copy_from_slice(&scales[..count]);
            }
        }
        position += count;
    }
}
