"""The second step of `gpu_report.py`: is what this GPU computes right?

    for row in kernel_rows(card): print(row.what, row.is_right)

Worth knowing: what is right follows from float32 arithmetic in plain PyTorch, on the same weights; limits are in units
of the result's rounding, or of the error that a CPU makes.
"""

import copy
from collections.abc import Iterable, Iterator

import torch
from gpu_card import MODELS, MODES, WHOLE_MODELS, Card, Part, Row, within
from measuring import SHAPES, build_model, meta_model
from torch import Tensor, nn

from checkpoint import load_model
from decoding import build_steps, stream
from generate import DEMO
from linear import LINEARS, kernels_missing, pack_linears, quantized_linears
from model import KV_DTYPES, KVCache, Linear, ModelArgs, RMSNorm, Sharding, Transformer, grouped_attention, project
from sampling import Sampling
from speculative import SPARE, PromptLookup, build_speculative_steps, speculate
from tokenizer import load_tokenizer


class Surrounded(nn.Module):
    """One of a layer's products with what the model puts around it: a norm before, gates or a residual after."""

    def __init__(self, name: str, linear: nn.Module, device: str, dtype: torch.dtype):
        super().__init__()
        self.name, self.linear, self.norm = name, linear, None
        if name in ("wqkv", "w13", "output"):
            self.norm = RMSNorm(linear.in_features, 1e-5).to(device, dtype).requires_grad_(False)

    def inputs(self, rows: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Noise to call it with: `x [1, rows, K]`, `residual [1, rows, N]`."""
        widths = self.linear.in_features, self.linear.out_features
        return tuple(torch.randn(1, rows, width, device=device, dtype=dtype) for width in widths)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        residual = residual if self.name in ("wo", "w2") else None
        return project(self.linear, x, self.norm, residual, gated=self.name == "w13")


def product_error(run: Surrounded, x: Tensor, residual: Tensor, y: Tensor) -> float:
    """How far `y` is from float32 arithmetic on the same weights, in units of x's rounding."""
    linear, is_quantized = run.linear, hasattr(run.linear, "dequantize")
    with torch.device("meta"):
        plain = Linear(linear.in_features, linear.out_features, False, Sharding())
    weight = linear.dequantize(torch.float32) if is_quantized else linear.weight.float()
    plain.weight = nn.Parameter(weight, requires_grad=False)
    exact = Surrounded(run.name, plain, str(x.device), torch.float32)
    if run.norm is not None:
        exact.norm.weight.copy_(run.norm.weight)
    return vector_error(y, exact(x.float(), residual.float()), x.dtype)


def vector_error(y: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """How far the worst of the vectors `y [..., D]` is from `exact`, relative to its norm, in units of a rounding."""
    return float(((y.float() - exact).norm(dim=-1) / exact.norm(dim=-1)).max()) / torch.finfo(dtype).eps


def random_product(name: str, mode: str, args: ModelArgs, device: str, dtype: torch.dtype) -> Surrounded:
    """A quantised product of such a model, of which the norm, the gates and the residual are a large part."""
    shape, scheme = SHAPES[name](meta_model(args, dtype, None)), MODES[mode]
    weight = torch.randn(shape.out_features, shape.in_features, device=device) / shape.in_features**0.5
    run = Surrounded(name, LINEARS[scheme["mode"]].from_float(weight, **scheme), device, dtype)
    if run.norm is not None:
        run.norm.weight.uniform_(0.5, 2)
    return run


def product_errors(mode: str, args: ModelArgs, device: str, dtype: torch.dtype, all_rows: Iterable[int]) -> list[float]:
    """The errors of the GPU's kernels for a product with norm and gates and for one with a residual, by rows of x."""
    errors = []
    for name in ("w13", "w2"):
        run = random_product(name, mode, args, device, dtype)
        run.linear.has_kernel = True
        for rows in all_rows:
            x, residual = run.inputs(rows, device, dtype)
            errors.append(product_error(run, 3 * x, residual, run(3 * x, residual)))
    return errors


def attention_error(
    kv_dtype: torch.dtype, n_queries: int, n_slots: int, args: ModelArgs, device: str, dtype: torch.dtype
) -> float:
    """How far the GPU's kernel is from float32 arithmetic on the same cache, in units of the queries' rounding."""
    first = torch.tensor([[0], [n_slots // 3], [n_slots - n_queries]], device=device)  # of three rows
    positions = first + torch.arange(n_queries, device=device)
    cache = KVCache((3, args.n_kv_heads, n_slots + 1, args.head_dim), torch.device(device), kv_dtype)
    fresh = torch.randn(2, 3, args.n_kv_heads, n_slots, args.head_dim, device=device, dtype=dtype)
    slots = torch.arange(n_slots, device=device)
    cache.write(slots.expand(3, -1), *fresh)
    q = torch.randn(3, args.n_heads, n_queries, args.head_dim, device=device, dtype=dtype)
    k, v, *scales = cache.stored(3, n_slots)
    exact = [x.float() * scale[..., None] for x, scale in zip((k, v), scales, strict=True)] if scales else (k, v)
    exact = grouped_attention(q.float(), *(x.float() for x in exact), slots <= positions[:, None, :, None])
    return vector_error(torch.ops.fast_gpu.decode_attention(q, k, v, positions, 0, *scales), exact, dtype)


def kernel_rows(card: Card) -> Iterator[Row]:
    """Every kernel beside plain PyTorch in float32, at the 8B shape; the limit is twice the rounding of the result."""
    if reason := kernels_missing(card.device, card.dtype):
        yield Row(reason, "", None, None)
        return
    for mode, all_rows in (("int8", (1, 2, 4, 6, 20)), ("int4", (1, 2, 4, 6, 20)), ("int4 g128", (1, 6))):
        errors = product_errors(mode, MODELS["8B"], card.device, card.dtype, all_rows)
        yield error_row(f"{mode} products, {all_rows[0]} to {all_rows[-1]} rows", errors)
    from kernels import gpu_attention  # noqa: F401 - registers the operator

    has_fp8 = torch.cuda.get_device_capability(card.device) >= (8, 9)
    for kv_dtype in (card.dtype, *KV_DTYPES[: 2 if has_fp8 else 1]):
        errors = [attention_error(kv_dtype, n, 8192, MODELS["8B"], card.device, card.dtype) for n in (1, 6)]
        yield error_row(f"attention over a cache in {str(kv_dtype).removeprefix('torch.')}", errors)


def error_row(what: str, errors: list[float]) -> Row:
    worst = float(torch.tensor(errors).max())  # NaN if one is
    return within(f"{what}: worst error", "eps", 2.0, worst, errors=errors)


TINY = ModelArgs(
    dim=256, n_layers=4, n_heads=8, n_kv_heads=2, head_dim=32, hidden_dim=512, vocab_size=512, context_length=256,
    norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip


def cached_logits(model: Transformer, idx: Tensor, n_prefilled: int) -> Tensor:
    """Logits of every position: a prefill, then one position at a time."""
    model.setup_caches(*idx.shape)
    positions = torch.arange(idx.shape[1], device=idx.device)
    parts = [(0, n_prefilled), *((i, i + 1) for i in range(n_prefilled, idx.shape[1]))]
    return torch.cat([model(idx[:, a:b], positions[a:b]) for a, b in parts], 1).float().cpu()


def logits_rows(card: Card) -> Iterator[Row]:
    """A tiny model's logits through the cache, on the device beside float32 on the CPU, relative to their norm."""
    float32 = build_model(TINY, "cpu", torch.float32)
    idx = torch.randint(TINY.vocab_size, (2, 40))

    def error(model: Transformer, exact: Tensor) -> float:
        found = cached_logits(model, idx.to(model.norm.weight.device), 32)
        return float((found - exact).norm() / exact.norm())

    exact = float32(idx)
    found = error(copy.deepcopy(float32).to(card.device), exact)
    yield within("tiny model, float32: logits beside the CPU's", "relative", 1e-4, found)
    limit = 3 * error(copy.deepcopy(float32).to(card.dtype), exact)  # of a CPU's own rounding
    for mode in WHOLE_MODELS:
        model = copy.deepcopy(float32)
        for name, linear in list(quantized_linears(model, {})) if MODES[mode] else []:
            parent, _, child = name.rpartition(".")
            swapped = LINEARS[MODES[mode]["mode"]].from_float(linear.weight, **MODES[mode])
            setattr(model.get_submodule(parent), child, swapped)
        exact = model(idx)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(card.dtype)
        model = model.to(card.device)
        pack_linears(model, card.dtype)
        yield within(f"tiny model, {mode}: logits beside the CPU's float32", "relative", limit, error(model, exact))


def greedy_rows(card: Card) -> Iterator[Row]:
    """The demo's greedy tokens in float32: compiled as eager, speculating as plain."""
    n, greedy, prompts = 100, Sampling(temperature=0), [load_tokenizer(DEMO).encode("The module")]
    model = load_model(DEMO, card.device, torch.float32)
    model.setup_caches(1, 256, spare=SPARE)
    eager = [token for (token,) in stream(build_steps(model, greedy), prompts, n)]
    plain = build_steps(model, greedy, card.compile)
    steps = build_speculative_steps(plain, PromptLookup(model, greedy, 5), greedy, card.compile)
    found = {
        "compiled as eager": [token for (token,) in stream(plain, prompts, n)],
        "speculating as plain": [token for step in speculate(steps, prompts, n) for token in step.ids[0]][:n],
    }
    for name, tokens in found.items():
        same = next((i for i, (a, b) in enumerate(zip(tokens, eager, strict=True)) if a != b), n)
        yield Row(f"demo, float32: greedy tokens that agree, {name}", "tokens", n, same, same == n)


CORRECTNESS: list[Part] = [kernel_rows, logits_rows, greedy_rows]
