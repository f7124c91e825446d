//! The way of events from the engine to whoever asked: a queue that can be read by waiting, by polling, or from an async
//! task, without an async runtime here. Letting go of the receiving end cancels the request.

use crate::request::{Event, RequestError};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    arrived: Condvar,
    cancelled: AtomicBool,
}

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<Event>,
    waker: Option<Waker>,
    /// The sender has sent its last event.
    closed: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing panics while it holds the lock, so a poisoned queue is a whole one.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The engine's end.
#[derive(Debug)]
pub(crate) struct EventSender {
    shared: Arc<Shared>,
}

/// The asker's end: dropping it cancels the request within one step.
#[derive(Debug)]
pub struct EventReceiver {
    shared: Arc<Shared>,
}

/// Cancels a request from elsewhere; its receiver then gets `Finished` with `FinishReason::Cancelled`.
#[derive(Debug, Clone)]
pub struct CancelHandle {
    shared: Arc<Shared>,
}

/// A queue's two ends.
pub(crate) fn channel() -> (EventSender, EventReceiver) {
    let shared = Arc::new(Shared::default());
    (EventSender { shared: Arc::clone(&shared) }, EventReceiver { shared })
}

impl EventSender {
    /// Appends an event. After `Finished` or `Failed` nothing more is taken.
    pub(crate) fn send(&self, event: Event) {
        let mut queue = self.shared.lock();
        if queue.closed {
            return;
        }
        queue.closed = matches!(event, Event::Finished(_) | Event::Failed(_));
        queue.events.push_back(event);
        let waker = queue.waker.take();
        drop(queue);
        self.shared.arrived.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Whether the receiver is gone or asked for the end.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.shared.cancelled.load(Ordering::Relaxed)
    }
}

impl Drop for EventSender {
    /// A request never ends without a word, whatever happened to the engine.
    fn drop(&mut self) {
        self.send(Event::Failed(RequestError::Engine("it stopped before the request was finished".to_owned())));
    }
}

impl EventReceiver {
    /// Waits for the next event; `None` after the last.
    pub fn recv(&mut self) -> Option<Event> {
        let mut queue = self.shared.lock();
        loop {
            if let Some(event) = queue.events.pop_front() {
                return Some(event);
            }
            if queue.closed {
                return None;
            }
            queue = self.shared.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// [`EventReceiver::recv`] with a limit: `Err` if nothing came in time.
    ///
    /// # Errors
    /// The time that was waited.
    pub fn recv_timeout(&mut self, timeout: Duration) -> Result<Option<Event>, Duration> {
        let deadline = Instant::now() + timeout;
        let mut queue = self.shared.lock();
        loop {
            if let Some(event) = queue.events.pop_front() {
                return Ok(Some(event));
            }
            if queue.closed {
                return Ok(None);
            }
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Err(timeout);
            }
            queue = self.shared.arrived.wait_timeout(queue, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The next event if one is there, without waiting.
    pub fn try_recv(&mut self) -> Option<Event> {
        self.shared.lock().events.pop_front()
    }

    /// For async callers: `std::future::poll_fn(|context| receiver.poll_recv(context)).await`. `None` after the last.
    pub fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        let mut queue = self.shared.lock();
        match queue.events.pop_front() {
            Some(event) => Poll::Ready(Some(event)),
            None if queue.closed => Poll::Ready(None),
            None => {
                queue.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Events that wait to be read: a slow reader shows here.
    pub fn backlog(&self) -> usize {
        self.shared.lock().events.len()
    }

    /// Cancels the request while this end stays open.
    pub fn cancel_handle(&self) -> CancelHandle {
        CancelHandle { shared: Arc::clone(&self.shared) }
    }
}

impl Drop for EventReceiver {
    fn drop(&mut self) {
        self.shared.cancelled.store(true, Ordering::Relaxed);
    }
}

impl CancelHandle {
    /// Ends the request within one step.
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    fn prefill(done_tokens: usize) -> Event {
        Event::Prefill { done_tokens, prompt_tokens: 9 }
    }

    #[test]
    fn events_arrive_in_order_and_a_lost_engine_is_a_failure() {
        let (sender, mut receiver) = channel();
        assert!(receiver.try_recv().is_none());
        assert!(receiver.recv_timeout(Duration::from_millis(1)).is_err());
        sender.send(prefill(1));
        sender.send(prefill(2));
        assert_eq!(receiver.backlog(), 2);
        drop(sender);
        assert!(matches!(receiver.recv(), Some(Event::Prefill { done_tokens: 1, .. })));
        assert!(matches!(receiver.recv(), Some(Event::Prefill { done_tokens: 2, .. })));
        assert!(matches!(receiver.recv(), Some(Event::Failed(RequestError::Engine(_)))));
        assert!(receiver.recv().is_none());
    }

    #[test]
    fn dropping_the_receiver_or_its_handle_cancels() {
        let (sender, receiver) = channel();
        assert!(!sender.is_cancelled());
        drop(receiver);
        assert!(sender.is_cancelled());
        let (sender, receiver) = channel();
        receiver.cancel_handle().cancel();
        assert!(sender.is_cancelled());
    }

    #[test]
    fn an_async_reader_is_woken() {
        struct Count(AtomicUsize);
        impl Wake for Count {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(Arc::clone(&count));
        let (sender, mut receiver) = channel();
        assert!(receiver.poll_recv(&mut Context::from_waker(&waker)).is_pending());
        sender.send(prefill(3));
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert!(matches!(receiver.poll_recv(&mut Context::from_waker(&waker)), Poll::Ready(Some(_))));
    }
}
