"""The CPU kernels: weight packing, products on every instruction set of this machine, attention, threads, building.

    python -m pytest tests/test_kernels_cpu.py

Worth knowing: the reference is float32 arithmetic on the dequantised weights; the kernels round their result to
bfloat16, which alone is a relative error of up to 0.4 %.
"""

import contextlib
import ctypes
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fuzz_operators import REFUSED, RIGHT, fuzz

from fast.checkpoint import load_model
from fast.decoding import build_steps, stream
from fast.layers import TENSORS, fused
from fast.quantized import GROUP_SIZES, GroupedLinear, Int8Linear, QuantizedKVCache
from fast.sampling import Sampling
from kernels import cpu
from kernels.cpu import build, packing
from model import ACTIVATIONS, Linear, RMSNorm, Router, Sharding, gated
from model import multiply as textbook_multiply
from scripts.bench.presets import preset
from scripts.bench.random_models import FORMS, every_fp8, random_groups

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(build.load() is not None, reason=str(build.load()))
SHAPES = [(1, 64), (16, 64), (40, 192), (131, 256), (8, 1056)]
AS_OURS = 1  # scales and zeros in bfloat16, zeros in the middle


@pytest.fixture(params=["avx512", "avx2", "portable"])
def variant(request):
    try:
        torch.ops.fast.choose_variant(request.param)
    except RuntimeError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    torch.ops.fast.choose_variant(torch.ops.fast.variants()[0])


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def pack(module) -> torch.Tensor:
    if isinstance(module, Int8Linear):
        return packing.pack_int8(module.weight, module.scales)
    return packing.pack_groups(module.weight, module.scales, module.zeros)


def unpack_int8(packed: torch.Tensor, n_out: int, n_in: int) -> tuple[torch.Tensor, ...]:
    """The inverse of `packing.pack_int8`."""
    fours, scales = packed[:, : packing.LANES * n_in], packed[:, packing.LANES * n_in :].contiguous()
    above = fours.reshape(-1, n_in // 4, packing.LANES, 4).transpose(1, 2).reshape(-1, n_in)
    return (above[:n_out] ^ 0x80).view(torch.int8), scales.view(torch.float32).flatten()[:n_out]


def unpack_int4(packed: torch.Tensor, n_out: int, n_in: int, groupsize: int) -> tuple[torch.Tensor, ...]:
    """The inverse of `packing.pack_groups`."""
    n_groups, n_panels = n_in // groupsize, len(packed)
    words, pairs = packed.view(n_panels, n_groups, -1).split((packing.LANES * groupsize // 2, packing.LANES * 4), dim=2)
    e, f, g, h = (
        words.reshape(n_panels, n_in // 8, packing.LANES, 4).transpose(1, 2).reshape(-1, n_in // 8, 4).unbind(2)
    )
    weight = torch.stack((e & 0xF | f << 4, g & 0xF | h << 4, e >> 4 | f & 0xF0, g >> 4 | h & 0xF0), dim=2)
    pairs = pairs.contiguous().view(torch.bfloat16).view(n_panels, n_groups, packing.LANES, 2).transpose(1, 2)
    scales, zeros = pairs.reshape(-1, n_groups, 2).unbind(2)
    return weight.flatten(1)[:n_out], scales[:n_out].contiguous(), zeros[:n_out].contiguous()


def close(y: torch.Tensor, expected: torch.Tensor) -> bool:
    return y.dtype == torch.bfloat16 and float((y.float() - expected).norm() / expected.norm()) < 0.004


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_packing_int8_is_undone(n, k):
    weight, scales = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n)
    packed = packing.pack_int8(weight, scales)
    assert packed.shape == (-(-n // 16), 16 * k + 64)
    found = unpack_int8(packed, n, k)
    assert found[0].equal(weight)
    assert found[1].equal(scales)


@pytest.mark.parametrize(("n", "k", "groupsize"), [(1, 64, 32), (40, 192, 64), (131, 256, 256), (2000, 128, 128)])
def test_packing_int4_is_undone(n, k, groupsize):
    tensors = torch.randint(256, (n, k // 2), dtype=torch.uint8), normal(n, k // groupsize), normal(n, k // groupsize)
    tensors = tensors[0], tensors[1].bfloat16(), tensors[2].bfloat16()
    packed = packing.pack_groups(*tensors)
    assert packed.shape == (-(-n // 16), 8 * k + 64 * k // groupsize)
    for found, expected in zip(unpack_int4(packed, n, k, groupsize), tensors, strict=True):
        assert found.equal(expected)


def test_tensors_in_huge_pages_lie_side_by_side(monkeypatch):
    monkeypatch.setattr(packing, "_mapping", None)
    tensors = [packing.in_huge_pages(*shape).fill_(i) for i, shape in enumerate(((3, 7), (0, 5), (1 << 20,), (2, 65)))]
    assert [tuple(t.shape) for t in tensors] == [(3, 7), (0, 5), (1 << 20,), (2, 65)]
    assert all((t == i).all() and (t.data_ptr() % packing.CACHE_LINE == 0) for i, t in enumerate(tensors))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert tensors[3].data_ptr() - tensors[2].data_ptr() == 1 << 20
    assert packing.in_huge_pages(300 << 20).nbytes == 300 << 20  # larger than a mapping, 256 MiB


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs huge pages")
def test_two_threads_get_memory_of_their_own(monkeypatch):
    """Without a lock both would wait inside, where the place of the next tensor has been read but not moved on."""
    inside, frombuffer = threading.Barrier(2), torch.frombuffer

    def wait(*args, **kwargs):
        with contextlib.suppress(threading.BrokenBarrierError):
            inside.wait(0.2)
        return frombuffer(*args, **kwargs)

    monkeypatch.setattr(torch, "frombuffer", wait)
    with ThreadPoolExecutor(2) as pool:
        tensors = [future.result() for future in [pool.submit(packing.in_huge_pages, 100) for _ in range(2)]]
    assert tensors[0].data_ptr() != tensors[1].data_ptr()


def test_odd_calls_are_right_or_refused():
    """A crash would end another process."""
    counts, bad = fuzz(calls=150)
    assert not bad
    assert min(counts[RIGHT], counts[REFUSED]) > 30


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 8, 9, 16, 17, 40, 300])
@pytest.mark.parametrize("threads", [1, 2])
def test_products(variant, rows, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        for n, k in SHAPES if rows < 100 else [(40, 320)]:
            x, weight = normal(rows, k).bfloat16(), normal(n, k)
            rounded = weight.bfloat16()
            y = torch.ops.fast.bf16_linear(x, packing.pack_bf16(rounded), n)
            assert close(y, x.float() @ rounded.float().T)
            module = Int8Linear.from_float(weight)
            y = torch.ops.fast.int8_linear(x, pack(module), n)
            assert close(y, x.float() @ module.dequantize(torch.float32).T)
            for groupsize in (size for size in GROUP_SIZES if k % size == 0):
                for form in FORMS:
                    module = random_groups(n, k, groupsize, form)
                    product = cpu.product(module.weight, module.scales, module.zeros, module.zeros_are)
                    y = product.operator(x, *product.tensors.values(), None, None, 0.0, None, "", None, None)
                    assert close(y, x.float() @ module.dequantize(torch.float32).T)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("rows", [1, 6, 256])
def test_every_number_of_fp8_is_exact(variant, rows):
    """Subnormal ones too."""
    module, ones = every_fp8(), torch.eye(256, dtype=torch.bfloat16)
    (packed,), operator = cpu.product(module.weight, module.scales).tensors.values(), torch.ops.fast.grouped_linear
    y = torch.cat([operator(x, packed, 16, 128, 16) for x in ones.split(rows)])
    assert y.T.equal(module.weight.bfloat16())


@pytest.mark.parametrize("rows", [1, 6, 40])
@pytest.mark.parametrize(
    ("activation", "norm_dtype"), [("", torch.bfloat16), ("silu", torch.bfloat16), ("gelu_tanh", torch.float32)]
)
def test_fused_norm_bias_gates_and_residual(variant, rows, activation, norm_dtype):
    """Norm, bias, gating and residual inside the kernels, against plain PyTorch in float32."""
    x, weight, bias = 30 * normal(rows, 200).bfloat16(), normal(88, 200).bfloat16(), normal(88).bfloat16()
    weight, x = F.pad(weight, (0, 24)), F.pad(x, (0, 24))  # to 224 inputs, a multiple of the group size 32
    norm = RMSNorm(224, eps=1.0).requires_grad_(False)
    norm.weight.data = normal(224).to(norm_dtype).float()
    residual = None if activation else normal(rows, 88).bfloat16()
    int8, int4 = Int8Linear.from_float(weight), GroupedLinear.from_float(weight, groupsize=32)
    surroundings = bias, norm.weight.to(norm_dtype), norm.eps, residual, activation
    for exact, y in (
        (weight.float(), torch.ops.fast.bf16_linear(x, packing.pack_bf16(weight), 88, *surroundings)),
        (int8.dequantize(torch.float32), torch.ops.fast.int8_linear(x, pack(int8), 88, *surroundings)),
        (int4.dequantize(torch.float32), torch.ops.fast.grouped_linear(x, pack(int4), 88, 32, AS_OURS, *surroundings)),
    ):
        linear = Linear(224, 88, True, Sharding()).requires_grad_(False)
        linear.weight.data, linear.bias.data = exact, bias.float()
        expected = fused(linear, x.float(), norm, None if activation else residual.float(), activation)
        assert y.shape == (rows, 44 if activation else 88)
        assert float((y.float() - expected).norm() / expected.norm()) < 0.008  # rounded to bfloat16 after each step


@pytest.mark.parametrize("mode", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 2, 6, 40, 130])
@pytest.mark.parametrize("threads", [1, 2])
def test_experts(variant, mode, tokens, threads):
    """Of 5 experts 3 compute a token; the last is chosen by none, the first by all, in prefill by more than 16."""
    E, K, N = 5, 64, 96
    experts = torch.stack([torch.tensor([0, 1 + t % 3, 1 + (t + 1) % 3]) for t in range(tokens)])
    experts = experts[:, torch.tensor([1, 0, 2])].contiguous()
    weights, norm = normal(tokens, 3).abs(), normal(K).bfloat16()
    float_weight, residual = normal(E * N, K).bfloat16(), normal(tokens, N).bfloat16()
    if mode == "bf16":
        dense, product = float_weight.float(), cpu.product(float_weight, n_experts=E)
    else:
        kind, scheme = (Int8Linear, {}) if mode == "int8" else (GroupedLinear, {"groupsize": 32})
        module = kind.from_float(float_weight, **scheme)
        tensors = (getattr(module, name) for name in TENSORS[type(module)])
        dense, product = module.dequantize(torch.float32), cpu.product(*tensors, n_experts=E)
    torch.set_num_threads(threads)
    try:
        x = normal(tokens, K).bfloat16()
        y = product.operator(x, *product.tensors.values(), None, norm, 1e-5, None, "silu", experts, None)
        normed = F.rms_norm(x.float(), (K,), norm.float(), 1e-5).bfloat16().float()
        exact = gated(textbook_multiply(normed, dense, None, E, experts).bfloat16().float(), "silu").flatten(0, 1)
        assert y.shape == (3 * tokens, N // 2)
        assert float((y.float() - exact).norm() / exact.norm()) < 0.008
        x = normal(3 * tokens, K).bfloat16()
        y = product.operator(x, *product.tensors.values(), None, None, 0.0, residual, "", experts, weights)
        exact = textbook_multiply(x.float().unflatten(0, (-1, 3)), dense, None, E, experts, weights) + residual
        assert close(y, exact)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("normalizes", [False, True])
@pytest.mark.parametrize(("n_experts", "k"), [(8, 2), (20, 3), (128, 8)])
def test_router(variant, n_experts, k, normalizes):
    weight, norm = normal(n_experts, 256).bfloat16(), RMSNorm(256, eps=1.0).requires_grad_(False)
    norm.weight.data = normal(256).bfloat16()
    exact = Router(preset("moe-8x300m")).requires_grad_(False)
    exact.k, exact.normalizes, exact.weight.data = k, normalizes, weight
    product = cpu.router(weight, k, normalizes)
    for tokens in (1, 3, 16, 17, 100):
        x = normal(tokens, 256).bfloat16()
        experts, weights = product.operator(x, *product.tensors.values(), norm.weight, norm.eps)
        expected, shares = exact(norm(x))
        assert experts.equal(expected)
        assert torch.allclose(weights, shares, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": torch.tensor([[0, 3]])}, "expert 3 of 3"),
        ({"experts": torch.tensor([[0, -1]])}, "expert -1 of 3"),
        ({"experts": torch.tensor([[0, 1], [0, 1]])}, "1 rows of x for experts [2, 2]"),
        ({"experts": torch.tensor([[0, 1]]).int()}, "experts must be int64 [T, k]"),
        ({"weights": torch.ones(1, 2)}, "1 rows of x for experts [1, 2]"),
        ({"bias": torch.ones(32).bfloat16()}, "without a bias"),
        ({"n_out": 24}, "a multiple of 16 outputs"),
    ],
)
def test_experts_that_do_not_fit_are_refused(changes, message):
    packed = packing.pack_bf16(normal(96, 64).bfloat16())
    given = {"n_out": 32, "experts": torch.tensor([[0, 1]]), **changes}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.fast.bf16_linear(normal(1, 64).bfloat16(), packed, **given)


def test_experts_of_which_a_panel_would_hold_two_have_no_kernel():
    assert cpu.product(normal(3 * 24, 64).bfloat16(), n_experts=3) is None


@pytest.mark.parametrize(("activation", "exact"), ACTIVATIONS.items())
def test_gates_far_from_zero(variant, activation, exact):
    gates = torch.tensor([-1e30, -200, -90, -20, -1, 0, 1, 20, 90, 200, 1e30]).bfloat16()
    weight = torch.zeros(22, 2, dtype=torch.bfloat16)
    weight[:11, 0], weight[11:, 0] = gates, 1
    y = torch.ops.fast.bf16_linear(
        torch.tensor([[1.0, 0.0]]).bfloat16(), packing.pack_bf16(weight), 22, activation=activation
    )
    assert torch.allclose(y[0].float(), exact(gates.float()), rtol=0.01, atol=1e-7)


def test_batched_rows_equal_single_rows(variant):
    """A row of a batch, or of a verified draft, gives what it gives alone, up to rounding."""
    x, weight = normal(6, 256).bfloat16(), normal(48, 256)
    for multiply in (
        lambda x: torch.ops.fast.bf16_linear(x, packing.pack_bf16(weight.bfloat16()), 48),
        lambda x: torch.ops.fast.int8_linear(x, pack(Int8Linear.from_float(weight)), 48),
        lambda x: torch.ops.fast.grouped_linear(
            x, pack(GroupedLinear.from_float(weight, groupsize=32)), 48, 32, AS_OURS
        ),
    ):
        alone = torch.cat([multiply(row[None]) for row in x])
        assert torch.allclose(multiply(x).float(), alone.float(), rtol=0.008, atol=0.02)


def test_large_zeros_cancel_exactly(variant):
    """Weights around 100 with a spread of 1, the inputs' second half is the first one negated: the spread remains."""
    half, weight = normal(2, 256).bfloat16(), 100 + normal(16, 512)
    x = torch.cat((half, -half), 1)
    module = GroupedLinear.from_float(weight, groupsize=32)
    y = torch.ops.fast.grouped_linear(x, pack(module), 16, 32, AS_OURS)
    assert close(y, x.float() @ module.dequantize(torch.float32).T)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_row(variant, bad):
    """int8 and int4 products round inputs to integers, which have no NaN; no output of that row may be finite."""
    x, weight = normal(3, 512).bfloat16(), normal(16, 512)
    x[1, 300] = bad
    for multiply in (
        lambda x: torch.ops.fast.bf16_linear(x, packing.pack_bf16(weight.bfloat16()), 16),
        lambda x: torch.ops.fast.int8_linear(x, pack(Int8Linear.from_float(weight)), 16),
        lambda x: torch.ops.fast.grouped_linear(
            x, pack(GroupedLinear.from_float(weight, groupsize=32)), 16, 32, AS_OURS
        ),
    ):
        for rows in (x, x[1:2], x.repeat(8, 1)):
            y = multiply(rows)
            assert torch.equal(y.isfinite().all(dim=1), rows.isfinite().all(dim=1))
            assert not y[~rows.isfinite().all(dim=1)].isfinite().any()


def test_operators_keep_pytorchs_rules():
    x, module = normal(3, 64).bfloat16(), Int8Linear.from_float(normal(40, 64))
    torch.library.opcheck(torch.ops.fast.int8_linear.default, (x, pack(module), 40))
    module = GroupedLinear.from_float(normal(40, 64), groupsize=32)
    torch.library.opcheck(torch.ops.fast.grouped_linear.default, (x, pack(module), 40, 32, AS_OURS))
    torch.library.opcheck(torch.ops.fast.bf16_linear.default, (x, packing.pack_bf16(normal(40, 64).bfloat16()), 40))
    packed, norm = packing.pack_bf16(normal(48, 64).bfloat16()), normal(64).bfloat16()
    routing = x, packing.pack_bf16(normal(3, 64).bfloat16()), 3, 2, True, norm, 1e-5
    experts, weights = torch.ops.fast.route(*routing)
    torch.library.opcheck(torch.ops.fast.route.default, routing)
    torch.library.opcheck(torch.ops.fast.bf16_linear.default, (x, packed, 16), {"experts": experts})
    given = {"experts": experts[:1], "weights": weights[:1].contiguous()}
    torch.library.opcheck(torch.ops.fast.bf16_linear.default, (x[:2], packed, 16), given)


def test_a_weight_of_another_size_is_refused():
    packed = pack(Int8Linear.from_float(normal(40, 64)))
    with pytest.raises(RuntimeError, match="the weight has 3264 bytes, not 6336"):
        torch.ops.fast.int8_linear(normal(1, 128).bfloat16(), packed, 40)


def test_a_weight_of_another_type_is_refused():
    with pytest.raises(RuntimeError, match="the weight is BFloat16, not packed in bytes"):
        torch.ops.fast.bf16_linear(normal(1, 64).bfloat16(), normal(40, 64).bfloat16(), 40)


@pytest.mark.parametrize(
    ("surroundings", "message"),
    [
        ({"norm": torch.ones(63).bfloat16()}, "the norm must be bfloat16 [64], contiguous, not BFloat16 [63]"),
        ({"bias": torch.ones(40)}, "the bias must be bfloat16 [40], contiguous, not Float [40]"),
        ({"residual": torch.ones(1, 20).bfloat16()}, "the residual must be bfloat16 [1, 40]"),
        ({"residual": torch.ones(1, 20).bfloat16(), "activation": "silu"}, "with no residual"),
        ({"activation": "relu"}, "the activation is silu or gelu_tanh, not relu"),
        ({"norm": torch.ones(63)}, "the norm must have 64 weights"),
    ],
)
def test_surroundings_that_do_not_fit_are_refused(surroundings, message):
    weight = packing.pack_bf16(normal(40, 64).bfloat16())
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.fast.bf16_linear(normal(1, 64).bfloat16(), weight, 40, **surroundings)


@pytest.mark.parametrize(("n_in", "groupsize"), [(96, 0), (96, 64), (1024, 512), (96, 96)])
def test_groups_that_do_not_fit_are_refused(n_in, groupsize):
    packed = pack(GroupedLinear.from_float(normal(40, n_in), groupsize=32))
    with pytest.raises(RuntimeError, match=f"{n_in} inputs cannot be divided into groups of {groupsize}, which"):
        torch.ops.fast.grouped_linear(normal(1, n_in).bfloat16(), packed, 40, groupsize, AS_OURS)


def test_ctrl_c_before_a_step_begins_is_raised_and_not_shown(monkeypatch):
    shown = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    monkeypatch.setattr(build, "in_a_team", lambda call: ctypes.CFUNCTYPE(None)(interrupt)())
    with pytest.raises(KeyboardInterrupt):
        cpu.in_one_region(lambda: None)()
    assert not shown
    assert sys.unraisablehook == shown.append


def test_asking_for_the_variants_chooses_none():
    best = torch.ops.fast.variants()[0]
    try:
        torch.ops.fast.choose_variant("portable")
        x, weight = normal(1, 64).bfloat16(), packing.pack_bf16(normal(16, 64).bfloat16())
        portable = torch.ops.fast.bf16_linear(x, weight, 16)
        assert torch.ops.fast.variants()[-1] == "portable"
        assert cpu.missing("cpu", torch.bfloat16) is None
        assert torch.ops.fast.bf16_linear(x, weight, 16).equal(portable)
    finally:
        torch.ops.fast.choose_variant(best)


attention_missing = build.load() is not None or torch.ops.fast.variants()[0] != "avx512"
needs_avx512 = pytest.mark.skipif(attention_missing, reason="needs AVX-512 with bf16")


@needs_avx512
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("n_rows", "heads", "kv_heads", "positions", "slots", "head_dim", "window"),
    [
        (1, 8, 2, 1, 5, 64, None),
        (2, 4, 4, 1, 300, 128, None),
        (3, 8, 2, 6, 1500, 64, None),
        (1, 14, 2, 3, 2500, 96, 700),
        (1, 8, 1, 16, 700, 32, 100),
        (2, 8, 4, 1, 300, 48, None),  # head sizes that do not fill registers
        (1, 4, 4, 2, 600, 80, None),
        (1, 6, 2, 5, 700, 100, 300),
        (2, 4, 1, 4, 40, 120, None),
        (1, 3, 1, 1, 20, 7, None),
        (1, 4, 1, 3, 600, 256, 512),
    ],
)
def test_attention(n_rows, heads, kv_heads, positions, slots, head_dim, window, threads, kv_dtype):
    """Rows of different lengths, over views of a larger cache whose unused slots are NaN."""
    cache = QuantizedKVCache((n_rows + 1, kv_heads, slots + 3, head_dim), "cpu", kv_dtype)
    keys = normal(n_rows + 1, kv_heads, slots, head_dim)
    cache.write(torch.arange(slots).expand(n_rows + 1, -1), keys.bfloat16(), keys.flip(2).bfloat16())
    for tensor in cache.buffers():
        tensor[:, :, slots:] = torch.nan if tensor.is_floating_point() else 127
    k, v, *scales = stored = cache.stored(n_rows, slots)
    if scales:
        k, v = (x * scale[..., None] for x, scale in zip((k, v), scales, strict=True))
    q = 3 * normal(n_rows, positions, heads, head_dim).bfloat16().transpose(1, 2)
    ends = torch.tensor([slots, slots // 2, positions][:n_rows])
    at = ends[:, None] - positions + torch.arange(positions)
    mask = torch.arange(slots) <= at[:, None, :, None]
    if window:
        mask &= torch.arange(slots) > at[:, None, :, None] - window
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, enable_gqa=True)
    torch.set_num_threads(threads)
    try:
        assert close(torch.ops.fast.decode_attention(q, *stored[:2], at, window or 0, *scales), expected)
    finally:
        torch.set_num_threads(1)


@needs_avx512
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_attention_does_not_turn_nan_into_numbers(bad, kv_dtype):
    for place in range(3):
        q, k, v = (normal(1, n, s, 48).bfloat16() for n, s in ((4, 2), (2, 600), (2, 600)))
        (q, k, v)[place][0, 1, 1, 5] = bad  # query head 1 belongs to key head 0, key head 1 to query heads 2 and 3
        cache = QuantizedKVCache((1, 2, 600, 48), "cpu", kv_dtype)
        cache.write(torch.arange(600)[None], k, v)
        keys, values, *scales = cache.stored(1, 600)
        y = torch.ops.fast.decode_attention(q, keys, values, torch.tensor([[598, 599]]), 0, *scales)
        finite = [bool(y[0, head].isfinite().all()) for head in range(4)]
        assert finite == ([True, False, True, True] if place == 0 else [True, True, False, False])


@needs_avx512
def test_attention_keeps_pytorchs_rules():
    q, cache, positions = normal(1, 4, 1, 32).bfloat16(), normal(1, 2, 40, 32).bfloat16(), torch.tensor([[32]])
    torch.library.opcheck(torch.ops.fast.decode_attention.default, (q, cache[:, :, :33], cache[:, :, :33], positions))
    with pytest.raises(RuntimeError, match="positions must be int64"):
        torch.ops.fast.decode_attention(q, cache, cache, positions[0])
    with pytest.raises(RuntimeError, match="int8 keys and values need scales"):
        torch.ops.fast.decode_attention(q, cache.char(), cache.char(), positions)


@needs_avx512
@pytest.mark.parametrize(("compiled", "kv_dtype"), [(False, None), (True, None), (True, torch.int8)])
def test_the_model_attends_with_the_kernel(tiny, compiled, kv_dtype):
    """A step over a cache that the same step writes; the reference is the model without the kernel."""
    model = load_model(tiny("llama-head-dim")[1], device="cpu", dtype=torch.bfloat16)
    model.setup_caches(2, 64, kv_dtype=kv_dtype)
    model(torch.arange(80).view(2, 40), torch.arange(40))
    step = torch.compile(model, fullgraph=True) if compiled else model
    tokens, positions = torch.tensor([[3], [5]]), torch.tensor([[40], [17]])
    y = step(tokens, positions, model.slots[:48])
    for layer in model.layers:
        assert layer.attention.kv_cache.kernel.operator is torch.ops.fast.decode_attention
        layer.attention.kv_cache.kernel = None
    expected = model(tokens, positions, model.slots[:48])
    assert float((y - expected).float().norm() / expected.float().norm()) < 0.02


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@needs_avx512
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", ["llama-head-dim", "qwen3-moe-mixed"])
def test_a_team_decodes_the_same(tiny, two_threads, monkeypatch, family, compiled):
    model = load_model(tiny(family)[1], device="cpu", dtype=torch.bfloat16)
    model.setup_caches(2, 64)
    region = build_steps(model, Sampling(temperature=0), compiled)
    monkeypatch.setattr("fast.decoding.in_one_region", lambda model, step: step)
    alone = build_steps(model, Sampling(temperature=0), compiled)
    assert region.decode.__qualname__.startswith("in_one_region")
    texts = [list(stream(steps, [[3, 4], [5]], 40)) for steps in (alone, region)]
    assert texts[0] == texts[1]


def multiply(x, *weights):
    return [torch.ops.fast.bf16_linear(x, packed, 320) for packed in weights]


def test_prefetched_weights_may_be_freed(two_threads):
    """The weight that the threads prefetch, expecting it next, may be freed, even in the middle of a step."""
    x, weights = normal(1, 320).bfloat16(), [normal(320, 320).bfloat16() for _ in range(6)]
    expected = [x.float() @ weight.float().T for weight in weights]

    def step(packed: list[torch.Tensor]) -> list[torch.Tensor]:
        return [multiply(x, packed.pop(0))[0] for _ in range(len(packed))]

    for n in (6, 6, 2, 5, 6):
        packed = [packing.pack_bf16(weight) for weight in weights]
        packing._mapping = None  # or weights packed later would share it and keep it alive
        results = cpu.in_one_region(step)(packed[:n])
        assert all(close(y, reference) for y, reference in zip(results, expected[:n], strict=True))


def test_many_rows_in_a_team(variant, two_threads):
    """Without AVX-512 PyTorch multiplies them, which in a team lost the part of the second thread."""
    x, weight = normal(40, 320).bfloat16(), normal(320, 320).bfloat16()
    (y,) = cpu.in_one_region(multiply)(x, packing.pack_bf16(weight))
    assert close(y, x.float() @ weight.float().T)
    assert torch.get_num_threads() == 2


def test_a_team_inside_a_team_and_beside_another(two_threads):
    x, weights = normal(3, 320).bfloat16(), [packing.pack_bf16(normal(320, 320).bfloat16()) for _ in range(4)]
    expected = multiply(x, *weights)
    team = cpu.in_one_region(lambda: [cpu.in_one_region(multiply)(x, *weights) for _ in range(50)])
    with ThreadPoolExecutor(2) as pool:
        found = [
            f.result() for f in [pool.submit(team), pool.submit(team), pool.submit(lambda: [multiply(x, *weights)])]
        ]
    assert all(torch.equal(a, b) for results in found for ys in results for a, b in zip(ys, expected, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_the_leader_does_not_wait_for_threads_that_do_not_run(two_threads):
    """A busy machine may stop any thread. In a forked process the leader is the only thread there is."""
    x, packed = normal(3, 320).bfloat16(), packing.pack_bf16(normal(320, 320).bfloat16())
    step = cpu.in_one_region(lambda: [multiply(x, packed)[0] for _ in range(50)])
    expected = step()
    if (child := os.fork()) == 0:
        os._exit(0 if all(map(torch.equal, step(), expected)) else 1)
    for _ in range(200):
        if (ended := os.waitpid(child, os.WNOHANG))[0]:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)
    assert ended == (child, 0)


def test_idle_threads_sleep(two_threads):
    x, packed = normal(1, 320).bfloat16(), packing.pack_bf16(normal(320, 320).bfloat16())

    def step() -> float:
        multiply(x, packed)
        start = time.process_time()
        time.sleep(0.5)
        used = time.process_time() - start
        multiply(x, packed)
        return used

    assert cpu.in_one_region(step)() < 0.25


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_leaves_the_team(two_threads, error):
    def step():
        multiply(normal(1, 320).bfloat16(), packing.pack_bf16(normal(320, 320).bfloat16()))
        raise error

    for _ in range(2):
        with pytest.raises(type(error)) as raised:
            cpu.in_one_region(step)()
        assert raised.value is error
    assert cpu.in_one_region(lambda *args: args)(1, "a") == (1, "a")


def load_in_a_process(folder: Path, **environment: str) -> str:
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), **environment}
    command = [sys.executable, "-c", "from kernels.cpu import build; print(build.load())"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_without_a_compiler_it_says_so(tmp_path):
    found = load_in_a_process(tmp_path, CXX="no-such-compiler")
    assert found.startswith("the CPU's kernels cannot be built, so plain PyTorch computes, more slowly: ")
    assert found.endswith("no C++ compiler (no-such-compiler) is installed")
    assert not list(tmp_path.iterdir())


def test_a_failed_build_is_remembered_for_that_compiler(tmp_path):
    compiler, calls = tmp_path / "c++", tmp_path / "calls"

    def load(complaint: str) -> str:
        takes_c20 = 'case "$*" in *-fsyntax-only*) exit 0; esac'
        compiler.write_text(f"#!/bin/sh\n{takes_c20}\necho x >> {calls}\necho '{complaint}' >&2\nexit 1\n")
        compiler.chmod(0o755)
        os.utime(compiler, (0, len(complaint)))
        return load_in_a_process(tmp_path / "built", CXX=str(compiler))

    complaint = "products.cpp:1: error: out of patience"
    assert load(complaint).endswith(f"more slowly: {complaint}")
    (kept,) = (tmp_path / "built").iterdir()
    n = len(calls.read_text())
    assert load(complaint).endswith(f"more slowly: {complaint} (delete {kept} to try again)")
    assert len(calls.read_text()) == n
    assert load("error: Killed").endswith("more slowly: error: Killed")  # another compiler; no fault of the source
    assert len(calls.read_text()) > n
    assert list((tmp_path / "built").iterdir()) == [kept]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be built" in load_in_a_process(tmp_path / "file")
