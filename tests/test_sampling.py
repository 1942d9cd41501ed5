"""sampling.py: filters against transformers' logits processors, draws against the distribution that they are given.

python -m pytest tests/test_sampling.py
"""

import dataclasses
from functools import partial

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fast.decoding import build_steps, stream
from fast.drafting import SPARE
from fast.sampling import Sampling, draw, min_p, top_k, top_p
from fast.speculative import PromptLookup, build_speculative_steps, speculate

VOCAB = 50


@pytest.fixture
def logits():
    """Five rows, from almost certain to almost uniform."""
    spread = torch.tensor([8.0, 3.0, 1.5, 0.5, 0.01])[:, None]
    return spread * torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(3))


def warped(logits, *warpers):
    for warper in warpers:
        logits = warper(None, logits)
    return logits


# --- filters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 7, VOCAB - 1, VOCAB, VOCAB + 1, 10**6])
def test_top_k_equals_transformers(logits, k):
    expected = warped(logits, TopKLogitsWarper(k))
    assert torch.equal(top_k(logits, k), expected)
    descending, order = logits.sort(descending=True)
    assert torch.equal(top_k(descending, k, descending=True), expected.gather(1, order))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p_equals_transformers(logits, p):
    assert torch.equal(top_p(logits, p), warped(logits, TopPLogitsWarper(p)))


@pytest.mark.parametrize("p", [1e-9, 0.05, 0.3, 0.9, 1.0])
def test_min_p_equals_transformers(logits, p):
    assert torch.equal(min_p(logits, p), warped(logits, MinPLogitsWarper(p)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("temperature", "k", "p", "least"),
    [(0.7, None, None, None), (1.3, 8, None, None), (0.8, 200, 0.9, None), (1.0, 20, 0.7, 0.02), (2.0, None, 0.9, 0.3)],
)
def test_combined_filters_equal_transformers(logits, dtype, temperature, k, p, least):
    logits = logits.to(dtype)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(k)] if k else []
    warpers += [TopPLogitsWarper(p)] if p else []
    warpers += [MinPLogitsWarper(least)] if least else []
    expected = warped(logits.float(), *warpers).softmax(-1)
    probs = Sampling(temperature, k, p, least).probs(logits)
    assert probs.dtype == torch.float32
    assert torch.equal(probs > 0, expected > 0)
    torch.testing.assert_close(probs, expected, rtol=1e-5, atol=1e-8)


def test_a_row_of_a_batch_is_filtered_as_if_alone(logits):
    sampling = Sampling(0.9, 10, 0.8, 0.01)
    batch = sampling.probs(logits.view(5, 1, VOCAB))
    assert batch.shape == (5, 1, VOCAB)
    for row in range(5):
        assert torch.equal(batch[row, 0], sampling.probs(logits[row]))
    assert len({int(n) for n in (batch > 0).sum(-1).flatten()}) > 1  # the rows keep different numbers of tokens


def test_ties():
    tied = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    assert (top_k(tied, 1) > -torch.inf).tolist() == [False, True, True, True, False]  # tied tokens are all kept
    assert (min_p(tied, 1.0) > -torch.inf).tolist() == [False, True, True, True, False]
    assert (top_p(torch.zeros(4), 0.5) > -torch.inf).sum() == 2  # the smallest set that reaches p
    assert (top_p(torch.zeros(4), 0.51) > -torch.inf).sum() == 3
    assert Sampling(temperature=0)(tied).item() == 1


def test_some_token_is_always_left(logits):
    for sampling in (Sampling(1e-3, 1, 1e-9, 1.0), Sampling(100.0, 1), Sampling(1.0, None, 1e-9), Sampling(1.0, None)):
        probs = sampling.probs(logits)
        assert probs.isfinite().all()
        torch.testing.assert_close(probs.sum(-1), torch.ones(5))


def test_filters_leave_their_input_alone(logits):
    before = logits.clone()
    Sampling(0.5, 3, 0.5, 0.5)(logits)
    assert torch.equal(logits, before)


# --- choosing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_temperature_0_is_exact_argmax(logits, dtype):
    logits = logits.view(5, 1, VOCAB).to(dtype)
    close = logits[0, 0].clone()
    close[[17, 31]] = torch.tensor([100.0, 100.5]).to(dtype)
    for x in (logits, close):
        ids = Sampling(temperature=0, top_k=1, top_p=0.5)(x)
        assert ids.dtype == torch.int64
        assert torch.equal(ids, x.float().argmax(-1))
    assert ids.item() == 31


def test_a_low_temperature_approaches_argmax(logits):
    assert torch.equal(Sampling(temperature=1e-4)(logits), logits.argmax(-1))


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}])
def test_the_draw_is_unbiased(options):
    """Chi-square over 20 000 draws; tokens that a filter ruled out are never drawn."""
    torch.manual_seed(0)
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0, -0.5, 1.5, 0.8])
    sampling, n = Sampling(**{"temperature": 0.9, "top_k": None, **options}), 20_000
    probs = sampling.probs(logits)
    counts = sampling(logits.expand(n, 8)).bincount(minlength=8)
    kept = probs > 0
    assert counts[~kept].sum() == 0
    assert kept.all() == (not options)
    expected = n * probs[kept].double()
    statistic = ((counts[kept] - expected) ** 2 / expected).sum()
    critical = {2: 13.8, 3: 16.3, 4: 18.5, 7: 24.3}[int(kept.sum()) - 1]  # exceeded by 1 fair draw in 1000
    assert statistic < critical


def test_tokens_tied_with_the_kth_may_be_drawn():
    torch.manual_seed(0)
    logits = torch.zeros(1000)
    logits[[7, 400, 900]] = 2.0
    counts = Sampling(temperature=1.0, top_k=1)(logits.expand(3000, 1000)).bincount(minlength=1000)
    assert counts.sum() == counts[[7, 400, 900]].sum()
    assert counts[[7, 400, 900]].min() > 900


def test_the_chi_square_test_sees_a_bias():
    torch.manual_seed(0)
    probs = torch.tensor([0.5, 0.3, 0.2])
    counts = draw(torch.tensor([0.52, 0.29, 0.19]).expand(20_000, 3)).bincount(minlength=3)
    assert ((counts - 20_000 * probs) ** 2 / (20_000 * probs)).sum() > 13.8


def test_rows_are_drawn_independently():
    torch.manual_seed(0)
    first, second = draw(torch.full((2, 4), 0.25).repeat(10_000, 1)).view(-1, 2).T
    assert abs((first == second).float().mean() - 0.25) < 0.02


def test_the_same_seed_draws_the_same_tokens(logits):
    sampling, drawn = Sampling(1.0, None), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append(torch.stack([sampling(logits) for _ in range(20)]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, r"temperature -1 must be 0 \(greedy\) or more"),
        ({"temperature": float("nan")}, "temperature nan must be 0"),
        ({"top_k": -5}, "top_k -5 must be at least 1"),
        ({"top_p": 0.0}, "top_p 0.0 must be above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p 1.01 must be above 0 and at most 1"),
        ({"top_p": float("nan")}, "top_p nan must be above 0"),
        ({"min_p": -1}, "min_p -1 must be above 0 and at most 1"),
        ({"min_p": 2}, "min_p 2 must be above 0 and at most 1"),
    ],
)
def test_what_cannot_be_used_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_0_is_off():
    assert Sampling(0.8, top_k=0, min_p=0.0) == Sampling(0.8, top_k=None, min_p=None)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 9e-6])
def test_the_coldest_temperatures_are_0(logits, temperature):
    assert Sampling(temperature) == Sampling(0.0)
    assert torch.equal(Sampling(1e-5).probs(logits).argmax(-1), logits.argmax(-1))  # the coldest that is drawn from


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(0.8, 5), Sampling(0.8, None), Sampling(1.0, 5, 0.9, 0.1)])
def test_logits_that_are_not_numbers_give_minus_1(logits, sampling, compiled):
    logits[1, 3], logits[2, 4], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, 5] = -torch.inf  # a token that is ruled out is no fault
    ids = (torch.compile(sampling) if compiled else sampling)(logits)
    assert [bool(x < 0) for x in ids] == [False, True, True, True, False]
    assert ids.max() < VOCAB


@dataclasses.dataclass(frozen=True)
class Cutoff(Sampling):
    """An invented sampler: tokens below 2 % are ruled out."""

    def probs(self, logits, descending=False):
        probs = super().probs(logits, descending)
        return probs.masked_fill(probs < 0.02, 0)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_sampler_is_added_by_its_probabilities(ours, monkeypatch, compiled):
    """Only `probs` changes, as docs/extending.md says; plain decoding and a speculative step both draw from it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # Inductor takes long
    model, sampling = ours("llama"), Cutoff(temperature=2.0, top_k=None)
    model.setup_caches(1, 64, SPARE)
    plain = build_steps(model, sampling, compiled)
    steps = build_speculative_steps(plain, PromptLookup(), sampling, 2, compiled)
    torch.manual_seed(0)
    drawn = [token for (token,) in stream(plain, [[1, 2]], 40)]
    accepted = [token for step in speculate(steps, [[1, 2]], 40) for token in step.ids[0]][:40]
    for tokens in (drawn, accepted):
        probs = Sampling(temperature=2.0, top_k=None).probs(model(torch.tensor([[1, 2, *tokens]]))[0, 1:-1])
        chosen = probs.gather(1, torch.tensor(tokens)[:, None])
        assert chosen.min() > 0.0199
        assert len(set(tokens)) > 10
    assert probs[probs < 0.02].sum() > 10  # of a total of 40, 1 per position: much was ruled out
