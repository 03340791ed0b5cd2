//! The kernels behind [`Gpt2Ops`].

use std::sync::Arc;

use burn::backend::Flex;
use burn::backend::TensorMetadata;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, TensorData, bf16, f16};
use pulp::Arch;
use rayon::prelude::*;

use super::append::append;
use super::attend::{Attention, View, attend};
use super::element::Element;
use super::epilogue::Epilogue;
use super::int8::{self, Multiplier, Quantized};
use super::linear::{Packed, linear, pack};
use crate::PackedRow;
use crate::metadata::check_rows;
use crate::ops::{Gelu, Gpt2Ops, TILE, default, default_int8};

type Tensor = FloatTensor<Flex>;

/// Runs `$body` with `$E` as the Rust type of `$dtype`, or `$otherwise` if there are no kernels for it or not `$if`.
macro_rules! with_element {
    ($dtype:expr, $E:ident if $if:expr => $body:expr, _ => $otherwise:expr) => {
        match $dtype {
            _ if !$if => $otherwise,
            DType::F32 => {
                type $E = f32;
                $body
            }
            DType::F16 => {
                type $E = f16;
                $body
            }
            DType::BF16 => {
                type $E = bf16;
                $body
            }
            _ => $otherwise,
        }
    };
}

impl Gpt2Ops for Flex {
    fn pack(matrix: Tensor) -> Tensor {
        let [inputs, outputs] = matrix.shape().dims();
        with_element!(matrix.dtype(), E if true => {
            let tiles = pack::<E>(inputs, outputs, indexed(&matrix));
            let count = outputs.div_ceil(TILE);
            Tensor::from_data(TensorData::new(tiles, [count, inputs, TILE]))
        }, _ => default::pack::<Self>(matrix))
    }

    fn packed_linear(x: Tensor, tiles: Tensor, bias: Tensor, outputs: usize, gelu: Option<Gelu>) -> Tensor {
        let is_f32 = x.dtype() == DType::F32 && bias.dtype() == DType::F32;
        with_element!(tiles.dtype(), E if is_f32 => {
            let bias = bias.to_contiguous();
            let epilogue = Epilogue { bias: Some(elements(&bias)), gelu, residual: None };
            product::<E>(x, &tiles, outputs, epilogue)
        }, _ => default::packed_linear::<Self>(x, tiles, bias, outputs, gelu))
    }

    fn packed_linear_add(x: Tensor, tiles: Tensor, bias: Tensor, residual: Tensor) -> Tensor {
        let [_, outputs] = residual.shape().dims();
        let is_f32 = [&x, &bias, &residual].iter().all(|tensor| tensor.dtype() == DType::F32);
        with_element!(tiles.dtype(), E if is_f32 => {
            let (bias, residual) = (bias.to_contiguous(), contiguous(residual));
            let epilogue = Epilogue { bias: Some(elements(&bias)), gelu: None, residual: Some(elements(&residual)) };
            product::<E>(x, &tiles, outputs, epilogue)
        }, _ => default::packed_linear_add::<Self>(x, tiles, bias, residual))
    }

    fn packed_columns(tiles: Tensor, ids: IntTensor<Self>) -> Tensor {
        let [count, inputs, width] = tiles.shape().dims();
        with_element!(tiles.dtype(), E if true => {
            let packed = Packed::new(elements::<E>(&tiles), inputs, count * width);
            let ids = ids_below(count * width, &ids);
            rows_of(&ids, inputs, |id| packed.column(id).map(|element| E::widen(&[element])[0]))
        }, _ => default::packed_columns::<Self>(tiles, ids))
    }

    fn quantize(matrix: Tensor) -> (IntTensor<Self>, Tensor) {
        let [inputs, outputs] = matrix.shape().dims();
        with_element!(matrix.dtype(), E if true => {
            let at = indexed::<E>(&matrix);
            let (words, scales) = int8::quantize(inputs, outputs, |input, output| E::widen(&[at(input, output)])[0]);
            let (tiles, quads) = (outputs.div_ceil(TILE), inputs.div_ceil(int8::QUAD));
            let groups = inputs.div_ceil(int8::GROUP);
            let words = Tensor::from_data(TensorData::new(words, [tiles, quads, TILE]));
            (words, Tensor::from_data(TensorData::new(scales, [tiles, groups, TILE])))
        }, _ => Self::quantize(default::cast::<Self>(matrix, DType::F32)))
    }

    fn quantized_linear(
        x: Tensor,
        weights: IntTensor<Self>,
        scales: Tensor,
        bias: Tensor,
        outputs: usize,
        gelu: Option<Gelu>,
    ) -> Tensor {
        if [&x, &bias].iter().any(|tensor| tensor.dtype() != DType::F32) {
            return default_int8::linear::<Self>(x, weights, scales, bias, outputs, gelu);
        }
        let bias = bias.to_contiguous();
        let epilogue = Epilogue { bias: Some(elements(&bias)), gelu, residual: None };
        quantized_product(x, &weights, &scales, outputs, epilogue)
    }

    fn quantized_linear_add(
        x: Tensor,
        weights: IntTensor<Self>,
        scales: Tensor,
        bias: Tensor,
        residual: Tensor,
    ) -> Tensor {
        if [&x, &bias, &residual].iter().any(|tensor| tensor.dtype() != DType::F32) {
            return default_int8::linear_add::<Self>(x, weights, scales, bias, residual);
        }
        let [_, outputs] = residual.shape().dims();
        let (bias, residual) = (bias.to_contiguous(), contiguous(residual));
        let epilogue = Epilogue { bias: Some(elements(&bias)), gelu: None, residual: Some(elements(&residual)) };
        quantized_product(x, &weights, &scales, outputs, epilogue)
    }

    fn quantized_columns(weights: IntTensor<Self>, scales: Tensor, ids: IntTensor<Self>, inputs: usize) -> Tensor {
        let [tiles, _, _] = weights.shape().dims();
        let matrix = Quantized::new(elements(&weights), elements(&scales), [inputs, tiles * TILE]);
        rows_of(&ids_below(tiles * TILE, &ids), inputs, |id| matrix.column(id))
    }

    fn append(
        keys: Tensor,
        values: Tensor,
        new_keys: Tensor,
        new_values: Tensor,
        _context_lens: IntTensor<Self>,
        _layout: IntTensor<Self>,
        rows: Arc<[PackedRow]>,
    ) -> (Tensor, Tensor) {
        (append_to(keys, new_keys, &rows), append_to(values, new_values, &rows))
    }

    fn attend(
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        context_lens: IntTensor<Self>,
        _layout: IntTensor<Self>,
        rows: Arc<[PackedRow]>,
    ) -> Tensor {
        assert_eq!(values.shape(), keys.shape(), "shape of the values");
        let [tokens, heads, head_dim] = query.shape().dims();
        check_rows([tokens, heads, head_dim], keys.shape().dims(), &rows);
        let dtype = keys.dtype();
        let is_fit = query.dtype() == DType::F32 && values.dtype() == dtype;
        with_element!(dtype, E if is_fit => {
            let (query, keys, values) = (rows_contiguous(query), rows_contiguous(keys), rows_contiguous(values));
            let attention = Attention {
                query: packed_view::<f32>(&query),
                keys: view::<E>(&keys),
                values: view(&values),
                rows: &rows,
                shape: [heads, head_dim],
            };
            let mut out = vec![0.0; tokens * heads * head_dim];
            attend(Arch::new(), attention, &mut out);
            Tensor::from_data(TensorData::new(out, [tokens, heads * head_dim]))
        }, _ => default::attend::<Self>(query, keys, values, context_lens, &rows))
    }
}

fn append_to(mut buffer: Tensor, new: Tensor, rows: &[PackedRow]) -> Tensor {
    let [slots, heads, capacity, head_dim] = buffer.shape().dims();
    check_rows(new.shape().dims(), [slots, heads, capacity, head_dim], rows);
    let is_whole = buffer.is_contiguous() && buffer.layout().start_offset() == 0;
    let dtype = buffer.dtype();
    with_element!(dtype, E if is_whole => {
        let new = rows_contiguous(default::cast::<Flex>(new, dtype));
        let len = slots * heads * capacity * head_dim;
        append::<E>(&mut buffer.storage_mut()[..len], [heads, capacity, head_dim], packed_view(&new), rows);
        buffer
    }, _ => default::append::<Flex>(buffer, new, rows))
}

fn product<E: Element>(x: Tensor, tiles: &Tensor, outputs: usize, epilogue: Epilogue<'_>) -> Tensor {
    let [rows, inputs] = x.shape().dims();
    let x = contiguous(x);
    let mut out = vec![0.0; rows * outputs];
    linear(Arch::new(), elements(&x), Packed::new(elements::<E>(tiles), inputs, outputs), epilogue, &mut out);
    Tensor::from_data(TensorData::new(out, [rows, outputs]))
}

fn quantized_product(
    x: Tensor,
    weights: &IntTensor<Flex>,
    scales: &Tensor,
    outputs: usize,
    epilogue: Epilogue<'_>,
) -> Tensor {
    let [rows, inputs] = x.shape().dims();
    let x = contiguous(x);
    let matrix = Quantized::new(elements(weights), elements(scales), [inputs, outputs]);
    let mut out = vec![0.0; rows * outputs];
    int8::linear(Arch::new(), Multiplier::best(), elements(&x), matrix, epilogue, &mut out);
    Tensor::from_data(TensorData::new(out, [rows, outputs]))
}

/// `[N, inputs]`: a row for each id.
fn rows_of<I: Iterator<Item = f32>>(ids: &[usize], inputs: usize, row: impl Fn(usize) -> I + Sync) -> Tensor {
    let mut rows = vec![0.0_f32; ids.len() * inputs];
    rows.par_chunks_exact_mut(inputs.max(1)).zip(ids).with_min_len(16).for_each(|(to, &id)| {
        for (to, from) in to.iter_mut().zip(row(id)) {
            *to = from;
        }
    });
    Tensor::from_data(TensorData::new(rows, [ids.len(), inputs]))
}

/// The elements of a matrix, whatever its strides, by row and column.
fn indexed<E: Element>(matrix: &Tensor) -> impl Fn(usize, usize) -> E + Sync {
    let [of_row, of_column] = *matrix.layout().strides() else { unreachable!("a matrix has two dimensions") };
    let (elements, start) = (matrix.storage::<E>(), matrix.layout().start_offset() as isize);
    move |row, column| elements[(start + row as isize * of_row + column as isize * of_column) as usize]
}

/// Itself if it is contiguous.
fn contiguous(tensor: Tensor) -> Tensor {
    if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
}

/// The same with its last dimension contiguous, and no stride that is negative.
fn rows_contiguous(tensor: Tensor) -> Tensor {
    let strides = tensor.layout().strides();
    let fits = strides.last() == Some(&1) && strides.iter().all(|stride| *stride >= 0);
    if fits { tensor } else { tensor.to_contiguous() }
}

/// A `[N, H, D]` tensor in place, as `[1, H, N, D]`.
fn packed_view<E: Element>(tensor: &Tensor) -> View<'_, E> {
    let [of_token, of_head, _] = *tensor.layout().strides() else {
        unreachable!("what is packed has three dimensions")
    };
    let strides = [0, of_head, of_token].map(|stride| stride as usize);
    View { elements: tensor.storage(), start: tensor.layout().start_offset(), strides }
}

/// A `[S, H, C, D]` tensor in place.
fn view<E: Element>(tensor: &Tensor) -> View<'_, E> {
    let [of_row, of_head, of_position, _] = *tensor.layout().strides() else {
        unreachable!("buffers have four dimensions")
    };
    let strides = [of_row, of_head, of_position].map(|stride| stride as usize);
    View { elements: tensor.storage(), start: tensor.layout().start_offset(), strides }
}

/// The elements of a contiguous tensor.
fn elements<E: Stored>(tensor: &Tensor) -> &[E] {
    let (start, end) = tensor.layout().contiguous_offsets().expect("the tensor was made contiguous");
    &tensor.storage()[start..end]
}

/// A type of elements, of weights or others.
trait Stored: burn::tensor::Element + bytemuck::Pod {}

impl<E: burn::tensor::Element + bytemuck::Pod> Stored for E {}

/// Ids of columns.
///
/// # Panics
///
/// If one of them is not among the first `count`.
fn ids_below(count: usize, ids: &IntTensor<Flex>) -> Vec<usize> {
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
fn integers(tensor: &IntTensor<Flex>) -> Vec<usize> {
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
