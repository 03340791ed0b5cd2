//! Weights that are spread over several files, with an index that says where each tensor is.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Component, Path};

use burn::tensor::{DType, TensorData};
use serde::Deserialize;

use super::source::{TensorInfo, TensorSource};
use crate::{Error, Result};

/// Which file holds which tensor: the part of `*.index.json` that is needed.
#[derive(Deserialize)]
pub struct Index {
    /// Tensor name to file name; the files lie beside the index.
    weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Reads an index. A file name that leads out of the folder is refused, before anything is done with it.
    pub fn read(path: &Path) -> Result<Self> {
        let damaged = |reason: String| Error::Checkpoint { path: path.to_owned(), reason };
        let text = super::text::read_text(path)?;
        let index: Self =
            serde_json::from_str(&text).map_err(|error| damaged(format!("not an index of shards: {error}")))?;
        if index.weight_map.is_empty() {
            return Err(damaged("the index names no tensor".into()));
        }
        if let Some(file) = index.files().find(|file| !is_plain_file_name(file)) {
            return Err(damaged(format!("the shard name `{file}` leads out of the folder")));
        }
        Ok(index)
    }

    /// The names of the files, each as often as it is named.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.weight_map.values().map(String::as_str)
    }
}

/// Several files as one source.
pub struct ShardedSource {
    shards: Vec<Box<dyn TensorSource>>,
    /// Which shard holds a tensor.
    holder: HashMap<String, usize>,
}

impl ShardedSource {
    /// Opens the shards that `index` names with `open`.
    pub fn open(index: &Path, open: impl Fn(&Path) -> Result<Box<dyn TensorSource>>) -> Result<Self> {
        let folder = index.parent().unwrap_or(Path::new(""));
        let damaged = |reason: String| Error::Checkpoint { path: index.to_owned(), reason };
        let index = Index::read(index)?;
        let mut shards: Vec<Box<dyn TensorSource>> = Vec::new();
        let mut position = HashMap::new();
        for file in index.files() {
            if position.contains_key(file) {
                continue;
            }
            let path = folder.join(file);
            if !path.is_file() {
                return Err(damaged(format!("the shard `{file}` is missing")));
            }
            position.insert(file, shards.len());
            shards.push(open(&path)?);
        }

        let mut holder: HashMap<String, usize> = HashMap::new();
        let mut problems = Vec::new();
        for (shard, source) in shards.iter().enumerate() {
            for (name, _) in source.tensors() {
                if holder.insert(name.clone(), shard).is_some() {
                    problems.push(format!("`{name}` is in more than one shard"));
                }
            }
        }
        for (name, file) in &index.weight_map {
            if holder.get(name) != position.get(file.as_str()) {
                problems.push(format!("`{name}` is not in the shard `{file}`, as the index says"));
            }
        }
        if !problems.is_empty() {
            return Err(Error::Tensors(problems));
        }
        Ok(Self { shards, holder })
    }

    fn shard(&self, name: &str) -> Result<&dyn TensorSource> {
        let shard = self.holder.get(name).map(|&shard| &*self.shards[shard]);
        shard.ok_or_else(|| Error::Tensors(vec![format!("`{name}` is missing")]))
    }
}

/// Whether a name stays in its folder: one normal component, no root, no drive, no `..`.
fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let plain = matches!(components.next(), Some(Component::Normal(_))) && components.next().is_none();
    plain && !name.contains(['/', '\\', ':', '\0'])
}

impl TensorSource for ShardedSource {
    fn tensors(&self) -> Vec<(String, TensorInfo)> {
        self.shards.iter().flat_map(|shard| shard.tensors()).collect()
    }

    fn read(&self, name: &str, dtype: DType) -> Result<TensorData> {
        self.shard(name)?.read(name, dtype)
    }

    fn read_rows(&self, name: &str, dtype: DType, rows: Range<usize>) -> Result<Option<TensorData>> {
        self.shard(name)?.read_rows(name, dtype, rows)
    }

    fn total_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.total_bytes()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::is_plain_file_name;

    #[test]
    fn shard_names_stay_in_the_folder() {
        assert!(is_plain_file_name("model-00001-of-00002.safetensors"));
        for name in ["", ".", "..", "../a", "/etc/passwd", "a/b", "a\\b", "c:a", "./a"] {
            assert!(!is_plain_file_name(name), "{name}");
        }
    }
}
