//! Threads for decode steps: a fixed team that spins between small parallel regions.
//!
//! A decode step is hundreds of regions of 5 to 500 us. A fork-join library that hands work over through a queue costs
//! 6 to 20 us a region here and does not split a 5 us piece at all; a team that spins on one epoch counter costs a
//! quarter of a microsecond. So:
//!
//! - work is split statically ([`partition`]); the caller is thread 0 and works too;
//! - one epoch counter starts a region and one flag a thread ends it; the closure is borrowed, nothing is allocated;
//! - inside a region threads meet at [`Pool::barrier`], so that a longer piece of a step can be one region;
//! - a step is one stretch in which the team stays together: [`Pool::begin_step`] (or [`Pool::enter`]) says that it begins, and from
//!   then on threads that wait spin with PAUSE, so that the next region is to them what the other side of a barrier is, at the
//!   price of one ([`Pool::region_latency`], [`Pool::barrier_latency`]); between steps they park after a short grace;
//! - when a machine is oversubscribed (the measured latency is far above its best), spinning takes the processor from
//!   whoever we wait for: threads then yield at once and park early.
//!
//! Loaders, quantizers and tokenizers use rayon instead: their pieces are large and uneven.
//!
//! `unsafe`: handing a borrowed closure to threads that outlive the borrow; `run` does not return before they are done.
#![allow(unsafe_code)]

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// PAUSEs between two looks at the clock.
const SPINS_PER_CLOCK: u32 = 128;
/// How long a thread spins before it also yields: longer than any balanced region's wait, shorter than a time slice.
const SPIN_BEFORE_YIELD: Duration = Duration::from_micros(30);
/// How long an idle thread stays awake after the last region outside of a step.
const GRACE: Duration = Duration::from_micros(100);
/// And inside of one: longer than anything that a step does on one thread, and an end to a step that nobody ended.
const STEP_GRACE: Duration = Duration::from_millis(20);
/// Steps between two looks at the latency.
const STEPS_PER_PROBE: u64 = 64;
/// A machine is oversubscribed when an empty region takes this many times the best ever seen...
const OVERSUBSCRIBED_FACTOR: u32 = 16;
/// ...and at least this long.
const OVERSUBSCRIBED_FLOOR: Duration = Duration::from_micros(8);

/// Meetings in a row whose time is taken at once.
const MEETINGS: u32 = 32;

/// A value alone on its cache lines (two: adjacent lines are fetched in pairs).
#[repr(align(128))]
struct Alone<T>(T);

/// The closure of the current region, borrowed.
type Region<'a> = &'a (dyn Fn(usize, usize) + Sync);

struct Shared {
    /// Counts regions; a change starts one.
    epoch: Alone<AtomicU64>,
    /// Written by the caller before it advances `epoch`, read by workers after they saw that.
    region: UnsafeCell<Option<Region<'static>>>,
    /// Per worker: the last epoch it finished.
    done: Box<[Alone<AtomicU64>]>,
    /// Per worker: whether it sleeps or is about to.
    parked: Box<[Alone<AtomicBool>]>,
    /// Steps in progress ([`Pool::enter`]).
    active: Alone<AtomicUsize>,
    /// Threads at the barrier, and how often it opened.
    arrived: Alone<AtomicUsize>,
    generation: Alone<AtomicU64>,
    /// A thread of this region panicked: nobody may wait for it at the barrier.
    poisoned: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    oversubscribed: AtomicBool,
    shutdown: AtomicBool,
    num_threads: usize,
}

// SAFETY: `region` is the only field that is not already `Sync`. The caller writes it while every worker waits for
// `epoch` (all `done` flags equal the current epoch) and publishes it by the release store of `epoch`.
unsafe impl Sync for Shared {}

/// What a [`Pool`] is made of.
#[derive(Debug, Clone, Copy, Default)]
pub struct PoolOptions {
    /// Threads, the caller included; `None` for one per available core.
    pub threads: Option<usize>,
    /// Whether each worker stays on one core, and [`Pool::pin_caller`] does something.
    pub pin: bool,
}

/// A team of threads for parallel regions. See the module's page.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One region at a time.
    turn: Mutex<()>,
    cpus: Vec<usize>,
    pin: bool,
    best_latency: Mutex<Duration>,
    steps: AtomicU64,
}

/// The processors that this process might use before a thread of it was kept on one: what such a thread sees is that one, and so
/// do threads that it starts.
static BEFORE_PINNING: OnceLock<Processors> = OnceLock::new();

thread_local! {
    /// Whether this thread is inside a region: a nested one could never start.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
    /// Whether this thread was asked to stay on a core before.
    static PINNED: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, idle threads spin instead of sleeping. See [`Pool::enter`].
pub struct ActiveStep<'a> {
    shared: &'a Shared,
}

impl Drop for ActiveStep<'_> {
    fn drop(&mut self) {
        self.shared.active.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pool {
    /// Starts the threads and measures an empty region.
    ///
    /// # Panics
    /// If the system refuses a thread.
    pub fn new(options: PoolOptions) -> Self {
        let cpus = available_cores();
        let num_threads = options.threads.unwrap_or(cpus.len()).max(1);
        let flags = |_| Alone(AtomicU64::new(0));
        let shared = Arc::new(Shared {
            epoch: Alone(AtomicU64::new(0)),
            region: UnsafeCell::new(None),
            done: (1..num_threads).map(flags).collect(),
            parked: (1..num_threads).map(|_| Alone(AtomicBool::new(false))).collect(),
            active: Alone(AtomicUsize::new(0)),
            arrived: Alone(AtomicUsize::new(0)),
            generation: Alone(AtomicU64::new(0)),
            poisoned: AtomicBool::new(false),
            panic: Mutex::new(None),
            oversubscribed: AtomicBool::new(num_threads > cpus.len()),
            shutdown: AtomicBool::new(false),
            num_threads,
        });
        // More threads than cores: pinning would stack them up in one fixed way, so the system places them.
        let pin = options.pin && num_threads <= cpus.len();
        let workers = (1..num_threads)
            .map(|index| {
                let shared = Arc::clone(&shared);
                let cpu = pin.then(|| cpus[index]);
                std::thread::Builder::new()
                    .name(format!("moellon-{index}"))
                    .spawn(move || {
                        match (cpu, BEFORE_PINNING.get()) {
                            (Some(cpu), _) => keep_current_thread_on(&[cpu]),
                            // The caller may be kept on a core; this thread is not.
                            (None, Some(before)) => keep_current_thread_on(&before.allowed),
                            (None, None) => {}
                        }
                        worker(&shared, index);
                    })
                    .expect("the system starts a thread")
            })
            .collect();
        let best_latency = Mutex::new(Duration::MAX);
        let pool = Pool { shared, workers, turn: Mutex::new(()), cpus, pin, best_latency, steps: AtomicU64::new(0) };
        pool.probe(64);
        pool
    }

    /// Threads of a region, the caller included.
    pub fn num_threads(&self) -> usize {
        self.shared.num_threads
    }

    /// Runs `region(thread_index, num_threads)` on every thread of the team at once and returns when all are done.
    ///
    /// # Panics
    /// If the closure panics on any thread (with its message), or if called inside a region.
    pub fn run(&self, region: impl Fn(usize, usize) + Sync) {
        self.run_dyn(&region);
    }

    fn run_dyn(&self, region: Region<'_>) {
        assert!(!INSIDE.get(), "a region of the pool cannot start another: use Pool::barrier");
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. This function does not return or unwind before every worker has set its
        // `done` flag, and a worker does not touch the closure after that.
        let erased = unsafe { std::mem::transmute::<Region<'_>, Region<'static>>(region) };
        // SAFETY: all workers wait for the next epoch (the previous call saw their `done` flags), so nobody reads.
        unsafe { *shared.region.get() = Some(erased) };
        let epoch = shared.epoch.0.load(Ordering::Relaxed) + 1;
        shared.epoch.0.store(epoch, Ordering::Release);
        // Pairs with the fence in `sleep`: either the worker sees the epoch, or we see that it is parked.
        fence(Ordering::SeqCst);
        for (worker, parked) in self.workers.iter().zip(&shared.parked) {
            if parked.0.load(Ordering::Relaxed) {
                worker.thread().unpark();
            }
        }
        execute(shared, region, 0);
        for done in &shared.done {
            let mut spin = Spin::new();
            while done.0.load(Ordering::Acquire) != epoch {
                spin.once(shared);
            }
        }
        if shared.poisoned.load(Ordering::Relaxed) {
            shared.poisoned.store(false, Ordering::Relaxed);
            shared.arrived.0.store(0, Ordering::Relaxed);
            let payload = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
            resume_unwind(payload.expect("the thread that set `poisoned` left its message"));
        }
    }

    /// Inside a region: waits until every thread of the team is here. What they wrote before is visible after.
    ///
    /// # Panics
    /// If called outside of a region, or if a thread of the region panicked.
    pub fn barrier(&self) {
        assert!(INSIDE.get(), "Pool::barrier outside of a region would wait for nobody");
        let shared = &*self.shared;
        let generation = shared.generation.0.load(Ordering::Acquire);
        if shared.arrived.0.fetch_add(1, Ordering::AcqRel) + 1 == shared.num_threads {
            shared.arrived.0.store(0, Ordering::Relaxed);
            shared.generation.0.store(generation + 1, Ordering::Release);
            return;
        }
        let mut spin = Spin::new();
        while shared.generation.0.load(Ordering::Acquire) == generation {
            assert!(!shared.poisoned.load(Ordering::Relaxed), "another thread of this region panicked");
            spin.once(shared);
        }
    }

    /// Keeps the current thread on the core that the workers leave free, if the pool pins. For the thread that runs
    /// steps; calling it again costs nothing. The main thread stays free: threads that it starts later (a server's)
    /// would inherit its one core.
    pub fn pin_caller(&self) {
        if self.pin && !PINNED.replace(true) && !is_main_thread() {
            BEFORE_PINNING.get_or_init(Processors::now);
            keep_current_thread_on(&self.cpus[..1]);
        }
    }

    /// Says that many regions will follow at once (a decode step): until the guard is dropped, idle threads spin.
    pub fn enter(&self) -> ActiveStep<'_> {
        self.begin_step();
        ActiveStep { shared: &self.shared }
    }

    /// [`Pool::enter`] for callers whose steps begin and end in different functions; [`Pool::end_step`] ends it.
    pub fn begin_step(&self) {
        self.shared.active.0.fetch_add(1, Ordering::Relaxed);
        if self.steps.fetch_add(1, Ordering::Relaxed) % STEPS_PER_PROBE == STEPS_PER_PROBE - 1 {
            self.probe(4);
        }
    }

    /// Ends a step that [`Pool::begin_step`] began.
    pub fn end_step(&self) {
        let before = self.shared.active.0.fetch_sub(1, Ordering::Relaxed);
        assert!(before > 0, "a step ends that did not begin");
    }

    /// Time of an empty region now: the median of 33 times 32 in a row, as they follow each other in a step.
    pub fn region_latency(&self) -> Duration {
        self.latency(|| (0..MEETINGS).for_each(|_| self.run(|_, _| {})))
    }

    /// Time of a barrier inside of a region now, measured as [`Pool::region_latency`] is.
    pub fn barrier_latency(&self) -> Duration {
        self.latency(|| self.run(|_, _| (0..MEETINGS).for_each(|_| self.barrier())))
    }

    /// The time of one of [`MEETINGS`] that `meet` has: the median of 33.
    fn latency(&self, meet: impl Fn()) -> Duration {
        let mut samples = [Duration::ZERO; 33];
        for sample in &mut samples {
            let start = Instant::now();
            meet();
            *sample = start.elapsed() / MEETINGS;
        }
        samples.sort_unstable();
        samples[samples.len() / 2]
    }

    /// Regions run and barriers opened since the start: how often a step meets.
    pub fn num_meetings(&self) -> [u64; 2] {
        [self.shared.epoch.0.load(Ordering::Relaxed), self.shared.generation.0.load(Ordering::Relaxed)]
    }

    /// Whether threads yield early because something else wants the same cores.
    pub fn is_oversubscribed(&self) -> bool {
        self.shared.oversubscribed.load(Ordering::Relaxed)
    }

    /// Looks how long an empty region takes now: the fastest of `regions`.
    fn probe(&self, regions: usize) {
        let mut fastest = Duration::MAX;
        for _ in 0..regions {
            let start = Instant::now();
            self.run(|_, _| {});
            fastest = fastest.min(start.elapsed());
        }
        self.judge(fastest);
    }

    /// Compares the fastest of a few empty regions with the fastest ever.
    fn judge(&self, fastest: Duration) {
        let mut best = self.best_latency.lock().unwrap_or_else(PoisonError::into_inner);
        *best = fastest.min(*best);
        let limit = (*best * OVERSUBSCRIBED_FACTOR).max(OVERSUBSCRIBED_FLOOR);
        let too_many = self.num_threads() > self.cpus.len();
        self.shared.oversubscribed.store(too_many || fastest > limit, Ordering::Relaxed);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.shutdown.store(true, Ordering::Release);
        self.shared.epoch.0.fetch_add(1, Ordering::Release);
        fence(Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of regions; its own loop has none to report.
            let _ = worker.join();
        }
    }
}

/// Waiting: PAUSE first, then PAUSE and yield.
struct Spin {
    spins: u32,
    start: Option<Instant>,
    yields: bool,
}

impl Spin {
    fn new() -> Self {
        Spin { spins: 0, start: None, yields: false }
    }

    /// One step of waiting. Returns the time waited so far at each look at the clock.
    fn once(&mut self, shared: &Shared) -> Option<Duration> {
        std::hint::spin_loop();
        self.spins += 1;
        if !self.spins.is_multiple_of(if self.yields { 4 } else { SPINS_PER_CLOCK }) {
            return None;
        }
        let waited = self.start.get_or_insert_with(Instant::now).elapsed();
        self.yields = waited > SPIN_BEFORE_YIELD || shared.oversubscribed.load(Ordering::Relaxed);
        if self.yields {
            std::thread::yield_now();
        }
        Some(waited)
    }
}

/// Runs the closure as thread `index`; a panic is kept for the caller.
fn execute(shared: &Shared, region: Region<'_>, index: usize) {
    INSIDE.set(true);
    let outcome = catch_unwind(AssertUnwindSafe(|| region(index, shared.num_threads)));
    INSIDE.set(false);
    if let Err(payload) = outcome {
        // The first message wins: later ones are mostly "another thread panicked" from the barrier.
        let mut panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner);
        panic.get_or_insert(payload);
        shared.poisoned.store(true, Ordering::Relaxed);
    }
}

fn worker(shared: &Shared, index: usize) {
    let mut seen = 0;
    loop {
        seen = wait_for_epoch(shared, index, seen);
        if shared.shutdown.load(Ordering::Acquire) {
            return;
        }
        // SAFETY: the caller wrote the region before the release store of the epoch that we acquired, and does not
        // write again before our `done` flag shows this epoch.
        let region = unsafe { *shared.region.get() }.expect("the caller publishes a region with every epoch");
        execute(shared, region, index);
        shared.done[index - 1].0.store(seen, Ordering::Release);
    }
}

/// Waits for an epoch other than `seen`: spins during a step and for a short grace after it, then sleeps.
fn wait_for_epoch(shared: &Shared, index: usize, seen: u64) -> u64 {
    let mut spin = Spin::new();
    loop {
        let epoch = shared.epoch.0.load(Ordering::Acquire);
        if epoch != seen {
            return epoch;
        }
        let Some(waited) = spin.once(shared) else { continue };
        let idle = shared.active.0.load(Ordering::Relaxed) == 0 || shared.oversubscribed.load(Ordering::Relaxed);
        if waited > if idle { GRACE } else { STEP_GRACE } {
            sleep(shared, index, seen);
            spin = Spin::new();
        }
    }
}

fn sleep(shared: &Shared, index: usize, seen: u64) {
    let parked = &shared.parked[index - 1].0;
    parked.store(true, Ordering::Relaxed);
    // Pairs with the fence in `run_dyn`.
    fence(Ordering::SeqCst);
    while shared.epoch.0.load(Ordering::Acquire) == seen {
        std::thread::park();
    }
    parked.store(false, Ordering::Relaxed);
}

/// The part of `0..total` that belongs to part `index` of `parts`: whole multiples of `granularity` (except at the
/// end), sizes as equal as that allows, in order.
pub fn partition(total: usize, parts: usize, index: usize, granularity: usize) -> Range<usize> {
    let units = total.div_ceil(granularity);
    let at = |part: usize| (units * part / parts * granularity).min(total);
    at(index)..at(index + 1)
}

/// Processors that this process may use.
struct Processors {
    /// All of them; empty where the system does not say.
    allowed: Vec<usize>,
    /// One a physical core, no more than the CPU quota.
    cores: Vec<usize>,
}

impl Processors {
    /// As the current thread sees them.
    fn now() -> Self {
        let quota = std::thread::available_parallelism().map_or(1, usize::from);
        let allowed = allowed_cpus().unwrap_or_default();
        let all = if allowed.is_empty() { (0..quota).collect() } else { allowed.clone() };
        let mut cores = all.clone();
        // Two threads of one core share its load ports and caches: the second adds no bandwidth.
        cores.retain(|cpu| match first_sibling(*cpu) {
            Some(first) => first == *cpu || !all.contains(&first),
            None => true,
        });
        cores.truncate(quota.max(1));
        Processors { allowed, cores: if cores.is_empty() { vec![0] } else { cores } }
    }
}

/// The processors this process may use, one a physical core, no more than its CPU quota.
pub fn available_cores() -> Vec<usize> {
    BEFORE_PINNING.get().map_or_else(|| Processors::now().cores, |before| before.cores.clone())
}

/// The first hardware thread of the core of `cpu`.
fn first_sibling(cpu: usize) -> Option<usize> {
    let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
    let list = std::fs::read_to_string(path).ok()?;
    list.trim().split([',', '-']).next()?.parse().ok()
}

#[cfg(target_os = "linux")]
fn allowed_cpus() -> Option<Vec<usize>> {
    // SAFETY: an all-zero cpu_set_t is a valid empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is valid for writes of the size given.
    let status = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) };
    // SAFETY: `cpu` stays below the number of bits of the set.
    let is_set = |cpu: &usize| unsafe { libc::CPU_ISSET(*cpu, &set) };
    (status == 0).then(|| (0..libc::CPU_SETSIZE as usize).filter(is_set).collect())
}

#[cfg(not(target_os = "linux"))]
fn allowed_cpus() -> Option<Vec<usize>> {
    None
}

/// Keeps the current thread on `cpus`, where the system can; a refusal costs speed only.
#[cfg(target_os = "linux")]
fn keep_current_thread_on(cpus: &[usize]) {
    // SAFETY: an all-zero cpu_set_t is a valid empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for cpu in cpus {
        // SAFETY: `cpu` came out of a set of the same size.
        unsafe { libc::CPU_SET(*cpu, &mut set) };
    }
    // SAFETY: `set` is valid for reads of the size given.
    unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) };
}

#[cfg(not(target_os = "linux"))]
fn keep_current_thread_on(_cpus: &[usize]) {}

/// Whether this is the thread that the process started with.
#[cfg(target_os = "linux")]
fn is_main_thread() -> bool {
    // SAFETY: no preconditions.
    unsafe { libc::gettid() == libc::getpid() }
}

#[cfg(not(target_os = "linux"))]
fn is_main_thread() -> bool {
    false
}

#[cfg(test)]
mod tests;
