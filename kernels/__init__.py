"""Hand-written kernels, registered as PyTorch operators; each kind of device has a backend with the same functions.

A backend is a module with

    missing(device, dtype) -> str | None                         in one line, why it has no kernels there; else None
    product(weight, scales, zeros, zeros_are, n_experts) -> Product | None  for a Linear's tensors (`fast/quantized.py`)
    router(weight, k, normalizes) -> Product | None                         see `Product`
    attention(device, kv_dtype, head_dim) -> Attention | None               over a KV cache of that type
    in_one_region(step) -> step                  for a step whose products and attention are all these

Only `fast/layers.py` chooses between them and plain PyTorch, which computes whatever has no kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GATES = ("silu", "gelu_tanh")  # activations that products compute


def kind_of_pairs(dtype: torch.dtype, zeros_are: str) -> int:
    """How pairs of scale and zero are stored: 1 to 3, what zeros mean, as in `quantized.ZEROS`; plus 4 in float16.

    8 is fp8's scale in float32, without a zero.
    """
    if dtype == torch.float32:
        return 8
    return 1 + ("middle", "lowest", "steps").index(zeros_are) + 4 * (dtype == torch.float16)


@dataclass(frozen=True)
class Product:
    """Multiplication by one weight.

    tensors: the weight in the layout that the kernel reads, by name.
    operator: (x [M, K], *tensors, bias, norm, eps, residual, activation, experts, weights) -> [M, N], any M.
        norm `[K]`, of x's type or float32, is the weight of an RMSNorm applied to x. With an activation, one of GATES,
        the outputs are two halves g and u, and the result is activation(g) * u, `[M, N / 2]`; "" is none. residual
        `[M, N]`, not with an activation, is added last.
        experts, int64 `[T, k]`, and weights, float32 `[T, k]`: as for `model.multiply`. x has T rows, and the result
        T k; or, with weights, x has T k and the result T.
        A router's: (x [T, K], *tensors, norm, eps) -> experts, weights; its norm is not optional.
    """

    tensors: dict[str, Tensor]
    operator: Callable[..., Tensor]


@dataclass(frozen=True)
class Attention:
    """Attention for at most `max_positions` new positions per row.

    operator, if it `takes_qkv`: (qkv [B, S, (H + 2 KV) D], cos, sin, positions, window, q_norm, k_norm, eps, k, v,
        [k_scales, v_scales]) -> [B, S, H D]; it also applies norms and RoPE and writes the cache, which is passed last.
    Otherwise: (q [B, H, S, D], k, v, positions, window, [k_scales, v_scales]) -> like q; the cache is already written.
    """

    operator: Callable[..., Tensor]
    max_positions: int
    takes_qkv: bool
