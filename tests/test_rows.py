"""rows.py: when text is shown, where a row ends, and its figures.

    python -m pytest tests/test_rows.py

Worth knowing: text that may begin a stop string, or is half a character, is held back until that is decided.
"""

import dataclasses
import random

import pytest
import torch
from conftest import GREEDY, prompt_of, tokens_of

from fast import rows
from fast.decoding import build_steps
from fast.rows import Row, run_rows
from fast.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Pieces:
    """A tokenizer backend whose token i stands for the bytes `pieces[i]`."""

    utf8_errors, adds_space, special = "replace", False, {}

    def __init__(self, pieces: list[bytes], names: dict[int, str] | None = None):
        self.pieces, self.vocab_size, self.names = pieces, len(pieces), names or {}

    def bytes_of(self, token_id: int) -> bytes:
        return self.pieces[token_id]


END = -1  # in the tests below: the stop id
TURN, USER = "<turn>", "<user>"  # special tokens


def put_all(pieces: list[str | bytes | int], stops: list[str]) -> tuple[Row, list[str]]:
    """A row that was given one token per piece, at most `len(pieces)`, until it ended; the text that each showed."""
    names = {i: p for i, p in enumerate(pieces) if p in (TURN, USER)}
    spelled = [b"" if p == END or i in names else p.encode() if isinstance(p, str) else p for i, p in enumerate(pieces)]
    ends = [i for i, p in enumerate(pieces) if p == END]
    row, shown = Row(Tokenizer(Pieces([*spelled, b"prompt"], names), ends, ""), [len(pieces)], len(pieces), stops), []
    for token in range(len(pieces)):
        assert row.finish_reason is None
        shown.append(row.put(token))
        if row.finish_reason:
            break
    return row, shown


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "reason"),
    [
        (["one", " two"], [], ["one", " two"], "length"),
        (["one", END, "two"], [], ["one", ""], "stop"),
        (["one", END], [], ["one", ""], "stop"),
        ([END], [], [""], "stop"),
        (["a b", "STOP", "c"], ["STOP"], ["a b", ""], "stop"),  # within a token
        (["a bS", "TO", "Pc", "d"], ["STOP"], ["a b", "", ""], "stop"),  # across tokens, and followed by text
        (["a bS", "TO", "c", "d"], ["STOP"], ["a b", "", "STOc", "d"], "length"),  # held back, but no stop string
        (["a bS", "TO"], ["STOP"], ["a b", "STO"], "length"),  # nothing is held back at the end
        (["a bST", END], ["STOP"], ["a b", "ST"], "stop"),
        (["STSTSTO", "P"], ["STOP"], ["STST", ""], "stop"),
        (["aab"], ["ab"], ["a"], "stop"),
        (["x", "ab", "c"], ["abc", "b"], ["x", "a"], "stop"),  # "b" is complete first
        (["xabc"], ["c", "ab"], ["x"], "stop"),  # both complete in one token: the leftmost counts
        (["one\n", "\n", "two"], ["\n\n"], ["one", ""], "stop"),
        (["STOP"], ["STOP"], [""], "stop"),
        ([b"caf\xc3", b"\xa9", "!"], [], ["caf", "é", "!"], "length"),
        ([b"\xf0\x9f", b"\x98", b"\x80"], [], ["", "", "😀"], "length"),
        ([b"ok\xf0\x9f", END], [], ["ok", "�"], "stop"),
        (["ok", b"\xf0\x9f"], [], ["ok", "�"], "length"),
        (["caf", b"\xc3", b"\xa9t\xc3", b"\xa9", "x"], ["été"], ["caf", "", "", ""], "stop"),
        (["caf", b"\xc3", b"\xa9t", "x"], ["été"], ["caf", "", "", "étx"], "length"),
        (["one", TURN, "two"], [], ["one", "", "two"], "length"),
        (["one", TURN, "two"], ["STOP"], ["one", "", "two"], "length"),
        (["one", TURN, "two"], [TURN], ["one", ""], "stop"),  # a special token by name
        (["one", TURN, "you", USER, "x"], ["<turn>you<user>"], ["one", "", "", ""], "stop"),
        (["one", TURN, "me", USER, "x"], ["<turn>you<user>"], ["one", "", "me", "", "x"], "length"),
        (["one", TURN, "you", "x"], ["<turn>you<user>"], ["one", "", "", "youx"], "length"),
        (["one\n", TURN], ["\n<turn>"], ["one", ""], "stop"),
        (["one\n", USER, TURN], ["\n<turn>"], ["one", "\n", ""], "length"),
        (["a", "<tu", "rn", ">b"], [TURN], ["a", "", "", ""], "stop"),  # spelt in letters
        (["a", "<tu", TURN, "b"], ["<turn>b"], ["a", "", "<tu", ""], "stop"),
    ],
)
def test_row(pieces, stops, shown, reason):
    row, was_shown = put_all(pieces, stops)
    assert was_shown == shown
    assert row.finish_reason == reason
    assert row.text == "".join(shown)
    assert row.tokens == list(range(len(shown)))
    assert len(row.times) == len(shown)


def test_rows_of_random_text_show_all_but_what_follows_a_stop_string():
    rng, stopped, whole = random.Random(0), 0, 0
    for _ in range(500):
        pieces = ["".join(rng.choices("ab", k=rng.randrange(4))) for _ in range(8)]
        stops = ["".join(rng.choices("abc", k=rng.randrange(1, 6))) for _ in range(rng.randrange(1, 4))]
        text = ""
        for piece in pieces:  # by definition: stop at the token that completes a stop string, cut before the leftmost
            text += piece
            if hits := [text.find(stop) for stop in stops if stop in text]:
                text = text[: min(hits)]
                break
        row, shown = put_all(pieces, stops)
        assert row.text == "".join(shown) == text
        assert row.finish_reason == ("stop" if hits else "length")
        stopped, whole = stopped + bool(hits), whole + (not hits)
    assert min(stopped, whole) > 50


def test_a_row_knows_the_word_boundary_behind_its_prompt():
    class Words(Pieces):
        adds_space = True

    tokenizer = Tokenizer(Words([b" one", b" two"]), [], "")
    assert Row(tokenizer, [0], 5, []).put(1) == " two"
    assert tokenizer.decode([1]) == "two"


def test_figures_of_a_row(monkeypatch):
    clock = iter([10.5, 10.75, 11.0])
    monkeypatch.setattr(rows.time, "perf_counter", lambda: next(clock))
    row, _ = put_all(["a", "b", "c"], [])
    figures = row.figures(start=10.0)
    assert figures == {
        "prompt_tokens": [3], "tokens": [0, 1, 2], "text": "abc", "finish_reason": "length",
        "ttft_s": 0.5, "prefill_tokens_per_s": 2.0, "decode_tokens_per_s": 4.0,
    }  # fmt: skip
    row.times, row.tokens = [10.5], [0]
    assert row.figures(start=10.0)["decode_tokens_per_s"] is None


def test_run_rows_ends_each_row_by_itself(ours):
    prompts, n = [prompt_of(6), prompt_of(3)], 20
    steps = build_steps(ours(rows=2), GREEDY)
    first, second = tokens_of(steps, prompts, n)
    end = next(t for t in first if t not in second)  # stops only the first row
    at = first.index(end)
    tokenizer = Tokenizer(Pieces([b"<%d>" % i for i in range(128)]), [end], "")
    rows, shown = [Row(tokenizer, prompt, n, []) for prompt in prompts], ["", ""]

    def show(i, text):
        shown[i] += text

    run_rows(steps, rows, n, show)
    assert [row.tokens for row in rows] == [first[: at + 1], second]
    assert [row.finish_reason for row in rows] == ["stop", "length"]
    assert shown == [row.text for row in rows]
    assert shown[1] == "".join(f"<{t}>" for t in second)


def test_run_rows_computes_nothing_once_all_have_stopped(ours):
    steps, prompt, calls = build_steps(ours(), GREEDY), prompt_of(6), []

    def decode(*args):
        calls.append(args)
        return steps.decode(*args)

    tokens = tokens_of(steps, [prompt], 20)[0]
    end = tokens[6]
    row = Row(Tokenizer(Pieces([b"x"] * 128), [end], ""), prompt, 20, [])
    run_rows(dataclasses.replace(steps, decode=decode), [row], 20, lambda i, text: None)
    assert row.tokens == tokens[: tokens.index(end) + 1]
    assert len(calls) == len(row.tokens) - 1  # on a CPU nothing runs ahead
