"""The GPU's kernels, in Triton: products of up to 16 rows with int8 and int4 weights, of up to 2 with float ones.

    if gpu.missing("cuda", torch.bfloat16) is None:
        y = torch.ops.fast_gpu.int4_linear(x, weight, scales, zeros)

`int8_linear` and `int4_linear` take x bfloat16 or float16 `[M, K]` and weights as files have them, and give `[M, N]`,
with one kernel that reads each weight once: up to 4 rows by multiply-adds in float32, up to 16 on the tensor cores.
More rows are a prefill: there the weights are written out as numbers for `F.linear`. K is a multiple of 32. `linear`
is for weights of x's type. No sum depends on which program comes first: equal inputs give equal bits.

They also do what surrounds a product (`model.project`): a layer of 7B int4 weights is read in some 25 us, and a kernel
of its own for norm, gates or residual costs one or two. Bias, gates and residual join the sums where these end. Of the
norm (2 rows at most) the weight multiplies the inputs on their way in, and what divides them all waits for the end.

Worth knowing: nothing here has been measured on a GPU. Triton's interpreter proves the numbers on a CPU; tile sizes
follow from what the compiler makes of the kernels for an H100 (16-byte loads, no spills, four instructions a weight).
"""

import functools
import os
import shutil
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 16  # of x; above it is a prefill
FEW_ROWS = 4  # of x, up to which a multiply-add per weight and row costs less than what the tensor cores ask for
FLOAT_ROWS = 2  # of x, up to which there is a kernel for weights of its type
FLOAT_OUTPUTS = 4  # of a program, there
NORM_ROWS = 2  # of x, up to which a kernel has registers for the norm's weight
SMS = 132  # multiprocessors of an H100, where there is none to ask


@triton.jit
def _four(t):
    """The columns of `t [A, 4]`, each `[A]`."""
    even, odd = tl.split(tl.reshape(t, (t.shape[0], 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _eight(t):
    """The columns of `t [A, 8]`, each `[A]`."""
    even, odd = tl.split(tl.reshape(t, (t.shape[0], 4, 2)))
    a, c, e, g = _four(even)
    b, d, f, h = _four(odd)
    return a, b, c, d, e, f, g, h


@triton.jit
def _plus(tensors, i: tl.constexpr, more):
    """The tuple `tensors` with `more` added to the one at i."""
    changed = ()
    for at in tl.static_range(len(tensors)):
        changed = changed + (tensors[at] + more if at == i else tensors[at],)
    return changed


@triton.jit
def _gate(gate, up):
    return gate * tl.sigmoid(gate) * up


@triton.jit
def _multiply_few(
    x_ptr,  # [rows, K]
    words_ptr,  # [N, K * BITS / 32], the stored weights as 32-bit words
    scales_ptr,  # int8: [N]; int4: [N, K / GROUP]
    zeros_ptr,  # int4: [N, K / GROUP]
    bias_ptr,  # [N] or None
    norm_ptr,  # [K] or None
    residual_ptr,  # like y, or None
    y_ptr,  # [rows, N], or of gates and what they let through [rows, N / 2]
    rows,
    n_out,
    exponent,  # the bits of the float 2^BITS
    eps,
    n_chunks: tl.constexpr,  # of 16 bytes in a row of weights
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GATED: tl.constexpr,  # 1: N is N, 2: every second of a program's outputs belongs to the gate before it
    ROWS: tl.constexpr,  # rows, rounded up to a power of two
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,  # of a row that are read at once: one per thread
):
    """`y = x W^T`: a program makes BLOCK_N outputs for all rows of x, a thread reads 16 bytes of weights at a time.

    A stored weight u of b bits becomes a float without a conversion: put at the top of the mantissa under the exponent
    of 2^b it is 2^b + u. What that adds, and the zero, the sum of the inputs takes off. The exponent is an argument
    because the compiler spends two instructions on masking with one constant and merging with another.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    OFFSET: tl.constexpr = 24 if BITS == 4 else 384  # 2^b, and what u lies above the signed value
    exponent = exponent.to(tl.uint32, bitcast=True)
    n_y = n_out // GATED
    first_n = tl.program_id(0) * (BLOCK_N // GATED)
    # One tensor for each output and row, so that a thread keeps its chunk: nothing changes hands before the last sum.
    totals = (tl.zeros((CHUNKS,), tl.float32),) * (BLOCK_N * ROWS)
    squares = (tl.zeros((CHUNKS,), tl.float32),) * ROWS
    for first in range(0, n_chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        words = ()
        for b in tl.static_range(BLOCK_N):
            n = first_n + b // GATED + b % GATED * n_y
            at = (n * n_chunks + chunk)[:, None] * 4 + tl.arange(0, 4)[None, :]
            ok = chunk < tl.where(first_n + b // GATED < n_y, n_chunks, 0)
            stored = tl.load(words_ptr + at, mask=ok[:, None], other=0)
            stored = stored.to(tl.uint32, bitcast=True)
            words = words + _four(stored if BITS == 4 else stored ^ 0x80808080)  # 4 times [CHUNKS]
        dots = (tl.zeros((CHUNKS,), tl.float32),) * (BLOCK_N * ROWS)
        x_sums = (tl.zeros((CHUNKS,), tl.float32),) * ROWS
        for i in tl.static_range(4):
            k = (chunk * 4 + i)[:, None] * PER_WORD + tl.arange(0, PER_WORD)[None, :]
            if norm_ptr is not None:
                norm = tl.load(norm_ptr + k, mask=(chunk < n_chunks)[:, None], other=0.0).to(tl.float32)
                norm = _eight(norm) if BITS == 4 else _four(norm)
            for r in tl.static_range(ROWS):
                ok = chunk < tl.where(r < rows, n_chunks, 0)
                x = tl.load(x_ptr + r * (n_chunks * 4 * PER_WORD) + k, mask=ok[:, None], other=0.0).to(tl.float32)
                x = _eight(x) if BITS == 4 else _four(x)  # PER_WORD times [CHUNKS]
                for j in tl.static_range(PER_WORD):
                    x_j = x[j]
                    if norm_ptr is not None:
                        squares = _plus(squares, r, x_j * x_j)
                        x_j *= norm[j]
                    x_sums = _plus(x_sums, r, x_j)
                    for b in tl.static_range(BLOCK_N):
                        w = ((words[4 * b + i] >> (j * BITS)) & ((1 << BITS) - 1)) << (23 - BITS) | exponent
                        dots = _plus(dots, b * ROWS + r, w.to(tl.float32, bitcast=True) * x_j)
        for b in tl.static_range(BLOCK_N):
            if BITS == 4:
                n = first_n + b // GATED + b % GATED * n_y
                group = n * (n_chunks * 32 // GROUP) + chunk * 32 // GROUP
                ok = chunk < tl.where(first_n + b // GATED < n_y, n_chunks, 0)
                scales = tl.load(scales_ptr + group, mask=ok, other=0.0).to(tl.float32)
                zeros = tl.load(zeros_ptr + group, mask=ok, other=0.0).to(tl.float32)
                for r in tl.static_range(ROWS):
                    part = dots[b * ROWS + r] * scales + x_sums[r] * (zeros - OFFSET * scales)
                    totals = _plus(totals, b * ROWS + r, part)
            else:
                for r in tl.static_range(ROWS):
                    totals = _plus(totals, b * ROWS + r, dots[b * ROWS + r] - OFFSET * x_sums[r])
    for r in tl.static_range(ROWS):
        factor = 1.0
        if norm_ptr is not None:
            factor = tl.rsqrt(tl.sum(squares[r]) / (n_chunks * 4 * PER_WORD) + eps)
        for b in tl.static_range(0, BLOCK_N, GATED):
            n = first_n + b // GATED
            if n < n_y:
                y = _whole(totals[b * ROWS + r], factor, scales_ptr, bias_ptr, n, BITS)
                if GATED == 2:
                    y = _gate(y, _whole(totals[(b + 1) * ROWS + r], factor, scales_ptr, bias_ptr, n_y + n, BITS))
                if residual_ptr is not None:
                    y += tl.load(residual_ptr + r * n_y + n, mask=r < rows, other=0.0).to(tl.float32)
                tl.store(y_ptr + r * n_y + n, y.to(y_ptr.dtype.element_ty), mask=r < rows)


@triton.jit
def _whole(total, factor, scales_ptr, bias_ptr, n, BITS: tl.constexpr):
    """Output n of a row, from its threads' parts."""
    y = tl.sum(total) * factor
    if BITS == 8:
        y *= tl.load(scales_ptr + n)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n).to(tl.float32)
    return y


@triton.jit
def _multiply_float(
    x_ptr,  # [ROWS, K]
    weight_ptr,  # [N, K], of x's type
    bias_ptr,  # [N] or None
    norm_ptr,  # [K] or None
    residual_ptr,  # like y, or None
    y_ptr,  # [ROWS, N], or of gates and what they let through [ROWS, N / 2]
    n_out,
    eps,
    n_in: tl.constexpr,
    GATED: tl.constexpr,  # as in `_multiply_few`
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # 16 bytes for each thread
):
    """`y = x W^T` for few rows: a program makes BLOCK_N outputs for all of them."""
    n_y = n_out // GATED
    lane = tl.arange(0, BLOCK_N)
    n = tl.program_id(0) * (BLOCK_N // GATED) + lane // GATED
    n_ok = n < n_y
    n = n + lane % GATED * n_y
    at = n[:, None].to(tl.int64) * n_in
    totals = (tl.zeros((BLOCK_N, BLOCK_K), tl.float32),) * ROWS
    squares = (tl.zeros((1, BLOCK_K), tl.float32),) * ROWS
    for first in range(0, n_in, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        w = tl.load(weight_ptr + at + k, mask=n_ok[:, None] & (k < n_in), other=0.0).to(tl.float32)
        if norm_ptr is not None:
            norm = tl.load(norm_ptr + k, mask=k < n_in, other=0.0).to(tl.float32)
        for r in tl.static_range(ROWS):
            x = tl.load(x_ptr + r * n_in + k, mask=k < n_in, other=0.0).to(tl.float32)
            if norm_ptr is not None:
                squares = _plus(squares, r, x * x)
                x *= norm
            totals = _plus(totals, r, w * x)
    for r in tl.static_range(ROWS):
        y = tl.sum(totals[r], 1)
        if norm_ptr is not None:
            y *= tl.rsqrt(tl.sum(squares[r]) / n_in + eps)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(tl.float32)
        if GATED == 2:
            gate, up = tl.split(tl.reshape(y, (BLOCK_N // 2, 2)))
            y = _gate(gate, up)
        to = tl.program_id(0) * (BLOCK_N // GATED) + tl.arange(0, BLOCK_N // GATED)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + r * n_y + to, mask=to < n_y, other=0.0).to(tl.float32)
        tl.store(y_ptr + r * n_y + to, y.to(y_ptr.dtype.element_ty), mask=to < n_y)


@triton.jit
def _weights(
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    n,
    first,
    n_out,
    n_in: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The float32 weights of the outputs `n [B]` for SIZE inputs from each of `first [S]` on, `[S, B, SIZE]`.

    SIZE divides GROUP or is a multiple of it. int8 weights come without their scale.
    """
    n = n[None, :, None]
    n_bytes = n_in * BITS // 8
    at = (first * BITS // 8)[:, None, None] + tl.arange(0, SIZE * BITS // 8)[None, None, :]
    stored = tl.load(weight_ptr + n.to(tl.int64) * n_bytes + at, mask=(n < n_out) & (at < n_bytes), other=0)
    if BITS == 4:
        q = tl.interleave(stored & 0xF, stored >> 4).to(tl.float32) - 8
        PART: tl.constexpr = GROUP if GROUP < SIZE else SIZE  # of a group
        n_groups = n_in // GROUP
        group = (first[:, None, None] + (tl.arange(0, SIZE // PART) * PART)[None, None, :]) // GROUP
        ok = (n < n_out) & (group < n_groups)
        scales = tl.load(scales_ptr + n * n_groups + group, mask=ok, other=0.0).to(tl.float32)
        zeros = tl.load(zeros_ptr + n * n_groups + group, mask=ok, other=0.0).to(tl.float32)
        w = tl.reshape(q, (q.shape[0], q.shape[1], SIZE // PART, PART)) * scales[:, :, :, None] + zeros[:, :, :, None]
        w = tl.reshape(w, q.shape)
    else:
        w = stored.to(tl.float32)
    return w


@triton.jit
def _multiply_more(
    x_ptr,  # [rows, K]
    weight_ptr,  # [N, K * BITS / 8], as stored
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    rows,
    n_out,
    n_in: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """`y = x W^T` for up to 16 rows on the tensor cores. Each of a program's SPLITS warps sums over a share of K.

    Bias, gates and residual as in `_multiply_few`, but the outputs of all gates come before those of what they let
    through.
    """
    WIDTH: tl.constexpr = BLOCK_N // GATED  # outputs of y
    n_y = n_out // GATED
    lane = tl.arange(0, BLOCK_N)
    n = tl.program_id(0) * WIDTH + lane % WIDTH + lane // WIDTH * n_y
    row = tl.arange(0, 16)[None, :, None]
    steps: tl.constexpr = (n_in + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    total = tl.zeros((SPLITS, BLOCK_N, 16), tl.float32)
    for step in range(steps):
        first = (tl.arange(0, SPLITS) * steps + step) * BLOCK_K
        w = _weights(weight_ptr, scales_ptr, zeros_ptr, n, first, n_out, n_in, BITS, GROUP, BLOCK_K).to(dtype)
        k = first[:, None, None] + tl.arange(0, BLOCK_K)[None, None, :]
        x = tl.load(x_ptr + row * n_in + k, mask=(row < rows) & (k < n_in), other=0.0)  # [SPLITS, 16, BLOCK_K]
        total = tl.dot(w, tl.permute(x, (0, 2, 1)), total)
    y = tl.sum(total, 0)  # [BLOCK_N, 16]
    if BITS == 8:
        y *= tl.load(scales_ptr + n, mask=n < n_out, other=0.0)[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < n_out, other=0.0).to(tl.float32)[:, None]
    if GATED == 2:
        gate, up = tl.split(tl.permute(tl.reshape(y, (2, WIDTH, 16)), (1, 2, 0)))
        y = _gate(gate, up)
    n = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    row = tl.arange(0, 16)
    at, ok = row[None, :] * n_y + n[:, None], (n < n_y)[:, None] & (row < rows)[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(dtype), mask=ok)


@triton.jit
def _dequantize(
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    w_ptr,  # [N, K]
    n_out,
    n_in: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the weights out as numbers."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_K + tl.arange(0, 1)
    w = _weights(weight_ptr, scales_ptr, zeros_ptr, n, first, n_out, n_in, BITS, GROUP, BLOCK_K)
    n = n[None, :, None]
    k = (first[:, None] + tl.arange(0, BLOCK_K)[None, :])[:, None, :]
    if BITS == 8:
        w *= tl.load(scales_ptr + n, mask=n < n_out, other=0.0)
    tl.store(w_ptr + n.to(tl.int64) * n_in + k, w.to(w_ptr.dtype.element_ty), mask=(n < n_out) & (k < n_in))


@functools.cache
def missing(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why there are no kernels for activations in `dtype` on this GPU, in one line, or None: two small ones ran."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"a GPU's kernels take bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"a GPU's kernels need compute capability 8.0, {device} has less"
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["clang", "gcc"]  # Triton's choice, for its launchers
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not any(map(shutil.which, compilers)) or not headers.exists():
        return f"a GPU's kernels need a C compiler ({' or '.join(compilers)}) and Python's headers"
    try:
        from kernels import gpu_attention

        gpu_attention.try_out(device, dtype)
        x, weight = (torch.zeros(1, 64, device=device, dtype=kind) for kind in (dtype, torch.int8))
        int8_linear(x, weight, torch.zeros(1, device=device))
        torch.cuda.synchronize(device)
    except Exception as error:  # of any kind: what Triton, the driver or the chip does not take
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"a GPU's kernels fail on {torch.cuda.get_device_name(device)}: {reason}"
    return None


@torch.library.custom_op("fast_gpu::int8_linear", mutates_args=())
def int8_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`x W^T`, `[M, N]`, for x `[M, K]` and int8 weights `[N, K]` with scales `[N]`; the rest as in `model.project`."""
    with torch.cuda.device_of(x):
        return _linear(x, weight, scales, scales, 8, bias, norm, eps, residual, gated)


@torch.library.custom_op("fast_gpu::int4_linear", mutates_args=())
def int4_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`x W^T` for x `[M, K]` and 4-bit weights `[N, K / 2]`, scales and zeros `[N, K / G]`; else as `int8_linear`."""
    with torch.cuda.device_of(x):
        return _linear(x, weight, scales, zeros, 4, bias, norm, eps, residual, gated)


@torch.library.custom_op("fast_gpu::linear", mutates_args=())
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`x W^T`, `[M, N]`, for x `[M, K]` of 1 or 2 rows and weights `[N, K]` of its type; else as `int8_linear`."""
    (rows, n_in), n_out, gates = x.shape, weight.shape[0], 2 if gated else 1
    if rows > FLOAT_ROWS or weight.shape[1] != n_in:
        raise ValueError(f"x is {rows} x {n_in}: this takes {FLOAT_ROWS} rows at most, of {weight.shape[1]}")
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    y = x.new_empty(rows, n_out // gates)
    with torch.cuda.device_of(x):
        _multiply_float[-(-n_out // FLOAT_OUTPUTS),](
            x, weight, bias, norm, residual, y, n_out, eps, n_in, gates, rows, FLOAT_OUTPUTS, 1024, num_warps=4
        )
    return y


@linear.register_fake
def _linear_fake(x, weight, bias=None, norm=None, eps=0.0, residual=None, gated=False):
    return x.new_empty(x.shape[0], weight.shape[0] // (2 if gated else 1))


@int8_linear.register_fake
def _int8_fake(x, weight, scales, *around, **named):
    return _linear_fake(x, weight, *around, **named)


@int4_linear.register_fake
def _int4_fake(x, weight, scales, zeros, *around, **named):
    return _linear_fake(x, weight, *around, **named)


def _linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    (rows, n_in), n_out = x.shape, weight.shape[0]
    if weight.shape[1] * 8 != n_in * bits or n_in % 32:
        raise ValueError(f"x has {n_in} columns, the weight {weight.shape[1] * 8 // bits}, and 32 must divide them")
    if gated and n_out % 2:
        raise ValueError(f"gates are as many as what they let through, not half of {n_out}")
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    if norm is not None and rows > NORM_ROWS:
        x, norm = F.rms_norm(x, (n_in,), norm, eps), None
    shape = {"BITS": bits, "GROUP": n_in // scales.shape[1] if bits == 4 else 32}
    if rows > MAX_ROWS:
        w = x.new_empty(n_out, n_in)
        _dequantize[-(-n_out // 16), -(-n_in // 256)](
            weight, scales, zeros, w, n_out, n_in, **shape, BLOCK_N=16, BLOCK_K=256
        )
        y = F.linear(x, w, bias)
        if gated:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        return y if residual is None else y.add_(residual)
    shape["GATED"] = 2 if gated else 1
    y = x.new_empty(rows, n_out // shape["GATED"])
    if rows <= FEW_ROWS:
        n_chunks = n_in * bits // 128
        warps, block = few_rows_tiles(n_out, n_chunks, multiprocessors(x.device))
        block = max(block, shape["GATED"])
        _multiply_few[-(-n_out // block),](
            x, weight.view(torch.int32), scales, zeros, bias, norm, residual, y, rows, n_out, (127 + bits) << 23, eps,
            n_chunks, **shape, ROWS=1 << (rows - 1).bit_length(), BLOCK_N=block, CHUNKS=32 * warps, num_warps=warps,
        )  # fmt: skip
    else:
        warps = 8 if n_in >= 2048 else 2
        _multiply_more[-(-n_out // 16),](
            x, weight, scales, zeros, bias, residual, y, rows, n_out, n_in, **shape,
            BLOCK_N=16, BLOCK_K=128, SPLITS=warps, num_warps=warps,
        )  # fmt: skip
    return y


def few_rows_tiles(n_out: int, n_chunks: int, multiprocessors: int) -> tuple[int, int]:
    """Warps of a program and outputs that it makes, for rows of so many 16-byte chunks. Reasoned, not measured.

    As many warps as leave the fewest threads without a chunk in the last turn; as many outputs, which share the inputs'
    way through the caches, as leave every multiprocessor four programs.
    """
    warps = min((4, 2, 1), key=lambda w: -(-n_chunks // (32 * w)) * w)
    outputs = next((b for b in (4, 2) if n_out >= 4 * multiprocessors * b), 1)
    return warps, outputs


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else SMS
