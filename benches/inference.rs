//! What inference is made of, each part beside the least time that this machine could take for it: the roofline of its
//! operations and bytes, with the machine's rates measured first.
//!
//!     cargo bench -p gpt2-burn --bench inference
//!     cargo bench -p gpt2-burn --bench inference -- decode
//!
//! The model has the shape of GPT-2 and random weights, whose speed is that of the real ones.

use std::hint::black_box;

use comfy_table::{CellAlignment, Table, presets};
use gpt2_burn::batch::{BatchOptions, RowRequest};
use gpt2_burn::burn::tensor::{DType, Device};
use gpt2_burn::checkpoint::SaveOptions;
use gpt2_burn::cost::{Cost, Counted, Hardware, Pass, Work, format_bytes, format_seconds};
use gpt2_burn::generate::{Generator, Stop};
use gpt2_burn::measure::{Repeats, Timing, peaks};
use gpt2_burn::prefix::{Payload, RadixTree};
use gpt2_burn::sampling::{Purpose, Sampling, uniform};
use gpt2_burn::{CacheStorage, Checkpoint, Gpt2, Gpt2Config, Logits, Result, Threads, TokenBatch, WeightFormat};

fn main() -> Result<()> {
    let only = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    // `cargo bench -p gpt2-burn` passes `--bench`, `cargo test --benches` does not: then a small shape and one run are enough.
    let is_bench = std::env::args().any(|argument| argument == "--bench");
    let device = gpt2_burn::device("flex")?;
    let (config, repeats) = match is_bench {
        true => (Gpt2Config::default(), Repeats { warm_up: 1, min_runs: 5, seconds: 1.0 }),
        false => (Gpt2Config { n_embd: 64, n_layer: 2, n_head: 2, ..Gpt2Config::default() }, Repeats::once()),
    };
    let machine = peaks(&device, &config, Some(WeightFormat::F32), repeats)?;
    println!(
        "{} threads read {}/s and multiply {:.0} GFLOP/s\n",
        Threads::current(),
        format_bytes(machine.bandwidth),
        machine.flops / 1e9
    );
    let mut bench = Bench { device, machine, repeats, only, rows: Vec::new() };
    bench.forwards(&config)?;
    bench.sampling(config.vocab_size)?;
    bench.tree_match()?;
    bench.joins()?;
    bench.loading(&config)?;
    println!("{}", bench.table());
    Ok(())
}

/// So many tokens, and nothing that was computed for them.
struct Tokens(usize);

impl Payload for Tokens {
    fn tokens(&self) -> usize {
        self.0
    }

    fn bytes(&self) -> usize {
        self.0
    }

    fn split(self, at: usize) -> (Self, Self) {
        (Self(at), Self(self.0 - at))
    }
}

struct Bench {
    device: Device,
    machine: Hardware,
    repeats: Repeats,
    /// Only rows whose name holds this.
    only: String,
    rows: Vec<[String; 6]>,
}

impl Bench {
    /// Times a part, if it is asked for.
    fn row(&mut self, name: &str, work: Work, run: impl FnMut() -> Result<()>) -> Result<()> {
        if !name.contains(&self.only) {
            return Ok(());
        }
        let timing: Timing = self.repeats.time(&self.device, run)?;
        let roofline = self.machine.roofline(work);
        let (low, high) = timing.spread();
        let seconds = timing.median();
        self.rows.push([
            name.to_owned(),
            format_seconds(seconds),
            format!("{} to {}", format_seconds(low), format_seconds(high)),
            format!("{:.1}", work.bytes / seconds / 1e9),
            format!("{:.0}", work.flops / seconds / 1e9),
            format!("{:.0}% ({})", 100.0 * roofline.seconds() / seconds, roofline.bound()),
        ]);
        Ok(())
    }

    /// Prefill, decode steps and verifications: one forward each.
    fn forwards(&mut self, config: &Gpt2Config) -> Result<()> {
        let model = config.init(&self.device)?.pack(WeightFormat::F32)?;
        let cost = Cost::new(config, DType::F32)?.counting(Counted::kernels());
        let prefills = [(1, 128), (1, 512), (8, 128)].map(|(batch, length)| ("prefill", Pass::prefill(batch, length)));
        let decodes = [(1, 128), (1, 1000), (8, 128), (8, 512)]
            .map(|(batch, length)| ("decode step", Pass::decode(batch, length)));
        let verifications = (1..=8).map(|drafted| ("verification", Pass::verify(1, 512, drafted)));
        for (what, pass) in prefills.into_iter().chain(decodes).chain(verifications) {
            let name = match what {
                "prefill" => format!("{what}: {} x {} tokens", pass.batch, pass.new),
                "decode step" => format!("{what}: {} x token {}", pass.batch, pass.keys()),
                _ => format!("{what}: {} drafted behind {}", pass.new - 1, pass.context_len),
            };
            if name.contains(&self.only) {
                self.forward(&name, &model, cost.work(pass)?, pass)?;
            }
        }
        Ok(())
    }

    /// What it takes that a row joins a batch of 32 and one leaves it: a hundredth of the difference of both, since the
    /// model computes next to nothing.
    fn joins(&mut self) -> Result<()> {
        const STEPS: usize = 100;
        let config = Gpt2Config { vocab_size: 64, n_embd: 8, n_layer: 1, n_head: 1, ..Gpt2Config::default() };
        let generator = Generator::new(config.init(&self.device)?.pack(WeightFormat::F32)?);
        let row = |max_new_tokens| RowRequest {
            max_new_tokens,
            sampling: Sampling::greedy(),
            stop: Stop { ignore_eos: true, ..Stop::default() },
            ..RowRequest::new(vec![1])
        };
        let (stays, leaves) = (row(2 * STEPS), row(1));
        for (name, joins) in
            [("batch of 32: 100 steps", false), ("batch of 32: 100 steps, each a join and a leave", true)]
        {
            self.row(name, Work::default(), || {
                let mut batch = generator.batch(BatchOptions::default().with_max_row_tokens(2 * STEPS))?;
                for _ in 0..32 - usize::from(joins) {
                    batch.add(&stays)?;
                    batch.step()?;
                }
                for _ in 0..STEPS {
                    if joins {
                        batch.add(&leaves)?;
                    }
                    black_box(batch.step()?);
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn forward(&mut self, name: &str, model: &Gpt2, work: Work, pass: Pass) -> Result<()> {
        let mut cache = model.cache(CacheStorage::Preallocated, pass.batch, pass.keys())?;
        let ids = |count: usize| vec![(0..count as u32).collect::<Vec<u32>>(); pass.batch];
        if pass.context_len > 0 {
            model.hidden_states(&TokenBatch::new(&ids(pass.context_len), model)?, &mut cache)?;
        }
        let new = TokenBatch::new(&ids(pass.new), model)?;
        self.row(name, work, || {
            for row in 0..pass.batch {
                cache.truncate(row, pass.context_len)?;
            }
            black_box(model.forward(&new, &mut cache, Logits::LastK(pass.logits))?);
            Ok(())
        })
    }

    /// From logits to a token, which reads every logit.
    fn sampling(&mut self, vocab_size: usize) -> Result<()> {
        let logits: Vec<f32> =
            (0..vocab_size).map(|id| 8.0 * uniform(1, 0, id as u64, Purpose::Token) as f32).collect();
        let work = Work { flops: 0.0, bytes: (vocab_size * size_of::<f32>()) as f64 };
        let plain = Sampling::default();
        for (name, sampling) in [
            ("sampling: greedy", Sampling::greedy()),
            ("sampling: temperature 0.8", Sampling { temperature: 0.8, ..plain }),
            ("sampling: top-k 200", Sampling { top_k: Some(200), ..plain }),
            ("sampling: top-p 0.9", Sampling { top_p: 0.9, ..plain }),
        ] {
            self.row(name, work, || {
                black_box(sampling.distribution(black_box(&logits), &[])?.sample(0.5));
                Ok(())
            })?;
        }
        Ok(())
    }

    /// The longest known prefix of a prompt of 1,000 tokens among those of a thousand others: 900 tokens of each are those of
    /// a hundred more. Each token that is found is compared with one that is held.
    fn tree_match(&mut self) -> Result<()> {
        let name = "tree match: 1000 tokens, 1000 prompts";
        if !name.contains(&self.only) {
            return Ok(());
        }
        let prompt = |seed: u32| -> Vec<u32> {
            (0..1000).map(|n: u32| if n < 900 { n * n % 50_000 + seed % 10 } else { (n + 7 * seed) % 50_000 }).collect()
        };
        let mut tree = RadixTree::<u8, Tokens>::default();
        for seed in 0..1000 {
            tree.insert(0, &prompt(seed), 0, Tokens(1000))?;
        }
        let asked: Vec<Vec<u32>> = (5000..5010).map(prompt).collect();
        let found = tree.find(0, &asked[0]).len();
        let work = Work { flops: 0.0, bytes: (2 * found * size_of::<u32>()) as f64 };
        let mut turns = asked.iter().cycle();
        self.row(name, work, || {
            let ids = turns.next().map_or(&[][..], Vec::as_slice);
            black_box(tree.find(0, black_box(ids)).len());
            Ok(())
        })
    }

    /// A checkpoint's file, which the system holds in memory already, to a model; each weight is read and written at least once.
    fn loading(&mut self, config: &Gpt2Config) -> Result<()> {
        let names = ["loading: safetensors", "loading: safetensors, packed"];
        if !names.iter().any(|name| name.contains(&self.only)) {
            return Ok(());
        }
        let io = |source| gpt2_burn::Error::Io { path: std::env::temp_dir(), source };
        let folder = tempfile::tempdir().map_err(io)?;
        config.init(&self.device)?.save(folder.path(), SaveOptions { dtype: DType::F32, max_shard_bytes: None })?;
        let bytes = 2.0 * (config.num_params() * size_of::<f32>()) as f64;
        let device = self.device.clone();
        let load = || Checkpoint::open(folder.path())?.load(&device, DType::F32);
        self.row(names[0], Work { flops: 0.0, bytes }, || load().map(|model| drop(black_box(model))))?;
        let pack = || load()?.pack(WeightFormat::F32);
        self.row(names[1], Work { flops: 0.0, bytes: 2.0 * bytes }, || pack().map(|model| drop(black_box(model))))
    }

    fn table(self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::ASCII_MARKDOWN).set_header([
            "part",
            "median",
            "middle half",
            "GB/s",
            "GFLOP/s",
            "of roofline",
        ]);
        table.add_rows(self.rows);
        table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
        table
    }
}
