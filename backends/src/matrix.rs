//! [`Gpt2Ops`] on burn's own tensors.

use burn::backend::Dispatch;
use burn::tensor::{DType, Device, Int, Tensor};

use crate::ops::{Gelu, Gpt2Ops, TILE};

/// Whether there are kernels for a device; without them, matrices had better not be packed. The CPU has them if it has
/// AVX2 with FMA, AVX-512 or NEON; a device that records gradients has none.
pub fn has_kernels(device: &Device) -> bool {
    #[cfg(feature = "flex")]
    let is_fast = crate::flex::is_fast();
    #[cfg(not(feature = "flex"))]
    let is_fast = false;
    is_fast && !device.is_autodiff() && crate::device("flex").is_ok_and(|flex| flex == *device)
}

/// A matrix `[inputs, outputs]` in the layout that its kernel reads from end to end.
#[derive(Clone, Debug)]
pub struct PackedMatrix {
    /// `[tiles, inputs, 32]`.
    tiles: Tensor<3>,
    outputs: usize,
}

impl PackedMatrix {
    /// Packs `[inputs, outputs]`, rounded to `dtype`.
    pub fn new(matrix: Tensor<2>, dtype: DType) -> Self {
        let [_, outputs] = matrix.dims();
        let matrix = if matrix.dtype() == dtype { matrix } else { matrix.cast(dtype) };
        let tiles = Tensor::from_dispatch(<Dispatch as Gpt2Ops>::pack(matrix.into_dispatch()));
        Self { tiles, outputs }
    }

    /// `[inputs, outputs]`.
    pub fn dims(&self) -> [usize; 2] {
        let [_, inputs, _] = self.tiles.dims();
        [inputs, self.outputs]
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        let [inputs, outputs] = self.dims();
        outputs.div_ceil(TILE) * TILE * inputs * self.tiles.dtype().size()
    }

    /// `x W + b`, put through GELU if a form of it is given: `[N, inputs]` to `[N, outputs]`, in f32 both.
    ///
    /// # Panics
    ///
    /// If shapes or element types are others.
    pub fn linear(&self, x: Tensor<2>, bias: Tensor<1>, gelu: Option<Gelu>) -> Tensor<2> {
        let (x, tiles, bias) = (x.into_dispatch(), self.tiles.clone().into_dispatch(), bias.into_dispatch());
        Tensor::from_dispatch(<Dispatch as Gpt2Ops>::packed_linear(x, tiles, bias, self.outputs, gelu))
    }

    /// `x W + b + residual`: `[N, inputs]` and `[N, outputs]` to `[N, outputs]`, in f32.
    ///
    /// # Panics
    ///
    /// If shapes or element types are others.
    pub fn linear_add(&self, x: Tensor<2>, bias: Tensor<1>, residual: Tensor<2>) -> Tensor<2> {
        let (x, tiles, bias) = (x.into_dispatch(), self.tiles.clone().into_dispatch(), bias.into_dispatch());
        Tensor::from_dispatch(<Dispatch as Gpt2Ops>::packed_linear_add(x, tiles, bias, residual.into_dispatch()))
    }

    /// The columns `ids`, `[N]`, as rows: `[N, inputs]`, in f32.
    ///
    /// # Panics
    ///
    /// If there is no such column.
    pub fn columns(&self, ids: Tensor<1, Int>) -> Tensor<2> {
        let tiles = self.tiles.clone().into_dispatch();
        Tensor::from_dispatch(<Dispatch as Gpt2Ops>::packed_columns(tiles, ids.into_dispatch()))
    }
}

/// `softmax(q k^T / sqrt D) v` over keys in place in a cache.
///
/// # Shapes
///
/// - query: `[B, H, T, D]`
/// - keys, values: `[B, H, L, D]`, of which query `t` of row `b` sees the first `past[b] + t + 1`
/// - past: `[B]`
/// - result: `[B, T, H D]`
///
/// # Panics
///
/// If shapes are others, or the query is not in f32; keys and values may be in a half.
pub fn attend(query: Tensor<4>, keys: Tensor<4>, values: Tensor<4>, past: Tensor<1, Int>) -> Tensor<3> {
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
    Tensor::from_dispatch(<Dispatch as Gpt2Ops>::attend_shared(
        query.into_dispatch(),
        shared_keys.into_dispatch(),
        shared_values.into_dispatch(),
        keys.into_dispatch(),
        values.into_dispatch(),
        past.into_dispatch(),
    ))
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::ops::default;
    use burn::backend::Flex;
    use burn::tensor::{Distribution, Shape};

    fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
        Tensor::random(Shape::new(shape), Distribution::Uniform(-1.0, 1.0), &Device::flex())
    }

    #[track_caller]
    fn assert_close<const D: usize>(found: Tensor<D>, expected: Tensor<D>) {
        assert_eq!(found.dims(), expected.dims());
        let worst: f32 = (found - expected).abs().max().into_scalar();
        assert!(worst < 1e-4, "they differ by {worst}");
    }

    #[test]
    fn kernels_and_default_bodies_are_the_same_functions() {
        for (rows, inputs, outputs) in [(1, 40, 70), (5, 33, 64), (17, 64, 31)] {
            let (x, matrix, bias) = (random([rows, inputs]), random([inputs, outputs]), random([outputs]));
            let residual = random([rows, outputs]);
            // A transposed view, as the tied head is one.
            for matrix in [matrix.clone(), matrix.transpose().matmul(Tensor::eye(inputs, &Device::flex())).transpose()]
            {
                for dtype in [DType::F32, DType::F16, DType::BF16] {
                    let packed = PackedMatrix::new(matrix.clone(), dtype);
                    assert_eq!(packed.dims(), [inputs, outputs]);
                    let flex = |tensor: Tensor<2>| tensor.try_into_primitive::<Flex>().unwrap();
                    let tiles = || packed.tiles.clone().try_into_primitive::<Flex>().unwrap();
                    let of_bias = || bias.clone().try_into_primitive::<Flex>().unwrap();
                    let tensor = |primitive| Tensor::<2>::from_primitive::<Flex>(primitive);
                    for gelu in [None, Some(Gelu::Tanh), Some(Gelu::Erf)] {
                        let expected =
                            default::packed_linear::<Flex>(flex(x.clone()), tiles(), of_bias(), outputs, gelu);
                        assert_close(packed.linear(x.clone(), bias.clone(), gelu), tensor(expected));
                    }
                    let residual_of = || flex(residual.clone());
                    let expected =
                        default::packed_linear_add::<Flex>(flex(x.clone()), tiles(), of_bias(), residual_of());
                    assert_close(packed.linear_add(x.clone(), bias.clone(), residual.clone()), tensor(expected));
                    let ids = Tensor::<1, Int>::from_data([3, 0, outputs as i32 - 1], &Device::flex());
                    let picked = ids.clone().try_into_primitive::<Flex>().unwrap();
                    let expected = default::packed_columns::<Flex>(tiles(), picked);
                    assert_close(packed.columns(ids), tensor(expected));
                }
            }
        }
    }

    #[test]
    fn attention_is_that_of_the_default_body() {
        for (batch, time, past) in [(1, 1, vec![7]), (3, 1, vec![0, 9, 4]), (2, 6, vec![5, 0])] {
            let (heads, head_dim, shared) = (3, 20, 4);
            let count = past.iter().max().unwrap() + time;
            let wide = || random([batch, heads, count + 5, head_dim]).narrow(2, 2, count);
            let (keys, values) = (wide(), wide());
            let [shared_keys, shared_values] = [0, 1].map(|_| random([1, heads, shared, head_dim]));
            // Heads that are not contiguous, as a projection gives them.
            let query = random([batch, time, heads, head_dim]).swap_dims(1, 2);
            let ints: Vec<i32> = past.iter().map(|&past| past as i32).collect();
            let past = Tensor::<1, Int>::from_data(ints.as_slice(), &Device::flex());

            let flex = |tensor: &Tensor<4>| tensor.clone().try_into_primitive::<Flex>().unwrap();
            let past_of = || past.clone().try_into_primitive::<Flex>().unwrap();
            let expected = default::attend::<Flex>(flex(&query), flex(&keys), flex(&values), past_of());
            let found = attend(query.clone(), keys.clone(), values.clone(), past.clone());
            assert_close(found, Tensor::from_primitive::<Flex>(expected));
            let expected = default::attend_shared::<Flex>(
                flex(&query),
                flex(&shared_keys),
                flex(&shared_values),
                flex(&keys),
                flex(&values),
                past_of(),
            );
            let found = attend_shared(query, [shared_keys, shared_values], [keys, values], past.clone());
            assert_close(found, Tensor::from_primitive::<Flex>(expected));
        }
    }
}
