//! Key-value caches on burn's own tensors: appending to them and attending over them.

use burn::backend::Dispatch;
use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::ops::Gpt2Ops;

/// Writes new keys and values, `[B, H, T, D]` each, into the buffers of a cache, `[B, H, C, D]` each: of row `b`, the first
/// `counts[b]` positions go to `starts[b]..starts[b] + counts[b]`. Buffers that nothing else refers to are written in place.
/// `past` is `starts` on the device, in any type of integers, if that is there already.
///
/// # Panics
///
/// If shapes do not fit, or if keys are of another element type than values, in the buffers or among what is new.
pub fn append(
    [keys, values]: [Tensor<4>; 2],
    [new_keys, new_values]: [Tensor<4>; 2],
    past: Option<&Tensor<1, Int>>,
    starts: &[usize],
    counts: &[usize],
) -> [Tensor<4>; 2] {
    let ([batch, heads, time, head_dim], [rows, of_buffer, capacity, width]) = (new_keys.dims(), keys.dims());
    assert_eq!([keys.dims(), new_keys.dims()], [values.dims(), new_values.dims()], "keys are shaped as values");
    assert_eq!([keys.dtype(), new_keys.dtype()], [values.dtype(), new_values.dtype()], "types of keys and of values");
    assert_eq!([batch, heads, head_dim], [rows, of_buffer, width], "rows, heads and width of the buffers");
    assert_eq!([starts.len(), counts.len()], [batch, batch], "rows with a start and a count");
    let fits = |(start, count): (&usize, &usize)| {
        start.checked_add(*count).is_some_and(|end| end <= capacity) && *count <= time
    };
    assert!(starts.iter().zip(counts).all(fits), "{counts:?} new positions from {starts:?} on, of {capacity}");
    assert!(past.is_none_or(|past| past.dims() == [batch]), "a length of each row");
    let past = past.cloned().unwrap_or_else(|| {
        let starts: Vec<i32> = starts.iter().map(|start| *start as i32).collect();
        Tensor::from_data(TensorData::new(starts, [batch]), (&keys.device(), DType::I32))
    });
    let (keys, values) = <Dispatch as Gpt2Ops>::append(
        keys.into_dispatch(),
        values.into_dispatch(),
        new_keys.into_dispatch(),
        new_values.into_dispatch(),
        past.into_dispatch(),
        starts.to_vec(),
        counts.to_vec(),
    );
    [keys, values].map(Tensor::from_dispatch)
}

/// `softmax(q k^T / sqrt D) v` over keys in place in a cache.
///
/// # Shapes
///
/// - query: `[B, H, T, D]`
/// - keys, values: `[B, H, L, D]`, of which query `t` of row `b` sees the first `past[b] + t + 1`
/// - past: `[B]`, in any type of integers
/// - result: `[B, T, H D]`
///
/// # Panics
///
/// If shapes are others, or if keys are of another element type than values. Kernels of the CPU also if a length is negative; others
/// take it for 0.
pub fn attend(query: Tensor<4>, keys: Tensor<4>, values: Tensor<4>, past: Tensor<1, Int>) -> Tensor<3> {
    check(&query, [&keys, &values], &past);
    let (query, past) = (query.into_dispatch(), past.into_dispatch());
    Tensor::from_dispatch(<Dispatch as Gpt2Ops>::attend(query, keys.into_dispatch(), values.into_dispatch(), past))
}

/// As [`attend`], over shared keys before each row's own, `[1, H, S, D]` both, of which every query sees all.
///
/// # Panics
///
/// As [`attend`].
pub fn attend_shared(
    query: Tensor<4>,
    [shared_keys, shared_values]: [Tensor<4>; 2],
    [keys, values]: [Tensor<4>; 2],
    past: Tensor<1, Int>,
) -> Tensor<3> {
    check(&query, [&keys, &values], &past);
    let [_, heads, _, head_dim] = query.dims();
    let [_, _, count, _] = shared_keys.dims();
    assert_eq!(
        [shared_keys.dims(), shared_values.dims()],
        [[1, heads, count, head_dim]; 2],
        "shapes of what is shared"
    );
    assert_eq!(shared_keys.dtype(), shared_values.dtype(), "types of shared keys and of shared values");
    Tensor::from_dispatch(<Dispatch as Gpt2Ops>::attend_shared(
        query.into_dispatch(),
        shared_keys.into_dispatch(),
        shared_values.into_dispatch(),
        keys.into_dispatch(),
        values.into_dispatch(),
        past.into_dispatch(),
    ))
}

fn check(query: &Tensor<4>, [keys, values]: [&Tensor<4>; 2], past: &Tensor<1, Int>) {
    assert_eq!(keys.dtype(), values.dtype(), "types of keys and of values");
    let ([batch, heads, _, head_dim], [_, _, count, _]) = (query.dims(), keys.dims());
    assert_eq!([keys.dims(), values.dims()], [[batch, heads, count, head_dim]; 2], "shapes of keys and values");
    assert_eq!(past.dims(), [batch], "a length of each row");
}
