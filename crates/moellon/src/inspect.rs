//! `moellon inspect`: what a model is made of, what a token reads, and the ceiling that follows.

use crate::cli::InspectOptions;
use crate::model_source::ModelSource;
use crate::table;
use anyhow::Result;
use moellon_model::ModelConfig;
use moellon_model::account::{Account, Component, Sum, cache_bytes_per_token, cache_bytes_read};
use moellon_model::config::{Attention, IndexSource};
use moellon_model::weights::Weights;
use moellon_ops::CacheDtype;
use serde_json::{Value, json};

/// Runs the command.
pub fn run(options: &InspectOptions) -> Result<()> {
    let source = ModelSource::open(options.model.model.as_deref())?;
    let weights = Weights::describe(&source.config, &source.checkpoint)?;
    let (bandwidth_gb_s, measured) = match options.bandwidth {
        Some(given) => {
            anyhow::ensure!(
                given.is_finite() && given > 0.0,
                "--bandwidth is {given}, expected a positive number of GB/s"
            );
            (given, false)
        }
        None => (crate::doctor::measure_bandwidth(None)?.gb_per_s, true),
    };
    let context = options.context.unwrap_or(source.config.max_position_embeddings.min(8192));
    let view = View { source: &source, weights: &weights, context, bandwidth_gb_s, measured };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&view.json())?);
    } else {
        view.print();
    }
    Ok(())
}

struct View<'a> {
    source: &'a ModelSource,
    weights: &'a Weights,
    context: usize,
    bandwidth_gb_s: f64,
    measured: bool,
}

impl View<'_> {
    fn account(&self) -> &Account {
        &self.weights.account
    }

    fn config(&self) -> &ModelConfig {
        &self.source.config
    }

    /// Bytes that one decoded token reads: weights of the trunk and cache at `context`.
    fn bytes_per_token(&self) -> f64 {
        self.account().trunk().bytes_per_token + self.cache_bytes()
    }

    fn cache_bytes(&self) -> f64 {
        cache_bytes_read(self.config(), CacheDtype::Bf16, self.context) as f64
    }

    fn ceiling_tok_s(&self) -> f64 {
        self.bandwidth_gb_s * 1e9 / self.bytes_per_token()
    }

    fn parts(&self) -> Vec<(Component, Sum, Vec<String>)> {
        let part = |c| (c, self.account().component(c), self.account().formats(c));
        Component::ALL
            .into_iter()
            .map(part)
            .filter(|(_, sum, _)| sum.parameters > 0 || sum.bytes_per_token > 0.0)
            .collect()
    }

    fn print(&self) {
        let config = self.config();
        let (trunk, mtp) = (self.account().trunk(), self.account().mtp());
        println!("{}", self.source.name);
        println!(
            "architecture        {}, {} layers, hidden {}, vocabulary {}",
            config.architecture.model_type(),
            config.layers.len(),
            config.hidden_size,
            config.vocab_size
        );
        println!("attention           {}", attention(config));
        println!("experts per layer   {}", runs(&self.trunk_experts()));
        println!(
            "                    {} a token{}",
            config.moe.num_experts_per_tok,
            if config.moe.shared_intermediate_size.is_some() { " and a shared one" } else { "" }
        );
        println!("mtp                 {}", self.mtp_line());
        println!(
            "parameters          {} ({} active a token){}",
            table::count(trunk.parameters as f64),
            table::count(trunk.active_parameters),
            if mtp.parameters > 0 { format!(", mtp {}", table::count(mtp.parameters as f64)) } else { String::new() }
        );
        println!(
            "files               {}, {:.3} bits a weight",
            table::bytes(self.source.checkpoint.size_bytes() as f64),
            self.bits_per_weight()
        );
        println!(
            "context             {} positions; cache {} a position (bf16)\n",
            config.max_position_embeddings,
            table::bytes(cache_bytes_per_token(config, CacheDtype::Bf16) as f64)
        );
        let total = self.bytes_per_token();
        let row = |name: &str, size: f64, read: f64, formats: String| {
            vec![
                name.to_owned(),
                table::bytes(size),
                table::bytes(read),
                format!("{:.1} %", 100.0 * read / total),
                formats,
            ]
        };
        let mut rows: Vec<Vec<String>> = self
            .parts()
            .into_iter()
            .map(|(c, sum, formats)| {
                row(&c.name().replace('_', " "), sum.size_bytes as f64, sum.bytes_per_token, formats.join(", "))
            })
            .collect();
        rows.push(row(
            &format!("cache at {}", self.context),
            self.context as f64 * cache_bytes_per_token(config, CacheDtype::Bf16) as f64,
            self.cache_bytes(),
            "bf16".to_owned(),
        ));
        rows.push(row("total", trunk.size_bytes as f64, total, String::new()));
        table::print(&["component", "size", "read a token", "share", "format"], &rows);
        println!(
            "\nceiling             {:.1} tok/s at batch 1 and {:.1} GB/s{}",
            self.ceiling_tok_s(),
            self.bandwidth_gb_s,
            if self.measured { " (read bandwidth measured now on this machine)" } else { "" }
        );
    }

    fn trunk_experts(&self) -> Vec<usize> {
        self.weights.experts_per_layer().into_iter().take(self.config().layers.len()).collect()
    }

    fn mtp_experts(&self) -> Vec<usize> {
        self.weights.experts_per_layer().into_iter().skip(self.config().layers.len()).collect()
    }

    fn mtp_line(&self) -> String {
        match (self.config().num_mtp_layers, self.weights.mtp.len()) {
            (0, _) => "none".to_owned(),
            (promised, 0) => format!("config.json promises {promised}, the files have none: no self-speculation"),
            (_, found) => format!("{found} layer, experts {}", runs(&self.mtp_experts())),
        }
    }

    fn bits_per_weight(&self) -> f64 {
        let all = self.account().sum(|_| true);
        all.size_bytes as f64 * 8.0 / all.parameters as f64
    }

    fn json(&self) -> Value {
        let config = self.config();
        let (trunk, mtp) = (self.account().trunk(), self.account().mtp());
        let components: serde_json::Map<String, Value> = self
            .parts()
            .into_iter()
            .map(|(c, sum, formats)| {
                let value = json!({
                    "parameters": sum.parameters,
                    "size_bytes": sum.size_bytes,
                    "active_parameters": sum.active_parameters.round(),
                    "bytes_per_token": sum.bytes_per_token.round(),
                    "formats": formats,
                });
                (c.name().to_owned(), value)
            })
            .collect();
        json!({
            "model": self.source.name,
            "architecture": config.architecture.model_type(),
            "num_layers": config.layers.len(),
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_position_embeddings,
            "attention": attention(config),
            "experts_per_layer": self.trunk_experts(),
            "num_experts_per_tok": config.moe.num_experts_per_tok,
            "mtp": { "layers_in_config": config.num_mtp_layers, "layers_in_files": self.weights.mtp.len(), "experts": self.mtp_experts(), "parameters": mtp.parameters, "size_bytes": mtp.size_bytes, "bytes_per_token": mtp.bytes_per_token.round() },
            "parameters": trunk.parameters + mtp.parameters,
            "active_parameters": trunk.active_parameters.round(),
            "file_bytes": self.source.checkpoint.size_bytes(),
            "bits_per_weight": self.bits_per_weight(),
            "components": components,
            "context": self.context,
            "cache_bytes_per_position": cache_bytes_per_token(config, CacheDtype::Bf16),
            "cache_bytes_per_token": self.cache_bytes(),
            "bytes_per_token": self.bytes_per_token().round(),
            "bandwidth_gb_s": self.bandwidth_gb_s,
            "bandwidth_measured": self.measured,
            "ceiling_tok_s": self.ceiling_tok_s(),
        })
    }
}

fn attention(config: &ModelConfig) -> String {
    let kind = match config.attention {
        Attention::Gqa(g) => format!("GQA, {} heads over {} of {}", g.num_heads, g.num_kv_heads, g.head_dim),
        Attention::Mla(m) => format!("MLA, {} heads, latent {} + {}", m.num_heads, m.kv_lora_rank, m.qk_rope_head_dim),
    };
    match config.indexer {
        None => kind,
        Some(indexer) => {
            let own = config.layers.iter().filter(|l| l.index == IndexSource::Own).count();
            format!(
                "{kind}, sparse: top {} of {} indexers on {own} of {} layers",
                indexer.topk,
                indexer.num_heads,
                config.layers.len()
            )
        }
    }
}

/// `3 x dense, 75 x 77`.
fn runs(experts: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for count in experts {
        match runs.last_mut() {
            Some((value, length)) if value == count => *length += 1,
            _ => runs.push((*count, 1)),
        }
    }
    let name = |count: usize| if count == 0 { "dense".to_owned() } else { count.to_string() };
    runs.into_iter().map(|(count, length)| format!("{length} x {}", name(count))).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    #[test]
    fn equal_layers_are_one_run() {
        assert_eq!(super::runs(&[0, 0, 0, 77, 77, 256]), "3 x dense, 2 x 77, 1 x 256");
    }
}
