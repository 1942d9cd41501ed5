"""Calls the operators of the CPU's kernels with odd sizes, types, strides and numbers: is each right, or refused?

    python -m tests.fuzz_operators --calls 1000 --asan

Half of the calls are valid; in the others one argument is changed. Results are compared with plain PyTorch's.
Worth knowing: with --asan the kernels are built anew, in a temporary folder, with AddressSanitizer. It ends the process
at the first access outside of a tensor, as a crash does without it; the calls then go on in another process.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu, kind_of_pairs
from kernels.cpu import build
from model import gated, multiply
from scripts.bench.random_models import FORMS, random_groups

ROOT = Path(__file__).parent.parent
ASAN = "-fsanitize=address", "-O1", "-g1"
RIGHT, REFUSED, ELSE = "right", "refused with a line", "anything else"
ROWS, OUTPUTS, INPUTS = (0, 1, 2, 3, 8, 9, 16, 17, 40), (0, 2, 16, 40, 96), (0, 64, 256, 320)
NUMBERS = (0, 1, -1, 3, 288, 512, 1 << 31, 1 << 40, (1 << 62) + 1, (1 << 63) - 1, -(1 << 63))
NO_FORMS = 0, 4, 8, 12, 17, -1, 1 << 62
DTYPES = torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int8, torch.int32, torch.int64
Call = tuple[str, dict[str, Any], Any]  # an operator, valid arguments, and (arguments) -> the result in plain PyTorch


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def in_panels(n: int) -> int:
    return -(-n // 16) * 16


def a_product(dice: random.Random) -> Call:
    m, n, k, E = dice.choice(ROWS), dice.choice(OUTPUTS), dice.choice(INPUTS), dice.choice((1, 1, 3))
    n = n if E == 1 else in_panels(n)
    kind, groupsize = dice.choice(("bf16", "int8", *FORMS)), dice.choice((32, 64))
    form: dict[str, Any] = {}
    if kind in FORMS:
        bits, dtype, zeros_are = FORMS[kind]
        form = {"groupsize": groupsize, "form": kind_of_pairs(dtype, zeros_are) + 8 * (bits != 4)}
    name = f"{kind if kind in ('bf16', 'int8') else 'grouped'}_linear"
    if not n or not k:
        tensors, exact = None, torch.zeros(E * n, k)
    elif form:
        module = random_groups(E * n, k, groupsize, kind)
        tensors, exact = (module.weight, module.scales, module.zeros, zeros_are), module.dequantize(torch.float32)
    elif kind == "int8":
        tensors = torch.randint(-127, 128, (E * n, k), dtype=torch.int8), torch.rand(E * n)
        exact = tensors[0] * tensors[1][:, None]
    else:
        tensors = (bf16(E * n, k),)
        exact = tensors[0].float()
    if tensors is None:
        packed = torch.zeros(in_panels(E * n) // 16, 64 * (kind == "int8"), dtype=torch.uint8)
    else:
        packed = cpu.product(*tensors, n_experts=E).tensors["packed"].clone()  # so that nothing lies beside it
    x, bias, residual, experts, weights = bf16(m, k), bf16(n), None, None, None
    activation = dice.choice(("", "silu", "gelu_tanh"))
    if E > 1:
        top, bias = dice.choice((0, 1, 2)), None
        experts = torch.rand(m, E).argsort(1)[:, :top] * bool(n and k)  # a weight without bytes is of one expert
        if dice.random() < 0.5 and not activation:
            x, weights = bf16(m * top, k), torch.rand(m, top)
        elif not activation:
            m *= top
    if not activation:
        residual = dice.choice((None, bf16(m, n)))
    norm = dice.choice((None, bf16(k), torch.randn(k)))
    surroundings = {"bias": dice.choice((None, bias)), "norm": norm, "eps": 1e-5, "residual": residual}
    surroundings |= {"activation": activation, "experts": experts, "weights": weights}
    n_rows = in_panels(len(exact))
    exact = F.pad(exact, (0, 0, 0, n_rows - len(exact)))

    def expected(x, packed, n_out, bias, norm, eps, residual, activation, experts, weights, **others) -> Tensor:
        dense = exact if packed.numel() else torch.zeros(n_out, k)
        if others != form or (experts is None and len(dense) != (in_panels(n_out) if packed.numel() else n_out)):
            raise ValueError("the weight is of another form")
        x = x.float() if norm is None else F.rms_norm(x.float(), norm.shape, norm.float(), eps).bfloat16().float()
        n_experts = 1 if experts is None or not n_out or not k else n_rows // n_out
        if weights is not None:
            x = x.unflatten(0, experts.shape)
        bias = bias if bias is None else bias.float()
        y = multiply(x, dense[: n_experts * n_out], bias, n_experts, experts, weights).flatten(0, -2)
        y = y if residual is None else y + residual
        return gated(y.bfloat16().float(), activation) if activation else y

    return name, {"x": x, "packed": packed, "n_out": n, **form, **surroundings}, expected


def a_route(dice: random.Random) -> Call:
    n_rows, E, k = dice.choice(ROWS), dice.choice((1, 8, 20)), dice.choice(INPUTS[1:])
    weight, norm = bf16(E, k), dice.choice((bf16(k), torch.randn(k)))
    packed = cpu.router(weight, 1, False).tensors["packed"].clone()
    chosen = {"n_experts": E, "k": dice.randint(0, E), "normalizes": dice.random() < 0.5}

    def expected(x, packed, n_experts, k, normalizes, norm, eps) -> Tensor:
        if in_panels(n_experts) != in_panels(E):
            raise ValueError("the weight is of another size")
        x = F.rms_norm(x.float(), norm.shape, norm.float(), eps).bfloat16().float()
        dense = F.pad(weight.float(), (0, 0, 0, in_panels(E) - E))[:n_experts]
        shares = F.linear(x, dense).softmax(-1).topk(k).values
        return shares / shares.sum(-1, keepdim=True) if normalizes else shares

    return "route", {"x": bf16(n_rows, k), "packed": packed, **chosen, "norm": norm, "eps": 1e-5}, expected


def a_packing(dice: random.Random) -> Call:
    n, k = dice.choice(OUTPUTS), dice.choice(INPUTS)
    out = torch.zeros(in_panels(n) // 16, 32 * k, dtype=torch.uint8)

    def expected(weight, out) -> Tensor:
        weight = F.pad(weight, (0, 0, 0, in_panels(len(weight)) - len(weight)))
        pairs = (
            weight.unflatten(1, (weight.shape[1] // 2, 2))
            .unflatten(0, (len(weight) // 16, 16))
            .transpose(1, 2)
            .contiguous()
        )
        return pairs.view(torch.uint8).view(out.shape).float()

    return "pack_bf16", {"weight": bf16(n, k), "out": out}, expected


def an_attention(dice: random.Random) -> Call:
    B, KV, heads, S, L = (dice.choice(sizes) for sizes in ((0, 1, 2), (1, 2), (0, 1, 3), (0, 1, 5), (1, 5, 300, 700)))
    D, is_int8 = dice.choice((0, 7, 32, 80)), dice.random() < 0.5
    k, v = (torch.randint(-127, 128, (B, KV, L, D)).char() if is_int8 else bf16(B, KV, L, D) for _ in range(2))
    k_scales, v_scales = (torch.rand(B, KV, L) / 99 if is_int8 else None for _ in range(2))
    positions = torch.randint(-1, L, (B, S))
    for _ in range(dice.choice((0, 0, positions.numel()))):
        positions.view(-1)[dice.randrange(positions.numel())] = dice.choice((*NUMBERS, L, L + 7))
    window = dice.choice((0, 0, 1, 100, 300, *(n for n in NUMBERS if n > 0)))

    def expected(q, k, v, positions, window, k_scales, v_scales) -> Tensor:
        if not q.numel():
            return q.float()
        k, v = (x.float() if s is None else x * s[..., None] for x, s in ((k, k_scales), (v, v_scales)))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        at, slots = positions.clamp(-1, 1 << 41)[:, None, :, None], torch.arange(k.shape[2])
        hidden = slots > at
        if window:
            hidden = hidden | (slots <= at - min(window, 1 << 41))
        scores = q.float() @ k.mT / max(q.shape[3], 1) ** 0.5
        return scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num() @ v

    args = {"q": bf16(B, KV * heads, S, D), "k": k, "v": v, "positions": positions, "window": window}
    return "decode_attention", args | {"k_scales": k_scales, "v_scales": v_scales}, expected


def changed(dice: random.Random, value: Any) -> Any:
    """Another value for an argument, in most cases an invalid one."""
    if isinstance(value, bool | str):
        return dice.choice((True, False, "", "relu", "silu"))
    if isinstance(value, int):
        return dice.choice((*NUMBERS, value + 1, value - 1))
    if isinstance(value, float):
        return dice.choice((0.0, 1.0, float("nan"), float("inf"), -1.0))
    if value is None:
        shape = [dice.choice((0, 1, 16, 64)) for _ in range(dice.randint(0, 3))]
        return torch.randn(shape).to(dice.choice(DTYPES))
    dim = dice.randrange(value.dim()) if value.dim() else 0
    size = value.shape[dim] if value.dim() else 0
    ways = [value[None], value.flatten(), value.to(dice.choice(DTYPES)), value.new_empty(0), None]
    ways += [torch.stack((value, value), -1)[..., 0]]  # the same values, not contiguous
    if value.dim() > 1:
        ways += [value.transpose(dim, dim - 1), value.mT.contiguous().mT]
    if size:
        ways += [value.select(dim, 0), value.narrow(dim, 0, dice.choice((0, 1, size - 1)))]
        ways += [torch.cat((value, value.narrow(dim, 0, dice.choice((1, size)))), dim)]
        ways += 2 * [value.narrow(dim, 0, 1).expand(value.shape)]  # stride 0
        ways += [
            value.narrow(dim, 0, 1).expand(*value.shape[:dim], dice.choice((1 << 31, 1 << 40)), *value.shape[dim + 1 :])
        ]
    if value.dtype == torch.int64 and value.numel():
        ways += [value.flatten().index_fill(0, torch.tensor([0]), dice.choice(NUMBERS)).view(value.shape)]
    return dice.choice(ways)


def agree(y: Tensor, exact: Tensor, is_gated: bool) -> bool:
    if y.shape != exact.shape or not y.isnan().equal(exact.isnan()):
        return False
    y, exact = y.float().nan_to_num(), exact.nan_to_num()
    return bool(
        (y - exact).norm() <= 0.02 * exact.norm() + (0.3 if is_gated else 1e-4)
    )  # far below 0 a gate magnifies errors


def outcome(number: int) -> tuple[str, str]:
    """Make this call: RIGHT, REFUSED or ELSE, and in words what it was and what happened."""
    dice = random.Random(number)
    torch.manual_seed(number)
    torch.set_num_threads(dice.choice((1, 2)))
    torch.ops.fast.choose_variant(variant := dice.choice(torch.ops.fast.variants()))
    cases = [a_product, a_product, a_route, a_packing] + [an_attention] * (variant == "avx512")
    name, args, expected = dice.choice(cases)(dice)
    what = ""
    if number % 2:
        what = dice.choice(list(args))
        args[what] = dice.choice(NO_FORMS) if what == "form" else changed(dice, args[what])
    sizes = {key: (x.dtype, x.shape, x.stride()) if isinstance(x, Tensor) else x for key, x in args.items()}
    words = f"{name} ({variant}), changed: {what or None}, {sizes}"
    print(f"{number}\t{ELSE}\t{words}", flush=True)  # if it crashes
    run = getattr(torch.ops.fast, name)
    try:
        result = cpu.in_one_region(lambda: run(**args))() if dice.random() < 0.3 else run(**args)
    except (RuntimeError, IndexError, TypeError, MemoryError) as error:
        line = str(error).partition("\n")[0]
        return (REFUSED if what and line else ELSE), f"{words}: {line}"
    result = args["out"] if name == "pack_bf16" else result[1] if name == "route" else result
    try:
        exact = expected(**args)
    except Exception as error:
        return ELSE, f"{words}: it should have been refused: {error}"
    return (RIGHT if agree(result, exact, bool(args.get("activation"))) else ELSE), f"{words}: the result differs"


def fuzz(calls: int, asan: bool = False) -> tuple[Counter, list[str]]:
    """Make `calls` calls in another process. Returns how many had each outcome and, in words, those that were ELSE."""
    found, bad = {}, []
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        if asan:
            os.environ["TORCH_EXTENSIONS_DIR"] = folder
            build.FLAGS += ASAN
            build._build()
            libraries = ("libasan.so", "libstdc++.so")  # the second, or exceptions would end the process
            ask = [[build.compiler(), f"-print-file-name={library}"] for library in libraries]
            preload = " ".join(subprocess.check_output(command, text=True).strip() for command in ask)
            options = "detect_leaks=0:allocator_may_return_null=1"
            environment = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": options}
        while len(found) < calls:
            command = [sys.executable, "-m", "tests.fuzz_operators", "--from", str(len(found)), "--calls", str(calls)]
            child = subprocess.run(
                command + ["--asan"] * asan, cwd=ROOT, env=environment, capture_output=True, text=True
            )
            lines = dict(line.split("\t", 1) for line in child.stdout.splitlines())
            if not lines:
                raise RuntimeError(child.stderr)
            found |= lines
            if child.returncode:
                reason = next((line for line in child.stderr.splitlines() if "ERROR: Addr" in line), child.returncode)
                bad.append(f"{list(lines.values())[-1]}: the process ended: {reason}")
    outcomes = [line.split("\t") for line in found.values()]
    return Counter(kind for kind, _ in outcomes), bad + [words for kind, words in outcomes if kind == ELSE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--asan", action="store_true", help="with the compiler's AddressSanitizer")
    parser.add_argument("--from", type=int, dest="first", help=argparse.SUPPRESS)  # of the process that makes the calls
    args = parser.parse_args()
    if args.first is None:
        counts, bad = fuzz(args.calls, args.asan)
        print(*bad, sep="\n", file=sys.stderr)
        print(" · ".join(f"{kind}: {counts[kind]}" for kind in (RIGHT, REFUSED, ELSE)))
        sys.exit(1 if bad else 0)
    build.FLAGS += ASAN * args.asan
    if reason := build.load():
        sys.exit(reason)
    for number in range(args.first, args.calls):
        print(number, *outcome(number), sep="\t", flush=True)


if __name__ == "__main__":
    main()
