"""GPTQ (Frantar et al. 2022): 4-bit weights whose rounding errors compensate each other on calibration text.

    for name, error, module in gptq_linears(checkpoint, scheme, chunks, device): ...

A Linear's inputs X over the calibration text give the Hessian H = 2 X^T X of its squared output error. The weight's
columns are rounded one after the other, and the inverse of H says how each error is spread over the columns to come.

Worth knowing: one transformer block is quantised at a time. In memory are that block, the Hessian of one Linear (of
every expert) and the hidden states of the calibration text; each Linear sees the inputs that the quantised Linears
before it produce, each expert only those of the tokens that are routed to it.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fast.checkpoint import Checkpoint
from fast.quantized import GroupedLinear, int4_round, int4_scales, int4_values, pack_nibbles, quantized_linears
from model import Transformer, attention_mask, rope_table

TOKENS_AT_ONCE = 8192


class Hessian:
    """X^T X of a Linear's inputs `x [..., K]`, float32 `[K, K]`, averaged over the rows seen."""

    def __init__(self, n_in: int, device: torch.device | str):
        self.sum, self.n_rows = torch.zeros(n_in, n_in, device=device), 0

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        self.sum.addmm_(rows.T, rows)
        self.n_rows += len(rows)

    @property
    def mean(self) -> Tensor:
        return self.sum / self.n_rows


def add_inputs(
    hessians: list[Hessian], x: Tensor, experts: Tensor | None = None, weights: Tensor | None = None
) -> None:
    """Add the inputs of a Linear, as `multiply` takes them, to the Hessian of each expert."""
    if experts is None:
        return hessians[0].add(x)
    rows = x if weights is not None else x[..., None, :].expand(*experts.shape, -1)
    for e, hessian in enumerate(hessians):
        hessian.add(rows[experts == e])


def gptq(
    weight: Tensor,
    hessian: Tensor,
    groupsize: int,
    percdamp: float = 0.01,
    blocksize: int = 128,
    act_order: bool = False,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Quantise `weight [N, K]` for inputs with `hessian [K, K]`, both float32.

    percdamp: added to the Hessian's diagonal, as a share of its mean. blocksize: columns whose errors are spread over
    the later columns in one product, rounded up to whole groups. act_order: round columns in order of falling diagonal,
    so that the inputs that matter most come first, while most columns can still compensate. Group scales are then taken
    from the unrounded weights, because a group's columns are no longer rounded one after the other.
    Returns q uint8 `[N, K]`, scales and zeros bfloat16 `[N, K / G]`, and the relative error of the outputs.
    Raises ValueError if the damped Hessian is not positive definite.
    """
    n_in = weight.shape[1]
    if not hessian.sum().isfinite():
        raise ValueError("its inputs are NaN or infinite: a weight before it is damaged")
    importance = hessian.diagonal() + 1e-12 * hessian.diagonal().mean()
    if act_order:
        order = importance.argsort(descending=True)
        scales, zeros = int4_scales(weight.unflatten(1, (-1, groupsize)), True, importance.view(-1, groupsize))
    else:
        order = torch.arange(n_in, device=weight.device)
        scales = torch.empty(len(weight), n_in // groupsize, dtype=torch.bfloat16, device=weight.device)
        zeros = torch.empty_like(scales)
    w, spread = weight[:, order].clone(), _inverse_factor(hessian[order][:, order], percdamp)
    q = torch.empty_like(w, dtype=torch.uint8)
    blocksize = -(-blocksize // groupsize) * groupsize
    for start in range(0, n_in, blocksize):
        block, factor = w[:, start : start + blocksize], spread[start : start + blocksize, start : start + blocksize]
        errors = torch.empty_like(block)
        for i in range(block.shape[1]):
            g = order[start + i] // groupsize
            if not act_order and i % groupsize == 0:
                columns = slice(start + i, start + i + groupsize)
                scales[:, g], zeros[:, g] = int4_scales(w[:, columns], True, importance[columns])
            column, group = block[:, i, None], (scales[:, g], zeros[:, g])
            rounded = int4_round(column, *group)
            q[:, start + i] = rounded[:, 0]
            values = int4_values(rounded, *(x[:, None] for x in group))
            errors[:, i] = ((column - values) / factor[i, i])[:, 0]
            block[:, i:] -= errors[:, i, None] * factor[i, i:]
        w[:, start + blocksize :] -= errors @ spread[start : start + blocksize, start + blocksize :]
    q = torch.empty_like(q).index_copy_(1, order, q)
    weight_error = int4_values(q, scales, zeros) - weight
    errors, outputs = (float((w @ hessian * w).sum()) for w in (weight_error, weight))
    return q, scales, zeros, (errors / outputs) ** 0.5 if outputs > 0 else 0.0


def _inverse_factor(hessian: Tensor, percdamp: float) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse; row i spreads the error of column i."""
    diagonal = hessian.diagonal()
    unused = (diagonal == 0) * diagonal.mean()  # an input that is always zero
    damped = hessian + torch.diag(unused + percdamp * diagonal.mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise ValueError(f"the Hessian is singular with --percdamp {percdamp}: raise it, or calibrate longer")
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        raise ValueError(f"the Hessian is nearly singular with --percdamp {percdamp}: raise it, or calibrate longer")
    return upper


def read_weight(checkpoint: Checkpoint, name: str, device: str, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of the Linear `name` on `device`; for a tied output projection, the embedding table.

    dtype: None leaves it as stored. Raises ValueError if not every number in it is finite.
    """
    tied = name == "output" and checkpoint.args.tie_embeddings
    stored = checkpoint.tensors["tok_embeddings.weight" if tied else f"{name}.weight"]
    return check_finite(f"{name}.weight", stored.load(device, dtype or stored.dtype))


def check_finite(name: str, tensor: Tensor) -> Tensor:
    """Return `tensor`; raises ValueError with its name if not all numbers are finite."""
    if not tensor.sum(dtype=torch.float32).isfinite():
        raise ValueError(f"{name} holds NaN or infinite values: it cannot be quantised")
    return tensor


def gptq_linears(
    checkpoint: Checkpoint, scheme: dict[str, Any], chunks: Sequence[list[int]], device: str
) -> Iterator[tuple[str, float, nn.Module]]:
    """Yield (name, relative error of its outputs, the quantised Linear), in the model's order.

    scheme: "groupsize", "percdamp", "blocksize", "act_order", "skip". chunks: calibration text, equally long rows of
    token ids. Raises ValueError as `gptq` does, with the Linear's name. Where all inputs are zero there is nothing to
    compensate: such a Linear is rounded, as is an expert with fewer rows than inputs. Both are said on stderr.
    """
    with torch.device("meta"):
        model = Transformer(checkpoint.args)
    wanted = dict(quantized_linears(model, scheme))
    options = {key: scheme[key] for key in ("groupsize", "percdamp", "blocksize", "act_order")}

    def load(prefix: str) -> nn.Module:
        module = model.get_submodule(prefix)
        state = {n: checkpoint.tensors[f"{prefix}.{n}"].load(device, torch.bfloat16) for n in module.state_dict()}
        module.load_state_dict(state, assign=True)
        return module

    def quantize(name: str, linear: nn.Linear, hessians: list[Hessian]) -> tuple[str, float, nn.Module]:
        parts, errors, E, K = [], [], len(hessians), linear.in_features
        weights = read_weight(checkpoint, name, device, torch.float32).chunk(E)
        for weight, hessian in zip(weights, hessians, strict=True):
            if not hessian.sum.any() or (E > 1 and hessian.n_rows < K):
                rounded = GroupedLinear.from_float(weight, scale_search=True, **options)
                parts.append((rounded.weight, rounded.scales, rounded.zeros))
                continue
            try:
                q, scales, zeros, error = gptq(weight, hessian.mean, **options)
            except ValueError as problem:
                raise ValueError(f"{name}: {problem}") from None
            parts.append((pack_nibbles(q), scales, zeros))
            errors.append(error)
        if len(errors) < E:
            why = "its inputs are all zero on the calibration text, so it is rounded"
            if E > 1:
                why = f"{E - len(errors)} of {E} experts see fewer than {K} tokens or only zeros, so they are rounded"
            tqdm.write(f"{name}: {why}", file=sys.stderr)
        module = GroupedLinear.from_parts(*map(torch.cat, zip(*parts, strict=True)), bias=linear.bias)
        linear.weight = nn.Parameter(module.dequantize(torch.bfloat16), requires_grad=False)
        return name, sum(errors) / max(1, len(errors)), module

    S, rows = len(chunks[0]), max(1, TOKENS_AT_ONCE // len(chunks[0]))
    positions = torch.arange(S, device=device)[None]
    given = [
        (*rope_table(kind, positions, S), None, S, attention_mask(kind, positions, positions[0]))
        for kind in model.kinds
    ]
    embed = load("tok_embeddings")
    hidden = [embed(torch.tensor(chunks[i : i + rows], device=device)) for i in range(0, len(chunks), rows)]
    model.tok_embeddings = embed = None
    for i, block in enumerate(model.layers):
        load(f"layers.{i}")
        context = given[model.kind_of_layer[i]]
        linears = {name: linear for name, linear in wanted.items() if name.startswith(f"layers.{i}.")}
        for name, linear in linears.items():
            hessians = [Hessian(linear.in_features, device) for _ in range(linear.n_experts)]
            hook = linear.register_forward_pre_hook(lambda _, inputs, each=hessians: add_inputs(each, *inputs))
            for x in hidden:
                block(x, *context)
            hook.remove()
            yield quantize(name, linear, hessians)
        for j, x in enumerate(hidden):
            hidden[j] = block(x, *context)
        model.layers[i] = None
    if (output := wanted.get("output")) is not None:
        norm, hessian = load("norm"), Hessian(output.in_features, device)
        for x in hidden:
            hessian.add(norm(x))
        yield quantize("output", output, [hessian])
