"""A model's tensors as files hold them: found and described, but not read until they are needed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

import tp

ELEMENTS_AT_ONCE = 1 << 24  # of a computed tensor: temporary memory stays below a few hundred MB


@dataclass(frozen=True)
class Part:
    """A tensor in a file: its shape there, and how to get its rows.

    rows: (first, end) -> the rows from `first` to before `end`, a view of the file's pages where that is possible.
    is_computed: they are computed from what the file holds, so they are better read a few at a time.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]
    is_computed: bool = False

    def read(self) -> Tensor:
        """The whole tensor, or a view of it."""
        return self.rows(0, self.shape[0])

    def fill(self, out: Tensor) -> None:
        """Write the values into `out`, converting to its dtype."""
        n_rows = self.shape[0]
        at_once = max(1, ELEMENTS_AT_ONCE * n_rows // out.numel()) if self.is_computed and out.numel() else n_rows
        for first in range(0, n_rows, at_once or 1):
            end = min(n_rows, first + at_once)
            out[first:end].copy_(self.rows(first, end))


def part_of(tensor: Tensor) -> Part:
    """The tensor itself, which may be mapped to a file's pages."""
    return Part(tuple(tensor.shape), tensor.dtype, lambda first, end: tensor[first:end])


@dataclass(frozen=True)
class Stored:
    """A tensor of the model as stored in files: the rows of its `parts`, one below the other."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def load(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """The tensor on `device`; on the CPU and already in `dtype`, a single contiguous view is not copied."""
        if len(self.parts) == 1 and not self.parts[0].is_computed:
            return self.parts[0].read().to(device, dtype).contiguous()
        out = torch.empty(self.shape, device=device, dtype=dtype)
        self.fill(out)
        return out

    def fill(self, out: Tensor) -> None:
        """Write the values into `out`, converting to its dtype, one part after the other."""
        for rows, part in zip(out.split([part.shape[0] for part in self.parts]), self.parts, strict=True):
            part.fill(rows)

    def share(self, share: tp.Share) -> "Stored":
        """The rank's share of this tensor, not yet read; loading it reads only its own pages of a mapped part."""
        shape = list(self.shape)
        if share.is_zero:
            zeros = Part(self.shape, self.dtype, lambda first, end: torch.zeros(end - first, *shape[1:]))
            return Stored(self.shape, (zeros,))
        if share.dim == 1:
            ((first, end),) = share.ranges
            parts = [_columns(part, first, end) for part in self.parts]
        else:
            offsets = [0, *accumulate(part.shape[0] for part in self.parts)]
            parts = [
                _rows(part, max(first - offset, 0), min(end - offset, part.shape[0]))
                for first, end in share.ranges
                for offset, part in zip(offsets, self.parts, strict=False)
                if offset < end and first < offset + part.shape[0]
            ]
        shape[share.dim] = sum(end - first for first, end in share.ranges)
        return Stored(tuple(shape), tuple(parts))


def _rows(part: Part, first: int, end: int) -> Part:
    return replace(part, shape=(end - first, *part.shape[1:]), rows=lambda a, b: part.rows(first + a, first + b))


def _columns(part: Part, first: int, end: int) -> Part:
    shape = part.shape[0], end - first, *part.shape[2:]
    return replace(part, shape=shape, rows=lambda a, b: part.rows(a, b)[:, first:end])
