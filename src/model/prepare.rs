//! [`Gpt2::prepare`]: weights in the layout that kernels read fastest.

use burn::module::{Module, ModuleMapper, Param};
use burn::nn::Embedding;
use burn::tensor::{DType, Tensor};
use gpt2_burn_backends::{PackedMatrix, has_kernels};

use super::{Gpt2, Linear};
use crate::{Error, Result};

/// Element types that a prepared model holds its matrices in. What kernels compute from them is f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum WeightFormat {
    /// As exact as the file; four bytes a weight are read for each token.
    #[default]
    F32,
    /// Half of that, with 11 significant bits.
    F16,
    /// Half of that, with 8 significant bits.
    Bf16,
}

impl From<WeightFormat> for DType {
    fn from(format: WeightFormat) -> Self {
        match format {
            WeightFormat::F32 => Self::F32,
            WeightFormat::F16 => Self::F16,
            WeightFormat::Bf16 => Self::BF16,
        }
    }
}

/// A linear layer or a head, packed.
#[derive(Clone, Debug)]
pub struct Packed {
    pub matrix: PackedMatrix,
    /// Zeros if there is none.
    pub bias: Tensor<1>,
}

impl Packed {
    /// `[inputs, outputs]` and a bias.
    pub fn new(matrix: Tensor<2>, bias: Option<Tensor<1>>, format: WeightFormat) -> Self {
        let [_, outputs] = matrix.dims();
        let device = matrix.device();
        let bias = bias.map_or_else(|| Tensor::zeros([outputs], (&device, DType::F32)), |bias| bias.cast(DType::F32));
        Self { matrix: PackedMatrix::new(matrix, format.into()), bias }
    }
}

impl Gpt2 {
    /// The same model with its matrices in the layout that the device's kernels stream best, in `format`.
    ///
    /// It is for inference, and the last thing that is done with a model: it does not train, nor can it be saved, cast or
    /// moved. What is packed is no parameter any more: those of the blocks' linear layers and of the head are left
    /// without elements, so a burn record of a prepared model holds none of its weights. Matrices are packed one after
    /// the other and not held twice, if no clone of the model holds them.
    ///
    /// On a device without kernels, and for training, nothing is packed: the model is only [cast](Self::cast) to `format`.
    ///
    /// # Errors
    ///
    /// [`Error::Prepared`] if it is prepared already; [`Error::Device`] if the device does not compute in `format`.
    pub fn prepare(mut self, format: WeightFormat) -> Result<Self> {
        self.check_unprepared("prepared again")?;
        if !has_kernels(&self.device()) {
            return self.cast(format.into());
        }
        gpt2_burn_backends::check_dtype(&self.device(), format.into())?;
        let head = match self.lm_head.take() {
            Some(mut head) => {
                let packed = Packed::new(emptied(&mut head.weight).transpose(), None, format);
                self.wte = Embedding { weight: cast(self.wte.weight, format.into()) };
                self.lm_head = Some(head);
                packed
            }
            None => Packed::new(emptied(&mut self.wte.weight).transpose(), None, format),
        };
        self.packed_head = Some(head);
        for block in &mut self.h {
            for linear in [&mut block.attn.c_attn, &mut block.attn.c_proj, &mut block.mlp.c_fc, &mut block.mlp.c_proj] {
                linear.prepare(format);
            }
        }
        // Norms and positions are small and enter f32 sums. A token embedding of its own is not small; its rows are cast
        // as they are looked up.
        let wte = self.wte.clone();
        Ok(Self { wte, ..self.map(&mut ToF32) })
    }

    /// Whether the weights are in the layout of the device's kernels.
    pub fn is_prepared(&self) -> bool {
        self.packed_head.is_some()
    }

    /// Fails if the model was prepared and then moved to where its packed matrices are not.
    pub(super) fn check_in_place(&self) -> Result<()> {
        let in_place = !self.is_prepared() || has_kernels(&self.device());
        if in_place { Ok(()) } else { Err(Error::Prepared { what: "trained, or moved to another device" }) }
    }

    pub(crate) fn check_unprepared(&self, what: &'static str) -> Result<()> {
        if self.is_prepared() { Err(Error::Prepared { what }) } else { Ok(()) }
    }
}

impl Linear {
    fn prepare(&mut self, format: WeightFormat) {
        let bias = self.bias.as_ref().map(Param::val);
        self.packed = Some(Packed::new(emptied(&mut self.weight), bias, format));
    }
}

/// The value of a parameter, which is left without elements.
fn emptied(param: &mut Param<Tensor<2>>) -> Tensor<2> {
    let value = param.val();
    *param = Param::initialized(param.id, Tensor::zeros([0, 0], (&value.device(), DType::F32)));
    value
}

fn cast<const D: usize>(param: Param<Tensor<D>>, dtype: DType) -> Param<Tensor<D>> {
    param.map(|tensor| if tensor.dtype() == dtype { tensor } else { tensor.cast(dtype) })
}

struct ToF32;

impl ModuleMapper for ToF32 {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        cast(param, DType::F32)
    }
}
