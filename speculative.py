"""Speculative decoding: a draft proposes k tokens, the target checks them in one pass, the output stays the target's.

    steps = build_speculative_steps(target, DraftModel(draft, sampling, k), sampling, compile=True)
    for step in speculate(steps, [tokenizer.encode("Hello")], max_new_tokens=50): print(step.ids)

The target's pass over k + 1 tokens reads its weights once, as a decoded token does, so every accepted draft saves a
step. The rule of Leviathan et al. 2023 and Chen et al. 2023 makes it exact: a draft x drawn from q is accepted with
probability min(1, p(x) / q(x)), p being the target's distribution; at the first rejection a token is drawn from
norm(max(p - q, 0)), and after k acceptances one from p. Rows of a batch accept on their own.

Worth knowing: nothing here waits for the device. Each step has fixed shapes, writes k + 1 slots of the cache and
advances a row by 1 to k + 1 positions; what a rejected draft left behind lies beyond the row's position, where no query
looks before it is overwritten. Only the host's copy of ids and counts, one step behind on a GPU, says how far rows are.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoding import Steps, build_steps, check_fit, compile_step, copy_to_host, kv_slots, lay_out, stream, wait
from model import Transformer
from sampling import Sampling, draw

MAX_K = 15  # with the token before them 16 rows, as many as the kernels for few rows take
SPARE = MAX_K + 1  # cache slots behind the last token's, for drafts that are rejected
AUTO_K = (2, 4, 7)  # what `choose` tries: each is compiled and timed


class DraftModel(nn.Module):
    """Drafts k tokens by a smaller or quantised model of the same vocabulary, with a cache like the target's."""

    def __init__(self, model: Transformer, sampling: Sampling, k: int):
        super().__init__()
        self.model, self.sampling, self.k = model, sampling, k

    def prefill(self, idx: Tensor, input_pos: Tensor, kv_pos: Tensor, last: Tensor) -> None:
        self.model(idx, input_pos, kv_pos, logits_at=last[:, :0])

    def forward(self, new: Tensor, new_pos: Tensor, token: Tensor, input_pos: Tensor, kv_pos: Tensor):
        """The drafts, int `[B, k]`, and the distributions they were drawn from, float32 `[B, k, V]`.

        new `[B, k+1]`: the last step's tokens, the first at position `new_pos [B, 1]`; token `[B, 1]`, the last
        that counts, is at `input_pos [B, 1]`. At temperature 0 the distributions are left out, `[B, k, 0]`.
        """
        drafts, probs = [], []
        for i in range(self.k):
            logits = self.model(token, input_pos + i, kv_pos)  # [B, 1, V]
            q = logits[..., :0].float() if self.sampling.temperature == 0 else self.sampling.probs(logits)
            token = self.sampling(logits) if self.sampling.temperature == 0 else draw(q)
            drafts.append(token)
            probs.append(q)
        self.model(token, input_pos + self.k, kv_pos, logits_at=token[:, :0])  # its keys, should it be accepted
        return torch.cat(drafts, 1), torch.cat(probs, 1)


class PromptLookup(nn.Module):
    """Drafts what followed the last occurrence of the text's last tokens, at most three (Saxena 2023): no model."""

    def __init__(self, target: Transformer, sampling: Sampling, k: int, longest: int = 3):
        super().__init__()
        self.vocab_size, self.sampling, self.k, self.longest = target.args.vocab_size, sampling, k, longest
        # history[b, i] is row b's token at position i. The target's cache is as wide, and kept as long.
        history = target.slots.new_zeros(target.max_batch_size, len(target.slots) + 1)
        self.register_buffer("history", history, persistent=False)

    def prefill(self, idx: Tensor, input_pos: Tensor, kv_pos: Tensor, last: Tensor) -> None:
        self.history[: len(idx), input_pos] = idx

    def forward(self, new: Tensor, new_pos: Tensor, token: Tensor, input_pos: Tensor, kv_pos: Tensor):
        """As `DraftModel.forward`; a draft's distribution is all on itself."""
        B, ahead = new.shape[0], torch.arange(self.k + 1, device=new.device)
        self.history[torch.arange(B, device=new.device)[:, None], new_pos + ahead] = new
        history = self.history[:B]
        at = torch.arange(history.shape[1], device=new.device)
        same, length = at < input_pos, 0  # [B, C]: the tokens up to `at` and those up to `input_pos` are the same
        for i in range(self.longest):
            shifted = F.pad(history, (i, 0), value=-1)[:, : len(at)]
            same = same & (shifted == history.gather(1, (input_pos - i).clamp(min=0)))
            length = length + same.long()
        score = (length * len(at) + at).masked_fill(at >= input_pos, -1)  # the longest, of these the last
        found = score.argmax(1, keepdim=True)  # [B, 1]
        # Drafts beyond the text's end repeat what lies between.
        drafts = history.gather(1, found + 1 + ahead[:-1] % (input_pos - found).clamp(min=1))
        if self.sampling.temperature == 0:
            return drafts, torch.empty(B, self.k, 0, device=new.device)
        return drafts, F.one_hot(drafts, self.vocab_size).float()


def decide(sampling: Sampling, logits: Tensor, drafts: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of a step and how many drafts they begin with: int `[B, k+1]` and `[B, 1]` (n: 0 to k).

    logits: the target's `[B, k+1, V]`; drafts `[B, k]`, drawn from q `[B, k, V]`. Of the tokens the first n + 1 count;
    they are distributed as if the target had drawn them one by one.
    """
    if sampling.temperature == 0:
        best = sampling(logits)
        return best, (drafts == best[:, :-1]).long().cumprod(1).sum(1, keepdim=True)
    p, chosen = sampling.probs(logits), drafts[..., None]
    p_chosen, q_chosen = p[:, :-1].gather(2, chosen)[..., 0], q.gather(2, chosen)[..., 0]  # [B, k]
    accepted = torch.rand_like(p_chosen) * q_chosen < p_chosen
    n = accepted.long().cumprod(1).sum(1, keepdim=True)
    row = n[..., None].expand(-1, -1, p.shape[-1])
    p_n, q_n = p.gather(1, row), F.pad(q, (0, 0, 0, 1)).gather(1, row)  # [B, 1, V]; q is nothing after k acceptances
    rest = (p_n - q_n).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p_n)  # p and q equal but for rounding
    return F.pad(drafts, (0, 1)).scatter(1, n, draw(rest)), n


@dataclass(frozen=True)
class SpeculativeSteps(Steps):
    """The functions of `Steps`, for the target alone, and the two of a speculative step.

    drafter.prefill(the arguments of Steps.prefill)
    draft(new, new_pos, token, input_pos, kv_pos) -> (drafts, q), see `DraftModel.forward`
    verify(token [B, 1], input_pos [B, 1], drafts, q, kv_pos, last_pos [B, 1])
        -> (new [B, k+1], n [B, 1], the last token that counts [B, 1], its position [B, 1], at most last_pos)
    """

    k: int
    drafter: DraftModel | PromptLookup
    draft: Callable[..., tuple[Tensor, Tensor]]
    verify: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def build_speculative_steps(
    model: Transformer,
    drafter: DraftModel | PromptLookup,
    sampling: Sampling,
    compile: bool = False,
    compile_prefill: bool = False,
    decide: Callable = decide,
) -> SpeculativeSteps:
    """Compile the steps as asked: the k steps of the draft are one graph, the target's pass with its decision another.

    The caches of the target and of a draft model must be set up, with SPARE slots to spare.
    decide: what accepts; a benchmark without trained weights gives another. Raises ValueError for k out of range.
    """
    if not 1 <= drafter.k <= MAX_K:
        raise ValueError(f"--speculate_k {drafter.k} must be 1 to {MAX_K}")
    ahead = torch.arange(drafter.k + 1, device=model.tok_embeddings.weight.device)

    def verify(token: Tensor, input_pos: Tensor, drafts: Tensor, q: Tensor, kv_pos: Tensor, last_pos: Tensor):
        logits = model(torch.cat((token, drafts), 1), input_pos + ahead, kv_pos)  # [B, k+1, V]
        new, n = decide(sampling, logits, drafts, q)
        return new, n, new.gather(1, n), torch.minimum(input_pos + n + 1, last_pos)

    draft = drafter.forward
    if compile:
        draft = compile_step(draft, (None, None, None, None, 0), mode="reduce-overhead")
        verify = compile_step(verify, (None, None, None, None, 0, None), mode="reduce-overhead")
    plain = build_steps(model, sampling, compile, compile_prefill)
    return SpeculativeSteps(**vars(plain), k=drafter.k, drafter=drafter, draft=draft, verify=verify)


@dataclass
class Step:
    """What a step brought: each row's new ids, none once it has all it was asked for; the time on the device.

    The first step is the prefill, one id a row. A row's last ids may go beyond the number asked for: cut them.
    """

    ids: list[list[int]]
    draft_s: float = 0.0
    verify_s: float = 0.0


def speculate(
    steps: SpeculativeSteps, prompts: list[list[int]], max_new_tokens: int, cached: int = 0
) -> Iterator[Step]:
    """Yield steps until every row has `max_new_tokens` ids; stop by leaving the loop. Else as `decoding.stream`."""
    model, k, on_gpu = steps.model, steps.k, steps.model.slots.is_cuda
    check_fit(model, prompts, max_new_tokens, cached)
    layout = lay_out(model, prompts, cached)
    token, input_pos = steps.prefill(*layout), cached + layout[-1] + 1
    steps.drafter.prefill(*layout)
    last_pos = input_pos + max_new_tokens - 1  # of a row's last token, where it waits for the other rows
    new, n, new_pos = F.pad(token, (0, k)), torch.zeros_like(token), input_pos
    under_way = deque([(copy_to_host(torch.cat((new, n), 1)), [])])  # what the host has not seen yet
    lengths, produced = [cached + len(prompt) for prompt in prompts], [0] * len(prompts)
    while True:
        # On a CPU the host reads a step before the next one begins; a GPU runs a step ahead.
        while len(under_way) < 1 + on_gpu and min(produced) + len(under_way) < max_new_tokens:
            known = max(length + min(has, max_new_tokens) for length, has in zip(lengths, produced, strict=True))
            kv_pos = model.slots[: kv_slots(known + len(under_way) * (k + 1) + k, len(model.slots))]
            marks = [_mark(on_gpu)]
            drafts, q = steps.draft(new, new_pos, token, input_pos, kv_pos)
            marks.append(_mark(on_gpu))
            new_pos = input_pos + 1
            new, n, token, input_pos = steps.verify(token, input_pos, drafts, q, kv_pos, last_pos)
            marks.append(_mark(on_gpu))
            under_way.append((copy_to_host(torch.cat((new, n), 1)), marks))
        if not under_way:
            return
        copy, marks = under_way.popleft()
        rows = wait(*copy).tolist()
        ids = [row[: row[-1] + 1] if has < max_new_tokens else [] for row, has in zip(rows, produced, strict=True)]
        produced = [has + len(row) for has, row in zip(produced, ids, strict=True)]
        yield Step(ids, *(_seconds(*pair) for pair in pairwise(marks)))


def _mark(on_gpu: bool) -> Any:
    """This moment: on the device's clock where it runs ahead of the host."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def warm_up_speculation(steps: SpeculativeSteps, prompts: list[list[int]], max_new_tokens: int) -> float:
    """Compile the speculative step, and on a GPU record it for every cache size; the seconds it took."""
    start, model, k = time.perf_counter(), steps.model, steps.k
    if not steps.prefill_is_compiled and not model.slots.is_cuda:
        prompts = [prompt[:2] for prompt in prompts]  # nothing to gain from a whole one
    deque(speculate(steps, prompts, min(2 * k + 3, max_new_tokens)), maxlen=0)  # two steps at least
    if model.slots.is_cuda and max_new_tokens > 1:
        zeros = torch.zeros(len(prompts), 1, dtype=torch.long, device=model.slots.device)
        longest = max(map(len, prompts)) + k + 1
        for slots in sorted({kv_slots(longest + n, len(model.slots)) for n in range(max_new_tokens + k + 2)}):
            for _ in range(3):  # warm-up, recording, replay
                drafts, q = steps.draft(zeros.expand(-1, k + 1).contiguous(), zeros, zeros, zeros, model.slots[:slots])
                steps.verify(zeros, zeros, drafts, q, model.slots[:slots], zeros)
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ---- What it brings.


@dataclass
class Acceptance:
    """How often a step accepted n drafts, n = 0 to k, and what the steps cost."""

    counts: list[int]
    draft_s: list[float] = field(default_factory=list)
    verify_s: list[float] = field(default_factory=list)

    def add(self, step: Step, live: list[bool]) -> None:
        """Count a step that is not the prefill, for the rows that had not ended before it."""
        for ids, is_live in zip(step.ids, live, strict=True):
            if is_live and ids:
                self.counts[len(ids) - 1] += 1
        self.draft_s.append(step.draft_s)
        self.verify_s.append(step.verify_s)

    def mean(self, k: int | None = None) -> float:
        """Drafts accepted per step and row; with `k`, had there been only so many."""
        accepted = sum(min(n, k or n) * count for n, count in enumerate(self.counts))
        return accepted / max(1, sum(self.counts))

    def figures(self) -> dict[str, Any]:
        """The entry in `--metrics_path`; times are medians per step."""
        times = {"draft_s": self.draft_s, "verify_s": self.verify_s}
        medians = {name: median(values) if values else None for name, values in times.items()}
        return {"counts": self.counts, "mean": self.mean(), "k": len(self.counts) - 1, **medians}


def choose(
    all_steps: list[SpeculativeSteps], prompts: list[list[int]], max_new_tokens: int
) -> tuple[SpeculativeSteps | None, str]:
    """The steps that are fastest on these prompts by a short measurement, or None where plain decoding is; a report.

    Acceptance is taken from the largest k: what a smaller one would have accepted follows from it.
    """
    n = min(64, max_new_tokens)
    seconds, accepted = [], None
    for steps in sorted(all_steps, key=lambda steps: steps.k, reverse=True):
        measured = Acceptance([0] * (steps.k + 1))
        for step in islice(speculate(steps, prompts, n), 1, None if accepted is None else 9):
            measured.add(step, [True] * len(prompts))
        accepted = accepted or measured
        figures = measured.figures()
        seconds.append((steps, (figures["draft_s"] or 0) + (figures["verify_s"] or 0)))
    times = []
    for _ in stream(all_steps[0], prompts, min(18, n)):
        times.append(time.perf_counter())
    plain_s = median(b - a for a, b in pairwise(times)) if len(times) > 1 else 0.0
    report, best, best_s = [f"plain {plain_s * 1e3:.2f} ms/token"], None, plain_s
    for steps, step_s in reversed(seconds):
        token_s = step_s / (1 + accepted.mean(steps.k))
        report.append(f"k={steps.k} {token_s * 1e3:.2f}")
        if token_s < best_s:
            best, best_s = steps, token_s
    return best, f"--speculate_k auto: {', '.join(report)}: " + (f"k={best.k}" if best else "plain decoding")
