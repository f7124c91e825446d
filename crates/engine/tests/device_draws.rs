//! Tokens that the device draws are those that the host would have drawn, with drafts and without, and rows of logits stay on the device
//! as long as nobody needs them.

mod support;

use moellon_engine::{EngineOptions, Policy, Request, SamplingParams, SpeculationOptions};
use support::drawing::DrawingBackend;
use support::{Sizes, cpu, drain, ids_of, prompt, request};

/// Tokens of the fixture's vocabulary.
fn vocab_size(sizes: &Sizes) -> usize {
    sizes.decoder(cpu().as_mut()).config().vocab_size
}

fn sampled(seed: u64, params: SamplingParams) -> Request {
    let sampling = SamplingParams { seed, ..params };
    Request { sampling, ..request(prompt(seed as u32 % 3, 9 + seed as usize), 24) }
}

/// One of each way to draw, greedy ones among them.
fn requests() -> Vec<Request> {
    let hot = SamplingParams { temperature: 0.9, ..SamplingParams::default() };
    [
        hot.clone(),
        SamplingParams::default(),
        SamplingParams { top_k: 5, ..hot.clone() },
        SamplingParams { top_p: 0.8, ..hot.clone() },
        SamplingParams { min_p: 0.05, temperature: 1.7, ..hot.clone() },
        SamplingParams { top_k: 40, top_p: 0.95, min_p: 0.01, ..hot },
    ]
    .into_iter()
    .zip(1..)
    .map(|(params, seed)| sampled(seed, params))
    .collect()
}

/// Everybody's tokens, and the rows of logits read and drawn.
fn answers(sizes: &Sizes, on_device: bool, requests: Vec<Request>) -> (Vec<Vec<u32>>, [usize; 2]) {
    let (backend, counts) = DrawingBackend::wrap(cpu(), vocab_size(sizes));
    let mut engine = sizes.engine_on(if on_device { backend } else { cpu() });
    counts.take();
    let mut receivers: Vec<_> =
        requests.into_iter().map(|request| engine.submit(request).expect("it is accepted")).collect();
    for _ in 0..400 {
        engine.step().expect("a step works");
    }
    (receivers.iter_mut().map(|receiver| ids_of(&drain(receiver))).collect(), counts.take())
}

fn sizes(speculation: Option<SpeculationOptions>) -> Sizes {
    Sizes { options: EngineOptions { speculation, ..EngineOptions::default() }, ..Sizes::default() }
}

fn drafting() -> SpeculationOptions {
    SpeculationOptions {
        suffix: true,
        mtp: false,
        policy: Policy::Always,
        max_depth: 4,
        ..SpeculationOptions::default()
    }
}

#[test]
fn the_device_draws_what_the_host_draws() {
    for speculation in [None, Some(drafting())] {
        let sizes = sizes(speculation);
        let (expected, _) = answers(&sizes, false, requests());
        let (found, [rows_read, rows_drawn]) = answers(&sizes, true, requests());
        assert_eq!(found, expected);
        assert!(expected.iter().all(|tokens| tokens.len() == 24), "all requests ended");
        assert_eq!(rows_read, 0, "no row of logits was needed");
        assert!(rows_drawn >= 5 * 24, "{rows_drawn} rows drawn");
    }
}

#[test]
fn what_needs_logits_reads_them() {
    let hot = SamplingParams { temperature: 0.9, ..SamplingParams::default() };
    let penalized = SamplingParams { presence_penalty: 0.5, ..hot.clone() };
    let biased = SamplingParams { logit_bias: vec![(3, 2.0)], ..hot.clone() };
    let wishes = || {
        vec![
            sampled(1, penalized.clone()),
            sampled(2, biased.clone()),
            Request { logprobs: Some(2), ..sampled(3, hot.clone()) },
            // Stop tokens are masked until then, and its draws go on as if nothing had been.
            Request { min_tokens: 6, stop_token_ids: vec![61], ..sampled(4, hot.clone()) },
        ]
    };
    let sizes = sizes(Some(drafting()));
    let (expected, _) = answers(&sizes, false, wishes());
    let (found, [rows_read, rows_drawn]) = answers(&sizes, true, wishes());
    assert_eq!(found, expected);
    assert!(rows_read >= 3 * 24, "{rows_read} rows read");
    assert!(rows_drawn >= 10, "{rows_drawn} rows drawn");
}
