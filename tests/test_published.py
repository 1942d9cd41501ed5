"""Checkpoints that others quantised: what is loaded are the weights that the files mean, whatever computes with them.

    python -m pytest tests/test_published.py

GPTQ's and AWQ's files are written here, by the formulas in their authors' papers and packages; compressed-tensors
writes, and reads, its own.
"""

import copy
import json
import re
import shutil
import zlib
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
from conftest import GREEDY, make_tiny, prompt_of, relative_error, tokens_of
from safetensors.torch import load_file, save_file
from test_tp import in_threads
from torch import Tensor
from transformers import AutoModelForCausalLM

import eval as eval_script
import generate
import quantize
from fast.checkpoint import load_model, open_checkpoint
from fast.cli import DEMO
from fast.decoding import build_steps
from fast.layers import FastLinear, kernels_missing
from fast.published import check
from scripts.convert_hf_checkpoint import convert

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
needs_compressed_tensors = pytest.mark.skipif(
    find_spec("compressed_tensors") is None, reason="needs the package compressed-tensors"
)
IDS = torch.randint(128, (2, 12), generator=torch.Generator().manual_seed(5))


def pack(q: Tensor, bits: int, dim: int, order: list[int] | None = None) -> Tensor:
    """Integers packed into int32 words along `dim`, the lowest bits first, in this `order`."""
    each = 32 // bits
    fields = q.movedim(dim, -1).to(torch.int64).unflatten(-1, (-1, each))[..., order or list(range(each))]
    words = (fields << (bits * torch.arange(each))).sum(-1)
    return (words - (words >= 2**31) * 2**32).to(torch.int32).movedim(-1, dim).contiguous()


@dataclass
class Groups:
    """Integers q `[N, K]` from 0 on, scales `[N, K / G]`, zeros z of the same shape, the group of each input."""

    q: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor

    def values(self) -> Tensor:
        return (self.q - self.zeros[:, self.g_idx]) * self.scales.float()[:, self.g_idx]


def rounded(weight: Tensor, bits: int, groupsize: int, symmetric: bool, dtype: torch.dtype, g_idx: Tensor) -> Groups:
    n_groups = int(g_idx.max()) + 1
    scales, zeros = (torch.empty(len(weight), n_groups) for _ in range(2))
    for g in range(n_groups):
        low, high = weight[:, g_idx == g].aminmax(dim=1)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scales[:, g] = 2 * torch.maximum(-low, high) / (2**bits - 1) if symmetric else (high - low) / (2**bits - 1)
        zeros[:, g] = 2 ** (bits - 1) if symmetric else (-low / scales[:, g]).round()
    scales = scales.to(dtype)
    q = (weight / scales.float()[:, g_idx] + zeros[:, g_idx]).round().clamp(0, 2**bits - 1)
    return Groups(q.long(), scales, zeros.long(), g_idx)


def as_gptq(groups: Groups, bits: int, first_version: bool) -> dict[str, Tensor]:
    qzeros = pack(groups.zeros.T, bits, 1)
    if first_version:
        qzeros -= 0x11111111 if bits == 4 else 0x01010101
    g_idx = groups.g_idx.to(torch.int32)
    return {"qweight": pack(groups.q.T, bits, 0), "qzeros": qzeros, "scales": groups.scales.T, "g_idx": g_idx}


def as_awq(groups: Groups) -> dict[str, Tensor]:
    q, zeros = (pack(x.T, 4, 1, AWQ_ORDER) for x in (groups.q, groups.zeros))
    return {"qweight": q, "qzeros": zeros, "scales": groups.scales.T}


def as_compressed_tensors(groups: Groups, bits: int, symmetric: bool) -> dict[str, Tensor]:
    """As the package itself writes it."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    middle, K = 2 ** (bits - 1), groups.q.shape[1]
    size = K // groups.scales.shape[1]
    strategy = {"strategy": "channel"} if size == K else {"strategy": "group", "group_size": size}
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **strategy)
    given = {"weight": groups.values(), "weight_scale": groups.scales, "weight_zero_point": groups.zeros - middle}
    given["weight_zero_point"] = given["weight_zero_point"].to(torch.int8)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    if (groups.g_idx.diff() < 0).any():  # which the package has given up
        packed = {"weight_packed": pack(groups.q, bits, 1), "weight_zero_point": pack(groups.zeros, bits, 0)}
        shape = {"weight_shape": torch.tensor(groups.q.shape), "weight_g_idx": groups.g_idx.int()}
        return {**packed, **shape, "weight_scale": groups.scales}
    made = PackedQuantizationCompressor.compress(given, scheme)
    exact = PackedQuantizationCompressor.decompress({**made, "weight_scale": groups.scales.float()}, scheme)["weight"]
    assert torch.allclose(exact, groups.values())
    return made


def compressed(bits: int, symmetric: bool = True) -> dict:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    given = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    return {**given, "bits": bits, "ignore": ["lm_head"], "quantization_status": "compressed"}


CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq", "sym": True, "desc_act": False},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
    "gptq-8": {"quant_method": "gptq", "bits": 8},
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True},
    "compressed-4": compressed(4),
    "compressed-8": compressed(8),
}


def stored_in(path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


@pytest.fixture
def published(tmp_path):
    """`published(format, ...)`: a tiny model whose weights are the dequantised ones, and the directory it is stored in.

    orders: for the inputs of a module, by the last part of its name, their groups are mixed. skip: parts of names that
    are not quantised.
    """

    def make(
        form: str, family: str = "llama", groupsize: int = 32, symmetric: bool = False, orders: tuple[str, ...] = (),
        dtype: torch.dtype = torch.float16, skip: tuple[str, ...] = ("lm_head",), **sizes,
    ):  # fmt: skip
        bits, generator = CONFIGS[form]["bits"], torch.Generator()
        make_tiny(family, intermediate_size=128, **sizes).save_pretrained(tmp_path / "exact")
        stored = {name: t if "norm" in name else t.half() for name, t in stored_in(tmp_path / "exact").items()}
        exact = {name: t.float() for name, t in stored.items()}
        for name, weight in exact.items():
            module, last = name.rpartition(".")[0], name.split(".")[-2]
            if weight.dim() < 2 or "embed" in name or any(part in name for part in skip):
                continue
            K = weight.shape[1]
            size = K if groupsize == -1 else groupsize
            g_idx = torch.arange(K) // size
            if last in orders:  # what has the same inputs has the same order
                seed = zlib.crc32(re.sub("[qkv]_proj|gate_proj|up_proj|w[13]", "in", name).encode())
                g_idx = g_idx[torch.randperm(K, generator=generator.manual_seed(seed))]
            groups = rounded(weight, bits, size, symmetric, dtype, g_idx)
            exact[name] = groups.values()
            del stored[name]
            if form == "awq":
                made = as_awq(groups)
            elif form.startswith("gptq"):
                made = as_gptq(groups, bits, form != "gptq_v2")
            else:
                made = as_compressed_tensors(groups, bits, symmetric)
            stored |= {f"{module}.{kind}": tensor.contiguous() for kind, tensor in made.items()}
        save_file(exact, tmp_path / "exact" / "model.safetensors", {"format": "pt"})
        save_file({name: t.clone() for name, t in stored.items()}, tmp_path / "model.safetensors", {"format": "pt"})
        config = json.loads((tmp_path / "exact" / "config.json").read_text())
        given = compressed(bits, symmetric) if "compressed" in form else {**CONFIGS[form], "group_size": groupsize}
        config["quantization_config"] = given
        (tmp_path / "config.json").write_text(json.dumps(config))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "exact", dtype=torch.float32)
        return model.requires_grad_(False), tmp_path

    return make


def are_equal(model, path) -> bool:
    """Whether what is loaded in float32 computes the logits of `model`."""
    exact = model(IDS).logits
    return relative_error(load_model(path, dtype=torch.float32)(IDS), exact) < 1e-5


@pytest.mark.parametrize("form", CONFIGS)
@pytest.mark.parametrize("groupsize", [16, 32, 64, -1])
@pytest.mark.parametrize("symmetric", [False, True])
@needs_compressed_tensors
def test_weights_are_those_that_the_file_means(published, form, groupsize, symmetric):
    model, path = published(form, groupsize=groupsize, symmetric=symmetric)
    assert are_equal(model, path)
    scheme = open_checkpoint(path).quantization
    expected = {"mode": CONFIGS[form]["quant_method"], "bits": CONFIGS[form]["bits"], "scales": "float16"}
    expected |= {"groupsize": 64 if groupsize == -1 else groupsize, "zeros": "steps", "skip": ["output"]}
    if groupsize == -1:  # of w2's 128 inputs
        w2 = {key: expected[key] for key in ("bits", "scales", "zeros")} | {"groupsize": 128}
        expected["others"] = {f"layers.{i}.feed_forward.w2": w2 for i in range(2)}
    assert scheme == expected


ORDERED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("form", "family"),
    [("gptq", "llama"), ("gptq", "qwen2"), ("gptq-8", "ernie"), ("gptq", "gemma3"), ("compressed-4", "llama")],
)
@needs_compressed_tensors
def test_inputs_in_the_order_of_their_groups(published, form, family):
    model, path = published(form, family, orders=ORDERED)
    assert are_equal(model, path)
    assert open_checkpoint(path).quantization["ordered"] == ["wqkv", "wo", "w13"]  # w2's is that of w13's rows


@pytest.mark.parametrize("family", ["phi3", "mixtral"])
def test_stacked_projections_and_experts(published, capsys, family):
    """Experts' inputs are in orders of their own, so one stacked Linear cannot hold those of w13."""
    orders = ORDERED if family == "mixtral" else ("down_proj", "o_proj")
    model, path = published(
        "gptq", family, orders=(*orders, "w1", "w2", "w3"), skip=("lm_head", "moe.gate."), groupsize=16
    )
    assert are_equal(model, path)
    said = capsys.readouterr().err
    assert ("dequantised: 2 of 9 Linears (layers.0.feed_forward.experts.w13, " in said) == (family == "mixtral")


@pytest.mark.parametrize("skip", ["q_proj", "v_proj", "gate_proj", "self_attn", "layers.0", "layers"])
def test_what_is_not_quantised_stays_so(published, capsys, skip):
    """A projection of a stacked Linear alone cannot: the others are dequantised, which is said."""
    model, path = published("gptq", skip=("lm_head", skip), orders=("down_proj",))
    assert are_equal(model, path)
    assert ("dequantised: 2 of 9" in capsys.readouterr().err) == ("_proj" in skip)
    scheme = open_checkpoint(path).quantization
    skipped = {"self_attn": ["wqkv", "wo", "output"], "gate_proj": ["w13", "output"]}.get(skip, ["wqkv", "output"])
    assert scheme is None if skip == "layers" else skip == "layers.0" or scheme["skip"] == skipped


@pytest.mark.skipif(kernels_missing("cpu", torch.bfloat16) is not None, reason="needs the CPU's kernels")
@pytest.mark.parametrize("form", ["gptq", "gptq-8", "awq"])
def test_kernels_multiply_by_them(published, form):
    model, path = published(form, orders=ORDERED if form == "gptq" else ())
    loaded = load_model(path)
    assert type(loaded.layers[0].attention.wo) is FastLinear
    assert (loaded.layers[0].attention.wo.order is not None) == (form == "gptq")
    exact = model(IDS).logits
    plain = relative_error(copy.deepcopy(model).bfloat16()(IDS).logits, exact)
    assert relative_error(loaded(IDS), exact) < 1.5 * plain
    loaded.setup_caches(1, 64)
    eager, compiled = (tokens_of(build_steps(loaded, GREEDY, c), [prompt_of(9)], 12) for c in (False, True))
    assert eager == compiled


def test_converted_it_is_the_same(published, capsys):
    model, path = published("gptq", orders=ORDERED, groupsize=-1)
    converted = convert(path, torch.float32)
    assert capsys.readouterr().out.endswith(", gptq\n")
    assert open_checkpoint(converted).quantization == open_checkpoint(path).quantization
    states = load_model(path, dtype=torch.float32).state_dict(), load_model(converted, dtype=torch.float32).state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(states[1][name].equal(tensor) for name, tensor in states[0].items())
    assert quantize.main(["--checkpoint_path", str(converted)]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {converted} is quantised already (gptq): give the unquantised checkpoint\n"


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_share_it(published, monkeypatch, n_ranks):
    model, path = published("gptq", groupsize=16, orders=ORDERED, num_key_value_heads=4)
    for logits in in_threads(n_ranks, monkeypatch, lambda ranks: load_model(path, "cpu", torch.float32, ranks)(IDS)):
        assert relative_error(logits, model(IDS).logits) < 1e-5


@needs_compressed_tensors
def test_zero_points_that_are_not_packed(published):
    """As files of before 2025 have them."""
    model, path = published("compressed-4")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    tensors = stored_in(path)
    for name in [name for name in tensors if name.endswith("zero_point")]:
        shape = tensors[name.replace("zero_point", "scale")].shape
        tensors[name] = unpack_from_int32(tensors[name], 4, shape, packed_dim=0).contiguous()
    save_file(tensors, path / "model.safetensors")
    assert are_equal(model, path)


def test_biases_that_are_zero_are_left_out(published):
    model, path = published("gptq")
    tensors = stored_in(path) | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    save_file(tensors, path / "model.safetensors")
    assert are_equal(model, path)
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected tensors: model.layers.0.self_attn.q_proj.bias \[64\]$"):
        open_checkpoint(path)


def test_scales_in_float32_are_not_rounded(published, capsys):
    model, path = published("gptq", dtype=torch.float32, orders=ORDERED)
    assert are_equal(model, path)
    assert "dequantised: 8 of 9 Linears (layers.0.attention.wqkv, layers.0.attention.wo, " in (
        said := capsys.readouterr().err
    )
    assert "as no Linear here holds scales float32" in said


def change(path, **settings) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **settings}))


def test_older_directories_say_it_in_a_file_of_its_own(published):
    model, path = published("gptq")
    change(path, quantization_config=None)
    with pytest.raises(ValueError, match="its weights are quantised, but config.json has no quantization_config"):
        open_checkpoint(path)
    (path / "quantize_config.json").write_text('{"bits": 4, "group_size": 32, "desc_act": false}')
    assert are_equal(model, path)


MISFIT = "model.layers.1.mlp.up_proj: its tensors do not fit each other and the configuration: "
DAMAGES = [
    ("gptq", "qzeros", None, "missing tensors: model.layers.1.mlp.up_proj.qzeros"),
    ("gptq", "qweight", None, "missing tensors: model.layers.1.mlp.up_proj.qweight"),
    ("gptq", "weight", torch.zeros(128, 64), "model.layers.1.mlp.up_proj has both a weight and a qweight"),
    ("gptq", "scales", torch.zeros(3, 128).half(), MISFIT + "qweight int32 [8, 128], scales float16 [3, 128], qzeros"),
    ("gptq", "scales", torch.tensor(1.0), MISFIT),
    ("gptq", "scales", torch.ones(2, 128).int(), MISFIT),
    ("gptq", "qzeros", torch.zeros(1, 2).int(), MISFIT),
    ("gptq", "qzeros", torch.zeros(2, 16), MISFIT),
    ("gptq", "qweight", torch.zeros(8, 128), MISFIT),
    ("gptq", "qweight", torch.zeros(8).int(), MISFIT),
    ("gptq", "qweight", torch.zeros(16, 128).int(), MISFIT),
    ("gptq", "g_idx", torch.zeros(64).int(), MISFIT),
    ("awq", "qzeros", torch.zeros(2, 15).int(), MISFIT),
    ("compressed-4", "weight_zero_point", None, "missing tensors: model.layers.1.mlp.up_proj.weight_zero_point"),
    ("compressed-4", "weight_zero_point", torch.zeros(128, 2).int(), MISFIT),
    ("compressed-4", "weight_zero_point", torch.zeros(16, 2), MISFIT),
    ("compressed-4", "weight_packed", torch.zeros(1, 8).int(), MISFIT),
    ("compressed-4", "weight_shape", torch.tensor([128.0, 64.0]), MISFIT),
    ("compressed-4", "weight_shape", torch.tensor([128, 0]), MISFIT),
]


@pytest.mark.parametrize(("form", "tensor", "value", "message"), DAMAGES)
@needs_compressed_tensors
def test_damaged_tensors_are_named(published, form, tensor, value, message):
    _, path = published(form)
    tensors = stored_in(path) | {f"model.layers.1.mlp.up_proj.{tensor}": value}
    save_file({name: t for name, t in tensors.items() if t is not None}, path / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value)


GROUP = CONFIGS["compressed-4"]["config_groups"]["group_0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "weights quantised by 'bitsandbytes' are not supported; supported: GPTQ",
        ),
        ({"quant_method": "gptq", "bits": 3}, "gptq with bits 3 is not supported"),
        ({"quant_method": "gptq", "bits": 4.0}, "gptq with bits 4.0 is not supported"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:x": {}}}, "gptq with dynamic {'-:x': {}} is not supported"),
        ({**CONFIGS["compressed-4"], "config_groups": {}}, "config_groups has {}; expected an object with weights"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "gptq with checkpoint_format 'marlin' is"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq with version 'gemv' is not supported"),
        ({"quant_method": ["awq"]}, "weights quantised by ['awq'] are not supported"),
        ({**CONFIGS["compressed-4"], "format": "int-quantized"}, "compressed-tensors with format 'int-quantized' is"),
        ({**CONFIGS["compressed-4"], "format": "float-quantized"}, "compressed-tensors with num_bits 4 is not"),
        (
            {"quant_method": "fp8", "weight_block_size": [128]},
            "weight_block_size is [128]; expected two sizes",
        ),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8 with fmt 'e5m2' is not supported"),
        ({**CONFIGS["compressed-4"], "config_groups": {"W4A16": ["Linear"]}}, "config_groups has ['Linear']; expected"),
        ({**CONFIGS["compressed-4"], "config_groups": None}, "config_groups has None; expected an object"),
        (
            {"config_groups": {"a": {**GROUP, "input_activations": {"num_bits": 8}}}},
            "with input_activations {'num",
        ),
    ],
)
def test_what_is_not_supported_is_said(changes, message):
    config = changes if "quant_method" in changes else {**CONFIGS["compressed-4"], **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        check({"quantization_config": config})


FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}


@pytest.mark.parametrize(
    ("block", "given"),
    [
        ((64, 32), {"quant_method": "fp8", "weight_block_size": [64, 32], "activation_scheme": "dynamic"}),
        ((96, 40), {"quant_method": "fp8", "weight_block_size": [96, 40], "fmt": "e4m3"}),
        ((64, 64), {"strategy": "block", "block_structure": "64x64"}),
        ((1, None), {"strategy": "channel"}),
        ((None, None), {"strategy": "tensor"}),
    ],
)
@needs_compressed_tensors
def test_fp8_stays_fp8(published, monkeypatch, capsys, block, given):
    """Whether activations are quantised, too, does not matter."""
    from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    _, path = published("gptq")
    exact, stored = {}, {}
    for name, weight in stored_in(path / "exact").items():
        exact[name] = stored[name] = weight
        if "_proj" not in name:
            continue
        (N, K), sizes = weight.shape, (block[0] or weight.shape[0], block[1] or weight.shape[1])
        at = (torch.arange(N) // sizes[0])[:, None], torch.arange(K) // sizes[1]
        scales = torch.zeros(int(at[0].max()) + 1, int(at[1].max()) + 1)
        scales = scales.index_put(at, weight.abs() / 448, accumulate=True).bfloat16()  # any that are large enough
        stored[name] = (weight / scales.float()[at]).to(torch.float8_e4m3fn)
        exact[name] = stored[name].float() * scales.float()[at]
        kind = "scale_inv" if "quant_method" in given else "scale"
        stored[f"{name}_{kind}"] = scales if block[0] else scales.flatten()
        stored[name.replace("weight", "input_scale")] = torch.ones(1)
        if given.get("strategy") == "channel":
            scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**FLOAT, **given))
            tensors = {"weight": stored[name], "weight_scale": scales}
            theirs = FloatQuantizationCompressor.decompress(tensors, scheme)["weight"]
            assert relative_error(theirs, exact[name]) < 0.005
    if "quant_method" not in given:
        group = {"weights": {**FLOAT, **given}, "input_activations": {"num_bits": 8, "dynamic": True}}
        given = {**CONFIGS["compressed-4"], "format": "float-quantized", "config_groups": {"group_0": group}}
    save_file(stored, path / "model.safetensors")
    save_file(exact, path / "exact" / "model.safetensors", {"format": "pt"})
    change(path, quantization_config=given)
    model = AutoModelForCausalLM.from_pretrained(path / "exact", dtype=torch.float32).requires_grad_(False)
    assert are_equal(model, path)
    scheme, said = open_checkpoint(path).quantization, capsys.readouterr().err
    if block[1] == 40:  # no multiple of 16 inputs shares a scale
        assert scheme is None
        assert "dequantised: 8 of 9 Linears" in said
        assert "as no Linear here holds groupsize 8" in said
    else:
        assert (scheme["mode"], scheme["bits"], scheme["groupsize"]) == (given["quant_method"], "fp8", block[1] or 64)
        assert "dequantised" not in said
        converted = load_model(convert(path, torch.float32), dtype=torch.float32).state_dict()
        for key, tensor in load_model(path, dtype=torch.float32).state_dict().items():
            assert (converted[key].dtype, converted[key].float().equal(tensor.float())) == (tensor.dtype, True)
        if kernels_missing("cpu", torch.bfloat16) is None:
            assert type((loaded := load_model(path)).layers[0].attention.wo) is FastLinear
            plain, exact = copy.deepcopy(model).bfloat16()(IDS).logits, model(IDS).logits
            assert relative_error(loaded(IDS), exact) < 1.5 * relative_error(plain, exact)
    if block[1] == 32:
        for logits in in_threads(2, monkeypatch, lambda ranks: load_model(path, "cpu", torch.float32, ranks)(IDS)):
            assert relative_error(logits, model(IDS).logits) < 1e-5
    name = "model.layers.0.mlp.up_proj"
    save_file({**stored, f"{name}.weight_scale": torch.ones(3)}, path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name}: its scales|missing tensors: {name}.weight_scale"):
        open_checkpoint(path)


@needs_compressed_tensors
def test_transformers_reads_the_same(published):
    """It dequantises compressed-tensors' files with that package; for GPTQ and AWQ it has none on a CPU."""
    model, path = published("compressed-4", dtype=torch.bfloat16, symmetric=True)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)  # it rounds the weights to bfloat16
    assert relative_error(theirs(IDS).logits, model(IDS).logits) < 0.01
    assert are_equal(model, path)


def test_the_demo_as_gptq_answers_and_is_scored(tmp_path, capfd):
    """Through the command lines: the directory itself and what it is converted to give the same figures."""
    tensors = load_file(DEMO / "model.safetensors")
    for name, weight in list(tensors.items()):
        if "layers" in name and weight.dim() == 2:
            g_idx = torch.arange(weight.shape[1]) // 32
            groups = rounded(weight.float(), 4, 32, False, torch.float16, g_idx)
            del tensors[name]
            made = as_gptq(groups, 4, first_version=True)
            tensors |= {f"{name.removesuffix('.weight')}.{kind}": t.contiguous() for kind, t in made.items()}
    shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.pth", "*.safetensors"))
    save_file(tensors, tmp_path / "model.safetensors")
    change(tmp_path, quantization_config=CONFIGS["gptq"])
    converted, text, found = convert(tmp_path, torch.bfloat16), tmp_path / "text", {}
    text.write_text((DEMO.parent / "heldout.txt").read_text(encoding="utf-8")[:20000])
    for path in (tmp_path, converted, DEMO):
        assert eval_script.main(["--checkpoint_path", str(path), "--perplexity", str(text)]) == 0
        perplexity = float(re.search(r"perplexity (\S+) per token", capfd.readouterr().out)[1])
        sampling = ["--prompt", "She could not", "--temperature", "0", "--max_new_tokens", "20"]
        assert generate.main(["--checkpoint_path", str(path), *sampling]) == 0
        found[path] = perplexity, capfd.readouterr().out.partition("She could not")[2].partition("first token")[0]
    assert found[tmp_path] == found[converted]
    assert found[tmp_path][0] == pytest.approx(found[DEMO][0], rel=0.02)
    assert found[tmp_path][0] != found[DEMO][0]
