//! Compiled kernels on disk, for the next run.
//!
//! Contains `unsafe` because wgpu cannot know where the data that it hands to a driver comes from.
#![allow(unsafe_code)]

use super::Device;
use moellon_ops::Result;
use std::path::{Path, PathBuf};

/// In front of what Vulkan's driver gave us: this, and the sum of the rest.
const MARK: [u8; 8] = *b"moellon1";

/// Where compiled kernels are kept.
pub(super) struct KernelCache {
    path: PathBuf,
    /// Where wgpu compiles.
    pub(super) wgpu: Option<wgpu::PipelineCache>,
}

/// FNV-1a.
fn sum(data: &[u8]) -> [u8; 8] {
    let mix = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    data.iter().fold(0xcbf2_9ce4_8422_2325, mix).to_le_bytes()
}

/// What the driver gave us, if a file is as we left it.
fn unmarked(file: &[u8]) -> Option<&[u8]> {
    let (found, data) = file.strip_prefix(&MARK)?.split_at_checked(8)?;
    (found == sum(data)).then_some(data)
}

impl Device {
    /// Takes compiled kernels of an earlier run from a file, where the API has such a thing.
    pub(super) fn open_cache(&mut self, info: &wgpu::AdapterInfo, folder: Option<&Path>) -> Result<()> {
        let Some(folder) = folder.filter(|_| self.device.features().contains(wgpu::Features::PIPELINE_CACHE)) else {
            return Ok(());
        };
        // wgpu's key names adapter and driver version.
        let Some(key) = wgpu::util::pipeline_cache_key(info) else { return Ok(()) };
        let path = folder.join(key);
        let data = std::fs::read(&path).ok();
        if let Some(vulkan) = &mut self.vulkan {
            vulkan.open_cache(data.as_deref().and_then(unmarked))?;
            self.cache = Some(KernelCache { path, wgpu: None });
            return Ok(());
        }
        // SAFETY: the data is what this driver gave us (`save_cache`), under a name that is unique to it; wgpu checks its header, and with
        // `fallback` data that does not fit is dropped.
        let cache = unsafe {
            self.device.create_pipeline_cache(&wgpu::PipelineCacheDescriptor {
                label: Some("moellon"),
                data: data.as_deref(),
                fallback: true,
            })
        };
        self.cache = Some(KernelCache { path, wgpu: Some(cache) });
        Ok(())
    }

    /// Keeps compiled kernels for the next run. That it cannot be written is no reason to fail.
    pub(crate) fn save_cache(&self) {
        let Some(KernelCache { path, wgpu }) = &self.cache else { return };
        let marked = |data: Vec<u8>| [&MARK[..], &sum(&data), &data].concat();
        let data = match wgpu {
            Some(cache) => cache.get_data(),
            None => self.vulkan.as_ref().and_then(|vulkan| vulkan.compiled()).map(marked),
        };
        let Some(data) = data else { return };
        let known = std::fs::metadata(path).is_ok_and(|m| m.len() == data.len() as u64);
        let Some(folder) = path.parent().filter(|_| !known) else { return };
        let temporary = path.with_extension(format!("tmp{}", std::process::id()));
        let written = std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::write(&temporary, &data))
            .and_then(|()| std::fs::File::open(&temporary)?.sync_all())
            .and_then(|()| std::fs::rename(&temporary, path));
        if written.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_taken_as_they_were_left() {
        let data = b"what a driver gave us";
        let file = [&MARK[..], &sum(data), data].concat();
        assert_eq!(unmarked(&file), Some(&data[..]));
        for changed in 0..file.len() {
            let mut other = file.clone();
            other[changed] ^= 1;
            assert_eq!(unmarked(&other), None, "byte {changed}");
        }
        assert_eq!(unmarked(&file[..file.len() - 1]), None);
        assert_eq!(unmarked(&MARK), None);
    }
}
