"""The GPU's kernels, in Triton: products of a few rows, and attention of a few positions over the cache.

    if gpu.missing("cuda", torch.bfloat16) is None:
        product = gpu.product(weight, scales, zeros)

Triton is imported only where it is used: the package works without it, and then has no kernels.
"""

import functools
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import Attention, Product

OVERLAP = False  # whether a kernel may start before its predecessor ends (programmatic dependent launch)


@functools.cache
def missing(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """The reason, in one line, why activations in `dtype` have no kernels here; None if two small kernels could run."""
    global OVERLAP
    try:
        from kernels.gpu import flash_decoding, products
    except ModuleNotFoundError as error:
        return f"a GPU's kernels need the package {error.name}: pip install {error.name}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"a GPU's kernels take bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    capability, as_loaded = torch.cuda.get_device_capability(device), OVERLAP
    if capability < (8, 0):
        return f"a GPU's kernels need compute capability 8.0, {device} has less"
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["clang", "gcc"]  # Triton compiles its launchers with one
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not any(map(shutil.which, compilers)) or not headers.exists():
        return f"a GPU's kernels need a C compiler ({' or '.join(compilers)}) and Python's headers"
    try:
        OVERLAP = capability >= (9, 0)  # try it as `product` will set it for a quantised weight
        qkv, turn = (torch.zeros(1, 1, n, device=device, dtype=kind) for n, kind in ((192, dtype), (32, torch.float32)))
        cache = torch.zeros(2, 1, 1, 1, 64, device=device, dtype=dtype)
        flash_decoding.decode_attention(qkv, turn, turn, turn[..., 0].long(), 0, True, None, None, 0.0, *cache)
        x, weight = (torch.zeros(16, 64, device=device, dtype=kind) for kind in (dtype, torch.int8))
        products.linear(x[:1], weight, torch.zeros(16, device=device))
        torch.cuda.synchronize(device)
    except Exception as error:  # of any kind: whatever Triton, the driver or the GPU rejects
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"a GPU's kernels fail on {torch.cuda.get_device_name(device)}: {reason}"
    finally:
        OVERLAP = as_loaded
    return None


def product(
    weight: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    zeros_are: str = "middle",
    n_experts: int = 1,
) -> Product | None:
    """The product with a weight in bfloat16 or float16, int8 or in groups; None where 32 does not divide the inputs.

    From Hopper on, a quantised weight lets all kernels of the process overlap (`OVERLAP`): on an H100 that gave 3 to
    8 % more tokens/s, and 0.7 % fewer in bfloat16.
    """
    global OVERLAP
    from kernels.gpu import products

    if weight.shape[1] % (16 if weight.dtype == torch.uint8 else 32):
        return None
    operator = functools.partial(products.multiply, n_experts, zeros_are)
    if scales is None:
        return Product({"weight": weight}, lambda x, weight, *others: operator(x, weight, None, *others))
    if zeros is not None:
        scales = torch.stack((scales, zeros), -1)  # so that a thread loads both at once
    if weight.is_cuda:
        OVERLAP = torch.cuda.get_device_capability(weight.device) >= (9, 0)
    return Product({"weight": weight.contiguous(), "scales": scales.contiguous()}, operator)


def router(weight: Tensor, k: int, normalizes: bool) -> Product | None:
    """The router with a weight `[E, K]`, of any sizes."""
    from kernels.gpu import routing

    return Product({"weight": weight}, lambda x, *tensors: routing.route(x, *tensors, k, normalizes))


def attention(device: torch.device, kv_dtype: torch.dtype, head_dim: int) -> Attention | None:
    """Attention over a cache in bfloat16, float16, int8 or, where the GPU has it, fp8; None for `head_dim` > 256."""
    from kernels.gpu import flash_decoding

    kinds = [torch.bfloat16, torch.float16, torch.int8]
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9):  # on a CPU: Triton's interpreter
        kinds.append(torch.float8_e4m3fn)
    if kv_dtype not in kinds or head_dim > 256:
        return None
    return Attention(torch.ops.fast_gpu.decode_attention, flash_decoding.MAX_POSITIONS, takes_qkv=True)


def in_one_region(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step` itself: once compiled it is a single CUDA graph already."""
    return step
