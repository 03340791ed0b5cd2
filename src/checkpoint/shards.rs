//! Weights that are spread over several files, with an index that says where each tensor is.

use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path};

use burn::tensor::{DType, TensorData};
use serde::Deserialize;

use super::source::{TensorInfo, TensorSource};
use crate::{Error, Result};

/// The part of `*.index.json` that is needed.
#[derive(Deserialize)]
struct Index {
    /// Tensor name to file name.
    weight_map: BTreeMap<String, String>,
}

/// Several files as one source.
pub struct ShardedSource {
    shards: Vec<Box<dyn TensorSource>>,
    /// Which shard holds a tensor.
    holder: HashMap<String, usize>,
}

impl ShardedSource {
    /// Opens the shards that `index` names with `open`. They lie beside it: a name that leads elsewhere is refused.
    pub fn open(index: &Path, open: impl Fn(&Path) -> Result<Box<dyn TensorSource>>) -> Result<Self> {
        let damaged = |reason: String| Error::Checkpoint { path: index.to_owned(), reason };
        let text = super::files::read_text(index)?;
        let Index { weight_map } =
            serde_json::from_str(&text).map_err(|error| damaged(format!("not an index of shards: {error}")))?;
        if weight_map.is_empty() {
            return Err(damaged("the index names no tensor".into()));
        }

        let folder = index.parent().unwrap_or(Path::new(""));
        let mut shards: Vec<Box<dyn TensorSource>> = Vec::new();
        let mut position = HashMap::new();
        for file in weight_map.values() {
            if position.contains_key(file) {
                continue;
            }
            if !is_plain_file_name(file) {
                return Err(damaged(format!("the shard name `{file}` leads out of the folder")));
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
        for (name, file) in &weight_map {
            if holder.get(name) != position.get(file) {
                problems.push(format!("`{name}` is not in the shard `{file}`, as the index says"));
            }
        }
        if !problems.is_empty() {
            return Err(Error::Tensors(problems));
        }
        Ok(Self { shards, holder })
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
        match self.holder.get(name) {
            Some(&shard) => self.shards[shard].read(name, dtype),
            None => Err(Error::Tensors(vec![format!("`{name}` is missing")])),
        }
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
