//! Another element type for a model's weights.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Tensor};

use super::Gpt2;
use crate::Result;

struct Cast(DType);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.cast(self.0))
    }
}

impl Gpt2 {
    /// The same model with its weights, and so everything computed from them, in another element type.
    ///
    /// # Errors
    ///
    /// [`Error::Packed`](crate::Error::Packed) for a packed model;
    /// [`Error::Device`](crate::Error::Device) if the device does not compute in `dtype`;
    /// [`Error::Mismatch`](crate::Error::Mismatch) for another type than f32 in the
    /// [deterministic mode](Self::with_determinism).
    pub fn cast(self, dtype: DType) -> Result<Self> {
        self.check_not_packed("cast")?;
        gpt2_burn_backends::check_dtype(&self.device(), dtype)?;
        let deterministic = self.deterministic;
        self.map(&mut Cast(dtype)).with_determinism(deterministic)
    }
}
