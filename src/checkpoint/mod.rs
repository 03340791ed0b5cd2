//! Checkpoints: Hugging Face folders and nanoGPT files in, Hugging Face folders out.
//!
//! | layout | files |
//! |---|---|
//! | Hugging Face | `config.json` with `model.safetensors`, or shards with `model.safetensors.index.json` |
//! | Hugging Face, older | `config.json` with `pytorch_model.bin`, or shards with `pytorch_model.bin.index.json` |
//! | nanoGPT | one `ckpt.pt`, which holds its own shape |
//! | memory | the bytes of a `config.json` and a `model.safetensors` |
//!
//! Opening a checkpoint reads names and shapes; weights are read by [`Checkpoint::load`], a tensor at a time.

mod element;
#[cfg(feature = "files")]
mod files;
#[cfg(feature = "files")]
mod hub;
mod load;
mod names;
#[cfg(feature = "files")]
mod nanogpt;
#[cfg(feature = "files")]
mod pytorch;
mod random;
mod safetensors;
#[cfg(feature = "files")]
mod save;
#[cfg(feature = "files")]
mod shards;
mod source;
#[cfg(feature = "files")]
mod text;

use std::io::Cursor;
use std::path::PathBuf;

use burn::tensor::{DType, Device};

use crate::tokenizer::Tokenizer;
use crate::{Gpt2, Gpt2Config, Result, WeightFormat};
#[cfg(feature = "files")]
pub use hub::DownloadProgress;
#[cfg(feature = "files")]
pub(crate) use safetensors::SafetensorsSource;
#[cfg(feature = "files")]
pub use save::SaveOptions;
#[cfg(feature = "files")]
pub(crate) use save::write_file;
pub(crate) use source::TensorSource;

/// An opened checkpoint: the shape of its model, and where its weights are.
///
/// ```no_run
/// use gpt2_burn::{Checkpoint, burn::tensor::DType};
///
/// let device = gpt2_burn::device("flex")?;
/// let checkpoint = Checkpoint::open("path/to/gpt2")?;
/// let tokenizer = checkpoint.tokenizer()?;
/// let model = checkpoint.load(&device, DType::F32)?;
/// # Ok::<(), gpt2_burn::Error>(())
/// ```
pub struct Checkpoint {
    /// The model's shape. A field that no file records can be set before loading: nanoGPT files do not say which
    /// GELU they were trained with, and [`Activation::GeluErf`](crate::Activation::GeluErf), nanoGPT's own since 2023,
    /// is assumed.
    pub config: Gpt2Config,
    source: Box<dyn TensorSource>,
    layout: names::Layout,
    /// The folder that may hold a tokenizer.
    folder: Option<PathBuf>,
}

impl Checkpoint {
    /// A checkpoint in memory, in Hugging Face's layout: the text of its `config.json` and the bytes of its
    /// `model.safetensors`.
    ///
    /// # Errors
    ///
    /// If either is not what it should be.
    pub fn from_bytes(config: &str, safetensors: impl AsRef<[u8]> + Send + Sync + 'static) -> Result<Self> {
        let source = safetensors::SafetensorsSource::new(Cursor::new(safetensors), "the bytes given".into())?;
        Ok(Self {
            config: Gpt2Config::from_json(config)?,
            source: Box::new(source),
            layout: names::Layout::HuggingFace,
            folder: None,
        })
    }

    /// Random weights for a shape, drawn as GPT-2 initialises them: those of a seed are the same wherever they are loaded, which
    /// [`Gpt2Config::init`] does not promise, since there each device draws its own.
    ///
    /// ```
    /// use gpt2_burn::{Checkpoint, Gpt2Config, burn::tensor::DType};
    ///
    /// let config = Gpt2Config { vocab_size: 50, n_positions: 16, n_embd: 8, n_layer: 2, n_head: 2, ..Default::default() };
    /// let model = Checkpoint::random(&config, 1337)?.load(&gpt2_burn::device("flex")?, DType::F32)?;
    /// # Ok::<(), gpt2_burn::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Gpt2Config::validate`].
    pub fn random(config: &Gpt2Config, seed: u64) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            config: config.clone(),
            source: Box::new(random::RandomSource::new(config, seed)),
            layout: names::Layout::HuggingFace,
            folder: None,
        })
    }

    /// Builds the model on `device` and reads its weights, converted to `dtype`, a tensor at a time.
    ///
    /// # Errors
    ///
    /// [`Error::Tensors`](crate::Error::Tensors) lists every tensor that is missing, unexpected or of another shape;
    /// nothing has been read then. [`Error::Device`](crate::Error::Device) if the device does not compute in `dtype`.
    pub fn load(&self, device: &Device, dtype: DType) -> Result<Gpt2> {
        load::load(&self.config, &*self.source, self.layout, device, dtype)
    }

    /// As [`load`](Self::load) and then [`Gpt2::pack`], but each matrix is packed as it is read, so that the weights
    /// are never held in two forms: what it takes is little more than the model in `format`. (Of a PyTorch file, the head is
    /// held as a whole while it is packed.)
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load); [`Error::Device`](crate::Error::Device), too, if the device has no kernels for
    /// [`WeightFormat::Int8`].
    pub fn load_packed(&self, device: &Device, format: WeightFormat) -> Result<Gpt2> {
        load::load_packed(&self.config, &*self.source, self.layout, device, format)
    }

    /// The tokenizer that lies beside the weights; none if the folder has none.
    ///
    /// # Errors
    ///
    /// If there is one and it is unusable.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>> {
        match &self.folder {
            #[cfg(feature = "files")]
            Some(folder) => Tokenizer::find(folder),
            _ => Ok(None),
        }
    }
}
