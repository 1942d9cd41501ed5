"""Meta's own files, `params.json` and `consolidated.*.pth`: what they mean, and how they name and divide tensors.

check_params(params, path)
args = args_from_params(params, shapes)
"""

from pathlib import Path
from typing import Any

from fast.config import make_args, read, rope_factors
from fast.families import Naming
from model import ModelArgs, RopeScaling

# As of a `Family`; modules that are not listed have the same name as ours.
NAMING = Naming(
    {
        "layers.{}.attention.wqkv": tuple(f"layers.{{}}.attention.w{x}" for x in "qkv"),
        "layers.{}.feed_forward.w13": ("layers.{}.feed_forward.w1", "layers.{}.feed_forward.w3"),
    },
    pairs="neighbours",
)
# Name -> the dimension along which Meta's model-parallel shards divide it; the rest is whole in every shard.
SHARD_DIMS: dict[str, int] = {
    "wq.weight": 0, "wk.weight": 0, "wv.weight": 0, "wo.weight": 1,
    "w1.weight": 0, "w2.weight": 1, "w3.weight": 0, "output.weight": 0, "tok_embeddings.weight": 1,
}  # fmt: skip
PARAMS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "multiple_of", "ffn_dim_multiplier",
    "norm_eps", "rope_theta", "use_scaled_rope", "vocab_size", "max_seq_len", "max_batch_size", "sliding_window",
}  # fmt: skip


def check_params(params: dict[str, Any], path: Path) -> None:
    """Raise ValueError for keys of the `params.json` at `path` that are missing or unknown."""
    missing, unsupported = {"dim", "n_layers", "n_heads", "norm_eps"} - params.keys(), params.keys() - PARAMS
    if missing or unsupported:
        raise ValueError(f"{path}: missing {sorted(missing)}, unsupported {sorted(unsupported)}")


def args_from_params(params: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> ModelArgs:
    """The arguments from `params.json`; sizes it lacks come from the tensors, context and scaling from the release.

    shapes: of the joined tensors, by Meta's names. Raises ValueError if one that a size is read from is missing.
    """
    if missing := {"layers.0.feed_forward.w1.weight", "tok_embeddings.weight"} - shapes.keys():
        raise ValueError(f"consolidated.*.pth: missing tensors: {', '.join(sorted(missing))}")
    dim, n_heads = read(params, "dim", int), read(params, "n_heads", int)
    theta, scaled = read(params, "rope_theta", float, 1e4, above=1), read(params, "use_scaled_rope", bool, False)
    head_dim = read(params, "head_dim", int, dim // n_heads, above=1)
    context = {1e6: 16384, 5e5: 8192}.get(theta, 4096)  # CodeLlama, Llama 3, Llama 2
    factor = 32.0 if dim < 4096 else 8.0  # Llama 3.2 (1B and 3B); 3.1 and 3.3
    return make_args(
        {
            "dim": dim,
            "n_layers": params["n_layers"],
            "n_heads": n_heads,
            "n_kv_heads": params.get("n_kv_heads") or n_heads,
            "head_dim": head_dim,
            "hidden_dim": shapes["layers.0.feed_forward.w1.weight"][0],
            "vocab_size": shapes["tok_embeddings.weight"][0],
            "context_length": params.get("max_seq_len") or (131072 if scaled else context),
            "norm_eps": params["norm_eps"],
            "rope_theta": theta,
            "rope_scaling": RopeScaling(rope_factors("llama3", factor, theta, head_dim)) if scaled else None,
            "tie_embeddings": "output.weight" not in shapes,
            "sliding_window": params.get("sliding_window"),
        }
    )
