"""The shapes of known models, by name: what is measured needs no checkpoint.

args = preset("llama-2-7b")
"""

from dataclasses import replace

from fast.config import rope_factors
from model import ModelArgs, RopeScaling


def preset(name: str) -> ModelArgs:
    """The shape of the model called exactly `name`. Raises ValueError that lists the names."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; choose from: {', '.join(PRESETS)}")
    return PRESETS[name]


def without_experts(args: ModelArgs) -> ModelArgs:
    """A dense model that reads as many bytes a token as this one with experts, but for its routers."""
    return replace(args, n_experts=0, hidden_dim=args.experts_per_token * args.expert_dim)


def _preset(dim, n_layers, n_heads, n_kv_heads, hidden_dim, vocab_size, context_length, rope_theta, **other):
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "hidden_dim": hidden_dim}
    rest = {"head_dim": dim // n_heads, "norm_eps": 1e-5, **other}
    return ModelArgs(**sizes, vocab_size=vocab_size, context_length=context_length, rope_theta=rope_theta, **rest)


_GEMMA_3 = {
    "tie_embeddings": True, "norm_eps": 1e-6, "norm_offset": 1.0, "qk_norm": True, "post_norms": True,
    "activation": "gelu_tanh", "sliding_rope_theta": 1e4,
}  # fmt: skip
_LLAMA_31, _LLAMA_32, _LLAMA_32_1B = (
    RopeScaling(rope_factors("llama3", factor, 5e5, head_dim)) for factor, head_dim in ((8, 128), (32, 128), (32, 64))
)

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
    "llama-3.2-1b": _preset(2048, 16, 32, 8, 8192, 128256, 131072, 5e5, rope_scaling=_LLAMA_32_1B, tie_embeddings=True),
    "llama-3.2-3b": _preset(3072, 28, 24, 8, 8192, 128256, 131072, 5e5, rope_scaling=_LLAMA_32, tie_embeddings=True),
    "mistral-7b": _preset(4096, 32, 32, 8, 14336, 32000, 32768, 1e4, sliding_window=4096),
    "qwen-2.5-7b": _preset(3584, 28, 28, 4, 18944, 152064, 32768, 1e6, norm_eps=1e-6, qkv_bias=True),
    "gemma-3-1b": _preset(
        1152, 26, 4, 1, 6912, 262144, 32768, 1e6, head_dim=256, attention_scale=256**-0.5, embedding_scale=34.0,
        sliding_window=512, sliding_layers=tuple(i for i in range(26) if i % 6 != 5), **_GEMMA_3,
    ),
    "mixtral-8x7b": _preset(
        4096, 32, 32, 8, 14336, 32000, 32768, 1e6, n_experts=8, experts_per_token=2, expert_dim=14336
    ),
    "moe-8x300m": _preset(1024, 24, 16, 4, 2816, 32000, 4096, 1e4, n_experts=8, experts_per_token=2, expert_dim=2816),
    "qwen-3-30b-a3b": _preset(
        2048, 48, 32, 4, 6144, 151936, 40960, 1e6, head_dim=128, norm_eps=1e-6, qk_norm=True,
        n_experts=128, experts_per_token=8, expert_dim=768,
    ),
    "qwen-3-8b": _preset(4096, 36, 32, 8, 12288, 151936, 40960, 1e6, norm_eps=1e-6, qk_norm=True),
}  # fmt: skip
