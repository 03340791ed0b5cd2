//! Layer norm (Ba et al., 2016) in one kernel, a workgroup a row.

use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{THREADS, address_type, empty_beside};

/// `(x - mean) / sqrt(variance + epsilon) gamma + beta` of each row of `x`, `[N, d]`; `gamma` and `beta` are `[d]`, all in f32.
pub fn layer_norm(x: CubeTensor, gamma: CubeTensor, beta: CubeTensor, epsilon: f32) -> CubeTensor {
    let x = into_contiguous(x);
    let [rows, width] = [x.meta.shape()[0], x.meta.shape()[1]];
    let output = empty_beside(&x, [rows, width], DType::F32);
    let cubes = cubecl::calculate_cube_count_elemwise(&x.client, rows * THREADS, CubeDim::new_1d(THREADS as u32));
    let address = address_type(&[&x, &output]);
    // SAFETY: a workgroup behind the last row does nothing; `checks::layer_norm` made sure that gamma and beta are as long as a
    // row.
    unsafe {
        layer_norm_kernel::launch_unchecked(
            &output.client,
            cubes,
            CubeDim::new_1d(THREADS as u32),
            address,
            x.into_tensor_arg(),
            into_contiguous(gamma).into_tensor_arg(),
            into_contiguous(beta).into_tensor_arg(),
            output.clone().into_tensor_arg(),
            epsilon,
        );
    }
    output
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn layer_norm_kernel(x: &Tensor<f32>, gamma: &Tensor<f32>, beta: &Tensor<f32>, output: &mut Tensor<f32>, epsilon: f32) {
    let (rows, width) = (x.shape(0), x.shape(1));
    let row = CUBE_POS;
    let thread = UNIT_POS as usize;
    let mut shared = Shared::<[f32]>::new_slice(THREADS);
    if row < rows {
        let start = row * width;
        let mut sum = 0.0_f32;
        let mut column = thread;
        while column < width {
            sum += x[start + column];
            column += THREADS;
        }
        let mean = total(&mut shared, sum, thread) / width as f32;
        let mut squares = 0.0_f32;
        column = thread;
        while column < width {
            let distance = x[start + column] - mean;
            squares += distance * distance;
            column += THREADS;
        }
        let variance = total(&mut shared, squares, thread) / width as f32;
        let scale = 1.0 / f32::sqrt(variance + epsilon);
        column = thread;
        while column < width {
            output[start + column] = (x[start + column] - mean) * scale * gamma[column] + beta[column];
            column += THREADS;
        }
    }
}

/// The sum of what the threads of a workgroup have, for each of them.
#[cube]
fn total(shared: &mut Shared<[f32]>, value: f32, thread: usize) -> f32 {
    // Nobody still reads what an earlier call left.
    sync_cube();
    shared[thread] = value;
    sync_cube();
    let mut step = comptime!(THREADS / 2).runtime();
    while step > 0 {
        if thread < step {
            let other = shared[thread + step];
            shared[thread] += other;
        }
        sync_cube();
        step /= 2;
    }
    shared[0]
}
