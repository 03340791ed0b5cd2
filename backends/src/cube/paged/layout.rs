//! [`PagedRow`]s as kernels read them: what changes from step to step, and what does not.
//!
//! A step of one new token and one query a row, taken again and again, changes the context lengths (which
//! [`advance`](crate::Gpt2Ops::advance) does on the device) and now and then the page table; tokens and queries stay as they are.

use burn::backend::ops::IntTensorOps;
use burn::tensor::{Element, TensorData};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use bytemuck::Pod;

use crate::PagedRow;

/// Where each row has its pages, and how many tokens they hold before the new ones.
#[derive(Clone)]
pub struct PageTable {
    /// `[B, W]` in u32: the pages of each row, in order. W is at least 1; what is not used is 0.
    pub pages: CubeTensor,
    /// `[B]` in i32.
    pub context_lens: CubeTensor,
}

impl PageTable {
    /// The pages of the rows: as many as they need for all of their tokens, and up to `width` of those that they may need later. Rows
    /// without new tokens have none.
    ///
    /// # Panics
    ///
    /// If [`PagedRow::check`] would, or a length is too large for 32 bits.
    pub fn new(rows: &[PagedRow], page_len: usize, width: usize, device: &CubeDevice) -> Self {
        let is_there = |row: &&PagedRow| row.new_len > 0;
        let needed = rows.iter().filter(is_there).map(|row| row.seq_len().div_ceil(page_len)).max();
        let width = needed.unwrap_or(0).max(width).max(1);
        let (mut pages, mut context_lens) = (vec![0_u32; rows.len() * width], vec![0_i32; rows.len()]);
        for (index, row) in rows.iter().enumerate().filter(|(_, row)| is_there(row)) {
            let known = row.pages.len().min(width);
            pages[index * width..][..known].copy_from_slice(&row.pages[..known]);
            context_lens[index] = int(row.context_len);
        }
        Self {
            pages: upload(pages, [rows.len(), width], device),
            context_lens: upload(context_lens, [rows.len()], device),
        }
    }

    /// Pages that a row may have, W.
    pub fn width(&self) -> usize {
        self.pages.meta.shape()[1]
    }
}

/// Whose the new tokens are.
#[derive(Clone)]
pub struct Tokens {
    /// `[N, 2]` in i32: the row of each, and how many of the row's new tokens are before it.
    pub places: CubeTensor,
}

impl Tokens {
    /// The new tokens of these rows.
    ///
    /// # Panics
    ///
    /// If a number is too large for 32 bits.
    pub fn new(rows: &[PagedRow], device: &CubeDevice) -> Self {
        let of_row = |(index, row): (usize, &PagedRow)| (0..row.new_len).flat_map(move |t| [int(index), int(t)]);
        let places: Vec<i32> = rows.iter().enumerate().flat_map(of_row).collect();
        let count = places.len() / 2;
        Self { places: upload(places, [count, 2], device) }
    }
}

/// Whose the queries are, in blocks of some of a row's.
#[derive(Clone)]
pub struct Queries {
    /// `[K, 4]` in i32: the row, how many of the row's new tokens are before the first query, which of all queries that is, and how many
    /// queries these are.
    pub blocks: CubeTensor,
}

impl Queries {
    /// Blocks of up to `of_block` queries.
    ///
    /// # Panics
    ///
    /// If a number is too large for 32 bits.
    pub fn new(rows: &[PagedRow], of_block: usize, device: &CubeDevice) -> Self {
        let (mut blocks, mut count) = (Vec::new(), 0);
        for (index, row) in rows.iter().enumerate() {
            for first in (0..row.query_len).step_by(of_block) {
                let queries = (row.query_len - first).min(of_block);
                blocks.extend([index, row.new_len - row.query_len + first, count, queries].map(int));
                count += queries;
            }
        }
        let of_all = blocks.len() / 4;
        Self { blocks: upload(blocks, [of_all, 4], device) }
    }

    /// How many blocks of so many queries the rows have.
    pub fn blocks(rows: &[PagedRow], of_block: usize) -> usize {
        rows.iter().map(|row| row.query_len.div_ceil(of_block)).sum()
    }
}

fn int(number: usize) -> i32 {
    i32::try_from(number).unwrap_or_else(|_| panic!("{number} is more than 32 bits hold"))
}

pub(super) fn upload<E: Element + Pod, const D: usize>(
    numbers: Vec<E>,
    shape: [usize; D],
    device: &CubeDevice,
) -> CubeTensor {
    CubeBackend::int_from_data(TensorData::new(numbers, shape), device)
}
