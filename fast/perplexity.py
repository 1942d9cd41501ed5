"""Sliding-window perplexity of a text: how well a model predicts each token from the ones before it.

    result = perplexity(model, tokenizer.encode(text), window=512, stride=256)
    print(result.perplexity)

As in https://huggingface.co/docs/transformers/perplexity, windows of `window` tokens start every `stride` tokens, and
each scores only the tokens that no earlier window has scored. A small stride gives every token a long context; a stride
as long as the window is the fast, pessimistic form that papers on quantisation report.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fast.decoding import no_numbers
from model import Transformer

CHUNK_ELEMENTS = 1 << 25  # logits converted to float32 at a time: 128 MiB


@dataclass(frozen=True)
class Perplexity:
    """`nll`: the summed negative log-likelihood, in nats, of the `n_tokens` tokens that were scored."""

    nll: float
    n_tokens: int

    @property
    def perplexity(self) -> float:
        """Per token; infinite where the mean is too large for a float."""
        return _exp(self.nll / self.n_tokens)

    def bits_per_byte(self, tokens_per_byte: float) -> float:
        """Bits per byte of the text, comparable between models with different tokenizers. The few tokens without
        context (the very first; each window's first if the stride equals the window) count as average ones.
        """
        return self.nll / self.n_tokens * tokens_per_byte / math.log(2)


def perplexity(
    model: Transformer,
    ids: list[int],
    window: int,
    stride: int,
    batch_size: int | None = None,
    progress: bool = False,
    kv_dtype: torch.dtype | None = None,
) -> Perplexity:
    """Score the text `ids` with windows of `window` tokens, one every `stride`, `batch_size` windows at a time.

    No cache is used, unless `kv_dtype` asks for a quantised one: then every window goes through it, and queries see
    the quantised keys and values, as in decoding. Default batch: as many windows as make 4096 tokens.
    Raises ValueError for sizes that do not fit each other, and for a text of fewer than two tokens.
    """
    if window < 2:
        raise ValueError(f"window {window} must be at least 2")
    if not 1 <= stride <= window:
        raise ValueError(f"stride {stride} must be 1 to {window}, the window")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    if len(ids) < 2:
        raise ValueError(f"a text of {len(ids)} tokens has no perplexity: at least 2 are needed")
    windows = list(_windows(len(ids), window, stride))
    size = batch_size or max(1, 4096 // window)
    # The first window scores more tokens than the others: alone, it does not pad their logits.
    batches = [windows[:1], *(windows[i : i + size] for i in range(1, len(windows), size))]
    if kv_dtype is not None:
        model.setup_caches(size, min(window, len(ids)), kv_dtype=kv_dtype)
    nll, n_tokens = 0.0, 0
    for batch in tqdm(batches, desc="perplexity", disable=None if progress else True):
        nll += _score(model, ids, batch, kv_dtype is not None)
        n_tokens += sum(end - first for _, first, end in batch)
    return Perplexity(nll, n_tokens)


def _windows(n: int, window: int, stride: int):
    """(begin, first scored, end) of every window over `n` tokens; a window's own first token cannot be scored."""
    scored = 0
    for begin in range(0, n, stride):
        end = min(begin + window, n)
        first = max(scored, begin + 1)
        if first < end:
            yield begin, first, end
        scored = end
        if end == n:
            return


@torch.no_grad()
def _score(model: Transformer, ids: list[int], windows: list[tuple[int, int, int]], cached: bool) -> float:
    """The summed negative log-likelihood of the windows' scored tokens; the output projection skips all others."""
    device = model.tok_embeddings.weight.device
    longest = max(end - begin for begin, _, end in windows)
    most = max(end - first for _, first, end in windows)
    idx = torch.zeros(len(windows), longest, dtype=torch.long)  # padded on the right: the causal mask hides it
    logits_at = torch.zeros(len(windows), most, dtype=torch.long)
    targets = torch.full((len(windows), most), -100)
    for row, (begin, first, end) in enumerate(windows):
        idx[row, : end - begin] = torch.tensor(ids[begin:end])
        logits_at[row, : end - first] = torch.arange(first - begin - 1, end - begin - 1)
        targets[row, : end - first] = torch.tensor(ids[first:end])
    slots = model.slots[:longest] if cached else None
    logits = model(idx.to(device), slots, slots, logits_at=logits_at.to(device))
    nll = float(negative_log_likelihoods(logits, targets.to(device)).sum(dtype=torch.float64))
    if not math.isfinite(nll):
        raise no_numbers(model, f"tokens {windows[0][1] + 1} to {windows[-1][2]} of the text")
    return nll


def negative_log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """In nats, float32 `[B, N]`, from logits `[B, N, vocab]`; 0 where the target is -100.

    The float32 softmax is computed in chunks, so that it needs little memory beside the logits.
    """
    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    chunks = zip(logits.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    losses = [F.cross_entropy(chunk.float(), target, reduction="none") for chunk, target in chunks]
    return torch.cat(losses).view(targets.shape)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
