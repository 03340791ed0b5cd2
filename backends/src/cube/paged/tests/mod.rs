//! Rows of tokens whose keys and values are known, in pages here and there.

mod bits;
mod refused;
#[cfg(not(feature = "fusion"))] // whose tensors are not those of the kernels
mod tables;
mod written;

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::cube::tests::random;
use crate::{PagedRow, append_pages, attend_pages};

/// Tokens of a sequence: what is at a position depends on the number, the position and the head alone.
#[derive(Clone, Copy, Debug)]
struct Sequence {
    number: u64,
    /// Its first pages are those of sequence 0.
    common: usize,
    context_len: usize,
    new_len: usize,
    query_len: usize,
}

/// `[H, L, D]`
#[derive(Clone, Copy, Debug)]
struct Page {
    heads: usize,
    len: usize,
    head_dim: usize,
}

impl Sequence {
    /// Keys, values or queries, `[n, H, D]`, of positions in a range.
    fn states(self, range: Range<usize>, page: Page, what: u64) -> Vec<f32> {
        let state = |position: usize| {
            let number = if position < self.common * page.len { 0 } else { self.number };
            let seed = (number * 5000 + position as u64) * 3 + what;
            let of_position: Vec<f32> = random([page.heads, page.head_dim], seed).try_into_vec_as().unwrap();
            of_position
        };
        range.flat_map(state).collect()
    }
}

/// What sequences attend to in one call, all contexts having been written before: what is not is NaN. Pages are dealt so that
/// `placed` changes where they are.
struct Batch {
    rows: Vec<PagedRow>,
    pages: usize,
    page: Page,
    sequences: Vec<Sequence>,
}

impl Batch {
    fn new(sequences: &[Sequence], page: Page, placed: u32) -> Self {
        let held = |sequence: &Sequence| (sequence.context_len + sequence.new_len).div_ceil(page.len);
        // Sequence 0 lends its first pages.
        let common = sequences.iter().map(|sequence| sequence.common).max().unwrap_or(0);
        let all = common + sequences.iter().map(|sequence| held(sequence) - sequence.common).sum::<usize>();
        let mut next = common;
        let place = |page: usize| ((page as u32) + placed) % all as u32;
        let rows = sequences.iter().map(|sequence| {
            let own = held(sequence) - sequence.common;
            let pages = (0..sequence.common).chain(next..next + own).map(place).collect();
            next += own;
            let Sequence { context_len, new_len, query_len, .. } = *sequence;
            PagedRow { pages, context_len, new_len, query_len }
        });
        Self { rows: rows.collect(), pages: all, page, sequences: sequences.to_vec() }
    }

    fn tensor(&self, device: &Device, what: u64, range: impl Fn(&Sequence) -> Range<usize>) -> Tensor<3> {
        let of = |sequence: &Sequence| sequence.states(range(sequence), self.page, what);
        let numbers: Vec<f32> = self.sequences.iter().flat_map(of).collect();
        let [heads, head_dim] = [self.page.heads, self.page.head_dim];
        let count = numbers.len() / (heads * head_dim);
        Tensor::from_data(TensorData::new(numbers, [count, heads, head_dim]), device)
    }

    /// Pages with the contexts.
    fn slabs(&self, dtype: DType, device: &Device) -> [Tensor<4>; 2] {
        let Page { heads, len, head_dim } = self.page;
        let mut slabs = [0, 1].map(|_| Tensor::full([self.pages, heads, len, head_dim], f32::NAN, (device, dtype)));
        for (row, sequence) in self.rows.iter().zip(&self.sequences).filter(|(row, _)| row.context_len > 0) {
            let alone = Self { rows: vec![], pages: 0, page: self.page, sequences: vec![*sequence] };
            let new = [0, 1].map(|what| alone.tensor(device, what, |sequence| 0..sequence.context_len));
            let row = PagedRow { context_len: 0, new_len: row.context_len, query_len: 0, ..row.clone() };
            slabs = append_pages(new, slabs, vec![row].into());
        }
        slabs
    }

    fn new_states(&self, device: &Device) -> [Tensor<3>; 2] {
        [0, 1].map(|what| {
            self.tensor(device, what, |sequence| sequence.context_len..sequence.context_len + sequence.new_len)
        })
    }

    fn query(&self, device: &Device) -> Tensor<3> {
        self.tensor(device, 2, |sequence| {
            let end = sequence.context_len + sequence.new_len;
            end - sequence.query_len..end
        })
    }

    fn rows(&self) -> Arc<[PagedRow]> {
        self.rows.clone().into()
    }

    fn attend(&self, dtype: DType, device: &Device) -> Tensor<2> {
        let slabs = self.slabs(dtype, device);
        attend_pages(self.query(device), self.new_states(device), slabs, self.rows()).0
    }

    /// The bits of each row's results.
    fn bits(&self, dtype: DType, device: &Device) -> Vec<Vec<u32>> {
        self.of_rows(self.attend(dtype, device))
    }

    fn of_rows(&self, out: Tensor<2>) -> Vec<Vec<u32>> {
        let width = self.page.heads * self.page.head_dim;
        let numbers: Vec<f32> = out.try_into_vec_as().unwrap();
        assert!(numbers.iter().all(|number| number.is_finite()));
        let mut rest = &numbers[..];
        let mut next = |row: &PagedRow| {
            let (of_row, others) = rest.split_at(row.query_len * width);
            rest = others;
            of_row.iter().map(|number| number.to_bits()).collect()
        };
        self.rows.iter().map(&mut next).collect()
    }
}

fn prompt(number: u64, new_len: usize) -> Sequence {
    Sequence { number, common: 0, context_len: 0, new_len, query_len: new_len }
}

fn dtypes(device: &Device) -> Vec<DType> {
    [DType::F32, DType::F16, DType::BF16].into_iter().filter(|dtype| device.supports_dtype(*dtype)).collect()
}
