"""The CPU's kernels, in C++: products that read each weight once, at the speed of memory, and attention over a cache.

    if cpu.missing("cpu", torch.bfloat16) is None:
        product = cpu.product(weight, scales, zeros)

`build.py` compiles `operators.cpp` and `products.cpp`; `packing.py` lays weights out as `products.cpp` reads them.
"""

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import Attention, Product, kind_of_pairs
from kernels.cpu import build, packing


def missing(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """The reason, in one line, why there are no kernels for activations in `dtype`, or None. Builds them if needed."""
    if dtype != torch.bfloat16:
        return f"the CPU's kernels take bfloat16, not {str(dtype).removeprefix('torch.')}"
    return build.load()


def product(
    weight: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    zeros_are: str = "middle",
    n_experts: int = 1,
) -> Product | None:
    """Pack a weight in bfloat16, int8 or in groups for its product; None where its sizes do not fit the panels."""
    n_out, n_in = weight.shape[0] // n_experts, weight.shape[1]
    if n_experts > 1 and n_out % packing.LANES:
        return None
    if scales is not None and scales.dim() == 2:
        bits = 4 if weight.dtype == torch.uint8 else 8
        groupsize = 8 * n_in // bits // scales.shape[1]
        if groupsize % 16 or packing.INPUTS_PER_SCALE % groupsize:
            return None
        form = kind_of_pairs(scales.dtype, zeros_are) + 8 * (bits == 8)
        operator, sizes = torch.ops.fast.grouped_linear, (n_out, groupsize, form)
        packed = packing.pack_groups(weight, scales, zeros)
    elif n_in % (2 if scales is None else 4):
        return None
    elif scales is not None:
        operator, sizes, packed = torch.ops.fast.int8_linear, (n_out,), packing.pack_int8(weight, scales)
    else:
        operator, sizes, packed = torch.ops.fast.bf16_linear, (n_out,), packing.pack_bf16(weight)
    return Product({"packed": packed}, lambda x, packed, *fused: operator(x, packed, *sizes, *fused))


def router(weight: Tensor, k: int, normalizes: bool) -> Product | None:
    """Pack a router's weight, bfloat16 `[E, K]`; None where its sizes do not fit the panels."""
    if weight.shape[1] % 2 or weight.dtype != torch.bfloat16:
        return None
    sizes = len(weight), k, normalizes
    operator = torch.ops.fast.route
    return Product({"packed": packing.pack_bf16(weight)}, lambda x, packed, *norm: operator(x, packed, *sizes, *norm))


def attention(device: torch.device, kv_dtype: torch.dtype, head_dim: int) -> Attention | None:
    """Attention for processors with AVX-512 and its bf16 dot product; None for other types of cache."""
    if kv_dtype not in (torch.bfloat16, torch.int8) or torch.ops.fast.variants()[0] != "avx512":
        return None
    return Attention(torch.ops.fast.decode_attention, max_positions=16, takes_qkv=False)


def in_one_region(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step` led by a team of threads (`threads.h`), which between kernels prefetch the weights used next.

    Other operators run on one thread inside it, but oneDNN's (a product of bfloat16) give wrong results there.
    """

    args, result, error = (), None, None

    @ctypes.CFUNCTYPE(None)
    def call() -> None:
        nonlocal result, error
        try:
            result, error = step(*args), None
        except BaseException as problem:
            error = problem

    def run(*given: Any) -> Any:
        nonlocal args, error
        args, error = given, KeyboardInterrupt()  # raised if Ctrl-C arrives before the `try` in `call`
        hook, sys.unraisablehook = sys.unraisablehook, _unless_interrupted
        try:
            build.in_a_team(call)
        finally:
            sys.unraisablehook = hook
        if error is not None:
            raise error
        return result

    return step if build.in_a_team is None else run


def _unless_interrupted(unraisable: Any) -> None:
    """Show what could not be raised, but for a Ctrl-C that arrives where ctypes cannot pass it on: `run` raises it."""
    if unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)
