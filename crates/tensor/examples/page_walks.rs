//! What the translation of addresses costs on this machine, with huge pages and without: nanoseconds of a load that depends on the one
//! before, over lines side by side and over as many lines of which each has a 4 KiB page of its own. If huge pages are huge all the way
//! down, the second kind costs what the first does; under a hypervisor that maps small ones, it does not, and no call of the guest
//! changes that.
//!
//! ```text
//! cargo run --release -p moellon-tensor --example page_walks
//! ```

#![allow(clippy::print_stdout, reason = "a program")]

use moellon_tensor::arena::{AlignedBuf, set_huge_pages};
use moellon_tensor::rng::SplitMix64;
use std::time::Instant;

/// 512 KiB of lines: in the second cache, with 32 MiB of pages, which are 16 huge ones and four times the translations of small ones
/// that a processor keeps.
const LINES: usize = 8192;
/// Numbers of a line, and of a small page.
const LINE: usize = 8;
const PAGE: usize = 512;
const ROUNDS: usize = 9;

fn main() -> std::io::Result<()> {
    for wanted in [true, false] {
        set_huge_pages(wanted);
        let mut buffer = AlignedBuf::<u64>::zeroed(LINES * PAGE)?;
        let dense = chase(&mut buffer, |line, _| line * LINE);
        // Any line of the page: the first ones would share a few sets of the caches.
        let paged = chase(&mut buffer, |line, rng| line * PAGE + rng.below(PAGE / LINE) * LINE);
        let pages = if wanted { "huge" } else { "small" };
        println!("{pages} pages: {dense:.1} ns a line side by side, {paged:.1} ns a line a page");
    }
    Ok(())
}

/// Nanoseconds of a load, in the fastest of several rounds over all lines in random order.
fn chase(buffer: &mut [u64], place: impl Fn(usize, &mut SplitMix64) -> usize) -> f64 {
    let mut rng = SplitMix64::new(1);
    let mut order: Vec<usize> = (0..LINES).map(|line| place(line, &mut rng)).collect();
    for last in (1..LINES).rev() {
        order.swap(last, rng.below(last + 1));
    }
    for (i, at) in order.iter().enumerate() {
        buffer[*at] = order[(i + 1) % LINES] as u64;
    }
    let mut at = order[0];
    let mut fastest = f64::INFINITY;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for _ in 0..4 * LINES {
            at = buffer[at] as usize;
        }
        fastest = fastest.min(start.elapsed().as_secs_f64() / (4 * LINES) as f64);
    }
    assert!(order.contains(&at), "the chain is closed");
    fastest * 1e9
}
