//! A module into a Hugging Face folder.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::error;
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor};
use safetensors::{Dtype, View, serialize_to_file};
use serde_json::json;

use super::names::{HEAD, of_path};
use crate::{Error, Gpt2, Result};

const WHOLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Where a checkpoint is put together, in the folder that it is for.
const STAGING: &str = ".saving";

/// How a model is written.
#[derive(Clone, Copy, Debug)]
pub struct SaveOptions {
    /// Element type of the file: f32, f16 or bf16.
    pub dtype: DType,
    /// Bytes of tensors after which another file is begun; none: one file.
    pub max_shard_bytes: Option<usize>,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self { dtype: DType::F32, max_shard_bytes: None }
    }
}

impl Gpt2 {
    /// Writes `config.json` and `model.safetensors` (or shards with an index) to `folder`, which is made if need be,
    /// so that `transformers` and this library load the same model.
    ///
    /// A checkpoint that is there already is replaced; if writing fails, it is left as it was.
    ///
    /// A model without biases is written with biases of zero, because the layout has no word for it.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] for an element type that is none of the three, [`Error::Io`] or [`Error::Checkpoint`] if writing
    /// fails.
    pub fn save(&self, folder: impl AsRef<Path>, options: SaveOptions) -> Result<()> {
        self.check_not_packed("saved")?;
        let folder = folder.as_ref();
        let (dtype, torch_name) = match options.dtype {
            DType::F32 => (Dtype::F32, "float32"),
            DType::F16 => (Dtype::F16, "float16"),
            DType::BF16 => (Dtype::BF16, "bfloat16"),
            other => {
                return Err(Error::mismatch("element type of the file", "F32, F16 or BF16", format!("{other:?}")));
            }
        };
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Io { path, source }
        };
        std::fs::create_dir_all(folder).map_err(io(folder))?;

        let mut config = self.config().clone();
        config.bias = true;
        config.extra.remove("torch_dtype");
        config.extra.insert("dtype".into(), torch_name.into());
        // All is written beside what is there, which is replaced only when nothing can fail any more but a rename.
        let staging = folder.join(STAGING);
        std::fs::create_dir_all(&staging).map_err(io(&staging))?;
        let path = staging.join("config.json");
        std::fs::write(&path, config.to_json()).map_err(io(&path))?;

        let entries = self.entries(dtype, options.dtype);
        let shards = split(entries, options.max_shard_bytes.unwrap_or(usize::MAX));
        let count = shards.len();
        let (mut weight_map, mut total_size) = (BTreeMap::new(), 0);
        for (index, shard) in shards.into_iter().enumerate() {
            let file = match count {
                1 => WHOLE.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            };
            for (name, entry) in &shard {
                weight_map.insert(name.clone(), file.clone());
                total_size += entry.data_len();
            }
            let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
            write_file(shard, metadata, &staging.join(&file))?;
        }
        if count > 1 {
            let index = json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
            let path = staging.join(INDEX);
            let text = serde_json::to_string_pretty(&index).expect("an index holds only JSON values");
            std::fs::write(&path, text).map_err(io(&path))?;
        }
        // The config goes first and comes last: without it the folder is no checkpoint, half old and half new.
        for stale in ["config.json", WHOLE, INDEX] {
            let path = folder.join(stale);
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != ErrorKind::NotFound => return Err(io(&path)(source)),
                _ => {}
            }
        }
        let files: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
        let index = (count > 1).then_some(INDEX);
        for file in files.into_iter().chain(index).chain(["config.json"]) {
            let path = folder.join(file);
            std::fs::rename(staging.join(file), &path).map_err(io(&path))?;
        }
        std::fs::remove_dir_all(&staging).map_err(io(&staging))
    }

    /// Every tensor of the file, in the module's order; read from the device only when it is written.
    fn entries(&self, dtype: Dtype, element: DType) -> Vec<(String, Entry)> {
        let mut collector = Collector { path: Vec::new(), dtype, element, entries: Vec::new() };
        self.visit(&mut collector);
        let mut entries = collector.entries;
        if !self.config().bias {
            let zeros: Vec<_> = entries.iter().filter_map(|(name, entry)| entry.bias_of(name)).collect();
            entries.extend(zeros);
        }
        entries
    }
}

/// Writes a safetensors file, which appears under its name when it is complete. It has the mode of the file that it replaces, and
/// if there is none, that of any new file of this process.
pub(crate) fn write_file<V: View>(
    tensors: Vec<(String, V)>,
    metadata: HashMap<String, String>,
    path: &Path,
) -> Result<()> {
    static FILES: AtomicUsize = AtomicUsize::new(0);
    let name = format!(".saving-{}-{}", std::process::id(), FILES.fetch_add(1, Ordering::Relaxed));
    let staged = path.with_file_name(name);
    let write = || -> Result<(), Box<dyn error::Error>> {
        let ordinary = File::create_new(&staged)?.metadata()?.permissions();
        let permissions = std::fs::metadata(path).map_or(ordinary, |old| old.permissions());
        // This puts another file there, one that only its owner may read.
        serialize_to_file(tensors, Some(metadata), &staged)?;
        std::fs::set_permissions(&staged, permissions)?;
        Ok(std::fs::rename(&staged, path)?)
    };
    write().map_err(|error| {
        // Whether it is there or not: what is told is why nothing was written.
        let _ = std::fs::remove_file(&staged);
        Error::Checkpoint { path: path.to_owned(), reason: error.to_string() }
    })
}

/// Cuts the list where a shard would exceed `limit` bytes; a tensor is never cut.
fn split(entries: Vec<(String, Entry)>, limit: usize) -> Vec<Vec<(String, Entry)>> {
    let mut shards: Vec<Vec<_>> = vec![Vec::new()];
    let mut bytes = 0;
    for (name, entry) in entries {
        if bytes > 0 && bytes + entry.data_len() > limit {
            shards.push(Vec::new());
            bytes = 0;
        }
        bytes += entry.data_len();
        shards.last_mut().expect("there is a shard").push((name, entry));
    }
    shards
}

/// One tensor of the file.
struct Entry {
    values: Values,
    shape: Vec<usize>,
    dtype: Dtype,
    element: DType,
}

enum Values {
    Matrix(Tensor<2>),
    Vector(Tensor<1>),
    Zeros,
}

impl Entry {
    /// The bias of zeros that belongs to this weight; embeddings and the head have none.
    fn bias_of(&self, name: &str) -> Option<(String, Self)> {
        let layer = name.strip_suffix(".weight")?;
        if layer == "lm_head" || layer.ends_with("wte") || layer.ends_with("wpe") {
            return None;
        }
        let width = *self.shape.last()?;
        let entry = Self { values: Values::Zeros, shape: vec![width], dtype: self.dtype, element: self.element };
        Some((format!("{layer}.bias"), entry))
    }
}

impl View for Entry {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let data = match &self.values {
            Values::Matrix(tensor) => tensor.to_data_dtype(self.element),
            Values::Vector(tensor) => tensor.to_data_dtype(self.element),
            Values::Zeros => return vec![0; self.data_len()].into(),
        };
        data.bytes().to_vec().into()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.element.size()
    }
}

struct Collector {
    path: Vec<String>,
    dtype: Dtype,
    element: DType,
    entries: Vec<(String, Entry)>,
}

impl ModuleVisitor for Collector {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let name = of_path(&self.path);
        let name = if name == HEAD { name } else { format!("transformer.{name}") };
        let tensor = param.val();
        let shape = tensor.shape().to_vec();
        let values = match *shape.as_slice() {
            [length] => Values::Vector(tensor.reshape([length])),
            [rows, columns] => Values::Matrix(tensor.reshape([rows, columns])),
            _ => unreachable!("GPT-2 has matrices and vectors only"),
        };
        self.entries.push((name, Entry { values, shape, dtype: self.dtype, element: self.element }));
    }

    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }
}
