"""Speculative decoding: a draft proposes k tokens, the target checks them in one pass, the output stays the target's.

    steps = build_speculative_steps(build_steps(target, sampling), DraftModel(draft, sampling), sampling, k="auto")
    for step in speculate(steps, [tokenizer.encode("Hello")], max_new_tokens=50): print(step.ids)

Verifying k + 1 tokens reads the target's weights once, as decoding one token does, so every accepted draft saves a
step. The rule of Leviathan et al. 2023 and Chen et al. 2023 makes it exact: a draft x drawn from q is accepted with
probability min(1, p(x) / q(x)), p being the target's distribution; at the first rejection a token is drawn from
norm(max(p - q, 0)), and after k acceptances one from p. Each row of a batch accepts independently.

Worth knowing: the host can launch a step before it has read the result of the last one. A step has fixed shapes, writes
k + 1 slots of the cache and advances a row by 1 to k + 1 positions; a rejected draft's keys and values lie beyond the
row's position and are overwritten before a query reads them. On a GPU the host reads ids and counts one step late, so
the choice of k (`pace.py`) lags by a step; only drafts by `lookup.py` wait for the last step's ids.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.checkpoint import load_model
from fast.compiling import compile_step
from fast.decoding import (
    Steps,
    check_fit,
    copy_to_host,
    every_size,
    lay_out,
    no_numbers,
    slots_to_read,
    steps_ahead,
    time_kernels,
    wait,
)
from fast.dflash import DFlashDraft, DFlashHead
from fast.drafting import MAX_K, DraftModel
from fast.eagle import EagleDraft, EagleHead
from fast.families import head_kind
from fast.head_files import load_head
from fast.layers import in_one_region
from fast.lookup import PromptLookup
from fast.pace import Agree, Pace
from fast.reading import read_json, reading
from fast.sampling import Sampling, draw
from fast.tokenizer import Tokenizer, load_tokenizer
from model import Transformer
from tp import ALONE, Ranks

Drafter = DraftModel | EagleDraft | DFlashDraft | PromptLookup

LEARNERS = 4  # rows of a batch that a step's chances are learned from
BAD_DRAFT = -2  # in place of a step's ids, if the draft model's logits are not numbers


def load_draft(
    path: Path | None,
    target: Transformer,
    tokenizer: Tokenizer,
    device: str,
    dtype: torch.dtype,
    ranks: Ranks = ALONE,
    replicate: bool = False,
) -> Transformer | None:
    """The model or head at `path` that drafts for `target`. Raises ValueError if it does not fit the target.

    A model must have the target's tokenizer. replicate: every rank holds all of it, and rank 0's logits are broadcast
    for each draft; else `ranks` shard it. A head is always whole on every rank.
    """
    if path is None:
        return None
    if (config := path / "config.json").is_file():
        with reading(config):
            is_head = head_kind(read_json(config))
        if is_head:
            return load_head(path, target, device, dtype, ranks)
    draft = load_model(path, device=device, dtype=dtype, ranks=ranks, replicate=replicate)
    ours, theirs = target.args.vocab_size, draft.args.vocab_size
    probe = "The quick brown fox: jumps_over(13) lazy dogs? \u00dcn\u00efcode, 42.\n"
    try:
        # What each begins a text with, and how many embeddings it has, may differ.
        if load_tokenizer(path).encode(probe, bos=False) != tokenizer.encode(probe, bos=False):
            raise ValueError(f"{path} has other token ids than the target: a draft needs the same tokenizer")
    except FileNotFoundError:
        if ours != theirs:
            counts = f"{path} has {theirs} embeddings, the target {ours}"
            raise ValueError(f"{counts}, and it has no tokenizer to compare: copy its tokenizer there") from None
    return draft


def drafter_for(
    draft: Transformer | None, target: Transformer, sampling: Sampling, k: int | str, compile: bool = False
) -> Drafter:
    """What drafts: the model or head `draft`, whose caches and the target's are set up, or without it prompt lookup."""
    if draft is None:
        return PromptLookup()
    if isinstance(draft, EagleHead):
        return EagleDraft(draft, target, sampling, k, compile)
    if isinstance(draft, DFlashHead):
        return DFlashDraft(draft, target, sampling, k, compile)
    return DraftModel(draft, sampling, target.args.vocab_size, compile)


def accept(sampling: Sampling, logits: Tensor, drafts: Tensor, q: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A step's tokens, int `[B, k+1]`, and n, the number of drafts accepted, int `[B, 1]`.

    logits: the target's `[B, k+1, V]`; drafts `[B, k]`, drawn from q `[B, k, V]`, or without it not by chance. Only the
    first n + 1 tokens count: n drafts and one from the target. They are distributed as if the target had drawn them one
    by one.
    """
    if sampling.temperature == 0:
        best = sampling(logits)
        return best, (drafts == best[:, :-1]).long().cumprod(1).sum(1, keepdim=True)
    p, chosen = sampling.probs(logits), drafts[..., None]
    q = F.one_hot(drafts, p.shape[-1]).float() if q is None else q
    p_chosen, q_chosen = p[:, :-1].gather(2, chosen)[..., 0], q.gather(2, chosen)[..., 0]  # [B, k]
    accepted = torch.rand_like(p_chosen) * q_chosen < p_chosen
    n = accepted.long().cumprod(1).sum(1, keepdim=True)
    row = n[..., None].expand(-1, -1, p.shape[-1])
    p_n, q_n = p.gather(1, row), F.pad(q, (0, 0, 0, 1)).gather(1, row)  # [B, 1, V]; q is 0 after k acceptances
    rest = (p_n - q_n).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p_n)  # p and q differ only by rounding
    return F.pad(drafts, (0, 1)).scatter(1, n, draw(rest)), n


@dataclass(frozen=True)
class SpeculativeSteps:
    """The target's plain steps, what drafts, the function that verifies, and what chooses between them.

    verify(token [B, 1], input_pos [B, 1], kv_pos, last_pos [B, 1], drafts [B, k] and what else `drafter.draft` gives)
        -> (new_ids [B, k+1], n [B, 1], the next previous and token, the next input_pos, clamped to last_pos)
    """

    plain: Steps
    drafter: Drafter
    verify: Callable[..., tuple[Tensor, ...]]
    pace: Pace

    @property
    def model(self) -> Transformer:
        return self.plain.model


def build_speculative_steps(
    plain: Steps,
    drafter: Drafter,
    sampling: Sampling,
    k: int | str,
    compile: bool = False,
    accept: Callable = accept,
    agree: Agree = list,
) -> SpeculativeSteps:
    """Steps that draft k tokens each, or for k "auto" as many as pays; the verifying pass compiled if asked.

    plain: built with the drafter's `run`. The caches of the target and of a draft must be set up with `spare=SPARE`.
    accept: the acceptance rule; a benchmark without trained weights passes its own. agree: see `Pace`. ValueError for k
    out of range.
    """
    if k != "auto" and not 1 <= k <= MAX_K:
        raise ValueError(f"speculate_k {k} must be 1 to {MAX_K}")
    model, run = plain.model, drafter.run or plain.model

    def verify(token: Tensor, input_pos: Tensor, kv_pos: Tensor, last_pos: Tensor, drafts: Tensor, *q: Tensor):
        idx = torch.cat((token, drafts), 1).clamp(min=0)  # [B, k+1]
        ahead = torch.arange(idx.shape[1], device=idx.device)
        new_ids, n = accept(sampling, run(idx, input_pos + ahead, kv_pos), idx[:, 1:], *q)
        new_ids = new_ids.masked_fill((drafts < 0).any(1, keepdim=True), BAD_DRAFT)
        return new_ids, n, idx.gather(1, n), new_ids.gather(1, n), torch.minimum(input_pos + n + 1, last_pos)

    if compile:
        several = None if model.slots.is_cuda else 1  # on a CPU any k, on a GPU each k is compiled for itself
        verify = compile_step(verify, (None, None, 0, None, several, several), record=True)
    return SpeculativeSteps(plain, drafter, in_one_region(model, verify), pace_of(drafter, k, agree))


def pace_of(drafter: Drafter, k: int | str, agree: Agree = list) -> Pace:
    """A pace that has learned nothing yet: k drafts in each step, or for "auto" as many as pay."""
    return Pace(drafter.ks if k == "auto" else (k,), drafter.prior, k == "auto", drafter.probes, agree)


@dataclass
class StepResult:
    """Result of one step of k drafts: each row's new ids, none once it has `max_new_tokens`, and the seconds it took.

    The first step is the prefill, one id per row. A row's last ids may exceed `max_new_tokens`: the caller cuts them.
    """

    ids: list[list[int]]
    k: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0


@dataclass
class Launched:
    """A step whose ids the host has not read yet: `new_ids` and how many are accepted, on their way to it.

    Time stamps: when it began, had drafted, and had verified; None for the prefill.
    """

    k: int
    copy: tuple[Tensor, torch.cuda.Event | None]
    began: Any = None
    drafted: Any = None
    ended: Any = None


def speculate(
    steps: SpeculativeSteps,
    prompts: list[list[int]],
    max_new_tokens: int,
    cached: int = 0,
    is_live: Callable[[int], bool] = lambda row: True,
) -> Iterator[StepResult]:
    """Yield steps until every row has `max_new_tokens` ids; leave the loop to stop. Otherwise as `decoding.stream`.

    is_live: whether a row still runs.
    """
    model, drafter, pace, on_gpu = steps.model, steps.drafter, steps.pace, steps.model.slots.is_cuda
    ahead = steps_ahead(model)
    check_fit(model, prompts, max_new_tokens, cached)
    layout = lay_out(model, prompts, cached)
    kv_pos_of = slots_to_read(model)
    drafter.begin(prompts, cached, layout)
    token, input_pos = steps.plain.prefill(*layout), cached + layout[-1] + 1
    last_pos = input_pos + max_new_tokens - 1  # a finished row stays there until all have finished
    previous = layout[0].gather(1, layout[-1])
    drafter.follow(previous, input_pos, layout[2])
    in_flight = deque([Launched(0, copy_to_host(token))])
    lengths, produced = [cached + len(prompt) for prompt in prompts], [0] * len(prompts)
    ended = None
    while True:
        live = [row for row, done in enumerate(produced) if done < max_new_tokens and is_live(row)]
        fewest = min((produced[row] for row in live), default=0)
        behind = [row for row in live if produced[row] == fewest]  # these set the pace
        known = max(length + min(done, max_new_tokens) for length, done in zip(lengths, produced, strict=True))
        while len(in_flight) < 1 + ahead and min(produced) + len(in_flight) < max_new_tokens:
            k = pace.choose(lambda k, behind=behind: drafter.expected(k, behind, pace.chances))
            if k and drafter.waits and in_flight:
                break  # these drafts need the ids of the last step
            kv_pos = kv_pos_of(known + sum(1 + step.k for step in in_flight) + k)
            began = drafted = ended or _mark(on_gpu)
            if k:
                drafts = drafter.draft(k, token, input_pos, kv_pos)
                drafted = _mark(on_gpu)
                new_ids, n, previous, token, input_pos = steps.verify(token, input_pos, kv_pos, last_pos, *drafts)
                out = torch.cat((new_ids, n), 1)
            else:
                previous, (out, input_pos) = token, steps.plain.decode(token, input_pos, kv_pos)
                token = out
                if len(prompts) > 1:
                    input_pos = torch.minimum(input_pos, last_pos)
            drafter.follow(previous, input_pos, kv_pos)
            now = _mark(on_gpu)
            in_flight.append(Launched(k, copy_to_host(out), began, drafted, now))
            ended = now if on_gpu else None  # a GPU's step includes what the GPU waited for it
        if not in_flight:
            return
        step = in_flight.popleft()
        ids = wait(*step.copy).tolist()
        if step.k:
            ids = [row[: row[-1] + 1] for row in ids]
        for row, done in enumerate(produced):
            if done >= max_new_tokens:  # a GPU's last step may have been launched for nothing
                ids[row] = []
            elif (least := min(ids[row])) < 0:
                at = f"new token {done + 1}"
                if least == BAD_DRAFT:
                    raise no_numbers(drafter.model, f"a draft of {at}", "the draft model's")
                raise no_numbers(model, at)
            produced[row] += len(ids[row])
        drafter.take(ids, step.k, behind[:LEARNERS], pace.chances)
        result = StepResult(ids, step.k)
        if step.began is not None:
            result.draft_s, result.verify_s = _seconds(step.began, step.drafted), _seconds(step.drafted, step.ended)
            progress = sum(len(ids[row]) for row in behind) / max(1, len(behind))
            pace.add(step.k, [len(ids[row]) for row in live], progress, len(ids), result.draft_s, result.verify_s)
        yield result


def _mark(on_gpu: bool) -> Any:
    """A time stamp: an event on the GPU's own clock, or the host's clock for a CPU."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def warm_up_speculation(steps: SpeculativeSteps, prompts: list[list[int]], max_new_tokens: int) -> float:
    """Compile the steps, and on a GPU time their kernels and record them for every cache size. Returns the seconds
    taken. The plain steps are `warm_up`'s.
    """
    start, model, drafter = time.perf_counter(), steps.model, steps.drafter
    drafter.time_kernels(len(prompts))
    if not steps.plain.prefill_is_compiled and not model.slots.is_cuda:
        prompts = [prompt[:2] for prompt in prompts]  # a longer prompt would compile nothing more
    for k in steps.pace.ks:
        time_kernels(model, len(prompts), k + 1)
        only = dataclasses.replace(steps, pace=pace_of(drafter, k))
        deque(islice(speculate(only, prompts, min(2 * k + 3, max_new_tokens)), 3), maxlen=0)  # prefill and two steps
        if model.slots.is_cuda and max_new_tokens > 1:
            zeros = torch.zeros(len(prompts), 1, dtype=torch.long, device=model.slots.device)
            longest = max(map(len, prompts)) + k + 1
            for kv_pos in every_size(model, range(longest, longest + max_new_tokens + k + 2)):
                for _ in range(2):  # the first call compiles
                    drafter.follow(zeros, zeros + 1, kv_pos)
                    drafts = drafter.draft(k, zeros, zeros + 1, kv_pos)
                    steps.verify(zeros, zeros + 1, kv_pos, zeros.clone(), *drafts)
            torch.cuda.synchronize()
    return time.perf_counter() - start
