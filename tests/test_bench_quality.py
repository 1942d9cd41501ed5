"""The table of what quantising costs in quality: its rows, its columns, and one number in each cell.

python -m pytest tests/test_bench_quality.py
"""

import pytest

from fast.cli import DEMO
from scripts.bench import quality


def table(capsys, *flags: str) -> list[dict[str, str]]:
    assert quality.main(["--device", "cpu", *flags]) == 0
    header, line, *rows = [row.strip("|").split("|") for row in capsys.readouterr().out.splitlines()]
    assert {len(header), *map(len, rows)} == {len(line)}
    names = [name.strip() for name in header]
    return [dict(zip(names, map(str.strip, row), strict=True)) for row in rows]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join((DEMO.parent / "heldout.txt").read_text().split()[:400]))
    return str(path)


def test_a_row_for_each_checkpoint(capsys, text):
    target, draft = str(DEMO), str(DEMO.parent / "draft")
    first, second, again = table(capsys, "--checkpoint_path", target, draft, target, "--perplexity", text)
    assert first == {**again, "lost, %": "+0.00"} == again
    assert [row["weights"] for row in (first, second)] == [f"`{target}`", f"`{draft}`"]
    assert [row["MB"] for row in (first, second)] == ["9.3", "1.1"]  # 4,656,896 and 557,696 weights of 2 bytes
    lost = 100 * (float(second["perplexity"]) / float(first["perplexity"]) - 1)
    assert float(second["lost, %"]) == pytest.approx(lost, abs=0.01)


def test_every_mode_by_its_flags(capsys, text, monkeypatch, tmp_path):
    monkeypatch.setattr(quality, "EVERY_MODE", ["--mode int8", "--mode int4-gptq --groupsize 128 --act_order"])
    calibration = tmp_path / "calibration.txt"
    calibration.write_text(" ".join((DEMO.parent / "heldout.txt").read_text().split()[400:1600]))
    flags = ["--every_mode", "--calibration_file", str(calibration), "--perplexity", text]
    exact, int8, int4 = table(capsys, *flags)
    assert [row["weights"] for row in (exact, int8, int4)] == [
        "as they are", "`--mode int8`", "`--mode int4-gptq --groupsize 128 --act_order`",
    ]  # fmt: skip
    assert float(exact["MB"]) > float(int8["MB"]) > float(int4["MB"])
    assert exact["perplexity"] != int8["perplexity"] != int4["perplexity"]


def test_tasks_have_a_column_for_the_error(capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(DEMO.parent.parent)
    (row,) = table(capsys, "--include_path", "demo/tasks", "--tasks", "demo_last_word", "--limit", "4")
    assert list(row) == ["weights", "MB", "demo_last_word acc", "±"]
    assert 0 <= float(row["demo_last_word acc"]) <= 1
    assert 0 <= float(row["±"]) <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--every_mode", "--checkpoint_path", "a", "b"], "error: --every_mode takes one --checkpoint_path, not 2\n"),
        (["--checkpoint_path", "nowhere", "--perplexity", "LICENSE"], "error: nowhere: no such file or directory\n"),
    ],
)
def test_errors_are_one_line(capsys, flags, message):
    assert quality.main(flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(message)
