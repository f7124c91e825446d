//! The requests in work: for the page's queue and its cancel button.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::watch;

/// All requests in work.
#[derive(Default)]
pub(crate) struct Registry {
    entries: Mutex<BTreeMap<u64, Arc<Entry>>>,
    next: AtomicUsize,
}

struct Entry {
    id: String,
    protocol: &'static str,
    since: Instant,
    prompt_tokens: usize,
    cached_tokens: AtomicUsize,
    prefilled_tokens: AtomicUsize,
    new_tokens: AtomicUsize,
    pending_call_bytes: AtomicUsize,
    has_started: AtomicUsize,
    cancel: watch::Sender<bool>,
}

/// A request's place in the registry; leaves it when dropped.
pub(crate) struct Ticket {
    registry: Arc<Registry>,
    key: u64,
    entry: Arc<Entry>,
    cancelled: watch::Receiver<bool>,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Entry>>> {
        // Nothing under the lock can panic half-way through a change.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn enter(self: &Arc<Self>, id: &str, protocol: &'static str, prompt_tokens: usize) -> Ticket {
        let (cancel, cancelled) = watch::channel(false);
        let entry = Arc::new(Entry {
            id: id.to_owned(),
            protocol,
            since: Instant::now(),
            prompt_tokens,
            cached_tokens: AtomicUsize::new(0),
            prefilled_tokens: AtomicUsize::new(0),
            new_tokens: AtomicUsize::new(0),
            pending_call_bytes: AtomicUsize::new(0),
            has_started: AtomicUsize::new(0),
            cancel,
        });
        let key = self.next.fetch_add(1, Ordering::Relaxed) as u64;
        self.lock().insert(key, Arc::clone(&entry));
        Ticket { registry: Arc::clone(self), key, entry, cancelled }
    }

    /// Requests in work.
    pub(crate) fn len(&self) -> usize {
        self.lock().len()
    }

    /// Ends a request; `false` if there is none of this id.
    pub(crate) fn cancel(&self, id: &str) -> bool {
        let entries = self.lock();
        let mut found = false;
        for entry in entries.values().filter(|entry| entry.id == id) {
            found |= entry.cancel.send(true).is_ok();
        }
        found
    }

    /// Ends all requests.
    pub(crate) fn cancel_all(&self) {
        for entry in self.lock().values() {
            // A receiver that is gone needs no telling.
            let _ = entry.cancel.send(true);
        }
    }

    /// What the page shows, oldest first.
    pub(crate) fn list(&self) -> Vec<Value> {
        let show = |entry: &Arc<Entry>| {
            let count = |number: &AtomicUsize| number.load(Ordering::Relaxed);
            let new_tokens = count(&entry.new_tokens);
            let state = match (count(&entry.has_started), new_tokens) {
                (0, _) => "waiting",
                (_, 0) => "prefill",
                (_, _) => "decode",
            };
            json!({
                "id": entry.id,
                "protocol": entry.protocol,
                "state": state,
                "prompt_tokens": entry.prompt_tokens,
                "cached_tokens": count(&entry.cached_tokens),
                "prefilled_tokens": count(&entry.prefilled_tokens),
                "new_tokens": new_tokens,
                "pending_call_bytes": count(&entry.pending_call_bytes),
                "age_s": entry.since.elapsed().as_secs_f64(),
            })
        };
        self.lock().values().map(show).collect()
    }
}

impl Ticket {
    pub(crate) fn protocol(&self) -> &'static str {
        self.entry.protocol
    }

    pub(crate) fn started(&self, cached_tokens: usize) {
        self.entry.has_started.store(1, Ordering::Relaxed);
        self.entry.cached_tokens.store(cached_tokens, Ordering::Relaxed);
    }

    pub(crate) fn prefilled(&self, done_tokens: usize) {
        self.entry.prefilled_tokens.store(done_tokens, Ordering::Relaxed);
    }

    pub(crate) fn generated(&self, num_tokens: usize, pending_call_bytes: usize) {
        self.entry.new_tokens.fetch_add(num_tokens, Ordering::Relaxed);
        self.entry.pending_call_bytes.store(pending_call_bytes, Ordering::Relaxed);
    }

    /// Resolves when somebody cancels the request. Owns what it needs.
    pub(crate) fn cancelled(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut cancelled = self.cancelled.clone();
        async move {
            if cancelled.wait_for(|is_cancelled| *is_cancelled).await.is_err() {
                // The entry is gone: nobody can cancel any more.
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.registry.lock().remove(&self.key);
    }
}
