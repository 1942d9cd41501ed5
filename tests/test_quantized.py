"""The quantised Linears: rounding, the stored form, products, swapping.

python -m pytest tests/test_quantized.py
"""

import re

import pytest
import torch
from conftest import normal, relative_error
from torch import nn

from fast.quantized import (
    GroupedLinear,
    Int8Linear,
    int4_round,
    int4_scales,
    int4_values,
    pack_nibbles,
    swap_linears,
    unpack_nibbles,
)
from model import Linear, Sharding


@pytest.mark.parametrize(("n", "k"), [(1, 2), (3, 64), (17, 96), (64, 250)])
def test_packing_nibbles_is_undone(n, k):
    q = torch.randint(16, (n, k), dtype=torch.uint8)
    packed = pack_nibbles(q)
    assert packed.shape == (n, k // 2)
    assert unpack_nibbles(packed).equal(q)
    assert int(packed[0, 0]) == int(q[0, 0]) + 16 * int(q[0, 1])  # the layout in files


def test_int8_errs_by_less_than_one_percent_and_half_a_step():
    weight = normal(96, 2048) * torch.logspace(-3, 1, 96)[:, None]
    module = Int8Linear.from_float(weight)
    error = module.dequantize(torch.float32) - weight
    assert relative_error(module.dequantize(torch.float32), weight) < 0.01
    assert (error.abs() <= weight.abs().amax(1, keepdim=True) / 127 * 0.5001).all()
    assert module.weight.dtype == torch.int8
    assert int(module.weight.min()) >= -127


@pytest.mark.parametrize(("groupsize", "bound"), [(32, 0.085), (64, 0.095), (128, 0.105), (256, 0.115)])
def test_int4_errs_within_its_bound_and_the_search_lowers_it(groupsize, bound):
    weight = normal(64, 1024) + 0.5
    exact = weight.unflatten(1, (-1, groupsize))
    plain, searched = (GroupedLinear.from_float(weight, groupsize=groupsize, scale_search=s) for s in (False, True))
    centred = (exact - exact.mean(-1, keepdim=True)).norm()
    errors = [(m.dequantize(torch.float32) - weight).norm() / centred for m in (plain, searched)]
    assert errors[0] < bound
    assert errors[1] < 0.97 * errors[0]
    per_group = [(m.dequantize(torch.float32).view_as(exact) - exact).square().sum(-1) for m in (plain, searched)]
    assert (per_group[1] <= per_group[0] * 1.0001).all()  # the search makes no group worse


def test_the_search_weighs_errors_by_importance():
    groups, importance = normal(256, 32), torch.ones(32)
    importance[3] = 1000.0
    error = {}
    for name, weights in {"equal": None, "weighted": importance}.items():
        scales, zeros = int4_scales(groups, True, weights)
        rounded = int4_values(int4_round(groups, scales, zeros), scales[:, None], zeros[:, None])
        error[name] = float((rounded - groups)[:, 3].square().mean())
    assert error["weighted"] < 0.3 * error["equal"]


@pytest.mark.parametrize("value", [0.0, 1.0, -3e-5, 250.0])
@pytest.mark.parametrize("search", [False, True])
def test_constant_weights_stay_what_they_are(value, search):
    weight = torch.full((4, 64), value)
    for module in (Int8Linear.from_float(weight), GroupedLinear.from_float(weight, groupsize=32, scale_search=search)):
        assert torch.allclose(module.dequantize(torch.float32), weight, rtol=0.004, atol=0)


def test_values_that_sixteen_steps_hold_are_exact():
    weight = (torch.randint(16, (8, 64), generator=torch.Generator().manual_seed(1)).float() - 8) * 0.25
    weight[:, [0, 32]], weight[:, [1, 33]] = -2.0, 1.75  # every group spans all 16 steps
    assert GroupedLinear.from_float(weight, groupsize=32).dequantize(torch.float32).equal(weight)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", [{}, {"groupsize": 32}, {"groupsize": 64}])
@pytest.mark.parametrize("shape", [(1, 1, 192), (3, 7, 192)])
def test_a_product_equals_that_of_the_dequantised_weights(bias, scheme, shape):
    weight, b, x = normal(40, 192, seed=1), normal(40, seed=2) if bias else None, normal(*shape, seed=3)
    module = (GroupedLinear if scheme else Int8Linear).from_float(weight, b, **scheme)
    expected = nn.functional.linear(x, module.dequantize(torch.float32), b)
    assert torch.allclose(module(x), expected, rtol=1e-5, atol=1e-4)


def small() -> nn.Module:
    with torch.device("meta"):
        w2 = Linear(160, 8, True, Sharding())
        return nn.ModuleDict({"wo": Linear(96, 8, False, Sharding()), "inner": nn.ModuleDict({"w2": w2})})


def test_swapping_keeps_biases_and_what_is_skipped():
    model = small()
    swap_linears(model, {"mode": "int4", "groupsize": 32, "skip": ["wo"]})
    assert isinstance(model["wo"], nn.Linear)
    assert isinstance(model["inner"]["w2"], GroupedLinear)
    assert model["inner"]["w2"].bias.shape == (8,)
    assert set(model.state_dict()) == {"wo.weight", *(f"inner.w2.{x}" for x in ("weight", "scales", "zeros", "bias"))}


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"mode": "int3"}, "quantisation mode 'int3' is not supported; supported: int8, int4, int4-gptq"),
        (
            {"mode": "int4", "groupsize": 48},
            "quantisation with groupsize 48 is not supported; supported: 16, 32,",
        ),
        ({"mode": "int4"}, "quantisation with groupsize None is not supported"),
        ({"mode": "int4", "groupsize": 64}, "wo has 96 inputs, not a multiple of 64: use --groupsize 16 or 32"),
        ({"mode": "int4", "groupsize": 64, "skip": ["wo"]}, "inner.w2 has 160 inputs, not a multiple of 64: use"),
    ],
)
def test_what_does_not_fit_is_named(scheme, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        swap_linears(small(), scheme)
