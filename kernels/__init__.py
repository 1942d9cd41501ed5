"""Hand-written kernels: every one a registered operator, the kernels of one kind of device behind four functions.

A backend is a module with

    missing(device, dtype) -> str | None                         why it has no kernels there; None: it has
    product(weight, scales, zeros) -> Product | None             for the tensors of a Linear in `fast/quantized.py`
    attention(device, kv_dtype, head_dim) -> Attention | None    over a cache of that type
    together(step) -> step                                       for a step of which these kernels do all the work

`fast/layers.py` alone asks them. Where the answer is None, plain PyTorch computes it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Product:
    """A product with one weight.

    tensors: the weight in the layout that the kernel reads, by name.
    operator: (x [M, K], *tensors, bias, norm, eps, residual, gated) -> [M, N], any M. norm `[K]` is the weight of an
        RMSNorm of x. With `gated`, the two halves g and u of the outputs give silu(g) * u, `[M, N / 2]`. residual, of
        the result's shape, is added.
    """

    tensors: dict[str, Tensor]
    operator: Callable[..., Tensor]


@dataclass(frozen=True)
class Attention:
    """Attention of at most `max_positions` new positions a row.

    operator, if it `takes_qkv`: (qkv [B, S, (H + 2 KV) D], cos, sin, positions, window, q_norm, k_norm, eps, k, v,
        [k_scales, v_scales]) -> [B, S, H D]; it also turns the heads and writes the cache, whose tensors come last.
    Else: (q [B, H, S, D], k, v, positions, window, [k_scales, v_scales]) -> like q, over the valid part of the cache.
    """

    operator: Callable[..., Tensor]
    max_positions: int
    takes_qkv: bool
