//! Sharing tiles of several matrices among threads: each thread gets one consecutive piece of about the same cost.

use std::ops::Range;

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

/// Calls `each(item, tiles)` for the parts of `items` that belong to thread `index` of `num_threads`. Over all threads
/// every tile is called once; a tile belongs to the thread in whose share of the cost it starts.
pub(crate) fn share(items: &[Item], num_threads: usize, index: usize, mut each: impl FnMut(usize, Range<usize>)) {
    let total: u64 = items.iter().map(|item| item.tiles as u64 * item.tile_cost).sum();
    let cut = |part: usize| (u128::from(total) * part as u128 / num_threads as u128) as u64;
    let (from, to) = (cut(index), cut(index + 1));
    let mut start = 0;
    for (number, item) in items.iter().enumerate() {
        let end = start + item.tiles as u64 * item.tile_cost;
        if end > from && start < to {
            // Tiles that start at or after a cost, counted from the item's start.
            let before =
                |cost: u64| cost.saturating_sub(start).div_ceil(item.tile_cost.max(1)).min(item.tiles as u64) as usize;
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
                    share(&items, num_threads, index, |item, tiles| {
                        cost += tiles.len() as u64 * items[item].tile_cost;
                        seen.extend(tiles.map(|tile| (item, tile)));
                    });
                    assert!(
                        cost <= total.div_ceil(num_threads as u64) + largest,
                        "{cost} of {total} by one of {num_threads}"
                    );
                }
                assert_eq!(seen, expected, "{num_threads} threads");
            }
        }
    }
}
