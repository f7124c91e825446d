//! `calibrate`: one pass of texts through a model, a layer at a time, that measures what weights are given and what
//! experts add. The MTP layer is measured too.

use crate::observe::{Observations, Observer};
use crate::product::write_file;
use crate::progress::{Meter, Progress};
use crate::quantize::Source;
use crate::stats::{KEY, MomentsMode, StatsInfo};
use crate::stream::{BackendFactory, Sequences, Stream};
use crate::{Error, Result};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

/// What to calibrate with.
#[derive(Debug, Clone)]
pub struct CalibrateOptions {
    /// Names and SHA-256 of the texts, for the record.
    pub texts: Vec<[String; 2]>,
    /// Tokens of a sequence at most, for the record.
    pub sequence_len: usize,
    /// How moments are kept.
    pub moments: MomentsMode,
}

/// Runs `sequences` through the model and writes what was measured to the new directory `destination`.
///
/// # Errors
/// A destination that exists, a model that does not load, or a failing file system.
pub fn calibrate(
    source: Source<'_>,
    sequences: &Sequences,
    options: &CalibrateOptions,
    destination: &Path,
    backends: &mut BackendFactory<'_>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<()> {
    if destination.exists() {
        return Err(Error::mismatch(format!("{}", destination.display()), "there already", "a new directory"));
    }
    let mut name = destination.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    let partial = destination.with_file_name(name);
    if partial.exists() {
        std::fs::remove_dir_all(&partial).map_err(|e| Error::io(&partial, e))?;
    }
    std::fs::create_dir_all(&partial).map_err(|e| Error::io(&partial, e))?;
    let config = source.config;
    let tokens = sequences.num_tokens() as u64;
    let num_mtp = present_mtp_layers(source);
    let num_layers = config.layers.len();
    let mut meter = Meter::new(tokens * (num_layers + 1 + num_mtp) as u64, progress);
    let mut aliases = BTreeMap::new();
    let mut stream = Stream::new(config, source.checkpoint, sequences);
    stream.embed(backends()?.as_mut())?;
    for layer in 0..num_layers {
        let mut observer = Observer::new(backends()?, options.moments);
        stream.layer(layer, &mut observer)?;
        let name = format!("layer {layer}");
        save(&partial.join(format!("layer-{layer:05}.safetensors")), observer.seen, &mut aliases)?;
        meter.add(&name, tokens, None);
    }
    let mut observer = Observer::new(backends()?, options.moments);
    stream.head(&mut observer, &mut |_, _| Ok(()))?;
    save(&partial.join("head.safetensors"), observer.seen, &mut aliases)?;
    meter.add("head", tokens, None);
    for mtp in 0..num_mtp {
        let mut observer = Observer::new(backends()?, options.moments);
        stream.mtp(mtp, &mut observer, &mut |_, _| Ok(()))?;
        // The head was measured where the trunk uses it.
        observer.seen.inputs.remove("lm_head");
        save(&partial.join(format!("layer-{:05}.safetensors", num_layers + mtp)), observer.seen, &mut aliases)?;
        meter.add("mtp", tokens, None);
    }
    let info = StatsInfo {
        schema: 1,
        model: source.name.to_owned(),
        identity: source.checkpoint.identity(),
        texts: options.texts.clone(),
        tokens,
        sequence_len: options.sequence_len,
        moments: options.moments,
        aliases,
    };
    let mut text = serde_json::to_vec_pretty(&json!({ KEY: info })).expect("statistics serialise");
    text.push(b'\n');
    write_file(&partial.join("config.json"), &text)?;
    std::fs::rename(&partial, destination).map_err(|e| Error::io(destination, e))
}

/// MTP layers that the config promises and the checkpoint has.
pub(crate) fn present_mtp_layers(source: Source<'_>) -> usize {
    let first = source.config.layers.len();
    (first..first + source.config.num_mtp_layers)
        .take_while(|layer| source.checkpoint.tensor(&format!("model.layers.{layer}.enorm.weight")).is_some())
        .count()
}

/// Writes what one part showed.
fn save(path: &Path, seen: Observations, aliases: &mut BTreeMap<String, String>) -> Result<()> {
    let bytes = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (block, sums) in seen.saliency {
        let num_experts = sums.sums[0].len();
        let values: Vec<f32> = sums.sums.iter().flatten().map(|sum| *sum as f32).collect();
        tensors.push((format!("{block}.saliency"), Dtype::F32, vec![5, num_experts], bytes(&values)));
    }
    for (name, sums) in seen.inputs {
        let (count, cols) = (sums.tokens.len(), sums.cols);
        let tokens = sums.tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
        tensors.push((format!("{name}.tokens"), Dtype::U32, vec![count], tokens));
        tensors.push((format!("{name}.input_sq"), Dtype::F32, vec![count, cols], bytes(&sums.input_sq())));
        let pooled_rows = seen.rows.get(&name).copied().unwrap_or_else(|| sums.tokens[0]);
        let moments = sums.into_moments(pooled_rows);
        if !moments.is_empty() {
            let shape = vec![moments.len(), cols, cols];
            let data = moments.iter().flat_map(|m| bytes(m)).collect();
            tensors.push((format!("{name}.moments"), Dtype::F32, shape, data));
        }
    }
    aliases.extend(seen.aliases);
    if tensors.is_empty() {
        return Ok(());
    }
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, data)| {
            let view = TensorView::new(*dtype, shape.clone(), data).expect("the data have the shape's size");
            (name.as_str(), view)
        })
        .collect::<Vec<_>>();
    let file = safetensors::serialize(views, None).expect("tensors of different names serialise");
    write_file(path, &file)
}
