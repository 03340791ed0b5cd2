//! A cache of prefixes into a file.

use std::borrow::Cow;
use std::path::Path;

use burn::tensor::{DType, Tensor};
use safetensors::{Dtype, View};
use xxhash_rust::xxh3::Xxh3;

use super::{FORMAT, KEYS_AND_VALUES, Node, name};
use crate::cache::States;
use crate::checkpoint::write_file;
use crate::prefix::{Entry, Fingerprint, PrefixCache};
use crate::{Error, KvSegment, Result};

impl PrefixCache {
    /// Writes all that is held to a safetensors file, which a generator with the same model
    /// [restores](crate::generate::Generator::restore_prefixes). A file that is there is replaced when the new one is
    /// complete, and not before; its mode stays as it was.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] if writing fails, [`Error::Execution`] if the device does not hand the data over.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let (nodes, segments): (Vec<Node>, Vec<KvSegment>) = self.with_tree(|tree| {
            let node = |entry: Entry<'_, Fingerprint, KvSegment>| {
                let (model, ids) = (entry.space.to_string(), entry.ids.to_vec());
                (Node { model, parent: entry.parent, ids, ends: entry.ends }, entry.payload.clone())
            };
            tree.entries().into_iter().map(node).unzip()
        });
        let nodes = serde_json::to_string(&nodes).expect("nodes are made of numbers and text");
        let tensors = segments.iter().enumerate().flat_map(|(index, segment)| {
            let saved = |part| SavedSegment::new(segment, part);
            KEYS_AND_VALUES.into_iter().enumerate().map(move |(part, text)| (name(index, text), saved(part)))
        });
        let tensors: Vec<(String, SavedSegment)> = tensors.collect();

        let mut checksum = Xxh3::new();
        checksum.update(nodes.as_bytes());
        for (_, part) in &tensors {
            let data = part.states().try_to_data().map_err(|error| Error::Execution(error.to_string()))?;
            checksum.update(data.bytes());
        }
        let checksum = format!("{:032x}", checksum.digest128());
        let metadata = [("format", FORMAT.to_owned()), ("nodes", nodes), ("checksum", checksum)];
        write_file(tensors, metadata.map(|(key, text)| (key.to_owned(), text)).into(), path.as_ref())
    }
}

/// The keys, or the values, of a segment. Out of pages, they are copied when they are wanted.
struct SavedSegment {
    segment: KvSegment,
    /// 0 for the keys.
    part: usize,
    /// `[layers, H, n, D]`.
    shape: [usize; 4],
}

impl SavedSegment {
    fn new(segment: &KvSegment, part: usize) -> Self {
        Self { segment: segment.clone(), part, shape: segment.shape() }
    }

    fn states(&self) -> Tensor<4> {
        let States { keys, values } = self.segment.states();
        if self.part == 0 { keys } else { values }
    }
}

impl View for SavedSegment {
    fn dtype(&self) -> Dtype {
        match self.segment.dtype() {
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            _ => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.states().to_data().bytes().to_vec().into()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.segment.dtype().size()
    }
}
