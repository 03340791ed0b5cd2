//! [`RowLogits`]: what a forward says of each row.

use std::ops::Range;

/// Logits behind some tokens of each row, on the host.
#[derive(Debug, Default)]
pub struct RowLogits {
    values: Vec<f32>,
    vocab_size: usize,
    /// Which of the positions in `values` are each row's.
    rows: Vec<Range<usize>>,
}

impl RowLogits {
    /// Of `counts[b]` positions of each row, one row's behind the other's.
    pub fn new(values: Vec<f32>, vocab_size: usize, counts: &[usize]) -> Self {
        let ranges = counts.iter().scan(0, |end, count| {
            *end += count;
            Some(*end - count..*end)
        });
        Self { values, vocab_size, rows: ranges.collect() }
    }

    /// The same, of which what was row `i` is row `rows[i]` now.
    pub fn of_rows(self, rows: impl Iterator<Item = usize> + Clone) -> Self {
        let mut ranges = vec![0..0; rows.clone().max().map_or(0, |row| row + 1)];
        rows.zip(self.rows).for_each(|(row, range)| ranges[row] = range);
        Self { rows: ranges, ..self }
    }

    /// Those of a row, `[vocab_size]` for each of its positions.
    pub fn row(&self, row: usize) -> impl Iterator<Item = &[f32]> {
        let Range { start, end } = self.rows.get(row).cloned().unwrap_or_default();
        self.values[start * self.vocab_size..end * self.vocab_size].chunks_exact(self.vocab_size.max(1))
    }
}
