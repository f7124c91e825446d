//! The settings of a generation that OpenAI's protocols share: sampling, limits, stops.

use crate::error::ApiError;
use crate::fields::Fields;
use crate::model::ServedModel;
use crate::options::RequestLimits;
use moellon_engine::SamplingParams;
use serde_json::Value;
use std::hash::{BuildHasher, Hasher};

/// How to generate, apart from the prompt.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Settings {
    pub(crate) sampling: SamplingParams,
    /// `None`: to the end of the context.
    pub(crate) max_tokens: Option<usize>,
    pub(crate) min_tokens: usize,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) ignore_eos: bool,
    /// Alternatives with each token.
    pub(crate) logprobs: Option<usize>,
    /// Answers to give.
    pub(crate) n: usize,
    /// Answers to generate, at least `n`: the likeliest are given.
    pub(crate) candidates: usize,
    pub(crate) cache_salt: Option<String>,
}

impl Settings {
    /// One answer, in protocols that have no choices.
    pub(crate) fn single(self) -> Settings {
        Settings { n: 1, candidates: 1, ..self }
    }

    /// Whether answers are generated that are not given.
    pub(crate) fn chooses(&self) -> bool {
        self.candidates > self.n
    }
}

/// A number that nobody can guess, from the process's random keys.
pub(crate) fn random_number() -> u64 {
    std::hash::RandomState::new().build_hasher().finish()
}

impl Settings {
    /// The model's defaults.
    pub(crate) fn new(model: &ServedModel) -> Settings {
        let seed = model.default_seed.unwrap_or_else(random_number);
        let sampling = SamplingParams { seed, ..model.default_sampling.clone() };
        Settings {
            sampling,
            max_tokens: model.default_max_tokens,
            min_tokens: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            n: 1,
            candidates: 1,
            cache_salt: None,
        }
    }

    /// Reads the fields that all protocols name alike, and the extras of other servers.
    pub(crate) fn read(fields: Fields<'_>, model: &ServedModel, limits: &RequestLimits) -> Result<Settings, ApiError> {
        let mut settings = Settings::new(model);
        let sampling = &mut settings.sampling;
        // Two servers' names of one setting; the more common name is read last and wins.
        if let Some(number) = fields.number("repeat_penalty")? {
            sampling.repetition_penalty = number;
        }
        let numbers: [(&str, &mut f32); 6] = [
            ("temperature", &mut sampling.temperature),
            ("top_p", &mut sampling.top_p),
            ("min_p", &mut sampling.min_p),
            ("repetition_penalty", &mut sampling.repetition_penalty),
            ("frequency_penalty", &mut sampling.frequency_penalty),
            ("presence_penalty", &mut sampling.presence_penalty),
        ];
        for (name, setting) in numbers {
            if let Some(number) = fields.number(name)? {
                *setting = number;
            }
        }
        // -1 turns it off in other servers.
        if fields.get("top_k").is_some_and(|value| value.as_i64() == Some(-1)) {
            sampling.top_k = 0;
        } else if let Some(top_k) = fields.count("top_k", 0, usize::MAX)? {
            sampling.top_k = top_k;
        }
        if let Some(seed) = fields.get("seed") {
            let bits = seed.as_i64().map(|seed| seed as u64).or(seed.as_u64());
            sampling.seed = bits.ok_or_else(|| fields.wrong("seed", seed, "a whole number of 64 bits"))?;
        }
        sampling.logit_bias = read_logit_bias(fields, limits)?;
        sampling
            .validate(model.vocab_size)
            .map_err(|error| ApiError::field(fields.path(error.name), &error.found, error.expected))?;
        settings.min_tokens = fields.count("min_tokens", 0, usize::MAX)?.unwrap_or(0);
        settings.stop = read_stop(fields, "stop", limits)?;
        settings.stop_token_ids = read_token_ids(fields, "stop_token_ids", model, limits)?;
        settings.ignore_eos = fields.flag("ignore_eos")?.unwrap_or(false);
        settings.n = fields.count("n", 1, limits.max_choices)?.unwrap_or(1);
        settings.candidates = fields.count("best_of", settings.n, limits.max_choices)?.unwrap_or(settings.n);
        settings.cache_salt = fields.text("cache_salt")?.map(str::to_owned);
        Ok(settings)
    }
}

fn read_logit_bias(fields: Fields<'_>, limits: &RequestLimits) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(biases) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    if biases.len() > limits.max_logit_biases {
        let found = format!("{} tokens", biases.len());
        return Err(ApiError::field("logit_bias", found, &format!("at most {}", limits.max_logit_biases)));
    }
    let pair = |(token, bias): (&String, &Value)| {
        let id: u32 =
            token.parse().map_err(|_| ApiError::field("logit_bias", format!("key {token:?}"), "token ids"))?;
        let bias = bias.as_f64().ok_or_else(|| fields.wrong("logit_bias", bias, "numbers from -100 to 100"))?;
        Ok((id, bias as f32))
    };
    biases.iter().map(pair).collect()
}

/// A string or a list of strings, none of them empty.
pub(crate) fn read_stop(fields: Fields<'_>, name: &str, limits: &RequestLimits) -> Result<Vec<String>, ApiError> {
    let list = match fields.get(name) {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list.as_slice(),
        Some(single) => std::slice::from_ref(single),
    };
    if list.len() > limits.max_stop_strings {
        let found = format!("{} strings", list.len());
        return Err(ApiError::field(fields.path(name), found, &format!("at most {}", limits.max_stop_strings)));
    }
    let most = limits.max_stop_bytes;
    let expected = format!("a string of 1 to {most} bytes, or a list of such");
    let text = |value: &Value| {
        let text = value.as_str().filter(|text| !text.is_empty() && text.len() <= most);
        text.map(str::to_owned).ok_or_else(|| fields.wrong(name, value, &expected))
    };
    list.iter().map(text).collect()
}

fn read_token_ids(
    fields: Fields<'_>,
    name: &str,
    model: &ServedModel,
    limits: &RequestLimits,
) -> Result<Vec<u32>, ApiError> {
    let Some(list) = fields.list(name)? else { return Ok(Vec::new()) };
    if list.len() > limits.max_stop_strings {
        let found = format!("{} tokens", list.len());
        return Err(ApiError::field(fields.path(name), found, &format!("at most {}", limits.max_stop_strings)));
    }
    let id =
        |value: &Value| token_id(value, model).ok_or_else(|| fields.wrong(name, value, "token ids of the vocabulary"));
    list.iter().map(id).collect()
}

/// A JSON value as an id of the vocabulary.
pub(crate) fn token_id(value: &Value, model: &ServedModel) -> Option<u32> {
    u32::try_from(value.as_u64()?).ok().filter(|id| (*id as usize) < model.vocab_size)
}
