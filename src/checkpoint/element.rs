//! Element types of stored tensors, and their conversion to those that models compute in.

use burn::tensor::{DType, TensorData, bf16, f16};

use crate::Result;

/// The float types that checkpoints are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    F64,
    F32,
    F16,
    Bf16,
    /// Some other type: a buffer, not a weight.
    Other,
}

impl Stored {
    /// burn's name for it; none for types that models do not compute in.
    #[cfg(feature = "files")]
    pub fn dtype(self) -> Option<DType> {
        match self {
            Self::F32 => Some(DType::F32),
            Self::F16 => Some(DType::F16),
            Self::Bf16 => Some(DType::BF16),
            Self::F64 | Self::Other => None,
        }
    }

    /// Bytes of one element; 0 for types that are not read.
    pub fn size(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Other => 0,
        }
    }
}

/// Bytes that are converted at a time: little enough to stay in the cache.
const CHUNK: usize = 1 << 18;

/// Reads `elements` little-endian elements with `read`, which fills a buffer with the bytes that come next, and
/// converts them chunk by chunk, so that the stored form is never held whole.
pub fn read_converted(
    stored: Stored,
    elements: usize,
    shape: &[usize],
    dtype: DType,
    read: impl FnMut(&mut [u8]) -> Result<()>,
) -> Result<TensorData> {
    Ok(match dtype {
        DType::F16 => TensorData::new(convert::<f16>(stored, elements, read)?, shape),
        DType::BF16 => TensorData::new(convert::<bf16>(stored, elements, read)?, shape),
        _ => TensorData::new(convert::<f32>(stored, elements, read)?, shape),
    })
}

fn convert<T: FromStored>(
    stored: Stored,
    elements: usize,
    mut read: impl FnMut(&mut [u8]) -> Result<()>,
) -> Result<Vec<T>> {
    let size = stored.size();
    let mut values = Vec::with_capacity(elements);
    let mut chunk = vec![0; CHUNK.min(elements * size)];
    let mut left = elements;
    while left > 0 {
        let now = left.min(CHUNK / size);
        let bytes = &mut chunk[..now * size];
        read(bytes)?;
        append(stored, bytes, &mut values);
        left -= now;
    }
    Ok(values)
}

fn append<T: FromStored>(stored: Stored, bytes: &[u8], values: &mut Vec<T>) {
    match stored {
        Stored::F64 => {
            let (elements, _) = bytes.as_chunks();
            values.extend(elements.iter().map(|e| T::from_f64(f64::from_le_bytes(*e))));
        }
        Stored::F32 => {
            let (elements, _) = bytes.as_chunks();
            values.extend(elements.iter().map(|e| T::from_f32(f32::from_le_bytes(*e))));
        }
        Stored::F16 => {
            let (elements, _) = bytes.as_chunks();
            values.extend(elements.iter().map(|e| T::from_f32(f16::from_le_bytes(*e).to_f32())));
        }
        Stored::Bf16 => {
            let (elements, _) = bytes.as_chunks();
            values.extend(elements.iter().map(|e| T::from_f32(bf16::from_le_bytes(*e).to_f32())));
        }
        Stored::Other => {}
    }
}

/// Every f16 and bf16 is an f32, so going through f32 loses nothing; an f64 is rounded once.
trait FromStored {
    fn from_f32(value: f32) -> Self;

    fn from_f64(value: f64) -> Self;
}

impl FromStored for f32 {
    fn from_f32(value: f32) -> Self {
        value
    }

    fn from_f64(value: f64) -> Self {
        value as f32
    }
}

impl FromStored for f16 {
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }

    fn from_f64(value: f64) -> Self {
        f16::from_f32(rounded_to_odd(value))
    }
}

impl FromStored for bf16 {
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }

    fn from_f64(value: f64) -> Self {
        bf16::from_f32(rounded_to_odd(value))
    }
}

/// The one of the two nearest f32 whose last bit is 1, or `value` itself if it is an f32: what is not exact never looks like the
/// middle of two halves, and rounding it again gives what rounding `value` once would (Boldo and Melquiond, *When double
/// rounding is odd*, 2005).
fn rounded_to_odd(value: f64) -> f32 {
    let near = value as f32;
    if f64::from(near) == value || near.is_nan() || near.to_bits() & 1 == 1 {
        return near;
    }
    let away = f64::from(near).abs() > value.abs();
    f32::from_bits(if away { near.to_bits() - 1 } else { near.to_bits() + 1 })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Just above the middle of two halves: in f32 it is the middle, which would be rounded to the even one below.
    #[test]
    fn doubles_are_rounded_once() {
        let value = 1.0 + 2.0_f64.powi(-11) + 2.0_f64.powi(-40);
        let read = |dtype| {
            let read = |bytes: &mut [u8]| {
                bytes.copy_from_slice(&value.to_le_bytes());
                Ok(())
            };
            read_converted(Stored::F64, 1, &[1], dtype, read).unwrap().convert::<f32>().try_to_vec::<f32>().unwrap()[0]
        };
        assert_eq!(read(DType::F16), 1.0 + 2.0_f32.powi(-10));
        assert_eq!(read(DType::BF16), 1.0);
    }

    #[test]
    fn all_elements_arrive_across_chunk_borders() {
        for elements in [0, 1, CHUNK / 2 - 1, CHUNK / 2, CHUNK / 2 + 1, CHUNK + 3] {
            let mut next = 0_u32;
            let data = read_converted(Stored::Bf16, elements, &[elements], DType::F32, |bytes| {
                for element in bytes.chunks_exact_mut(2) {
                    element.copy_from_slice(&bf16::from_f32((next % 251) as f32).to_le_bytes());
                    next += 1;
                }
                Ok(())
            });
            let values = data.unwrap().try_to_vec::<f32>().unwrap();
            assert_eq!(values.len(), elements);
            assert!(values.iter().enumerate().all(|(i, value)| *value == (i % 251) as f32));
        }
    }
}
