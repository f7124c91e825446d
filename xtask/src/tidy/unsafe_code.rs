//! `unsafe` is denied in the workspace. A module that needs it opts in, says why at its top, and stands in this list.

use super::Finding;
use crate::workspace::TextFile;

/// Modules that may contain `unsafe`: a file, or a folder with a slash at its end.
const ALLOWED: [(&str, &str); 11] = [
    ("crates/tensor/src/arena.rs", "memory from mmap or the allocator, viewed as a slice"),
    ("crates/tensor/src/pool.rs", "a borrowed closure handed to threads"),
    ("crates/checkpoint/src/mapped_file.rs", "memory-mapped files"),
    ("crates/backend-cuda/src/driver.rs", "calls into the CUDA driver"),
    ("crates/backend-cuda/src/nvrtc.rs", "calls into NVIDIA's compiler"),
    ("crates/backend-wgpu/src/device.rs", "kernels without wgpu's checks inside them"),
    ("crates/backend-wgpu/src/device/cache.rs", "pipeline caches from disk"),
    ("crates/backend-wgpu/src/vulkan.rs", "calls into Vulkan"),
    ("crates/backend-cpu/src/", "vector instructions, and threads that write disjoint parts of device memory"),
    ("crates/model/tests/allocations.rs", "an allocator that counts"),
    ("crates/surgery/src/simd.rs", "calls to loops compiled for wider vectors, behind their run-time check"),
];

/// Checks every Rust file against the list, and the list against the files.
pub(super) fn check(files: &[TextFile]) -> Vec<Finding> {
    check_against(&ALLOWED, files)
}

fn check_against(allowed: &[(&str, &str)], files: &[TextFile]) -> Vec<Finding> {
    let covers = |entry: &str, path: &str| if entry.ends_with('/') { path.starts_with(entry) } else { path == entry };
    let opts_in = |file: &&TextFile| {
        file.path.ends_with(".rs") && file.text.lines().any(|line| line.trim_start().starts_with(OPT_IN))
    };
    let mut findings = Vec::new();
    for file in files.iter().filter(opts_in) {
        let place = &file.path;
        if !allowed.iter().any(|(entry, _)| covers(entry, place)) {
            findings.push(Finding::error(place, "allows unsafe code and is not in xtask/src/tidy/unsafe_code.rs"));
        }
        let header: String = file.text.lines().take_while(|l| l.starts_with("//!")).collect();
        if !header.contains("unsafe") {
            findings.push(Finding::error(place, "allows unsafe code and its module doc does not say why"));
        }
    }
    for (entry, _) in allowed {
        if !files.iter().filter(opts_in).any(|file| covers(entry, &file.path)) {
            findings.push(Finding::error("xtask/src/tidy/unsafe_code.rs", format!("{entry} has no unsafe code")));
        }
    }
    findings
}

/// How a module opts in.
const OPT_IN: &str = "#![allow(unsafe_code";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::{file, messages};

    #[test]
    fn unsafe_code_outside_of_the_list_is_found() {
        let allowed = [("crates/a/src/mmap.rs", ""), ("crates/b/src/simd/", "")];
        let good = format!("//! Maps files. `unsafe`: mmap.\n{OPT_IN})]\n");
        let files = [file("crates/a/src/mmap.rs", &good), file("crates/b/src/simd/avx2.rs", &good)];
        assert_eq!(check_against(&allowed, &files), []);
        let [mmap, simd] = files;
        let found = messages(check_against(&allowed, &[mmap.clone(), simd, file("crates/a/src/other.rs", &good)]));
        assert!(found.len() == 1 && found[0].starts_with("crates/a/src/other.rs"), "{found:?}");
        let silent = file("crates/b/src/simd/avx2.rs", &format!("//! Kernels.\n{OPT_IN})]\n"));
        assert!(messages(check_against(&allowed, &[mmap.clone(), silent]))[0].contains("does not say why"));
        assert!(messages(check_against(&allowed, &[mmap]))[0].contains("crates/b/src/simd/ has no unsafe code"));
    }
}
