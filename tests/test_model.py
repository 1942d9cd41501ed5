"""model.py against Hugging Face transformers, and its cache against recomputation.

    python -m pytest tests/test_model.py

Worth knowing: most comparisons are in float32, where a wrong term shows and rounding does not.
"""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES

import quantize
from fast import families
from fast.checkpoint import load_model, open_checkpoint
from fast.config import make_args, rope_factors
from fast.quantized import KV_DTYPES, GroupedLinear, QuantizedKVCache, quantize_kv
from model import RopeScaling, Transformer
from scripts.bench.presets import PRESETS

LENGTH = 24  # longer than the sliding windows


@pytest.fixture
def idx():
    return torch.randint(0, 128, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def load(tiny):
    """`load(family, rows, capacity)`: our own model, in float32, with a fresh cache."""

    def make(family: str, rows: int = 2, capacity: int = 64) -> Transformer:
        model = load_model(tiny(family)[1], dtype=torch.float32)
        model.setup_caches(rows, capacity)
        return model

    return make


def assert_equal_logits(ours, theirs, relative=1e-4):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


# --- against transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tiny, load, idx, family):
    assert_equal_logits(load(family)(idx), tiny(family)[0](idx).logits)


@pytest.mark.parametrize(
    ("family", "without"),
    [
        ("llama-linear", {"rope_scaling": None}),
        ("llama-llama3", {"rope_scaling": None}),
        ("llama-theta", {"rope_theta": 10000.0}),
        ("mistral-window", {"sliding_window": None}),
        ("qwen2-window", {"sliding_window": None}),
        ("qwen2-mixed", {"sliding_layers": None}),
        ("ministral", {"sliding_layers": (0,)}),
        ("smollm3", {"unrotated_layers": ()}),
        ("smollm3", {"unrotated_layers": (0,)}),
        # without the attention factor; with truncation
        ("qwen3-yarn", {"rope_scaling": RopeScaling(rope_factors("yarn", 4.0, 1e4, 128, 1.0, 32.0, 32))}),
        ("llama-yarn", {"rope_scaling": RopeScaling(rope_factors("yarn", 4.0, 1e4, 16, 1.0, 32.0, 32), 1.0648)}),
        ("phi3", {"sliding_window": None}),
        ("phi3-long", {"rotary_dim": None, "rope_scaling": None}),
        ("phi3-short", {"rope_scaling": None}),
        ("granite-4", {"attention_scale": None}),
        ("granite", {"attention_scale": None}),
        ("granite", {"embedding_scale": 12.0}),
        ("granite", {"logits_scale": 1.0}),
        ("granite", {"norm_eps": 0.1}),
        ("mixtral", {"norm_expert_weights": False}),
        ("mixtral", {"experts_per_token": 1}),
        ("qwen3-moe", {"norm_expert_weights": True}),
        ("gemma3", {"norm_offset": -1.0}),  # loading has added it to the weights
        ("gemma3", {"activation": "silu"}),
        ("gemma3", {"attention_scale": None}),
        ("gemma3", {"embedding_scale": 1.0}),
        ("gemma3", {"sliding_rope_theta": None}),
        ("gemma3", {"rope_scaling": None}),
        ("gemma3", {"sliding_layers": None}),
    ],
)
def test_the_comparison_sees_each_setting(load, idx, family, without):
    model = load(family)
    same, other = (Transformer(dataclasses.replace(model.args, **{"norm_offset": 0.0, **x})) for x in ({}, without))
    same.load_state_dict(model.state_dict())
    other.load_state_dict(model.state_dict())
    assert_equal_logits(same(idx), model(idx))
    with pytest.raises(AssertionError):
        assert_equal_logits(other(idx), model(idx))


@pytest.mark.parametrize("norm", ["attention_post_norm", "ffn_post_norm"])
def test_the_comparison_sees_each_norm(tiny, load, idx, norm):
    model = load("gemma3")
    setattr(model.layers[1], norm, None)
    with pytest.raises(AssertionError):
        assert_equal_logits(model(idx), tiny("gemma3")[0](idx).logits)


@pytest.mark.parametrize("family", ["ernie", "helium", "phi3-long"])
def test_the_comparison_sees_the_order_of_a_heads_elements(tiny, load, idx, monkeypatch, family):
    monkeypatch.setattr(families, "head_order", lambda args, pairs: None)
    with pytest.raises(AssertionError):
        assert_equal_logits(load(family)(idx), tiny(family)[0](idx).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_int4_logits_equal_transformers_with_the_same_weights(tiny, idx, tmp_path, family):
    """transformers gets the weights that the file stands for."""
    scheme = {"mode": "int4", "groupsize": 32}
    quantize.quantize(open_checkpoint(tiny(family)[1]), scheme, tmp_path / "model.pth", "cpu", None)
    hf = copy.deepcopy(tiny(family)[0])
    linears = [module for module in hf.modules() if isinstance(module, torch.nn.Linear) and module.in_features >= 32]
    weights = [GroupedLinear.from_float(linear.weight, groupsize=32).dequantize(torch.float32) for linear in linears]
    for parameter in hf.parameters():
        parameter.copy_(parameter.bfloat16())
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)  # a tied output projection gets its own
    for name, stacked in tiny(family)[0].named_parameters():
        if ".experts." in name:
            weight = GroupedLinear.from_float(stacked.flatten(0, 1), groupsize=32).dequantize(torch.float32)
            hf.get_parameter(name).copy_(weight.view_as(stacked))
    assert_equal_logits(load_model(tmp_path / "model.pth", dtype=torch.float32)(idx), hf(idx).logits)


def test_bfloat16_is_as_close_as_bfloat16_can_be(tiny, idx):
    hf, directory = tiny("llama")
    exact, ours = hf(idx).logits, load_model(directory, dtype=torch.bfloat16)(idx).float()
    assert (ours - exact).norm() / exact.norm() < 0.03


# --- the configuration ----------------------------------------------------------------------------------------------


def test_make_args_inverts_asdict():
    for args in PRESETS.values():
        assert make_args(dataclasses.asdict(args)) == args


PRESET = dataclasses.asdict(PRESETS["llama-3.2-1b"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 1}, "it has an unknown field 'width'"),
        ({"dim": "2048"}, "dim is '2048'; expected a whole number"),
        ({"dim": True}, "dim is True; expected a whole number"),
        ({"head_dim": 0}, "head_dim is 0; expected a number above 1, up to 10000"),
        ({"norm_eps": -1e-5}, "norm_eps is -1e-05; expected a number above 0, up to 1000"),
        ({"norm_eps": float("nan")}, "norm_eps is nan; expected a number above 0, up to 1000"),
        ({"n_layers": 10**6}, "n_layers is 1000000; expected a number above 0, up to 1000"),
        ({"n_kv_heads": 0}, "n_kv_heads is 0; expected a number above 0, up to 10000"),
        ({"context_length": 2**40}, "context_length is 1099511627776; expected a number above 0, up to 16777216"),
        ({"sliding_layers": 5}, "sliding_layers is 5; expected a tuple or null"),
        ({"sliding_layers": (1, 16)}, r"sliding_layers is \(1, 16\); expected numbers of the 16 layers"),
        ({"rotary_dim": 66}, "rotary_dim is 66; expected at most head_dim, 64"),
        ({"activation": "relu"}, "activation is 'relu'; expected silu or gelu_tanh"),
        ({"n_experts": 8}, "experts_per_token is 0; expected at most the 8 experts there are"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling has an unknown field 'factor'"),
        ({"rope_scaling": {"attention_factor": 8.0}}, "rope_scaling has no factors"),
        ({"rope_scaling": {"factors": (1.0, None)}}, "rope_scaling.factors.1 is None; expected a number"),
        ({"rope_scaling": {"factors": (1.0,)}}, r"rope_scaling has \(1.0,\); expected 32 numbers above 0"),
    ],
)
def test_arguments_that_no_model_has_are_an_error(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make_args(PRESET | change)


def test_arguments_that_are_missing_are_an_error():
    with pytest.raises(ValueError, match="^it has no dim$"):
        make_args({name: value for name, value in PRESET.items() if name != "dim"})


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[LENGTH], [7, LENGTH - 7], [7] + [1] * (LENGTH - 7), [1] * LENGTH])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_equals_recomputed(load, idx, family, pieces):
    model, positions = load(family), torch.arange(LENGTH)
    outputs = [model(i, p) for i, p in zip(idx.split(pieces, 1), positions.split(pieces), strict=True)]
    assert_equal_logits(torch.cat(outputs, 1), model(idx), 1e-5)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "phi3-long"])  # alone, a text is short
def test_ragged_batch_gives_what_each_row_gives_alone(load, idx, family):
    lengths, n_new = torch.tensor([3, 11, 8]), 6
    text = torch.cat((idx, idx[:1].flip(1)))  # [3, LENGTH]
    batch = load(family, rows=3)
    padded = text[:, :11].where(torch.arange(11) < lengths[:, None], 0)
    outputs = [batch(padded, torch.arange(11), logits_at=lengths[:, None] - 1)]
    for step in range(n_new):
        input_pos = lengths[:, None] + step  # [3, 1]
        outputs.append(batch(text.gather(1, input_pos), input_pos))
    for row, length in enumerate(lengths.tolist()):
        alone = load(family)(text[row : row + 1, : length + n_new])
        assert_equal_logits(torch.cat(outputs, 1)[row], alone[0, length - 1 :], 1e-5)


def test_ragged_rows_can_take_several_tokens_at_once(load, idx):
    model = load("llama")
    model(idx[:, :10], torch.arange(10))
    rows = torch.stack((idx[0, 4:8], idx[1, 9:13]))
    output = model(rows, torch.stack((torch.arange(4, 8), torch.arange(9, 13))))
    whole = model(idx)
    assert_equal_logits(output, torch.stack((whole[0, 4:8], whole[1, 9:13])), 1e-5)


def test_logits_at_picks_positions_per_row(load, idx):
    model, at = load("llama"), torch.tensor([[5, 0], [LENGTH - 1, 5]])
    whole = model(idx)
    picked = model(idx, torch.arange(LENGTH), logits_at=at)
    assert_equal_logits(picked, torch.stack([whole[row, at[row]] for row in range(2)]), 1e-5)
    assert_equal_logits(model(idx, logits_at=at), picked, 1e-5)


def test_capacity_and_spare_rows_change_nothing(load, idx):
    small, large = load("llama", 2, LENGTH), load("llama", 3, 128)
    for part, positions in ((idx[:, :-1], torch.arange(LENGTH - 1)), (idx[:, -1:], torch.tensor([LENGTH - 1]))):
        assert torch.equal(small(part, positions), large(part, positions))


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_what_lies_beyond_the_valid_part_is_not_read(load, idx, family):
    model = load(family)
    for layer in model.layers:
        layer.attention.kv_cache.k.fill_(torch.nan)
        layer.attention.kv_cache.v.fill_(torch.nan)
    outputs = [model(idx[:, a:b], torch.arange(a, b)) for a, b in ((0, 6), (6, 10), (10, 11))]
    assert_equal_logits(torch.cat(outputs, 1), model(idx[:, :11]), 1e-5)


def test_attention_reads_the_cache_in_place(load, idx, monkeypatch):
    model, seen = load("llama"), []

    def spy(q, k, v, *args, **kwargs):
        seen.append((q, k, v))
        return attention(q, k, v, *args, **kwargs)

    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model(idx, torch.arange(LENGTH))
    seen.clear()
    model(idx[:, :1], torch.tensor([LENGTH]))
    assert len(seen) == len(model.layers)
    for (_, k, v), layer in zip(seen, model.layers, strict=True):
        cache = layer.attention.kv_cache
        assert k.shape == v.shape == (2, model.args.n_kv_heads, LENGTH + 1, model.args.head_dim)
        assert (k.data_ptr(), v.data_ptr()) == (cache.k.data_ptr(), cache.v.data_ptr())


def test_attention_takes_what_a_gpu_returns(load, idx, monkeypatch):
    """On a GPU, SDPA's result is laid out in memory as `[B, S, H, D]`."""

    def attend(*args, **kwargs):
        return attention(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    model, attention = load("llama"), F.scaled_dot_product_attention
    model(idx[:, :5], torch.arange(5))
    expected = model(idx[:, 5:], torch.arange(5, LENGTH))
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    assert model(idx[:, 5:], torch.arange(5, LENGTH)).equal(expected)


def test_kv_pos_may_hold_more_slots_than_are_valid(load, idx):
    model = load("llama")
    model(idx[:, :9], torch.arange(9))
    exact = model(idx[:, 9:10], torch.tensor([9]))
    assert_equal_logits(model(idx[:, 9:10], torch.tensor([9]), kv_pos=model.slots[:32]), exact, 1e-5)


@pytest.mark.parametrize(
    ("rows", "positions", "message"),
    [
        (2, torch.arange(62, 66), "positions 62 to 65 do not fit the cache of 64 positions"),
        (2, torch.arange(-1, 3), "positions -1 to 2 do not fit the cache"),
        (3, torch.arange(4), "batch of 3 rows, but setup_caches was given max_batch_size=2"),
        (2, torch.tensor([0, 1, 2, 4]), "input_pos must be consecutive along a row"),
        (2, torch.tensor([3, 2, 1, 0]), "input_pos must be consecutive along a row"),
        (2, torch.arange(5), r"input_pos has shape \(5,\); for idx \(2, 4\) use \(4,\) or \(2, 4\)"),
        (2, torch.zeros(3, 4).long(), r"input_pos has shape \(3, 4\)"),
    ],
)
def test_positions_that_do_not_fit_are_an_error(load, rows, positions, message):
    with pytest.raises(ValueError, match=message):
        load("llama")(torch.zeros(rows, 4).long(), positions)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_what_a_quantized_cache_rounds_is_bounded(kv_dtype):
    x = torch.randn(3, 2, 50, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 50)[:, None]
    x[0, 0, 0] = 0
    for vectors in (x, x.bfloat16()):
        q, scales = quantize_kv(vectors, kv_dtype)
        exact, greatest = vectors.float(), vectors.float().abs().amax(-1, keepdim=True)
        error = (q.float() * scales[..., None] - exact).abs()
        bound = greatest / 254 if kv_dtype == torch.int8 else torch.maximum(exact.abs() / 16, greatest / 448 / 1024)
        assert (error <= bound * 1.0001).all()
        assert (error > bound * 0.9).any()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_attention_over_a_quantized_cache_is_that_over_its_values(load, kv_dtype):
    attention = load("llama").layers[0].attention
    cache = attention.kv_cache = QuantizedKVCache((3, attention.n_kv_heads, 40, attention.head_dim), "cpu", kv_dtype)
    x, full = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0)), torch.ones(2, 1, 8)
    cache.write(torch.arange(30).expand(3, 30), *torch.randn(2, 3, attention.n_kv_heads, 30, attention.head_dim))
    mask = torch.arange(30) <= torch.tensor([[9], [29]])[:, None, :, None]
    y = attention(x, full, 0 * full, torch.tensor([[9], [29]]), 30, mask)  # RoPE by an angle of zero
    k, v, *scales = (t.float() for t in cache.stored(2, 30))
    k, v = k * scales[0][..., None], v * scales[1][..., None]
    q = attention.wqkv(x)[..., : attention.n_heads * attention.head_dim].view(2, attention.n_heads, 1, -1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert_equal_logits(y, attention.wo(expected.view(2, 1, -1)), 1e-5)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("family", ["llama", "llama-mha", "mistral-window"])
def test_a_quantized_cache_gives_the_same_at_once_or_token_by_token(load, idx, family, kv_dtype):
    """Close to the float cache, but not equal; a row in a batch of different lengths gives what it gives alone.

    The last bit of a sum may decide which way a cached value is rounded: hence bounds, not equality.
    """
    exact, model = load(family), load(family, 3)
    model.setup_caches(3, 64, kv_dtype=kv_dtype)
    whole = model(idx, torch.arange(LENGTH))
    error = (whole - exact(idx)).norm()
    assert 1e-3 < error / whole.norm() < (0.02 if kv_dtype == torch.int8 else 0.1)
    steps = [model(idx[:, i : i + 1], torch.tensor([i])) for i in range(LENGTH)]
    assert (torch.cat(steps, 1) - whole).norm() < error / 10
    both = model(idx[:, :2], torch.tensor([[5, 6], [17, 18]]))
    alone = model(idx[:1, :2], torch.tensor([5, 6]))
    assert_equal_logits(both[:1], alone, 1e-3)


def test_input_pos_without_a_cache_is_an_error(tiny, idx):
    with pytest.raises(ValueError, match="call setup_caches"):
        load_model(tiny("llama")[1])(idx, torch.arange(LENGTH))


@pytest.mark.parametrize(("rows", "capacity"), [(0, 8), (1, 0)])
def test_an_empty_cache_is_an_error(load, rows, capacity):
    with pytest.raises(ValueError, match=f"a cache of {rows} x {capacity} positions: it needs at least 1 x 1"):
        load("llama", rows, capacity)
