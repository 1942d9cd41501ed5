"""quantize.py: the files it writes, GPTQ, calibration, errors; generate.py on what it wrote.

    python -m pytest tests/test_quantize.py

Worth knowing: on independent inputs GPTQ gains nothing over rounding, so its tests make correlated inputs.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import GROWTH, make_tiny

import generate
import quantize
from fast import gptq as gptq_module
from fast.checkpoint import load_model, open_checkpoint, save_checkpoint
from fast.gptq import Hessian, gptq, gptq_linears
from fast.quantized import GroupedLinear, Int8Linear, int4_values, pack_nibbles
from model import Linear, ModelArgs, Transformer

ROOT = Path(quantize.__file__).parent
DEMO = ROOT / "demo" / "target"
MODES = {"int8": "model_int8.pth", "int4": "model_int4.g32.pth", "int4-gptq": "model_int4-gptq.g32.pth"}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def run(capsys):
    """`run("--flag", value)`: exit code, stdout and stderr of quantize.py."""

    def call(*flags) -> tuple[int, str, str]:
        capsys.readouterr()
        return quantize.main([str(flag) for flag in flags]), *capsys.readouterr()

    return call


@pytest.fixture
def fails(run):
    """`fails(message, "--flag", value)`: one line on stderr says what was wrong, and exit code 2."""

    def call(message: str, *flags) -> None:
        code, out, err = run(*flags)
        lines = [line for line in err.splitlines() if not re.search("Linear/s|s/Linear", line) and line.strip()]
        assert (code, out, len(lines)) == (2, "", 1), err
        assert lines[0].startswith("error: ")
        assert message in lines[0]

    return call


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A file of English text, three times the calibration text that the demo's widest Linear needs."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((ROOT / "demo" / "heldout.txt").read_text(encoding="utf-8")[:8000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory, text) -> Path:
    """A directory like the demo's, with a file of every mode, each made by the command line."""
    directory = tmp_path_factory.mktemp("written")
    for path in DEMO.iterdir():
        (directory / path.name).symlink_to(path)
    for mode in MODES:
        flags = ["--checkpoint_path", directory, "--mode", mode]
        flags += ["--calibration_file", text, "--calibration_seq_length", 256] if mode == "int4-gptq" else []
        assert quantize.main([str(flag) for flag in flags]) == 0
    return directory


# ---- What is written.


@pytest.mark.parametrize("mode", MODES)
def test_a_file_says_what_it_is_and_loads_by_that(written, mode):
    model = load_model(written / MODES[mode], dtype=torch.float32)  # for which a CPU has no kernels
    assert model.quantization["mode"] == mode
    assert model.quantization.get("groupsize") == (None if mode == "int8" else 32)
    kind = Int8Linear if mode == "int8" else GroupedLinear
    linears = [
        m for name, m in model.named_modules() if name.rpartition(".")[2] in ("wqkv", "wo", "w13", "w2", "output")
    ]
    assert len(linears) == 4 * model.args.n_layers + 1
    assert all(isinstance(linear, kind) for linear in linears)


def test_files_are_as_small_as_their_bits(written):
    float_size = (DEMO / "model.safetensors").stat().st_size
    embedding = 2 * 2048 * 256  # tied to the output projection in the demo, stored separately once that is quantised
    sizes = {mode: (written / name).stat().st_size for mode, name in MODES.items()}
    assert sizes["int8"] == pytest.approx(float_size / 2 + embedding, rel=0.02)
    assert sizes["int4"] == pytest.approx(float_size * 5 / 16 + embedding, rel=0.02)


@pytest.mark.parametrize("mode", MODES)
def test_save_load_save_is_the_same_file(written, tmp_path, mode):
    checkpoint = open_checkpoint(written / MODES[mode])
    tensors = {name: (t.shape, t.dtype, t.fill) for name, t in checkpoint.tensors.items()}
    save_checkpoint(tmp_path / "again.pth", checkpoint.args, tensors, checkpoint.quantization)
    assert (tmp_path / "again.pth").read_bytes() == (written / MODES[mode]).read_bytes()


def test_weights_are_those_of_from_float(written):
    source, found = load_model(DEMO, dtype=torch.float32), open_checkpoint(written / "model_int4.g32.pth").tensors
    expected = GroupedLinear.from_float(source.layers[2].attention.wqkv.weight, groupsize=32)
    for name, tensor in expected.state_dict().items():
        assert found[f"layers.2.attention.wqkv.{name}"].load("cpu", tensor.dtype).equal(tensor)
    assert found["tok_embeddings.weight"].load("cpu", torch.bfloat16).equal(source.tok_embeddings.weight.bfloat16())


@pytest.mark.parametrize("family", ["llama-tied", "llama-bias", "qwen2", "mistral-window", "gemma3", "qwen3-moe-mixed"])
@pytest.mark.parametrize("mode", ["int8", "int4", "int4-gptq"])
def test_families(tiny, tmp_path, family, mode):
    """A tied output projection is stored by itself, biases are kept, a sliding window applies; logits stay close."""
    source, target = open_checkpoint(tiny(family)[1]), tmp_path / "model.pth"
    scheme = {"mode": mode, "groupsize": 32, "percdamp": 0.01, "blocksize": 32, "act_order": False}
    tokens = torch.randint(128, (64, 16), generator=torch.Generator().manual_seed(0))
    quantize.quantize(source, scheme, target, "cpu", tokens.tolist() if mode == "int4-gptq" else None)
    model, exact = load_model(target, dtype=torch.float32), load_model(tiny(family)[1], dtype=torch.float32)
    assert model.args == exact.args
    assert model.output.weight is not model.tok_embeddings.weight
    if family == "qwen2":
        bias = model.layers[0].attention.wqkv.bias
        assert torch.allclose(bias, exact.layers[0].attention.wqkv.bias, rtol=0.01)
    found, expected = model(tokens[:8]), exact(tokens[:8])
    assert (found - expected).norm() < {"int8": 0.06, "int4": 0.5, "int4-gptq": 0.5}[mode] * expected.norm()


def test_skipped_linears_stay_float(tiny, run, tmp_path):
    flags = ["--checkpoint_path", tiny("llama-tied")[1], "--output_path", tmp_path / "m.pth"]
    code, out, _ = run(*flags, "--skip", "lm_head", "wo", "layers.1.feed_forward.w2")
    assert code == 0
    assert "weights     int8, skip output wo layers.1.feed_forward.w2\n" in out
    assert "Linears     5 quantised, 4 left in bf16\n" in out
    assert "next" not in out  # there is no tokenizer
    model = load_model(tmp_path / "m.pth", dtype=torch.float32)
    assert model.output.weight is model.tok_embeddings.weight
    for linear in (model.output, model.layers[0].attention.wo, model.layers[1].feed_forward.w2):
        assert isinstance(linear, Linear)
    assert type(model.layers[0].feed_forward.w2) is Int8Linear


# ---- GPTQ.


def dependent_inputs(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs `[n, k]`, whose spectrum falls steeply, as that of hidden states does."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator) * torch.logspace(0, -2, k)[:, None]
    return torch.randn(n, k, generator=generator) @ mixing


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("groupsize", "blocksize"), [(32, 128), (128, 32), (64, 64)])
def test_gptq_beats_rounding_on_inputs_that_depend_on_each_other(act_order, groupsize, blocksize):
    x, weight = dependent_inputs(2000, 256), torch.randn(48, 256, generator=torch.Generator().manual_seed(1))
    hessian = x.T @ x / len(x)
    options = {"groupsize": groupsize, "percdamp": 0.01, "blocksize": blocksize, "act_order": act_order}
    q, scales, zeros, error = gptq(weight, hessian, **options)

    def output_error(approximate):
        return float(((approximate - weight) @ x.T).norm() / (weight @ x.T).norm())

    rounded = GroupedLinear.from_float(weight, groupsize=groupsize, scale_search=True).dequantize(torch.float32)
    assert output_error(int4_values(q, scales, zeros)) == pytest.approx(error, rel=1e-3)
    assert error < 0.6 * output_error(rounded)


def test_gptq_does_not_depend_on_the_block_size():
    hessian = torch.cov(dependent_inputs(2000, 128).T)
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    results = [
        gptq(weight, hessian, groupsize=32, percdamp=0.01, blocksize=b, act_order=False)[3] for b in (32, 64, 128)
    ]
    assert max(results) < 1.02 * min(results)  # equal up to rounding


def test_gptq_with_independent_inputs_is_rounding():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    q, scales, zeros, _ = gptq(weight, torch.eye(64), groupsize=32, percdamp=0.01, blocksize=64, act_order=False)
    expected = GroupedLinear.from_float(weight, groupsize=32, scale_search=True).dequantize(torch.float32)
    assert int4_values(q, scales, zeros).equal(expected)


def test_gptq_takes_inputs_that_are_always_zero():
    hessian = torch.cov(dependent_inputs(500, 64).T)
    hessian[5] = hessian[:, 5] = 0
    q, scales, zeros, error = gptq(
        torch.randn(4, 64), hessian, groupsize=32, percdamp=0.01, blocksize=64, act_order=True
    )
    assert error < 0.2
    assert scales.isfinite().all()


def test_gptq_of_a_singular_hessian_says_so():
    with pytest.raises(ValueError, match="singular with --percdamp 1e-30: raise it, or calibrate longer"):
        gptq(torch.randn(4, 64), torch.ones(64, 64), groupsize=32, percdamp=1e-30, blocksize=64, act_order=False)


def test_gptq_rounds_a_linear_whose_inputs_are_all_zero(tmp_path, text, capsys):
    """As a layer that was switched off has them."""
    model = make_tiny("llama")
    model.get_parameter("model.layers.1.mlp.up_proj.weight").zero_()  # so the inputs of w2 are zero
    model.get_parameter("model.layers.0.self_attn.q_proj.weight").zero_()
    model.save_pretrained(tmp_path)
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "calibrate", lambda *_: [[1, 2, 3, 4]] * 64)
        flags = ["--mode", "int4-gptq", "--calibration_file", text, "--checkpoint_path", tmp_path, "--device", "cpu"]
        assert quantize.main([str(flag) for flag in flags]) == 0
    err = capsys.readouterr().err
    assert err.count("so it is rounded") == 1
    assert "layers.1.feed_forward.w2: its inputs are all zero on the calibration text, so it is rounded\n" in err
    tensors = open_checkpoint(tmp_path / "model_int4-gptq.g32.pth").tensors
    name = "layers.1.feed_forward.w2"
    weight = model.get_parameter("model.layers.1.mlp.down_proj.weight").data
    expected = GroupedLinear.from_float(weight, groupsize=32, scale_search=True).state_dict()
    for part, value in expected.items():
        assert tensors[f"{name}.{part}"].parts[0].read().equal(value)


def test_gptq_rounds_an_expert_that_few_tokens_reach(tiny, capsys):
    """Each expert sees the tokens that are routed to it, none of the others."""
    source = load_model(
        tiny("mixtral")[1], dtype=torch.float32
    ).bfloat16()  # loading in bfloat16 would pack the weights
    tokens = torch.randint(128, (10, 16), generator=torch.Generator().manual_seed(0))
    seen = {}
    feed_forward = source.layers[0].feed_forward
    feed_forward.router.register_forward_hook(lambda _, x, routing: seen.update(x=x[0], experts=routing[0]))
    source(tokens)
    scheme = {"groupsize": 32, "percdamp": 0.01, "blocksize": 32, "act_order": False, "skip": ["wqkv", "wo"]}
    found = gptq_linears(open_checkpoint(tiny("mixtral")[1]), scheme, tokens.tolist(), "cpu")
    name, mean_error, module = next(found)
    assert name == "layers.0.feed_forward.experts.w13"
    rows = [seen["x"][(seen["experts"] == e).any(-1)].float() for e in range(4)]
    few = [len(x) < 64 for x in rows]  # inputs
    assert sorted(few)[:1] + sorted(few)[-1:] == [False, True]
    message = f"{name}: {sum(few)} of 4 experts see fewer than 64 tokens or only zeros, so they are rounded\n"
    assert message in capsys.readouterr().err
    parts = module.weight.chunk(4), module.scales.chunk(4), module.zeros.chunk(4)
    exact = load_model(tiny("mixtral")[1], dtype=torch.float32).layers[0].feed_forward.experts.w13.weight
    weights, errors = exact.chunk(4), []
    for weight, x, is_rounded, *part in zip(weights, rows, few, *parts, strict=True):
        if is_rounded:
            plain = GroupedLinear.from_float(weight, groupsize=32, scale_search=True)
            assert all(a.equal(b) for a, b in zip(part, (plain.weight, plain.scales, plain.zeros), strict=True))
        else:
            hessian = Hessian(64, "cpu")
            hessian.add(x)
            q, *_, error = gptq(weight, hessian.mean, 32, blocksize=32)
            assert part[0].equal(pack_nibbles(q))
            errors.append(error)
    assert mean_error == pytest.approx(sum(errors) / len(errors), rel=1e-3)


def test_gptq_of_inputs_that_are_no_numbers_says_so():
    hessian = torch.eye(64)
    hessian[3, 4] = torch.nan
    with pytest.raises(ValueError, match="its inputs are NaN or infinite"):
        gptq(torch.randn(4, 64), hessian, groupsize=32)
    assert gptq(torch.zeros(4, 64), torch.eye(64), groupsize=32)[3] == 0


def test_gptq_observes_what_the_model_computes(tiny, monkeypatch):
    """With rounding switched off, every Hessian is that of the float model's own inputs."""
    monkeypatch.setattr(gptq_module, "int4_values", lambda q, scales, zeros: torch.full((), torch.nan))
    seen = {}

    def exact(weight, hessian, **options):
        seen[weight.shape, len(seen)] = hessian
        return torch.zeros(weight.shape), torch.zeros(len(weight), 2), torch.zeros(len(weight), 2), 0.0

    monkeypatch.setattr(gptq_module, "gptq", exact)
    monkeypatch.setattr(gptq_module.GroupedLinear, "dequantize", lambda self, dtype: next(weights))
    source = load_model(tiny("llama")[1], dtype=torch.float32).bfloat16()  # loading in bfloat16 would pack the weights
    tokens = torch.randint(128, (6, 16), generator=torch.Generator().manual_seed(0))
    names = [n for n, m in source.named_modules() if isinstance(m, Linear)]
    weights = iter([source.get_submodule(name).weight for name in names])
    inputs = {name: [] for name in names}
    for name in names:
        source.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: inputs[name].append(x[0]))
    source(tokens)
    scheme = {"groupsize": 32, "percdamp": 0.01, "blocksize": 32, "act_order": False}
    found = [name for name, *_ in gptq_linears(open_checkpoint(tiny("llama")[1]), scheme, tokens.tolist(), "cpu")]
    assert found == names
    for name, hessian in zip(names, seen.values(), strict=True):
        x = inputs[name][0].flatten(0, 1).float()
        assert torch.allclose(hessian, x.T @ x / len(x), rtol=1e-3, atol=1e-4)


# ---- Memory, interruption, errors.


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_anonymous_memory_is_bounded(tmp_path, mode):
    """A model of 503 MB, whose largest Linear has 34 MB: the output is a mapped file, so only Linears count."""
    shape = {"dim": 1024, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "head_dim": 128, "hidden_dim": 8192}
    args = ModelArgs(**shape, vocab_size=8192, context_length=128, norm_eps=1e-5, rope_theta=1e4)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(args).state_dict().items()}
    tensors = {name: (shape, torch.bfloat16, lambda out: out.fill_(1)) for name, shape in shapes.items()}
    save_checkpoint(tmp_path / "model.pth", args, tensors)
    flags = ["--checkpoint_path", str(tmp_path / "model.pth"), "--mode", mode]
    program = f"{GROWTH}\nimport quantize\nprint('grew', growth(lambda: quantize.main({flags})))"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    grew = int(run.stdout.split("grew ")[1])
    assert grew < 300  # one Linear, stored and quantised, and slack; far below the model


def test_an_interrupted_run_leaves_no_file(tmp_path, text):
    for path in DEMO.iterdir():
        (tmp_path / path.name).symlink_to(path)
    flags = ["--mode", "int4-gptq", "--calibration_file", text, "--checkpoint_path", tmp_path]
    command = [sys.executable, "quantize.py", *map(str, flags)]
    before = set(tmp_path.iterdir())
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while set(tmp_path.iterdir()) == before and run.poll() is None:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    err = run.communicate(timeout=60)[1].decode()
    assert run.returncode == 130, err
    assert "stopped; no checkpoint was written" in err
    assert "Traceback" not in err
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("mode", ["int8", "int4-gptq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_no_number_is_named(fails, tmp_path, mode, value, name, text):
    model = make_tiny("llama")
    model.get_parameter(name).view(-1)[7] = value
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").symlink_to(DEMO / "tokenizer.model")
    ours = {"model.norm.weight": "norm.weight"}.get(name, "layers.1.feed_forward.w2.weight")
    flags = ["--mode", mode, "--checkpoint_path", tmp_path, "--device", "cpu"]
    flags += ["--calibration_file", text] if mode == "int4-gptq" else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "calibrate", lambda *_: [[1, 2, 3, 4]] * 64)
        fails(f"{ours} holds NaN or infinite values: it cannot be quantised", *flags)
    assert not list(tmp_path.glob("*.pth*"))


GPTQ = ["--mode", "int4-gptq", "--calibration_file", ROOT / "LICENSE"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint_path", "nowhere.pth"], "nowhere.pth: no such file or directory"),
        (["--skip", "w5"], "no such Linear; use output, w13, w2, wo, wqkv or a full name (layers.0.attention.wqkv)"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (
            ["--mode", "int4", "--groupsize", 256, "--checkpoint_path", DEMO.parent / "draft"],
            "layers.0.attention.wqkv has 128 inputs, not a multiple of 256: use",
        ),
        ([*GPTQ, "--calibration_limit", 0], "--calibration_limit 0 must be at least 1"),
        ([*GPTQ, "--percdamp", 0], "--percdamp 0.0: give a share above 0, such as 0.01"),
        ([*GPTQ, "--calibration_seq_length", 9999], "the calibration text gives 0 sequences of 9999 tokens"),
        (["--output_path", "nowhere/model.pth"], "nowhere"),
        (["--groupsize", 32], "--mode int8 does not use everything that is given: leave out --groupsize"),
        (["--scale_search", "--act_order"], "leave out --scale_search, --act_order"),
        (["--mode", "int4", "--calibration_limit", 128], "leave out --calibration_limit"),
        ([*GPTQ, "--scale_search"], "leave out --scale_search"),
        ([*GPTQ, "--calibration_tasks", "x"], "--calibration_file and --calibration_tasks: choose one of them"),
        # Found before the checkpoint is looked for:
        (["--mode", "int4-gptq", "--calibration_file", "no.txt", "--checkpoint_path", "nowhere.pth"], "'no.txt'"),
        (["--mode", "int4-gptq", "--calibration_file", ROOT, "--checkpoint_path", "nowhere.pth"], "Is a directory"),
    ],
)
def test_bad_flags(fails, tmp_path, flags, message):
    fails(message, *(["--output_path", tmp_path / "m.pth"] if "--output_path" not in flags else []), *flags)


def test_too_little_calibration_text(fails, tmp_path):
    (tmp_path / "short.txt").write_text("A few words. " * 40)
    flags = ["--mode", "int4-gptq", "--calibration_file", tmp_path / "short.txt", "--output_path", tmp_path / "m.pth"]
    message = (
        "the calibration text gives 2 sequences of 64 tokens, but the 512 inputs of the widest Linear need 8: give"
    )
    fails(message, *flags, "--calibration_seq_length", 64)


def test_a_quantised_input(fails, written):
    path = written / "model_int8.pth"
    fails("is quantised already (int8): give the unquantised checkpoint", "--checkpoint_path", path)


@pytest.fixture
def source(tmp_path) -> Path:
    """The draft model's directory, converted as well, with a tokenizer; and files that are in an output's way."""
    directory = Path(shutil.copytree(DEMO.parent / "draft", tmp_path / "source"))
    checkpoint = open_checkpoint(directory)
    tensors = {name: (t.shape, torch.bfloat16, t.fill) for name, t in checkpoint.tensors.items()}
    save_checkpoint(directory / "model.pth", checkpoint.args, tensors)
    torch.save({"weight": torch.ones(2)}, directory / "theirs.pth")
    (directory / "link.pth").symlink_to("model.pth")
    (directory / "weights.pth").symlink_to("model.safetensors")
    os.link(directory / "model.pth", directory / "hard.pth")
    os.mkfifo(directory / "pipe.pth")
    return directory


def contents(directory: Path) -> dict[str, str | bytes]:
    """What is in a directory, by name: where a link points to, a file's bytes, a pipe's mode."""
    return {
        path.name: os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "pipe"
        for path in directory.iterdir()
    }


@pytest.mark.parametrize("given", [".", "model.pth"])
@pytest.mark.parametrize(
    "output", ["model.pth", "link.pth", "hard.pth", "weights.pth", "theirs.pth", "pipe.pth", "model.safetensors"]
)
def test_an_output_replaces_nothing_but_a_result(fails, source, given, output):
    before = contents(source)
    message = "give it a name that ends in .pth" if output == "model.safetensors" else "not made by quantize.py: give"
    fails(message, "--checkpoint_path", source / given, "--output_path", source / output)
    assert contents(source) == before


def test_replacing_a_result_of_other_settings_is_said(run, source):
    target, flags = source / "m.pth", ["--checkpoint_path", source, "--output_path", source / "m.pth"]

    def said(*more) -> list[str]:
        code, _, err = run(*flags, *more)
        assert code == 0, err
        return [line for line in err.splitlines() if "replacing" in line]

    assert said() == []
    first = target.read_bytes()
    assert said() == []
    assert target.read_bytes() == first
    assert said("--mode", "int4", "--skip", "w2", "output") == [f"replacing {target}, which was int8"]
    assert said("--mode", "int4") == [f"replacing {target}, which was int4, groupsize 32, skip w2 output"]


def test_an_output_that_is_a_link_stays_one(run, source, tmp_path):
    elsewhere, link = tmp_path / "elsewhere.pth", source / "new.pth"
    link.symlink_to(elsewhere)
    for mode in ("int8", "int4"):  # there is no file at first
        code, out, err = run("--checkpoint_path", source, "--mode", mode, "--output_path", link)
        assert code == 0, err
        assert link.is_symlink()
        assert load_model(elsewhere).quantization["mode"] == mode
    assert f"wrote {link}\n" in out


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_the_next_command_works_as_printed(run, source, tmp_path, monkeypatch, capsys, mode):
    """From another directory, for a file in a third one with a space in its name; the parameters stay as many."""
    other, here = tmp_path / "its own place", tmp_path / "here"
    other.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    code, out, err = run("--checkpoint_path", source, "--mode", mode, "--output_path", other / "m.pth")
    assert code == 0, err
    small = {"config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"}
    assert contents(other) == {name: (source / name).read_bytes() for name in small} | {
        "m.pth": (other / "m.pth").read_bytes()
    }
    *_, parameters, copied, command = out.splitlines()
    assert set(copied.replace(",", "").split()) == {"copied", "too", *small}
    _, python, script, *flags = shlex.split(command)
    assert (python, Path(script).resolve()) == ("python", ROOT / "generate.py")
    flags.remove("--compile")
    for path in (other / "m.pth", source, source / "model.pth"):
        flags[-1] = str(path)
        assert generate.main([*flags, "--max_new_tokens", "2", "--device", "cpu"]) == 0
        said = "".join(capsys.readouterr())
        assert f"{path}: 0.6 M parameters, bfloat16" in said
        assert parameters.split() == ["parameters", "0.6", "M"]


def test_the_next_command_names_a_file_that_looks_like_a_flag(run, source, monkeypatch):
    monkeypatch.chdir(source)
    code, out, err = run("--checkpoint_path", source, "--mode", "int8", "--output_path=-q.pth")
    assert code == 0, err
    assert out.splitlines()[-1].endswith(f" --checkpoint_path {source / '-q.pth'}")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_files_of_another_model_beside_the_output_are_refused(fails, source, tmp_path, name):
    other = tmp_path / "other"
    other.mkdir()
    (other / name).write_text("{}")
    message = f"{other / name} is not that of {source}: give another directory in --output_path"
    fails(message, "--checkpoint_path", source, "--output_path", other / "m.pth")
    assert contents(other) == {name: b"{}"}


def test_a_file_from_before_says_untied_and_loads(tiny, tmp_path):
    """Files written before kept `tie_embeddings` false once the output projection was quantised."""
    new, old = tmp_path / "new.pth", tmp_path / "old.pth"
    quantize.quantize(open_checkpoint(tiny("llama-tied")[1]), {"mode": "int8"}, new, "cpu")
    checkpoint = open_checkpoint(new)
    tensors = {name: (t.shape, t.dtype, t.fill) for name, t in checkpoint.tensors.items()}
    save_checkpoint(old, dataclasses.replace(checkpoint.args, tie_embeddings=False), tensors, checkpoint.quantization)
    tokens = torch.arange(20)[None]
    assert load_model(new)(tokens).equal(load_model(old)(tokens))


def test_a_full_disk_leaves_no_file(tmp_path):
    program = (
        "import resource, sys, torch, quantize, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "sys.exit(quantize.main(['--output_path', sys.argv[1]]))\n"
    )
    run = subprocess.run([sys.executable, "-c", program, tmp_path / "m.pth"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == f"error: [Errno 27] File too large: '{tmp_path / 'm.pth'}'"
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())


def test_calibration_tasks_without_lm_eval(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    message = "--calibration_tasks needs lm_eval: pip install 'lm_eval>=0.4.9,<0.5', or give --calibration_file TEXT"
    fails(message, "--mode", "int4-gptq", "--checkpoint_path", "nowhere.pth")


# ---- generate.py on every file.


@pytest.mark.parametrize("mode", MODES)
def test_generating_from_every_file(written, mode, tmp_path, capsys):
    """Eager and compiled, alone and in a batch of three, in bf16 with the CPU's kernels: the texts begin alike."""
    settings, texts = torch._inductor.config.save_config(), {}
    for name, flags in {"eager": [], "compiled": ["--compile", "--compile_prefill"]}.items():
        for batch in (1, 3):
            if (name, batch, mode) in (("compiled", 3, "int8"), ("compiled", 1, "int4")):
                continue  # one compiled batch size is enough for these modes
            torch._dynamo.reset()
            path = tmp_path / "figures.json"
            defaults = ["--checkpoint_path", written / MODES[mode], "--temperature", 0, "--max_new_tokens", 16]
            argv = [*defaults, "--batch_size", batch, "--device", "cpu", "--metrics_path", path, *flags]
            assert generate.main([str(flag) for flag in argv]) == 0
            figures = json.loads(path.read_text())
            assert figures["quantization"]["mode"] == mode
            assert len(figures["samples"]) == batch
            assert len({sample["text"] for sample in figures["samples"]}) == 1
            texts[name, batch] = figures["samples"][0]["text"]
    torch._inductor.config.load_config(settings)
    assert f"M parameters, bfloat16, {mode}, cpu" in "".join(capsys.readouterr())
    assert len({text[:20] for text in texts.values()}) == 1, texts  # further on, rounding may decide between two tokens
