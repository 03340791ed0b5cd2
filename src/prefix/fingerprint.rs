//! [`Fingerprint`]: which model computed something, and how.

use std::fmt;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor, TensorData};
use xxhash_rust::xxh3::Xxh3;

use crate::{Error, Gpt2, Result};

/// What tells keys and values of one model from those of all others: a hash (XXH3, 128 bits) of its weights and shape, the
/// element type that they are held in, the device, and the way of computing, which decides on last digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(u128);

impl Fingerprint {
    /// The fingerprint of a model whose keys and values are held in `cache_dtype`. Every weight is read once.
    ///
    /// # Errors
    ///
    /// [`Error::Execution`] if the device does not hand the weights over.
    pub fn new(model: &Gpt2, cache_dtype: DType) -> Result<Self> {
        let config = model.config();
        let mut hasher = Hasher { hash: Xxh3::new(), failure: None };
        let how = (model.is_prepared(), model.is_deterministic(), model.dtype(), cache_dtype, model.device());
        let what = (config.n_head, config.n_positions, config.activation_function, config.layer_norm_epsilon);
        hasher.hash.update(format!("{how:?} {what:?}").as_bytes());
        model.visit(&mut hasher);
        for matrix in model.packed_matrices() {
            let data = matrix.try_data().map_err(|error| Error::Execution(error.to_string()))?;
            data.iter().for_each(|data| hasher.add_data(data));
        }
        match hasher.failure {
            Some(failure) => Err(Error::Execution(failure)),
            None => Ok(Self(hasher.hash.digest128())),
        }
    }

    /// From the text that [`Display`](fmt::Display) gives.
    #[cfg(feature = "files")]
    pub(super) fn from_text(text: &str) -> Option<Self> {
        (text.len() == 32).then(|| u128::from_str_radix(text, 16).ok())?.map(Self)
    }
}

/// 32 hexadecimal digits.
impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
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
