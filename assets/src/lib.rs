#![doc = include_str!("../README.md")]
#![no_std]

/// A model in memory, in Hugging Face's layout.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// The text of `config.json`.
    pub config: &'static str,
    /// The bytes of `model.safetensors`, in f16.
    pub weights: &'static [u8],
    /// The bytes of `tokenizer.json`.
    pub tokenizer: &'static [u8],
}

/// The model whose text is wanted.
pub const TARGET: Model = Model {
    config: include_str!("../target/config.json"),
    weights: include_bytes!("../target/model.safetensors"),
    tokenizer: include_bytes!("../target/tokenizer.json"),
};

/// A smaller model that learned to say what the target would, and shares its tokenizer.
pub const DRAFT: Model = Model {
    config: include_str!("../draft/config.json"),
    weights: include_bytes!("../draft/model.safetensors"),
    tokenizer: include_bytes!("../draft/tokenizer.json"),
};

/// What is known of the models: `README.md`.
pub const CARD: &str = include_str!("../README.md");

/// The last tenth of the text that both were trained on the rest of: neither has seen it.
pub const HELD_OUT: &str = include_str!("../held_out.txt");
