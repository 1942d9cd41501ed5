"""Timing a prefill, a decode step or one product, compared with the device's own speed at that moment.

    yardstick = Yardstick(args, device, dtype)
    point = Decode("bf16", steps, yardstick, batch_size=1, context_length=128, new_tokens=32)
    point.measure()
    print(point.figures())

Worth knowing: the bandwidth of a rented machine can halve within seconds. So every measurement is compared with a plain
read or product taken immediately before and after it.
"""

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.decoding import Steps, stream
from fast.layers import backend_for, replace_linears
from fast.metrics import bytes_per_step, memory_to_read, share_of_experts
from kernels.gpu import choice
from model import ModelArgs, Transformer
from scripts.bench.random_models import fill_weights

MAX_COPIES = 128  # in a `Rotation`: each copy is a call in one compiled graph


def replay_seconds(device: str, function: Callable[..., Any], *args: Any) -> float:
    """GPU: seconds of a call's kernels, replayed as a CUDA graph, without the host. CPU: the median of 5 calls."""
    if device.startswith("cuda"):
        return choice.replay_seconds(function, *args)
    function(*args)  # the first call may compile
    return median(_elapsed(function, *args) for _ in range(5))


def _elapsed(function: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def timed(items: Iterable[Any]) -> tuple[list[Any], float]:
    """All items after the first, and the seconds from the first to the last."""
    iterator = iter(items)
    next(iterator)
    start = time.perf_counter()
    rest = list(iterator)
    return rest, time.perf_counter() - start


class Yardstick:
    """The device's own speed at this moment: memory bandwidth, and the rate of matrix products."""

    def __init__(self, args: ModelArgs, device: str, dtype: torch.dtype):
        self.is_cuda, self.device, self.dtype = device.startswith("cuda"), device, dtype
        self.source = memory_to_read(device)
        sizes = (args.dim, 2 * args.hidden_dim), (2048, 2048)
        self.weights = [torch.randn(n_out, n_in, device=device, dtype=dtype) for n_in, n_out in sizes]
        self.bandwidth()  # the first read is slow

    def seconds(self, function: Callable[..., Any], *args: Any) -> float:
        """Seconds of a call. GPU: the mean over about 5 ms of calls, by CUDA events, because the host runs ahead."""
        if not self.is_cuda:
            return _elapsed(function, *args)
        n = 1 + int(5e-3 / choice.seconds_by_events(1, function, *args))
        return choice.seconds_by_events(n, function, *args)

    def bandwidth(self) -> float:
        """Bytes per second of a plain read; on a GPU the best of 5."""
        return self.source.nbytes / min(self.seconds(self.source.sum) for _ in range(5 if self.is_cuda else 1))

    def matmul_rates(self, n_tokens: int) -> dict[str, float]:
        """Operations per second of `F.linear`, the best of three, by shape (tokens x in x out)."""
        rates = {}
        for weight in self.weights:
            x = torch.randn(n_tokens, weight.shape[1], device=self.device, dtype=self.dtype)
            best = min(self.seconds(F.linear, x, weight) for _ in range(3))
            rates[f"{n_tokens}x{weight.shape[1]}x{weight.shape[0]}"] = 2 * n_tokens * weight.numel() / best
        return rates


def operations(args: ModelArgs, batch_size: int, tokens: int, pairs: float) -> float:
    """Operations of a pass over `tokens` tokens of each row: 2 per token and weight of the layers (of experts, those
    that compute a token), 2 per weight of the output projection (computed for a row's last token only), and those of
    attention's two products. pairs: a row's pairs of a query and a key it attends to. Norms, RoPE and softmax are not
    counted.
    """
    with torch.device("meta"):
        weights = [(name, p) for name, p in Transformer(args).layers.named_parameters() if p.dim() == 2]
    used = share_of_experts(args)
    layers = 2 * tokens * sum(p.numel() * (used if ".experts." in name else 1) for name, p in weights)
    attention = 4 * args.n_layers * args.n_heads * args.head_dim * pairs
    return batch_size * (layers + attention + 2 * args.vocab_size * args.dim)


def spread(values: list[float], outside: int) -> list[float]:
    """The median, and the lowest and highest value after dropping 1 / `outside` of the values at either end."""
    ordered = sorted(values)
    cut = len(ordered) // outside
    return [median(ordered), ordered[cut], ordered[-1 - cut]]


@dataclasses.dataclass
class Prefill:
    """Prefills, timed until the first token's id is on the host. `share`: of the rate of the fastest `F.linear`."""

    mode: str
    steps: Steps
    yardstick: Yardstick
    batch_size: int
    prompt_length: int
    seconds: list[float] = dataclasses.field(default_factory=list)
    rates: list[dict[str, float]] = dataclasses.field(default_factory=list)  # before and after each prefill

    def measure(self) -> None:
        n_tokens = self.batch_size * self.prompt_length
        prompts = torch.randint(self.steps.model.args.vocab_size, (self.batch_size, self.prompt_length)).tolist()
        self.rates.append(self.yardstick.matmul_rates(n_tokens))
        self.seconds.append(_elapsed(next, stream(self.steps, prompts, 1)))
        self.rates.append(self.yardstick.matmul_rates(n_tokens))

    def figures(self) -> dict[str, Any]:
        length, model, seconds = self.prompt_length, self.steps.model, median(self.seconds)
        best = [max(rate.values()) for rate in self.rates]
        n_operations = operations(model.args, self.batch_size, length, length * (length + 1) / 2)
        around = zip(best[::2], best[1::2], strict=True)
        shares = [n_operations / s / mean(rates) for s, rates in zip(self.seconds, around, strict=True)]
        return {
            "mode": self.mode,
            "batch_size": self.batch_size,
            "prompt_length": length,
            "first_token_s": seconds,
            "tokens_per_s": self.batch_size * length / seconds,
            "operations": n_operations,
            "bytes": bytes_per_step(model, self.batch_size, length, length),
            "gflops_per_s": n_operations / seconds / 1e9,
            "matmul_gflops_per_s": median(best) / 1e9,
            "matmul_shape": max(self.rates[0], key=lambda shape: median(rate[shape] for rate in self.rates)),
            "share": spread(shares, outside=len(shares) + 1),
        }


@dataclasses.dataclass
class Decode:
    """Decode steps, timed in stretches of about 50 ms between two plain reads; on a GPU a run is one stretch.

    The cache holds noise before the first token: its contents do not change the time.
    """

    mode: str
    steps: Steps
    yardstick: Yardstick
    batch_size: int
    context_length: int
    new_tokens: int
    stretches: list[tuple[float, float, float]] = dataclasses.field(default_factory=list)  # see `add`

    def measure(self) -> None:
        """One run of `stream`, paused between two tokens to time a plain read."""
        is_cuda, before = self.yardstick.is_cuda, self.yardstick.bandwidth()
        tokens = stream(self.steps, [[1]] * self.batch_size, self.new_tokens, cached=self.context_length - 1)
        next(tokens)
        if not is_cuda:  # a GPU is already computing the next token
            before = self.yardstick.bandwidth()
        n, valid, start = 0, self.context_length, time.perf_counter()
        for i, _ in enumerate(tokens, start=2):
            n, valid, elapsed = n + 1, valid + 1, time.perf_counter() - start
            if i == self.new_tokens or (elapsed > 0.05 and not is_cuda):
                after = self.yardstick.bandwidth()
                self.add(elapsed / n, valid - (n - 1) / 2, (before + after) / 2)
                n, before, start = 0, after, time.perf_counter()

    def add(self, seconds: float, positions: float, bandwidth: float) -> None:
        """Add a stretch: seconds per step, mean positions attended to, bytes per second of plain reads around it."""
        self.stretches.append((seconds, bytes_per_step(self.steps.model, self.batch_size, positions), bandwidth))

    def figures(self) -> dict[str, Any]:
        """Medians over the stretches; `share` has the range of the middle 80 % too.

        A step's time is split into reading its bytes at the bandwidth of that moment and the rest. Both are divided by
        the number of layers, although they include the output projection.
        """
        args = self.steps.model.args
        seconds, nbytes, bandwidths = (median(column) for column in zip(*self.stretches, strict=True))
        positions = self.context_length + self.new_tokens / 2  # on average over a run
        n_operations = operations(args, self.batch_size, 1, positions)
        return {
            "mode": self.mode,
            "batch_size": self.batch_size,
            "context_length": self.context_length,
            "max_seq_length": self.steps.model.max_seq_length,
            "tokens_per_s": self.batch_size / seconds,
            "operations": n_operations,
            "bytes": nbytes,
            "gflops_per_s": n_operations / seconds / 1e9,
            "gb_per_s": nbytes / seconds / 1e9,
            "bandwidth_gb_per_s": bandwidths / 1e9,
            "share": spread([n / s / bandwidth for s, n, bandwidth in self.stretches], outside=10),
            "layer_bytes_us": median(n / bandwidth for _, n, bandwidth in self.stretches) / args.n_layers * 1e6,
            "layer_rest_us": median(s - n / bandwidth for s, n, bandwidth in self.stretches) / args.n_layers * 1e6,
        }


class Copy(nn.Module):
    """One of the copies in a `Rotation`."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    @torch.compiler.nested_compile_region  # as in the model: Inductor must not fuse two products
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Rotation(nn.Module):
    """Copies of one Linear, more than the caches hold, used in turn: as in a decode step, none is found in a cache."""

    def __init__(
        self, linear: nn.Module, device: str, dtype: torch.dtype, scheme: dict[str, Any] | None, is_fast: bool = True
    ):
        """linear: on `meta`, as from `meta_model`. is_fast: use the backend's kernel, if it has one."""
        super().__init__()
        nbytes = sum(t.nbytes for t in linear.state_dict().values())
        n = min(MAX_COPIES, max(2, -(-rotation_bytes(device) // nbytes)))
        self.copies = nn.ModuleList(Copy(copy.deepcopy(linear)) for _ in range(n)).to_empty(device=device)
        fill_weights(self.copies, dtype, scheme)
        if is_fast:
            replace_linears(self.copies, backend_for(device, dtype))
        self.nbytes = sum(t.nbytes for t in self.copies.state_dict().values())

    def forward(self, x: Tensor) -> list[Tensor]:
        return [one(x) for one in self.copies]  # return all, or the compiler removes the unused products


def rotation_bytes(device: str) -> int:
    """The least number of bytes of a `Rotation`: four times the largest cache, and at least 256 MiB."""
    if device.startswith("cuda"):
        return max(1 << 28, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max(1 << 28, *(4 * int(size.strip()[:-1]) * units[size.strip()[-1]] for size in sizes), 0)


@dataclasses.dataclass
class Product:
    """One of a layer's products, or the output projection, for `rows` rows of activations."""

    mode: str
    shape: str
    rotation: Rotation
    run: Callable[[Tensor], list[Tensor]]  # the rotation, compiled or not
    yardstick: Yardstick
    rows: int
    passes: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # seconds, bytes/s of reads

    def __post_init__(self):
        n_in, device, dtype = self.rotation.copies[0].linear.in_features, self.yardstick.device, self.yardstick.dtype
        self.x = torch.randn(self.rows, 1, n_in, device=device, dtype=dtype)
        for _ in range(3):  # compiles, and on a GPU records a CUDA graph
            self.yardstick.seconds(self.run, self.x)

    def measure(self) -> None:
        """Five passes over all copies, with a plain read before and after each."""
        reads, seconds = [self.yardstick.bandwidth()], []
        for _ in range(5):
            seconds.append(self.yardstick.seconds(self.run, self.x))
            reads.append(self.yardstick.bandwidth())
        self.passes += zip(seconds, map(mean, pairwise(reads)), strict=True)

    def figures(self) -> dict[str, Any]:
        nbytes, n = self.rotation.nbytes, len(self.rotation.copies)
        linear, seconds = self.rotation.copies[0].linear, median(s for s, _ in self.passes)
        return {
            "mode": self.mode,
            "shape": f"{self.shape} {linear.out_features}x{linear.in_features}",
            "rows": self.rows,
            "copies": n,
            "rotated_mb": nbytes / 1e6,
            "bytes": nbytes / n,
            "operations": 2 * self.rows * linear.out_features * linear.in_features,
            "us": seconds / n * 1e6,
            "gb_per_s": nbytes / seconds / 1e9,
            "bandwidth_gb_per_s": median(bandwidth for _, bandwidth in self.passes) / 1e9,
            "share": spread([nbytes / s / bandwidth for s, bandwidth in self.passes], outside=10),
        }
