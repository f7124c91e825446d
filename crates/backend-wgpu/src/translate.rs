//! Kernels in other languages. On a Mac wgpu makes the same translation when a pipeline is compiled; here it runs anywhere, so that CI
//! checks every kernel for Metal without a Mac and keeps the text for whoever reads it.

use naga::back::{msl, spv};
use naga::valid::{Capabilities, ValidationFlags, Validator};

/// The Metal Shading Language of a kernel, as wgpu makes it: arguments in one `[[buffer]]` after the bindings.
///
/// # Errors
/// What naga says about the kernel, in one text: it does not parse, is not valid, or has no translation.
pub fn metal(wgsl: &str) -> Result<String, String> {
    let module = naga::front::wgsl::parse_str(wgsl).map_err(|e| e.emit_to_string(wgsl))?;
    let info = Validator::new(
        ValidationFlags::all(),
        Capabilities::IMMEDIATES
            | Capabilities::SHADER_FLOAT16
            | Capabilities::SHADER_FLOAT16_IN_FLOAT32
            | Capabilities::SUBGROUP,
    )
    .validate(&module)
    .map_err(|e| e.emit_to_string(wgsl))?;
    let mut resources = msl::EntryPointResources::default();
    let mut slot = 0;
    for (_, variable) in module.global_variables.iter() {
        if let Some(binding) = variable.binding {
            let target = msl::BindTarget { buffer: Some(slot), mutable: true, ..Default::default() };
            resources.resources.insert(binding, target);
            slot += 1;
        }
    }
    resources.immediates_buffer = Some(slot);
    resources.sizes_buffer = Some(slot + 1);
    let options = msl::Options {
        lang_version: (2, 4),
        per_entry_point_map: std::iter::once(("main".to_owned(), resources)).collect(),
        bounds_check_policies: naga::proc::BoundsCheckPolicies::default(),
        zero_initialize_workgroup_memory: false,
        force_loop_bounding: false,
        fake_missing_bindings: false,
        emit_int_div_checks: false,
        ..Default::default()
    };
    let (text, translation) =
        msl::write_string(&module, &info, &options, &msl::PipelineOptions::default()).map_err(|e| e.to_string())?;
    match translation.entry_point_names.into_iter().next() {
        Some(Ok(_)) => Ok(text),
        Some(Err(error)) => Err(error.to_string()),
        None => Err("no entry point".to_owned()),
    }
}

/// Whether a kernel, one with cooperative matrices too, is valid and has a translation for Vulkan.
///
/// # Errors
/// As [`metal`].
pub fn vulkan(wgsl: &str) -> Result<Vec<u32>, String> {
    let module = naga::front::wgsl::parse_str(wgsl).map_err(|e| e.emit_to_string(wgsl))?;
    let info = Validator::new(ValidationFlags::all(), Capabilities::all())
        .validate(&module)
        .map_err(|e| e.emit_to_string(wgsl))?;
    let options = spv::Options { lang_version: (1, 3), ..Default::default() };
    spv::write_vec(&module, &info, &options, None).map_err(|e| e.to_string())
}
