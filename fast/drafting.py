"""Models that draft for another one: a smaller model here, heads in `eagle.py` and `dflash.py`.

    drafter = DraftModel(load_model("demo/draft"), sampling)
    drafts, *q = drafter.draft(k, token, input_pos, kv_pos)

Worth knowing: nothing here waits for the device. How many drafts were accepted is known there alone, so a drafter reads
again what it may have read before: the keys and values are the same, and those of rejected drafts are overwritten.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.compiling import compile_step, replayed
from fast.decoding import time_kernels
from fast.layers import in_one_region
from fast.metrics import bytes_per_step
from fast.pace import Chances
from fast.sampling import Sampling, draw
from model import Transformer

MAX_K = 15  # with the token before them 16 rows, the most that the kernels for few rows take
SPARE = MAX_K + 1  # extra cache slots, for drafts past `max_seq_length`


class Chain(nn.Module):
    """Drafts k tokens; on a GPU one CUDA graph for each k.

    model: what drafts, with a cache like the target's. A subclass has `_drafts(k, *tensors, kv_pos)`, the drafts, int
    `[B, k]`, and unless temperature is 0 the distributions they were drawn from, `[B, k, V]`. A draft is -1 where the
    logits are not numbers. `_read_step(*tensors, kv_pos)` reads a few tokens of the text.
    """

    ks, probes, waits = (2, 4, 7), True, False
    prior = (0.7, 0.7, 0.7)  # for the first draft of a step, the second and third, and later ones
    run: Callable[..., Tensor] | None = None  # runs the target in its model's place

    def __init__(self, model: Transformer, sampling: Sampling, compile: bool):
        super().__init__()
        self.model, self.sampling, self.is_compiled = model, sampling, compile
        self._by_k: dict[int, Callable[..., tuple[Tensor, ...]]] = {}

    def _chained(self, k: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        if k not in self._by_k:
            drafts = partial(self._drafts, k)
            in_place = [False] * (len(tensors) - 1) + [True]
            drafts = replayed(drafts, in_place) if self.is_compiled else drafts
            self._by_k[k] = in_one_region(self.model, drafts)
        return self._by_k[k](*tensors)

    @cached_property
    def _read_apart(self) -> Callable[..., Any]:
        """`_read_step`, to be called outside of `_drafts`."""
        return in_one_region(self.model, self._read_step)

    def take(self, ids: list[list[int]], k: int, behind: Sequence[int], chances: Chances) -> None:
        """Let `chances` learn how many of a step's k drafts the rows that are `behind` accepted."""
        for n in (len(ids[row]) - 1 for row in behind):
            for place in range(1, min(n + 1, k) + 1):
                chances.learn(place, place <= n)

    def expected(self, k: int, behind: Sequence[int], chances: Chances) -> list[float]:
        """How many of 0 to k drafts are accepted on average."""
        return chances.expected(1, k)

    def bytes_per_step(self, k: int, batch_size: int, positions: float) -> float:
        """Bytes that drafting k tokens reads: weights and `positions` of KV cache, k times."""
        return k * bytes_per_step(self.model, batch_size, positions)


class DraftModel(Chain):
    """Drafts by a smaller or quantised model of the same tokenizer.

    vocab_size: the target's (default: the draft's own). Models of one tokenizer differ in it where their embeddings are
    padded, as Qwen 2.5's are, or where a fine-tune added tokens.
    compile: one token's step.
    """

    def __init__(self, model: Transformer, sampling: Sampling, vocab_size: int | None = None, compile: bool = False):
        super().__init__(model, sampling, compile)
        self.vocab_size = vocab_size or model.args.vocab_size
        self._unread: list[tuple[Tensor, Tensor]] = []  # tokens that the draft's cache lacks, positions of the next
        any_length = None if model.slots.is_cuda else 1
        self._read_step = compile_step(self._next, (any_length, any_length, 0)) if compile else self._next

    def time_kernels(self, n_rows: int) -> None:
        """As `decoding.time_kernels`, for the first draft, which two tokens precede, and those after it."""
        for n in (2, 1):
            time_kernels(self.model, n_rows, n)

    def begin(self, prompts: list[list[int]], cached: int, layout: tuple[Tensor, ...]) -> None:
        """Read prompts that continue `cached` positions, laid out as `lay_out` does."""
        idx, input_pos, kv_pos, last = layout
        if cached and self._unread:
            self._read(len(self._unread), kv_pos)
        self._unread = []
        self._logits(idx, input_pos, kv_pos, last[:, :0])

    def _read(self, n: int, kv_pos: Tensor) -> None:
        """Store the keys and values of the first `n` unread tokens."""
        tokens, following = (torch.cat(parts, 1) for parts in zip(*self._unread[:n], strict=True))
        self._unread = self._unread[n:]
        if tokens.is_cuda or tokens.numel() > SPARE:
            self._logits(tokens, following - 1, kv_pos, tokens[:, :0])
        else:  # what is not led by the decode step's threads waits for them, up to 15 ms
            self._read_apart(tokens, following - 1, kv_pos)

    def _logits(self, idx: Tensor, input_pos: Tensor, kv_pos: Tensor, logits_at: Tensor) -> Tensor:
        """Logits for the target's vocabulary; a token that the draft does not have is -inf, and read as its last."""
        own = self.model.args.vocab_size
        logits = self.model(idx.clamp(0, own - 1), input_pos, kv_pos, logits_at=logits_at)
        missing = self.vocab_size - own
        return F.pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits[..., : self.vocab_size]

    def _next(self, tokens: Tensor, input_pos: Tensor, kv_pos: Tensor) -> tuple[Tensor, ...]:
        """The token after the last of `tokens`, `[B, 1]`, and the distribution it was drawn from, `[B, 1, V]`."""
        logits = self._logits(tokens, input_pos, kv_pos, torch.full_like(tokens[:, :1], tokens.shape[1] - 1))
        if self.sampling.temperature == 0:
            return (self.sampling(logits),)
        q = self.sampling.probs(logits)
        return draw(q), q

    def _drafts(self, k: int, tokens: Tensor, pos: Tensor, kv_pos: Tensor) -> tuple[Tensor, ...]:
        found = []
        for _ in range(k):
            found.append(self._read_step(tokens, pos, kv_pos))
            tokens, pos = found[-1][0], pos[:, -1:] + 1
        return tuple(torch.cat(parts, 1) for parts in zip(*found, strict=True))

    def follow(self, previous: Tensor, input_pos: Tensor, kv_pos: Tensor) -> None:
        """Note the token `[B, 1]` before the one at `input_pos [B, 1]`: the draft may not have read it."""
        self._unread.append((previous, input_pos))

    def draft(self, k: int, token: Tensor, input_pos: Tensor, kv_pos: Tensor) -> tuple[Tensor, ...]:
        """The drafts, int `[B, k]`, and unless temperature is 0 the distributions they were drawn from, `[B, k, V]`.

        token: the text's last, `[B, 1]` at `input_pos [B, 1]`. A draft is -1 where the logits are not numbers.
        """
        # What is recorded takes two tokens, what is compiled as many as the kernels for few rows.
        at_once = 2 if token.is_cuda else max(2, SPARE // len(token))
        while len(self._unread) >= at_once:
            self._read(at_once - 1 if at_once > 2 else len(self._unread) - 1, kv_pos)
        before, following = zip(*self._unread, strict=True)
        self._unread = []
        tokens, pos = torch.cat((*before, token), 1), torch.cat((*following, input_pos + 1), 1) - 1
        return self._chained(k, tokens, pos, kv_pos)
