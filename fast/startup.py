"""A script imports this first: Ctrl-C while it imports torch, or while Python exits, ends it in silence, with 130.

Python would print a traceback of the import that it interrupts. In between, `cli.exit_code` handles Ctrl-C.
"""

import signal
import sys
from pathlib import Path


def is_script(path: str | None) -> bool:
    """Whether the file that Python was started with is one of this project's, and not, for example, pytest."""
    root = Path(__file__).resolve().parent.parent
    folders = [root, *(root / name for name in ("fast", "demo", "scripts", "scripts/bench"))]
    return path is not None and Path(path).resolve().parent in folders


_is_ignored = signal.getsignal(signal.SIGINT) is not signal.default_int_handler  # as under nohup
if is_script(getattr(sys.modules["__main__"], "__file__", None)) and not _is_ignored:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
