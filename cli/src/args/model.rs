//! `--model`, `--device`, `--dtype`, `--threads`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use gpt2_burn::burn::tensor::{DType, Device};
use gpt2_burn::tokenizer::Tokenizer;
use gpt2_burn::{Checkpoint, Gpt2, Threads, WeightFormat};

use super::{Failure, Given, progress};

/// Which model, and where it runs.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    /// A folder in Hugging Face's layout, a nanoGPT file, `embedded`, a published size (gpt2, gpt2-medium, gpt2-large,
    /// gpt2-xl), or any id on the Hugging Face hub
    #[arg(long, default_value = "embedded", value_name = "embedded|NAME|DIR|FILE.pt")]
    pub model: String,
    /// nanoGPT's spelling of --model; `resume` reads ckpt.pt in --out_dir
    #[arg(long = "init_from", alias = "init-from", hide = true, conflicts_with = "model")]
    init_from: Option<String>,
    /// Where nanoGPT's `resume` finds its checkpoint
    #[arg(long = "out_dir", alias = "out-dir", hide = true, default_value = "out")]
    out_dir: PathBuf,
    /// A tokenizer.json, or a folder with one; default: the one that lies beside the weights
    #[arg(long, value_name = "FILE|DIR")]
    tokenizer: Option<PathBuf>,
    /// The device that computes: flex, ndarray, wgpu, vulkan, metal, cuda, cuda:1, rocm, if they are compiled in; `compare` and
    /// `curves` take several, with commas between them
    #[arg(long, default_value = "flex")]
    pub device: String,
    /// Element type of the weights; kernels compute in f32, burn's operations in the type of the weights
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: WeightType,
    /// Kernels of this library's own, where the device has them, or burn's operations
    #[arg(long, value_enum, default_value = "on")]
    pub kernels: OnOff,
    /// Lets a GPU round the factors of products in f32, which is faster for prompts and not exact
    #[arg(long)]
    pub fast_f32: bool,
    /// Threads of the CPU; 0: one a core
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub threads: usize,
}

/// A switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    On,
    Off,
}

/// Element types for weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WeightType {
    #[value(alias = "float32")]
    F32,
    #[value(alias = "float16")]
    F16,
    #[value(alias = "bfloat16")]
    Bf16,
    /// Eight bits a weight; only kernels compute with it
    Int8,
}

impl std::fmt::Display for WeightType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        })
    }
}

impl From<WeightType> for WeightFormat {
    fn from(dtype: WeightType) -> Self {
        match dtype {
            WeightType::F32 => Self::F32,
            WeightType::F16 => Self::F16,
            WeightType::Bf16 => Self::Bf16,
            WeightType::Int8 => Self::Int8,
        }
    }
}

/// Element types of caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CacheType {
    #[value(alias = "float32")]
    F32,
    #[value(alias = "float16")]
    F16,
    #[value(alias = "bfloat16")]
    Bf16,
    /// A byte for each number, and a scale for each head and position; on CPUs with kernels
    Int8,
}

impl From<CacheType> for DType {
    fn from(dtype: CacheType) -> Self {
        match dtype {
            CacheType::F32 => Self::F32,
            CacheType::F16 => Self::F16,
            CacheType::Bf16 => Self::BF16,
            CacheType::Int8 => Self::I8,
        }
    }
}

/// Element types of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FloatType {
    #[value(alias = "float32")]
    F32,
    #[value(alias = "float16")]
    F16,
    #[value(alias = "bfloat16")]
    Bf16,
}

impl From<FloatType> for DType {
    fn from(dtype: FloatType) -> Self {
        match dtype {
            FloatType::F32 => Self::F32,
            FloatType::F16 => Self::F16,
            FloatType::Bf16 => Self::BF16,
        }
    }
}

impl ModelArgs {
    /// Refuses flags that would be ignored.
    pub fn check(&self, given: &Given) -> Result<(), Failure> {
        if self.init_from.as_deref() != Some("resume") {
            given.refuse(&["out_dir"], "has no effect: it is read with --init_from=resume only")?;
        }
        let on_gpu = self.device.split(',').any(|name| !["flex", "ndarray"].contains(&name));
        if !on_gpu || self.kernels == OnOff::Off {
            given.refuse(&["fast_f32"], "has no effect: it is for the kernels of GPUs")?;
        }
        Ok(())
    }

    /// What the model is called, in either spelling.
    pub fn name(&self) -> &str {
        self.init_from.as_deref().unwrap_or(&self.model)
    }

    /// Loads the model, onto the device named, and its tokenizer.
    pub fn load(&self) -> Result<(Gpt2, Option<Tokenizer>), Failure> {
        self.load_on(&self.device()?)
    }

    /// Loads the model and its tokenizer.
    pub fn load_on(&self, device: &Device) -> Result<(Gpt2, Option<Tokenizer>), Failure> {
        self.load_as(self.dtype.into(), device)
    }

    /// The same with weights in another format than the one asked for.
    pub fn load_as(&self, format: WeightFormat, device: &Device) -> Result<(Gpt2, Option<Tokenizer>), Failure> {
        let (checkpoint, tokenizer) = match self.init_from.as_deref() {
            Some("resume") => (Checkpoint::open(self.out_dir.join("ckpt.pt"))?, None),
            Some(name) => find(name, &gpt2_burn_pair::TARGET)?,
            None => find(&self.model, &gpt2_burn_pair::TARGET)?,
        };
        let tokenizer = match &self.tokenizer {
            Some(path) => Some(Tokenizer::open(path)?),
            None => tokenizer,
        };
        Ok((self.load_checkpoint(&checkpoint, format, device)?, tokenizer))
    }

    /// Loads a draft of that name, onto the same device and in the same type; `embedded` is the small one of the pair.
    pub fn load_draft(&self, name: &str) -> Result<Gpt2, Failure> {
        self.load_draft_on(name, &self.device()?)
    }

    /// Loads a draft of that name, in the same type; `embedded` is the small one of the pair.
    pub fn load_draft_on(&self, name: &str, device: &Device) -> Result<Gpt2, Failure> {
        let (checkpoint, _) = find(name, &gpt2_burn_pair::DRAFT)?;
        self.load_checkpoint(&checkpoint, self.dtype.into(), device)
    }

    /// Whether the model is the embedded target, which has a draft beside it.
    pub fn is_embedded(&self) -> bool {
        self.name() == "embedded"
    }

    /// The weights of a checkpoint in `format`, for kernels unless they are off.
    pub fn load_checkpoint(
        &self,
        checkpoint: &Checkpoint,
        format: WeightFormat,
        device: &Device,
    ) -> Result<Gpt2, Failure> {
        let _shown = progress::loading(&checkpoint.config);
        match self.kernels {
            OnOff::On => Ok(checkpoint.load_packed(device, format)?),
            OnOff::Off => Ok(checkpoint.load(device, float_dtype(format)?)?),
        }
    }

    /// The model in the type asked for, computed by kernels unless they are off.
    pub fn pack(&self, model: Gpt2) -> Result<Gpt2, Failure> {
        match self.kernels {
            OnOff::On => Ok(model.pack(self.dtype.into())?),
            OnOff::Off => Ok(model.cast(float_dtype(self.dtype.into())?)?),
        }
    }

    /// The device named.
    pub fn device(&self) -> Result<Device, Failure> {
        Ok(gpt2_burn::device(&self.device)?)
    }

    /// Runs `work` on as many threads as were asked for.
    pub fn with_threads<T: Send>(&self, work: impl FnOnce() -> Result<T, Failure> + Send) -> Result<T, Failure> {
        gpt2_burn::backends::allow_fast_f32(self.fast_f32);
        match self.threads {
            0 => work(),
            threads => Threads::new(threads).map_err(gpt2_burn::Error::from)?.install(work),
        }
    }
}

/// The type of the weights where burn's operations compute with them.
fn float_dtype(format: WeightFormat) -> Result<DType, Failure> {
    match format {
        WeightFormat::Int8 => Err("`--dtype int8` needs the kernels: leave out `--kernels off`".into()),
        format => Ok(format.float()),
    }
}

/// The checkpoint of this name, and the tokenizer that comes with it; `./embedded` is a folder.
fn find(name: &str, embedded: &gpt2_burn_pair::Model) -> Result<(Checkpoint, Option<Tokenizer>), Failure> {
    if name == "embedded" {
        let tokenizer = Tokenizer::from_bytes(embedded.tokenizer)?;
        return Ok((Checkpoint::from_bytes(embedded.config, embedded.weights)?, Some(tokenizer)));
    }
    let checkpoint = Checkpoint::find(name, progress::downloads())?;
    let tokenizer = checkpoint.tokenizer()?;
    Ok((checkpoint, tokenizer))
}
