//! One request in work: its answers' events from the engine, read into deltas, and its account.

use crate::error::{ApiError, ErrorKind};
use crate::generator::{EventStream, Generator};
use crate::metrics::Metrics;
use crate::model::ServedModel;
use crate::pipeline::{Delta, Pipeline, PipelineSettings};
use crate::registry::{Registry, Ticket};
use crate::settings::Settings;
use moellon_engine::{CacheMiss, Event, FinishReason, Finished, Request, ThinkingBudget};
use moellon_text::constraint::Constraint;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

/// Everything that is known before the engine is asked.
pub(crate) struct Plan {
    pub(crate) prompt: Vec<u32>,
    /// The field that the prompt came from, for errors.
    pub(crate) prompt_param: &'static str,
    pub(crate) settings: Settings,
    /// One an answer, or none at all.
    pub(crate) constraints: Vec<Box<dyn Constraint>>,
    pub(crate) thinking_budget: Option<ThinkingBudget>,
    pub(crate) prompt_logprobs: bool,
    pub(crate) pipeline: PipelineSettings,
    pub(crate) warnings: Vec<String>,
}

/// Tokens of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) prompt: usize,
    pub(crate) cached: usize,
    pub(crate) completion: usize,
    pub(crate) reasoning: usize,
}

/// Why an answer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ending {
    Stop,
    StopString(String),
    Length,
    ToolCalls,
}

/// What happened next.
#[derive(Debug)]
pub(crate) enum Step {
    /// The first answer was admitted.
    Started,
    /// Prompt tokens are being computed.
    Prefill { done_tokens: usize, prompt_tokens: usize },
    /// New pieces of an answer.
    Deltas { choice: usize, deltas: Vec<Delta> },
    /// An answer ended.
    Ended { choice: usize, ending: Ending, finished: Option<Finished> },
    /// All answers ended.
    Done,
    /// The request failed.
    Failed(ApiError),
}

struct Choice {
    /// `None`: over.
    events: Option<EventStream>,
    pipeline: Pipeline,
    /// Tokens so far.
    num_tokens: usize,
    /// Sum of their log-probabilities, where the engine gives them.
    logprob: f64,
}

/// What a job needs of the server.
#[derive(Clone)]
pub(crate) struct Workshop {
    pub(crate) model: Arc<ServedModel>,
    pub(crate) generator: Arc<dyn Generator>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) registry: Arc<Registry>,
}

/// A request in work. Dropping it cancels what is not finished and writes its log line.
pub(crate) struct Job {
    workshop: Workshop,
    choices: Vec<Choice>,
    ticket: Ticket,
    /// Steps that are known and not given yet.
    ready: std::collections::VecDeque<Step>,
    pub(crate) usage: Usage,
    pub(crate) timings: Timings,
    pub(crate) id: String,
    has_started: bool,
    is_done: bool,
    /// The choice that is asked first, so that none starves.
    first: usize,
    prompt_param: &'static str,
    outcome: &'static str,
    miss: Option<CacheMiss>,
}

/// Where the time went.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timings {
    submitted: Instant,
    pub(crate) queued: Duration,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    pub(crate) prefill: Duration,
    pub(crate) decode: Duration,
}

impl Timings {
    pub(crate) fn time_to_first_token(&self) -> Option<Duration> {
        self.first_token.map(|first| first - self.submitted)
    }
}

impl Job {
    /// Asks the engine for every answer.
    ///
    /// # Errors
    /// What can be said before any work, with the HTTP status it deserves.
    pub(crate) fn submit(workshop: &Workshop, plan: Plan, id: &str, protocol: &'static str) -> Result<Job, ApiError> {
        let model = &workshop.model;
        let settings = plan.settings;
        let prompt_tokens = plan.prompt.len();
        // Room for at least one token of answer, unless none is wanted (scoring).
        let room = model.context_length.saturating_sub(prompt_tokens);
        if room == 0 {
            let most = model.context_length.saturating_sub(1);
            let message = format!("the prompt has {prompt_tokens} tokens, expected at most {most}");
            let error = ApiError::new(ErrorKind::InvalidRequest, message);
            return Err(error.with_param(plan.prompt_param).with_code("context_length_exceeded"));
        }
        let mut stop_token_ids = settings.stop_token_ids.clone();
        if !settings.ignore_eos {
            stop_token_ids.extend_from_slice(&model.stop_token_ids);
        }
        let mut choices = Vec::with_capacity(settings.candidates);
        let mut constraints = plan.constraints.into_iter();
        // Candidates are compared by them.
        let logprobs = settings.logprobs.or(settings.chooses().then_some(0));
        for index in 0..settings.candidates {
            let wants_logprobs = settings.logprobs.is_some();
            let pipeline = Pipeline::new(model, &plan.pipeline, &settings.stop, &stop_token_ids, wants_logprobs)?;
            let mut sampling = settings.sampling.clone();
            sampling.seed = sampling.seed.wrapping_add(index as u64);
            let request = Request {
                id: if settings.candidates == 1 { id.to_owned() } else { format!("{id}-{index}") },
                prompt: plan.prompt.clone(),
                sampling,
                max_tokens: settings.max_tokens.unwrap_or(room).min(room),
                min_tokens: settings.min_tokens.min(room),
                stop_token_ids: stop_token_ids.clone(),
                logprobs,
                prompt_logprobs: plan.prompt_logprobs && index == 0,
                constraint: constraints.next(),
                thinking_budget: plan.thinking_budget.clone(),
                cache_salt: settings.cache_salt.clone(),
            };
            let events = workshop
                .generator
                .submit(request)
                .map_err(|error| workshop.metrics.refused(ApiError::from_engine(&error, plan.prompt_param)))?;
            choices.push(Choice { events: Some(events), pipeline, num_tokens: 0, logprob: 0.0 });
        }
        let ticket = workshop.registry.enter(id, protocol, prompt_tokens);
        Ok(Job {
            workshop: workshop.clone(),
            choices,
            ticket,
            ready: std::collections::VecDeque::new(),
            usage: Usage { prompt: prompt_tokens, ..Usage::default() },
            timings: Timings {
                submitted: Instant::now(),
                queued: Duration::ZERO,
                first_token: None,
                last_token: None,
                prefill: Duration::ZERO,
                decode: Duration::ZERO,
            },
            id: id.to_owned(),
            has_started: false,
            is_done: false,
            first: 0,
            prompt_param: plan.prompt_param,
            outcome: "cancelled",
            miss: None,
        })
    }

    /// Answers that are generated.
    pub(crate) fn num_choices(&self) -> usize {
        self.choices.len()
    }

    /// Mean log-probability of an answer's tokens so far; only where the engine was asked for them. None is certain.
    pub(crate) fn mean_logprob(&self, choice: usize) -> f64 {
        let choice = &self.choices[choice];
        if choice.num_tokens == 0 { 0.0 } else { choice.logprob / choice.num_tokens as f64 }
    }

    /// The next step. After [`Step::Done`] and [`Step::Failed`] there is none to wait for.
    pub(crate) async fn next(&mut self) -> Step {
        loop {
            if let Some(step) = self.ready.pop_front() {
                return step;
            }
            if self.is_done || self.choices.iter().all(|choice| choice.events.is_none()) {
                if !self.is_done {
                    self.is_done = true;
                    self.account_done();
                }
                return Step::Done;
            }
            let cancel = self.ticket.cancelled();
            let event = tokio::select! {
                biased;
                () = cancel => {
                    self.close("cancelled");
                    // Not a status that SDKs repeat by themselves.
                    let error = ApiError::new(ErrorKind::InvalidRequest, "the request was cancelled by the operator");
                    return Step::Failed(error.with_code("cancelled"));
                }
                event = next_event(&mut self.choices, self.first) => event,
            };
            self.first = (event.0 + 1) % self.choices.len();
            self.take(event.0, event.1);
        }
    }

    fn close(&mut self, outcome: &'static str) {
        self.is_done = true;
        self.outcome = outcome;
        for choice in &mut self.choices {
            choice.events = None;
        }
    }

    /// Turns an event into steps.
    fn take(&mut self, index: usize, event: Option<Event>) {
        match event {
            Some(Event::Started(started)) => {
                if !self.has_started {
                    self.has_started = true;
                    self.usage.cached = started.cached_tokens;
                    self.timings.queued = started.queued;
                    self.miss = started.miss;
                    self.ticket.started(started.cached_tokens);
                    self.ready.push_back(Step::Started);
                }
            }
            Some(Event::Prefill { done_tokens, prompt_tokens }) => {
                self.ticket.prefilled(done_tokens);
                self.ready.push_back(Step::Prefill { done_tokens, prompt_tokens });
            }
            Some(Event::Tokens(tokens)) => self.tokens(index, &tokens),
            Some(Event::Finished(finished)) => self.finished(index, finished),
            Some(Event::Failed(error)) => {
                self.close("error");
                self.ready.push_back(Step::Failed(ApiError::from_engine(&error, self.prompt_param)));
            }
            None => {
                self.close("error");
                let error = ApiError::new(ErrorKind::Internal, "the engine stopped without an answer");
                self.ready.push_back(Step::Failed(error.with_code("engine_failed")));
            }
        }
    }

    fn tokens(&mut self, index: usize, tokens: &[moellon_engine::SampledToken]) {
        let now = Instant::now();
        if let Some(last) = self.timings.last_token {
            self.workshop.metrics.inter_token(now - last);
        }
        if self.timings.first_token.is_none() {
            self.timings.first_token = Some(now);
            self.workshop.metrics.first_token(now - self.timings.submitted);
        }
        self.timings.last_token = Some(now);
        let choice = &mut self.choices[index];
        let mut deltas = Vec::new();
        for token in tokens {
            choice.num_tokens += 1;
            choice.logprob += f64::from(token.logprob.unwrap_or(0.0));
            choice.pipeline.push(token, &mut deltas);
            if choice.pipeline.is_over {
                break;
            }
        }
        self.ticket.generated(tokens.len(), choice.pipeline.pending_call_bytes());
        let is_over = choice.pipeline.is_over;
        if !deltas.is_empty() {
            self.ready.push_back(Step::Deltas { choice: index, deltas });
        }
        if is_over {
            // Dropping the events ends the generation within a step.
            self.end(index, None);
        }
    }

    fn finished(&mut self, index: usize, finished: Finished) {
        if finished.reason == FinishReason::Cancelled {
            self.close("cancelled");
            let error = ApiError::new(ErrorKind::InvalidRequest, "the request was cancelled");
            self.ready.push_back(Step::Failed(error.with_code("cancelled")));
            return;
        }
        self.end(index, Some(finished));
    }

    fn end(&mut self, index: usize, finished: Option<Finished>) {
        let choice = &mut self.choices[index];
        choice.events = None;
        let mut deltas = Vec::new();
        choice.pipeline.finish(&mut deltas);
        if !deltas.is_empty() {
            self.ready.push_back(Step::Deltas { choice: index, deltas });
        }
        let pipeline = &mut choice.pipeline;
        let is_length = finished.as_ref().is_some_and(|finished| finished.reason == FinishReason::Length);
        if let (Some(reason), false) = (pipeline.broken_call.take(), is_length) {
            // Its first part is with the client and cannot be taken back, and a whole call it is not: an error is the only
            // ending that no client takes for one.
            tracing::warn!(request = %self.id, %reason, "malformed tool call in a stream");
            self.close("error");
            let error = ApiError::new(ErrorKind::Internal, format!("the model wrote a malformed tool call: {reason}"));
            self.ready.push_back(Step::Failed(error.with_code("malformed_tool_call")));
            return;
        }
        // An answer that was cut says so, even if it has complete calls: the last one may be missing.
        let ending = match pipeline.stop_string.take() {
            Some(text) => Ending::StopString(text),
            None if is_length => Ending::Length,
            None if pipeline.num_calls > 0 => Ending::ToolCalls,
            None => Ending::Stop,
        };
        for reason in pipeline.malformed.drain(..) {
            tracing::warn!(request = %self.id, %reason, "malformed tool call, sent as text");
        }
        self.usage.completion += finished.as_ref().map_or(choice.num_tokens, |finished| finished.completion_tokens);
        self.usage.reasoning += choice.pipeline.reasoning_tokens;
        if let Some(finished) = &finished {
            self.timings.prefill = self.timings.prefill.max(finished.prefill);
            self.timings.decode = self.timings.decode.max(finished.decode);
        } else if let (Some(first), Some(last)) = (self.timings.first_token, self.timings.last_token) {
            self.timings.prefill = (first - self.timings.submitted).saturating_sub(self.timings.queued);
            self.timings.decode = last - first;
        }
        self.outcome = match ending {
            Ending::Stop | Ending::StopString(_) => "stop",
            Ending::Length => "length",
            Ending::ToolCalls => "tool_calls",
        };
        self.ready.push_back(Step::Ended { choice: index, ending, finished });
    }

    fn account_done(&mut self) {
        self.workshop.metrics.succeeded(self.outcome, &self.usage, &self.timings, self.timings.submitted.elapsed());
    }

    /// Why the prompt was not cached further, in words and with the texts that differ.
    fn miss_reason(&self) -> Option<String> {
        let miss = self.miss.as_ref()?;
        let tokenizer = &self.workshop.model.tokenizer;
        let text = |id: u32| format!("{:?}", tokenizer.decode(&[id], false));
        let cached = miss.cached.map_or("the end of what is cached".to_owned(), text);
        Some(format!("token {}: found {}, cached {cached}", miss.position, text(miss.found)))
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if !self.is_done {
            for choice in &self.choices {
                self.usage.completion += choice.num_tokens;
            }
            self.workshop.metrics.cancelled(&self.usage);
        }
        let per_second =
            |tokens: usize, time: Duration| (time > Duration::ZERO).then(|| tokens as f64 / time.as_secs_f64());
        let new_prompt = self.usage.prompt.saturating_sub(self.usage.cached);
        let rounded = |rate: Option<f64>| rate.map_or(0.0, |rate| (rate * 10.0).round() / 10.0);
        let ms = |time: Duration| (time.as_secs_f64() * 1e4).round() / 10.0;
        tracing::info!(
            request = %self.id,
            protocol = self.ticket.protocol(),
            model = %self.workshop.model.name,
            prompt_tokens = self.usage.prompt,
            cached_tokens = self.usage.cached,
            new_tokens = self.usage.completion,
            reasoning_tokens = self.usage.reasoning,
            queued_ms = ms(self.timings.queued),
            ttft_ms = self.timings.time_to_first_token().map_or(0.0, ms),
            total_ms = ms(self.timings.submitted.elapsed()),
            prefill_tok_per_s = rounded(per_second(new_prompt, self.timings.prefill)),
            decode_tok_per_s = rounded(per_second(self.usage.completion.saturating_sub(1), self.timings.decode)),
            finish = self.outcome,
            cache_miss = self.miss_reason().as_deref().unwrap_or("none"),
            "request"
        );
    }
}

/// The next event of any answer that is not over; `None` inside when its stream broke off.
async fn next_event(choices: &mut [Choice], first: usize) -> (usize, Option<Event>) {
    std::future::poll_fn(|context| {
        let count = choices.len();
        for index in (first..count).chain(0..first) {
            if let Some(events) = &mut choices[index].events
                && let Poll::Ready(event) = events.poll_next(context)
            {
                return Poll::Ready((index, event));
            }
        }
        Poll::Pending
    })
    .await
}
