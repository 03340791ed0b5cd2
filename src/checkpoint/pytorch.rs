//! One file that `torch.save` wrote.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};
use pytorch_reader::{DType as TorchType, PytorchError, PytorchReader, Tensor};

use super::element::{Stored, read_converted};
use super::source::{TensorInfo, TensorSource};
use crate::guard::guarded;
use crate::{Error, Result};

/// The tensors of a PyTorch file, or of one dictionary in it. Their shapes are only claims: a view can repeat a few
/// stored elements any number of times, so what is read is compared with the model and the file's length before.
pub struct PytorchSource {
    path: PathBuf,
    tensors: HashMap<String, Tensor>,
    length: u64,
}

impl PytorchSource {
    /// Opens a file; `key` names the dictionary in it that holds the weights.
    pub fn open(path: &Path, key: Option<&str>) -> Result<Self> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let length = std::fs::metadata(path).map_err(io)?.len();
        let tensors = parsed(path, || match key {
            Some(key) => PytorchReader::with_top_level_key(path, key),
            None => PytorchReader::new(path),
        })?
        .into_tensors();
        Ok(Self { path: path.to_owned(), tensors, length })
    }
}

/// What the reader makes of the file at `path`, its failures as errors of ours.
pub fn parsed<T>(path: &Path, read: impl FnOnce() -> Result<T, PytorchError>) -> Result<T> {
    let damaged = |reason: &str| Error::Checkpoint {
        path: path.to_owned(),
        reason: format!("not a usable PyTorch file: {reason}"),
    };
    guarded(read).ok_or_else(|| damaged("the reader failed"))?.map_err(|error| damaged(&error.to_string()))
}

impl TensorSource for PytorchSource {
    fn tensors(&self) -> Vec<(String, TensorInfo)> {
        let info = |tensor: &Tensor| TensorInfo { stored: stored(tensor.dtype()), shape: tensor.shape().to_vec() };
        self.tensors.iter().map(|(name, tensor)| (name.clone(), info(tensor))).collect()
    }

    fn read(&self, name: &str, dtype: DType) -> Result<TensorData> {
        let missing = || Error::Tensors(vec![format!("`{name}` is missing")]);
        let tensor = self.tensors.get(name).ok_or_else(missing)?;
        let io = |source| Error::Io { path: self.path.clone(), source };
        let bytes = parsed(&self.path, || Ok(tensor.read()))?.map_err(io)?;
        let mut bytes = bytes.as_slice();
        let stored = stored(tensor.dtype());
        read_converted(stored, tensor.num_elements(), tensor.shape(), dtype, |chunk| {
            bytes.read_exact(chunk).map_err(io)?;
            if cfg!(target_endian = "big") {
                // The reader gives this machine's byte order, the conversion expects the files'.
                chunk.chunks_exact_mut(stored.size()).for_each(<[u8]>::reverse);
            }
            Ok(())
        })
    }

    fn total_bytes(&self) -> u64 {
        self.length
    }
}

fn stored(dtype: TorchType) -> Stored {
    match dtype {
        TorchType::F64 => Stored::F64,
        TorchType::F32 => Stored::F32,
        TorchType::F16 => Stored::F16,
        TorchType::BF16 => Stored::Bf16,
        _ => Stored::Other,
    }
}
