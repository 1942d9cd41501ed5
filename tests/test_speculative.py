"""speculative.py: with any draft the output is the target's: greedy token for token, sampled by a chi-square test.

    python -m pytest tests/test_speculative.py

Worth knowing: greedy tokens are compared in float32, where batching changes logits too little to change an argmax.
"""

import base64
import dataclasses
import itertools
import json
import shutil
import subprocess
from collections import deque
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import GREEDY, make_tiny, prompt_of, tokens_of
from heads import make_dflash, make_head, save, save_dflash

import generate
from fast import chat, cli, speculative
from fast.checkpoint import load_model, open_checkpoint, save_checkpoint
from fast.cli import DEMO
from fast.decoding import build_steps, warm_up
from fast.drafting import SPARE, DraftModel
from fast.head_files import load_head
from fast.pace import Pace
from fast.sampling import Sampling
from fast.speculative import SpeculativeSteps, build_speculative_steps, drafter_for, speculate, warm_up_speculation
from fast.tokenizer import load_tokenizer
from model import Transformer
from quantize import quantize

ROOT = Path(generate.__file__).parent
PROMPTS = [prompt_of(length) for length in (1, 2, 9, 30)]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def with_cache(model: Transformer, rows: int = 1, capacity: int = 64) -> Transformer:
    model.setup_caches(rows, capacity, spare=SPARE)
    return model


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> Path:
    """A random model that is unrelated to the target."""
    path = tmp_path_factory.mktemp("stranger")
    hf = make_tiny("llama", num_hidden_layers=1, max_position_embeddings=512)
    hf.lm_head.weight.set_(hf.lm_head.weight.flip(0))
    hf.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def head(ours, tmp_path_factory) -> Path:
    """An EAGLE-3 head that often knows what the tiny model says after PROMPTS, and not after other texts."""
    target, untrained, path = ours(), make_head(), tmp_path_factory.mktemp("head")
    with torch.no_grad():
        texts = [prompt + tokens_of(build_steps(target, GREEDY), [prompt], 30)[0] for prompt in PROMPTS]
        loaded, xs = load_head(save(untrained, path, "speculators"), target, dtype=torch.float32), []
        for text in texts:
            idx = torch.tensor([text])
            hidden = loaded.fuse(target(idx, hidden_at=loaded.hidden_at)[1])
            xs.append(loaded.norm(loaded(idx[:, 1:-1], hidden[:, :-2]))[0])
        following = torch.cat([torch.tensor(text[2:]) for text in texts])
        own = following.unique()
        trained = make_head(own_vocab=own.tolist())
        wanted = (following[:, None] == own).float()
        trained.lm_head.weight.copy_(10 * torch.linalg.lstsq(torch.cat(xs), wanted, driver="gelsd").solution.T)
    return save(trained, path, "speculators")


@pytest.fixture(scope="module")
def dflash(ours, tmp_path_factory) -> Path:
    """A DFlash head that sometimes knows what the tiny model says after PROMPTS."""
    target, path = ours(), tmp_path_factory.mktemp("dflash")
    untrained = make_dflash(hidden_at=(1, 2), own_vocab=range(128))
    with torch.no_grad():
        loaded = load_head(save_dflash(untrained, path, "speculators"), target, dtype=torch.float32)
        xs, following = [], []
        loaded.setup_caches(1, 96, SPARE)
        for prompt in PROMPTS:
            text = prompt + tokens_of(build_steps(target, GREEDY), [prompt], 32)[0]
            idx, slots = torch.tensor([text]), loaded.slots
            loaded.read(idx, target(idx, hidden_at=loaded.hidden_at)[1], slots[None, : len(text)], slots)
            for at in range(len(text) - 6, len(prompt) - 1, -1):  # what a block overwrites is not needed again
                block = torch.tensor([[text[at], 5, 5, 5, 5]])
                xs.append(loaded.norm(loaded(block, torch.tensor([[at]]), slots))[0, 1:])
                following.append(torch.tensor(text[at + 1 : at + 5]))
        own = torch.cat(following).unique()
        trained = make_dflash(hidden_at=(1, 2), own_vocab=own.tolist())
        wanted = (torch.cat(following)[:, None] == own).float()
        trained.lm_head.weight.copy_(10 * torch.linalg.lstsq(torch.cat(xs), wanted, driver="gelsd").solution.T)
    return save_dflash(trained, path, "speculators")


@pytest.fixture
def drafted(ours, stranger, head, dflash):
    """`drafted(by, k)`: speculative steps for the tiny model, drafted by itself, a stranger, a head or lookup."""

    def make(by: str, k, sampling=GREEDY, rows=1, capacity=64, family="llama", compile=False) -> SpeculativeSteps:
        target = with_cache(ours(family, capacity=capacity), rows, capacity)
        if by == "lookup":
            draft = None
        elif by in ("head", "dflash"):
            path = head if by == "head" else dflash
            draft = with_cache(load_head(path, target, dtype=torch.float32), rows, capacity)
        else:
            draft = ours(family, capacity=capacity) if by == "itself" else load_model(stranger, dtype=torch.float32)
            draft = with_cache(draft, rows, capacity)
        drafter = drafter_for(draft, target, sampling, k, compile)
        plain = build_steps(target, sampling, compile, run=drafter.run)
        return build_speculative_steps(plain, drafter, sampling, k, compile)

    return make


def rows_of(steps: SpeculativeSteps, prompts: list[list[int]], n: int, cached: int = 0) -> list[list[int]]:
    """`n` tokens for every row."""
    rows = [[] for _ in prompts]
    for step in speculate(steps, prompts, n, cached):
        for row, ids in zip(rows, step.ids, strict=True):
            row += ids
    assert all(len(row) >= n for row in rows)
    return [row[:n] for row in rows]


# --- greedy: token for token -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["itself", "stranger", "head", "dflash", "lookup"])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_greedy_tokens_are_plain_decoding_s(ours, drafted, by, k):
    plain, steps = build_steps(ours(), GREEDY), drafted(by, k)
    for prompt in PROMPTS:
        for n in (1, 24):
            assert rows_of(steps, [prompt], n) == tokens_of(plain, [prompt], n)


@pytest.mark.parametrize("by", ["itself", "head", "dflash"])
def test_greedy_tokens_over_a_quantized_cache(ours, drafted, by):
    model, steps = ours("llama"), drafted(by, 4)
    for part, spare in ((model, 0), (steps.model, SPARE), (steps.drafter.model, SPARE)):
        part.setup_caches(1, 64, spare, torch.int8)
    assert rows_of(steps, [PROMPTS[2]], 24) == tokens_of(build_steps(model, GREEDY), [PROMPTS[2]], 24)


@pytest.mark.parametrize("scheme", [{"mode": "int8"}, {"mode": "int4", "groupsize": 32}], ids=lambda s: s["mode"])
def test_greedy_tokens_of_a_quantised_target(tiny, head, tmp_path, scheme):
    """A DFlash head uses its quantised output projection."""
    quantize(open_checkpoint(tiny("llama-head-dim")[1]), scheme, tmp_path / "model.pth", "cpu")
    target = with_cache(load_model(tmp_path / "model.pth", dtype=torch.float32))
    expected = tokens_of(build_steps(target, GREEDY), [PROMPTS[2]], 24)
    for path in (head, save_dflash(make_dflash(), tmp_path / "dflash")):
        loaded = with_cache(load_head(path, target, dtype=torch.float32))
        assert (loaded.output is target.output) == (path != head)
        drafter = drafter_for(loaded, target, GREEDY, 4)
        steps = build_speculative_steps(build_steps(target, GREEDY, run=drafter.run), drafter, GREEDY, 4)
        assert rows_of(steps, [PROMPTS[2]], 24) == expected


@pytest.mark.parametrize("family", ["mistral-window", "qwen3", "qwen3-moe"])
def test_greedy_tokens_of_other_families(ours, drafted, family):
    expected = tokens_of(build_steps(ours(family), GREEDY), [PROMPTS[2]], 24)
    for by in ("itself", "head", "dflash", "lookup"):
        assert rows_of(drafted(by, 4, family=family), [PROMPTS[2]], 24) == expected


@pytest.mark.parametrize("by", ["itself", "stranger", "head", "dflash", "lookup"])
def test_rows_of_a_batch_accept_on_their_own(ours, drafted, by):
    expected = [tokens_of(build_steps(ours(), GREEDY), [prompt], 20)[0] for prompt in PROMPTS]
    steps = drafted(by, 3, rows=5)
    assert rows_of(steps, PROMPTS, 20) == expected
    assert rows_of(steps, PROMPTS[:2], 20) == expected[:2]


def test_the_cache_may_be_filled_to_its_last_slot(ours, drafted):
    prompt = PROMPTS[2]
    expected = tokens_of(build_steps(ours(), GREEDY), [prompt], 20)
    for capacity in (28, 12):
        assert (
            rows_of(drafted("itself", 8, capacity=capacity), [prompt], capacity - 8)[0] == expected[0][: capacity - 8]
        )
    with pytest.raises(ValueError, match="1 rows of 29 tokens .* do not fit the cache of 1 x 28"):
        rows_of(drafted("itself", 8, capacity=28), [prompt], 21)


def test_demo_pair_is_plain_decoding_and_worth_it():
    tokenizer = load_tokenizer(DEMO)
    target = with_cache(load_model(DEMO, dtype=torch.float32), capacity=100)
    draft = with_cache(load_model(DEMO.parent / "draft", dtype=torch.float32), capacity=100)
    plain = build_steps(target, GREEDY)
    steps = build_speculative_steps(plain, DraftModel(draft, GREEDY), GREEDY, 5)
    for text in ("She could not", "Mr. Darcy", "It was a"):
        prompt = tokenizer.encode(text)
        assert rows_of(steps, [prompt], 60) == tokens_of(plain, [prompt], 60)
    assert steps.pace.tallies[5].mean() > 2


@pytest.mark.parametrize("n", [100, 160])
def test_a_draft_may_have_fewer_or_more_embeddings(ours, tmp_path, n):
    make_tiny("llama", num_hidden_layers=1, vocab_size=n).save_pretrained(tmp_path)
    expected = [tokens_of(build_steps(ours(), GREEDY), [prompt], 20)[0] for prompt in PROMPTS]
    assert max(map(max, expected)) > 100
    for sampling in (GREEDY, Sampling(0.5, None)):
        target, draft = (with_cache(m, 4) for m in (ours(rows=4), load_model(tmp_path, dtype=torch.float32)))
        drafter = DraftModel(draft, sampling, target.args.vocab_size)
        steps = build_speculative_steps(build_steps(target, sampling), drafter, sampling, 3)
        rows = rows_of(steps, PROMPTS, 20)
        assert rows == expected if sampling == GREEDY else max(map(max, rows)) < 128


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, 20), Sampling(0.8, None)])
@pytest.mark.parametrize("by", ["itself", "head", "dflash", "lookup"])
def test_numbers_that_are_none_end_a_text(drafted, by, sampling):
    steps = drafted(by, 3, sampling, rows=2)
    for model in [steps.model] + ([] if by == "lookup" else [steps.drafter.model]):
        found = speculate(steps, [PROMPTS[2]] * 2, 50)
        n = sum(len(next(found).ids[0]) for _ in range(3))
        last = model.layers[-1]
        norm = (last.block if by == "head" and model is not steps.model else last).ffn_norm.weight.data
        kept, norm[7] = norm[7].item(), torch.nan
        whose = "the model's logits for new" if model is steps.model else "the draft model's logits for a draft of new"
        with pytest.raises(ValueError, match=f"{whose} token [0-9]+ are NaN or infinite"):
            next(found)
        norm[7] = kept
    assert n >= 3


# --- plain steps in between ------------------------------------------------------------------------------------------


class Mixed(Pace):
    """Takes these k in turn, whatever pays."""

    def __init__(self, *ks: int):
        super().__init__(tuple(set(ks) - {0}), (0.5,), adapts=False)
        self.order = itertools.cycle(ks)

    def choose(self, expected):
        return next(self.order)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("by", ["itself", "stranger", "head", "dflash", "lookup"])
@pytest.mark.parametrize("pace", [None, (0, 3), (2, 0, 0, 0, 15, 1, 0, 7), (0,), tuple(range(1, 16)), (15,)])
def test_greedy_tokens_with_plain_steps_in_between(ours, drafted, monkeypatch, by, pace, ahead):
    """ahead: how many steps are launched before the last one is read, as on a GPU."""
    monkeypatch.setattr(speculative, "steps_ahead", lambda model: ahead)
    expected = [tokens_of(build_steps(ours(), GREEDY), [prompt], 30)[0] for prompt in PROMPTS]
    steps = drafted(by, "auto", rows=4)
    for prompts in (PROMPTS, PROMPTS[2:3]):
        mixed = dataclasses.replace(steps, pace=Mixed(*pace)) if pace else steps
        assert rows_of(mixed, prompts, 30) == [expected[PROMPTS.index(prompt)] for prompt in prompts]


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("n_plain", [3, 18])  # 18 are more than it reads at once
def test_a_draft_model_reads_what_plain_steps_brought(drafted, monkeypatch, ahead, n_plain):
    """Drafting for itself it would be wrong sometimes, if its cache lacked a token; nor does a later turn's."""
    monkeypatch.setattr(speculative, "steps_ahead", lambda model: ahead)
    steps = drafted("itself", "auto", rows=2)
    mixed = dataclasses.replace(steps, pace=Mixed(0, 3, *[0] * n_plain, 5))
    first = rows_of(mixed, [PROMPTS[2], PROMPTS[3]], 15)
    (text,) = first[:1]
    assert rows_of(mixed, [text[5:8], text[5:8]], 20, cached=len(PROMPTS[2]) + 5)[0][:7] == text[8:15]
    for k in (3, 5):
        assert sum(mixed.pace.tallies[k].counts) > 0
        assert mixed.pace.tallies[k].mean() == k


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("by", ["head", "dflash"])
def test_a_head_reads_every_position_once_it_is_known(drafted, monkeypatch, by, ahead):
    """Its cache before a draft is that of a head that reads the whole text at once."""
    monkeypatch.setattr(speculative, "steps_ahead", lambda model: ahead)
    steps, whole = (drafted(by, "auto", rows=2, capacity=96) for _ in range(2))
    mixed = dataclasses.replace(steps, pace=Mixed(*[0] * 20, 3, 7, 0, 0, 2))
    texts, lengths = [list(PROMPTS[1]), list(PROMPTS[3])], []
    for step in speculate(mixed, list(texts), 50):
        if step.k:  # the head had read what was known before this step
            lengths = [len(text) for text in texts]
        for text, ids in zip(texts, step.ids, strict=True):
            text += ids
    assert {3, 7} <= {k for k, tally in mixed.pace.tallies.items() if tally.mean() > 0}
    drafter = whole.drafter
    for row, (text, n) in enumerate(zip(texts, lengths, strict=True)):
        slots = drafter.target.slots[:n]
        drafter.run(torch.tensor([text[:n]]), slots, slots, torch.tensor([[n - 1]]))
        drafter.draft(1, torch.tensor([[text[n]]]), torch.tensor([[n]]), drafter.target.slots[: n + 1])
        caches = (part.drafter.model.layers[0].attention.kv_cache for part in (steps, whole))
        found, expected = (cache.k[i, :, : n - 1] for cache, i in zip(caches, (row, 0), strict=True))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by", ["head", "dflash"])
def test_a_head_reads_on_where_the_last_turn_ended(drafted, by):
    """At a later turn its cache is that of a head that reads the whole text at once, the last position apart."""
    steps, whole = (drafted(by, 3) for _ in range(2))
    mixed, prompt = dataclasses.replace(steps, pace=Mixed(3, 0, 0)), PROMPTS[2]
    text = prompt + rows_of(mixed, [prompt], 14)[0]
    cached = len(text) - 1
    text += PROMPTS[3][:12]
    deque(speculate(mixed, [text[cached:]], 1, cached), maxlen=0)
    slots = whole.model.slots[: len(text)]
    whole.plain.prefill(torch.tensor([text]), slots, slots, torch.tensor([[len(text) - 1]]))
    for name in ("k", "v"):
        caches = (getattr(part.drafter.model.layers[0].attention.kv_cache, name) for part in (steps, whole))
        found, expected = (cache[:, :, : len(text) - 1] for cache in caches)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("back", [0, 2, 9, 30, 45])
@pytest.mark.parametrize("by", ["head", "dflash"])
def test_a_head_reads_on_where_an_earlier_text_was_left(drafted, by, back):
    """Another text continues the first `cached` positions of the last one, as after a turn that was taken back.

    An EAGLE-3 head may have read the last of them, whose state is gone, with the token that followed there before.
    """
    steps, whole = (drafted(by, 7, capacity=128) for _ in range(2))
    last = PROMPTS[3] + rows_of(dataclasses.replace(steps, pace=Mixed(3, 0, 0, 7)), [PROMPTS[3]], 21)[0]
    cached = len(last) - 1 - back
    text = last[:cached] + [7, 8]
    text += rows_of(dataclasses.replace(steps, pace=Mixed(0, 2, 7, 0)), [text[cached:]], 15, cached)[0]
    deque(speculate(steps, [text[-1:]], 1, len(text) - 1), maxlen=0)
    slots = whole.model.slots[: len(text)]
    whole.plain.prefill(torch.tensor([text]), slots, slots, torch.tensor([[len(text) - 1]]))
    same = [i for i in range(len(text) - 1) if by == "dflash" or i != cached - 1]
    for name in ("k", "v"):
        caches = (getattr(part.drafter.model.layers[0].attention.kv_cache, name) for part in (steps, whole))
        torch.testing.assert_close(*(cache[:, :, same] for cache in caches), rtol=1e-4, atol=1e-4)


# --- acceptance, and the caches afterwards ---------------------------------------------------------------------------


def test_a_draft_that_is_the_target_is_always_accepted(drafted):
    for sampling in (GREEDY, Sampling(temperature=1.0, top_k=20)):
        steps = list(speculate(drafted("itself", 4, sampling), [PROMPTS[2]], 41))[1:]
        assert [len(step.ids[0]) for step in steps] == [5] * 8


def test_caches_after_rejections_are_plain_decoding_s(ours, drafted):
    prompt, n = PROMPTS[2], 25
    plain = build_steps(ours(), GREEDY)
    tokens = tokens_of(plain, [prompt], n)[0]
    for by in ("stranger", "itself"):
        steps = drafted(by, 4)
        lengths = [len(step.ids[0]) for step in speculate(steps, [prompt], n)][1:]
        assert (min(lengths) < 5) == (by == "stranger")
        valid = len(prompt) + n - 1  # the last token is never an input
        for ours_, theirs in zip(steps.model.layers, plain.model.layers, strict=True):
            for name in ("k", "v"):
                mine, other = (getattr(layer.attention.kv_cache, name)[:, :, :valid] for layer in (ours_, theirs))
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
        assert rows_of(steps, [tokens[10:14]], 6, cached=len(prompt) + 10)[0] == tokens[14:20]  # the caches are valid
    # Here the draft is the target itself, so its own cache must be that of plain decoding.
    for mine, other in zip(steps.drafter.model.layers, plain.model.layers, strict=True):
        torch.testing.assert_close(
            mine.attention.kv_cache.k[:, :, : len(prompt) + 14],
            other.attention.kv_cache.k[:, :, : len(prompt) + 14], rtol=1e-4, atol=1e-4,
        )  # fmt: skip


# --- sampled: the same distribution ----------------------------------------------------------------------------------


def continuation_probabilities(model: Transformer, prompt: list[int], sampling: Sampling, n: int) -> torch.Tensor:
    """The probability of every continuation of `n` tokens, `[V**n]`, from full forward passes without a cache."""
    V = model.args.vocab_size
    texts, table = torch.tensor([prompt]), torch.ones(1)
    for _ in range(n):
        probs = sampling.probs(model(texts)[:, -1])  # [rows, V]
        table = (table[:, None] * probs).flatten()
        texts = torch.cat((texts.repeat_interleave(V, 0), torch.arange(V).repeat(len(texts))[:, None]), 1)
    return table


@pytest.mark.parametrize("by", ["model", "head", "dflash", "lookup"])
@pytest.mark.parametrize("sampling", [Sampling(1.0, top_k=None), Sampling(0.8, top_k=5, top_p=0.9)])
def test_the_first_three_tokens_are_distributed_as_the_target_s(tmp_path, by, sampling):
    V, n_samples, prompt = 7, 6000, [1, 2, 3, 1, 2]
    make_tiny("llama", vocab_size=V).save_pretrained(tmp_path / "target")
    hf = make_tiny("llama", vocab_size=V, num_hidden_layers=1)
    hf.lm_head.weight.mul_(0.5)
    hf.save_pretrained(tmp_path / "draft")
    rows = 1000
    target = with_cache(load_model(tmp_path / "target", dtype=torch.float32), rows, 16)
    expected = continuation_probabilities(target, prompt, sampling, 3) * n_samples
    head = make_head(vocab_size=V, own_vocab=(0, 1, 3, 4, 6), own_embeddings=False)  # 2 and 5 it never proposes
    block = make_dflash(own_vocab=(0, 1, 3, 4, 6), vocab_size=V)
    for head_ in (head, block):
        head_.lm_head.weight.mul_(0.5)
    draft = {
        "model": lambda: load_model(tmp_path / "draft", dtype=torch.float32),
        "head": lambda: load_head(save(head, tmp_path / "head", "speculators"), target, dtype=torch.float32),
        "dflash": lambda: load_head(save_dflash(block, tmp_path, "speculators"), target, dtype=torch.float32),
        "lookup": lambda: None,
    }[by]()
    drafter = drafter_for(draft and with_cache(draft, rows, 16), target, sampling, 2)
    plain = build_steps(target, sampling, run=drafter.run)
    steps = build_speculative_steps(plain, drafter, sampling, 2)
    torch.manual_seed(1)
    counts = torch.zeros(V**3)
    for _ in range(n_samples // rows):
        texts = [[] for _ in range(rows)]
        for step in speculate(steps, [prompt] * rows, 3):
            for text, ids in zip(texts, step.ids, strict=True):
                text += ids
        codes = torch.tensor([text[0] * V * V + text[1] * V + text[2] for text in texts])
        counts += codes.bincount(minlength=V**3)
    assert all(n > n_samples / 50 for n in steps.pace.tallies[2].counts)  # every number of accepted drafts occurs
    assert counts[expected == 0].sum() == 0
    order = expected.argsort(descending=True)
    common = order[expected[order] >= 5]
    observed = torch.cat((counts[common], (n_samples - counts[common].sum())[None]))
    awaited = torch.cat((expected[common], (n_samples - expected[common].sum())[None].clamp(min=1e-3)))
    if awaited[-1] < 5:  # the rare continuations are too few for a class of their own
        observed, awaited = observed[:-1], awaited[:-1]
    chi_square, freedom = ((observed - awaited) ** 2 / awaited).sum(), len(awaited) - 1
    assert freedom > 5
    # Wilson and Hilferty's approximation of the 99.9 % point
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square < limit


# --- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "rows", "backend"),
    [("stranger", 1, "inductor"), ("stranger", 2, "aot_eager"), ("head", 2, "aot_eager"), ("dflash", 2, "inductor")],
)
def test_compiled_is_eager_for_any_length_and_k_without_recompilation(drafted, monkeypatch, by, rows, backend):
    """What is recompiled does not depend on the backend, of which Inductor takes long."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    eager, compiled = (drafted(by, "auto", rows=rows, capacity=300, compile=on) for on in (False, True))
    warm_up(compiled.plain, [prompt_of(3), prompt_of(9)][:rows], 30)
    warm_up_speculation(compiled, [prompt_of(3), prompt_of(9)][:rows], 30)
    with torch.compiler.set_stance("fail_on_recompile"):
        for lengths in ((5, 9), (1, 120), (240, 230)):
            prompts = [prompt_of(length) for length in lengths[:rows]]
            order = 0, 2, 0, 0, 0, 7, *[0] * 20, 4
            ours, theirs = (dataclasses.replace(steps, pace=Mixed(*order)) for steps in (compiled, eager))
            assert rows_of(ours, prompts, 60) == rows_of(theirs, prompts, 60)
    for one, other in ((compiled.model, eager.model), (compiled.drafter.model, eager.drafter.model)):
        for layers in zip(one.layers, other.layers, strict=True):
            caches = (layer.attention.kv_cache.k[:, :, :280] for layer in layers)
            torch.testing.assert_close(*caches, rtol=1e-4, atol=1e-4)


def test_a_compiled_block_may_draft_one_token(ours, drafted, monkeypatch):
    """Its length is not dynamic: the drafts' would be 1."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    steps, plain = drafted("dflash", 1, compile=True), build_steps(ours(), GREEDY)
    assert rows_of(steps, [PROMPTS[2]], 24) == tokens_of(plain, [PROMPTS[2]], 24)


@pytest.mark.parametrize(("by", "backend"), [("head", "inductor"), ("dflash", "aot_eager")])
def test_a_compiled_prefill_of_any_length_is_read_by_a_head(ours, head, dflash, monkeypatch, by, backend):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    rows = []
    for compile in (False, True):
        target = with_cache(ours())
        path = head if by == "head" else dflash
        drafter = drafter_for(with_cache(load_head(path, target, dtype=torch.float32)), target, GREEDY, 2)
        plain = build_steps(target, GREEDY, compile_prefill=compile, run=drafter.run)
        steps = build_speculative_steps(plain, drafter, GREEDY, 2)
        rows.append([rows_of(steps, [prompt], 8) for prompt in PROMPTS] + steps.pace.tallies[2].counts)
    assert rows[0] == rows[1]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("by", ["model", "head", "dflash", "lookup"])
def test_on_a_gpu_a_step_never_waits_and_equals_plain(ours, head, dflash, by):
    torch._dynamo.reset()
    target = with_cache(ours(rows=2, capacity=300, device="cuda"), 2, 300)
    draft = {
        "model": lambda: ours(rows=2, capacity=300, device="cuda"),
        "head": lambda: load_head(head, target, "cuda", torch.float32),
        "dflash": lambda: load_head(dflash, target, "cuda", torch.float32),
        "lookup": lambda: None,
    }[by]()
    drafter = drafter_for(draft and with_cache(draft, 2, 300), target, GREEDY, 4, compile=True)
    plain, prompts = build_steps(target, GREEDY, run=drafter.run), [prompt_of(100), prompt_of(3)]
    expected = tokens_of(plain, prompts, 60)
    steps = build_speculative_steps(plain, drafter, GREEDY, 4, compile=True)
    warm_up_speculation(steps, prompts, 60)
    brought, rows = speculate(steps, prompts, 60), [[], []]
    first = next(brought)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in [first, *brought]:
            rows = [row + ids for row, ids in zip(rows, step.ids, strict=True)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [row[:60] for row in rows] == expected


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def main(capsys):
    """`main("--flag", value)`: exit code, stdout and stderr of generate.py with the demo, greedy in float32."""
    settings = torch._inductor.config.save_config()

    def call(*flags) -> tuple[int, str, str]:
        fixed = ["--device", "cpu", "--dtype", "float32", "--temperature", 0, "--max_new_tokens", 40]
        capsys.readouterr()
        code = generate.main([str(flag) for flag in [*fixed, *flags]])
        return code, *capsys.readouterr()

    yield call
    torch._inductor.config.load_config(settings)


@pytest.fixture
def demo_heads(tmp_path) -> dict[str, Path]:
    """Random heads for the demo."""
    sizes = {"hidden_size": 256, "num_attention_heads": 2, "vocab_size": 2048}
    return {
        "EAGLE": save(make_head(256, (2, 3, 4), own_embeddings=False, **sizes), tmp_path / "eagle", "specforge"),
        "DFLASH": save_dflash(make_dflash(256, (2, 3, 4), block_size=9, **sizes), tmp_path / "dflash"),
    }


def tokens_in(path: Path) -> list[list[int]]:
    return [sample["tokens"] for sample in json.loads(path.read_text())["samples"]]


@pytest.mark.parametrize(
    "flags",
    [
        ("--speculate_k", 4), ("--prompt_lookup",), ("--speculate_k", "auto"), ("--prompt_lookup", "--compare"),
        ("--draft_checkpoint_path", "EAGLE"), ("--draft_checkpoint_path", "EAGLE", "--speculate_k", 4, "--compare"),
        ("--draft_checkpoint_path", "DFLASH"), ("--draft_checkpoint_path", "DFLASH", "--speculate_k", 4, "--compare"),
    ],
)  # fmt: skip
def test_the_command_line_gives_the_plain_text(main, tmp_path, demo_heads, flags):
    flags = [demo_heads.get(flag, flag) for flag in flags]
    lines = tmp_path / "prompts.txt"
    lines.write_text("She could not\nThe name of the house\nA\n")
    for name, more in (("plain", ()), ("speculative", flags)):
        code, _, err = main("--prompt_file", lines, "--stop", "which", "--metrics_path", tmp_path / name, *more)
        assert code == 0, err
    assert tokens_in(tmp_path / "speculative") == tokens_in(tmp_path / "plain")
    acceptance = json.loads((tmp_path / "speculative").read_text())["acceptance"]
    for tally in acceptance["by_k"]:
        assert len(tally["counts"]) == tally["k"] + 1
        assert tally["mean"] == sum(n * count for n, count in enumerate(tally["counts"])) / sum(tally["counts"])
        assert tally["verify_s"] > 0
        how = f"steps of {tally['k']} drafts, {tally['mean']:.2f} accepted" if tally["k"] else "plain steps of"
        assert f"{tally['steps']} {how}" in err
    drafting = [tally for tally in acceptance["by_k"] if tally["k"]]
    assert ([4] == [tally["k"] for tally in acceptance["by_k"]]) == (4 in flags)
    assert acceptance["steps"] == sum(tally["steps"] for tally in drafting)
    assert sum(acceptance["counts"]) == sum(sum(tally["counts"]) for tally in drafting)
    total = sum(n * count for n, count in enumerate(acceptance["counts"]))
    assert acceptance["mean"] == total / max(1, sum(acceptance["counts"]))
    assert all(tally["draft_s"] > 0 for tally in drafting)
    assert ("times plain decoding's" in err) == ("--compare" in flags) == ("speed_up" in acceptance)


def test_a_stop_id_inside_an_accepted_run_ends_the_sample(main, monkeypatch, tmp_path):
    """With the target as its own draft all drafts are accepted, so the stop id lies within an accepted run."""
    flags = ["--prompt", "She could not", "--metrics_path", tmp_path / "m", "--draft_checkpoint_path", DEMO]
    assert main(*flags, "--speculate_k", 8)[0] == 0
    tokens = tokens_in(tmp_path / "m")[0]
    at = next(
        i for i in range(3, 30) if i % 9 in (3, 4, 5) and tokens[i] not in tokens[:i]
    )  # in the middle of a step's 9 tokens
    load = cli.load_tokenizer

    def stopping(*args):
        tokenizer = load(*args)
        tokenizer.stop_ids = frozenset([tokens[at]])
        return tokenizer

    monkeypatch.setattr(cli, "load_tokenizer", stopping)
    code, out, _ = main(*flags, "--speculate_k", 8)
    sample = json.loads((tmp_path / "m").read_text())["samples"][0]
    assert (code, sample["tokens"], sample["finish_reason"]) == (0, tokens[: at + 1], "stop")


def test_a_conversation_may_speculate(main, monkeypatch, demo_heads):
    answers, by_head = [], [("--draft_checkpoint_path", path) for path in demo_heads.values()]
    ways = [(), ("--speculate_k", 3), ("--speculate_k", "auto"), ("--prompt_lookup",)]
    for flags in [*ways, *by_head, *((*flags, "--speculate_k", 3) for flags in by_head)]:
        lines = iter(["The list of", " names", " and the"])
        monkeypatch.setattr(chat, "ask", lambda _, lines=lines: next(lines, None))
        code, out, err = main("--interactive", *flags)
        assert code == 0, err
        answers.append(out)
    assert answers[0]
    assert all(a == b for a, b in pairwise(answers))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--speculate_k", 0], "--speculate_k 0 must be 1 to 15, or auto"),
        (["--prompt_lookup", "--speculate_k", 16], "--speculate_k 16 must be 1 to 15"),
        (["--prompt_lookup", "--speculate_k", -1], "--speculate_k -1 must be 1 to 15"),
        (["--prompt_lookup", "--draft_checkpoint_path", DEMO], "choose one of them to draft"),
        (["--checkpoint_path", DEMO.parent / "draft", "--speculate_k", 3], "needs --draft_checkpoint_path DRAFT or"),
        (["--compare"], "--compare needs speculative decoding"),
        (["--draft_checkpoint_path", "nowhere"], "nowhere"),
        (
            ["--draft_checkpoint_path", "DFLASH", "--speculate_k", 9],
            "--speculate_k 9 must be 1 to 8, the drafts in a block of this head, or auto",
        ),
    ],
)
def test_bad_flags_are_one_line(main, demo_heads, flags, message):
    code, out, err = main(*(demo_heads.get(flag, flag) for flag in flags))
    assert code == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err.splitlines()[-1]
    assert err.count("error") == 1


def with_embeddings(n: int, path: Path, tokenizer: bool) -> Path:
    """The demo's draft model with `n` embeddings, padded with zeros."""
    path.mkdir()
    if tokenizer:
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(DEMO.parent / "draft" / name, path)
    draft = open_checkpoint(DEMO.parent / "draft")

    def fill(stored, out):
        out.zero_()
        stored.fill(out[: stored.shape[0]])

    tensors = {
        name: ((n, *s.shape[1:]) if name == "tok_embeddings.weight" else s.shape, torch.bfloat16, partial(fill, s))
        for name, s in draft.tensors.items()
    }
    save_checkpoint(path / "model.pth", dataclasses.replace(draft.args, vocab_size=n), tensors)
    return path


def test_a_draft_may_have_more_embeddings_but_no_other_tokens(main, tiny, tmp_path):
    """As Qwen 2.5's small models have fewer than its large ones."""
    padded = with_embeddings(2112, tmp_path / "padded", tokenizer=True)
    config = json.loads((padded / "tokenizer_config.json").read_text())
    (padded / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    code, out, _ = main("--draft_checkpoint_path", padded, "--temperature", 0, "--max_new_tokens", 30)
    assert (code, out) == (0, main("--temperature", 0, "--max_new_tokens", 30)[1])
    code, _, err = main("--draft_checkpoint_path", with_embeddings(2112, tmp_path / "alone", tokenizer=False))
    assert code == 2
    assert "has 2112 embeddings, the target 2048, and it has no tokenizer to compare: copy its tokenizer" in err
    shutil.copytree(tiny("llama")[1], tmp_path / "other")
    lines = [b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)]  # Llama 3's format
    (tmp_path / "other" / "tokenizer.model").write_bytes(b"".join(lines))
    code, _, err = main("--draft_checkpoint_path", tmp_path / "other")
    assert code == 2
    assert "has other token ids than the target: a draft needs the same tokenizer" in err


# --- the recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("scripts/recipe_*.sh")), ids=lambda path: path.name)
def test_a_recipe_uses_flags_that_exist(recipe):
    assert subprocess.run(["bash", "-n", recipe]).returncode == 0
    text = recipe.read_text().replace("\\\n", " ")
    for line in text.splitlines():
        program = next((word for word in line.split() if word.endswith(".py")), None)
        if program is None or line.startswith("#"):
            continue
        source = (ROOT / program).read_text() + (ROOT / "fast" / "cli.py").read_text()
        flags = [word for word in line.split() if word.startswith("--") and word != "--standalone"]
        for flag in flags[flags.index("--nproc_per_node") + 1 :] if "--nproc_per_node" in flags else flags:
            assert f'"{flag}"' in source, (program, flag)
