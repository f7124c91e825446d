//! The compiled kernels. CUBINs are made from `kernels/*.cu` by `xtask/kernels/nvrtc_check.py --write` and embedded, compressed;
//! nothing is compiled at run time.

use crate::driver::{Device, Kernel, Module, device_error};
use moellon_ops::Result;
use std::io::Read;
use std::path::Path;

/// Kernel files of one compute capability.
struct Images {
    capability: (i32, i32),
    rows: &'static [u8],
    pack: &'static [u8],
    matmul: &'static [u8],
    attention: &'static [u8],
    decode: &'static [u8],
    few: &'static [u8],
}

const IMAGES: [Images; 1] = [Images {
    capability: (9, 0),
    rows: include_bytes!("../cubin/sm_90a/rows.cubin.gz"),
    pack: include_bytes!("../cubin/sm_90a/pack.cubin.gz"),
    matmul: include_bytes!("../cubin/sm_90a/matmul.cubin.gz"),
    attention: include_bytes!("../cubin/sm_90a/attention.cubin.gz"),
    decode: include_bytes!("../cubin/sm_90a/decode.cubin.gz"),
    few: include_bytes!("../cubin/sm_90a/few.cubin.gz"),
}];

/// Dynamic shared memory that attention kernels may ask for: what a multiprocessor of an H100 or H200 has, less the reserved kilobyte.
pub(crate) const ATTENTION_SHARED: u32 = 226 * 1024;
/// The same for products: the ring of tiles and the results of 128 choices of experts.
const PRODUCT_SHARED: u32 = 160 * 1024;

/// Dynamic shared memory of a kernel for one row.
fn decode_shared(name: &str) -> u32 {
    if name.starts_with("router") { 0 } else { PRODUCT_SHARED }
}

/// The same for a few rows.
fn few_shared(name: &str) -> u32 {
    if matches!(name, "route_plan" | "latent_rows" | "few_sum") { 0 } else { PRODUCT_SHARED }
}

fn unpacked(image: &[u8]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(image)
        .read_to_end(&mut bytes)
        .map_err(|e| device_error(format!("unpacking kernels: {e}")))?;
    Ok(bytes)
}

/// Kernels by name, loaded when first used.
pub(crate) struct Kernels {
    rows: Module,
    pack: Module,
    matmul: Module,
    attention: Module,
    decode: Module,
    few: Module,
}

impl Kernels {
    /// Loads the kernels for `device`.
    ///
    /// # Errors
    /// If none were built for its compute capability.
    pub(crate) fn load(device: &mut Device, folder: Option<&Path>) -> Result<Self> {
        if let Some(folder) = folder {
            let mut load = |stem: &str| {
                let path = folder.join(format!("{stem}.cubin.gz"));
                let image = std::fs::read(&path).map_err(|e| device_error(format!("{}: {e}", path.display())))?;
                device.load_module(stem, &unpacked(&image)?)
            };
            return Ok(Kernels {
                rows: load("rows")?,
                pack: load("pack")?,
                matmul: load("matmul")?,
                attention: load("attention")?,
                decode: load("decode")?,
                few: load("few")?,
            });
        }
        let Some(images) = IMAGES.iter().find(|i| i.capability == device.capability) else {
            let (major, minor) = device.capability;
            let built: Vec<String> = IMAGES.iter().map(|i| format!("{}.{}", i.capability.0, i.capability.1)).collect();
            return Err(device_error(format!(
                "{} has compute capability {major}.{minor}, expected one that this build has kernels for: {}",
                device.name,
                built.join(", ")
            )));
        };
        Ok(Kernels {
            rows: device.load_module("rows", &unpacked(images.rows)?)?,
            pack: device.load_module("pack", &unpacked(images.pack)?)?,
            matmul: device.load_module("matmul", &unpacked(images.matmul)?)?,
            attention: device.load_module("attention", &unpacked(images.attention)?)?,
            decode: device.load_module("decode", &unpacked(images.decode)?)?,
            few: device.load_module("few", &unpacked(images.few)?)?,
        })
    }

    pub(crate) fn rows(&mut self, name: &str) -> Result<Kernel> {
        self.rows.kernel(name, 0)
    }

    pub(crate) fn pack(&mut self, name: &str) -> Result<Kernel> {
        self.pack.kernel(name, 0)
    }

    pub(crate) fn matmul(&mut self, name: &str) -> Result<Kernel> {
        let streams = ["linear", "gate_up", "down"].iter().any(|start| name.starts_with(start));
        self.matmul.kernel(name, if streams { PRODUCT_SHARED } else { 0 })
    }

    pub(crate) fn decode(&mut self, name: &str) -> Result<Kernel> {
        self.decode.kernel(name, decode_shared(name))
    }

    /// Whether there is such a kernel for one row.
    pub(crate) fn has_decode(&mut self, name: &str) -> Result<bool> {
        Ok(self.decode.find(name, decode_shared(name))?.is_some())
    }

    pub(crate) fn few(&mut self, name: &str) -> Result<Kernel> {
        self.few.kernel(name, few_shared(name))
    }

    /// Whether there is such a kernel for a few rows.
    pub(crate) fn has_few(&mut self, name: &str) -> Result<bool> {
        Ok(self.few.find(name, few_shared(name))?.is_some())
    }

    pub(crate) fn attention(&mut self, name: &str) -> Result<Kernel> {
        self.attention.kernel(name, if matches!(name, "index_topk" | "attend_join") { 0 } else { ATTENTION_SHARED })
    }
}
