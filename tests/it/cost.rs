//! The arithmetic of inference, as far as it concerns models: it is that of their sizes, and its floating-point operations are those
//! of a count that walks the shapes of a real one.

use crate::common::{device, small_config};
use gpt2_burn::burn::module::{Module, ModuleVisitor, Param};
use gpt2_burn::burn::tensor::{BoolStore, DType, Tensor};
use gpt2_burn::cost::{Cost, Counted, ElementBytes, Hardware, Part, Pass, Precision, SpeculationCost};
use gpt2_burn::{Error, Gpt2, Gpt2Config, ModelShape};
use proptest::prelude::*;

#[test]
fn a_models_costs_are_those_of_its_sizes_and_types() {
    let config = Gpt2Config {
        n_inner: Some(50),
        tie_word_embeddings: false,
        bias: false,
        ..Gpt2Config::published("gpt2-medium").unwrap()
    };
    let shape = ModelShape::from(&config);
    let precision = Precision { weights: DType::I8, activations: DType::F32, cache: DType::F16 };
    let element_bytes = ElementBytes { weights: 1, activations: 4, cache: 2 };
    assert_eq!(ElementBytes::try_from(precision).unwrap(), element_bytes);
    let core = gpt2_burn_core::cost::Cost::new(shape, element_bytes).unwrap().counting(Counted::kernels());
    let cost = Cost::new(&config, precision).unwrap().counting(Counted::kernels());
    assert_eq!((cost.config(), cost.precision(), cost.counted()), (&config, precision, Counted::kernels()));

    let t4 = Hardware::preset("t4").unwrap();
    for pass in [Pass::naive(3, 500), Pass::decode(2, 700), Pass::verify(1, 100, 4)] {
        assert_eq!(cost.terms(pass).unwrap(), core.terms(pass).unwrap());
        assert_eq!(cost.work(pass).unwrap(), core.work(pass).unwrap());
        assert_eq!(cost.work_of(Part::Mlp, pass).unwrap(), core.work_of(Part::Mlp, pass).unwrap());
        assert_eq!(cost.seconds(&t4, pass).unwrap(), core.seconds(&t4, pass).unwrap());
        assert_eq!(cost.memory(pass).unwrap(), core.memory(pass).unwrap());
        assert_eq!(cost.fits(&t4, pass).unwrap(), core.fits(&t4, pass).unwrap());
    }
    assert_eq!((cost.naive(), cost.cached()), (core.naive(), core.cached()));
    assert_eq!(cost.naive_of(Part::Attention), core.naive_of(Part::Attention));
    assert_eq!(cost.cached_of(Part::Attention), core.cached_of(Part::Attention));
    assert_eq!(cost.kv_speedup(&t4, 4, 600).unwrap(), core.kv_speedup(&t4, 4, 600).unwrap());
    assert_eq!(cost.kv_bytes_per_layer(4, 600), core.kv_bytes_per_layer(4, 600));
    assert_eq!(cost.kv_bytes(4, 600), core.kv_bytes(4, 600));
    assert_eq!(cost.parameter_bytes(), config.num_params() as f64);
    assert_eq!(core.parameter_bytes(), config.num_params() as f64);
    let everything = Cost::new(&config, DType::BF16).unwrap();
    assert_eq!((everything.precision(), everything.counted()), (DType::BF16.into(), Counted::all()));
    assert_eq!(everything.parameter_bytes(), 2.0 * config.num_params() as f64);
}

#[test]
fn models_and_types_that_cannot_be_are_errors() {
    for dtype in [DType::Bool(BoolStore::Native), DType::I8] {
        assert!(matches!(Cost::new(&small_config(), dtype), Err(Error::Mismatch { .. })));
    }
    assert!(Cost::new(&small_config(), Precision { weights: DType::I8, ..DType::F32.into() }).is_ok());
    assert!(matches!(Cost::new(&Gpt2Config { n_head: 5, ..small_config() }, DType::F32), Err(Error::Config { .. })));
    // What the core finds is an error of the library.
    let cost = Cost::new(&small_config(), DType::F32).unwrap();
    assert!(matches!(cost.work(Pass::naive(0, 1)), Err(Error::EmptyBatch)));
    assert!(matches!(cost.memory(Pass::decode(1, 0)), Err(Error::Mismatch { .. })));
    assert!(matches!(cost.terms(Pass::naive(1, 25)), Err(Error::ContextOverflow { .. })));
    let speculation = || -> gpt2_burn::Result<SpeculationCost> { Ok(SpeculationCost::new(1.5, 0.1)?) };
    assert!(matches!(speculation(), Err(Error::Mismatch { what: "acceptance rate", .. })));
}

/// Shapes of the matrices in the blocks, and of the head, as the module holds them.
#[derive(Default)]
struct Matrices {
    path: Vec<String>,
    blocks: Vec<[usize; 2]>,
    head: Option<[usize; 2]>,
}

impl ModuleVisitor for Matrices {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let shape = param.lazy_shape();
        let Ok(shape) = <[usize; 2]>::try_from(shape.to_vec()) else { return };
        let path = self.path.join(".");
        match () {
            () if path.contains("c_attn") || path.contains("c_proj") || path.contains("c_fc") => {
                self.blocks.push(shape)
            }
            // A head of its own comes behind the embedding that it would be.
            () if path.starts_with("wte") || path.starts_with("lm_head") => self.head = Some(shape),
            () => assert!(path.starts_with("wpe"), "{path}"),
        }
    }
}

/// FLOPs of a pass, counted one multiply-add after the other: a vector through each matrix, a query to each key.
fn counted_flops(model: &Gpt2, pass: Pass, counted: Counted) -> f64 {
    let mut matrices = Matrices::default();
    model.visit(&mut matrices);
    let config = model.config();
    let mut multiply_adds = 0_u64;
    let of = |matrices: &[[usize; 2]]| matrices.iter().map(|[inputs, outputs]| (inputs * outputs) as u64).sum::<u64>();
    let (others, last) = matrices.blocks.split_at(4 * (config.n_layer - 1));
    for _row in 0..pass.batch {
        for query in 0..pass.new {
            let is_in_last = counted.whole_last_layer || query >= pass.new - pass.logits;
            // Of what nobody wants, the last layer makes a key and a value: two thirds of its first matrix.
            multiply_adds += of(others) + if is_in_last { of(last) } else { of(&last[..1]) / 3 * 2 };
            let layers = if is_in_last { config.n_layer } else { config.n_layer - 1 };
            for key in 0..pass.context_len + pass.new {
                if counted.causal && key > pass.context_len + query {
                    continue;
                }
                for _layer_and_head in 0..layers * config.n_head {
                    multiply_adds += 2 * config.head_dim() as u64; // a score, and a share of a value
                }
            }
            if counted.head && query >= pass.new - pass.logits {
                let [vocab, width] = matrices.head.unwrap();
                multiply_adds += (vocab * width) as u64;
            }
        }
    }
    2.0 * multiply_adds as f64
}

prop_compose! {
    fn configs()(
        head_dim in 1_usize..6,
        n_head in 1_usize..4,
        n_layer in 1_usize..4,
        n_inner in proptest::option::of(1_usize..30),
        vocab_size in 1_usize..40,
        tie_word_embeddings: bool,
        bias: bool,
    ) -> Gpt2Config {
        let n_embd = head_dim * n_head;
        Gpt2Config { n_embd, n_head, n_layer, n_inner, vocab_size, tie_word_embeddings, bias, ..small_config() }
    }
}

prop_compose! {
    fn counteds()(on: [bool; 9]) -> Counted {
        let [head, embeddings, norms, elementwise, biases, activations, scores, causal, whole_last_layer] = on;
        Counted { head, embeddings, norms, elementwise, biases, activations, scores, causal, whole_last_layer }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn flops_are_those_counted_by_walking_a_models_shapes(
        config in configs(),
        counted in counteds(),
        batch in 1_usize..4,
        context_len in 0_usize..10,
        new in 1_usize..14,
        logits in 0_usize..14,
    ) {
        let cost = Cost::new(&config, DType::F32).unwrap().counting(counted);
        let model = config.init(&device()).unwrap();
        for pass in [
            Pass { batch, context_len, new, logits: logits.min(new), cached: true },
            Pass::naive(batch, new),
            Pass::decode(batch, new),
            Pass::verify(batch, context_len, new),
        ] {
            prop_assert_eq!(cost.work(pass).unwrap().flops, counted_flops(&model, pass, counted));
        }
    }
}
