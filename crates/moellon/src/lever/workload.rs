//! What arms do: continue texts, reach a first token, answer, serve. A window of each gives one time.

use crate::model_source::ModelSource;
use anyhow::Result;
use moellon_engine::{Engine, Event, EventReceiver, Request, SamplingParams, ThinkingBudget};
use moellon_lab::in_turn::{Arm, Sample};
use moellon_text::Tokenizer;
use std::collections::BTreeMap;
use std::time::Instant;

/// Tokens of a prompt that are its own, behind a prefix that others share.
const OWN_TOKENS: usize = 8;

/// What the chat is asked: simple steps, of which a thought is not worth much.
const QUESTIONS: [&str; 4] = [
    "Write a function that adds two numbers.",
    "What does the keyword `mut` mean in Rust?",
    "Write a struct for a point with two coordinates.",
    "Write a test for a function `is_even`.",
];

/// A greedy request for `tokens` tokens.
fn request(id: usize, prompt: Vec<u32>, tokens: usize, salt: Option<String>) -> Request {
    Request {
        id: format!("lever {id}"),
        prompt,
        sampling: SamplingParams::default(),
        max_tokens: tokens,
        min_tokens: 0,
        stop_token_ids: Vec::new(),
        logprobs: None,
        prompt_logprobs: false,
        constraint: None,
        thinking_budget: None,
        cache_salt: salt,
    }
}

/// An engine whose steps can be made slower on purpose.
pub struct Stepper {
    pub engine: Engine,
    /// Share of each step's time that is waited away.
    pub slowdown: f64,
}

impl Stepper {
    fn step(&mut self) -> Result<(), String> {
        let started = Instant::now();
        self.engine.step().map_err(|error| error.to_string())?;
        if self.slowdown > 0.0 {
            let until = started.elapsed().mul_f64(1.0 + self.slowdown);
            while started.elapsed() < until {
                std::hint::spin_loop();
            }
        }
        Ok(())
    }

    fn submit(&mut self, request: Request) -> Result<Running, String> {
        let receiver = self.engine.submit(request).map_err(|error| error.to_string())?;
        Ok(Running { receiver, ids: Vec::new(), done: false })
    }
}

/// A request on its way.
struct Running {
    receiver: EventReceiver,
    ids: Vec<u32>,
    done: bool,
}

impl Running {
    fn drain(&mut self) -> Result<(), String> {
        while let Some(event) = self.receiver.try_recv() {
            match event {
                Event::Started(_) | Event::Prefill { .. } => {}
                Event::Tokens(tokens) => self.ids.extend(tokens.iter().map(|token| token.id)),
                Event::Finished(_) => self.done = true,
                Event::Failed(error) => return Err(error.to_string()),
            }
        }
        Ok(())
    }
}

fn drain(all: &mut [Running]) -> Result<(), String> {
    all.iter_mut().try_for_each(Running::drain)
}

/// Sequences that continue texts, all at once. The time is that of decoding alone, while all of them run.
pub struct Decode {
    pub stepper: Stepper,
    pub prompts: Vec<Vec<u32>>,
    pub tokens: usize,
}

impl Arm for Decode {
    fn window(&mut self) -> Result<Sample, String> {
        let stepper = &mut self.stepper;
        let mut all = Vec::new();
        for (i, prompt) in self.prompts.iter().enumerate() {
            all.push(stepper.submit(request(i, prompt.clone(), self.tokens, None))?);
        }
        while all.iter().any(|running| running.ids.is_empty()) {
            stepper.step()?;
            drain(&mut all)?;
        }
        let generated = |all: &[Running]| all.iter().map(|running| running.ids.len()).sum::<usize>();
        let (before, stats) = (generated(&all), stepper.engine.stats());
        let started = Instant::now();
        while all.iter().all(|running| !running.done) {
            stepper.step()?;
            drain(&mut all)?;
        }
        let seconds = started.elapsed().as_secs_f64();
        let tokens = generated(&all) - before;
        let after = stepper.engine.stats();
        let mut extra = BTreeMap::from([("steps".to_owned(), (after.steps - stats.steps) as f64)]);
        if let (Some(before), Some(after)) = (&stats.speculation, &after.speculation) {
            let steps = (after.sequence_steps - before.sequence_steps).max(1) as f64;
            extra.insert("tokens a step".to_owned(), tokens as f64 / steps);
            let drafted = after.all().draft_tokens - before.all().draft_tokens;
            let right = after.all().accepted_tokens - before.all().accepted_tokens;
            extra.insert("drafts a step".to_owned(), drafted as f64 / steps);
            if drafted > 0 {
                extra.insert("accepted %".to_owned(), 100.0 * right as f64 / drafted as f64);
            }
        }
        while all.iter().any(|running| !running.done) {
            stepper.step()?;
            drain(&mut all)?;
        }
        let output = all.into_iter().map(|running| running.ids).collect();
        Ok(Sample { seconds: seconds / tokens.max(1) as f64, output, extra })
    }
}

/// Where a prompt's prefix is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefix {
    Cold,
    Warm,
    Disk,
}

/// Requests that share a long prefix and have a few tokens of their own each, up to the first token of all of them.
pub struct FirstToken {
    pub stepper: Stepper,
    pub text: Vec<u32>,
    pub prefix_tokens: usize,
    pub concurrent: usize,
    pub prefix: Prefix,
    pub round: usize,
}

impl Arm for FirstToken {
    fn window(&mut self) -> Result<Sample, String> {
        let salt = match self.prefix {
            Prefix::Cold => format!("cold {}", self.round),
            Prefix::Warm | Prefix::Disk => "warm".to_owned(),
        };
        if self.prefix == Prefix::Disk {
            self.stepper.engine.flush();
            self.stepper.engine.forget_prefixes();
        }
        let rest = self.text.len() - self.prefix_tokens - OWN_TOKENS;
        let mut all = Vec::new();
        let started = Instant::now();
        for i in 0..self.concurrent {
            let own = self.prefix_tokens + (self.round * self.concurrent + i) * OWN_TOKENS % rest;
            let mut prompt = self.text[..self.prefix_tokens].to_vec();
            prompt.extend(&self.text[own..own + OWN_TOKENS]);
            all.push(self.stepper.submit(request(i, prompt, 2, Some(salt.clone())))?);
        }
        self.round += 1;
        while all.iter().any(|running| running.ids.is_empty()) {
            self.stepper.step()?;
            drain(&mut all)?;
        }
        let seconds = started.elapsed().as_secs_f64() / self.concurrent as f64;
        while all.iter().any(|running| !running.done) {
            self.stepper.step()?;
            drain(&mut all)?;
        }
        let output = all.into_iter().map(|running| running.ids).collect();
        Ok(Sample { seconds, output, extra: BTreeMap::new() })
    }
}

/// Requests that arrive at once and are served to their ends, prompts included.
pub struct Serve {
    pub stepper: Stepper,
    pub prompts: Vec<Vec<u32>>,
    pub tokens: usize,
    pub round: usize,
}

impl Arm for Serve {
    fn window(&mut self) -> Result<Sample, String> {
        let started = Instant::now();
        let mut all = Vec::new();
        for (i, prompt) in self.prompts.iter().enumerate() {
            let salt = Some(format!("{} {i}", self.round));
            all.push(self.stepper.submit(request(i, prompt.clone(), self.tokens, salt))?);
        }
        self.round += 1;
        while all.iter().any(|running| !running.done) {
            self.stepper.step()?;
            drain(&mut all)?;
        }
        let seconds = started.elapsed().as_secs_f64() / self.prompts.len() as f64;
        let output = all.into_iter().map(|running| running.ids).collect();
        Ok(Sample { seconds, output, extra: BTreeMap::new() })
    }
}

/// A chat prompt and how long its thought may be.
pub struct Question {
    prompt: Vec<u32>,
    inside_thought: bool,
}

/// Renders the questions; `None` without a chat template or without tokens for thoughts.
pub fn questions(source: &ModelSource, base: &super::Base, thinking: bool) -> Result<Option<Vec<Question>>> {
    let Some((template, _)) = source.chat_template(base.directory.as_deref(), &base.tokenizer)? else {
        return Ok(None);
    };
    let Some((open, close)) = thought_marks(&base.tokenizer) else { return Ok(None) };
    let render = |text: &&str| {
        let mut conversation = crate::chat::Conversation::new(None, thinking);
        conversation.user(text);
        let prompt = conversation.render(&template, &base.tokenizer)?.ids;
        // A prompt that opens a thought and closes it again asks for none.
        let last = |mark: u32| prompt.iter().rposition(|id| *id == mark);
        let inside_thought = last(open) > last(close);
        Ok(Question { prompt, inside_thought })
    };
    QUESTIONS.iter().map(render).collect::<Result<Vec<_>>>().map(Some)
}

/// Tokens that open and close a thought.
fn thought_marks(tokenizer: &Tokenizer) -> Option<(u32, u32)> {
    let format = moellon_text::ThinkingFormat::default();
    Some((tokenizer.id_of(&format.open)?, tokenizer.id_of(&format.close)?))
}

/// Answers to the questions, one after the other.
pub struct Answer {
    pub stepper: Stepper,
    pub questions: Vec<Question>,
    pub stop_ids: Vec<u32>,
    pub marks: (u32, u32),
    pub tokens: usize,
    pub budget: Option<usize>,
}

impl Answer {
    /// The arm, where the tokenizer has marks for thoughts.
    pub fn new(
        stepper: Stepper,
        questions: Vec<Question>,
        stop_ids: Vec<u32>,
        tokenizer: &Tokenizer,
        tokens: usize,
        budget: Option<usize>,
    ) -> Option<Self> {
        Some(Answer { stepper, questions, stop_ids, marks: thought_marks(tokenizer)?, tokens, budget })
    }
}

impl Arm for Answer {
    fn window(&mut self) -> Result<Sample, String> {
        let (open, close) = self.marks;
        let started = Instant::now();
        let mut output = Vec::new();
        let mut thought = 0;
        for (i, question) in self.questions.iter().enumerate() {
            let mut request = request(i, question.prompt.clone(), self.tokens, None);
            request.stop_token_ids.clone_from(&self.stop_ids);
            request.thinking_budget = self.budget.map(|max_tokens| ThinkingBudget {
                max_tokens,
                starts_inside: question.inside_thought,
                open_token_id: open,
                close_token_id: close,
                end_token_ids: vec![close],
            });
            let mut running = self.stepper.submit(request)?;
            while !running.done {
                self.stepper.step()?;
                running.drain()?;
            }
            let mut inside = question.inside_thought;
            for id in &running.ids {
                inside = (inside || *id == open) && *id != close;
                thought += usize::from(inside);
            }
            output.push(running.ids);
        }
        let count = self.questions.len() as f64;
        let tokens: usize = output.iter().map(Vec::len).sum();
        let extra = BTreeMap::from([
            ("tokens an answer".to_owned(), tokens as f64 / count),
            ("of them thought".to_owned(), thought as f64 / count),
        ]);
        Ok(Sample { seconds: started.elapsed().as_secs_f64() / count, output, extra })
    }
}
