//! The kernels behind [`Gpt2Ops`]: what they are given is [checked](super::checks), and what none of them reads goes to the default
//! bodies.

use std::sync::Arc;

use burn::backend::TensorMetadata;
use burn::backend::ops::IntTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::DType;
use burn_cubecl::CubeBackend;

use super::append::append;
use super::argmax::{advance, argmax};
use super::attend::{attend, has_kernel};
use super::checks::{self, After, Matrix, is_stored_float};
use super::columns::columns;
use super::gelu::Activation;
use super::int8::few_rows_int8;
use super::linear::{FEW, few_rows};
use super::many::many_rows;
use super::norm::layer_norm;
use super::paged::{self, PageTable, Plan, Queries, Tokens};
use super::product::Epilogue;
use super::units;
use crate::ops::default::as_i32;
use crate::ops::{Gelu, Gpt2Ops, TILE, default, default_int8, default_paged};
use crate::{PackedRow, PagedRow};

type Tensor = FloatTensor<CubeBackend>;
type Ints = IntTensor<CubeBackend>;

impl Gpt2Ops for CubeBackend {
    fn pack(matrix: Tensor) -> Tensor {
        // Once in a model's life; in memory as it is described, whatever a device adds behind rows for its own reasons.
        burn_cubecl::kernel::into_contiguous(default::pack::<Self>(matrix))
    }

    fn packed_linear(x: Tensor, tiles: Tensor, bias: Tensor, outputs: usize, gelu: Option<Gelu>) -> Tensor {
        let matrix = Matrix::Packed(&tiles);
        checks::product(&x, &matrix, outputs, &After { bias: &bias, residual: None });
        match are_f32(&[&x, &bias]) && matrix.has_kernels() {
            true => packed_product(x, tiles, outputs, epilogue(bias, gelu, None), gelu),
            false => default::packed_linear::<Self>(x, tiles, bias, outputs, gelu),
        }
    }

    fn packed_linear_add(x: Tensor, tiles: Tensor, bias: Tensor, residual: Tensor) -> Tensor {
        let [outputs] = bias.shape().dims();
        let matrix = Matrix::Packed(&tiles);
        checks::product(&x, &matrix, outputs, &After { bias: &bias, residual: Some(&residual) });
        match are_f32(&[&x, &bias, &residual]) && matrix.has_kernels() {
            true => packed_product(x, tiles, outputs, epilogue(bias, None, Some(residual)), None),
            false => default::packed_linear_add::<Self>(x, tiles, bias, residual),
        }
    }

    fn packed_columns(tiles: Tensor, ids: Ints) -> Tensor {
        let [count, inputs, _] = tiles.shape().dims();
        let matrix = Matrix::Packed(&tiles);
        checks::columns(&matrix, &ids, inputs);
        match matrix.has_kernels() {
            true => columns(tiles, None, as_i32::<Self>(ids), inputs),
            false => default::packed_columns::<Self>(tiles, within(ids, count * TILE)),
        }
    }

    fn quantize(matrix: Tensor) -> (Ints, Tensor) {
        // Not every device has f16.
        let (words, scales) = default_int8::quantize::<Self>(matrix, DType::F32);
        let contiguous = burn_cubecl::kernel::into_contiguous;
        (contiguous(words), contiguous(scales))
    }

    fn quantized_linear(
        x: Tensor,
        weights: Ints,
        scales: Tensor,
        bias: Tensor,
        outputs: usize,
        gelu: Option<Gelu>,
    ) -> Tensor {
        let matrix = Matrix::Quantized(&weights, &scales);
        checks::product(&x, &matrix, outputs, &After { bias: &bias, residual: None });
        match are_f32(&[&x, &bias]) && matrix.has_kernels() {
            true => quantized_product(x, weights, scales, outputs, epilogue(bias, gelu, None)),
            false => default_int8::linear::<Self>(x, weights, scales, bias, outputs, gelu),
        }
    }

    fn quantized_linear_add(x: Tensor, weights: Ints, scales: Tensor, bias: Tensor, residual: Tensor) -> Tensor {
        let [outputs] = bias.shape().dims();
        let matrix = Matrix::Quantized(&weights, &scales);
        checks::product(&x, &matrix, outputs, &After { bias: &bias, residual: Some(&residual) });
        match are_f32(&[&x, &bias, &residual]) && matrix.has_kernels() {
            true => quantized_product(x, weights, scales, outputs, epilogue(bias, None, Some(residual))),
            false => default_int8::linear_add::<Self>(x, weights, scales, bias, residual),
        }
    }

    fn quantized_columns(weights: Ints, scales: Tensor, ids: Ints, inputs: usize) -> Tensor {
        let matrix = Matrix::Quantized(&weights, &scales);
        checks::columns(&matrix, &ids, inputs);
        let [count, _, _] = weights.shape().dims();
        match matrix.has_kernels() {
            true => columns(weights, Some(scales), as_i32::<Self>(ids), inputs),
            false => default_int8::columns::<Self>(weights, scales, within(ids, count * TILE), inputs),
        }
    }

    fn append(
        keys: Tensor,
        values: Tensor,
        new_keys: Tensor,
        new_values: Tensor,
        context_lens: Ints,
        layout: Ints,
        rows: Arc<[PackedRow]>,
    ) -> (Tensor, Tensor) {
        checks::append([&keys, &values], [&new_keys, &new_values], [&context_lens, &layout], &rows);
        let max_query_len = max_query_len(&rows);
        if max_query_len == 0 {
            return (keys, values);
        }
        if !are_of_one_type(&[&keys, &values]) || !are_of_one_type(&[&new_keys, &new_values]) {
            let keys = default::append::<Self>(keys, new_keys, &rows);
            return (keys, default::append::<Self>(values, new_values, &rows));
        }
        let layout = [context_lens, layout].map(as_i32::<Self>);
        let [keys, values] = append([keys, values], [new_keys, new_values], layout, max_query_len);
        (keys, values)
    }

    fn attend(
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        context_lens: Ints,
        layout: Ints,
        rows: Arc<[PackedRow]>,
    ) -> Tensor {
        let [tokens, heads, head_dim] = checks::packed(&query, [&keys, &values], [&context_lens, &layout], &rows);
        let max_query_len = max_query_len(&rows);
        let has_kernel = tokens > 0 && has_kernel([rows.len(), heads, max_query_len, head_dim]);
        if !are_f32(&[&query]) || !has_kernel || !are_of_one_type(&[&keys, &values]) {
            return default::attend::<Self>(query, keys, values, context_lens, &rows);
        }
        attend(query, [keys, values], [context_lens, layout].map(as_i32::<Self>), max_query_len)
    }

    fn attend_pages(
        query: Tensor,
        new_keys: Tensor,
        new_values: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Arc<[PagedRow]>,
    ) -> (Tensor, Tensor, Tensor) {
        let queries = checks::query_of_pages(&query, &keys);
        let shape = checks::pages([&new_keys, &new_values], [&keys, &values], queries, &rows);
        let (new, pages) = ([new_keys, new_values], [keys, values]);
        if queries == 0 || !are_f32(&[&query]) || !have_page_kernels(&new, &pages, &rows) {
            return default_paged::attend::<Self>(query, new, pages, &rows);
        }
        let (client, device) = (query.client.clone(), query.device.clone());
        let [_, _, page_len, _] = shape;
        let table = PageTable::new(&rows, page_len, 1, &device);
        let Some(plan) = Plan::new(&client, shape, table.width(), &rows) else {
            return default_paged::attend::<Self>(query, new, pages, &rows);
        };
        let [keys, values] = paged::append(pages, new, &table, &Tokens::new(&rows, &device));
        let of_rows = Queries::new(&rows, plan.queries(), &device);
        let out = paged::attend(query, [keys.clone(), values.clone()], &table, &of_rows, plan);
        (out, keys, values)
    }

    fn append_pages(
        new_keys: Tensor,
        new_values: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Arc<[PagedRow]>,
    ) -> (Tensor, Tensor) {
        let queries = rows.iter().map(|row| row.query_len).sum();
        let [_, _, page_len, _] = checks::pages([&new_keys, &new_values], [&keys, &values], queries, &rows);
        let (new, pages) = ([new_keys, new_values], [keys, values]);
        if !have_page_kernels(&new, &pages, &rows) {
            let ([new_keys, new_values], [keys, values]) = (new, pages);
            let keys = default_paged::append::<Self>(keys, new_keys, &rows);
            return (keys, default_paged::append::<Self>(values, new_values, &rows));
        }
        let device = pages[0].device.clone();
        let table = PageTable::new(&rows, page_len, 1, &device);
        let [keys, values] = paged::append(pages, new, &table, &Tokens::new(&rows, &device));
        (keys, values)
    }

    fn copy_pages(pages: Tensor, copies: Arc<[[u32; 2]]>) -> Tensor {
        checks::copies(&pages, &copies);
        match is_stored_float(pages.dtype) && !copies.is_empty() && has_elements(&pages) {
            true => paged::copy(pages, &copies),
            false => default_paged::copy::<Self>(pages, &copies),
        }
    }

    fn read_pages(keys: Tensor, values: Tensor, pages: Arc<[u32]>, len: usize, _head_dim: usize) -> (Tensor, Tensor) {
        checks::reading([&keys, &values], &pages, len);
        let read = |states: Tensor| match is_stored_float(states.dtype) && len > 0 && has_elements(&states) {
            true => paged::read(states, &pages, len),
            false => default_paged::read::<Self>(states, &pages, len),
        };
        (read(keys), read(values))
    }

    fn layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, epsilon: f64) -> Tensor {
        checks::layer_norm(&x, &gamma, &beta);
        match are_f32(&[&x, &gamma, &beta]) {
            true => layer_norm(x, gamma, beta, epsilon as f32),
            false => default::layer_norm::<Self>(x, gamma, beta, epsilon),
        }
    }

    fn argmax(logits: Tensor) -> Ints {
        checks::logits(&logits);
        if are_f32(&[&logits]) { argmax(logits) } else { default::argmax::<Self>(logits) }
    }

    fn advance(logits: Tensor, ids: Ints, context_lens: Ints, chosen: Ints) -> (Ints, Ints, Ints) {
        checks::advance(&logits, &ids, &context_lens, &chosen);
        let are_i32 = [&ids, &context_lens, &chosen].iter().all(|tensor| tensor.dtype() == DType::I32);
        if !are_f32(&[&logits]) || !are_i32 {
            return default::advance::<Self>(logits, context_lens, chosen);
        }
        let [ids, context_lens, chosen] = advance(logits, [ids, context_lens, chosen]);
        (ids, context_lens, chosen)
    }
}

/// New tokens of the row that has most.
fn max_query_len(rows: &[PackedRow]) -> usize {
    rows.iter().map(|row| row.query_len).max().unwrap_or(0)
}

fn are_f32(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|tensor| tensor.dtype() == DType::F32)
}

/// Of one type, and of one that kernels read.
fn are_of_one_type(tensors: &[&Tensor]) -> bool {
    let dtype = tensors[0].dtype();
    is_stored_float(dtype) && tensors.iter().all(|tensor| tensor.dtype() == dtype)
}

fn has_elements(tensor: &Tensor) -> bool {
    tensor.shape().num_elements() > 0
}

/// Whether there are kernels for what is new of these rows, of which one has something, and for these pages: of one type each, with
/// numbers that 32 bits hold.
fn have_page_kernels(new: &[Tensor; 2], pages: &[Tensor; 2], rows: &[PagedRow]) -> bool {
    let is_counted = |number: usize| i32::try_from(number).is_ok();
    let tokens: usize = rows.iter().map(|row| row.new_len).sum();
    let are_counted = is_counted(tokens) && rows.iter().all(|row| row.new_len == 0 || is_counted(row.seq_len()));
    let has_something = has_elements(&new[0]) && has_elements(&pages[0]);
    has_something && are_counted && are_of_one_type(&new.each_ref()) && are_of_one_type(&pages.each_ref())
}

/// Ids of columns that are there: burn's own kernels take what they are given for such.
fn within(ids: Ints, columns: usize) -> Ints {
    CubeBackend::int_clamp(as_i32::<CubeBackend>(ids), 0.into(), (columns as i64 - 1).into())
}

fn epilogue(bias: Tensor, gelu: Option<Gelu>, residual: Option<Tensor>) -> Epilogue {
    Epilogue { bias, activation: Activation::from(gelu), residual }
}

fn packed_product(x: Tensor, tiles: Tensor, outputs: usize, epilogue: Epilogue, gelu: Option<Gelu>) -> Tensor {
    let [rows, _] = x.shape().dims();
    if rows >= units::LEAST_ROWS
        && units::are_for(&tiles)
        && let Some(product) = units::product(&x, tiles.clone(), outputs, &epilogue, gelu)
    {
        return product;
    }
    match rows > FEW {
        true => many_rows(x, tiles, None, outputs, epilogue),
        false => few_rows(x, tiles, outputs, epilogue),
    }
}

fn quantized_product(x: Tensor, words: Ints, scales: Tensor, outputs: usize, epilogue: Epilogue) -> Tensor {
    let [rows, _] = x.shape().dims();
    match rows > FEW {
        true => many_rows(x, words, Some(scales), outputs, epilogue),
        false => few_rows_int8(x, words, scales, outputs, epilogue),
    }
}
