"""A GPU's attention over the KV cache for a few positions, in Triton: the valid slots are divided among programs.

    y = torch.ops.fast_gpu.decode_attention(q, k, v, positions, window, k_scales, v_scales)

One query has a key head for each of 8 to 32 programs at most, too few for a GPU: so many programs share a head's slots,
and a second kernel joins what they found (Flash-Decoding, Dao et al. 2023). How many slots are valid is read on the
device: one recording in a CUDA graph serves every length and reads no more than is valid.

Worth knowing: unmeasured on a GPU and proven in Triton's interpreter. Hence the model uses it for an int8 or fp8 cache
alone: without it PyTorch would write that out in the queries' type and read it again, at three times the bytes or more,
while for a float cache there is SDPA, which others have measured.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import gpu

BLOCK = 64  # slots at a time


@triton.jit
def _attend_share(
    q_ptr,  # [B, H, S, D]
    k_ptr,  # [B, KV, L, D]
    v_ptr,
    k_scales_ptr,  # [B, KV, L], or None where k and v are of q's type
    v_scales_ptr,
    positions_ptr,  # [B, S]
    sums_ptr,  # [B, KV, SPLITS, H / KV * S, D], the share's weighted sum of values
    peaks_ptr,  # [B, KV, SPLITS, H / KV * S], its highest score
    totals_ptr,  # its sum of weights
    scale,
    q_batch,  # strides, here and below
    q_head,
    q_row,
    cache_batch,
    cache_head,
    cache_slot,
    scales_batch,
    scales_head,
    KV: tl.constexpr,
    HEADS: tl.constexpr,  # query heads of a key head
    S: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The softmax, over a share of the valid slots, of all queries that look at one key head: HEADS times S rows.

    Of a quantised cache the stored bytes are read: keys are exact in q's type, their scales multiply the scores; values
    are multiplied by theirs before they are rounded to it, for a weight times a scale may be too small for float16.
    """
    batch, head = tl.program_id(0) // KV, tl.program_id(0) % KV
    row = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    row_ok, d_ok = row < HEADS * S, d < D
    position = tl.load(positions_ptr + batch * S + row % S).to(tl.int32)
    first, end = 0, tl.max(position, 0) + 1
    if WINDOW > 0:
        first = tl.maximum(tl.min(position, 0) - WINDOW + 1, 0)
    share = tl.cdiv(end - first, SPLITS * BLOCK) * BLOCK
    first += tl.program_id(1) * share
    end = tl.minimum(first + share, end)
    q_at = batch * q_batch + (head * HEADS + row // S) * q_head + row % S * q_row
    q = tl.load(q_ptr + q_at[:, None] + d[None, :], mask=row_ok[:, None] & d_ok[None, :], other=0.0)
    cache_at = batch.to(tl.int64) * cache_batch + head * cache_head
    scales_at = batch.to(tl.int64) * scales_batch + head * scales_head
    peak = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(first, end, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        at = cache_at + slot[:, None] * cache_slot + d[None, :]
        ok = (slot < end)[:, None] & d_ok[None, :]
        k = tl.load(k_ptr + at, mask=ok, other=0.0)
        v = tl.load(v_ptr + at, mask=ok, other=0.0)
        seen = (slot < end)[None, :] & (slot[None, :] <= position[:, None])
        if WINDOW > 0:
            seen = seen & (slot[None, :] > position[:, None] - WINDOW)
        scores = tl.dot(q, tl.trans(k.to(q.dtype))) * scale
        if k_scales_ptr is not None:
            scores *= tl.load(k_scales_ptr + scales_at + slot, mask=slot < end, other=0.0)[None, :]
            v = v.to(tl.float32) * tl.load(v_scales_ptr + scales_at + slot, mask=slot < end, other=0.0)[:, None]
        v = v.to(q.dtype)
        scores = tl.where(seen, scores, -1e30)
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.where(seen, tl.exp(scores - higher[:, None]), 0.0)
        kept = tl.exp(peak - higher)
        total = total * kept + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * kept[:, None])
        peak = higher
    at = (tl.program_id(0) * SPLITS + tl.program_id(1)) * (HEADS * S) + row
    tl.store(peaks_ptr + at, peak, mask=row_ok)
    tl.store(totals_ptr + at, total, mask=row_ok)
    tl.store(sums_ptr + at[:, None] * D + d[None, :], sums, mask=row_ok[:, None] & d_ok[None, :])


@triton.jit
def _join_shares(
    sums_ptr,
    peaks_ptr,
    totals_ptr,
    y_ptr,  # [B, S, H, D]
    KV: tl.constexpr,
    HEADS: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One row of the result, from what every share found for it."""
    group, row = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    at = (group * SPLITS + tl.arange(0, SPLITS)) * (HEADS * S) + row
    peaks = tl.load(peaks_ptr + at)
    kept = tl.exp(peaks - tl.max(peaks, 0))
    total = tl.sum(tl.load(totals_ptr + at) * kept, 0)
    sums = tl.load(sums_ptr + at[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    y = tl.sum(sums * kept[:, None], 0) / total
    y_row = (group // KV * S + row % S) * (KV * HEADS) + group % KV * HEADS + row // S
    tl.store(y_ptr + y_row * D + d, y.to(y_ptr.dtype.element_ty), mask=d < D)


@torch.library.custom_op("fast_gpu::decode_attention", mutates_args=())
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    window: int = 0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Attention of `q [B, H, S, D]` at `positions [B, S]` over the cache `k`, `v` `[B, KV, L, D]`, of S <= 16.

    The cache is of q's type, or of int8 or fp8 with float32 scales `[B, KV, L]`. A query sees the slots up to its
    position, with a `window` only so many of them. Positions are below L. The result `[B, H, S, D]` lies in memory as
    `[B, S, H, D]`, for the output projection.
    """
    (B, H, S, D), KV = q.shape, k.shape[1]
    assert S <= 16
    assert q.stride(3) == k.stride(3) == 1
    assert k.stride() == v.stride()
    scale_strides = (0, 0)
    if k_scales is not None:
        assert k_scales.stride() == v_scales.stride()
        assert k_scales.stride(2) == 1
        scale_strides = k_scales.stride()[:2]
    rows = H // KV * S
    splits = splits_of(B * KV, gpu.multiprocessors(q.device))
    found = q.new_empty(B * KV * splits * rows, D + 2, dtype=torch.float32)
    peaks, totals, sums = found.view(-1).split((found.shape[0], found.shape[0], found.shape[0] * D))
    y = _fake(q)
    shape = {"KV": KV, "HEADS": H // KV, "S": S, "D": D, "BLOCK_D": triton.next_power_of_2(D), "SPLITS": splits}
    with torch.cuda.device_of(q):
        _attend_share[B * KV, splits](
            q, k, v, k_scales, v_scales, positions.contiguous(), sums, peaks, totals, D**-0.5, *q.stride()[:3],
            *k.stride()[:3], *scale_strides, **shape, WINDOW=window, ROWS=max(16, triton.next_power_of_2(rows)),
            BLOCK=BLOCK, num_warps=4 if rows <= 32 else 8,
        )  # fmt: skip
        _join_shares[B * KV, rows](sums, peaks, totals, y.transpose(1, 2), **shape)
    return y


@decode_attention.register_fake
def _fake(q: Tensor, *others: Tensor | int | None) -> Tensor:
    B, H, S, D = q.shape
    return q.new_empty(B, S, H, D).transpose(1, 2)


def splits_of(n_heads: int, multiprocessors: int) -> int:
    """Programs that share a key head's slots, for `n_heads` in all rows: about four for every multiprocessor."""
    return min(64, 1 << max(0, (4 * multiprocessors // n_heads).bit_length() - 1))
