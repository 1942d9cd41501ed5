"""Quantised Linears: how weights are rounded, how they are stored, how they are multiplied; a quantised KV cache.

    module = GroupedLinear.from_float(weight, groupsize=32)  # [N, K] in any float dtype
    y = module(x)

A checkpoint stores the same for every device (a Linear has N outputs, K inputs and groups of G inputs):

    rows     weight  int8     [N, K]      w = weight * scales, symmetric per output row
             scales  float32  [N]
    groups   weight  uint8    [N, K / 2]  two weights a byte, the even input in the low four bits; q = byte's half - 8
                 or  int8     [N, K]      q = weight
             scales  [N, K / G]           w = q * scales + zeros, per group of G inputs
             zeros   [N, K / G]           both bfloat16 or both float16
    fp8      weight  float8_e4m3fn [N, K] w = weight * scales
             scales  float32  [N, K / G]

Worth knowing: `zeros` is the value in the middle of a group's range, usually small beside the range, so that rounding
it to bfloat16 costs little. Weights are rounded with scale and zero as stored, in bfloat16. Files that others have
quantised give zeros otherwise (`ZEROS`); they are kept as they are, so that nothing is rounded again. The modules here
multiply by dequantised weights in plain PyTorch; `layers.speed_up` replaces them with a kernel where there is one.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from model import KVCache, Sharding, multiply

GROUP_SIZES = (16, 32, 64, 128, 256)
# What `zeros` z mean, with the scale s of their group: the weights in the middle are z, z + 8 s or z s.
ZEROS = ("middle", "lowest", "steps")
# The types of a GroupedLinear's weights, by their bits.
WEIGHTS: dict[int | str, torch.dtype] = {4: torch.uint8, 8: torch.int8, "fp8": torch.float8_e4m3fn}
KV_DTYPES = (torch.int8, torch.float8_e4m3fn)  # the types that a cache can be quantised to
ELEMENTS_AT_ONCE = 1 << 19  # elements quantised at a time: staying in the CPU's cache is ten times as fast


class QuantizedLinear(nn.Module):
    """Base class: `y = x W^T + bias` for x `[..., K]`, with W `[N, K]` from `dequantize`."""

    in_groups = False  # whether each group of `groupsize` inputs has its own scale
    n_experts = 1  # whose weights are stacked
    sharding = Sharding()
    collective: Callable[[Tensor], Tensor] | None = None
    gather: Callable[[Tensor], Tensor] | None = None  # of ranks that each have a share of x, if it is to be ordered

    def __init__(self, in_features: int, out_features: int, bias: bool, ordered: bool = False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        # Which input each column of the weight is for, int32 [K]; None: they are in order.
        self.register_buffer("order", torch.empty(in_features, dtype=torch.int32) if ordered else None)

    def dequantize(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """The weights as numbers, `[N, K]`, in the order stored, or only these `rows` of them, int `[n]`."""
        raise NotImplementedError

    def stored(self, rows: Tensor | None) -> list[Tensor]:
        """Its buffers but `order`, or only these rows of them."""
        return [t if rows is None else t[rows] for name, t in self.named_buffers() if name != "order"]

    def forward(self, x: Tensor, experts: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        x, rows, n_experts = in_order(self, x), None, self.n_experts
        if experts is not None and experts.numel() < n_experts:  # dequantise the chosen ones alone
            n_out = self.out_features // n_experts
            rows = (experts.reshape(-1, 1) * n_out + torch.arange(n_out, device=x.device)).flatten()
            n_experts, experts = experts.numel(), torch.arange(experts.numel(), device=x.device).view_as(experts)
        y = multiply(x, self.dequantize(x.dtype, rows), self.bias, n_experts, experts, weights)
        return y if self.collective is None else self.collective(y)


def in_order(linear: nn.Module, x: Tensor) -> Tensor:
    """The inputs `x [..., K]` of a `linear` in the order in which it stores its weights for them."""
    if linear.order is None:
        return x
    return (x if linear.gather is None else linear.gather(x)).index_select(-1, linear.order)


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


class GroupedLinear(QuantizedLinear):
    """A Linear with weights of 4 or 8 bits, and a scale and a zero for each group of `groupsize` inputs.

    bits: 4 or 8, or "fp8", whose scales are float32, without zeros. scales: the type of scales and zeros. zeros: what
    these mean, one of ZEROS. ordered: whether it has an `order`.
    """

    in_groups = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        groupsize: int = 32,
        bits: int | str = 4,
        scales: torch.dtype = torch.bfloat16,
        zeros: str = "middle",
        ordered: bool = False,
    ):
        super().__init__(in_features, out_features, bias, ordered)
        self.groupsize, self.zeros_are = groupsize, zeros
        n_bytes = in_features // 2 if bits == 4 else in_features
        self.register_buffer("weight", torch.empty(out_features, n_bytes, dtype=WEIGHTS[bits]))
        scales = torch.float32 if bits == "fp8" else scales
        self.register_buffer("scales", torch.empty(out_features, in_features // groupsize, dtype=scales))
        self.register_buffer("zeros", None if bits == "fp8" else torch.empty_like(self.scales))

    @classmethod
    def from_float(
        cls, weight: Tensor, bias: Tensor | None = None, *, groupsize: int, scale_search: bool = False, **scheme: Any
    ) -> "GroupedLinear":
        """Round `weight [N, K]` to the nearest of 16 steps per group; `scale_search`: see `int4_scales`."""

        def quantize(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            groups = rows.unflatten(1, (-1, groupsize))  # [n, K / G, G]
            scales, zeros = int4_scales(groups, scale_search)
            return pack_nibbles(int4_round(groups, scales, zeros).flatten(1)), scales, zeros

        return cls.from_parts(*_by_rows(quantize, weight), bias=bias)

    @classmethod
    def from_parts(
        cls,
        weight: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        bias: Tensor | None = None,
        zeros_are: str = "middle",
    ) -> "GroupedLinear":
        """A module that holds these tensors, already in the stored form, without copying them."""
        bits = next(bits for bits, dtype in WEIGHTS.items() if dtype == weight.dtype)
        n_in = weight.shape[1] * (2 if bits == 4 else 1)
        module = cls(n_in, weight.shape[0], False, n_in // scales.shape[1], bits, scales.dtype, zeros_are)
        module.weight, module.scales, module.zeros = weight, scales, zeros
        module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return module

    def dequantize(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        weight, scales, *zeros = self.stored(rows)
        if not zeros:
            return group_values(weight.float(), scales, torch.zeros_like(scales)).to(dtype)
        q = unpack_nibbles(weight).to(torch.int8) - 8 if weight.dtype == torch.uint8 else weight
        return group_values(q, scales.float(), middle(scales.float(), zeros[0].float(), self.zeros_are)).to(dtype)


LINEARS: dict[str, type[QuantizedLinear]] = {
    "int8": Int8Linear,
    "int4": GroupedLinear,
    "int4-gptq": GroupedLinear,
}
# Settings of weights in groups, with the values that a scheme may give them; the first is the default.
SETTINGS: dict[str, tuple] = {
    "groupsize": (None, *GROUP_SIZES),
    "bits": (4, 8, "fp8"),
    "scales": ("bfloat16", "float16"),
    "zeros": ZEROS,
}
# The modes of checkpoints that others quantised (`fast/published.py`, `fast/gguf.py`).
PUBLISHED = ("gptq", "awq", "compressed-tensors", "fp8", "gguf")


class Mode(TypedDict):
    mode: str


class Scheme(Mode, total=False):
    """What a checkpoint records of its quantisation, see `swap_linears`."""

    skip: list[str]
    groupsize: int
    bits: int | str
    scales: str
    zeros: str
    ordered: list[str]
    others: dict[str, dict[str, Any]]


def quantized_linears(model: nn.Module, scheme: dict[str, Any]) -> Iterator[tuple[str, nn.Linear]]:
    """Name and module of every Linear that `scheme` quantises: all but those in `skip`, by full name or last part."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not is_among(scheme.get("skip", ()), name):
            yield name, module


def is_among(names: Collection[str], name: str) -> bool:
    """Whether the Linear `name`, or the last part of its name, is one of `names`."""
    return name in names or name.rpartition(".")[2] in names


def swap_linears(model: nn.Module, scheme: dict[str, Any]) -> None:
    """Replace the Linears that `scheme` quantises with quantised ones, whose weights are still uninitialised.

    scheme: what a checkpoint records, {"mode": "int4", "groupsize": 32, "skip": ["output"], ...}. If others quantised
    it, also the rest of SETTINGS; "ordered", the Linears that have an order, as in "skip"; and "others", by the name of
    a Linear the settings that it has instead. Raises ValueError for an unsupported mode or setting, and for a Linear
    whose number of inputs is not a multiple of the group size.
    """
    for name, linear in list(quantized_linears(model, scheme)):
        given = scheme | scheme.get("others", {}).get(name, {})
        known = {**LINEARS, **dict.fromkeys(PUBLISHED, GroupedLinear)}
        if (mode := given.get("mode")) not in known:
            raise ValueError(f"quantisation mode {mode!r} is not supported; supported: {', '.join(known)}")
        options = {}
        if known[mode].in_groups:
            options = group_options(name, linear.in_features, given)
            options["ordered"] = is_among(scheme.get("ordered", ()), name)
        parent, _, child = name.rpartition(".")
        with linear.weight.device:
            swapped = known[mode](linear.in_features, linear.out_features, linear.bias is not None, **options)
        swapped.sharding, swapped.n_experts = linear.sharding, linear.n_experts
        setattr(model.get_submodule(parent), child, swapped)


def group_options(name: str, n_in: int, scheme: dict[str, Any]) -> dict[str, Any]:
    """The SETTINGS that `scheme` gives the Linear `name` with `n_in` inputs. Raises ValueError as `swap_linears`."""
    options = {key: scheme.get(key, allowed[0]) for key, allowed in SETTINGS.items()}
    for key, value in options.items():
        if value is None or value not in SETTINGS[key]:
            supported = ", ".join(str(allowed) for allowed in SETTINGS[key] if allowed is not None)
            raise ValueError(f"quantisation with {key} {value!r} is not supported; supported: {supported}")
    if n_in % options["groupsize"]:
        fitting = [str(size) for size in GROUP_SIZES if n_in % size == 0]
        remedy = f"--groupsize {' or '.join(fitting)}" if fitting else f"--skip {name.rpartition('.')[2]}"
        remedy = "" if scheme["mode"] in PUBLISHED else f": use {remedy}"
        raise ValueError(f"{name} has {n_in} inputs, not a multiple of {options['groupsize']}{remedy}")
    return options | {"scales": getattr(torch, options["scales"])}


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
    return group_values(q.float() - 8, scales.float(), zeros.float())


def group_values(q: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """`q * scales + zeros`, float32, for q `[..., K]` and float32 scales, zeros `[..., K / G]`."""
    return (q.unflatten(-1, (scales.shape[-1], -1)) * scales[..., None] + zeros[..., None]).flatten(-2)


def middle(scales: Tensor, zeros: Tensor, zeros_are: str) -> Tensor:
    """The weights in the middle of groups with float32 `scales`, whose `zeros` are one of ZEROS."""
    return {"middle": zeros, "lowest": zeros + 8 * scales, "steps": zeros * scales}[zeros_are]


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
