"""Checkpoints that others have quantised: GPTQ, AWQ, compressed-tensors and fp8.

    method = check(config)                                        # of config.json, before the weights are downloaded
    scheme, parts = read(method, settings, parts, model, naming)  # the files' tensors as those of GroupedLinears

Formats of integers hold a scale and a zero for every group of inputs, as a `GroupedLinear` does: they are packed in
another way, but nothing is rounded again. Weights in fp8 have a scale; it is repeated for the groups of inputs that
share it. The tensors that are there show which modules are quantised.

Worth knowing: GPTQ's `desc_act` and compressed-tensors' `actorder` put any input into any group (`g_idx`). The inputs
of a group are then brought together, and the Linear gets an `order` in which it takes its inputs. For `w2` that costs
nothing: the rows of `w13`, which produce its inputs, are put into that order.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fast.families import Naming
from fast.quantized import GROUP_SIZES, SETTINGS, WEIGHTS, GroupedLinear, pack_nibbles, unpack_nibbles
from fast.stored import Part
from model import Linear, Transformer

# Method -> the settings that are supported.
METHODS: dict[str, dict[str, tuple]] = {
    "gptq": {
        "bits": (4, 8), "checkpoint_format": (None, "gptq", "gptq_v2"), "is_marlin_format": (None, False),
        "dynamic": (None, {}),
    },
    "awq": {"bits": (4,), "version": (None, "gemm", "GEMM")},
    "compressed-tensors": {
        "format": ("pack-quantized",), "num_bits": (4, 8), "type": ("int",), "input_activations": (None,),
        "output_activations": (None,), "transform_config": (None, {}),
    },
    "float-quantized": {"num_bits": (8,), "type": ("float",), "transform_config": (None, {})},  # compressed-tensors'
    "fp8": {"fmt": (None, "e4m3")},
}  # fmt: skip
SUPPORTED = (
    "GPTQ with 4 or 8 bits for all modules and checkpoint_format gptq or gptq_v2; AWQ with 4 and version gemm; "
    "compressed-tensors pack-quantized with 4 or 8 bits, weights only, and float-quantized; fp8"
)
# Method -> a module's tensors: the packed weight, scales, zeros, the inputs' groups, the weight's shape.
TENSORS = {
    "gptq": ("qweight", "scales", "qzeros", "g_idx"),
    "awq": ("qweight", "scales", "qzeros"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
}
PACKED = (".qweight", ".weight_packed")
AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # of 8 outputs in a word, which holds them in the order 0 2 4 6 1 3 5 7
WIDEST = 128  # inputs of a group, where a scale is for whole rows: it is repeated
FP8 = WEIGHTS["fp8"]
FP8_SCALES = (".weight_scale", ".weight_scale_inv")
# Of activations and of the KV cache, which are not rounded here.
OTHER_SCALES = (".input_scale", ".output_scale", ".activation_scale", ".q_scale", ".k_scale", ".v_scale")


def check(config: dict[str, Any]) -> str | None:
    """The method by which the weights of this config.json are quantised; None: they are not.

    Raises ValueError, one line, for methods and settings that are not supported.
    """
    given = config.get("quantization_config")
    if not given:
        return None
    method = given.get("quant_method") if isinstance(given, dict) else given
    if not isinstance(given, dict) or method not in ("gptq", "awq", "compressed-tensors", "fp8"):
        raise ValueError(f"weights quantised by {method!r:.80} are not supported; supported: {SUPPORTED}")
    for settings in _settings(given, method):
        _block(settings)
        kind = "float-quantized" if settings.get("format") == "float-quantized" else method
        for key, allowed in METHODS[kind].items():
            value = settings.get(key)
            if not any(value == one and type(value) is type(one) for one in allowed):
                found = f"{method} with {key} {value!r:.80}"
                raise ValueError(f"{found} is not supported; supported: {SUPPORTED}")
    return method


def _settings(given: dict[str, Any], method: str) -> Iterator[dict[str, Any]]:
    """The settings to check; compressed-tensors has some for each of several groups of modules."""
    if method != "compressed-tensors":
        yield given
        return
    groups = given.get("config_groups")
    for group in groups.values() if groups and isinstance(groups, dict) else [groups]:
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise ValueError(f"config_groups has {group!r:.80}; expected an object with weights")
        yield {**given, **{key: value for key, value in group.items() if value is not None}, **weights}


def _block(settings: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a weight in fp8 that share a scale, if it is divided in both."""
    for key in ("weight_block_size", "block_structure"):
        if (block := settings.get(key)) is not None:
            sizes = block.split("x") if isinstance(block, str) else block
            if not isinstance(sizes, list) or not re.fullmatch(r"[1-9]\d* [1-9]\d*", " ".join(map(str, sizes))):
                raise ValueError(f"{key} is {block!r:.80}; expected two sizes, such as [128, 128]")
            return int(sizes[0]), int(sizes[1])
    return None


@dataclass(frozen=True)
class Packed:
    """The weight `[N, K]` of a module in one of the formats, as a `GroupedLinear` stores it.

    bits: 4, 8 or "fp8".
    rows: outputs, a slice or indices -> their weights as a GroupedLinear stores them, but for the inputs' order.
    scales: [N, K / G]. zeros: outputs -> [n, K / G], of any type, None for fp8; zeros_are: what they mean, one of
        `quantized.ZEROS`.
    g_idx: the group of each input, int [K]; None: they are in order.
    outputs: the order in which its rows are wanted; None: as in the file.
    comes_ordered: whether what computes its inputs gives them group by group.
    """

    bits: int | str
    shape: tuple[int, int]
    rows: Callable[[slice | Tensor], Tensor]
    scales: Tensor
    zeros: Callable[[slice | Tensor], Tensor] | None
    zeros_are: str = "steps"
    g_idx: Tensor | None = None
    outputs: Tensor | None = None
    comes_ordered: bool = False

    @cached_property
    def by_group(self) -> Tensor | None:
        """The inputs, group by group, int64 `[K]`; None if they are so in the file."""
        return None if self.g_idx is None or not (self.g_idx.diff() < 0).any() else self.g_idx.argsort(stable=True)

    @property
    def order(self) -> Tensor | None:
        """The order in which the GroupedLinear must take its inputs; None: as they come."""
        return None if self.comes_ordered else self.by_group

    @property
    def groupsize(self) -> int:
        """That of the GroupedLinear; a scale for whole rows is repeated."""
        size = self.shape[1] // self.scales.shape[1]
        fitting = (s for s in GROUP_SIZES if s <= WIDEST and size % s == 0)
        return size if size in GROUP_SIZES else max(fitting, default=size)

    @property
    def settings(self) -> tuple[tuple[str, Any], ...]:
        """Those of the GroupedLinear, as in a scheme."""
        values = {"bits": self.bits, "groupsize": self.groupsize}
        if self.zeros is not None:
            values |= {"scales": str(self.scales.dtype).removeprefix("torch."), "zeros": self.zeros_are}
        return tuple(values.items())

    @property
    def kinds(self) -> tuple[str, ...]:
        """The GroupedLinear's tensors."""
        return ("weight", "scales") if self.zeros is None else ("weight", "scales", "zeros")

    def part(self, kind: str) -> Part:
        """One of the GroupedLinear's tensors, not yet computed."""
        (N, K), dtype = self.shape, self.scales.dtype
        if kind == "order":
            return Part((K,), torch.int32, lambda first, end: self.order[first:end].int())
        shape = (N, K // self.groupsize)
        if kind == "weight":
            shape, dtype = (N, K // 2 if self.bits == 4 else K), WEIGHTS[self.bits]
        return Part(shape, dtype, lambda first, end: self.tensor(kind, first, end), is_computed=True)

    def tensor(self, kind: str, first: int, end: int) -> Tensor:
        """Rows `first` to `end` of the weight, the scales or the zeros of the GroupedLinear."""
        rows = slice(first, end) if self.outputs is None else self.outputs[first:end]
        if kind == "weight":
            weight = self.rows(rows)
            if self.by_group is not None:
                q = (unpack_nibbles(weight) if self.bits == 4 else weight)[:, self.by_group]
                weight = pack_nibbles(q) if self.bits == 4 else q
            return weight
        tensor = self.scales[rows] if kind == "scales" else self.zeros(rows).to(self.scales.dtype)
        return tensor.repeat_interleave(self.shape[1] // tensor.shape[1] // self.groupsize, 1)

    def dequantised(self) -> Part:
        """The weight as numbers, computed in float32, its inputs as they come."""

        def rows(first: int, end: int) -> Tensor:
            tensors = {kind: self.tensor(kind, first, end) for kind in self.kinds}
            values = GroupedLinear.from_parts(**tensors, zeros_are=self.zeros_are).dequantize(torch.float32)
            return values if self.order is None else values[:, self.order.argsort()]

        return Part(self.shape, torch.bfloat16 if self.bits == "fp8" else self.scales.dtype, rows, is_computed=True)


def _weights(words: Tensor, bits: int) -> Tensor:
    """Those packed in int32 `words [n, m]`, lowest first, as a GroupedLinear stores them, `[n, 4 m]`."""
    stored = words.contiguous().view(torch.uint8)
    return stored if bits == 4 else (stored ^ 0x80).view(torch.int8)


def _steps(words: Tensor, bits: int) -> Tensor:
    """From the integers that mean 0, packed in int32 `words [m, n]`, to the middle, int `[m, n * 32 / bits]`."""
    stored = words.contiguous().view(torch.uint8)
    return 2 ** (bits - 1) - (unpack_nibbles(stored) if bits == 4 else stored).int()


def _from_gptq(tensors: list[Tensor | None], config: dict[str, Any]) -> Packed:
    """qweight int32 `[K * bits / 32, N]`, scales `[K / G, N]`, qzeros int32 `[K / G, N * bits / 32]`, g_idx `[K]`.

    Fields are packed lowest first. But for the format "gptq_v2" 1 is subtracted from all zeros, as AutoGPTQ did: from
    whole words, so that a zero of 0 borrows from the next.
    """
    qweight, scales, qzeros, g_idx = tensors
    bits = config["bits"]
    less = 0 if config.get("checkpoint_format") == "gptq_v2" else {4: 0x11111111, 8: 0x01010101}[bits]

    return Packed(
        bits,
        (qweight.shape[1], 32 * qweight.shape[0] // bits),
        rows=lambda outputs: _weights(qweight[:, outputs].T, bits),
        scales=scales.T,
        zeros=lambda outputs: _steps(qzeros + less, bits).T[outputs],
        g_idx=g_idx,
    )


def _from_awq(tensors: list[Tensor | None], config: dict[str, Any]) -> Packed:
    """qweight int32 `[K, N / 8]`, scales `[K / G, N]`, qzeros int32 `[K / G, N / 8]`; see AWQ_PLACES."""
    qweight, scales, qzeros = tensors

    def in_place(fields: Tensor) -> Tensor:  # [m, n] -> [n, m]
        return fields.unflatten(1, (-1, 8))[:, :, AWQ_PLACES].flatten(1).T

    def rows(outputs: slice) -> Tensor:
        first = outputs.start // 8
        q = in_place(unpack_nibbles(_weights(qweight[:, first : -(-outputs.stop // 8)], 4)))
        return pack_nibbles(q[outputs.start - 8 * first : outputs.stop - 8 * first])

    shape = 8 * qweight.shape[1], qweight.shape[0]
    return Packed(4, shape, rows, scales.T, zeros=lambda outputs: in_place(_steps(qzeros, 4))[outputs])


def _from_compressed_tensors(tensors: list[Tensor | None], config: dict[str, Any]) -> Packed:
    """weight_packed int32 `[N, K * bits / 32]`, weight_scale `[N, K / G]`, `[N, 1]` or `[1]`, weight_shape (N, K).

    Symmetric if there is no weight_zero_point, int32 `[N * bits / 32, K / G]`; 2^(bits - 1) is added to what is packed.
    """
    packed, scales, zero_point, g_idx, size = tensors
    N, K = size.tolist()
    if g_idx is not None and (g_idx < 0).all():  # there is no order
        g_idx = None
    bits = 32 * packed.shape[1] // K
    scales = scales if scales.numel() > 1 else scales.reshape(1, 1).expand(N, 1)

    def zeros(outputs: slice | Tensor) -> Tensor:
        if zero_point is None:
            return torch.zeros_like(scales[outputs])
        if zero_point.dtype == torch.int8:  # older files do not pack it
            return -zero_point[outputs].int()
        return _steps(zero_point.T, bits).T[:N][outputs]

    return Packed(bits, (N, K), lambda outputs: _weights(packed[outputs], bits), scales, zeros, g_idx=g_idx)


def _from_fp8(parts: dict[str, Part], module: str, block: tuple[int, int] | None) -> Packed:
    """weight float8_e4m3fn `[N, K]`, and what to multiply it by: a scale, or one for each row or each `block`.

    Takes them out of `parts`. Raises ValueError if the scale is missing or does not fit.
    """
    weight = parts.pop(f"{module}.weight")
    found = [parts.pop(module + kind) for kind in FP8_SCALES if module + kind in parts]
    if len(found) != 1:
        raise ValueError(f"missing tensors: {module}{FP8_SCALES[0]}")
    scale, (N, K) = found[0].read().float(), weight.shape
    scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    shared = {(1, 1): (N, K), (N, 1): (1, K)}  # shape of the scales -> the rows and columns that share one
    if block is not None:
        shared[-(-N // block[0]), -(-K // block[1])] = block
    if scale.shape not in shared:
        raise ValueError(f"{module}: its scales {list(found[0].shape)} do not fit its weight {[N, K]}")
    rows, columns = shared[scale.shape]
    scales = scale[torch.arange(N) // rows][:, torch.arange(0, K, math.gcd(K, columns)) // columns]
    return Packed("fp8", (N, K), lambda outputs: weight.read()[outputs], scales, zeros=None)


READERS = {"gptq": _from_gptq, "awq": _from_awq, "compressed-tensors": _from_compressed_tensors}


def read(
    method: str, config: dict[str, Any], parts: dict[str, Part], model: Transformer, naming: Naming
) -> tuple[dict[str, Any] | None, dict[str, Part]]:
    """The scheme for `quantized.swap_linears`, and the `parts` of the files with the tensors of its GroupedLinears.

    config: the quantization_config. Others as for `assign`. Raises ValueError for tensors that are missing or do not
    fit each other.
    """
    parts, packed = dict(parts), {}
    in_fp8 = [
        name.removesuffix(".weight") for name, part in parts.items() if part.dtype == FP8 and len(part.shape) == 2
    ]
    if in_fp8:
        block = next(filter(None, map(_block, _settings(config, method))), None)
        packed = {module: _from_fp8(parts, module, block) for module in in_fp8}
        parts = {name: part for name, part in parts.items() if not name.endswith(OTHER_SCALES)}
    own = [name.rpartition(".") for name in parts if name.rpartition(".")[2] in TENSORS.get(method, ())]
    for module in dict.fromkeys(module for module, _, kind in own if kind != "scales"):
        packed[module] = _packed(method, config, parts, module)
    return assign(method, packed, parts, model, naming)


def assign(
    mode: str, packed: dict[str, Packed], parts: dict[str, Part], model: Transformer, naming: Naming
) -> tuple[dict[str, Any] | None, dict[str, Part]]:
    """The scheme, and `parts` with the GroupedLinears' tensors from the `packed` weights, by the file's modules.

    model: without weights. Dequantised are embeddings, and a Linear whose parts are quantised in different ways, or in
    no way that a GroupedLinear can hold, which is said on stderr.
    """
    linears = {name: linear for name, linear in model.named_modules() if isinstance(linear, Linear)}
    theirs = {name: naming.theirs(name, linear.n_experts) for name, linear in linears.items()}
    (table,), (head,) = naming.theirs("tok_embeddings"), theirs["output"]
    if model.args.tie_embeddings and table in packed:
        packed = {**packed, head: packed[table]}
    for name in linears:
        if name.endswith(".w2") and all(other in packed for other in theirs[name]):
            _order_rows(packed, parts, theirs[name], theirs[name.removesuffix("2") + "13"])
    parts = {**parts, **{f"{other}.weight": one.dequantised() for other, one in packed.items()}}
    specs, ordered, lost = {}, [], {}
    for name, linear in linears.items():
        found = [packed[other] for other in theirs[name] if other in packed]
        are_alike = len(found) == len(theirs[name]) and len({one.settings for one in found}) == 1
        are_alike = are_alike and all(_equal(one.order, found[0].order) for one in found)
        wrong = [f"{key} {value}" for key, value in found[0].settings if value not in SETTINGS[key]] if found else []
        if fits := are_alike and not wrong:
            specs[name] = found[0].settings
            if found[0].order is not None:
                ordered.append(name)
                parts[f"{theirs[name][0]}.order"] = found[0].part("order")
        elif found:
            lost[name] = f"no Linear here holds {wrong[0]}" if wrong else "its parts are quantised in different ways"
        for other in [other for other in theirs[name] if other in packed]:
            parts |= {f"{other}.{kind}": packed[other].part(kind) for kind in packed[other].kinds if fits}
            bias = parts.get(f"{other}.bias")
            if bias is not None and linear.bias is None and not bias.read().any():
                del parts[f"{other}.bias"]  # AutoGPTQ stored biases that are zero
    for reason in dict.fromkeys(lost.values()):
        names = [name for name in lost if lost[name] == reason]
        which = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        print(f"dequantised: {len(names)} of {len(linears)} Linears ({which}), as {reason}", file=sys.stderr)
    return _scheme(mode, specs, ordered, list(linears)), parts


def _packed(method: str, config: dict[str, Any], parts: dict[str, Part], module: str) -> Packed:
    """Take the tensors of `module` out of `parts`. Raises ValueError if some are missing or do not fit each other."""
    kinds, optional = TENSORS[method], ["g_idx", "weight_g_idx"]
    if not all(settings.get("symmetric") is False for settings in _settings(config, method)):
        optional.append("weight_zero_point")
    if missing := [kind for kind in kinds if kind not in optional and f"{module}.{kind}" not in parts]:
        raise ValueError(f"missing tensors: {', '.join(f'{module}.{kind}' for kind in missing)}")
    if f"{module}.weight" in parts:
        raise ValueError(f"{module} has both a weight and a {kinds[0]}")
    found = {kind: parts.pop(f"{module}.{kind}") for kind in kinds if f"{module}.{kind}" in parts}
    try:
        tensors = {kind: part.read() for kind, part in found.items()}
        packed = READERS[method]([tensors.get(kind) for kind in kinds], config)
        forms, n_in = _forms(method, packed), packed.shape[1]
        fits = all(any(t.dtype in types and t.shape == s for types, s in forms[kind]) for kind, t in tensors.items())
        groups = torch.arange(n_in) // (n_in // packed.scales.shape[1])
        fits = fits and (packed.g_idx is None or packed.g_idx.sort().values.long().equal(groups))
        fits = fits and packed.bits in SETTINGS["bits"] and n_in % packed.scales.shape[1] == 0
    except (RuntimeError, IndexError, TypeError, ValueError, ArithmeticError):
        fits = False
    if not fits:
        types = {kind: str(part.dtype).removeprefix("torch.") for kind, part in found.items()}
        sizes = ", ".join(f"{kind} {types[kind]} {list(part.shape)}" for kind, part in found.items())
        raise ValueError(f"{module}: its tensors do not fit each other and the configuration: {sizes}")
    return packed


def _forms(method: str, packed: Packed) -> dict[str, list[tuple[tuple[torch.dtype, ...], tuple[int, ...]]]]:
    """The types and shapes that the tensors of a module may have."""
    (N, K), G = packed.shape, packed.scales.shape[1]
    n, k = (-(-size * packed.bits // 32) for size in (N, K))  # in words
    words, ints, floats = (torch.int32,), (torch.int32, torch.int64), (torch.float16, torch.bfloat16, torch.float32)
    if method != "compressed-tensors":
        qweight = (k, N) if method == "gptq" else (K, n)
        common = {"qweight": [(words, qweight)], "scales": [(floats, (G, N))], "qzeros": [(words, (G, n))]}
        return {**common, "g_idx": [(ints, (K,))]}
    return {
        "weight_packed": [(words, (N, k))],
        "weight_scale": [(floats, (N, G))] + [(floats, (1,))] * (G == 1),
        "weight_zero_point": [(words, (n, G)), ((torch.int8,), (N, G))],
        "weight_g_idx": [(ints, (K,))],
        "weight_shape": [(ints, (2,))],
    }


def _order_rows(packed: dict[str, Packed], parts: dict[str, Part], w2: list[str], w13: list[str]) -> None:
    """Put the rows of the file's modules `w13` into the order in which those of `w2` take them, expert by expert."""
    each = len(w13) // len(w2)  # gate and up, or both in one
    for i, down in enumerate(w2):
        if (order := packed[down].order) is None:
            continue
        packed[down] = replace(packed[down], comes_ordered=True)
        rows = order if each == 2 else torch.cat((order, order + len(order)))
        for module in w13[each * i : each * (i + 1)]:
            if module in packed:
                packed[module] = replace(packed[module], outputs=rows)
            for name in (f"{module}.weight", f"{module}.bias"):
                if part := parts.get(name):
                    parts[name] = replace(part, rows=lambda a, b, part=part, rows=rows: part.read()[rows[a:b]])


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.equal(b))


def _scheme(mode: str, specs: dict[str, tuple], ordered: list[str], linears: list[str]) -> dict[str, Any] | None:
    if not specs:
        return None

    def short(names: list[str]) -> list[str]:  # the last part of a name stands for all that end so
        others = {name.rpartition(".")[2] for name in linears if name not in names}
        return list(dict.fromkeys(k if (k := name.rpartition(".")[2]) not in others else name for name in names))

    ((most, _),) = Counter(specs.values()).most_common(1)
    others = {name: dict(spec) for name, spec in specs.items() if spec != most}
    skip = short([name for name in linears if name not in specs])
    scheme = {"mode": mode, **dict(most), "skip": skip, "ordered": short(ordered), "others": others}
    return {key: value for key, value in scheme.items() if value or key == "skip"}
