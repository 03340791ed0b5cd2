//! Memory of intermediate results, used again: what a prompt needs is given back to the system between two layers otherwise, and
//! asked for anew, and the system clears it page by page, which took a tenth of a prefill.

use std::sync::{Mutex, PoisonError};

use burn::backend::Flex;
use burn::backend::TensorMetadata;
use burn::backend::flex::Layout;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Shape};

/// What is at hand, for whoever computes next.
static KEPT: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());

/// Numbers that are worth keeping: the allocator is quick with fewer.
const WORTH_KEEPING: usize = 1 << 16;

/// Most numbers that are kept, of all vectors together: 512 rows of what stands between two layers of GPT-2 are 4.3 million.
const MOST_KEPT: usize = 6 << 20;

/// A vector of this length with numbers in it that mean nothing.
pub fn take(len: usize) -> Vec<f32> {
    if len < WORTH_KEEPING {
        return vec![0.0; len];
    }
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    // The smallest that is large enough, if it is not far too large.
    let fits = |vector: &Vec<f32>| (len..=4 * len).contains(&vector.capacity());
    let found = (0..kept.len()).filter(|&at| fits(&kept[at])).min_by_key(|&at| kept[at].capacity());
    let Some(mut vector) = found.map(|at| kept.swap_remove(at)) else { return vec![0.0; len] };
    drop(kept);
    vector.resize(len, 0.0);
    vector
}

/// Keeps the memory of a tensor, if nothing else refers to it.
pub fn give(tensor: FloatTensor<Flex>) {
    let len = tensor.bytes().len() / size_of::<f32>();
    if tensor.dtype() != DType::F32 || len < WORTH_KEEPING || !tensor.can_mut() {
        return;
    }
    let whole = tensor.with_layout(Layout::contiguous(Shape::new([len])));
    let (bytes, _, _) = whole.into_data().into_parts();
    // Other than as a vector's, the memory is not ours to keep.
    let Ok(vector) = bytes.try_into_vec::<f32>() else { return };
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    let held: usize = kept.iter().map(Vec::capacity).sum();
    if held + vector.capacity() <= MOST_KEPT {
        kept.push(vector);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::TensorData;

    #[test]
    fn memory_is_used_again_unless_something_refers_to_it() {
        // A length of this test's own, since all tests share what is kept.
        let len = WORTH_KEEPING + 12_345;
        let tensor = |vector: Vec<f32>| FloatTensor::<Flex>::from_data(TensorData::new(vector, [len]));
        let first = take(len);
        let place = first.as_ptr();
        let shared = tensor(first);
        let other = shared.clone();
        give(shared);
        let new = take(len);
        assert_ne!(new.as_ptr(), place, "something else refers to it");
        drop(new);
        give(other);
        let again = take(len);
        assert_eq!((again.as_ptr(), again.len()), (place, len));
    }

    #[test]
    fn little_is_not_kept() {
        let tensor = FloatTensor::<Flex>::from_data(TensorData::new(vec![1.0_f32; 10], [10]));
        give(tensor);
        assert!(KEPT.lock().unwrap().iter().all(|vector| vector.capacity() >= WORTH_KEEPING));
        assert_eq!(take(10), [0.0; 10]);
    }
}
