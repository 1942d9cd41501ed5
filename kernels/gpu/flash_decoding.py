"""Attention for a few new positions on a GPU, in Triton: RoPE, writing to the KV cache, the softmax over its slots.

    y = torch.ops.fast_gpu.decode_attention(qkv, cos, sin, positions, 0, True, None, None, 0.0, *cache.buffers())

One program per key head would be 8 to 32 programs for a row, too few for a GPU: so several programs share a head's
slots, and a second kernel combines their results (Flash-Decoding, Dao et al. 2023). Each program applies RoPE to the
queries itself, a few kilobytes; the last also applies it to the new keys, stores them and the new values, and attends
to them without reading them back. The number of valid slots is read on the device, so one CUDA graph serves every
length of text and reads no more than is valid.

Worth knowing: PyTorch would need 5 to 7 launches a layer for a float cache instead of 2. It would dequantise an int8 or
fp8 cache to memory and read it again, at least three times the bytes.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.choice import fastest
from kernels.gpu.products import let_overlap, multiprocessors, overlapping

BLOCK = 64  # slots at a time
MAX_POSITIONS = 16  # new positions per row


@triton.jit
def _rotated(qkv_ptr, at, row_ok, norm_ptr, eps, cos_ptr, sin_ptr, token, D: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Both halves, `[R, D / 2]`, of the heads at `at [R]`, after RMSNorm, if any, and RoPE by rows `token [R]`."""
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, BLOCK_HALF)
    d_ok = d < HALF
    ok = row_ok[:, None] & d_ok[None, :]
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    left = tl.load(qkv_ptr + at[:, None] + d[None, :], mask=ok, other=0.0).to(tl.float32)
    right = tl.load(qkv_ptr + at[:, None] + HALF + d[None, :], mask=ok, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        factor = tl.rsqrt(tl.sum(left * left + right * right, 1) / D + eps)[:, None]
        left *= factor * tl.load(norm_ptr + d, mask=d_ok, other=0.0).to(tl.float32)[None, :]
        right *= factor * tl.load(norm_ptr + HALF + d, mask=d_ok, other=0.0).to(tl.float32)[None, :]
        left, right = left.to(dtype).to(tl.float32), right.to(dtype).to(tl.float32)
    cos = tl.load(cos_ptr + token[:, None] * HALF + d[None, :], mask=ok, other=0.0)
    sin = tl.load(sin_ptr + token[:, None] * HALF + d[None, :], mask=ok, other=0.0)
    return (left * cos - right * sin).to(dtype), (right * cos + left * sin).to(dtype)


@triton.jit
def _scales(peaks, KIND: tl.constexpr):
    """As `fast.quantized.quantize_kv`: scales that map the largest elements, `peaks`, to the limit of int8 or fp8."""
    LIMIT: tl.constexpr = 127.0 if KIND == tl.int8 else 448.0
    return tl.div_rn(tl.maximum(peaks, 1e-30), tl.full(peaks.shape, LIMIT, tl.float32))


@triton.jit
def _quantized(x, scales, KIND: tl.constexpr):
    q = tl.div_rn(x.to(tl.float32), tl.broadcast_to(scales[:, None], x.shape))
    if KIND == tl.int8:
        q = (q + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum has no bits for a fraction, so it rounds half to even
    return q.to(KIND)


@triton.jit
def _attend(q_left, q_right, k_left, k_right, v, k_scales, v_scales, visible, peak, total, sums, scale):
    """Add L slots, masked by `visible [R, L]`, to an online softmax: its peak and total `[R]` and its sums `[R, D]`.

    A quantised cache is passed as stored: keys are exact in q's type, and their scales multiply the scores; values are
    multiplied by theirs before they are rounded to that type, because weight times scale may underflow in float16.
    """
    dtype = q_left.dtype
    scores = tl.dot(q_left, tl.trans(k_left.to(dtype)))
    scores = tl.dot(q_right, tl.trans(k_right.to(dtype)), scores) * scale
    if k_scales is not None:
        scores *= k_scales[None, :]
        v = v.to(tl.float32) * v_scales[:, None]
    scores = tl.where(visible, scores, -1e30)
    higher = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.where(visible, tl.exp(scores - higher[:, None]), 0.0)
    kept = tl.exp(peak - higher)
    total = total * kept + tl.sum(weights, 1)
    return higher, total, tl.dot(weights.to(dtype), v.to(dtype), sums * kept[:, None])


@triton.jit
def _attend_share(
    qkv_ptr,  # [B, S, (H + 2 KV) * D]
    cos_ptr,  # [B, S, D / 2]
    sin_ptr,
    positions_ptr,  # [B, S]
    q_norm_ptr,  # [D] or None
    k_norm_ptr,
    k_ptr,  # [B or more, KV, L, D]
    v_ptr,
    k_scales_ptr,  # [B or more, KV, L], or None where k and v are of qkv's type
    v_scales_ptr,
    sums_ptr,  # [B, KV, SPLITS, H / KV * S, D], the share's weighted sum of values
    peaks_ptr,  # [B, KV, SPLITS, H / KV * S], its highest score
    totals_ptr,  # its sum of weights
    scale,
    eps,
    n_slots,  # L
    S,
    KV: tl.constexpr,
    HEADS: tl.constexpr,  # query heads per key head
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    NEW: tl.constexpr,  # the largest S
    BLOCK_D: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Attention of all queries of one key head, HEADS times S rows, to this program's share of the valid slots."""
    HALF: tl.constexpr = D // 2
    WIDTH: tl.constexpr = (HEADS + 2) * KV * D
    KIND: tl.constexpr = k_ptr.dtype.element_ty
    batch, head, split = tl.program_id(0) // KV, tl.program_id(0) % KV, tl.program_id(1)
    let_overlap(OVERLAP)
    n_cached = tl.load(positions_ptr + batch * S).to(tl.int32)
    row, d, half = tl.arange(0, ROWS), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_HALF)
    row_ok, d_ok, half_ok = row < HEADS * S, d < D, half < HALF
    token, last_seen = batch * S + row % S, row * 0 + S - 1  # of the new positions
    if CAUSAL:
        last_seen = row % S
    q_at = token * WIDTH + (head * HEADS + row // S) * D
    q_left, q_right = _rotated(qkv_ptr, q_at, row_ok, q_norm_ptr, eps, cos_ptr, sin_ptr, token, D, BLOCK_HALF)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(n_cached - WINDOW + 1, 0)
    share = tl.cdiv(n_cached - first, SPLITS * BLOCK) * BLOCK
    first += split * share
    end = tl.minimum(first + share, n_cached)
    slot_0 = tl.program_id(0).to(tl.int64) * n_slots
    peak = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(first, end, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        slot_ok = slot < end
        at = (slot_0 + slot)[:, None] * D
        k_left = tl.load(k_ptr + at + half[None, :], mask=slot_ok[:, None] & half_ok[None, :], other=0.0)
        k_right = tl.load(k_ptr + at + HALF + half[None, :], mask=slot_ok[:, None] & half_ok[None, :], other=0.0)
        v = tl.load(v_ptr + at + d[None, :], mask=slot_ok[:, None] & d_ok[None, :], other=0.0)
        k_scales = None
        v_scales = None
        if k_scales_ptr is not None:
            k_scales = tl.load(k_scales_ptr + slot_0 + slot, mask=slot_ok, other=0.0)
            v_scales = tl.load(v_scales_ptr + slot_0 + slot, mask=slot_ok, other=0.0)
        visible = slot_ok[None, :] & row_ok[:, None]
        if WINDOW > 0:
            visible = visible & (slot[None, :] > n_cached + last_seen[:, None] - WINDOW)
        peak, total, sums = _attend(
            q_left, q_right, k_left, k_right, v, k_scales, v_scales, visible, peak, total, sums, scale
        )
    if split == SPLITS - 1:
        new = tl.arange(0, NEW)
        new_ok, new_token = new < S, batch * S + new
        new_at = new_token * WIDTH + (KV * HEADS + head) * D
        new_left, new_right = _rotated(
            qkv_ptr, new_at, new_ok, k_norm_ptr, eps, cos_ptr, sin_ptr, new_token, D, BLOCK_HALF
        )
        new_v = tl.load(
            qkv_ptr + new_at[:, None] + KV * D + d[None, :], mask=new_ok[:, None] & d_ok[None, :], other=0.0
        )
        new_k_scales = None
        new_v_scales = None
        to = slot_0 + n_cached + new
        if k_scales_ptr is not None:
            left, right = tl.abs(new_left.to(tl.float32)), tl.abs(new_right.to(tl.float32))
            new_k_scales = _scales(tl.maximum(tl.max(left, 1), tl.max(right, 1)), KIND)
            new_v_scales = _scales(tl.max(tl.abs(new_v.to(tl.float32)), 1), KIND)
            new_left, new_right = _quantized(new_left, new_k_scales, KIND), _quantized(new_right, new_k_scales, KIND)
            new_v = _quantized(new_v, new_v_scales, KIND)
            tl.store(k_scales_ptr + to, new_k_scales, mask=new_ok)
            tl.store(v_scales_ptr + to, new_v_scales, mask=new_ok)
        tl.store(k_ptr + to[:, None] * D + half[None, :], new_left, mask=new_ok[:, None] & half_ok[None, :])
        tl.store(k_ptr + to[:, None] * D + HALF + half[None, :], new_right, mask=new_ok[:, None] & half_ok[None, :])
        tl.store(v_ptr + to[:, None] * D + d[None, :], new_v, mask=new_ok[:, None] & d_ok[None, :])
        new_seen = row_ok[:, None] & (new[None, :] <= last_seen[:, None])
        if WINDOW > 0:
            new_seen = new_seen & (new[None, :] > last_seen[:, None] - WINDOW)
        peak, total, sums = _attend(
            q_left, q_right, new_left, new_right, new_v, new_k_scales, new_v_scales, new_seen, peak, total, sums, scale
        )
    found = (tl.program_id(0) * SPLITS + split) * (HEADS * S) + row
    tl.store(peaks_ptr + found, peak, mask=row_ok)
    tl.store(totals_ptr + found, total, mask=row_ok)
    if (first < end) | (split == SPLITS - 1):  # an empty share stores only its total, 0, and its peak
        tl.store(sums_ptr + found[:, None] * D + d[None, :], sums, mask=row_ok[:, None] & d_ok[None, :])


@triton.jit
def _join_shares(
    sums_ptr,
    peaks_ptr,
    totals_ptr,
    y_ptr,  # [B, S, H, D]
    S,
    KV: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Combine the results of all shares for one row."""
    group, row = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    at = (group * SPLITS + tl.arange(0, SPLITS)) * (HEADS * S) + row
    let_overlap(OVERLAP)
    peaks = tl.load(peaks_ptr + at)
    totals, kept = tl.load(totals_ptr + at), tl.exp(peaks - tl.max(peaks, 0))
    ok = (totals > 0)[:, None] & (d < D)[None, :]
    sums = tl.load(sums_ptr + at[:, None] * D + d[None, :], mask=ok, other=0.0)
    y = tl.sum(sums * kept[:, None], 0) / tl.sum(totals * kept, 0)
    y_row = (group // KV * S + row % S) * (KV * HEADS) + group % KV * HEADS + row // S
    tl.store(y_ptr + y_row * D + d, y.to(y_ptr.dtype.element_ty), mask=d < D)


# Before torch 2.14 a nested_compile_region cannot contain an operator that declares what it mutates. There nothing is
# declared. That is safe: a compiled step uses the caches only here, and each call's inputs depend on the call before.
STORED = ("k", "v", "k_scales", "v_scales") if torch.__version__ >= (2, 14) else ()


@torch.library.custom_op("fast_gpu::decode_attention", mutates_args=STORED)
def decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    window: int,
    is_causal: bool,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k: Tensor,
    v: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Attention, `[B, S, H * D]`, of `qkv [B, S, (H + 2 KV) * D]`: every head's query, then the keys, then the values.

    `positions [B, S]`, S <= 16, are consecutive along S. RoPE rotates queries and keys by `cos` and `sin`, float32
    `[B, S, D / 2]`, after RMSNorm with the weights `q_norm` and `k_norm` `[D]`, if given. Keys and values are stored at
    their positions in the whole cache, `k`, `v` `[B or more, KV, L, D]` of qkv's type, or int8 or fp8 with float32
    scales `[B or more, KV, L]`. A query sees the slots up to its position, or if not `is_causal` what the last one
    sees; with a `window`, only so many of them.
    Positions are not checked against the cache's size.
    """
    (B, S, width), (_, KV, L, D) = qkv.shape, k.shape
    assert S <= MAX_POSITIONS
    assert k.is_contiguous()
    assert v.is_contiguous()
    H = width // D - 2 * KV
    rows = H // KV * S
    ways = ways_of(B * KV, multiprocessors(qkv.device), block_of(rows, D))

    def at_the_end() -> Tensor:
        """The call at the end of the cache, where it takes longest. Later tokens overwrite what it stores there."""
        last = positions + (L - S - positions[:, :1])
        return decode_attention(qkv, cos, sin, last, window, is_causal, q_norm, k_norm, eps, k, v, k_scales, v_scales)

    key = f"attention of {B} x {KV} heads, {rows} rows, {k.dtype} {D} wide, below {1 << L.bit_length()} slots"
    key += f", a window of {window}" if window else ""
    splits, block = fastest(key, ways, again=at_the_end)
    found = qkv.new_empty(B * KV * splits * rows, D + 2, dtype=torch.float32)
    peaks, totals, sums = found.view(-1).split((found.shape[0], found.shape[0], found.shape[0] * D))
    y = qkv.new_empty(B, S, H * D)
    shape = {"KV": KV, "HEADS": H // KV, "D": D, "BLOCK_D": triton.next_power_of_2(D), "SPLITS": splits}
    shape |= overlapping()
    with torch.cuda.device_of(qkv):
        _attend_share[B * KV, splits](
            *(x.contiguous() for x in (qkv, cos, sin, positions)), q_norm, k_norm, k, v, k_scales, v_scales, sums,
            peaks, totals, D**-0.5, eps, L, S, **shape, WINDOW=window, CAUSAL=is_causal, NEW=MAX_POSITIONS,
            ROWS=max(16, triton.next_power_of_2(rows)), BLOCK_HALF=max(16, triton.next_power_of_2(D // 2)),
            BLOCK=block, num_warps=4 if rows <= 32 else 8,
        )  # fmt: skip
        _join_shares[B * KV, rows](sums, peaks, totals, y, S, **shape)
    return y


@decode_attention.register_fake
def _fake(qkv, cos, sin, positions, window, is_causal, q_norm, k_norm, eps, k, *others):
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] - 2 * k.shape[1] * k.shape[3])


def block_of(rows: int, D: int) -> int:
    """Slots at a time, at most: more would not fit every GPU's shared memory."""
    block, most = (BLOCK, 128) if D <= 128 else (BLOCK // 2, 32)
    return block if rows <= most else block // 2


@functools.cache
def ways_of(n_heads: int, multiprocessors: int, block: int) -> dict[str, tuple[int, int]]:
    """By name, the ways worth timing: programs that share a key head's slots, and slots that each takes at a time.

    n_heads: key heads of all rows. The first way, the default, is not measured: four programs per multiprocessor.
    """
    shares = [min(64, 1 << max(0, (n * multiprocessors // n_heads).bit_length() - 1)) for n in (4, 2, 8)]
    every = [(splits, size) for size in (block, max(16, block // 2)) for splits in shares]
    return {f"{splits} programs a head, {size} slots at a time": (splits, size) for splits, size in every}
