//! New keys and values into pages.
#![allow(unsafe_code)] // pages of a slab that other threads have, too

use burn::tensor::ElementConversion;

use super::{Paged, Slab};
use crate::flex::element::Element;
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
pub unsafe fn append_row<E: Element>(
    paged: &Paged<'_, E>,
    slabs: [Slab<'_, E>; 2],
    index: usize,
    head: usize,
    first: usize,
) {
    let (row, [_, head_dim], page_len) = (&paged.rows[index], paged.shape, paged.page_len);
    let mut position = row.context_len;
    while position < row.seq_len() {
        let (page, slot) = (row.pages[position / page_len], position % page_len);
        // Up to the end of the lanes that this position is in.
        let count = (LANES - slot % LANES).min(row.seq_len() - position);
        let token = |t: usize| first + position - row.context_len + t;
        // SAFETY: nobody else uses these parts, as the caller promises, and the slabs do not overlap.
        let [keys, values] = slabs.map(|slab| unsafe { slab.part_mut(page, head) });
        let (group, _) = keys[slot / LANES * LANES * head_dim..][..LANES * head_dim].as_chunks_mut::<LANES>();
        let of_token = |t: usize| paged.new_keys.position(0, head, token(t), head_dim);
        match count {
            // A whole line at a time, and not a line for each element.
            LANES => {
                let new: [&[E]; LANES] = std::array::from_fn(of_token);
                for (d, line) in group.iter_mut().enumerate() {
                    *line = std::array::from_fn(|t| rounded(new[t][d]));
                }
            }
            _ => {
                for t in 0..count {
                    for (line, key) in group.iter_mut().zip(of_token(t)) {
                        line[slot % LANES + t] = rounded(*key);
                    }
                }
            }
        }
        for t in 0..count {
            let value = paged.new_values.position(0, head, token(t), head_dim);
            let to = &mut values[(slot + t) * head_dim..][..head_dim];
            to.iter_mut().zip(value).for_each(|(to, value)| *to = rounded(*value));
        }
        position += count;
    }
}

/// As `ops::default::rounded` says.
fn rounded<E: Element>(x: E) -> E {
    if E::OVERFLOWS && E::widen(&[x])[0].is_infinite() { f32::NAN.elem() } else { x }
}
