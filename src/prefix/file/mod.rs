//! A cache of prefixes in a file, so that it outlives its process.
//!
//! The file is a safetensors file. Each node of the tree has two tensors, `0.keys` and `0.values` and so on, of the shape
//! `[layers, heads, tokens, width of a head]`; the header says under `nodes` which model and tokens they are of and which
//! node is before each, and under `checksum` the hash (XXH3, 128 bits) of that and of all tensors in their order.

mod read;
mod write;

pub(crate) use read::Reader;

use serde::{Deserialize, Serialize};

/// What such a file says it is. Keys and values of the first version were computed with another order of sums.
const FORMAT: &str = "gpt2-burn prefixes 2";

/// What each node has a tensor of.
const KEYS_AND_VALUES: [&str; 2] = ["keys", "values"];

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

/// Name of a tensor of a node.
fn name(node: usize, part: &str) -> String {
    format!("{node}.{part}")
}
