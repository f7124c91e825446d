//! Dense products of a few rows by the kernels of `kernels/lines.cu`, whose blocks have a slice of the columns in shared memory: which of their sizes a product
//! gets. The results are the bits of `few_line`.

use super::{COUNTERS, CudaBackend};
use crate::args;
use crate::driver::Clusters;
use crate::weights::{fast_format, takes_digits, tile_bytes};
use moellon_ops::Result;
use moellon_tensor::WeightFormat;

/// Tiles of columns that arrive together, and the most that a block may have of them (`CHUNK`, `MAX_CHUNKS`).
const MOST_TILES: usize = 8 * 16;
/// Slots of a warp's ring: more are not needed to keep enough weights on their way, and phases have a bit each.
const MOST_DEPTH: usize = 16;

/// What a kernel was compiled for: row tiles of a warp, tiles of a slot of its ring, the most warps of a block, and whether it multiplies by wgmma.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Size {
    row_tiles: usize,
    tiles: usize,
    most_warps: usize,
    wide: bool,
}

/// The sizes that `LINES` and `WIDE_LINES` of lines.cu make.
const SIZES: [Size; 3] = [
    Size { row_tiles: 1, tiles: 4, most_warps: 16, wide: false },
    Size { row_tiles: 2, tiles: 2, most_warps: 16, wide: false },
    Size { row_tiles: 1, tiles: 4, most_warps: 16, wide: true },
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
    /// Rows that the kernel has: 8, 16 or 32.
    rows: usize,
}

/// Which blocks have the slices of a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Team {
    blocks: usize,
    /// They are a cluster and add slices from each other's shared memory. Otherwise sums go through the second-level cache: clusters of eight blocks that
    /// fill a multiprocessor each leave 12 of an H200's 132 idle (its groups of multiprocessors are no multiples of eight).
    cluster: bool,
}

const TEAMS: [Team; 7] = [
    Team { blocks: 1, cluster: true },
    Team { blocks: 2, cluster: true },
    Team { blocks: 2, cluster: false },
    Team { blocks: 4, cluster: true },
    Team { blocks: 4, cluster: false },
    Team { blocks: 8, cluster: true },
    Team { blocks: 8, cluster: false },
];

/// What a plan has to fit: multiprocessors, and bytes of shared memory that a block may have.
#[derive(Debug, Clone, Copy)]
struct Room {
    multiprocessors: usize,
    shared: usize,
}

/// How a product is launched.
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
    /// Whether a team has one unit.
    one: bool,
    depth: usize,
    x_at: usize,
    sums_at: usize,
    sums_bytes: usize,
    /// Dynamic shared memory.
    shared: usize,
}

impl Plan {
    /// A product in blocks of `warps` warps; `None` if it does not fit.
    fn new(shape: &Shape, size: Size, team: Team, warps: usize, room: Room) -> Option<Self> {
        if !shape.slices.is_multiple_of(team.blocks) || warps > size.most_warps {
            return None;
        }
        let slices = shape.slices / team.blocks;
        let digits = takes_digits(shape.format);
        if !warps.is_multiple_of(slices)
            || size.wide && !(digits && shape.rows == 32 && (warps / slices).is_multiple_of(4))
        {
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
        // Blocks that wait for each other must all be resident: one a multiprocessor.
        if tiles > MOST_TILES || !team.cluster && (shape.matrices > 1 || 2 * units > COUNTERS) {
            return None;
        }
        let one = shape.matrices > 1 || units <= room.multiprocessors / team.blocks;
        let x = match (size.wide, digits) {
            (true, _) => tiles.div_ceil(2) * 8192 + tiles * 256,
            (false, true) => tiles * shape.rows * 136,
            (false, false) => tiles * shape.rows * 128,
        };
        let sums = slices * shape.rows * (unit * 16 + 8) * 4;
        // A cluster with one unit has no use for its rows when it joins slices, so sums lie in their place.
        let behind_rings = match (team.cluster, one) {
            (false, _) => x,
            (true, true) => x.max(sums),
            (true, false) => x + 2 * sums,
        };
        let slot = size.row_tiles * size.tiles * tile_bytes(shape.format) as usize;
        let rings = |depth: usize| (warps * (depth * slot + 128)).next_multiple_of(1024);
        let useful = if one { shape.tiles.div_ceil(shape.slices).div_ceil(size.tiles) } else { MOST_DEPTH };
        let fits = |depth: &usize| rings(*depth) + behind_rings <= room.shared;
        let depth = (useful.min(2)..=useful.min(MOST_DEPTH)).rev().find(fits)?;
        let x_at = rings(depth);
        let least = if team.cluster { 0 } else { room.shared / 2 + 1024 };
        Some(Plan {
            size,
            team,
            warps,
            first_unit,
            units,
            unit_rows: unit * 16,
            one,
            depth,
            x_at,
            sums_at: if one { x_at } else { x_at + x },
            sums_bytes: if one { 0 } else { sums },
            shared: (x_at + behind_rings).max(least),
        })
    }

    /// Which of all plans takes the least time; `None` if none fits.
    fn best(shape: &Shape, room: Room) -> Option<Self> {
        let plans = SIZES.iter().flat_map(|size| {
            TEAMS.iter().flat_map(move |team| {
                (1..=size.most_warps).filter_map(move |warps| Plan::new(shape, *size, *team, warps, room))
            })
        });
        plans.min_by(|a, b| a.time(shape, room).total_cmp(&b.time(shape, room)))
    }

    /// Microseconds that the product takes, roughly.
    fn time(&self, shape: &Shape, room: Room) -> f64 {
        let usable =
            if self.team.cluster { 30 * room.multiprocessors / 33 } else { room.multiprocessors } / self.team.blocks;
        let tiles = (self.warps * self.size.row_tiles * shape.tiles.div_ceil(shape.slices)) as f64;
        let rounds = self.units.div_ceil(usable) as f64;
        let bytes = f64::from(tile_bytes(shape.format)) / 30e3;
        let multiplied = if self.size.wide { 0.024 } else { 0.008 + 0.0011 * shape.rows as f64 };
        let x = (shape.tiles.div_ceil(self.team.blocks) * shape.rows * 136) as f64 / 60e3;
        let join = if self.team.blocks > 1 { 1.0 } else { 0.0 };
        x + join + rounds * (tiles * bytes.max(multiplied) + if self.one { 0.0 } else { join })
    }
}

impl CudaBackend {
    /// Launches the product, whose units are not cut yet. False where no kernel or size is there for it.
    pub(super) fn launch_lines(&mut self, dense: &args::Dense, format: WeightFormat) -> Result<bool> {
        let rows = match dense.rows {
            ..=8 => 8,
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
        let Size { row_tiles, tiles, most_warps, wide } = plan.size;
        let wide = if wide { "w" } else { "" };
        let kernel = format!("lines{rows}{wide}_{row_tiles}_{tiles}_{most_warps}_{name}");
        let Some(kernel) = self.kernels.lines(&kernel)? else { return Ok(false) };
        let mut args = args::Lines {
            dense: *dense,
            depth: plan.depth as u32,
            x_at: plan.x_at as u32,
            sums_at: plan.sums_at as u32,
            sums_bytes: plan.sums_bytes as u32,
            ..args::Lines::default()
        };
        args.dense.first_unit = plan.first_unit;
        let (threads, shared) = (32 * plan.warps as u32, plan.shared as u32);
        let (mut count, blocks) = (plan.units as u32, plan.team.blocks as u32);
        if !plan.team.cluster {
            let floats = plan.units * shape.slices * rows * (plan.unit_rows + 8);
            args.shares = blocks;
            args.sums = self.slice_sums.pointer("sums of slices", 4 * floats as u64, &mut self.device)?;
            args.arrived = self.counters(COUNTERS)?;
            count = count.min(self.device.multiprocessors / blocks);
            self.device.launch(&kernel, [count * blocks, 1, 1], threads, shared, &args)?;
            return Ok(true);
        }
        let mut clusters = Clusters { count, blocks };
        if !plan.one {
            clusters.count = count.min(self.device.resident_clusters(&kernel, clusters, threads, shared)?);
        }
        self.device.launch_clusters(&kernel, clusters, threads, shared, &args)?;
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
        for (bits, rows) in [(2, 8), (4, 16), (4, 32), (6, 32), (8, 32)] {
            for shape in shapes(bits, rows) {
                let plans = all_plans(&shape);
                for plan in &plans {
                    let tiles_of_part =
                        |i: usize| (plan.first_unit[i + 1] - plan.first_unit[i]) as usize * plan.unit_rows / 16;
                    assert!(
                        (0..shape.row_tiles.len()).all(|i| tiles_of_part(i) >= shape.row_tiles[i]),
                        "{shape:?} {plan:?}"
                    );
                    assert!(plan.shared <= H200.shared && plan.x_at.is_multiple_of(1024), "{shape:?} {plan:?}");
                    assert!(plan.depth >= 1 && plan.depth <= MOST_DEPTH, "{shape:?} {plan:?}");
                }
                assert_eq!(Plan::best(&shape, H200).is_some(), !plans.is_empty(), "{shape:?}");
            }
        }
    }

    /// Blocks that wait for each other without being a cluster would wait for ever if one of them were not resident.
    #[test]
    fn blocks_that_wait_are_all_resident() {
        let plans: Vec<Plan> = shapes(4, 32).iter().flat_map(all_plans).filter(|plan| !plan.team.cluster).collect();
        assert!(!plans.is_empty());
        for plan in plans {
            let teams = plan.units.min(H200.multiprocessors / plan.team.blocks);
            assert!(teams * plan.team.blocks <= H200.multiprocessors, "{plan:?}");
            assert!(plan.one == (plan.units <= teams), "{plan:?}");
        }
    }

    #[test]
    fn sums_do_not_reach_the_rings() {
        for shape in shapes(4, 32) {
            for plan in all_plans(&shape).iter().filter(|plan| plan.team.cluster && !plan.one) {
                assert!(
                    plan.sums_at >= plan.x_at && plan.sums_at + 2 * plan.sums_bytes <= plan.shared,
                    "{shape:?} {plan:?}"
                );
            }
        }
    }
}
