"""Speed at a real model's shape, with random weights, compared with the device's own speed at that moment.

    python -m scripts.bench.speed --model tinyllama-1.1b --mode bf16 int8 int4
    python -m scripts.bench.speed --model tinyllama-1.1b --context_length 128 512 --batch_size 1 4 16 --plot roof.png
    python -m scripts.bench.speed --model tinyllama-1.1b --context_length 100 --max_seq_length 256 8192
    python -m scripts.bench.speed --model tinyllama-1.1b --mode bf16 int8 int4 --shapes --batch_size 1 6 16

Worth knowing: a machine's bandwidth may halve within seconds, so tokens/s alone say little. A plain read is timed
before and after every stretch of decoding, `F.linear` before and after every prefill. A share compares a figure with
these two; the table gives medians; all points take turns within a run. A flag with several values is an axis: each
value is measured with the first value of the other flags, and in every mode.
"""

import fast.startup  # isort: skip  # noqa: F401 - before the others, see there
import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fast.cli import CACHE_DTYPES, check_at_least, drop_compile, exit_code, resolve_device, resolve_kv_dtype
from fast.compiling import set_compile_flags
from fast.decoding import Steps, build_steps, stream, warm_up
from fast.layers import kernels_missing
from fast.metrics import peak_memory
from fast.quantized import GROUP_SIZES
from fast.sampling import Sampling
from model import ModelArgs
from scripts.bench import command_line
from scripts.bench.command_line import check_files, report
from scripts.bench.measuring import Decode, Prefill, Product, Rotation, Yardstick
from scripts.bench.presets import PRESETS, preset, without_experts
from scripts.bench.random_models import SHAPES, build_model, meta_model, scheme_of, with_caches


def capacities_of(args: argparse.Namespace) -> list[int]:
    """The capacities of the KV cache. Raises ValueError for one that is too small for the given lengths."""
    needed = max(*args.prompt_length, max(args.context_length) + args.new_tokens - 1)
    if args.max_seq_length and min(args.max_seq_length) < needed:
        raise ValueError(f"--max_seq_length {min(args.max_seq_length)} is less than the {needed} these lengths take")
    return args.max_seq_length or [needed]


def prepare(args: argparse.Namespace, mode: str, shape: ModelArgs) -> list[Steps]:
    """The steps, compiled if asked, for each capacity of the KV cache; they share the weights."""
    capacities = capacities_of(args)
    model = build_model(shape, *resolve_device(args), scheme_of(mode, args.groupsize))
    twins = with_caches(model, max(args.batch_size), capacities, resolve_kv_dtype(args))
    return [build_steps(twin, Sampling(), args.compile, args.compile_prefill) for twin in twins]


def warm_up_alone(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the first compiled run of one mode, including building the CPU's kernels, and peak memory in bytes."""
    args.max_seq_length, args.batch_size = capacities_of(args)[:1], args.batch_size[:1]
    prompts = [[1] * args.prompt_length[0]] * args.batch_size[0]
    start = time.perf_counter()
    kernels_missing(*resolve_device(args))  # builds them
    seconds = time.perf_counter() - start
    (steps,) = prepare(args, args.only_warm_up, preset(args.model))
    seconds += warm_up(steps, prompts, 2)
    deque(stream(steps, prompts, 2), maxlen=0)
    return {"seconds": seconds, "peak_memory_bytes": peak_memory(args.device)}


def fresh_process(argv: list[str], mode: str, env: dict[str, str]) -> dict[str, float]:
    """`warm_up_alone` in a new process, with `env` added to its environment."""
    command = [sys.executable, "-m", "scripts.bench.speed", *argv, "--only_warm_up", mode]
    child = subprocess.run(command, env={**os.environ, **env}, stdout=subprocess.PIPE)
    if child.returncode:
        raise ValueError(f"the process that warms up {mode} failed with exit code {child.returncode}")
    return json.loads(child.stdout.splitlines()[-1])


def measure_startup(args: argparse.Namespace, argv: list[str]) -> list[dict[str, Any]]:
    """Compile times and peak memory of every mode, in fresh processes.

    `first`: empty caches. `cold`: only the CPU's kernels are built (a GPU has none to build). `warm`: all is cached.
    """
    alone, names = [], ["first", "cold", "warm"] if resolve_device(args)[0] == "cpu" else ["cold", "warm"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        for mode in args.mode:
            times, env = {}, {}
            for name in names if args.compile or args.compile_prefill else [None]:
                print(f"{mode} in a fresh process{f', {name}' if name else ''} ...", file=sys.stderr)
                if name:
                    folder = f"{cache}/{mode}_{'first' if name == 'first' else 'later'}"
                    os.makedirs(folder, exist_ok=True)  # for precompiled headers; a TMPDIR that is missing is ignored
                    env = dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TMPDIR"), folder)
                    env["TORCH_EXTENSIONS_DIR"] = f"{cache}/{mode}_kernels"
                run = fresh_process(argv, mode, env)
                times |= {f"compile_{name}_s": run["seconds"]} if name else {}
            alone.append({"mode": mode, **times, "peak_memory_bytes": run["peak_memory_bytes"]})
    return alone


def take_turns(points: list[Prefill | Decode] | list[Product], repeats: int) -> None:
    for point in tqdm(points * repeats, desc="measuring", file=sys.stderr):
        point.measure()


def measure_model(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of every prefill and every decode."""
    batches, contexts = args.batch_size, args.context_length
    # (batch size, context length, index of the capacity): along each axis, starting from the first values
    decodes = [(batches[0], context, 0) for context in contexts] + [(batch, contexts[0], 0) for batch in batches[1:]]
    decodes += [(batches[0], contexts[0], i) for i in range(1, len(capacities_of(args)))]
    if args.compile:  # compile for each batch size; otherwise the second one would be compiled as dynamic
        torch._dynamo.config.automatic_dynamic_shapes = len(args.mode) * len(decodes) == 1 and not args.dense
    print(f"building {args.model} and warming up ...", file=sys.stderr)
    yardstick, by_mode = Yardstick(preset(args.model), *resolve_device(args)), {}
    prefills, points = [], []
    shapes = {mode: (mode, preset(args.model)) for mode in args.mode}
    if args.dense:
        shapes |= {f"{mode} dense": (mode, without_experts(preset(args.model))) for mode in args.mode}
    for name, shape in shapes.items():
        by_mode[name] = steps = prepare(args, *shape)
        prefills += [Prefill(name, steps[0], yardstick, batches[0], length) for length in args.prompt_length]
    for batch, context, i in decodes:
        for name in shapes:
            warm_up(by_mode[name][i], [[1] * context] * batch, args.new_tokens)
            points.append(Decode(name, by_mode[name][i], yardstick, batch, context, args.new_tokens))
    take_turns(prefills + points, args.repeats)
    return {"prefill": [p.figures() for p in prefills], "decode": [p.figures() for p in points]}


def measure_shapes(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of every product of a decode step; only one shape, in every mode, is in memory at a time."""
    device, dtype = resolve_device(args)
    shape, products = preset(args.model), []
    yardstick = Yardstick(shape, device, dtype)
    for name, pick in SHAPES.items():
        points = []
        for mode in args.mode:
            scheme = scheme_of(mode, args.groupsize)
            rotation = Rotation(pick(meta_model(shape, dtype, scheme)), device, dtype, scheme)
            run = rotation
            if args.compile:
                run = torch.compile(rotation, fullgraph=True, mode="reduce-overhead", dynamic=False)
            points += [Product(mode, name, rotation, run, yardstick, rows) for rows in args.batch_size]
        take_turns(points, args.repeats)
        products += [point.figures() for point in points]
        torch.compiler.reset()  # frees this shape's weights
    return {"products": products}


def print_table(r: dict[str, Any]) -> None:
    widths = (38, 34, 40, 18, 22)

    def row(*cells: str) -> None:
        cells += ("",) * (len(widths) - len(cells))
        print("|", " | ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)), "|")

    def read(p: dict[str, Any]) -> str:
        return f"{p['bandwidth_gb_per_s']:.1f} GB/s (plain read)"

    share = "{:.0%} ({:.0%} to {:.0%})".format
    row("", "measured", "the device itself", "share of it", "us per layer: + rest")
    row(*("-" * width for width in widths))
    for p in r.get("prefill", []):
        prefill = f"{p['tokens_per_s']:.1f} tokens/s, {p['gflops_per_s']:.0f} GFLOP/s"
        matmul = f"{p['matmul_gflops_per_s']:.0f} GFLOP/s (F.linear {p['matmul_shape']})"
        row(f"{p['mode']} prefill {p['batch_size']} x {p['prompt_length']}", prefill, matmul, share(*p["share"]))
    place, first = ("batch_size", "context_length", "max_seq_length"), {}
    for p in r.get("decode", []):
        base = first.setdefault(tuple(p[key] for key in place), p)
        decode = f"{p['tokens_per_s']:.2f} tokens/s, {p['gb_per_s']:.1f} GB/s"
        if p is not base:
            decode += f" ({p['tokens_per_s'] / base['tokens_per_s']:.2f} x)"
        name = "{mode} decode {batch_size} at {context_length}, cache {max_seq_length}".format(**p)
        row(name, decode, read(p), share(*p["share"]), f"{p['layer_bytes_us']:.1f} {p['layer_rest_us']:+.1f}")
    rates = {tuple(p[key] for key in ("mode", *place)): p["tokens_per_s"] for p in r.get("decode", [])}
    for (mode, *where), rate in rates.items():
        if dense := rates.get((f"{mode} dense", *where)):
            row(f"{mode} decode, of the dense model's", f"{rate / dense:.2f} x")
    for p in r.get("prefill", []):
        row(f"{p['mode']} first token after {p['prompt_length']}", f"{p['first_token_s'] * 1e3:.0f} ms")
    for p in r.get("products", []):
        product = f"{p['us']:.1f} us, {p['gb_per_s']:.1f} GB/s ({p['copies']} copies)"
        row(f"{p['mode']} {p['shape']}, {p['rows']} rows", product, read(p), share(*p["share"]))
    for m in r.get("alone", []):
        compiled = [f"{key.split('_')[1]} {m[key]:.1f} s" for key in m if key.startswith("compile_")]
        row(f"{m['mode']} compile, with a first run", ", ".join(compiled) or "-")
        row(f"{m['mode']} peak memory", f"{m['peak_memory_bytes'] / 1e9:.2f} GB")


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.build_parser(__doc__)
    add = parser.add_argument
    add("--mode", nargs="+", choices=["bf16", "int8", "int4"], default=["bf16"], help="one or several")
    add("--groupsize", type=int, choices=GROUP_SIZES, default=32, help="of int4")
    add("--compile_prefill", action="store_true", help="compile the prefill")
    add("--kv_dtype", choices=CACHE_DTYPES, default="auto", help="what the KV cache stores (default: as --dtype)")
    axes = {
        "prompt_length": ([128], "tokens of a prefill"),
        "context_length": ([128], "positions before the decoded tokens; noise, for only time counts"),
        "batch_size": ([1], "rows that are decoded; a prefill has the first number"),
        "max_seq_length": (None, "capacities of the KV cache (default: what the lengths take)"),
    }
    for name, (default, text) in axes.items():
        add(f"--{name}", type=int, nargs="+", default=default, help=f"{text}; one or several")
    add("--new_tokens", type=int, default=32, help="of a run")
    add("--repeats", type=int, default=5, help="runs of every point, which take turns")
    add("--dense", action="store_true", help="take turns with a dense model that reads as much as one with experts")
    add("--shapes", action="store_true", help="the single products of a decode step instead, --batch_size rows each")
    add("--startup", action="store_true", help="compile times and peak memory too, in fresh processes")
    add("--plot", type=Path, help="draw every prefill and decode under the device's roofline in this PNG")
    add("--only_warm_up", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that cannot be measured."""
    check_at_least(args, 1, "prompt_length", "context_length", "batch_size", "repeats")
    check_at_least(args, 2, "new_tokens")
    preset(args.model)
    capacities_of(args)
    check_files(args)
    if args.dense and not preset(args.model).n_experts:
        with_experts = ", ".join(name for name, shape in PRESETS.items() if shape.n_experts)
        raise ValueError(f"--dense: {args.model} has no experts; {with_experts} have them")
    if args.dense and args.batch_size != [1]:
        raise ValueError("--dense: more rows read more experts, and no more of a dense model: leave --batch_size out")
    if args.shapes and preset(args.model).n_experts:
        raise ValueError(f"--shapes: {args.model} has experts, whose products depend on the token; leave it out")
    if args.plot and args.dense:
        raise ValueError("--plot draws one model: leave --dense out")
    if args.plot and args.shapes:
        raise ValueError("--plot draws prefills and decodes, which --shapes leaves out")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs the package matplotlib: pip install matplotlib")


def run(args: argparse.Namespace, argv: list[str]) -> None:
    check(args)
    device, dtype = resolve_device(args)
    drop_compile(args, "compile", "compile_prefill")
    if args.compile or args.compile_prefill:
        set_compile_flags(device)
        torch._dynamo.config.recompile_limit = 256  # one function for every mode, capacity and batch size
    if "only_warm_up" in args:
        return print(json.dumps(warm_up_alone(args)))
    if set(args.mode) != {"bf16"} and (reason := kernels_missing(device, dtype)):
        print(reason, file=sys.stderr)
    figures = {"alone": measure_startup(args, argv)} if args.startup else {}
    figures |= measure_shapes(args) if args.shapes else measure_model(args)
    result = report(args, figures, print_table)
    if args.plot:
        from scripts.bench.roofline import draw

        draw(result, args.plot)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    with torch.no_grad():
        return exit_code(lambda: run(build_parser().parse_args(argv), argv))


if __name__ == "__main__":
    sys.exit(main())
