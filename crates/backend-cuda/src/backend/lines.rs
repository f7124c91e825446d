//! Dense products of a few rows by the kernels of `kernels/lines.cu`, whose blocks have a slice of the columns in shared memory: which of their sizes a product
//! gets. The results are the bits of `few_line`.

use super::CudaBackend;
use crate::args;
use crate::driver::Clusters;
use crate::weights::{fast_format, takes_digits, tile_bytes};
use moellon_ops::Result;
use moellon_tensor::WeightFormat;

/// Tiles of columns that arrive together, and the most that a block may have of them (`CHUNK`, `MAX_CHUNKS`).
const MOST_TILES: usize = 8 * 16;
/// Slots of a warp's ring: more are not needed to keep enough weights on their way, and phases have a bit each.
const MOST_DEPTH: usize = 16;
/// Blocks that share the slices of a row tile: a cluster.
const CLUSTERS: [usize; 4] = [1, 2, 4, 8];

/// What a kernel was compiled for: row tiles of a warp, tiles of a slot of its ring, the most warps of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Size {
    row_tiles: usize,
    tiles: usize,
    most_warps: usize,
}

/// The sizes that `LINES` of lines.cu makes.
const SIZES: [Size; 2] =
    [Size { row_tiles: 2, tiles: 2, most_warps: 16 }, Size { row_tiles: 3, tiles: 2, most_warps: 8 }];

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

/// How a product is launched.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Plan {
    size: Size,
    /// Blocks of a cluster, and warps of a block.
    cluster: usize,
    warps: usize,
    first_unit: [u32; 5],
    /// Units of all matrices.
    units: usize,
    depth: u32,
    x_at: u32,
    sums_at: u32,
    sums_bytes: u32,
    /// Dynamic shared memory.
    shared: u32,
}

impl Plan {
    /// A product in blocks of `warps` warps, `cluster` of which have all slices; `None` if it does not fit into `most_shared` bytes of a block.
    fn new(shape: &Shape, size: Size, cluster: usize, warps: usize, device: (usize, u32)) -> Option<Self> {
        let (multiprocessors, most_shared) = device;
        if !shape.slices.is_multiple_of(cluster) || warps > size.most_warps {
            return None;
        }
        let slices = shape.slices / cluster;
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
        let tiles = (0..cluster).map(|rank| start(rank + 1) - start(rank)).max()?;
        if tiles > MOST_TILES {
            return None;
        }
        // A cluster with one unit has no use for its rows when it joins slices, so sums lie in their place.
        let one = shape.matrices > 1 || units * cluster <= multiprocessors;
        let x = tiles * shape.rows * if takes_digits(shape.format) { 136 } else { 128 };
        let sums = slices * shape.rows * (unit * 16 + 8) * 4;
        let behind_rings = if one { x.max(sums) } else { x + 2 * sums };
        let slot = size.row_tiles * size.tiles * tile_bytes(shape.format) as usize;
        let ring = |depth: usize| depth * slot + 128;
        let useful = if one { shape.tiles.div_ceil(shape.slices).div_ceil(size.tiles) } else { MOST_DEPTH };
        let fits = |depth: &usize| warps * ring(*depth) + behind_rings <= most_shared as usize;
        let depth = (useful.min(2)..=useful.min(MOST_DEPTH)).rev().find(fits)?;
        let x_at = warps * ring(depth);
        Some(Plan {
            size,
            cluster,
            warps,
            first_unit,
            units,
            depth: depth as u32,
            x_at: x_at as u32,
            sums_at: (if one { x_at } else { x_at + x }) as u32,
            sums_bytes: if one { 0 } else { sums as u32 },
            shared: (x_at + behind_rings) as u32,
        })
    }

    /// Which of all plans takes the least time; `None` if none fits.
    fn best(shape: &Shape, device: (usize, u32)) -> Option<Self> {
        let plans = SIZES.iter().flat_map(|size| {
            CLUSTERS.iter().flat_map(move |cluster| {
                (1..=size.most_warps).filter_map(move |warps| Plan::new(shape, *size, *cluster, warps, device))
            })
        });
        plans.min_by(|a, b| a.time(shape, device.0).total_cmp(&b.time(shape, device.0)))
    }
}

impl Plan {
    /// Microseconds that the product takes on so many multiprocessors, roughly.
    fn time(&self, shape: &Shape, multiprocessors: usize) -> f64 {
        let usable = multiprocessors / self.cluster * self.cluster;
        let slices = shape.slices / self.cluster;
        let tiles = (self.warps * self.size.row_tiles * shape.tiles.div_ceil(shape.slices)) as f64;
        let rounds = (self.units * self.cluster).div_ceil(usable) as f64;
        let bytes = f64::from(tile_bytes(shape.format)) / 30e3;
        let multiplied = 0.008 + 0.0007 * shape.rows as f64;
        let x = (shape.tiles.div_ceil(self.cluster) * shape.rows * 136) as f64 / 60e3;
        let each = if self.sums_bytes > 0 { 1.5 } else { 0.0 };
        let join = if self.cluster > 1 { 1.0 } else { 0.0 } + 0.1 * slices as f64;
        x + join + rounds * (tiles * bytes.max(multiplied) + each)
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
        let device = (self.device.multiprocessors as usize, self.kernels.lines_shared());
        let (Some(plan), Some(name)) = (Plan::best(&shape, device), fast_format(format)) else { return Ok(false) };
        let Size { row_tiles, tiles, most_warps } = plan.size;
        let Some(kernel) = self.kernels.lines(&format!("lines{rows}_{row_tiles}_{tiles}_{most_warps}_{name}"))? else {
            return Ok(false);
        };
        let mut dense = *dense;
        dense.first_unit = plan.first_unit;
        let args = args::Lines {
            dense,
            depth: plan.depth,
            x_at: plan.x_at,
            sums_at: plan.sums_at,
            sums_bytes: plan.sums_bytes,
        };
        let mut clusters = Clusters { count: plan.units as u32, blocks: plan.cluster as u32 };
        let threads = 32 * plan.warps as u32;
        if plan.sums_bytes > 0 {
            clusters.count =
                clusters.count.min(self.device.resident_clusters(&kernel, clusters, threads, plan.shared)?);
        }
        self.device.launch_clusters(&kernel, clusters, threads, plan.shared, &args)?;
        Ok(true)
    }
}
