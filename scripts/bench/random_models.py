"""The models that the benchmarks run: random weights at the shape of a real model.

    model = build_model(preset("llama-3.1-8b"), "cuda", torch.bfloat16, {"mode": "int4", "groupsize": 32})
    (model,) = with_caches(model, batch_size=1, capacities=[2048])

Worth knowing: pages of memory that were never written are all the same page of zeros, which stays in the CPU's caches,
so reading them would cost nothing. Weights and KV caches are therefore filled with noise.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fast.layers import speed_up
from fast.quantized import GroupedLinear, swap_linears
from model import ModelArgs, Transformer

STD = 0.02  # standard deviation of all weights, and of the noise in KV caches

# Weights in groups as files hold them: bits, the type of scales and zeros, what zeros mean (`quantized.ZEROS`).
FORMS: dict[str, tuple[int | str, torch.dtype, str]] = {
    "int4": (4, torch.bfloat16, "middle"),
    "4 bits as GPTQ's": (4, torch.float16, "steps"),
    "4 bits as compressed-tensors'": (4, torch.bfloat16, "steps"),
    "4 bits as GGUF's": (4, torch.float16, "lowest"),
    "8 bits as GPTQ's": (8, torch.float16, "steps"),
    "8 bits as compressed-tensors'": (8, torch.bfloat16, "steps"),
    "fp8": ("fp8", torch.float32, "middle"),
}
# The products of a decode step, by name.
SHAPES: dict[str, Callable[[Transformer], nn.Module]] = {
    "wqkv": lambda model: model.layers[0].attention.wqkv,
    "wo": lambda model: model.layers[0].attention.wo,
    "w13": lambda model: model.layers[0].feed_forward.w13,
    "w2": lambda model: model.layers[0].feed_forward.w2,
    "output": lambda model: model.output,
}


def scheme_of(mode: str, groupsize: int = 32) -> dict[str, Any] | None:
    """How `mode` quantises the Linears, as a checkpoint records it; None for a float mode."""
    return {"int8": {"mode": "int8"}, "int4": {"mode": "int4", "groupsize": groupsize}}.get(mode)


def random_groups(n: int, k: int, groupsize: int, form: str, device: str = "cpu", size: float = 1.0) -> GroupedLinear:
    """A GroupedLinear with random weights of about this `size`; scales and zeros differ among groups."""
    bits, dtype, zeros_are = FORMS[form]
    if bits == "fp8":
        scales = (0.1 + torch.rand(n, k // groupsize, device=device)) * size
        return GroupedLinear.from_parts(torch.randn(n, k, device=device).to(torch.float8_e4m3fn), scales)
    weight = torch.randint(256, (n, k * bits // 8), dtype=torch.uint8, device=device)
    levels = 2 ** (bits - 4)  # for each of 4 bits
    scales = (0.1 + torch.rand(n, k // groupsize, device=device)) / (4 * levels) * size
    zeros = torch.randn(n, k // groupsize, device=device) * (size / 4)
    if zeros_are == "steps":
        zeros = (4 * levels / size * zeros).round()
    elif zeros_are == "lowest":
        zeros -= 8 * scales
    weight = weight if bits == 4 else weight.view(torch.int8)
    return GroupedLinear.from_parts(weight, scales.to(dtype), zeros.to(dtype), zeros_are=zeros_are)


def every_fp8(device: str = "cpu") -> GroupedLinear:
    """A GroupedLinear `[16, 256]` with every number that fp8 has in each row, and two scales that change nothing."""
    numbers = torch.arange(256, dtype=torch.uint8, device=device)
    numbers[[0x7F, 0xFF]] = 0  # these are no numbers
    weight = torch.stack([numbers.roll(17 * i) for i in range(16)]).view(torch.float8_e4m3fn)
    return GroupedLinear.from_parts(weight, torch.ones(16, 2, device=device))


def noise_block(device: str | torch.device, dtype: torch.dtype) -> Tensor:
    """Noise, of an odd length so that no two rows of a weight that repeats it are equal."""
    return (STD * torch.randn((1 << 22) + 15, device=device)).to(dtype)


def fill(tensor: Tensor, noise: Tensor) -> None:
    """Fill a contiguous tensor with `noise`, repeated."""
    for piece in tensor.view(-1).split(len(noise)):
        piece.copy_(noise[: len(piece)])


def fill_weights(module: nn.Module, dtype: torch.dtype, scheme: dict[str, Any] | None) -> None:
    """Fill `module` with random weights, norms with 1. scheme: how its Linears are quantised, None if they are not."""
    noise = noise_block(next(iter(module.state_dict().values())).device, dtype)
    integers = torch.randint(-127, 128, noise.shape, device=noise.device, dtype=torch.int8)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.fill_(1)
        else:
            fill(parameter, noise)
    for name, buffer in module.named_buffers():
        if name.endswith("weight"):
            fill(buffer.view(torch.int8), integers)
        elif name.endswith("zeros"):
            buffer.zero_()
        else:  # the scale that gives integers, uniform over n_levels values, the standard deviation STD
            n_levels = 255 if scheme["mode"] == "int8" else 16
            buffer.fill_(STD / ((n_levels**2 - 1) / 12) ** 0.5)


def meta_model(args: ModelArgs, dtype: torch.dtype, scheme: dict[str, Any] | None) -> Transformer:
    """The model on `meta`, without memory. scheme: how the Linears are quantised, as a checkpoint records it."""
    if scheme is not None:
        args = dataclasses.replace(args, tie_embeddings=False)  # a quantised output projection has its own weight
    with torch.device("meta"):
        model = Transformer(args)
    if scheme is not None:
        swap_linears(model, scheme)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False).eval()


def textbook_model(
    args: ModelArgs, device: str, dtype: torch.dtype, scheme: dict[str, Any] | None = None
) -> Transformer:
    """A model with random weights, made on the device, of `model.py`'s layers. scheme: as for `meta_model`."""
    model = meta_model(args, dtype, scheme)
    tied = model.args.tie_embeddings
    if tied:
        model.output.weight = None  # otherwise to_empty gives it memory of its own
    model = model.to_empty(device=device)
    if tied:
        model.output.weight = model.tok_embeddings.weight
    fill_weights(model, dtype, scheme)
    return model


def build_model(args: ModelArgs, device: str, dtype: torch.dtype, scheme: dict[str, Any] | None = None) -> Transformer:
    """`textbook_model` with the fast layers that a loaded model has."""
    model = textbook_model(args, device, dtype, scheme)
    speed_up(model, dtype)
    return model


def with_caches(
    model: Transformer, batch_size: int, capacities: list[int], kv_dtype: torch.dtype | None = None
) -> list[Transformer]:
    """For each capacity a model that shares the weights; its KV cache is filled with noise, which is 0 in int8."""
    twins, weights = [], [*model.parameters(), *model.buffers()]
    noise = noise_block(model.tok_embeddings.weight.device, model.tok_embeddings.weight.dtype)
    for capacity in capacities:
        twin = copy.deepcopy(model, {id(tensor): tensor for tensor in weights})
        twin.setup_caches(batch_size, capacity, kv_dtype=kv_dtype)
        for layer in twin.layers:
            for buffer in layer.attention.kv_cache.buffers():
                fill(buffer, noise)
        twins.append(twin)
    return twins
