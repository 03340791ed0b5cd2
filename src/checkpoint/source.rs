//! [`TensorSource`]: named tensors somewhere, read one at a time.

use std::ops::Range;

use burn::tensor::{DType, TensorData};

use super::element::Stored;
use crate::Result;

/// What is known of a stored tensor before it is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub stored: Stored,
    pub shape: Vec<usize>,
}

/// Named tensors that can be read one at a time.
pub trait TensorSource: Send + Sync {
    /// Name, element type and shape of every tensor.
    fn tensors(&self) -> Vec<(String, TensorInfo)>;

    /// Reads the tensor `name` as `dtype` (f32, f16 or bf16).
    fn read(&self, name: &str, dtype: DType) -> Result<TensorData>;

    /// Reads rows of the matrix `name`; none if this source can only read it as a whole.
    fn read_rows(&self, _name: &str, _dtype: DType, _rows: Range<usize>) -> Result<Option<TensorData>> {
        Ok(None)
    }

    /// Bytes of all files together: no set of distinct tensors can hold more.
    fn total_bytes(&self) -> u64;
}
