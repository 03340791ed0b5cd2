//! Loading holds the weights once: peak resident memory stays under 1.2 x the weights as held.
#![cfg(target_os = "linux")]

mod common;

use std::path::Path;
use std::process::Command;

use common::{device, small_config};
use gpt2_burn::burn::tensor::DType;
use gpt2_burn::checkpoint::SaveOptions;
use gpt2_burn::{Checkpoint, Gpt2Config};

/// Set for a process that only loads and measures itself.
const CHILD: &str = "GPT2_BURN_LOADS";

/// A figure of `/proc/self/status`, in bytes.
fn status(field: &str) -> usize {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_matches(|c: char| !c.is_ascii_digit()).parse::<usize>().unwrap() * 1024
}

fn load_and_measure(path: &Path) {
    for dtype in [DType::F32, DType::F16] {
        let before = status("VmRSS:");
        std::fs::write("/proc/self/clear_refs", "5").unwrap(); // the peak starts anew
        let model = Checkpoint::open(path).unwrap().load(&device(), dtype).unwrap();
        let taken = status("VmHWM:") - before;
        let weights = model.config().num_params() * dtype.size();
        assert!(taken > weights / 2, "{taken} bytes cannot hold {weights} bytes of weights");
        let ratio = taken as f64 / weights as f64;
        assert!(ratio < 1.2, "{} as {dtype:?}: {taken} bytes for {weights}, {ratio:.2} x", path.display());
        println!("{} as {dtype:?}: {ratio:.3} x the weights", path.display());
        drop(model);
    }
}

#[test]
fn loading_holds_the_weights_once() {
    if let Some(path) = std::env::var_os(CHILD) {
        return load_and_measure(Path::new(&path));
    }
    let config = Gpt2Config { vocab_size: 30_000, n_embd: 512, n_head: 8, n_layer: 4, ..small_config() };
    let model = config.init(&device()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (name, dtype, max_shard_bytes) in
        [("f32", DType::F32, None), ("f16", DType::F16, None), ("shards", DType::F32, Some(40_000_000))]
    {
        let path = folder.path().join(name);
        model.save(&path, SaveOptions { dtype, max_shard_bytes }).unwrap();
        // In a process of its own, so that nothing that saving left behind is counted or used again.
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "loading_holds_the_weights_once", "--nocapture"])
            .env(CHILD, &path)
            .output()
            .unwrap();
        assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
        let printed = String::from_utf8_lossy(&child.stdout);
        assert!(printed.contains("x the weights"), "the child measured nothing: {printed}");
    }
}
