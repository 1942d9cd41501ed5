"""torch.compile for decoding: dynamic sizes, CUDA graphs, Inductor's settings, and what a machine lacks to compile.

    set_compile_flags("cpu")
    decode = compile_step(decode, dynamic_dims=(None, None, 0), record=True)

Only a command line changes these settings, never an import.
Worth knowing: CUDA graphs are recorded here, not by torch.compile's mode "reduce-overhead", which checks at each replay
all that a step depends on, the address of each weight included, while a small model's GPU waits.
"""

import contextlib
import contextvars
import os
import shutil
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.cpu.build import compiler_missing, main_line

Dims = int | tuple[int, ...] | None
Outputs = Tensor | tuple[Tensor, ...]


def compile_step(step: Callable, dynamic_dims: tuple[Dims, ...], record: bool = False) -> Callable:
    """Compile `step` once for every size above 1 of its dynamic dimensions, one per argument (None: static).

    The last arguments may be left out. record: on a GPU, replay it as a CUDA graph, see `recorded`; arguments with
    dynamic dimensions are read in place. A call raises OSError where the compiler or a full disk hinders compiling.
    """
    compiled = torch.compile(step, fullgraph=True)

    def run(*tensors: Tensor) -> Outputs:
        for tensor, dims in zip(tensors, dynamic_dims, strict=False):
            for dim in dims if isinstance(dims, tuple) else (dims,):
                is_marked = dim in getattr(tensor, "_dynamo_dynamic_indices", ())  # by an earlier call
                if dim is not None and not is_marked and dim < tensor.dim() and tensor.shape[dim] > 1:
                    torch._dynamo.mark_dynamic(tensor, dim)
            if dims is None and tensor.is_cuda:  # kernels are chosen by it; a second size would make it dynamic
                torch._dynamo.mark_static(tensor)
        try:
            return compiled(*tensors)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if hindrance := _hindrance(error.inner_exception):
                raise hindrance from error
            raise

    return replayed(run, [dims is not None for dims in dynamic_dims]) if record else run


def _hindrance(error: Exception) -> OSError | None:
    """One line for an error inside Inductor that is this machine's fault; None for a bug, whose traceback is wanted."""
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    if not isinstance(error, (OSError, CppCompileError, InvalidCxxCompiler)):
        return None
    reason = main_line(error.output) if isinstance(error, CppCompileError) else str(error).partition("\n")[0]
    return OSError(f"torch.compile cannot work here: {reason}; mend that, or leave out --compile")


def replayed(step: Callable[..., Outputs], in_place: Sequence[bool]) -> Callable[..., Outputs]:
    """`step`, which a GPU replays as a CUDA graph, see `recorded`."""
    graphs = recorded(step, in_place, record_graph)
    return lambda *tensors: (graphs if tensors[0].is_cuda else step)(*tensors)


@dataclass
class Recording:
    """A step recorded for arguments of certain sizes: where it reads them, what replays it, the outputs it writes."""

    inputs: list[Tensor]
    replay: Callable[[], None] | None = None  # None: not recorded yet
    out: Outputs = ()


def recorded(step: Callable[..., Outputs], in_place: Sequence[bool], record: Callable) -> Callable[..., Outputs]:
    """`step`, recorded for every combination of sizes that its arguments take, and from then on replayed.

    The first call with new sizes runs it, so that it compiles; the second records. Each call copies its arguments to
    where the recording reads them, except those `in_place`: for another address of these it is recorded anew.
    """
    recordings: dict[tuple, Recording] = {}

    def run(*tensors: Tensor) -> Outputs:
        each = list(zip(tensors, in_place, strict=False))
        key = tuple((tensor.shape, stays and tensor.data_ptr()) for tensor, stays in each)
        if (found := recordings.get(key)) is None:
            found = recordings[key] = Recording([tensor if stays else tensor.clone() for tensor, stays in each])
            out = step(*found.inputs)
        else:
            if found.replay is None:
                found.replay, found.out = record(step, found.inputs)
            for recorded_at, (tensor, stays) in zip(found.inputs, each, strict=True):
                if not stays:
                    recorded_at.copy_(tensor)
            found.replay()
            out = found.out
        return out.clone() if isinstance(out, Tensor) else tuple(o.clone() for o in out)  # the next replay writes there

    return run


def record_graph(step: Callable[..., Outputs], inputs: list[Tensor]) -> tuple[Callable[[], None], Outputs]:
    """Record `step` as a CUDA graph, without running it: what replays it, and the outputs that a replay writes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's threads may go on meanwhile
        out = step(*inputs)
    return graph.replay, out


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


def precompile_header() -> None:
    """Precompile the header of Inductor's C++ kernels in a background thread, unless that has been done before.

    Inductor itself would begin only after generating the kernels, and wait: 6 to 8 of a first compile's 17 to 20 s.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    headers = Path(default_cache_dir(), "precompiled_headers")
    remove_cut_headers(headers)
    if any(headers.glob("*.[gp]ch")):
        return
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    def compile() -> None:
        if sys.platform == "linux":  # where each thread has its own niceness
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)  # lower than a build of our CPU kernels
        with contextlib.suppress(Exception):  # the compile that needs the header will report it
            CppPythonBindingsCodeCache.load_pybinding_async([], 'extern "C" void kernel() {}')

    flags = contextvars.copy_context()  # Inductor's settings are per thread
    threading.Thread(target=flags.run, args=(compile,), daemon=True).start()


def remove_cut_headers(headers: Path) -> None:
    """Remove the precompiled headers whose compiler was killed: Inductor takes any for whole, and then cannot compile.

    While Inductor makes one, it holds a lock, and there is a folder beside it, which a killed process leaves behind.
    """
    for beside in headers.glob("*.h_CxxBuild"):
        from filelock import FileLock, Timeout

        header = beside.name.removesuffix("_CxxBuild")
        lock = FileLock(headers / "locks" / f"{header.removesuffix('.h')}.lock", timeout=0)
        with contextlib.suppress(Timeout, OSError), lock:  # held: another process is making it
            if beside.exists():
                for cut in headers.glob(f"{header}.[gp]ch"):
                    cut.unlink()
                beside.rmdir()


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
