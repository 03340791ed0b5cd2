//! Which files a path means.

use std::fs::File;
use std::path::Path;

use super::names::Layout;
use super::pytorch::PytorchSource;
use super::safetensors::SafetensorsSource;
use super::shards::ShardedSource;
use super::source::TensorSource;
use super::text::read_text;
use super::{Checkpoint, nanogpt};
use crate::{Error, Gpt2Config, Result};

impl Checkpoint {
    /// Opens a folder in Hugging Face's layout, or a nanoGPT file (`*.pt`).
    ///
    /// A nanoGPT output folder, which holds a `ckpt.pt` and no `config.json`, is opened as its file.
    ///
    /// # Errors
    ///
    /// If the files are missing, damaged, or describe another kind of model.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.is_file() {
            return nanogpt::open(path);
        }
        if !path.is_dir() {
            let reason = "there is no such file or folder".to_owned();
            return Err(Error::Checkpoint { path: path.to_owned(), reason });
        }
        let config = path.join("config.json");
        let nano = path.join("ckpt.pt");
        if !config.is_file() && nano.is_file() {
            return nanogpt::open(&nano);
        }
        if !config.is_file() {
            let reason = "the folder has no config.json (nor nanoGPT's ckpt.pt)".to_owned();
            return Err(Error::Checkpoint { path: path.to_owned(), reason });
        }
        Ok(Self {
            config: Gpt2Config::parse(&read_text(&config)?, &config.display().to_string())?,
            source: open_weights(path)?,
            layout: Layout::HuggingFace,
            folder: Some(path.to_owned()),
        })
    }
}

/// The weights of a Hugging Face folder: safetensors before PyTorch, one file before shards, as `transformers` looks.
fn open_weights(folder: &Path) -> Result<Box<dyn TensorSource>> {
    for (file, open) in [
        ("model.safetensors", open_safetensors as fn(&Path) -> _),
        ("model.safetensors.index.json", |index: &Path| sharded(index, open_safetensors)),
        ("pytorch_model.bin", open_pytorch),
        ("pytorch_model.bin.index.json", |index: &Path| sharded(index, open_pytorch)),
    ] {
        let path = folder.join(file);
        if path.is_file() {
            return open(&path);
        }
    }
    let reason = "the folder has neither model.safetensors nor pytorch_model.bin, nor an index of shards".to_owned();
    Err(Error::Checkpoint { path: folder.to_owned(), reason })
}

fn open_safetensors(path: &Path) -> Result<Box<dyn TensorSource>> {
    let file = File::open(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    Ok(Box::new(SafetensorsSource::new(file, path.to_owned())?))
}

fn open_pytorch(path: &Path) -> Result<Box<dyn TensorSource>> {
    Ok(Box::new(PytorchSource::open(path, None)?))
}

fn sharded(index: &Path, open: fn(&Path) -> Result<Box<dyn TensorSource>>) -> Result<Box<dyn TensorSource>> {
    Ok(Box::new(ShardedSource::open(index, open)?))
}
