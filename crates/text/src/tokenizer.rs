//! Text to token ids and back: Hugging Face's `tokenizer.json` with the settings of `tokenizer_config.json`.
//!
//! Encoding is the `tokenizers` crate's; decoding is ours, from a table of raw bytes a token, so that a stream and a
//! whole text decode alike and a consumer can ask what a single token is.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::OnceLock;

use crate::error::Error;
use crate::token_bytes::{LeadingRule, TokenDecoder};
use crate::tokenizer_config::TokenizerConfig;

const TOKENIZER_FILE: &str = "tokenizer.json";

/// No model has more tokens than this; a larger id is a damaged file, and its table would eat the memory.
const MAX_TOKEN_ID: u32 = 1 << 24;

/// Marks where [`Tokenizer::defuse`] cut a token's text in two. A Unicode noncharacter: never part of a text.
const CUT: char = '\u{FDD0}';

/// A loaded tokenizer. Cheap to share behind an `Arc`; all methods take `&self`.
pub struct Tokenizer {
    hf: tokenizers::Tokenizer,
    /// The same model without any added token, for text that must not be able to name one.
    ordinary: OnceLock<tokenizers::Tokenizer>,
    config: TokenizerConfig,
    decoder: TokenDecoder,
    /// Bytes of all tokens, one after the other.
    bytes: Vec<u8>,
    /// `bytes[starts[id]..starts[id + 1]]` are token `id`'s.  [vocab_size + 1]
    starts: Vec<u32>,
    /// Ids of the tokens marked special, sorted.
    special_ids: Vec<u32>,
    /// Texts of all added tokens of more than one character.
    added_texts: Vec<String>,
    /// Their first characters.
    added_starts: BTreeSet<char>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("special_ids", &self.special_ids)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Loads `tokenizer.json` and, where there is one, `tokenizer_config.json` of a model folder.
    ///
    /// # Errors
    /// [`Error::Read`] when a file cannot be read, [`Error::TokenizerFile`] when its content is not usable.
    pub fn from_folder(folder: &Path) -> Result<Tokenizer, Error> {
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read(&path).map_err(|source| Error::Read { path, source })
        };
        let config = folder.join("tokenizer_config.json").exists();
        let config = if config { Some(read("tokenizer_config.json")?) } else { None };
        Tokenizer::from_bytes(&read(TOKENIZER_FILE)?, config.as_deref())
    }

    /// Loads the content of `tokenizer.json` and of `tokenizer_config.json`.
    ///
    /// Truncation and padding settings are ignored: a prompt is never cut silently.
    ///
    /// # Errors
    /// [`Error::TokenizerFile`] names the file, the field at fault and what was expected.
    pub fn from_bytes(tokenizer_json: &[u8], tokenizer_config_json: Option<&[u8]>) -> Result<Tokenizer, Error> {
        let config = match tokenizer_config_json {
            Some(json) => TokenizerConfig::from_bytes(json)?,
            None => TokenizerConfig::default(),
        };
        let fail = |reason: String| Error::TokenizerFile { file: TOKENIZER_FILE, reason };
        // The decoder is read first, and by us: the library panics on some damaged ones.
        let parts: TokenizerParts =
            serde_json::from_slice(tokenizer_json).map_err(|error| fail(format!("is not a JSON object: {error}")))?;
        let decoder = TokenDecoder::from_json(&parts.decoder).map_err(fail)?;
        let mut hf = load_hf(tokenizer_json).map_err(fail)?;
        hf.with_truncation(None).map_err(|error| fail(error.to_string()))?;
        hf.with_padding(None);

        let (bytes, starts) = token_table(&hf, &decoder)?;
        let added = hf.get_added_tokens_decoder();
        let mut special_ids: Vec<u32> = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        special_ids.sort_unstable();
        let added_texts: Vec<String> =
            added.into_values().map(|token| token.content).filter(|text| text.chars().nth(1).is_some()).collect();
        let added_starts = added_texts.iter().filter_map(|text| text.chars().next()).collect();
        Ok(Tokenizer {
            hf,
            ordinary: OnceLock::new(),
            config,
            decoder,
            bytes,
            starts,
            special_ids,
            added_texts,
            added_starts,
        })
    }

    /// The settings of `tokenizer_config.json`; all empty when there was none.
    pub fn config(&self) -> &TokenizerConfig {
        &self.config
    }

    /// Token ids of a text, in which the texts of special tokens stand for those tokens: for rendered templates.
    ///
    /// `add_special` lets the tokenizer's own rule add tokens around the text (usually a BOS). Chat templates write
    /// theirs, so it is `false` for rendered templates.
    ///
    /// # Errors
    /// [`Error::Encode`] when the tokenizer library refuses the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, Error> {
        encode_with(&self.hf, text, add_special)
    }

    /// Token ids of a text in which nothing is special: `<|user|>` is encoded as its characters.
    ///
    /// # Errors
    /// [`Error::Encode`] when the tokenizer library refuses the text, or can only spell it with a special token.
    pub fn encode_ordinary(&self, text: &str) -> Result<Vec<u32>, Error> {
        let ordinary = self.ordinary.get_or_init(|| {
            let mut ordinary = self.hf.clone();
            ordinary.with_added_vocabulary(tokenizers::AddedVocabulary::new());
            ordinary
        });
        let ids = encode_with(ordinary, text, false)?;
        match ids.iter().find(|id| self.is_special(**id)) {
            Some(id) => Err(Error::Encode {
                reason: format!("the text contains special token {id}, expected ordinary text only"),
            }),
            None => Ok(ids),
        }
    }

    /// Makes a user's text safe to put into a template: cuts every text of a special or added token in two, with an
    /// invisible mark that only [`encode_defused`](Self::encode_defused) understands.
    ///
    /// Without it a message that contains `<|assistant|>` could pose as a turn of the assistant.
    pub fn defuse(&self, text: &str) -> String {
        let mut defused = String::with_capacity(text.len());
        let clean: String = text.chars().filter(|character| *character != CUT).collect();
        for (start, character) in clean.char_indices() {
            defused.push(character);
            // Cut after the first character, so that a token inside of another one is met when its own first is.
            // Nearly all characters begin no token: models have up to a thousand, which all begin with `<` or `[`.
            if self.added_starts.contains(&character)
                && self.added_texts.iter().any(|token| clean[start..].starts_with(token.as_str()))
            {
                defused.push(CUT);
            }
        }
        defused
    }

    /// [`encode`](Self::encode) for a rendered template whose user texts went through [`defuse`](Self::defuse).
    ///
    /// # Errors
    /// [`Error::Encode`] as in [`encode`](Self::encode).
    pub fn encode_defused(&self, text: &str) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::new();
        for part in text.split(CUT) {
            ids.extend(self.encode(part, false)?);
        }
        Ok(ids)
    }

    /// The text of token ids: the joined bytes of the tokens, with U+FFFD for what is not UTF-8.
    ///
    /// Equal to Hugging Face's decode, except that a run of byte-fallback tokens with a bad byte loses only that byte
    /// here and the whole run there. Ids without a token (padding rows of the model) are skipped.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        let mut is_first = true;
        for id in ids.iter().filter(|id| !(skip_special && self.is_special(**id))) {
            if is_first {
                bytes.extend_from_slice(&self.first_token_bytes(*id));
                is_first = self.token_bytes(*id).is_empty();
            } else {
                bytes.extend_from_slice(self.token_bytes(*id));
            }
        }
        let strip = self.leading_spaces_to_strip();
        let spaces = bytes.iter().take(strip).take_while(|byte| **byte == b' ').count();
        String::from_utf8_lossy(&bytes[spaces..]).into_owned()
    }

    /// The raw bytes of a token inside of a text; empty for an id without a token. May be a part of a character.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        match (self.starts.get(id as usize), self.starts.get(id as usize + 1)) {
            (Some(start), Some(end)) => &self.bytes[*start as usize..*end as usize],
            _ => &[],
        }
    }

    /// The raw bytes of a token that begins a text.
    pub(crate) fn first_token_bytes(&self, id: u32) -> Vec<u8> {
        match self.decoder.leading {
            LeadingRule::Keep | LeadingRule::StripSpaces(_) => self.token_bytes(id).to_vec(),
            LeadingRule::DropMetaspaceInFirstToken => {
                self.token(id).map(|token| self.decoder.bytes_of_first(&token)).unwrap_or_default()
            }
        }
    }

    /// How many leading spaces a whole text loses.
    pub(crate) fn leading_spaces_to_strip(&self) -> usize {
        match self.decoder.leading {
            LeadingRule::StripSpaces(count) => count,
            LeadingRule::Keep | LeadingRule::DropMetaspaceInFirstToken => 0,
        }
    }

    /// The id of a token by its name in the vocabulary, such as `<|user|>`.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.hf.token_to_id(token)
    }

    /// The name of a token in the vocabulary (in the tokenizer's own alphabet: `Ġthe`, `▁the`, `<|user|>`).
    pub fn token(&self, id: u32) -> Option<String> {
        self.hf.id_to_token(id)
    }

    /// One more than the largest id. The model's own vocab_size is often larger: padding rows.
    pub fn vocab_size(&self) -> usize {
        self.starts.len() - 1
    }

    /// Whether the token is marked special (roles, end of text; often not `<think>` or `<tool_call>`).
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.binary_search(&id).is_ok()
    }

    /// Ids of all tokens marked special, in rising order.
    pub fn special_ids(&self) -> &[u32] {
        &self.special_ids
    }

    /// Id of the beginning-of-text token named by `tokenizer_config.json`.
    pub fn bos_id(&self) -> Option<u32> {
        self.id_of(self.config.special_token("bos_token")?)
    }

    /// Id of the end-of-text token named by `tokenizer_config.json`. A model may stop at more tokens: see its
    /// `generation_config.json`.
    pub fn eos_id(&self) -> Option<u32> {
        self.id_of(self.config.special_token("eos_token")?)
    }

    /// Checks that the model has an embedding row for every token.
    ///
    /// # Errors
    /// [`Error::VocabTooSmall`] names the token with the largest id.
    pub fn check_vocab(&self, model_vocab_size: usize) -> Result<(), Error> {
        if self.vocab_size() <= model_vocab_size {
            return Ok(());
        }
        let id = (self.vocab_size() - 1) as u32;
        Err(Error::VocabTooSmall { token: self.token(id).unwrap_or_default(), id, vocab_size: model_vocab_size })
    }
}

/// What we read of `tokenizer.json` ourselves.
#[derive(serde::Deserialize)]
struct TokenizerParts {
    #[serde(default)]
    decoder: serde_json::Value,
}

/// Loads the library's tokenizer. Its deserializers contain `expect`s that damaged files can reach, so a panic in
/// there is an error like any other.
fn load_hf(tokenizer_json: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    match std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(tokenizer_json)) {
        Ok(loaded) => loaded.map_err(|error| error.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(format!("the tokenizer library gave up: {}", text.unwrap_or("no reason given")))
        }
    }
}

fn encode_with(hf: &tokenizers::Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>, Error> {
    let encoding = hf.encode_fast(text, add_special).map_err(|error| Error::Encode { reason: error.to_string() })?;
    Ok(encoding.get_ids().to_vec())
}

/// All tokens' bytes joined, and where each begins.
fn token_table(hf: &tokenizers::Tokenizer, decoder: &TokenDecoder) -> Result<(Vec<u8>, Vec<u32>), Error> {
    let fail = |reason: String| Error::TokenizerFile { file: TOKENIZER_FILE, reason };
    let ids: BTreeSet<u32> =
        hf.get_vocab(true).into_values().chain(hf.get_added_tokens_decoder().into_keys()).collect();
    let Some(largest) = ids.last().copied() else {
        return Err(fail("model.vocab: found no token, expected at least one".to_owned()));
    };
    if largest > MAX_TOKEN_ID {
        return Err(fail(format!("found token id {largest}, expected at most {MAX_TOKEN_ID}")));
    }
    let mut bytes = Vec::new();
    let mut starts = Vec::with_capacity(largest as usize + 2);
    for id in 0..=largest {
        starts.push(bytes.len() as u32);
        if let Some(token) = hf.id_to_token(id) {
            bytes.extend_from_slice(&decoder.bytes_of(&token));
        }
        if bytes.len() > u32::MAX as usize {
            return Err(fail("found more than 4 GiB of tokens".to_owned()));
        }
    }
    starts.push(bytes.len() as u32);
    Ok((bytes, starts))
}
