"""metrics.py: bytes per token against a count by hand, and the figures as they are printed and written.

python -m pytest tests/test_metrics.py
"""

import json

import pytest
import torch

from fast import metrics
from fast.cli import write_json
from fast.metrics import bytes_per_step, describe, measure_bandwidth, peak_memory, report
from fast.quantized import QuantizedKVCache
from model import ModelArgs, Transformer

ARGS = {
    "dim": 8, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "hidden_dim": 10, "vocab_size": 32,
    "context_length": 64, "norm_eps": 1e-5, "rope_theta": 1e4,
}  # fmt: skip
FIGURES = {
    "ttft_s": 0.0123, "prefill_tokens_per_s": 456.78, "decode_tokens_per_s": 90.12, "bytes_per_token": 3.21e6,
    "bandwidth_gb_s": 0.26,
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_per_step_by_hand(tied, dtype, size):
    model = Transformer(ModelArgs(**ARGS, tie_embeddings=tied)).to(dtype)
    model.setup_caches(2, 40)
    wqkv, wo = 8 * (4 + 2 + 2) * 6, 4 * 6 * 8
    layer = wqkv + wo + 3 * 8 * 10 + 2 * 8  # two norms
    weights = 3 * layer + 8 + 32 * 8  # the last norm and the output projection, tied or not; never the embedding
    position = 3 * 2 * 2 * 6  # layers, keys and values, heads, head_dim
    assert bytes_per_step(model, 1, 0) == size * weights
    assert bytes_per_step(model, 2, 10.5) == size * (weights + 2 * 10.5 * position)
    model.new_cache = QuantizedKVCache
    model.setup_caches(2, 40, kv_dtype=torch.int8)  # with a float32 scale for every 6 elements
    assert bytes_per_step(model, 2, 10.5) == size * weights + 2 * 10.5 * position * (6 + 4) / 6


def test_bytes_per_step_count_the_experts_that_compute_a_token():
    experts = {"n_experts": 8, "experts_per_token": 2, "expert_dim": 4, "dense_layers": (1,)}
    model = Transformer(ModelArgs(**ARGS, **experts))
    model.setup_caches(2, 40)
    attention, expert, router = 8 * (4 + 2 + 2) * 6 + 4 * 6 * 8, 3 * 8 * 4, 8 * 8
    others = 3 * (attention + 2 * 8) + 2 * router + 3 * 8 * 10 + 8 + 32 * 8
    assert bytes_per_step(model, 1, 0) == 4 * (others + 2 * 2 * expert)
    two_rows = 8 * (1 - (6 / 8) ** 2)  # experts, if each row chooses at random
    assert bytes_per_step(model, 2, 0) == bytes_per_step(model, 1, 0, 2) == 4 * (others + 2 * two_rows * expert)


def test_describe():
    line = describe(FIGURES)
    prefill = "first token 12 ms · prefill 456.8 tokens/s"
    assert line == f"{prefill} · decode 90.1 tokens/s · 3.2 MB/token · 0.3 GB/s"
    one_token = {**FIGURES, "decode_tokens_per_s": None, "bandwidth_gb_s": None}
    assert describe(one_token) == prefill


def test_report_gives_medians_and_every_row(capsys):
    samples = [{**FIGURES, "ttft_s": ttft, "rows": [{"n": ttft}, {"n": -ttft}]} for ttft in (0.9, 0.1, 0.2)]
    samples[0] |= {"decode_tokens_per_s": None, "bandwidth_gb_s": None}  # it stopped at its first token
    samples[1]["decode_tokens_per_s"] = 50.0
    samples[2]["decode_tokens_per_s"] = 60.0
    figures = report(samples, {"build_s": 0.0, "load_s": 1.25, "compile_s": 0.0}, "cpu", None)
    assert figures["samples"] == [{"n": n} for n in (0.9, -0.9, 0.1, -0.1, 0.2, -0.2)]
    assert (figures["bytes_per_token"], figures["bandwidth_gb_s"]) == (3.21e6, 0.26)
    assert (figures["load_s"], figures["compile_s"], figures["acceptance"]) == (1.25, 0.0, None)
    assert 1e8 < figures["measured_bandwidth_gb_s"] * 1e9 < 1e13
    out = capsys.readouterr().err
    assert "build" not in out
    assert "median of 3: first token 200 ms" in out
    assert "decode 55.0 tokens/s" in out
    assert "load 1.2 s · compile 0.0 s · peak memory" in out


def test_report_of_samples_that_stopped_at_their_first_token(capsys):
    stopped = {**FIGURES, "decode_tokens_per_s": None, "bandwidth_gb_s": None, "rows": [{}]}
    assert report([stopped], {"build_s": 0.0, "load_s": 0.0, "compile_s": 0.0}, "cpu", None)["bandwidth_gb_s"] is None
    assert "decoding" not in capsys.readouterr().err
    report([FIGURES | {"rows": []}] * 2, {"build_s": 12.34, "load_s": 0.0, "compile_s": 0.0}, "cpu", None)
    assert "\nbuild 12.3 s · load 0.0 s" in capsys.readouterr().err


def test_a_run_that_filled_the_memory_is_reported(capsys, monkeypatch):
    def full(n_bytes: int):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(metrics, "in_huge_pages", full)
    figures = report([FIGURES | {"rows": []}], {"build_s": 0.0, "load_s": 0.0, "compile_s": 0.0}, "cpu", None)
    assert (figures["measured_bandwidth_gb_s"], figures["bandwidth_gb_s"]) == (None, 0.26)
    assert capsys.readouterr().err.startswith("too little memory is left to measure the bandwidth\nload 0.0 s")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((1 << 29) - 2, 1 << 35))
    assert measure_bandwidth("cuda") is None


def test_bandwidth_and_memory_are_of_this_machine():
    assert 1e8 < measure_bandwidth("cpu") < 1e13
    block = bytearray(b"x") * (1 << 20)
    assert len(block) < peak_memory("cpu") < 1 << 40


def test_write_json_replaces_the_file(tmp_path):
    path = tmp_path / "figures.json"
    for value in ({"text": "größer 😀"}, {"n": [1, 2.5, None]}):
        write_json(path, value)
        assert json.loads(path.read_text(encoding="utf-8")) == value
    assert [p.name for p in tmp_path.iterdir()] == ["figures.json"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # the permissions of any new file


def test_write_json_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "figures.json"
    write_json(path, {"n": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"n": 2, "bad": object()})
    with pytest.raises(OSError, match="figures"):
        write_json(tmp_path / "figures.json" / "below a file", {"n": 3})
    assert json.loads(path.read_text()) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["figures.json"]
