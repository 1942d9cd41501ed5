"""The fourth step of `gpu_report.py`: times single products and attention with every kernel that can compute them.

    for row in product_rows(card, "8B", ["int4"], rows=1): print(row.what, row.predicted, row.measured, row.unit)

Worth knowing: weights are random. The result of every product is also compared with float32 arithmetic.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fast.layers import FastKVCache, fast_linear, kernels_missing
from fast.quantized import GroupedLinear, QuantizedLinear
from kernels import gpu
from kernels.gpu.choice import asked_by, trying
from model import Attention, rope_table
from scripts.bench.gpu_card import CONTEXTS, MODELS, MODES, Card, Part, Row, make_headroom
from scripts.bench.gpu_correctness import FusedProduct, product_error
from scripts.bench.measuring import Rotation, replay_seconds
from scripts.bench.random_models import SHAPES, meta_model

COUNTED_ATTENTION = 2  # launches of kernels/gpu/flash_decoding.py


def kernels_of(card: Card) -> ModuleType | None:
    """The module of our GPU kernels, if the device can run them."""
    return gpu if card.device.startswith("cuda") and kernels_missing(card.device, card.dtype) is None else None


def by_inductor(card: Card, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` compiled with Inductor's tuning, like a model for which our kernels do not run."""
    tuned = {"coordinate_descent_tuning": True}
    return torch.compile(function, fullgraph=True, dynamic=False, options=tuned) if card.compile else function


class Int4Pack(nn.Module):
    """The product with PyTorch's own int4 operator, whose formula is ours: w = (q - 8) * scale + zero."""

    def __init__(self, linear: GroupedLinear):
        super().__init__()
        self.in_features, self.out_features, self.groupsize = linear.in_features, linear.out_features, linear.groupsize
        swapped = linear.weight << 4 | linear.weight >> 4  # the operator expects the even input in the high four bits
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack(swapped, 8))
        self.register_buffer("scales", torch.stack((linear.scales, linear.zeros), -1).transpose(0, 1).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.aten._weight_int4pack_mm(x.flatten(0, -2), self.packed, self.groupsize, self.scales)
        return y.unflatten(0, x.shape[:-1])


Call = Callable[[FusedProduct, Tensor, Tensor], Tensor]


def call(run: FusedProduct, x: Tensor, residual: Tensor) -> Tensor:
    return run(x, residual)


def forced_to(way: str) -> Call:
    """A call that makes the operator use this variant instead of choosing one."""

    def run_with_way(run: FusedProduct, x: Tensor, residual: Tensor) -> Tensor:
        with trying(way):
            return run(x, residual)

    return run_with_way


Candidates = dict[str, tuple[str, list[nn.Module], Call]]


def candidates(card: Card, name: str, linears: list[nn.Module], rows: int, others: bool) -> Candidates:
    """Ways to compute the product `name`, by label: the one that the model uses, or with `others` the alternatives.

    Each is (name, modules, call). An empty name is the bare product: no norm, gates or residual.
    """
    plain, bare = {"Inductor": (name, linears, by_inductor(card, call))}, {"F.linear, bare": ("", linears, call)}
    if (backend := kernels_of(card)) is None:
        return bare if others else plain
    fast = [fast_linear(linear, backend) for linear in linears]
    if not others:
        return {"kernels/gpu": (name, fast, call)}
    found = plain if isinstance(linears[0], QuantizedLinear) else bare
    if isinstance(linears[0], GroupedLinear) and card.dtype == torch.bfloat16:
        found["aten._weight_int4pack_mm, bare"] = ("", [Int4Pack(linear) for linear in linears], call)
    run = FusedProduct(name, fast[0], card.device, card.dtype)
    ((ways, _),) = asked_by(run, *run.inputs(rows, card.device, card.dtype)).values()
    return {**{f"kernels/gpu, {way}": (name, fast, forced_to(way)) for way in ways}, **found}


def call_all(run: Callable[..., Tensor], each: list[nn.Module], *args: Any) -> list[Tensor]:
    return [run(one, *args) for one in each]


def time_each(ways: dict[str, Callable[[], float]], otherwise: str) -> tuple[str, dict[str, float], dict[str, str]]:
    """The label of the fastest, the seconds of each, and the errors of those that failed.

    Raises RuntimeError, beginning with `otherwise`, if all failed.
    """
    seconds, failed = {}, {}
    for label, time_it in ways.items():
        try:
            seconds[label] = time_it()
        except Exception as error:
            failed[label] = f"{type(error).__name__}: {error}"
    torch.compiler.reset()  # frees the compiled graphs and the weights in them
    if not seconds:
        raise RuntimeError(f"{otherwise}: {failed}")
    return min(seconds, key=seconds.get), seconds, failed


def product_row(card: Card, model: str, name: str, mode: str, rows: int, others: bool) -> Row:
    """The fastest candidate for one product; copies of the weight take turns, so that no cache holds the next one."""
    linear = SHAPES[name](meta_model(MODELS[model], card.dtype, MODES[mode]))
    rotation = Rotation(linear, card.device, card.dtype, MODES[mode], is_fast=False)
    linears, n_bytes = [one.linear for one in rotation.copies], rotation.nbytes / len(rotation.copies)
    errors = {}

    def time_it(label: str, around: str, modules: list[nn.Module], run: Call) -> float:
        each = [FusedProduct(around, module, card.device, card.dtype) for module in modules]
        x, residual = each[0].inputs(rows, card.device, card.dtype)
        exact = FusedProduct(around, linears[0], card.device, card.dtype)
        errors[label] = product_error(exact, x, residual, run(each[0], x, residual))
        return replay_seconds(card.device, call_all, run, each, x, residual) / len(each)

    found = candidates(card, name, linears, rows, others)
    ways = {label: partial(time_it, label, *way) for label, way in found.items()}
    fastest, seconds, failed = time_each(ways, f"{model} {name}, {mode}: no way works")
    predicted = card.read and n_bytes / card.read
    what = f"{model} {name}, {mode}, {rows} row{'s' if rows > 1 else ''}: {fastest}"
    is_right = None if all(error < 4 for error in errors.values()) and not failed else False
    more = {"us": {k: s * 1e6 for k, s in seconds.items()}, "errors": errors, "failed": failed, "bytes": n_bytes}
    return Row(what, "us", predicted and predicted * 1e6, seconds[fastest] * 1e6, is_right, more)


def product_rows(
    card: Card, model: str, modes: Iterable[str], rows: int, others: bool = False, names: Iterable[str] = tuple(SHAPES)
) -> Iterator[Row]:
    for mode in modes:
        for name in names:
            yield product_row(card, model, name, mode, rows, others)


def attention_rows(card: Card, model: str, batch: int) -> Iterator[Row]:
    """Attention of one new position per row, with our kernel and with Inductor; 8 KV caches take turns."""
    make_headroom(card)
    args, kernels = MODELS[model], {"Inductor": None}
    if backend := kernels_of(card):
        kernels["kernels/gpu"] = backend.attention

    def attend(attention: Attention, *given: Any) -> Tensor:
        return attention.kv_cache.attend(attention, *given)

    compiled = by_inductor(card, attend)
    for context in CONTEXTS:
        position = torch.full((batch, 1), context - 1, device=card.device)
        mask = torch.ones(batch, 1, 1, context, dtype=torch.bool, device=card.device)
        shape, calls = (batch, args.n_kv_heads, context + 1, args.head_dim), {}
        for label, attention in kernels.items():
            layers = []
            for _ in range(8):
                with torch.device("meta"):
                    layers.append(Attention(args))
                layers[-1].kv_cache = FastKVCache(attention, shape, torch.device(card.device), card.dtype)
            qkv = torch.randn(batch, 1, layers[0].wqkv.out_features, device=card.device, dtype=card.dtype)
            given = (layers, qkv, *rope_table(args, position, args.context_length), position, context, mask)
            way = attend if attention else compiled
            calls[label] = partial(replay_seconds, card.device, call_all, way, *given)
        fastest, seconds, failed = time_each(calls, f"{model} attention, {batch} at {context}: no way works")
        n_bytes = sum(x.nbytes for x in layers[0].kv_cache.buffers())
        predicted = card.step_seconds(n_bytes, COUNTED_ATTENTION)
        us = {label: total / len(layers) * 1e6 for label, total in seconds.items()}
        more = {"us": us, "failed": failed, "bytes": n_bytes}
        what = f"{model} attention, {batch} at {context}: {fastest}"
        yield Row(what, "us", predicted and predicted * 1e6, us[fastest], False if failed else None, more)


QUANTIZED = ("int4", "int8", "int4 g128")
# The most important parts come first: compiling takes long, and the step may run out of time.
PRODUCTS: list[Part] = [
    partial(product_rows, model="8B", modes=QUANTIZED, rows=1),
    partial(product_rows, model="7B", modes=QUANTIZED, rows=1),
    partial(attention_rows, model="8B", batch=1),
    partial(attention_rows, model="7B", batch=1),
    partial(product_rows, model="8B", modes=QUANTIZED, rows=6),
    partial(product_rows, model="7B", modes=("bf16",), rows=1),
    partial(product_rows, model="8B", modes=("bf16",), rows=1),
    partial(product_rows, model="8B", modes=("int4",), rows=1, others=True, names=("w13", "w2")),
    partial(product_rows, model="8B", modes=("bf16",), rows=1, others=True),
    partial(attention_rows, model="8B", batch=8),
    partial(product_rows, model="8B", modes=("bf16",), rows=6),
    partial(product_rows, model="7B", modes=("bf16", *QUANTIZED), rows=6),
    partial(product_rows, model="8B", modes=("int8", "int4 g128"), rows=1, others=True, names=("w13", "w2")),
    partial(product_rows, model="8B", modes=QUANTIZED, rows=1, others=True, names=("wqkv", "wo", "output")),
    partial(product_rows, model="7B", modes=("bf16", *QUANTIZED), rows=1, others=True),
]
