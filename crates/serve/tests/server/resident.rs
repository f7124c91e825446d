//! A model that is unloaded while nobody asks.

use crate::client::{TestServer, options, served_model};
use moellon_engine::{Request, RequestError};
use moellon_serve::scripted::{ScriptedAnswer, ScriptedGenerator};
use moellon_serve::{EventStream, Generator, GeneratorStats, Resident};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::oneshot;

const PATH: &str = "/v1/chat/completions";

/// A generator that answers nothing once it is closed.
struct Closable {
    scripted: Arc<ScriptedGenerator>,
    is_closed: AtomicBool,
}

impl Generator for Closable {
    fn submit(&self, request: Request) -> Result<EventStream, RequestError> {
        if self.is_closed.load(Ordering::SeqCst) {
            return Err(RequestError::ShuttingDown);
        }
        self.scripted.submit(request)
    }

    fn stats(&self) -> GeneratorStats {
        self.scripted.stats()
    }

    fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
    }
}

/// What the loads of a test do, in order: wait for a word, which may be a failure. Beyond them, loads succeed at once.
type Loads = Arc<Mutex<VecDeque<oneshot::Receiver<Result<(), String>>>>>;

/// A server, what its loads do, and how many there were.
async fn resident(idle: Option<Duration>, max_waiting: usize) -> (Arc<TestServer>, Loads, Arc<AtomicUsize>) {
    let model = served_model();
    let script = |prompt: &str, _: &Request| ScriptedAnswer {
        prefill: Duration::from_secs(if prompt.contains("long") { 3600 } else { 0 }),
        ..ScriptedAnswer::text("</think>ok")
    };
    let scripted = Arc::new(ScriptedGenerator::new(Arc::clone(&model.tokenizer), script));
    let (loads, count) = (Loads::default(), Arc::new(AtomicUsize::new(0)));
    let make = {
        let scripted = Arc::clone(&scripted);
        move || Arc::new(Closable { scripted: Arc::clone(&scripted), is_closed: AtomicBool::new(false) })
    };
    let load = {
        let (loads, count, make) = (Arc::clone(&loads), Arc::clone(&count), make.clone());
        move || {
            count.fetch_add(1, Ordering::SeqCst);
            let word = loads.lock().unwrap().pop_front();
            word.map_or(Ok(()), |word| word.blocking_recv().expect("the test says a word"))?;
            Ok(make() as Arc<dyn Generator>)
        }
    };
    let generator = Resident::new(make(), load, idle, max_waiting).unwrap();
    let server = TestServer::start_generator(model, options(), scripted, Arc::new(generator)).await;
    (Arc::new(server), loads, count)
}

fn ask(content: &str) -> Value {
    json!({"messages": [{"role": "user", "content": content}]})
}

async fn health(server: &TestServer) -> Value {
    server.get("/health").await.json()
}

async fn wait_until(server: &TestServer, what: &str, condition: impl Fn(&Value) -> bool) {
    for _ in 0..1000 {
        if condition(&health(server).await) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} did not happen within 10 s");
}

#[tokio::test]
async fn an_unloaded_model_is_loaded_by_the_next_request() {
    let (server, _, count) = resident(None, 8).await;
    assert_eq!(server.post(PATH, &ask("hi")).await.status, 200);
    for loads in 0..3 {
        assert_eq!(health(&server).await["loaded"], true);
        assert_eq!(server.post("/models/unload", &json!({})).await.json()["success"], true);
        // Twice is no error.
        assert_eq!(server.post("/models/unload", &json!({})).await.status, 200);
        assert_eq!(health(&server).await["loaded"], false);
        assert_eq!(server.get("/ready").await.status, 200);
        assert_eq!(count.load(Ordering::SeqCst), loads);
        let reply = server.post(PATH, &ask("hi")).await;
        assert_eq!(reply.json()["choices"][0]["message"]["content"], "ok");
    }
    assert!(server.get("/metrics").await.body.contains("moellon:model_loaded{model_name=\"tiny\"} 1"));
}

/// A generator whose device is gone.
struct Broken {
    failures_in_a_row: u64,
    is_closed: Arc<AtomicBool>,
}

impl Generator for Broken {
    fn submit(&self, _: Request) -> Result<EventStream, RequestError> {
        Err(RequestError::Engine("the device is lost".to_owned()))
    }

    fn stats(&self) -> GeneratorStats {
        GeneratorStats { failures_in_a_row: self.failures_in_a_row, ..GeneratorStats::default() }
    }

    fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
    }
}

#[tokio::test]
async fn a_generator_that_fails_again_and_again_is_loaded_anew() {
    for (failures_in_a_row, is_reloaded) in [(1, false), (2, true)] {
        let model = served_model();
        let script = |_: &str, _: &Request| ScriptedAnswer::text("</think>ok");
        let scripted = Arc::new(ScriptedGenerator::new(Arc::clone(&model.tokenizer), script));
        let is_closed = Arc::new(AtomicBool::new(false));
        let broken = Arc::new(Broken { failures_in_a_row, is_closed: Arc::clone(&is_closed) });
        let (next, seen) = (Arc::clone(&scripted), Arc::clone(&is_closed));
        let load = move || {
            assert!(seen.load(Ordering::SeqCst), "the device is let go of before it is opened again");
            Ok(Arc::clone(&next) as Arc<dyn Generator>)
        };
        let generator = Resident::new(broken, load, None, 8).unwrap();
        let server = TestServer::start_generator(model, options(), scripted, Arc::new(generator)).await;
        let reply = server.post(PATH, &ask("hi")).await;
        if is_reloaded {
            assert_eq!(reply.json()["choices"][0]["message"]["content"], "ok");
        } else {
            assert_eq!(reply.status, 500);
            assert!(reply.body.contains("the device is lost"), "{reply:?}");
        }
        assert_eq!(is_closed.load(Ordering::SeqCst), is_reloaded);
    }
}

#[tokio::test]
async fn requests_wait_for_one_load_and_too_many_are_told_so() {
    let (server, loads, count) = resident(None, 3).await;
    assert_eq!(server.post("/models/unload", &json!({})).await.status, 200);
    let (word, heard) = oneshot::channel();
    loads.lock().unwrap().push_back(heard);
    let waiting: Vec<_> = (0..3)
        .map(|_| {
            let server = Arc::clone(&server);
            tokio::spawn(async move { server.post(PATH, &ask("hi")).await })
        })
        .collect();
    wait_until(&server, "waiting", |health| health["waiting"] == 3).await;
    let reply = server.post(PATH, &ask("hi")).await;
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (429, &json!("queue_full")));
    word.send(Ok(())).unwrap();
    for request in waiting {
        assert_eq!(request.await.unwrap().status, 200);
    }
    assert_eq!(count.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_load_that_fails_is_said_and_tried_again() {
    let (server, loads, count) = resident(None, 8).await;
    assert_eq!(server.post("/models/unload", &json!({})).await.status, 200);
    let (word, heard) = oneshot::channel();
    loads.lock().unwrap().push_back(heard);
    word.send(Err("out of memory".to_owned())).unwrap();
    let reply = server.post(PATH, &ask("hi")).await;
    assert_eq!(reply.status, 500);
    assert!(reply.body.contains("could not be loaded: out of memory"), "{reply:?}");
    assert_eq!(server.get("/ready").await.status, 503);
    assert_eq!(server.post(PATH, &ask("hi")).await.status, 200);
    assert_eq!(server.get("/ready").await.status, 200);
    assert_eq!(count.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn work_keeps_the_model_and_idleness_unloads_it() {
    let (server, _, count) = resident(Some(Duration::from_millis(40)), 8).await;
    wait_until(&server, "unloading", |health| health["loaded"] == false).await;
    let working = {
        let server = Arc::clone(&server);
        tokio::spawn(async move { server.post(PATH, &ask("a long prompt")).await })
    };
    wait_until(&server, "work", |health| health["running"] == 1).await;
    // Five times as long as it may be idle.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(health(&server).await["loaded"], true);
    let reply = server.post("/models/unload", &json!({})).await;
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (503, &json!("busy")));
    working.abort();
    wait_until(&server, "unloading again", |health| health["loaded"] == false).await;
    assert_eq!(count.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_generator_that_cannot_be_unloaded_says_so() {
    let server = TestServer::saying("</think>ok").await;
    let reply = server.post("/models/unload", &json!({})).await;
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (400, &json!("unsupported")));
}
