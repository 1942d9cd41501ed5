"""checkpoint.py and the converter: every input form gives the same model, and errors name the file at fault.

    python -m pytest tests/test_checkpoint.py

Worth knowing: the memory test runs in its own process and reads the kernel's count of anonymous pages (`RssAnon`),
which includes copies of the weights, but not mapped file pages: the kernel can drop these at any time.
"""

import dataclasses
import errno
import hashlib
import importlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GROWTH
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fast.checkpoint import load_model, open_checkpoint, save_checkpoint
from fast.config import make_args, rope_factors
from fast.layers import speed_up
from model import RopeScaling

ROOT = Path(__file__).parent.parent


def same_model(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def save_ours(path, checkpoint, dtype=torch.float32, **kwargs):
    tensors = {name: (stored.shape, dtype, stored.fill) for name, stored in checkpoint.tensors.items()}
    save_checkpoint(path, checkpoint.args, tensors, **kwargs)


def files_in(directory) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.fixture
def copy(tiny, tmp_path):
    """`copy(family)`: a copy of a Hugging Face directory, for a test to damage."""

    def make(family="llama"):
        return Path(shutil.copytree(tiny(family)[1], tmp_path / "model"))

    return make


@pytest.fixture
def shard(copy):
    """`shard(family, kind)`: such a copy in several files with an index; kind is "safetensors" or "bin"."""

    def make(family="llama", kind="safetensors", n_shards=3):
        directory = copy(family)
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        stem = "model" if kind == "safetensors" else "pytorch_model"
        files = [f"{stem}-{i + 1:05}-of-{n_shards:05}.{kind}" for i in range(n_shards)]
        weight_map = {name: files[i % n_shards] for i, name in enumerate(tensors)}
        for file in files:
            part = {name: tensors[name] for name in tensors if weight_map[name] == file}
            (save_file if kind == "safetensors" else torch.save)(part, directory / file)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (directory / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
        return directory

    return make


# --- input forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-tied", "llama-bias", "qwen2", "qwen3", "gemma3"])
def test_every_input_form_gives_the_same_model(tiny, shard, tmp_path, family):
    hf, directory = tiny(family)
    expected = load_model(directory, dtype=torch.float32)
    hf.save_pretrained(tmp_path / "hf-sharded", max_shard_size="100KB")
    assert (tmp_path / "hf-sharded/model.safetensors.index.json").exists()
    single_bin = tmp_path / "bin"
    single_bin.mkdir()
    shutil.copy(directory / "config.json", single_bin)
    torch.save(hf.state_dict(), single_bin / "pytorch_model.bin")
    save_ours(tmp_path / "model.pth", open_checkpoint(directory))
    for form in ("hf-sharded", "bin", "model.pth"):
        assert same_model(load_model(tmp_path / form, dtype=torch.float32), expected), form
    assert same_model(load_model(shard(family, "bin"), dtype=torch.float32), expected)


def test_safetensors_are_preferred_to_bin(copy):
    directory = copy()
    (directory / "pytorch_model.bin").write_bytes(b"not read")
    load_model(directory)


def test_loaded_model_is_for_inference(tiny):
    model = load_model(tiny("llama")[1])
    assert not model.training
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad and not p.is_meta for p in model.parameters())


def test_tied_embeddings_are_one_tensor_on_disk_and_in_memory(copy, tmp_path):
    directory = copy("llama-tied")
    tensors = load_file(directory / "model.safetensors")
    assert "lm_head.weight" not in tensors
    expected = load_model(directory, dtype=torch.float32)
    assert expected.output.weight is expected.tok_embeddings.weight
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # some files store it nevertheless
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, directory / "model.safetensors")
    assert same_model(load_model(directory, dtype=torch.float32), expected)
    save_ours(tmp_path / "model.pth", open_checkpoint(directory))
    assert "output.weight" not in torch.load(tmp_path / "model.pth", weights_only=True)["model"]


def test_what_is_left_out_is_said(tiny, capsys):
    load_model(tiny("mistral3")[1])
    assert re.search("only its language model is used; left out: .*, ... and [0-9]+ more\n$", capsys.readouterr().err)


def test_an_output_projection_of_its_own_is_used_whatever_the_configuration_says(copy):
    """As in transformers."""
    directory = copy("llama-tied")
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, directory / "model.safetensors")
    model, hf = load_model(directory, dtype=torch.float32), AutoModelForCausalLM.from_pretrained(directory)
    assert not model.args.tie_embeddings
    idx = torch.arange(20)[None]
    torch.testing.assert_close(model(idx), hf(idx).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_converted_on_the_way(tiny, dtype):
    exact, rounded = (load_model(tiny("qwen2")[1], dtype=d) for d in (torch.float32, dtype))
    speed_up(exact.to(dtype), dtype)
    assert same_model(exact, rounded)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_load_onto_the_gpu(tiny):
    directory = tiny("llama-bias")[1]
    on_gpu, expected = (load_model(directory, device=d, dtype=torch.float16) for d in ("cuda", "cpu"))
    assert same_model(on_gpu.cpu(), expected)


# --- Meta's files ---------------------------------------------------------------------------------------------------

PARAMS = {
    "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5, "vocab_size": -1,
}  # fmt: skip
META_NAMES = {
    "model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.": "", "self_attn": "attention",
    "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
COLUMN_DIVIDED = ("wo.weight", "w2.weight")


def write_meta(hf, directory, n_shards, params=None, divide_vocabulary=False):
    """Write the model in Meta's format: rotary pairs interleaved, every matrix divided among `n_shards` files."""
    directory.mkdir(parents=True)
    shards = [{"rope.freqs": torch.ones(8)} for _ in range(n_shards)]
    for name, tensor in hf.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # halves -> pairs
            tensor = torch.cat([torch.stack(head.chunk(2), 1).flatten(0, 1) for head in tensor.split(16)])
        for theirs, metas in META_NAMES.items():
            name = name.replace(theirs, metas)
        dim = int(name.endswith(COLUMN_DIVIDED) or (name == "tok_embeddings.weight" and not divide_vocabulary))
        pieces = tensor.chunk(n_shards, dim) if tensor.ndim == 2 else [tensor] * n_shards
        for shard, piece in zip(shards, pieces, strict=True):
            shard[name] = piece.clone()
    for i, shard in enumerate(shards):
        torch.save(shard, directory / f"consolidated.{i:02}.pth")
    (directory / "params.json").write_text(json.dumps({**PARAMS, **(params or {})}))
    return directory


@pytest.mark.parametrize("divide_vocabulary", [False, True])
@pytest.mark.parametrize("n_shards", [1, 2])
def test_meta_checkpoint(tiny, tmp_path, n_shards, divide_vocabulary):
    hf, hf_directory = tiny("llama")
    directory = write_meta(hf, tmp_path / "meta", n_shards, divide_vocabulary=divide_vocabulary)
    ours = load_model(directory, dtype=torch.float32)
    expected = load_model(hf_directory, dtype=torch.float32)
    assert same_model(ours, expected)
    assert ours.args == dataclasses.replace(expected.args, context_length=4096)
    idx = torch.arange(40)[None]
    torch.testing.assert_close(ours(idx), hf(idx).logits, rtol=1e-4, atol=1e-4)


def test_meta_files_beside_a_config(tiny, copy):
    directory = copy()
    write_meta(tiny("llama")[0], directory / "original", 2)
    (directory / "model.safetensors").unlink()
    model = load_model(directory)
    assert same_model(model, load_model(tiny("llama")[1]))
    assert model.args.context_length == 128  # from config.json; params.json does not give it


def test_meta_params(tiny, tmp_path):
    hf = tiny("llama")[0]
    llama32 = write_meta(hf, tmp_path / "32", 1, {"rope_theta": 5e5, "use_scaled_rope": True})
    args = open_checkpoint(llama32).args
    assert (args.rope_scaling, args.context_length) == (RopeScaling(rope_factors("llama3", 32.0, 5e5, 16)), 131072)
    code = write_meta(hf, tmp_path / "code", 1, {"rope_theta": 1e6})
    assert (open_checkpoint(code).args.rope_theta, open_checkpoint(code).args.context_length) == (1e6, 16384)
    mixture = write_meta(hf, tmp_path / "moe", 1, {"moe": {"num_experts": 8}})
    with pytest.raises(ValueError, match=r"params.json: missing \[\], unsupported \['moe'\]"):
        open_checkpoint(mixture)


# --- damaged and unsupported files ----------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_listed_in_one_error(copy):
    directory = copy()
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(96, 32)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match="missing tensors") as raised:
        load_model(directory)
    assert str(raised.value) == (
        f"{directory}: missing tensors: model.layers.1.self_attn.k_proj.weight [32, 64], model.norm.weight [64]; "
        "unexpected tensors: model.layers.0.self_attn.q_proj.bias [64]; "
        "wrongly shaped tensors: model.layers.0.mlp.up_proj.weight is [96, 32], expected [96, 64]"
    )


def test_long_listings_are_cut(copy):
    directory = copy()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4, "vocab_size": 100}))
    with pytest.raises(ValueError, match=r"layers.2.mlp.gate_proj.weight \[96, 64\], .*, \.\.\. and 10 more; wrong"):
        load_model(directory)


def test_a_tensor_in_two_files_is_an_error(copy):
    directory = copy()
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    shutil.copy(directory / "a.safetensors", directory / "b.safetensors")
    with pytest.raises(ValueError, match="b.safetensors holds tensors that another file holds too: lm_head.weight, "):
        load_model(directory)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", None, "model has no config.json"),
        ("config.json", "{", "config.json: not JSON: "),
        ("config.json", "[1]", "config.json: it is .1.; expected an object"),
        ("model.safetensors.index.json", "\xff{", "index.json: not JSON: "),
        ("model.safetensors.index.json", "{}", "index.json: it has no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}', "index.json: weight_map.a is 1; expected a text"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../x"}}', "names '../x', which is outside"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "/etc/hosts"}}', "names '/etc/hosts', which is outside"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "gone"}}',
            "index.json names 'gone', which is not there",
        ),
        ("model-00002-of-00003.safetensors", None, "names 'model-00002-of-00003.safetensors', which is not there"),
        ("model-00002-of-00003.safetensors", "", "model-00002-of-00003.safetensors is empty: download it again"),
    ],
)
def test_damaged_directory(shard, file, text, message):
    directory = shard()
    if text is None:
        (directory / file).unlink()
    else:
        (directory / file).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        load_model(directory)


def test_a_directory_without_weights_is_an_error(copy):
    directory = copy()
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no \*.safetensors, no pytorch_model\*.bin and no consolidated"):
        load_model(directory)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
OLD = io.BytesIO()
torch.save({"a": torch.ones(2)}, OLD, _use_new_zipfile_serialization=False)
WRONG = {
    "lfs": (LFS, "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
    "html": (b"\n<!DOCTYPE html><html>", "is a web page, not the file itself: download it again"),
    "HTML": (b"<HTML><body>", "is a web page, not the file itself: download it again"),
    "old": (OLD.getvalue(), "is a pickle, as torch wrote before 1.6: save it again"),
    "pickle": (pickle.dumps({"a": 1}), "is a pickle, as torch wrote before 1.6: save it again"),
    "empty": (b"", "is empty: download it again"),
}


@pytest.mark.parametrize("name", ["model.pth", "model.gguf", "dir/pytorch_model.bin", "dir/model.safetensors"])
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_says_what_it_is(tiny, tmp_path, name, kind):
    (data, message), path, given = WRONG[kind], tmp_path / name, tmp_path / name.partition("/")[0]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    if given != path:
        shutil.copy(tiny("llama")[1] / "config.json", given)
    with pytest.raises(ValueError, match=re.escape(f"{path} {message}")):
        load_model(given)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_of_a_directory_is_refused(copy, name):
    directory = copy()
    (directory / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=f"{name} is part of a checkpoint: give its directory, {directory}"):
        load_model(directory / name)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "adapter_config.json, adapter_model.safetensors, a LoRA adapter: merge it into its base model",
        ),
        (["x.Q4_0.gguf"], "x.Q4_0.gguf, to be given by name"),
        (["model.pth", "model_int8.pth"], "model.pth, model_int8.pth, to be given by name"),
        (["model.safetensors.0a1b.incomplete"], "an interrupted download: run scripts/download.py again, it resumes"),
    ],
)
def test_a_directory_without_weights_says_what_it_holds(copy, names, message):
    directory = copy()
    (directory / "model.safetensors").unlink()
    for name in names:
        (directory / name).touch()
    with pytest.raises(ValueError, match=re.escape(f"no consolidated.*.pth, but {names[0]}")) as raised:
        load_model(directory)
    assert message in str(raised.value)


def test_an_adapter_beside_the_weights_is_not_the_model(shard):
    directory = shard(kind="bin")
    (directory / "pytorch_model.bin.index.json").unlink()
    expected = load_model(directory)
    save_file({"base_model.lora_A.weight": torch.ones(2)}, directory / "adapter_model.safetensors")
    assert same_model(load_model(directory), expected)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("kept", [5, 1000, -1])
def test_truncated_shard(shard, kind, kept):
    file = sorted(shard(kind=kind).glob(f"*1-of*.{kind}"))[0]
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{file.name}: not a whole"):
        load_model(file.parent)


def test_truncated_pth(tiny, tmp_path):
    path = tmp_path / "model.pth"
    save_ours(path, open_checkpoint(tiny("llama")[1]))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model.pth: not a whole torch file"):
        load_model(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "expected a dict of tensors"),
        ({"a": torch.ones(1)}, "not a checkpoint in this project's format 1"),
        ({"format": 2, "config": {}, "quantization": None, "model": {}}, "not a checkpoint in this project's format 1"),
        ({"format": 1, "config": {"dim": 3}, "quantization": None, "model": {}}, "it has no context_length"),
    ],
)
def test_pth_of_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model.pth")


def test_pth_that_runs_code_is_refused(tmp_path):
    torch.save({"format": 1, "config": Path("x"), "quantization": None, "model": {}}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="not a whole torch file: Weights only load failed"):
        load_model(tmp_path / "model.pth")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        load_model(tmp_path / "nowhere.pth")


def test_unknown_quantization_is_an_error(tiny, tmp_path):
    save_ours(tmp_path / "model.pth", open_checkpoint(tiny("llama")[1]), quantization={"mode": "int3"})
    with pytest.raises(ValueError, match="quantisation mode 'int3' is not supported; supported: int8, int4, int4-gptq"):
        load_model(tmp_path / "model.pth")


# --- saving ---------------------------------------------------------------------------------------------------------


def test_saved_file_is_an_ordinary_torch_file(tiny, tmp_path):
    checkpoint = open_checkpoint(tiny("llama-llama3")[1])
    paths = [tmp_path / "a.pth", tmp_path / "b.pth"]
    for path in paths:
        save_ours(path, checkpoint, torch.bfloat16)
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert len(digests) == 1
    assert files_in(tmp_path) == {"a.pth", "b.pth"}
    for mapped in (False, True):
        content = torch.load(paths[0], weights_only=True, mmap=mapped)
        assert content.keys() == {"format", "config", "quantization", "model"}
        assert (content["format"], content["quantization"]) == (1, None)
        assert make_args(content["config"]) == checkpoint.args
        for name, stored in checkpoint.tensors.items():
            assert torch.equal(content["model"][name], stored.load("cpu", torch.bfloat16))


def test_several_dtypes_and_shapes_can_be_saved(tiny, tmp_path):
    tensors = {
        "a": torch.arange(7, dtype=torch.uint8), "b": torch.randn(3, 5), "c": torch.tensor(2), "d": torch.ones(0, 4),
    }  # fmt: skip
    args, quantization = open_checkpoint(tiny("llama")[1]).args, {"mode": "int4", "groupsize": 32}
    entries = {name: (t.shape, t.dtype, lambda out, t=t: out.copy_(t)) for name, t in tensors.items()}
    save_checkpoint(tmp_path / "x.pth", args, entries, quantization)
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    assert content["quantization"] == quantization
    assert all(
        torch.equal(content["model"][name], t) and content["model"][name].dtype == t.dtype
        for name, t in tensors.items()
    )


def test_full_disk_keeps_the_old_file(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "model.pth").write_text("old")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'model.pth'}'"):
        save_ours(tmp_path / "model.pth", open_checkpoint(tiny("llama")[1]))
    assert files_in(tmp_path) == {"model.pth"}
    assert (tmp_path / "model.pth").read_text() == "old"


def test_saving_writes_through_links_and_never_over_a_pipe(tiny, tmp_path):
    checkpoint = open_checkpoint(tiny("llama")[1])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.pth").symlink_to("elsewhere/model.pth")
    for _ in range(2):  # there is no file at first
        save_ours(tmp_path / "link.pth", checkpoint)
        assert (tmp_path / "link.pth").is_symlink()
        assert files_in(tmp_path / "elsewhere") == {"model.pth"}
    assert same_model(load_model(tmp_path / "elsewhere/model.pth"), load_model(tiny("llama")[1]))
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(ValueError, match="pipe.pth: it is not a regular file"):
        save_ours(tmp_path / "pipe.pth", checkpoint)
    assert (tmp_path / "pipe.pth").is_fifo()
    with pytest.raises(FileNotFoundError, match="pipe.pth: not a file"):
        load_model(tmp_path / "pipe.pth")


def test_a_system_without_fallocate_can_save(tiny, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    save_ours(tmp_path / "model.pth", open_checkpoint(tiny("llama")[1]))
    assert same_model(load_model(tmp_path / "model.pth"), load_model(tiny("llama")[1]))


# --- the scripts ----------------------------------------------------------------------------------------------------


def run(*command, **kwargs):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **kwargs)


def convert(directory, *flags, **kwargs):
    return run(sys.executable, "scripts/convert_hf_checkpoint.py", "--checkpoint_dir", str(directory), *flags, **kwargs)


def test_convert(shard):
    directory = shard("qwen3")
    done = convert(directory, "--dtype", "float16")
    target, expected = directory / "model.pth", load_model(directory, dtype=torch.float16)
    assert done.returncode == 0, done.stderr
    wrote, following = done.stdout.splitlines()
    assert wrote.startswith(f"wrote {target}: {sum(p.numel() for p in expected.parameters()):,} parameters, 0.000 GB")
    assert following == f"next: python generate.py --checkpoint_path {target}"
    assert "100%" in done.stderr
    assert same_model(load_model(target, dtype=torch.float16), expected)
    assert {t.dtype for t in torch.load(target, weights_only=True)["model"].values()} == {torch.float16}


def test_convert_says_what_is_wrong_in_one_line(copy):
    directory = copy()
    (directory / "config.json").unlink()
    done = convert(directory)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {directory} has no config.json\n"


def test_convert_that_may_not_write_so_much(copy):
    directory = copy()
    before = files_in(directory)
    done = convert(directory, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: [Errno 27] File too large: '{directory / 'model.pth'}'"
    assert "Traceback" not in done.stderr
    assert files_in(directory) == before


def test_interrupted_convert_keeps_the_old_file(copy, monkeypatch, capsys):
    directory = copy()
    (directory / "model.pth").write_text("old")
    before = files_in(directory)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = importlib.import_module("convert_hf_checkpoint")
    monkeypatch.setattr(script.tqdm, "update", lambda *_: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(sys, "argv", ["convert_hf_checkpoint.py", "--checkpoint_dir", str(directory)])
    assert script.main() == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped; nothing was written"
    assert files_in(directory) == before
    assert (directory / "model.pth").read_text() == "old"


def test_prepare_downloads_then_converts(tmp_path):
    calls, python = tmp_path / "calls", tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {calls}\ncase "$*" in *bad/model*) exit 2;; esac\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python)}
    assert run("scripts/prepare.sh", "some/model", "bad/model", "other/model", env=environment).returncode == 2
    assert calls.read_text().splitlines() == [
        "scripts/download.py some/model --checkpoint_dir checkpoints",
        "scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/some/model",
        "scripts/download.py bad/model --checkpoint_dir checkpoints",
    ]
    usage = run("scripts/prepare.sh")
    assert (usage.returncode, usage.stderr) == (2, "usage: scripts/prepare.sh REPO [REPO ...]\n")


# --- memory ---------------------------------------------------------------------------------------------------------

WATCH = f"""
import sys
{GROWTH}
from fast.checkpoint import load_model
from kernels.cpu import build
build.load()
sys.path.insert(0, "scripts")
from convert_hf_checkpoint import convert

path = Path(sys.argv[1])
print("grew", growth(lambda: convert(path, torch.float16)))
print("grew", growth(lambda: load_model(path / "model.pth", dtype=torch.float16)))
print("grew", growth(lambda: load_model(path, dtype=torch.float16)))
convert(path, torch.bfloat16)
print("grew", growth(lambda: load_model(path / "model.pth")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_anonymous_memory_is_bounded(tmp_path):
    """A model of 240 MB in float16, in 4 shards: the largest tensor has 16 MB, `wqkv` and `w13` together 150 MB."""
    dim, hidden, n_layers, vocab = 1024, 3072, 8, 8192
    sizes = {"hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": n_layers, "vocab_size": vocab}
    config = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 8, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shards = [{} for _ in range(4)]
    for layer in range(n_layers):
        shard, name = shards[layer // 2], f"model.layers.{layer}."
        shard |= {f"{name}self_attn.{x}_proj.weight": torch.ones(dim, dim).half() for x in "qkvo"}
        shard |= {f"{name}mlp.{x}_proj.weight": torch.ones(hidden, dim).half() for x in ("gate", "up")}
        shard[f"{name}mlp.down_proj.weight"] = torch.ones(dim, hidden).half()
        shard |= {f"{name}{x}_layernorm.weight": torch.ones(dim).half() for x in ("input", "post_attention")}
    shards[0] |= {f"{name}.weight": torch.ones(vocab, dim).half() for name in ("model.embed_tokens", "lm_head")}
    shards[3]["model.norm.weight"] = torch.ones(dim).half()
    for i, shard in enumerate(shards):
        save_file(shard, tmp_path / f"model-{i}.safetensors")
    del shards, shard
    done = run(sys.executable, "-c", WATCH, str(tmp_path))
    assert done.returncode == 0, done.stderr
    converted, mapped, stacked, packed = (
        int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("grew")
    )
    assert (tmp_path / "model.pth").stat().st_size > 230e6
    assert converted < 40  # far less than a copy of the model
    assert mapped < 20  # the weights are mapped pages of the file
    assert stacked < 190  # stacking copies `wqkv` and `w13`; the rest is mapped
    assert packed < 290  # a single copy: the packed weights
