"""The demo's models, and those of a very short run of `demo/train.py`: transformers computes the same logits.

python -m pytest tests/test_demo.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import prompt_of
from transformers import AutoModelForCausalLM

from demo import make_tasks, train
from fast.checkpoint import load_model
from fast.cli import exit_code
from fast.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent


def assert_ours_is_theirs(directory: Path) -> None:
    ids = torch.tensor([load_tokenizer(directory).encode("She could not but smile at the idea of his being in love.")])
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
    flags = ["--steps", 2, "--max_chapters", 30, "--batch_size", 1, "--vocab_size", 1024, "--out", tmp_path]
    command = [sys.executable, "-m", "demo.train", *map(str, flags)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["models"]["target"]["steps"] == 2
    assert f"{report['models']['target']['perplexity_per_token']:,}" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "heldout.txt").stat().st_size > 0
    assert not (tmp_path / "training.pt").exists()
    for name in ("target", "draft"):
        assert_ours_is_theirs(tmp_path / name)


def test_a_training_goes_on_where_it_was_stopped(monkeypatch):
    """The state it keeps gives the weights and the curve of a training that was not stopped, dropout included."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    monkeypatch.setattr(train, "STEPS_BETWEEN_POINTS", 2)
    monkeypatch.setattr(train, "HEAD_DIM", 16)
    stored, batches = {}, [prompt_of(65, seed) for seed in range(6)]

    def run(keep) -> tuple[dict, list]:
        torch.manual_seed(0)
        model = train.build(train.hf_config(shape, 128), dropout=0.5)
        data = (torch.tensor([ids]) for ids in batches)
        state = train.train(model, data, batches[0], 6, 1e-2, dict(stored), keep)
        return model.state_dict(), state["curve"]

    def stop(state) -> None:
        stored.update(state)
        if state["step"] == 4:
            raise KeyboardInterrupt

    whole, curve = run(lambda state: None)
    with pytest.raises(KeyboardInterrupt):
        run(stop)
    assert stored["step"] == 4
    resumed, again = run(lambda state: None)
    assert [step for step, *_ in curve] == [2, 4, 6]
    assert curve == again
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_training_with_other_settings_does_not_go_on(tmp_path, monkeypatch, capsys):
    torch.save({"settings": {"steps": 1}}, tmp_path / "training.pt")
    flags = ["--max_chapters", "60", "--vocab_size", "1024", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train", *flags])
    assert exit_code(lambda: train.run(train.parse_args())) == 2
    err = capsys.readouterr().err
    assert err == f"error: {tmp_path / 'training.pt'} is of a run with other settings: delete it to start anew\n"
    assert [path.name for path in tmp_path.iterdir()] == ["training.pt"]


def test_the_demo_tasks_are_those_that_the_script_makes(tmp_path, capsys):
    assert make_tasks.main(["--out", str(tmp_path)]) == 0
    made, kept = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (tmp_path, ROOT / "demo" / "tasks"))
    assert made == kept
    assert sum(map(len, kept.values())) < 100_000
    for line in kept["demo_continuation.jsonl"].splitlines():
        item = json.loads(line)
        assert len(set(item["endings"])) == 4
        assert 0 <= item["label"] < 4
