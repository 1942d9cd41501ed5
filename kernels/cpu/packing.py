"""Packs weights into panels of 16 rows, in memory with huge pages.

    packed = pack_groups(weight, scales, zeros)

`products.cpp` describes the layout of a panel.
"""

import contextlib
import math
import mmap
import threading

import torch
from torch import Tensor

LANES = 16  # rows of a panel
CACHE_LINE, HUGE_PAGE = 64, 1 << 21  # bytes
INPUTS_PER_SCALE = 256  # inputs that the kernels quantise with one scale; group sizes must divide it
PANELS_AT_ONCE = 64  # packed at a time, to bound the temporary memory

_mapping: mmap.mmap | None = None  # where `in_huge_pages` puts the next tensor, at offset `_taken`
_taken = 0
_lock = threading.Lock()  # of the two: threads may load models at once


def pack_bf16(weight: Tensor) -> Tensor:
    """Pack bfloat16 `[N, K]`, K even, into uint8 `[ceil(N / 16), 32 K]`, a panel per row."""
    out = in_huge_pages(-(-weight.shape[0] // LANES), 2 * LANES * weight.shape[1])
    torch.ops.fast.pack_bf16(weight.contiguous(), out)
    return out


def pack_int8(weight: Tensor, scales: Tensor) -> Tensor:
    """Pack int8 `[N, K]`, K a multiple of 4, and scales, float32 `[N]`, into uint8 `[ceil(N / 16), 16 K + 64]`."""

    def panels(weight: Tensor, scales: Tensor) -> Tensor:
        above = weight.view(torch.uint8) ^ 0x80
        fours = above.unflatten(1, (-1, 4)).unflatten(0, (-1, LANES)).transpose(1, 2)  # [P, K / 4, 16, 4]
        scales = scales.unflatten(0, (-1, LANES))
        return torch.cat((fours.flatten(1), scales.view(torch.uint8)), dim=1)

    return _by_panels(panels, weight, scales)


def pack_groups(weight: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Pack a `GroupedLinear`'s tensors into uint8 `[ceil(N / 16), 2 K * bits + 64 K / G]`."""

    def panels(weight: Tensor, pairs: Tensor) -> Tensor:
        n_groups = pairs.shape[1]
        if weight.dtype == torch.float8_e4m3fn:
            fours = weight.view(torch.uint8).unflatten(1, (-1, 2, 2)).mT.flatten(2)
        elif weight.dtype == torch.int8:
            fours = (weight.view(torch.uint8) ^ 0x80).unflatten(1, (-1, 4))
        else:
            a, b, c, d = weight.unflatten(1, (-1, 4)).unbind(2)  # each [rows, K / 8], the even input in the low nibble
            fours = torch.stack((a & 0xF | c << 4, a >> 4 | c & 0xF0, b & 0xF | d << 4, b >> 4 | d & 0xF0), dim=2)
        words = fours.unflatten(0, (-1, LANES)).transpose(1, 2)  # [P, words of a row, 16, 4]
        pairs = pairs.unflatten(0, (-1, LANES)).transpose(1, 2)  # [P, K / G, 16, 2 or 1]
        words = words.reshape(len(words), n_groups, -1)
        pairs = pairs.contiguous().view(torch.uint8).reshape(len(words), n_groups, -1)
        return torch.cat((words, pairs), dim=2).flatten(1)

    pairs = scales[..., None] if zeros is None else torch.stack((scales, zeros), dim=2)
    return _by_panels(panels, weight, pairs)


def _by_panels(pack, *tensors: Tensor) -> Tensor:
    """`pack` a few panels of rows at a time; the last panel is padded with zeros."""
    n_out = len(tensors[0])
    out: Tensor | None = None
    for start in range(0, n_out, LANES * PANELS_AT_ONCE):
        rows = [tensor[start : start + LANES * PANELS_AT_ONCE] for tensor in tensors]
        lacking = -len(rows[0]) % LANES
        if lacking:
            rows = [torch.cat((piece, piece.new_zeros(lacking, *piece.shape[1:]))) for piece in rows]
        panels = pack(*rows)
        if out is None:
            out = in_huge_pages(-(-n_out // LANES), panels.shape[1])
        out[start // LANES : start // LANES + len(panels)] = panels
    return out


def in_huge_pages(*shape: int) -> Tensor:
    """An empty uint8 tensor in memory that Linux may map in pages of 2 MiB: a token takes 5 % less time in int4.

    Tensors share mappings of 256 MiB (more for a larger one), each freed with its last tensor. With one mapping per
    tensor, the ends that do not fill 2 MiB would lie in pages of 4 KiB: a third of all bytes in int4.
    """
    size = math.prod(shape)
    if not hasattr(mmap, "MADV_HUGEPAGE") or size == 0:
        return torch.empty(shape, dtype=torch.uint8)
    global _mapping, _taken
    with _lock:
        if _mapping is None or _taken + size > len(_mapping):
            _mapping = mmap.mmap(-1, max(-(-size // HUGE_PAGE), 128) * HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):  # a Linux kernel without huge pages
                _mapping.madvise(mmap.MADV_HUGEPAGE)
            _taken = 0
        tensor = torch.frombuffer(_mapping, dtype=torch.uint8, count=size, offset=_taken)
        _taken += -(-size // CACHE_LINE) * CACHE_LINE
    return tensor.view(shape)
