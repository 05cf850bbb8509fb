"""CUDA C compiled at run time by NVRTC, the compiler that torch brings along, and run on torch's tensors."""

from __future__ import annotations

import ctypes
import os
import site
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import ModelmillError

if TYPE_CHECKING:
    from torch import Tensor

# Each operation rounded by itself as IEEE 754 has it, as on a CPU.
EXACT_OPTIONS = ("--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false")
THREADS = 128  # in a block of them


class NvrtcError(ModelmillError):
    """There is no compiler for CUDA C, or it refused a source."""


class Kernel:
    """A compiled function that can be started on torch's current GPU and stream."""

    def __init__(self, driver: Any, handle: ctypes.c_void_p) -> None:
        self._driver, self._handle = driver, handle

    def __call__(self, blocks: int, *arguments: Tensor | int | None) -> None:
        """
        Start `blocks` blocks of THREADS threads.

        Args:
            arguments: tensors on the GPU, None for a null pointer, and 64-bit integers.
        """
        import torch

        words = [
            ctypes.c_int64(each) if isinstance(each, int) else ctypes.c_void_p(0 if each is None else each.data_ptr())
            for each in arguments
        ]
        pointers = (ctypes.c_void_p * len(words))(*(ctypes.addressof(word) for word in words))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = self._driver.cuLaunchKernel(self._handle, blocks, 1, 1, THREADS, 1, 1, 0, stream, pointers, None)
        if status:
            raise NvrtcError(f"a kernel could not be started: CUDA's error {status}")


def compiled_kernels(sources: Mapping[str, str], names: tuple[str, ...]) -> dict[str, Kernel]:
    """
    Compile for torch's current GPU.

    Args:
        sources: texts by file name; the first is compiled, the others are what it includes.
        names: of the functions, which are `extern "C"` and `__global__`.

    Raises:
        NvrtcError: there is no NVRTC, or it refuses the source.
    """
    import torch

    torch.cuda.current_stream().synchronize()  # there is a context from here on
    major, minor = torch.cuda.get_device_capability()
    image = _compile(_load_nvrtc(), sources, f"--gpu-architecture=sm_{major}{minor}")
    driver = ctypes.CDLL("libcuda.so.1")
    module = ctypes.c_void_p()
    _demand(driver.cuModuleLoadData(ctypes.byref(module), image), "the compiled kernels could not be loaded")
    kernels = {}
    for name in names:
        handle = ctypes.c_void_p()
        _demand(driver.cuModuleGetFunction(ctypes.byref(handle), module, name.encode()), f"there is no kernel {name}")
        kernels[name] = Kernel(driver, handle)
    return kernels


def _load_nvrtc() -> Any:
    import torch

    name = f"libnvrtc.so.{(torch.version.cuda or '').partition('.')[0]}"
    folders = [Path(folder) for folder in (*site.getsitepackages(), str(Path(torch.__file__).parent.parent))]
    homes = [Path(os.environ[key], "lib64") for key in ("CUDA_HOME", "CUDA_PATH") if key in os.environ]
    found = [path for folder in folders for path in folder.glob(f"nvidia/*/lib/{name}")]
    for path in [*found, *(home / name for home in [*homes, Path("/usr/local/cuda/lib64")]), Path(name)]:
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    raise NvrtcError(f"{name} is not there; pip installs it with torch for CUDA")


def _compile(nvrtc: Any, sources: Mapping[str, str], architecture: str) -> bytes:
    (name, text), *headers = sources.items()
    count = len(headers)
    contents = (ctypes.c_char_p * count)(*(content.encode() for _, content in headers))
    included = (ctypes.c_char_p * count)(*(each.encode() for each, _ in headers))
    program = ctypes.c_void_p()
    created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), count, contents, included)
    _demand(created, "NVRTC does not start")
    options = [option.encode() for option in (architecture, "--std=c++17", *EXACT_OPTIONS)]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    if status:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise NvrtcError(f"{name} could not be compiled: {log.value.decode(errors='replace')}")
    _demand(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "NVRTC gave no code")
    image = ctypes.create_string_buffer(size.value)
    _demand(nvrtc.nvrtcGetCUBIN(program, image), "NVRTC gave no code")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return image.raw


def _demand(status: int, problem: str) -> None:
    if status:
        raise NvrtcError(f"{problem}: CUDA's error {status}")
