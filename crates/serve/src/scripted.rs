//! A generator that replays answers instead of computing them: for tests of the protocols, with real clients or without.

use crate::generator::{EventStream, Generator, GeneratorStats};
use moellon_engine::{
    CacheMiss, Event, FinishReason, Finished, PromptScore, Request, RequestError, SampledToken, Started,
};
use moellon_text::Tokenizer;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// One answer of a script.
#[derive(Debug, Clone, Default)]
pub struct ScriptedAnswer {
    /// Its text, markers of thoughts and calls included. It ends with a stop token.
    pub text: String,
    /// Time before its first token.
    pub prefill: Duration,
    /// Time between its tokens.
    pub token_time: Duration,
    /// Prompt tokens that count as cached.
    pub cached_tokens: usize,
    /// Why the rest of the prompt does not.
    pub miss: Option<CacheMiss>,
    /// Log-probability of each token, where asked for; -0.25 by default.
    pub logprob: Option<f32>,
    /// Refuses the request at once.
    pub refuse: Option<RequestError>,
    /// Fails after this many tokens.
    pub fail_after: Option<(usize, RequestError)>,
}

impl ScriptedAnswer {
    /// An answer without delays.
    pub fn text(text: impl Into<String>) -> ScriptedAnswer {
        ScriptedAnswer { text: text.into(), ..ScriptedAnswer::default() }
    }
}

/// Chooses an answer by the prompt's text and the request.
type Script = dyn Fn(&str, &Request) -> ScriptedAnswer + Send + Sync;

/// Replays answers.
pub struct ScriptedGenerator {
    tokenizer: Arc<Tokenizer>,
    script: Box<Script>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    running: AtomicUsize,
    cancelled: AtomicU64,
    steps: AtomicU64,
    next: AtomicU64,
}

/// One running answer in the count.
struct Running(Arc<Shared>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

impl ScriptedGenerator {
    /// A generator that asks `script` for every answer.
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        script: impl Fn(&str, &Request) -> ScriptedAnswer + Send + Sync + 'static,
    ) -> ScriptedGenerator {
        ScriptedGenerator { tokenizer, script: Box::new(script), shared: Arc::new(Shared::default()) }
    }

    /// Requests whose receiver went away before their end.
    pub fn num_cancelled(&self) -> u64 {
        self.shared.cancelled.load(Ordering::Relaxed)
    }

    /// Tokens sent so far.
    pub fn num_tokens(&self) -> u64 {
        self.shared.steps.load(Ordering::Relaxed)
    }
}

impl Generator for ScriptedGenerator {
    fn submit(&self, request: Request) -> Result<EventStream, RequestError> {
        let prompt = self.tokenizer.decode(&request.prompt, false);
        let answer = (self.script)(&prompt, &request);
        if let Some(error) = answer.refuse {
            return Err(error);
        }
        let ids =
            self.tokenizer.encode(&answer.text, false).map_err(|error| RequestError::Engine(error.to_string()))?;
        let (sender, receiver) = mpsc::unbounded_channel();
        self.shared.running.fetch_add(1, Ordering::Relaxed);
        let running = Running(Arc::clone(&self.shared));
        tokio::spawn(play(sender, request, answer, ids, running));
        Ok(Box::new(receiver))
    }

    fn stats(&self) -> GeneratorStats {
        let running = self.shared.running.load(Ordering::Relaxed);
        GeneratorStats {
            running,
            steps: self.shared.steps.load(Ordering::Relaxed),
            cache_used_bytes: running as u64 * (1 << 20),
            cache_reusable_bytes: 64 << 20,
            cache_total_bytes: 1 << 30,
            weights_bytes: 3 << 30,
            bandwidth_fraction: Some(0.5),
            prefix_queried_tokens: self.shared.next.load(Ordering::Relaxed),
            ..GeneratorStats::default()
        }
    }
}

async fn play(
    sender: mpsc::UnboundedSender<Event>,
    request: Request,
    answer: ScriptedAnswer,
    ids: Vec<u32>,
    running: Running,
) {
    let shared = Arc::clone(&running.0);
    let cancelled = || {
        shared.cancelled.fetch_add(1, Ordering::Relaxed);
    };
    let started = Instant::now();
    let prompt_tokens = request.prompt.len();
    shared.next.fetch_add(prompt_tokens as u64, Ordering::Relaxed);
    let cached_tokens = answer.cached_tokens.min(prompt_tokens);
    let first =
        Event::Started(Started { prompt_tokens, cached_tokens, miss: answer.miss.clone(), queued: Duration::ZERO });
    if sender.send(first).is_err() {
        return cancelled();
    }
    let wait = async |time: Duration| {
        tokio::select! {
            biased;
            () = sender.closed() => false,
            () = tokio::time::sleep(time), if !time.is_zero() => true,
            () = std::future::ready(()), if time.is_zero() => true,
        }
    };
    if !wait(answer.prefill).await {
        return cancelled();
    }
    let first_token = Instant::now();
    let stop = request.stop_token_ids.first().copied();
    let mut reason = FinishReason::Length;
    let mut count = 0;
    for id in ids.into_iter().chain(stop).take(request.max_tokens) {
        if let Some((after, error)) = &answer.fail_after
            && *after == count
        {
            let _ = sender.send(Event::Failed(error.clone()));
            return;
        }
        if !wait(answer.token_time).await {
            return cancelled();
        }
        count += 1;
        shared.steps.fetch_add(1, Ordering::Relaxed);
        let logprob = answer.logprob.unwrap_or(-0.25);
        let token = SampledToken {
            id,
            logprob: request.logprobs.map(|_| logprob),
            top_logprobs: (0..request.logprobs.unwrap_or(0)).map(|rank| (id, logprob - rank as f32)).collect(),
            forced: false,
        };
        if sender.send(Event::Tokens(vec![token])).is_err() {
            return cancelled();
        }
        if request.stop_token_ids.contains(&id) {
            reason = FinishReason::Stop;
            break;
        }
    }
    let prompt_logprobs = request.prompt_logprobs.then(|| {
        let top_logprobs = |logprob: f32| {
            let ranks = 0..request.logprobs.unwrap_or(0);
            ranks.map(|rank| (rank as u32, logprob - rank as f32)).collect()
        };
        let score = |position: usize| {
            let logprob = -0.5 * position as f32;
            (position > 0).then(|| PromptScore { logprob, top_logprobs: top_logprobs(logprob) })
        };
        (0..prompt_tokens).map(score).collect()
    });
    let finished = Finished {
        reason,
        completion_tokens: count,
        accepted_draft_tokens: 0,
        preemptions: 0,
        prompt_logprobs,
        prefill: first_token - started,
        decode: first_token.elapsed(),
    };
    if sender.send(Event::Finished(finished)).is_err() {
        cancelled();
    }
}
