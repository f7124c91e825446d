//! The compiled kernels, and their sources. CUBINs are made from `kernels/*.cu` by `xtask/kernels/nvrtc_check.py --write` and embedded,
//! compressed. For a GPU that has none they are compiled once, by NVRTC where the machine has it, and kept on disk.

use crate::CudaOptions;
use crate::driver::{Device, Kernel, Module, device_error};
use crate::nvrtc;
use moellon_ops::Result;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// A kernel file: its name and text, and its CUBIN for each of [`CAPABILITIES`], compressed.
struct File {
    stem: &'static str,
    source: &'static str,
    images: [&'static [u8]; CAPABILITIES.len()],
}

/// Compute capabilities that CUBINs are embedded for.
const CAPABILITIES: [(i32, i32); 1] = [(9, 0)];

macro_rules! files {
    ($($stem:literal)*) => {
        [$(File {
            stem: $stem,
            source: include_str!(concat!("../kernels/", $stem, ".cu")),
            images: [include_bytes!(concat!("../cubin/sm_90a/", $stem, ".cubin.gz"))],
        }),*]
    };
}

static FILES: [File; 12] = files!["rows" "pack" "matmul" "prompt" "attention" "prompt_attention" "gqa" "decode" "latent" "few" "lines" "sample"];

macro_rules! headers {
    ($($name:literal)*) => { [$(($name, include_str!(concat!("../kernels/", $name)))),*] };
}

/// What kernel files include, by name.
const HEADERS: [(&str, &str); 13] = headers!["attend.cuh" "attend_rows.cuh" "barriers.cuh" "common.cuh" "lots.cuh" "matrices.cuh" "packed.cuh" "pipe.cuh" "product.cuh" "route.cuh" "row.cuh" "shared_rows.cuh" "wgmma.cuh"];

/// The oldest GPUs whose instructions the kernels need (bfloat16 products, asynchronous copies).
const OLDEST: (i32, i32) = (8, 0);

/// Dynamic shared memory that attention kernels may ask for: what a multiprocessor of an H100 or H200 has, less the reserved kilobyte.
pub(crate) const ATTENTION_SHARED: u32 = 226 * 1024;
/// The same for products: the ring of tiles and the results of 128 choices of experts.
const PRODUCT_SHARED: u32 = 160 * 1024;

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

/// The compiler's name for a GPU: with all that its generation can do, where that has a name of its own.
fn architecture((major, minor): (i32, i32)) -> String {
    match (major, minor) {
        (9, 0) | (10, 0) | (12, 0) => format!("sm_{major}{minor}a"),
        _ => format!("sm_{major}{minor}"),
    }
}

/// Where a compiled file is kept: its name is a hash of all that goes into it.
fn kept(folder: &Path, file: &File, architecture: &str, compiler: (i32, i32)) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    (file.source, HEADERS, architecture, compiler).hash(&mut hasher);
    folder.join(format!("{}-{architecture}-{:016x}.cubin.gz", file.stem, hasher.finish()))
}

/// Writes a file that is there as a whole or not at all.
fn keep(path: &Path, image: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(image)?;
    std::fs::write(&temporary, packed.finish()?)?;
    std::fs::rename(&temporary, path)
}

/// CUBINs of all files, in their order: from the folder, or compiled now and kept there.
fn compiled(architecture: &str, compiler: (i32, i32), folder: Option<&Path>) -> Result<Vec<Vec<u8>>> {
    let path = |file: &File| folder.map(|folder| kept(folder, file, architecture, compiler));
    let found = |file: &File| path(file).and_then(|path| unpacked(&std::fs::read(path).ok()?).ok());
    let mut images: Vec<Option<Vec<u8>>> = FILES.iter().map(found).collect();
    if images.iter().any(Option::is_none) {
        tracing::warn!(architecture, folder = ?folder, "compiling kernels, once: this takes a minute or two");
    }
    // A file each: the compiler uses one core.
    std::thread::scope(|scope| {
        let missing = images.iter_mut().zip(&FILES).filter(|(image, _)| image.is_none());
        let threads: Vec<_> = missing
            .map(|(image, file)| {
                scope.spawn(move || -> Result<()> {
                    let made = nvrtc::compile(file.stem, file.source, &HEADERS, architecture)?;
                    if let Some(path) = path(file)
                        && let Err(error) = keep(&path, &made)
                    {
                        tracing::warn!(path = %path.display(), %error, "compiled kernels are not kept");
                    }
                    *image = Some(made);
                    Ok(())
                })
            })
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    Ok(images.into_iter().map(|image| image.expect("what was missing was compiled")).collect())
}

/// Why there are no kernels for a GPU; one line.
fn no_kernels(name: &str, (major, minor): (i32, i32), why: &str) -> moellon_ops::Error {
    let built: Vec<String> = CAPABILITIES.iter().map(|(major, minor)| format!("{major}.{minor}")).collect();
    device_error(format!(
        "{name} has compute capability {major}.{minor}, expected one that this build has kernels for: {}; {why}",
        built.join(", ")
    ))
}

/// Kernels by name, loaded when first used.
pub(crate) struct Kernels {
    modules: HashMap<&'static str, Module>,
    /// Dynamic shared memory that a block may have.
    pub(crate) most_shared: u32,
}

impl Kernels {
    /// Loads the kernels for `device`.
    ///
    /// # Errors
    /// If none were built for its compute capability and none can be compiled.
    pub(crate) fn load(device: &mut Device, options: &CudaOptions) -> Result<Self> {
        let mut modules = HashMap::new();
        for (file, image) in FILES.iter().zip(Self::images(device, options)?) {
            modules.insert(file.stem, device.load_module(file.stem, &image)?);
        }
        // The driver keeps a kilobyte, and kernels have small arrays of their own.
        Ok(Kernels { modules, most_shared: device.shared_bytes.saturating_sub(1024) })
    }

    fn images(device: &Device, options: &CudaOptions) -> Result<Vec<Vec<u8>>> {
        if let Some(folder) = &options.kernels {
            let read = |file: &File| {
                let path = folder.join(format!("{}.cubin.gz", file.stem));
                unpacked(&std::fs::read(&path).map_err(|e| device_error(format!("{}: {e}", path.display())))?)
            };
            return FILES.iter().map(read).collect();
        }
        let built = CAPABILITIES.iter().position(|capability| *capability == device.capability);
        if let Some(built) = built.filter(|_| !options.compile) {
            return FILES.iter().map(|file| unpacked(file.images[built])).collect();
        }
        if device.capability < OLDEST {
            let why = format!("kernels need {}.{} at least", OLDEST.0, OLDEST.1);
            return Err(no_kernels(&device.name, device.capability, &why));
        }
        let Some(compiler) = nvrtc::version() else {
            let why = "libnvrtc, which could compile them here, is not found";
            return Err(no_kernels(&device.name, device.capability, why));
        };
        compiled(&architecture(device.capability), compiler, options.cache_folder.as_deref())
    }

    fn module(&mut self, stem: &str) -> &mut Module {
        self.modules.get_mut(stem).expect("every file was loaded")
    }

    fn kernel(&mut self, stem: &str, name: &str, shared: u32) -> Result<Kernel> {
        let shared = shared.min(self.most_shared);
        self.module(stem).kernel(name, shared)
    }

    pub(crate) fn rows(&mut self, name: &str) -> Result<Kernel> {
        self.kernel("rows", name, 0)
    }

    pub(crate) fn pack(&mut self, name: &str) -> Result<Kernel> {
        self.kernel("pack", name, 0)
    }

    pub(crate) fn sample(&mut self, name: &str) -> Result<Kernel> {
        self.kernel("sample", name, 0)
    }

    pub(crate) fn matmul(&mut self, name: &str) -> Result<Kernel> {
        let streams = ["linear", "gate_up", "down"].iter().any(|start| name.starts_with(start));
        self.kernel("matmul", name, if streams { PRODUCT_SHARED } else { 0 })
    }

    /// A kernel for the products of a prompt; on GPUs without wgmma there is none.
    pub(crate) fn prompt(&mut self, name: &str) -> Result<Kernel> {
        self.kernel("prompt", name, if name.starts_with("prompt_") { ATTENTION_SHARED } else { 0 })
    }

    pub(crate) fn decode(&mut self, name: &str) -> Result<Kernel> {
        self.kernel("decode", name, PRODUCT_SHARED)
    }

    /// Whether there is such a kernel for one row.
    pub(crate) fn has_decode(&mut self, name: &str) -> Result<bool> {
        let shared = PRODUCT_SHARED.min(self.most_shared);
        Ok(self.module("decode").find(name, shared)?.is_some())
    }

    /// A kernel for one row of latent attention, if there is one: on GPUs without clusters there is none.
    pub(crate) fn latent(&mut self, name: &str) -> Result<Option<Kernel>> {
        let shared = ATTENTION_SHARED.min(self.most_shared);
        self.module("latent").find(name, shared)
    }

    pub(crate) fn few(&mut self, name: &str) -> Result<Kernel> {
        self.kernel("few", name, few_shared(name))
    }

    /// Whether there is such a kernel for a few rows.
    pub(crate) fn has_few(&mut self, name: &str) -> Result<bool> {
        let shared = few_shared(name).min(self.most_shared);
        Ok(self.module("few").find(name, shared)?.is_some())
    }

    /// A kernel for dense products of a few rows; on GPUs without clusters there is none.
    pub(crate) fn lines(&mut self, name: &str) -> Result<Option<Kernel>> {
        let shared = self.lines_shared();
        self.module("lines").find(name, shared)
    }

    /// Dynamic shared memory that a block of [`Kernels::lines`] may have.
    pub(crate) fn lines_shared(&self) -> u32 {
        ATTENTION_SHARED.min(self.most_shared)
    }

    /// A kernel for a step's attention with grouped queries.
    pub(crate) fn gqa(&mut self, name: &str) -> Result<Kernel> {
        self.kernel("gqa", name, ATTENTION_SHARED)
    }

    pub(crate) fn attention(&mut self, name: &str) -> Result<Kernel> {
        let joins = matches!(name, "index_topk" | "index_topk_few" | "attend_join");
        self.kernel("attention", name, if joins { 0 } else { ATTENTION_SHARED })
    }

    /// Attention for the rows of a prompt; on GPUs without wgmma there is none.
    pub(crate) fn prompt_attention(&mut self) -> Result<Kernel> {
        self.kernel("prompt_attention", "attend_prompt", ATTENTION_SHARED)
    }
}

#[cfg(test)]
#[allow(clippy::print_stderr)] // A skipped test says so.
mod tests {
    use super::*;

    #[test]
    fn all_sources_are_embedded() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let mut found: Vec<String> = std::fs::read_dir(folder)
            .expect("the folder is there")
            .map(|entry| entry.expect("it is read").file_name().into_string().expect("names are text"))
            .collect();
        let sources = FILES.iter().map(|file| format!("{}.cu", file.stem));
        let mut known: Vec<String> = sources.chain(HEADERS.iter().map(|(name, _)| (*name).to_owned())).collect();
        found.sort();
        known.sort();
        assert_eq!(known, found);
    }

    #[test]
    fn architectures_have_their_full_names() {
        let names = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)].map(architecture);
        assert_eq!(names, ["sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a", "sm_121"]);
    }

    #[test]
    fn a_gpu_without_kernels_is_named() {
        let error = no_kernels("NVIDIA A10", (8, 6), "libnvrtc is not found").to_string();
        assert_eq!(
            error,
            "back end cuda: NVIDIA A10 has compute capability 8.6, expected one that this build has kernels for: 9.0; libnvrtc is \
             not found"
        );
    }

    #[test]
    fn kept_kernels_come_back_whole_or_not_at_all() {
        let folder = std::env::temp_dir().join(format!("moellon-kernels-{}", std::process::id()));
        let path = kept(&folder, &FILES[0], "sm_89", (13, 0));
        assert_ne!(path, kept(&folder, &FILES[0], "sm_89", (13, 1)));
        assert_ne!(path, kept(&folder, &FILES[0], "sm_80", (13, 0)));
        keep(&path, b"a cubin").expect("the folder is writable");
        let packed = std::fs::read(&path).expect("it was kept");
        assert_eq!(unpacked(&packed).expect("it is whole"), b"a cubin");
        assert!(unpacked(&packed[..packed.len() - 5]).is_err(), "a cut file is compiled again");
        std::fs::remove_dir_all(folder).expect("it is ours");
    }

    #[test]
    fn sources_compile_where_the_compiler_is() {
        let Some(version) = nvrtc::version() else {
            eprintln!("SKIP kernels compiled at run time: libnvrtc is not found");
            return;
        };
        let file = FILES.iter().find(|file| file.stem == "sample").expect("it is there");
        let image = nvrtc::compile(file.stem, file.source, &HEADERS, "sm_80").expect("it compiles");
        assert!(image.starts_with(b"\x7fELF"), "{version:?}");
        let error = nvrtc::compile("broken", "#include \"nothing.cuh\"", &HEADERS, "sm_80").unwrap_err().to_string();
        assert!(error.contains("nothing.cuh") && error.contains("sm_80"), "{error}");
    }
}
