"""Model families as data: what their configuration files mean, how they name their tensors, the shapes of known models.

    args = args_from_hf(json.load(open("config.json")))
    args = preset("llama-2-7b")

Adding a family that this Transformer can compute is one entry in `FAMILIES`; `docs/extending.md` shows how.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from model import ModelArgs, RopeScaling, Transformer

# Our module -> the file's modules whose weights (and biases) are stacked in it. `{}` is the layer's number.
HF_MODULES: dict[str, tuple[str, ...]] = {
    "tok_embeddings": ("model.embed_tokens",),
    "layers.{}.attention_norm": ("model.layers.{}.input_layernorm",),
    "layers.{}.attention.wqkv": tuple(f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv"),
    "layers.{}.attention.q_norm": ("model.layers.{}.self_attn.q_norm",),
    "layers.{}.attention.k_norm": ("model.layers.{}.self_attn.k_norm",),
    "layers.{}.attention.wo": ("model.layers.{}.self_attn.o_proj",),
    "layers.{}.ffn_norm": ("model.layers.{}.post_attention_layernorm",),
    "layers.{}.feed_forward.w13": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    "layers.{}.feed_forward.w2": ("model.layers.{}.mlp.down_proj",),
    "norm": ("model.norm",),
    "output": ("lm_head",),
}


def hf_weights(model: Transformer) -> dict[str, Tensor]:
    """The weights and biases of a textbook model under Hugging Face's names, as views; a tied output has no entry."""
    found = {}
    for name, tensor in model.named_parameters():
        module, _, kind = name.rpartition(".")
        layer = next((part for part in module.split(".") if part.isdigit()), "")
        names = HF_MODULES[module.replace(f".{layer}.", ".{}.")]
        parts = tensor.split(model.get_submodule(module).sharding.parts) if len(names) > 1 else [tensor]
        found |= {f"{theirs.format(layer)}.{kind}": part for theirs, part in zip(names, parts, strict=True)}
    return found


@dataclass(frozen=True)
class Family:
    """An architecture of Hugging Face transformers.

    assumed: the defaults of its configuration class, for keys that config.json does not have.
    fixed: fields of `ModelArgs` that its code fixes, whatever config.json says.
    window_switch: the key that must be set for its code to use `sliding_window`; None: it never does.
    modules: the names of its tensors, as `HF_MODULES`.
    """

    assumed: dict[str, Any]
    fixed: dict[str, Any] = field(default_factory=dict)
    window_switch: str | None = None
    modules: dict[str, tuple[str, ...]] = field(default_factory=lambda: HF_MODULES)


_QWEN = {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096,
    "max_window_layers": 28,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family({"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}),
    "MistralForCausalLM": Family(
        {
            "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8,
        },
        window_switch="sliding_window",
    ),
    "Qwen2ForCausalLM": Family(_QWEN, {"qkv_bias": True, "out_bias": False}, "use_sliding_window"),
    "Qwen3ForCausalLM": Family({**_QWEN, "head_dim": 128}, {"qk_norm": True}, "use_sliding_window"),
}  # fmt: skip
REQUIRED_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
SUPPORTED_VALUES: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1.0, None),
}


def family_of(config: dict[str, Any]) -> Family:
    """The family that `config.json` names. Raises ValueError for one that this Transformer does not compute."""
    architecture = (config.get("architectures") or [None])[0]
    if architecture not in FAMILIES:
        raise ValueError(f"architecture {architecture!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[architecture]


def args_from_hf(config: dict[str, Any]) -> ModelArgs:
    """The arguments that a Hugging Face `config.json` describes.

    Reads what transformers 4 wrote (`rope_theta`, `rope_scaling`) and what 5 writes (`rope_parameters`).
    Raises ValueError for an architecture or a setting that this Transformer does not compute.
    """
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "in a way it does not name")
        remedy = "give the unquantised model; quantize.py makes int8 or int4 of it"
        raise ValueError(f"these weights are quantised already ({method}): {remedy}")
    family = family_of(config)
    config = {**family.assumed, **config}
    missing = [key for key in REQUIRED_KEYS if config.get(key) is None]
    if missing:
        raise ValueError(f"config.json has no {', '.join(missing)}")
    for key, supported in SUPPORTED_VALUES.items():
        if config.get(key, supported[0]) not in supported:
            raise ValueError(f"config.json: {key} {config[key]!r} is not supported; supported: {supported}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    n_heads = config["num_attention_heads"]
    args = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": n_heads,
        "n_kv_heads": config.get("num_key_value_heads") or n_heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // n_heads,
        "hidden_dim": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "rope_scaling": _rope_scaling(rope, config["max_position_embeddings"]),
        "tie_embeddings": bool(config.get("tie_word_embeddings")),
        "qkv_bias": bool(config.get("attention_bias")),
        "out_bias": bool(config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
        "sliding_window": _sliding_window(config, family.window_switch),
    }
    return ModelArgs(**{**args, **family.fixed})


def _rope_scaling(rope: dict[str, Any], context_length: int) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(f"config.json: partial_rotary_factor {rope['partial_rotary_factor']} is not supported")
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"config.json: rope type {kind!r} is not supported; supported: default, linear, llama3")
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    original = rope.get("original_max_position_embeddings") or context_length
    factors = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    return RopeScaling("llama3", *factors, original)


def _sliding_window(config: dict[str, Any], switch: str | None) -> int | None:
    window = config.get("sliding_window") if switch and config.get(switch) else None
    layer_types = set(config.get("layer_types") or [])
    unknown = layer_types - {"full_attention", "sliding_attention"}
    first_window_layer = config.get("max_window_layers", 0) if window and not layer_types else 0
    if unknown or len(layer_types) > 1 or 0 < first_window_layer < config["num_hidden_layers"]:
        raise ValueError(f"config.json: layers of several attention types {sorted(layer_types)} are not supported")
    no_layer_slides = layer_types == {"full_attention"} or first_window_layer >= config["num_hidden_layers"]
    return None if no_layer_slides else window


# ---- Meta's own files: params.json and consolidated.*.pth.

# As `HF_MODULES`; modules that are not listed have the same name as ours.
META_MODULES: dict[str, tuple[str, ...]] = {
    "layers.{}.attention.wqkv": tuple(f"layers.{{}}.attention.w{x}" for x in "qkv"),
    "layers.{}.feed_forward.w13": ("layers.{}.feed_forward.w1", "layers.{}.feed_forward.w3"),
}
# Name -> the dimension along which Meta's model-parallel shards divide it; the rest is whole in every shard.
META_SHARD_DIMS: dict[str, int] = {
    "wq.weight": 0, "wk.weight": 0, "wv.weight": 0, "wo.weight": 1,
    "w1.weight": 0, "w2.weight": 1, "w3.weight": 0, "output.weight": 0, "tok_embeddings.weight": 1,
}  # fmt: skip
META_PARAMS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "multiple_of", "ffn_dim_multiplier",
    "norm_eps", "rope_theta", "use_scaled_rope", "vocab_size", "max_seq_len", "max_batch_size", "sliding_window",
}  # fmt: skip


def check_meta_params(params: dict[str, Any], path: Path) -> None:
    """Raise ValueError for keys of the `params.json` at `path` that are missing or unknown."""
    missing, unsupported = {"dim", "n_layers", "n_heads", "norm_eps"} - params.keys(), params.keys() - META_PARAMS
    if missing or unsupported:
        raise ValueError(f"{path}: missing {sorted(missing)}, unsupported {sorted(unsupported)}")


def meta_head_dim(params: dict[str, Any]) -> int:
    return params.get("head_dim") or params["dim"] // params["n_heads"]


def args_from_meta(params: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> ModelArgs:
    """The arguments from `params.json`; sizes it lacks come from the tensors, context and scaling from the release.

    shapes: of the joined tensors, by Meta's names. Raises ValueError if one that a size is read from is missing.
    """
    if missing := {"layers.0.feed_forward.w1.weight", "tok_embeddings.weight"} - shapes.keys():
        raise ValueError(f"consolidated.*.pth: missing tensors: {', '.join(sorted(missing))}")
    theta, scaled = float(params.get("rope_theta", 1e4)), params.get("use_scaled_rope", False)
    context = {1e6: 16384, 5e5: 8192}.get(theta, 4096)  # CodeLlama, Llama 3, Llama 2
    factor = 32.0 if params["dim"] < 4096 else 8.0  # Llama 3.2 (1B and 3B); 3.1 and 3.3
    return ModelArgs(
        dim=params["dim"],
        n_layers=params["n_layers"],
        n_heads=params["n_heads"],
        n_kv_heads=params.get("n_kv_heads") or params["n_heads"],
        head_dim=meta_head_dim(params),
        hidden_dim=shapes["layers.0.feed_forward.w1.weight"][0],
        vocab_size=shapes["tok_embeddings.weight"][0],
        context_length=params.get("max_seq_len") or (131072 if scaled else context),
        norm_eps=params["norm_eps"],
        rope_theta=theta,
        rope_scaling=RopeScaling("llama3", factor) if scaled else None,
        tie_embeddings="output.weight" not in shapes,
        sliding_window=params.get("sliding_window"),
    )


# ---- Shapes.


def preset(name: str) -> ModelArgs:
    """The shape of the model called exactly `name`. Raises ValueError that lists the names."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; choose from: {', '.join(PRESETS)}")
    return PRESETS[name]


def _preset(dim, n_layers, n_heads, n_kv_heads, hidden_dim, vocab_size, context_length, rope_theta, **other):
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "hidden_dim": hidden_dim}
    rest = {"head_dim": dim // n_heads, "norm_eps": 1e-5, **other}
    return ModelArgs(**sizes, vocab_size=vocab_size, context_length=context_length, rope_theta=rope_theta, **rest)


_LLAMA_31, _LLAMA_32 = RopeScaling("llama3", 8.0), RopeScaling("llama3", 32.0)

# The shapes that benchmarks use, as their config.json on the Hugging Face hub gives them.
PRESETS: dict[str, ModelArgs] = {
    "stories-15m": _preset(288, 6, 6, 6, 768, 32000, 256, 1e4, tie_embeddings=True),
    "tinyllama-1.1b": _preset(2048, 22, 32, 4, 5632, 32000, 2048, 1e4),
    "open-llama-7b": _preset(4096, 32, 32, 32, 11008, 32000, 2048, 1e4, norm_eps=1e-6),
    "llama-2-7b": _preset(4096, 32, 32, 32, 11008, 32000, 4096, 1e4),
    "llama-2-13b": _preset(5120, 40, 40, 40, 13824, 32000, 4096, 1e4),
    "llama-2-70b": _preset(8192, 80, 64, 8, 28672, 32000, 4096, 1e4),
    "codellama-7b": _preset(4096, 32, 32, 32, 11008, 32016, 16384, 1e6),
    "codellama-34b": _preset(8192, 48, 64, 8, 22016, 32000, 16384, 1e6),
    "llama-3-8b": _preset(4096, 32, 32, 8, 14336, 128256, 8192, 5e5),
    "llama-3-70b": _preset(8192, 80, 64, 8, 28672, 128256, 8192, 5e5),
    "llama-3.1-8b": _preset(4096, 32, 32, 8, 14336, 128256, 131072, 5e5, rope_scaling=_LLAMA_31),
    "llama-3.1-70b": _preset(8192, 80, 64, 8, 28672, 128256, 131072, 5e5, rope_scaling=_LLAMA_31),
    "llama-3.1-405b": _preset(16384, 126, 128, 8, 53248, 128256, 131072, 5e5, rope_scaling=_LLAMA_31),
    "llama-3.2-1b": _preset(2048, 16, 32, 8, 8192, 128256, 131072, 5e5, rope_scaling=_LLAMA_32, tie_embeddings=True),
    "llama-3.2-3b": _preset(3072, 28, 24, 8, 8192, 128256, 131072, 5e5, rope_scaling=_LLAMA_32, tie_embeddings=True),
    "mistral-7b": _preset(4096, 32, 32, 8, 14336, 32000, 32768, 1e4, sliding_window=4096),
    "qwen-2.5-7b": _preset(3584, 28, 28, 4, 18944, 152064, 32768, 1e6, norm_eps=1e-6, qkv_bias=True),
    "qwen-3-8b": _preset(4096, 36, 32, 8, 12288, 151936, 40960, 1e6, norm_eps=1e-6, qk_norm=True),
}
