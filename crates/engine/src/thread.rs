//! One thread owns the engine; everybody else holds an [`EngineHandle`] and sends messages.
//!
//! A step that panics or whose device fails ends the requests in flight with [`Event::Failed`], and the engine goes on with
//! empty caches. What the engine says about itself is written after every step to a place of its own, so that it can be
//! read while a step hangs.
//!
//! [`Event::Failed`]: crate::request::Event::Failed

use crate::engine::{Engine, EngineError, RequestLimits};
use crate::events::{EventReceiver, channel};
use crate::request::{Request, RequestError};
use crate::sequence::{QueueTicket, Sequence};
use crate::stats::EngineStats;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often a busy engine that found nothing to do looks again. Only a bug makes it wait this long.
const RETRY: Duration = Duration::from_millis(5);

enum Message {
    Submit(Box<Sequence>),
    /// Finish what runs and waits until the deadline, then stop.
    Stop(Instant),
}

/// What the engine's thread writes and everybody may read.
struct Report {
    stats: EngineStats,
    /// The end of the last step, or when the engine became busy.
    progress: Instant,
    busy: bool,
}

struct Shared {
    limits: RequestLimits,
    max_sequence_tokens: usize,
    num_waiting: Arc<AtomicUsize>,
    rejected: AtomicU64,
    stopping: AtomicBool,
    report: Mutex<Report>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Sends requests to an engine on its own thread. Cheap to clone; the engine stops when the last handle is gone.
#[derive(Clone)]
pub struct EngineHandle {
    messages: Sender<Message>,
    shared: Arc<Shared>,
}

impl EngineHandle {
    /// Moves an engine to a thread of its own.
    ///
    /// # Errors
    /// If the operating system gives no thread.
    pub fn spawn(mut engine: Engine) -> Result<Self, EngineError> {
        let (messages, inbox) = mpsc::channel();
        let report = Report { stats: engine.stats(), progress: Instant::now(), busy: false };
        let shared = Arc::new(Shared {
            limits: engine.limits(),
            max_sequence_tokens: engine.max_sequence_tokens(),
            num_waiting: engine.num_waiting(),
            rejected: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            report: Mutex::new(report),
            thread: Mutex::new(None),
        });
        let worker = Worker { engine, inbox, shared: Arc::clone(&shared), deadline: None };
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || worker.run())
            .map_err(EngineError::Thread)?;
        *shared.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(EngineHandle { messages, shared })
    }

    /// Checks and queues a request. Dropping the receiver cancels it within one step.
    ///
    /// # Errors
    /// What does not fit, with numbers; a full queue; an engine that shuts down.
    pub fn submit(&self, request: Request) -> Result<EventReceiver, RequestError> {
        let shared = &self.shared;
        let refuse = |error| {
            shared.rejected.fetch_add(1, Ordering::Relaxed);
            error
        };
        if shared.stopping.load(Ordering::Relaxed) {
            return Err(refuse(RequestError::ShuttingDown));
        }
        shared.limits.check(&request, shared.num_waiting.load(Ordering::Relaxed)).map_err(refuse)?;
        let (sender, receiver) = channel();
        let ticket = QueueTicket::new(&shared.num_waiting);
        let sequence = Sequence::new(request, shared.max_sequence_tokens, sender, ticket);
        let sent = self.messages.send(Message::Submit(Box::new(sequence)));
        sent.map_err(|_| refuse(RequestError::ShuttingDown))?;
        Ok(receiver)
    }

    /// What requests are checked against.
    pub fn limits(&self) -> RequestLimits {
        self.shared.limits
    }

    /// The engine's state after its last step. Does not wait for the engine.
    pub fn stats(&self) -> EngineStats {
        let report = lock(&self.shared.report);
        EngineStats {
            waiting: self.shared.num_waiting.load(Ordering::Relaxed),
            rejected: self.shared.rejected.load(Ordering::Relaxed),
            since_progress: if report.busy { report.progress.elapsed() } else { Duration::ZERO },
            ..report.stats.clone()
        }
    }

    /// Whether the engine's thread is there. It ends at a shutdown; a panic outside of a step, which is a bug, ends it too.
    pub fn is_running(&self) -> bool {
        let thread = self.shared.thread.lock().unwrap_or_else(PoisonError::into_inner);
        thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Takes no more requests, lets those in flight finish for at most `drain`, fails the rest with
    /// [`RequestError::ShuttingDown`], writes cached blocks to disk and ends the thread.
    pub fn shutdown(&self, drain: Duration) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        let now = Instant::now();
        let deadline = now.checked_add(drain).unwrap_or(now + Duration::from_secs(365 * 86_400));
        // An error means that the thread has ended already.
        let _ = self.messages.send(Message::Stop(deadline));
        let thread = self.shared.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A panic outside of a step has failed all requests on its way.
            let _ = thread.join();
        }
    }
}

fn lock(report: &Mutex<Report>) -> MutexGuard<'_, Report> {
    report.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The engine's thread.
struct Worker {
    engine: Engine,
    inbox: Receiver<Message>,
    shared: Arc<Shared>,
    /// Set once it is to stop.
    deadline: Option<Instant>,
}

impl Worker {
    fn run(mut self) {
        let mut worked = true;
        while self.receive(worked) {
            worked = match catch_unwind(AssertUnwindSafe(|| self.engine.step())) {
                Ok(Ok(worked)) => worked,
                Ok(Err(error)) => self.recover(&error.to_string()),
                Err(panic) => self.recover(&format!("panic: {}", text_of(panic.as_ref()))),
            };
            self.report(worked);
        }
        while let Ok(Message::Submit(sequence)) = self.inbox.try_recv() {
            self.engine.enqueue(*sequence);
        }
        self.engine.fail_all(&RequestError::ShuttingDown);
        self.engine.flush();
        self.report(true);
    }

    /// Takes what has arrived, waiting if there is nothing to do; `false` to stop.
    fn receive(&mut self, worked: bool) -> bool {
        loop {
            let is_idle = self.engine.is_idle();
            if self.deadline.is_some_and(|deadline| is_idle || Instant::now() >= deadline) {
                return false;
            }
            let message = if is_idle {
                self.inbox.recv().map_err(|_| TryRecvError::Disconnected)
            } else if worked {
                self.inbox.try_recv()
            } else {
                self.inbox.recv_timeout(RETRY).map_err(|error| match error {
                    RecvTimeoutError::Timeout => TryRecvError::Empty,
                    RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
                })
            };
            match message {
                Ok(Message::Submit(sequence)) => {
                    if is_idle {
                        let mut report = lock(&self.shared.report);
                        report.progress = Instant::now();
                        report.busy = true;
                    }
                    self.engine.enqueue(*sequence);
                }
                Ok(Message::Stop(deadline)) => self.deadline = Some(deadline),
                Err(TryRecvError::Empty) => return true,
                // Nobody can ask any more, but those in flight are still answered.
                Err(TryRecvError::Disconnected) if self.engine.is_idle() => return false,
                Err(TryRecvError::Disconnected) => return true,
            }
        }
    }

    fn recover(&mut self, reason: &str) -> bool {
        self.engine.restart(reason);
        true
    }

    fn report(&mut self, progress: bool) {
        let stats = self.engine.stats();
        let busy = !self.engine.is_idle();
        let mut report = lock(&self.shared.report);
        report.stats = stats;
        report.busy = busy;
        if progress {
            report.progress = Instant::now();
        }
    }
}

fn text_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}
