"""The values of a Hugging Face config.json, each checked: what is read is of the right type and in range.

    dim = read(config, "hidden_size", int)

Every error is a ValueError of one line: the key, what was found, and what is expected.
"""

import math
from collections.abc import Container
from typing import Any, TypedDict

from fast.reading import check
from model import ACTIVATIONS, ModelArgs, RopeScaling

LAYER_TYPES = ("full_attention", "attention", "sliding_attention")
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
# Field of ModelArgs -> what it must be above, and the most it can be: far more than any model has.
_SIZE, _FACTOR = (0, 10**7), (1e-20, 1e20)
LIMITS: dict[str, tuple[float, float]] = {
    "dim": _SIZE,
    "n_layers": (0, 1000), "n_heads": (0, 10**4), "n_kv_heads": (0, 10**4), "head_dim": (1, 10**4),
    "hidden_dim": _SIZE, "vocab_size": _SIZE, "context_length": (0, 2**24), "norm_eps": (0, 1000),
    "rope_theta": (1, 1e20), "sliding_rope_theta": (1, 1e20), "expert_dim": (-1, 10**7), "norm_offset": (-1, 1),
    "sliding_window": (0, 2**31), "rotary_dim": (-1, 10**4),
    "attention_scale": _FACTOR, "embedding_scale": _FACTOR, "logits_scale": _FACTOR,
}  # fmt: skip


class HfConfig(TypedDict, total=False):
    """What a config.json holds beside numbers and switches, as far as it is read here."""

    architectures: list[str] | str | None
    text_config: dict[str, Any] | None
    layer_types: list[str] | None
    rope_parameters: dict[str, Any] | None
    rope_scaling: dict[str, Any] | None
    no_rope_layers: list[int] | None
    mlp_only_layers: list[int] | None
    eagle_config: dict[str, Any] | None
    dflash_config: dict[str, Any] | None
    transformer_layer_config: dict[str, Any]


def make_args(fields: dict[str, Any]) -> ModelArgs:
    """ModelArgs of these fields, whatever they hold; `rope_scaling` may be the dict of its own.

    Raises ValueError for a field that is missing, unknown, of another type, out of LIMITS, or does not fit the others.
    """
    check(fields, ModelArgs)
    for name, (above, most) in LIMITS.items():
        if (value := fields.get(name)) is not None and not above < value <= most:
            raise ValueError(f"{name} is {value!r:.80}; expected a number above {above}, up to {most}")
    scaling = fields.get("rope_scaling")
    scaling = RopeScaling(**scaling) if isinstance(scaling, dict) else scaling
    args = ModelArgs(**{**fields, "rope_scaling": scaling})
    for name in ("sliding_layers", "unrotated_layers", "dense_layers"):
        if not set(range(args.n_layers)) >= set(getattr(args, name) or ()):
            raise ValueError(f"{name} is {getattr(args, name)!r:.80}; expected numbers of the {args.n_layers} layers")
    n_rotated = args.head_dim if args.rotary_dim is None else args.rotary_dim
    if n_rotated > args.head_dim:
        raise ValueError(f"rotary_dim is {n_rotated}; expected at most head_dim, {args.head_dim}")
    for factors in (scaling.factors, scaling.long_factors) if scaling else ():
        if factors is not None and (len(factors) != n_rotated // 2 or not all(1e-20 < x < 1e20 for x in factors)):
            raise ValueError(f"rope_scaling has {factors!r:.80}; expected {n_rotated // 2} numbers above 0")
    n_experts, k = args.n_experts, args.experts_per_token
    if n_experts and not 1 < n_experts <= 4096:
        raise ValueError(f"a layer has {n_experts} experts; expected 2 to 4096")
    if n_experts and not 1 <= k <= n_experts:
        raise ValueError(f"experts_per_token is {k}; expected at most the {n_experts} experts there are")
    if args.activation not in ACTIVATIONS:
        raise ValueError(f"activation is {args.activation!r:.80}; expected {' or '.join(ACTIVATIONS)}")
    return args


def read(
    config: dict[str, Any], key: str, kind: type, default: Any = None, above: float = 0, most: float | None = None
) -> Any:
    """`config[key]`, a number above `above` up to `most`, or a bool, as `kind` says; `default` if absent or null.

    Raises ValueError for any other value, or without a value and a default.
    """
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise ValueError(f"it has no {key}")
    if kind is bool:
        fits, wanted = isinstance(value, bool), "true or false"
    else:
        least, limit = (above, 2**31) if kind is int else (max(above, 1e-20), 1e20)  # what can be computed with
        most = limit if most is None else most
        fits = isinstance(value, (int, kind)) and not isinstance(value, bool) and least < value <= most
        wanted = f"a {'whole ' if kind is int else ''}number above {above}, up to {most}"
    if not fits:
        raise ValueError(f"{key} is {value!r:.80}; expected {wanted}")
    return kind(value)


def text_config(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The configuration of the language model in that of one that also sees."""
    inner = config.get("text_config")
    if not inner or (found := inner.get("model_type", model_type)) != model_type:
        raise ValueError(f"text_config of {inner and found!r:.80} is not supported; supported: {model_type}")
    types = {key: config[key] for key in ("dtype", "torch_dtype") if key in config}
    outer = config.get("tie_word_embeddings")  # which applies, not the inner one
    return {**inner, **types, "tie_word_embeddings": outer}


def read_rope(
    config: dict[str, Any],
    types: list[str],
    head_dim: int,
    context_length: int,
    partial_rotary: bool,
    other_names: dict[str, str],
) -> dict[str, Any]:
    """What transformers 4 calls `rope_scaling` and 5 `rope_parameters`, as fields of `ModelArgs`.

    types: of the layers, for RoPE that is given for each. partial_rotary, other_names: as `Family` has them.
    """
    rope: dict[str, Any] = {}
    sliding = {}
    if "rope_local_base_freq" in config:
        sliding["rope_theta"] = read(config, "rope_local_base_freq", float, above=1)
    for name in ("rope_parameters", "rope_scaling"):  # where both are there, someone has added the second
        found = {} if config.get(name) is None else config[name]
        if found.keys() & set(LAYER_TYPES):  # for every type of layer
            for kind in sorted(set(types)):
                check(found.get(kind), dict, f"{name} for {kind}")
            of_sliding, others = found.get("sliding_attention", {}), set(types) - {"sliding_attention"}
            found = found[others.pop()] if others else of_sliding
            sliding = {**sliding, **of_sliding} if sliding or of_sliding != found else {}
        rope |= {"rope_type": found.get("type", "default"), **found} if found else {}
    # What stands beside the object applies where it is silent, but for the original length, as in transformers.
    beside = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    outer = {key: config[key] for key in beside if config.get(key) is not None}
    rope = {**outer, **rope, **{key: outer[key] for key in beside[2:] if key in outer}}
    share = read(rope, "partial_rotary_factor", float, 1.0)
    if share > 1 or (share < 1 and not partial_rotary):
        raise ValueError(f"partial_rotary_factor {share} is not supported")
    rotary_dim = int(head_dim * share)
    theta, sliding_theta = read(rope, "rope_theta", float, 10000.0, above=1), None
    scaling, context_length = read_rope_scaling(rope, context_length, other_names, theta, rotary_dim)
    if sliding and "sliding_attention" in types:
        sliding_theta = read(sliding, "rope_theta", float, theta, above=1)
        if (kind := sliding.get("rope_type", sliding.get("type", "default"))) != "default":
            raise ValueError(f"RoPE of type {kind!r:.80} is not supported in layers with a sliding window")
    return {
        "rope_theta": theta,
        "sliding_rope_theta": None if sliding_theta == theta and scaling is None else sliding_theta,
        "rope_scaling": scaling,
        "rotary_dim": None if share == 1 else rotary_dim,
        "context_length": context_length,
    }


def read_rope_scaling(
    rope: dict[str, Any], context_length: int, names: dict[str, str], theta: float, rotary_dim: int
) -> tuple[RopeScaling | None, int]:
    """The scaling and, as yarn may stretch it, the context length; defaults as in transformers' modeling_rope_utils.py.

    names: the family's own for types of RoPE.
    """
    kind = rope.get("rope_type", "default")
    kind = names.get(str(kind), kind)
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope type {kind!r:.80} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return None, context_length
    original = read(rope, "original_max_position_embeddings", int, context_length, above=1)
    factor = read(rope, "factor", float, context_length / original if kind in ("yarn", "longrope") else None)
    if kind == "linear":
        return RopeScaling(rope_factors(kind, factor, theta, rotary_dim)), context_length
    if kind == "llama3":
        low, high = (read(rope, key, float) for key in ("low_freq_factor", "high_freq_factor"))
        if low >= high:
            raise ValueError(f"low_freq_factor {low} is not less than high_freq_factor {high}")
        return RopeScaling(rope_factors(kind, factor, theta, rotary_dim, low, high, original)), context_length
    log = math.log(max(factor, 1.0))
    if kind == "longrope":
        attention = read(rope, "attention_factor", float, math.sqrt(1 + log / math.log(original)))
        short, long = (read_numbers(rope, key, rotary_dim // 2) for key in ("short_factor", "long_factor"))
        return RopeScaling(short, attention, long, original), context_length
    attention = 0.1 * log + 1
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        over, under = (0.1 * read(rope, key, float) * log + 1 for key in ("mscale", "mscale_all_dim"))
        attention = over / under
    attention = read(rope, "attention_factor", float, attention)
    turns = read(rope, "beta_slow", float, 1.0), read(rope, "beta_fast", float, 32.0)
    factors = rope_factors(kind, factor, theta, rotary_dim, *turns, original, read(rope, "truncate", bool, True))
    return RopeScaling(factors, attention), max(context_length, int(factor * original))


def rope_factors(
    kind: str,
    factor: float,
    theta: float,
    rotary_dim: int,
    low: float = 1.0,
    high: float = 4.0,
    original: int = 8192,
    truncate: bool = True,
) -> tuple[float, ...]:
    """How much more slowly RoPE with base `theta` turns each of its rotary_dim / 2 pairs.

    kind: `linear` (Chen et al. 2023), all pairs by `factor`; `llama3` (Llama 3.1) or `yarn` (Peng et al. 2023): those
        that turn less than `low` times in the `original` length by `factor`, those that turn more than `high` times by
        1, and those in between by a mixture: llama3's depends on a pair's turns, yarn's on its number. truncate: the
        mixture begins and ends at a whole number.
    """
    n, full = rotary_dim // 2, original / (2 * math.pi)
    if kind == "linear":
        return (factor,) * n
    if kind == "llama3":
        kept = [(full / theta ** (2 * i / rotary_dim) - low) / (high - low) for i in range(n)]
    else:
        last, first = (rotary_dim / 2 * math.log(full / turns, theta) for turns in (low, high))
        if truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotary_dim - 1)
        kept = [1 - (i - first) / ((last - first) or 0.001) for i in range(n)]
    kept = [min(max(share, 0.0), 1.0) for share in kept]
    return tuple(1 / (share + (1 - share) / factor) for share in kept)


def read_numbers(config: dict[str, Any], key: str, n: int) -> tuple[float, ...]:
    """`config[key]`, a list of `n` numbers above 0."""
    values = config.get(key)
    check(values, list, key)
    if len(values) != n:
        raise ValueError(f"{key} is {len(values)} numbers; expected {n} numbers, one for each pair that RoPE rotates")
    return tuple(read({key: value}, key, float) for value in values)


def read_window(config: dict[str, Any], switch: str | None) -> int | None:
    """The sliding window, if the family's code uses one."""
    if switch is None or config.get("sliding_window") is None:
        return None
    window = read(config, "sliding_window", int)
    return window if switch == "sliding_window" or read(config, switch, bool, False) else None


def read_layer_types(config: dict[str, Any], n_layers: int, window: int | None, keys: Container[str]) -> list[str]:
    """Which keys the queries of each layer see, one of LAYER_TYPES.

    keys: what else the family's code may read. `max_window_layers`: the first layers see all; `sliding_window_pattern`:
    every such layer does. Else all layers have the `window`, if there is one.
    """
    types = config.get("layer_types")
    if types is None:
        n_full, every = 0 if window else n_layers, n_layers + 1
        if window and "max_window_layers" in keys:
            n_full = read(config, "max_window_layers", int, above=-1)
        if "sliding_window_pattern" in keys:
            every = read(config, "sliding_window_pattern", int)
        slides = [i >= n_full and (i + 1) % every != 0 for i in range(n_layers)]
        types = ["sliding_attention" if sliding else "full_attention" for sliding in slides]
    if len(types) != n_layers:
        raise ValueError(f"layer_types is {types!r:.80}; expected a list of {n_layers}, one per layer")
    if unknown := [kind for kind in types if kind not in LAYER_TYPES]:
        supported = ", ".join(LAYER_TYPES)
        raise ValueError(f"layers of type {unknown[0]!r:.80} are not supported; supported: {supported}")
    return types
