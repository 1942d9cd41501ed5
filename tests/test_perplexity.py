"""perplexity.py against a sliding window over transformers' models, and the command line that prints it.

python -m pytest tests/test_perplexity.py
"""

import codecs
import math
import re
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import eval as eval_cli
from fast import perplexity as module
from fast.checkpoint import load_model
from fast.cli import DEMO
from fast.perplexity import perplexity
from fast.tokenizer import load_tokenizer

HELDOUT = DEMO.parent / "heldout.txt"
WIKITEXT = DEMO.parent.parent.parent / "shared" / "data" / "wikitext-2" / "test.txt"  # not in this repository


def perplexity_of_transformers(model, ids: list[int], window: int, stride: int) -> float:
    """The loop of https://huggingface.co/docs/transformers/perplexity; the mean is over the scored tokens."""
    ids, nll, n_tokens, previous = torch.tensor([ids]), 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - previous)] = -100
        n = int((labels[:, 1:] != -100).sum())
        nll += float(model(ids[:, begin:end], labels=labels).loss) * n
        n_tokens, previous = n_tokens + n, end
        if end == ids.shape[1]:
            break
    return math.exp(nll / n_tokens)


@pytest.fixture(scope="module")
def excerpt(tmp_path_factory):
    """A file with the beginning of the held-out text, followed by some two-byte characters."""
    path = tmp_path_factory.mktemp("perplexity") / "excerpt.txt"
    path.write_text(HELDOUT.read_text(encoding="utf-8")[:6000] + " Ünïcödé.", encoding="utf-8")
    return path


@pytest.mark.parametrize(("window", "stride"), [(512, 256), (128, 128), (100, 33)])
def test_the_demo_has_the_perplexity_that_transformers_finds(excerpt, window, stride):
    ids = load_tokenizer(DEMO).encode(excerpt.read_text(encoding="utf-8"))
    theirs = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    with torch.no_grad():
        expected = perplexity_of_transformers(theirs, ids, window, stride)
    found = perplexity(load_model(DEMO, dtype=torch.float32), ids, window, stride)
    assert found.perplexity == pytest.approx(expected, abs=1e-3)
    unscored = -(-len(ids) // window) if stride == window else 1
    assert found.n_tokens == len(ids) - unscored


def test_a_quantized_cache_shows_in_the_perplexity(excerpt):
    model, ids = load_model(DEMO), load_tokenizer(DEMO).encode(excerpt.read_text(encoding="utf-8"))
    exact, int8, fp8 = (
        perplexity(model, ids, 256, 128, kv_dtype=kv_dtype).perplexity
        for kv_dtype in (None, torch.int8, torch.float8_e4m3fn)
    )
    assert int8 != exact
    assert fp8 != exact
    assert int8 == pytest.approx(exact, rel=0.005)
    assert fp8 == pytest.approx(exact, rel=0.005)


@pytest.mark.skipif(not WIKITEXT.exists(), reason="WikiText-2 is not at hand")
def test_wikitext_has_the_perplexity_that_transformers_finds():
    ids = load_tokenizer(DEMO).encode(WIKITEXT.read_text(encoding="utf-8")[:6000])
    theirs = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    with torch.no_grad():
        expected = perplexity_of_transformers(theirs, ids, 512, 512)
    assert perplexity(load_model(DEMO, dtype=torch.float32), ids, 512, 512).perplexity == pytest.approx(
        expected, rel=1e-5
    )


def test_a_nonsense_perplexity_is_an_error(tiny):
    model, ids = load_model(tiny("llama")[1], dtype=torch.float16), list(range(50))
    model.norm.weight.data[7] = torch.inf
    with pytest.raises(ValueError, match="logits for tokens 2 to 32 of the text are NaN or .* try --dtype bfloat16"):
        perplexity(model, ids, window=32, stride=32)


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_neither_batches_nor_chunks_change_it(tiny, monkeypatch, family):
    model = load_model(tiny(family)[1], dtype=torch.float32)
    ids = torch.randint(128, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    alone = perplexity(model, ids, window=32, stride=24, batch_size=1)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 7 * 128)
    together = perplexity(model, ids, window=32, stride=24, batch_size=5)
    assert together.n_tokens == alone.n_tokens == 199
    assert together.nll == pytest.approx(alone.nll, rel=1e-6)


def test_the_command_line_prints_tokens_bytes_and_bits(excerpt, tmp_path, capsys, monkeypatch):
    marked = tmp_path / "marked.txt"
    marked.write_bytes(codecs.BOM_UTF8 + excerpt.read_bytes())  # which is no text
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    argv = ["--perplexity", str(marked), "--window", "64", "--stride", "32", "--dtype", "float32", "--compile"]
    assert eval_cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert "--compile is for --tasks" in err
    per_token, per_byte, bits = map(float, re.findall(r"(\d+\.\d+) (?:per token|per byte|bits per byte)", out))
    ids = load_tokenizer(DEMO).encode(excerpt.read_text(encoding="utf-8"))
    found = perplexity(load_model(DEMO, dtype=torch.float32), ids, 64, 32)
    n_bytes = excerpt.stat().st_size
    assert found.n_tokens == len(ids) - 1  # all but the begin-of-text token
    assert per_token == pytest.approx(found.perplexity, abs=1e-4)
    assert per_byte == pytest.approx(math.exp(found.nll / n_bytes), abs=1e-4)
    assert bits == pytest.approx(found.nll / n_bytes / math.log(2), abs=1e-4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing to evaluate"),
        (["--perplexity", "no.txt"], "--perplexity no.txt: no such file"),
        (["--perplexity", "EXCERPT", "--stride", "0"], "--stride 0 must be at least 1"),
        (["--perplexity", "EXCERPT", "--window", "1"], "window 1 must be at least 2"),
        (["--perplexity", "EXCERPT", "--window", "64", "--stride", "65"], "stride 65 must be 1 to 64"),
        (["--perplexity", str(DEMO / "model.safetensors")], "is not UTF-8 text"),
        (["--perplexity", "EMPTY"], "a text of 1 tokens has no perplexity"),
    ],
)
def test_errors_are_one_line(excerpt, tmp_path, capsys, argv, message):
    (tmp_path / "empty.txt").touch()
    names = {"EXCERPT": str(excerpt), "EMPTY": str(tmp_path / "empty.txt")}
    assert eval_cli.main([names.get(word, word) for word in argv]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
