//! Damaged and unsuitable files: a clear error, never a panic or a huge allocation.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crate::common::{device, fixture, name_of};
use gpt2_burn::burn::tensor::DType;
use gpt2_burn::tokenizer::Tokenizer;
use gpt2_burn::{Checkpoint, Error, Gpt2};
use proptest::prelude::*;
use tempfile::TempDir;

/// A copy of a fixture folder that can be damaged.
fn copy(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    folder
}

fn load(path: &Path) -> Result<Gpt2, Error> {
    Checkpoint::open(path)?.load(&device(), DType::F32)
}

#[track_caller]
fn message(path: &Path) -> String {
    load(path).expect_err("this must not load").to_string()
}

fn replace(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{from} is not in {}", path.display());
    fs::write(path, text.replace(from, to)).unwrap();
}

/// Rewrites the header of a safetensors file.
fn edit_header(path: &Path, edit: impl Fn(String) -> String) {
    let bytes = fs::read(path).unwrap();
    let size = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = edit(String::from_utf8(bytes[8..8 + size].to_vec()).unwrap());
    let mut edited = (header.len() as u64).to_le_bytes().to_vec();
    edited.extend(header.as_bytes());
    edited.extend(&bytes[8 + size..]);
    fs::write(path, edited).unwrap();
}

#[test]
fn paths_without_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    assert!(message(&folder.path().join("nowhere")).contains("no such file or folder"));
    assert!(message(folder.path()).contains("no config.json"));
    fs::write(folder.path().join("config.json"), "{}").unwrap();
    assert!(message(folder.path()).contains("neither model.safetensors nor pytorch_model.bin"));
    let not_found = Checkpoint::find("no-such-model", |_| {}).err().unwrap();
    assert!(matches!(not_found, Error::ModelNotFound { .. }), "{not_found}");
}

#[test]
fn configs_that_are_damaged_or_change_the_function() {
    let folder = copy("hf-tiny");
    let config = folder.path().join("config.json");
    replace(&config, "\"scale_attn_weights\": true", "\"scale_attn_weights\": false");
    assert!(message(folder.path()).contains("scale_attn_weights"));
    fs::write(&config, [0xff, 0xfe, 0x00]).unwrap();
    assert!(message(folder.path()).contains("not UTF-8"));
    fs::write(&config, "{\"n_embd\": ").unwrap();
    assert!(matches!(load(folder.path()), Err(Error::ConfigSyntax { .. })));
    fs::write(&config, "{\"n_layer\": 2000000000, \"n_embd\": 2, \"n_head\": 1}").unwrap();
    assert!(message(folder.path()).contains("n_layer"), "no block may be made before this is seen");
}

#[test]
fn safetensors_that_are_cut_short_or_garbage_or_claim_too_much() {
    let folder = copy("hf-tiny");
    let weights = folder.path().join("model.safetensors");
    let whole = fs::read(&weights).unwrap();
    for length in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&weights, &whole[..length]).unwrap();
        assert!(message(folder.path()).contains("model.safetensors"), "{length} bytes");
    }
    fs::write(&weights, vec![b'x'; 5000]).unwrap();
    assert!(message(folder.path()).contains("the header claims"));
    let mut huge = (1_u64 << 60).to_le_bytes().to_vec();
    huge.extend(b"{}");
    fs::write(&weights, huge).unwrap();
    assert!(message(folder.path()).contains("claims 1152921504606846976 bytes"));
    let mut longer = whole.clone();
    longer.extend([0; 16]);
    fs::write(&weights, longer).unwrap();
    assert!(message(folder.path()).contains("the file holds"));
    fs::write(&weights, &whole).unwrap();
    edit_header(&weights, |header| header.replace("[96,32]", "[96,1152921504606846976]"));
    assert!(matches!(load(folder.path()), Err(Error::Checkpoint { .. })));
}

#[test]
fn every_tensor_that_does_not_fit_is_listed() {
    let folder = copy("hf-tiny");
    let weights = folder.path().join("model.safetensors");
    edit_header(&weights, |header| {
        header
            .replace("transformer.h.0.ln_1.bias", "transformer.h.0.ln_9.bias")
            .replace("transformer.ln_f.weight", "extra.weight")
            .replace("[32,96]", "[96,32]")
    });
    let Err(Error::Tensors(problems)) = load(folder.path()) else { panic!("expected a list of tensors") };
    let all = problems.join("\n");
    for part in [
        "`h.0.ln_1.bias` is missing",
        "`h.0.ln_9.bias` is unexpected",
        "`ln_f.weight` is missing",
        "`extra.weight` is unexpected",
        "`h.0.attn.c_attn.weight` has the shape [96, 32], not [32, 96]",
        "`h.1.attn.c_attn.weight` has the shape [96, 32], not [32, 96]",
    ] {
        assert!(all.contains(part), "{part} is not in\n{all}");
    }
    assert_eq!(problems.len(), 6);
}

#[test]
fn a_tensor_with_two_names_or_of_no_float_type() {
    let folder = copy("hf-tiny");
    let weights = folder.path().join("model.safetensors");
    edit_header(&weights, |header| header.replace("\"transformer.h.0.ln_1.bias\"", "\"ln_f.bias\""));
    assert!(message(folder.path()).contains("are the same tensor"));
    let folder = copy("hf-tiny");
    let weights = folder.path().join("model.safetensors");
    edit_header(&weights, |header| header.replacen("\"F32\"", "\"I32\"", 1));
    assert!(message(folder.path()).contains("is not of a float type"));
}

#[test]
fn shards_that_are_missing_or_duplicated_or_elsewhere() {
    let first = "model-00001-of-00004.safetensors";
    let missing = copy("hf-tiny-sharded");
    fs::remove_file(missing.path().join(first)).unwrap();
    assert!(message(missing.path()).contains("is missing"));

    let duplicated = copy("hf-tiny-sharded");
    let second = "model-00002-of-00004.safetensors";
    fs::copy(duplicated.path().join(first), duplicated.path().join(second)).unwrap();
    assert!(message(duplicated.path()).contains("is in more than one shard"));

    for name in ["../model.safetensors", "/etc/hostname", "a/b", ".."] {
        let elsewhere = copy("hf-tiny-sharded");
        replace(&elsewhere.path().join("model.safetensors.index.json"), first, name);
        assert!(message(elsewhere.path()).contains("leads out of the folder"), "{name}");
    }

    let index = copy("hf-tiny-sharded");
    for text in ["", "[]", "{\"weight_map\": {}}", "{\"weight_map\": {\"a\": 3}}"] {
        fs::write(index.path().join("model.safetensors.index.json"), text).unwrap();
        assert!(matches!(load(index.path()), Err(Error::Checkpoint { .. })), "{text}");
    }

    let untold = copy("hf-tiny-sharded");
    replace(&untold.path().join("model.safetensors.index.json"), "transformer.wpe.weight", "transformer.wqe.weight");
    assert!(message(untold.path()).contains("is not in the shard"));
}

#[test]
fn pytorch_files_that_are_malformed() {
    for name in ["hf-tiny-bin", "hf-tiny-untied-bin"] {
        let folder = copy(name);
        let file = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
        let file = file.filter(|path| path.extension().is_some_and(|e| e == "bin")).min().unwrap();
        let whole = fs::read(&file).unwrap();
        for bytes in [b"".as_slice(), b"not a pickle", &whole[..40], &whole[..whole.len() / 2]] {
            fs::write(&file, bytes).unwrap();
            assert!(load(folder.path()).is_err(), "{name} with {} bytes", bytes.len());
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ckpt.pt");
    fs::write(&file, b"PK\x03\x04 and then nothing").unwrap();
    assert!(message(&file).contains("not a usable PyTorch file"));
    // A file without model_args is no nanoGPT checkpoint.
    assert!(load(&fixture("hf-tiny-bin").join("pytorch_model.bin")).is_err());
}

#[test]
fn tokenizer_files_that_are_damaged() {
    let folder = tempfile::tempdir().unwrap();
    assert!(Tokenizer::find(folder.path()).unwrap().is_none());
    fs::write(folder.path().join("vocab.json"), "{\"a\": 0}").unwrap();
    assert!(Tokenizer::find(folder.path()).unwrap().is_none(), "a vocabulary alone is no tokenizer");
    fs::write(folder.path().join("merges.txt"), [0xff]).unwrap();
    assert!(matches!(Tokenizer::find(folder.path()), Err(Error::Tokenizer { .. })));
    fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    assert!(matches!(Tokenizer::find(folder.path()), Err(Error::Tokenizer { .. })));
}

/// A change to the bytes of a file.
#[derive(Clone, Debug)]
enum Damage {
    Flip(usize, u8),
    Cut(usize),
    Insert(usize, Vec<u8>),
    Repeat(usize, usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        4 => (any::<usize>(), 1_u8..).prop_map(|(at, bits)| Damage::Flip(at, bits)),
        1 => any::<usize>().prop_map(Damage::Cut),
        1 => (any::<usize>(), proptest::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, new)| Damage::Insert(at, new)),
        1 => (any::<usize>(), 1_usize..64).prop_map(|(at, count)| Damage::Repeat(at, count)),
    ]
}

/// Where damage falls: mostly into the first kilobytes and the end, where headers and directories are.
fn position(at: usize, length: usize) -> usize {
    match at % 4 {
        0 => at / 4 % length,
        1 => length - 1 - at / 4 % length.min(2048),
        _ => at / 4 % length.min(4096),
    }
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        match self {
            Self::Flip(at, bits) => {
                let at = position(*at, bytes.len());
                bytes[at] ^= bits;
            }
            Self::Cut(at) => bytes.truncate(at % bytes.len()),
            Self::Insert(at, new) => {
                let at = position(*at, bytes.len());
                bytes.splice(at..at, new.iter().copied());
            }
            Self::Repeat(at, count) => {
                let at = position(*at, bytes.len());
                let end = (at + count).min(bytes.len());
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
        }
    }
}

/// Files of every kind that is read, and the path that is opened then.
const KINDS: [(&str, &str, &str); 11] = [
    ("hf-tiny", "model.safetensors", ""),
    ("hf-tiny", "config.json", ""),
    ("hf-tiny-sharded", "model.safetensors.index.json", ""),
    ("hf-tiny-bin", "pytorch_model.bin", ""),
    ("hf-tiny-untied-bin", "pytorch_model-00001-of-00002.bin", ""),
    ("nanogpt-nobias", "ckpt.pt", "ckpt.pt"),
    ("hf-tiny-untied-bin", "pytorch_model.bin.index.json", ""),
    ("nanogpt-nobias", "ckpt.pt", ""),
    ("byte-shakespeare", "vocab.json", ""),
    ("byte-shakespeare", "merges.txt", ""),
    ("byte-shakespeare", "tokenizer.json", ""),
];

/// A `tokenizer.json` with a merge, a special token and the usual components.
const TOKENIZER: &str = r#"{"version": "1.0", "truncation": null, "padding": null,
    "added_tokens": [{"id": 3, "content": "<|endoftext|>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true}],
    "normalizer": null, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": true}, "post_processor": null,
    "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
    "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
        "end_of_word_suffix": "", "fuse_unk": false, "vocab": {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3},
        "merges": [["a", "b"]]}}"#;

proptest! {
    #[test]
    fn damaged_files_give_errors_or_models_but_never_panic(
        damages in proptest::collection::vec(damage(), 1..6),
    ) {
        for (name, file, open) in KINDS {
            let folder = copy(name);
            let path = folder.path().join(file);
            let mut bytes = if file == "tokenizer.json" { TOKENIZER.into() } else { fs::read(&path).unwrap() };
            damages.iter().for_each(|damage| damage.apply(&mut bytes));
            fs::write(&path, &bytes).unwrap();
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                let _ = load(&folder.path().join(open));
                if let Ok(Some(tokenizer)) = Tokenizer::find(folder.path()) {
                    let _ = tokenizer.encode("abba<|endoftext|>").and_then(|ids| tokenizer.decode(&ids));
                }
            }));
            prop_assert!(outcome.is_ok(), "{name}/{file} panicked after {damages:?}");
        }
    }
}

/// The property again where little memory can be had: an allocation that a damaged length asks for would abort.
#[test]
#[cfg(target_os = "linux")]
fn damaged_files_ask_for_no_huge_allocation() {
    let output = std::process::Command::new("sh")
        .args(["-c", "ulimit -v 2000000 && exec \"$0\" --exact \"$1\""])
        .arg(std::env::current_exe().unwrap())
        .arg(name_of(&damaged_files_give_errors_or_models_but_never_panic))
        .env("RAYON_NUM_THREADS", "2") // each takes addresses, too
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && printed.contains("1 passed"), "a loader asked for more than 2 GB: {printed}");
}
