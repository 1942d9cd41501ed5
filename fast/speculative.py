"""Speculative decoding: a draft proposes k tokens, the target checks them in one pass, the output stays the target's.

    steps = build_speculative_steps(build_steps(target, sampling), DraftModel(draft, sampling, k=5), sampling)
    for step in speculate(steps, [tokenizer.encode("Hello")], max_new_tokens=50): print(step.ids)

Verifying k + 1 tokens reads the target's weights once, as decoding one token does, so every accepted draft saves a
step. The rule of Leviathan et al. 2023 and Chen et al. 2023 makes it exact: a draft x drawn from q is accepted with
probability min(1, p(x) / q(x)), p being the target's distribution; at the first rejection a token is drawn from
norm(max(p - q, 0)), and after k acceptances one from p. Each row of a batch accepts independently.

Worth knowing: the host can launch a step before it has read the result of the last one. A step has fixed shapes, writes
k + 1 slots of the cache and advances a row by 1 to k + 1 positions; a rejected draft's keys and values lie beyond the
row's position and are overwritten before a query reads them. On a GPU the host reads ids and counts one step late.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    stream,
    time_kernels,
    wait,
)
from fast.layers import in_one_region
from fast.metrics import bytes_per_step
from fast.sampling import Sampling, draw
from fast.tokenizer import Tokenizer, load_tokenizer
from model import Transformer
from tp import ALONE, Ranks

MAX_K = 15  # with the token before them 16 rows, the most that the kernels for few rows take
SPARE = MAX_K + 1  # extra cache slots, for drafts past `max_seq_length`
BAD_DRAFT = -2  # in place of a step's ids, if the draft model's logits are not numbers
AUTO_K = (2, 4, 7)  # the k that `choose_fastest` times; each is compiled


class DraftModel(nn.Module):
    """Drafts k tokens by a smaller or quantised model of the same tokenizer, with a cache like the target's.

    vocab_size: the target's (default: the draft's own). Models of one tokenizer differ in it where their embeddings are
    padded, as Qwen 2.5's are, or where a fine-tune added tokens.
    """

    def __init__(self, model: Transformer, sampling: Sampling, k: int, vocab_size: int | None = None):
        super().__init__()
        self.model, self.sampling, self.k = model, sampling, k
        self.vocab_size = vocab_size or model.args.vocab_size

    def prefill(self, idx: Tensor, input_pos: Tensor, kv_pos: Tensor, last: Tensor) -> None:
        self._logits(idx, input_pos, kv_pos, last[:, :0])

    def _logits(self, idx: Tensor, input_pos: Tensor, kv_pos: Tensor, logits_at: Tensor) -> Tensor:
        """Logits for the target's vocabulary; a token that the draft does not have is -inf, and read as its last."""
        own = self.model.args.vocab_size
        logits = self.model(idx.clamp(0, own - 1), input_pos, kv_pos, logits_at=logits_at)
        missing = self.vocab_size - own
        return F.pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits[..., : self.vocab_size]

    def forward(self, new_ids: Tensor, new_pos: Tensor, last_two: Tensor, input_pos: Tensor, kv_pos: Tensor):
        """The drafts, int `[B, k]`, and the distributions they were drawn from, float32 `[B, k, V]`.

        last_two `[B, 2]`: the text's last two tokens, the second at `input_pos [B, 1]`. new_ids `[B, k+1]`: the last
        step's tokens, the first at `new_pos [B, 1]`; only PromptLookup uses them. At temperature 0 the distributions
        are left out, `[B, k, 0]`. A draft is -1 where the logits are not numbers.
        """
        tokens, pos = last_two, torch.cat((input_pos - 1, input_pos), 1)  # draft k, if accepted, was not read yet
        drafts, probs = [], []
        for _ in range(self.k):
            logits = self._logits(tokens, pos, kv_pos, torch.full_like(tokens[:, :1], tokens.shape[1] - 1))
            q = logits[..., :0].float() if self.sampling.temperature == 0 else self.sampling.probs(logits)  # [B, 1, V]
            tokens = self.sampling(logits) if self.sampling.temperature == 0 else draw(q)
            pos = pos[:, -1:] + 1
            drafts.append(tokens)
            probs.append(q)
        return torch.cat(drafts, 1), torch.cat(probs, 1)

    def bytes_per_step(self, batch_size: int, positions: float) -> float:
        """Bytes that drafting k tokens reads: weights and `positions` of KV cache, k times."""
        return self.k * bytes_per_step(self.model, batch_size, positions)


class PromptLookup(nn.Module):
    """Without a model, drafts what followed the text's last 1 to 3 tokens where they last occurred (Saxena 2023)."""

    def __init__(self, target: Transformer, sampling: Sampling, k: int, longest: int = 3):
        super().__init__()
        self.vocab_size, self.sampling, self.k, self.longest = target.args.vocab_size, sampling, k, longest
        # history[b, i] is row b's token at position i. It has the size and the lifetime of the target's cache.
        history = target.slots.new_zeros(target.max_batch_size, len(target.slots) + 1)
        self.register_buffer("history", history, persistent=False)

    def prefill(self, idx: Tensor, input_pos: Tensor, kv_pos: Tensor, last: Tensor) -> None:
        self.history[: len(idx), input_pos] = idx

    def forward(self, new_ids: Tensor, new_pos: Tensor, last_two: Tensor, input_pos: Tensor, kv_pos: Tensor):
        """As `DraftModel.forward`; the distributions are one-hot."""
        B, ahead = new_ids.shape[0], torch.arange(self.k + 1, device=new_ids.device)
        self.history[torch.arange(B, device=new_ids.device)[:, None], new_pos + ahead] = new_ids
        history = self.history[:B]
        at = torch.arange(history.shape[1], device=new_ids.device)
        same, length = at < input_pos, 0  # [B, C]: the tokens that end at `at` equal those that end at `input_pos`
        for i in range(self.longest):
            shifted = F.pad(history, (i, 0), value=-1)[:, : len(at)]
            same = same & (shifted == history.gather(1, (input_pos - i).clamp(min=0)))
            length = length + same.long()
        score = (length * len(at) + at).masked_fill(at >= input_pos, -1)  # the longest match, of these the last
        found = score.argmax(1, keepdim=True)  # [B, 1]
        # Past the end of the text, drafts start over at the token after the match.
        drafts = history.gather(1, found + 1 + ahead[:-1] % (input_pos - found).clamp(min=1))
        if self.sampling.temperature == 0:
            return drafts, torch.empty(B, self.k, 0, device=new_ids.device)
        return drafts, F.one_hot(drafts, self.vocab_size).float()

    def bytes_per_step(self, batch_size: int, positions: float) -> float:
        return self.history[:batch_size].nbytes


def load_draft(
    path: Path | None,
    target: Transformer,
    tokenizer: Tokenizer,
    device: str,
    dtype: torch.dtype,
    ranks: Ranks = ALONE,
    replicate: bool = False,
) -> Transformer | None:
    """The model at `path` that drafts for `target`. Raises ValueError if its tokenizer is not the target's.

    `replicate`: every rank holds all of it, and rank 0's logits are broadcast for each draft. Else `ranks` shard it.
    """
    if path is None:
        return None
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


def accept(sampling: Sampling, logits: Tensor, drafts: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """A step's tokens, int `[B, k+1]`, and n, the number of drafts accepted, int `[B, 1]`.

    logits: the target's `[B, k+1, V]`; drafts `[B, k]`, drawn from q `[B, k, V]`. Only the first n + 1 tokens count: n
    drafts and one from the target. They are distributed as if the target had drawn them one by one.
    """
    if sampling.temperature == 0:
        best = sampling(logits)
        return best, (drafts == best[:, :-1]).long().cumprod(1).sum(1, keepdim=True)
    p, chosen = sampling.probs(logits), drafts[..., None]
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
    """The target's plain steps, and the two functions of a speculative step.

    draft(new_ids, new_pos, last_two, input_pos, kv_pos) -> (drafts, q), see `DraftModel.forward`
    verify(last_two, input_pos, drafts, q, kv_pos, last_pos [B, 1])
        -> (new_ids [B, k+1], n [B, 1], the next last_two and input_pos, clamped to last_pos)
    """

    plain: Steps
    drafter: DraftModel | PromptLookup
    draft: Callable[..., tuple[Tensor, Tensor]]
    verify: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]

    @property
    def model(self) -> Transformer:
        return self.plain.model

    @property
    def k(self) -> int:
        return self.drafter.k


def build_speculative_steps(
    plain: Steps,
    drafter: DraftModel | PromptLookup,
    sampling: Sampling,
    compile: bool = False,
    accept: Callable = accept,
) -> SpeculativeSteps:
    """Compile the steps as asked: the k steps of the draft are one graph, the target's pass and `accept` another.

    The caches of the target and of a draft model must be set up with `spare=SPARE`.
    accept: the acceptance rule; a benchmark without trained weights passes its own. ValueError for k out of range.
    """
    if not 1 <= drafter.k <= MAX_K:
        raise ValueError(f"speculate_k {drafter.k} must be 1 to {MAX_K}")
    model = plain.model
    ahead = torch.arange(drafter.k + 1, device=model.tok_embeddings.weight.device)

    def verify(last_two: Tensor, input_pos: Tensor, drafts: Tensor, q: Tensor, kv_pos: Tensor, last_pos: Tensor):
        idx = torch.cat((last_two[:, 1:], drafts), 1).clamp(min=0)  # [B, k+1]
        new_ids, n = accept(sampling, model(idx, input_pos + ahead, kv_pos), idx[:, 1:], q)
        new_ids = new_ids.masked_fill((drafts < 0).any(1, keepdim=True), BAD_DRAFT)
        last_two = torch.cat((idx.gather(1, n), new_ids.gather(1, n)), 1)
        return new_ids, n, last_two, torch.minimum(input_pos + n + 1, last_pos)

    draft = drafter.forward
    if compile:
        draft = compile_step(draft, (None, None, None, None, 0), record=True)
        verify = compile_step(verify, (None, None, None, None, 0, None), record=True)
    drafting = drafter.model if isinstance(drafter, DraftModel) else model
    return SpeculativeSteps(plain, drafter, in_one_region(drafting, draft), in_one_region(model, verify))


def candidate_steps(
    k: int | str, plain: Steps, draft: Transformer | None, sampling: Sampling, compile: bool
) -> list[SpeculativeSteps]:
    """Steps that draft `k` tokens with `draft`, or by prompt lookup if it is None; for "auto" one per k in AUTO_K."""
    drafters = [
        PromptLookup(plain.model, sampling, n)
        if draft is None
        else DraftModel(draft, sampling, n, plain.model.args.vocab_size)
        for n in (AUTO_K if k == "auto" else (k,))
    ]
    return [build_speculative_steps(plain, drafter, sampling, compile) for drafter in drafters]


@dataclass
class StepResult:
    """Result of one step: each row's new ids, none once the row has `max_new_tokens`, and the seconds it took.

    The first step is the prefill, one id per row. A row's last ids may exceed `max_new_tokens`: the caller cuts them.
    """

    ids: list[list[int]]
    draft_s: float = 0.0
    verify_s: float = 0.0


def speculate(
    steps: SpeculativeSteps, prompts: list[list[int]], max_new_tokens: int, cached: int = 0
) -> Iterator[StepResult]:
    """Yield steps until every row has `max_new_tokens` ids; leave the loop to stop. Otherwise as `decoding.stream`."""
    model, k, on_gpu = steps.model, steps.k, steps.model.slots.is_cuda
    check_fit(model, prompts, max_new_tokens, cached)
    layout = lay_out(model, prompts, cached)
    token, input_pos = steps.plain.prefill(*layout), cached + layout[-1] + 1
    steps.drafter.prefill(*layout)
    last_pos = input_pos + max_new_tokens - 1  # a finished row stays there until all have finished
    new_ids, n, new_pos = F.pad(token, (0, k)), torch.zeros_like(token), input_pos
    last_two = torch.cat((layout[0].gather(1, layout[-1]), token), 1)
    in_flight = deque([(copy_to_host(torch.cat((new_ids, n), 1)), [])])  # steps whose ids the host has not read yet
    lengths, produced = [cached + len(prompt) for prompt in prompts], [0] * len(prompts)
    while True:
        # On a CPU the host reads a step before the next one begins; a GPU runs a step ahead.
        while len(in_flight) < 1 + on_gpu and min(produced) + len(in_flight) < max_new_tokens:
            known = max(length + min(done, max_new_tokens) for length, done in zip(lengths, produced, strict=True))
            kv_pos = slots_to_read(model, known + len(in_flight) * (k + 1) + k)
            marks = [_mark(on_gpu)]
            drafts, q = steps.draft(new_ids, new_pos, last_two, input_pos, kv_pos)
            marks.append(_mark(on_gpu))
            new_pos = input_pos + 1
            new_ids, n, last_two, input_pos = steps.verify(last_two, input_pos, drafts, q, kv_pos, last_pos)
            marks.append(_mark(on_gpu))
            in_flight.append((copy_to_host(torch.cat((new_ids, n), 1)), marks))
        if not in_flight:
            return
        copy, marks = in_flight.popleft()
        rows = wait(*copy).tolist()
        ids = [row[: row[-1] + 1] if done < max_new_tokens else [] for row, done in zip(rows, produced, strict=True)]
        flat = [i for row in ids for i in row]
        if BAD_DRAFT in flat:
            raise no_numbers(steps.drafter.model, f"a draft of new token {min(produced) + 1}", "the draft model's")
        if min(flat, default=0) < 0:  # a GPU's last step may have been launched for nothing
            raise no_numbers(model, f"new token {min(produced) + 1}")
        produced = [done + len(row) for done, row in zip(produced, ids, strict=True)]
        yield StepResult(ids, *(_seconds(*span) for span in pairwise(marks)))


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
    """Compile the step, and on a GPU time its kernels and record it for every cache size. Returns the seconds taken."""
    start, model, k = time.perf_counter(), steps.model, steps.k
    time_kernels(model, len(prompts), k + 1)
    if isinstance(steps.drafter, DraftModel):
        for n in (2, 1):  # two tokens first, then token by token
            time_kernels(steps.drafter.model, len(prompts), n)
    if not steps.plain.prefill_is_compiled and not model.slots.is_cuda:
        prompts = [prompt[:2] for prompt in prompts]  # a longer prompt would compile nothing more
    deque(speculate(steps, prompts, min(2 * k + 3, max_new_tokens)), maxlen=0)  # two steps at least
    if model.slots.is_cuda and max_new_tokens > 1:
        zeros = torch.zeros(len(prompts), 1, dtype=torch.long, device=model.slots.device)
        new_ids, longest = zeros.expand(-1, k + 1).clone(), max(map(len, prompts)) + k + 1
        for kv_pos in every_size(model, range(longest, longest + max_new_tokens + k + 2)):
            for _ in range(2):  # the first call compiles
                drafts, q = steps.draft(new_ids, zeros, new_ids[:, :2].clone(), zeros + 1, kv_pos)
                steps.verify(new_ids[:, :2].clone(), zeros + 1, drafts, q, kv_pos, zeros)
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ---- Acceptance, and the choice of k.


@dataclass
class Acceptance:
    """How often a step accepted n drafts, n = 0 to k, and what the steps cost."""

    k: int
    counts: list[int] = field(init=False)
    draft_s: list[float] = field(default_factory=list)
    verify_s: list[float] = field(default_factory=list)
    compared: list[tuple[float, float]] = field(default_factory=list)  # tokens/s, speculative and plain

    def __post_init__(self):
        self.counts = [0] * (self.k + 1)

    @property
    def n_steps(self) -> int:
        return len(self.verify_s)

    def compare(self, rate: float | None, plain_rate: float | None) -> None:
        """Record the tokens/s of one sample, and of plain decoding right after it."""
        if rate and plain_rate:
            self.compared.append((rate, plain_rate))

    def add(self, step: StepResult, live: list[bool]) -> None:
        """Count a step that is not the prefill, for the rows that had not ended before it."""
        for ids, is_live in zip(step.ids, live, strict=True):
            if is_live and ids:
                self.counts[len(ids) - 1] += 1
        self.draft_s.append(step.draft_s)
        self.verify_s.append(step.verify_s)

    def mean(self, k: int | None = None) -> float:
        """Drafts accepted per step and row; with `k`, as if only the first k had been proposed."""
        accepted = sum(min(n, k or n) * count for n, count in enumerate(self.counts))
        return accepted / max(1, sum(self.counts))

    def figures(self) -> dict[str, Any]:
        """The entry in `--metrics_path`; times are medians per step."""
        figures: dict[str, Any] = {"counts": self.counts, "mean": self.mean(), "k": self.k}
        for name, seconds in (("draft_s", self.draft_s), ("verify_s", self.verify_s)):
            figures[name] = median(seconds) if seconds else None
        if self.compared:
            figures["plain_decode_tokens_per_s"] = median(plain for _, plain in self.compared)
            figures["speed_up"] = median(rate / plain for rate, plain in self.compared)
        return figures


def choose_fastest(
    all_steps: list[SpeculativeSteps], prompts: list[list[int]], max_new_tokens: int
) -> tuple[SpeculativeSteps | Steps, str]:
    """Time all steps and plain decoding briefly on these prompts; return the fastest of them, and a report.

    Acceptance is measured at the largest k alone: what a smaller one would have accepted follows from it.
    """
    n = min(64, max_new_tokens)
    seconds, accepted = [], None
    for steps in sorted(all_steps, key=lambda steps: steps.k, reverse=True):
        measured = Acceptance(steps.k)
        for step in islice(speculate(steps, prompts, n), 1, None if accepted is None else 9):
            measured.add(step, [True] * len(prompts))
        accepted = accepted or measured
        figures = measured.figures()
        seconds.append((steps, (figures["draft_s"] or 0) + (figures["verify_s"] or 0)))
    times = []
    for _ in stream(all_steps[0].plain, prompts, min(18, n)):
        times.append(time.perf_counter())
    plain_s = median(b - a for a, b in pairwise(times)) if len(times) > 1 else 0.0
    report, best, best_s = [f"plain {plain_s * 1e3:.2f} ms/token"], all_steps[0].plain, plain_s
    for steps, step_s in reversed(seconds):
        token_s = step_s / (1 + accepted.mean(steps.k))
        report.append(f"k={steps.k} {token_s * 1e3:.2f}")
        if token_s < best_s:
            best, best_s = steps, token_s
    chosen = f"k={best.k}" if isinstance(best, SpeculativeSteps) else "plain decoding"
    return best, f"--speculate_k auto: {', '.join(report)}: {chosen}"
