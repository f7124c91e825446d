//! Every kernel is checked and translated for Metal, without any adapter. With `MOELLON_METAL_OUT` set to a folder the translations
//! are kept there (`xtask kernels` does that).

use moellon_backend_wgpu::{cooperative_sources, kernel_sources, metal, vulkan};
use std::path::Path;

#[test]
fn every_kernel_is_valid_and_has_a_metal_translation() {
    let folder = std::env::var_os("MOELLON_METAL_OUT");
    let mut faults = Vec::new();
    for (name, wgsl) in kernel_sources() {
        match metal(&wgsl) {
            Ok(text) => {
                assert!(text.contains("kernel void main_"), "{name}: no entry point in\n{text}");
                if let Some(folder) = &folder {
                    std::fs::write(Path::new(folder).join(format!("{name}.metal")), text).expect("the folder is there");
                }
            }
            Err(error) => faults.push(format!("{name}: {error}")),
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// Metal has no matrices of 16 by 16.
#[test]
fn kernels_with_cooperative_matrices_are_valid_for_vulkan() {
    let sources = cooperative_sources();
    assert!(!sources.is_empty());
    let faults: Vec<String> =
        sources.iter().filter_map(|(name, wgsl)| vulkan(wgsl).err().map(|error| format!("{name}: {error}"))).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// A kernel that no pipeline uses would never be checked.
#[test]
fn every_file_is_part_of_a_kernel() {
    let sources = [kernel_sources(), cooperative_sources()].concat();
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")).expect("kernels are there") {
        let path = entry.expect("kernels can be listed").path();
        let text = std::fs::read_to_string(&path).expect("kernels can be read");
        // Lines before the first hole stand in a source as they are.
        let start: Vec<&str> = text.lines().take(3).filter(|line| !line.contains("{{")).collect();
        let used = sources.iter().any(|(_, wgsl)| wgsl.contains(start[0]));
        assert!(used, "{} is part of no kernel", path.display());
    }
}

#[test]
fn an_invalid_kernel_is_refused_in_words() {
    let error =
        metal("@compute @workgroup_size(1) fn main() { let x: u32 = 1.5; }").expect_err("a float is no integer");
    assert!(error.contains("u32"), "{error}");
}
