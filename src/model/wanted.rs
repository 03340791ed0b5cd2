//! [`Wanted`]: the tokens of a chunk whose hidden states somebody reads.

use burn::tensor::{Int, Tensor};

use super::tokens::Chunk;

/// Of each row, some of its last tokens.
pub struct Wanted {
    /// How many of each row of the chunk.
    pub counts: Vec<usize>,
    /// Which of the chunk's tokens they are, `[M]`; none if there are none.
    pub tokens: Option<Tensor<1, Int>>,
    /// Whether they are all of the chunk's.
    pub is_all: bool,
}

impl Wanted {
    /// Of a chunk of a batch in which each row has `query_lens[b]` new tokens and the last `counts[b]` of them are wanted.
    pub fn new(chunk: &Chunk, query_lens: &[usize], counts: &[usize]) -> Self {
        let (mut of_rows, mut tokens, mut end) = (Vec::new(), Vec::new(), 0_usize);
        for (row, range) in &chunk.rows {
            let first = (query_lens[*row] - counts[*row]).max(range.start).min(range.end);
            let count = range.end - first;
            end += range.len();
            of_rows.push(count);
            tokens.extend((end - count) as i32..end as i32);
        }
        let is_all = tokens.len() == end;
        let tokens = (!tokens.is_empty()).then(|| Tensor::from_data(tokens.as_slice(), &chunk.ids.device()));
        Self { counts: of_rows, tokens, is_all }
    }

    /// Their rows of `x`, `[N, d]`: `[M, d]`.
    pub fn select(&self, x: Tensor<2>) -> Option<Tensor<2>> {
        match self.is_all {
            true => Some(x),
            false => self.tokens.clone().map(|tokens| x.select(0, tokens)),
        }
    }
}
