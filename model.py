"""A Llama-style Transformer in one file: configuration, attention, feed-forward, RoPE and a static KV cache.

    model = Transformer(ModelArgs(dim=4096, n_layers=32, ...))
    model.setup_caches(max_batch_size=1, max_seq_length=2048)
    logits = model(idx, input_pos)

One class covers Llama and the families that differ from it only in their configuration (docs/models.md). The query,
key and value projections are stacked into one matrix (`wqkv`), gate and up projections into another (`w13`): at batch
size one a layer's time goes to kernel launches as well as to reading weights. Every shape is static, so that the decode
step can be recorded as a CUDA graph; only `kv_pos`, the cache slots attention may read, grows with the text.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE is stretched to longer contexts; `fast/config.py` computes the factors of linear, llama3 and yarn."""

    factors: tuple[float, ...]  # a pair turns so much more slowly; a number for every pair that RoPE rotates
    attention_factor: float = 1.0  # of cosines and sines
    long_factors: tuple[float, ...] | None = None  # for texts longer than `short_length` (longrope, Ding et al. 2024)
    short_length: int = 0


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
    n_experts: int = 0  # of a layer, which then has a MoEFeedForward in place of a FeedForward
    experts_per_token: int = 0
    expert_dim: int = 0  # width of an expert
    norm_expert_weights: bool = True  # divide the weights of a token's experts by their sum
    dense_layers: tuple[int, ...] = ()  # layers without experts
    qk_norm: bool = False  # RMSNorm on every query and key head (Qwen 3)
    post_norms: bool = False  # RMSNorm on what attention and feed-forward add to the residual stream (Gemma 2)
    norm_offset: float = 0.0  # added to the weights of every norm
    activation: str = "silu"  # of the feed-forward's gates, one of ACTIVATIONS
    sliding_window: int | None = None  # a query sees this many keys, its own included
    sliding_layers: tuple[int, ...] | None = None  # layers with that window, the others see all keys; None: all layers
    sliding_rope_theta: float | None = None  # of those layers, without rope_scaling; None: RoPE is alike in all layers
    unrotated_layers: tuple[int, ...] = ()  # layers without RoPE (Kazemnejad et al. 2023)
    rotary_dim: int | None = None  # elements of a head that RoPE rotates; None: all
    attention_scale: float | None = None  # of queries times keys; None: head_dim ** -0.5
    embedding_scale: float = 1.0
    logits_scale: float = 1.0

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: RoPE rotates pairs of elements")
        if self.rotary_dim is not None and self.rotary_dim % 2:
            raise ValueError(f"rotary_dim {self.rotary_dim} must be even: RoPE rotates pairs of elements")

    def of_layer(self, i: int) -> "ModelArgs":
        """The arguments of a model whose layers are all as layer `i` of this one."""
        particular = {"sliding_layers": None, "sliding_rope_theta": None, "unrotated_layers": (), "dense_layers": ()}
        if self.sliding_layers is not None and i not in self.sliding_layers:
            particular["sliding_window"] = None
        elif self.sliding_rope_theta is not None:
            particular |= {"rope_theta": self.sliding_rope_theta, "rope_scaling": None}
        if i in self.unrotated_layers:
            particular |= {"rotary_dim": 0, "rope_scaling": None}
        if i in self.dense_layers:
            particular["n_experts"] = 0
        return dataclasses.replace(self, **particular)


def rope_table(args: ModelArgs, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the RoPE angles (Su et al. 2021), each float32 `[*positions.shape, head_dim / 2]`.

    A pair that is not rotated has angle 0. `attention_scale` is part of the table: queries and keys are multiplied by
    it, so scores, which attention multiplies by head_dim ** -0.5, by its square.
    length: of the text, or of the cache that will hold it, which decides between longrope's factors.
    """
    rotary_dim, scaling = args.head_dim if args.rotary_dim is None else args.rotary_dim, args.rope_scaling
    pairs = torch.arange(rotary_dim // 2, dtype=torch.float32, device=positions.device)
    freqs, sizes = 1.0 / args.rope_theta ** (2 * pairs / rotary_dim), torch.ones_like(pairs)
    if scaling is not None:
        is_long = scaling.long_factors is not None and length > scaling.short_length
        freqs = freqs / torch.tensor(scaling.long_factors if is_long else scaling.factors).to(positions.device)
        sizes = sizes * scaling.attention_factor
    unrotated = (0, args.head_dim // 2 - len(freqs))
    angles = positions.float()[..., None] * F.pad(freqs, unrotated)
    sizes = F.pad(sizes, unrotated, value=1.0)
    if args.attention_scale is not None:
        sizes = sizes * (args.attention_scale * args.head_dim**0.5) ** 0.5
    return angles.cos() * sizes, angles.sin() * sizes


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x [B, S, H, D]`, pairing element i with i + D/2 as Hugging Face does; `cos`, `sin` `[B, S, D/2]`."""
    left, right = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    halves = left * cos - right * sin, right * cos + left * sin
    return torch.cat([half.to(x.dtype) for half in halves], dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square layer norm (Zhang and Sennrich 2019), computed in float32; `offset` is added to its weights."""

    def __init__(self, dim: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float() + self.offset, self.eps).to(x.dtype)


@dataclass(frozen=True)
class Sharding:
    """How tensor parallelism divides a module; `tp.connect` finds the divided dimension by comparing shapes.

    parts: output sizes of the stacked projections, each of which is divided separately. None: a single projection.
    collective: how the ranks' outputs are combined: "sum", or "gather" along the last dimension. None: they are not,
        and each rank's next module takes its share.
    """

    parts: tuple[int, ...] | None = None
    collective: str | None = None


class Embedding(nn.Embedding):
    """`nn.Embedding`, times `scale`; `lookup` replaces the lookup of a rank's share of the vocabulary."""

    sharding = Sharding(collective="sum")
    lookup: Callable[[Tensor, Tensor], Tensor] = staticmethod(F.embedding)  # (ids, weight) -> rows

    def __init__(self, n_ids: int, dim: int, scale: float = 1.0):
        super().__init__(n_ids, dim, _weight=torch.randn(n_ids, dim))  # its own imports the compiler if on `meta`
        self.scale = scale

    def forward(self, idx: Tensor) -> Tensor:
        y = self.lookup(idx, self.weight)
        return y if self.scale == 1.0 else y * self.scale


def multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    n_experts: int = 1,
    experts: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """`x W^T + bias` for `x [..., K]` and `weight [N, K]`.

    x is flattened because torch before 2.14 specialises a three-dimensional product with a bias on the text's length.
    With `experts [..., k]`, `weight` stacks those of all experts, without a bias. Then x is multiplied by each of its
    experts' weights, `[..., k, N]`; or, with float32 `weights [..., k]`, its rows `[..., k, K]` by one each, and the
    sum of the results times these weights is returned, `[..., N]`.
    """
    if experts is None:
        return F.linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
    rows = x if weights is not None else x[..., None, :].expand(*experts.shape, -1)
    product = opaque_by_experts if torch.compiler.is_compiling() else by_experts
    y = product(rows, weight.unflatten(0, (n_experts, -1)), experts)
    return y if weights is None else (y * weights[..., None]).sum(-2).to(x.dtype)


def by_experts(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """Each row of `x [..., k, K]` times the weight of its expert, `experts [..., k]` of `weight [E, N, K]`."""
    if x.is_cuda and experts.shape[:-1].numel() <= 16:  # a step, which a CUDA graph records: no shape may depend on ids
        y = F.linear(x, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])
        return y.take_along_dim(experts[..., None, None], -2)[..., 0, :]
    y = x.new_empty(*experts.shape, weight.shape[1])
    for e in experts.unique().tolist():
        rows = experts == e
        y[rows] = F.linear(x[rows], weight[e])
    return y


opaque_by_experts = torch.library.custom_op("fast::by_experts", by_experts, mutates_args=())  # for torch.compile
opaque_by_experts.register_fake(lambda x, weight, experts: x.new_empty(*experts.shape, weight.shape[1]))


class Linear(nn.Linear):
    """`multiply` by a weight that tensor parallelism can divide; `collective` then combines the ranks' outputs."""

    collective: Callable[[Tensor], Tensor] | None = None

    def __init__(self, in_features: int, out_features: int, bias: bool, sharding: Sharding, n_experts: int = 1):
        super().__init__(in_features, n_experts * out_features, bias)
        self.sharding, self.n_experts = sharding, n_experts

    def forward(self, x: Tensor, experts: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        y = multiply(x, self.weight, self.bias, self.n_experts, experts, weights)
        return y if self.collective is None else self.collective(y)


class KVCache(nn.Module):
    """Keys and values of one layer, `[B, n_kv_heads, capacity, head_dim]`, allocated once and written in place."""

    is_quantized = False  # whether it rounds what it stores

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype):
        super().__init__()
        for name in ("k", "v"):
            self.register_buffer(name, torch.zeros(shape, device=device, dtype=dtype), persistent=False)

    def write(self, input_pos: Tensor, *values: Tensor) -> None:
        """Store `values [B, n_kv_heads, S, ...]`, one per buffer, at slots `input_pos [B, S]` of the first B rows."""
        rows = torch.arange(input_pos.shape[0], device=input_pos.device)[:, None, None]
        heads = torch.arange(self.k.shape[1], device=input_pos.device)[None, :, None]
        for buffer, value in zip(self.buffers(), values, strict=True):
            buffer[rows, heads, input_pos[:, None, :]] = value

    def stored(self, n_rows: int, n_slots: int) -> list[Tensor]:
        """Views of the first slots of the first rows: keys, values and whatever else it stores."""
        return [buffer[:n_rows, :, :n_slots] for buffer in self.buffers()]

    def read(self, n_rows: int, n_slots: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values, `[n_rows, n_kv_heads, n_slots, head_dim]`, in `dtype` if they are stored in another."""
        k, v = self.stored(n_rows, n_slots)
        return k, v


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023), over the text of this call or over the KV cache."""

    is_causal = True  # False: all queries of a call see what the last one sees; for kernels, which take no mask

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = args.n_heads, args.n_kv_heads, args.head_dim
        self.window = args.sliding_window or 0
        qkv_sizes = (args.n_heads * args.head_dim,) + (args.n_kv_heads * args.head_dim,) * 2
        self.wqkv = Linear(args.dim, sum(qkv_sizes), args.qkv_bias, Sharding(parts=qkv_sizes))
        self.wo = Linear(args.n_heads * args.head_dim, args.dim, args.out_bias, Sharding(collective="sum"))
        self.q_norm = RMSNorm(args.head_dim, args.norm_eps, args.norm_offset) if args.qk_norm else None
        self.k_norm = RMSNorm(args.head_dim, args.norm_eps, args.norm_offset) if args.qk_norm else None
        self.kv_cache: KVCache | None = None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor | None, n_slots: int, mask: Tensor | None
    ) -> Tensor:
        """`x [B, S, dim]` to `[B, S, dim]`; the other arguments as for `attend`."""
        return self.wo(self.attend(self.wqkv(x), cos, sin, input_pos, n_slots, mask))

    def heads(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split `qkv [B, S, (H + 2 KV) D]` into `[B, heads, S, D]` each, with RoPE applied to queries and keys."""
        heads = qkv.unflatten(-1, (-1, self.head_dim))  # [B, S, H + 2 KV, D]
        q, k, v = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, cos, sin).transpose(1, 2), apply_rope(k, cos, sin).transpose(1, 2), v.transpose(1, 2)

    def attend(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor | None, n_slots: int, mask: Tensor | None
    ) -> Tensor:
        """Each query's weighted mean of the values, `[B, S, H D]`.

        input_pos: cache slots `[B, S]` where the new keys and values are stored; attention then covers the first
            `n_slots` slots. None: no cache is used, the text is complete.
        mask: see `attention_mask`.
        """
        q, k, v = self.heads(qkv, cos, sin)
        if input_pos is not None:
            self.kv_cache.write(input_pos, k, v)
            if mask is not None or self.kv_cache.is_quantized:  # else these k and v are all the cache holds
                k, v = self.kv_cache.read(len(q), n_slots, q.dtype)
        return grouped_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def last_seen(positions: Tensor, is_causal: bool) -> Tensor:
    """The last position that each query at `positions [B, S]` sees: its own, or if not `is_causal` the last query's."""
    return positions if is_causal else positions[:, -1:].expand_as(positions)


def attention_mask(args: ModelArgs, positions: Tensor, kv_pos: Tensor) -> Tensor | None:
    """Which slots `kv_pos [L]` the queries at `positions [B, S]` see, bool `[B, 1, S, L]`. None: plain causal."""
    if kv_pos.shape[0] == positions.shape[1] and args.sliding_window is None:
        return None  # as many slots as queries: both are positions 0 to S - 1
    mask = kv_pos <= positions[:, None, :, None]
    if args.sliding_window is not None:
        mask = mask & (kv_pos > positions[:, None, :, None] - args.sliding_window)
    return mask


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of `q [B, H, S, D]` over `k`, `v` `[B, KV, L, D]`, `mask` as in `attention_mask`; `[B, H, S, D]`.

    With a mask, the H / KV query heads that share a key head become rows of one product, so that keys and values are
    read once and never copied per head.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    (B, H, S, D), KV = q.shape, k.shape[1]
    if S > 1:
        mask = mask.repeat(1, 1, H // KV, 1)
    y = F.scaled_dot_product_attention(q.reshape(B, KV, H // KV * S, D), k, v, attn_mask=mask)
    return y.reshape(B, H, S, D)


# Of gates: SiLU (Elfwing et al. 2017), GELU (Hendrycks and Gimpel 2016).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def gated(x: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up` for the halves of `x [..., 2 N]`."""
    gate, up = x.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


class FeedForward(nn.Module):
    """A gated feed-forward (Shazeer 2020); `w13` stacks the gate projection and, below it, the up projection.

    Those of `n_experts` experts are stacked, one below the other; `forward` is then told which compute a token.
    """

    def __init__(self, args: ModelArgs, hidden_dim: int, n_experts: int = 1):
        super().__init__()
        self.w13 = Linear(args.dim, 2 * hidden_dim, args.mlp_bias, Sharding((hidden_dim,) * 2 * n_experts), n_experts)
        self.w2 = Linear(hidden_dim, args.dim, args.mlp_bias, Sharding((args.dim,) * n_experts, "sum"), n_experts)
        self.activation = args.activation

    def forward(self, x: Tensor, experts: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        return self.w2(gated(self.w13(x, experts), self.activation), experts, weights)


class Router(nn.Module):
    """Chooses the experts of a token, int `[..., k]`, and how much each counts, float32 `[..., k]`."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.k, self.normalizes = args.experts_per_token, args.norm_expert_weights
        self.weight = nn.Parameter(torch.zeros(args.n_experts, args.dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, experts = F.linear(x.float(), self.weight.float()).softmax(-1).topk(self.k)
        return experts, weights / weights.sum(-1, keepdim=True) if self.normalizes else weights


class MoEFeedForward(nn.Module):
    """A mixture of experts (Shazeer et al. 2017): feed-forwards, a few of which compute a token."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.router, self.experts = Router(args), FeedForward(args, args.expert_dim, args.n_experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, *self.router(x))


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention_norm = RMSNorm(args.dim, args.norm_eps, args.norm_offset)
        self.attention = Attention(args)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps, args.norm_offset)
        self.feed_forward = MoEFeedForward(args) if args.n_experts else FeedForward(args, args.hidden_dim)
        after = RMSNorm if args.post_norms else nn.Identity
        self.attention_post_norm = after(args.dim, args.norm_eps, args.norm_offset)
        self.ffn_post_norm = after(args.dim, args.norm_eps, args.norm_offset)

    def forward(self, x, cos, sin, input_pos, n_slots, mask, residual=None):
        """`x [B, S, dim]` to `[B, S, dim]`; `residual`: if not x; the other arguments as for `Attention.attend`."""
        y = self.attention(self.attention_norm(x), cos, sin, input_pos, n_slots, mask)
        x = (x if residual is None else residual) + self.attention_post_norm(y)
        return x + self.ffn_post_norm(self.feed_forward(self.ffn_norm(x)))


class Transformer(nn.Module):
    """The decoder. Call it without caches for whole texts (training, scoring), with them to generate."""

    new_cache: Callable[..., KVCache] = KVCache  # makes the cache of a layer; `layers.speed_up` replaces it

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = Embedding(args.vocab_size, args.dim, args.embedding_scale)
        layers = [args.of_layer(i) for i in range(args.n_layers)]
        self.layers = nn.ModuleList(map(TransformerBlock, layers))
        self.kinds = list(dict.fromkeys(layers))  # layers of one kind share a RoPE table and a mask
        self.kind_of_layer = [self.kinds.index(layer) for layer in layers]
        self.norm = RMSNorm(args.dim, args.norm_eps, args.norm_offset)
        self.output = Linear(args.dim, args.vocab_size, False, Sharding(collective="gather"))
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.max_batch_size = self.max_seq_length = 0
        self.quantization: dict[str, Any] | None = None  # the scheme in the file, set by `checkpoint.load_model`

    def setup_caches(
        self, max_batch_size: int, max_seq_length: int, spare: int = 0, kv_dtype: torch.dtype | None = None
    ) -> None:
        """Allocate the KV cache for `max_batch_size` rows of `max_seq_length` positions, in place of an earlier one.

        spare: extra slots at the end, for draft tokens that may be rejected (speculative decoding).
        kv_dtype: what the cache stores, of the types that `new_cache` knows. None: the dtype of the weights.
        Raises ValueError for a size below 1. More positions than `context_length` are the caller's to answer for.
        """
        if max_batch_size < 1 or max_seq_length < 1:
            raise ValueError(f"a cache of {max_batch_size} x {max_seq_length} positions: it needs at least 1 x 1")
        self.max_batch_size, self.max_seq_length = max_batch_size, max_seq_length
        weight = self.tok_embeddings.weight
        # The last slot is never used: a contiguous `cache[:, :, :n]` would make torch.compile build a second graph.
        n_kv_heads = self.layers[0].attention.n_kv_heads  # this rank's share
        shape = (max_batch_size, n_kv_heads, max_seq_length + spare + 1, self.args.head_dim)
        for layer in self.layers:
            layer.attention.kv_cache = self.new_cache(shape, weight.device, kv_dtype or weight.dtype)
        slots = torch.arange(max_seq_length + spare, device=weight.device)
        cos, sin = zip(*(rope_table(kind, slots, max_seq_length) for kind in self.kinds), strict=True)
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("cos", torch.stack(cos), persistent=False)  # [kinds, slots, head_dim / 2]
        self.register_buffer("sin", torch.stack(sin), persistent=False)

    def forward(
        self,
        idx: Tensor,
        input_pos: Tensor | None = None,
        kv_pos: Tensor | None = None,
        logits_at: Tensor | None = None,
        hidden_at: tuple[int, ...] = (),
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of the next token, `[B, S, vocab_size]`, or `[B, N, vocab_size]` with `logits_at`.

        idx: token ids, int `[B, S]`.
        input_pos: their positions, int `[S]` (shared) or `[B, S]` (per row), consecutive along S; keys and values are
            stored there. None: no cache, the text is complete and starts at 0.
        kv_pos: the cache slots that attention may read, `self.slots[:L]` with L greater than every position; then
            nothing is checked. None: `input_pos` is checked (ValueError) and L computed from it, which waits for the
            device.
        logits_at: int `[B, N]`, indices along S for which the output projection is computed. None: all.
        hidden_at: numbers of layers. What enters these (`n_layers`: what leaves the last) is returned as well, side by
            side, `[B, S, len(hidden_at) * dim]`.
        """
        if input_pos is not None and kv_pos is None:
            n_slots = self._check_positions(idx, input_pos)
            kv_pos = self.slots[:n_slots]
        x, hidden = self.run_layers(self.tok_embeddings(idx), input_pos, kv_pos, hidden_at)
        if logits_at is not None:
            x = x.gather(1, logits_at[:, :, None].expand(-1, -1, x.shape[-1]))
        logits = self.output(self.norm(x))
        logits = logits if self.args.logits_scale == 1.0 else logits * self.args.logits_scale
        return (logits, torch.cat(hidden, -1)) if hidden_at else logits

    def run_layers(
        self, x: Tensor, input_pos: Tensor | None, kv_pos: Tensor | None, hidden_at: tuple[int, ...] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """What leaves the last layer if `x [B, S, dim]` enters the first, and what enters those `hidden_at`."""
        B, S = x.shape[:2]
        if input_pos is None:
            kv_pos = torch.arange(S, device=x.device)
            positions = kv_pos.expand(B, S)
            tables = [rope_table(kind, positions, S) for kind in self.kinds]
        else:
            positions = input_pos.expand(B, S)
            tables = [(cos[positions], sin[positions]) for cos, sin in zip(self.cos, self.sin, strict=True)]
        n_slots = kv_pos.shape[0]  # read before the loop, or torch.compile would compile every layer separately
        masks = [attention_mask(kind, positions, kv_pos) for kind in self.kinds]
        cached_at, hidden = None if input_pos is None else positions, {}
        for i, (layer, kind) in enumerate(zip(self.layers, self.kind_of_layer, strict=True)):
            if i in hidden_at:
                hidden[i] = x
            x = layer(x, *tables[kind], cached_at, n_slots, masks[kind])
        hidden[len(self.layers)] = x
        return x, [hidden[i] for i in hidden_at]

    def _check_positions(self, idx: Tensor, input_pos: Tensor) -> int:
        """The number of cache slots in use once `input_pos` is stored; ValueError if it does not fit the cache."""
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
            raise ValueError(f"positions {first} to {last} do not fit the cache of {self.max_seq_length} positions")
        return last + 1
