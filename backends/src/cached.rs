//! Key-value caches on burn's own tensors: appending to them and attending over them.

use burn::backend::Dispatch;
use burn::tensor::Tensor;

use crate::AttentionMetadata;
use crate::metadata::check_rows;
use crate::ops::Gpt2Ops;

/// Writes new keys and values, `[N, H, D]` each, into the buffers of a cache, `[S, H, C, D]` each: of each row, to the positions
/// of its slot that follow its context. Buffers that nothing else refers to are written in place.
///
/// # Panics
///
/// If shapes do not fit, or if keys are of another element type than values, in the buffers or among what is new.
pub fn append(
    [keys, values]: [Tensor<4>; 2],
    [new_keys, new_values]: [Tensor<3>; 2],
    metadata: &AttentionMetadata,
) -> [Tensor<4>; 2] {
    assert_eq!(keys.dims(), values.dims(), "keys are shaped as values");
    assert_eq!(new_keys.dims(), new_values.dims(), "new keys are shaped as new values");
    assert_eq!([keys.dtype(), new_keys.dtype()], [values.dtype(), new_values.dtype()], "types of keys and of values");
    check_rows(new_keys.dims(), keys.dims(), metadata.rows());
    let (context_lens, layout) = metadata.on_device();
    let (keys, values) = <Dispatch as Gpt2Ops>::append(
        keys.into_dispatch(),
        values.into_dispatch(),
        new_keys.into_dispatch(),
        new_values.into_dispatch(),
        context_lens.into_dispatch(),
        layout.into_dispatch(),
        metadata.shared_rows(),
    );
    [keys, values].map(Tensor::from_dispatch)
}

/// `softmax(q k^T / sqrt D) v` over keys in place in a cache.
///
/// # Shapes
///
/// - query: `[N, H, D]`
/// - keys, values: `[S, H, C, D]`, of whose slot query `t` of a row sees the first `context_len + t + 1` positions
/// - result: `[N, H D]`
///
/// # Panics
///
/// If shapes are others, or if keys are of another element type than values.
pub fn attend(query: Tensor<3>, keys: Tensor<4>, values: Tensor<4>, metadata: &AttentionMetadata) -> Tensor<2> {
    assert_eq!(keys.dtype(), values.dtype(), "types of keys and of values");
    assert_eq!(keys.dims(), values.dims(), "keys are shaped as values");
    check_rows(query.dims(), keys.dims(), metadata.rows());
    let (context_lens, layout) = metadata.on_device();
    Tensor::from_dispatch(<Dispatch as Gpt2Ops>::attend(
        query.into_dispatch(),
        keys.into_dispatch(),
        values.into_dispatch(),
        context_lens.into_dispatch(),
        layout.into_dispatch(),
        metadata.shared_rows(),
    ))
}
