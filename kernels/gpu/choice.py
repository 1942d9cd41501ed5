"""Autotuning: which way to multiply or to attend is fastest on this GPU, timed on it once and remembered.

    measure(model, *args)                               # before a step is recorded
    tiles = fastest(key, ways, again=call)              # in an operator

An operator asks `fastest` how to compute what `key` describes, and passes the `ways` that it has, by name. `measure`
calls a model, records what its operators ask, and times the ways for every key not known yet: on the model's own
weights, all layers in turn, in a CUDA graph, after clearing the L2 cache. The winners' names are kept under
`~/.cache/fast-llm`, in a file for each combination of GPU, torch, triton and kernel source. Rank 0 measures for all.

Worth knowing: for a key that `measure` has not seen in this process, an operator uses its first way, a good default.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

Way = TypeVar("Way")
Asked = dict[str, tuple[list[str], list[Callable[[], Any]]]]  # by key: names of the ways, the calls that asked

INDUCTOR = "Inductor"  # the name of the way that torch.compile generates
CLEARING = 1 << 28  # bytes to write to clear the L2 cache, more than any GPU's holds

_fastest: dict[str, str] = {}  # the fastest way's name, by key, for the keys asked in this process
_asked: ContextVar[Asked | None] = ContextVar("asked", default=None)
_tried: ContextVar[str | None] = ContextVar("tried", default=None)


def fastest(key: str, ways: dict[str, Way], again: Callable[[], Any]) -> Way:
    """The way to compute what `key` describes: the one being tried, else the fastest measured, else the first.

    again: calls the operator once more with the same arguments.
    """
    asked = _asked.get()
    if asked is not None:
        asked.setdefault(key, (list(ways), []))[1].append(again)
    name = _tried.get() or _fastest.get(key)
    return ways[name if name in ways else next(iter(ways))]


@contextlib.contextmanager
def trying(name: str) -> Iterator[None]:
    """Inside, operators take the way of this name if they have it."""
    token = _tried.set(name)
    try:
        yield
    finally:
        _tried.reset(token)


def asked_by(function: Callable[..., Any], *args: Any) -> Asked:
    """Call `function` and return what its operators ask."""
    token = _asked.set({})
    try:
        function(*args)
        return _asked.get()
    finally:
        _asked.reset(token)


def measure(model: Callable[..., Any], *args: Any, seconds: Callable[..., float] | None = None) -> None:
    """Call `model`, time the ways for every key that it asks and that is not known yet, and call it once more.

    The second call lets the chosen ways compile now, before a step is recorded.
    seconds: the clock, called with a function and its arguments; by default `cold_seconds`. Ways that fail are skipped.
    """
    new = {key: found for key, found in asked_by(model, *args).items() if key not in _fastest}
    has_ranks = dist.is_available() and dist.is_initialized()
    if new and not (has_ranks and dist.get_rank()):
        kept = _read()
        _fastest.update({key: kept[key] for key, (names, _) in new.items() if kept.get(key) in names})
        unknown = {key: found for key, found in new.items() if key not in _fastest}
        if unknown:
            _fastest.update(_winners(unknown, seconds or cold_seconds))
            with contextlib.suppress(OSError):  # then the next process measures again
                _write(_read() | _fastest)
    if new and has_ranks:
        tables = [_fastest]
        dist.broadcast_object_list(tables, src=0)
        _fastest.update(tables[0])
    if new:
        model(*args)


def _winners(asked: Asked, seconds: Callable[..., float]) -> dict[str, str]:
    """The name of the fastest way for each key; a key is left out if all its ways fail."""
    found = {}
    total = sum(len(names) for names, _ in asked.values())
    with tqdm(total=total, desc="timing kernels on this GPU, once", unit="kernel") as bar:
        for key, (names, calls) in asked.items():
            _compile_together(names, calls[0])
            timed = {}
            for name in names:
                with trying(name), contextlib.suppress(Exception):  # of any kind: it does not compile or run here
                    timed[name] = seconds(_call_all, calls)
                bar.update()
            if timed:
                found[key] = min(timed, key=timed.get)
    return found


def _compile_together(names: list[str], call: Callable[[], Any]) -> None:
    """Compile the kernels of these ways on all the CPU's cores, by calling each once."""
    if not torch.cuda.is_available():  # Triton's interpreter compiles nothing
        return

    def run(name: str) -> None:
        with trying(name), contextlib.suppress(Exception):  # it fails again in `_winners`
            call()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, (name for name in names if name != INDUCTOR)))


def _call_all(calls: list[Callable[[], Any]]) -> None:
    for call in calls:
        call()


def cold_seconds(function: Callable[..., Any], *args: Any) -> float:
    """`replay_seconds` of clearing the L2 cache and then calling `function`; both are counted."""
    other = torch.empty(CLEARING, dtype=torch.uint8, device="cuda")
    return replay_seconds(lambda: (other.zero_(), function(*args)))


def replay_seconds(function: Callable[..., Any], *args: Any) -> float:
    """Seconds that the kernels of a call take, by events around replays of its CUDA graph.

    The median of 5 timings, each of at least 5 ms of replays.
    """
    for _ in range(3):  # compile, and allocate memory
        function(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(*args)
    n = 1 + int(5e-3 / seconds_by_events(3, graph.replay))
    seconds_by_events(10 * n, graph.replay)  # raises the GPU's clocks, which fall while the host compiles
    return median(seconds_by_events(n, graph.replay) for _ in range(5))


def seconds_by_events(n: int, function: Callable[..., Any], *args: Any) -> float:
    """Seconds per call, of `n` calls in a row, by the GPU's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(n):
        function(*args)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / n


def _file() -> Path:
    """The file of this GPU's winners. Other versions and changed kernels have other files."""
    import triton

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    source = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    versions = f"{gpu}, torch {torch.__version__}, triton {triton.__version__}"
    key = hashlib.sha256(source + versions.encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "fast-llm" / f"fastest-{key}.json"


def _read() -> dict[str, str]:
    try:
        table = json.loads(_file().read_text())
        return {key: name for key, name in table.items() if isinstance(name, str)}
    except (OSError, ValueError, AttributeError):  # no file, or not a table
        return {}


def _write(table: dict[str, str]) -> None:
    """Write the table atomically: another process reads either all of it or the previous one."""
    path = _file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(json.dumps(table, indent=1))
    os.replace(file.name, path)
