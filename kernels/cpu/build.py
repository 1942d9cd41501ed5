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
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden", "-w")
NOT_THE_SOURCE = "signal|Killed|No space left|limit exceeded|[Oo]ut of memory|memory exhausted"  # a compiler's words

in_a_team: Callable[..., None] | None = None  # (step), a C function in `threads.h`; None: no kernels are loaded


@functools.cache
def load() -> str | None:
    """Load the operators `torch.ops.fast.*`, building them if needed. Returns None, or in one line why it failed.

    The library lies in TORCH_EXTENSIONS_DIR, by default `~/.cache/torch_extensions`, under a name that depends on the
    source, the compiler's flags, the processor's architecture, the version of torch and its own content: a damaged one
    is built anew. What a compiler said against the source is kept there too, and that compiler is not tried again.
    """
    global in_a_team
    try:
        library = _find() or _build()
        torch.ops.load_library(library)
        in_a_team = ctypes.PyDLL(str(library)).in_a_team
    except OSError as error:
        return f"the CPU's kernels cannot be built, so plain PyTorch computes, more slowly: {error}".partition("\n")[0]
    _register_fakes()
    return None


def _folder() -> Path:
    """Where the library lies. Raises OSError where others may have written."""
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "torch_extensions"
    except RuntimeError:  # neither HOME nor an entry for this user in /etc/passwd, as in some containers
        folder = Path(tempfile.gettempdir(), f"torch_extensions-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise PermissionError(f"others can write to {folder}") from None
        return folder


def _name() -> str:
    """The start of the library's name: a hash of all that it is made from."""
    content = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.[ch]*")))
    content += f"{torch.__version__} {platform.machine()} {FLAGS}".encode()
    return f"fast-{hashlib.sha256(content).hexdigest()[:16]}"


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


def _find() -> Path | None:
    """The library, if it has been built and is whole."""
    found = _folder().glob(f"{_name()}-*.so")
    return next((library for library in found if library.stem.endswith(_digest(library))), None)


def compiler() -> str:
    """The C++ compiler's command, the same as Inductor's."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def compiler_missing() -> str | None:
    """The reason, in one line, why C++ cannot be compiled, or None."""
    if not shutil.which(compiler()):
        return f"no C++ compiler ({compiler()}) is installed"
    works = subprocess.run([compiler(), "-std=c++20", "-fsyntax-only", "-x", "c++", os.devnull], capture_output=True)
    return None if works.returncode == 0 else f"the C++ compiler ({compiler()}) does not take C++20"


def main_line(words: str) -> str:
    """The line of a compiler's `words` that says why it failed."""
    lines = words.strip().splitlines() or [""]
    return next((line for line in lines if re.search(f"error|{NOT_THE_SOURCE}", line)), lines[0])


def _build() -> Path:
    """Compile the sources in parallel and put the finished library in place, atomically, as other processes may look
    for it. Raises OSError, with the compiler's words if it cannot compile them.
    """
    if reason := compiler_missing():
        raise OSError(reason)
    command = Path(shutil.which(compiler())).resolve()
    stamp = hashlib.sha256(f"{command} {command.stat().st_mtime}".encode()).hexdigest()[:8]
    place, name = _folder(), _name()
    failure = place / f"{name}.{stamp}.txt"
    if failure.exists():
        raise OSError(f"{failure.read_text()} (delete {failure} to try again)")
    root = Path(torch.__file__).parent
    place.mkdir(parents=True, exist_ok=True)
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    link = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with tempfile.TemporaryDirectory(dir=place) as folder:
        temporary = Path(folder)
        print("building the CPU's kernels, once ...", file=sys.stderr)

        def run(*arguments: str | Path) -> None:
            command = [compiler(), *FLAGS, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if done.returncode:
                reason = main_line(done.stderr) or f"{compiler()} ended with {done.returncode}"
                if done.returncode > 0 and not re.search(NOT_THE_SOURCE, done.stderr):
                    (temporary / "failure").write_text(reason)
                    os.replace(temporary / "failure", failure)
                raise OSError(reason)

        def compile(source: Path) -> Path:
            run(abi, *include, "-c", source, "-o", target := temporary / f"{source.stem}.o")
            return target

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compile, Path(__file__).parent.glob("*.cpp")))
        run("-shared", *objects, "-o", whole := temporary / "whole.so", *link)
        library = place / f"{name}-{_digest(whole)}.so"
        os.replace(whole, library)
    return library


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
