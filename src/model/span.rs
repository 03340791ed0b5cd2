//! [`Span`]: where the new tokens of one forward stand, and what they may see.

use burn::tensor::{Bool, DType, Int, Tensor, TensorData};

use super::{Gpt2, TokenBatch};

/// Positions and visibility of the new tokens, computed once and shared by all layers.
pub struct Span {
    /// `[B, T]`, or `[1, T]` where all rows stand at the same positions.
    positions: Tensor<2, Int>,
    mode: Mode,
    batch: usize,
    past: Vec<usize>,
    new_lens: Vec<usize>,
}

/// How the tokens of a span are computed.
pub enum Mode {
    /// By burn's operations, all at once.
    Together {
        /// `[B or 1, 1, T, L]`: true where query t may not see key l. None: every query sees every key.
        hidden: Option<Tensor<4, Bool>>,
    },
    /// By burn's operations, each token by itself: the deterministic mode.
    Apart,
    /// By the kernels of a prepared model.
    Kernels {
        /// `[B]`: tokens that each row held before.
        past: Tensor<1, Int>,
    },
}

impl Span {
    /// The span of `tokens` behind rows of `model`'s that hold `past` tokens.
    pub fn new(past: &[usize], tokens: &TokenBatch, model: &Gpt2) -> Self {
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

        let hidden = || {
            let keys = past.iter().zip(new_lens).map(|(past, new)| past + new).max().unwrap_or(0);
            let limit: Tensor<4, Int> = positions.clone().reshape([rows, 1, time, 1]);
            let key = Tensor::<1, Int>::arange(0..keys as i64, &device).reshape([1, 1, 1, keys]);
            key.expand([rows, 1, time, keys]).greater(limit.expand([rows, 1, time, keys]))
        };
        let mode = if model.is_prepared() {
            let past: Vec<i32> = past.iter().map(|&past| past as i32).collect();
            Mode::Kernels { past: Tensor::from_data(TensorData::new(past, [batch]), (&device, DType::I32)) }
        } else if model.is_deterministic() {
            Mode::Apart
        } else {
            Mode::Together { hidden: (!uniform || time > 1).then(hidden) }
        };
        Self { positions, mode, batch, past: past.to_vec(), new_lens: new_lens.to_vec() }
    }

    /// The span of one new token of each row behind `past` tokens, `[B]`, for kernels; the same on the host are `lens`.
    pub fn ahead(past: Tensor<1, Int>, lens: &[usize]) -> Self {
        let batch = lens.len();
        let positions = past.clone().reshape([batch, 1]);
        let new_lens = vec![1; batch];
        Self { positions, mode: Mode::Kernels { past }, batch, past: lens.to_vec(), new_lens }
    }

    /// Position of each new token.
    pub fn positions(&self) -> &Tensor<2, Int> {
        &self.positions
    }

    /// How the tokens are computed.
    pub fn mode(&self) -> &Mode {
        &self.mode
    }

    /// Rows of the batch.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens that each row held before.
    pub fn past(&self) -> &[usize] {
        &self.past
    }

    /// The same on the device, for kernels.
    pub fn past_on_device(&self) -> Option<&Tensor<1, Int>> {
        match &self.mode {
            Mode::Kernels { past } => Some(past),
            _ => None,
        }
    }

    /// Whether it is computed by the kernels of a prepared model.
    pub fn is_for_kernels(&self) -> bool {
        matches!(self.mode, Mode::Kernels { .. })
    }

    /// Whether burn's operations compute every token by itself.
    pub fn is_apart(&self) -> bool {
        matches!(self.mode, Mode::Apart)
    }

    /// New tokens of each row.
    pub fn new_lens(&self) -> &[usize] {
        &self.new_lens
    }
}
