//! Weights into a module: names and shapes are compared first, then tensors are read one at a time.

use std::collections::{BTreeMap, HashMap};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{DType, Device, Tensor};

use super::element::Stored;
use super::names::{HEAD, Layout, canonical, is_mask, of_path};
use super::source::{TensorInfo, TensorSource};
use crate::{Error, Gpt2, Gpt2Config, Result};

/// Builds the model and fills it; see [`Checkpoint::load`](super::Checkpoint::load).
pub fn load(
    config: &Gpt2Config,
    source: &dyn TensorSource,
    layout: Layout,
    device: &Device,
    dtype: DType,
) -> Result<Gpt2> {
    config.validate()?;
    gpt2_burn_backends::check_dtype(device, dtype)?;
    let stored = Stock::new(config, source)?;
    let model = config.init(device)?;
    stored.check(&model, layout, source.total_bytes())?;

    let mut filler = Filler { source, names: stored.names, layout, device, dtype, path: Vec::new(), error: None };
    let model = model.map(&mut filler);
    match filler.error {
        Some(error) => Err(error),
        None => Ok(model),
    }
}

/// What a checkpoint has, under canonical names.
struct Stock {
    infos: BTreeMap<String, TensorInfo>,
    /// Canonical name to the checkpoint's own.
    names: HashMap<String, String>,
    problems: Vec<String>,
}

impl Stock {
    fn new(config: &Gpt2Config, source: &dyn TensorSource) -> Result<Self> {
        let mut stock = Self { infos: BTreeMap::new(), names: HashMap::new(), problems: Vec::new() };
        for (name, info) in source.tensors() {
            let canonical = canonical(&name).to_owned();
            // A tied head is stored by some and left out by others.
            if is_mask(&canonical) || (config.tie_word_embeddings && canonical == HEAD) {
                continue;
            }
            if let Some(other) = stock.names.insert(canonical.clone(), name.clone()) {
                stock.problems.push(format!("`{name}` and `{other}` are the same tensor"));
            }
            stock.infos.insert(canonical, info);
        }
        // Every layer has tensors of its own: more layers than tensors cannot be, and are not allocated.
        if config.n_layer > stock.infos.len() {
            let held = stock.infos.len();
            let reason = format!("{} layers, but the checkpoint holds {held} tensors", config.n_layer);
            return Err(Error::config("n_layer", reason));
        }
        Ok(stock)
    }

    /// Lists every tensor that is missing, unexpected, of another shape or of a type that is no float.
    fn check(&self, model: &Gpt2, layout: Layout, total_bytes: u64) -> Result<()> {
        let mut wanted = Wanted::default();
        model.visit(&mut wanted);
        let mut problems = self.problems.clone();
        let mut bytes = 0_u64;
        for (name, shape) in &wanted.shapes {
            let mut shape = shape.clone();
            if layout.is_transposed(name) {
                shape.reverse();
            }
            match self.infos.get(name) {
                None => problems.push(format!("`{name}` is missing")),
                Some(info) if info.shape != shape => {
                    problems.push(format!("`{name}` has the shape {:?}, not {shape:?}", info.shape));
                }
                Some(info) if info.stored == Stored::Other => {
                    problems.push(format!("`{name}` is not of a float type"));
                }
                Some(info) => {
                    let elements: usize = shape.iter().product();
                    bytes = bytes.saturating_add((elements * info.stored.size()) as u64);
                }
            }
        }
        let unexpected = self.infos.keys().filter(|name| !wanted.shapes.contains_key(*name));
        problems.extend(unexpected.map(|name| format!("`{name}` is unexpected")));
        if problems.is_empty() && bytes > total_bytes {
            // A PyTorch file can describe a tensor as a view that repeats a few stored elements.
            problems.push(format!("the tensors claim {bytes} bytes, the files hold {total_bytes}"));
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Tensors(problems)) }
    }
}

/// Names and shapes of a module's parameters, without drawing their initial values.
#[derive(Default)]
struct Wanted {
    path: Vec<String>,
    shapes: BTreeMap<String, Vec<usize>>,
}

impl ModuleVisitor for Wanted {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.shapes.insert(of_path(&self.path), param.lazy_shape().to_vec());
    }

    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }
}

/// Replaces each parameter by what the checkpoint holds.
struct Filler<'a> {
    source: &'a dyn TensorSource,
    names: HashMap<String, String>,
    layout: Layout,
    device: &'a Device,
    dtype: DType,
    path: Vec<String>,
    /// The first failure; what follows is not read.
    error: Option<Error>,
}

impl Filler<'_> {
    fn read<const D: usize>(&self, name: &str) -> Result<Tensor<D>> {
        let stored = self.names.get(name).map_or(name, String::as_str);
        let data = self.source.read(stored, self.dtype)?;
        let tensor = Tensor::from_data(data, (self.device, self.dtype));
        if !self.layout.is_transposed(name) {
            return Ok(tensor);
        }
        // Read back once, so that the module holds the transposed order itself and not a view of the other.
        let data = tensor.swap_dims(0, 1).try_into_data();
        let data = data.map_err(|error| Error::Execution(error.to_string()))?;
        Ok(Tensor::from_data(data, (self.device, self.dtype)))
    }
}

impl ModuleMapper for Filler<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.error.is_some() {
            return param;
        }
        match self.read(&of_path(&self.path)) {
            Ok(tensor) => param.transform_for_load(tensor, ParamId::new()),
            Err(error) => {
                self.error = Some(error);
                param
            }
        }
    }

    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }
}
