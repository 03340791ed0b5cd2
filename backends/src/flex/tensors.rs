//! Tensors as the slices that kernels take.

use burn::backend::Flex;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::DType;

use super::attend::View;
use super::element::Element;

type Tensor = FloatTensor<Flex>;

/// Itself if it is all of its memory; else a copy that is.
pub fn whole(tensor: Tensor) -> Tensor {
    let is_whole = tensor.is_contiguous() && tensor.layout().start_offset() == 0;
    if is_whole { tensor } else { Tensor::from_data(tensor.to_contiguous().into_data()) }
}

/// The elements of a matrix, whatever its strides, by row and column.
pub fn indexed<E: Element>(matrix: &Tensor) -> impl Fn(usize, usize) -> E + Sync {
    let [of_row, of_column] = *matrix.layout().strides() else { unreachable!("a matrix has two dimensions") };
    let (elements, start) = (matrix.storage::<E>(), matrix.layout().start_offset() as isize);
    move |row, column| elements[(start + row as isize * of_row + column as isize * of_column) as usize]
}

/// Itself if it is contiguous.
pub fn contiguous(tensor: Tensor) -> Tensor {
    if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
}

/// The same with its last dimension contiguous, and no stride that is negative.
pub fn rows_contiguous(tensor: Tensor) -> Tensor {
    let strides = tensor.layout().strides();
    let fits = strides.last() == Some(&1) && strides.iter().all(|stride| *stride >= 0);
    if fits { tensor } else { tensor.to_contiguous() }
}

/// A `[N, H, D]` tensor in place, as `[1, H, N, D]`.
pub fn packed_view<E: Element>(tensor: &Tensor) -> View<'_, E> {
    let [of_token, of_head, _] = *tensor.layout().strides() else {
        unreachable!("what is packed has three dimensions")
    };
    let strides = [0, of_head, of_token].map(|stride| stride as usize);
    View { elements: tensor.storage(), start: tensor.layout().start_offset(), strides }
}

/// A `[S, H, C, D]` tensor in place.
pub fn view<E: Element>(tensor: &Tensor) -> View<'_, E> {
    let [of_row, of_head, of_position, _] = *tensor.layout().strides() else {
        unreachable!("buffers have four dimensions")
    };
    let strides = [of_row, of_head, of_position].map(|stride| stride as usize);
    View { elements: tensor.storage(), start: tensor.layout().start_offset(), strides }
}

/// The elements of a contiguous tensor.
pub fn elements<E: Stored>(tensor: &Tensor) -> &[E] {
    let (start, end) = tensor.layout().contiguous_offsets().expect("the tensor was made contiguous");
    &tensor.storage()[start..end]
}

/// A type of elements, of weights or others.
pub trait Stored: burn::tensor::Element + bytemuck::Pod {}

impl<E: burn::tensor::Element + bytemuck::Pod> Stored for E {}

/// Ids of columns.
///
/// # Panics
///
/// If one of them is not among the first `count`.
pub fn ids_below(count: usize, ids: &IntTensor<Flex>) -> Vec<usize> {
    let ids = integers(ids);
    if let Some(id) = ids.iter().find(|id| **id >= count) {
        panic!("there is no column {id} among {count}");
    }
    ids
}

/// Ids or lengths, in any type of integers.
///
/// # Panics
///
/// If one of them is negative.
pub fn integers(tensor: &IntTensor<Flex>) -> Vec<usize> {
    let tensor = tensor.to_contiguous();
    let natural = |integer: i64| {
        usize::try_from(integer)
            .unwrap_or_else(|_| panic!("{integer} is neither a length nor an id: those are from 0 on"))
    };
    match tensor.dtype() {
        DType::I32 => elements::<i32>(&tensor).iter().map(|integer| natural(i64::from(*integer))).collect(),
        _ => {
            let data = tensor.into_data().convert::<i64>();
            let integers = data.as_slice::<i64>().expect("they were converted to i64");
            integers.iter().map(|integer| natural(*integer)).collect()
        }
    }
}
