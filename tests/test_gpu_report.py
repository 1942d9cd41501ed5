"""The GPU report without a GPU: its steps on a CPU at tiny sizes, what it calls wrong, how it handles failing steps.

    python -m pytest tests/test_gpu_report.py

`gpu_checks.py` applies the report's functions to the GPU's kernels.
"""

import dataclasses
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gpu_report
import pytest
import torch
import torch.nn.functional as F

from model import ACTIVATIONS
from scripts.bench import gpu_card, gpu_correctness, gpu_products, gpu_speed, measuring
from scripts.bench.gpu_card import READ, Card, Part, Row

TINY = dataclasses.replace(gpu_correctness.TINY, context_length=2048)


@pytest.fixture
def card(tmp_path, monkeypatch) -> Card:
    """A `Card` for the CPU with made-up figures; all models are tiny."""
    for name, shape in gpu_speed.MODELS.items():
        tiny = gpu_correctness.TINY_MODELS["with experts"] if shape.n_experts else TINY
        monkeypatch.setitem(gpu_speed.MODELS, name, dataclasses.replace(tiny, context_length=2048))
    sizes = {"N_LAYERS": 3, "NEW_TOKENS": 12, "PROMPT_LENGTHS": (9, 20)}
    for name, value in sizes.items():
        monkeypatch.setattr(gpu_speed, name, value)
    for module in (gpu_products, gpu_speed):
        monkeypatch.setattr(module, "CONTEXTS", (20, 140))
    monkeypatch.setattr(measuring, "rotation_bytes", lambda device: 1 << 20)
    return Card("cpu", torch.bfloat16, tmp_path, compile=False, read=1e10, rate=1e11, launch=1e-6)


def by_name(card: Card, *parts: Part) -> dict[str, Row]:
    """The rows of these parts of steps, by name."""
    rows = [row for part in parts for row in part(card)]
    found = {row.what: row for row in rows}
    assert len(found) == len(rows)  # a name that occurs twice would hide a row
    return found


# ---- What it calls right and wrong.


def test_right_arithmetic_is_right(card):
    rows = by_name(card, *gpu_correctness.CORRECTNESS[1:])
    assert len(rows) == 11
    assert all(row.is_right for row in rows.values()), rows


def test_logits_of_other_weights_are_wrong(card, monkeypatch):
    def spoilt(model, *args, original=gpu_correctness.cached_logits):
        model.layers[0].attention_norm.weight.data[:8] *= 1.5
        return original(model, *args)

    monkeypatch.setattr(gpu_correctness, "cached_logits", spoilt)
    assert [row.is_right for row in gpu_correctness.logits_rows(card)][0] is False


def test_a_draft_that_is_always_believed_is_wrong(card, monkeypatch):
    def gullible(steps, *args, original=gpu_correctness.speculate):
        for step in original(steps, *args):
            step.ids[0] = [token + (i > 0) for i, token in enumerate(step.ids[0])]
            yield step

    monkeypatch.setattr(gpu_correctness, "speculate", gullible)
    plain, *speculating = gpu_correctness.greedy_rows(card)
    assert plain.is_right
    assert [row.is_right for row in speculating] == [False, False]
    assert max(row.measured for row in speculating) < 100


@pytest.mark.parametrize("name", ["w13", "w2"])
def test_a_product_without_what_surrounds_it_is_wrong(monkeypatch, name):
    """Norm, gates and residual change the result so much that the check sees if one is missing."""
    run = gpu_correctness.random_product(name, "int8", TINY, "cpu", torch.float16)
    x, residual = run.inputs(2, "cpu", torch.float16)
    assert gpu_correctness.product_error(run, 3 * x, residual, run(3 * x, residual)) < 2
    wrong = {"no residual": run(3 * x, 0 * residual)} if name == "w2" else {}
    if name == "w13":
        monkeypatch.setitem(ACTIVATIONS, "silu", F.relu)
        wrong["relu"] = run(3 * x, residual)
        monkeypatch.undo()
        norm, run.norm = run.norm, None
        wrong["no norm"] = run(3 * x, residual)
        run.norm = norm
    for what, y in wrong.items():
        assert gpu_correctness.product_error(run, 3 * x, residual, y) > 10, what


@pytest.mark.parametrize(("errors", "is_right"), [([0.5, 1.9], True), ([2.1, 0.1], False), ([0.1, math.nan], False)])
def test_the_worst_error_counts(errors, is_right):
    assert gpu_correctness.error_row("products", errors).is_right == is_right


def test_the_demo(card):
    rows = by_name(card, *gpu_speed.DEMO_PARTS)
    assert len(rows) == 3 * 5
    for mode in ("bf16", "int8", "int4"):
        assert rows[f"demo, {mode}: worst greedy token, by float32"].is_right
        assert (card.out / f"demo_{mode}.json.gz").stat().st_size > 0


@pytest.mark.parametrize(
    ("spans", "total"),
    [([], 0), ([(5, 7), (0, 2)], 4), ([(0, 10), (2, 3), (9, 12)], 12), ([(0, 2), (2, 5), (0, 1)], 5)],
)
def test_the_gpu_is_busy_once_where_kernels_overlap(spans, total):
    assert gpu_speed.covered(spans) == total


def test_a_token_that_is_not_greedy_is_regretted(card):
    model = gpu_speed.load_model(gpu_speed.DEMO, "cpu", torch.float32)
    prompt = [5, 6, 7]
    best = [int(model(torch.tensor([prompt]))[0, -1].argmax())]
    assert gpu_speed.regret(model, prompt, best) == 0
    assert gpu_speed.regret(model, prompt, [(best[0] + 1) % model.args.vocab_size]) > 0.25


# ---- What it measures.


def test_products(card):
    rows = by_name(card, *gpu_products.PRODUCTS)
    # 2 models x 5 products x 4 modes x (1 row, 6 rows, 1 row by all candidates); attention: 3 x 2 contexts
    assert len(rows) == 2 * 5 * 4 * 3 + 3 * 2
    row = rows["8B w13, int8, 6 rows: Inductor"]
    assert row.predicted == pytest.approx((1024 * 256 + 4 * 1024) / 1e10 * 1e6)
    assert row.measured == row.more["us"]["Inductor"] > 0
    assert all(row.is_right is None for row in rows.values())  # errors below 4 roundings


def test_a_product_that_fails_or_errs_is_wrong(card, monkeypatch):
    card = dataclasses.replace(card, dtype=torch.float16)  # in which an error of 1 % is 10 roundings
    calls = {"right": gpu_products.call}

    def failing(run, x, residual):
        raise RuntimeError("out of resources")

    def candidates(card, name, linears, rows, others):
        return {label: (name, linears, call) for label, call in calls.items()}

    monkeypatch.setattr(gpu_products, "candidates", candidates)
    assert gpu_products.product_row(card, "8B", "wo", "int8", 1, False).is_right is None
    calls["wrong"] = lambda *args: 1.01 * gpu_products.call(*args)
    assert gpu_products.product_row(card, "8B", "wo", "int8", 1, False).is_right is False
    calls["wrong"] = failing
    row = gpu_products.product_row(card, "8B", "wo", "int8", 1, False)
    assert (row.is_right, row.more["failed"]) == (False, {"wrong": "RuntimeError: out of resources"})
    assert row.what == "8B wo, int8, 1 row: right"
    del calls["right"]
    with pytest.raises(RuntimeError, match="no way works"):
        gpu_products.product_row(card, "8B", "wo", "int8", 1, False)


def test_whole_steps_and_waits(card):
    rows = by_name(card, *gpu_speed.DECODES, *gpu_speed.WAITS)
    assert all(math.isfinite(row.measured) for row in rows.values())
    assert len(rows) == (3 * (2 * 2 + 1) + 1) * 6 + 1 + 3 * 2 * 2 + 2 * 2 + 2
    assert rows["30B-A3B, int4, 1 at 20: kernels"].predicted == 4 * (6 + 3) + 24
    assert (card.out / "8B_int4_8_at_140.json.gz").stat().st_size > 0


def test_a_step_is_split_into_its_bytes_and_the_rest(card, monkeypatch):
    """4 layers and 30 launches, 7 ms on the GPU: 1 ms for 10 MB, 6 ms for the rest; 8 ms for two rows in the loop."""
    monkeypatch.setitem(gpu_speed.COUNTED_LAUNCHES, 2, (5, 10))
    monkeypatch.setattr(gpu_speed, "bytes_per_step", lambda *args: 1e7)
    monkeypatch.setattr(gpu_speed, "time_replays", lambda *args: 7e-3)
    monkeypatch.setattr(gpu_speed, "time_stream", lambda *args: (8e-3, 0.125))
    rows = by_name(card, partial(gpu_speed.decode_rows, name="8B", mode="int8", batch=2, n_contexts=1))
    found = {name.removeprefix("8B, int8, 2 at 20: "): (row.predicted, row.measured) for name, row in rows.items()}
    assert found["8B, int8, 2 at 20"] == pytest.approx((2 / 1.03e-3, 2 / 8e-3))
    assert found["the graph alone"] == pytest.approx((2 / 1.03e-3, 2 / 7e-3))
    assert found["a layer's bytes, plainly read"] == (None, pytest.approx(250))
    assert found["the rest of a layer"] == pytest.approx((7.5, 1500))
    assert found["share of a plain read's bandwidth"] == (None, 12.5)


def test_a_model_too_large_for_the_memory_loses_layers(card, monkeypatch):
    def build(card, name, mode, n_layers, original=gpu_speed.build):
        if n_layers > 3:
            raise torch.OutOfMemoryError
        return original(card, name, mode, n_layers)

    monkeypatch.setattr(gpu_speed, "build", build)
    rows = by_name(card, partial(gpu_speed.decode_rows, name="8B", mode="int8", batch=1, n_contexts=1))
    assert "8B, int8, 1 at 20, 3 layers" in rows
    assert rows["8B, int8, 1 at 20, 3 layers: kernels"].predicted == 3 * 6 + 24


def test_startup_runs_the_command_line_twice(card):
    """Both runs share compile caches of their own, empty at first. Here nothing is compiled."""
    rows = by_name(card, gpu_speed.startup_rows)
    assert len(rows) == 4
    for caches in ("cold", "warm"):
        assert rows[f"generate.py, demo, {caches} caches: compiling"].measured == 0
        assert rows[f"generate.py, demo, {caches} caches: all of the process"].measured > 0.1


def test_replays_are_timed_by_events(monkeypatch):
    """On a fake GPU whose clock advances only at replays of a graph, by a millisecond each."""
    clock = {"ms": 0.0, "captured": 0, "calls": 0}

    class Graph:
        def replay(self):
            clock["ms"] += 1.0

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.ms = clock["ms"]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.ms - self.ms

    class Capture:
        def __init__(self, graph):
            assert isinstance(graph, Graph)

        def __enter__(self):
            clock["captured"] = -clock["calls"]

        def __exit__(self, *error):
            clock["captured"] += clock["calls"]

    made_up = {
        "synchronize": lambda: None, "CUDAGraph": Graph, "Event": Event, "graph": Capture,
    }  # fmt: skip
    for name, value in made_up.items():
        monkeypatch.setattr(torch.cuda, name, value)
    seconds = measuring.replay_seconds("cuda", lambda n: clock.update(calls=clock["calls"] + n), 1)
    assert seconds == pytest.approx(1e-3)
    assert clock["captured"] == 1


# ---- Its processes and its table.


def rows_of(tmp_path: Path, program: str, seconds: float = 60) -> tuple[list[dict], str]:
    log = tmp_path / "step.log"
    return list(gpu_report.rows_of([sys.executable, "-c", program], log, seconds)), log.read_text()


def test_a_step_that_fails_leaves_its_rows_and_its_reason(tmp_path):
    program = "import sys\nprint('{\"what\": 1}', flush=True)\nraise ValueError('too bad\\nfor you')"
    rows, log = rows_of(tmp_path, program)
    assert rows == [{"what": 1}, {"what": "step: FAILED", "failed": "ValueError: too bad"}]
    assert "Traceback" in log


def test_a_step_that_hangs_is_stopped_with_its_children(tmp_path):
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('{\"what\": 1}', flush=True)\ntime.sleep(60)"
    )
    start = time.monotonic()
    rows, log = rows_of(tmp_path, program, seconds=2)
    assert time.monotonic() - start < 30
    assert rows == [{"what": 1}, {"what": "step: OUT OF TIME", "failed": "stopped after 2 s, the rest is missing"}]
    assert 'File "<string>", line ' in log  # the stack at which it hung


@pytest.fixture
def run_fake_report(monkeypatch):
    """`run(out, steps)`: the exit code of a report whose steps yield these rows, by step."""

    def run(out: Path, steps: dict[str, list[dict]]) -> int:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(gpu_report, "made_with", lambda: {"card": "Card 1", "torch": "2.x"})
        monkeypatch.setattr(gpu_report, "rows_of", lambda command, log, seconds: iter(steps.get(log.stem, [])))
        return gpu_report.main(["--out", str(out)])

    return run


def row(what: str, predicted: float | None, measured: float, is_right: bool | None = None) -> dict:
    return dataclasses.asdict(Row(what, "us", predicted, measured, is_right))


def test_the_table_and_the_json(run_fake_report, tmp_path, capsys):
    out = tmp_path / "new" / "report"
    steps = {"card": [row(READ, 4.0, 3.0)], "demo": [row("graphs", 1, 1, True), row("clock", None, 1234.5678)]}
    assert run_fake_report(out, steps) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Card 1, torch 2.x"
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert len({len(line) for line in lines if line.startswith("|")}) == 1
    assert table[0] == ["what", "unit", "predicted", "measured", "ratio"]
    assert table[2:] == [
        [READ, "us", "4", "3", "0.75"],
        ["graphs", "us", "1", "1", "right"],
        ["clock", "us", "", "1235", ""],
    ]
    assert lines[-2].startswith("1 of 1 checks are right; 0 s")
    report = json.loads((out / "report.json").read_text())
    assert report["card"] == "Card 1"
    assert report["rows"][0] == {"step": "card", **steps["card"][0]}


@pytest.mark.parametrize(
    ("last", "says"),
    [
        (row("tokens", 100, 7, False), "WRONG"),
        ({"what": "demo: FAILED", "failed": "ValueError: too bad"}, "demo: FAILED: ValueError: too bad (more: "),
    ],
)
def test_what_is_wrong_or_missing_is_exit_code_1(run_fake_report, tmp_path, capsys, last, says):
    assert run_fake_report(tmp_path, {"demo": [row("graphs", 1, 1, True), last]}) == 1
    out = capsys.readouterr().out
    assert says in out
    assert last["what"] in out


def test_a_step_writes_its_rows_and_nothing_else(tmp_path, monkeypatch, capfd):
    """What a part prints goes to stderr. A part that fails becomes a row, and the next runs, with the card's rates."""

    def failing(card, mode):
        yield Row("before", "", None, 1.0)
        raise ValueError("too bad\nfor you")

    def working(card):
        os.write(1, b"chatter\n")  # as a compiler that it started would
        yield Row("bandwidth", "GB/s", None, card.read)

    monkeypatch.setitem(gpu_report.STEPS, "demo", ([partial(failing, mode="int4"), working], 1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_report, "set_compile_flags", lambda device: None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (tmp_path / "report.json").write_text(json.dumps({"rows": [{"what": READ, "measured": 4000.0}, {"what": "x"}]}))
    stdout = os.dup(1)
    try:
        with torch._dynamo.config.patch(recompile_limit=8, automatic_dynamic_shapes=True):  # restored at the end
            assert gpu_report.main(["--step", "demo", "--out", str(tmp_path)]) == 0
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
    out, err = capfd.readouterr()
    before, failed, after = map(json.loads, out.splitlines())
    assert before["what"] == "before"
    assert failed == {"what": "demo int4: FAILED", "failed": "ValueError: too bad"}
    assert after["measured"] == 4e12
    assert "Traceback" in err
    assert "chatter" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert gpu_report.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: this measures an NVIDIA GPU, and torch ")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_card(card, monkeypatch):
    """Predictions come from the driver's figures, here an H100's; clocks come from nvidia-smi."""
    h100 = {"memory_bus_width": 5120, "memory_clock_rate": 2_619_000, "major": 9, "minor": 0}
    props = SimpleNamespace(**h100, multi_processor_count=132, clock_rate=1_980_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: props)
    monkeypatch.setattr(torch, "randn", lambda *size, **named: torch.empty(*size, **named))
    monkeypatch.setattr(gpu_card, "replay_seconds", lambda device, function, *args: 1e-3)
    monkeypatch.setattr(gpu_card, "nvidia_smi", lambda *names: ["345", "1980", "2619", "2619"])
    rows = by_name(card, gpu_card.card_rows)
    assert rows[READ].predicted == pytest.approx(3352.32)
    assert rows[READ].measured == pytest.approx((1 << 28) / 1e-3 / 1e9)
    assert rows[gpu_card.PRODUCT].predicted == pytest.approx(1070.5, rel=1e-3)
    assert rows[gpu_card.PRODUCT].measured == pytest.approx(2 * 8192**3 / 1e-3 / 1e12)
    assert rows[gpu_card.LAUNCH].measured == pytest.approx(1)
    assert (rows["SM clock, as found"].predicted, rows["SM clock, as found"].measured) == (1980, 345)
    monkeypatch.setattr(gpu_card, "nvidia_smi", lambda *names: ["[N/A]", "1980", "2619", "2619"])
    del props.memory_bus_width, props.clock_rate  # an older torch does not report them
    rows = by_name(card, gpu_card.card_rows)
    assert [row.predicted for row in rows.values()] == [None] * 3


def test_nvidia_smi(monkeypatch):
    assert gpu_card.nvidia_smi("name") == [] or torch.cuda.is_available()
    monkeypatch.setattr(gpu_card.shutil, "which", lambda name: name)
    for stdout, found in (("535.1, 345\n535.1, 1980\n", ["535.1", "345"]), ("failed: no devices\n", []), ("", [])):
        monkeypatch.setattr(gpu_card.subprocess, "run", lambda *args, out=stdout, **named: SimpleNamespace(stdout=out))
        assert gpu_card.nvidia_smi("driver_version", "clocks.sm") == found
