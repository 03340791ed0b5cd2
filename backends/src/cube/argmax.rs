//! The most likely token of each row of logits, where the logits are: only its id crosses to the host, and that not at every step.

use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{THREADS, address_type, empty_beside, writable};
use crate::ops::default::NOT_A_NUMBER;

/// See [`Gpt2Ops::argmax`](crate::Gpt2Ops::argmax).
pub fn argmax(logits: CubeTensor) -> CubeTensor {
    let logits = into_contiguous(logits);
    let rows = logits.meta.shape()[0];
    let output = empty_beside(&logits, [rows], DType::I32);
    let (cubes, dim) = one_workgroup_each(&logits.client, rows);
    let address = address_type(&[&logits]);
    // SAFETY: a workgroup behind the last row does nothing.
    unsafe {
        argmax_kernel::launch_unchecked(
            &output.client,
            cubes,
            dim,
            address,
            logits.into_tensor_arg(),
            output.clone().into_tensor_arg(),
        );
    }
    output
}

/// See [`Gpt2Ops::advance`](crate::Gpt2Ops::advance).
pub fn advance(logits: CubeTensor, [ids, context_lens, chosen]: [CubeTensor; 3]) -> [CubeTensor; 3] {
    let logits = into_contiguous(logits);
    // In this order, since a copy may have something behind each of its rows.
    let [ids, context_lens, chosen] = [ids, context_lens, chosen].map(|tensor| into_contiguous(writable(tensor)));
    let (cubes, dim) = one_workgroup_each(&logits.client, logits.meta.shape()[0]);
    let address = address_type(&[&logits, &chosen]);
    // SAFETY: a workgroup behind the last row does nothing; `checks::advance` made sure that the tensors have as many rows as
    // the logits and a place for what is chosen; nothing else refers to them.
    unsafe {
        advance_kernel::launch_unchecked(
            &ids.client,
            cubes,
            dim,
            address,
            logits.into_tensor_arg(),
            ids.clone().into_tensor_arg(),
            context_lens.clone().into_tensor_arg(),
            chosen.clone().into_tensor_arg(),
        );
    }
    [ids, context_lens, chosen]
}

fn one_workgroup_each(client: &Client, rows: usize) -> (CubeCount, CubeDim) {
    let dim = CubeDim::new_1d(THREADS as u32);
    (cubecl::calculate_cube_count_elemwise(client, rows * THREADS, dim), dim)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn argmax_kernel(logits: &Tensor<f32>, output: &mut Tensor<i32>) {
    let row = CUBE_POS;
    if row < logits.shape(0) {
        let id = argmax_of_row(logits, row);
        if UNIT_POS == 0 {
            output[row] = id;
        }
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn advance_kernel(
    logits: &Tensor<f32>,
    ids: &mut Tensor<i32>,
    context_lens: &mut Tensor<i32>,
    chosen: &mut Tensor<i32>,
) {
    let row = CUBE_POS;
    if row < logits.shape(0) {
        let id = argmax_of_row(logits, row);
        if UNIT_POS == 0 {
            let columns = chosen.shape(1);
            let before = context_lens[row];
            chosen[row * columns + i32::max(before, 0) as usize % columns] = id;
            // Whatever is looked up next is in the vocabulary.
            ids[row] = i32::max(id, 0);
            context_lens[row] = before + 1;
        }
    }
}

/// The lowest id among the largest logits of a row, for the first thread of its workgroup; [`NOT_A_NUMBER`] if there is something
/// that is not one, or plus infinity, or nothing that is finite.
#[cube]
fn argmax_of_row(logits: &Tensor<f32>, row: usize) -> i32 {
    let count = logits.shape(1);
    let thread = UNIT_POS as usize;
    let mut values = Shared::<[f32]>::new_slice(THREADS);
    let mut ids = Shared::<[i32]>::new_slice(THREADS);
    let mut best = f32::min_value();
    // Behind every id, so that any other number wins against it.
    let mut id = count as i32;
    let mut column = thread;
    while column < count {
        let value = logits[row * count + column];
        // By its bits, since a compiler may take it for granted that there is nothing but numbers.
        let bits = u32::reinterpret(value);
        let magnitude = bits & 0x7fff_ffff;
        let is_finite = magnitude < 0x7f80_0000;
        if is_finite && (value > best || (value == best && (column as i32) < id)) {
            best = value;
            id = column as i32;
        }
        if magnitude > 0x7f80_0000 || bits == 0x7f80_0000 {
            best = f32::max_value();
            id = NOT_A_NUMBER;
        }
        column += THREADS;
    }
    values[thread] = best;
    ids[thread] = id;
    sync_cube();
    let mut step = comptime!(THREADS / 2).runtime();
    while step > 0 {
        if thread < step {
            let (other, other_id) = (values[thread + step], ids[thread + step]);
            let is_better = other > values[thread] || (other == values[thread] && other_id < ids[thread]);
            if is_better {
                values[thread] = other;
                ids[thread] = other_id;
            }
        }
        sync_cube();
        step /= 2;
    }
    let mut found = ids[0];
    if found >= count as i32 {
        found = NOT_A_NUMBER;
    }
    found
}
