"""What `benchmark.py` measures: a prefill, a decode step, one product; each beside what the device can do just then.

    yardstick = Yardstick(args, device, dtype)
    point = Decode("bf16", steps, yardstick, batch_size=1, context_length=128, new_tokens=32)
    point.measure()
    print(point.figures())

Worth knowing: memory that was never written is all one page of zeros, which the caches hold. So weights and KV caches
are filled with noise, or reading them would cost nothing.
"""

import copy
import dataclasses
import platform
import re
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.decoding import Steps, stream
from fast.layers import backend_for, replace_linears, speed_up
from fast.metrics import bytes_per_step, memory_to_read
from fast.quantized import swap_linears
from kernels.gpu import choice
from model import ModelArgs, Transformer

MAX_COPIES = 128  # of a weight that is rotated past the caches: as many calls make one compiled graph


def noise_block(device: str | torch.device, dtype: torch.dtype) -> Tensor:
    """Noise of an odd length, so that no two rows of a weight filled with it are equal."""
    return (0.02 * torch.randn((1 << 22) + 15, device=device)).to(dtype)


def fill(tensor: Tensor, noise: Tensor) -> None:
    """Fill a contiguous tensor with `noise` over and over."""
    for piece in tensor.view(-1).split(len(noise)):
        piece.copy_(noise[: len(piece)])


def fill_weights(module: nn.Module, dtype: torch.dtype, scheme: dict[str, Any] | None) -> None:
    """Random weights for all of `module`, norms at one."""
    noise = noise_block(next(iter(module.state_dict().values())).device, dtype)
    whole = torch.randint(-127, 128, noise.shape, device=noise.device, dtype=torch.int8)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.fill_(1)
        else:
            fill(parameter, noise)
    for name, buffer in module.named_buffers():
        if name.endswith("weight"):
            fill(buffer.view(torch.int8), whole)
        else:  # so that weights spread as the noise does
            buffer.fill_(0.0 if name.endswith("zeros") else 0.02 / (73 if scheme["mode"] == "int8" else 4.6))


def meta_model(args: ModelArgs, dtype: torch.dtype, scheme: dict[str, Any] | None) -> Transformer:
    """The model without memory. scheme: how the Linears are quantised, as a checkpoint records it."""
    if scheme is not None:
        args = dataclasses.replace(args, tie_embeddings=False)  # a quantised output projection has its own weight
    with torch.device("meta"):
        model = Transformer(args)
    if scheme is not None:
        swap_linears(model, scheme)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False).eval()


def build_model(args: ModelArgs, device: str, dtype: torch.dtype, scheme: dict[str, Any] | None = None) -> Transformer:
    """A model with random weights, made on the device, fast as a loaded one. scheme: as for `meta_model`."""
    model = meta_model(args, dtype, scheme)
    tied = model.args.tie_embeddings
    if tied:
        model.output.weight = None  # else to_empty gives it memory of its own
    model = model.to_empty(device=device)
    if tied:
        model.output.weight = model.tok_embeddings.weight
    fill_weights(model, dtype, scheme)
    speed_up(model, dtype)
    return model


def with_caches(
    model: Transformer, batch_size: int, capacities: list[int], kv_dtype: torch.dtype | None = None
) -> list[Transformer]:
    """For each capacity a model on the same weights, its KV cache written all over: with noise, int8 with zeros."""
    twins, weights = [], [*model.parameters(), *model.buffers()]
    noise = noise_block(model.tok_embeddings.weight.device, model.tok_embeddings.weight.dtype)
    for capacity in capacities:
        twin = copy.deepcopy(model, {id(tensor): tensor for tensor in weights})
        twin.setup_caches(batch_size, capacity, kv_dtype=kv_dtype)
        for layer in twin.layers:
            for buffer in layer.attention.kv_cache.buffers():
                fill(buffer, noise)
        twins.append(twin)
    return twins


def replay_seconds(device: str, function: Callable[..., Any], *args: Any) -> float:
    """Seconds that the kernels of a call take on a GPU, without the host; on a CPU a call's own, the median of 5."""
    if device.startswith("cuda"):
        return choice.replay_seconds(function, *args)
    function(*args)  # the first may compile
    return median(_elapsed(function, *args) for _ in range(5))


def _elapsed(function: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


class Yardstick:
    """What the device can do right now: bytes per second of memory, operations per second of matrix products."""

    def __init__(self, args: ModelArgs, device: str, dtype: torch.dtype):
        self.is_cuda, self.device, self.dtype = device.startswith("cuda"), device, dtype
        self.source = torch.ones(1 << 28, device=device) if self.is_cuda else memory_to_read()
        self.target = torch.empty_like(self.source) if self.is_cuda else None
        sizes = (args.dim, 2 * args.hidden_dim), (2048, 2048)
        self.weights = [torch.randn(n_out, n_in, device=device, dtype=dtype) for n_in, n_out in sizes]
        self.bandwidth()  # the first is slow

    def seconds(self, function: Callable[..., Any], *args: Any) -> float:
        """How long a call takes; on a GPU the mean of as many as take 5 ms, by its own clock: the host runs ahead."""
        if not self.is_cuda:
            return _elapsed(function, *args)
        n = 1 + int(5e-3 / choice.seconds_by_events(1, function, *args))
        return choice.seconds_by_events(n, function, *args)

    def bandwidth(self) -> float:
        """Bytes per second of one plain read on a CPU, of copies on a GPU (reads plus writes)."""
        if self.target is None:
            return self.source.nbytes / self.seconds(self.source.sum)
        return 2 * self.source.nbytes / min(self.seconds(self.target.copy_, self.source) for _ in range(5))

    def matmul_rates(self, n_tokens: int) -> dict[str, float]:
        """Operations per second of `F.linear`, best of three, by shape (tokens x in x out)."""
        rates = {}
        for weight in self.weights:
            x = torch.randn(n_tokens, weight.shape[1], device=self.device, dtype=self.dtype)
            best = min(self.seconds(F.linear, x, weight) for _ in range(3))
            rates[f"{n_tokens}x{weight.shape[1]}x{weight.shape[0]}"] = 2 * n_tokens * weight.numel() / best
        return rates


def operations(args: ModelArgs, batch_size: int, tokens: int, pairs: float) -> float:
    """Operations of a pass: 2 per token and weight of the layers, the output projection for a row's last token, and in
    attention the two products of `pairs` queries and keys that see each other. Norms, RoPE, softmax: not counted.
    """
    with torch.device("meta"):
        blocks = Transformer(args).layers
    layers = 2 * tokens * sum(p.numel() for p in blocks.parameters() if p.dim() == 2)
    attention = 4 * args.n_layers * args.n_heads * args.head_dim * pairs
    return batch_size * (layers + attention + 2 * args.vocab_size * args.dim)


def spread(values: list[float], outside: int) -> list[float]:
    """The median, and the range without one in `outside` of the values at either end."""
    ordered = sorted(values)
    cut = len(ordered) // outside
    return [median(ordered), ordered[cut], ordered[-1 - cut]]


@dataclasses.dataclass
class Prefill:
    """Prefills, up to the first token's id on the host. A share's base is the fastest product around it."""

    mode: str
    steps: Steps
    yardstick: Yardstick
    batch_size: int
    prompt_length: int
    seconds: list[float] = dataclasses.field(default_factory=list)
    rates: list[dict[str, float]] = dataclasses.field(default_factory=list)  # two for each prefill: before and after

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
            "bytes": bytes_per_step(model, self.batch_size, length),
            "gflops_per_s": n_operations / seconds / 1e9,
            "matmul_gflops_per_s": median(best) / 1e9,
            "matmul_shape": max(self.rates[0], key=lambda shape: median(rate[shape] for rate in self.rates)),
            "share": spread(shares, outside=len(shares) + 1),
        }


@dataclasses.dataclass
class Decode:
    """Decode steps in stretches of at least 50 ms, each with the bandwidth around it; on a GPU a run is one stretch.

    The first `context_length` positions of the cache are noise: what is there does not change the time.
    """

    mode: str
    steps: Steps
    yardstick: Yardstick
    batch_size: int
    context_length: int
    new_tokens: int
    stretches: list[tuple[float, float, float]] = dataclasses.field(default_factory=list)  # see `add`

    def measure(self) -> None:
        """One run of `stream`, stopped between two tokens to time a plain read."""
        is_cuda, before = self.yardstick.is_cuda, self.yardstick.bandwidth()
        tokens = stream(self.steps, [[1]] * self.batch_size, self.new_tokens, cached=self.context_length - 1)
        next(tokens)
        if not is_cuda:  # a GPU is at the next token already
            before = self.yardstick.bandwidth()
        n, valid, start = 0, self.context_length, time.perf_counter()
        for i, _ in enumerate(tokens, start=2):
            n, valid, elapsed = n + 1, valid + 1, time.perf_counter() - start
            if i == self.new_tokens or (elapsed > 0.05 and not is_cuda):
                after = self.yardstick.bandwidth()
                self.add(elapsed / n, valid - (n - 1) / 2, (before + after) / 2)
                n, before, start = 0, after, time.perf_counter()

    def add(self, seconds: float, positions: float, bandwidth: float) -> None:
        """A stretch: seconds of a step, positions that it attends on average, bytes per second of the reads beside."""
        self.stretches.append((seconds, bytes_per_step(self.steps.model, self.batch_size, positions), bandwidth))

    def figures(self) -> dict[str, Any]:
        """Medians over the stretches; the share's range is that of its middle 80 %.

        A step's time is that of its bytes at the bandwidth of the moment, and the rest; both are divided by the number
        of layers, the output projection's part with them.
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
    """One of the weights that take turns."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    @torch.compiler.nested_compile_region  # as in the model, where nothing is fused with a neighbour's product either
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Rotation(nn.Module):
    """Copies of one Linear, more than the caches hold, multiplied one after another as a decode step would."""

    def __init__(
        self, linear: nn.Module, device: str, dtype: torch.dtype, scheme: dict[str, Any] | None, is_fast: bool = True
    ):
        """linear: on `meta`, as `meta_model` has it. is_fast: multiplied by a kernel, where there is one."""
        super().__init__()
        nbytes = sum(t.nbytes for t in linear.state_dict().values())
        n = min(MAX_COPIES, max(2, -(-past_the_caches(device) // nbytes)))
        self.copies = nn.ModuleList(Copy(copy.deepcopy(linear)) for _ in range(n)).to_empty(device=device)
        fill_weights(self.copies, dtype, scheme)
        if is_fast:
            replace_linears(self.copies, backend_for(device, dtype))
        self.nbytes = sum(t.nbytes for t in self.copies.state_dict().values())

    def forward(self, x: Tensor) -> list[Tensor]:
        return [one(x) for one in self.copies]  # all of them, or a compiler would leave out the rest


def past_the_caches(device: str) -> int:
    """Bytes that a rotation should at least have: four times the last cache, and no less than 256 MB."""
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
    run: Callable[[Tensor], list[Tensor]]  # the rotation, compiled if asked
    yardstick: Yardstick
    rows: int
    passes: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # seconds, bytes per second beside it

    def __post_init__(self):
        n_in, device, dtype = self.rotation.copies[0].linear.in_features, self.yardstick.device, self.yardstick.dtype
        self.x = torch.randn(self.rows, 1, n_in, device=device, dtype=dtype)
        for _ in range(3):  # compiles; on a GPU records a graph
            self.yardstick.seconds(self.run, self.x)

    def measure(self) -> None:
        """Five passes over all copies, a plain read between two of them."""
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


def hardware(device: str) -> str:
    """The GPU's name, or the CPU's and the number of threads in use."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    return f"{name[1] if name else platform.machine()} x {torch.get_num_threads()}"


SHAPES: dict[str, Callable[[Transformer], nn.Module]] = {
    "wqkv": lambda model: model.layers[0].attention.wqkv,
    "wo": lambda model: model.layers[0].attention.wo,
    "w13": lambda model: model.layers[0].feed_forward.w13,
    "w2": lambda model: model.layers[0].feed_forward.w2,
    "output": lambda model: model.output,
}
