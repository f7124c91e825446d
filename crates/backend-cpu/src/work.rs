//! Sharing tiles of several matrices among threads: pieces in order, of which each thread begins with its own share and
//! then takes from the ends of the others': memory does not serve all cores alike at all times, and a system takes cores
//! away, so equal shares do not end together. A thread's first piece is half of its share, the next one half of the rest:
//! every piece begins in the middle of memory, where nothing was fetched ahead, so there should be few of them, and small
//! ones are needed at the end alone. Who computes a tile does not change its bits.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Pieces that a thread's share is cut into, at most: the last one is a 64th of it.
const PIECES_PER_THREAD: usize = 7;
/// The least cost of a piece, in bytes read: a few microseconds, against 50 nanoseconds for taking it.
const MIN_PIECE_COST: u64 = 48 * 1024;

/// Pieces of work that are not taken yet.
#[derive(Default)]
pub(crate) struct Queues {
    queues: Vec<Queue>,
    pieces: usize,
}

/// A thread's pieces, on cache lines of its own: the first one in the low half, one past the last in the high half.
#[derive(Default)]
#[repr(align(128))]
struct Queue(AtomicU64);

impl Queues {
    /// Cuts `items` into pieces for `num_threads` threads. Before the region that takes them.
    pub(crate) fn fill_for_items(&mut self, items: &[Item], num_threads: usize) {
        let smallest = (total_cost(items) / num_threads as u64 / MIN_PIECE_COST).max(1);
        let each = smallest.ilog2() as usize + 1;
        self.fill(each.min(PIECES_PER_THREAD) * num_threads, num_threads);
    }

    /// `pieces` pieces for `num_threads` threads.
    pub(crate) fn fill(&mut self, pieces: usize, num_threads: usize) {
        self.pieces = pieces;
        self.queues.resize_with(num_threads, Queue::default);
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let (start, end) = (pieces * index / num_threads, pieces * (index + 1) / num_threads);
            *queue.0.get_mut() = pack(start as u32, end as u32);
        }
    }

    /// A piece that nobody has taken, for thread `index`; `None` when all are.
    pub(crate) fn take(&self, index: usize) -> Option<usize> {
        (0..self.queues.len()).find_map(|offset| {
            let queue = &self.queues[(index + offset) % self.queues.len()].0;
            // What a piece's work writes is published by the end of the region, not by this counter.
            let taken = queue.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| {
                let (start, end) = unpack(now);
                match (start < end, offset) {
                    (false, _) => None,
                    (true, 0) => Some(pack(start + 1, end)),
                    (true, _) => Some(pack(start, end - 1)),
                }
            });
            let (start, end) = unpack(taken.ok()?);
            Some(if offset == 0 { start } else { end - 1 } as usize)
        })
    }

    /// Takes pieces of `items` until none is left, calling `each(item, tiles)`. Over all threads every tile is called
    /// once.
    pub(crate) fn share(&self, items: &[Item], index: usize, mut each: impl FnMut(usize, Range<usize>)) {
        while let Some(piece) = self.take(index) {
            share(items, self.part(piece), &mut each);
        }
    }

    /// Where a piece starts and ends: of a thread's share the halves, a quarter, .., and what is left.
    fn part(&self, piece: usize) -> Part {
        let num_threads = self.queues.len();
        let each = self.pieces / num_threads;
        let (thread, number) = (piece / each, piece % each);
        // The smallest piece of a share.
        let units = 1u64 << (each - 1);
        let before = |number: usize| if number == each { units } else { units - (units >> number) };
        let start = thread as u64 * units;
        Part { start: start + before(number), end: start + before(number + 1), of: num_threads as u64 * units }
    }
}

fn pack(start: u32, end: u32) -> u64 {
    u64::from(end) << 32 | u64::from(start)
}

fn unpack(both: u64) -> (u32, u32) {
    (both as u32, (both >> 32) as u32)
}

fn total_cost(items: &[Item]) -> u64 {
    items.iter().map(|item| item.tiles as u64 * item.tile_cost).sum()
}

/// Tiles of one matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Item {
    /// How many.
    pub(crate) tiles: usize,
    /// What one of them costs, in any unit that is the same for all items.
    pub(crate) tile_cost: u64,
}

/// The cost of a tile of `tile_bytes` and `cols` columns times `num_rows` rows, in bytes read: memory gives about four
/// bytes a cycle and core; multiplying 16 rows with one costs `cols / 8` cycles with 8-bit dot products.
pub(crate) fn tile_cost(tile_bytes: usize, cols: usize, num_rows: usize) -> u64 {
    (tile_bytes + cols / 2 * num_rows) as u64
}

/// Tiles that stay together: as many as kernels read at once, which is faster than one after the other.
const GROUP_TILES: u64 = 4;

/// A part of a cost: from `start` to `end` of `of`.
#[derive(Debug, Clone, Copy)]
struct Part {
    start: u64,
    end: u64,
    of: u64,
}

/// Calls `each(item, tiles)` for what of `items` belongs to `part` of their cost. Over all parts every tile is called once;
/// a group of tiles belongs to the part in which it starts.
fn share(items: &[Item], part: Part, mut each: impl FnMut(usize, Range<usize>)) {
    let total = total_cost(items);
    let cut = |at: u64| (u128::from(total) * u128::from(at) / u128::from(part.of)) as u64;
    let (from, to) = (cut(part.start), cut(part.end));
    let mut start = 0;
    for (number, item) in items.iter().enumerate() {
        let end = start + item.tiles as u64 * item.tile_cost;
        if end > from && start < to {
            // Tiles of groups that start before a cost, counted from the item's start.
            let before = |cost: u64| {
                let tiles = cost.saturating_sub(start).div_ceil(item.tile_cost.max(1));
                tiles.next_multiple_of(GROUP_TILES).min(item.tiles as u64) as usize
            };
            let tiles = before(from)..before(to);
            if !tiles.is_empty() {
                each(number, tiles);
            }
        }
        start = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tile_is_shared_once_in_order_and_costs_are_even() {
        let lists: [&[(usize, u64)]; 5] = [
            &[(1, 5)],
            &[(100, 3)],
            &[(7, 100), (3, 1), (50, 20)],
            &[(2, 9), (0, 4), (2, 9)],
            &[(1, 1), (1, 1000), (1, 1)],
        ];
        for list in lists {
            let items: Vec<Item> =
                list.iter().map(|(tiles, tile_cost)| Item { tiles: *tiles, tile_cost: *tile_cost }).collect();
            let expected: Vec<(usize, usize)> =
                items.iter().enumerate().flat_map(|(i, item)| (0..item.tiles).map(move |t| (i, t))).collect();
            let total: u64 = items.iter().map(|i| i.tiles as u64 * i.tile_cost).sum();
            let largest = items.iter().map(|i| i.tile_cost).max().unwrap();
            for num_threads in 1..20 {
                let mut seen = Vec::new();
                for index in 0..num_threads {
                    let mut cost = 0;
                    let part = Part { start: index, end: index + 1, of: num_threads };
                    share(&items, part, |item, tiles| {
                        cost += tiles.len() as u64 * items[item].tile_cost;
                        seen.extend(tiles.map(|tile| (item, tile)));
                    });
                    assert!(
                        cost <= total.div_ceil(num_threads) + GROUP_TILES * largest,
                        "{cost} of {total} by one of {num_threads}"
                    );
                }
                assert_eq!(seen, expected, "{num_threads} threads");
            }
        }
    }

    #[test]
    fn pieces_of_a_share_follow_each_other_and_become_smaller() {
        let mut queues = Queues::default();
        for num_threads in [1, 2, 5] {
            for each in [1, 2, PIECES_PER_THREAD] {
                queues.fill(each * num_threads, num_threads);
                let parts: Vec<Part> = (0..each * num_threads).map(|piece| queues.part(piece)).collect();
                let of = parts[0].of;
                assert_eq!((parts[0].start, parts.last().unwrap().end), (0, of), "{num_threads} threads");
                assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start), "{parts:?}");
                for share in parts.chunks(each) {
                    assert_eq!(share[each - 1].end - share[0].start, of / num_threads as u64, "{share:?}");
                    let sizes: Vec<u64> = share.iter().map(|part| part.end - part.start).collect();
                    assert!(sizes.windows(2).all(|pair| pair[0] >= pair[1]) && sizes[each - 1] == 1, "{sizes:?}");
                }
            }
        }
    }

    #[test]
    fn every_piece_is_taken_once_whoever_is_fast() {
        let mut queues = Queues::default();
        for num_threads in [1, 2, 3, 7] {
            for pieces in [0, 1, 5, 64] {
                queues.fill(pieces, num_threads);
                // The last thread takes all but what the first takes now and then.
                let mut seen = Vec::new();
                let mut turn = 0;
                while let Some(piece) = queues.take(if turn % 5 == 0 { 0 } else { num_threads - 1 }) {
                    seen.push(piece);
                    turn += 1;
                }
                seen.sort_unstable();
                assert_eq!(seen, (0..pieces).collect::<Vec<_>>(), "{num_threads} threads");
            }
        }
        // On real threads, with tiles.
        let items = [Item { tiles: 1000, tile_cost: 3000 }, Item { tiles: 77, tile_cost: 100_000 }];
        queues.fill_for_items(&items, 4);
        let counts: [Vec<AtomicU64>; 2] = items.map(|item| (0..item.tiles).map(|_| AtomicU64::new(0)).collect());
        std::thread::scope(|scope| {
            for index in 0..4 {
                let (queues, counts) = (&queues, &counts);
                scope.spawn(move || {
                    queues.share(&items, index, |item, tiles| {
                        for tile in tiles {
                            counts[item][tile].fetch_add(1, Ordering::Relaxed);
                        }
                    });
                });
            }
        });
        assert!(counts.iter().flatten().all(|count| count.load(Ordering::Relaxed) == 1));
    }
}
