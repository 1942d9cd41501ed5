"""The GPU's router, in Triton: which experts compute a token, and how much each of them counts.

    experts, weights = torch.ops.fast_gpu.route(x, weight, norm, eps, k, normalizes)

Two kernels for up to 16 rows: the scores of 16 experts for a row are a program's, and a row's choice is another's.
More rows (prefill) are plain PyTorch.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.plain import normed
from kernels.gpu.products import MAX_ROWS, let_overlap, overlapping

EXPERTS, INPUTS = 16, 256  # of a program, at a time


@triton.jit
def _score(
    x_ptr,  # [T, K]
    weight_ptr,  # [E, K]
    norm_ptr,  # [K]
    scores_ptr,  # float32 [T, E]
    n_experts,
    eps,
    n_in: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    t = tl.program_id(1).to(tl.int64)
    e = (tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E))[:, None]
    products, squares = tl.zeros((BLOCK_E, BLOCK_K), tl.float32), tl.zeros((1, BLOCK_K), tl.float32)
    let_overlap(OVERLAP)
    for first in range(0, n_in, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptr + t * n_in + k, mask=k < n_in, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + e * n_in + k, mask=(e < n_experts) & (k < n_in), other=0.0).to(tl.float32)
        squares += x * x
        products += w * (x * tl.load(norm_ptr + k, mask=k < n_in, other=0.0).to(tl.float32))
    scores = tl.sum(products, 1, keep_dims=True) * tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / n_in + eps)
    tl.store(scores_ptr + t * n_experts + e, scores, mask=e < n_experts)


@triton.jit
def _choose(
    scores_ptr,  # float32 [T, E]
    experts_ptr,  # int64 [T, k]
    weights_ptr,  # float32 [T, k]
    n_experts,
    k: tl.constexpr,
    NORMALIZES: tl.constexpr,
    BLOCK_E: tl.constexpr,  # experts, rounded up to a power of two
    BLOCK_J: tl.constexpr,  # k, rounded up to a power of two
    OVERLAP: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    e, j = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_J)
    let_overlap(OVERLAP)
    scores = tl.load(scores_ptr + t * n_experts + e, mask=e < n_experts, other=float("-inf"))
    shares = tl.exp(scores - tl.max(scores, 0))
    total = tl.sum(shares, 0)
    experts, weights = tl.zeros((BLOCK_J,), tl.int64), tl.zeros((BLOCK_J,), tl.float32)
    for i in range(k):
        best = tl.argmax(shares, 0)
        weights = tl.where(j == i, tl.max(shares, 0), weights)
        experts = tl.where(j == i, best, experts)
        shares = tl.where(e == best, -1.0, shares)
    if NORMALIZES:
        total = tl.sum(weights, 0)
    tl.store(experts_ptr + t * k + j, experts, mask=j < k)
    tl.store(weights_ptr + t * k + j, weights / total, mask=j < k)


@torch.library.custom_op("fast_gpu::route", mutates_args=())
def route(x: Tensor, weight: Tensor, norm: Tensor, eps: float, k: int, normalizes: bool) -> tuple[Tensor, Tensor]:
    """The `k` most probable of E experts, int64 `[T, k]`, and their probabilities, float32 `[T, k]`.

    x `[T, K]` in bfloat16 or float16, weight `[E, K]` of that type; norm `[K]`, of that type or float32, is the weight
    of an RMSNorm applied to x. normalizes: divide the probabilities by their sum.
    """
    (T, n_in), E = x.shape, weight.shape[0]
    if T > MAX_ROWS:
        weights, experts = F.linear(normed(x, norm, eps).float(), weight.float()).softmax(-1).topk(k)
        return experts, weights / weights.sum(-1, keepdim=True) if normalizes else weights
    experts, weights = _route_fake(x, weight, norm, eps, k, normalizes)
    if T == 0:
        return experts, weights
    x, scores = x.contiguous(), x.new_empty(T, E, dtype=torch.float32)
    with torch.cuda.device_of(x):
        grid = -(-E // EXPERTS), T
        _score[grid](x, weight, norm, scores, E, eps, n_in, EXPERTS, INPUTS, **overlapping(), num_warps=8)
        sizes = triton.next_power_of_2(E), triton.next_power_of_2(k)
        _choose[T,](scores, experts, weights, E, k, normalizes, *sizes, **overlapping(), num_warps=1)
    return experts, weights


@route.register_fake
def _route_fake(x, weight, norm, eps, k, normalizes):
    return x.new_empty(x.shape[0], k, dtype=torch.long), x.new_empty(x.shape[0], k, dtype=torch.float32)
