"""layers.py: the fast layers against model.py's, bit for bit without kernels; layers without a kernel run as well.

python -m pytest tests/test_layers.py
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import normal, relative_error
from torch import nn

from fast import layers
from fast.checkpoint import load_model, open_checkpoint
from fast.layers import FastBlock, FastKVCache, FastLinear, backend_for, fast_linear, in_one_region
from fast.quantized import LINEARS, GroupedLinear, Int8Linear, QuantizedKVCache, QuantizedLinear
from kernels import Product, cpu
from model import ACTIVATIONS, Linear, Router, Transformer, TransformerBlock, gated
from quantize import quantize

TEXTBOOKS = ["llama-bias", "mistral-window", "qwen3", "gemma3", "qwen3-moe-mixed"]
MODES = {"float": None, "int8": {"mode": "int8"}, "int4": {"mode": "int4", "groupsize": 32}}
has_kernels = pytest.mark.skipif(cpu.missing("cpu", torch.bfloat16) is not None, reason="needs the CPU's kernels")


@pytest.fixture(scope="module")
def stored(tiny, tmp_path_factory):
    """`stored(family, mode)`: the path of a model of that family in that mode."""
    made = {}

    def make(family: str, mode: str):
        if MODES[mode] is None:
            return tiny(family)[1]
        if (family, mode) not in made:
            made[family, mode] = tmp_path_factory.mktemp(family) / "model.pth"
            quantize(open_checkpoint(tiny(family)[1]), MODES[mode], made[family, mode], "cpu")
        return made[family, mode]

    return make


def textbook(monkeypatch, path, dtype: torch.dtype) -> Transformer:
    with monkeypatch.context() as patch:
        patch.setattr("fast.checkpoint.speed_up", lambda model, dtype: None)
        model = load_model(path, dtype=dtype)
    model.new_cache = QuantizedKVCache
    return model


def logits(model: Transformer, kv_dtype: torch.dtype | None) -> list[torch.Tensor]:
    """Logits without a cache, of a prefill, and in rows of different lengths of one position and of five."""
    model.setup_caches(2, 48, kv_dtype=kv_dtype)
    idx, ends = torch.arange(60).view(2, 30), torch.tensor([[20], [11]])
    found = [model(idx), model(idx[:, :20], torch.arange(20))]
    found += [model(idx[:, i : i + 1], ends + i, model.slots[:32]) for i in range(3)]
    return [*found, model(idx[:, :5], ends + 3 + torch.arange(5), model.slots[:40])]


@pytest.mark.parametrize("kv_dtype", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", TEXTBOOKS)
def test_without_kernels_the_layers_compute_the_textbooks_bits(stored, monkeypatch, family, mode, dtype, kv_dtype):
    exact = textbook(monkeypatch, stored(family, mode), dtype)
    assert all(type(block) is TransformerBlock for block in exact.layers)
    monkeypatch.setattr(layers, "kernels_missing", lambda device, dtype: "none here")
    model = load_model(stored(family, mode), dtype=dtype)
    assert all(type(block) is FastBlock for block in model.layers)
    for ours, theirs in zip(logits(model, kv_dtype), logits(exact, kv_dtype), strict=True):
        assert ours.equal(theirs)


@has_kernels
@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", [*TEXTBOOKS, "llama-tied", "mixtral"])
def test_with_kernels_they_compute_the_same_but_for_rounding(stored, monkeypatch, family, mode, kv_dtype):
    exact = textbook(monkeypatch, stored(family, mode), torch.float32)
    model = load_model(stored(family, mode), dtype=torch.bfloat16)
    assert not [module for module in model.modules() if isinstance(module, (nn.Linear, QuantizedLinear, Router))]
    for ours, theirs in zip(logits(model, kv_dtype), logits(exact, kv_dtype), strict=True):
        errors = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
        # Where two experts are almost equally probable, bfloat16 may choose the other one.
        assert 0 < (errors.median() if model.args.n_experts else relative_error(ours, theirs)) < 0.06


@has_kernels
def test_an_activation_that_no_kernel_knows_runs_without_one(tiny, monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "tanh", torch.tanh)
    exact = textbook(monkeypatch, tiny("llama")[1], torch.float32)
    model = load_model(tiny("llama")[1], dtype=torch.bfloat16)
    silu = logits(model, None)
    for layer in [*model.layers, *exact.layers]:
        layer.feed_forward.activation = "tanh"
    for ours, theirs, other in zip(logits(model, None), logits(exact, None), silu, strict=True):
        assert relative_error(ours, theirs) < 0.06
        assert relative_error(other, theirs) > 0.2


@has_kernels
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", [{}, {"groupsize": 32}, {"groupsize": 64}])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_packed_for_this_device_it_gives_the_same_product(bias, scheme, rows):
    weight, b = normal(40, 192, seed=1), normal(40, seed=2).bfloat16() if bias else None
    x = normal(rows, 1, 192, seed=3).bfloat16()
    module = (GroupedLinear if scheme else Int8Linear).from_float(weight, b, **scheme)
    expected = nn.functional.linear(x.float(), module.dequantize(torch.float32), None if b is None else b.float())
    fast = fast_linear(module, backend_for("cpu", torch.bfloat16))
    assert isinstance(fast, FastLinear)
    assert fast(x).dtype == torch.bfloat16
    assert relative_error(fast(x).float(), expected) < 0.006


@has_kernels
@pytest.mark.parametrize("groupsize", [24, 512, 96])
def test_groups_that_no_kernel_takes_run_without_one(groupsize):
    module, x = GroupedLinear.from_float(normal(8, 1536), groupsize=groupsize), normal(2, 1536, seed=1).bfloat16()
    fast = fast_linear(module, backend_for("cpu", torch.bfloat16))
    assert fast is module
    assert relative_error(fast(x), x.float() @ module.dequantize(torch.float32).T) < 0.01


class TernaryLinear(QuantizedLinear):
    """An invented quantisation: weights of -1, 0 and 1, a scale for each output."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(out_features, dtype=torch.float32))

    @classmethod
    def from_float(cls, weight, bias=None, **scheme) -> "TernaryLinear":
        module = cls(weight.shape[1], weight.shape[0])
        module.scales = weight.float().abs().mean(1)
        module.weight = (weight.float() / module.scales[:, None]).round().clamp(-1, 1).to(torch.int8)
        module.bias = bias if bias is None else nn.Parameter(bias, requires_grad=False)
        return module

    def dequantize(self, dtype: torch.dtype, rows: torch.Tensor | None = None) -> torch.Tensor:
        weight, scales = self.stored(rows)
        return (weight * scales[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantisation_that_has_no_kernel_runs(tiny, tmp_path, monkeypatch, dtype):
    """It is added as docs/extending.md says: a class, and its name in LINEARS."""
    monkeypatch.setitem(LINEARS, "ternary", TernaryLinear)
    quantize(open_checkpoint(tiny("llama-bias")[1]), {"mode": "ternary"}, tmp_path / "model.pth", "cpu")
    model, exact = load_model(tmp_path / "model.pth", dtype=dtype), load_model(tiny("llama-bias")[1], dtype=dtype)
    assert type(model.layers[0].attention.wo) is TernaryLinear
    w2 = model.layers[1].feed_forward.w2
    assert set(w2.weight.unique().tolist()) == {-1, 0, 1}
    for ours, theirs in zip(logits(model, None), logits(exact, None), strict=True):
        assert 0.1 < relative_error(ours, theirs) < 1.5  # 3 levels lose a lot, but not all


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 3])  # of 8 experts 3 compute a token, 9 three tokens
def test_without_a_kernel_only_the_chosen_experts_are_dequantised(stored, monkeypatch, mode, tokens):
    w13 = load_model(stored("qwen3-moe", mode), dtype=torch.float32).layers[0].feed_forward.experts.w13
    assert isinstance(w13, QuantizedLinear)
    x, experts = normal(1, tokens, 64), torch.tensor([[[6, 0, 3], [2, 5, 0], [7, 1, 4]]])[:, :tokens]
    exact = w13.dequantize(torch.float32).unflatten(0, (8, -1))
    expected = torch.stack([x[0, t] @ exact[e].T for t in range(tokens) for e in experts[0, t]]).view(1, tokens, 3, -1)
    seen, dequantize = [], type(w13).dequantize

    def observed(*args) -> torch.Tensor:
        seen.append(dequantize(*args))
        return seen[-1]

    monkeypatch.setattr(type(w13), "dequantize", observed)
    torch.testing.assert_close(w13(x, experts), expected)
    assert len(seen[0]) == (3 if tokens == 1 else 8) * 64


def test_a_kernel_is_added_in_two_places(tiny, tmp_path, monkeypatch):
    """As docs/extending.md says: in a backend's `product`, and in TENSORS, which lists the tensors passed to it."""
    seen = []

    def operator(x, weight, scales, bias, norm, eps, residual, activation, experts, weights):
        seen.append((x.shape[0], activation))
        x = x if norm is None else nn.functional.rms_norm(x, norm.shape, norm, eps)
        y = nn.functional.linear(x, weight * scales[:, None], bias)
        y = gated(y, activation) if activation else y
        return y if residual is None else y + residual

    def product(weight, scales=None, zeros=None, n_experts=1) -> Product | None:
        return scales is not None and Product({"weight": weight, "scales": scales}, operator) or None

    backend = SimpleNamespace(missing=lambda *_: None, product=product, attention=lambda *_: None, in_one_region=None)
    monkeypatch.setitem(LINEARS, "ternary", TernaryLinear)
    quantize(open_checkpoint(tiny("llama-bias")[1]), {"mode": "ternary", "skip": ["wo"]}, tmp_path / "model.pth", "cpu")
    plain = load_model(tmp_path / "model.pth", dtype=torch.float32)
    monkeypatch.setitem(layers.BACKENDS, "cpu", backend)
    monkeypatch.setitem(layers.TENSORS, TernaryLinear, ("weight", "scales"))
    model = load_model(tmp_path / "model.pth", dtype=torch.float32)
    for ours, theirs in zip(logits(model, None), logits(plain, None), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert [kind for _, kind in seen[:7]] == ["", "silu", ""] * 2 + [""]  # wqkv, w13, w2 of two layers; output
    assert isinstance(model.layers[0].attention.wo, Linear)


@has_kernels
def test_a_step_is_held_together_where_kernels_do_all_of_it(tiny):
    def step() -> None: ...

    def is_together(path, dtype: torch.dtype = torch.bfloat16, kv_dtype: torch.dtype | None = None) -> bool:
        model = load_model(path, dtype=dtype)
        model.setup_caches(1, 16, kv_dtype=kv_dtype)
        return in_one_region(model, step) is not step

    attends = cpu.attention(torch.device("cpu"), torch.bfloat16, 32) is not None
    assert is_together(tiny("llama-head-dim")[1]) == attends
    assert is_together(tiny("llama-head-dim")[1], kv_dtype=torch.int8) == attends
    assert not is_together(tiny("llama-head-dim")[1], kv_dtype=torch.float8_e4m3fn)
    assert not is_together(tiny("llama-head-dim")[1], torch.float32)
    assert is_together(tiny("llama")[1]) == attends  # head_dim 16


def test_a_device_without_a_backend_says_so():
    assert layers.kernels_missing("mps", torch.bfloat16) == "there are no kernels for mps"
    assert backend_for("mps", torch.bfloat16) is None
    cache = FastKVCache(None, (1, 1, 4, 8), torch.device("cpu"), torch.bfloat16)
    assert cache.kernel is None


def test_a_model_can_be_sped_up_again(tiny):
    """Converted to another dtype it gets that dtype's kernels; a further call changes nothing."""
    model, expected = (load_model(tiny("llama")[1], dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    layers.speed_up(model.bfloat16(), torch.bfloat16)
    layers.speed_up(model, torch.bfloat16)
    for ours, theirs in zip(logits(model, None), logits(expected, None), strict=True):
        assert ours.equal(theirs)
    assert not [module for module in model.modules() if type(module) is Linear]
