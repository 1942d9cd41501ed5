"""Choosing the next token: temperature, top-k, top-p, min-p and the random draw.

    sampling = Sampling(temperature=0.6, top_k=200)
    ids = sampling(logits)  # [..., vocab] -> [...], -1 where the logits are not numbers

None of these functions waits for the device, so they run inside the CUDA graph of the decode step: the draw
is an argmax over p / Exp(1), because `torch.multinomial` would synchronise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

COLDEST = 1e-5  # as in vLLM
TIES = 64  # extra candidates kept, so that tokens tied with the k-th are not lost


def top_k(logits: Tensor, k: int, descending: bool = False) -> Tensor:
    """Rule out all but the `k` likeliest tokens (Fan et al. 2018); `descending`: the logits are sorted already."""
    k = min(k, logits.shape[-1])
    kth = (logits if descending else logits.topk(k).values)[..., k - 1, None]
    return logits.masked_fill(logits < kth, -torch.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Rule out all but the smallest set of likeliest tokens whose probability reaches `p` (Holtzman et al. 2020)."""
    descending, order = logits.sort(dim=-1, descending=True)
    probs = descending.softmax(dim=-1)
    superfluous = probs.cumsum(dim=-1) - probs >= p  # the tokens before this one suffice
    return logits.masked_fill(superfluous.scatter(-1, order, superfluous), -torch.inf)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Rule out tokens less than `p` times as likely as the likeliest (Nguyen et al. 2024)."""
    probs = logits.softmax(dim=-1)
    return logits.masked_fill(probs < p * probs.amax(dim=-1, keepdim=True), -torch.inf)


def draw(probs: Tensor) -> Tensor:
    """Sample ids `[...]` from `probs [..., vocab]` by an exponential race: argmax of p / Exp(1), without a sync.

    The id is -1 where `probs` are NaN, all of them, as a softmax makes them of logits that are NaN or infinite.
    """
    ids = (probs / torch.empty_like(probs).exponential_()).argmax(dim=-1)
    return torch.where(probs[..., 0].isnan(), -1, ids)


@dataclass(frozen=True)
class Sampling:
    """Temperature first, then the filters in this order; None leaves a filter out. ValueError if out of range.

    A top_k or min_p of 0 leaves it out too, as elsewhere. A temperature below COLDEST is 0: logits divided by it would
    leave the range of float32.
    """

    temperature: float = 0.6
    top_k: int | None = 200
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature {self.temperature} must be 0 (greedy) or more")
        if self.temperature < COLDEST:
            object.__setattr__(self, "temperature", 0.0)
        for name in ("top_k", "min_p"):
            if getattr(self, name) == 0:
                object.__setattr__(self, name, None)
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must be at least 1, or 0 for all tokens")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} {value} must be above 0 and at most 1")

    def probs(self, logits: Tensor, descending: bool = False) -> Tensor:
        """The float32 distribution `[..., vocab]` that `__call__` samples from; needs a temperature above 0."""
        logits = logits.float() / self.temperature
        if self.top_k is not None:
            logits = top_k(logits, self.top_k, descending)
        for apply, value in ((top_p, self.top_p), (min_p, self.min_p)):
            if value is not None:
                logits = apply(logits, value)
        return logits.softmax(dim=-1)

    def __call__(self, logits: Tensor) -> Tensor:
        """Token ids `[...]`: the exact argmax at temperature 0, else a sample of `probs`.

        The id is -1 where the largest logit is NaN or infinite; NaN counts as the largest.
        """
        if self.temperature == 0:
            # Two reductions, which a compiled step divides among many cores; an argmax would keep to one.
            largest, vocab_size = logits.amax(dim=-1, keepdim=True), logits.shape[-1]
            ids = torch.where(logits == largest, torch.arange(vocab_size, device=logits.device), vocab_size)
            return torch.where(largest[..., 0].isfinite(), ids.amin(dim=-1), -1)
        if self.top_k is None:
            return draw(self.probs(logits))
        # Draw among the likeliest alone: noise for the whole vocabulary would be wasted on ids that top-k rules out.
        likeliest, ids = logits.topk(min(self.top_k + TIES, logits.shape[-1]))
        drawn = draw(self.probs(likeliest, descending=True))
        return torch.where(drawn < 0, -1, ids.gather(-1, drawn.clamp(min=0)[..., None])[..., 0])
