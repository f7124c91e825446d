//! Parameters and bytes by component: what a file holds, and what one decoded token must read. The arithmetic behind
//! every ceiling that `inspect` states; the profiler's counts are checked against it.

use crate::config::{Attention, IndexSource, ModelConfig};
use moellon_ops::CacheDtype;

/// Parts of a model, as tables list them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Component {
    /// Embedding table: one row a token.
    Embedding,
    /// Attention projections.
    Attention,
    /// Indexers of sparse attention.
    Indexer,
    /// Dense feed-forwards.
    DenseFfn,
    /// Shared experts.
    SharedExperts,
    /// Routers.
    Router,
    /// Routed experts.
    RoutedExperts,
    /// Norms, sinks and other vectors.
    Norms,
    /// Head.
    Head,
}

impl Component {
    /// All of them, in table order.
    pub const ALL: [Component; 9] = [
        Component::Embedding,
        Component::Attention,
        Component::Indexer,
        Component::DenseFfn,
        Component::SharedExperts,
        Component::Router,
        Component::RoutedExperts,
        Component::Norms,
        Component::Head,
    ];

    /// The name that tables and JSON use.
    pub const fn name(self) -> &'static str {
        match self {
            Component::Embedding => "embedding",
            Component::Attention => "attention",
            Component::Indexer => "indexer",
            Component::DenseFfn => "dense_ffn",
            Component::SharedExperts => "shared_experts",
            Component::Router => "router",
            Component::RoutedExperts => "routed_experts",
            Component::Norms => "norms",
            Component::Head => "head",
        }
    }
}

/// One weight as it was counted.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Which part of the model.
    pub component: Component,
    /// Whether it belongs to an MTP layer.
    pub mtp: bool,
    /// Name of the format, `f32` for vectors.
    pub format: String,
    /// Numbers in it.
    pub parameters: u64,
    /// Bytes of them, scales included.
    pub size_bytes: u64,
    /// Numbers that one decoded token uses.
    pub active_parameters: f64,
    /// Bytes that one decoded token reads.
    pub bytes_per_token: f64,
}

/// Everything that was counted.
#[derive(Debug, Clone, Default)]
pub struct Account {
    /// One entry a weight.
    pub entries: Vec<Entry>,
}

/// Sums over some entries.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sum {
    /// Numbers.
    pub parameters: u64,
    /// Bytes.
    pub size_bytes: u64,
    /// Numbers that one decoded token uses.
    pub active_parameters: f64,
    /// Bytes that one decoded token reads.
    pub bytes_per_token: f64,
}

impl Account {
    /// Sum over the entries that `select` picks.
    pub fn sum(&self, select: impl Fn(&Entry) -> bool) -> Sum {
        self.entries.iter().filter(|e| select(e)).fold(Sum::default(), |sum, e| Sum {
            parameters: sum.parameters + e.parameters,
            size_bytes: sum.size_bytes + e.size_bytes,
            active_parameters: sum.active_parameters + e.active_parameters,
            bytes_per_token: sum.bytes_per_token + e.bytes_per_token,
        })
    }

    /// The trunk: everything that plain decoding uses.
    pub fn trunk(&self) -> Sum {
        self.sum(|e| !e.mtp)
    }

    /// The MTP layers (the head, which they share, not counted again).
    pub fn mtp(&self) -> Sum {
        self.sum(|e| e.mtp)
    }

    /// One component of the trunk.
    pub fn component(&self, component: Component) -> Sum {
        self.sum(|e| !e.mtp && e.component == component)
    }

    /// Format names of one component of the trunk, the one with the most bytes first.
    pub fn formats(&self, component: Component) -> Vec<String> {
        let mut formats: Vec<(String, u64)> = Vec::new();
        for entry in self.entries.iter().filter(|e| !e.mtp && e.component == component) {
            match formats.iter_mut().find(|(name, _)| *name == entry.format) {
                Some((_, bytes)) => *bytes += entry.size_bytes,
                None => formats.push((entry.format.clone(), entry.size_bytes)),
            }
        }
        formats.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        formats.into_iter().map(|(name, _)| name).collect()
    }
}

/// Bytes of cache that one position of a sequence takes, all layers of the trunk together.
pub fn cache_bytes_per_token(config: &ModelConfig, dtype: CacheDtype) -> u64 {
    let (main, index) = config.cache_widths();
    let own = config.layers.iter().filter(|l| l.index == IndexSource::Own).count();
    ((config.layers.len() * main + own * index.unwrap_or(0)) * dtype.size_bytes()) as u64
}

/// Bytes of cache that decoding one token reads after `context` positions.
pub fn cache_bytes_read(config: &ModelConfig, dtype: CacheDtype, context: usize) -> u64 {
    let (main, index) = config.cache_widths();
    let mut elements = 0;
    for layer in &config.layers {
        let seen = match (layer.index, config.indexer, &config.attention) {
            (IndexSource::Own | IndexSource::Shared, Some(indexer), Attention::Mla(_)) => context.min(indexer.topk),
            _ => layer.window.map_or(context, |w| w.min(context)),
        };
        elements += seen * main;
        if let (IndexSource::Own, Some(width), Some(indexer)) = (layer.index, index, config.indexer) {
            elements += if context > indexer.topk { context * width } else { 0 };
        }
    }
    (elements * dtype.size_bytes()) as u64
}
