//! [`Span`]: where the new tokens of one forward stand, and what they may see.

use burn::tensor::{Bool, Int, Tensor, TensorData};

use super::TokenBatch;

/// Positions and visibility of the new tokens, computed once and shared by all layers.
pub struct Span {
    /// `[B, T]`, or `[1, T]` where all rows stand at the same positions.
    positions: Tensor<2, Int>,
    /// `[B or 1, 1, T, L]`: true where query t may not see key l. None: every query sees every key.
    hidden: Option<Tensor<4, Bool>>,
    batch: usize,
    past: Vec<usize>,
    new_lens: Vec<usize>,
    apart: bool,
}

impl Span {
    /// The span of `tokens` behind rows that hold `past` tokens; each token is to be computed by itself if `apart`.
    pub fn new(past: &[usize], tokens: &TokenBatch, apart: bool) -> Self {
        let [batch, time] = tokens.ids().dims();
        let device = tokens.ids().device();
        let new_lens = tokens.new_lens();
        let uniform = tokens.is_uniform() && past.iter().all(|len| *len == past[0]);

        // A query behind the end of its row stands at the row's last position: its output is not used, and no
        // position beyond the context is ever looked up.
        let rows = if uniform { 1 } else { batch };
        let at = |row: usize| (0..time).map(move |t| (past[row] + t.min(new_lens[row] - 1)) as i32);
        let positions: Vec<i32> = (0..rows).flat_map(at).collect();
        let positions = Tensor::from_data(TensorData::new(positions, [rows, time]), &device);

        let keys = past.iter().zip(new_lens).map(|(past, new)| past + new).max().unwrap_or(0);
        let hidden = (!uniform || time > 1).then(|| {
            let limit: Tensor<4, Int> = positions.clone().reshape([rows, 1, time, 1]);
            let key = Tensor::<1, Int>::arange(0..keys as i64, &device).reshape([1, 1, 1, keys]);
            key.expand([rows, 1, time, keys]).greater(limit.expand([rows, 1, time, keys]))
        });
        Self { positions, hidden, batch, past: past.to_vec(), new_lens: new_lens.to_vec(), apart }
    }

    /// Position of each new token.
    pub fn positions(&self) -> &Tensor<2, Int> {
        &self.positions
    }

    /// The mask of what is hidden from each query.
    pub fn hidden(&self) -> Option<Tensor<4, Bool>> {
        self.hidden.clone()
    }

    /// Rows of the batch.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens that each row held before.
    pub fn past(&self) -> &[usize] {
        &self.past
    }

    /// Whether every token is computed by itself: the deterministic mode.
    pub fn is_apart(&self) -> bool {
        self.apart
    }

    /// New tokens of each row.
    pub fn new_lens(&self) -> &[usize] {
        &self.new_lens
    }
}
