//! What a checkpoint is made of: every weight that its model asks for, with its name, shape and format, in the order in
//! which the model asks. The model itself says so ([`Weights::describe`] over a provider that takes notes), so there is
//! no second list of architectures here.

use crate::Result;
use moellon_checkpoint::{Checkpoint, Matrix, MlaShape, Projection};
use moellon_model::ModelConfig;
use moellon_model::provider::{KvB, WeightProvider};
use moellon_model::weights::Weights;
use moellon_tensor::{MatrixView, WeightFormat};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// Which part of a model a module belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Embedding table.
    Embedding,
    /// Attention's projections.
    Attention,
    /// The indexer of sparse attention.
    Indexer,
    /// Dense feed-forwards.
    DenseFfn,
    /// Shared experts.
    SharedExpert,
    /// Routers.
    Router,
    /// Routed experts.
    Experts,
    /// The MTP layer's input projection.
    MtpProjection,
    /// Head.
    Head,
}

impl Role {
    /// The name that tables and JSON use.
    pub const fn name(self) -> &'static str {
        match self {
            Role::Embedding => "embedding",
            Role::Attention => "attention",
            Role::Indexer => "indexer",
            Role::DenseFfn => "dense_ffn",
            Role::SharedExpert => "shared_expert",
            Role::Router => "router",
            Role::Experts => "experts",
            Role::MtpProjection => "mtp_projection",
            Role::Head => "head",
        }
    }

    fn of(path: &str) -> Role {
        let last = path.rsplit('.').next().unwrap_or(path);
        match last {
            "embed_tokens" => Role::Embedding,
            "lm_head" => Role::Head,
            "eh_proj" => Role::MtpProjection,
            "gate" | "router" => Role::Router,
            _ if path.contains(".indexer.") => Role::Indexer,
            _ if path.contains(".self_attn.") => Role::Attention,
            _ if path.contains(".shared_expert") => Role::SharedExpert,
            _ => Role::DenseFfn,
        }
    }
}

/// How a module's matrices are found in the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// One matrix, under the module's own name.
    Linear,
    /// One matrix an expert.
    Experts {
        /// E.g. `model.layers.3.mlp`.
        block: String,
        projection: Projection,
    },
    /// One matrix a head: one side of `kv_b_proj`.
    Heads {
        attention: String,
        shape: MlaShape,
        side: Side,
        /// Whether the checkpoint has both sides as one matrix, of which the queries' must be transposed.
        fused: bool,
    },
}

/// The two sides of `kv_b_proj`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// `embed_q`
    Queries,
    /// `unembed_out`
    Values,
}

/// One or several matrices of one shape that do the same thing.
#[derive(Debug, Clone)]
pub struct Module {
    /// E.g. `model.layers.3.self_attn.q_a_proj`, `model.layers.3.mlp.experts.gate_proj`, `..self_attn.embed_q`.
    pub name: String,
    /// Which part of the model.
    pub role: Role,
    /// Its layer; `None` for embedding and head. MTP layers are numbered after the trunk's.
    pub layer: Option<usize>,
    /// Whether the layer is an MTP layer.
    pub mtp: bool,
    /// Matrices: experts, heads, or 1.
    pub count: usize,
    /// Output features of each.
    pub rows: usize,
    /// Input features of each.
    pub cols: usize,
    /// How the checkpoint holds it (of transposed halves of `kv_b_proj`: of the whole).
    pub source_format: WeightFormat,
    pub(crate) place: Place,
}

impl Module {
    /// Numbers in all matrices.
    pub fn num_weights(&self) -> u64 {
        (self.count * self.rows * self.cols) as u64
    }

    /// The matrices, as views where the checkpoint's bytes can stay.
    ///
    /// # Errors
    /// As [`Checkpoint::linear`].
    pub fn matrices<'a>(&self, checkpoint: &'a Checkpoint) -> Result<Vec<Matrix<'a>>> {
        let shape = [self.rows, self.cols];
        Ok(match &self.place {
            Place::Linear => vec![checkpoint.linear(&self.name, shape)?],
            Place::Experts { block, projection } => checkpoint.experts(block, *projection, Some(self.count), shape)?,
            Place::Heads { attention, shape, side, fused: _ } => {
                let kv_b = checkpoint.mla_kv_b(attention, *shape)?;
                match side {
                    Side::Queries => kv_b.embed_q,
                    Side::Values => kv_b.unembed_out,
                }
            }
        })
    }
}

/// Biases of experts, which change their place with the weights.
#[derive(Debug, Clone)]
pub(crate) struct ExpertBias {
    pub(crate) block: String,
    pub(crate) projection: Projection,
    pub(crate) count: usize,
    pub(crate) rows: usize,
}

/// All weights of a checkpoint.
#[derive(Debug, Clone)]
pub struct Inventory {
    /// In the order of the model: embedding, layers, head, MTP layers.
    pub modules: Vec<Module>,
    /// Tensors that stay as they are: norms, biases, corrections, and whatever the model does not ask for.
    pub kept: Vec<String>,
    pub(crate) expert_biases: Vec<ExpertBias>,
}

impl Inventory {
    /// Takes the inventory of a checkpoint, checking every shape on the way.
    ///
    /// # Errors
    /// As [`Weights::describe`].
    pub fn take(config: &ModelConfig, checkpoint: &Checkpoint) -> Result<Self> {
        let recorder = Recorder { checkpoint, num_layers: config.layers.len(), modules: RefCell::default() };
        Weights::describe(config, &recorder)?;
        let modules = recorder.modules.into_inner();
        let mut inventory = Inventory { modules, kept: Vec::new(), expert_biases: Vec::new() };
        // A description has no use for biases and does not ask for them.
        for module in &inventory.modules {
            if let Place::Experts { block, projection } = &module.place
                && checkpoint.expert_biases(block, *projection, module.rows)?.is_some()
            {
                let (block, projection) = (block.clone(), *projection);
                let bias = ExpertBias { block, projection, count: module.count, rows: module.rows };
                inventory.expert_biases.push(bias);
            }
        }
        inventory.kept = inventory.unclaimed(checkpoint);
        Ok(inventory)
    }

    /// The module of that name.
    pub fn module(&self, name: &str) -> Option<&Module> {
        self.modules.iter().find(|module| module.name == name)
    }

    /// Tensors that are no part of a module.
    fn unclaimed(&self, checkpoint: &Checkpoint) -> Vec<String> {
        let mut exact = BTreeSet::new();
        let mut prefixes = Vec::new();
        for module in &self.modules {
            match &module.place {
                Place::Linear => {
                    exact.extend(PARTS.iter().map(|part| format!("{}.{part}", module.name)));
                }
                Place::Experts { block, .. } => {
                    prefixes.extend([format!("{block}.experts."), format!("{block}.switch_mlp.")]);
                }
                Place::Heads { attention, .. } => {
                    for half in ["kv_b_proj", "embed_q", "unembed_out"] {
                        exact.extend(PARTS.iter().map(|part| format!("{attention}.{half}.{part}")));
                    }
                }
            }
        }
        let claimed = |name: &str| exact.contains(name) || prefixes.iter().any(|p| name.starts_with(p.as_str()));
        checkpoint.tensors().map(|tensor| tensor.name).filter(|name| !claimed(name)).map(str::to_owned).collect()
    }
}

/// Tensors of a module in every convention.
const PARTS: [&str; 16] = [
    "weight",
    "scales",
    "biases",
    "global_scale",
    "weight_scale",
    "weight_scale_2",
    "weight_scale_inv",
    "input_scale",
    "weight_packed",
    "weight_global_scale",
    "input_global_scale",
    "weight_shape",
    "weight_zero_point",
    "qweight",
    "qzeros",
    "g_idx",
];

/// Hands the checkpoint's weights through and notes what was asked for.
struct Recorder<'a> {
    checkpoint: &'a Checkpoint,
    num_layers: usize,
    modules: RefCell<Vec<Module>>,
}

impl Recorder<'_> {
    fn note(
        &self,
        name: String,
        role: Role,
        count: usize,
        [rows, cols]: [usize; 2],
        format: WeightFormat,
        place: Place,
    ) {
        let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
        let mtp = layer.is_some_and(|layer: usize| layer >= self.num_layers);
        let module = Module { name, role, layer, mtp, count, rows, cols, source_format: format, place };
        self.modules.borrow_mut().push(module);
    }

    fn note_heads(&self, attention: &str, shape: MlaShape, [queries, values]: [WeightFormat; 2], fused: bool) {
        let MlaShape { num_heads, qk_nope_head_dim: nope, v_head_dim: v, kv_lora_rank: rank } = shape;
        let place = |side| Place::Heads { attention: attention.to_owned(), shape, side, fused };
        let name = |half: &str| format!("{attention}.{half}");
        self.note(name("embed_q"), Role::Attention, num_heads, [rank, nope], queries, place(Side::Queries));
        self.note(name("unembed_out"), Role::Attention, num_heads, [v, rank], values, place(Side::Values));
    }
}

impl WeightProvider for Recorder<'_> {
    moellon_model::forward_weights!(checkpoint: vector num_experts expert_biases has);

    fn linear(&self, path: &str, shape: [usize; 2]) -> moellon_model::Result<Matrix<'_>> {
        let matrix = self.checkpoint.linear(path, shape)?;
        self.note(path.to_owned(), Role::of(path), 1, shape, matrix.view().format, Place::Linear);
        Ok(matrix)
    }

    fn experts(
        &self,
        path: &str,
        projection: Projection,
        num_experts: usize,
        shape: [usize; 2],
    ) -> moellon_model::Result<Vec<Matrix<'_>>> {
        let matrices = self.checkpoint.experts(path, projection, Some(num_experts), shape)?;
        let place = Place::Experts { block: path.to_owned(), projection };
        let name = format!("{path}.experts.{}", projection.name());
        self.note(name, Role::Experts, num_experts, shape, matrices[0].view().format, place);
        Ok(matrices)
    }

    fn mla_kv_b(&self, path: &str, shape: MlaShape) -> moellon_model::Result<KvB<'_>> {
        let moellon_checkpoint::MlaKvB { embed_q, unembed_out } = self.checkpoint.mla_kv_b(path, shape)?;
        self.note_heads(path, shape, [embed_q[0].view().format, unembed_out[0].view().format], false);
        Ok(KvB { embed_q, unembed_out })
    }

    fn fused_kv_b_format(&self, path: &str, shape: MlaShape) -> moellon_model::Result<Option<WeightFormat>> {
        let fused = WeightProvider::fused_kv_b_format(self.checkpoint, path, shape)?;
        if let Some(format) = fused {
            self.note_heads(path, shape, [format; 2], true);
        }
        Ok(fused)
    }

    fn release(&self, _matrices: &[MatrixView<'_>]) {}
}
