//! What is done with each row of a matrix by itself, on burn's own tensors.

use burn::backend::Dispatch;
use burn::tensor::{Int, Tensor};

use crate::ops::Gpt2Ops;
use crate::ops::default::as_i32;

/// Layer norm of each row of `x`, `[N, d]`; `gamma` and `beta` are `[d]`. One kernel where [`is_asynchronous`](crate::is_asynchronous) is true.
///
/// # Panics
///
/// If shapes are others.
pub fn layer_norm(x: Tensor<2>, gamma: Tensor<1>, beta: Tensor<1>, epsilon: f64) -> Tensor<2> {
    assert_eq!([gamma.dims(), beta.dims()], [[x.dims()[1]]; 2], "widths of gamma and beta");
    let (gamma, beta) = (gamma.into_dispatch(), beta.into_dispatch());
    Tensor::from_dispatch(<Dispatch as Gpt2Ops>::layer_norm(x.into_dispatch(), gamma, beta, epsilon))
}

/// The lowest id among the largest logits of each row: `[N, V]` to `[N]`. A row that holds what is not a number, or plus infinity,
/// or nothing that is finite, has -1.
pub fn argmax(logits: Tensor<2>) -> Tensor<1, Int> {
    Tensor::from_dispatch(<Dispatch as Gpt2Ops>::argmax(logits.into_dispatch()))
}

/// What greedy decoding knows of its rows, on the device: see [`advance`].
#[derive(Clone, Debug)]
pub struct DecodeState {
    /// The newest token of each row, `[B]`, in i32.
    pub ids: Tensor<1, Int>,
    /// Tokens before it, `[B]`, in i32.
    pub context_lens: Tensor<1, Int>,
    /// The last `N` tokens that were chosen for each row, `[B, N]`, in i32: the one behind `p` tokens is at `p % N`.
    pub chosen: Tensor<2, Int>,
}

/// Takes the most likely token of each row of `logits`, `[B, V]`. In [`chosen`](DecodeState::chosen), -1 stands for logits that are not
/// numbers, or none of which is finite; in [`ids`](DecodeState::ids), there is a token of the vocabulary all the same. Tensors of
/// other integers come back in i32.
///
/// # Panics
///
/// If shapes are others.
pub fn advance(logits: Tensor<2>, state: DecodeState) -> DecodeState {
    let DecodeState { ids, context_lens, chosen } = state;
    let ([batch, _], [rows, columns]) = (logits.dims(), chosen.dims());
    assert_eq!([ids.dims(), context_lens.dims(), [rows]], [[batch]; 3], "rows of what is known");
    assert!(columns > 0, "a column for what is chosen");
    let (ids, context_lens, chosen) = <Dispatch as Gpt2Ops>::advance(
        logits.into_dispatch(),
        as_i32::<Dispatch>(ids.into_dispatch()),
        as_i32::<Dispatch>(context_lens.into_dispatch()),
        as_i32::<Dispatch>(chosen.into_dispatch()),
    );
    DecodeState {
        ids: Tensor::from_dispatch(ids),
        context_lens: Tensor::from_dispatch(context_lens),
        chosen: Tensor::from_dispatch(chosen),
    }
}
