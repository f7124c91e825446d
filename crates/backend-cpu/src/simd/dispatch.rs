//! Which vector instructions the processor has, and the one place where code compiled for them is entered.

use super::Simd;
use super::portable::Portable;
use std::fmt;

#[cfg(target_arch = "aarch64")]
use super::neon::Neon;
#[cfg(target_arch = "x86_64")]
use super::{avx2::Avx2, avx512::Avx512};

/// A set of vector instructions that kernels are compiled for. All levels give the same bits, except that with
/// [`crate::ActivationMode::Int8`] tile registers that multiply bf16 compute latent attention and the indexer's scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CpuLevel {
    /// Whatever the compilation target has.
    Portable,
    /// NEON with widening multiplies (Cortex-A72 and the like).
    Neon,
    /// NEON with dot products of bytes (2018 and later, all Apple silicon).
    NeonDotprod,
    /// The same and products of matrices of bytes, for many rows (Neoverse V1, Apple M2, Cortex-A710 and later).
    NeonI8mm,
    /// AVX2, FMA, F16C (Haswell, Zen and later).
    Avx2,
    /// AVX2 and AVX-VNNI (Alder Lake and later without AVX-512).
    Avx2Vnni,
    /// AVX-512 F, BW, VL, DQ and VNNI (Cascade Lake, Zen 4 and later).
    Avx512Vnni,
    /// The same, VBMI, and AMX tiles of bytes, which many rows are multiplied with (Sapphire Rapids and later), and of bf16, where the
    /// processor has those too, for attention over latents.
    Avx512Amx,
}

impl CpuLevel {
    /// All levels, slowest first.
    pub const ALL: [CpuLevel; 8] = [
        CpuLevel::Portable,
        CpuLevel::Neon,
        CpuLevel::NeonDotprod,
        CpuLevel::NeonI8mm,
        CpuLevel::Avx2,
        CpuLevel::Avx2Vnni,
        CpuLevel::Avx512Vnni,
        CpuLevel::Avx512Amx,
    ];

    /// The name in messages and receipts.
    pub const fn name(self) -> &'static str {
        match self {
            CpuLevel::Portable => "portable",
            CpuLevel::Neon => "neon",
            CpuLevel::NeonDotprod => "neon-dotprod",
            CpuLevel::NeonI8mm => "neon-i8mm",
            CpuLevel::Avx2 => "avx2",
            CpuLevel::Avx2Vnni => "avx2-vnni",
            CpuLevel::Avx512Vnni => "avx512-vnni",
            CpuLevel::Avx512Amx => "avx512-amx",
        }
    }

    /// Whether this machine can run it.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = || {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            };
            match self {
                CpuLevel::Portable => true,
                CpuLevel::Neon | CpuLevel::NeonDotprod | CpuLevel::NeonI8mm => false,
                CpuLevel::Avx2 => avx2(),
                CpuLevel::Avx2Vnni => avx2() && is_x86_feature_detected!("avxvnni"),
                CpuLevel::Avx512Vnni => {
                    avx2()
                        && is_x86_feature_detected!("avx512f")
                        && is_x86_feature_detected!("avx512bw")
                        && is_x86_feature_detected!("avx512vl")
                        && is_x86_feature_detected!("avx512dq")
                        && is_x86_feature_detected!("avx512vnni")
                }
                CpuLevel::Avx512Amx => {
                    CpuLevel::Avx512Vnni.is_available()
                        && is_x86_feature_detected!("avx512vbmi")
                        && super::amx::is_available()
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            use std::arch::is_aarch64_feature_detected;
            match self {
                CpuLevel::Portable => true,
                CpuLevel::Neon => is_aarch64_feature_detected!("neon"),
                CpuLevel::NeonDotprod => {
                    is_aarch64_feature_detected!("neon") && is_aarch64_feature_detected!("dotprod")
                }
                CpuLevel::NeonI8mm => CpuLevel::NeonDotprod.is_available() && is_aarch64_feature_detected!("i8mm"),
                CpuLevel::Avx2 | CpuLevel::Avx2Vnni | CpuLevel::Avx512Vnni | CpuLevel::Avx512Amx => false,
            }
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        {
            self == CpuLevel::Portable
        }
    }

    /// The levels that this machine can run, slowest first. Tests loop over them.
    pub fn available() -> impl Iterator<Item = CpuLevel> {
        CpuLevel::ALL.into_iter().filter(|level| level.is_available())
    }

    /// The fastest level that this machine can run.
    pub fn detect() -> CpuLevel {
        CpuLevel::available().last().unwrap_or(CpuLevel::Portable)
    }
}

impl fmt::Display for CpuLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A kernel body, generic over the level.
pub(crate) trait Kernel {
    /// What it works on.
    type Args: ?Sized;

    /// Whether it multiplies bytes. Levels that differ only in how they do that share the other kernels: every kernel is
    /// compiled for every level, and this crate is mostly kernels.
    const BYTE_DOTS: bool = false;
    /// Whether it makes or multiplies expanded tiles, for the same reason.
    #[cfg_attr(not(target_arch = "aarch64"), allow(dead_code, reason = "levels that care are of AArch64"))]
    const WIDE_DOTS: bool = false;

    /// Whether it looks up codes in tables, for the same reason.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "levels that care are of x86-64"))]
    const LOOKS_UP: bool = false;

    /// Runs it. Implementations are `#[inline(always)]`.
    ///
    /// # Safety
    /// `args` holds what the kernel's type says.
    unsafe fn run<S: Simd>(simd: S, args: &Self::Args);
}

/// A level that this machine has: [`Level::new`] is the only place that makes one, so that entering a kernel needs no
/// check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Level {
    name: CpuLevel,
    available: Available,
    #[cfg(target_arch = "x86_64")]
    bf16_tiles: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Available {
    Portable,
    #[cfg(target_arch = "aarch64")]
    Neon,
    #[cfg(target_arch = "aarch64")]
    NeonDotprod,
    #[cfg(target_arch = "aarch64")]
    NeonI8mm,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx2Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx512Vbmi,
}

impl Level {
    /// The level, if this machine has it.
    pub(crate) fn new(level: CpuLevel) -> Option<Self> {
        if !level.is_available() {
            return None;
        }
        let available = match level {
            CpuLevel::Portable => Some(Available::Portable),
            #[cfg(target_arch = "aarch64")]
            CpuLevel::Neon => Some(Available::Neon),
            #[cfg(target_arch = "aarch64")]
            CpuLevel::NeonDotprod => Some(Available::NeonDotprod),
            #[cfg(target_arch = "aarch64")]
            CpuLevel::NeonI8mm => Some(Available::NeonI8mm),
            #[cfg(target_arch = "x86_64")]
            CpuLevel::Avx2 => Some(Available::Avx2),
            #[cfg(target_arch = "x86_64")]
            CpuLevel::Avx2Vnni => Some(Available::Avx2Vnni),
            #[cfg(target_arch = "x86_64")]
            CpuLevel::Avx512Vnni => Some(Available::Avx512Vnni),
            #[cfg(target_arch = "x86_64")]
            CpuLevel::Avx512Amx => Some(Available::Avx512Vbmi),
            #[cfg(not(target_arch = "aarch64"))]
            CpuLevel::Neon | CpuLevel::NeonDotprod | CpuLevel::NeonI8mm => None,
            #[cfg(not(target_arch = "x86_64"))]
            CpuLevel::Avx2 | CpuLevel::Avx2Vnni | CpuLevel::Avx512Vnni | CpuLevel::Avx512Amx => None,
        };
        available.map(|available| Level {
            name: level,
            available,
            #[cfg(target_arch = "x86_64")]
            bf16_tiles: level == CpuLevel::Avx512Amx && super::amx::has_bf16(),
        })
    }

    /// Its name.
    pub(crate) fn name(self) -> CpuLevel {
        self.name
    }

    /// [`Simd::STREAMS`]
    pub(crate) fn streams(self) -> [usize; 4] {
        match self.available {
            Available::Portable => Portable::STREAMS,
            #[cfg(target_arch = "aarch64")]
            Available::Neon | Available::NeonDotprod | Available::NeonI8mm => Neon::<false, false>::STREAMS,
            #[cfg(target_arch = "x86_64")]
            Available::Avx2 | Available::Avx2Vnni => Avx2::<false>::STREAMS,
            #[cfg(target_arch = "x86_64")]
            Available::Avx512Vnni | Available::Avx512Vbmi => Avx512::<false>::STREAMS,
        }
    }

    /// Whether it has tile registers, so that [`Level::call_with_tiles`] may be called.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn has_tiles(self) -> bool {
        self.name == CpuLevel::Avx512Amx
    }

    /// Whether tile registers multiply bf16 as well.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn has_bf16_tiles(self) -> bool {
        self.bf16_tiles
    }

    /// Runs a kernel that uses tile registers.
    ///
    /// # Safety
    /// `args` holds what the kernel's type says.
    ///
    /// # Panics
    /// If the level has none.
    #[cfg(target_arch = "x86_64")]
    pub(crate) unsafe fn call_with_tiles<K: Kernel>(self, args: &K::Args) {
        assert!(self.has_tiles(), "{} has no tile registers", self.name);
        // SAFETY: the level exists only where the processor has AVX-512 with VBMI as well; `args` is the caller's promise.
        unsafe {
            if const { K::LOOKS_UP } {
                run_avx512_vbmi::<K>(args);
            } else {
                run_avx512_vnni::<K>(args);
            }
        }
    }

    /// Runs a kernel compiled for this level.
    ///
    /// # Safety
    /// `args` holds what the kernel's type says.
    pub(crate) unsafe fn call<K: Kernel>(self, args: &K::Args) {
        // SAFETY: a `Level` exists only for instructions that the processor has; `args` is the caller's promise.
        unsafe {
            match self.available {
                Available::Portable => run_portable::<K>(args),
                #[cfg(target_arch = "aarch64")]
                Available::Neon => run_neon::<K>(args),
                #[cfg(target_arch = "aarch64")]
                Available::NeonDotprod => {
                    if const { K::BYTE_DOTS } {
                        run_neon_dotprod::<K>(args);
                    } else {
                        run_neon::<K>(args);
                    }
                }
                #[cfg(target_arch = "aarch64")]
                Available::NeonI8mm => {
                    if const { K::WIDE_DOTS } {
                        run_neon_i8mm::<K>(args);
                    } else if const { K::BYTE_DOTS } {
                        run_neon_dotprod::<K>(args);
                    } else {
                        run_neon::<K>(args);
                    }
                }
                #[cfg(target_arch = "x86_64")]
                Available::Avx2 => run_avx2::<K>(args),
                #[cfg(target_arch = "x86_64")]
                Available::Avx2Vnni => {
                    if const { K::BYTE_DOTS } {
                        run_avx2_vnni::<K>(args);
                    } else {
                        run_avx2::<K>(args);
                    }
                }
                #[cfg(target_arch = "x86_64")]
                Available::Avx512Vnni => run_avx512_vnni::<K>(args),
                #[cfg(target_arch = "x86_64")]
                Available::Avx512Vbmi => {
                    if const { K::LOOKS_UP } {
                        run_avx512_vbmi::<K>(args);
                    } else {
                        run_avx512_vnni::<K>(args);
                    }
                }
            }
        }
    }
}

/// # Safety
/// `args` is what `K` asks for.
#[inline(never)]
unsafe fn run_portable<K: Kernel>(args: &K::Args) {
    // SAFETY: the caller's promise.
    unsafe { K::run(Portable, args) }
}

/// # Safety
/// The processor has the features; `args` is what `K` asks for.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2<K: Kernel>(args: &K::Args) {
    // SAFETY: the caller's promise.
    unsafe { K::run(Avx2::<false>::new(), args) }
}

/// # Safety
/// The processor has the features; `args` is what `K` asks for.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
unsafe fn run_avx2_vnni<K: Kernel>(args: &K::Args) {
    // SAFETY: the caller's promise.
    unsafe { K::run(Avx2::<true>::new(), args) }
}

/// # Safety
/// The processor has the features; `args` is what `K` asks for.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn run_avx512_vnni<K: Kernel>(args: &K::Args) {
    // SAFETY: the caller's promise.
    unsafe { K::run(Avx512::<false>::new(), args) }
}

/// # Safety
/// The processor has the features; `args` is what `K` asks for.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
unsafe fn run_avx512_vbmi<K: Kernel>(args: &K::Args) {
    // SAFETY: the caller's promise.
    unsafe { K::run(Avx512::<true>::new(), args) }
}

/// # Safety
/// The processor has the features; `args` is what `K` asks for.
#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
unsafe fn run_neon<K: Kernel>(args: &K::Args) {
    // SAFETY: the caller's promise.
    unsafe { K::run(Neon::<false, false>::new(), args) }
}

/// # Safety
/// The processor has the features; `args` is what `K` asks for.
#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon,dotprod")]
unsafe fn run_neon_dotprod<K: Kernel>(args: &K::Args) {
    // SAFETY: the caller's promise.
    unsafe { K::run(Neon::<true, false>::new(), args) }
}

/// # Safety
/// The processor has the features; `args` is what `K` asks for.
#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon,dotprod,i8mm")]
unsafe fn run_neon_i8mm<K: Kernel>(args: &K::Args) {
    // SAFETY: the caller's promise.
    unsafe { K::run(Neon::<true, true>::new(), args) }
}
