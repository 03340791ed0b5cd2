//! How checkpoints name tensors, and how the module does.

use crate::model::LINEARS;

/// Where a checkpoint comes from decides how its linear layers lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Linear weights are `[in, out]` (GPT-2's `Conv1D`), as in the module.
    HuggingFace,
    /// Linear weights are `[out, in]` (PyTorch's `Linear`).
    #[cfg_attr(not(feature = "files"), allow(dead_code))]
    NanoGpt,
}

impl Layout {
    /// Whether the tensor of this name has to be transposed on its way into the module.
    pub fn is_transposed(self, name: &str) -> bool {
        self == Self::NanoGpt && is_linear(name)
    }
}

/// Whether the tensor of this name is the matrix of a block's linear layer.
pub fn is_linear(name: &str) -> bool {
    name.strip_suffix(".weight").is_some_and(|name| LINEARS.iter().any(|linear| name.ends_with(linear)))
}

/// The head's name, without prefix in every layout.
pub const HEAD: &str = "lm_head.weight";

/// The name without what wrappers put before it: `_orig_mod.` (a compiled module), `module.` (a distributed one) and
/// `transformer.` (the part of a language model that is not the head).
pub fn canonical(name: &str) -> &str {
    ["_orig_mod.", "module.", "_orig_mod.", "transformer."]
        .iter()
        .fold(name, |name, prefix| name.strip_prefix(prefix).unwrap_or(name))
}

/// Whether a canonical name is that of a mask: older checkpoints store them with each attention layer.
pub fn is_mask(name: &str) -> bool {
    let of_attention = name.strip_suffix(".attn.bias").or(name.strip_suffix(".attn.masked_bias"));
    let layer = of_attention.and_then(|name| name.strip_prefix("h."));
    layer.is_some_and(|layer| !layer.is_empty() && layer.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The canonical name of the parameter at this path through the module: burn's norms call weight and bias gamma and
/// beta.
pub fn of_path(path: &[String]) -> String {
    let name = |part: &String| match part.as_str() {
        "gamma" => "weight".to_owned(),
        "beta" => "bias".to_owned(),
        other => other.to_owned(),
    };
    path.iter().map(name).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_taken_off() {
        for name in ["wte.weight", "transformer.wte.weight", "_orig_mod.transformer.wte.weight"] {
            assert_eq!(canonical(name), "wte.weight");
        }
        assert_eq!(canonical("module._orig_mod.lm_head.weight"), HEAD);
    }

    #[test]
    fn masks_are_told_from_biases() {
        assert!(is_mask("h.0.attn.bias") && is_mask("h.11.attn.masked_bias"));
        assert!(!is_mask("h.0.attn.c_attn.bias") && !is_mask("h.x.attn.bias") && !is_mask("attn.bias"));
    }
}
