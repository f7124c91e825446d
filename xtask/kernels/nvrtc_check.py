"""Compiles CUDA sources with NVRTC for every architecture that Moellon supports: no GPU, driver or toolkit needed.

usage: nvrtc_check.py [--write FOLDER ARCHITECTURE] [-DNAME ..] FILE.cu..

With --write the CUBINs for one architecture are written to FOLDER/<stem>.cubin.gz instead.

Needs the wheels nvidia-cuda-nvrtc, nvidia-cuda-runtime and nvidia-cuda-crt (`cargo xtask kernels` installs them).
"""

import concurrent.futures
import ctypes
import gzip
import importlib.util
import pathlib
import sys

ARCHITECTURES = ["sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a"]


def wheel_folder():
    """The folder of the wheels that holds `lib/` and `include/`."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else []:
        for candidate in sorted(pathlib.Path(folder).glob("cu*")):
            if list(candidate.glob("lib/libnvrtc.so.*")):
                return candidate
    sys.exit("nvrtc_check: the wheel nvidia-cuda-nvrtc is not installed")


def open_nvrtc(folder):
    """Loads the library and its built-ins, which it would look for on the library path."""
    for name in sorted(folder.glob("lib/libnvrtc-builtins.so.*")):
        ctypes.CDLL(str(name), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(sorted(folder.glob("lib/libnvrtc.so.*"))[0]))


def text_of(nvrtc, what, program):
    """A text that NVRTC holds for a program."""
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(max(size.value, 1))
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.value.decode(errors="replace").strip()


def compile_one(nvrtc, path, options):
    """Returns (the CUBIN, log); empty for an error."""
    program = ctypes.c_void_p()
    source = path.read_bytes()
    result = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, str(path).encode(), 0, None, None)
    if result != 0:
        return b"", f"nvrtcCreateProgram returned {result}"
    encoded = [option.encode() for option in options]
    result = nvrtc.nvrtcCompileProgram(program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded))
    log = text_of(nvrtc, "ProgramLog", program)
    cubin = b""
    if result == 0:
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, buffer)
        cubin = buffer.raw
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin, log


def compile_job(job):
    """One file for one architecture, in a process of its own: NVRTC uses one core."""
    file, architecture, defines = job
    folder = wheel_folder()
    options = [
        f"--gpu-architecture={architecture}",
        "--std=c++17",
        f"--include-path={folder / 'include'}",
        f"--include-path={file.parent}",
        *defines,
    ]
    return (file, architecture, *compile_one(open_nvrtc(folder), file, options))


def main(arguments):
    wheel_folder()
    failures = 0
    write_to, architectures = None, ARCHITECTURES
    if arguments[:1] == ["--write"]:
        write_to, architectures = pathlib.Path(arguments[1]), [arguments[2]]
        arguments = arguments[3:]
    defines = [argument for argument in arguments if argument.startswith("-D")]
    files = [pathlib.Path(argument) for argument in arguments if argument not in defines]
    jobs = [(file, architecture, defines) for file in files for architecture in architectures]
    with concurrent.futures.ProcessPoolExecutor() as pool:
        for file, architecture, cubin, log in pool.map(compile_job, jobs):
            if not cubin:
                failures += 1
                print(f"{file}: {architecture}: does not compile\n{log}")
                continue
            print(f"{file}: {architecture}: {len(cubin)} bytes" + (f"\n{log}" if log else ""))
            if write_to:
                write_to.mkdir(parents=True, exist_ok=True)
                # No time stamp: the same source gives the same file.
                (write_to / f"{file.stem}.cubin.gz").write_bytes(gzip.compress(cubin, mtime=0))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
