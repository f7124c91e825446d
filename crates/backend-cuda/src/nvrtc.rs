//! NVIDIA's compiler as a library, where the machine has it: for GPUs that this build has no compiled kernels for.
//!
//! `unsafe` is calls into the library, which is loaded at run time like the driver.
#![allow(unsafe_code)]

use crate::driver::device_error;
use cudarc::nvrtc::sys;
use moellon_ops::Result;
use std::ffi::{CStr, CString, c_char};
use std::ptr;

/// The library's version; `None` where there is no library.
pub(crate) fn version() -> Option<(i32, i32)> {
    // SAFETY: asking whether the library can be loaded.
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: out pointers.
    let result = unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) };
    (result == sys::nvrtcResult::NVRTC_SUCCESS).then_some((major, minor))
}

fn check(result: sys::nvrtcResult, what: &str) -> Result<()> {
    if result == sys::nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    // SAFETY: the library returns a static string for any value.
    let text = unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(result)) }.to_string_lossy().into_owned();
    Err(device_error(format!("{what}: {text}")))
}

/// A program, destroyed when dropped.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once.
        let _ = unsafe { sys::nvrtcDestroyProgram(&raw mut self.0) };
    }
}

impl Program {
    /// What the compiler said.
    fn log(&self) -> String {
        let mut size = 0;
        // SAFETY: out pointer; then a buffer of the size that the library asked for.
        let bytes = unsafe {
            if sys::nvrtcGetProgramLogSize(self.0, &raw mut size) != sys::nvrtcResult::NVRTC_SUCCESS {
                return String::new();
            }
            let mut bytes = vec![0u8; size];
            if sys::nvrtcGetProgramLog(self.0, bytes.as_mut_ptr().cast()) != sys::nvrtcResult::NVRTC_SUCCESS {
                return String::new();
            }
            bytes
        };
        String::from_utf8_lossy(&bytes).trim_end_matches('\0').trim().to_owned()
    }

    fn cubin(&self, what: &str) -> Result<Vec<u8>> {
        let mut size = 0;
        // SAFETY: out pointer.
        check(unsafe { sys::nvrtcGetCUBINSize(self.0, &raw mut size) }, what)?;
        let mut bytes = vec![0u8; size];
        // SAFETY: a buffer of the size that the library asked for.
        check(unsafe { sys::nvrtcGetCUBIN(self.0, bytes.as_mut_ptr().cast()) }, what)?;
        Ok(bytes)
    }
}

/// Compiles `source` for `architecture` (`sm_89`); `headers` are the files that it may include, by name.
///
/// # Errors
/// What the compiler says.
pub(crate) fn compile(name: &str, source: &str, headers: &[(&str, &str)], architecture: &str) -> Result<Vec<u8>> {
    let text = |text: &str| CString::new(text).expect("sources and options have no zero byte");
    let (source, file) = (text(source), text(&format!("{name}.cu")));
    let owned_names: Vec<CString> = headers.iter().map(|(name, _)| text(name)).collect();
    let owned_texts: Vec<CString> = headers.iter().map(|(_, source)| text(source)).collect();
    let architecture_option = format!("--gpu-architecture={architecture}");
    // Older compilers take a lambda inside a device template for a host function.
    let owned_options = [&architecture_option, "--std=c++17", "--device-as-default-execution-space"].map(text);
    let pointers = |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).collect::<Vec<*const c_char>>();
    let (names, texts, options) = (pointers(&owned_names), pointers(&owned_texts), pointers(&owned_options));
    let mut program = ptr::null_mut();
    // SAFETY: out pointer; strings with a final zero, as many as are stated, owned by this function.
    let result = unsafe {
        sys::nvrtcCreateProgram(
            &raw mut program,
            source.as_ptr(),
            file.as_ptr(),
            names.len() as i32,
            texts.as_ptr(),
            names.as_ptr(),
        )
    };
    check(result, &format!("reading kernels {name}"))?;
    let program = Program(program);
    // SAFETY: the program is alive; as many options as are stated.
    let result = unsafe { sys::nvrtcCompileProgram(program.0, options.len() as i32, options.as_ptr()) };
    if result != sys::nvrtcResult::NVRTC_SUCCESS {
        let log = program.log();
        let first = log.lines().find(|line| line.contains("error")).unwrap_or("the compiler says nothing");
        return Err(device_error(format!("compiling kernels {name} for {architecture}: {first}")));
    }
    program.cubin(&format!("compiled kernels {name}"))
}
