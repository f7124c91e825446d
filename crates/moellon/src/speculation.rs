//! From flags to an engine that speculates; what steps cost is measured once for a model and machine and kept in the user's
//! cache folder, as a text file that people can read.

use crate::cli::{Speculate, SpeculateOptions};
use crate::load;
use crate::model_source::ModelSource;
use anyhow::{Context, Result};
use moellon_checkpoint::Checkpoint;
use moellon_engine::{CostCurve, Drafter, Engine, EngineOptions, Policy, SpeculationOptions, SpeculationStats};
use moellon_model::{Decoder, Eagle, EagleConfig};
use moellon_ops::Backend;
use moellon_text::Tokenizer;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

/// An engine over a loaded decoder. `identity` names the weights, `vocabulary` the tokens.
pub fn engine(
    mut decoder: Decoder,
    mut backend: Box<dyn Backend>,
    flags: &SpeculateOptions,
    identity: &str,
    vocabulary: &Tokenizer,
    options: EngineOptions,
) -> Result<Engine> {
    anyhow::ensure!(
        flags.speculate != Speculate::Mtp || decoder.has_mtp(),
        "--speculate is mtp, but the model has no MTP layer; expected auto, ngram or draft=DIR"
    );
    let drafter = match &flags.speculate {
        Speculate::Draft(dir) => Some(drafter(dir, &mut decoder, vocabulary, backend.as_mut())?),
        _ => None,
    };
    let Some(mut speculation) = speculation(flags) else {
        return Ok(Engine::new(decoder, backend, options)?);
    };
    let path = cost_path(&decoder, backend.as_ref(), identity, &flags.speculate);
    speculation.cost = path.as_deref().and_then(read_curve);
    let is_new = speculation.cost.is_none();
    let options = EngineOptions { speculation: Some(speculation), ..options };
    let engine = Engine::with_drafter(decoder, drafter, backend, options)?;
    if let (true, Some(path), Some(curve)) = (is_new, path, engine.cost_curve())
        && let Err(error) = write_curve(&path, curve)
    {
        // Only the next start takes longer.
        eprintln!("the cost curve is not kept: {error:#}");
    }
    Ok(engine)
}

/// One line about what speculation did; `None` if it did nothing.
pub fn summary(stats: &SpeculationStats) -> Option<String> {
    let all = stats.all();
    if all.drafts == 0 {
        return None;
    }
    let steps = stats.sequence_steps.max(1) as f64;
    Some(format!(
        "drafts {} of {} right, {:.2} tokens a step, {} saved",
        all.accepted_tokens,
        all.draft_tokens,
        1.0 + all.accepted_tokens as f64 / steps,
        if stats.saved_seconds >= 0.0 {
            format!("{:.2} s", stats.saved_seconds)
        } else {
            format!("-{:.2} s", -stats.saved_seconds)
        }
    ))
}

fn speculation(flags: &SpeculateOptions) -> Option<SpeculationOptions> {
    let (suffix, mtp) = match flags.speculate {
        Speculate::Off => return None,
        Speculate::Auto => (true, true),
        Speculate::Ngram => (true, false),
        Speculate::Mtp => (false, true),
        Speculate::Draft(_) => (false, false),
    };
    Some(SpeculationOptions {
        suffix,
        mtp,
        policy: if flags.draft_always { Policy::Always } else { Policy::Governed },
        max_depth: usize::from(flags.draft_depth),
        ..SpeculationOptions::default()
    })
}

/// What a directory holds: an EAGLE-3 head, or a smaller model.
fn drafter(dir: &Path, model: &mut Decoder, vocabulary: &Tokenizer, backend: &mut dyn Backend) -> Result<Drafter> {
    let checkpoint = Checkpoint::open(dir)?;
    if !EagleConfig::is_eagle(&checkpoint.config) {
        return Ok(Drafter::Model(Box::new(draft_model(dir, model, vocabulary, backend)?)));
    }
    let context = || format!("EAGLE-3 head {}", dir.display());
    let config = EagleConfig::parse(&checkpoint.config, model.config()).with_context(context)?;
    let eagle = Eagle::load(&config, &checkpoint, model, backend).with_context(context)?;
    Ok(Drafter::Eagle(Box::new(eagle)))
}

fn draft_model(dir: &Path, model: &Decoder, vocabulary: &Tokenizer, backend: &mut dyn Backend) -> Result<Decoder> {
    let source = ModelSource::open(Some(dir))?;
    let tokenizer = source.tokenizer(Some(dir))?;
    // Another token under the same number would make drafts that are never right.
    let (found, expected) = (tokenizer.vocab_size(), vocabulary.vocab_size());
    anyhow::ensure!(
        found == expected,
        "draft model {}: its tokenizer has {found} tokens, expected the model's {expected}",
        dir.display()
    );
    let differs = |id: &u32| tokenizer.token_bytes(*id) != vocabulary.token_bytes(*id);
    if let Some(id) = (0..found as u32).find(differs) {
        anyhow::bail!(
            "draft model {}: its token {id} is {:?}, expected the model's {:?}",
            dir.display(),
            String::from_utf8_lossy(tokenizer.token_bytes(id)),
            String::from_utf8_lossy(vocabulary.token_bytes(id))
        );
    }
    let longest = source.config.max_position_embeddings;
    let context = model.options().max_context;
    anyhow::ensure!(
        longest >= context,
        "draft model {}: it was made for {longest} positions, expected the context of {context} (--context)",
        dir.display()
    );
    Ok(load::load_sized(&source, *model.options(), load::Mtp::AsStored, backend)?.0)
}

/// Where the curve of this model on this device is kept; `None` where the system names no place.
fn cost_path(decoder: &Decoder, backend: &dyn Backend, identity: &str, who: &Speculate) -> Option<PathBuf> {
    let folder = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    let mut hasher = DefaultHasher::new();
    let caps = backend.caps();
    (identity, caps.name, &caps.device, format!("{:?}", caps.activations)).hash(&mut hasher);
    (env!("CARGO_PKG_VERSION"), format!("{:?}", decoder.options()), format!("{who:?}")).hash(&mut hasher);
    decoder.draft_tokens().map(<[u32]>::len).hash(&mut hasher);
    moellon_lab::Machine::this().cpu.hash(&mut hasher);
    Some(folder.join("moellon").join(format!("cost-{:016x}.txt", hasher.finish())))
}

fn read_curve(path: &Path) -> Option<CostCurve> {
    CostCurve::from_text(&std::fs::read_to_string(path).ok()?)
}

fn write_curve(path: &Path, curve: &CostCurve) -> Result<()> {
    let folder = path.parent().context("the file has a folder")?;
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let mut file = tempfile::NamedTempFile::new_in(folder).with_context(|| folder.display().to_string())?;
    std::io::Write::write_all(&mut file, curve.to_text().as_bytes())?;
    file.as_file().sync_all()?;
    file.persist(path).with_context(|| path.display().to_string())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use moellon_engine::speculate::SourceStats;

    #[test]
    fn the_summary_counts_tokens_a_step() {
        let head = SourceStats { drafts: 50, draft_tokens: 100, accepted_tokens: 80 };
        let stats = SpeculationStats { head, sequence_steps: 100, saved_seconds: -0.5, ..SpeculationStats::default() };
        assert_eq!(summary(&stats).as_deref(), Some("drafts 80 of 100 right, 1.80 tokens a step, -0.50 s saved"));
        assert_eq!(summary(&SpeculationStats::default()), None);
    }
}
