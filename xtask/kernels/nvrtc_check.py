"""Compiles CUDA sources with NVRTC for every architecture that Moellon supports: no GPU, driver or toolkit needed.

usage: nvrtc_check.py FILE.cu..

Needs the wheels nvidia-cuda-nvrtc, nvidia-cuda-runtime and nvidia-cuda-crt (`cargo xtask kernels` installs them).
"""

import ctypes
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
    """Returns (bytes of the CUBIN, log); zero bytes for an error."""
    program = ctypes.c_void_p()
    source = path.read_bytes()
    result = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, str(path).encode(), 0, None, None)
    if result != 0:
        return 0, f"nvrtcCreateProgram returned {result}"
    encoded = [option.encode() for option in options]
    result = nvrtc.nvrtcCompileProgram(program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded))
    log = text_of(nvrtc, "ProgramLog", program)
    size = ctypes.c_size_t()
    if result == 0:
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return size.value, log


def main(files):
    folder = wheel_folder()
    nvrtc = open_nvrtc(folder)
    failures = 0
    for file in map(pathlib.Path, files):
        for architecture in ARCHITECTURES:
            options = [
                f"--gpu-architecture={architecture}",
                "--std=c++17",
                f"--include-path={folder / 'include'}",
                f"--include-path={file.parent}",
            ]
            size_bytes, log = compile_one(nvrtc, file, options)
            if size_bytes == 0:
                failures += 1
                print(f"{file}: {architecture}: does not compile\n{log}")
            else:
                print(f"{file}: {architecture}: {size_bytes} bytes" + (f"\n{log}" if log else ""))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
