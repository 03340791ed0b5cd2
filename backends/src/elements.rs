//! [`Elements`]: what a packed matrix holds, and [`Gpt2Ops`] on it.

use std::ops::Range;

use burn::backend::Dispatch;
use burn::tensor::{DType, Device, Element, Int, Tensor, TensorData, bf16, f16};

use crate::WeightFormat;
use crate::capabilities::is_asynchronous;
use crate::ops::{GROUP, Gelu, Gpt2Ops, QUAD, TILE};
use crate::pages::zeroed;

/// See [`Gpt2Ops`].
#[allow(clippy::large_enum_variant)] // all matrices of a model are of one format
#[derive(Clone, Debug)]
pub(crate) enum Elements {
    /// `[tiles, inputs, 32]`.
    Float(Tensor<3>),
    Int8 {
        /// `[tiles, quads, 32]`.
        weights: Tensor<3, Int>,
        /// `[tiles, groups, 32]`.
        scales: Tensor<3>,
    },
}

fn zeros<E: Element + bytemuck::Zeroable>(shape: [usize; 3]) -> TensorData {
    TensorData::new(zeroed::<E>(shape.iter().product()), shape)
}

impl Elements {
    pub fn new(matrix: Tensor<2>, format: WeightFormat) -> Self {
        if format == WeightFormat::Int8 {
            let (weights, scales) = <Dispatch as Gpt2Ops>::quantize(matrix.into_dispatch());
            return Self::Int8 { weights: Tensor::from_dispatch(weights), scales: Tensor::from_dispatch(scales) };
        }
        // Through f32: what makes halves of doubles looks only at their upper 32 bits.
        let matrix = if matrix.dtype() == DType::F64 { matrix.cast(DType::F32) } else { matrix };
        let matrix = if matrix.dtype() == format.float() { matrix } else { matrix.cast(format.float()) };
        Self::Float(Tensor::from_dispatch(<Dispatch as Gpt2Ops>::pack(matrix.into_dispatch())))
    }

    pub fn empty([inputs, outputs]: [usize; 2], format: WeightFormat, device: &Device) -> Self {
        let tiles = outputs.div_ceil(TILE);
        let (words, scales) = ([tiles, inputs.div_ceil(QUAD), TILE], [tiles, inputs.div_ceil(GROUP), TILE]);
        let floats = |zeros: TensorData| Self::Float(Tensor::from_data(zeros, (device, format.float())));
        match format {
            WeightFormat::F32 => floats(zeros::<f32>([tiles, inputs, TILE])),
            WeightFormat::F16 => floats(zeros::<f16>([tiles, inputs, TILE])),
            WeightFormat::Bf16 => floats(zeros::<bf16>([tiles, inputs, TILE])),
            WeightFormat::Int8 => Self::Int8 {
                weights: Tensor::from_data(zeros::<i32>(words), (device, DType::I32)),
                scales: match is_asynchronous(device) {
                    true => Tensor::from_data(zeros::<f32>(scales), (device, DType::F32)),
                    false => Tensor::from_data(zeros::<f16>(scales), (device, DType::F16)),
                },
            },
        }
    }

    /// The same with the tiles of `part` from tile `first` on.
    pub fn with(self, part: Self, first: usize) -> Self {
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

    /// Some of the tiles; nothing is copied.
    pub fn tiles(&self, tiles: Range<usize>) -> Self {
        let (first, count) = (tiles.start, tiles.len());
        match self.clone() {
            Self::Float(all) => Self::Float(all.narrow(0, first, count)),
            Self::Int8 { weights, scales } => {
                Self::Int8 { weights: weights.narrow(0, first, count), scales: scales.narrow(0, first, count) }
            }
        }
    }

    pub fn linear(&self, x: Tensor<2>, bias: Tensor<1>, outputs: usize, gelu: Option<Gelu>) -> Tensor<2> {
        let (x, bias) = (x.into_dispatch(), bias.into_dispatch());
        Tensor::from_dispatch(match self.clone() {
            Self::Float(tiles) => <Dispatch as Gpt2Ops>::packed_linear(x, tiles.into_dispatch(), bias, outputs, gelu),
            Self::Int8 { weights, scales } => {
                let (weights, scales) = (weights.into_dispatch(), scales.into_dispatch());
                <Dispatch as Gpt2Ops>::quantized_linear(x, weights, scales, bias, outputs, gelu)
            }
        })
    }

    pub fn linear_add(&self, x: Tensor<2>, bias: Tensor<1>, residual: Tensor<2>) -> Tensor<2> {
        let (x, bias, residual) = (x.into_dispatch(), bias.into_dispatch(), residual.into_dispatch());
        Tensor::from_dispatch(match self.clone() {
            Self::Float(tiles) => <Dispatch as Gpt2Ops>::packed_linear_add(x, tiles.into_dispatch(), bias, residual),
            Self::Int8 { weights, scales } => {
                let (weights, scales) = (weights.into_dispatch(), scales.into_dispatch());
                <Dispatch as Gpt2Ops>::quantized_linear_add(x, weights, scales, bias, residual)
            }
        })
    }

    pub fn columns(&self, ids: Tensor<1, Int>, inputs: usize) -> Tensor<2> {
        let ids = ids.into_dispatch();
        Tensor::from_dispatch(match self.clone() {
            Self::Float(tiles) => <Dispatch as Gpt2Ops>::packed_columns(tiles.into_dispatch(), ids),
            Self::Int8 { weights, scales } => {
                let (weights, scales) = (weights.into_dispatch(), scales.into_dispatch());
                <Dispatch as Gpt2Ops>::quantized_columns(weights, scales, ids, inputs)
            }
        })
    }
}
