"""What is built once and kept in a cache: the CPU's kernels and Inductor's precompiled header, damaged or out of place.

python -m pytest tests/test_build.py
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch._inductor.exc import CppCompileError

from fast.compiling import compile_step, remove_cut_headers
from kernels.cpu import build

ROOT = Path(__file__).parent.parent
needs_kernels = pytest.mark.skipif(build.load() is not None, reason=str(build.load()))


def load(environment: dict[str, str], before: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", f"{before}\nfrom kernels.cpu import build\nprint(build.load())"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)


@pytest.fixture
def compiler(tmp_path) -> str:
    """A compiler that is done at once: it copies the library that has been built before."""
    script = tmp_path / "c++"
    target = 'while [ "$1" != -o ]; do shift; done'
    links = f'case "$*" in *-shared*) {target}; cp {build._find()} "$2";; *-c*) {target}; : > "$2";; esac'
    script.write_text(f"#!/bin/sh\n{links}\n")
    script.chmod(0o755)
    return str(script)


@needs_kernels
def test_a_damaged_library_is_built_anew(tmp_path, compiler, monkeypatch):
    whole = build._find()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    older, kept = tmp_path / f"{build._name()}.so", tmp_path / whole.name
    shutil.copy(whole, older)  # whose name had no hash
    assert build._find() is None
    kept.write_bytes(bytes(whole.stat().st_size))
    assert build._find() is None
    shutil.copy(whole, kept)
    os.truncate(kept, whole.stat().st_size // 2)
    assert build._find() is None
    done = load({**os.environ, "CXX": compiler})
    assert done.stdout.strip() == "None"
    assert "building" in done.stderr
    assert build._find() == kept
    assert kept.read_bytes() == whole.read_bytes()


@needs_kernels
def test_a_user_without_a_home_has_a_folder_of_their_own(tmp_path, compiler):
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "TORCH_EXTENSIONS_DIR")}
    environment |= {"TMPDIR": str(tmp_path), "CXX": compiler}
    nobody = "import pwd\ndef unknown(uid): raise KeyError(uid)\npwd.getpwuid = unknown"
    folder = tmp_path / f"torch_extensions-{os.getuid()}"
    assert load(environment, nobody).stdout.strip() == "None"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert load(environment, nobody).stdout.strip().endswith(f"others can write to {folder}")


def test_a_header_whose_compiler_was_killed_is_removed(tmp_path):
    """Inductor leaves the folder `CxxBuild` when it is killed; it holds the lock while a compiler runs."""
    (tmp_path / "locks").mkdir()
    for name in ("cut", "being-made", "whole"):
        (tmp_path / f"{name}.h.gch").write_text("gpch")
        if name != "whole":
            (tmp_path / f"{name}.h_CxxBuild").mkdir()
    with FileLock(tmp_path / "locks" / "being-made.lock"):
        remove_cut_headers(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.gch")) == ["being-made.h.gch", "whole.h.gch"]
    assert [path.name for path in tmp_path.glob("*_CxxBuild")] == ["being-made.h_CxxBuild"]
    remove_cut_headers(tmp_path / "none")


@pytest.mark.parametrize(
    ("inside", "raised", "message"),
    [
        (OSError(28, "No space left on device"), OSError, "work here: .Errno 28. No space left on device; mend that"),
        (
            CppCompileError(["g++"], "in x.cpp:\nx.cpp:1: fatal error: none\nend"),
            OSError,
            "here: x.cpp:1: fatal error: ",
        ),
        (AssertionError("of Inductor's own"), torch._dynamo.exc.BackendCompilerFailed, "of Inductor's own"),
    ],
)
def test_a_machine_that_cannot_compile_is_one_line_and_a_bug_is_not(monkeypatch, inside, raised, message):
    def compile_fx(*args, **options):
        raise inside

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    with pytest.raises(raised, match=message):
        compile_step(lambda x: x + 1, (None,))(torch.ones(2))
