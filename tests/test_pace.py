"""pace.py: speculation that pays is found, and what does not pay never costs more than 3 % of plain decoding.

    python -m pytest tests/test_pace.py

Worth knowing: steps take simulated seconds here, so that the bounds are exact.
"""

import random
from collections import deque
from collections.abc import Callable
from functools import partial

import pytest

from fast.pace import Chances, Pace

MODEL = {"ks": (2, 4, 7), "prior": (0.7, 0.7, 0.7), "probes": True}


def simulate(
    pace: Pace, n: int, chance: Callable[[int], float], cost: Callable[[int], float], noise: float = 0.0, seed: int = 1
) -> float:
    """Speed as a multiple of plain decoding's over `n` tokens.

    chance(i): that a draft for token i is accepted, if those before it were. cost(k): of a step, in plain steps.
    """
    rng, done, spent = random.Random(seed), 0, 0.0
    while done < n:
        k, accepted = pace.choose(partial(pace.chances.expected, 1)), 0
        while accepted < k and rng.random() < chance(done + accepted):
            accepted += 1
        for place in range(1, min(accepted + 1, k) + 1):
            pace.chances.learn(place, place <= accepted)
        seconds = cost(k) * rng.uniform(1, 1 + noise)
        pace.add(k, [accepted + 1], accepted + 1, 1, 0.0, 0.01 * seconds)
        done, spent = done + accepted + 1, spent + seconds
    return done / spent * (1 + noise / 2)


@pytest.mark.parametrize("n", [200, 1000])
@pytest.mark.parametrize("per_draft", [0.02, 0.1, 0.3, 0.5])
def test_drafts_that_are_never_accepted_cost_at_most_3_percent(n, per_draft):
    assert simulate(Pace(**MODEL), n, lambda i: 0.0, lambda k: 1 + per_draft * k) >= 0.97


@pytest.mark.parametrize("chance", [0.2, 0.4, 0.6])
@pytest.mark.parametrize("per_draft", [0.1, 0.25, 0.5])
def test_drafts_that_are_seldom_accepted_cost_at_most_3_percent(chance, per_draft):
    for seed in range(20):
        found = simulate(Pace(**MODEL), 300, lambda i: chance, lambda k: 1 + per_draft * k, seed=seed)
        assert found >= 0.97, seed


def test_drafts_that_would_gain_little_at_best_are_seldom_tried():
    """A step of 7 drafts costs 5.5 plain ones and brings at most 8 tokens."""
    pace = Pace(**MODEL)
    assert simulate(pace, 1000, lambda i: 0.0, lambda k: 1 + 0.6 * k + 0.3 * (k > 0)) > 0.992
    assert 0 < pace.figures()["steps"] <= 5


def test_a_text_that_stops_repeating_goes_back_to_plain_steps():
    for seed in range(20):
        pace = Pace(**MODEL)
        fast = simulate(pace, 200, lambda i: 0.9, lambda k: 1 + 0.1 * k, seed=seed)
        slow = simulate(pace, 500, lambda i: 0.0, lambda k: 1 + 0.1 * k, seed=seed)
        assert fast > 2
        assert slow > 0.96


def test_a_text_that_begins_to_repeat_is_noticed():
    pace = Pace(**MODEL)
    simulate(pace, 300, lambda i: 0.0, lambda k: 1 + 0.1 * k)
    assert simulate(pace, 600, lambda i: 0.9, lambda k: 1 + 0.1 * k) > 1.5


@pytest.mark.parametrize("chance", [0.6, 0.8, 0.97])
@pytest.mark.parametrize("per_draft", [0.02, 0.1, 0.2])
def test_the_gain_is_nearly_that_of_the_best_k(chance, per_draft):
    found = simulate(Pace(**MODEL), 1000, lambda i: chance, lambda k: 1 + per_draft * k)
    assert found > 0.88 * max(sum(chance**i for i in range(k + 1)) / (1 + per_draft * k) for k in range(1, 8))


def test_noise_in_the_times_changes_little():
    for seed in range(10):
        assert simulate(Pace(**MODEL), 300, lambda i: 0.3, lambda k: 1 + 0.3 * k, noise=0.3, seed=seed) > 0.95
        assert simulate(Pace(**MODEL), 300, lambda i: 0.9, lambda k: 1 + 0.05 * k, noise=0.3, seed=seed) > 3


def test_the_costs_are_measured_again():
    """The machine's memory has become slow: a pass that cost 3 tokens costs hardly more than one."""
    pace = Pace(**MODEL)
    assert simulate(pace, 600, lambda i: 0.5, lambda k: 1 + 0.7 * k) > 0.97
    assert simulate(pace, 1500, lambda i: 0.5, lambda k: 1 + 0.02 * k) > 1.3


def test_a_number_always_drafts_as_many():
    pace = Pace((5,), (0.1,), adapts=False)
    for _ in range(100):
        assert pace.choose(partial(pace.chances.expected, 1)) == 5
        pace.add(5, [1], 1, 1, 1.0, 1.0)


def test_ranks_whose_clocks_differ_choose_alike():
    """Rank 1 reads other times, but rank 0's are agreed on."""
    rank_0, shared, chosen = Pace(**MODEL), deque(), []
    rank_0.agree = lambda costs: shared.append(costs) or costs
    rank_1 = Pace(**MODEL, agree=lambda costs: shared.popleft())
    rng = random.Random(0)
    for _ in range(500):
        ks = [pace.choose(partial(pace.chances.expected, 1)) for pace in (rank_0, rank_1)]
        assert ks[0] == ks[1]
        chosen.append(ks[0])
        tokens = [1 + rng.randrange(ks[0] + 1) for _ in range(2)]
        for pace, slower in ((rank_0, 1.0), (rank_1, 3.0 * rng.random())):
            for place in range(1, min(tokens[0], ks[0]) + 1):
                pace.chances.learn(place, place < tokens[0])
            pace.add(ks[0], tokens, tokens[0], 2, 0.0, slower * (1 + 0.2 * ks[0]))
    assert len(set(chosen)) > 1


def test_the_tallies_count_every_row_and_step():
    pace = Pace((2, 5), (0.5,))
    pace.add(0, [1, 1], 1, 2, 0.0, 1.0)
    pace.add(2, [1, 3], 1, 2, 0.5, 1.0)
    pace.add(2, [3], 3, 2, 1.5, 3.0)
    of_two = {"steps": 2, "mean": 4 / 3, "draft_s": 1.0, "verify_s": 2.0}
    assert pace.figures() == of_two | {
        "k": 5,
        "counts": [1, 0, 2, 0, 0, 0],
        "by_k": [
            {"k": 0, "steps": 1, "counts": [2], "mean": 0.0, "draft_s": 0.0, "verify_s": 1.0},
            of_two | {"k": 2, "counts": [1, 0, 2]},
        ],
    }
    none = {"k": 5, "steps": 0, "counts": [0] * 6, "mean": 0.0, "draft_s": None, "verify_s": None, "by_k": []}
    assert Pace((5,), (0.5,)).figures() == none


def test_chances_are_learned_by_class_and_multiply():
    chances = Chances((0.5, 0.8))
    assert chances.expected(1, 3) == pytest.approx([0, 0.5, 0.9, 1.22])
    assert chances.expected(9, 2) == pytest.approx([0, 0.8, 1.44])
    for _ in range(200):
        chances.learn(1, False)
        chances.learn(2, True)
    assert chances.expected(1, 3)[3] == pytest.approx(0, abs=0.01)
    assert chances.expected(7, 2) == pytest.approx([0, 1, 2], abs=0.01)
