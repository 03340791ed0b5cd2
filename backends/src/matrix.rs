//! [`PackedMatrix`]: a matrix in the layout of a device's kernels.

use std::ops::Range;

use burn::backend::{Dispatch, ExecutionError};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::capabilities::largest_buffer;
use crate::elements::Elements;
use crate::ops::default::as_i32;
use crate::ops::{Gelu, QUAD, TILE};

/// Element types that a [`PackedMatrix`] holds. What is computed from them is f32; only a GPU's matrix units, which products of
/// very many rows go to, round the other factor to the type of 16 bits.
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
    /// scale in f16 in common; so a weight is kept to within half a scale, or 3e-8 if that is more. On the CPU, products round their other factor in the same way; on a GPU they do not, and scales
    /// are in f32.
    Int8,
}

impl WeightFormat {
    /// Bytes of an element, without scales.
    fn element_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Int8 => 1,
        }
    }

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
    /// Its columns, one block after the other: a device may have a limit for what a kernel reads as one buffer, and the head of
    /// a GPT-2 takes more than WebGPU grants. All but the last have whole tiles.
    pub(crate) blocks: Vec<ColumnBlock>,
    inputs: usize,
    outputs: usize,
}

/// Some columns of a matrix.
#[derive(Clone, Debug)]
pub(crate) struct ColumnBlock {
    pub(crate) elements: Elements,
    pub(crate) columns: Range<usize>,
}

impl PackedMatrix {
    /// Packs `[inputs, outputs]`, of any float type, rounded to `format`.
    pub fn new(matrix: Tensor<2>, format: WeightFormat) -> Self {
        let [inputs, outputs] = matrix.dims();
        let blocks = columns_of_blocks([inputs, outputs], format, &matrix.device());
        let block = |columns: Range<usize>| {
            let matrix = match columns.len() == outputs {
                true => matrix.clone(),
                false => matrix.clone().narrow(1, columns.start, columns.len()),
            };
            ColumnBlock { elements: Elements::new(matrix, format), columns }
        };
        Self { blocks: blocks.into_iter().map(block).collect(), inputs, outputs }
    }

    /// A matrix whose columns come one chunk after the other from `chunk`, which is asked for `[inputs, n]` with the columns
    /// `a..b` until `outputs` are there: so a matrix need not be there as a whole before it is packed.
    ///
    /// # Errors
    ///
    /// The first of `chunk`.
    ///
    /// # Panics
    ///
    /// If a chunk has another shape.
    pub fn from_column_chunks<E>(
        [inputs, outputs]: [usize; 2],
        format: WeightFormat,
        device: &Device,
        mut chunk: impl FnMut(Range<usize>) -> Result<Tensor<2>, E>,
    ) -> Result<Self, E> {
        // Whole tiles, of about 4 MB in f32: little beside a matrix that is worth cutting.
        let width = (1_usize << 20).div_ceil(inputs.max(1)).next_multiple_of(TILE);
        let mut blocks = Vec::new();
        for columns in columns_of_blocks([inputs, outputs], format, device) {
            let mut elements = Elements::empty([inputs, columns.len()], format, device);
            for first in columns.clone().step_by(width) {
                let range = first..(first + width).min(columns.end);
                let (matrix, count) = (chunk(range.clone())?, range.len());
                assert_eq!(matrix.dims(), [inputs, count], "shape of the columns {range:?}");
                elements = elements.with(Elements::new(matrix, format), (first - columns.start) / TILE);
            }
            blocks.push(ColumnBlock { elements, columns });
        }
        Ok(Self { blocks, inputs, outputs })
    }

    /// `[inputs, outputs]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.inputs, self.outputs]
    }

    /// The device that it lies on.
    pub fn device(&self) -> Device {
        match &self.blocks[0].elements {
            Elements::Float(tiles) => tiles.device(),
            Elements::Int8 { weights, .. } => weights.device(),
        }
    }

    /// The packed elements, as they lie on the device: one tensor a block, or whole numbers and their scales.
    ///
    /// # Errors
    ///
    /// If the device does not hand them over.
    pub fn try_data(&self) -> Result<Vec<TensorData>, ExecutionError> {
        let mut data = Vec::new();
        for block in &self.blocks {
            match block.elements.clone() {
                Elements::Float(tiles) => data.push(tiles.try_into_data()?),
                Elements::Int8 { weights, scales } => {
                    data.push(weights.try_into_data()?);
                    data.push(scales.try_into_data()?);
                }
            }
        }
        Ok(data)
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        let bytes = |block: &ColumnBlock| match &block.elements {
            Elements::Float(tiles) => tiles.shape().num_elements() * tiles.dtype().size(),
            Elements::Int8 { weights, scales } => {
                4 * weights.shape().num_elements() + scales.dtype().size() * scales.shape().num_elements()
            }
        };
        self.blocks.iter().map(bytes).sum()
    }

    /// `x W + b`, put through GELU if a form of it is given: `[N, inputs]` to `[N, outputs]`, in f32 both.
    ///
    /// # Panics
    ///
    /// If shapes or element types are others.
    pub fn linear(&self, x: Tensor<2>, bias: Tensor<1>, gelu: Option<Gelu>) -> Tensor<2> {
        assert_eq!([x.dims()[1], bias.dims()[0]], [self.inputs, self.outputs], "widths of x and of the bias");
        self.of_blocks(|block, columns| match columns {
            None => block.linear(x.clone(), bias.clone(), self.outputs, gelu),
            Some(columns) => {
                let bias = bias.clone().narrow(0, columns.start, columns.len());
                block.linear(x.clone(), bias, columns.len(), gelu)
            }
        })
    }

    /// Some columns of [`linear`](Self::linear), the same bits: `[N, inputs]` to `[N, columns]`; `bias` is that of all.
    ///
    /// # Panics
    ///
    /// If shapes or element types are others.
    pub fn linear_columns(&self, x: Tensor<2>, bias: Tensor<1>, columns: Range<usize>) -> Tensor<2> {
        assert!(columns.end <= self.outputs, "columns {columns:?} of {}", self.outputs);
        let is_tiled =
            columns.start.is_multiple_of(TILE) && (columns.end.is_multiple_of(TILE) || columns.end == self.outputs);
        match &self.blocks[..] {
            [whole] if is_tiled => {
                assert_eq!([x.dims()[1], bias.dims()[0]], [self.inputs, self.outputs], "widths of x and of the bias");
                let bias = bias.narrow(0, columns.start, columns.len());
                let tiles = columns.start / TILE..columns.end.div_ceil(TILE);
                whole.elements.tiles(tiles).linear(x, bias, columns.len(), None)
            }
            _ => self.linear(x, bias, None).narrow(1, columns.start, columns.len()),
        }
    }

    /// `x W + b + residual`: `[N, inputs]` and `[N, outputs]` to `[N, outputs]`, in f32.
    ///
    /// # Panics
    ///
    /// If shapes or element types are others.
    pub fn linear_add(&self, x: Tensor<2>, bias: Tensor<1>, residual: Tensor<2>) -> Tensor<2> {
        let ([rows, inputs], [outputs]) = (x.dims(), bias.dims());
        assert_eq!([inputs, outputs], [self.inputs, self.outputs], "widths of x and of the bias");
        assert_eq!(residual.dims(), [rows, outputs], "shape of the residual");
        self.of_blocks(|block, columns| match columns {
            None => block.linear_add(x.clone(), bias.clone(), residual.clone()),
            Some(columns) => {
                let bias = bias.clone().narrow(0, columns.start, columns.len());
                block.linear_add(x.clone(), bias, residual.clone().narrow(1, columns.start, columns.len()))
            }
        })
    }

    /// What `product` makes with each block, side by side; without columns, with the whole.
    fn of_blocks(&self, product: impl Fn(&Elements, Option<&Range<usize>>) -> Tensor<2>) -> Tensor<2> {
        match &self.blocks[..] {
            [whole] => product(&whole.elements, None),
            blocks => {
                Tensor::cat(blocks.iter().map(|block| product(&block.elements, Some(&block.columns))).collect(), 1)
            }
        }
    }

    /// The columns `ids`, `[N]`, as rows: `[N, inputs]`, in f32; ids may be in any type of integers. Behind the last there may be
    /// some more, of zeros.
    ///
    /// # Panics
    ///
    /// If there is no such column; a GPU gives some other one instead.
    pub fn columns(&self, ids: Tensor<1, Int>) -> Tensor<2> {
        let [count] = ids.dims();
        // Where something can be subtracted from them.
        let ids: Tensor<1, Int> = Tensor::from_dispatch(as_i32::<Dispatch>(ids.into_dispatch()));
        let of_block = |block: &ColumnBlock| {
            let first = block.columns.start as i64;
            let ids = ids.clone().sub_scalar(first).clamp(0, block.columns.len() as i64 - 1);
            block.elements.columns(ids, self.inputs)
        };
        let (first, others) = self.blocks.split_first().expect("a matrix has a block, even without a column");
        if others.is_empty() {
            return first.elements.columns(ids, self.inputs);
        }
        others.iter().fold(of_block(first), |rows, block| {
            let is_here = ids.clone().greater_equal_elem(block.columns.start as i64).reshape([count, 1]);
            rows.mask_where(is_here.expand([count, self.inputs]), of_block(block))
        })
    }
}

/// The columns of each block of a matrix: few enough for each to be read as one buffer.
fn columns_of_blocks([inputs, outputs]: [usize; 2], format: WeightFormat, device: &Device) -> Vec<Range<usize>> {
    let bytes_of_tile = TILE * inputs.next_multiple_of(QUAD).max(1) * format.element_bytes();
    let max = largest_buffer(device).map_or(usize::MAX, |bytes| (bytes / bytes_of_tile).max(1).saturating_mul(TILE));
    let starts = (0..outputs.max(1)).step_by(max);
    starts.map(|start| start..start.saturating_add(max).min(outputs)).collect()
}
