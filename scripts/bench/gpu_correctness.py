"""The second step of `gpu_report.py`: does this GPU compute correctly?

    for row in kernel_rows(card): print(row.what, row.is_right)

Worth knowing: the reference is float32 arithmetic in plain PyTorch on the same weights. Most limits are multiples of
the result dtype's eps, or of the error that a CPU makes in the same dtype.
"""

import copy
import dataclasses
import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from fast.checkpoint import load_model
from fast.cli import DEMO
from fast.decoding import build_steps, stream
from fast.drafting import SPARE, DraftModel
from fast.layers import FastKVCache, fast_linear, fused, kernels_missing, speed_up
from fast.quantized import KV_DTYPES, LINEARS, QuantizedLinear, quantized_linears
from fast.sampling import Sampling
from fast.speculative import PromptLookup, build_speculative_steps, speculate
from fast.tokenizer import load_tokenizer
from kernels import gpu
from model import (
    Attention,
    KVCache,
    Linear,
    ModelArgs,
    RMSNorm,
    Sharding,
    Transformer,
    attention_mask,
    grouped_attention,
    last_seen,
    rope_table,
)
from scripts.bench.gpu_card import MODELS, MODES, WHOLE_MODELS, Card, Part, Row, within
from scripts.bench.random_models import FORMS, SHAPES, build_model, meta_model, random_groups


class FusedProduct(nn.Module):
    """A Linear with the operations around it in the model: a norm before; gates (SwiGLU) or a residual after."""

    def __init__(self, name: str, linear: nn.Module, device: str, dtype: torch.dtype):
        super().__init__()
        self.name, self.linear, self.norm = name, linear, None
        if name in ("wqkv", "w13", "output"):
            self.norm = RMSNorm(linear.in_features, 1e-5).to(device, dtype).requires_grad_(False)

    def inputs(self, rows: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Random inputs: `x [1, rows, K]`, `residual [1, rows, N]`."""
        widths = self.linear.in_features, self.linear.out_features
        return tuple(torch.randn(1, rows, width, device=device, dtype=dtype) for width in widths)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        residual = residual if self.name in ("wo", "w2") else None
        return fused(self.linear, x, self.norm, residual, activation="silu" if self.name == "w13" else "")


def product_error(run: FusedProduct, x: Tensor, residual: Tensor, y: Tensor) -> float:
    """The error of `y` against the same product with `model.Linear` in float32, in units of the eps of x's dtype."""
    linear, is_quantized = run.linear, isinstance(run.linear, QuantizedLinear)
    with torch.device("meta"):
        plain = Linear(linear.in_features, linear.out_features, False, Sharding())
    weight = linear.dequantize(torch.float32) if is_quantized else linear.weight.float()
    plain.weight = nn.Parameter(weight, requires_grad=False)
    exact = FusedProduct(run.name, plain, str(x.device), torch.float32)
    if run.norm is not None:
        exact.norm.weight.copy_(run.norm.weight)
    return vector_error(y, exact(x.float(), residual.float()), x.dtype)


def vector_error(y: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """The largest relative error (L2 norm) of the vectors `y [..., D]`, in units of the eps of `dtype`."""
    return float(((y.float() - exact).norm(dim=-1) / exact.norm(dim=-1)).max()) / torch.finfo(dtype).eps


def random_product(name: str, mode: str, args: ModelArgs, device: str, dtype: torch.dtype) -> FusedProduct:
    """A product with random weights, scaled so that norm, gates and residual matter to the result."""
    linear, scheme = SHAPES[name](meta_model(args, dtype, None)), MODES.get(mode)
    weight = torch.randn(linear.out_features, linear.in_features, device=device) / linear.in_features**0.5
    if mode in FORMS and scheme is None:
        linear = random_groups(*weight.shape, 128, mode, device, linear.in_features**-0.5)
    elif scheme is None:
        linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    else:
        linear = LINEARS[scheme["mode"]].from_float(weight, **scheme)
    run = FusedProduct(name, linear, device, dtype)
    if run.norm is not None:
        run.norm.weight.uniform_(0.5, 2)
    return run


def product_errors(mode: str, args: ModelArgs, device: str, dtype: torch.dtype, all_rows: Iterable[int]) -> list[float]:
    """Errors of our kernels for each number of rows, for a product with norm and gates and one with a residual."""
    errors = []
    for name in ("w13", "w2"):
        run = random_product(name, mode, args, device, dtype)
        fast = FusedProduct(name, fast_linear(run.linear, gpu), device, dtype)
        fast.norm = run.norm
        for rows in all_rows:
            x, residual = run.inputs(rows, device, dtype)
            errors.append(product_error(run, 3 * x, residual, fast(3 * x, residual)))
    return errors


def attention_error(
    args: ModelArgs,
    positions: Tensor,
    n_slots: int,
    kv_dtype: torch.dtype,
    device: str,
    dtype: torch.dtype,
    is_causal: bool = True,
) -> float:
    """The largest error of our attention kernel at `positions [B, S]` and of what it caches, in units of `dtype`'s eps.

    The reference attends in float32 to what the kernel has cached, not to what PyTorch would cache: in fp8 the two may
    round an element differently, since PyTorch divides by 448 less exactly on a GPU. Before the call, the cache holds
    NaN from the new positions on, to reveal a wrong slot. Values are so small that float16 would underflow in a kernel
    that multiplies attention weights by the scales of quantised values.
    """
    B, S = positions.shape
    attention = Attention(args).to(device, dtype).requires_grad_(False)
    attention.is_causal = is_causal
    for norm in (attention.q_norm, attention.k_norm):
        if norm is not None:
            norm.weight.uniform_(0.5, 2)
    shape, slots = (B, args.n_kv_heads, n_slots, args.head_dim), torch.arange(n_slots, device=device)
    cache = attention.kv_cache = FastKVCache(gpu.attention, shape, torch.device(device), kv_dtype)
    k, v = torch.randn(2, *shape, device=device, dtype=dtype)
    cache.write(slots.expand(B, -1), k, v / 1000)
    sizes = attention.wqkv.sharding.parts
    qkv = torch.randn(B, S, sum(sizes), device=device, dtype=dtype)
    qkv[..., -sizes[2] :] /= 1000
    cos, sin = rope_table(args, positions, args.context_length)
    twin = copy.deepcopy(cache)
    q, k, v = attention.heads(qkv, cos, sin)
    twin.write(positions, k, v)
    mask = attention_mask(args, last_seen(positions, is_causal), slots)
    for buffer in list(cache.buffers())[-2:]:
        buffer[(slots >= positions[:, :1])[:, None].expand(shape[:3])] = torch.nan
    y = cache.attend(attention, qkv, cos, sin, positions, n_slots, mask).unflatten(-1, (-1, args.head_dim))
    is_valid = (slots <= positions[:, -1:])[:, None, :, None]
    stored = numbers(cache)
    exact = grouped_attention(q.float(), *(torch.where(is_valid, x, 0) for x in stored), mask).transpose(1, 2)
    errors = [vector_error(y, exact, dtype)]
    for ours, theirs in zip(stored, numbers(twin), strict=True):
        if not torch.equal(ours.isnan(), ~is_valid.expand_as(ours)):
            return torch.inf  # stored too few positions, or too many
        difference = torch.where(is_valid, ours - theirs, 0).norm() / torch.where(is_valid, theirs, 0).norm()
        errors.append(float(difference) / torch.finfo(dtype).eps)
    return float(torch.tensor(errors).max())  # torch's max returns NaN if one is NaN, Python's may not


def numbers(cache: KVCache) -> list[Tensor]:
    """All keys and values, dequantised to float32."""
    k, v, *scales = (buffer.float() for buffer in cache.buffers())
    return [x * scale[..., None] for x, scale in zip((k, v), scales, strict=True)] if scales else [k, v]


def kernel_rows(card: Card) -> Iterator[Row]:
    """Every kernel against plain PyTorch in float32, at the 8B shape; the limit is 2 eps of the result's dtype."""
    if reason := kernels_missing(card.device, card.dtype):
        yield Row(reason, "", None, None)
        return
    some = (1, 2, 4, 6, 20)
    modes = {"bf16": some, "int8": some, "int4": some, "int4 g128": (1, 6)}
    for mode, all_rows in (modes | {form: (1, 6, 20) for form in FORMS if form not in modes}).items():
        errors = product_errors(mode, MODELS["8B"], card.device, card.dtype, all_rows)
        yield error_row(f"{mode} products, {all_rows[0]} to {all_rows[-1]} rows", errors)
    first = torch.tensor([[0], [2730], [8186]], device=card.device)  # the first new position of each row
    args, normed = MODELS["8B"], dataclasses.replace(MODELS["8B"], qk_norm=True, sliding_window=1000)
    has_fp8 = torch.cuda.get_device_capability(card.device) >= (8, 9)
    for kv_dtype in (card.dtype, *KV_DTYPES[: 2 if has_fp8 else 1]):
        errors = [
            attention_error(
                shape, first + torch.arange(n, device=card.device), 8192, kv_dtype, card.device, card.dtype, c
            )
            for n, shape, c in ((1, args, True), (6, args, True), (2, normed, True), (6, normed, False))
        ]
        yield error_row(f"attention over a cache in {str(kv_dtype).removeprefix('torch.')}", errors)


def error_row(what: str, errors: list[float]) -> Row:
    worst = float(torch.tensor(errors).max())  # torch's max returns NaN if one is NaN, Python's may not
    return within(f"{what}: worst error", "eps", 2.0, worst, errors=errors)


TINY = ModelArgs(
    dim=256, n_layers=4, n_heads=8, n_kv_heads=2, head_dim=32, hidden_dim=512, vocab_size=512, context_length=256,
    norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip


EXPERTS = {"n_experts": 8, "experts_per_token": 2, "expert_dim": 256}
TINY_MODELS = {"tiny model": TINY, "with experts": dataclasses.replace(TINY, **EXPERTS)}


def cached_logits(model: Transformer, idx: Tensor, n_prefilled: int) -> Tensor:
    """Logits of every position: prefill, then decode one position at a time."""
    model.setup_caches(*idx.shape)
    positions = torch.arange(idx.shape[1], device=idx.device)
    parts = [(0, n_prefilled), *((i, i + 1) for i in range(n_prefilled, idx.shape[1]))]
    return torch.cat([model(idx[:, a:b], positions[a:b]) for a, b in parts], 1).float().cpu()


def logits_rows(card: Card, which: str = "tiny model") -> Iterator[Row]:
    """Relative errors of a tiny model's logits, computed with the cache on the device, against float32 on the CPU.

    With experts, the median over the positions of a prefill or that over those after it: where two experts are almost
    equally probable, a position may have the other one.
    """
    float32 = build_model(TINY_MODELS[which], "cpu", torch.float32)
    idx = torch.randint(TINY.vocab_size, (2, 40))

    def error(model: Transformer, exact: Tensor) -> float:
        found = cached_logits(model, idx.to(model.tok_embeddings.weight.device), 32)
        if model.args.n_experts:
            each = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
            return float(torch.stack((each[:, :32].median(), each[:, 32:].median())).max())
        return float((found - exact).norm() / exact.norm())

    exact = float32(idx)
    found = error(copy.deepcopy(float32).to(card.device), exact)
    yield within(f"{which}, float32: logits beside the CPU's", "relative", 1e-4, found)
    limit = 3 * error(copy.deepcopy(float32).to(card.dtype), exact)  # three times the CPU's own rounding error
    for mode in WHOLE_MODELS:
        model = copy.deepcopy(float32)
        for name, linear in list(quantized_linears(model, {})) if MODES[mode] else []:
            parent, _, child = name.rpartition(".")
            swapped = LINEARS[MODES[mode]["mode"]].from_float(linear.weight, **MODES[mode])
            swapped.n_experts = linear.n_experts
            setattr(model.get_submodule(parent), child, swapped)
        exact = model(idx)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(card.dtype)
        model = model.to(card.device)
        speed_up(model, card.dtype)
        yield within(f"{which}, {mode}: logits beside the CPU's float32", "relative", limit, error(model, exact))


def greedy_rows(card: Card) -> Iterator[Row]:
    """The demo's greedy tokens in float32: compiled and speculative decoding must give the same as eager decoding.

    The draft model computes in the card's own type, with our kernels.
    """
    n, greedy, prompts = 100, Sampling(temperature=0), [load_tokenizer(DEMO).encode("She could not")]
    model = load_model(DEMO, card.device, torch.float32)
    model.setup_caches(1, 256, spare=SPARE)
    eager = [token for (token,) in stream(build_steps(model, greedy), prompts, n)]
    plain = build_steps(model, greedy, card.compile)
    draft = load_model(DEMO.parent / "draft", card.device, card.dtype)
    draft.setup_caches(1, 256, spare=SPARE)

    def speculating(drafter: DraftModel | PromptLookup, k: int | str) -> list[int]:
        steps = build_speculative_steps(plain, drafter, greedy, k, card.compile)
        return [token for step in speculate(steps, prompts, n) for token in step.ids[0]][:n]

    found = {
        "compiled as eager": lambda: [token for (token,) in stream(plain, prompts, n)],
        "speculating as plain": lambda: speculating(PromptLookup(), "auto"),
        "with a draft model as plain": lambda: speculating(DraftModel(draft, greedy, compile=card.compile), 5),
    }
    for name, generate in found.items():
        tokens = generate()
        same = next((i for i, (a, b) in enumerate(zip(tokens, eager, strict=True)) if a != b), n)
        yield Row(f"demo, float32: greedy tokens that agree, {name}", "tokens", n, same, same == n)


CORRECTNESS: list[Part] = [kernel_rows, logits_rows, greedy_rows, functools.partial(logits_rows, which="with experts")]
