"""The first step of `gpu_report.py`, the card's own speed; and what all steps share: rows and predictions.

    card = Card("cuda", torch.bfloat16, out=Path("gpu_report"))
    for row in card_rows(card): print(row.what, row.measured, row.unit)

Worth knowing: the predicted time of a decode step is its bytes over the bandwidth of a plain read, plus the number of
its launches times what a tiny kernel takes inside a CUDA graph.
"""

import dataclasses
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fast.metrics import memory_to_read
from scripts.bench.measuring import replay_seconds
from scripts.bench.presets import preset
from scripts.bench.random_models import scheme_of

MODES = {mode: scheme_of(mode) for mode in ("bf16", "int8", "int4")} | {"int4 g128": scheme_of("int4", 128)}
WHOLE_MODELS = ("int4", "bf16", "int8")  # the modes in which whole models are measured
MODELS = {"7B": preset("llama-2-7b"), "8B": preset("llama-3.1-8b"), "30B-A3B": preset("qwen-3-30b-a3b")}
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
    """A check that passes below the limit; NaN fails."""
    return Row(what, unit, limit, measured, measured < limit, more)


@dataclasses.dataclass(frozen=True)
class Card:
    """The device, and what the first step measured: bytes/s (`read`), operations/s (`rate`), seconds per launch."""

    device: str
    dtype: torch.dtype
    out: Path
    compile: bool = True
    read: float | None = None
    rate: float | None = None
    launch: float | None = None

    def step_seconds(self, n_bytes: float, n_launches: float) -> float | None:
        """The predicted time of a decode step; None unless the first step has measured the card."""
        return n_bytes / self.read + n_launches * self.launch if self.read and self.launch else None


Part = Callable[[Card], Iterator[Row]]  # a part of a step; if it fails, the next part still runs


def inverse(seconds: float | None, n: float = 1) -> float | None:
    return n / seconds if seconds else None


def make_headroom(card: Card) -> None:
    """Raise peak memory by 1 GB: Inductor's tuning copies outputs to the CPU where clones would exceed the peak."""
    if card.device.startswith("cuda"):
        torch.empty(1 << 30, dtype=torch.uint8, device=card.device)


def card_rows(card: Card) -> Iterator[Row]:
    """Bandwidth, rate of products, time of a launch, clocks; predicted from the chip's properties in the driver."""
    yield from clocks("as found")
    props = torch.cuda.get_device_properties(card.device)
    width, memory_clock = (getattr(props, name, 0) for name in ("memory_bus_width", "memory_clock_rate"))
    nominal = 2 * memory_clock * 1e3 * width / 8  # bytes per second: double data rate
    source = memory_to_read(card.device)
    yield Row(READ, "GB/s", nominal / 1e9 or None, source.nbytes / replay_seconds(card.device, source.sum) / 1e9)
    a, b = (torch.randn(8192, 8192, device=card.device, dtype=card.dtype) for _ in range(2))
    per_clock = {(8, 0): 2048, (9, 0): 4096}.get((props.major, props.minor), 0)  # bf16 operations per SM
    peak = per_clock * props.multi_processor_count * clock_rate(props)
    yield Row(PRODUCT, "TFLOP/s", peak / 1e12 or None, 2 * 8192**3 / replay_seconds(card.device, torch.mm, a, b) / 1e12)
    yield from clocks("after products")
    x = torch.zeros(4096, device=card.device)

    def many() -> None:
        for _ in range(1000):
            x.add_(1)

    yield Row(LAUNCH, "us", None, replay_seconds(card.device, many) / 1000 * 1e6)


def clocks(when: str) -> Iterator[Row]:
    """The current clocks; the highest possible ones are the prediction."""
    found = nvidia_smi("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem")
    if all(number.isdigit() for number in found) and found:
        sm, most_sm, memory, most_memory = map(float, found)
        yield Row(f"SM clock, {when}", "MHz", most_sm, sm)
        yield Row(f"memory clock, {when}", "MHz", most_memory, memory)


def nvidia_smi(*names: str) -> list[str]:
    """nvidia-smi's values of these properties of the first GPU; empty if it does not give them."""
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    if shutil.which(command[0]) is None:
        return []
    line = subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]
    return line.split(", ") if line.count(", ") == len(names) - 1 else []


def clock_rate(props: Any) -> float:
    """The highest SM clock in Hz; 0 if this version of torch does not report it."""
    return getattr(props, "clock_rate", 0) * 1e3
