//! Which module gets which format: rules over names, as JSON files, as presets, or made by an allocation.

use crate::inventory::{Inventory, Module, Place, Role};
use crate::{Error, Result, formats};
use moellon_tensor::WeightFormat;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Rules for a model; of those that match a module the last one counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Version of this layout: 1.
    pub schema: u32,
    /// Name for receipts and model cards.
    pub name: String,
    /// In order.
    pub rules: Vec<Rule>,
}

/// A format for the modules that a pattern matches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Module name; `*` stands for any characters.
    pub modules: String,
    /// First and last layer that it holds for; all without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<[usize; 2]>,
    /// Name of the format ([`formats::parse`]), or `keep` for the one that the source has.
    pub format: String,
}

impl Rule {
    fn new(modules: &str, format: &str) -> Self {
        Rule { modules: modules.to_owned(), layers: None, format: format.to_owned() }
    }

    fn matches(&self, module: &Module) -> bool {
        let in_layers =
            self.layers.is_none_or(|[first, last]| module.layer.is_some_and(|layer| (first..=last).contains(&layer)));
        in_layers && glob(&self.modules, &module.name)
    }
}

/// Whether `name` is of the form `pattern`.
fn glob(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    true
}

/// Names of the presets, for messages.
pub const PRESETS: &str = "q3a4, v59, keep";

/// In the place of a format: every module keeps the one it has, and no bit is decoded.
const KEEP: &str = "keep";

impl Plan {
    /// Everything in one format (routers and norms keep theirs).
    pub fn uniform(format: WeightFormat) -> Self {
        let name = formats::name(format);
        Plan { schema: 1, rules: vec![Rule::new("*", &name)], name }
    }

    /// A preset: `q3a4` (routed experts affine-3, head affine-6, the rest affine-4: GLM-5.2 with 77 experts in 106 GB) or
    /// `v59` (as q3a4, but the experts of layers 3 to 16 and 63 to 77 in affine-4), or
    /// `keep` (another container and the same numbers).
    ///
    /// # Errors
    /// Names the presets.
    pub fn preset(name: &str) -> Result<Self> {
        let experts = |first, last| Rule {
            modules: "model.layers.*.experts.*".to_owned(),
            layers: Some([first, last]),
            format: "affine-4".to_owned(),
        };
        let mut rules = vec![
            Rule::new("*", "affine-4"),
            Rule::new("lm_head", "affine-6"),
            Rule::new("model.layers.*.experts.*", "affine-3"),
        ];
        match name {
            "q3a4" => {}
            KEEP => rules = vec![Rule::new("*", KEEP)],
            "v59" => rules.extend([experts(3, 16), experts(63, 77)]),
            _ => return Err(Error::mismatch("preset plan", name, PRESETS)),
        }
        Ok(Plan { schema: 1, name: name.to_owned(), rules })
    }

    /// A rule for every module by its full name.
    pub(crate) fn explicit(name: &str, modules: &[(String, WeightFormat)]) -> Self {
        let rules = modules.iter().map(|(module, format)| Rule::new(module, &formats::name(*format))).collect();
        Plan { schema: 1, name: name.to_owned(), rules }
    }

    /// Reads a plan file.
    ///
    /// # Errors
    /// If it cannot be read or is not a plan.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let plan: Plan = serde_json::from_slice(&bytes).map_err(|e| Error::json(path, e))?;
        if plan.schema != 1 {
            return Err(Error::mismatch(format!("{}: schema", path.display()), plan.schema, 1));
        }
        Ok(plan)
    }

    /// Writes the plan, atomically.
    ///
    /// # Errors
    /// If the file system fails.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(self).expect("a plan serialises");
        text.push(b'\n');
        crate::product::write_file(path, &text)
    }

    /// The format of every module of `inventory`, in its order. Matrices whose rows are no whole number of groups get a
    /// smaller group or stay bf16; routers and the indexer's head weights keep what they have.
    ///
    /// # Errors
    /// An unknown format, a rule for one module that does not exist, or a module without a rule.
    pub fn formats(&self, inventory: &Inventory) -> Result<Vec<WeightFormat>> {
        let parsed = self
            .rules
            .iter()
            .map(|rule| {
                let exact = !rule.modules.contains('*');
                // Every plan may speak of the head, which a tied model does not have.
                if exact && rule.modules != "lm_head" && inventory.module(&rule.modules).is_none() {
                    return Err(Error::mismatch(
                        format!("plan {}: module", self.name),
                        &rule.modules,
                        "a module of the model",
                    ));
                }
                if rule.format == KEEP { Ok(None) } else { formats::parse(&rule.format).map(Some) }
            })
            .collect::<Result<Vec<Option<WeightFormat>>>>()?;
        inventory
            .modules
            .iter()
            .map(|module| {
                if stays(module) {
                    return Ok(module.source_format);
                }
                let last = self.rules.iter().zip(&parsed).rev().find(|(rule, _)| rule.matches(module));
                let (_, &format) = last.ok_or_else(|| {
                    Error::mismatch(format!("plan {}: rules for {}", self.name, module.name), 0, "at least 1")
                })?;
                Ok(format.map_or_else(|| kept(module), |format| formats::fit(format, module.cols)))
            })
            .collect()
    }
}

/// The format in which a module keeps its numbers: its own. Of a quantized `kv_b_proj` MLX's layout has two halves, one of
/// them transposed, whose groups lie across those of the source: they are f32.
fn kept(module: &Module) -> WeightFormat {
    match module.place {
        Place::Heads { fused: true, .. } if module.source_format.is_quantized() => WeightFormat::F32,
        Place::Heads { .. } | Place::Linear | Place::Experts { .. } => module.source_format,
    }
}

/// Whether a module keeps its format under every plan: small, and read by a top-k, where an error changes a choice.
pub(crate) fn stays(module: &Module) -> bool {
    module.role == Role::Router || module.name.ends_with(".indexer.weights_proj")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        assert!(glob("*", "lm_head"));
        assert!(glob("model.layers.*.experts.*", "model.layers.3.mlp.experts.gate_proj"));
        assert!(!glob("model.layers.*.experts.*", "model.layers.3.mlp.shared_experts.gate_proj"));
        assert!(glob("*.down_proj", "model.layers.3.mlp.experts.down_proj"));
        assert!(!glob("*.down_proj", "model.layers.3.mlp.down_proj.x"));
        assert!(glob("lm_head", "lm_head") && !glob("lm_head", "lm_head2") && !glob("", "a"));
    }

    #[test]
    fn unknown_presets_and_fields_are_named() {
        assert!(Plan::preset("q5").unwrap_err().to_string().contains("preset plan is q5, expected q3a4, v59, keep"));
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("plan.json");
        std::fs::write(&path, r#"{"schema": 1, "name": "x", "rules": [{"module": "*", "format": "nvfp4"}]}"#)
            .expect("written");
        assert!(Plan::read(&path).unwrap_err().to_string().contains("unknown field `module`"));
        Plan::preset("v59").expect("known").write(&path).expect("written");
        assert_eq!(Plan::read(&path).expect("read"), Plan::preset("v59").expect("known"));
    }
}
