//! [`Gpt2Config`]: the shape of a model, as Hugging Face's `config.json` writes it.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::{Error, ModelShape, Result};

/// The shape of a GPT-2 and what its training needs.
///
/// Reads and writes Hugging Face's `config.json`. A field that is absent has the default of `transformers`, which
/// is the 124M model, except `eos_token_id`: absent means that no token ends a text. Fields that this library does
/// not know are kept in [`extra`](Self::extra) and written back.
///
/// ```
/// use gpt2_burn::Gpt2Config;
///
/// let config = Gpt2Config::from_json(r#"{"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 64}"#)?;
/// assert_eq!(config.head_dim(), 32);
/// assert_eq!(Gpt2Config::published("gpt2-xl").unwrap().num_params(), 1_557_611_200);
/// # Ok::<(), gpt2_burn::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, Value>")]
pub struct Gpt2Config {
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Positions of the context: the most tokens that one sequence can hold.
    pub n_positions: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Transformer blocks.
    pub n_layer: usize,
    /// Attention heads of a block.
    pub n_head: usize,
    /// Hidden width of the MLP; none: 4 x `n_embd`.
    pub n_inner: Option<usize>,
    /// Nonlinearity of the MLP.
    pub activation_function: Activation,
    /// Added to the variance in the layer norms.
    pub layer_norm_epsilon: f64,
    /// Whether the head is the token embedding.
    pub tie_word_embeddings: bool,
    /// Whether linear layers and norms have biases. GPT-2 has; nanoGPT can be trained without.
    #[serde(skip_serializing_if = "is_true")]
    pub bias: bool,
    /// Dropout behind the embeddings, in training.
    pub embd_pdrop: f64,
    /// Dropout on the attention weights, in training.
    pub attn_pdrop: f64,
    /// Dropout at the end of each residual branch, in training.
    pub resid_pdrop: f64,
    /// Standard deviation of the initial weights.
    pub initializer_range: f64,
    /// Tokens that end a text; empty: none does.
    #[serde(serialize_with = "serialize_token_ids")]
    pub eos_token_id: Vec<u32>,
    /// What else the file says.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// Nonlinearity of the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activation {
    /// The tanh approximation, which GPT-2 was trained with: `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    #[serde(rename = "gelu_new", alias = "gelu_pytorch_tanh", alias = "gelu_fast")]
    GeluTanh,
    /// The definition, `0.5 x (1 + erf(x / sqrt 2))`, which nanoGPT trains with.
    #[serde(rename = "gelu", alias = "gelu_python")]
    GeluErf,
}

/// The published sizes: name, layers, heads, width, parameters.
const PUBLISHED: [(&str, usize, usize, usize, usize); 4] = [
    ("gpt2", 12, 12, 768, 124_439_808),
    ("gpt2-medium", 24, 16, 1024, 354_823_168),
    ("gpt2-large", 36, 20, 1280, 774_030_080),
    ("gpt2-xl", 48, 25, 1600, 1_557_611_200),
];

impl Default for Gpt2Config {
    /// The 124M model's shape, without an end-of-text token.
    fn default() -> Self {
        Self {
            vocab_size: 50_257,
            n_positions: 1024,
            n_embd: 768,
            n_layer: 12,
            n_head: 12,
            n_inner: None,
            activation_function: Activation::GeluTanh,
            layer_norm_epsilon: 1e-5,
            tie_word_embeddings: true,
            bias: true,
            embd_pdrop: 0.1,
            attn_pdrop: 0.1,
            resid_pdrop: 0.1,
            initializer_range: 0.02,
            eos_token_id: Vec::new(),
            extra: Map::new(),
        }
    }
}

impl Gpt2Config {
    /// The configuration of a published size: `gpt2`, `gpt2-medium`, `gpt2-large` or `gpt2-xl`.
    pub fn published(name: &str) -> Option<Self> {
        let &(_, n_layer, n_head, n_embd, _) = PUBLISHED.iter().find(|row| row.0 == name)?;
        Some(Self { n_layer, n_head, n_embd, eos_token_id: vec![50_256], ..Self::default() })
    }

    /// The names that [`published`](Self::published) knows, smallest first.
    pub fn published_names() -> impl Iterator<Item = &'static str> {
        PUBLISHED.iter().map(|row| row.0)
    }

    /// Reads the text of a `config.json` and checks it.
    ///
    /// # Errors
    ///
    /// [`Error::ConfigSyntax`] for text that is not such a file, [`Error::Config`] as in [`validate`](Self::validate).
    pub fn from_json(text: &str) -> Result<Self> {
        Self::parse(text, "text")
    }

    /// As [`from_json`](Self::from_json), with a name for the text in errors.
    pub(crate) fn parse(text: &str, origin: &str) -> Result<Self> {
        let syntax = |source| Error::ConfigSyntax { origin: origin.to_owned(), source };
        let fields: Map<String, Value> = serde_json::from_str(text).map_err(syntax)?;
        let config = Self::try_from(fields)?;
        config.validate()?;
        Ok(config)
    }

    /// The text of a `config.json` that `transformers` reads as the same model.
    pub fn to_json(&self) -> String {
        let mut config = self.clone();
        config.extra.entry("model_type").or_insert_with(|| "gpt2".into());
        config.extra.entry("architectures").or_insert_with(|| vec!["GPT2LMHeadModel"].into());
        // Absent means 50256 to `transformers`, whatever the vocabulary.
        config.extra.entry("bos_token_id").or_insert_with(|| self.eos_token_id.first().copied().into());
        serde_json::to_string_pretty(&config).expect("a config holds only JSON values")
    }

    /// Checks that a model of this shape exists and fits the address space, before anything is allocated.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] that names the first field that is zero, does not divide, overflows, is not a number, or
    /// changes the function in a way that this library does not compute.
    pub fn validate(&self) -> Result<()> {
        self.check_extra()?;
        ModelShape::from(self).validate()?;
        if !(self.layer_norm_epsilon.is_finite() && self.layer_norm_epsilon > 0.0) {
            let reason = format!("{} is not a positive number", self.layer_norm_epsilon);
            return Err(Error::config("layer_norm_epsilon", reason));
        }
        if !(self.initializer_range.is_finite() && self.initializer_range >= 0.0) {
            let reason = format!("{} is not a number from 0 up", self.initializer_range);
            return Err(Error::config("initializer_range", reason));
        }
        for (field, p) in
            [("embd_pdrop", self.embd_pdrop), ("attn_pdrop", self.attn_pdrop), ("resid_pdrop", self.resid_pdrop)]
        {
            if !(0.0..1.0).contains(&p) {
                return Err(Error::config(field, format!("{p} is not in [0, 1)")));
            }
        }
        Ok(())
    }

    /// Refuses what `transformers` would compute differently from us.
    fn check_extra(&self) -> Result<()> {
        if let Some(model_type) = self.extra.get("model_type").filter(|value| !value.is_null())
            && model_type != "gpt2"
        {
            return Err(Error::config("model_type", format!("{model_type} is not \"gpt2\"")));
        }
        for (field, usual) in
            [("scale_attn_weights", true), ("scale_attn_by_inverse_layer_idx", false), ("add_cross_attention", false)]
        {
            match self.extra.get(field) {
                None | Some(Value::Null) => {}
                Some(value) if *value == usual => {}
                Some(value) => {
                    return Err(Error::config(field, format!("{value} is not supported, only {usual} is")));
                }
            }
        }
        Ok(())
    }

    /// Hidden width of the MLP.
    pub fn inner(&self) -> usize {
        ModelShape::from(self).inner()
    }

    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.n_embd / self.n_head.max(1)
    }

    /// Number of parameters, for a [valid](Self::validate) configuration; a tied head counts once.
    pub fn num_params(&self) -> usize {
        ModelShape::from(self).num_params()
    }
}

/// Its sizes.
impl From<&Gpt2Config> for ModelShape {
    fn from(config: &Gpt2Config) -> Self {
        Self {
            vocab_size: config.vocab_size,
            n_positions: config.n_positions,
            n_embd: config.n_embd,
            n_layer: config.n_layer,
            n_head: config.n_head,
            n_inner: config.n_inner,
            tie_word_embeddings: config.tie_word_embeddings,
            bias: config.bias,
        }
    }
}

/// Field by field, so that an error can name the field.
impl TryFrom<Map<String, Value>> for Gpt2Config {
    type Error = Error;

    fn try_from(mut fields: Map<String, Value>) -> Result<Self> {
        let default = Self::default();
        let fields = &mut fields;
        Ok(Self {
            vocab_size: take(fields, "vocab_size", default.vocab_size)?,
            n_positions: take(fields, "n_positions", default.n_positions)?,
            n_embd: take(fields, "n_embd", default.n_embd)?,
            n_layer: take(fields, "n_layer", default.n_layer)?,
            n_head: take(fields, "n_head", default.n_head)?,
            n_inner: take(fields, "n_inner", default.n_inner)?,
            activation_function: take(fields, "activation_function", default.activation_function)?,
            layer_norm_epsilon: take(fields, "layer_norm_epsilon", default.layer_norm_epsilon)?,
            tie_word_embeddings: take(fields, "tie_word_embeddings", default.tie_word_embeddings)?,
            bias: take(fields, "bias", default.bias)?,
            embd_pdrop: take(fields, "embd_pdrop", default.embd_pdrop)?,
            attn_pdrop: take(fields, "attn_pdrop", default.attn_pdrop)?,
            resid_pdrop: take(fields, "resid_pdrop", default.resid_pdrop)?,
            initializer_range: take(fields, "initializer_range", default.initializer_range)?,
            eos_token_id: match take(fields, "eos_token_id", None)? {
                None => Vec::new(),
                Some(OneOrMany::One(id)) => vec![id],
                Some(OneOrMany::Many(ids)) => ids,
            },
            extra: std::mem::take(fields),
        })
    }
}

/// Takes a field out of what a file says.
fn take<T: DeserializeOwned>(fields: &mut Map<String, Value>, field: &'static str, default: T) -> Result<T> {
    let Some(value) = fields.remove(field) else { return Ok(default) };
    let shown = value.to_string();
    serde_json::from_value(value).map_err(|error| Error::config(field, format!("{shown} is not usable: {error}")))
}

fn is_true(value: &bool) -> bool {
    *value
}

/// `eos_token_id` is absent, null, a number or a list of numbers.
#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

fn serialize_token_ids<S: Serializer>(ids: &[u32], serializer: S) -> Result<S::Ok, S::Error> {
    match ids {
        [] => serializer.serialize_none(),
        [id] => serializer.serialize_some(id),
        many => many.serialize(serializer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field_of(text: &str) -> String {
        match Gpt2Config::from_json(text) {
            Err(Error::Config { field, .. }) => field.to_owned(),
            other => panic!("expected a config error for {text}, got {other:?}"),
        }
    }

    #[test]
    fn published_sizes_have_their_parameter_counts() {
        for (name, .., params) in PUBLISHED {
            let config = Gpt2Config::published(name).unwrap();
            config.validate().unwrap();
            assert_eq!(config.num_params(), params, "{name}");
        }
        assert!(Gpt2Config::published("gpt3").is_none());
        assert_eq!(Gpt2Config::published_names().count(), 4);
    }

    #[test]
    fn fields_that_change_the_function_are_named() {
        assert_eq!(field_of(r#"{"model_type": "llama"}"#), "model_type");
        assert_eq!(field_of(r#"{"scale_attn_weights": false}"#), "scale_attn_weights");
        assert_eq!(field_of(r#"{"scale_attn_by_inverse_layer_idx": true}"#), "scale_attn_by_inverse_layer_idx");
        assert_eq!(field_of(r#"{"add_cross_attention": true}"#), "add_cross_attention");
        assert_eq!(field_of(r#"{"activation_function": "relu"}"#), "activation_function");
        assert_eq!(field_of(r#"{"n_embd": 10, "n_head": 3}"#), "n_head");
        assert_eq!(field_of(r#"{"n_layer": 0}"#), "n_layer");
        assert_eq!(field_of(r#"{"layer_norm_epsilon": 0}"#), "layer_norm_epsilon");
        assert_eq!(field_of(r#"{"resid_pdrop": 1.0}"#), "resid_pdrop");
    }

    #[test]
    fn sizes_that_overflow_are_named_before_anything_is_allocated() {
        assert_eq!(field_of(r#"{"vocab_size": 99999999999}"#), "vocab_size");
        assert_eq!(
            field_of(r#"{"vocab_size": 2147483647, "n_embd": 2147483647, "n_head": 1, "n_inner": 1}"#),
            "vocab_size"
        );
        let wide = r#"{"n_embd": 1073741824, "n_head": 1, "vocab_size": 1, "n_positions": 1, "n_inner": 1}"#;
        assert_eq!(field_of(wide), "n_embd");
        let deep = r#"{"n_layer": 2000000000, "n_embd": 65536, "n_head": 1}"#;
        assert_eq!(field_of(deep), "n_embd");
    }

    #[test]
    fn eos_may_be_absent_null_one_or_many() {
        let eos = |text: &str| Gpt2Config::from_json(text).unwrap().eos_token_id;
        assert!(eos("{}").is_empty());
        assert!(eos(r#"{"eos_token_id": null}"#).is_empty());
        assert_eq!(eos(r#"{"eos_token_id": 7}"#), [7]);
        assert_eq!(eos(r#"{"eos_token_id": [7, 8]}"#), [7, 8]);
    }

    #[test]
    fn a_file_survives_reading_and_writing() {
        let text = r#"{"model_type": "gpt2", "n_embd": 32, "n_head": 2, "activation_function": "gelu",
            "eos_token_id": 5, "task_specific_params": {"a": [1, 2.5, null]}, "summary_type": "cls_index"}"#;
        let config = Gpt2Config::from_json(text).unwrap();
        assert_eq!(config.activation_function, Activation::GeluErf);
        assert_eq!(config.extra["task_specific_params"]["a"][1], 2.5);
        assert_eq!(Gpt2Config::from_json(&config.to_json()).unwrap().extra["summary_type"], "cls_index");
        assert_eq!(Gpt2Config::from_json(&config.to_json()).unwrap().extra["bos_token_id"], 5);
        let no_bias = Gpt2Config { bias: false, ..config };
        assert!(!Gpt2Config::from_json(&no_bias.to_json()).unwrap().bias);
    }

    #[test]
    fn text_that_is_no_config_is_an_error() {
        for text in ["", "[]", "{", "3"] {
            assert!(matches!(Gpt2Config::from_json(text), Err(Error::ConfigSyntax { .. })), "{text}");
        }
        for (text, field) in [
            (r#"{"n_embd": "wide"}"#, "n_embd"),
            (r#"{"n_layer": -1}"#, "n_layer"),
            (r#"{"n_head": 18446744073709551616}"#, "n_head"),
            (r#"{"attn_pdrop": null}"#, "attn_pdrop"),
            (r#"{"eos_token_id": -1}"#, "eos_token_id"),
        ] {
            assert_eq!(field_of(text), field);
        }
    }
}
