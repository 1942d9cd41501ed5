"""scripts/train_demo.py in its smallest form, and the demo it made: directories that transformers and we both read.

python -m pytest tests/test_train_demo.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

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
    command = [sys.executable, "-m", "scripts.train_demo", *map(str, flags)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["models"]["target"]["steps"] == 2
    assert f"{report['models']['target']['perplexity_per_token']:,}" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "heldout.txt").stat().st_size > 0
    for name in ("target", "draft"):
        assert_ours_is_theirs(tmp_path / name)
