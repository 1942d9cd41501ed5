"""Compiles the CPU's operators, `torch.ops.fast.*`.

    if build.load() is None:
        y = torch.ops.fast.bf16_linear(x, packing.pack_bf16(weight), n_out)

The library is built once; later processes find it. `operators.cpp` says what the operators take.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden", "-w")

in_a_team: Callable[..., None] | None = None  # (step), a C function in `threads.h`; None: no kernels are loaded


@functools.cache
def load() -> str | None:
    """Load the operators `torch.ops.fast.*`, building them if needed. Returns None, or in one line why it failed.

    The library lies in TORCH_EXTENSIONS_DIR, by default `~/.cache/torch_extensions`, under a name that depends on the
    source, the compiler's flags, the processor's architecture and the version of torch. What a compiler said against
    the source is kept there too, and that compiler is not tried again.
    """
    global in_a_team
    content = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.[ch]*")))
    key = hashlib.sha256(content + f"{torch.__version__} {platform.machine()} {FLAGS}".encode()).hexdigest()[:16]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    library = folder / f"fast-{key}.so"
    try:
        if not library.exists():
            _build(library)
        torch.ops.load_library(library)
        in_a_team = ctypes.PyDLL(str(library)).in_a_team
    except OSError as error:
        return f"the CPU's kernels cannot be built, so plain PyTorch computes, more slowly: {error}".partition("\n")[0]
    _register_fakes()
    return None


def compiler() -> str:
    """The C++ compiler's command, the same as Inductor's."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def compiler_missing() -> str | None:
    """The reason, in one line, why C++ cannot be compiled, or None."""
    if not shutil.which(compiler()):
        return f"no C++ compiler ({compiler()}) is installed"
    works = subprocess.run([compiler(), "-std=c++20", "-fsyntax-only", "-x", "c++", os.devnull], capture_output=True)
    return None if works.returncode == 0 else f"the C++ compiler ({compiler()}) does not take C++20"


def _build(library: Path) -> None:
    """Compile the sources in parallel and put the finished library in place, atomically, as other processes may look
    for it. Raises OSError, with the compiler's words if it cannot compile them.
    """
    if reason := compiler_missing():
        raise OSError(reason)
    command = Path(shutil.which(compiler())).resolve()
    stamp = hashlib.sha256(f"{command} {command.stat().st_mtime}".encode()).hexdigest()[:8]
    failure = library.with_suffix(f".{stamp}.txt")
    if failure.exists():
        raise OSError(f"{failure.read_text()} (delete {failure} to try again)")
    print("building the CPU's kernels, once ...", file=sys.stderr)
    root = Path(torch.__file__).parent
    library.parent.mkdir(parents=True, exist_ok=True)
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    link = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        temporary = Path(folder)

        def run(*arguments: str | Path) -> None:
            done = subprocess.run([compiler(), *FLAGS, *arguments], capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"{compiler()} ended with {done.returncode}"]
                reason = next((line for line in lines if "error" in line), lines[0])
                if done.returncode > 0 and not re.search("Killed|No space left", done.stderr):
                    failure.write_text(reason)
                raise OSError(reason)

        def compile(source: Path) -> Path:
            run(abi, *include, "-c", source, "-o", target := temporary / f"{source.stem}.o")
            return target

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compile, Path(__file__).parent.glob("*.cpp")))
        run("-shared", *objects, "-o", whole := temporary / library.name, *link)
        os.replace(whole, library)


def _register_fakes() -> None:
    """Tell torch.compile the shapes that the operators return."""

    def linear(
        x, packed, n_out, bias=None, norm=None, eps=0.0, residual=None, activation="", experts=None, weights=None
    ):
        n_rows = x.shape[0] if experts is None else experts.numel() if weights is None else experts.shape[0]
        return x.new_empty(n_rows, n_out // 2 if activation else n_out)

    for name in ("bf16_linear", "int8_linear"):
        torch.library.register_fake(f"fast::{name}", linear)
    torch.library.register_fake("fast::grouped_linear", lambda x, w, n, size, form, *fused: linear(x, w, n, *fused))

    def route(x, packed, n_experts, k, normalizes, norm, eps):
        return x.new_empty(x.shape[0], k, dtype=torch.long), x.new_empty(x.shape[0], k, dtype=torch.float32)

    torch.library.register_fake("fast::route", route)
    torch.library.register_fake("fast::decode_attention", lambda q, *others: q.new_empty(q.shape))
