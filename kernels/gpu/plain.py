"""A GPU's products in PyTorch's operators: of many rows (a prefill), or of few rows as Inductor generates them.

    y = plain(x, written_out(x, weight, scales, bits=4, group=32), bias, norm, eps, residual, activation)

Quantised weights are dequantised to memory, by a kernel; rows that experts compute are sorted by expert.
"""

import functools
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def scale_and_zero(words, PAIRS: tl.constexpr):
    """Scales and zeros of groups, float32, the zeros as weights in the middle; PAIRS: their `kind_of_pairs`."""
    if PAIRS == 8:
        scales = words.to(tl.float32, bitcast=True)
        zeros = tl.zeros_like(scales)
    elif PAIRS & 4:
        scales = (words & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        zeros = (words >> 16 & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        scales, zeros = (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    if (PAIRS & 3) == 2:
        zeros += 8 * scales
    if (PAIRS & 3) == 3:
        zeros *= scales
    return scales, zeros


@triton.jit
def dequantize(
    weight_ptr,  # [N, K * BITS / 8], as stored; fp8 as int8
    scales_ptr,  # as in `_multiply`
    w_ptr,  # [N, K]
    n_out,
    n_in: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the dequantised weights to memory."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    first = tl.program_id(1) * BLOCK_K
    at = first * BITS // 8 + tl.arange(0, BLOCK_K * BITS // 8)[None, :]
    stored = tl.load(weight_ptr + n * (n_in * BITS // 8) + at, mask=(n < n_out) & (at < n_in * BITS // 8), other=0)
    if PAIRS:
        if PAIRS == 8:  # fp8: 2^120 moves the exponent's bias, and makes subnormal numbers normal
            size = ((stored & 0x7F).to(tl.int32) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
            q = tl.where(stored < 0, -size, size)
        else:
            q = tl.interleave(stored & 0xF, stored >> 4).to(tl.float32) - 8 if BITS == 4 else stored.to(tl.float32)
        group = first // GROUP + tl.arange(0, BLOCK_K // GROUP)[None, :]
        at, ok = n * (n_in // GROUP) + group, (n < n_out) & (group < n_in // GROUP)
        scales, zeros = scale_and_zero(tl.load(scales_ptr + at, mask=ok, other=0), PAIRS)
        q = tl.reshape(q, (BLOCK_N, BLOCK_K // GROUP, GROUP))
        w = tl.reshape(q * scales[:, :, None] + zeros[:, :, None], (BLOCK_N, BLOCK_K))
    else:
        w = stored.to(tl.float32) * tl.load(scales_ptr + n, mask=n < n_out, other=0.0)
    k = first + tl.arange(0, BLOCK_K)[None, :]
    tl.store(w_ptr + n * n_in + k, w.to(w_ptr.dtype.element_ty), mask=(n < n_out) & (k < n_in))


def written_out(x: Tensor, weight: Tensor, scales: Tensor, bits: int, group: int, pairs: int) -> Tensor:
    """The weights dequantised to x's type, `[N, K]`."""
    n_out, n_in = weight.shape[0], x.shape[1]
    w = x.new_empty(n_out, n_in)
    weight = weight.view(torch.int8) if weight.dtype == torch.float8_e4m3fn else weight
    dequantize[-(-n_out // 16), -(-n_in // 256)](weight, scales, w, n_out, n_in, bits, group, pairs, 16, 256)
    return w


def normed(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """RMSNorm of x with weights of its type or float32, rounded to its type."""
    if norm.dtype != x.dtype:  # `F.rms_norm` would warn and be slow
        return F.rms_norm(x.float(), norm.shape, norm.float(), eps).to(x.dtype)
    return F.rms_norm(x, norm.shape, norm, eps)


def plain(x, weight, bias, norm, eps, residual, activation):
    """`linear` with float weights, in PyTorch's operators."""
    y = gated(F.linear(x if norm is None else normed(x, norm, eps), weight, bias), activation)
    return y if residual is None else residual + y


def gated(y, activation):
    if not activation:
        return y
    gate, up = y.chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") if activation == "gelu_tanh" else F.silu(gate)) * up


def sorted_by_expert(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """Many rows of x times the weights `[E, N, K]` of their experts `[T, k]`, expert by expert; `[T k, N]`."""
    n_experts, each = len(weight), experts.flatten()
    order = each.argsort(stable=True)
    ends = (each[:, None] == torch.arange(n_experts, device=each.device)).sum(0).cumsum(0)
    x = x[order // (len(each) // len(x))]
    if x.dtype == torch.bfloat16:
        y = F.grouped_mm(x, weight.mT, offs=ends.int())
    else:
        parts = x.tensor_split(ends[:-1].cpu())
        y = torch.cat([F.linear(part, w) for part, w in zip(parts, weight, strict=True)])
    return torch.empty_like(y).index_copy_(0, order, y)


@functools.cache
def compiled(key: str) -> Callable[..., Tensor]:
    """`plain`, compiled for one product alone: from a copy of its code, as recompilations are limited per code."""
    one = types.FunctionType(plain.__code__.replace(), globals())
    return torch.compile(one, fullgraph=True, dynamic=False, options={"coordinate_descent_tuning": True})
