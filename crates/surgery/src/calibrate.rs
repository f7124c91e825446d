//! `calibrate`: one pass of texts through a model, a layer at a time, that measures what weights are given and what
//! experts add. The MTP layer is measured too.

use crate::observe::{Observations, Observer, Watch};
use crate::product::write_file;
use crate::progress::{Meter, Progress};
use crate::quantize::Source;
use crate::stats::{KEY, MomentsMode, StatsInfo};
use crate::stream::{BackendFactory, Sequences, Stream};
use crate::{Error, Result};
use serde_json::{Map, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
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
        let mut observer = Observer::new(backends()?, Watch::Calibration(options.moments));
        stream.layer(layer, &mut observer)?;
        let name = format!("layer {layer}");
        save(&partial.join(format!("layer-{layer:05}.safetensors")), observer.into_seen(), &mut aliases)?;
        meter.add(&name, tokens, None);
    }
    let mut observer = Observer::new(backends()?, Watch::Calibration(options.moments));
    stream.head(&mut observer, &mut |_, _| Ok(()))?;
    save(&partial.join("head.safetensors"), observer.into_seen(), &mut aliases)?;
    meter.add("head", tokens, None);
    for mtp in 0..num_mtp {
        let mut observer = Observer::new(backends()?, Watch::Calibration(options.moments));
        stream.mtp(mtp, &mut observer, &mut |_, _| Ok(()))?;
        // The head was measured where the trunk uses it.
        let mut seen = observer.into_seen();
        seen.inputs.remove("lm_head");
        save(&partial.join(format!("layer-{:05}.safetensors", num_layers + mtp)), seen, &mut aliases)?;
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

/// The elements of a tensor.
enum Data {
    U32(Vec<u32>),
    /// One after the other.
    F32(Vec<Vec<f32>>),
}

/// Writes what one part showed.
fn save(path: &Path, seen: Observations, aliases: &mut BTreeMap<String, String>) -> Result<()> {
    let mut tensors: Vec<(String, Vec<usize>, Data)> = Vec::new();
    for (block, sums) in seen.saliency {
        let num_experts = sums.sums[0].len();
        let values = sums.sums.iter().flatten().map(|sum| *sum as f32).collect();
        tensors.push((format!("{block}.saliency"), vec![5, num_experts], Data::F32(vec![values])));
    }
    for (name, sums) in seen.inputs {
        let (count, cols) = (sums.tokens.len(), sums.cols);
        tensors.push((format!("{name}.tokens"), vec![count], Data::U32(sums.tokens.clone())));
        tensors.push((format!("{name}.input_sq"), vec![count, cols], Data::F32(vec![sums.input_sq()])));
        let pooled_rows = seen.rows.get(&name).copied().unwrap_or_else(|| sums.tokens[0]);
        let moments = sums.into_moments(pooled_rows);
        if !moments.is_empty() {
            tensors.push((format!("{name}.moments"), vec![moments.len(), cols, cols], Data::F32(moments)));
        }
    }
    aliases.extend(seen.aliases);
    if tensors.is_empty() {
        return Ok(());
    }
    write_tensors(path, &tensors).map_err(|e| Error::io(path, e))
}

/// Writes a safetensors file piece by piece: moments of a wide layer are gigabytes, of which no copy is made.
fn write_tensors(path: &Path, tensors: &[(String, Vec<usize>, Data)]) -> std::io::Result<()> {
    let mut header = Map::new();
    let mut offset = 0;
    for (name, shape, data) in tensors {
        let (dtype, end) = match data {
            Data::U32(values) => ("U32", offset + 4 * values.len()),
            Data::F32(parts) => ("F32", offset + 4 * parts.iter().map(Vec::len).sum::<usize>()),
        };
        header.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [offset, end] }));
        offset = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for (_, _, data) in tensors {
        match data {
            Data::U32(values) => values.iter().try_for_each(|value| file.write_all(&value.to_le_bytes()))?,
            Data::F32(parts) => {
                parts.iter().flatten().try_for_each(|value| file.write_all(&value.to_le_bytes()))?;
            }
        }
    }
    file.into_inner()?.sync_all()
}
