//! Dense products of nine to 32 rows by the kernels of `kernels/lines.cu`, whose blocks have a slice of the columns in shared memory: which of their sizes a
//! product gets, and which stay with `few_line`. The results are the same bits.

use super::{COUNTERS, CudaBackend};
use crate::args;
use crate::driver::Clusters;
use crate::weights::{fast_format, takes_digits, tile_bytes};
use moellon_ops::Result;
use moellon_tensor::WeightFormat;

/// Tiles of columns that a block may have (`CHUNK * MAX_CHUNKS`).
const MOST_TILES: usize = 8 * 16;
/// Slots of a warp's ring: more are no faster (H200, cuda-line-sizes).
const DEPTH: usize = 2;
/// Tiles of columns below which a product stays with `few_line`: the keys of GLM-5.2's heads have three, and take as long there.
const LEAST_TILES: usize = 8;

/// What a kernel was compiled for: row tiles of a warp, tiles of a slot of its ring, the most warps of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Size {
    row_tiles: usize,
    tiles: usize,
    most_warps: usize,
}

/// The sizes that `KERNELS` of lines.cu makes.
const SIZES: [Size; 3] = [
    Size { row_tiles: 1, tiles: 4, most_warps: 16 },
    Size { row_tiles: 3, tiles: 2, most_warps: 8 },
    Size { row_tiles: 4, tiles: 2, most_warps: 8 },
];

/// A product of several weights, or of one a head.
#[derive(Debug, Clone)]
struct Shape {
    /// Row tiles of each part.
    row_tiles: Vec<usize>,
    matrices: usize,
    /// Tiles of columns, and slices of them.
    tiles: usize,
    slices: usize,
    format: WeightFormat,
    /// Rows that the kernel has: 16 or 32.
    rows: usize,
}

/// Which blocks have the slices of a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Team {
    blocks: usize,
    /// They are a cluster and add slices from each other's shared memory; otherwise sums go through the second-level cache.
    cluster: bool,
}

impl Team {
    /// How many of them, a block a multiprocessor, work at a time. Clusters of four and more do not get all multiprocessors: their groups are no multiples
    /// of four (an H200 has 30 clusters of four and 15 of eight, 120 of 132 multiprocessors).
    fn at_a_time(self, multiprocessors: usize) -> usize {
        let usable = if self.cluster && self.blocks > 2 { multiprocessors * 10 / 11 } else { multiprocessors };
        usable / self.blocks
    }
}

/// Clusters first: where both fit, they are as fast or faster.
const TEAMS: [Team; 7] = [
    Team { blocks: 8, cluster: true },
    Team { blocks: 4, cluster: true },
    Team { blocks: 2, cluster: true },
    Team { blocks: 1, cluster: true },
    Team { blocks: 8, cluster: false },
    Team { blocks: 4, cluster: false },
    Team { blocks: 2, cluster: false },
];

/// What a plan has to fit: multiprocessors, and bytes of shared memory that a block may have.
#[derive(Debug, Clone, Copy)]
struct Room {
    multiprocessors: usize,
    shared: usize,
}

/// How a product is launched: a unit of row tiles a team of blocks, all at a time.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Plan {
    size: Size,
    team: Team,
    /// Of a block.
    warps: usize,
    first_unit: [u32; 5],
    /// Units of all matrices.
    units: usize,
    /// Rows of weights of a unit.
    unit_rows: usize,
    /// Tiles that a block multiplies: the measure of its time.
    work: usize,
    depth: usize,
    x_at: usize,
    /// Dynamic shared memory.
    shared: usize,
}

impl Plan {
    /// A product in blocks of `warps` warps; `None` if it does not fit.
    fn new(shape: &Shape, size: Size, team: Team, warps: usize, room: Room) -> Option<Self> {
        if shape.tiles < LEAST_TILES || !shape.slices.is_multiple_of(team.blocks) || warps > size.most_warps {
            return None;
        }
        let slices = shape.slices / team.blocks;
        if !warps.is_multiple_of(slices) {
            return None;
        }
        let unit = warps / slices * size.row_tiles;
        let mut first_unit = [0; 5];
        for (i, row_tiles) in shape.row_tiles.iter().enumerate() {
            first_unit[i + 1] = first_unit[i] + row_tiles.div_ceil(unit) as u32;
        }
        let units = first_unit[shape.row_tiles.len()] as usize * shape.matrices;
        let start = |rank: usize| rank * slices * shape.tiles / shape.slices;
        let tiles = (0..team.blocks).map(|rank| start(rank + 1) - start(rank)).max()?;
        let counted = team.cluster || 2 * units <= COUNTERS;
        if units > team.at_a_time(room.multiprocessors) || tiles > MOST_TILES || !counted {
            return None;
        }
        let x = tiles * shape.rows * if takes_digits(shape.format) { 136 } else { 128 };
        // Sums of slices lie where the rows were.
        let sums = if team.cluster { slices * shape.rows * (unit * 16 + 8) * 4 } else { 0 };
        let tiles_of_slice = shape.tiles.div_ceil(shape.slices);
        let depth = tiles_of_slice.div_ceil(size.tiles).min(DEPTH);
        let slot = size.row_tiles * size.tiles * tile_bytes(shape.format) as usize;
        let x_at = (warps * (depth * slot + 128)).next_multiple_of(1024);
        let shared = x_at + x.max(sums);
        (shared <= room.shared).then_some(Plan {
            size,
            team,
            warps,
            first_unit,
            units,
            unit_rows: unit * 16,
            work: warps * size.row_tiles * tiles_of_slice,
            depth,
            x_at,
            // More than half of a multiprocessor's where blocks wait for each other: one a multiprocessor, so that all are resident.
            shared: if team.cluster { shared } else { shared.max(room.shared / 2 + 1024) },
        })
    }

    /// What its blocks have to do, and that they wait for each other through the second-level cache.
    fn cost(&self) -> usize {
        if self.team.cluster { self.work } else { self.work + self.work / 8 }
    }

    /// The plan whose blocks have least to do; of several the one with most warps, and then the smallest slices. `None` if none fits: a product with more
    /// units than there are at a time, or with few columns.
    fn best(shape: &Shape, room: Room) -> Option<Self> {
        let plans = TEAMS.iter().flat_map(|team| {
            SIZES.iter().flat_map(move |size| {
                (1..=size.most_warps).filter_map(move |warps| Plan::new(shape, *size, *team, warps, room))
            })
        });
        plans.min_by_key(|plan| (plan.cost(), plan.size.row_tiles))
    }
}

impl CudaBackend {
    /// Launches the product, whose units are not cut yet. False where `few_line` is for it.
    pub(super) fn launch_lines(&mut self, dense: &args::Dense, format: WeightFormat) -> Result<bool> {
        let rows = match dense.rows {
            // No faster with so few: weights are what these wait for (H200, cuda-line-sizes).
            ..=8 => return Ok(false),
            9..=16 => 16,
            _ => 32,
        };
        let parts = &dense.part[..dense.num_parts as usize];
        let shape = Shape {
            row_tiles: parts.iter().map(|part| part.w.rows.div_ceil(16) as usize).collect(),
            matrices: dense.matrices as usize,
            tiles: parts[0].w.cols.div_ceil(64) as usize,
            slices: dense.slices as usize,
            format,
            rows,
        };
        let room = Room {
            multiprocessors: self.device.multiprocessors as usize,
            shared: self.kernels.lines_shared() as usize,
        };
        let (Some(plan), Some(name)) = (Plan::best(&shape, room), fast_format(format)) else { return Ok(false) };
        let kernel = format!("lines{rows}_{}_{name}", plan.size.row_tiles);
        let Some(kernel) = self.kernels.lines(&kernel)? else { return Ok(false) };
        let mut args =
            args::Lines { dense: *dense, depth: plan.depth as u32, x_at: plan.x_at as u32, ..args::Lines::default() };
        args.dense.first_unit = plan.first_unit;
        let (threads, shared) = (32 * plan.warps as u32, plan.shared as u32);
        let (count, blocks) = (plan.units as u32, plan.team.blocks as u32);
        if plan.team.cluster {
            self.device.launch_clusters(&kernel, Clusters { count, blocks }, threads, shared, &args)?;
        } else {
            let floats = plan.units * shape.slices * rows * (plan.unit_rows + 8);
            args.shares = blocks;
            args.sums = self.slice_sums.pointer("sums of slices", 4 * floats as u64, &mut self.device)?;
            args.arrived = self.counters(COUNTERS)?;
            self.device.launch(&kernel, [count * blocks, 1, 1], threads, shared, &args)?;
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::products::slices;
    use moellon_tensor::ScaleDtype;

    const H200: Room = Room { multiprocessors: 132, shared: 226 << 10 };

    fn shape(rows_of_parts: &[usize], matrices: usize, cols: usize, bits: u8, rows: usize) -> Shape {
        Shape {
            row_tiles: rows_of_parts.iter().map(|rows| rows.div_ceil(16)).collect(),
            matrices,
            tiles: cols.div_ceil(64),
            slices: slices(cols),
            format: WeightFormat::Affine { bits, group: 64, scale: ScaleDtype::Bf16 },
            rows,
        }
    }

    /// The dense products of a layer of GLM-5.2, its head, and a small one.
    fn shapes(bits: u8, rows: usize) -> Vec<Shape> {
        vec![
            shape(&[2048, 576], 1, 6144, bits, rows),
            shape(&[16384], 1, 2048, bits, rows),
            shape(&[512], 64, 192, bits, rows),
            shape(&[256], 64, 512, bits, rows),
            shape(&[6144], 1, 16384, bits, rows),
            shape(&[6144], 1, 2048, bits, rows),
            shape(&[154_880], 1, 6144, bits, rows),
            shape(&[48, 17], 1, 100, bits, rows),
        ]
    }

    fn all_plans(shape: &Shape) -> Vec<Plan> {
        let mut plans = Vec::new();
        for size in SIZES {
            for team in TEAMS {
                plans.extend((1..=size.most_warps).filter_map(|warps| Plan::new(shape, size, team, warps, H200)));
            }
        }
        plans
    }

    #[test]
    fn every_plan_has_all_row_tiles_and_fits() {
        for (bits, rows) in [(2, 16), (4, 16), (4, 32), (6, 32), (8, 32)] {
            for shape in shapes(bits, rows) {
                for plan in all_plans(&shape) {
                    let row_tiles =
                        |i: usize| (plan.first_unit[i + 1] - plan.first_unit[i]) as usize * plan.unit_rows / 16;
                    assert!(
                        (0..shape.row_tiles.len()).all(|i| row_tiles(i) >= shape.row_tiles[i]),
                        "{shape:?} {plan:?}"
                    );
                    assert!(plan.shared <= H200.shared && plan.x_at.is_multiple_of(1024), "{shape:?} {plan:?}");
                }
            }
        }
    }

    /// What was fastest on an H200 (cuda-line-sizes): row tiles of a warp, blocks of a team, whether it is a cluster, warps.
    #[test]
    fn products_of_glm_have_the_sizes_that_were_measured() {
        let found: Vec<_> = shapes(4, 32)
            .iter()
            .map(|shape| Plan::best(shape, H200).map(|p| (p.size.row_tiles, p.team.blocks, p.team.cluster, p.warps)))
            .collect();
        let expected = [
            Some((1, 8, true, 12)),
            Some((4, 2, true, 8)),
            None,
            Some((1, 2, true, 16)),
            Some((3, 8, false, 8)),
            Some((1, 2, true, 12)),
            None,
            None,
        ];
        assert_eq!(found, expected);
    }

    /// Blocks that wait for each other without being a cluster would wait for ever if one of them were not resident.
    #[test]
    fn blocks_that_wait_are_all_resident() {
        let plans: Vec<Plan> = shapes(4, 32).iter().flat_map(all_plans).filter(|plan| !plan.team.cluster).collect();
        assert!(!plans.is_empty());
        for plan in plans {
            assert!(plan.units * plan.team.blocks <= H200.multiprocessors && 2 * plan.shared > H200.shared, "{plan:?}");
        }
    }
}
