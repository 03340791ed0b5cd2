//! Attention over pages: [`PagedRow`] says whose the new tokens of a batch are and where they go, [`attend_pages`] writes them there and
//! attends; what else is done with pages.

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::tensor::{DType, Device, Element, Tensor, TensorData, bf16, f16};
use bytemuck::Zeroable;

use crate::capabilities::{has_page_kernels, is_asynchronous};
use crate::ops::Gpt2Ops;

/// Consecutive new tokens of one sequence whose keys and values lie in pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagedRow {
    /// The pages of its positions: page i has positions `page_len i..page_len (i + 1)`.
    pub pages: Vec<u32>,
    /// Tokens that the pages hold before the new ones.
    pub context_len: usize,
    /// New tokens, whose keys and values are written.
    pub new_len: usize,
    /// How many of the last of them attend.
    pub query_len: usize,
}

impl PagedRow {
    /// Tokens that it has with the new ones; `usize::MAX` if they cannot be counted.
    pub fn seq_len(&self) -> usize {
        self.context_len.saturating_add(self.new_len)
    }

    /// Which of its pages are written.
    fn written(&self, page_len: usize) -> &[u32] {
        match self.new_len {
            0 => &[],
            _ => &self.pages[self.context_len / page_len..self.seq_len().div_ceil(page_len)],
        }
    }

    /// Checks rows of so many new tokens and queries over a slab of so many pages.
    ///
    /// # Panics
    ///
    /// If the counts are others, a page is not there, a row has too few pages or more queries than new tokens, or a page that is
    /// written is named twice.
    pub(crate) fn check(rows: &[Self], [new, queries]: [usize; 2], pages: usize, page_len: usize) {
        let (mut of_rows, mut seen) = ([0, 0], vec![0_u8; pages]);
        // What has nothing new is neither read nor written.
        for row in rows.iter().filter(|row| row.new_len > 0 || row.query_len > 0) {
            assert!(row.query_len <= row.new_len, "{row:?} has more queries than new tokens");
            assert!(row.seq_len().div_ceil(page_len) <= row.pages.len(), "{row:?} has too few pages of {page_len}");
            let held = &row.pages[..row.seq_len().div_ceil(page_len)];
            assert!(held.iter().all(|page| (*page as usize) < pages), "{row:?} in a slab of {pages} pages");
            held.iter().for_each(|page| seen[*page as usize] = seen[*page as usize].saturating_add(1));
            of_rows = [of_rows[0] + row.new_len, of_rows[1] + row.query_len];
        }
        assert_eq!(of_rows, [new, queries], "new tokens and queries of all rows");
        for row in rows {
            let is_alone = row.written(page_len).iter().all(|page| seen[*page as usize] == 1);
            assert!(is_alone, "{row:?} writes to a page that is named twice");
        }
    }
}

/// Words of 4 bytes that a position of a head takes in pages of integers: its numbers, of a byte each, and their scale. It is never the
/// number of its numbers.
pub fn int8_width(head_dim: usize) -> usize {
    let width = head_dim.div_ceil(4) + 1;
    if width == head_dim { width + 1 } else { width }
}

/// Pages, `[P, H, L, D]`, of zeros. Pages of [`DType::I8`] are `[P, H, L, W]` of [`DType::F32`], with W the [`int8_width`] of D: a
/// [device](has_page_kernels) with kernels for them keeps integers there, and a scale for each head and position. On CPUs, the system gives them memory when they are written to, and not before.
pub fn new_pages(shape: [usize; 4], dtype: DType, device: &Device) -> Tensor<4> {
    fn zeros<E: Element + Zeroable>(shape: [usize; 4]) -> TensorData {
        TensorData::new(bytemuck::zeroed_vec::<E>(shape.iter().product()), shape)
    }
    let options = (device, dtype);
    // burn's own zeros are a copy of some, and so they are written. The system is not asked for large pages: it would give 2 MB with
    // the first token, and attention is no faster with them.
    match dtype {
        _ if is_asynchronous(device) => Tensor::zeros(shape, options),
        DType::F32 => Tensor::from_data(zeros::<f32>(shape), options),
        DType::F16 => Tensor::from_data(zeros::<f16>(shape), options),
        DType::BF16 => Tensor::from_data(zeros::<bf16>(shape), options),
        DType::I8 => {
            let [pages, heads, page_len, head_dim] = shape;
            new_pages([pages, heads, page_len, int8_width(head_dim)], DType::F32, device)
        }
        _ => Tensor::zeros(shape, options),
    }
}

/// Writes new keys and values to the pages of their rows, and computes `softmax(q k^T / sqrt D) v` over all that each query sees there;
/// returns the result and the pages. Pages that nothing else refers to are written in place.
///
/// The query is divided by sqrt D first. Of one page: `m` is the largest score that a query sees, `w = exp(score - m)`, `l` the sum of the weights, and `o` the weighted sum of the
/// values. Pages are folded from the left, from (-inf, 0, 0): `M = max(m1, m2)`, `a = exp(m1 - M)`, `b = exp(m2 - M)`,
/// `l = l1 a + l2 b`, `o = o1 a + o2 b`, and in the end `o / l` (Milakov and Gimelshein, *Online normalizer calculation for softmax*, 2018). So rows that share a
/// page can read it together, and none of their sums depends on that.
///
/// # Shapes
///
/// - query: `[M, H, D]`, of each row the last `query_len` new tokens
/// - new keys and values: `[N, H, D]`
/// - pages, of keys and of values: `[P, H, L, D]`, with L a multiple of 16; where in `[L, D]` an element lies is the device's own affair
/// - result: `[M, H D]`
///
/// # Panics
///
/// If shapes or element types do not fit, a row has too few pages or more queries than new tokens, or a page that is written is
/// named twice.
pub fn attend_pages(
    query: Tensor<3>,
    [new_keys, new_values]: [Tensor<3>; 2],
    [keys, values]: [Tensor<4>; 2],
    rows: Arc<[PagedRow]>,
) -> (Tensor<2>, [Tensor<4>; 2]) {
    check([&new_keys, &new_values], [&keys, &values]);
    let ([pages, heads, page_len, _], [new, _, head_dim], [queries, ..]) = (keys.dims(), new_keys.dims(), query.dims());
    assert_eq!(query.dims(), [queries, heads, head_dim], "heads and width of the query");
    PagedRow::check(&rows, [new, queries], pages, page_len);
    let (out, keys, values) = <Dispatch as Gpt2Ops>::attend_pages(
        query.into_dispatch(),
        new_keys.into_dispatch(),
        new_values.into_dispatch(),
        keys.into_dispatch(),
        values.into_dispatch(),
        rows,
    );
    (Tensor::from_dispatch(out), [keys, values].map(Tensor::from_dispatch))
}

/// Writes new keys and values as [`attend_pages`] does, and no more.
///
/// # Panics
///
/// As [`attend_pages`].
pub fn append_pages(
    [new_keys, new_values]: [Tensor<3>; 2],
    [keys, values]: [Tensor<4>; 2],
    rows: Arc<[PagedRow]>,
) -> [Tensor<4>; 2] {
    check([&new_keys, &new_values], [&keys, &values]);
    let ([pages, _, page_len, _], [new, ..]) = (keys.dims(), new_keys.dims());
    PagedRow::check(&rows, [new, rows.iter().map(|row| row.query_len).sum()], pages, page_len);
    let (keys, values) = <Dispatch as Gpt2Ops>::append_pages(
        new_keys.into_dispatch(),
        new_values.into_dispatch(),
        keys.into_dispatch(),
        values.into_dispatch(),
        rows,
    );
    [keys, values].map(Tensor::from_dispatch)
}

/// Makes pages, of keys and of values, copies of others: of each pair, the second one of the first one, in order.
///
/// # Panics
///
/// If there is no such page.
pub fn copy_pages(pages: [Tensor<4>; 2], copies: Arc<[[u32; 2]]>) -> [Tensor<4>; 2] {
    pages.map(|pages| {
        let [count, ..] = pages.dims();
        assert!(copies.iter().flatten().all(|page| (*page as usize) < count), "{copies:?} of {count} pages");
        match copies.is_empty() {
            true => pages,
            false => Tensor::from_dispatch(<Dispatch as Gpt2Ops>::copy_pages(pages.into_dispatch(), copies.clone())),
        }
    })
}

/// The keys and the values at the first `len` positions of a row with these pages, `[len, H, D]` both: the order in which files have
/// them. What integers stand for is handed out in f32; written to pages, it becomes the same integers again.
///
/// # Panics
///
/// If `len` is 0, there are not so many pages, one is not there, or pages are not shaped as [`attend_pages`] says.
pub fn read_pages([keys, values]: [Tensor<4>; 2], pages: Arc<[u32]>, len: usize, head_dim: usize) -> [Tensor<3>; 2] {
    assert_eq!(keys.dims(), values.dims(), "keys are shaped as values");
    let [count, _, page_len, _] = keys.dims();
    check_pages(&keys, head_dim);
    assert!(len > 0 && len.div_ceil(page_len) <= pages.len(), "{len} positions of {} pages of {page_len}", pages.len());
    assert!(pages.iter().all(|page| (*page as usize) < count), "{pages:?} of {count} pages");
    let (keys, values) =
        <Dispatch as Gpt2Ops>::read_pages(keys.into_dispatch(), values.into_dispatch(), pages, len, head_dim);
    [keys, values].map(Tensor::from_dispatch)
}

/// Checks that new states, `[N, H, D]`, fit to pages, `[P, H, L, D]`.
fn check([new_keys, new_values]: [&Tensor<3>; 2], [keys, values]: [&Tensor<4>; 2]) {
    let ([_, heads, ..], [_, new_heads, head_dim]) = (keys.dims(), new_keys.dims());
    assert_eq!(keys.dims(), values.dims(), "keys are shaped as values");
    assert_eq!(new_keys.dims(), new_values.dims(), "new keys are shaped as new values");
    assert_eq!([keys.dtype(), new_keys.dtype()], [values.dtype(), new_values.dtype()], "types of keys and of values");
    check_pages(keys, head_dim);
    assert_eq!(new_heads, heads, "heads of what is new");
}

/// Checks that pages, `[P, H, L, D]`, hold something, and whole registers of positions.
fn check_pages(pages: &Tensor<4>, head_dim: usize) {
    let [_, heads, page_len, width] = pages.dims();
    let is_int8 = pages.dtype() == DType::F32 && width == int8_width(head_dim) && has_page_kernels(&pages.device());
    assert!(width == head_dim || is_int8, "pages of heads of {head_dim} numbers, {width} wide");
    assert!(heads > 0 && head_dim > 0, "pages of {heads} heads of {head_dim} numbers");
    assert!(page_len > 0 && page_len.is_multiple_of(16), "pages of {page_len} positions, and not of a multiple of 16");
}
