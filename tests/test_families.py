"""families.py: what configuration files mean, against transformers; a family added in one place.

python -m pytest tests/test_families.py
"""

import dataclasses
import json
import math

import pytest
import torch
from conftest import FAMILIES as TINY_FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fast.checkpoint import load_model
from fast.config import rope_factors
from fast.families import FAMILIES, HF_MODULES, Family, Naming, args_from_hf, hf_weights
from model import RopeScaling, Transformer
from scripts.bench.presets import preset

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
    "gemma-3-1b": {
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": None,
        "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768,
        "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
        "vocab_size": 262144,
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
    assert args_from_hf(HUB_CONFIGS[name]) == preset(name)


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
@pytest.mark.parametrize("family", [name for name in TINY_FAMILIES if name not in ("mistral3", "gemma3-vision")])
def test_hub_form_equals_transformers_5_form(tiny, read_config, family, type_key):
    new = read_config(tiny(family)[1])
    assert "rope_parameters" in new
    assert "dtype" in new
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    if family in ("ministral", "granite-4", "granite-4-nope"):
        old["layer_types"] = new["layer_types"]
    rope = dict(new["rope_parameters"])
    if family == "gemma3":
        old |= {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"], "sliding_window_pattern": 2}
        rope = dict(rope["full_attention"])
    old |= {"torch_dtype": new["dtype"], "rope_theta": rope.pop("rope_theta")}
    old["rope_scaling"] = None if rope["rope_type"] == "default" else {type_key: rope.pop("rope_type"), **rope}
    assert args_from_hf(old) == args_from_hf(new)
    del old["architectures"]  # then the model_type says it
    assert args_from_hf(old) == args_from_hf(new)


def test_nemo_keeps_its_head_dim():
    nemo = {**HUB_CONFIGS["mistral-7b"], "hidden_size": 5120, "head_dim": 128, "sliding_window": None}
    args = args_from_hf(nemo)
    assert (args.head_dim, args.sliding_window) == (128, None)


@pytest.mark.parametrize("name", [n for n in FAMILIES if not n.startswith(("Mistral3", "GraniteMoeHybrid", "Gemma3"))])
def test_absent_fields_are_what_transformers_assumes(name):
    given = {"hidden_size": 1280, "intermediate_size": 96, "num_hidden_layers": 30, "num_attention_heads": 160}
    hf = AutoConfig.for_model(FAMILIES[name].model_type, **given, vocab_size=128, pad_token_id=0)
    args = args_from_hf({**given, "vocab_size": 128, "architectures": [name]})
    assert args.n_kv_heads == hf.num_key_value_heads
    assert args.head_dim == (getattr(hf, "head_dim", None) or 1280 // 160)
    assert (args.context_length, args.norm_eps) == (hf.max_position_embeddings, hf.rms_norm_eps)
    assert args.rope_theta == hf.rope_parameters["rope_theta"]
    assert args.sliding_window == getattr(hf, "sliding_window", None)
    assert args.tie_embeddings == hf.tie_word_embeddings
    is_qwen2 = name == "Qwen2ForCausalLM"  # which has biases whatever its configuration says
    assert args.qkv_bias == (is_qwen2 or getattr(hf, "attention_bias", False) or getattr(hf, "use_bias", False))
    assert args.attention_scale == getattr(hf, "attention_multiplier", None)
    if args.n_experts:
        assert (args.n_experts, args.experts_per_token) == (hf.num_local_experts, hf.num_experts_per_tok)
        assert args.expert_dim == getattr(hf, "moe_intermediate_size", hf.intermediate_size)
        assert (args.norm_expert_weights, args.dense_layers) == (getattr(hf, "norm_topk_prob", True), ())
    rotated = getattr(hf, "no_rope_layers", [1] * 30)
    assert args.unrotated_layers == tuple(i for i in range(30) if not rotated[i])
    if "use_sliding_window" in hf.to_dict():
        hf = AutoConfig.for_model(hf.model_type, **given, use_sliding_window=True, sliding_window=7, pad_token_id=0)
        settings = {"use_sliding_window": True, "sliding_window": 7}
        args = args_from_hf({**given, "vocab_size": 128, "architectures": [name], **settings})
        types = getattr(hf, "layer_types", None)  # without, all layers are alike
        slides = types and tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
        assert (args.sliding_window, args.sliding_layers) == (7, slides)


def test_a_sparse_gemma_has_what_transformers_assumes():
    """As the hub's models that see describe their language model."""
    given = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    given["rope_scaling"] = {"factor": 8.0, "rope_type": "linear"}
    hf, text = AutoConfig.for_model("gemma3_text", **given), {**given, "model_type": "gemma3_text"}
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "torch_dtype": "bfloat16"}
    args = args_from_hf({**outer, "text_config": text})
    assert (args.n_heads, args.n_kv_heads) == (hf.num_attention_heads, hf.num_key_value_heads)
    assert args.head_dim == hf.head_dim
    assert (args.vocab_size, args.context_length) == (hf.vocab_size, hf.max_position_embeddings)
    assert (args.norm_eps, args.tie_embeddings) == (hf.rms_norm_eps, hf.tie_word_embeddings)
    assert args.attention_scale == hf.query_pre_attn_scalar**-0.5
    assert args.embedding_scale == 50.5  # the square root of 2560 in bfloat16
    exact = args_from_hf({**outer, "torch_dtype": "float32", "text_config": text})
    assert exact.embedding_scale == pytest.approx(2560**0.5)
    assert args.sliding_layers == tuple(i for i, kind in enumerate(hf.layer_types) if kind == "sliding_attention")
    full, sliding = hf.rope_parameters["full_attention"], hf.rope_parameters["sliding_attention"]
    assert (args.rope_theta, args.sliding_rope_theta) == (full["rope_theta"], sliding["rope_theta"])
    assert args.rope_scaling == RopeScaling((8.0,) * (args.head_dim // 2))


def test_rope_that_is_given_for_each_type_of_layer():
    types = {"layer_types": ["full_attention", "sliding_attention"] * 11}
    plain = {"rope_type": "default", "rope_theta": 5.0}
    linear = {**plain, "rope_type": "linear", "factor": 2.0}

    def found(**of_types) -> tuple:
        args = args_from_hf({**TINYLLAMA, **types, "rope_parameters": of_types})
        return args.rope_theta, args.rope_scaling, args.sliding_rope_theta

    scaling = RopeScaling((2.0,) * 32)
    assert found(full_attention=linear, sliding_attention=linear) == (5.0, scaling, None)
    assert found(full_attention=linear, sliding_attention=plain) == (5.0, scaling, 5.0)
    assert found(full_attention=plain, sliding_attention=plain) == (5.0, None, None)
    assert found(full_attention=plain, sliding_attention={**plain, "rope_theta": 7.0}) == (5.0, None, 7.0)


def test_a_gemma_without_a_window_keeps_its_two_ropes(tiny, read_config):
    args = args_from_hf({**read_config(tiny("gemma3")[1]), "sliding_window": None})
    layers = [args.of_layer(i) for i in range(2)]
    assert [(layer.sliding_window, layer.rope_theta) for layer in layers] == [(None, 100.0), (None, 10000.0)]


def test_llama_has_no_sliding_window():
    assert args_from_hf({**TINYLLAMA, "sliding_window": 4096}).sliding_window is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "'GemmaForCausalLM' is not supported; supported: LlamaForCausalLM, "),
        ({"architectures": None}, "architecture 'None' is not supported"),
        ({"architectures": "Other"}, "architecture 'Other' is not supported"),
        ({"architectures": None, "model_type": "gemma4"}, "architecture 'gemma4' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: .*silu"),
        ({"hidden_act": {}}, "hidden_act {} is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope type 'dynamic' is not supported; .*, yarn"),
        ({"architectures": {"a": 1}}, "architectures is {'a': 1}; expected a list or a text"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures.0 is .*; expected a text"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; expected an object"),
        ({"rope_scaling": []}, r"rope_scaling is \[\]; expected an object"),
        ({"rope_scaling": {"type": "linear", "factor": {"x": 4.0}}}, "factor is {'x': 4.0}; expected a number above 0"),
        ({"rope_scaling": {"type": "yarn", "factor": 1e308}}, "factor is 1e.308; expected a number above 0, up to"),
        ({"rope_scaling": {"type": 0}}, "rope type 0 is not supported"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "low_freq_factor 4.0 is not less than high_freq_factor 4.0",
        ),
        ({"layer_types": 5, "rope_parameters": {"full_attention": {}}}, "layer_types is 5; expected a list"),
        ({"hidden_size": 10**20}, "hidden_size is 1000.*; expected a whole number above 0, up to"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000.*; expected a number above 0, up to"),
        ({"rope_scaling": {"type": "linear"}}, "it has no factor"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor is '4'; expected a number above 0"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "it has no low_freq_factor"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "short_factor is None; expected a list"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "short_factor is 1 numbers; expected 32"),
        (
            {
                "layer_types": ["full_attention", "sliding_attention"] * 11,
                "rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "yarn"}},
            },
            "RoPE of type 'yarn' is not supported in layers with a sliding window",
        ),
        (
            {"layer_types": ["sliding_attention"] * 22, "rope_parameters": {"full_attention": {}}},
            "rope_parameters for sliding_attention is None; expected an object",
        ),
        ({"rope_theta": 0.5}, "rope_theta is 0.5; expected a number above 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25 is not supported"),
        ({"layer_types": ["full_attention"]}, "layer_types is .*; expected a list of 22, one per layer"),
        ({"layer_types": ["chunked_attention"] * 22}, "layers of type 'chunked_attention' are not supported"),
        ({"hidden_size": None}, "it has no hidden_size"),
        ({"hidden_size": 64.5}, "hidden_size is 64.5; expected a whole number above 0"),
        ({"head_dim": 0}, "head_dim is 0; expected a whole number above 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a number above 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; expected true or false"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1; expected a whole number above 0"),
        ({"num_key_value_heads": 5}, "n_heads 32 must be a multiple of n_kv_heads 5"),
        ({"head_dim": 65}, "head_dim 65 must be even"),
    ],
)
def test_unsupported_config_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        args_from_hf({**TINYLLAMA, **change})


def test_what_is_null_is_absent_except_where_it_means_none():
    assert args_from_hf({**TINYLLAMA, "max_position_embeddings": None}).context_length == 2048
    mistral = {**HUB_CONFIGS["mistral-7b"], "num_key_value_heads": None, "sliding_window": None}
    assert (args_from_hf(mistral).n_kv_heads, args_from_hf(mistral).sliding_window) == (32, None)


def test_names_of_2023_and_settings_that_the_code_ignores():
    assert args_from_hf({**TINYLLAMA, "architectures": ["LLaMAForCausalLM"]}) == args_from_hf(TINYLLAMA)
    for name in ("mistral-7b", "qwen-2.5-7b"):
        assert args_from_hf({**HUB_CONFIGS[name], "attention_bias": True, "mlp_bias": True}) == preset(name)


def test_the_layers_of_a_qwen_that_slide():
    qwen = {**HUB_CONFIGS["qwen-2.5-7b"], "use_sliding_window": True}
    for first, slides in ((28, None), (40, None), (14, tuple(range(14, 28)))):
        assert args_from_hf({**qwen, "max_window_layers": first}).sliding_layers == slides
    assert args_from_hf({**qwen, "max_window_layers": 28}).sliding_window is None
    assert args_from_hf({**qwen, "max_window_layers": 0}).sliding_window == 131072


def test_yarn_promises_the_stretched_length():
    """Qwen's model cards ask for this beside the original length."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    args = args_from_hf({**HUB_CONFIGS["qwen-3-8b"], "rope_scaling": yarn})
    assert args.context_length == 131072
    assert args.rope_scaling.attention_factor == pytest.approx(1.1386294)  # 0.1 ln 4 + 1


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("smollm3", {"no_rope_layers": ["1", "0"]}, "no_rope_layers.0 is '1'; expected a whole number"),
        ("smollm3", {"no_rope_layers": 0}, "no_rope_layers is 0; expected a list"),
        ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers is \[1\]; expected 2 of 1 and 0"),
        ("qwen2-mixed", {"use_sliding_window": "false"}, "use_sliding_window is 'false'; expected true or false"),
        ("qwen2-mixed", {"layer_types": None, "max_window_layers": "1"}, "max_window_layers is '1'; expected a whole"),
        ("phi3", {"sliding_window": 0}, "sliding_window is 0; expected a whole number above 0"),
        ("granite", {"residual_multiplier": 1e-200}, "residual_multiplier is 1e-200; expected a number above 0, up to"),
        ("granite-4", {"position_embedding_type": 5}, "position_embedding_type is 5; expected rope or nope"),
        (
            "gemma3",
            {"hidden_activation": "gelu"},
            "hidden_activation 'gelu' is not supported; supported: silu, swish, ge",
        ),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, which is not supported"),
        ("gemma3", {"rope_local_base_freq": "1e4"}, "rope_local_base_freq is '1e4'; expected a number above 1"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0; expected a number above 0"),
        (
            "gemma3",
            {"layer_types": None, "sliding_window_pattern": "6"},
            "sliding_window_pattern is '6'; expected a who",
        ),
        ("mixtral", {"num_experts_per_tok": 5}, "experts_per_token is 5; expected at most the 4 experts there are"),
        ("mixtral", {"num_local_experts": 1}, "a layer has 1 experts; expected 2 to 4096"),
        ("mixtral", {"num_local_experts": 10**9}, "a layer has 1000000000 experts; expected 2 to 4096"),
        ("qwen3-moe", {"mlp_only_layers": 0}, "mlp_only_layers is 0; expected a list"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0; expected a whole number above 0"),
        ("qwen3-moe", {"mlp_only_layers": 3}, "mlp_only_layers is 3; expected a list"),
        ("qwen3-moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers.0 is '0'; expected a whole number"),
        ("qwen3-moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0; expected a whole number above 0"),
        ("granite-4", {"num_local_experts": ""}, "num_local_experts is ''; expected a whole number above -1"),
    ],
)
def test_a_broken_setting_of_a_family_is_an_error(tiny, read_config, family, change, message):
    with pytest.raises(ValueError, match=message):
        args_from_hf({**read_config(tiny(family)[1]), **change})


def test_a_list_that_is_longer_than_the_model_is_cut(tiny, read_config):
    config = {**read_config(tiny("smollm3")[1]), "no_rope_layers": [1, 0, 0, 0]}
    assert args_from_hf(config).unrotated_layers == (1,)


def test_which_layers_have_experts(tiny, read_config):
    config = {**read_config(tiny("qwen3-moe")[1]), "num_hidden_layers": 6, "decoder_sparse_step": 2}
    args = args_from_hf({**config, "mlp_only_layers": [3, 9]})
    assert args.dense_layers == (0, 2, 3, 4)
    experts = [args.of_layer(i).n_experts for i in range(6)]
    assert experts == [0, 8, 0, 0, 0, 8]


def test_mixtral_does_not_read_what_says_so_for_qwen(tiny, read_config):
    config = read_config(tiny("mixtral")[1])
    assert args_from_hf({**config, "decoder_sparse_step": 7, "mlp_only_layers": [0]}) == args_from_hf(config)


def test_the_hub_and_transformers_5_name_the_number_of_experts_differently(tiny, read_config):
    config = read_config(tiny("qwen3-moe")[1])
    n_experts = config.pop("num_local_experts")
    assert args_from_hf({**config, "num_experts": n_experts}).n_experts == 8
    assert args_from_hf(config).n_experts == 128  # the default


def test_rope_scaling_goes_before_rope_parameters():
    """Someone has added it, as model cards say, to what transformers 5 wrote; the base of the latter stays."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    written = {"rope_type": "default", "rope_theta": 1e6}
    scaling = RopeScaling(rope_factors("yarn", 4.0, 1e6, 128, 1.0, 32.0, 32768), 0.1 * math.log(4) + 1)
    for added in (yarn, {"type": yarn["rope_type"], **{key: yarn[key] for key in yarn if key != "rope_type"}}):
        args = args_from_hf({**HUB_CONFIGS["qwen-3-8b"], "rope_parameters": written, "rope_scaling": added})
        assert (args.rope_scaling, args.rope_theta, args.context_length) == (scaling, 1e6, 131072)


def test_smollm3_slides_where_it_does_not_rotate(tiny, read_config):
    """The hub's configuration has a key of Qwen's, which its code does not read."""
    config = {**read_config(tiny("smollm3")[1]), "use_sliding_window": True, "sliding_window": 5}
    del config["layer_types"]
    args = args_from_hf({**config, "max_window_layers": 28})
    assert (args.sliding_window, args.sliding_layers, args.unrotated_layers) == (5, (1,), (1,))


def test_a_language_model_of_another_kind_inside_one_that_sees_is_an_error(tiny, read_config):
    config = read_config(tiny("mistral3")[1])
    with pytest.raises(ValueError, match="text_config of 'ministral3' is not supported; supported: mistral"):
        args_from_hf({**config, "text_config": {**config["text_config"], "model_type": "ministral3"}})
    with pytest.raises(ValueError, match="text_config of None"):
        args_from_hf({**config, "text_config": None})


@pytest.mark.parametrize("change", [{"num_local_experts": 4}, {"num_local_experts": None}, {"layer_types": None}])
def test_a_granite_with_experts_or_without_attention_is_an_error(tiny, read_config, change):
    with pytest.raises(ValueError, match="layers with experts .* or without attention are not supported"):
        args_from_hf({**read_config(tiny("granite-4")[1]), **change})


def test_a_family_is_added_in_one_place(tiny, read_config, tmp_path, monkeypatch):
    """As in docs/extending.md: like Llama, with other names, other defaults, and biases that no config.json has."""

    def renamed(name: str) -> str:
        return name.replace("self_attn", "attn").replace("lm_head", "unembed")

    assumed = {"rms_norm_eps": 1e-5, "max_position_embeddings": 128}
    names = {ours: tuple(map(renamed, theirs)) for ours, theirs in HF_MODULES.items()}
    tulip = Family("tulip", assumed, fixed={"qkv_bias": True, "out_bias": True}, naming=Naming(names))
    monkeypatch.setitem(FAMILIES, "TulipForCausalLM", tulip)
    hf, directory = tiny("llama-bias")
    config = {**read_config(directory), "architectures": ["TulipForCausalLM"]}
    for key in (*assumed, "attention_bias"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(directory / "model.safetensors")
    save_file({renamed(name): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    idx = torch.arange(20)[None]
    assert torch.allclose(load_model(tmp_path, dtype=torch.float32)(idx), hf(idx).logits, rtol=1e-4, atol=1e-4)


def test_neighbours_are_reordered_in_norms_of_heads_too(tiny, read_config, tmp_path, monkeypatch):
    """A made-up family: as Qwen 3, with RoPE that rotates neighbours."""
    hf, directory = tiny("qwen3")
    qwen = FAMILIES["Qwen3ForCausalLM"]
    family = dataclasses.replace(qwen, naming=Naming(HF_MODULES, pairs="neighbours"))
    monkeypatch.setitem(FAMILIES, "Qwen3ForCausalLM", family)
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if any(part in name for part in ("q_proj", "k_proj", "q_norm", "k_norm")):
            heads = tensor.unflatten(0, (-1, 2, 16))  # [heads, halves, pairs, ...]
            tensors[name] = heads.transpose(1, 2).flatten(0, 2).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(read_config(directory)))
    idx = torch.arange(20)[None]
    assert torch.allclose(load_model(tmp_path, dtype=torch.float32)(idx), hf(idx).logits, rtol=1e-4, atol=1e-4)


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-bias", "mistral", "qwen2", "qwen3"])
def test_weights_go_back_under_their_names(tiny, read_config, family):
    hf, directory = tiny(family)
    model = Transformer(args_from_hf(read_config(directory))).requires_grad_(False)
    for parameter in model.parameters():
        parameter.uniform_(0.5, 1)
    again = AutoModelForCausalLM.from_config(hf.config).float().eval()
    weights = hf_weights(model)
    assert again.load_state_dict(weights, strict=False).missing_keys == ["lm_head.weight"] * (family == "llama-tied")
    assert weights.keys() <= again.state_dict().keys()
    idx = torch.arange(20)[None]
    assert torch.allclose(again(idx).logits, model(idx), rtol=1e-4, atol=1e-4)
