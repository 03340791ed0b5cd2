//! [`Slabs`]: the memory of pages.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};

use super::{States, head_bytes};
use crate::Threads;
use crate::backends::{self, PagedRow};
use crate::memory::product;

/// Keys and values of all pages of each layer.
///
/// They have no second handle: what computes with a layer's takes them out and puts them back, since a tensor that something else
/// refers to is copied when it is written to.
#[derive(Debug)]
pub struct Slabs {
    /// `[P, H, L, D]` both; none before the first page is taken.
    layers: Vec<Option<[Tensor<4>; 2]>>,
    /// P, H, L and D.
    shape: [usize; 4],
    /// Whether all of it is written when it is made. If not, the system gives memory to the pages that are written to, and only
    /// then.
    is_written: bool,
    dtype: DType,
    device: Device,
}

impl Slabs {
    /// Of so many layers, for pages of `[H, L, D]`, and without any.
    pub fn new(layers: usize, page: [usize; 3], is_written: bool, dtype: DType, device: &Device) -> Self {
        let [heads, page_len, head_dim] = page;
        let layers = std::iter::repeat_with(|| None).take(layers).collect();
        Self { layers, shape: [0, heads, page_len, head_dim], is_written, dtype, device: device.clone() }
    }

    /// Pages for which there is room.
    pub fn pages(&self) -> usize {
        self.shape[0]
    }

    /// Positions of a page.
    pub fn page_len(&self) -> usize {
        self.shape[2]
    }

    /// Whether all of it is written when it is made.
    pub fn is_written(&self) -> bool {
        self.is_written
    }

    /// Bytes that are there twice while slabs with so many pages in use become longer: those of a layer, since one follows the other.
    pub fn copied(&self, held: usize) -> usize {
        match self.pages() {
            0 => 0,
            pages => self.bytes(if self.is_written { pages } else { held }) / self.layers.len().max(1),
        }
    }

    /// Bytes of so many pages: 2 x layers x width x positions x element size for each, and the scales of integers.
    pub fn bytes(&self, pages: usize) -> usize {
        let [_, heads, page_len, head_dim] = self.shape;
        product([pages, 2 * self.layers.len(), heads, page_len, head_bytes(head_dim, self.dtype)])
    }

    /// Makes room for `pages`, of which the first `held` hold something: those are copied if there was less room.
    pub fn make_room(&mut self, pages: usize, held: usize) {
        let before = self.pages();
        if pages <= before {
            return;
        }
        self.shape[0] = pages;
        let (shape, is_written, dtype, device) = (self.shape, self.is_written, self.dtype, &self.device);
        let longer = |slab: Option<Tensor<4>>| {
            let new = match is_written {
                true => backends::new_pages(shape, dtype, device).add_scalar(1.0),
                false => backends::new_pages(shape, dtype, device),
            };
            match slab {
                Some(slab) => {
                    let [_, heads, page_len, width] = slab.dims();
                    new.slice_assign([0..held, 0..heads, 0..page_len, 0..width], slab.narrow(0, 0, held))
                }
                None => new,
            }
        };
        let make = |layer: &mut Option<[Tensor<4>; 2]>| {
            let [keys, values] = layer.take().map_or([None, None], |layer| layer.map(Some));
            *layer = Some([longer(keys), longer(values)]);
        };
        match before {
            0 => {
                let written = if is_written { self.bytes(pages) } else { 0 };
                for_each(&mut self.layers, written, make);
            }
            // One after the other: no more than one is there twice.
            _ => self.layers.iter_mut().for_each(make),
        }
    }

    /// Writes new keys and values of a layer, `[N, H, D]`, to pages, and attends over them with `query`, `[M, H, D]`: `[M, H D]`.
    pub fn attend(&mut self, layer: usize, query: Tensor<3>, new: [Tensor<3>; 2], rows: Arc<[PagedRow]>) -> Tensor<2> {
        let (out, slabs) = backends::attend_pages(query, new, self.take(layer), rows);
        self.layers[layer] = Some(slabs);
        out
    }

    /// Writes new keys and values of a layer, `[N, H, D]`, to pages.
    pub fn append(&mut self, layer: usize, new: [Tensor<3>; 2], rows: Arc<[PagedRow]>) {
        self.layers[layer] = Some(backends::append_pages(new, self.take(layer), rows));
    }

    /// Makes pages copies of others: of each pair, the second one of the first one, in order.
    pub fn copy(&mut self, copies: &Arc<[[u32; 2]]>) {
        if copies.is_empty() {
            return;
        }
        let written = self.bytes(copies.len());
        for_each(&mut self.layers, written, |layer| {
            *layer = layer.take().map(|slabs| backends::copy_pages(slabs, copies.clone()));
        });
    }

    /// Keys and values at some positions of what these pages hold in each layer, `[1, H, n, D]`.
    pub fn read(&self, pages: &Arc<[u32]>, positions: Range<usize>) -> Vec<States> {
        let [.., head_dim] = self.shape;
        let of_layer = |slabs: &[Tensor<4>; 2]| {
            let [keys, values] = backends::read_pages(slabs.clone(), pages.clone(), positions.end, head_dim);
            let rectangle = |states: Tensor<3>| states.swap_dims(0, 1).unsqueeze::<4>();
            let part = |states| rectangle(states).narrow(2, positions.start, positions.len());
            States { keys: part(keys), values: part(values) }
        };
        self.layers.iter().flatten().map(of_layer).collect()
    }

    /// A layer's `(keys, values)`, for tests that look at where they lie.
    pub fn of_layer(&self, layer: usize) -> Option<(Tensor<4>, Tensor<4>)> {
        self.layers.get(layer)?.clone().map(|[keys, values]| (keys, values))
    }

    fn take(&mut self, layer: usize) -> [Tensor<4>; 2] {
        self.layers[layer].take().expect("a step takes its pages before it writes to them")
    }
}

/// Bytes below which threads take longer to wake than to write them.
const WORTH_THREADS: usize = 1 << 20;

/// Does `work` on each layer, in all of which so many bytes are written: by several threads, since most of the time goes into asking the
/// system for memory, which they do faster.
fn for_each<T: Send>(layers: &mut [T], written: usize, work: impl Fn(&mut T) + Send + Sync) {
    match written < WORTH_THREADS {
        true => layers.iter_mut().for_each(work),
        false => Threads::for_each(layers.iter_mut().collect(), work),
    }
}
