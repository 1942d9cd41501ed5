"""model.py against Hugging Face transformers, and its cache against itself.

    python -m pytest tests/test_model.py

Worth knowing: everything is compared in float32, where a wrong term shows and rounding does not.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES
from transformers import AutoConfig

from fast.checkpoint import load_model
from model import KV_DTYPES, PRESETS, KVCache, ModelArgs, RopeScaling, Transformer, quantize_kv

LENGTH = 24  # longer than the sliding windows


@pytest.fixture
def idx():
    return torch.randint(0, 128, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def load(tiny):
    """Our own model, in float32, with a fresh cache."""

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
    ],
)
def test_the_comparison_sees_each_setting(load, idx, family, without):
    model = load(family)
    other = Transformer(dataclasses.replace(model.args, **without))
    other.load_state_dict(model.state_dict())
    with pytest.raises(AssertionError):
        assert_equal_logits(other(idx), model(idx))


def test_bfloat16_is_as_close_as_bfloat16_can_be(tiny, idx):
    hf, directory = tiny("llama")
    exact, ours = hf(idx).logits, load_model(directory, dtype=torch.bfloat16)(idx).float()
    assert (ours - exact).norm() / exact.norm() < 0.03


# --- config.json ----------------------------------------------------------------------------------------------------

TINYLLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632,
    "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float32",
    "vocab_size": 32000,
}  # fmt: skip
HUB_CONFIGS = {
    "tinyllama-1.1b": TINYLLAMA,
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 128256,
    },
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "qwen-2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
        "max_position_embeddings": 32768, "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 152064,
    },
    "qwen-3-8b": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36,
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
        "use_sliding_window": False, "vocab_size": 151936,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_hub_config_gives_the_preset(name):
    assert ModelArgs.from_hf(HUB_CONFIGS[name]) == ModelArgs.from_name(name)


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hub_form_equals_transformers_5_form(tiny, read_config, family, type_key):
    new = read_config(tiny(family)[1])
    assert "rope_parameters" in new
    assert "dtype" in new
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    rope = dict(new["rope_parameters"])
    old |= {"torch_dtype": new["dtype"], "rope_theta": rope.pop("rope_theta")}
    old["rope_scaling"] = None if rope["rope_type"] == "default" else {type_key: rope.pop("rope_type"), **rope}
    assert ModelArgs.from_hf(old) == ModelArgs.from_hf(new)


def test_nemo_keeps_its_head_dim():
    nemo = {**HUB_CONFIGS["mistral-7b"], "hidden_size": 5120, "head_dim": 128, "sliding_window": None}
    args = ModelArgs.from_hf(nemo)
    assert (args.head_dim, args.sliding_window) == (128, None)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_absent_fields_are_what_transformers_assumes(model_type):
    given = {"hidden_size": 512, "intermediate_size": 96, "num_hidden_layers": 30, "num_attention_heads": 64}
    hf = AutoConfig.for_model(model_type, **given, vocab_size=128)
    name = model_type.capitalize() + "ForCausalLM"
    args = ModelArgs.from_hf({**given, "vocab_size": 128, "architectures": [name]})
    assert args.n_kv_heads == hf.num_key_value_heads
    assert args.head_dim == (getattr(hf, "head_dim", None) or 512 // 64)
    assert (args.context_length, args.norm_eps) == (hf.max_position_embeddings, hf.rms_norm_eps)
    assert args.rope_theta == hf.rope_parameters["rope_theta"]
    assert args.sliding_window == getattr(hf, "sliding_window", None)
    assert args.tie_embeddings == hf.tie_word_embeddings
    if model_type.startswith("qwen"):
        with pytest.raises(ValueError, match="several attention types"):  # the last 2 of 30 layers slide
            ModelArgs.from_hf({**given, "vocab_size": 128, "architectures": [name], "use_sliding_window": True})


def test_llama_has_no_sliding_window():
    assert ModelArgs.from_hf({**TINYLLAMA, "sliding_window": 4096}).sliding_window is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "'GemmaForCausalLM' is not supported; supported: LlamaForCausalLM, "),
        ({"architectures": None}, "architecture None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: .*silu"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported; .*linear, llama3"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25 is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config .*gptq.* is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "several attention types .* are not supported"),
        ({"layer_types": ["chunked_attention"]}, "attention types .*chunked_attention.* are not supported"),
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"num_key_value_heads": 5}, "n_heads 32 must be a multiple of n_kv_heads 5"),
        ({"head_dim": 65}, "head_dim 65 must be even"),
    ],
)
def test_unsupported_config_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        ModelArgs.from_hf({**TINYLLAMA, **change})


def test_qwen_that_slides_in_some_layers_is_an_error():
    mixed = {**HUB_CONFIGS["qwen-2.5-7b"], "use_sliding_window": True, "max_window_layers": 14}
    with pytest.raises(ValueError, match="several attention types"):
        ModelArgs.from_hf(mixed)
    assert ModelArgs.from_hf({**mixed, "max_window_layers": 28}).sliding_window is None
    assert ModelArgs.from_hf({**mixed, "max_window_layers": 0}).sliding_window == 131072


def test_from_dict_inverts_asdict():
    for args in PRESETS.values():
        assert ModelArgs.from_dict(dataclasses.asdict(args)) == args
    config = dataclasses.asdict(PRESETS["llama-3.2-1b"])
    assert ModelArgs.from_dict(config).rope_scaling == RopeScaling("llama3", 32.0)
    del config["dim"]
    with pytest.raises(ValueError, match=r"unknown fields \['width'\], missing fields \['dim'\]"):
        ModelArgs.from_dict({**config, "width": 1})


# --- presets --------------------------------------------------------------------------------------------------------

PUBLISHED_PARAMETERS = {
    "stories-15m": 15_191_712,
    "tinyllama-1.1b": 1_100_048_384,
    "open-llama-7b": 6_738_415_616,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "codellama-7b": 6_738_546_688,
    "codellama-34b": 33_743_970_304,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen-2.5-7b": 7_615_616_512,
    "qwen-3-8b": 8_190_735_360,
}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_preset_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = Transformer(ModelArgs.from_name(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_PARAMETERS[name]


def test_preset_names_are_exact():
    assert set(PRESETS) == set(PUBLISHED_PARAMETERS)
    for near_miss in ("llama-2", "LLAMA-2-7B", "llama-2-7b-chat", ""):
        with pytest.raises(ValueError, match="choose from: stories-15m, .*, qwen-3-8b"):
            ModelArgs.from_name(near_miss)


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[LENGTH], [7, LENGTH - 7], [7] + [1] * (LENGTH - 7), [1] * LENGTH])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen3"])
def test_cached_equals_recomputed(load, idx, family, pieces):
    model, positions = load(family), torch.arange(LENGTH)
    outputs = [model(i, p) for i, p in zip(idx.split(pieces, 1), positions.split(pieces), strict=True)]
    assert_equal_logits(torch.cat(outputs, 1), model(idx), 1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen3"])
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


def test_kv_pos_may_hold_more_slots_than_are_valid(load, idx):
    model = load("llama")
    model(idx[:, :9], torch.arange(9))
    exact = model(idx[:, 9:10], torch.tensor([9]))
    assert_equal_logits(model(idx[:, 9:10], torch.tensor([9]), kv_pos=model.slots[:32]), exact, 1e-5)


@pytest.mark.parametrize(
    ("rows", "positions", "message"),
    [
        (2, torch.arange(62, 66), "positions 62 to 65 do not fit the cache, whose capacity is 64"),
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
    layer = load("llama").layers[0]
    attention, norm = layer.attention, layer.attention_norm
    cache = attention.kv_cache = KVCache((3, attention.n_kv_heads, 40, attention.head_dim), "cpu", kv_dtype)
    x, full = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0)), torch.ones(2, 1, 8)
    cache.write(torch.arange(30).expand(3, 30), *torch.randn(2, 3, attention.n_kv_heads, 30, attention.head_dim))
    mask = torch.arange(30) <= torch.tensor([[9], [29]])[:, None, :, None]
    y = attention(x, norm, full, 0 * full, torch.tensor([[9], [29]]), 30, mask)  # RoPE by an angle of zero
    k, v, *scales = (t.float() for t in cache.stored(2, 30))
    k, v = k * scales[0][..., None], v * scales[1][..., None]
    q = attention.wqkv(norm(x))[..., : attention.qkv_sizes[0]].view(2, attention.n_heads, 1, -1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert_equal_logits(y, x + attention.wo(expected.view(2, 1, -1)), 1e-5)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("family", ["llama", "llama-mha", "mistral-window"])
def test_a_quantized_cache_gives_the_same_at_once_or_token_by_token(load, idx, family, kv_dtype):
    """Near what the float cache gives, not equal to it; a row of its own length in a batch is as it is alone.

    Where a sum's last bit decides which way a value is rounded, a step of the cache shows: hence the bounds.
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


@pytest.mark.parametrize(("rows", "capacity"), [(0, 8), (1, 0), (1, 129)])
def test_a_cache_that_the_model_cannot_use_is_an_error(load, rows, capacity):
    with pytest.raises(ValueError, match="at least 1 row and 1 to 128 positions"):
        load("llama", rows, capacity)
