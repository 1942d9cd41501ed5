"""The benchmarks of speculation as a user runs them, on the smallest models. No test here looks at a speed.

python -m pytest tests/test_bench_speculation.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench import acceptance, speculation

ROOT = Path(__file__).resolve().parent.parent


def benchmark(*args: str, module: str = "speculation") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"scripts.bench.{module}", "--device", "cpu", *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_it_says_that_acceptance_is_forced_and_shows_the_model_of_the_speed_up():
    sizes = ["--prompt_length", "8", "--new_tokens", "9", "--repeats", "1", "--speculate_k", "3", "--accept", "0", "3"]
    done = benchmark("--model", "stories-15m", "--no-compile", "--batch_size", "2", *sizes)
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
def test_errors_are_one_line(capfd, args, message):
    assert speculation.main(["--device", "cpu", "--model", "stories-15m", *args]) == 2
    assert capfd.readouterr() == ("", f"{message}\n")


def test_real_text_gives_a_row_for_every_task_and_batch():
    sizes = ["--max_new_tokens", "12", "--repeats", "1", "--batch_size", "2", "4"]
    done = benchmark("--prompt_lookup", "--temperature", "0", *sizes, module="acceptance")
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    tasks = json.loads(last)["tasks"]
    assert [(row["task"], row["rows"]) for row in tasks] == [
        (task, n) for n in (2, 4) for task in ("summarise", "edit", "code", "free")
    ]
    for row in tasks:
        assert 0 <= row["share_of_steps_that_draft"] < 1
        assert 0 <= row["accepted_per_drafting_step"] <= 15
        assert 0 < row["lowest_speed_up"] <= row["speed_up"]
        assert any(line.startswith(f"| {row['task']} | {row['rows']} | ") for line in lines)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "error: nothing speculates: give --prompt_lookup or --draft_checkpoint_path DRAFT"),
        (["--prompt_lookup", "--batch_size", "5"], "error: --batch_size 5 must be 1 to 4, a task has four prompts"),
        (["--prompt_lookup", "--max_new_tokens", "1"], "error: --max_new_tokens 1 must be at least 2"),
        (["--prompt_lookup", "--text", str(ROOT / "LICENSE")], "error: --text has 0 lines of 500 to 1100 characters"),
    ],
)
def test_errors_of_real_text_are_one_line(capfd, args, message):
    assert acceptance.main(["--device", "cpu", *args]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1
