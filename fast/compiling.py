"""torch.compile for decoding: dynamic sizes, Inductor's settings, and what a machine lacks to compile.

    set_compile_flags("cpu")
    decode = compile_step(decode, dynamic_dims=(None, None, 0), mode="reduce-overhead")

Only a command line changes these settings, never an import.
"""

import contextlib
import contextvars
import os
import shutil
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kernels.cpu.build import compiler_missing

Dims = int | tuple[int, ...] | None


def compile_step(step: Callable, dynamic_dims: tuple[Dims, ...], mode: str | None = None) -> Callable:
    """Compile `step` once for every size above 1 of its dynamic dimensions, one per argument (None: static).

    mode: as for torch.compile; "reduce-overhead" records CUDA graphs.
    """
    compiled = torch.compile(step, mode=mode, fullgraph=True)

    def run(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        for tensor, dims in zip(tensors, dynamic_dims, strict=True):
            for dim in dims if isinstance(dims, tuple) else (dims,):
                if dim is not None and dim < tensor.dim() and tensor.shape[dim] > 1:
                    torch._dynamo.mark_dynamic(tensor, dim)
        out = compiled(*tensors)
        if mode is None or not tensors[0].is_cuda:
            return out
        return out.clone() if isinstance(out, Tensor) else tuple(o.clone() for o in out)  # a replay overwrites them

    return run


def set_compile_flags(device: str) -> None:
    """Set Inductor's options for decoding. Only for command lines: importing a module changes nothing."""
    if device == "cpu":
        torch._inductor.config.cpp.enable_floating_point_contract_flag = "fast"  # fused multiply-add
        torch._inductor.config.cpp.vec_isa_ok = True  # else Inductor compiles a probe per instruction set
        torch._inductor.config.cpp.min_chunk_size = 8192  # iterations per thread: fewer are not worth another thread
        os.environ.setdefault("TORCH_WARM_POOL", "0")  # else Inductor starts processes that only Triton needs
        if shutil.which("openssl"):
            precompile_header()
        else:  # Inductor calls openssl to see whether a header has changed, and fails without it
            torch._inductor.config.cpp_cache_precompile_headers = False
    else:
        torch._inductor.config.shape_padding = False  # else Inductor times products with padded operands
        torch._inductor.config.triton.cudagraph_dynamic_shape_warn_limit = None  # sizes are few: see `kv_slots`


def precompile_header() -> None:
    """Precompile the header of Inductor's C++ kernels in a background thread, unless that has been done before.

    Inductor itself would begin only after generating the kernels, and wait: 6 to 8 of a first compile's 17 to 20 s.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if any(Path(default_cache_dir(), "precompiled_headers").glob("*.[gp]ch")):
        return
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    def compile() -> None:
        if sys.platform == "linux":  # where each thread has its own niceness
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)  # lower than a build of our CPU kernels
        with contextlib.suppress(Exception):  # the compile that needs the header will report it
            CppPythonBindingsCodeCache.load_pybinding_async([], 'extern "C" void kernel() {}')

    flags = contextvars.copy_context()  # Inductor's settings are per thread
    threading.Thread(target=flags.run, args=(compile,), daemon=True).start()


def missing_compiler() -> str | None:
    """What this machine lacks for `--compile`, or None: a C++ compiler, Python's headers, a folder to write to."""
    if reason := compiler_missing():
        return reason
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers (Python.h, Debian package python3-dev) are not installed"
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir  # the import makes the folder too

        tempfile.TemporaryFile(dir=cache_dir()).close()
    except OSError as error:
        return f"Inductor's cache (TORCHINDUCTOR_CACHE_DIR) cannot be written: {error}"
    return None
