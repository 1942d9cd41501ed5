"""lookup.py: the longest match is found, and its most frequent continuation proposed.

python -m pytest tests/test_lookup.py
"""

import random
from collections import Counter

import pytest
import torch

from fast.lookup import NEWEST, Matches, PromptLookup
from fast.pace import Chances


def matches_in(text: list[int]) -> Matches:
    matches = Matches()
    for token in text:
        matches.append(token)
    return matches


@pytest.mark.parametrize(
    ("text", "continuation"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 9, 3, 8, 1, 2, 3], [4, 5, 6, 7]),  # three tokens beat the later single one
        ([3, 5, 6, 7, 8, 3, 9, 10, 11, 12, 3], [9, 10, 11, 12]),  # the later of two equal matches
        ([3, 5, 6, 8, 3, 5, 7, 8, 3, 9, 3], [5, 7, 8, 3]),  # 5 follows more often than 9
        ([8, 5, 6, 5, 6], [5, 6, 5, 6]),  # beyond the end of the text the match goes on
        ([7, 7], [7, 7, 7, 7]),
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_what_most_often_followed_the_longest_match_is_proposed(text, continuation):
    assert matches_in(text).continuation(4) == continuation


def test_any_text_as_by_searching_it():
    rng = random.Random(0)
    for _ in range(300):
        text = [rng.randrange(rng.choice((2, 3, 8))) for _ in range(rng.randrange(1, NEWEST))]
        matches, n = matches_in(text), len(text)
        lengths = {i: next((m for m in range(i + 1) if text[i - m] != text[n - 1 - m]), i + 1) for i in range(n - 1)}
        assert matches.lengths == {i: m for i, m in lengths.items() if m}
        if longest := max(lengths.values(), default=0):
            following = Counter(text[i + 1] for i, m in lengths.items() if m == longest)
            assert following[matches.continuation(1)[0]] == max(following.values())


def test_a_long_match_is_kept_where_its_tokens_occur_more_often_than_is_searched():
    passage = [100, 0, 101, 0, 102, 0, 103, 0, 104]
    matches = matches_in(passage + [0, 50] * 2 * NEWEST + passage[:5])
    assert matches.continuation(4) == passage[5:]


def test_a_text_of_one_token_has_few_matches():
    matches = matches_in([7] * 3000)
    assert sorted(matches.lengths) == list(range(2999 - NEWEST, 2999))  # not 2999 of them
    assert matches.continuation(3) == [7, 7, 7]


def test_a_text_may_be_cut_and_continued():
    text = [5, 6, 7, 5, 6, 8, 5]
    matches = matches_in([*text, 1, 2, 3, 1])
    matches.truncate(len(text))
    for token in (6, 7):
        matches.append(token)
    assert matches.tokens == [*text, 6, 7]
    assert matches.continuation(2) == [5, 6]
    assert matches.lengths == {2: 2}  # a match is counted from the cut


def test_rows_have_texts_of_their_own_and_learn_from_every_token():
    lookup, chances = PromptLookup(), Chances((0.5, 0.5))
    lookup.begin([[1, 2, 3, 1], [4, 5, 6, 7]], 0, ())
    (drafts,) = lookup.draft(3, torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(1))
    assert drafts.tolist() == [[2, 3, 1], [0, 0, 0]]  # nothing matches in the second
    assert lookup.expected(3, [0, 1], chances) == [0] * 4
    assert lookup.expected(2, [0], chances) == pytest.approx([0, 0.5, 0.75])
    lookup.take([[2, 9], [4]], 2, [0], chances)  # a hit after a match of 1, a miss after one of 2
    assert lookup.texts[1].tokens == [4, 5, 6, 7, 4]
    assert chances.expected(1, 1)[1] > 0.5 > chances.expected(2, 1)[1]
    lookup.begin([[8], [8]], 3, ())
    assert [text.tokens for text in lookup.texts] == [[1, 2, 3, 8], [4, 5, 6, 8]]
    lookup.begin([[1]], 0, ())
    assert [text.tokens for text in lookup.texts] == [[1]]
