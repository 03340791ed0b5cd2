//! [`Fingerprint`]: which model computed something, and how.

use std::fmt;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor, TensorData};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::backends::{is_asynchronous, is_fast_f32_allowed};
use crate::{Error, Gpt2, Result};

/// What tells keys and values of one model from those of all others: a hash (XXH3, 128 bits) of its weights and shape, the
/// element type that they are held in, the device, and the way of computing, which decides on last digits.
///
/// To the latter belongs whether this process [allows](crate::backends::allow_fast_f32) fast f32, for a model to which that
/// makes a difference: one that is [packed](Gpt2::pack), on a GPU.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint {
    /// Of all but fast f32, which can be allowed and forbidden while the model is in use.
    model: u128,
    /// Whether fast f32 is allowed; none: it makes no difference to this model.
    fast_f32: Option<bool>,
}

impl Fingerprint {
    /// The fingerprint of a model whose keys and values are held in `cache_dtype`. Every weight is read once.
    ///
    /// # Errors
    ///
    /// [`Error::Execution`] if the device does not hand the weights over.
    pub fn new(model: &Gpt2, cache_dtype: DType) -> Result<Self> {
        let config = model.config();
        let mut hasher = Hasher { hash: Xxh3::new(), failure: None };
        let how = (model.is_packed(), model.is_deterministic(), model.dtype(), cache_dtype, model.device());
        let what = (config.n_head, config.n_positions, config.activation_function, config.layer_norm_epsilon);
        hasher.hash.update(format!("{how:?} {what:?}").as_bytes());
        model.visit(&mut hasher);
        for matrix in model.packed_matrices() {
            let data = matrix.try_data().map_err(|error| Error::Execution(error.to_string()))?;
            data.iter().for_each(|data| hasher.add_data(data));
        }
        match hasher.failure {
            Some(failure) => Err(Error::Execution(failure)),
            None => {
                Ok(Self { model: hasher.hash.digest128(), fast_f32: depends_on_fast_f32(model).then_some(false) }.now())
            }
        }
    }

    /// Of the same model as this process computes now.
    pub(crate) fn now(self) -> Self {
        self.with_fast_f32(is_fast_f32_allowed())
    }

    fn with_fast_f32(self, is_allowed: bool) -> Self {
        Self { fast_f32: self.fast_f32.map(|_| is_allowed), ..self }
    }
}

/// Whether fast f32 can change what a model computes: only kernels for packed matrices ask for it. (burn's own operations
/// may use matrix units too; that does not depend on what is allowed.)
fn depends_on_fast_f32(model: &Gpt2) -> bool {
    model.is_packed() && is_asynchronous(&model.device())
}

/// 32 hexadecimal digits.
impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digest = match self.fast_f32 {
            Some(true) => xxh3_128(&[&self.model.to_le_bytes()[..], b"fast f32"].concat()),
            Some(false) | None => self.model,
        };
        write!(f, "{digest:032x}")
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

struct Hasher {
    hash: Xxh3,
    failure: Option<String>,
}

impl Hasher {
    fn add<const D: usize>(&mut self, tensor: Tensor<D>) {
        match tensor.try_into_data() {
            Ok(data) => self.add_data(&data),
            Err(error) => self.failure = Some(error.to_string()),
        }
    }

    fn add_data(&mut self, data: &TensorData) {
        self.hash.update(format!("{:?} {:?}", data.shape(), data.dtype()).as_bytes());
        self.hash.update(data.bytes());
    }
}

impl ModuleVisitor for Hasher {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.add(param.val());
    }
}

#[cfg(test)]
impl Fingerprint {
    /// Of a model to which fast f32 makes a difference, computing in a way that is not the one of now.
    pub(super) fn of_another_way() -> Self {
        let model = Self { model: 7, fast_f32: Some(false) };
        model.with_fast_f32(!is_fast_f32_allowed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Gpt2Config, WeightFormat};

    #[test]
    fn the_fingerprint_of_a_gpus_model_says_whether_fast_f32_is_allowed() {
        let exact = Fingerprint { model: 7, fast_f32: Some(false) };
        let fast = exact.with_fast_f32(true);
        assert_ne!(exact, fast);
        assert_ne!(exact.to_string(), fast.to_string(), "nor does a file take the one for the other");
        assert_eq!(fast.to_string().len(), 32);
        assert_eq!(fast.with_fast_f32(false), exact, "allowed and forbidden again");
        assert_ne!(fast.to_string(), Fingerprint { model: 8, ..fast }.to_string());
        assert_eq!(Fingerprint::of_another_way().now().now(), Fingerprint::of_another_way().now());
        assert_ne!(Fingerprint::of_another_way().now(), Fingerprint::of_another_way());
    }

    #[test]
    fn fast_f32_makes_no_difference_to_the_fingerprint_of_a_cpus_model() {
        let config =
            Gpt2Config { vocab_size: 7, n_positions: 4, n_embd: 8, n_layer: 1, n_head: 2, ..Gpt2Config::default() };
        let plain = config.init(&crate::device("flex").unwrap()).unwrap();
        let packed = plain.clone().pack(WeightFormat::F32).unwrap();
        for model in [plain, packed] {
            let fingerprint = Fingerprint::new(&model, DType::F32).unwrap();
            assert_eq!(fingerprint.with_fast_f32(true), fingerprint);
            assert_eq!(fingerprint.with_fast_f32(true).to_string(), fingerprint.to_string());
        }
    }
}
