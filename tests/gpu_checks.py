"""Tests of the GPU's kernels, on a GPU or on a CPU in Triton's interpreter; `test_kernels_gpu.py` runs both.

    TRITON_INTERPRET=1 python -m pytest --noconftest tests/gpu_checks.py

Worth knowing: the interpreter must be chosen before triton is imported, so these tests run in a process of their own.
It converts float32 to bfloat16 by truncation, with twice the error of rounding: hence its larger `BOUND`.
"""

import copy
import dataclasses
import itertools
import os
from functools import partial

import pytest
import torch
import triton.language as tl
from torch._dynamo.testing import CompileCounterWithBackend

from fast.layers import FastBlock, FastKVCache, FastLinear, fast_linear, fused, speed_up
from fast.quantized import GROUP_SIZES, GroupedLinear, Int8Linear, QuantizedKVCache
from kernels import gpu
from kernels.gpu import choice, flash_decoding, products, routing
from model import (
    Attention,
    Linear,
    ModelArgs,
    RMSNorm,
    Router,
    Sharding,
    Transformer,
    gated,
    multiply,
    rope_table,
)
from scripts.bench import gpu_correctness, gpu_products
from scripts.bench.random_models import FORMS, every_fp8, random_groups

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = [torch.bfloat16, torch.float16]
BOUND = 1.0 if DEVICE == "cpu" else 0.6
torch.set_num_threads(1)


def set_multiprocessors(monkeypatch, n: int) -> None:
    for module in (products, flash_decoding):
        monkeypatch.setattr(module, "multiprocessors", lambda device: n)


@pytest.fixture(autouse=True)
def _small_gpu(monkeypatch):
    """One multiprocessor, so that products of over 128 outputs already take the tiles `MANY_OUTPUTS`; a fixed seed."""
    torch.manual_seed(0)
    set_multiprocessors(monkeypatch, 1)


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "_fastest", {})


@pytest.fixture(autouse=True)
def _dots(monkeypatch):
    """The interpreter stores bfloat16 as integers and would multiply those, so `dot` gets its operands in float32."""
    if DEVICE == "cpu":
        from triton.runtime.interpreter import InterpreterBuilder

        def dot(self, a, b, *rest, original=InterpreterBuilder.create_dot):
            return original(self, self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32), *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@pytest.fixture(autouse=True)
def _patched_once(monkeypatch):
    """The interpreter replaces all functions of `triton.language` at each call of a function, not only at a launch."""
    if DEVICE == "cpu":
        from triton.runtime import interpreter

        def patch(function, original=interpreter._patch_lang):
            used = [value for value in function.__globals__.values() if value is tl or value is tl.core]
            return original(function) if any(tl.core.is_builtin(language.load) for language in used) else None

        monkeypatch.setattr(interpreter, "_patch_lang", patch)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def float_linear(weight: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None = None) -> Linear:
    """A `model.Linear` with these weights."""
    linear = Linear(weight.shape[1], weight.shape[0], bias is not None, Sharding()).requires_grad_(False)
    linear.weight.data = weight.to(dtype)
    if bias is not None:
        linear.bias.data = bias.to(dtype)
    return linear.to(DEVICE)


def product(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return fast_linear(module.to(DEVICE), gpu)(x)


def is_right(module: torch.nn.Module, x: torch.Tensor) -> bool:
    """Whether the product has x's dtype and errs by less than `BOUND` roundings, against float32 on these weights."""
    is_float = isinstance(module, Linear)
    y, weight = product(module, x), module.weight.float() if is_float else module.dequantize(torch.float32)
    exact = x.float() @ weight.T
    error = float((y.float() - exact).norm() / exact.norm()) / torch.finfo(x.dtype).eps
    return (y.dtype, y.shape) == (x.dtype, exact.shape) and error < BOUND


def all_are_right(x: torch.Tensor, weight: torch.Tensor) -> bool:
    groupsizes = [size for size in GROUP_SIZES if weight.shape[1] % size == 0]
    modules = [float_linear(weight, x.dtype), Int8Linear.from_float(weight)]
    # Over all shapes, all forms.
    forms = itertools.islice(itertools.cycle(FORMS), sum(weight.shape) % len(FORMS), None)
    modules += [random_groups(*weight.shape, size, form) for size, form in zip(groupsizes, forms, strict=False)]
    return all(is_right(module, x) for module in modules)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [16, 64])
def test_every_number_of_fp8_is_exact(patched_interpreter, dtype, rows):
    """Subnormal ones too."""
    module, ones = every_fp8(DEVICE), torch.eye(256, dtype=dtype, device=DEVICE)
    assert torch.cat([product(module, x) for x in ones.split(rows)]).T.equal(module.weight.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [(1, 18, 64), (1, 3, 1056), (1, 75, 1056), (2, 41, 192), (2, 70, 1024), (3, 17, 96), (4, 16, 2304)],
)
def test_few_rows(dtype, rows, n, k):
    x, weight = normal(rows, k).to(dtype), normal(n, k)
    assert all_are_right(x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [(5, 40, 64), (8, 131, 192), (6, 70, 1056), (13, 3, 256), (16, 17, 1056), (11, 75, 512), (7, 16, 2304)],
)
def test_more_rows(dtype, rows, n, k):
    assert all_are_right(normal(rows, k).to(dtype), normal(n, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(40, 192), (17, 1056), (3, 256)])
def test_a_prefill(dtype, n, k):
    assert all_are_right(normal(20, k).to(dtype), normal(n, k))


@pytest.mark.parametrize(
    ("activation", "norm_dtype"), [("", torch.float16), ("silu", torch.float16), ("gelu_tanh", torch.float32)]
)
@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [
        (1, 18, 96),
        (1, 70, 1056),
        (2, 34, 192),
        (3, 66, 256),
        (2, 6, 192),
        (6, 40, 96),
        (8, 130, 1056),
        (5, 18, 512),
        (16, 18, 1056),
        (20, 40, 96),
    ],
)
def test_fused_norm_bias_gates_and_residual(rows, n, k, activation, norm_dtype):
    """Norm, bias, gates and residual inside the kernels, against plain PyTorch in float32."""
    x, bias, around = 30 * normal(rows, k).half(), normal(n).half(), {"activation": activation}
    norm = RMSNorm(k, eps=1.0).to(DEVICE).requires_grad_(False)
    norm.weight.data = normal(k).half().to(norm_dtype)
    if not activation:
        around["residual"] = normal(1, rows, n).half()
    modules = [Int8Linear.from_float(normal(n, k), bias), GroupedLinear.from_float(normal(n, k), bias, groupsize=32)]
    for module in [*modules, float_linear(normal(n, k), x.dtype, bias)]:
        is_float = isinstance(module, Linear)
        weight = module.weight.float() if is_float else module.dequantize(torch.float32)
        linear = float_linear(weight, torch.float32, bias)
        exact = fused(
            linear, x[None].float(), norm, **{k: v if k == "activation" else v.float() for k, v in around.items()}
        )
        y = fused(fast_linear(module.to(DEVICE), gpu), x[None], norm, **around)
        assert (y.dtype, y.shape) == (x.dtype, exact.shape)
        assert float((y.float() - exact).norm() / exact.norm()) < 2 * torch.finfo(x.dtype).eps


def test_no_rows():
    """A draft's prefill asks for no logits."""
    x, weight = normal(0, 128).half(), normal(48, 128)
    for linear in (
        float_linear(weight, torch.float16),
        Int8Linear.from_float(weight),
        GroupedLinear.from_float(weight, groupsize=32),
    ):
        assert product(linear, x).shape == (0, 48)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["float", "int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 4, 17])  # more than 16 are a prefill
def test_experts(dtype, mode, tokens):
    """Of 5 experts 3 compute a token; the first computes all, the last none."""
    E, K, N = 5, 64, 48
    experts = torch.tensor([[1 + t % 3, 0, 1 + (t + 1) % 3] for t in range(tokens)], device=DEVICE)
    weights, norm, residual = normal(tokens, 3).abs(), normal(K).to(dtype), normal(tokens, N).to(dtype)
    float_weight = normal(E * N, K)
    module = {
        "float": lambda: float_linear(float_weight, dtype),
        "int8": lambda: Int8Linear.from_float(float_weight),
        "int4": lambda: GroupedLinear.from_float(float_weight, groupsize=32),
    }[mode]().to(DEVICE)
    module.n_experts = E
    exact = module.weight.float() if mode == "float" else module.dequantize(torch.float32)
    fast, bound = fast_linear(module, gpu), BOUND * torch.finfo(dtype).eps
    x, rms = normal(tokens, K).to(dtype), RMSNorm(K, 1e-5).requires_grad_(False)
    rms.weight.data = norm
    y = fast(x, experts, norm=rms, activation="silu")
    expected = gated(multiply(rms(x.float()), exact, None, E, experts), "silu")
    assert (y.dtype, y.shape) == (dtype, (tokens, 3, N // 2))
    assert float((y.float() - expected).norm() / expected.norm()) < 3 * bound
    x = normal(tokens, 3, K).to(dtype)
    y = fast(x, experts, weights, residual=residual)
    expected = multiply(x.float(), exact, None, E, experts, weights) + residual.float()
    assert (y.dtype, y.shape) == (dtype, (tokens, N))
    assert float((y.float() - expected).norm() / expected.norm()) < 3 * bound


def test_inductor_multiplies_no_experts():
    """Not even one: it would multiply with the weights of all."""
    assert choice.INDUCTOR in products.ways_of(1, 64, 48, 16, 64, 1)
    assert choice.INDUCTOR not in products.ways_of(1, 64, 48, 16, 64, 1, n_chosen=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_experts", "k", "n_in"), [(8, 2, 64), (20, 3, 288), (128, 8, 320)])
@pytest.mark.parametrize("normalizes", [False, True])
def test_router(dtype, n_experts, k, n_in, normalizes):
    args = dataclasses.replace(REPORTED, dim=n_in, n_experts=n_experts, experts_per_token=k)
    exact = Router(dataclasses.replace(args, norm_expert_weights=normalizes)).requires_grad_(False)
    exact.weight.data = normal(n_experts, n_in).to(dtype).float()
    norm = RMSNorm(n_in, eps=1.0).to(DEVICE).requires_grad_(False)
    norm.weight.data = normal(n_in).to(dtype).float()
    product = gpu.router(exact.weight.to(dtype), k, normalizes)
    for tokens in (0, 1, 7, 17):
        x = normal(tokens, n_in).to(dtype)
        experts, weights = product.operator(x, *product.tensors.values(), norm.weight.to(dtype), norm.eps)
        expected, shares = exact(norm(x.float()))
        assert (experts.shape, weights.shape) == ((tokens, k), (tokens, k))
        assert (experts == expected).all(1).float().mean() > 0.8 or tokens == 0  # more rows are normed in x's type
        alike = (experts == expected).all(1)
        assert torch.allclose(weights[alike], shares[alike], rtol=0.05, atol=1e-3)


def test_large_zeros_cancel_exactly():
    """Weights around 100 with a spread of 1, the inputs' second half is the first one negated: the spread remains."""
    for rows in (2, 6):
        half = normal(rows, 256).half()
        assert is_right(GroupedLinear.from_float(100 + normal(16, 512), groupsize=32), torch.cat((half, -half), 1))


def test_a_bias_a_batch_and_a_view():
    x, weight, bias = normal(2, 3, 128).half(), normal(8, 128), normal(8).half()
    expected = torch.nn.functional.linear(x, Int8Linear.from_float(weight).dequantize(torch.float16), bias)
    for view in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.allclose(product(Int8Linear.from_float(weight, bias), view), expected, rtol=1e-3, atol=0.02)


def pairs(int4: GroupedLinear) -> torch.Tensor:
    return torch.stack((int4.scales, int4.zeros), -1)


def test_operators_keep_pytorchs_rules():
    x, int8 = normal(2, 64).half(), Int8Linear.from_float(normal(3, 64))
    int4 = GroupedLinear.from_float(normal(3, 64), groupsize=32)
    for weights in ((int8.weight, int8.scales), (int4.weight, pairs(int4)), (normal(3, 64).half(),)):
        torch.library.opcheck(torch.ops.fast_gpu.linear.default, (x, *weights))
    experts = {"experts": torch.tensor([[0, 2], [1, 0]], device=DEVICE), "n_experts": 3}
    torch.library.opcheck(torch.ops.fast_gpu.linear.default, (x, normal(48, 64).half()), experts)
    torch.library.opcheck(routing.route, (x, normal(3, 64).half(), normal(64).half(), 1e-5, 2, True))


def test_one_compiled_graph_serves_every_number_of_rows():
    counter = CompileCounterWithBackend("aot_eager")
    module = fast_linear(Int8Linear.from_float(normal(8, 64)), gpu)
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for rows in (2, 7, 30):
        x = normal(rows, 64).half()
        assert compiled(x).equal(module(x))
    assert counter.frame_count == 1


def test_a_weight_of_another_size_is_refused():
    module = Int8Linear.from_float(normal(8, 64))
    int4 = GroupedLinear.from_float(normal(8, 64), groupsize=32)
    for weights in ((module.weight, module.scales), (int4.weight, pairs(int4)), (normal(8, 64).half(),)):
        with pytest.raises(ValueError, match="x has 128 columns, the weight 64"):
            torch.ops.fast_gpu.linear(normal(1, 128).half(), *weights)


@pytest.mark.parametrize(("outputs", "activation"), [(7, "silu"), (8, "relu")])
def test_gates_that_do_not_fit_are_refused(outputs, activation):
    with pytest.raises(ValueError, match=f"an even number of outputs, not {outputs}, and an activation of .'silu', "):
        torch.ops.fast_gpu.linear(normal(1, 64).half(), normal(outputs, 64).half(), activation=activation)


REPORTED = ModelArgs(
    dim=32, n_layers=1, n_heads=6, n_kv_heads=2, head_dim=32, hidden_dim=32, vocab_size=32, context_length=200,
    norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip


@pytest.mark.parametrize(("mode", "rows"), [(mode, (1, 6, 20)) for mode in ("bf16", "int8", "int4")])
def test_the_reports_products(mode, rows):
    """The check of products in `gpu_report.py` passes, with its limit of twice the rounding error."""
    errors = gpu_correctness.product_errors(mode, REPORTED, DEVICE, torch.float16, rows)
    assert len(errors) == 2 * len(rows)
    assert 0 < max(errors) < 2


def launches_of(monkeypatch, name: str, module=products) -> list[dict[str, int]]:
    """A list to which every launch of this kernel from now on adds its constants."""
    launched, kernel = [], getattr(module, name)

    class Launch:
        def __getitem__(self, grid):
            return lambda *args, **constants: (launched.append(constants), kernel[grid](*args, **constants))

    monkeypatch.setattr(module, name, Launch())
    return launched


def name_of(launch: dict[str, int]) -> str:
    return f"{launch['num_warps']} warps, {launch['BLOCK_N']} outputs, {launch['UNROLL']} unrolled"


@pytest.mark.parametrize("kind", ["float", "int4"])
def test_the_report_times_every_way(monkeypatch, kind):
    """Each candidate launches the tiles it is named after, and its product is right."""
    weight = normal(64, 2048) / 16
    linear = float_linear(weight, torch.float16) if kind == "float" else GroupedLinear.from_float(weight, groupsize=32)
    monkeypatch.setattr(gpu_products, "kernels_of", lambda card: gpu)
    card = gpu_products.Card(DEVICE, torch.float16, None, compile=False)
    launched = launches_of(monkeypatch, "_multiply")
    found = gpu_products.candidates(card, "w13", [linear], 1, others=True)
    launched.clear()
    for label, (name, modules, call) in found.items():
        run = gpu_correctness.FusedProduct(name, modules[0], DEVICE, torch.float16)
        x, residual = run.inputs(1, DEVICE, torch.float16)
        exact = gpu_correctness.FusedProduct(name, linear, DEVICE, torch.float16)
        assert gpu_correctness.product_error(exact, x, residual, call(run, x, residual)) < 2, label
    names = [f"kernels/gpu, {name_of(way)}" for way in launched]
    others = ["kernels/gpu, Inductor", "F.linear, bare"] if kind == "float" else ["Inductor"]
    assert list(found) == names + others
    assert len(names) == len(products.FEW_OUTPUTS)


@pytest.mark.parametrize(
    ("kind", "rows", "best"), [("float", 2, 1), ("float", 1, -1), ("int8", 1, 2), ("int4", 6, -1), ("int4", 16, 1)]
)
def test_the_fastest_way_is_taken(monkeypatch, kind, rows, best):
    """A fake clock decides which way is the fastest; the product is right in all of them."""
    weight, norm = normal(64, 512) / 16, RMSNorm(512, 1e-5).half().to(DEVICE).requires_grad_(False)
    quantized = Int8Linear.from_float(weight) if kind == "int8" else GroupedLinear.from_float(weight, groupsize=32)
    linear = float_linear(weight, torch.float16) if kind == "float" else quantized
    linear, x, timed = fast_linear(linear, gpu), normal(1, rows, 512).half(), []

    def step() -> torch.Tensor:
        return fused(linear, x, norm, activation="silu")

    def clock(function, *args) -> float:
        function(*args)
        timed.append(function)
        return float(len(timed) != 1 + names.index(names[best]))

    launched, expected = launches_of(monkeypatch, "_multiply"), step()
    ((names, _),) = choice.asked_by(step).values()
    for name in names:
        with choice.trying(name):
            assert torch.allclose(step(), expected, rtol=0.01, atol=0.002), name
    choice.measure(step, seconds=clock)
    assert len(timed) == len(names)
    launched.clear()
    step()
    assert [*map(name_of, launched)] == ([] if names[best] == choice.INDUCTOR else [names[best]])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_loaded_for_a_gpu_it_has_the_kernel():
    with torch.device(DEVICE):
        model = Transformer(dataclasses.replace(REPORTED, dim=128, hidden_dim=4096)).bfloat16().requires_grad_(False)
    x, plain = normal(1, 1, 128).bfloat16(), copy.deepcopy(model.layers[0].feed_forward.w13)
    speed_up(model, torch.bfloat16)
    fast = model.layers[0].feed_forward.w13
    assert isinstance(fast, FastLinear)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch._inductor.config.coordinate_descent_tuning
    assert torch.allclose(fast(x), plain(x), rtol=0.02, atol=0.5)
    assert fast(x).equal(fast(x))


@pytest.fixture
def patched_interpreter(monkeypatch):
    """Work around three faults of Triton's interpreter.

    In 3.6, `range` up to a computed number needs numpy before 2.4. Up to 3.9, what rounds up to 32 in fp8 becomes 16,
    and subnormal numbers of bfloat16 become 0 in float32.
    """
    if DEVICE == "cpu":
        from triton.runtime import interpreter

        def patch(tensor, scope, original=interpreter._patch_lang_tensor):
            original(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        def convert(x, kind, to, *rounding, original=interpreter._convert_float):
            if (str(kind), str(to)) == ("bf16", "fp32"):
                return x.astype("uint32") << 16
            if str(to) != "fp8e4nv":
                return original(x, kind, to, *rounding)
            return torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
        monkeypatch.setattr(interpreter, "_convert_float", convert)


def attention_args(heads: int, kv_heads: int, D: int, **others) -> ModelArgs:
    return dataclasses.replace(REPORTED, n_heads=heads, n_kv_heads=kv_heads, head_dim=D, context_length=301, **others)


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "S", "D", "window", "qk_norm", "is_causal"),
    [
        (4, 4, 1, 64, 100, False, True),
        (6, 2, 1, 80, None, True, True),
        (2, 1, 5, 32, 3, False, True),
        (4, 2, 16, 48, None, True, True),
        (4, 1, 3, 256, 100, True, True),
        (2, 1, 9, 32, None, True, False),
        (2, 1, 5, 32, 7, False, False),
    ],
)
def test_attention_over_a_cache(
    monkeypatch, patched_interpreter, heads, kv_heads, S, D, window, qk_norm, is_causal, kv_dtype
):
    """Rows of different lengths: one with nothing cached, one up to the cache's end; 2 to 8 programs share a head."""
    set_multiprocessors(monkeypatch, 6)
    args = attention_args(heads, kv_heads, D, sliding_window=window, qk_norm=qk_norm)
    positions = torch.tensor([[0], [130], [301 - S]], device=DEVICE) + torch.arange(S, device=DEVICE)
    error = gpu_correctness.attention_error(args, positions, 301, kv_dtype, DEVICE, torch.float16, is_causal)
    assert 0 < error < 2


@pytest.mark.parametrize("best", [0, -1])
def test_the_fastest_attention_is_taken(monkeypatch, patched_interpreter, best):
    """Each way is right; it is timed at the cache's last slot, and the other slots keep what they hold."""
    set_multiprocessors(monkeypatch, 2)
    args, shape = attention_args(4, 2, 32), (2, 2, 150, 32)
    layer, positions = Attention(args).half().to(DEVICE), torch.tensor([[7], [140]], device=DEVICE)
    cache = FastKVCache(gpu.attention, shape, torch.device(DEVICE), torch.float16)
    for buffer in cache.buffers():
        buffer.copy_(normal(*shape))
    qkv, (cos, sin), timed = normal(2, 1, 8 * 32).half(), rope_table(args, positions, 301), []

    def step() -> torch.Tensor:
        return cache.attend(layer, qkv, cos, sin, positions, 150, mask=None)

    def clock(function, *args) -> float:
        function(*args)
        timed.append(cache.k[:, :, -1].equal(before[:, :, -1]))
        return float(len(timed) != 1 + names.index(names[best]))

    expected, before = step(), cache.k.clone()
    ((names, _),) = choice.asked_by(step).values()
    for name in names:
        with choice.trying(name):
            assert torch.allclose(step(), expected, atol=0.002), name
    launched = launches_of(monkeypatch, "_attend_share", flash_decoding)
    choice.measure(step, seconds=clock)
    assert timed == [False] * len(names)
    assert cache.k[:, :, :-1].equal(before[:, :, :-1])
    launched.clear()
    assert torch.allclose(step(), expected, atol=0.002)
    assert [f"{way['SPLITS']} programs a head, {way['BLOCK']} slots at a time" for way in launched] == [names[best]]


def test_the_report_times_both_attentions(monkeypatch, patched_interpreter):
    """Plain PyTorch, which Inductor would compile, and our kernel are both timed; neither fails."""
    monkeypatch.setattr(gpu_products, "kernels_of", lambda card: gpu)
    monkeypatch.setattr(gpu_products, "CONTEXTS", [20])
    monkeypatch.setitem(gpu_products.MODELS, "8B", REPORTED)
    launched = launches_of(monkeypatch, "_attend_share", flash_decoding)
    card = gpu_products.Card(DEVICE, torch.float16, None, compile=False)
    (row,) = gpu_products.attention_rows(card, "8B", 1)
    assert (row.is_right, row.more["failed"]) == (None, {})
    assert set(row.more["us"]) == {"Inductor", "kernels/gpu"}
    assert launched
    assert len(launched) % 8 == 0  # one launch for each of 8 caches


@pytest.mark.parametrize("wrong", ["a slot less", "no new key", "another angle"])
def test_the_report_sees_wrong_attention(patched_interpreter, monkeypatch, wrong):
    """Also where only the longest row is wrong, or only what is stored in the cache."""
    attend = torch.ops.fast_gpu.decode_attention

    def wrongly(qkv, cos, sin, positions, window, is_causal, q_norm, k_norm, eps, k, *others):
        if wrong == "a slot less":
            positions = positions - torch.tensor([[0], [0], [1]], device=DEVICE)
        elif wrong == "no new key":
            k = k.clone()
        else:
            cos = cos * 1.01
        return attend(qkv, cos, sin, positions, window, is_causal, q_norm, k_norm, eps, k, *others)

    monkeypatch.setattr(torch.ops.fast_gpu, "decode_attention", wrongly)
    positions = torch.tensor([[0], [50], [149]], device=DEVICE)
    assert gpu_correctness.attention_error(REPORTED, positions, 150, torch.float16, DEVICE, torch.float16) > 5


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.int8])
def test_attention_keeps_pytorchs_rules(patched_interpreter, kv_dtype):
    qkv, positions = normal(1, 1, 4 * 32).half(), torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
    cache, (cos, sin) = QuantizedKVCache((1, 1, 5, 32), DEVICE, kv_dtype), rope_table(REPORTED, positions, 200)
    rules = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if flash_decoding.STORED:
        rules = ("test_schema", *rules)
    args = (qkv, cos, sin, positions, 0, True, None, None, 0.0, *cache.buffers())
    torch.library.opcheck(torch.ops.fast_gpu.decode_attention.default, args, test_utils=rules)


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_model_attends_with_the_kernel(patched_interpreter, compiled, kv_dtype):
    """Two decode steps that write the cache, with rows of different lengths, against plain PyTorch."""
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "hidden_dim": 32}
    with torch.device(DEVICE):
        model = Transformer(
            ModelArgs(**sizes, vocab_size=16, context_length=80, norm_eps=1e-5, rope_theta=1e4, sliding_window=70)
        )
    model = model.half().requires_grad_(False)
    tokens, positions = torch.tensor([[[3], [5]], [[74], [17]]], device=DEVICE)
    logits = []
    model.layers = torch.nn.ModuleList(map(FastBlock, model.layers))
    for backend in (None, gpu):
        model.new_cache = partial(FastKVCache, backend and backend.attention)
        model.setup_caches(2, 80, kv_dtype=kv_dtype)
        model(torch.arange(148, device=DEVICE).view(2, 74) % 16, torch.arange(74, device=DEVICE))
        step = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled and backend else model
        logits.append([step(tokens, positions + i, model.slots[:80]) for i in range(2)])
    for y, expected in zip(*logits, strict=True):
        assert not y.equal(expected)
        assert torch.allclose(y, expected, rtol=0.01, atol=0.002)
