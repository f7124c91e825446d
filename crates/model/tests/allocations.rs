//! A step of a loaded model allocates nothing: everything is made at load, or by the first step of its kind.
//!
//! `unsafe`: an allocator that counts and hands everything on to the system's.
#![allow(unsafe_code)]

mod golden_support;

use golden_support::{Golden, fixtures};
use moellon_backend_cpu::{ActivationMode, CpuBackend, CpuOptions};
use moellon_model::DecoderOptions;
use moellon_model::batch::{Batch, LogitRows};
use moellon_ops::{Backend, CacheDtype};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const BLOCK_SIZE: usize = 8;
const BLOCKS_PER_SEQUENCE: usize = 8;
const SEQUENCES: usize = 8;

/// A token of each of `sequences` sequences.
fn batch(sequences: usize, position: usize) -> Batch {
    let mut batch = Batch::default();
    for sequence in 0..sequences {
        let table: Vec<u32> = (0..BLOCKS_PER_SEQUENCE).map(|b| (sequence * BLOCKS_PER_SEQUENCE + b) as u32).collect();
        batch.push_sequence(&[(sequence * 3 + position % 5) as u32], position, &table, BLOCK_SIZE, LogitRows::Last);
    }
    batch
}

#[test]
fn a_step_allocates_nothing() {
    for name in fixtures() {
        let options = CpuOptions { threads: Some(2), pin: false, level: None, activation: ActivationMode::Int8 };
        let mut backend = CpuBackend::new(options).expect("back end starts");
        let context = BLOCKS_PER_SEQUENCE * BLOCK_SIZE;
        let sizes = DecoderOptions {
            max_sequences: SEQUENCES,
            max_logit_rows: SEQUENCES,
            block_size: BLOCK_SIZE,
            num_blocks: SEQUENCES * BLOCKS_PER_SEQUENCE,
            ..DecoderOptions::single_sequence(context, SEQUENCES, CacheDtype::Bf16)
        };
        let mut decoder = Golden::open(&name).decoder_for(sizes, &mut backend);
        for sequences in [1, SEQUENCES] {
            // Contexts on both sides of the fixtures' index_topk. The first step makes room.
            for position in [context - 1, 3] {
                let next = batch(sequences, position);
                decoder.forward(&next, &mut backend).expect("step runs");
                let before = ALLOCATIONS.load(Ordering::Relaxed);
                decoder.forward(&next, &mut backend).expect("step runs");
                backend.synchronize().expect("step ends");
                let made = ALLOCATIONS.load(Ordering::Relaxed) - before;
                assert_eq!(made, 0, "{name}: allocations of a step of {sequences} rows at {position}");
            }
        }
    }
}
