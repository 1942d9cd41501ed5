"""The first step of `gpu_report.py`: what the card itself can do. Also the report's rows and its predictions.

    card = Card("cuda", torch.bfloat16, out=Path("gpu_report"))
    for row in card_rows(card): print(row.what, row.measured, row.unit)

Worth knowing: a decode step is predicted to take the time of its bytes at the bandwidth of a plain read, plus the time
of a tiny kernel inside a CUDA graph for each of its launches.
"""

import dataclasses
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fast.families import preset
from fast.metrics import memory_to_read
from scripts.bench.measuring import replay_seconds
from scripts.bench.random_models import scheme_of

MODES = {mode: scheme_of(mode) for mode in ("bf16", "int8", "int4")} | {"int4 g128": scheme_of("int4", 128)}
WHOLE_MODELS = ("int4", "bf16", "int8")  # the modes in which whole models are measured
MODELS = {"7B": preset("llama-2-7b"), "8B": preset("llama-3.1-8b")}
CONTEXTS = (128, 8192)

READ, PRODUCT, LAUNCH = (
    "plain read",
    "bf16 product, 8192 x 8192 x 8192",
    "tiny kernel in a CUDA graph",
)


@dataclasses.dataclass
class Row:
    """A row of the table. is_right: the verdict of a check; None: not a check, so the table shows the ratio instead."""

    what: str
    unit: str
    predicted: float | None
    measured: float | None
    is_right: bool | None = None
    more: dict[str, Any] = dataclasses.field(default_factory=dict)  # only in the JSON


def within(what: str, unit: str, limit: float, measured: float, **more: Any) -> Row:
    """A check that is right below the limit; NaN is wrong."""
    return Row(what, unit, limit, measured, measured < limit, more)


@dataclasses.dataclass(frozen=True)
class Card:
    """The device, and what the first step measured: bytes per second, operations per second, seconds of a launch."""

    device: str
    dtype: torch.dtype
    out: Path
    compile: bool = True
    read: float | None = None
    rate: float | None = None
    launch: float | None = None

    def step_seconds(self, n_bytes: float, n_launches: float) -> float | None:
        """The predicted time of a decode step; None before the first step."""
        return n_bytes / self.read + n_launches * self.launch if self.read and self.launch else None


Part = Callable[[Card], Iterator[Row]]  # a part of a step; if it fails, the next part still runs


def inverse(seconds: float | None, n: float = 1) -> float | None:
    return n / seconds if seconds else None


def make_headroom(card: Card) -> None:
    """Reserve 1 GB in the allocator: without it Inductor, tuning a kernel that writes, copies its output to the CPU."""
    if card.device.startswith("cuda"):
        torch.empty(1 << 30, dtype=torch.uint8, device=card.device)


def card_rows(card: Card) -> Iterator[Row]:
    """Bandwidth, product rate, launches and clocks; predicted from what the driver reports of the chip."""
    yield from clocks("as found")
    props = torch.cuda.get_device_properties(card.device)
    width, memory_clock = (getattr(props, name, 0) for name in ("memory_bus_width", "memory_clock_rate"))
    nominal = 2 * memory_clock * 1e3 * width / 8  # bytes per second: double data rate
    source = memory_to_read(card.device)
    yield Row(READ, "GB/s", nominal / 1e9 or None, source.nbytes / replay_seconds(card.device, source.sum) / 1e9)
    a, b = (torch.randn(8192, 8192, device=card.device, dtype=card.dtype) for _ in range(2))
    per_clock = {(8, 0): 2048, (9, 0): 4096}.get((props.major, props.minor), 0)  # bf16 operations of an SM
    peak = per_clock * props.multi_processor_count * clock_rate(props)
    yield Row(PRODUCT, "TFLOP/s", peak / 1e12 or None, 2 * 8192**3 / replay_seconds(card.device, torch.mm, a, b) / 1e12)
    yield from clocks("after products")
    x = torch.zeros(4096, device=card.device)

    def many() -> None:
        for _ in range(1000):
            x.add_(1)

    yield Row(LAUNCH, "us", None, replay_seconds(card.device, many) / 1000 * 1e6)


def clocks(when: str) -> Iterator[Row]:
    """The clocks at this moment beside the highest."""
    found = nvidia_smi("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem")
    if all(number.isdigit() for number in found) and found:
        sm, most_sm, memory, most_memory = map(float, found)
        yield Row(f"SM clock, {when}", "MHz", most_sm, sm)
        yield Row(f"memory clock, {when}", "MHz", most_memory, memory)


def nvidia_smi(*names: str) -> list[str]:
    """What nvidia-smi reports of the first GPU for these names; empty without nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    if shutil.which(command[0]) is None:
        return []
    line = subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]
    return line.split(", ") if line.count(", ") == len(names) - 1 else []


def clock_rate(props: Any) -> float:
    """The highest clock of the multiprocessors in Hz; 0 if this torch does not report it."""
    return getattr(props, "clock_rate", 0) * 1e3
