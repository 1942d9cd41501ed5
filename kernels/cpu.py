"""The CPU's kernels for products of a few rows: built once from `cpu*.cpp`, found again by every later process.

    if cpu.load() is None:
        packed = cpu.pack_int4(weight, scales, zeros)
        y = torch.ops.fast.int4_linear(x, packed, n_out, groupsize)

`bf16_linear`, `int8_linear` and `int4_linear` take x bfloat16 `[M, K]` and give `[M, N]`: one row at the speed of
memory, up to 16 without reading a weight twice, more as a product of matrices. They also do what surrounds a product
(`model.project`). `cpu_kernels.cpp` says how panels lie.
`decode_attention` is attention of a few positions over a long cache, for processors where `is_fast()`.
`in_a_team` is for steps made of these alone.
"""

import contextlib
import ctypes
import functools
import hashlib
import math
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LANES = 16  # rows of a panel
CACHE_LINE, HUGE_PAGE = 64, 1 << 21  # bytes
PANELS_AT_ONCE = 64  # packed together: what that takes beside the result is small
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden", "-w")

_library: ctypes.PyDLL | None = None
_mapping: mmap.mmap | None = None  # where the next tensor of `in_huge_pages` goes, behind so many bytes
_taken = 0


@functools.cache
def load() -> str | None:
    """Build or find the operators `torch.ops.fast.*`; None, or in one line why they are not there.

    The library lies in TORCH_EXTENSIONS_DIR, by default `~/.cache/torch_extensions`, under a name that depends on the
    source and on the version of torch.
    """
    global _library
    content = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("cpu*.[ch]*")))
    key = hashlib.sha256(content + f"{torch.__version__} {FLAGS}".encode()).hexdigest()[:16]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    library = folder / f"fast-{key}.so"
    try:
        if not library.exists():
            _build(library)
        torch.ops.load_library(library)
        _library = ctypes.PyDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[0])
        return f"the CPU's kernels cannot be built, without them quantised weights run slowly: {reason}"
    _register_fakes()
    return None


def is_fast() -> bool:
    """Whether this processor has AVX-512 with bf16, without which there is no attention here."""
    return load() is None and torch.ops.fast.variant("") == "avx512"


def in_a_team(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step` with the threads held together from its first kernel to its last: what lies between them costs less.

    Operators that are not of these kernels run on one thread in there.
    """

    def run(*args: Any) -> Any:
        result, error = None, KeyboardInterrupt()  # which may come before the first line of `call`

        @ctypes.CFUNCTYPE(None)
        def call() -> None:
            nonlocal result, error
            try:
                result, error = step(*args), None
            except BaseException as problem:
                error = problem

        _library.in_a_team(call)
        if error is not None:
            raise error
        return result

    return step if _library is None else run


def _build(library: Path) -> None:
    """Compile the sources, all at once; the library gets its name once it is whole. Raises OSError or
    CalledProcessError.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise OSError(f"no C++ compiler ({compiler}) is installed")
    print("building the CPU's kernels, once ...", file=sys.stderr)
    root = Path(torch.__file__).parent
    library.parent.mkdir(parents=True, exist_ok=True)
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    link = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        temporary = Path(folder)

        def run(*arguments: str | Path) -> None:
            subprocess.run([compiler, *FLAGS, *arguments], check=True, capture_output=True, text=True)

        def compile(source: Path) -> Path:
            run(abi, *include, "-c", source, "-o", target := temporary / f"{source.stem}.o")
            return target

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compile, Path(__file__).parent.glob("cpu*.cpp")))
        run("-shared", *objects, "-o", whole := temporary / library.name, *link)
        os.replace(whole, library)


def _register_fakes() -> None:
    """Tell a compiler what the operators return."""

    def linear(x, packed, n_out, bias=None, norm=None, eps=0.0, residual=None, gated=False):
        return x.new_empty(x.shape[0], n_out // 2 if gated else n_out)

    for name in ("bf16_linear", "int8_linear"):
        torch.library.register_fake(f"fast::{name}", linear)
    torch.library.register_fake("fast::int4_linear", lambda x, w, n, groupsize, *around: linear(x, w, n, *around))
    torch.library.register_fake("fast::decode_attention", lambda q, *others: q.new_empty(q.shape))


def pack_bf16(weight: Tensor) -> Tensor:
    """bfloat16 `[N, K]`, K even, as panels, uint8 `[ceil(N / 16), 32 K]`."""
    out = in_huge_pages(-(-weight.shape[0] // LANES), 2 * LANES * weight.shape[1])
    torch.ops.fast.pack_bf16(weight.contiguous(), out)
    return out


def pack_int8(weight: Tensor, scales: Tensor) -> Tensor:
    """int8 `[N, K]`, 4 dividing K, and float32 `[N]` as panels, uint8 `[ceil(N / 16), 16 K + 64]`."""

    def panels(weight: Tensor, scales: Tensor) -> Tensor:
        above = weight.view(torch.uint8) ^ 0x80
        fours = above.unflatten(1, (-1, 4)).unflatten(0, (-1, LANES)).transpose(1, 2)  # [P, K / 4, 16, 4]
        scales = scales.unflatten(0, (-1, LANES))
        return torch.cat((fours.flatten(1), scales.view(torch.uint8)), dim=1)

    return _by_panels(panels, weight, scales)


def pack_int4(weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """uint8 `[N, K / 2]` and bfloat16 `[N, K / G]` as panels, uint8 `[ceil(N / 16), 8 K + 64 K / G]`."""

    def panels(weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        n_groups = scales.shape[1]
        a, b, c, d = weight.unflatten(1, (-1, 4)).unbind(2)  # each [rows, K / 8], an even input below an odd one
        fours = torch.stack((a & 0xF | c << 4, a >> 4 | c & 0xF0, b & 0xF | d << 4, b >> 4 | d & 0xF0), dim=2)
        words = fours.unflatten(0, (-1, LANES)).transpose(1, 2)  # [P, K / 8, 16, 4]
        pairs = torch.stack((scales, zeros), dim=2).unflatten(0, (-1, LANES)).transpose(1, 2)  # [P, K / G, 16, 2]
        words = words.reshape(len(words), n_groups, -1)
        pairs = pairs.contiguous().view(torch.uint8).reshape(len(words), n_groups, -1)
        return torch.cat((words, pairs), dim=2).flatten(1)

    return _by_panels(panels, weight, scales, zeros)


def _by_panels(pack, *tensors: Tensor) -> Tensor:
    """`pack` a few panels of rows at a time; the last is filled up with zeros."""
    n_out = len(tensors[0])
    out: Tensor | None = None
    for start in range(0, n_out, LANES * PANELS_AT_ONCE):
        rows = [tensor[start : start + LANES * PANELS_AT_ONCE] for tensor in tensors]
        lacking = -len(rows[0]) % LANES
        if lacking:
            rows = [torch.cat((piece, piece.new_zeros(lacking, *piece.shape[1:]))) for piece in rows]
        panels = pack(*rows)
        if out is None:
            out = in_huge_pages(-(-n_out // LANES), panels.shape[1])
        out[start // LANES : start // LANES + len(panels)] = panels
    return out


def in_huge_pages(*shape: int) -> Tensor:
    """An empty uint8 tensor whose memory the system may map in pages of 2 MiB, which a stream of it reads faster.

    Tensors lie side by side in mappings of 256 MiB, each of which goes with the last of its tensors. Where every tensor
    had one of its own, what did not fill a page, a third of all bytes in int4, lay in small ones: 2 % slower a token.
    """
    size = math.prod(shape)
    if not hasattr(mmap, "MADV_HUGEPAGE") or size == 0:
        return torch.empty(shape, dtype=torch.uint8)
    global _mapping, _taken
    if _mapping is None or _taken + size > len(_mapping):
        _mapping = mmap.mmap(-1, max(-(-size // HUGE_PAGE), 128) * HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            _mapping.madvise(mmap.MADV_HUGEPAGE)
        _taken = 0
    tensor = torch.frombuffer(_mapping, dtype=torch.uint8, count=size, offset=_taken)
    _taken += -(-size // CACHE_LINE) * CACHE_LINE
    return tensor.view(shape)
