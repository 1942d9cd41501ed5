"""The benchmark of scoring, on the smallest shape. No test looks at a speed.

python -m pytest tests/test_bench_scoring.py
"""

import json

import pytest

from scripts.bench import scoring


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_benchmark_compares_equal_models(capsys, dtype):
    assert scoring.main(["--model", "stories-15m", "--items", "1", "--dtype", dtype]) == 0
    header, *_, last = capsys.readouterr().out.splitlines()
    assert header.startswith(f"stories-15m, {dtype}, ")
    figures = json.loads(last)
    assert figures["items"] == 1
    assert figures["ratio"] == pytest.approx(figures["ours_items_per_s"] / figures["hflm_items_per_s"])
    assert figures["largest_difference"] < {"float32": 1e-2, "bfloat16": 1}[dtype]
    assert figures["mean_log_likelihood"] < -100  # the score of random weights: about 10 nats a token


def test_errors_are_one_line(capsys):
    assert scoring.main(["--model", "stories-15m", "--per_turn", "0"]) == 2
    assert capsys.readouterr().err == "error: --per_turn 0 must be at least 1\n"
