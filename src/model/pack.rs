//! [`Gpt2::pack`]: weights in the layout that kernels read fastest.

use burn::module::{Module, ModuleMapper, Param};
use burn::nn::Embedding;
use burn::tensor::{DType, Device, Tensor};
use gpt2_burn_backends::{PackedMatrix, WeightFormat, check_format, has_kernels};

use super::linears::LINEARS;
use super::{Gpt2, Linear};
use crate::{Error, Result};

/// A linear layer or a head, packed.
#[derive(Clone, Debug)]
pub struct Packed {
    pub matrix: PackedMatrix,
    /// Zeros if there is none.
    pub bias: Tensor<1>,
}

impl Packed {
    fn new(matrix: PackedMatrix, bias: Option<Tensor<1>>, device: &Device) -> Self {
        let [_, outputs] = matrix.dims();
        let zeros = || Tensor::zeros([outputs], (device, DType::F32));
        let bias = bias.map_or_else(zeros, |bias| bias.cast(DType::F32));
        Self { matrix, bias }
    }
}

/// A matrix of the model, while it is packed.
pub(crate) struct MatrixToPack<'a> {
    /// Its name in a checkpoint.
    pub name: String,
    /// The parameter that holds it; it is left without elements afterwards.
    pub param: &'a Param<Tensor<2>>,
    /// Whether it is the head, of which the parameter is the transposed.
    pub is_head: bool,
}

impl Gpt2 {
    /// The same model with its matrices in the layout that the device's kernels stream best, in `format`.
    ///
    /// It is for inference, and the last thing that is done with a model: it does not train, nor can it be saved, cast or
    /// moved. What is packed is no parameter any more: those of the blocks' linear layers and of the head are left
    /// without elements, so a burn record of a packed model holds none of its weights. Matrices are packed one after
    /// the other and not held twice, if no clone of the model holds them;
    /// [`Checkpoint::load_packed`](crate::Checkpoint::load_packed) packs them as they are read, and holds no more than
    /// chunks of what is not packed yet.
    ///
    /// On a device without kernels, and for training, nothing is packed: the model is only [cast](Self::cast) to `format`.
    ///
    /// # Errors
    ///
    /// [`Error::Packed`] if it is packed already; [`Error::Device`] if the device does not compute in `format`, or has
    /// no kernels for [`WeightFormat::Int8`].
    pub fn pack(self, format: WeightFormat) -> Result<Self> {
        self.check_not_packed("packed again")?;
        check_format(&self.device(), format)?;
        if !has_kernels(&self.device()) {
            return self.cast(format.float());
        }
        let mut model = self.pack_with(|matrix| {
            let value = matrix.param.val();
            let value = if matrix.is_head { value.transpose() } else { value };
            Ok(PackedMatrix::new(value, format))
        })?;
        // Norms and positions are small and enter f32 sums. A token embedding of its own is not small; its rows are cast
        // as they are looked up.
        let wte = Embedding { weight: cast(model.wte.weight.clone(), embedding_dtype(format)) };
        model = model.map(&mut ToF32);
        Ok(if model.lm_head.is_some() { Self { wte, ..model } } else { model })
    }

    /// Replaces each matrix of a linear layer or head by what `pack_matrix` makes of it, the largest first, while there is room.
    pub(crate) fn pack_with(
        mut self,
        mut pack_matrix: impl FnMut(MatrixToPack<'_>) -> Result<PackedMatrix>,
    ) -> Result<Self> {
        let (name, param) = match &mut self.lm_head {
            Some(head) => ("lm_head.weight", &mut head.weight),
            None => ("wte.weight", &mut self.wte.weight),
        };
        let matrix = pack_matrix(MatrixToPack { name: name.to_owned(), param, is_head: true })?;
        empty(param);
        self.packed_head = Some(Packed::new(matrix, None, &param.device()));
        for (layer, block) in self.h.iter_mut().enumerate() {
            for (name, linear) in LINEARS.into_iter().zip(block.linears_mut()) {
                linear.pack(format!("h.{layer}.{name}.weight"), &mut pack_matrix)?;
            }
        }
        Ok(self)
    }

    /// Whether the weights are in the layout of the device's kernels.
    pub fn is_packed(&self) -> bool {
        self.packed_head.is_some()
    }

    /// The packed matrices, which are no parameters any more.
    pub(crate) fn packed_matrices(&self) -> impl Iterator<Item = &PackedMatrix> {
        let linears = self.h.iter().flat_map(|block| block.linears().map(|linear| &linear.packed));
        linears.chain([&self.packed_head]).flatten().map(|packed| &packed.matrix)
    }

    /// Fails if the model was packed and then moved to where its packed matrices are not, or put in the deterministic mode and
    /// then to where dropout is at work.
    pub(super) fn check_in_place(&self) -> Result<()> {
        if self.is_deterministic() {
            self.check_inference("the deterministic mode")?;
        }
        // A device that records gradients equals the one that it is.
        let is_here = |head: &Packed| has_kernels(&self.device()) && head.matrix.device() == self.device();
        let in_place = self.packed_head.as_ref().is_none_or(is_here);
        if in_place { Ok(()) } else { Err(Error::Packed { what: "trained, or moved to another device" }) }
    }

    pub(crate) fn check_not_packed(&self, what: &'static str) -> Result<()> {
        if self.is_packed() { Err(Error::Packed { what }) } else { Ok(()) }
    }
}

impl Linear {
    fn pack(
        &mut self,
        name: String,
        pack_matrix: &mut impl FnMut(MatrixToPack<'_>) -> Result<PackedMatrix>,
    ) -> Result<()> {
        let matrix = pack_matrix(MatrixToPack { name, param: &self.weight, is_head: false })?;
        empty(&mut self.weight);
        self.packed = Some(Packed::new(matrix, self.bias.as_ref().map(Param::val), &self.weight.device()));
        Ok(())
    }
}

/// The type that a packed model holds a token embedding in that is not its head too: of its rows a few are looked up, so
/// their bytes are no matter of speed.
pub(crate) fn embedding_dtype(format: WeightFormat) -> DType {
    match format {
        WeightFormat::Int8 => DType::F16,
        _ => format.float(),
    }
}

/// Leaves a parameter without elements.
fn empty(param: &mut Param<Tensor<2>>) {
    *param = Param::initialized(param.id, Tensor::zeros([0, 0], (&param.lazy_device(), DType::F32)));
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
