//! `moellon logits`: logits for given token ids, in a file that other implementations can be compared with.

use crate::backend;
use crate::cli::LogitsOptions;
use crate::load;
use crate::model_source::ModelSource;
use anyhow::{Context, Result};
use moellon_model::batch::LogitRows;
use moellon_model::mtp::MtpHidden;
use moellon_model::session::read_logits;
use moellon_model::{Decoder, Session};
use moellon_ops::Backend;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::io::Write;
use std::path::Path;

/// Runs the command.
pub fn run(options: &LogitsOptions) -> Result<()> {
    let source = ModelSource::open(options.model.model.as_deref())?;
    let vocab_size = source.config.vocab_size;
    if let Some(id) = options.ids.iter().find(|id| **id as usize >= vocab_size) {
        anyhow::bail!("--ids has {id}, expected ids below the vocabulary size {vocab_size}");
    }
    let context = options.ids.len() + options.greedy + 1;
    let mut backend = backend::create(&options.device, options.activations)?;
    let (mut decoder, _) = load::load(&source, context, options.cache, load::Mtp::AsStored, backend.as_mut())?;
    let results = compute(options, &mut decoder, backend.as_mut())?;
    write(&options.out, &results, vocab_size)?;
    println!("{}: {} prompt logits, {} greedy ids", options.out.display(), options.ids.len(), results.greedy_ids.len());
    Ok(())
}

#[derive(Default)]
struct Results {
    /// `[num_ids, vocab_size]`, prefilled.
    logits: Vec<f32>,
    /// `[num_ids, vocab_size]`, one token a step.
    decode_logits: Vec<f32>,
    greedy_ids: Vec<u32>,
    /// `[greedy, vocab_size]`
    greedy_logits: Vec<f32>,
    /// `[num_ids - 1, vocab_size]`
    mtp_logits: Vec<f32>,
}

fn compute(options: &LogitsOptions, decoder: &mut Decoder, backend: &mut dyn Backend) -> Result<Results> {
    let mut results = Results::default();
    let mut session = Session::new();
    let chunk_size = decoder.options().max_batch_tokens;
    for (index, chunk) in options.ids.chunks(chunk_size).enumerate() {
        let logits = session.step(chunk, LogitRows::All, decoder, backend, None)?;
        results.logits.extend(read_logits(logits, backend)?);
        // The MTP row of a token needs the token after it.
        let first = index * chunk_size;
        let next = &options.ids[(first + 1).min(options.ids.len())..(first + chunk.len() + 1).min(options.ids.len())];
        if options.mtp && !next.is_empty() {
            let logits = session.mtp(next, first, MtpHidden::Trunk, decoder, backend)?;
            results.mtp_logits.extend(read_logits(logits, backend)?);
        }
    }
    let mut session = Session::new();
    let mut last = Vec::new();
    for id in &options.ids {
        let logits = session.extend(&[*id], decoder, backend)?;
        last = read_logits(logits, backend)?;
        results.decode_logits.extend_from_slice(&last);
    }
    for _ in 0..options.greedy {
        let best = last.iter().enumerate().fold(0, |best, (i, x)| if *x > last[best] { i } else { best }) as u32;
        results.greedy_ids.push(best);
        results.greedy_logits.extend_from_slice(&last);
        let logits = session.extend(&[best], decoder, backend)?;
        last = read_logits(logits, backend)?;
    }
    Ok(results)
}

/// Writes the file whole or not at all.
fn write(path: &Path, results: &Results, vocab_size: usize) -> Result<()> {
    let floats = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let ids: Vec<u8> = results.greedy_ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let matrices = [
        ("logits", floats(&results.logits)),
        ("decode_logits", floats(&results.decode_logits)),
        ("greedy_logits", floats(&results.greedy_logits)),
        ("mtp_logits", floats(&results.mtp_logits)),
    ];
    let mut tensors = Vec::new();
    for (name, bytes) in matrices.iter().filter(|(_, bytes)| !bytes.is_empty()) {
        let rows = bytes.len() / 4 / vocab_size;
        tensors.push((*name, TensorView::new(Dtype::F32, vec![rows, vocab_size], bytes)?));
    }
    if !results.greedy_ids.is_empty() {
        tensors.push(("greedy_ids", TensorView::new(Dtype::I32, vec![results.greedy_ids.len()], &ids)?));
    }
    let bytes = safetensors::serialize(tensors, None)?;
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder).with_context(|| format!("--out {}", path.display()))?;
    file.write_all(&bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).with_context(|| format!("--out {}", path.display()))?;
    Ok(())
}
