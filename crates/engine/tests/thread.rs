//! The engine on its thread: many clients, failures, shutdown.

mod support;

use moellon_engine::{EngineHandle, Event, EventReceiver, FinishReason, RequestError};
use std::time::{Duration, Instant};
use support::faulty::FaultyBackend;
use support::{Sizes, cpu, ids_of, prompt, request};

fn collect(mut receiver: EventReceiver) -> Vec<Event> {
    std::iter::from_fn(|| receiver.recv_timeout(Duration::from_secs(60)).expect("the engine makes progress")).collect()
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "{what} in time");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn many_threads_get_their_own_answers_and_nothing_is_left() {
    let sizes = Sizes::default();
    let expected: Vec<Vec<u32>> =
        (0..6).map(|i| ids_of(&support::run_one(&mut sizes.engine(), request(prompt(i, 12), 8)))).collect();
    let engine = EngineHandle::spawn(sizes.engine()).unwrap();
    std::thread::scope(|scope| {
        for client in 0..6u32 {
            let (engine, expected) = (engine.clone(), &expected);
            scope.spawn(move || {
                for round in 0..5 {
                    let receiver = engine.submit(request(prompt(client, 12), 8)).unwrap();
                    if (client + round) % 3 == 0 {
                        drop(receiver);
                    } else {
                        assert_eq!(ids_of(&collect(receiver)), expected[client as usize]);
                    }
                }
            });
        }
    });
    wait_until("everything ends", || engine.stats().running + engine.stats().waiting == 0);
    wait_until("blocks are given back", || engine.stats().used_blocks == 0);
    let stats = engine.stats();
    assert!(stats.steps > 0 && stats.generated_tokens > 0 && stats.since_progress.is_zero());
    assert_eq!(stats.cancelled + stats.finished_length, 30);
}

#[test]
fn a_panic_fails_what_runs_and_the_engine_starts_anew() {
    let (backend, fault) = FaultyBackend::wrap(cpu());
    let engine = EngineHandle::spawn(Sizes::default().engine_on(backend)).unwrap();
    let expected = ids_of(&collect(engine.submit(request(prompt(1, 20), 10)).unwrap()));
    fault.panic();
    let events = collect(engine.submit(request(prompt(1, 20), 10)).unwrap());
    let Some(Event::Failed(error)) = events.last() else { panic!("{events:?}") };
    assert_eq!(error.to_string(), "engine: panic: an injected panic");
    let events = collect(engine.submit(request(prompt(1, 20), 10)).unwrap());
    let [Event::Started(started), ..] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!((started.cached_tokens, ids_of(&events)), (0, expected));
    wait_until("the report is there", || engine.stats().failures_in_a_row == 0);
    assert_eq!((engine.stats().restarts, engine.stats().failed), (1, 1));
}

#[test]
fn shutdown_lets_requests_finish_and_takes_no_more() {
    let engine = EngineHandle::spawn(Sizes::default().engine()).unwrap();
    let receivers: Vec<_> = (0..6).map(|i| engine.submit(request(prompt(i, 12), 20)).unwrap()).collect();
    assert!(engine.is_running());
    engine.shutdown(Duration::from_secs(60));
    assert!(!engine.is_running());
    for receiver in receivers {
        let events = collect(receiver);
        let Some(Event::Finished(finished)) = events.last() else { panic!("{events:?}") };
        assert_eq!((finished.reason, finished.completion_tokens), (FinishReason::Length, 20));
    }
    assert_eq!(engine.submit(request(vec![1], 1)).unwrap_err(), RequestError::ShuttingDown);
    assert_eq!(engine.stats().rejected, 1);
}

#[test]
fn shutdown_without_patience_fails_the_rest_in_words() {
    let engine = EngineHandle::spawn(Sizes::default().engine()).unwrap();
    let receivers: Vec<_> = (0..8).map(|i| engine.submit(request(prompt(i, 12), 80)).unwrap()).collect();
    engine.shutdown(Duration::ZERO);
    for receiver in receivers {
        let events = collect(receiver);
        assert!(
            matches!(events.last(), Some(Event::Failed(RequestError::ShuttingDown) | Event::Finished(_))),
            "{events:?}"
        );
    }
    assert_eq!(engine.stats().running, 0);
}

#[test]
fn requests_in_flight_are_answered_when_all_handles_are_gone() {
    let engine = EngineHandle::spawn(Sizes::default().engine()).unwrap();
    let receiver = engine.submit(request(prompt(1, 12), 20)).unwrap();
    drop(engine);
    assert_eq!(ids_of(&collect(receiver)).len(), 20);
}
