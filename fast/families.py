"""Model families as data: what their configuration files mean, and how they name their tensors.

    args = args_from_hf(json.load(open("config.json")))

Adding a family that this Transformer can compute is one entry in `FAMILIES`; `docs/extending.md` shows how.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from fast.config import LIMITS, HfConfig, make_args, read, read_layer_types, read_rope, read_window, text_config
from fast.reading import check
from model import ModelArgs, Transformer

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


# Where a norm follows attention and feed-forward too, the one before the feed-forward has another name.
POST_NORM_MODULES = {
    **HF_MODULES,
    "layers.{}.attention_post_norm": ("model.layers.{}.post_attention_layernorm",),
    "layers.{}.ffn_norm": ("model.layers.{}.pre_feedforward_layernorm",),
    "layers.{}.ffn_post_norm": ("model.layers.{}.post_feedforward_layernorm",),
}


# In place of a feed-forward, experts: the second `{}` is an expert's number.
EXPERT_MODULES = {
    **HF_MODULES,
    "layers.{}.feed_forward.router": ("model.layers.{}.mlp.gate",),
    "layers.{}.feed_forward.experts.w13": tuple(f"model.layers.{{}}.mlp.experts.{{}}.{x}_proj" for x in ("gate", "up")),
    "layers.{}.feed_forward.experts.w2": ("model.layers.{}.mlp.experts.{}.down_proj",),
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


# Field of ModelArgs -> its key in config.json, for what a number or a switch says alone.
HF_KEYS: dict[str, str] = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "qkv_bias": "attention_bias",
    "out_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
}
# Names of activations in config.json -> in `model.ACTIVATIONS`.
HF_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Naming:
    """How files name and arrange the tensors of a model.

    modules: our module -> theirs, as `HF_MODULES`; modules that are not listed have the same name as ours.
    pairs: which elements of a head RoPE rotates together: "halves" (i and i + rotary_dim / 2), "neighbours" (2i and
        2i + 1), or "ours". Loading reorders the rows of queries and keys accordingly, see `head_order`.
    left_out: patterns of tensors that are no part of the language model.
    """

    modules: dict[str, tuple[str, ...]]
    pairs: str = "halves"
    left_out: tuple[str, ...] = ()

    def theirs(self, module: str, n_experts: int = 1) -> list[str]:
        """The modules of the files that are stacked in our `module`."""
        template, layer = re.sub(r"\.\d+\.", ".{}.", module), re.findall(r"\.(\d+)\.", module)
        if template not in self.modules:
            return [module]
        return [other.format(*layer, e) for e in range(n_experts) for other in self.modules[template]]


OURS = Naming({}, pairs="ours")


@dataclass(frozen=True)
class Family:
    """An architecture of Hugging Face transformers.

    model_type: its name in a config.json without `architectures`.
    assumed: the defaults of its configuration class, for keys that config.json does not have.
    fixed: fields of `ModelArgs` that its code fixes, whatever config.json says.
    keys: where its keys are not those of `HF_KEYS`. activation_key: that of the gates' activation.
    window_switch: the key that must be set for its code to use `sliding_window`; None: it never does.
    partial_rotary: whether its code heeds `partial_rotary_factor`. rope_types: its own names for types of RoPE.
    particular: further fields of `ModelArgs`, from config.json and the fields that are read already.
    text_model: the `model_type` of its `text_config`, which describes the language model of one that sees, too.
    naming: the names of its tensors.
    """

    model_type: str
    assumed: dict[str, Any]
    fixed: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    activation_key: str = "hidden_act"
    window_switch: str | None = None
    partial_rotary: bool = False
    rope_types: dict[str, str] = field(default_factory=dict)
    particular: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None
    text_model: str | None = None
    naming: Naming = field(default_factory=lambda: Naming(HF_MODULES))


def _smollm3(config: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    n_layers, rotated = args["n_layers"], config.get("no_rope_layers")
    if rotated is None:
        interval = read(config, "no_rope_layer_interval", int)
        rotated = [int((i + 1) % interval != 0) for i in range(n_layers)]
    if len(rotated) < n_layers or not {0, 1} >= set(rotated):
        raise ValueError(f"no_rope_layers is {rotated!r:.80}; expected {n_layers} of 1 and 0")
    unrotated = tuple(i for i in range(n_layers) if not rotated[i])
    slides = args.get("sliding_window") and config.get("layer_types") is None
    return {"unrotated_layers": unrotated, **({"sliding_layers": unrotated} if slides else {})}


def _granite(config: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    """`x + m f(norm(x))` is `m (y + f(norm'(y)))` for y = x / m, where norm' has its eps divided by the square of m.

    So the residual multiplier m goes into two numbers; the last norm takes it out again.
    """
    residual = read(config, "residual_multiplier", float)
    return {
        "attention_scale": read(config, "attention_multiplier", float),
        "embedding_scale": read(config, "embedding_multiplier", float) / residual,
        "logits_scale": 1 / read(config, "logits_scaling", float),
        "norm_eps": args["norm_eps"] / residual**2,
    }


def _granite_hybrid(config: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    n_experts = read(config, "num_local_experts", int, above=-1)
    if n_experts or not config.get("layer_types"):  # by default its layers have no attention
        raise ValueError("layers with experts (num_local_experts) or without attention are not supported")
    if (kind := config.get("position_embedding_type")) not in ("rope", "nope", None):
        raise ValueError(f"position_embedding_type is {kind!r:.80}; expected rope or nope")
    unrotated = () if kind == "rope" else tuple(range(args["n_layers"]))
    return {**_granite(config, args), "unrotated_layers": unrotated}


def _gemma3(config: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if config.get(key):
            raise ValueError(f"{key} is {config[key]!r:.80}, which is not supported")
    # Its code rounds the embeddings' scale to the weights' type, by up to 0.4 % in bfloat16, and it was trained so.
    is_bfloat16 = (config.get("dtype") or config.get("torch_dtype")) == "bfloat16"
    scale = torch.tensor(args["dim"] ** 0.5, dtype=torch.bfloat16 if is_bfloat16 else torch.float32)
    attention_scale = read(config, "query_pre_attn_scalar", float) ** -0.5
    return {"attention_scale": attention_scale, "embedding_scale": scale.item()}


def _experts(config: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    return {"n_experts": read(config, "num_local_experts", int, args["n_experts"])}


def _qwen3_moe(config: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    dense, step = config.get("mlp_only_layers", []), read(config, "decoder_sparse_step", int, 1)
    dense = tuple(i for i in range(args["n_layers"]) if i in dense or (i + 1) % step)
    return {**_experts(config, args), "dense_layers": dense}


def _renamed(changes: dict[str, str], modules: dict = HF_MODULES) -> dict[str, tuple[str, ...]]:
    """`modules` with the parts of the files' names in `changes` replaced."""

    def rename(name: str) -> str:
        for old, new in changes.items():
            name = name.replace(old, new)
        return name

    return {ours: tuple(dict.fromkeys(map(rename, theirs))) for ours, theirs in modules.items()}


_QWEN = {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096,
    "max_window_layers": 28,
}  # fmt: skip
_MISTRAL = {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8,
}  # fmt: skip
_GRANITE = {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "attention_multiplier": 1.0, "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0, "logits_scaling": 1.0,
}  # fmt: skip
_GEMMA3 = Family(
    "gemma3_text",
    {
        "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "intermediate_size": 9216, "vocab_size": 262208, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 6, "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
    {"qk_norm": True, "post_norms": True, "norm_offset": 1.0, "mlp_bias": False},
    activation_key="hidden_activation",
    window_switch="sliding_window",
    particular=_gemma3,
    naming=Naming(POST_NORM_MODULES),
)  # fmt: skip
_VISION = ("vision_tower.*", "multi_modal_projector.*")
_INSIDE = {"model.": "language_model.model.", "lm_head": "language_model.lm_head"}
_NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}),
    "MistralForCausalLM": Family("mistral", _MISTRAL, _NO_BIAS, window_switch="sliding_window"),
    "MinistralForCausalLM": Family("ministral", _MISTRAL, _NO_BIAS, window_switch="sliding_window"),
    "Mistral3ForConditionalGeneration": Family(
        "mistral3",
        {**_MISTRAL, "tie_word_embeddings": True},
        _NO_BIAS,
        window_switch="sliding_window",
        text_model="mistral",
        naming=Naming(_renamed(_INSIDE), left_out=_VISION),
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2", _QWEN, {"qkv_bias": True, "out_bias": False, "mlp_bias": False}, window_switch="use_sliding_window"
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        {**_QWEN, "head_dim": 128},
        {"qk_norm": True, "mlp_bias": False},
        window_switch="use_sliding_window",
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        {
            "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 8, "rope_theta": 1e6,
            "num_local_experts": 8, "num_experts_per_tok": 2,
        },
        _NO_BIAS,
        {
            "n_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok",
            "expert_dim": "intermediate_size",
        },
        window_switch="sliding_window",
        particular=_experts,
        naming=Naming(
            _renamed(
                {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}, EXPERT_MODULES
            )
        ),
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        {
            "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 4, "sliding_window": 4096,
            "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "intermediate_size": 6144,
        },
        {"qk_norm": True, "mlp_bias": False},
        {
            "n_experts": "num_experts", "experts_per_token": "num_experts_per_tok",
            "expert_dim": "moe_intermediate_size", "norm_expert_weights": "norm_topk_prob",
        },
        window_switch="use_sliding_window",
        particular=_qwen3_moe,
        naming=Naming(EXPERT_MODULES),
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
        _NO_BIAS,
        window_switch="sliding_window",
        partial_rotary=True,
        rope_types={"su": "longrope", "yarn": "longrope"},
        naming=Naming(
            _renamed(
                {
                    ".q_proj": ".qkv_proj", ".k_proj": ".qkv_proj", ".v_proj": ".qkv_proj",
                    ".gate_proj": ".gate_up_proj", ".up_proj": ".gate_up_proj",
                }
            )
        ),
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        {
            "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6,
            "tie_word_embeddings": True, "no_rope_layer_interval": 4,
        },
        window_switch="use_sliding_window",
        particular=_smollm3,
    ),
    "GraniteForCausalLM": Family("granite", _GRANITE, particular=_granite),
    "GraniteMoeHybridForCausalLM": Family(
        "granitemoehybrid",
        {**_GRANITE, "num_local_experts": 8, "shared_intermediate_size": 1024},
        {"mlp_bias": False},
        {"hidden_dim": "shared_intermediate_size"},
        particular=_granite_hybrid,
        naming=Naming(
            _renamed(
                {
                    "mlp.": "shared_mlp.", "gate_proj": "input_linear", "up_proj": "input_linear",
                    "down_proj": "output_linear",
                }
            )
        ),
    ),
    "SeedOssForCausalLM": Family(
        "seed_oss",
        {
            "rms_norm_eps": 1e-6, "max_position_embeddings": 524288, "num_key_value_heads": 8, "head_dim": 128,
            "attention_bias": True,
        },
        keys={"out_bias": "attention_out_bias"},
    ),
    "Ernie4_5ForCausalLM": Family(
        "ernie4_5",
        {
            "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 2, "head_dim": 128,
            "rope_theta": 5e5, "tie_word_embeddings": True,
        },
        keys={"qkv_bias": "use_bias", "out_bias": "use_bias", "mlp_bias": "use_bias"},
        naming=Naming(HF_MODULES, pairs="neighbours"),
    ),
    "HeliumForCausalLM": Family(
        "helium",
        {
            "rms_norm_eps": 1e-8, "max_position_embeddings": 4096, "num_key_value_heads": 20, "head_dim": 128,
            "rope_theta": 1e5,
        },
        {"out_bias": False},
        naming=Naming(HF_MODULES, pairs="neighbours"),
    ),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": replace(
        _GEMMA3,
        model_type="gemma3",
        text_model="gemma3_text",
        naming=Naming(_renamed(_INSIDE, POST_NORM_MODULES), left_out=_VISION),
    ),
}  # fmt: skip
ALIASES = {"LLaMAForCausalLM": "LlamaForCausalLM", "Ernie4_5_ForCausalLM": "Ernie4_5ForCausalLM"}
NULL_IS_A_VALUE = ("num_key_value_heads", "head_dim", "sliding_window")  # elsewhere null is as good as absent


def head_kind(config: dict[str, Any]) -> str | None:
    """Whether this is the `config.json` of a head that drafts: "EAGLE-3", "DFlash" or None. See `head_files.py`.

    Raises ValueError for a head of another kind.
    """
    names, kind = str(config.get("architectures")), config.get("speculators_model_type")
    if kind not in (None, "eagle3", "dflash"):
        raise ValueError(f"speculators_model_type is {kind!r:.80}; supported: eagle3, dflash")
    if kind == "dflash" or (kind is None and re.search(r"\bDFlashDraftModel\b", names)):
        return "DFlash"
    is_safeailab_s = "draft_vocab_size" in config and kind is None  # they have no name of their own
    return "EAGLE-3" if "eagle3" in f"{names} {kind}".lower() or is_safeailab_s else None


def family_of(config: dict[str, Any]) -> Family:
    """The family that `config.json` names. Raises ValueError for one that this Transformer does not compute."""
    by_type = {family.model_type: name for name, family in FAMILIES.items()}
    model_type = str(config.get("model_type"))
    names = config.get("architectures") or [by_type.get(model_type, model_type)]
    name = names if isinstance(names, str) else names[0]
    name = ALIASES.get(name, name)
    if name not in FAMILIES:
        raise ValueError(f"architecture {name!r:.80} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def args_from_hf(config: dict[str, Any]) -> ModelArgs:
    """The arguments that a Hugging Face `config.json` describes.

    Reads what transformers 4 wrote (`rope_theta`, `rope_scaling`) and what 5 writes (`rope_parameters`).
    Raises ValueError for an architecture or a setting that this Transformer does not compute.
    """
    check(config, HfConfig)
    family = family_of(config)
    if family.text_model:
        config = text_config(config, family.text_model)
        check(config, HfConfig, "text_config")
    given = {key: value for key, value in config.items() if value is not None or key in NULL_IS_A_VALUE}
    config = {**family.assumed, **given}
    kinds = {field.name: field.type for field in fields(ModelArgs)}
    args: dict[str, Any] = {}
    for name, key in {**HF_KEYS, **family.keys}.items():
        default = False if kinds[name] is bool else None
        if name in ("n_kv_heads", "head_dim"):
            default = args["n_heads"] if name == "n_kv_heads" else args["dim"] // args["n_heads"]
        args[name] = read(config, key, kinds[name], default, *LIMITS.get(name, ()))
    name = config.get(family.activation_key, "silu")
    if str(name) not in HF_ACTIVATIONS:
        key, supported = family.activation_key, ", ".join(HF_ACTIVATIONS)
        raise ValueError(f"{key} {name!r:.80} is not supported; supported: {supported}")
    args["activation"] = HF_ACTIVATIONS[name]
    window = read_window(config, family.window_switch)
    types = read_layer_types(config, args["n_layers"], window, family.assumed)
    sliding = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    sizes = args["head_dim"], args["context_length"]
    args |= read_rope(config, types, *sizes, family.partial_rotary, family.rope_types)
    args["sliding_window"] = window if sliding else None
    if (window or args["sliding_rope_theta"]) and 0 < len(sliding) < len(types):
        args["sliding_layers"] = sliding
    if family.particular:
        args |= family.particular(config, args)
    return make_args({**args, **family.fixed})


def head_order(args: ModelArgs, pairs: str) -> list[int] | None:
    """Where the elements of our query and key heads lie in files with such `pairs`; None: at the same places.

    Ours rotates the pairs (i, i + head_dim / 2), those with the lowest i if not all are rotated. Files have what is not
    rotated at the end of a head.
    """
    if pairs == "ours":
        return None
    rotated = args.head_dim if args.rotary_dim is None else args.rotary_dim
    first, second, rest = range(rotated // 2), range(rotated // 2, rotated), range(rotated, args.head_dim)
    if pairs == "neighbours":
        first, second = range(0, rotated, 2), range(1, rotated, 2)
    order = [*first, *rest[: len(rest) // 2], *second, *rest[len(rest) // 2 :]]
    return None if order == sorted(order) else order
