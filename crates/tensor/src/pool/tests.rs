use super::*;
use std::sync::atomic::AtomicU32;

fn pool(threads: usize) -> Pool {
    Pool::new(PoolOptions { threads: Some(threads), pin: false })
}

#[test]
fn partition_covers_everything_once_in_order_and_evenly() {
    for total in 0..70 {
        for parts in 1..9 {
            for granularity in [1, 2, 4, 16] {
                let mut next = 0;
                let mut units = Vec::new();
                for index in 0..parts {
                    let range = partition(total, parts, index, granularity);
                    assert_eq!(range.start, next);
                    assert!(range.start.is_multiple_of(granularity) || range.start == total);
                    next = range.end;
                    units.push(range.len().div_ceil(granularity));
                }
                assert_eq!(next, total);
                assert!(units.iter().max().unwrap() - units.iter().min().unwrap() <= 1);
            }
        }
    }
}

#[test]
fn every_thread_runs_every_region_once() {
    for threads in [1, 2, 3, 5, 8] {
        let pool = pool(threads);
        let counts: Vec<AtomicU32> = (0..threads).map(|_| AtomicU32::new(0)).collect();
        for _ in 0..2000 {
            pool.run(|index, num_threads| {
                assert_eq!(num_threads, threads);
                counts[index].fetch_add(1, Ordering::Relaxed);
            });
        }
        assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 2000));
    }
}

#[test]
fn meetings_are_counted() {
    for threads in [1, 3] {
        let pool = pool(threads);
        let before = pool.num_meetings();
        for _ in 0..7 {
            pool.run(|_, _| {
                pool.barrier();
                pool.barrier();
            });
        }
        let after = pool.num_meetings();
        assert_eq!([after[0] - before[0], after[1] - before[1]], [7, 14], "{threads} threads");
    }
}

#[test]
fn writes_of_a_region_are_visible_after_it_and_after_its_barrier() {
    // Plain (non-atomic) writes through disjoint slices: a missing acquire or release is a wrong sum.
    let pool = pool(4);
    let cells: Vec<AtomicU64> = (0..4).map(|_| AtomicU64::new(0)).collect();
    for round in 1..=2000u64 {
        pool.run(|index, num_threads| {
            for step in 0..3 {
                cells[index].store(round * 10 + step, Ordering::Relaxed);
                pool.barrier();
                for cell in &cells[..num_threads] {
                    assert_eq!(cell.load(Ordering::Relaxed), round * 10 + step);
                }
                pool.barrier();
            }
        });
        assert!(cells.iter().all(|c| c.load(Ordering::Relaxed) == round * 10 + 2));
    }
}

#[test]
fn sleeping_workers_wake_up() {
    let pool = pool(3);
    let count = AtomicU32::new(0);
    for pause_us in [0, 50, 100, 110, 150, 400, 3000] {
        for _ in 0..40 {
            std::thread::sleep(Duration::from_micros(pause_us));
            pool.run(|_, _| {
                count.fetch_add(1, Ordering::Relaxed);
            });
        }
    }
    assert_eq!(count.load(Ordering::Relaxed), 3 * 40 * 7);
}

#[test]
fn steps_keep_workers_awake_and_end() {
    let pool = pool(2);
    for _ in 0..3 * STEPS_PER_PROBE {
        let _step = pool.enter();
        pool.run(|_, _| {});
    }
    assert_eq!(pool.shared.active.0.load(Ordering::Relaxed), 0);
    assert!(pool.region_latency() > Duration::ZERO);
    assert!(pool.barrier_latency() > Duration::ZERO);
}

#[test]
fn several_callers_take_turns() {
    let pool = pool(3);
    let count = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    pool.run(|_, _| {
                        count.fetch_add(1, Ordering::Relaxed);
                        pool.barrier();
                    });
                }
            });
        }
    });
    assert_eq!(count.load(Ordering::Relaxed), 4 * 200 * 3);
}

#[test]
fn a_panic_on_any_thread_reaches_the_caller_and_leaves_the_pool_usable() {
    let pool = pool(4);
    for victim in 0..4 {
        for others_wait in [false, true] {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(|index, _| {
                    assert!(index != victim, "thread {index} was told to fail");
                    if others_wait {
                        pool.barrier();
                    }
                });
            }));
            let payload = outcome.expect_err("the panic of one thread must reach the caller");
            let message = payload.downcast_ref::<String>().expect("a formatted message");
            assert_eq!(message, &format!("thread {victim} was told to fail"));
            pool.run(|_, _| pool.barrier());
        }
    }
}

#[test]
fn nested_regions_and_stray_barriers_are_refused() {
    let pool = pool(2);
    assert!(catch_unwind(AssertUnwindSafe(|| pool.barrier())).is_err());
    assert!(catch_unwind(AssertUnwindSafe(|| pool.run(|_, _| pool.run(|_, _| {})))).is_err());
    pool.run(|_, _| {});
}

#[test]
fn pools_come_and_go() {
    for round in 0..50 {
        let pool = pool(1 + round % 5);
        if round % 2 == 0 {
            pool.run(|_, _| {});
        }
    }
}

#[test]
fn cores_are_few_and_distinct() {
    let mut cores = available_cores();
    assert!(!cores.is_empty());
    assert!(cores.len() <= std::thread::available_parallelism().map_or(1, usize::from));
    cores.dedup();
    assert_eq!(cores.len(), available_cores().len());
}

#[test]
#[cfg(target_os = "linux")]
fn pinning_the_caller_leaves_it_one_core() {
    let pool = Pool::new(PoolOptions { threads: Some(1), pin: true });
    std::thread::scope(|scope| {
        scope.spawn(|| {
            pool.pin_caller();
            pool.pin_caller();
            assert_eq!(allowed_cpus().map(|cpus| cpus.len()), Some(1));
        });
    });
    // Regions alone pin nobody.
    let before = allowed_cpus();
    pool.run(|_, _| {});
    assert_eq!(allowed_cpus(), before);
}

#[test]
fn a_pool_yields_while_empty_regions_are_slow_and_no_longer() {
    // One thread: never more threads than cores.
    let pool = pool(1);
    *pool.best_latency.lock().unwrap() = Duration::from_micros(1);
    for (latency_us, expected) in [(2, false), (100, true), (16, false), (17, true), (1, false)] {
        pool.judge(Duration::from_micros(latency_us));
        assert_eq!(pool.is_oversubscribed(), expected, "{latency_us} us");
    }
    // Far above the best, but nothing that would hurt.
    *pool.best_latency.lock().unwrap() = Duration::from_nanos(100);
    pool.judge(Duration::from_micros(7));
    assert!(!pool.is_oversubscribed());
}

#[test]
fn steps_are_counted_towards_the_probe_and_may_be_begun_and_ended_apart() {
    let pool = pool(2);
    // The probe overwrites this when it runs, and only then.
    for step in 1..=STEPS_PER_PROBE {
        *pool.best_latency.lock().unwrap() = Duration::MAX;
        pool.begin_step();
        let probed = *pool.best_latency.lock().unwrap() < Duration::MAX;
        assert_eq!(probed, step == STEPS_PER_PROBE, "step {step}");
        pool.end_step();
    }
    assert_eq!(pool.shared.active.0.load(Ordering::Relaxed), 0);
}

#[test]
fn a_thread_on_one_core_starts_pools_on_all_of_them() {
    let cores = available_cores();
    std::thread::spawn(move || {
        let first = Pool::new(PoolOptions { threads: None, pin: true });
        first.pin_caller();
        assert_eq!(available_cores(), cores);
        assert_eq!(Pool::new(PoolOptions { threads: None, pin: true }).num_threads(), first.num_threads());
        // And a worker that is not kept on a core may use any.
        let allowed = Mutex::new(Vec::new());
        Pool::new(PoolOptions { threads: Some(2), pin: false }).run(|index, _| {
            if index == 1 {
                *allowed.lock().unwrap() = allowed_cpus().unwrap_or_default();
            }
        });
        let mut allowed = allowed.into_inner().unwrap();
        allowed.retain(|cpu| cores.contains(cpu));
        assert!(allowed == cores || allowed_cpus().is_none(), "{allowed:?} of {cores:?}");
    })
    .join()
    .unwrap();
}
