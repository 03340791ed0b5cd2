//! [`Gpt2Ops`] on burn's own tensors.

use burn::backend::Dispatch;
use burn::backend::ExecutionError;
use burn::tensor::{DType, Device, Element, Int, Tensor, TensorData, bf16, f16};

use crate::ops::{GROUP, Gelu, Gpt2Ops, QUAD, TILE};
use crate::pages::zeroed;

/// Whether there are kernels for a device; without them, matrices had better not be packed. The CPU has them if it has
/// AVX2 with FMA, AVX-512 or NEON; a device that records gradients has none.
pub fn has_kernels(device: &Device) -> bool {
    #[cfg(feature = "flex")]
    let is_fast = crate::flex::is_fast();
    #[cfg(not(feature = "flex"))]
    let is_fast = false;
    is_fast && !device.is_autodiff() && crate::device("flex").is_ok_and(|flex| flex == *device)
}

/// Element types that a [`PackedMatrix`] holds. What is computed from them is f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum WeightFormat {
    /// Four bytes a weight are read for each product.
    #[default]
    F32,
    /// Half of that, with 11 significant bits.
    F16,
    /// Half of that, with 8 significant bits.
    Bf16,
    /// A quarter, and 3% for scales: whole numbers from -127 to 127, of which every 64 consecutive inputs of a column have a
    /// scale in f16 in common. Products round their other factor in the same way.
    Int8,
}

impl WeightFormat {
    /// The float type that elements are rounded to before they are packed.
    pub fn float(self) -> DType {
        match self {
            Self::F32 | Self::Int8 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// A matrix `[inputs, outputs]` in the layout that its kernel reads from end to end.
#[derive(Clone, Debug)]
pub struct PackedMatrix {
    elements: Elements,
    inputs: usize,
    outputs: usize,
}

/// See [`Gpt2Ops`].
#[allow(clippy::large_enum_variant)] // all matrices of a model are of one format
#[derive(Clone, Debug)]
enum Elements {
    /// `[tiles, inputs, 32]`.
    Float(Tensor<3>),
    Int8 {
        /// `[tiles, quads, 32]`.
        weights: Tensor<3, Int>,
        /// `[tiles, groups, 32]`.
        scales: Tensor<3>,
    },
}

impl PackedMatrix {
    /// Packs `[inputs, outputs]`, rounded to `format`.
    pub fn new(matrix: Tensor<2>, format: WeightFormat) -> Self {
        let [inputs, outputs] = matrix.dims();
        let elements = match format {
            WeightFormat::Int8 => {
                let (weights, scales) = <Dispatch as Gpt2Ops>::quantize(matrix.into_dispatch());
                Elements::Int8 { weights: Tensor::from_dispatch(weights), scales: Tensor::from_dispatch(scales) }
            }
            _ => {
                let matrix = if matrix.dtype() == format.float() { matrix } else { matrix.cast(format.float()) };
                Elements::Float(Tensor::from_dispatch(<Dispatch as Gpt2Ops>::pack(matrix.into_dispatch())))
            }
        };
        Self { elements, inputs, outputs }
    }

    /// A matrix whose columns come one piece after the other from `piece`, which is asked for `[inputs, n]` with the columns
    /// `a..b` until `outputs` are there: so a matrix need not be there as a whole before it is packed.
    ///
    /// # Errors
    ///
    /// The first of `piece`.
    ///
    /// # Panics
    ///
    /// If a piece has another shape.
    pub fn from_pieces<E>(
        [inputs, outputs]: [usize; 2],
        format: WeightFormat,
        device: &Device,
        mut piece: impl FnMut(std::ops::Range<usize>) -> Result<Tensor<2>, E>,
    ) -> Result<Self, E> {
        let mut whole = Self::empty([inputs, outputs], format, device);
        // Whole tiles, of about 4 MB in f32: little beside a matrix that is worth cutting.
        let columns = (1_usize << 20).div_ceil(inputs.max(1)).next_multiple_of(TILE);
        for first in (0..outputs).step_by(columns) {
            let range = first..(first + columns).min(outputs);
            let (part, count) = (piece(range.clone())?, range.len());
            assert_eq!(part.dims(), [inputs, count], "shape of the columns {range:?}");
            whole.elements = whole.elements.with(Self::new(part, format).elements, first / TILE);
        }
        Ok(whole)
    }

    fn empty([inputs, outputs]: [usize; 2], format: WeightFormat, device: &Device) -> Self {
        let tiles = outputs.div_ceil(TILE);
        let (words, scales) = ([tiles, inputs.div_ceil(QUAD), TILE], [tiles, inputs.div_ceil(GROUP), TILE]);
        let floats = |zeros: TensorData| Elements::Float(Tensor::from_data(zeros, (device, format.float())));
        let elements = match format {
            WeightFormat::F32 => floats(zeros::<f32>([tiles, inputs, TILE])),
            WeightFormat::F16 => floats(zeros::<f16>([tiles, inputs, TILE])),
            WeightFormat::Bf16 => floats(zeros::<bf16>([tiles, inputs, TILE])),
            WeightFormat::Int8 => Elements::Int8 {
                weights: Tensor::from_data(zeros::<i32>(words), (device, DType::I32)),
                scales: Tensor::from_data(zeros::<f16>(scales), (device, DType::F16)),
            },
        };
        Self { elements, inputs, outputs }
    }

    /// `[inputs, outputs]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.inputs, self.outputs]
    }

    /// The packed elements, as they lie on the device: one tensor, or whole numbers and their scales.
    ///
    /// # Errors
    ///
    /// If the device does not hand them over.
    pub fn try_data(&self) -> Result<Vec<TensorData>, ExecutionError> {
        Ok(match self.elements.clone() {
            Elements::Float(tiles) => vec![tiles.try_into_data()?],
            Elements::Int8 { weights, scales } => vec![weights.try_into_data()?, scales.try_into_data()?],
        })
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        match &self.elements {
            Elements::Float(tiles) => tiles.shape().num_elements() * tiles.dtype().size(),
            Elements::Int8 { weights, scales } => {
                4 * weights.shape().num_elements() + 2 * scales.shape().num_elements()
            }
        }
    }

    /// `x W + b`, put through GELU if a form of it is given: `[N, inputs]` to `[N, outputs]`, in f32 both.
    ///
    /// # Panics
    ///
    /// If shapes or element types are others.
    pub fn linear(&self, x: Tensor<2>, bias: Tensor<1>, gelu: Option<Gelu>) -> Tensor<2> {
        assert_eq!(x.dims()[1], self.inputs, "width of x");
        let (x, bias, outputs) = (x.into_dispatch(), bias.into_dispatch(), self.outputs);
        Tensor::from_dispatch(match self.elements.clone() {
            Elements::Float(tiles) => {
                <Dispatch as Gpt2Ops>::packed_linear(x, tiles.into_dispatch(), bias, outputs, gelu)
            }
            Elements::Int8 { weights, scales } => {
                let (weights, scales) = (weights.into_dispatch(), scales.into_dispatch());
                <Dispatch as Gpt2Ops>::quantized_linear(x, weights, scales, bias, outputs, gelu)
            }
        })
    }

    /// `x W + b + residual`: `[N, inputs]` and `[N, outputs]` to `[N, outputs]`, in f32.
    ///
    /// # Panics
    ///
    /// If shapes or element types are others.
    pub fn linear_add(&self, x: Tensor<2>, bias: Tensor<1>, residual: Tensor<2>) -> Tensor<2> {
        assert_eq!([x.dims()[1], residual.dims()[1]], [self.inputs, self.outputs], "widths of x and of the residual");
        let (x, bias, residual) = (x.into_dispatch(), bias.into_dispatch(), residual.into_dispatch());
        Tensor::from_dispatch(match self.elements.clone() {
            Elements::Float(tiles) => {
                <Dispatch as Gpt2Ops>::packed_linear_add(x, tiles.into_dispatch(), bias, residual)
            }
            Elements::Int8 { weights, scales } => {
                let (weights, scales) = (weights.into_dispatch(), scales.into_dispatch());
                <Dispatch as Gpt2Ops>::quantized_linear_add(x, weights, scales, bias, residual)
            }
        })
    }

    /// The columns `ids`, `[N]`, as rows: `[N, inputs]`, in f32. Behind the last there may be some more, of zeros.
    ///
    /// # Panics
    ///
    /// If there is no such column.
    pub fn columns(&self, ids: Tensor<1, Int>) -> Tensor<2> {
        let ids = ids.into_dispatch();
        Tensor::from_dispatch(match self.elements.clone() {
            Elements::Float(tiles) => <Dispatch as Gpt2Ops>::packed_columns(tiles.into_dispatch(), ids),
            Elements::Int8 { weights, scales } => {
                let (weights, scales) = (weights.into_dispatch(), scales.into_dispatch());
                <Dispatch as Gpt2Ops>::quantized_columns(weights, scales, ids, self.inputs)
            }
        })
    }
}

fn zeros<E: Element + bytemuck::Zeroable>(shape: [usize; 3]) -> TensorData {
    TensorData::new(zeroed::<E>(shape.iter().product()), shape)
}

impl Elements {
    /// The same with the tiles of `part` from tile `first` on.
    fn with(self, part: Self, first: usize) -> Self {
        let floats = |whole: Tensor<3>, part: Tensor<3>| {
            let [tiles, inputs, _] = part.dims();
            whole.slice_assign([first..first + tiles, 0..inputs, 0..TILE], part)
        };
        match (self, part) {
            (Self::Float(whole), Self::Float(part)) => Self::Float(floats(whole, part)),
            (Self::Int8 { weights, scales }, Self::Int8 { weights: words, scales: of_part }) => {
                let [tiles, quads, _] = words.dims();
                let weights = weights.slice_assign([first..first + tiles, 0..quads, 0..TILE], words);
                Self::Int8 { weights, scales: floats(scales, of_part) }
            }
            _ => unreachable!("both are of the same format"),
        }
    }
}

/// Writes new keys or values, `[B, H, T, D]`, into the buffer of a cache, `[B, H, C, D]`: of row `b`, the first `counts[b]`
/// positions go to `starts[b]..starts[b] + counts[b]`. A buffer that nothing else refers to is written in place.
///
/// # Panics
///
/// If shapes or element types do not fit.
pub fn append(buffer: Tensor<4>, new: Tensor<4>, starts: &[usize], counts: &[usize]) -> Tensor<4> {
    let ([batch, heads, _, head_dim], [rows, of_buffer, capacity, width]) = (new.dims(), buffer.dims());
    assert_eq!([batch, heads, head_dim], [rows, of_buffer, width], "rows, heads and width of the buffer");
    assert_eq!([starts.len(), counts.len()], [batch, batch], "rows with a start and a count");
    let fits = |(start, count): (&usize, &usize)| start + count <= capacity && *count <= new.dims()[2];
    assert!(starts.iter().zip(counts).all(fits), "{counts:?} new positions from {starts:?} on, of {capacity}");
    let (buffer, new) = (buffer.into_dispatch(), new.into_dispatch());
    Tensor::from_dispatch(<Dispatch as Gpt2Ops>::append(buffer, new, starts.to_vec(), counts.to_vec()))
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
    use crate::ops::{default, default_int8};
    use burn::backend::Flex;
    use burn::backend::tensor::{FloatTensor, IntTensor};
    use burn::tensor::{Distribution, Shape};
    use proptest::prelude::*;

    const FORMATS: &[WeightFormat] = &[WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16, WeightFormat::Int8];

    fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
        Tensor::random(Shape::new(shape), Distribution::Uniform(-1.0, 1.0), &Device::flex())
    }

    #[track_caller]
    fn assert_close<const D: usize>(found: Tensor<D>, expected: Tensor<D>) {
        assert_eq!(found.dims(), expected.dims());
        let worst: f32 = (found - expected).abs().max().into_scalar();
        assert!(worst < 1e-4, "they differ by {worst}");
    }

    /// A random matrix in one of several ways to lie in memory: by itself, transposed, every other row of a longer one, or
    /// columns out of the middle of a wider one.
    fn lying(rows: usize, columns: usize, way: usize) -> Tensor<2> {
        match way % 4 {
            0 => random([rows, columns]),
            1 => random([columns, rows]).transpose(),
            2 => random([2 * rows, columns]).slice(burn::tensor::s![0..;2, ..]),
            _ => random([rows, columns + 5]).narrow(1, 2, columns),
        }
    }

    fn flex<const D: usize>(tensor: &Tensor<D>) -> FloatTensor<Flex> {
        tensor.clone().try_into_primitive::<Flex>().unwrap()
    }

    fn ints<const D: usize>(tensor: &Tensor<D, Int>) -> IntTensor<Flex> {
        tensor.clone().try_into_primitive::<Flex>().unwrap()
    }

    fn check_products([rows, inputs, outputs]: [usize; 3], ways: [usize; 3], format: WeightFormat, gelu: Option<Gelu>) {
        let (x, matrix) = (lying(rows, inputs, ways[0]), lying(inputs, outputs, ways[1]));
        let (bias, residual) = (random([outputs]), lying(rows, outputs, ways[2]));
        let packed = PackedMatrix::new(matrix.clone(), format);
        assert_eq!(packed.dims(), [inputs, outputs]);
        let ids = Tensor::<1, Int>::from_data([outputs as i32 - 1, 0, outputs as i32 / 2], &Device::flex());
        let tensor = |primitive| Tensor::<2>::from_primitive::<Flex>(primitive);

        let of_bias = || flex(&bias);
        let (product, sum, columns) = match &packed.elements {
            Elements::Float(tiles) => {
                assert_close(
                    Tensor::<3>::from_primitive::<Flex>(default::pack::<Flex>(flex(&matrix.cast(format.float())))),
                    tiles.clone(),
                );
                (
                    default::packed_linear::<Flex>(flex(&x), flex(tiles), of_bias(), outputs, gelu),
                    default::packed_linear_add::<Flex>(flex(&x), flex(tiles), of_bias(), flex(&residual)),
                    default::packed_columns::<Flex>(flex(tiles), ints(&ids)),
                )
            }
            Elements::Int8 { weights, scales } => {
                let (words, steps) = default_int8::quantize::<Flex>(flex(&matrix));
                let words = Tensor::<3, Int>::from_primitive::<Flex>(words);
                assert_eq!(words.into_data(), weights.clone().into_data());
                assert_close(
                    Tensor::<3>::from_primitive::<Flex>(steps).cast(DType::F32),
                    scales.clone().cast(DType::F32),
                );
                let matrix = || (ints(weights), flex(scales));
                let ((a, b), (c, d), (e, f)) = (matrix(), matrix(), matrix());
                (
                    default_int8::linear::<Flex>(flex(&x), a, b, of_bias(), outputs, gelu),
                    default_int8::linear_add::<Flex>(flex(&x), c, d, of_bias(), flex(&residual)),
                    default_int8::columns::<Flex>(e, f, ints(&ids), inputs),
                )
            }
        };
        assert_close(packed.linear(x.clone(), bias.clone(), gelu), tensor(product));
        assert_close(packed.linear_add(x, bias.clone(), residual), tensor(sum));
        assert_close(packed.columns(ids), tensor(columns));
    }

    #[derive(Clone, Debug)]
    struct Sizes {
        heads: usize,
        time: usize,
        head_dim: usize,
        shared: usize,
        spare: usize,
        past: Vec<usize>,
    }

    fn check_attention(sizes: Sizes, dtype: DType, query_is_split: bool) {
        let Sizes { heads, time, head_dim, shared, spare, past } = sizes;
        let (batch, count) = (past.len(), past.iter().max().unwrap() + time);
        let own = || random([batch, heads, count + spare, head_dim]).narrow(2, spare / 2, count).cast(dtype);
        let (keys, values) = (own(), own());
        let [shared_keys, shared_values] = [0, 1].map(|_| random([1, heads, shared, head_dim]).cast(dtype));
        // Heads that are not contiguous, as a projection gives them.
        let query = match query_is_split {
            true => random([batch, time, heads, head_dim]).swap_dims(1, 2),
            false => random([batch, heads, time, head_dim]),
        };
        let lens: Vec<i32> = past.iter().map(|&past| past as i32).collect();
        let past = Tensor::<1, Int>::from_data(lens.as_slice(), &Device::flex());

        let expected = default::attend::<Flex>(flex(&query), flex(&keys), flex(&values), ints(&past));
        let found = attend(query.clone(), keys.clone(), values.clone(), past.clone());
        assert_close(found.clone(), Tensor::from_primitive::<Flex>(expected));
        if shared == 0 {
            return;
        }
        let expected = default::attend_shared::<Flex>(
            flex(&query),
            flex(&shared_keys),
            flex(&shared_values),
            flex(&keys),
            flex(&values),
            ints(&past),
        );
        let found = attend_shared(query, [shared_keys, shared_values], [keys, values], past);
        assert_close(found, Tensor::from_primitive::<Flex>(expected));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn products_are_those_of_the_default_bodies(
            (rows, inputs, outputs) in (1_usize..30, 1_usize..200, 1_usize..100),
            ways in any::<[usize; 3]>(),
            format in prop::sample::select(FORMATS),
            gelu in prop::sample::select(&[None, Some(Gelu::Tanh), Some(Gelu::Erf)][..]),
        ) {
            check_products([rows, inputs, outputs], ways, format, gelu);
        }

        #[test]
        fn attention_is_that_of_the_default_body(
            (heads, time, head_dim) in (1_usize..4, 1_usize..40, 1_usize..80),
            (shared, spare) in (0_usize..20, 0_usize..6),
            past in prop::collection::vec(0_usize..50, 1..4),
            dtype in prop::sample::select(&[DType::F32, DType::F16, DType::BF16][..]),
            query_is_split in any::<bool>(),
        ) {
            check_attention(Sizes { heads, time, head_dim, shared, spare, past }, dtype, query_is_split);
        }
    }

    #[test]
    fn appending_is_that_of_the_default_body_and_happens_in_place() {
        let (heads, capacity, head_dim) = (3, 20, 8);
        for (starts, counts) in [(vec![4, 4], vec![5, 5]), (vec![0, 13], vec![7, 2]), (vec![20, 3], vec![0, 1])] {
            for dtype in [DType::F32, DType::F16] {
                let buffer = || random([2, heads, capacity, head_dim]).cast(dtype);
                let (left, new) = (buffer(), random([2, 7, heads, head_dim]).cast(dtype).swap_dims(1, 2));
                let expected = default::append::<Flex>(flex(&left), flex(&new), starts.clone(), counts.clone());
                let expected = Tensor::<4>::from_primitive::<Flex>(expected);
                let copied = append(left.clone(), new.clone(), &starts, &counts);
                assert_eq!(copied.into_data(), expected.clone().into_data());
                let start = |tensor: &Tensor<4>| flex(tensor).bytes().as_ptr();
                let before = start(&left);
                let written = append(left, new, &starts, &counts);
                assert_eq!(start(&written), before);
                assert_eq!(written.into_data(), expected.into_data());
            }
        }
    }

    #[test]
    fn a_matrix_packed_in_pieces_is_the_same() {
        // More columns than a piece has, and a last one that is no whole tile.
        let (inputs, outputs) = (3000, 800);
        let matrix = random([inputs, outputs]);
        for format in FORMATS {
            let mut pieces = 0;
            let in_pieces = PackedMatrix::from_pieces([inputs, outputs], *format, &Device::flex(), |columns| {
                pieces += 1;
                Ok::<_, ()>(matrix.clone().narrow(1, columns.start, columns.len()))
            });
            assert!(pieces > 2);
            let whole = PackedMatrix::new(matrix.clone(), *format);
            let (in_pieces, ids) = (in_pieces.unwrap(), Tensor::<1, Int>::arange(0..outputs as i64, &Device::flex()));
            assert_eq!(in_pieces.bytes(), whole.bytes());
            assert_eq!(in_pieces.columns(ids.clone()).into_data(), whole.columns(ids).into_data(), "{format:?}");
        }
        let failed = PackedMatrix::from_pieces([4, 4], WeightFormat::F32, &Device::flex(), |_| Err("no"));
        assert_eq!(failed.unwrap_err(), "no");
    }

    #[test]
    fn formats_take_the_bytes_that_they_say() {
        let bytes = |format| PackedMatrix::new(random([128, 64]), format).bytes();
        assert_eq!(FORMATS.iter().map(|format| bytes(*format)).collect::<Vec<_>>(), [32_768, 16_384, 16_384, 8_448]);
    }
}
