//! [`AttentionMetadata`]: whose the tokens of a packed batch are, and where they stand.

use std::ops::Range;
use std::sync::Arc;

use burn::backend::Dispatch;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::ops::default::as_i32;

/// Consecutive new tokens of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedRow {
    /// Row of a cache's buffers that the sequence has.
    pub slot: usize,
    /// Tokens that it holds there before the new ones.
    pub context_len: usize,
    /// New tokens.
    pub query_len: usize,
}

impl PackedRow {
    /// Tokens that it holds with the new ones; `usize::MAX` if they cannot be counted.
    pub fn seq_len(&self) -> usize {
        self.context_len.saturating_add(self.query_len)
    }
}

/// What attention has to know of a batch of new tokens, `[N]`: they are packed, which means that those of one row follow
/// those of the row before, and nothing stands between them.
#[derive(Clone, Debug)]
pub struct AttentionMetadata {
    rows: Arc<[PackedRow]>,
    /// `[B]`.
    context_lens: Tensor<1, Int>,
    /// `[B, 3]`: slot, first new token, and new tokens of each row.
    layout: Tensor<2, Int>,
}

impl AttentionMetadata {
    /// The tokens of these rows.
    ///
    /// # Panics
    ///
    /// If two rows have one slot, or a number is too large for 32 bits.
    pub fn new(rows: Vec<PackedRow>, device: &Device) -> Self {
        let int =
            |number: usize| i32::try_from(number).unwrap_or_else(|_| panic!("{number} is more than 32 bits hold"));
        let mut slots: Vec<usize> = rows.iter().map(|row| row.slot).collect();
        slots.sort_unstable();
        assert!(slots.windows(2).all(|pair| pair[0] != pair[1]), "a slot for each of the rows {rows:?}");
        let firsts = firsts(&rows);
        let layout = rows.iter().zip(&firsts).flat_map(|(row, first)| [row.slot, *first, row.query_len].map(int));
        let layout = TensorData::new(layout.collect::<Vec<i32>>(), [rows.len(), 3]);
        let context_lens: Vec<i32> = rows.iter().map(|row| int(row.context_len)).collect();
        Self {
            context_lens: Tensor::from_data(TensorData::new(context_lens, [rows.len()]), (device, DType::I32)),
            layout: Tensor::from_data(layout, (device, DType::I32)),
            rows: rows.into(),
        }
    }

    /// The same, with the context lengths that stand on the device, `[B]`, in any type of integers. Kernels of GPUs go by them,
    /// which no host has to know; others by those that were given before.
    ///
    /// # Panics
    ///
    /// If there is not one for each row.
    #[must_use]
    pub fn with_context_lens(self, context_lens: Tensor<1, Int>) -> Self {
        assert_eq!(context_lens.dims(), [self.rows.len()], "a context length for each row");
        let context_lens = Tensor::from_dispatch(as_i32::<Dispatch>(context_lens.into_dispatch()));
        Self { context_lens, ..self }
    }

    /// The rows, in the order of their tokens.
    pub fn rows(&self) -> &[PackedRow] {
        &self.rows
    }

    /// New tokens of all rows, N.
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(|row| row.query_len).sum()
    }

    /// The new token that is each row's first.
    pub fn firsts(&self) -> Vec<usize> {
        firsts(&self.rows)
    }

    /// Where lengths and layout are.
    pub fn device(&self) -> Device {
        self.context_lens.device()
    }

    /// The same of each row's last new tokens alone, `counts[b]` of them; rows that have none are left out.
    ///
    /// # Panics
    ///
    /// If there is not one count a row, or one is more than the row's new tokens.
    #[must_use]
    pub fn last(&self, counts: &[usize]) -> Self {
        assert_eq!(counts.len(), self.rows.len(), "a count for each row");
        let row = |(row, count): (&PackedRow, &usize)| PackedRow {
            context_len: row.seq_len() - count,
            query_len: *count,
            ..*row
        };
        assert!(
            self.rows.iter().zip(counts).all(|(row, count)| *count <= row.query_len),
            "{counts:?} of {:?}",
            self.rows
        );
        let rows = self.rows.iter().zip(counts).map(row).filter(|row| row.query_len > 0).collect();
        Self::new(rows, &self.device())
    }

    /// The rows as rectangles.
    pub fn groups(&self) -> Vec<RowGroup> {
        RowGroup::all(&self.rows)
    }

    pub(crate) fn shared_rows(&self) -> Arc<[PackedRow]> {
        self.rows.clone()
    }

    pub(crate) fn on_device(&self) -> (Tensor<1, Int>, Tensor<2, Int>) {
        (self.context_lens.clone(), self.layout.clone())
    }
}

/// Rows of equally many new tokens in slots next to each other: what can be computed as one rectangle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowGroup {
    /// Which of the rows they are.
    pub rows: Range<usize>,
    /// Their new tokens among all.
    pub tokens: Range<usize>,
    /// Their slots.
    pub slots: Range<usize>,
    /// New tokens of each, at least one.
    pub query_len: usize,
}

impl RowGroup {
    /// As few as there can be, in the order of the rows; those without a new token are left out.
    pub(crate) fn all(rows: &[PackedRow]) -> Vec<Self> {
        let mut groups: Vec<Self> = Vec::new();
        for (index, (row, first)) in rows.iter().zip(firsts(rows)).enumerate().filter(|(_, (row, _))| row.query_len > 0)
        {
            match groups.last_mut().filter(|last| last.query_len == row.query_len && last.slots.end == row.slot) {
                Some(last) if last.rows.end == index => {
                    (last.rows.end, last.tokens.end, last.slots.end) = (index + 1, first + row.query_len, row.slot + 1);
                }
                _ => groups.push(Self {
                    rows: index..index + 1,
                    tokens: first..first + row.query_len,
                    slots: row.slot..row.slot + 1,
                    query_len: row.query_len,
                }),
            }
        }
        groups
    }
}

/// The new token that is each row's first.
pub(crate) fn firsts(rows: &[PackedRow]) -> Vec<usize> {
    let first = |next: &mut usize, row: &PackedRow| {
        let first = *next;
        *next += row.query_len;
        Some(first)
    };
    rows.iter().scan(0, first).collect()
}

/// The shape of what is new, `[N, H, D]`, beside buffers, `[S, H, C, D]`.
///
/// # Panics
///
/// If a row is not in the buffers, or the tokens are not those of the rows.
pub(crate) fn check_rows([tokens, heads, head_dim]: [usize; 3], buffer: [usize; 4], rows: &[PackedRow]) {
    let [slots, of_buffer, capacity, width] = buffer;
    let ([new, held], asked) =
        ([[heads, head_dim], [of_buffer, width]], rows.iter().map(|row| row.query_len).sum::<usize>());
    assert!(new == held, "heads and width of the buffers, {held:?}, and not {new:?}");
    assert!(tokens == asked, "the {asked} new tokens of all rows, and not {tokens}");
    let is_there = |row: &PackedRow| row.slot < slots && row.seq_len() <= capacity;
    assert!(rows.iter().all(is_there), "{rows:?} in {slots} slots of {capacity} positions");
}
