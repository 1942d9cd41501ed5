"""Files from outside: what is wrong with one is said in a line that names it; bad inputs never end in a traceback.

python -m pytest tests/test_reading.py
"""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import fuzz_inputs
import pytest
from test_families import TINYLLAMA

from fast.families import args_from_hf
from fast.reading import FileError, check, read_json, reading
from fast.tokenizer import AddedToken, TokenizerConfig


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (True, int, "it is True; expected a whole number"),
        (1.0, int, "it is 1.0; expected a whole number"),
        (None, int | str, "it is None; expected a whole number or a text"),
        ([1, "a"], list[int], "1 is 'a'; expected a whole number"),
        ({"a": [1]}, dict[str, list[str]], "a.0 is 1; expected a text"),
        ((1, None), tuple[int, ...], "1 is None; expected a whole number"),
        ([1], tuple[int, ...], r"it is \[1\]; expected a tuple"),
        ({"lstrip": True}, AddedToken, "it has no content"),
        ({"bos_token": {"content": 5}}, TokenizerConfig, "bos_token.content is 5; expected a text"),
        ({"legacy": 1}, TokenizerConfig, "legacy is 1; expected true or false or null"),
    ],
)
def test_values_of_another_type(value, kind, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        check(value, kind)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1, float),
        (None, int | None),
        ([], list[int]),
        ({"a": object()}, dict[str, Any]),
        ({"content": "a", "unknown": 1}, AddedToken),
        ({"chat_template": [{"name": "a", "template": "b"}], "bos_token": "<s>"}, TokenizerConfig),
    ],
)
def test_values_of_the_right_type(value, kind):
    check(value, kind)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON: Expecting value"),
        ("{", "not JSON: Expecting property name"),
        ("[1]", r"it is \[1\]; expected an object"),
        ("[" * 100_000, r"damaged, or of a kind that is not known here \(RecursionError: maximum recursion depth"),
        ("\udcff", "x.json is not UTF-8 text"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON: Exceeds the limit"),
    ],
)
def test_files_that_are_not_json(tmp_path, text, message):
    file = tmp_path / "x.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(FileError, match=message) as raised:
        read_json(file)
    assert str(raised.value).startswith(str(file))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match="config.json: not a file"):
        read_json(tmp_path / "config.json")


class Panic(BaseException):
    """As of a package in Rust: no Exception."""


def test_whatever_goes_wrong_is_said_of_the_file_once():
    for error, words in (
        (ValueError("too wide"), "a/b: too wide"),
        (ValueError("a/b: too wide"), "a/b: too wide"),
        (KeyError("x"), "a/b: damaged, or of a kind that is not known here (KeyError: 'x')"),
        (Panic("two\nlines"), "a/b: damaged, or of a kind that is not known here (Panic: two)"),
    ):
        with pytest.raises(FileError) as raised, reading("a"), reading(Path("a/b")):
            raise error
        assert str(raised.value) == words


OUT_OF_MEMORY = RuntimeError("unable to mmap 9 bytes from file <a>: Cannot allocate memory (12)")


@pytest.mark.parametrize("error", [FileNotFoundError, ImportError, MemoryError, KeyboardInterrupt, OUT_OF_MEMORY])
def test_what_is_not_the_file_s_fault_passes(error):
    with pytest.raises(error if isinstance(error, type) else type(error)) as raised, reading("a"):
        raise error
    assert not isinstance(raised.value, FileError)


@pytest.mark.parametrize(
    "config", [{"num_hidden_layers": 10**6}, {"hidden_size": 10**12}, {"max_position_embeddings": 2**30}]
)
def test_sizes_that_no_model_has_are_refused_before_it_is_made(config):
    (key,) = config
    with pytest.raises(ValueError, match=f"{key} is {config[key]}; expected a whole number above 0, up to"):
        args_from_hf({**TINYLLAMA, **config})


def test_bad_inputs_work_or_are_refused_in_one_line(tmp_path):
    """docs/reliability.md has the counts of ten times as many."""
    (bases := tmp_path / "bases").mkdir()
    fuzz_inputs.make_bases(bases)
    found = list(fuzz_inputs.verdicts(0, range(500), bases))
    assert [case for case in found if case[2] == "wrong"] == []
    counts = Counter(verdict for _, _, verdict, _ in found)
    assert min(counts["refused"], counts["right"]) > 50  # else the cases are not what they should be
