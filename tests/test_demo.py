"""The demo's models, and those of a very short run of `demo/train.py`: transformers computes the same logits.

python -m pytest tests/test_demo.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from demo import make_tasks
from fast.checkpoint import load_model
from fast.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent


def assert_ours_is_theirs(directory: Path) -> None:
    ids = torch.tensor([load_tokenizer(directory).encode("Return the number of items in the list.")])
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert torch.allclose(load_model(directory, dtype=torch.float32)(ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["target", "draft"])
def test_the_demo_is_an_ordinary_directory(name):
    assert_ours_is_theirs(ROOT / "demo" / name)


def test_the_demo_is_small_and_its_pair_shares_a_tokenizer():
    sizes = [path.stat().st_size for path in (ROOT / "demo").rglob("*") if "__pycache__" not in path.parts]
    assert sum(sizes) <= 12_000_000
    target, draft = ((ROOT / "demo" / name / "tokenizer.model").read_bytes() for name in ("target", "draft"))
    assert target == draft


def test_a_short_training_writes_everything(tmp_path):
    flags = ["--steps", 2, "--max_documents", 60, "--batch_size", 1, "--vocab_size", 1024, "--out", tmp_path]
    command = [sys.executable, "-m", "demo.train", *map(str, flags)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["models"]["target"]["steps"] == 2
    assert f"{report['models']['target']['perplexity_per_token']:,}" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "heldout.txt").stat().st_size > 0
    for name in ("target", "draft"):
        assert_ours_is_theirs(tmp_path / name)


def test_the_demo_tasks_are_those_that_the_script_makes(tmp_path, capsys):
    assert make_tasks.main(["--out", str(tmp_path)]) == 0
    made, kept = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (tmp_path, ROOT / "demo" / "tasks"))
    assert made == kept
    assert sum(map(len, kept.values())) < 100_000
    for line in kept["demo_continuation.jsonl"].splitlines():
        item = json.loads(line)
        assert len(set(item["endings"])) == 4
        assert 0 <= item["label"] < 4
