//! Weights into a module: names and shapes are compared first, then tensors are read one at a time.

use std::collections::{BTreeMap, HashMap};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{DType, Device, Tensor};

use super::element::Stored;
use super::names::{HEAD, Layout, canonical, is_linear, is_mask, of_path};
use super::source::{TensorInfo, TensorSource};
use crate::backends::{PackedMatrix, has_kernels};
use crate::model::embedding_dtype;
use crate::{Error, Gpt2, Gpt2Config, Result, WeightFormat};

/// Builds the model and fills it; see [`Checkpoint::load`](super::Checkpoint::load).
pub fn load(
    config: &Gpt2Config,
    source: &dyn TensorSource,
    layout: Layout,
    device: &Device,
    dtype: DType,
) -> Result<Gpt2> {
    gpt2_burn_backends::check_dtype(device, dtype)?;
    let (model, reader) = empty(config, source, layout, device)?;
    reader.read_all(model, |_| Some(dtype))
}

/// As [`load`], with the matrices packed as they are read; see [`Checkpoint::load_packed`](super::Checkpoint::load_packed).
pub fn load_packed(
    config: &Gpt2Config,
    source: &dyn TensorSource,
    layout: Layout,
    device: &Device,
    format: WeightFormat,
) -> Result<Gpt2> {
    gpt2_burn_backends::check_format(device, format)?;
    if !has_kernels(device) {
        return load(config, source, layout, device, format.float());
    }
    let (model, reader) = empty(config, source, layout, device)?;
    let is_packed = |name: &str| match name {
        HEAD => true,
        "wte.weight" => config.tie_word_embeddings,
        name => is_linear(name),
    };
    let model = reader.read_all(model, |name| match name {
        name if is_packed(name) => None,
        "wte.weight" => Some(embedding_dtype(format)),
        _ => Some(DType::F32),
    })?;
    model.pack_with(|matrix| match matrix.is_head {
        true => reader.pack_head(&matrix.name, matrix.param.lazy_shape().dims(), format),
        false => Ok(PackedMatrix::new(reader.read(&matrix.name, format.float())?, format)),
    })
}

/// A model without weights yet, and what reads them: everything that can be checked before has been.
fn empty<'a>(
    config: &Gpt2Config,
    source: &'a dyn TensorSource,
    layout: Layout,
    device: &'a Device,
) -> Result<(Gpt2, Reader<'a>)> {
    config.validate()?;
    let stored = Stock::new(config, source)?;
    let model = config.init(device)?;
    stored.check(&model, layout, source.total_bytes())?;
    Ok((model, Reader { source, names: stored.names, layout, device }))
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

/// Reads tensors by their canonical names.
struct Reader<'a> {
    source: &'a dyn TensorSource,
    names: HashMap<String, String>,
    layout: Layout,
    device: &'a Device,
}

impl Reader<'_> {
    fn stored_name<'n>(&'n self, name: &'n str) -> &'n str {
        self.names.get(name).map_or(name, String::as_str)
    }

    fn read<const D: usize>(&self, name: &str, dtype: DType) -> Result<Tensor<D>> {
        let data = self.source.read(self.stored_name(name), dtype)?;
        let tensor = Tensor::from_data(data, (self.device, dtype));
        if !self.layout.is_transposed(name) {
            return Ok(tensor);
        }
        // Read back once, so that the module holds the transposed order itself and not a view of the other.
        let data = tensor.swap_dims(0, 1).try_into_data();
        let data = data.map_err(|error| Error::Execution(error.to_string()))?;
        Ok(Tensor::from_data(data, (self.device, dtype)))
    }

    /// Replaces each parameter by what the checkpoint holds, in the type that `dtype` gives for its name; without one, it
    /// stays as it is.
    fn read_all(&self, model: Gpt2, dtype: impl Fn(&str) -> Option<DType>) -> Result<Gpt2> {
        let mut loader = Loader { reader: self, dtype, path: Vec::new(), error: None };
        let model = model.map(&mut loader);
        loader.error.map_or(Ok(model), Err)
    }

    /// The head, which is stored as `[vocab_size, n_embd]`, packed: the largest tensor is read a few rows at a time.
    fn pack_head(&self, name: &str, [vocab_size, width]: [usize; 2], format: WeightFormat) -> Result<PackedMatrix> {
        let mut whole: Option<Tensor<2>> = None;
        PackedMatrix::from_column_chunks([width, vocab_size], format, self.device, |columns| {
            let rows = self.source.read_rows(self.stored_name(name), format.float(), columns.clone())?;
            let rows = match (rows, &whole) {
                (Some(data), _) => Tensor::from_data(data, (self.device, format.float())),
                (None, Some(whole)) => whole.clone().narrow(0, columns.start, columns.len()),
                (None, None) => {
                    let read = whole.insert(self.read(name, format.float())?);
                    read.clone().narrow(0, columns.start, columns.len())
                }
            };
            Ok(rows.transpose())
        })
    }
}

/// See [`Reader::read_all`].
struct Loader<'a, F> {
    reader: &'a Reader<'a>,
    dtype: F,
    path: Vec<String>,
    /// The first failure; what follows is not read.
    error: Option<Error>,
}

impl<F: Fn(&str) -> Option<DType>> ModuleMapper for Loader<'_, F> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let name = of_path(&self.path);
        let Some(dtype) = (self.dtype)(&name).filter(|_| self.error.is_none()) else { return param };
        match self.reader.read(&name, dtype) {
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
