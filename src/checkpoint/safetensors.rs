//! One safetensors file, on disk or in memory.

use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use burn::tensor::{DType, TensorData};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo as Info};

use super::element::{Stored, read_converted};
use super::source::{TensorInfo, TensorSource};
use crate::{Error, Result};

/// The format's own bound on its header.
const MAX_HEADER: u64 = 100_000_000;

/// Bytes that are scanned at a time.
#[cfg(feature = "files")]
const CHUNK: usize = 1 << 18;

/// A safetensors file whose header has been read and checked against the file's length.
pub struct SafetensorsSource<R> {
    reader: Mutex<R>,
    path: PathBuf,
    metadata: Metadata,
    /// Where the tensors' bytes start.
    data_start: u64,
    length: u64,
}

impl<R: Read + Seek> SafetensorsSource<R> {
    /// Reads the header.
    pub fn new(mut reader: R, path: PathBuf) -> Result<Self> {
        let damaged = |reason: String| Error::Checkpoint { path: path.clone(), reason };
        let io = |source| Error::Io { path: path.clone(), source };

        let length = reader.seek(SeekFrom::End(0)).map_err(io)?;
        reader.rewind().map_err(io)?;
        if length < 8 {
            return Err(damaged(format!("{length} bytes are too few for a safetensors file")));
        }
        let mut size = [0; 8];
        reader.read_exact(&mut size).map_err(io)?;
        let header = u64::from_le_bytes(size);
        if header > MAX_HEADER.min(length - 8) {
            return Err(damaged(format!("the header claims {header} bytes, the file has {length}")));
        }
        let mut text = vec![0; header as usize];
        reader.read_exact(&mut text).map_err(io)?;
        // Deserialising also checks that shapes, types and offsets agree and that the tensors lie end to end.
        let metadata: Metadata =
            serde_json::from_slice(&text).map_err(|error| damaged(format!("not a safetensors header: {error}")))?;
        let claimed = metadata.data_len() as u64;
        if claimed != length - 8 - header {
            let held = length - 8 - header;
            return Err(damaged(format!("the header claims {claimed} bytes of tensors, the file holds {held}")));
        }
        Ok(Self { reader: Mutex::new(reader), metadata, data_start: 8 + header, length, path })
    }

    fn info(&self, name: &str) -> Result<&Info> {
        self.metadata.info(name).ok_or_else(|| Error::Tensors(vec![format!("`{name}` is missing")]))
    }

    /// Reads elements of a tensor from `first` on, as many as `shape` has; `seen` is given their bytes as they are stored.
    fn read_elements(
        &self,
        info: &Info,
        first: usize,
        shape: Vec<usize>,
        dtype: DType,
        mut seen: impl FnMut(&[u8]),
    ) -> Result<TensorData> {
        let io = |source| Error::Io { path: self.path.clone(), source };
        let stored = stored(info.dtype);
        // A reader that panicked left no broken state behind: each read seeks first.
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        let start = self.data_start + (info.data_offsets.0 + first * stored.size()) as u64;
        reader.seek(SeekFrom::Start(start)).map_err(io)?;
        let elements = shape.iter().product();
        read_converted(stored, elements, &shape, dtype, |bytes| {
            reader.read_exact(bytes).map_err(io)?;
            seen(bytes);
            Ok(())
        })
    }

    /// As [`read`](TensorSource::read); `seen` is given the bytes as they are stored.
    #[cfg(feature = "files")]
    pub fn read_seen(&self, name: &str, dtype: DType, seen: impl FnMut(&[u8])) -> Result<TensorData> {
        let info = self.info(name)?;
        self.read_elements(info, 0, info.shape.clone(), dtype, seen)
    }

    /// Gives `seen` the bytes of a tensor as they are stored, a chunk at a time, so that it is never held whole.
    #[cfg(feature = "files")]
    pub fn scan(&self, name: &str, mut seen: impl FnMut(&[u8])) -> Result<()> {
        let io = |source| Error::Io { path: self.path.clone(), source };
        let (start, end) = self.info(name)?.data_offsets;
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        reader.seek(SeekFrom::Start(self.data_start + start as u64)).map_err(io)?;
        let mut chunk = vec![0; CHUNK.min(end - start)];
        let mut left = end - start;
        while left > 0 {
            let bytes = &mut chunk[..left.min(CHUNK)];
            reader.read_exact(bytes).map_err(io)?;
            seen(bytes);
            left -= bytes.len();
        }
        Ok(())
    }

    /// What the header says under a name of the writer's choice.
    #[cfg(feature = "files")]
    pub fn text(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }
}

impl<R: Read + Seek + Send> TensorSource for SafetensorsSource<R> {
    fn tensors(&self) -> Vec<(String, TensorInfo)> {
        let info = |info: &Info| TensorInfo { stored: stored(info.dtype), shape: info.shape.clone() };
        self.metadata.tensors().into_iter().map(|(name, tensor)| (name, info(tensor))).collect()
    }

    fn read(&self, name: &str, dtype: DType) -> Result<TensorData> {
        let info = self.info(name)?;
        self.read_elements(info, 0, info.shape.clone(), dtype, |_| {})
    }

    fn read_rows(&self, name: &str, dtype: DType, rows: Range<usize>) -> Result<Option<TensorData>> {
        let info = self.info(name)?;
        let [height, width] = info.shape[..] else { return Ok(None) };
        if rows.start > rows.end || rows.end > height {
            return Err(Error::mismatch("rows of a tensor", format!("within 0..{height}"), format!("{rows:?}")));
        }
        self.read_elements(info, rows.start * width, vec![rows.len(), width], dtype, |_| {}).map(Some)
    }

    fn total_bytes(&self) -> u64 {
        self.length
    }
}

fn stored(dtype: Dtype) -> Stored {
    match dtype {
        Dtype::F64 => Stored::F64,
        Dtype::F32 => Stored::F32,
        Dtype::F16 => Stored::F16,
        Dtype::BF16 => Stored::Bf16,
        _ => Stored::Other,
    }
}
