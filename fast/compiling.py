"""torch.compile as decoding uses it: for which sizes a step is compiled, Inductor's settings, what a machine lacks.

    set_compile_flags("cpu")
    decode = compile_step(decode, dynamic_dims=(None, None, 0), mode="reduce-overhead")

Settings are set by a command line's `main`, never by an import.
"""

import contextlib
import contextvars
import os
import shutil
import sys
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kernels.cpu.build import compiler_missing

Dims = int | tuple[int, ...] | None


def compile_step(step: Callable, dynamic_dims: tuple[Dims, ...], mode: str | None = None) -> Callable:
    """Compile `step` once for all sizes above one that the given dimensions of each argument may have.

    mode: torch.compile's; "reduce-overhead" records CUDA graphs.
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
        return out.clone() if isinstance(out, Tensor) else tuple(o.clone() for o in out)  # a CUDA graph reuses its own

    return run


def set_compile_flags(device: str) -> None:
    """Inductor's settings for decoding. For a command line's `main` alone: importing a module changes nothing."""
    if device == "cpu":
        torch._inductor.config.cpp.enable_floating_point_contract_flag = "fast"  # fused multiply-add
        torch._inductor.config.cpp.vec_isa_ok = True  # or a probe is compiled for every instruction set
        torch._inductor.config.cpp.min_chunk_size = 8192  # of a loop for each thread: waiting for another takes longer
        os.environ.setdefault("TORCH_WARM_POOL", "0")  # or processes that only Triton needs start beside the compiler
        if shutil.which("openssl"):
            precompile_header()
        else:  # with which Inductor finds out whether a header is still the same: it would fail
            torch._inductor.config.cpp_cache_precompile_headers = False
    else:
        torch._inductor.config.shape_padding = False  # or it times products with padded operands while it compiles
        torch._inductor.config.triton.cudagraph_dynamic_shape_warn_limit = None  # `kv_slots` has few sizes


def precompile_header() -> None:
    """Compile the header of Inductor's C++ kernels beside what comes next, unless there is one.

    Inductor begins when the kernels are written, and waits: 6 to 8 seconds of a first compile of 17 to 20.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if any(Path(default_cache_dir(), "precompiled_headers").glob("*.[gp]ch")):
        return
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    def compile() -> None:
        if sys.platform == "linux":  # where a thread has a niceness of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)  # the CPU's kernels, if they build, first
        with contextlib.suppress(Exception):  # the compile that needs it will meet the same, and say so
            CppPythonBindingsCodeCache.load_pybinding_async([], 'extern "C" void kernel() {}')

    flags = contextvars.copy_context()  # Inductor's are each thread's own
    threading.Thread(target=flags.run, args=(compile,), daemon=True).start()


def missing_compiler() -> str | None:
    """What `--compile` lacks on this machine, or None. Inductor needs a C++ compiler and Python's headers."""
    if reason := compiler_missing():
        return reason
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers (Python.h, Debian package python3-dev) are not installed"
    return None
