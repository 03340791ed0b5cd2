//! The kernels behind [`Gpt2Ops`].

use burn::backend::TensorMetadata;
use burn::backend::ops::IntTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, TensorData};
use burn_cubecl::CubeBackend;

use super::append::append;
use super::argmax::{advance, argmax};
use super::attend::{Segments, attend, has_kernel};
use super::columns::columns;
use super::gelu::Activation;
use super::int8::few_rows_int8;
use super::linear::{Epilogue, FEW, few_rows};
use super::many::many_rows;
use super::norm::layer_norm;
use super::units;
use crate::ops::{Gelu, Gpt2Ops, default, default_int8};

type Tensor = FloatTensor<CubeBackend>;
type Ints = IntTensor<CubeBackend>;

impl Gpt2Ops for CubeBackend {
    fn pack(matrix: Tensor) -> Tensor {
        // Once in a model's life; in memory as it is described, whatever a device adds behind rows for its own reasons.
        burn_cubecl::kernel::into_contiguous(default::pack::<Self>(matrix))
    }

    fn packed_linear(x: Tensor, tiles: Tensor, bias: Tensor, outputs: usize, gelu: Option<Gelu>) -> Tensor {
        match are_f32(&[&x, &bias]) {
            true => packed_product(x, tiles, outputs, epilogue(bias, gelu, None), gelu),
            false => default::packed_linear::<Self>(x, tiles, bias, outputs, gelu),
        }
    }

    fn packed_linear_add(x: Tensor, tiles: Tensor, bias: Tensor, residual: Tensor) -> Tensor {
        let [_, outputs] = residual.shape().dims();
        match are_f32(&[&x, &bias, &residual]) {
            true => packed_product(x, tiles, outputs, epilogue(bias, None, Some(residual)), None),
            false => default::packed_linear_add::<Self>(x, tiles, bias, residual),
        }
    }

    fn packed_columns(tiles: Tensor, ids: Ints) -> Tensor {
        let [_, inputs, _] = tiles.shape().dims();
        columns(tiles, None, ids, inputs)
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
        match are_f32(&[&x, &bias]) {
            true => quantized_product(x, weights, scales, outputs, epilogue(bias, gelu, None)),
            false => default_int8::linear::<Self>(x, weights, scales, bias, outputs, gelu),
        }
    }

    fn quantized_linear_add(x: Tensor, weights: Ints, scales: Tensor, bias: Tensor, residual: Tensor) -> Tensor {
        let [_, outputs] = residual.shape().dims();
        match are_f32(&[&x, &bias, &residual]) {
            true => quantized_product(x, weights, scales, outputs, epilogue(bias, None, Some(residual))),
            false => default_int8::linear_add::<Self>(x, weights, scales, bias, residual),
        }
    }

    fn quantized_columns(weights: Ints, scales: Tensor, ids: Ints, inputs: usize) -> Tensor {
        columns(weights, Some(scales), ids, inputs)
    }

    fn append(
        keys: Tensor,
        values: Tensor,
        new_keys: Tensor,
        new_values: Tensor,
        past: Ints,
        _starts: Vec<usize>,
        counts: Vec<usize>,
    ) -> (Tensor, Tensor) {
        let most = counts.iter().copied().max().unwrap_or(0);
        if most == 0 {
            return (keys, values);
        }
        let ragged = counts.iter().any(|count| *count < most).then(|| {
            let counts: Vec<i32> = counts.iter().map(|count| *count as i32).collect();
            let len = counts.len();
            Self::int_from_data(TensorData::new(counts, [len]), &keys.device())
        });
        let [keys, values] = append([keys, values], [new_keys, new_values], past, ragged, most);
        (keys, values)
    }

    fn attend(query: Tensor, keys: Tensor, values: Tensor, past: Ints) -> Tensor {
        let shape: [usize; 4] = query.shape().dims();
        if !are_f32(&[&query]) || !has_kernel(shape) {
            return default::attend::<Self>(query, keys, values, past);
        }
        attend(query, Segments { own: keys, shared: None }, Segments { own: values, shared: None }, past)
    }

    fn attend_shared(
        query: Tensor,
        shared_keys: Tensor,
        shared_values: Tensor,
        keys: Tensor,
        values: Tensor,
        past: Ints,
    ) -> Tensor {
        let shape: [usize; 4] = query.shape().dims();
        let is_one_type = shared_keys.dtype() == keys.dtype() && shared_values.dtype() == values.dtype();
        if !are_f32(&[&query]) || !has_kernel(shape) || !is_one_type {
            return default::attend_shared::<Self>(query, shared_keys, shared_values, keys, values, past);
        }
        let keys = Segments { own: keys, shared: Some(shared_keys) };
        attend(query, keys, Segments { own: values, shared: Some(shared_values) }, past)
    }

    fn layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, epsilon: f64) -> Tensor {
        match are_f32(&[&x, &gamma, &beta]) {
            true => layer_norm(x, gamma, beta, epsilon as f32),
            false => default::layer_norm::<Self>(x, gamma, beta, epsilon),
        }
    }

    fn argmax(logits: Tensor) -> Ints {
        if are_f32(&[&logits]) { argmax(logits) } else { default::argmax::<Self>(logits) }
    }

    fn advance(logits: Tensor, ids: Ints, past: Ints, chosen: Ints) -> (Ints, Ints, Ints) {
        let are_i32 = [&ids, &past, &chosen].iter().all(|tensor| tensor.dtype() == DType::I32);
        if !are_f32(&[&logits]) || !are_i32 {
            return default::advance::<Self>(logits, past, chosen);
        }
        let [ids, past, chosen] = advance(logits, [ids, past, chosen]);
        (ids, past, chosen)
    }
}

fn are_f32(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|tensor| tensor.dtype() == DType::F32)
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
