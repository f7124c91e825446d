//! Drafts by a network: the model's own MTP layer, an EAGLE-3 head, or a smaller model with the same tokens. All keep cache rows
//! of their own under the slots of the model's, so that shared prefixes bring them along; a row is due for every token that the model
//! computed. Rows wait until a draft is wanted or there are many of them: one run takes them all, and reads its weights once.

use crate::sequence::Sequence;
use moellon_model::batch::{Batch, LogitRows};
use moellon_model::mtp::{MtpHidden, MtpStep};
use moellon_model::session::greedy;
use moellon_model::{Decoder, Eagle, Error as ModelError};
use moellon_ops::{Backend, Buffer, Cache, ElementType, Tensor};
use std::collections::HashMap;

/// Vocabularies up to this size are brought to the host, which then knows how likely each draft is.
const MAX_HOST_LOGITS: usize = 16_384;

/// The network that drafts.
pub(crate) enum Network {
    /// The decoder's own MTP layer.
    Mtp,
    /// An EAGLE-3 head.
    Eagle(Box<Eagle>),
    /// A smaller model.
    Model(Box<Decoder>),
}

/// What a network's rows are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeadKind {
    /// One that reads the model's hidden states. Its row at position `i` is made of the model's hidden state there and of token `i + 1`.
    Hidden,
    /// Another decoder. Its row at position `i` is made of token `i`.
    Model,
}

/// One drafted token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Drafted {
    pub(crate) token: u32,
    /// Its probability by the head's own logits, where they are cheap to read.
    pub(crate) confidence: Option<f64>,
}

/// Stands for a sequence whose rows were forgotten.
const NOBODY: u64 = u64::MAX;

/// A row that waits.
#[derive(Debug, Clone, Copy)]
struct Row {
    sequence: u64,
    /// Counted from the start of the sequence's window.
    position: usize,
    token: u32,
}

/// A sequence whose next token is drafted: the row of the head's last run that the next draft continues.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tip {
    pub(crate) sequence: u64,
    pub(crate) drafted: Drafted,
    /// Position of that row.
    position: usize,
    row: u32,
}

/// Where a running sequence's rows of the head are.
pub(crate) struct Table<'a> {
    /// Its blocks from the window's first on.
    blocks: &'a [u32],
    /// Whether others that begin alike may read them.
    is_whole: bool,
}

/// The same of all running sequences by their number.
pub(crate) type Tables<'a> = HashMap<u64, Table<'a>>;

/// The table of one sequence whose rows are for nobody else.
pub(crate) fn table_of(sequence: u64, blocks: &[u32]) -> Tables<'_> {
    HashMap::from([(sequence, Table { blocks, is_whole: false })])
}

/// The tables of `running`.
pub(crate) fn tables(running: &[Sequence]) -> Tables<'_> {
    fn table(sequence: &Sequence) -> (u64, Table<'_>) {
        let window = sequence.track.head.window;
        let blocks = sequence.blocks.get(window.block..).unwrap_or_default();
        (sequence.number, Table { blocks, is_whole: window.is_whole() })
    }
    running.iter().map(table).collect()
}

/// The network and the rows that it is behind.
pub(crate) struct Head {
    network: Network,
    waiting: Vec<Row>,
    max_waiting: usize,
    block_size: usize,
    /// For each cache block its first slots with a row of the head's.
    filled: Vec<usize>,
    /// u32 `[max_sequences, 1]`
    chosen: Buffer,
    logits: Vec<f32>,
}

impl Head {
    pub(crate) fn new(network: Network, decoder: &Decoder, backend: &mut dyn Backend) -> Result<Self, ModelError> {
        let sizes = decoder.options();
        Ok(Head {
            network,
            waiting: Vec::new(),
            max_waiting: sizes.max_batch_tokens,
            block_size: sizes.block_size,
            filled: vec![0; sizes.num_blocks],
            chosen: backend.alloc("drafted tokens", ElementType::U32, sizes.max_logit_rows)?,
            logits: Vec::new(),
        })
    }

    pub(crate) fn kind(&self) -> HeadKind {
        match self.network {
            Network::Mtp | Network::Eagle(_) => HeadKind::Hidden,
            Network::Model(_) => HeadKind::Model,
        }
    }

    /// Caches that are not the decoder's own.
    pub(crate) fn caches(&self) -> Vec<Cache> {
        match &self.network {
            Network::Mtp => Vec::new(),
            Network::Eagle(eagle) => eagle.caches().collect(),
            Network::Model(model) => model.caches().collect(),
        }
    }

    pub(crate) fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(crate) fn max_waiting(&self) -> usize {
        self.max_waiting
    }

    pub(crate) fn waits_for(&self, sequence: u64) -> bool {
        self.waiting.iter().any(|row| row.sequence == sequence)
    }

    /// Forgets the rows that wait of one sequence.
    pub(crate) fn drop_waiting_of(&mut self, sequence: u64) {
        if self.waiting.iter().all(|row| row.sequence == sequence) {
            self.waiting.clear();
        }
        // Others keep the places where their hidden states are.
        self.waiting.iter_mut().filter(|row| row.sequence == sequence).for_each(|row| row.sequence = NOBODY);
    }

    /// Forgets every row that waits.
    pub(crate) fn drop_waiting(&mut self) {
        self.waiting.clear();
    }

    /// All blocks are empty.
    pub(crate) fn restart(&mut self) {
        self.waiting.clear();
        self.filled.fill(0);
    }

    pub(crate) fn filled(&self, block: u32) -> usize {
        self.filled[block as usize]
    }

    pub(crate) fn set_filled(&mut self, block: u32, num_slots: usize) {
        self.filled[block as usize] = num_slots;
    }

    /// Whether the first `num_tokens` positions of a block table have rows.
    pub(crate) fn covers(&self, blocks: &[u32], num_tokens: usize) -> bool {
        let whole = blocks.iter().zip(0..num_tokens.div_ceil(self.block_size));
        whole
            .into_iter()
            .all(|(block, index)| self.filled(*block) >= self.block_size.min(num_tokens - index * self.block_size))
    }

    /// Takes rows at positions `first ..` of a sequence's window. For [`HeadKind::Hidden`] `hidden_rows` are the rows of the model's last
    /// step with the hidden states of these positions. There must be room.
    pub(crate) fn wait_for(
        &mut self,
        sequence: u64,
        first: usize,
        tokens: &[u32],
        hidden_rows: std::ops::Range<u32>,
        decoder: &mut Decoder,
        backend: &mut dyn Backend,
    ) -> Result<(), ModelError> {
        let (rows, first_saved): (Vec<u32>, usize) = (hidden_rows.collect(), self.waiting.len());
        match &mut self.network {
            Network::Mtp => decoder.save_hidden(&rows, first_saved, backend)?,
            Network::Eagle(eagle) => eagle.save_hidden(&rows, first_saved, decoder, backend)?,
            Network::Model(_) => {}
        }
        let rows = (first..).zip(tokens).map(|(position, token)| Row { sequence, position, token: *token });
        self.waiting.extend(rows);
        Ok(())
    }

    /// Runs all rows that wait. Returns a draft for each of the sequences `wanted` that has rows.
    pub(crate) fn catch_up(
        &mut self,
        wanted: &[u64],
        tables: &Tables<'_>,
        decoder: &mut Decoder,
        backend: &mut dyn Backend,
    ) -> Result<Vec<Tip>, ModelError> {
        let mut order: Vec<u64> = Vec::new();
        let mut by_sequence: HashMap<u64, Vec<(u32, Row)>> = HashMap::new();
        for (saved, row) in (0u32..).zip(self.waiting.drain(..)) {
            let rows = by_sequence.entry(row.sequence).or_default();
            if rows.is_empty() {
                order.push(row.sequence);
            }
            rows.push((saved, row));
        }
        let (mut batch, mut hidden_rows, mut tips) = (Batch::default(), Vec::new(), Vec::new());
        for sequence in order {
            let Some(Table { blocks, is_whole }) = tables.get(&sequence) else { continue };
            let rows = &by_sequence[&sequence];
            let tokens: Vec<u32> = rows.iter().map(|(_, row)| row.token).collect();
            let wants = wanted.contains(&sequence);
            let logits = if wants { LogitRows::Last } else { LogitRows::None };
            batch.push_sequence(&tokens, rows[0].1.position, blocks, self.block_size, logits);
            hidden_rows.extend(rows.iter().map(|(saved, _)| *saved));
            for (_, row) in rows.iter().filter(|_| *is_whole) {
                let filled = &mut self.filled[blocks[row.position / self.block_size] as usize];
                *filled = (*filled).max(row.position % self.block_size + 1);
            }
            if wants {
                let position = rows[rows.len() - 1].1.position;
                tips.push((sequence, position, hidden_rows.len() as u32 - 1));
            }
        }
        if batch.num_tokens() == 0 {
            return Ok(Vec::new());
        }
        let logits = self.run(&batch, &hidden_rows, MtpHidden::Saved, None, decoder, backend)?;
        self.pick(&tips, logits, decoder, backend)
    }

    /// Drafts one more token of each tip, whose slots must be there.
    pub(crate) fn chain(
        &mut self,
        tips: &[Tip],
        tables: &Tables<'_>,
        decoder: &mut Decoder,
        backend: &mut dyn Backend,
    ) -> Result<Vec<Tip>, ModelError> {
        let (mut batch, mut hidden_rows, mut next) = (Batch::default(), Vec::new(), Vec::new());
        for tip in tips {
            let Some(Table { blocks, .. }) = tables.get(&tip.sequence) else { continue };
            let position = tip.position + 1;
            batch.push_sequence(&[tip.drafted.token], position, blocks, self.block_size, LogitRows::Last);
            next.push((tip.sequence, position, hidden_rows.len() as u32));
            hidden_rows.push(tip.row);
        }
        // Rows side by side attend where they did before.
        let in_a_row = tips.windows(2).all(|pair| pair[1].row == pair[0].row + 1);
        let share = tips.first().filter(|_| in_a_row).map(|tip| tip.row);
        let logits = self.run(&batch, &hidden_rows, MtpHidden::Mtp, share, decoder, backend)?;
        self.pick(&next, logits, decoder, backend)
    }

    fn run(
        &mut self,
        batch: &Batch,
        hidden_rows: &[u32],
        hidden: MtpHidden,
        share_index_of: Option<u32>,
        decoder: &mut Decoder,
        backend: &mut dyn Backend,
    ) -> Result<Tensor, ModelError> {
        let step = MtpStep { batch, hidden_rows, hidden, share_index_of };
        match &mut self.network {
            Network::Mtp => decoder.forward_mtp(&step, backend),
            Network::Eagle(eagle) => eagle.forward(&step, decoder, backend),
            Network::Model(model) => model.forward(batch, backend),
        }
    }

    /// The likeliest token of each row of logits.
    fn pick(
        &mut self,
        rows: &[(u64, usize, u32)],
        logits: Tensor,
        decoder: &Decoder,
        backend: &mut dyn Backend,
    ) -> Result<Vec<Tip>, ModelError> {
        let drafted: Vec<Drafted> = if rows.is_empty() {
            Vec::new()
        } else if logits.cols <= MAX_HOST_LOGITS {
            self.logits.resize(logits.rows * logits.cols, 0.0);
            backend.read_f32(logits, &mut self.logits)?;
            self.logits.chunks_exact(logits.cols).map(likeliest).collect()
        } else {
            let tokens = greedy(logits, self.chosen.tensor(logits.rows, 1), backend)?;
            tokens.into_iter().map(|token| Drafted { token, confidence: None }).collect()
        };
        // A head's columns may stand for some tokens alone.
        let tokens = match &self.network {
            Network::Mtp => decoder.draft_tokens(),
            Network::Eagle(eagle) => eagle.draft_tokens(),
            Network::Model(_) => None,
        };
        let token = |column: u32| tokens.map_or(column, |tokens| tokens[column as usize]);
        let tip = |((sequence, position, row), drafted): (&(u64, usize, u32), Drafted)| Tip {
            sequence: *sequence,
            drafted: Drafted { token: token(drafted.token), ..drafted },
            position: *position,
            row: *row,
        };
        Ok(rows.iter().zip(drafted).map(tip).collect())
    }
}

/// The largest logit's token and its probability.
fn likeliest(logits: &[f32]) -> Drafted {
    let (mut token, mut max) = (0, f32::NEG_INFINITY);
    for (index, logit) in (0u32..).zip(logits) {
        if *logit > max {
            (token, max) = (index, *logit);
        }
    }
    // Only a guess of a guess: what is far below the maximum is left out.
    let total: f32 = logits.iter().filter(|logit| **logit > max - 12.0).map(|logit| (logit - max).exp()).sum();
    Drafted { token, confidence: Some(f64::from(1.0 / total.max(1.0))) }
}
