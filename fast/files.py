"""Files that several processes may write, and processes that die while they write: locks and temporary folders.

    with beside(target) as folder:
        write(folder / "part")
        os.replace(folder / "part", target)

Worth knowing: the kernel drops a lock when its process dies, however it dies. So a temporary folder whose lock is free
was left by a dead process, and the next one with the same target removes it.
"""

import contextlib
import glob
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def locked(path: Path, waiting: str | None = None) -> Iterator[bool]:
    """Lock the file at `path`, made if it is missing, during the `with` block; yield whether it is locked.

    waiting: if another process has the lock, print this on stderr and wait; None: yield False.
    It also yields False where there are no locks: on Windows and some network file systems.
    """
    if fcntl is None:
        yield False
        return
    is_ours = False
    while not is_ours:
        with open(path, "ab") as file:
            is_locked = _lock(file, waiting)
            with contextlib.suppress(FileNotFoundError):  # while we waited, another process moved or removed it
                is_ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
            if is_ours:
                yield is_locked


def _lock(file: IO, waiting: str | None) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is None:
            return False
        print(waiting, file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # not supported here
        return False
    return True


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A new folder `NAME*.tmp` beside `target`, deleted at the end; first, those that dead processes left are deleted.

    SIGTERM ends the process as Ctrl-C does, with exit code 143, so that the folder is deleted then too.
    """
    lock = target.name + ".lock"  # never the target's own name
    for folder in target.parent.glob(glob.escape(target.name) + "????????.tmp"):
        with contextlib.suppress(OSError), locked(folder / lock) as is_dead:
            if is_dead:
                shutil.rmtree(folder)
    place = {"prefix": target.name, "suffix": ".tmp", "dir": target.parent}
    with _unwound_by_sigterm(), tempfile.TemporaryDirectory(**place) as folder, locked(Path(folder) / lock):
        yield Path(folder)


@contextlib.contextmanager
def _unwound_by_sigterm() -> Iterator[None]:
    is_main = threading.current_thread() is threading.main_thread()  # no other thread may set a handler
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
