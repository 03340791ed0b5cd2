//! A cache of prefixes out of a file.
//!
//! A file can be larger than the budget, larger than memory, and anybody's. Its header is checked first, then all of it
//! against its checksum, a chunk at a time; only then is it read for good, node after node, as far as there is room.
//! Of a node only its own ids are held: those before it are its parents'.

use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};
use xxhash_rust::xxh3::Xxh3;

use super::{FORMAT, KEYS_AND_VALUES, Node, name};
use crate::cache::{KvPool, number_type};
use crate::checkpoint::{SafetensorsSource, TensorSource};
use crate::prefix::{Fingerprint, PrefixCache};
use crate::{Error, Gpt2Config, KvCacheConfig, KvSegment, Result};

/// For which model keys and values are read.
pub(crate) struct Reader {
    pub fingerprint: Fingerprint,
    pub config: Gpt2Config,
    pub dtype: DType,
    pub device: Device,
    /// The pages that they go to; none: each segment has memory of its own.
    pub pool: Option<Arc<KvPool>>,
}

impl PrefixCache {
    /// Puts in what a file holds for the models of `readers`; returns how many tokens that are new.
    ///
    /// Nothing that is held goes for it: of the nodes in their order, those that the budget has room for beside it are put
    /// in. With a node that is left out, all behind it are.
    pub(crate) fn restore(&self, path: &Path, readers: &[Reader]) -> Result<usize> {
        let saved = Saved::open(path, readers)?;
        let sums = saved.check()?;
        let mut new = 0;
        for (index, node) in saved.nodes.iter().enumerate() {
            let Some(reader) = node.reader else { continue };
            let ids = saved.ids(index);
            let held = self.held(reader.fingerprint, &ids);
            if held < ids.len() {
                let bytes = if reader.pool.is_some() { 0 } else { (ids.len() - held) * reader.token_bytes() };
                if held < node.start || !self.has_room(bytes) {
                    continue;
                }
                let segment = saved.segment(index, reader, sums[index])?;
                let Some(segment) = self.in_pages(&ids, segment, reader)? else { continue };
                new += self.insert(reader.fingerprint, &ids, node.start, segment)?;
            }
            node.node.ends.iter().for_each(|end| self.mark(reader.fingerprint, &ids[..node.start + end]));
        }
        Ok(new)
    }

    /// The last tokens of a sequence, of which those before are held, as the reader's caches hold them; none if there is no room.
    fn in_pages(&self, ids: &[u32], segment: KvSegment, reader: &Reader) -> Result<Option<KvSegment>> {
        let Some(pool) = &reader.pool else { return Ok(Some(segment)) };
        let config = KvCacheConfig::new(1, ids.len()).with_dtype(reader.dtype);
        let mut cache = config.init_in(&reader.config, &reader.device, Some(pool))?;
        let start = ids.len() - segment.tokens();
        let mut path = self.path(reader.fingerprint, &ids[..start]);
        if path.iter().map(|(_, tokens)| tokens).sum::<usize>() < start {
            return Ok(None);
        }
        path.push((segment, ids.len() - start));
        cache.append_segments(&[path])?;
        let segment = cache.share(0, start..ids.len())?;
        Ok(Some(segment).filter(|_| self.has_room(0)))
    }
}

/// A file of which the header has been read and found right.
struct Saved<'a> {
    path: &'a Path,
    source: SafetensorsSource<BufReader<File>>,
    nodes: Vec<Located<'a>>,
}

/// A node, and where it belongs.
struct Located<'a> {
    node: Node,
    /// For which of the models; none: another.
    reader: Option<&'a Reader>,
    /// Tokens before it.
    start: usize,
}

impl<'a> Saved<'a> {
    fn open(path: &'a Path, readers: &'a [Reader]) -> Result<Self> {
        let refused = |reason: String| Error::Checkpoint { path: path.to_owned(), reason };
        let file = File::open(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        let source = SafetensorsSource::new(BufReader::new(file), path.to_owned())?;
        let mut saved = Self { path, source, nodes: Vec::new() };
        if saved.text("format")? != FORMAT {
            return Err(refused(format!("its format is `{}`, not `{FORMAT}`", saved.text("format")?)));
        }
        let nodes: Vec<Node> =
            serde_json::from_str(saved.text("nodes")?).map_err(|error| refused(format!("its nodes: {error}")))?;
        let infos: HashMap<String, _> = saved.source.tensors().into_iter().collect();
        if infos.len() != 2 * nodes.len() {
            return Err(refused(format!("{} tensors for {} nodes", infos.len(), nodes.len())));
        }
        let names: Vec<String> = readers.iter().map(|reader| reader.fingerprint.to_string()).collect();
        for (index, node) in nodes.into_iter().enumerate() {
            let start = saved.start(index, &node)?;
            let reader = names.iter().zip(readers).find(|(name, _)| **name == node.model).map(|(_, reader)| reader);
            for name in KEYS_AND_VALUES.map(|part| name(index, part)) {
                let info = infos.get(&name).ok_or_else(|| refused(format!("`{name}` is missing")))?;
                let checked =
                    reader.map_or(Ok(()), |reader| reader.check_tensor(&node, info.stored.dtype(), &info.shape));
                checked.map_err(|reason| refused(format!("`{name}`: {reason}")))?;
            }
            let checked = reader.map_or(Ok(()), |reader| reader.check_node(&node, start));
            checked.map_err(|reason| refused(format!("node {index}: {reason}")))?;
            saved.nodes.push(Located { node, reader, start });
        }
        match saved.nodes.first() {
            Some(first) if saved.nodes.iter().all(|node| node.reader.is_none()) => Err(refused(format!(
                "it was written for another model, element type or device, or in another way of computing: its fingerprint \
                 is {}, this one's is {}",
                first.node.model,
                names.join(" or ")
            ))),
            _ => Ok(saved),
        }
    }

    /// Tokens before the node that comes next, `index`.
    fn start(&self, index: usize, node: &Node) -> Result<usize> {
        let Some(parent) = node.parent else { return Ok(0) };
        match self.nodes.get(parent) {
            Some(before) if before.node.model == node.model => Ok(before.start + before.node.ids.len()),
            Some(_) => Err(self.refused(format!("node {index} and its parent, {parent}, are of two models"))),
            None => Err(self.refused(format!("node {index} stands before its parent, {parent}"))),
        }
    }

    fn refused(&self, reason: String) -> Error {
        Error::Checkpoint { path: self.path.to_owned(), reason }
    }

    fn text(&self, key: &str) -> Result<&str> {
        let missing = || self.refused(format!("it has no `{key}`: this is no cache of prefixes"));
        self.source.text(key).ok_or_else(missing)
    }

    /// Reads all of it and holds it against its checksum; returns a checksum of each node's tensors.
    fn check(&self) -> Result<Vec<u128>> {
        let mut checksum = Xxh3::new();
        checksum.update(self.text("nodes")?.as_bytes());
        let mut sums = Vec::with_capacity(self.nodes.len());
        for index in 0..self.nodes.len() {
            let mut sum = Xxh3::new();
            for part in KEYS_AND_VALUES {
                self.source.scan(&name(index, part), |bytes| {
                    checksum.update(bytes);
                    sum.update(bytes);
                })?;
            }
            sums.push(sum.digest128());
        }
        if self.text("checksum")? != format!("{:032x}", checksum.digest128()) {
            return Err(self.refused("its contents have been altered: they do not have its checksum".to_owned()));
        }
        Ok(sums)
    }

    /// The tokens of a node and all those before it.
    fn ids(&self, index: usize) -> Vec<u32> {
        let mut path = vec![];
        let mut next = Some(index);
        while let Some(index) = next {
            let Node { ids, parent, .. } = &self.nodes[index].node;
            path.push(ids.as_slice());
            next = *parent;
        }
        path.reverse();
        path.concat()
    }

    /// Keys and values of a node, if they are still those that were checked.
    fn segment(&self, index: usize, reader: &Reader, sum: u128) -> Result<KvSegment> {
        let mut hash = Xxh3::new();
        let mut read =
            |part| self.source.read_seen(&name(index, part), number_type(reader.dtype), |bytes| hash.update(bytes));
        let [keys, values] = KEYS_AND_VALUES.map(&mut read);
        let (keys, values) = (keys?, values?);
        if hash.digest128() != sum {
            return Err(self.refused(format!("node {index} was altered while the file was read")));
        }
        let tensor = |data| Tensor::<4>::from_data(data, (&reader.device, number_type(reader.dtype)));
        Ok(KvSegment::new(tensor(keys), tensor(values)))
    }
}

impl Reader {
    /// Bytes of the keys and values of a token.
    fn token_bytes(&self) -> usize {
        2 * self.config.n_layer * self.config.n_embd * number_type(self.dtype).size()
    }

    fn check_tensor(&self, node: &Node, dtype: Option<DType>, shape: &[usize]) -> Result<(), String> {
        let wanted = [self.config.n_layer, self.config.n_head, node.ids.len(), self.config.head_dim()];
        if node.ids.is_empty() || *shape != wanted || dtype != Some(number_type(self.dtype)) {
            return Err(format!("{shape:?} of {dtype:?}, not {wanted:?} of {:?}", number_type(self.dtype)));
        }
        Ok(())
    }

    fn check_node(&self, node: &Node, start: usize) -> Result<(), String> {
        let tokens = node.ids.len();
        if start + tokens > self.config.n_positions {
            return Err(format!(
                "a sequence of {} tokens is beyond {} positions",
                start + tokens,
                self.config.n_positions
            ));
        }
        if let Some(id) = node.ids.iter().find(|id| **id as usize >= self.config.vocab_size) {
            return Err(format!("token id {id} is outside the vocabulary 0..{}", self.config.vocab_size));
        }
        if let Some(end) = node.ends.iter().find(|end| !(1..=tokens).contains(*end)) {
            return Err(format!("a prompt ends behind {end} of {tokens} tokens"));
        }
        if !node.ends.is_sorted_by(|left, right| left < right) {
            return Err("prompts end there more than once, or out of order".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::{Seek, SeekFrom, Write};

    use super::*;

    #[test]
    fn a_node_that_is_altered_behind_the_check_is_refused() {
        let device = crate::device("flex").unwrap();
        let fingerprint = Fingerprint::of_another_way().now();
        let states = || Tensor::<4>::ones([1, 2, 3, 4], (&device, DType::F32));
        let cache = PrefixCache::new(1 << 20);
        cache.insert(fingerprint, &[1, 2, 3], 0, KvSegment::new(states(), states())).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prefixes");
        cache.save(&path).unwrap();

        let config =
            Gpt2Config { vocab_size: 7, n_positions: 3, n_embd: 8, n_layer: 1, n_head: 2, ..Gpt2Config::default() };
        let readers = [Reader { fingerprint, config, dtype: DType::F32, device: device.clone(), pool: None }];
        let saved = Saved::open(&path, &readers).unwrap();
        let sums = saved.check().unwrap();
        assert_eq!(saved.segment(0, &readers[0], sums[0]).unwrap().tokens(), 3);
        let mut file = OpenOptions::new().write(true).open(&path).unwrap();
        file.seek(SeekFrom::End(-1)).unwrap();
        file.write_all(&[1]).unwrap();
        let error = saved.segment(0, &readers[0], sums[0]).unwrap_err();
        assert!(error.to_string().contains("altered while the file was read"), "{error}");
    }
}
