"""Files are written whole, where they are to be, or an error names them, also if processes die; devices; checkpoints.

    python -m pytest tests/test_files.py

Worth knowing: a test that hands a real device to code which replaces files would replace the device, so pipes stand in.
"""

import gzip
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fast import cli, files
from fast.checkpoint import load_model, open_checkpoint, save_checkpoint
from fast.cli import check_device, check_writable, find_checkpoint, load, profiled, replacing, write_json

ROOT = cli.ROOT
DRAFT = cli.DEMO.parent / "draft"


def write_trace(path: Path) -> None:
    with profiled(path):
        torch.ones(3) + 1


WRITERS = [lambda path: write_json(path, {"n": 1}), write_trace]


@pytest.mark.parametrize("write", WRITERS)
def test_a_pipe_is_written_into(tmp_path, write):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    check_writable(pipe)
    write(pipe)
    assert pipe.is_fifo()
    reader.join(10)
    assert json.loads(read[0])
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize("write", WRITERS)
def test_a_link_stays_and_its_file_is_replaced(tmp_path, write):
    (tmp_path / "folder").mkdir()
    link, file = tmp_path / "link.json", tmp_path / "folder" / "file.json"
    link.symlink_to("folder/file.json")
    for _ in range(2):  # there is no file at first
        check_writable(link)
        write(link)
        assert link.is_symlink()
        assert json.loads(file.read_text())
        file.write_text("old")
    assert list(file.parent.iterdir()) == [file]
    link.unlink()
    link.symlink_to("nowhere/file.json")
    with pytest.raises(ValueError, match=f"cannot write {link}: {tmp_path / 'nowhere'} is not a directory"):
        check_writable(link)


def python(program: str, *argv, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", f"import sys\nfrom pathlib import Path\n{program}", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, **options)


@pytest.mark.skipif(not Path("/proc/self/fd/1").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("path", ["/proc/self/fd/1", "out.txt"])
def test_our_own_output_is_written_into_in_order(tmp_path, path):
    """What a shell's `> out.txt` names is a regular file; replacing it would lose what is printed."""
    program = """
from fast.cli import check_writable, write_json
path = Path(sys.argv[1])
check_writable(path)
print("before")
write_json(path, {"n": 1})
print("after")
"""
    with open(tmp_path / "out.txt", "w") as file:
        done = python(program, tmp_path / path, stdout=file)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.txt").read_text() == 'before\n{\n "n": 1\n}\nafter\n'


FULL = """
import resource, signal
from fast.cli import exit_code, profiled, write_json
import torch

def trace(path):
    with profiled(path):
        torch.ones(3) + 1

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))
path = Path(sys.argv[1])
work = {"json": lambda: write_json(path, {"n": "x" * 2000}), "trace": lambda: trace(path)}
sys.exit(exit_code(work[sys.argv[2]]))
"""


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("x.json", "json", r"error: \[Errno 27\] File too large: '{path}'\n"),
        ("x.json", "trace", r"error: the trace {path} could not be written: is the disk full\?\n"),
        ("x.json.gz", "trace", r"error: the trace {path} could not be written: is the disk full\?\n"),
    ],
)
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, name, kind, message):
    path = tmp_path / name
    done = python(FULL, path, kind, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(message.format(path=re.escape(str(path))), done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_trace_may_be_compressed(tmp_path):
    write_trace(tmp_path / "trace.json.gz")
    with gzip.open(tmp_path / "trace.json.gz") as file:
        assert json.load(file)["traceEvents"]


# ---- Processes that die while they write, and several at once.


def save(path: Path, pause) -> None:
    checkpoint = open_checkpoint(DRAFT)
    tensors = {name: (t.shape, torch.bfloat16, t.fill) for name, t in checkpoint.tensors.items()}
    *_, (last, (shape, dtype, fill)) = tensors.items()
    tensors[last] = shape, dtype, lambda out: (pause(), fill(out))
    save_checkpoint(path, checkpoint.args, tensors)


def replace(path: Path, pause) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        pause()


@pytest.fixture(params=[save, replace])
def writer(request, tmp_path):
    """(write, process, go_on): a process is half through `write(path)`, and goes on once the event is set."""
    context = multiprocessing.get_context("fork")
    is_writing, go_on = context.Event(), context.Event()
    pause = lambda: (is_writing.set(), go_on.wait(60))  # noqa: E731
    process = context.Process(target=request.param, args=(tmp_path / "x.pth", pause))
    process.start()
    assert is_writing.wait(30)
    yield lambda path: request.param(path, lambda: None), process, go_on
    process.kill()
    process.join()


def test_sigterm_removes_what_is_half_written(writer, tmp_path):
    _, process, _ = writer
    process.terminate()
    process.join(10)
    assert process.exitcode == 143
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_by_the_next(writer, tmp_path):
    write, process, _ = writer
    other = tmp_path / "y.pthabcdefgh.tmp"
    other.mkdir()
    process.kill()
    process.join(10)
    (left,) = tmp_path.glob("x.pth*.tmp")
    for unfinished in left.glob("archive.pth"):
        with pytest.raises(ValueError, match="archive.pth: not finished: what wrote it was stopped"):
            load_model(unfinished)
    write(tmp_path / "x.pth")
    assert set(tmp_path.iterdir()) == {tmp_path / "x.pth", other}


def test_what_a_living_process_writes_is_not_removed(writer, tmp_path):
    write, process, go_on = writer
    path = tmp_path / "x.pth"
    write(path)
    first = path.stat().st_ino
    go_on.set()
    process.join(10)
    assert process.exitcode == 0
    assert path.stat().st_ino != first  # the other's
    assert list(tmp_path.iterdir()) == [path]


def test_without_locks_nothing_is_removed(writer, tmp_path, monkeypatch):
    write, process, go_on = writer
    monkeypatch.setattr(files, "fcntl", None)
    write(tmp_path / "x.pth")
    go_on.set()
    process.join(10)
    assert process.exitcode == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "x.pth"]


def test_runs_that_are_killed_leave_nothing_broken():
    """A few kills; by hand, `python tests/kills.py --kills 100`."""
    command = [sys.executable, "tests/kills.py", "--kills", "3"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall("^([a-z]+): 3 kills", done.stdout, re.MULTILINE) == ["convert", "quantise", "download"]


# ---- Devices.


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine with a CPU alone")
@pytest.mark.parametrize("device", ["mps", "meta", "cpu:7", "xpu", "gpu", "", "mkldnn", "cpu "])
def test_a_device_that_cannot_be_used(device, recwarn):
    with pytest.raises(ValueError, match=f"--device {device} cannot be used here: this machine has cpu$"):
        check_device(device)
    assert not recwarn.list


# ---- Checkpoints by name.


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A working directory, and `checkpoints/org/model` in another one that stands for the repository's root."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    shutil.copytree(DRAFT, tmp_path / "checkpoints/org/model")
    return tmp_path


def test_a_name_means_what_was_fetched(root):
    fetched = root / "checkpoints/org/model"
    assert find_checkpoint(Path("org/model")) == fetched
    Path("org/model").mkdir(parents=True)  # a directory that is here comes first
    assert find_checkpoint(Path("org/model")) == Path("org/model")


def test_a_directory_of_one_pth_is_that_file(root):
    folder = root / "checkpoints/org/model"
    checkpoint = open_checkpoint(folder)
    tensors = {name: (t.shape, torch.bfloat16, t.fill) for name, t in checkpoint.tensors.items()}
    save_checkpoint(folder / "model_x.pth", checkpoint.args, tensors)
    assert find_checkpoint(folder) == folder  # its weights are the directory's own
    (folder / "model.safetensors").unlink()
    for path in (folder, Path("org/model")):
        assert find_checkpoint(path) == folder / "model_x.pth"
    load_model(find_checkpoint(folder))
    shutil.copy(folder / "model_x.pth", folder / "model_y.pth")
    assert find_checkpoint(folder) == folder  # which of the two? the error names both
    shutil.copy(folder / "model_x.pth", folder / "model.pth")
    assert find_checkpoint(folder) == folder / "model.pth"


def test_a_name_that_was_not_fetched(root):
    with pytest.raises(FileNotFoundError) as raised:
        find_checkpoint(Path("org/other"))
    remedy = "if it is a model's name on Hugging Face, add --download or run ./scripts/prepare.sh org/other"
    assert str(raised.value) == f"org/other: no such file or directory; {remedy}"
    for path in ("model", "a/b/c", "org/model.pth", "/org/model", "../model"):
        assert find_checkpoint(Path(path), download=True) == Path(path)  # no name of a model: loading it says so


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_tokenizer_that_is_a_git_lfs_pointer(root, name):
    path = root / "checkpoints/org/model" / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`"):
        load(path.parent, "cpu", torch.float32)
