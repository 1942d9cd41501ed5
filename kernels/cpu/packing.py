"""Weights as panels of 16 rows, in memory with huge pages.

    packed = pack_int4(weight, scales, zeros)

`products.cpp` reads panels, and describes them.
"""

import contextlib
import math
import mmap

import torch
from torch import Tensor

LANES = 16  # rows of a panel
CACHE_LINE, HUGE_PAGE = 64, 1 << 21  # bytes
SCALED = 256  # inputs that share a scale when the kernel makes integers of them; group sizes must divide it
PANELS_AT_ONCE = 64  # packed together, to bound the memory that packing takes beside the result

_mapping: mmap.mmap | None = None  # where `in_huge_pages` puts the next tensor, after `_taken` bytes
_taken = 0


def pack_bf16(weight: Tensor) -> Tensor:
    """bfloat16 `[N, K]`, K even, as panels, uint8 `[ceil(N / 16), 32 K]`."""
    out = in_huge_pages(-(-weight.shape[0] // LANES), 2 * LANES * weight.shape[1])
    torch.ops.fast.pack_bf16(weight.contiguous(), out)
    return out


def pack_int8(weight: Tensor, scales: Tensor) -> Tensor:
    """int8 `[N, K]`, 4 dividing K, and float32 `[N]` as panels, uint8 `[ceil(N / 16), 16 K + 64]`."""

    def panels(weight: Tensor, scales: Tensor) -> Tensor:
        above = weight.view(torch.uint8) ^ 0x80
        fours = above.unflatten(1, (-1, 4)).unflatten(0, (-1, LANES)).transpose(1, 2)  # [P, K / 4, 16, 4]
        scales = scales.unflatten(0, (-1, LANES))
        return torch.cat((fours.flatten(1), scales.view(torch.uint8)), dim=1)

    return _by_panels(panels, weight, scales)


def pack_int4(weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """uint8 `[N, K / 2]` and bfloat16 `[N, K / G]` as panels, uint8 `[ceil(N / 16), 8 K + 64 K / G]`."""

    def panels(weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        n_groups = scales.shape[1]
        a, b, c, d = weight.unflatten(1, (-1, 4)).unbind(2)  # each [rows, K / 8], an even input below an odd one
        fours = torch.stack((a & 0xF | c << 4, a >> 4 | c & 0xF0, b & 0xF | d << 4, b >> 4 | d & 0xF0), dim=2)
        words = fours.unflatten(0, (-1, LANES)).transpose(1, 2)  # [P, K / 8, 16, 4]
        pairs = torch.stack((scales, zeros), dim=2).unflatten(0, (-1, LANES)).transpose(1, 2)  # [P, K / G, 16, 2]
        words = words.reshape(len(words), n_groups, -1)
        pairs = pairs.contiguous().view(torch.uint8).reshape(len(words), n_groups, -1)
        return torch.cat((words, pairs), dim=2).flatten(1)

    return _by_panels(panels, weight, scales, zeros)


def _by_panels(pack, *tensors: Tensor) -> Tensor:
    """`pack` a few panels of rows at a time; the last is filled up with zeros."""
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
    """An empty uint8 tensor whose memory the system may map in pages of 2 MiB, which a stream of it reads faster.

    Tensors lie side by side in mappings of 256 MiB, each of which goes with the last of its tensors. Where every tensor
    had one of its own, what did not fill a page, a third of all bytes in int4, lay in small ones: 2 % slower a token.
    """
    size = math.prod(shape)
    if not hasattr(mmap, "MADV_HUGEPAGE") or size == 0:
        return torch.empty(shape, dtype=torch.uint8)
    global _mapping, _taken
    if _mapping is None or _taken + size > len(_mapping):
        _mapping = mmap.mmap(-1, max(-(-size // HUGE_PAGE), 128) * HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            _mapping.madvise(mmap.MADV_HUGEPAGE)
        _taken = 0
    tensor = torch.frombuffer(_mapping, dtype=torch.uint8, count=size, offset=_taken)
    _taken += -(-size // CACHE_LINE) * CACHE_LINE
    return tensor.view(shape)
