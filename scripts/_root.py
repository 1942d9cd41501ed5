"""Lets the scripts in this folder import the modules of the repository's root: `import _root` first.

`python scripts/x.py` makes Python look beside the script, not in the working directory. This is the one place that
changes the search path, and only entry points import it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fast.startup  # noqa: E402, F401 - before torch, see there
