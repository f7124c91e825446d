//! A generator that leaves memory when nobody asks, and comes back when somebody does.
//!
//! The first request after an unload starts the load, and it and those behind it wait for it. What the generator cached on
//! disk is still there afterwards; what it cached in memory is not.
//!
//! A generator whose steps fail again and again is left and loaded anew by the next request: a device that was lost must be opened
//! again. (CUDA does not open one again in the same process after a kernel went wrong; then the load says so.)

use crate::generator::{EventSource, EventStream, Generator, GeneratorStats, UnloadError};
use moellon_engine::{Event, Request, RequestError};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Makes the generator again, as it was; an error is said to everybody who waits, and the next request tries again.
type Load = dyn Fn() -> Result<Arc<dyn Generator>, String> + Send + Sync;

/// Failed steps in a row after which a generator is not asked again. One may be anything; the engine begins anew after it.
const FAILURES: u64 = 2;

/// A generator that may be unloaded. Needs a place for its requests only while it loads.
pub struct Resident {
    shared: Arc<Shared>,
}

struct Shared {
    load: Box<Load>,
    /// Requests that may wait for a load.
    max_waiting: usize,
    state: Mutex<State>,
}

enum State {
    Loaded {
        generator: Arc<dyn Generator>,
        /// When there last was something to do.
        used: Instant,
        /// Held by requests that waited for the load and are not submitted yet.
        arriving: Arc<()>,
    },
    Unloaded {
        /// What it last said of itself, with why it could not be loaded again, if it could not.
        last: Box<GeneratorStats>,
    },
    /// On its way out or in.
    Moving { last: Box<GeneratorStats>, waiting: Vec<oneshot::Sender<Loaded>> },
}

/// What those who wait are sent.
type Loaded = Result<Arrival, String>;

#[derive(Clone)]
struct Arrival {
    generator: Arc<dyn Generator>,
    /// Keeps the generator where it is until the request is in its count.
    arriving: Arc<()>,
}

impl Resident {
    /// `generator` is what `load` made first. It is unloaded after `idle` without requests, if a time is given, and when
    /// [`Generator::unload`] says so.
    ///
    /// # Errors
    /// If the operating system gives no thread to look at the clock.
    pub fn new(
        generator: Arc<dyn Generator>,
        load: impl Fn() -> Result<Arc<dyn Generator>, String> + Send + Sync + 'static,
        idle: Option<Duration>,
        max_waiting: usize,
    ) -> std::io::Result<Resident> {
        let state = Mutex::new(State::Loaded { generator, used: Instant::now(), arriving: Arc::new(()) });
        let shared = Arc::new(Shared { load: Box::new(load), max_waiting, state });
        if let Some(idle) = idle {
            let watched = Arc::downgrade(&shared);
            let interval = (idle / 8).clamp(Duration::from_millis(5), Duration::from_secs(1));
            std::thread::Builder::new().name("idle".to_owned()).spawn(move || {
                loop {
                    std::thread::sleep(interval);
                    let Some(shared) = watched.upgrade() else { return };
                    // Busy, or not loaded: there is nothing to do.
                    let _ = shared.unload(Some(idle));
                }
            })?;
        }
        Ok(Resident { shared })
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of the state is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Unloads what has had nothing to do for `idle`, or at once.
    fn unload(self: &Arc<Self>, idle: Option<Duration>) -> Result<(), UnloadError> {
        let mut state = self.lock();
        let State::Loaded { generator, used, arriving } = &mut *state else { return Ok(()) };
        let stats = generator.stats();
        let requests = stats.running + stats.waiting + Arc::strong_count(arriving) - 1;
        if requests > 0 {
            *used = Instant::now();
            return Err(UnloadError::Busy { requests });
        }
        if idle.is_some_and(|idle| used.elapsed() < idle) {
            return Ok(());
        }
        let last = Box::new(GeneratorStats { cache_used_bytes: 0, cache_reusable_bytes: 0, ..stats });
        let moving = State::Moving { last: last.clone(), waiting: Vec::new() };
        let State::Loaded { generator, .. } = std::mem::replace(&mut *state, moving) else {
            unreachable!("it was loaded, and the lock is held");
        };
        drop(state);
        let started = Instant::now();
        generator.close();
        drop(generator);
        tracing::info!(seconds = started.elapsed().as_secs_f64(), "model unloaded");
        let mut state = self.lock();
        let is_wanted = matches!(&*state, State::Moving { waiting, .. } if !waiting.is_empty());
        if is_wanted {
            drop(state);
            self.spawn_load(None);
        } else {
            *state = State::Unloaded { last };
        }
        Ok(())
    }

    /// Loads in a thread of its own, once `broken` has let go of the device.
    fn spawn_load(self: &Arc<Self>, broken: Option<Arc<dyn Generator>>) {
        let shared = Arc::clone(self);
        let spawned = std::thread::Builder::new().name("load".to_owned()).spawn(move || {
            if let Some(broken) = broken {
                tracing::warn!("the device failed {FAILURES} times in a row, the model is loaded anew");
                broken.close();
            }
            let started = Instant::now();
            let loaded = (shared.load)();
            match &loaded {
                Ok(_) => tracing::info!(seconds = started.elapsed().as_secs_f64(), "model loaded"),
                Err(reason) => tracing::error!(%reason, "the model could not be loaded again"),
            }
            shared.settle(loaded);
        });
        if let Err(error) = spawned {
            self.settle(Err(error.to_string()));
        }
    }

    /// Ends a load: those who wait are told.
    fn settle(&self, loaded: Result<Arc<dyn Generator>, String>) {
        let mut state = self.lock();
        let State::Moving { last, waiting } = &mut *state else { return };
        let waiting = std::mem::take(waiting);
        let last = GeneratorStats { failed: loaded.is_err(), waiting: 0, ..(**last).clone() };
        let loaded: Loaded = loaded.map(|generator| Arrival { generator, arriving: Arc::new(()) });
        *state = match &loaded {
            Ok(Arrival { generator, arriving }) => {
                State::Loaded { generator: Arc::clone(generator), used: Instant::now(), arriving: Arc::clone(arriving) }
            }
            Err(_) => State::Unloaded { last: Box::new(last) },
        };
        drop(state);
        // Nothing of them stays here: what is arriving keeps the generator loaded.
        let messages: Vec<_> = waiting.into_iter().map(|sender| (sender, loaded.clone())).collect();
        drop(loaded);
        for (sender, message) in messages {
            // Who has left needs nothing.
            let _ = sender.send(message);
        }
    }
}

impl Generator for Resident {
    fn submit(&self, request: Request) -> Result<EventStream, RequestError> {
        let mut state = self.shared.lock();
        let (sender, receiver) = oneshot::channel();
        let mut broken = None;
        let must_load = match &mut *state {
            State::Loaded { generator, used, .. } => {
                *used = Instant::now();
                let stats = generator.stats();
                if stats.failures_in_a_row < FAILURES || stats.running > 0 {
                    return generator.submit(request);
                }
                let moving = State::Moving { last: Box::new(stats), waiting: vec![sender] };
                if let State::Loaded { generator, .. } = std::mem::replace(&mut *state, moving) {
                    broken = Some(generator);
                }
                true
            }
            State::Unloaded { last } => {
                let last = std::mem::take(last);
                *state = State::Moving { last, waiting: vec![sender] };
                true
            }
            State::Moving { waiting, .. } => {
                waiting.retain(|sender| !sender.is_closed());
                if waiting.len() >= self.shared.max_waiting {
                    return Err(RequestError::QueueFull { waiting: waiting.len(), limit: self.shared.max_waiting });
                }
                waiting.push(sender);
                false
            }
        };
        drop(state);
        if must_load {
            self.shared.spawn_load(broken);
        }
        Ok(Box::new(AfterLoad::Waiting(Box::new(request), receiver)))
    }

    fn stats(&self) -> GeneratorStats {
        match &*self.shared.lock() {
            State::Loaded { generator, .. } => generator.stats(),
            State::Unloaded { last } => GeneratorStats { unloaded: true, ..(**last).clone() },
            State::Moving { last, waiting } => {
                let waiting = waiting.iter().filter(|sender| !sender.is_closed()).count();
                GeneratorStats { unloaded: true, waiting, ..(**last).clone() }
            }
        }
    }

    fn unload(&self) -> Result<(), UnloadError> {
        self.shared.unload(None)
    }

    fn close(&self) {
        if let State::Loaded { generator, .. } = &*self.shared.lock() {
            generator.close();
        }
    }
}

/// The events of a request that waits for a load.
enum AfterLoad {
    Waiting(Box<Request>, oneshot::Receiver<Loaded>),
    Going(EventStream),
    Over,
}

impl EventSource for AfterLoad {
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        if let AfterLoad::Waiting(_, receiver) = self {
            let Poll::Ready(loaded) = Future::poll(Pin::new(receiver), context) else { return Poll::Pending };
            let AfterLoad::Waiting(request, _) = std::mem::replace(self, AfterLoad::Over) else {
                unreachable!("it is matched above");
            };
            let submitted = match loaded {
                Ok(Ok(arrival)) => arrival.generator.submit(*request),
                Ok(Err(reason)) => Err(RequestError::Engine(format!("the model could not be loaded: {reason}"))),
                Err(_) => Err(RequestError::ShuttingDown),
            };
            match submitted {
                Ok(events) => *self = AfterLoad::Going(events),
                Err(error) => return Poll::Ready(Some(Event::Failed(error))),
            }
        }
        match self {
            AfterLoad::Going(events) => events.poll_next(context),
            AfterLoad::Waiting(..) | AfterLoad::Over => Poll::Ready(None),
        }
    }
}
