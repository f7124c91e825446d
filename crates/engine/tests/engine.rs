//! What an engine does for its requests, step by step, on a tiny random model.

mod support;

use moellon_engine::{
    DiskCacheOptions, EngineOptions, Event, FinishReason, Request, RequestError, SamplingParams, Started,
    ThinkingBudget,
};
use moellon_text::constraint::{Constraint, ConstraintError, TokenMask};
use std::path::Path;
use support::faulty::FaultyBackend;
use support::{BLOCK, Sizes, cpu, drain, ids_of, prompt, request, run, run_one, tokens_of};

fn started(events: &[Event]) -> &Started {
    let [Event::Started(started), ..] = events else { panic!("{events:?}") };
    started
}

fn reason(events: &[Event]) -> FinishReason {
    let Some(Event::Finished(finished)) = events.last() else { panic!("{events:?}") };
    finished.reason
}

fn failure(events: &[Event]) -> &RequestError {
    let Some(Event::Failed(error)) = events.last() else { panic!("{events:?}") };
    error
}

#[test]
fn a_client_that_leaves_is_gone_within_one_step_and_its_prefill_stays() {
    let mut engine = Sizes::default().engine();
    let receiver = engine.submit(request(prompt(1, 60), 20)).unwrap();
    engine.step().unwrap();
    engine.step().unwrap();
    drop(receiver);
    assert!(!engine.step().unwrap());
    let stats = engine.stats();
    assert_eq!((stats.running, stats.used_blocks, stats.cancelled), (0, 0, 1));
    engine.check().unwrap();
    // Two chunks of 16 tokens were computed.
    let events = run_one(&mut engine, request(prompt(1, 60), 20));
    assert_eq!(started(&events).cached_tokens, 32);
    // One that waits leaves the queue, too.
    let _running: Vec<_> = (0..4).map(|i| engine.submit(request(prompt(i, 9), 30)).unwrap()).collect();
    let waiting = engine.submit(request(prompt(9, 9), 30)).unwrap();
    engine.step().unwrap();
    assert_eq!(engine.stats().waiting, 1);
    drop(waiting);
    engine.step().unwrap();
    assert_eq!(engine.stats().waiting, 0);
}

#[test]
fn a_cancel_handle_ends_a_request_in_words() {
    let mut engine = Sizes::default().engine();
    let mut receiver = engine.submit(request(prompt(1, 10), 50)).unwrap();
    for _ in 0..4 {
        engine.step().unwrap();
    }
    receiver.cancel_handle().cancel();
    run(&mut engine);
    let events = drain(&mut receiver);
    assert_eq!((reason(&events), ids_of(&events).len()), (FinishReason::Cancelled, 4));
}

#[test]
fn requests_that_do_not_fit_are_refused_with_numbers() {
    let options = EngineOptions { max_waiting: 2, ..EngineOptions::default() };
    let mut engine = Sizes { num_blocks: 6, options, ..Sizes::default() }.engine();
    let refused = |engine: &mut moellon_engine::Engine, request| engine.submit(request).unwrap_err().to_string();
    assert_eq!(refused(&mut engine, request(Vec::new(), 1)), "the prompt has no tokens, expected at least 1");
    assert_eq!(refused(&mut engine, request(prompt(1, 96), 1)), "the prompt has 96 tokens, expected at most 95");
    let block_bytes = engine.limits().block_bytes;
    assert_eq!(
        refused(&mut engine, request(prompt(1, 48), 1)),
        format!("the prompt needs {} bytes of cache, the cache has {}", 7 * block_bytes, 6 * block_bytes)
    );
    let vocab_size = engine.limits().vocab_size;
    assert_eq!(
        refused(&mut engine, request(vec![1, vocab_size as u32], 1)),
        format!("the prompt has token {vocab_size} at position 1, expected ids below {vocab_size}")
    );
    let sampling = SamplingParams { top_p: 2.0, ..SamplingParams::default() };
    let wrong = Request { sampling, ..request(vec![1], 1) };
    assert_eq!(refused(&mut engine, wrong), "top_p is 2, expected above 0, at most 1");
    let _waiting = [engine.submit(request(vec![1], 1)).unwrap(), engine.submit(request(vec![1], 1)).unwrap()];
    assert_eq!(refused(&mut engine, request(vec![1], 1)), "2 requests are waiting, expected fewer than 2");
    assert_eq!(engine.stats().rejected, 6);
    run(&mut engine);
    // Alone in the cache a sequence may grow to its end.
    let events = run_one(&mut engine, request(prompt(1, 40), 1000));
    assert_eq!((reason(&events), ids_of(&events).len()), (FinishReason::Length, 8));
}

#[test]
fn a_stream_gets_a_token_every_step_while_a_long_prompt_is_computed() {
    let sizes = Sizes { max_context: 256, num_blocks: 64, max_batch_tokens: 32, ..Sizes::default() };
    let mut engine = sizes.engine();
    let mut stream = engine.submit(request(prompt(1, 4), 60)).unwrap();
    engine.step().unwrap();
    assert_eq!(ids_of(&drain(&mut stream)).len(), 1);
    let mut long = engine.submit(request(prompt(2, 200), 1)).unwrap();
    let mut steps = 0;
    while engine.stats().running > 0 && !drain(&mut long).iter().any(|e| matches!(e, Event::Finished(_))) {
        engine.step().unwrap();
        steps += 1;
        assert_eq!(ids_of(&drain(&mut stream)).len(), 1, "step {steps}");
        assert!(engine.stats().last_step_tokens <= 32);
    }
    assert!(steps >= 200 / 31, "{steps} steps");
}

#[test]
fn a_miss_says_where_and_what() {
    let mut engine = Sizes::default().engine();
    let events = run_one(&mut engine, request(prompt(1, 20), 1));
    assert_eq!(started(&events).cached_tokens, 0);
    let miss = started(&events).miss.clone().unwrap();
    assert_eq!((miss.position, miss.found, miss.cached), (0, prompt(1, 20)[0], None));
    let mut other = prompt(1, 20);
    other[11] = 63;
    let events = run_one(&mut engine, request(other, 1));
    assert_eq!(started(&events).cached_tokens, 11);
    let miss = started(&events).miss.clone().unwrap();
    assert_eq!((miss.position, miss.found, miss.cached), (11, 63, Some(prompt(1, 20)[11])));
    let events = run_one(&mut engine, request(prompt(1, 20), 1));
    assert_eq!((started(&events).cached_tokens, &started(&events).miss), (19, &None));
    let salted = Request { cache_salt: Some("user 2".to_owned()), ..request(prompt(1, 20), 1) };
    assert_eq!(started(&run_one(&mut engine, salted)).cached_tokens, 0);
}

#[test]
fn the_prefix_cache_stays_within_its_bytes() {
    let free = Sizes::default().engine();
    let max_bytes = 5 * free.limits().block_bytes + 1;
    let options = EngineOptions { max_prefix_cache_bytes: Some(max_bytes), ..EngineOptions::default() };
    let mut engine = Sizes { options, ..Sizes::default() }.engine();
    for seed in 0..6 {
        run_one(&mut engine, request(prompt(seed, 20), 4));
        let stats = engine.stats();
        assert!(stats.reusable_bytes() <= max_bytes, "{} bytes", stats.reusable_bytes());
    }
    assert_eq!(started(&run_one(&mut engine, request(prompt(0, 20), 1))).cached_tokens, 0);
    assert_eq!(started(&run_one(&mut engine, request(prompt(0, 20), 1))).cached_tokens, 19);
}

#[test]
fn requests_that_begin_alike_are_computed_once_even_at_the_same_time() {
    let mut engine = Sizes::default().engine();
    let mut receivers: Vec<_> = (0..4).map(|_| engine.submit(request(prompt(1, 64), 3)).unwrap()).collect();
    run(&mut engine);
    let prefill_tokens = engine.stats().prefill_tokens;
    assert!(prefill_tokens <= 64 + 3 * 2 * BLOCK as u64, "{prefill_tokens} tokens computed");
    let answers: Vec<Vec<u32>> = receivers.iter_mut().map(|r| ids_of(&drain(r))).collect();
    assert!(answers.iter().all(|answer| *answer == answers[0] && answer.len() == 3));
}

#[test]
fn answers_to_one_prompt_share_its_prefill_also_within_a_step() {
    // All four prompts fit a step: without waiting for one another each would be computed.
    let mut engine = Sizes { max_batch_tokens: 64, ..Sizes::default() }.engine();
    let sampled = |seed| {
        let sampling = SamplingParams { temperature: 1.0, seed, ..SamplingParams::default() };
        Request { sampling, ..request(prompt(1, 13), 6) }
    };
    let mut receivers: Vec<_> = (0..4).map(|seed| engine.submit(sampled(seed)).unwrap()).collect();
    run(&mut engine);
    // One whole block, once; its five tokens of a block and no more, each.
    assert_eq!(engine.stats().prefill_tokens, 8 + 4 * 5);
    let answers: Vec<Vec<u32>> = receivers.iter_mut().map(|r| ids_of(&drain(r))).collect();
    for (seed, answer) in (0..).zip(answers) {
        let mut alone = Sizes { max_batch_tokens: 64, ..Sizes::default() }.engine();
        assert_eq!(answer, ids_of(&run_one(&mut alone, sampled(seed))), "seed {seed}");
    }
    // The first leaves: the next one goes on in its place.
    let mut engine = Sizes { max_batch_tokens: 8, ..Sizes::default() }.engine();
    let first = engine.submit(request(prompt(2, 40), 2)).unwrap();
    let mut second = engine.submit(request(prompt(2, 40), 2)).unwrap();
    engine.step().unwrap();
    drop(first);
    run(&mut engine);
    assert_eq!(reason(&drain(&mut second)), FinishReason::Length);
    engine.check().unwrap();
}

fn disk_sizes(dir: &Path) -> Sizes {
    let disk = DiskCacheOptions { dir: dir.to_owned(), max_bytes: 1 << 30, model_identity: "tiny".to_owned() };
    Sizes { options: EngineOptions { disk_cache: Some(disk), ..EngineOptions::default() }, ..Sizes::default() }
}

#[test]
fn a_restart_finds_full_blocks_on_disk_and_damaged_files_are_misses() {
    let folder = tempfile::tempdir().unwrap();
    let sizes = disk_sizes(folder.path());
    let mut engine = sizes.engine();
    let expected = ids_of(&run_one(&mut engine, request(prompt(1, 60), 10)));
    engine.flush();
    drop(engine);
    let mut warm = sizes.engine();
    let events = run_one(&mut warm, request(prompt(1, 60), 10));
    assert_eq!((started(&events).cached_tokens, ids_of(&events)), (56, expected.clone()));
    let stats = warm.stats();
    assert_eq!((stats.disk_hit_tokens, stats.disk.unwrap().hits), (56, 7));
    drop(warm);
    let files: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().path()).collect();
    let blocks: Vec<_> = files.iter().filter(|path| path.extension().is_some_and(|e| e == "kv")).collect();
    assert_eq!(blocks.len(), 69 / BLOCK);
    for path in blocks {
        let mut content = std::fs::read(path).unwrap();
        let middle = content.len() / 2;
        content[middle] ^= 4;
        std::fs::write(path, content).unwrap();
    }
    let mut damaged = sizes.engine();
    let events = run_one(&mut damaged, request(prompt(1, 60), 10));
    assert_eq!((started(&events).cached_tokens, ids_of(&events)), (0, expected));
    assert_eq!(damaged.stats().disk.unwrap().corrupt, 1);
}

#[test]
fn a_failing_device_ends_what_runs_and_the_queue_goes_on() {
    let (backend, fault) = FaultyBackend::wrap(cpu());
    let mut engine = Sizes { max_sequences: 1, ..Sizes::default() }.engine_on(backend);
    let mut first = engine.submit(request(prompt(1, 10), 10)).unwrap();
    let mut second = engine.submit(request(prompt(2, 10), 10)).unwrap();
    engine.step().unwrap();
    fault.fail();
    let error = engine.step().unwrap_err().to_string();
    engine.restart(&error);
    assert_eq!(failure(&drain(&mut first)).to_string(), "engine: back end faulty: an injected failure");
    engine.check().unwrap();
    run(&mut engine);
    assert_eq!(reason(&drain(&mut second)), FinishReason::Length);
    let stats = engine.stats();
    assert_eq!((stats.restarts, stats.failures_in_a_row, stats.failed), (1, 0, 1));
}

#[test]
fn unusable_logits_fail_one_request_by_name_and_leave_nothing_cached() {
    for logprobs in [None, Some(1)] {
        let (backend, fault) = FaultyBackend::wrap(cpu());
        let mut engine = Sizes::default().engine_on(backend);
        let mut broken = engine.submit(Request { logprobs, ..request(prompt(1, 16), 10) }).unwrap();
        engine.step().unwrap();
        let mut sound = engine.submit(request(prompt(2, 10), 10)).unwrap();
        fault.nan();
        run(&mut engine);
        let events = drain(&mut broken);
        let text = failure(&events).to_string();
        assert!(text.starts_with("the model's logits after 17 tokens are unusable: the logit of token "), "{text}");
        assert_eq!(reason(&drain(&mut sound)), FinishReason::Length);
        assert_eq!(started(&run_one(&mut engine, request(prompt(1, 16), 1))).cached_tokens, 0);
    }
}

#[test]
fn a_prompt_that_comes_from_disk_holds_nobody_up() {
    let folder = tempfile::tempdir().unwrap();
    let sizes = disk_sizes(folder.path());
    let mut engine = sizes.engine();
    let expected = ids_of(&run_one(&mut engine, request(prompt(1, 60), 6)));
    engine.flush();
    drop(engine);
    let mut engine = sizes.engine();
    let mut beside = engine.submit(request(prompt(2, 10), 80)).unwrap();
    engine.step().unwrap();
    let mut restored = engine.submit(request(prompt(1, 60), 6)).unwrap();
    let gone = engine.submit(request(prompt(1, 60), 6)).unwrap();
    let mut third = engine.submit(request(prompt(3, 10), 6)).unwrap();
    let mut before = drain(&mut beside).len();
    let mut gone = Some(gone);
    for _ in 0..60 {
        engine.step().unwrap();
        engine.check().unwrap();
        gone.take();
        let now = drain(&mut beside).len();
        assert!(now > 0, "the running request has a token in every step");
        before += now;
    }
    assert!(before > 60);
    run(&mut engine);
    let events = drain(&mut restored);
    assert_eq!((started(&events).cached_tokens, ids_of(&events)), (56, expected));
    assert_eq!(ids_of(&drain(&mut third)), ids_of(&run_one(&mut engine, request(prompt(3, 10), 6))));
    assert_eq!(engine.stats().cancelled, 1);
}

#[test]
fn a_failure_while_a_prompt_comes_from_disk_loses_nothing_but_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let sizes = disk_sizes(folder.path());
    let mut engine = sizes.engine();
    let expected = ids_of(&run_one(&mut engine, request(prompt(1, 60), 6)));
    engine.flush();
    drop(engine);
    let mut engine = sizes.engine();
    let _beside = engine.submit(request(prompt(2, 10), 80)).unwrap();
    let mut restored = engine.submit(request(prompt(1, 60), 6)).unwrap();
    engine.step().unwrap();
    engine.restart("on purpose");
    run(&mut engine);
    assert_eq!(ids_of(&drain(&mut restored)), expected);
}

#[test]
fn log_probabilities_of_a_prompt_are_those_of_generating_it() {
    let mut engine = Sizes::default().engine();
    let generated = run_one(&mut engine, Request { logprobs: Some(3), ..request(prompt(1, 21), 9) });
    let tokens = tokens_of(&generated);
    let mut text = prompt(1, 21);
    text.extend(ids_of(&generated));
    let scored = Request { prompt_logprobs: true, logprobs: Some(3), ..request(text, 0) };
    let events = run_one(&mut engine, scored);
    let Some(Event::Finished(finished)) = events.last() else { panic!("{events:?}") };
    let scores = finished.prompt_logprobs.as_ref().unwrap();
    assert_eq!((scores.len(), &scores[0], finished.completion_tokens), (30, &None, 0));
    assert!(scores[1..].iter().all(|score| score.as_ref().is_some_and(|score| score.logprob <= 0.0)));
    for (token, score) in tokens.iter().zip(scores[21..].iter().flatten()) {
        assert_eq!(token.logprob, Some(score.logprob));
        assert_eq!(token.top_logprobs, score.top_logprobs);
        assert_eq!(token.top_logprobs[0], (token.id, token.logprob.unwrap()), "greedy takes the likeliest");
        assert_eq!(token.top_logprobs.len(), 3);
    }
}

#[test]
fn stop_tokens_end_a_request_but_not_before_min_tokens() {
    let mut engine = Sizes::default().engine();
    let free = ids_of(&run_one(&mut engine, request(prompt(1, 10), 12)));
    let stops = Request { stop_token_ids: vec![free[0], free[3]], ..request(prompt(1, 10), 12) };
    let events = run_one(&mut engine, stops);
    assert_eq!((reason(&events), ids_of(&events)), (FinishReason::Stop, free[..1].to_vec()));
    let patient = Request { stop_token_ids: vec![free[0]], min_tokens: 5, ..request(prompt(1, 10), 12) };
    let ids = ids_of(&run_one(&mut engine, patient));
    assert!(ids.len() >= 5 && !ids[..5].contains(&free[0]), "{ids:?}");
}

#[test]
fn a_spent_thinking_budget_writes_the_end_and_goes_on() {
    let mut engine = Sizes::default().engine();
    let thinking_budget = ThinkingBudget {
        max_tokens: 4,
        starts_inside: true,
        open_token_id: 61,
        close_token_id: 62,
        end_token_ids: vec![60, 62],
    };
    let budgeted = Request { thinking_budget: Some(thinking_budget), ..request(prompt(1, 10), 12) };
    let tokens = tokens_of(&run_one(&mut engine, budgeted));
    let free = ids_of(&run_one(&mut engine, request(prompt(1, 10), 12)));
    assert_eq!(tokens.iter().take(4).map(|t| t.id).collect::<Vec<_>>(), free[..4]);
    assert_eq!(tokens.iter().map(|t| t.forced).filter(|forced| *forced).count(), 2);
    assert_eq!((tokens[4].id, tokens[4].forced, tokens[5].id, tokens[5].forced), (60, true, 62, true));
    assert!(tokens.len() == 12 && tokens[6..].iter().all(|t| t.id != 61));
}

/// Allows tokens of one parity in turn and ends after six.
#[derive(Default)]
struct Alternating(u32);

impl Constraint for Alternating {
    fn allow(&mut self, mask: &mut TokenMask) -> Result<(), ConstraintError> {
        (0..mask.vocab_size() as u32).filter(|token| token % 2 != self.0 % 2).for_each(|token| mask.clear(token));
        Ok(())
    }
    fn consume(&mut self, token: u32) -> Result<(), ConstraintError> {
        if token % 2 != self.0 % 2 {
            return Err(ConstraintError::NotAllowed { token, consumed: self.0 as usize });
        }
        self.0 += 1;
        Ok(())
    }
    fn rollback(&mut self, num_tokens: usize) -> Result<(), ConstraintError> {
        self.0 -= num_tokens as u32;
        Ok(())
    }
    fn may_end(&mut self) -> bool {
        self.0 >= 6
    }
    fn is_complete(&mut self) -> bool {
        self.0 >= 6
    }
}

/// Fails at the third token.
struct Failing(u32);

impl Constraint for Failing {
    fn allow(&mut self, _mask: &mut TokenMask) -> Result<(), ConstraintError> {
        self.0 += 1;
        if self.0 < 3 {
            return Ok(());
        }
        Err(ConstraintError::Failed { consumed: 2, reason: "out of fuel".to_owned() })
    }
    fn consume(&mut self, _token: u32) -> Result<(), ConstraintError> {
        Ok(())
    }
    fn rollback(&mut self, _num_tokens: usize) -> Result<(), ConstraintError> {
        Ok(())
    }
    fn may_end(&mut self) -> bool {
        false
    }
    fn is_complete(&mut self) -> bool {
        false
    }
}

#[test]
fn constraints_bind_every_token_and_their_failure_fails_the_request() {
    let mut engine = Sizes::default().engine();
    for temperature in [0.0, 1.5] {
        let constrained = Request {
            constraint: Some(Box::new(Alternating::default())),
            sampling: SamplingParams { temperature, ..SamplingParams::default() },
            stop_token_ids: (0..10).collect(),
            ..request(prompt(1, 10), 40)
        };
        let events = run_one(&mut engine, constrained);
        let ids = ids_of(&events);
        assert_eq!((reason(&events), ids.len()), (FinishReason::Stop, 6));
        assert!(ids.iter().zip(0u32..).all(|(id, i)| id % 2 == i % 2 && *id >= 10), "{ids:?}");
    }
    let failing = Request { constraint: Some(Box::new(Failing(0))), ..request(prompt(1, 10), 40) };
    let events = run_one(&mut engine, failing);
    let text = "constraint: the grammar's parser stopped after 2 tokens: out of fuel";
    assert_eq!((failure(&events).to_string().as_str(), ids_of(&events).len()), (text, 2));
}
