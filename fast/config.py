"""The values of a Hugging Face config.json, each checked: what is read is of the right type and in range.

    dim = read(config, "hidden_size", int)

Every error is a ValueError of one line: the key, what was found, and what is expected.
"""

import math
from typing import Any

from model import RopeScaling

LAYER_TYPES = ("full_attention", "attention", "sliding_attention")
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


def read(config: dict[str, Any], key: str, kind: type, default: Any = None, above: int = 0) -> Any:
    """`config[key]`, a number above `above` or a bool, as `kind` says; `default` if it is absent or null.

    Raises ValueError for any other value, or without a value and a default.
    """
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise ValueError(f"config.json has no {key}")
    if kind is bool:
        fits, wanted = isinstance(value, bool), "true or false"
    else:
        least, most = (above, 2**31) if kind is int else (max(above, 1e-20), 1e20)  # what can be computed with
        fits = isinstance(value, (int, kind)) and not isinstance(value, bool) and least < value <= most
        wanted = f"a {'whole ' if kind is int else ''}number above {above}, up to {most:.0e}"
    if not fits:
        raise ValueError(f"config.json: {key} is {value!r:.80}; expected {wanted}")
    return kind(value)


def text_config(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The configuration of the language model in that of one that also sees."""
    inner = config.get("text_config")
    if not isinstance(inner, dict) or inner.get("model_type", model_type) != model_type:
        found = inner.get("model_type") if isinstance(inner, dict) else inner
        raise ValueError(f"config.json: text_config of {found!r:.80} is not supported; supported: {model_type}")
    outer = config.get("tie_word_embeddings")  # which applies, not the inner one
    return {**inner, "tie_word_embeddings": outer}


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
    for name in ("rope_parameters", "rope_scaling"):  # where both are there, someone has added the second
        found = {} if config.get(name) is None else config[name]
        if not isinstance(found, dict):
            raise ValueError(f"config.json: {name} is {found!r:.80}; expected an object with rope_type and factor")
        if found and all(isinstance(value, dict) for value in found.values()):  # for every type of layer
            used = [found[kind] for kind in found if kind in types]
            if not used or any(value != used[0] for value in used):
                kinds = ", ".join(found)
                raise ValueError(f"config.json: RoPE that differs among layers ({kinds:.80}) is not supported")
            found = used[0]
        rope |= {"rope_type": found.get("type", "default"), **found} if found else {}
    # What stands beside the object applies where it is silent, but for the original length, as in transformers.
    beside = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    outer = {key: config[key] for key in beside if config.get(key) is not None}
    rope = {**outer, **rope, **{key: outer[key] for key in beside[2:] if key in outer}}
    share = read(rope, "partial_rotary_factor", float, 1.0)
    if share > 1 or (share < 1 and not partial_rotary):
        raise ValueError(f"config.json: partial_rotary_factor {share} is not supported")
    rotary_dim = int(head_dim * share)
    scaling = rope_scaling(rope, context_length, other_names, rotary_dim // 2)
    if scaling and scaling.type == "yarn":
        context_length = max(context_length, int(scaling.factor * scaling.original_context_length))
    return {
        "rope_theta": read(rope, "rope_theta", float, 10000.0, above=1),
        "rope_scaling": scaling,
        "rotary_dim": None if share == 1 else rotary_dim,
        "context_length": context_length,
    }


def rope_scaling(rope: dict[str, Any], context_length: int, names: dict[str, str], n_pairs: int) -> RopeScaling | None:
    """`names`: the family's own for types of RoPE. Defaults are those of transformers' modeling_rope_utils.py."""
    kind = rope.get("rope_type", "default")
    kind = names.get(str(kind), kind)
    if kind not in ROPE_TYPES:
        raise ValueError(f"config.json: rope type {kind!r:.80} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return None
    original = read(rope, "original_max_position_embeddings", int, context_length, above=1)
    factor = read(rope, "factor", float, context_length / original if kind in ("yarn", "longrope") else None)
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind == "llama3":
        low, high = (read(rope, key, float) for key in ("low_freq_factor", "high_freq_factor"))
        if low >= high:
            raise ValueError(f"config.json: low_freq_factor {low} is not less than high_freq_factor {high}")
        return RopeScaling("llama3", factor, low, high, original)
    log = math.log(max(factor, 1.0))
    if kind == "longrope":
        attention = read(rope, "attention_factor", float, math.sqrt(1 + log / math.log(original)))
        factors = {f"{which}s": read_numbers(rope, which, n_pairs) for which in ("short_factor", "long_factor")}
        return RopeScaling(kind, factor, original_context_length=original, attention_factor=attention, **factors)
    attention = 0.1 * log + 1
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        over, under = (0.1 * read(rope, key, float) * log + 1 for key in ("mscale", "mscale_all_dim"))
        attention = over / under
    attention = read(rope, "attention_factor", float, attention)
    turns = read(rope, "beta_slow", float, 1.0), read(rope, "beta_fast", float, 32.0)
    return RopeScaling(kind, factor, *turns, original, attention, read(rope, "truncate", bool, True))


def read_numbers(config: dict[str, Any], key: str, n: int) -> tuple[float, ...]:
    """`config[key]`, a list of `n` numbers above 0."""
    values = config.get(key)
    if not isinstance(values, list) or len(values) != n:
        found = f"{len(values)} numbers" if isinstance(values, list) else f"{values!r:.80}"
        raise ValueError(f"config.json: {key} is {found}; expected {n} numbers, one for each pair that RoPE rotates")
    return tuple(read({key: value}, key, float) for value in values)


def read_window(config: dict[str, Any], switch: str | None) -> int | None:
    """The sliding window, if the family's code uses one."""
    if switch is None or config.get("sliding_window") is None:
        return None
    window = read(config, "sliding_window", int)
    return window if switch == "sliding_window" or read(config, switch, bool, False) else None


def read_layer_types(config: dict[str, Any], n_layers: int, n_full: int) -> list[str]:
    """Which keys the queries of each layer see, one of LAYER_TYPES; by default the first `n_full` layers see all."""
    types = config.get("layer_types")
    if types is None:
        types = ["full_attention" if i < n_full else "sliding_attention" for i in range(n_layers)]
    if not isinstance(types, list) or len(types) != n_layers:
        raise ValueError(f"config.json: layer_types is {types!r:.80}; expected a list of {n_layers}, one per layer")
    if unknown := [kind for kind in types if kind not in LAYER_TYPES]:
        supported = ", ".join(LAYER_TYPES)
        raise ValueError(f"config.json: layers of type {unknown[0]!r:.80} are not supported; supported: {supported}")
    return types
