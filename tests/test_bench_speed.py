"""The speed benchmark's command line on the smallest shape: its figures are consistent. No test looks at a speed.

    python -m pytest tests/test_bench_speed.py

Worth knowing: the runs are in this process, since a new one takes longer to import torch than to measure.
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
import torch

from fast.decoding import build_steps
from fast.sampling import Sampling
from scripts.bench import measuring, speed
from scripts.bench.measuring import Decode
from scripts.bench.presets import PRESETS
from scripts.bench.random_models import build_model, textbook_model, with_caches

DIM, N_LAYERS, HIDDEN_DIM, VOCAB_SIZE = 288, 6, 768, 32000  # stories-15m: tied, as many KV as query heads
IN_LAYERS = N_LAYERS * (4 * DIM * DIM + 3 * DIM * HIDDEN_DIM)
BYTES_PER_WEIGHT = {"bf16": 2, "int4": 5 / 8}


def run_of(*args: str) -> tuple[list[str], dict]:
    """The lines before the JSON, and the JSON, of a run on the smallest shape."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert speed.main(["--model", "stories-15m", "--no-compile", "--device", "cpu", *args]) == 0
    *lines, last = out.getvalue().splitlines()
    return lines, json.loads(last)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[list[str], dict, Path]:
    """One run over every axis: the lines before the JSON, the figures, and the folder that its files are in."""
    folder = tmp_path_factory.mktemp("benchmark")
    axes = [
        "--prompt_length", "24", "5", "--context_length", "24", "300", "--batch_size", "2", "1",
        "--max_seq_length", "320", "512", "--mode", "bf16", "int4",
    ]  # fmt: skip
    written = ["--json_path", str(folder / "figures.json")]
    if importlib.util.find_spec("matplotlib"):
        written += ["--plot", str(folder / "roof.png")]
    return *run_of("--new_tokens", "9", "--repeats", "2", *axes, *written), folder


def test_json_says_what_was_run(run):
    _, figures, folder = run
    expected = {
        "model": "stories-15m",
        "compile": False,
        "prompt_length": [24, 5],
        "new_tokens": 9,
        "batch_size": [2, 1],
    }
    assert {key: figures[key] for key in expected} == expected
    assert figures["dtype"] == "bfloat16"
    assert all(figures[key] for key in ("hardware", "torch", "date"))
    assert json.loads((folder / "figures.json").read_text()) == figures


def test_every_axis_starts_from_the_first_values(run):
    _, figures, _ = run
    prefills = [(point["mode"], point["batch_size"], point["prompt_length"]) for point in figures["prefill"]]
    assert prefills == [("bf16", 2, 24), ("bf16", 2, 5), ("int4", 2, 24), ("int4", 2, 5)]
    keys = ("batch_size", "context_length", "max_seq_length", "mode")
    decodes = [tuple(point[key] for key in keys) for point in figures["decode"]]
    places = [(2, 24, 320), (2, 300, 320), (1, 24, 320), (2, 24, 512)]
    assert decodes == [(*place, mode) for place in places for mode in ("bf16", "int4")]


def test_bytes_and_operations_follow_from_the_shape(run):
    _, figures, _ = run
    norms = (2 * N_LAYERS + 1) * DIM
    per_position = N_LAYERS * 2 * DIM  # keys and values
    for point in figures["decode"]:
        rows, positions = point["batch_size"], point["context_length"] + 4.5  # the mean over 8 steps
        weights = BYTES_PER_WEIGHT[point["mode"]] * (IN_LAYERS + VOCAB_SIZE * DIM) + 2 * norms
        off = 2 * rows * 3.5 * per_position  # a run may be timed in stretches: the median one may lie off its middle
        assert point["bytes"] == pytest.approx(weights + 2 * rows * positions * per_position, abs=off)
        assert point["gb_per_s"] * 1e9 == pytest.approx(point["tokens_per_s"] / rows * point["bytes"])
        attention = N_LAYERS * 4 * DIM * positions
        assert point["operations"] == rows * (2 * IN_LAYERS + 2 * VOCAB_SIZE * DIM + attention)
        assert point["gflops_per_s"] * 1e9 == pytest.approx(point["operations"] * point["tokens_per_s"] / rows)
    for point in figures["prefill"]:
        length = point["prompt_length"]
        attention = N_LAYERS * 4 * DIM * sum(range(1, length + 1))
        assert point["operations"] == 2 * (2 * length * IN_LAYERS + attention + 2 * VOCAB_SIZE * DIM)
        weights = BYTES_PER_WEIGHT[point["mode"]] * (IN_LAYERS + VOCAB_SIZE * DIM) + 2 * norms
        assert point["bytes"] == weights + 2 * 2 * length * per_position
        assert point["gflops_per_s"] * 1e9 == pytest.approx(point["operations"] / point["first_token_s"])
        assert point["tokens_per_s"] == pytest.approx(2 * length / point["first_token_s"])


def test_shares_are_ordered_and_the_table_shows_the_figures(run):
    lines, figures, _ = run
    assert lines[0].startswith("stories-15m, bfloat16, ")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert len({len(line) for line in lines if line.startswith("|")}) == 1
    table = {row[0]: row[1:] for row in rows}
    for point in figures["prefill"] + figures["decode"]:
        middle, low, high = point["share"]
        assert 0 < low <= middle <= high
    for point in figures["prefill"]:
        cells = table[f"{point['mode']} prefill 2 x {point['prompt_length']}"]
        assert cells[0].startswith(f"{point['tokens_per_s']:.1f} tokens/s")
    for point in figures["decode"]:
        name = f"decode {point['batch_size']} at {point['context_length']}, cache {point['max_seq_length']}"
        cells = table[f"{point['mode']} {name}"]
        assert cells[0].startswith(f"{point['tokens_per_s']:.2f} tokens/s, {point['gb_per_s']:.1f} GB/s")
        assert cells[0].endswith(" x)") == (point["mode"] == "int4")  # the ratio to the first mode
        assert cells[2].startswith(f"{point['share'][0]:.0%} (")
        assert cells[3] == f"{point['layer_bytes_us']:.1f} {point['layer_rest_us']:+.1f}"


@pytest.fixture(scope="module")
def decode() -> Decode:
    """A `Decode` that has not been measured yet; its model has one layer."""
    shape = dataclasses.replace(PRESETS["stories-15m"], n_layers=1, vocab_size=512)
    (model,) = with_caches(build_model(shape, "cpu", torch.float32), 3, [40])
    return Decode("bf16", build_steps(model, Sampling()), None, batch_size=3, context_length=20, new_tokens=3)


def test_a_steps_time_is_its_bytes_time_and_the_rest(decode):
    """Each stretch of steps is compared with the bandwidth measured beside it."""
    for bandwidth in (10e9, 20e9, 40e9):
        decode.add(seconds=1e-3, positions=21.5, bandwidth=bandwidth)
    point = decode.figures()
    layer = 4 * DIM * DIM + 3 * DIM * HIDDEN_DIM
    assert point["bytes"] == 4 * (layer + 512 * DIM + 3 * DIM + 3 * 21.5 * 2 * DIM)
    assert point["layer_bytes_us"] == pytest.approx(point["bytes"] / 20e3)
    assert point["layer_bytes_us"] + point["layer_rest_us"] == pytest.approx(1000)
    assert point["tokens_per_s"] == pytest.approx(3000)
    assert point["share"] == pytest.approx([point["bytes"] / 1e-3 / b for b in (20e9, 40e9, 10e9)])


def test_weights_and_cache_are_noise(decode):
    """Memory that was never written is one page of zeros, which the CPU's caches hold: reading it costs nothing."""
    cache = decode.steps.model.layers[0].attention.kv_cache
    assert cache.k.shape == (3, 6, 41, 48)
    for tensor in (cache.k, cache.v):
        assert tensor.std() == pytest.approx(0.02, rel=0.2)


def test_shapes(monkeypatch):
    assert measuring.rotation_bytes("cpu") >= 256e6
    monkeypatch.setattr(measuring, "rotation_bytes", lambda device: 4 << 20)
    lines, figures = run_of("--shapes", "--mode", "bf16", "int4", "--batch_size", "1", "3", "--repeats", "1")
    sizes = {"wqkv": (864, 288), "wo": (288, 288), "w13": (1536, 288), "w2": (288, 768), "output": (32000, 288)}
    expected = [
        (f"{name} {n}x{k}", mode, rows)
        for name, (n, k) in sizes.items()
        for mode in ("bf16", "int4")
        for rows in (1, 3)
    ]
    assert [(point["shape"], point["mode"], point["rows"]) for point in figures["products"]] == expected
    for point in figures["products"]:
        n, k = sizes[point["shape"].split()[0]]
        assert point["bytes"] == BYTES_PER_WEIGHT[point["mode"]] * n * k
        assert point["operations"] == 2 * point["rows"] * n * k
        assert point["copies"] == max(2, -(-(4 << 20) // point["bytes"]))
        assert point["rotated_mb"] == pytest.approx(point["copies"] * point["bytes"] / 1e6)
        assert point["gb_per_s"] * 1e3 == pytest.approx(point["bytes"] / point["us"])
        assert any(f"{point['mode']} {point['shape']}, {point['rows']} rows " in line for line in lines)


def test_experts_take_turns_with_a_dense_model(monkeypatch):
    experts = {"n_experts": 16, "experts_per_token": 2, "expert_dim": 96}
    shape = dataclasses.replace(PRESETS["stories-15m"], n_layers=2, **experts)
    monkeypatch.setitem(PRESETS, "experts", shape)
    sizes = ["--new_tokens", "3", "--repeats", "1"]
    lines, figures = run_of("--model", "experts", "--dense", "--mode", "bf16", "int8", *sizes)
    points = {point["mode"]: point for point in figures["decode"]}
    assert list(points) == ["bf16", "int8", "bf16 dense", "int8 dense"]
    routers = 2 * 16 * DIM
    assert points["bf16"]["bytes"] == points["bf16 dense"]["bytes"] + 2 * routers
    assert points["bf16"]["operations"] == points["bf16 dense"]["operations"] + 2 * routers
    for mode in ("bf16", "int8"):
        ratio = points[mode]["tokens_per_s"] / points[f"{mode} dense"]["tokens_per_s"]
        (line,) = (line for line in lines if f" {mode} decode, of the dense model's " in line)
        assert f" {ratio:.2f} x " in line


def test_startup_is_measured_in_fresh_processes():
    sizes = ["--prompt_length", "5", "--context_length", "5", "--new_tokens", "2", "--repeats", "1"]
    lines, figures = run_of("--startup", *sizes)
    (alone,) = figures["alone"]
    assert alone.keys() == {"mode", "peak_memory_bytes"}  # nothing was compiled
    assert alone["peak_memory_bytes"] > 1e8  # a process with torch
    (line,) = (line for line in lines if "bf16 peak memory" in line)
    assert f" {alone['peak_memory_bytes'] / 1e9:.2f} GB " in line


def test_the_plot_is_a_picture(run):
    pytest.importorskip("matplotlib")
    folder = run[2]
    picture = (folder / "roof.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    assert 10_000 < len(picture) < 100_000
    assert sorted(path.name for path in folder.iterdir()) == ["figures.json", "roof.png"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "llama-9"], "error: unknown model 'llama-9'; choose from: stories-15m, tinyllama-1.1b"),
        (["--new_tokens", "1"], "error: --new_tokens 1 must be at least 2"),
        (["--batch_size", "4", "0"], "error: --batch_size 0 must be at least 1"),
        (["--device", "nowhere"], "error: --device nowhere cannot be used here"),
        (["--max_seq_length", "512", "100"], "error: --max_seq_length 100 is less than the 159 these lengths take"),
        (["--dense"], "error: --dense: stories-15m has no experts; mixtral-8x7b, moe-8x300m, qwen-3-30b-a3b have"),
        (
            ["--model", "moe-8x300m", "--shapes"],
            "error: --shapes: moe-8x300m has experts, whose products depend on the",
        ),
        (["--dense", "--model", "moe-8x300m", "--batch_size", "1", "4"], "error: --dense: more rows read more experts"),
        (["--plot", "x.png", "--dense", "--model", "moe-8x300m"], "error: --plot draws one model: leave --dense out"),
        (["--shapes", "--plot", "x.png"], "error: --plot draws prefills and decodes, which --shapes leaves out"),
        (["--plot", "no/such/folder/x.png"], "error: cannot write no/such/folder/x.png: "),
    ],
)
def test_errors_are_one_line(args, message, capsys):
    assert speed.main(["--model", "stories-15m", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert len(err.splitlines()) == 1


def test_without_matplotlib_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert speed.main(["--model", "stories-15m", "--plot", "x.png"]) == 2
    assert capsys.readouterr().err == "error: --plot needs the package matplotlib: pip install matplotlib\n"


@pytest.mark.parametrize("tied", [True, False])
def test_random_weights(tied):
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


@pytest.mark.parametrize("scheme", [{"mode": "int8"}, {"mode": "int4", "groupsize": 32}])
def test_random_quantised_weights_have_the_deviation_of_float_ones(scheme):
    model = textbook_model(PRESETS["stories-15m"], "cpu", torch.float32, scheme)
    for linear in (model.layers[0].attention.wo, model.output):
        assert linear.dequantize(torch.float32).std() == pytest.approx(0.02, rel=0.02)
