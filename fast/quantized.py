"""Quantised Linears: how weights are rounded, how they are stored, how they are multiplied; a quantised KV cache.

    module = Int4Linear.from_float(weight, groupsize=32)  # [N, K] in any float dtype
    y = module(x)

A checkpoint stores the same for every device (a Linear has N outputs, K inputs and groups of G inputs):

    int8   weight  int8     [N, K]      w = weight * scales, symmetric per output row
           scales  float32  [N]
    int4   weight  uint8    [N, K / 2]  two weights a byte, the even input in the low four bits; q = 0 .. 15
           scales  bfloat16 [N, K / G]  w = (q - 8) * scales + zeros, per group of G inputs
           zeros   bfloat16 [N, K / G]

Worth knowing: `zeros` is the value in the middle of a group's range, usually small beside the range, so that rounding
it to bfloat16 costs little. Weights are rounded with scale and zero as stored, in bfloat16. The modules here multiply
by dequantised weights in plain PyTorch; `layers.speed_up` replaces them with a kernel where the backend has one.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model import KVCache, Sharding, multiply

GROUP_SIZES = (32, 64, 128, 256)
KV_DTYPES = (torch.int8, torch.float8_e4m3fn)  # the types that a cache can be quantised to
ELEMENTS_AT_ONCE = 1 << 19  # elements quantised at a time: staying in the CPU's cache is ten times as fast


class QuantizedLinear(nn.Module):
    """Base class: `y = x W^T + bias` for x `[..., K]`, with W `[N, K]` from `dequantize`."""

    in_groups = False  # whether each group of `groupsize` inputs has its own scale
    n_experts = 1  # whose weights are stacked
    sharding = Sharding()
    collective: Callable[[Tensor], Tensor] | None = None

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def dequantize(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """The weights as numbers, `[N, K]`, or only these `rows` of them, int `[n]`."""
        raise NotImplementedError

    def stored(self, rows: Tensor | None) -> list[Tensor]:
        """Its buffers, or only these rows of them."""
        return [t if rows is None else t[rows] for t in self.buffers()]

    def forward(self, x: Tensor, experts: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        rows, n_experts = None, self.n_experts
        if experts is not None and experts.numel() < n_experts:  # dequantise the chosen ones alone
            n_out = self.out_features // n_experts
            rows = (experts.reshape(-1, 1) * n_out + torch.arange(n_out, device=x.device)).flatten()
            n_experts, experts = experts.numel(), torch.arange(experts.numel(), device=x.device).view_as(experts)
        y = multiply(x, self.dequantize(x.dtype, rows), self.bias, n_experts, experts, weights)
        return y if self.collective is None else self.collective(y)


class Int8Linear(QuantizedLinear):
    """A Linear with int8 weights and a float32 scale per output row."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(out_features, dtype=torch.float32))

    @classmethod
    def from_float(cls, weight: Tensor, bias: Tensor | None = None, **scheme: Any) -> "Int8Linear":
        """Round `weight [N, K]` to the nearest of 255 steps per row."""
        module = cls(weight.shape[1], weight.shape[0])
        module.weight, module.scales = _by_rows(_round_int8, weight)
        module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return module

    def dequantize(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        weight, scales = self.stored(rows)
        return (weight * scales[:, None]).to(dtype)


class Int4Linear(QuantizedLinear):
    """A Linear with 4-bit weights, and a scale and a zero for each group of `groupsize` inputs."""

    in_groups = True

    def __init__(self, in_features: int, out_features: int, bias: bool = False, groupsize: int = 32):
        super().__init__(in_features, out_features, bias)
        self.groupsize = groupsize
        self.register_buffer("weight", torch.empty(out_features, in_features // 2, dtype=torch.uint8))
        for name in ("scales", "zeros"):
            shape = out_features, in_features // groupsize
            self.register_buffer(name, torch.empty(shape, dtype=torch.bfloat16))

    @classmethod
    def from_float(
        cls, weight: Tensor, bias: Tensor | None = None, *, groupsize: int, scale_search: bool = False, **scheme: Any
    ) -> "Int4Linear":
        """Round `weight [N, K]` to the nearest of 16 steps per group; `scale_search`: see `int4_scales`."""

        def quantize(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            groups = rows.unflatten(1, (-1, groupsize))  # [n, K / G, G]
            scales, zeros = int4_scales(groups, scale_search)
            return pack_nibbles(int4_round(groups, scales, zeros).flatten(1)), scales, zeros

        return cls.from_parts(*_by_rows(quantize, weight), bias=bias)

    @classmethod
    def from_parts(cls, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None) -> "Int4Linear":
        """A module that holds these tensors, already in the stored form, without copying them."""
        n_in = 2 * weight.shape[1]
        module = cls(n_in, weight.shape[0], groupsize=n_in // scales.shape[1])
        module.weight, module.scales, module.zeros = weight, scales, zeros
        module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return module

    def dequantize(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        weight, scales, zeros = self.stored(rows)
        return int4_values(unpack_nibbles(weight), scales, zeros).to(dtype)


LINEARS: dict[str, type[QuantizedLinear]] = {
    "int8": Int8Linear,
    "int4": Int4Linear,
    "int4-gptq": Int4Linear,
}


def quantized_linears(model: nn.Module, scheme: dict[str, Any]) -> Iterator[tuple[str, nn.Linear]]:
    """Name and module of every Linear that `scheme` quantises: all but those in `skip`, by full name or last part."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not {name, name.rpartition(".")[2]} & set(scheme.get("skip", ())):
            yield name, module


def swap_linears(model: nn.Module, scheme: dict[str, Any]) -> None:
    """Replace the Linears that `scheme` quantises with quantised ones, whose weights are still uninitialised.

    scheme: what a checkpoint records, {"mode": "int4", "groupsize": 32, "skip": ["output"], ...}. Raises ValueError for
    an unsupported mode or group size, and for a Linear whose number of inputs is not a multiple of the group size.
    """
    mode, groupsize = scheme.get("mode"), scheme.get("groupsize")
    if mode not in LINEARS:
        raise ValueError(f"quantisation mode {mode!r} is not supported; supported: {', '.join(LINEARS)}")
    options = {}
    if LINEARS[mode].in_groups:
        if groupsize not in GROUP_SIZES:
            raise ValueError(f"group size {groupsize!r} is not supported; supported: {GROUP_SIZES}")
        options["groupsize"] = groupsize
    for name, linear in list(quantized_linears(model, scheme)):
        if options and linear.in_features % groupsize:
            fitting = [str(size) for size in GROUP_SIZES if linear.in_features % size == 0]
            remedy = f"--groupsize {' or '.join(fitting)}" if fitting else f"--skip {name.rpartition('.')[2]}"
            raise ValueError(f"{name} has {linear.in_features} inputs, not a multiple of {groupsize}: use {remedy}")
        parent, _, child = name.rpartition(".")
        with linear.weight.device:
            swapped = LINEARS[mode](linear.in_features, linear.out_features, linear.bias is not None, **options)
        swapped.sharding, swapped.n_experts = linear.sharding, linear.n_experts
        setattr(model.get_submodule(parent), child, swapped)


def pack_nibbles(q: Tensor) -> Tensor:
    """`q [N, K]` of values 0 .. 15 to uint8 `[N, K / 2]`, the even input in the low four bits."""
    q = q.to(torch.uint8)
    return q[:, ::2] | q[:, 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)


def int4_scales(groups: Tensor, search: bool, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The scale and zero of each group, bfloat16 `[...]`, for weights `groups [..., G]` in float32.

    Without `search` the 16 steps span the group's range. With it, ranges shortened by up to 45 % are tried too; then,
    from the best one, rounding alternates with a linear regression of the weights on the rounded values. The least
    squared error wins. `importance`, of a shape that broadcasts to `groups`, weights these errors.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    best = _spanning(low, high)
    if not search:
        return best
    weights = torch.ones_like(groups) if importance is None else importance.expand_as(groups)

    def error(scales: Tensor, zeros: Tensor) -> Tensor:
        rounded = int4_values(int4_round(groups, scales, zeros).flatten(-2), scales, zeros).view_as(groups)
        return (weights * (rounded - groups).square()).sum(-1)

    def keep_better(scales: Tensor, zeros: Tensor) -> None:
        nonlocal best, least
        found = error(scales, zeros)
        better = found < least
        best = torch.where(better, scales, best[0]), torch.where(better, zeros, best[1])
        least = torch.where(better, found, least)

    least = error(*best)
    for percent in range(95, 50, -5):
        keep_better(*_spanning(low * percent / 100, high * percent / 100))
    total = weights.sum(-1, keepdim=True)
    for _ in range(4):
        q = int4_round(groups, *best).float() - 8
        q_mean, w_mean = ((weights * x).sum(-1, keepdim=True) / total for x in (q, groups))
        spread = (weights * (q - q_mean).square()).sum(-1)
        slope = (weights * (q - q_mean) * (groups - w_mean)).sum(-1) / spread
        scales = torch.where(spread > 0, slope, best[0].float()).to(torch.bfloat16)
        keep_better(scales, (w_mean - scales[..., None] * q_mean)[..., 0].to(torch.bfloat16))
    return best


def _spanning(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and zero whose 16 steps reach from `low` to `high`."""
    scales = ((high - low) / 15).clamp(min=1e-30).to(torch.bfloat16)
    return scales, (low + 8 * scales.float()).to(torch.bfloat16)


def int4_round(groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The nearest of the 16 steps, uint8 0 .. 15, for `groups [..., G]` with `scales`, `zeros` `[...]`."""
    q = (groups - zeros.float()[..., None]) / scales.float()[..., None] + 8
    return q.round().clamp(0, 15).to(torch.uint8)


def int4_values(q: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The float32 weights that `q [..., K]` encodes, with `scales`, `zeros` `[..., K / G]`."""
    groups = q.unflatten(-1, (scales.shape[-1], -1)).float() - 8
    return (groups * scales.float()[..., None] + zeros.float()[..., None]).flatten(-2)


def _round_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    scales = rows.abs().amax(1).clamp(min=1e-30) / 127
    return (rows / scales[:, None]).round().to(torch.int8), scales


def _by_rows(quantize, weight: Tensor) -> Sequence[Tensor]:
    """Apply `quantize` to a few rows of `weight` at a time, in float32, and concatenate the results."""
    pieces = [quantize(rows.float()) for rows in weight.split(max(1, ELEMENTS_AT_ONCE // weight.shape[1]))]
    return [torch.cat(column) for column in zip(*pieces, strict=True)]


def quantize_kv(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x [..., D]` in `dtype`, and a float32 scale per vector, `[...]`, that maps its largest element to the limit.

    An element's error is at most 1 / 254 of the largest element in int8, and 1 / 16 of itself in fp8, if not subnormal.
    """
    limit = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    scales = x.float().abs().amax(-1).clamp(min=1e-30) / limit
    q = x.float() / scales[..., None]
    return (q if dtype.is_floating_point else q.round()).to(dtype), scales


class QuantizedKVCache(KVCache):
    """A KV cache that quantises, if its dtype is one of KV_DTYPES; else it is a `KVCache`.

    Each vector then has a float32 scale, `[B, n_kv_heads, capacity]`: 1/32 more bytes at head_dim 128.
    """

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype):
        super().__init__(shape, device, dtype)
        self.is_quantized = dtype in KV_DTYPES
        if self.is_quantized:
            self.register_buffer("k_scales", torch.zeros(shape[:3], device=device), persistent=False)
            self.register_buffer("v_scales", torch.zeros(shape[:3], device=device), persistent=False)

    def write(self, input_pos: Tensor, *values: Tensor) -> None:
        """As `KVCache.write`, for keys and values `[B, n_kv_heads, S, head_dim]`."""
        if self.is_quantized:
            (k, k_scales), (v, v_scales) = (quantize_kv(value, self.k.dtype) for value in values)
            values = k, v, k_scales, v_scales
        super().write(input_pos, *values)

    def read(self, n_rows: int, n_slots: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `KVCache.read`; a quantised cache is dequantised."""
        k, v, *scales = self.stored(n_rows, n_slots)
        if scales:
            k, v = ((x.float() * scale[..., None]).to(dtype) for x, scale in zip((k, v), scales, strict=True))
        return k, v
