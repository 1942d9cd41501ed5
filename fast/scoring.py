"""Log-likelihoods of many continuations: batched, sorted by length, with shared prefixes computed once.

    scorer = Scorer(model, batch_size=16)
    for log_likelihood, is_greedy in scorer.score([(context_ids, continuation_ids), ...]): ...

The answers to one question share a prefix, and so do questions after the same few-shot examples. Texts with a common
prefix form a group: the prefix goes through the model once, its keys and values (`prefixes`) are copied to the rows
of the KV cache, and only the rest of each text is computed per row. Texts that share nothing need no cache.
"""

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from fast.compiling import compile_step
from fast.decoding import common_prefix, no_numbers, round_up
from fast.perplexity import negative_log_likelihoods
from model import Transformer

MIN_SHARED = 16  # tokens that sharing must save to be worth a forward pass of its own
PASS_TOKENS = {"cuda": 16384, "cpu": 256}  # in a forward pass, to keep the device busy; a larger batch takes several
AUTO_TOKENS = {"cuda": 65536, "cpu": 4096}  # in a batch if `batch_size` is None, padding included
AUTO_ROWS = 64


@dataclass(frozen=True)
class Text:
    """One input of the model and the continuations to score at its end: (index of the request, token ids) each."""

    ids: list[int]
    continuations: list[tuple[int, list[int]]]

    @property
    def n_scored(self) -> int:
        return max(len(ids) for _, ids in self.continuations)


@dataclass
class Group:
    """Texts whose first `n_shared` tokens are the same; the logits to score all come after them."""

    texts: list[Text]
    n_shared: int

    @property
    def longest_suffix(self) -> int:
        return max(len(text.ids) for text in self.texts) - self.n_shared


@dataclass(frozen=True)
class Suffix:
    """The part of a text after the `start` tokens that its group shares; `source`: the group's index in the batch."""

    text: Text
    start: int
    source: int

    @property
    def length(self) -> int:
        return len(self.text.ids) - self.start


def to_texts(requests: list[tuple[list[int], list[int]]], max_length: int) -> list[Text]:
    """The distinct inputs of (context, continuation) pairs, in lexicographic order.

    The input is context and continuation without the last token, cut on the left to `max_length`, as the harness's HFLM
    does. Raises ValueError for a pair without context, or a continuation longer than `max_length`.
    """
    by_ids: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    for i, (context, continuation) in enumerate(requests):
        if not context:
            raise ValueError("a continuation needs at least one token of context")
        if len(continuation) > max_length:
            raise ValueError(f"a continuation of {len(continuation)} tokens exceeds the maximum length {max_length}")
        if continuation:
            ids = (context + continuation)[-(max_length + 1) :][:-1]
            by_ids.setdefault(tuple(ids), []).append((i, continuation))
    return [Text(list(ids), continuations) for ids, continuations in sorted(by_ids.items())]


def to_groups(texts: list[Text], max_rows: int) -> list[Group]:
    """Group neighbours of the sorted `texts`, at most `max_rows` each, where that saves tokens.

    A text joins the group before it if that saves enough, unless it shares over twice as much with its successor.
    """
    groups: list[Group] = []
    for i, text in enumerate(texts):
        own = len(text.ids) - text.n_scored  # the most that can be shared
        if groups and len(groups[-1].texts) < max_rows:
            group = groups[-1]
            n = len(group.texts)
            common = min(group.n_shared, own, common_prefix(group.texts[-1].ids, text.ids))
            following = common_prefix(text.ids, texts[i + 1].ids) if i + 1 < len(texts) else 0
            if n * common >= (n - 1) * group.n_shared + MIN_SHARED and 2 * common >= min(own, following):
                group.texts.append(text)
                group.n_shared = common
                continue
        groups.append(Group([text], own))
    for group in groups:
        if len(group.texts) == 1:
            group.n_shared = 0
    return groups


def bucket(n: int) -> int:
    """`n` rounded up to one of few lengths; from 128 on, padding is at most an eighth."""
    return round_up(n, at_least=16, per_octave=8)


class Scorer:
    """Scores continuations with a model, whose KV cache it sets up as needed.

    batch_size: most rows in a batch, halved when a GPU runs out of memory; None: what AUTO_ROWS and AUTO_TOKENS allow.
    max_length: most tokens of an input (default: context length). kv_dtype: that of a quantised cache for all texts.
    """

    def __init__(
        self,
        model: Transformer,
        batch_size: int | None = None,
        max_length: int | None = None,
        compile: bool = False,
        kv_dtype: torch.dtype | None = None,
    ):
        max_length = max_length or model.args.context_length
        if max_length < 1:
            raise ValueError(f"max_seq_length {max_length} must be at least 1")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1 or auto")
        self.model, self.batch_size, self.max_length, self.compile = model, batch_size, max_length, compile
        self.most_positions = max(max_length, model.args.context_length)
        self.device, self.kv_dtype = model.tok_embeddings.weight.device, kv_dtype
        self.pass_tokens = PASS_TOKENS.get(self.device.type, 256)
        self._min_size = 2 if compile else 1  # torch.compile specialises on size 1

        def whole(idx: Tensor, logits_at: Tensor) -> Tensor:
            slots = None if kv_dtype is None else model.slots[: idx.shape[1]]
            return model(idx, slots, slots, logits_at)

        def cached(idx: Tensor, input_pos: Tensor, kv_pos: Tensor, logits_at: Tensor) -> Tensor:
            return model(idx, input_pos, kv_pos, logits_at)

        self._whole = compile_step(whole, ((0, 1), (0, 1))) if compile else whole
        self._cached = compile_step(cached, ((0, 1), (0, 1), 0, (0, 1))) if compile else cached

    def rows_for(self, length: int) -> int:
        """How many rows of `length` tokens a batch takes."""
        return self.batch_size or max(1, min(AUTO_ROWS, AUTO_TOKENS.get(self.device.type, 4096) // length))

    def reserve(self, rows: int, length: int) -> None:
        """Make sure that the model has a KV cache of `rows` rows of at least `length` positions."""
        rows = max(rows, self._min_size)
        if self.model.max_batch_size != rows or self.model.max_seq_length < length:
            for layer in self.model.layers:
                layer.attention.kv_cache = None  # free the old cache before allocating
            capacity = min(bucket(length), self.most_positions)
            self.model.setup_caches(rows, capacity, kv_dtype=self.kv_dtype)

    @torch.no_grad()
    def score(self, requests: list[tuple[list[int], list[int]]], progress: bool = False) -> list[tuple[float, bool]]:
        """For every (context, continuation) its log-likelihood in nats, and whether greedy decoding would give it."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)  # for an empty continuation
        texts = to_texts(requests, self.max_length)
        bar = tqdm(total=len(requests), desc="log-likelihoods", disable=None if progress else True)
        bar.update(len(requests) - sum(len(text.continuations) for text in texts))
        rows = self.rows_for(max((len(text.ids) for text in texts), default=1))
        waiting = by_length(to_groups(texts, rows))
        while waiting:
            batch = take_batch(waiting, rows)
            try:
                found = self._score_batch(batch, rows)
            except torch.OutOfMemoryError:
                if rows == 1 or torch.distributed.is_initialized():  # the other ranks would not retry
                    raise
                rows = self.batch_size = rows // 2
                print(f"out of memory: continuing with batches of {rows}", file=sys.stderr)
                waiting = by_length([part for group in waiting + batch for part in split(group, rows)])
                continue
            for i, result in found:
                results[i] = result
            bar.update(len(found))
        bar.close()
        return results

    def _score_batch(self, groups: list[Group], rows: int) -> list[tuple[int, tuple[float, bool]]]:
        """(index of the request, result) for every continuation in the groups."""
        suffixes = [Suffix(text, group.n_shared, source) for source, group in enumerate(groups) for text in group.texts]
        suffixes.sort(key=lambda suffix: suffix.length, reverse=True)
        prefixes = None
        if groups[0].n_shared or self.kv_dtype is not None:
            self.reserve(rows, max(len(suffix.text.ids) for suffix in suffixes))
        if groups[0].n_shared:
            prefixes = self._compute_prefixes(groups)
        found = []
        while suffixes:  # rows of similar length share a pass, whatever their group, to pad little
            n = max(1, self.pass_tokens // suffixes[0].length)
            found += self._score_suffixes(suffixes[:n], prefixes)
            suffixes = suffixes[n:]
        return found

    def _compute_prefixes(self, groups: list[Group]) -> list[list[Tensor]]:
        """By layer, the cache contents for each group's shared prefix, `[len(groups), n_kv_heads, longest, ...]`."""
        caches = [layer.attention.kv_cache for layer in self.model.layers]
        longest = max(group.n_shared for group in groups)
        kept = [
            [t.new_zeros(len(groups), t.shape[1], longest, *t.shape[3:]) for t in cache.buffers()] for cache in caches
        ]
        begin = 0
        while begin < len(groups):
            part = groups[begin : begin + max(1, self.pass_tokens // groups[begin].n_shared)]
            S = min(self._padded(max(group.n_shared for group in part)), self.model.max_seq_length)
            idx = torch.zeros(max(self._min_size, len(part)), S, dtype=torch.long)
            for row, group in enumerate(part):
                idx[row, : group.n_shared] = torch.tensor(group.texts[0].ids[: group.n_shared])
            idx, slots = idx.to(self.device), self.model.slots[:S]
            self._cached(idx, slots.clone(), slots, idx.new_zeros(len(idx), 1))  # its logits are not used
            rows, n = slice(begin, begin + len(part)), min(S, longest)
            for cache, tensors in zip(caches, kept, strict=True):
                for tensor, stored in zip(tensors, cache.stored(len(part), n), strict=True):
                    tensor[rows, :, :n] = stored
            begin += len(part)
        return kept

    def _score_suffixes(
        self, suffixes: list[Suffix], prefixes: list[list[Tensor]] | None
    ) -> list[tuple[int, tuple[float, bool]]]:
        """One forward pass over `suffixes`, behind their shared prefixes, if any; returns as `_score_batch`."""
        S, starts = self._padded(suffixes[0].length), [suffix.start for suffix in suffixes]
        if prefixes is not None:  # padding must fit the cache too: some rows start earlier and recompute a little
            starts = [min(start, self.model.max_seq_length - S) for start in starts]
        n = max(self._min_size, max(suffix.text.n_scored for suffix in suffixes))
        idx = torch.zeros(max(self._min_size, len(suffixes)), S, dtype=torch.long)
        logits_at = torch.zeros(len(idx), n, dtype=torch.long)
        requests, row_of, targets = [], [], []
        for row, (suffix, start) in enumerate(zip(suffixes, starts, strict=True)):
            end = len(suffix.text.ids) - start
            idx[row, :end] = torch.tensor(suffix.text.ids[start:])
            logits_at[row] = torch.arange(end - n, end).clamp(min=0)
            for request, ids in suffix.text.continuations:
                requests.append(request)
                row_of.append(row)
                targets.append([-100] * (n - len(ids)) + ids)
        idx, logits_at = idx.to(self.device), logits_at.to(self.device)
        if prefixes is None:
            logits = self._whole(idx, logits_at)
        else:
            self._copy_prefixes(prefixes, [suffix.source for suffix in suffixes])
            first = torch.tensor(starts + [0] * (len(idx) - len(starts)), device=self.device)
            input_pos = first[:, None] + torch.arange(S, device=self.device)  # [B, S]
            n_slots = min(self._padded(max(starts) + S), self.model.max_seq_length)
            logits = self._cached(idx, input_pos, self.model.slots[:n_slots], logits_at)
        if row_of != list(range(len(logits))):
            logits = logits[torch.tensor(row_of, device=self.device)]
        wanted = torch.tensor(targets, device=self.device)
        nll = negative_log_likelihoods(logits, wanted).sum(1, dtype=torch.float64)
        if bad := [n for n, x in zip(requests, nll.tolist(), strict=True) if not math.isfinite(x)]:
            raise no_numbers(self.model, f"scored text {min(bad) + 1}")
        greedy = ((logits.argmax(-1) == wanted) | (wanted == -100)).all(1)
        return list(zip(requests, zip((-nll).tolist(), greedy.tolist(), strict=True), strict=True))

    def _copy_prefixes(self, prefixes: list[list[Tensor]], sources: list[int]) -> None:
        """Copy to the cache's row i the keys and values of beginning `sources[i]`."""
        rows = torch.tensor(sources, device=self.device)
        for layer, tensors in zip(self.model.layers, prefixes, strict=True):
            places = layer.attention.kv_cache.stored(len(rows), tensors[0].shape[2])
            for place, tensor in zip(places, tensors, strict=True):
                place.copy_(tensor[rows])

    def _padded(self, n: int) -> int:
        """The length to pad `n` tokens to: if compiled, one of few lengths (`bucket`); else `n`, without padding."""
        return min(bucket(n) if self.compile else n, self.most_positions)


def parse_batch_size(value: int | str | None) -> int | None:
    """`N`, or None for "auto" (and the harness's "auto:N"). Raises ValueError for anything else."""
    if value is None or str(value).startswith("auto"):
        return None
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"--batch_size {value} must be at least 1, or auto")
    return int(value)


def by_length(groups: list[Group]) -> list[Group]:
    """Sorted for taking from the end: groups with a shared prefix first, within each kind the longest first.

    So the progress bar overestimates the time left, and memory runs out at once or not at all.
    """
    return sorted(groups, key=lambda group: (group.n_shared, group.longest_suffix))


def take_batch(waiting: list[Group], rows: int) -> list[Group]:
    """Pop groups from the end of `waiting` until `rows` are full; all of them have a shared prefix, or none has."""
    batch, sharing = [], bool(waiting[-1].n_shared)
    while waiting and bool(waiting[-1].n_shared) == sharing and len(waiting[-1].texts) <= rows:
        rows -= len(waiting[-1].texts)
        batch.append(waiting.pop())
    return batch


def split(group: Group, rows: int) -> list[Group]:
    """The group in pieces of at most `rows` texts; one text alone shares nothing."""
    pieces = [group.texts[i : i + rows] for i in range(0, len(group.texts), rows)]
    return [Group(piece, group.n_shared if len(piece) > 1 else 0) for piece in pieces]
