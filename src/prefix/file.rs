//! A cache of prefixes in a file, so that it outlives its process.
//!
//! The file is a safetensors file. Each node of the tree has two tensors, `0.keys` and `0.values` and so on, of the shape
//! `[layers, heads, tokens, width of a head]`; the header says under `nodes` which model and tokens they are of and which
//! node is before each, and under `checksum` the hash (XXH3, 128 bits) of that and of all tensors in their order.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};
use safetensors::{Dtype, View, serialize_to_file};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::{Fingerprint, PrefixCache};
use crate::checkpoint::{SafetensorsSource, TensorSource};
use crate::{Error, KvSegment, Result};

/// What such a file says it is.
const FORMAT: &str = "gpt2-burn prefixes 1";

/// A node, as the header has it.
#[derive(Serialize, Deserialize)]
struct Node {
    model: String,
    /// The node before it, which stands before it in the list too.
    parent: Option<usize>,
    ids: Vec<u32>,
    /// Behind how many of the ids whole prompts end.
    ends: Vec<usize>,
}

/// For which model keys and values are read.
pub(crate) struct Reader {
    pub fingerprint: Fingerprint,
    /// `[layers, heads, width of a head]`.
    pub shape: [usize; 3],
    pub vocab_size: usize,
    pub dtype: DType,
    pub device: Device,
}

impl PrefixCache {
    /// Writes all that is held to a safetensors file, which a generator with the same model
    /// [restores](crate::generate::Generator::restore_prefixes). A file that is there is replaced when the new one is
    /// complete, and not before.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] if writing fails, [`Error::Execution`] if the device does not hand the data over.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let (nodes, segments): (Vec<Node>, Vec<KvSegment>) = self.with_tree(|tree| {
            let entries = tree.entries().into_iter();
            let node = |entry: super::Entry<'_, Fingerprint, KvSegment>| {
                let (model, ids) = (entry.space.to_string(), entry.ids.to_vec());
                (Node { model, parent: entry.parent, ids, ends: entry.ends }, entry.payload.clone())
            };
            entries.map(node).unzip()
        });
        let nodes = serde_json::to_string(&nodes).expect("nodes are made of numbers and text");
        let tensors = segments.iter().enumerate().flat_map(|(index, segment)| {
            [("keys", segment.keys()), ("values", segment.values())]
                .map(|(name, states)| (format!("{index}.{name}"), Part::new(states)))
        });
        let tensors: Vec<(String, Part)> = tensors.collect();

        let mut checksum = Xxh3::new();
        checksum.update(nodes.as_bytes());
        for (_, part) in &tensors {
            let data = part.states.try_to_data().map_err(|error| Error::Execution(error.to_string()))?;
            checksum.update(data.bytes());
        }
        let checksum = format!("{:032x}", checksum.digest128());
        let metadata = [("format", FORMAT.to_owned()), ("nodes", nodes), ("checksum", checksum)];
        let metadata: HashMap<String, String> =
            metadata.into_iter().map(|(key, text)| (key.to_owned(), text)).collect();
        serialize_to_file(tensors, Some(metadata), path)
            .map_err(|error| Error::Checkpoint { path: path.to_owned(), reason: error.to_string() })
    }

    /// Puts in what a file holds for the models of `readers`; returns how many tokens are new.
    pub(crate) fn restore(&self, path: &Path, readers: &[Reader]) -> Result<usize> {
        let refused = |reason: String| Error::Checkpoint { path: path.to_owned(), reason };
        let file = File::open(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        let file = SafetensorsSource::new(BufReader::new(file), path.to_owned())?;
        let text =
            |key| file.text(key).ok_or_else(|| refused(format!("it has no `{key}`: this is no cache of prefixes")));
        if text("format")? != FORMAT {
            return Err(refused(format!("its format is `{}`, not `{FORMAT}`", text("format")?)));
        }
        let nodes = text("nodes")?;
        let mut checksum = Xxh3::new();
        checksum.update(nodes.as_bytes());
        let nodes: Vec<Node> = serde_json::from_str(nodes).map_err(|error| refused(format!("its nodes: {error}")))?;
        let infos: HashMap<String, _> = file.tensors().into_iter().collect();
        if infos.len() != 2 * nodes.len() {
            return Err(refused(format!("{} tensors for {} nodes", infos.len(), nodes.len())));
        }

        // All of it is read and found right before any of it is put in.
        let mut read: Vec<Option<Sequence>> = Vec::new();
        for (index, node) in nodes.iter().enumerate() {
            let reader = readers.iter().find(|reader| Fingerprint::from_text(&node.model) == Some(reader.fingerprint));
            let before = match node.parent {
                None => Some(&[][..]),
                Some(parent) if parent < index => read[parent].as_ref().map(|before| before.ids.as_slice()),
                Some(parent) => return Err(refused(format!("node {index} stands before its parent, {parent}"))),
            };
            let mut parts = Vec::new();
            for name in [format!("{index}.keys"), format!("{index}.values")] {
                let info = infos.get(&name).ok_or_else(|| refused(format!("`{name}` is missing")))?;
                let stored = info.stored.dtype().ok_or_else(|| refused(format!("`{name}` is not of a float type")))?;
                let data = file.read(&name, stored)?;
                checksum.update(data.bytes());
                parts.push(data);
            }
            read.push(match (reader, before, parts.try_into()) {
                (Some(reader), Some(before), Ok(parts)) => {
                    let sequence = reader.sequence(node, before, parts);
                    Some(sequence.map_err(|reason| refused(format!("node {index}: {reason}")))?)
                }
                _ => None,
            });
        }
        if text("checksum")? != format!("{:032x}", checksum.digest128()) {
            return Err(refused("its contents have been altered: they do not have its checksum".to_owned()));
        }
        if !nodes.is_empty() && read.iter().all(Option::is_none) {
            let wanted: Vec<String> = readers.iter().map(|reader| reader.fingerprint.to_string()).collect();
            let reason = format!(
                "it was written for another model, element type or device: its fingerprint is {}, this one's is {}",
                nodes[0].model,
                wanted.join(" or ")
            );
            return Err(refused(reason));
        }
        read.into_iter().flatten().map(|sequence| self.put_back(sequence)).sum()
    }

    fn put_back(&self, sequence: Sequence) -> Result<usize> {
        let Sequence { model, ids, from, segment, ends } = sequence;
        let new = self.put(model, &ids, from, segment)?;
        ends.into_iter().for_each(|end| self.mark(model, &ids[..from + end]));
        Ok(new)
    }
}

/// A node, read: the last of its tokens from the first of a sequence on.
struct Sequence {
    model: Fingerprint,
    ids: Vec<u32>,
    from: usize,
    segment: KvSegment,
    ends: Vec<usize>,
}

impl Reader {
    fn sequence(&self, node: &Node, before: &[u32], [keys, values]: [TensorData; 2]) -> Result<Sequence, String> {
        let [layers, heads, head_dim] = self.shape;
        let tokens = node.ids.len();
        for data in [&keys, &values] {
            let (shape, wanted) = (data.shape(), [layers, heads, tokens, head_dim]);
            if tokens == 0 || **shape != wanted || data.dtype() != self.dtype {
                return Err(format!("{shape:?} of {:?}, not {wanted:?} of {:?}", data.dtype(), self.dtype));
            }
        }
        if let Some(id) = node.ids.iter().find(|id| **id as usize >= self.vocab_size) {
            return Err(format!("token id {id} is outside the vocabulary 0..{}", self.vocab_size));
        }
        if let Some(end) = node.ends.iter().find(|end| !(1..=tokens).contains(*end)) {
            return Err(format!("a prompt ends behind {end} of {tokens} tokens"));
        }
        let place = |data| Tensor::<4>::from_data(data, (&self.device, self.dtype));
        let segment = KvSegment::new(place(keys), place(values));
        let ids = [before, &node.ids].concat();
        Ok(Sequence { model: self.fingerprint, ids, from: before.len(), segment, ends: node.ends.clone() })
    }
}

/// The keys or the values of a segment: `[layers, H, n, D]`.
struct Part {
    states: Tensor<4>,
    shape: [usize; 4],
}

impl Part {
    fn new(states: &Tensor<4>) -> Self {
        Self { states: states.clone(), shape: states.dims() }
    }
}

impl View for Part {
    fn dtype(&self) -> Dtype {
        match self.states.dtype() {
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            _ => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.states.to_data().bytes().to_vec().into()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.states.dtype().size()
    }
}
