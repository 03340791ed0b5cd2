//! The kernels behind [`Gpt2Ops`].

use std::sync::Arc;

use burn::backend::Flex;
use burn::backend::TensorMetadata;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, TensorData, bf16, f16};
use pulp::Arch;
use rayon::prelude::*;

use super::append::append;
use super::attend::{Attention, attend};
use super::element::Element;
use super::epilogue::Epilogue;
use super::int8::{self, Multiplier, Quantized};
use super::linear::{Packed, linear, pack};
use super::paged::{self, PageElement, Paged};
use super::tensors::{contiguous, elements, ids_below, indexed, packed_view, rows_contiguous, view, whole};
use crate::metadata::check_rows;
use crate::ops::{Gelu, Gpt2Ops, TILE, default, default_int8, default_paged};
use crate::{PackedRow, PagedRow};

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

    fn attend_pages(
        query: Tensor,
        new_keys: Tensor,
        new_values: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Arc<[PagedRow]>,
    ) -> (Tensor, Tensor, Tensor) {
        let ([queries, heads, head_dim], dtype) = (query.shape().dims(), query.dtype());
        // How pages lie in memory depends on what they hold alone.
        let is_int8 = is_int8(&keys, head_dim);
        with_element!(keys.dtype(), E if true => {
            let query = rows_contiguous(default::cast::<Self>(query, DType::F32));
            let mut out = vec![0.0; queries * heads * head_dim];
            let (new, slabs) = ([new_keys, new_values], [keys, values]);
            let (keys, values) = match is_int8 {
                true => over_pages::<i8, f32>(&query, new, slabs, &rows, &mut out),
                false => over_pages::<E, E>(&query, new, slabs, &rows, &mut out),
            };
            let out = Tensor::from_data(TensorData::new(out, [queries, heads * head_dim]));
            (default::cast::<Self>(out, dtype), keys, values)
        }, _ => default_paged::attend::<Self>(query, [new_keys, new_values], [keys, values], &rows))
    }

    fn append_pages(
        new_keys: Tensor,
        new_values: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Arc<[PagedRow]>,
    ) -> (Tensor, Tensor) {
        let is_int8 = is_int8(&keys, new_keys.shape().dims::<3>()[2]);
        with_element!(keys.dtype(), E if true => {
            let rows: Vec<PagedRow> = rows.iter().map(|row| PagedRow { query_len: 0, ..row.clone() }).collect();
            let no_query = Tensor::from_data(TensorData::new(Vec::<f32>::new(), [0, 1, 1]));
            let (new, slabs) = ([new_keys, new_values], [keys, values]);
            match is_int8 {
                true => over_pages::<i8, f32>(&no_query, new, slabs, &rows, &mut []),
                false => over_pages::<E, E>(&no_query, new, slabs, &rows, &mut []),
            }
        }, _ => (
            default_paged::append::<Self>(keys, new_keys, &rows),
            default_paged::append::<Self>(values, new_values, &rows),
        ))
    }

    fn copy_pages(pages: Tensor, copies: Arc<[[u32; 2]]>) -> Tensor {
        with_element!(pages.dtype(), E if true => {
            let mut pages = whole(pages);
            let [_, heads, page_len, head_dim] = pages.shape().dims::<4>();
            let (of_page, elements) = (heads * page_len * head_dim, pages.storage_mut::<E>());
            for [from, to] in copies.iter().map(|pair| pair.map(|page| page as usize * of_page)) {
                elements.copy_within(from..from + of_page, to);
            }
            pages
        }, _ => default_paged::copy::<Self>(pages, &copies))
    }

    fn read_pages(keys: Tensor, values: Tensor, pages: Arc<[u32]>, len: usize, head_dim: usize) -> (Tensor, Tensor) {
        let ([_, heads, page_len, _], dtype) = (keys.shape().dims::<4>(), keys.dtype());
        let (shape, is_int8) = ([heads, page_len, head_dim], is_int8(&keys, head_dim));
        with_element!(dtype, E if true => {
            let (keys, values) = (whole(keys), whole(values));
            match is_int8 {
                true => read_from::<i8, f32>([&keys, &values], &pages, len, shape),
                false => read_from::<E, E>([&keys, &values], &pages, len, shape),
            }
        }, _ => (default_paged::read::<Self>(keys, &pages, len), default_paged::read::<Self>(values, &pages, len)))
    }
}

/// Whether pages hold integers, of which four stand in an element.
fn is_int8(pages: &Tensor, head_dim: usize) -> bool {
    let [.., width] = pages.shape().dims::<4>();
    pages.dtype() == DType::F32 && width != head_dim
}

/// The keys and the values at the first `len` positions of a row, `[len, H, D]`. `E` is what the pages hold, which is stored as
/// `Stored`.
fn read_from<E: PageElement<Number: burn::tensor::Element>, Stored: Element>(
    slabs: [&Tensor; 2],
    pages: &[u32],
    len: usize,
    shape: [usize; 3],
) -> (Tensor, Tensor) {
    let [heads, _, head_dim] = shape;
    let [keys, values] = slabs.map(|slab| bytemuck::cast_slice::<Stored, E>(elements(slab)));
    let tensor = |read| Tensor::from_data(TensorData::new(read, [len, heads, head_dim]));
    (tensor(paged::read_keys(keys, pages, len, shape)), tensor(paged::read_values(values, pages, len, shape)))
}

/// Writes what is new, and attends to `out`. `E` is what the pages hold, which is stored as `Stored`.
fn over_pages<E: PageElement, Stored: Element>(
    query: &Tensor,
    new: [Tensor; 2],
    [keys, values]: [Tensor; 2],
    rows: &[PagedRow],
    out: &mut [f32],
) -> (Tensor, Tensor) {
    let [_, heads, page_len, _] = keys.shape().dims::<4>();
    let [_, _, head_dim] = new[0].shape().dims::<3>();
    let [new_keys, new_values] = new.map(|new| rows_contiguous(default::cast::<Flex>(new, DType::F32)));
    let (mut keys, mut values) = (whole(keys), whole(values));
    let paged = Paged {
        query: packed_view::<f32>(query),
        new_keys: packed_view::<f32>(&new_keys),
        new_values: packed_view(&new_values),
        rows,
        page_len,
        shape: [heads, head_dim],
    };
    let len = keys.shape().num_elements();
    let [of_keys, of_values] = [&mut keys, &mut values]
        .map(|slab| bytemuck::cast_slice_mut::<Stored, E>(&mut slab.storage_mut::<Stored>()[..len]));
    paged::attend(Arch::new(), paged, of_keys, of_values, out);
    (keys, values)
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
