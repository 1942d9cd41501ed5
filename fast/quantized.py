"""The quantised Linears: how a float weight becomes one, how it lies in a file, how it multiplies.

    module = Int4Linear.from_float(weight, groupsize=32)  # [N, K] in any float dtype
    y = module(x)

What a file holds is the same for every device, N being the outputs and K the inputs of a Linear:

    int8   weight  int8     [N, K]      w = weight * scales, symmetric per output row
           scales  float32  [N]
    int4   weight  uint8    [N, K / 2]  two weights a byte, the even input in the low four bits; q = 0 .. 15
           scales  bfloat16 [N, K / G]  w = (q - 8) * scales + zeros, per group of G inputs
           zeros   bfloat16 [N, K / G]

Worth knowing: `zeros` is the value in the middle of a group's range, small beside the range itself, so that rounding it
to bfloat16 costs nothing; and a weight is rounded with the scale and zero as stored, not as computed. After loading,
`pack` brings them into the layout of a CPU's kernel, which never reaches a file; a GPU's kernels take them as stored.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import cpu

GROUP_SIZES = (32, 64, 128, 256)
ELEMENTS_AT_ONCE = 1 << 19  # of a weight while it is quantised: what the caches hold is ten times as fast


class QuantizedLinear(nn.Module):
    """What the two have in common: `y = x W^T + bias` with the bias in the dtype of `x [..., K]`."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.has_kernel, self.has_collective = False, False  # as in a `model.Linear`
        self.packed: Tensor | None = None  # for a CPU's kernel; a GPU's take the stored form

    def has_kernel_for(self, x: Tensor) -> bool:
        return self.has_kernel

    def forward(self, x: Tensor) -> Tensor:
        if not self.has_kernel:
            return F.linear(x, self.dequantize(x.dtype), self.bias)
        return self.multiply(x.flatten(0, -2), self.bias).unflatten(0, x.shape[:-1])

    def pack(self, dtype: torch.dtype) -> None:
        """Use this device's kernel, if there is one for activations in `dtype`, and take the layout it asks for."""
        device, names = self.weight.device, list(self._buffers)
        if kernels_missing(device, dtype) is not None or self.in_features % (32 if device.type == "cuda" else 4):
            return
        self.has_kernel = True
        if device.type == "cuda":
            for name in names:
                setattr(self, name, getattr(self, name).contiguous())
            return
        packed = self.pack_for_cpu()
        for name in names:
            delattr(self, name)
        del self.packed
        self.register_buffer("packed", packed)


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

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights as numbers, `[N, K]`."""
        return (self.weight * self.scales[:, None]).to(dtype)

    def pack_for_cpu(self) -> Tensor:
        return cpu.pack_int8(self.weight, self.scales)

    def multiply(self, x: Tensor, *around: Any) -> Tensor:
        if self.packed is None:
            return torch.ops.fast_gpu.linear(x, self.weight, self.scales, None, *around)
        return torch.ops.fast.int8_linear(x, self.packed, self.out_features, *around)


class Int4Linear(QuantizedLinear):
    """A Linear with 4-bit weights, a scale and a zero for each group of `groupsize` inputs."""

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
        """A module that holds these tensors as they are, in the stored form."""
        n_in = 2 * weight.shape[1]
        module = cls(n_in, weight.shape[0], groupsize=n_in // scales.shape[1])
        module.weight, module.scales, module.zeros = weight, scales, zeros
        module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return module

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights as numbers, `[N, K]`."""
        return int4_values(unpack_nibbles(self.weight), self.scales, self.zeros).to(dtype)

    def pack_for_cpu(self) -> Tensor:
        return cpu.pack_int4(self.weight, self.scales, self.zeros)

    def multiply(self, x: Tensor, *around: Any) -> Tensor:
        if self.packed is None:
            return torch.ops.fast_gpu.linear(x, self.weight, self.scales, self.zeros, *around)
        return torch.ops.fast.int4_linear(x, self.packed, self.out_features, self.groupsize, *around)


LINEARS: dict[str, type[Int8Linear] | type[Int4Linear]] = {
    "int8": Int8Linear,
    "int4": Int4Linear,
    "int4-gptq": Int4Linear,
}


def quantized_linears(model: nn.Module, scheme: dict[str, Any]) -> Iterator[tuple[str, nn.Linear]]:
    """Name and module of every Linear that `scheme` quantises: all but those in its `skip`, by name or last part."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not {name, name.rpartition(".")[2]} & set(scheme.get("skip", ())):
            yield name, module


def swap_linears(model: nn.Module, scheme: dict[str, Any]) -> None:
    """Put the quantised Linears that `scheme` describes in the place of the float ones, without weights.

    scheme: what a checkpoint records, {"mode": "int4", "groupsize": 32, "skip": ["output"], ...}. Raises ValueError for
    a mode or a group size that this version does not have, and for a Linear whose inputs the groups do not divide.
    """
    mode, groupsize = scheme.get("mode"), scheme.get("groupsize")
    if mode not in LINEARS:
        raise ValueError(f"quantisation mode {mode!r} is not supported; supported: {', '.join(LINEARS)}")
    options = {}
    if LINEARS[mode] is Int4Linear:
        if groupsize not in GROUP_SIZES:
            raise ValueError(f"group size {groupsize!r} is not supported; supported: {GROUP_SIZES}")
        options["groupsize"] = groupsize
    for name, linear in list(quantized_linears(model, scheme)):
        if groupsize is not None and linear.in_features % groupsize:
            fitting = [str(size) for size in GROUP_SIZES if linear.in_features % size == 0]
            remedy = f"--groupsize {' or '.join(fitting)}" if fitting else f"--skip {name.rpartition('.')[2]}"
            raise ValueError(f"{name} has {linear.in_features} inputs, not a multiple of {groupsize}: use {remedy}")
        parent, _, child = name.rpartition(".")
        with linear.weight.device:
            swapped = LINEARS[mode](linear.in_features, linear.out_features, linear.bias is not None, **options)
        swapped.sharding = linear.sharding
        setattr(model.get_submodule(parent), child, swapped)


def pack_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every Linear the kernel there is for it on its device and for activations in `dtype`, and its weight the
    layout which that asks for; attention over the cache gets a GPU's, or the CPU's where the processor runs it fast.

    On a GPU this turns cuDNN's attention off for the process: on Hopper SDPA prefers it, and it plans anew for each
    length of a prompt, which takes longer than the attention.
    """
    device = next(iter(model.state_dict().values())).device
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    has_kernels = kernels_missing(device, dtype) is None
    on_cpu, on_gpu = (has_kernels and device.type == kind for kind in ("cpu", "cuda"))
    if on_gpu:
        from kernels import gpu, gpu_attention  # noqa: F401 - registers its operator

        has_fp8 = torch.cuda.get_device_capability(device) >= (8, 9)
        cached = (dtype, torch.int8, *[torch.float8_e4m3fn] * has_fp8)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.pack(dtype)
        elif isinstance(module, nn.Linear) and on_cpu and module.in_features % 2 == 0:
            module.register_buffer("packed", cpu.pack_bf16(module.weight))
            module.weight, module.kernel = None, multiply_on_cpu
        elif isinstance(module, nn.Linear) and on_gpu and module.in_features % 32 == 0:
            module.kernel, module.kernel_rows = multiply_on_gpu, gpu.MAX_ROWS
        elif hasattr(module, "kv_cache") and on_cpu and cpu.is_fast() and module.head_dim % 32 == 0:
            module.kernels = dict.fromkeys((torch.bfloat16, torch.int8), attend_on_cpu)
        elif hasattr(module, "kv_cache") and on_gpu and module.head_dim <= 128:
            module.kernels = dict.fromkeys(cached, attend_on_gpu)


def multiply_on_cpu(linear: nn.Module, x: Tensor, *around: Any) -> Tensor:
    """The product of a `model.Linear` with its packed weight."""
    return torch.ops.fast.bf16_linear(x, linear.packed, linear.out_features, *around)


def multiply_on_gpu(linear: nn.Module, x: Tensor, *around: Any) -> Tensor:
    """The product of a `model.Linear` with a few rows."""
    return torch.ops.fast_gpu.linear(x, linear.weight, None, None, *around)


def attend_on_cpu(
    attention: nn.Module, qkv: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor, n_slots: int
) -> Tensor:
    """`model.Attention.attend` with the CPU's kernel."""
    q, k, v = attention.heads(qkv, cos, sin)
    attention.kv_cache.write(input_pos, k, v)
    k, v, *scales = attention.kv_cache.stored(len(q), n_slots)
    y = torch.ops.fast.decode_attention(q, k, v, input_pos, attention.window, *scales)
    return y.transpose(1, 2).flatten(2)


def attend_on_gpu(
    attention: nn.Module, qkv: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor, n_slots: int
) -> Tensor:
    """`model.Attention.attend` with the GPU's kernels, which find out themselves how many slots are valid."""
    norms = (None, None, 0.0)
    if attention.q_norm is not None:
        norms = attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps
    return torch.ops.fast_gpu.decode_attention(
        qkv, cos, sin, input_pos, attention.window, *norms, *attention.kv_cache.buffers()
    )


def kernels_missing(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why plain PyTorch multiplies, and on a GPU attends, in one line; None where there are kernels."""
    if torch.device(device).type == "cuda":
        try:
            from kernels import gpu
        except ModuleNotFoundError as error:
            return f"a GPU's kernels need the package {error.name}: pip install {error.name}"
        return gpu.missing(device, dtype)
    if torch.device(device).type != "cpu":
        return f"there is no kernel for quantised weights on {device}"
    if dtype != torch.bfloat16:
        return f"the kernels for quantised weights take bfloat16, not {str(dtype).removeprefix('torch.')}"
    return cpu.load()


def pack_nibbles(q: Tensor) -> Tensor:
    """`q [N, K]` of values 0 .. 15 to uint8 `[N, K / 2]`, the even input in the low four bits."""
    q = q.to(torch.uint8)
    return q[:, ::2] | q[:, 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)


def int4_scales(groups: Tensor, search: bool, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The scale and zero of each group, bfloat16 `[...]`, for weights `groups [..., G]` in float32.

    Without `search` the 16 steps span the group's range. With it the range is also cut short by up to 45 %, and from
    the best cut on, rounding and a linear regression of the weights on the rounded values take turns; what has the
    least squared error stays. `importance`, of a shape that broadcasts to `groups`, weights these errors.
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
    """The float32 weights that `q [..., K]` stands for, with `scales`, `zeros` `[..., K / G]`."""
    groups = q.unflatten(-1, (scales.shape[-1], -1)).float() - 8
    return (groups * scales.float()[..., None] + zeros.float()[..., None]).flatten(-2)


def _round_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    scales = rows.abs().amax(1).clamp(min=1e-30) / 127
    return (rows / scales[:, None]).round().to(torch.int8), scales


def _by_rows(quantize, weight: Tensor) -> Sequence[Tensor]:
    """`quantize` a few rows of `weight` at a time in float32, and join what it returns."""
    pieces = [quantize(rows.float()) for rows in weight.split(max(1, ELEMENTS_AT_ONCE // weight.shape[1]))]
    return [torch.cat(column) for column in zip(*pieces, strict=True)]
