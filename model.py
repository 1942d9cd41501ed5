"""A Llama-style Transformer in one file: configuration, attention, feed-forward, RoPE and a static KV cache.

    args = ModelArgs.from_hf(json.load(open("config.json")))
    model = Transformer(args)
    model.setup_caches(max_batch_size=1, max_seq_length=2048)
    logits = model(idx, input_pos)

One class covers Llama 1 to 3.3, CodeLlama, Mistral, Qwen 2, 2.5 and 3: the configuration alone decides. Query, key
and value projections are stacked into one matrix (`wqkv`), gate and up projections into another (`w13`), because at
batch size one a layer costs its launches as well as its bytes. Every shape is static, so that the decode step can be
recorded as one CUDA graph; what grows with the text is only `kv_pos`, the list of cache slots attention may read.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE frequencies are stretched to longer contexts: `linear` (Chen et al. 2023) or `llama3` (Llama 3.1)."""

    type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """The shape of a model. Sizes count elements; `context_length` is the number of positions it was trained for."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int  # width of the feed-forward
    vocab_size: int
    context_length: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False  # the output projection is the embedding table
    qkv_bias: bool = False
    out_bias: bool = False  # on the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on every query and key head (Qwen 3)
    sliding_window: int | None = None  # a query sees this many keys, itself included

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: RoPE turns pairs")

    def divided(self, n_ranks: int) -> "ModelArgs":
        """The shape of one rank's share under tensor parallelism (Megatron-LM, Shoeybi et al. 2019).

        Heads and the feed-forward's width are divided; more ranks than key heads share these; the vocabulary is
        divided only where it can be. Raises ValueError for what `n_ranks` does not divide.
        """
        for name in ("n_heads", "hidden_dim"):
            if getattr(self, name) % n_ranks:
                raise ValueError(f"{name} {getattr(self, name)} is not a multiple of {n_ranks}")
        if self.n_kv_heads % n_ranks and n_ranks % self.n_kv_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} and {n_ranks}: neither is a multiple of the other")
        return dataclasses.replace(
            self,
            n_heads=self.n_heads // n_ranks,
            n_kv_heads=max(1, self.n_kv_heads // n_ranks),
            hidden_dim=self.hidden_dim // n_ranks,
            vocab_size=self.vocab_size // (1 if self.vocab_size % n_ranks else n_ranks),
        )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ModelArgs":
        """The arguments that a Hugging Face `config.json` describes.

        Reads what transformers 4 wrote (`rope_theta`, `rope_scaling`) and what 5 writes (`rope_parameters`).
        Raises ValueError for an architecture or a setting that this Transformer does not compute.
        """
        architecture = (config.get("architectures") or [None])[0]
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
        config = {**ARCHITECTURES[architecture], **config}
        missing = [key for key in REQUIRED_HF_FIELDS if config.get(key) is None]
        if missing:
            raise ValueError(f"config.json has no {', '.join(missing)}")
        for key, supported in SUPPORTED_HF_VALUES.items():
            if config.get(key, supported[0]) not in supported:
                raise ValueError(f"config.json: {key} {config[key]!r} is not supported; supported: {supported}")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        n_heads = config["num_attention_heads"]
        return cls(
            dim=config["hidden_size"],
            n_layers=config["num_hidden_layers"],
            n_heads=n_heads,
            n_kv_heads=config.get("num_key_value_heads") or n_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // n_heads,
            hidden_dim=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            context_length=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            rope_scaling=_rope_scaling_from_hf(rope, config["max_position_embeddings"]),
            tie_embeddings=bool(config.get("tie_word_embeddings")),
            qkv_bias=bool(config["attention_bias"]),
            out_bias=bool(config["attention_bias"]) and architecture != "Qwen2ForCausalLM",
            mlp_bias=bool(config.get("mlp_bias")),
            qk_norm=architecture == "Qwen3ForCausalLM",
            sliding_window=_sliding_window_from_hf(config),
        )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelArgs":
        """The inverse of `dataclasses.asdict`. Raises ValueError for missing or unknown fields."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(config.keys() - fields)
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in config]
        if unknown or missing:
            raise ValueError(f"model config: unknown fields {unknown}, missing fields {missing}")
        scaling = config.get("rope_scaling")
        return cls(**{**config, "rope_scaling": RopeScaling(**scaling) if scaling else None})

    @classmethod
    def from_name(cls, name: str) -> "ModelArgs":
        """The preset called exactly `name`. Raises ValueError that lists the presets."""
        if name not in PRESETS:
            raise ValueError(f"unknown model {name!r}; choose from: {', '.join(PRESETS)}")
        return PRESETS[name]


# Architecture -> what its configuration class in transformers assumes when config.json does not say.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "attention_bias": False},
    "MistralForCausalLM": {
        "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "attention_bias": False, "sliding_window": 4096,
        "num_key_value_heads": 8,
    },
    "Qwen2ForCausalLM": {
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "attention_bias": True, "num_key_value_heads": 32,
        "sliding_window": 4096, "max_window_layers": 28,
    },
    "Qwen3ForCausalLM": {
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "attention_bias": False, "num_key_value_heads": 32,
        "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128,
    },
}  # fmt: skip
REQUIRED_HF_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
SUPPORTED_HF_VALUES: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}


def _rope_scaling_from_hf(rope: dict[str, Any], context_length: int) -> RopeScaling | None:
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
    return RopeScaling(
        "llama3",
        float(rope["factor"]),
        float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
        original,
    )


def _sliding_window_from_hf(config: dict[str, Any]) -> int | None:
    window = config.get("sliding_window")
    architecture = config["architectures"][0]
    if architecture.startswith("Llama") or (architecture.startswith("Qwen") and not config.get("use_sliding_window")):
        window = None  # transformers does not look at it either
    layer_types = set(config.get("layer_types") or [])
    unknown = layer_types - {"full_attention", "sliding_attention"}
    first_window_layer = config.get("max_window_layers", 0) if window and not layer_types else 0
    if unknown or len(layer_types) > 1 or 0 < first_window_layer < config["num_hidden_layers"]:
        raise ValueError(f"config.json: layers of several attention types {sorted(layer_types)} are not supported")
    no_layer_slides = layer_types == {"full_attention"} or first_window_layer >= config["num_hidden_layers"]
    return None if no_layer_slides else window


def _preset(dim, n_layers, n_heads, n_kv_heads, hidden_dim, vocab_size, context_length, rope_theta, **other):
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "hidden_dim": hidden_dim}
    rest = {"head_dim": dim // n_heads, "norm_eps": 1e-5, **other}
    return ModelArgs(**sizes, vocab_size=vocab_size, context_length=context_length, rope_theta=rope_theta, **rest)


_LLAMA_31, _LLAMA_32 = RopeScaling("llama3", 8.0), RopeScaling("llama3", 32.0)

# The shapes that benchmarks use, as their config.json on the hub gives them.
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


def rope_table(args: ModelArgs, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles (Su et al. 2021), float32 `[*positions.shape, head_dim // 2]`."""
    exponents = torch.arange(0, args.head_dim, 2, dtype=torch.float32, device=positions.device) / args.head_dim
    freqs = 1.0 / args.rope_theta**exponents
    scaling = args.rope_scaling
    if scaling is not None and scaling.type == "linear":
        freqs = freqs / scaling.factor
    elif scaling is not None:
        # Long wavelengths are stretched, short ones kept, those between interpolated (Llama 3.1's reference code).
        turns = scaling.original_context_length * freqs / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = kept.clamp(0, 1)
        freqs = freqs * kept + freqs / scaling.factor * (1 - kept)
    angles = positions.float()[..., None] * freqs
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x [B, S, H, D]`, pairing element i with i + D/2 as Hugging Face does; `cos`, `sin` `[B, S, D/2]`."""
    left, right = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    halves = left * cos - right * sin, right * cos + left * sin
    return torch.cat([half.to(x.dtype) for half in halves], dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square layer norm (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


@dataclass(frozen=True)
class Sharding:
    """How tensor parallelism divides a module; which dimension it is, the module's shape in a divided model tells.

    parts: sizes of what is stacked in the output, to be divided each on its own; None: it is one.
    collective: what makes one output of the ranks' own, a "sum", or a "gather" along the last dimension; None: none,
        the next module takes each rank's share.
    """

    parts: tuple[int, ...] | None = None
    collective: str | None = None


class Embedding(nn.Embedding):
    """`nn.Embedding`; as a rank's share of the vocabulary it gives zeros for the ids of others, for a sum to fill."""

    sharding = Sharding(collective="sum")
    first_id: int | None = None  # of a share; None: this is the whole vocabulary

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # a draw on `meta` imports the compiler, for a second
            super().reset_parameters()

    def forward(self, idx: Tensor) -> Tensor:
        if self.first_id is None:
            return super().forward(idx)
        row = idx - self.first_id
        ours = (row >= 0) & (row < self.num_embeddings)
        return super().forward(row.where(ours, 0)) * ours[..., None]


class Linear(nn.Linear):
    """`nn.Linear`, but its products of a few rows may stream the weight at the memory's speed.

    On a CPU `F.linear` reaches about 55 % of the read bandwidth in bfloat16. Whoever loads the model may have a
    `kernel(linear, x [M, K], ...) -> [M, N]` that reaches all of it. Without one a compiled product of one row is a
    multiply-and-sum that Inductor fuses, for about 85 %.
    """

    kernel: Callable[..., Tensor] | None = None
    kernel_rows: int | None = None  # of x that it takes at most; None: any
    has_collective = False  # what follows the module under tensor parallelism; a kernel cannot go past it

    def __init__(self, in_features: int, out_features: int, bias: bool, sharding: Sharding):
        super().__init__(in_features, out_features, bias)
        self.sharding = sharding

    def has_kernel_for(self, x: Tensor) -> bool:
        return self.kernel is not None and (self.kernel_rows is None or x.shape[:-1].numel() <= self.kernel_rows)

    def multiply(self, x: Tensor, *around: Any) -> Tensor:
        """The kernel's product for `x [M, K]`; `around` as for `project`."""
        return self.kernel(self, x, *around)

    def forward(self, x: Tensor) -> Tensor:
        if self.has_kernel_for(x):
            return self.multiply(x.flatten(0, -2), self.bias).unflatten(0, x.shape[:-1])
        if x.device.type == "cpu" and torch.compiler.is_compiling() and x.numel() == self.in_features:
            # Inductor stores what as_strided sees: x is made once, not again for every output.
            row = x.reshape(-1).as_strided((self.in_features,), (1,))
            # It sums up to 4096 terms in registers, longer rows through memory at two thirds of the speed.
            pieces = (-1, divisor(self.in_features, at_most=4096))
            products = self.weight.float().unflatten(1, pieces) * row.float().view(pieces)
            y = products.sum(-1).sum(-1).view(*x.shape[:-1], -1)
            return (y if self.bias is None else y + self.bias.float()).to(x.dtype)
        return F.linear(x, self.weight, self.bias)


def project(
    linear: nn.Module, x: Tensor, norm: RMSNorm | None = None, residual: Tensor | None = None, gated: bool = False
) -> Tensor:
    """`residual + linear(norm(x))`, or `gated`, half as wide: `silu(gate) * up`, what the Linear gives being gate, up.

    A Linear with a kernel does it all in there: at batch size one what happens between the products takes 10 % of the
    time of quantised weights.
    """
    if linear.has_kernel_for(x) and not linear.has_collective:
        scale, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        before = None if residual is None else residual.flatten(0, -2)
        y = linear.multiply(x.flatten(0, -2), linear.bias, scale, eps, before, gated)
        return y.unflatten(0, x.shape[:-1])
    y = linear(x if norm is None else norm(x))
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else residual + y


def divisor(n: int, at_most: int) -> int:
    """The largest divisor of `n` that is not above `at_most`."""
    return next(d for d in range(min(n, at_most), 0, -1) if n % d == 0)


KV_DTYPES = (torch.int8, torch.float8_e4m3fn)  # what a cache may be quantised to


def quantize_kv(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x [..., D]` in `dtype` and a float32 scale per vector, `[...]`, by which its greatest element meets the limit.

    The error of an element is at most 1 / 254 of that greatest one in int8, and 1 / 16 of its own in fp8.
    """
    limit = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    scales = x.float().abs().amax(-1).clamp(min=1e-30) / limit
    q = x.float() / scales[..., None]
    return (q if dtype.is_floating_point else q.round()).to(dtype), scales


class KVCache(nn.Module):
    """Keys and values of one layer, `[B, n_kv_heads, capacity, head_dim]`, allocated once and written in place.

    As int8 or fp8 they have scales, `[B, n_kv_heads, capacity]`: float32, a 32nd more bytes at 128 elements, so that
    the values' rounding is all that is lost.
    """

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.is_quantized = dtype in KV_DTYPES
        buffers = {"k": (shape, dtype), "v": (shape, dtype)}
        if self.is_quantized:
            buffers |= {"k_scales": (shape[:3], torch.float32), "v_scales": (shape[:3], torch.float32)}
        for name, (size, kind) in buffers.items():
            self.register_buffer(name, torch.zeros(size, device=device, dtype=kind), persistent=False)

    def write(self, input_pos: Tensor, k: Tensor, v: Tensor) -> None:
        """Store `k`, `v` `[B, n_kv_heads, S, D]` at the slots `input_pos [B, S]` of the first B rows."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None, None]
        heads = torch.arange(k.shape[1], device=k.device)[None, :, None]
        slots = input_pos[:, None, :]
        if self.is_quantized:
            k, self.k_scales[rows, heads, slots] = quantize_kv(k, self.k.dtype)
            v, self.v_scales[rows, heads, slots] = quantize_kv(v, self.v.dtype)
        self.k[rows, heads, slots] = k
        self.v[rows, heads, slots] = v

    def stored(self, n_rows: int, n_slots: int) -> list[Tensor]:
        """Views of the keys, the values and the scales, if there are any, of the first rows' first slots."""
        return [buffer[:n_rows, :, :n_slots] for buffer in self.buffers()]


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) over the fresh keys, or over the valid part of the cache.

    A quantised cache is read even where the fresh keys are at hand: so a text gives the same, computed at once or token
    by token. For up to 16 positions over the cache whoever loads the model may have put something faster in the place
    of `attend`, with the same arguments but the mask, into `kernels`, by the type of what is cached.
    """

    kernels: dict[torch.dtype, Callable[..., Tensor]] = {}
    kernel: Callable[..., Tensor] | None = None  # the cache's of these

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = args.n_heads, args.n_kv_heads, args.head_dim
        self.window = args.sliding_window or 0
        self.qkv_sizes = (args.n_heads * args.head_dim,) + (args.n_kv_heads * args.head_dim,) * 2
        self.wqkv = Linear(args.dim, sum(self.qkv_sizes), args.qkv_bias, Sharding(parts=self.qkv_sizes))
        self.wo = Linear(args.n_heads * args.head_dim, args.dim, args.out_bias, Sharding(collective="sum"))
        self.q_norm = RMSNorm(args.head_dim, args.norm_eps) if args.qk_norm else None
        self.k_norm = RMSNorm(args.head_dim, args.norm_eps) if args.qk_norm else None
        self.kv_cache: KVCache | None = None

    def forward(
        self,
        x: Tensor,
        norm: RMSNorm,
        cos: Tensor,
        sin: Tensor,
        input_pos: Tensor | None,
        n_slots: int,
        mask: Tensor | None,
    ) -> Tensor:
        """`x [B, S, dim]` plus what attention over `norm(x)` adds to it."""
        qkv = project(self.wqkv, x, norm)
        is_cached = input_pos is not None and mask is not None
        if self.kernel is not None and is_cached and x.shape[1] <= 16:  # last: a compiler guards what is asked
            y = self.kernel(self, qkv, cos, sin, input_pos, n_slots)
        else:
            y = self.attend(qkv, cos, sin, input_pos, n_slots, mask)
        return project(self.wo, y, residual=x)

    def heads(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, `[B, heads, S, D]`, of `qkv [B, S, ...]`; RoPE turns the first two."""
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in qkv.split(self.qkv_sizes, dim=-1))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, cos, sin).transpose(1, 2), apply_rope(k, cos, sin).transpose(1, 2), v.transpose(1, 2)

    def attend(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor | None, n_slots: int, mask: Tensor | None
    ) -> Tensor:
        """Each query's weighted mean of the values, `[B, S, heads * D]`; keys and values go to their slots."""
        q, k, v = self.heads(qkv, cos, sin)
        scales = []
        if input_pos is not None:
            self.kv_cache.write(input_pos, k, v)
            if mask is not None or self.kv_cache.is_quantized:
                k, v, *scales = self.kv_cache.stored(len(q), n_slots)
        if scales:
            k, v = ((x.float() * scale[..., None]).to(q.dtype) for x, scale in zip((k, v), scales, strict=True))
        if mask is None:  # the queries are the whole text so far: what is cached is what is at hand
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = grouped_attention(q, k, v, mask)
        return y.transpose(1, 2).flatten(2)


def attention_mask(args: ModelArgs, positions: Tensor, kv_pos: Tensor) -> Tensor | None:
    """Which slots `kv_pos [L]` the queries at `positions [B, S]` see, bool `[B, 1, S, L]`; None: plainly causal."""
    if kv_pos.shape[0] == positions.shape[1] and args.sliding_window is None:
        return None  # S consecutive queries are slots 0..S-1
    mask = kv_pos <= positions[:, None, :, None]
    if args.sliding_window is not None:
        mask = mask & (kv_pos > positions[:, None, :, None] - args.sliding_window)
    return mask


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of `q [B, H, S, D]` over `k`, `v` `[B, KV, L, D]`, with `mask` bool `[B, 1, S, L]`; `[B, H, S, D]`.

    The H / KV query heads that share a key head become rows of one product, so keys and values are read once and
    never copied per head.
    """
    (B, H, S, D), KV = q.shape, k.shape[1]
    q = q.reshape(B, KV, H // KV * S, D)
    if S == 1 and torch.compiler.is_compiling() and (q.is_cuda or H == KV):
        return decode_attention(q, k, v, mask).view(B, H, S, D)
    if S > 1:
        mask = mask.repeat(1, 1, H // KV, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(B, H, S, D)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`grouped_attention` of one position, spelled out for a compiler; `q [B, KV, G, D]`, the result like `q`.

    SDPA's kernels hand a head to a core each and multiply matrices of G rows; at G = 1 a fused multiply-and-sum reads
    the cache 5 times as fast (CPU, 512 to 4096 positions).
    """
    one_row = q.shape[2] == 1
    scores = (q.float() * k.float()).sum(-1)[:, :, None] if one_row else (q @ k.mT).float()  # [B, KV, G, L]
    probs = (scores * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    return (probs.mT * v.float()).sum(2, keepdim=True).to(q.dtype) if one_row else probs.to(v.dtype) @ v


class FeedForward(nn.Module):
    """`x + w2(silu(gate(norm(x))) * up(norm(x)))` (SwiGLU, Shazeer 2020); `w13` is gate above up."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w13 = Linear(args.dim, 2 * args.hidden_dim, args.mlp_bias, Sharding(parts=(args.hidden_dim,) * 2))
        self.w2 = Linear(args.hidden_dim, args.dim, args.mlp_bias, Sharding(collective="sum"))

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return project(self.w2, project(self.w13, x, norm, gated=True), residual=x)


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.feed_forward = FeedForward(args)

    @torch.compiler.nested_compile_region  # the blocks are alike: a compiler translates the first and reuses it
    def forward(self, x, cos, sin, input_pos, n_slots, mask):
        x = self.attention(x, self.attention_norm, cos, sin, input_pos, n_slots, mask)
        return self.feed_forward(x, self.ffn_norm)


class Transformer(nn.Module):
    """The decoder. Call it without caches for whole texts (training, scoring), with them to generate."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = Linear(args.dim, args.vocab_size, False, Sharding(collective="gather"))
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.max_batch_size = self.max_seq_length = 0
        self.quantization: dict[str, Any] | None = None  # what `checkpoint.load_model` found the Linears to be

    def setup_caches(
        self, max_batch_size: int, max_seq_length: int, spare: int = 0, kv_dtype: torch.dtype | None = None
    ) -> None:
        """Allocate the KV cache for `max_batch_size` rows of `max_seq_length` positions. Call it once.

        spare: slots behind them for tokens that are tried and discarded (speculative decoding).
        kv_dtype: one of KV_DTYPES to quantise the cache. None: the weights' own.
        Raises ValueError if the model was not made for so many positions.
        """
        if max_batch_size < 1 or not 1 <= max_seq_length <= self.args.context_length:
            raise ValueError(
                f"a cache of {max_batch_size} x {max_seq_length} positions does not fit: "
                f"this model takes at least 1 row and 1 to {self.args.context_length} positions"
            )
        self.max_batch_size, self.max_seq_length = max_batch_size, max_seq_length
        weight = self.tok_embeddings.weight
        # One slot to spare: a view of the whole cache would be contiguous, a layout that is compiled for on its own.
        n_kv_heads = self.layers[0].attention.n_kv_heads  # of this rank
        shape = (max_batch_size, n_kv_heads, max_seq_length + spare + 1, self.args.head_dim)
        for layer in self.layers:
            layer.attention.kv_cache = KVCache(shape, weight.device, kv_dtype or weight.dtype)
            layer.attention.kernel = layer.attention.kernels.get(kv_dtype or weight.dtype)
        slots = torch.arange(max_seq_length + spare, device=weight.device)
        cos, sin = rope_table(self.args, slots)
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self,
        idx: Tensor,
        input_pos: Tensor | None = None,
        kv_pos: Tensor | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token, `[B, S, vocab_size]`, or `[B, N, vocab_size]` with `logits_at`.

        idx: token ids, int `[B, S]`.
        input_pos: their positions, int `[S]` (shared) or `[B, S]` (per row), consecutive along S; keys and values are
            stored there. None: no cache, the text is complete and starts at 0.
        kv_pos: the cache slots that attention may read, `self.slots[:L]` with L above every position. None: found by
            looking at `input_pos`, which waits for the device and checks it (ValueError). Callers that pass it have
            checked.
        logits_at: int `[B, N]`, indices along S for which the output projection is computed. None: all.
        """
        B, S = idx.shape
        if input_pos is None:
            kv_pos = torch.arange(S, device=idx.device)
            positions = kv_pos.expand(B, S)
            cos, sin = rope_table(self.args, positions)
        else:
            if kv_pos is None:
                n_slots = self._check_positions(idx, input_pos)
                kv_pos = self.slots[:n_slots]
            positions = input_pos.expand(B, S)
            cos, sin = self.cos[positions], self.sin[positions]
        n_slots = kv_pos.shape[0]
        mask = attention_mask(self.args, positions, kv_pos)
        x = self.tok_embeddings(idx)
        cached_at = None if input_pos is None else positions
        for layer in self.layers:
            x = layer(x, cos, sin, cached_at, n_slots, mask)
        if logits_at is not None:
            x = x.gather(1, logits_at[:, :, None].expand(-1, -1, x.shape[-1]))
        return project(self.output, x, self.norm)

    def _check_positions(self, idx: Tensor, input_pos: Tensor) -> int:
        """The number of cache slots in use after `input_pos`; ValueError where it does not fit the cache."""
        if self.max_seq_length == 0:
            raise ValueError("input_pos needs a cache: call setup_caches(max_batch_size, max_seq_length) first")
        B, S = idx.shape
        if B > self.max_batch_size:
            raise ValueError(f"batch of {B} rows, but setup_caches was given max_batch_size={self.max_batch_size}")
        if input_pos.shape not in ((S,), (B, S)):
            raise ValueError(f"input_pos has shape {tuple(input_pos.shape)}; for idx {B, S} use {(S,)} or {B, S}")
        rows = input_pos.reshape(-1, S)
        if bool((rows.diff(dim=1) != 1).any()):
            raise ValueError("input_pos must be consecutive along a row: pad prompts on the right")
        first, last = int(rows.min()), int(rows.max())
        if first < 0 or last >= self.max_seq_length:
            raise ValueError(
                f"positions {first} to {last} do not fit the cache, whose capacity is {self.max_seq_length}"
            )
        return last + 1
