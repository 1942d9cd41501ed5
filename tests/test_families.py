"""families.py: what configuration files mean, against transformers; the presets; a family added in one place.

python -m pytest tests/test_families.py
"""

import json

import pytest
import torch
from conftest import FAMILIES as TINY_FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fast.checkpoint import load_model
from fast.families import FAMILIES, HF_MODULES, PRESETS, Family, args_from_hf, hf_weights, preset
from model import Transformer

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
    assert args_from_hf(HUB_CONFIGS[name]) == preset(name)


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_hub_form_equals_transformers_5_form(tiny, read_config, family, type_key):
    new = read_config(tiny(family)[1])
    assert "rope_parameters" in new
    assert "dtype" in new
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    rope = dict(new["rope_parameters"])
    old |= {"torch_dtype": new["dtype"], "rope_theta": rope.pop("rope_theta")}
    old["rope_scaling"] = None if rope["rope_type"] == "default" else {type_key: rope.pop("rope_type"), **rope}
    assert args_from_hf(old) == args_from_hf(new)


def test_nemo_keeps_its_head_dim():
    nemo = {**HUB_CONFIGS["mistral-7b"], "hidden_size": 5120, "head_dim": 128, "sliding_window": None}
    args = args_from_hf(nemo)
    assert (args.head_dim, args.sliding_window) == (128, None)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_absent_fields_are_what_transformers_assumes(model_type):
    given = {"hidden_size": 512, "intermediate_size": 96, "num_hidden_layers": 30, "num_attention_heads": 64}
    hf = AutoConfig.for_model(model_type, **given, vocab_size=128)
    name = model_type.capitalize() + "ForCausalLM"
    args = args_from_hf({**given, "vocab_size": 128, "architectures": [name]})
    assert args.n_kv_heads == hf.num_key_value_heads
    assert args.head_dim == (getattr(hf, "head_dim", None) or 512 // 64)
    assert (args.context_length, args.norm_eps) == (hf.max_position_embeddings, hf.rms_norm_eps)
    assert args.rope_theta == hf.rope_parameters["rope_theta"]
    assert args.sliding_window == getattr(hf, "sliding_window", None)
    assert args.tie_embeddings == hf.tie_word_embeddings
    if model_type.startswith("qwen"):
        with pytest.raises(ValueError, match="several attention types"):  # only the last 2 of 30 have a window
            args_from_hf({**given, "vocab_size": 128, "architectures": [name], "use_sliding_window": True})


def test_llama_has_no_sliding_window():
    assert args_from_hf({**TINYLLAMA, "sliding_window": 4096}).sliding_window is None


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
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised already \(gptq\): give the unquantised"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "several attention types .* are not supported"),
        ({"layer_types": ["chunked_attention"]}, "attention types .*chunked_attention.* are not supported"),
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"num_key_value_heads": 5}, "n_heads 32 must be a multiple of n_kv_heads 5"),
        ({"head_dim": 65}, "head_dim 65 must be even"),
    ],
)
def test_unsupported_config_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        args_from_hf({**TINYLLAMA, **change})


def test_qwen_that_slides_in_some_layers_is_an_error():
    mixed = {**HUB_CONFIGS["qwen-2.5-7b"], "use_sliding_window": True, "max_window_layers": 14}
    with pytest.raises(ValueError, match="several attention types"):
        args_from_hf(mixed)
    assert args_from_hf({**mixed, "max_window_layers": 28}).sliding_window is None
    assert args_from_hf({**mixed, "max_window_layers": 0}).sliding_window == 131072


def test_a_family_is_added_in_one_place(tiny, read_config, tmp_path, monkeypatch):
    """As in docs/extending.md: like Llama, with other names, other defaults, and biases that no config.json has."""

    def renamed(name: str) -> str:
        return name.replace("self_attn", "attn").replace("lm_head", "unembed")

    assumed = {"rms_norm_eps": 1e-5, "max_position_embeddings": 128}
    names = {ours: tuple(map(renamed, theirs)) for ours, theirs in HF_MODULES.items()}
    tulip = Family(assumed, fixed={"qkv_bias": True, "out_bias": True}, modules=names)
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
        model = Transformer(preset(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_PARAMETERS[name]


def test_preset_names_are_exact():
    assert set(PRESETS) == set(PUBLISHED_PARAMETERS)
    for near_miss in ("llama-2", "LLAMA-2-7B", "llama-2-7b-chat", ""):
        with pytest.raises(ValueError, match="choose from: stories-15m, .*, qwen-3-8b"):
            preset(near_miss)
