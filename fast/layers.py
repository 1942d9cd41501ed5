"""Fast layers that replace the textbook layers of `model.py` and compute the same results.

    speed_up(model, torch.bfloat16)  # after the weights are loaded, before `setup_caches`

Only this file replaces layers of the model by kernels. At batch size one a layer's time goes to launches as well as to
reading weights, so a `FastBlock` is five operators: norms, SiLU and residuals are fused into the products. Where a
backend (`kernels/__init__.py`) has no kernel, the textbook layer stays: new families and quantisations work at once.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fast.quantized import GroupedLinear, Int8Linear, QuantizedKVCache, QuantizedLinear, in_order
from kernels import GATES, Product, cpu, gpu
from model import (
    Attention,
    Linear,
    MoEFeedForward,
    RMSNorm,
    Router,
    Transformer,
    TransformerBlock,
    gated,
    grouped_attention,
    last_seen,
    multiply,
)

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": gpu}


def kernels_missing(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why plain PyTorch computes products (and attention, on a GPU), in one line; None if there are kernels."""
    backend = BACKENDS.get(torch.device(device).type)
    if backend is None:
        return f"there are no kernels for {device}"
    return backend.missing(device, dtype)


def backend_for(device: torch.device | str, dtype: torch.dtype) -> ModuleType | None:
    """The backend whose kernels take activations in `dtype` on `device`, if there is one."""
    return BACKENDS[torch.device(device).type] if kernels_missing(device, dtype) is None else None


class Operator(nn.Module):
    """A backend's operator and, as buffers, the tensors that it takes after its input."""

    def __init__(self, product: Product):
        super().__init__()
        self.operator, self.names = product.operator, tuple(product.tensors)
        for name, tensor in product.tensors.items():
            self.register_buffer(name, tensor)

    def call(self, x: Tensor, *others: Any) -> Any:
        return self.operator(x.flatten(0, -2), *(getattr(self, name) for name in self.names), *others)


class FastLinear(Operator):
    """A Linear whose product is a backend's operator."""

    def __init__(self, linear: nn.Module, product: Product):
        super().__init__(product)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.collective = linear.bias, linear.collective
        self.gather, order = getattr(linear, "gather", None), getattr(linear, "order", None)
        if order is None:
            self.order = None  # no buffer: torch.compile's guards would check it at every step
        else:
            self.register_buffer("order", order)

    def forward(
        self,
        x: Tensor,
        experts: Tensor | None = None,
        weights: Tensor | None = None,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        activation: str = "",
    ) -> Tensor:
        """As `fused`, in one operator; a collective comes last, and `fused` then passes no residual."""
        if self.order is not None:
            x, norm = in_order(self, x if norm is None else norm(x)), None
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        flat = [None if t is None else t.flatten(0, -2) for t in (residual, experts, weights)]
        y = self.call(x, self.bias, weight, eps, flat[0], activation, *flat[1:])
        shape = x.shape[:-1] if experts is None else experts.shape if weights is None else experts.shape[:-1]
        y = y.unflatten(0, shape)
        return y if self.collective is None else self.collective(y)


class CompiledLinear(Linear):
    """A Linear for torch.compile on a CPU without a kernel: one float32 row takes 2/3 of the time of `F.linear`."""

    def __init__(self, linear: Linear):
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, linear.bias is not None, linear.sharding)
        self.weight, self.bias, self.collective = linear.weight, linear.bias, linear.collective

    def forward(self, x: Tensor, experts: None = None, weights: None = None) -> Tensor:
        if x.numel() > self.in_features or not torch.compiler.is_compiling():
            y = multiply(x, self.weight, self.bias)
        else:  # a multiply-and-sum that Inductor fuses
            # as_strided makes Inductor store its input, so x is computed once, not again for every output.
            row = x.reshape(-1).as_strided((self.in_features,), (1,))
            # Inductor sums up to 4096 terms in registers; longer sums go through memory, at two thirds of the speed.
            length = next(n for n in range(min(4096, self.in_features), 0, -1) if self.in_features % n == 0)
            products = self.weight.float().unflatten(1, (-1, length)) * row.float().view(-1, length)
            y = products.sum(-1).sum(-1).view(*x.shape[:-1], -1)
            y = (y if self.bias is None else y + self.bias.float()).to(x.dtype)
        return y if self.collective is None else self.collective(y)


def fused(
    linear: nn.Module,
    x: Tensor,
    norm: RMSNorm | None = None,
    residual: Tensor | None = None,
    activation: str = "",
    post_norm: RMSNorm | None = None,
    experts: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """`residual + post_norm(linear(norm(x)))`; an `activation` is applied to the Linear's output first, by `gated`.

    experts, weights: as in `multiply`.

    One operator if the Linear has one that knows the activation, no collective and no post_norm: these come before the
    residual.
    """
    is_known = activation in ("", *GATES)
    if isinstance(linear, FastLinear) and linear.collective is None and post_norm is None and is_known:
        return linear(x, experts, weights, norm, residual, activation)
    y = linear(x if norm is None else norm(x), experts, weights)
    y = gated(y, activation) if activation else y
    y = y if post_norm is None else post_norm(y)
    return y if residual is None else residual + y


class NormedOutput(nn.Module):
    """The model's last norm and its output projection in one operator."""

    def __init__(self, norm: RMSNorm, linear: FastLinear):
        super().__init__()
        self.norm, self.linear = norm, linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, norm=self.norm)


class FastRouter(Operator):
    """A norm and the router after it in one operator."""

    def forward(self, x: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        experts, weights = self.call(x, norm.weight, norm.eps)
        return experts.unflatten(0, x.shape[:-1]), weights.unflatten(0, x.shape[:-1])


class FastKVCache(QuantizedKVCache):
    """A KV cache, quantised or not, with a backend's attention kernel, if it has one for this type of cache."""

    def __init__(self, attention: Callable | None, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype):
        super().__init__(shape, device, dtype)
        self.kernel = attention and attention(device, dtype, shape[-1])

    def attend(
        self,
        attention: Attention,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        input_pos: Tensor,
        n_slots: int,
        mask: Tensor,
    ) -> Tensor:
        """As `attention.attend` over this cache."""
        # Test S last: torch.compile adds a guard for every condition it evaluates.
        has_kernel = self.kernel is not None and qkv.shape[1] <= self.kernel.max_positions
        if has_kernel and self.kernel.takes_qkv:
            norms = (None, None, 0.0)
            if attention.q_norm is not None:
                norms = attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps
            sees = attention.window, attention.is_causal
            return self.kernel.operator(qkv, cos, sin, input_pos, *sees, *norms, *self.buffers())
        q, k, v = attention.heads(qkv, cos, sin)
        self.write(input_pos, k, v)
        if has_kernel:
            k, v, *scales = self.stored(len(q), n_slots)
            y = self.kernel.operator(q, k, v, last_seen(input_pos, attention.is_causal), attention.window, *scales)
        else:
            y = compiled_attention(q, *self.read(len(q), n_slots, q.dtype), mask)
        return y.transpose(1, 2).flatten(2)


def compiled_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`grouped_attention`; when compiling, attention of one position is written out where that is faster.

    SDPA's kernels give each head to one core and multiply matrices of G = H / KV rows; at G = 1 a fused
    multiply-and-sum reads the cache 5 times as fast (CPU, 512 to 4096 positions).
    """
    (B, H, S, D), KV = q.shape, k.shape[1]
    if S > 1 or not torch.compiler.is_compiling() or (H > KV and not q.is_cuda):
        return grouped_attention(q, k, v, mask)
    q = q.reshape(B, KV, H // KV, D)
    scores = (q.float() * k.float()).sum(-1)[:, :, None] if H == KV else (q @ k.mT).float()  # [B, KV, G, L]
    probs = (scores * D**-0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    y = (probs.mT * v.float()).sum(2, keepdim=True).to(q.dtype) if H == KV else probs.to(v.dtype) @ v
    return y.view(B, H, S, D)


class FastBlock(nn.Module):
    """`TransformerBlock` as five operators (and two norms, if it has post-norms), compiled once for all layers."""

    def __init__(self, block: TransformerBlock):
        super().__init__()
        self.attention, self.feed_forward, self.ffn_norm = block.attention, block.feed_forward, block.ffn_norm
        norms = block.attention_norm, block.attention_post_norm, block.ffn_post_norm
        norms = (norm if isinstance(norm, RMSNorm) else None for norm in norms)
        self.attention_norm, self.attention_post_norm, self.ffn_post_norm = norms

    @torch.compiler.nested_compile_region  # the blocks are alike: torch.compile traces the first and reuses it
    def forward(self, x, cos, sin, input_pos, n_slots, mask, residual=None):
        a, f = self.attention, self.feed_forward
        qkv = fused(a.wqkv, x, self.attention_norm)
        if input_pos is None or mask is None:  # there is no earlier text to attend to
            y = a.attend(qkv, cos, sin, input_pos, n_slots, mask)
        else:
            y = a.kv_cache.attend(a, qkv, cos, sin, input_pos, n_slots, mask)
        x = fused(a.wo, y, residual=x if residual is None else residual, post_norm=self.attention_post_norm)
        experts = weights = None
        if isinstance(f, MoEFeedForward):
            is_fast = isinstance(f.router, FastRouter)
            experts, weights = f.router(x, self.ffn_norm) if is_fast else f.router(self.ffn_norm(x))
            f = f.experts
        y = fused(f.w13, x, self.ffn_norm, activation=f.activation, experts=experts)
        return fused(f.w2, y, residual=x, post_norm=self.ffn_post_norm, experts=experts, weights=weights)


# The tensors of a Linear that a backend's `product` takes, in that order. A class not listed here has no kernel.
TENSORS: dict[type[nn.Module], tuple[str, ...]] = {
    Linear: ("weight",),
    CompiledLinear: ("weight",),
    Int8Linear: ("weight", "scales"),
    GroupedLinear: ("weight", "scales", "zeros"),
}


def fast_linear(linear: nn.Module, backend: ModuleType | None) -> nn.Module:
    """A `FastLinear`; if `backend` has no kernel, a `CompiledLinear` (not quantised, on a CPU) or `linear` itself."""
    tensors = (getattr(linear, name) for name in TENSORS[type(linear)])
    zeros_are = {"zeros_are": linear.zeros_are} if isinstance(linear, GroupedLinear) else {}
    product = backend and backend.product(*tensors, n_experts=linear.n_experts, **zeros_are)
    if product:
        return FastLinear(linear, product)
    is_plain = type(linear) is Linear and linear.n_experts == 1
    return CompiledLinear(linear) if is_plain and linear.weight.device.type == "cpu" else linear


def replace_linears(module: nn.Module, backend: ModuleType | None) -> None:
    """Replace every Linear in `module`, one by one, so that each weight is freed once it is packed.

    On a GPU it also turns Inductor's tuning on (without a `backend`) or off, for everything compiled from then on.
    """
    names = [name for name, child in module.named_modules() if type(child) in TENSORS]
    if any(module.get_submodule(name).weight.is_cuda for name in names):
        # It makes one-row products multiply-and-sum. Otherwise off: tuning a sampler once kept ptxas busy for minutes.
        torch._inductor.config.coordinate_descent_tuning = backend is None
    for name in names:
        parent, _, key = name.rpartition(".")
        setattr(module.get_submodule(parent), key, fast_linear(module.get_submodule(name), backend))


def speed_up(model: Transformer, dtype: torch.dtype) -> None:
    """Replace the layers of `model` by fast ones, for activations in `dtype` on the device of the weights.

    On a GPU this turns cuDNN's attention off for the process: on Hopper SDPA prefers it, and cuDNN makes a new plan for
    every prompt length: 70 ms on an H100, 1 s the first time.
    """
    device = model.tok_embeddings.weight.device
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    backend = backend_for(device, dtype)
    for norm in model.modules():
        if isinstance(norm, RMSNorm) and norm.offset:  # kernels know no offset; the sum may need float32
            norm.weight, norm.offset = nn.Parameter(norm.weight.float() + norm.offset, requires_grad=False), 0.0
    for name, module in list(model.named_modules()):
        if type(module) is TransformerBlock:
            model.set_submodule(name, FastBlock(module))
        if backend and type(module) is MoEFeedForward and type(router := module.router) is Router:
            product = backend.router(router.weight, router.k, router.normalizes)
            module.router = FastRouter(product) if product else router
    replace_linears(model, backend)
    if isinstance(model.norm, RMSNorm) and isinstance(model.output, FastLinear) and model.output.collective is None:
        model.output, model.norm = NormedOutput(model.norm, model.output), nn.Identity()
    model.new_cache = partial(FastKVCache, backend and backend.attention)


def in_one_region(model: Transformer, step: Callable) -> Callable:
    """The backend's `in_one_region` of `step`, if kernels do all of the model's work. The caches must be set up."""
    for module in model.modules():
        if isinstance(module, (Linear, QuantizedLinear)) or (isinstance(module, FastKVCache) and module.kernel is None):
            return step
    return BACKENDS[model.slots.device.type].in_one_region(step)
