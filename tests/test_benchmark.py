"""The benchmark as a user runs it, on its smallest shape: what it prints adds up. No test here looks at a speed.

    python -m pytest tests/test_benchmark.py

Worth knowing: one thread is enough, and threads that wait for each other on busy cores make tiny models very slow.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"dim": 288, "n_layers": 6, "hidden_dim": 768, "vocab_size": 32000}  # stories-15m: tied, as many KV as Q heads


def benchmark(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/benchmark.py", *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[list[str], dict, Path]:
    """One run with caches of two capacities: the lines before the JSON, the figures, and the file they went to."""
    path = tmp_path_factory.mktemp("benchmark") / "figures.json"
    sizes = ["--prompt_length", "24", "--new_tokens", "9", "--batch_size", "2", "--repeats", "2"]
    done = benchmark(
        "--model", "stories-15m", "--no-compile", *sizes, "--max_seq_length", "64", "512", "--json_path", str(path),
        "--mode", "bf16", "int4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    return lines, json.loads(last), path


def test_json_says_what_was_run(run):
    _, figures, path = run
    expected = {"model": "stories-15m", "compile": False, "prompt_length": 24, "new_tokens": 9, "batch_size": 2}
    assert {key: figures[key] for key in expected} == expected
    assert figures["dtype"] == "bfloat16"
    assert all(figures[key] for key in ("hardware", "torch", "date"))
    assert [mode["mode"] for mode in figures["modes"]] == figures["mode"] == ["bf16", "int4"]
    assert all("compile_cold_s" not in mode for mode in figures["modes"])  # nothing was compiled
    assert json.loads(path.read_text()) == figures


def test_bytes_and_operations_follow_from_the_shape(run):
    _, figures, _ = run
    dim, n_layers, hidden_dim, vocab_size = SHAPE.values()
    in_layers = n_layers * (4 * dim * dim + 3 * dim * hidden_dim)
    norms = (2 * n_layers + 1) * dim
    # On average a step, 1 to 8 behind the prompt of 24, attends 28.5 positions in each of 2 rows.
    cache = 2 * 28.5 * n_layers * 2 * dim
    for decode in figures["decode"]:
        bytes_per_weight = {"bf16": 2, "int4": 5 / 8}[decode["mode"]]
        whole_run = bytes_per_weight * (in_layers + vocab_size * dim) + 2 * (norms + cache)
        spread = 2 * 2 * 3.5 * n_layers * 2 * dim  # a run may be measured in pieces, their median is near its middle
        assert decode["bytes_per_step"] == pytest.approx(whole_run, abs=spread)
        assert decode["gb_per_s"] * 1e9 == pytest.approx(decode["tokens_per_s"] / 2 * whole_run, rel=0.02)
    attention = n_layers * 4 * dim * sum(range(1, 25))
    for mode in figures["modes"]:
        assert mode["prefill_flops"] == 2 * (2 * 24 * in_layers + attention + 2 * vocab_size * dim)
        gflops = mode["prefill_tokens_per_s"] * mode["prefill_flops"] / 48 / 1e9
        assert mode["prefill_gflops_per_s"] == pytest.approx(gflops)


def test_figures_are_positive_and_ordered(run):
    _, figures, _ = run
    rows = [(decode["mode"], decode["max_seq_length"]) for decode in figures["decode"]]
    assert rows == [("bf16", 64), ("bf16", 512), ("int4", 64), ("int4", 512)]
    for mode in figures["modes"]:
        assert mode["peak_memory_bytes"] > 1e8  # a process with torch
        assert mode["matmul_gflops_per_s"] > 0
    for decode in figures["decode"]:
        assert all(decode[key] > 0 for key in ("first_token_s", "tokens_per_s", "gb_per_s", "bandwidth_gb_per_s"))
    shares = [mode["prefill_share"] for mode in figures["modes"]] + [decode["share"] for decode in figures["decode"]]
    for middle, low, high in shares:
        assert 0 < low <= middle <= high


def test_table_shows_the_figures(run):
    lines, figures, _ = run
    assert lines[0].startswith("stories-15m, bfloat16, ")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    table = {row[0]: row[1:] for row in rows}
    assert len({len(line) for line in lines if line.startswith("|")}) == 1
    for mode in figures["modes"]:
        cells = table[f"{mode['mode']} prefill 2 x 24"]
        assert cells[0].startswith(f"{mode['prefill_tokens_per_s']:.1f} tokens/s")
        assert table[f"{mode['mode']} compile, with a first run"][0] == "-"
        assert table[f"{mode['mode']} peak memory"][0] == f"{mode['peak_memory_bytes'] / 1e9:.2f} GB"
    for decode in figures["decode"]:
        cells = table[f"{decode['mode']} decode 2 x 9, cache {decode['max_seq_length']}"]
        assert cells[0].startswith(f"{decode['tokens_per_s']:.2f} tokens/s, {decode['gb_per_s']:.1f} GB/s")
        assert cells[0].endswith(" x)") == (decode["mode"] == "int4")  # beside the first mode's
        assert cells[2].startswith(f"{decode['share'][0]:.0%} (")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "llama-9"], "error: unknown model 'llama-9'; choose from: stories-15m, tinyllama-1.1b"),
        (["--model", "stories-15m", "--new_tokens", "1"], "error: --prompt_length, --batch_size and --repeats must be"),
        (["--model", "stories-15m", "--device", "nowhere"], "error: --device nowhere cannot be used here"),
    ],
)
def test_errors_are_one_line(args, message):
    done = benchmark(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_random_weights(tied, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import dataclasses

    import torch
    from benchmark import build_model

    from model import PRESETS

    args = dataclasses.replace(PRESETS["stories-15m"], n_layers=1, tie_embeddings=tied, vocab_size=512, qkv_bias=True)
    model = build_model(args, "cpu", torch.float32)
    assert (model.output.weight is model.tok_embeddings.weight) == tied
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cpu"
        if "norm" in name:
            assert (parameter == 1).all()
        else:
            assert parameter.std() == pytest.approx(0.02, rel=0.2)
    assert len(model.layers[0].feed_forward.w13.weight.unique(dim=0)) == 2 * args.hidden_dim
