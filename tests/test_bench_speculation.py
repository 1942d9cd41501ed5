"""The benchmark of speculation as a user runs it, on the smallest shape. No test here looks at a speed.

python -m pytest tests/test_bench_speculation.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def benchmark(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scripts.bench.speculation", "--model", "stories-15m", "--device", "cpu", *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_it_says_that_acceptance_is_forced_and_shows_the_model_of_the_speed_up():
    sizes = ["--prompt_length", "8", "--new_tokens", "9", "--repeats", "1", "--speculate_k", "3", "--accept", "0", "3"]
    done = benchmark("--no-compile", "--batch_size", "2", *sizes)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert "how many drafts are accepted is FORCED" in lines[2]
    figures = json.loads(last)
    assert figures["acceptance"] == "forced"
    assert [row["accepted"] for row in figures["steps"]] == [0, 3]
    for row in figures["steps"]:
        cost = (row["draft_s"] + row["verify_s"]) / row["decode_s"]
        assert row["predicted_speed_up"] == pytest.approx((row["accepted"] + 1) / cost)
        assert row["verify_per_decode"] == pytest.approx(row["verify_s"] / row["decode_s"])
        assert row["speed_up"] > 0
        cells = f"{row['predicted_speed_up']:.2f} | {row['speed_up']:>17.2f} |"
        assert any(f"{row['accepted']} of 3" in line and cells in line for line in lines)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--accept", "6"], "error: --accept 6 must be 0 to --speculate_k, which is 5"),
        (
            ["--draft", "llama-3.2-1b"],
            "error: --draft llama-3.2-1b has a vocabulary of 128256 tokens, --model 32000",
        ),
    ],
)
def test_errors_are_one_line(args, message):
    done = benchmark(*args)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (2, "", message)
