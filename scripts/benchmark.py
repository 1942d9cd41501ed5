"""Speed at a real model's shape, with random weights, beside what the device itself can do at that moment.

    python scripts/benchmark.py --model tinyllama-1.1b
    python scripts/benchmark.py --model tinyllama-1.1b --mode bf16 int8 int4
    python scripts/benchmark.py --model tinyllama-1.1b --prompt_length 100 --max_seq_length 256 8192

Worth knowing: a machine's bandwidth may drift by half within seconds, so tokens/s alone say little. A plain read (on a
GPU a copy) is timed before and after every stretch of decoding, a plain product before and after every prefill; a share
compares a figure with its own two neighbours, and the table gives medians. Modes and capacities take turns within a
run: the second line asks what quantising gains, the third what the capacity of the KV cache costs. Progress goes to
stderr; the table, and as the last line every figure as JSON, to stdout.
"""

import argparse
import copy
import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import _root  # noqa: F401 - finds the modules of the repository's root
import torch
import torch.nn.functional as F

from decoding import Steps, build_steps, missing_compiler, set_compile_flags, stream, warm_up
from generate import CACHE_DTYPES, resolve_device, resolve_kv_dtype
from linear import GROUP_SIZES, kernels_missing, pack_linears, swap_linears
from metrics import bytes_per_step, peak_memory, write_json
from model import ModelArgs, Transformer
from sampling import Sampling


def build_model(args: ModelArgs, device: str, dtype: torch.dtype, scheme: dict[str, Any] | None = None) -> Transformer:
    """A model with random weights, made on the device: one block of noise over and over, norms left at one.

    scheme: how the Linears are quantised, as a checkpoint records it.
    """
    if scheme is not None:
        args = dataclasses.replace(args, tie_embeddings=False)  # a quantised output projection has its own weight
    with torch.device("meta"):
        model = Transformer(args)
    if scheme is not None:
        swap_linears(model, scheme)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if args.tie_embeddings:
        model.output.weight = None  # else to_empty gives it memory of its own
    model = model.to_empty(device=device).requires_grad_(False).eval()
    if args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    noise = (0.02 * torch.randn((1 << 22) + 15, device=device)).to(dtype)  # an odd length: no two rows are equal
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1)
            continue
        for piece in parameter.view(-1).split(len(noise)):
            piece.copy_(noise[: len(piece)])
    for name, buffer in model.named_buffers():
        if name.endswith("weight"):
            buffer.view(-1).view(torch.int8).random_(-127, 128)
        else:  # so that weights spread as the noise does
            buffer.fill_(0.0 if name.endswith("zeros") else 0.02 / (73 if scheme["mode"] == "int8" else 4.6))
    pack_linears(model, dtype)
    return model


class Yardstick:
    """What the device can do right now: bytes per second of memory, operations per second of matrix products."""

    def __init__(self, args: ModelArgs, n_tokens: int, device: str, dtype: torch.dtype):
        self.is_cuda = device.startswith("cuda")
        self.source = torch.ones(1 << (28 if self.is_cuda else 26), device=device)  # 1 GiB or 256 MiB
        self.target = torch.empty_like(self.source) if self.is_cuda else None
        self.products = {}
        for n_in, n_out in ((args.dim, 2 * args.hidden_dim), (2048, 2048)):
            x = torch.randn(n_tokens, n_in, device=device, dtype=dtype)
            self.products[f"{n_tokens}x{n_in}x{n_out}"] = x, torch.randn(n_out, n_in, device=device, dtype=dtype)
        self.bandwidth(), self.matmul_rates()  # the first of each is slow

    def seconds(self, function: Callable[..., Any], *args: Any) -> float:
        """How long a call takes, with all that it starts on the device."""
        start = time.perf_counter()
        function(*args)
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def bandwidth(self) -> float:
        """Bytes per second of one plain read on a CPU, of copies on a GPU (reads plus writes)."""
        if self.target is None:
            return self.source.nbytes / self.seconds(self.source.sum)
        return 2 * self.source.nbytes / min(self.seconds(self.target.copy_, self.source) for _ in range(5))

    def matmul_rates(self) -> dict[str, float]:
        """Operations per second of `F.linear`, best of three, by shape (tokens x in x out)."""
        return {
            shape: 2 * len(x) * weight.numel() / min(self.seconds(F.linear, x, weight) for _ in range(3))
            for shape, (x, weight) in self.products.items()
        }


def prefill_flops(model: Transformer, batch_size: int, length: int) -> float:
    """Operations of a prefill: 2 per token and weight of the layers, the output projection for a row's last position,
    and in attention the two products over the keys that a causal query sees. Norms, RoPE, softmax: not counted.
    """
    args = model.args
    with torch.device("meta"):
        blocks = Transformer(args).layers
    layers = 2 * length * sum(p.numel() for p in blocks.parameters() if p.dim() == 2)
    attention = 4 * args.n_layers * args.n_heads * args.head_dim * length * (length + 1) / 2
    return batch_size * (layers + attention + 2 * args.vocab_size * args.dim)


def measure_prefill(steps: Steps, prompts: list[list[int]], yardstick: Yardstick, repeats: int) -> dict[str, Any]:
    """Time prefills, up to the first token's id on the host. A share's base is the fastest product around it."""
    seconds, rates = [], [yardstick.matmul_rates()]
    for _ in range(repeats):
        seconds.append(yardstick.seconds(lambda: deque(stream(steps, prompts, 1), maxlen=0)))
        rates.append(yardstick.matmul_rates())
    best = [max(rate.values()) for rate in rates]
    flops = prefill_flops(steps.model, len(prompts), len(prompts[0]))
    shares = sorted(flops / s / mean(around) for s, around in zip(seconds, pairwise(best), strict=True))
    return {
        "prefill_tokens_per_s": len(prompts) * len(prompts[0]) / median(seconds),
        "prefill_flops": flops,
        "prefill_gflops_per_s": flops / median(seconds) / 1e9,
        "matmul_gflops_per_s": median(best) / 1e9,
        "matmul_shape": max(rates[0], key=lambda shape: median(rate[shape] for rate in rates)),
        "prefill_share": [median(shares), shares[0], shares[-1]],
    }


@dataclasses.dataclass
class Decoding:
    """Decode times in stretches of at least 50 ms, each with the bandwidth around it; on a GPU a run is one stretch."""

    mode: str
    steps: Steps
    yardstick: Yardstick
    first_token_s: list[float] = dataclasses.field(default_factory=list)
    stretches: list[tuple[float, ...]] = dataclasses.field(default_factory=list)

    def measure(self, prompts: list[list[int]], new_tokens: int) -> None:
        """One run of `stream`, stopped between two tokens to time a plain read."""
        is_cuda, before, start = self.yardstick.is_cuda, self.yardstick.bandwidth(), time.perf_counter()
        tokens = stream(self.steps, prompts, new_tokens)
        next(tokens)
        self.first_token_s.append(time.perf_counter() - start)
        if not is_cuda:  # a GPU is at the next token already
            before = self.yardstick.bandwidth()
        n, valid, start = 0, len(prompts[0]), time.perf_counter()
        for i, ids in enumerate(tokens, start=2):
            n, valid, elapsed = n + 1, valid + 1, time.perf_counter() - start
            if i == new_tokens or (elapsed > 0.05 and not is_cuda):
                after = self.yardstick.bandwidth()
                nbytes = bytes_per_step(self.steps.model, len(ids), valid - (n - 1) / 2)
                self.stretches.append((len(ids) * n / elapsed, nbytes, nbytes * n / elapsed, (before + after) / 2))
                n, before, start = 0, after, time.perf_counter()

    def figures(self) -> dict[str, Any]:
        """Medians over the stretches; the share's range is that of its middle 80 %."""
        tokens, nbytes, rates, bandwidths = zip(*self.stretches, strict=True)
        shares = sorted(rate / bandwidth for rate, bandwidth in zip(rates, bandwidths, strict=True))
        return {
            "mode": self.mode,
            "max_seq_length": self.steps.model.max_seq_length,
            "first_token_s": median(self.first_token_s),
            "tokens_per_s": median(tokens),
            "bytes_per_step": median(nbytes),
            "gb_per_s": median(rates) / 1e9,
            "bandwidth_gb_per_s": median(bandwidths) / 1e9,
            "share": [median(shares), shares[len(shares) // 10], shares[-1 - len(shares) // 10]],
        }


def fresh_process(argv: list[str], mode: str, cache: str) -> dict[str, float]:
    """What `warm_up` takes in a new process that keeps all it compiles, kernels and headers too, in `cache`."""
    env = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCH_EXTENSIONS_DIR": f"{cache}/extensions", "TMPDIR": cache}
    command = [sys.executable, __file__, *argv, "--only_warm_up", mode]
    child = subprocess.run(command, env={**os.environ, **env}, stdout=subprocess.PIPE)
    if child.returncode:
        raise ValueError(f"the process that warms up {mode} failed with exit code {child.returncode}")
    return json.loads(child.stdout.splitlines()[-1])


def prepare(args: argparse.Namespace, mode: str, capacities: list[int]) -> list[Steps]:
    """The steps for each capacity of the KV cache, on the same weights."""
    device, dtype = resolve_device(args)
    shape = ModelArgs.from_name(args.model)
    shape = dataclasses.replace(shape, context_length=max(shape.context_length, *capacities))
    scheme = {"int8": {"mode": "int8"}, "int4": {"mode": "int4", "groupsize": args.groupsize}}.get(mode)
    model, all_steps = build_model(shape, device, dtype, scheme), []
    weights = [*model.parameters(), *model.buffers()]
    for capacity in capacities:
        twin = copy.deepcopy(model, {id(tensor): tensor for tensor in weights})
        twin.setup_caches(args.batch_size, capacity, kv_dtype=resolve_kv_dtype(args))
        all_steps.append(build_steps(twin, Sampling(), args.compile, args.compile_prefill))
    return all_steps


def made_up_prompts(args: argparse.Namespace) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    shape = args.batch_size, args.prompt_length
    return torch.randint(ModelArgs.from_name(args.model).vocab_size, shape, generator=generator).tolist()


def capacities_of(args: argparse.Namespace) -> list[int]:
    return args.max_seq_length or [args.prompt_length + args.new_tokens - 1]


def warm_up_alone(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the first compiled run of one mode, kernels built on the way included, and the process's memory."""
    start = time.perf_counter()
    kernels_missing(*resolve_device(args))  # builds them
    seconds = time.perf_counter() - start
    (steps,) = prepare(args, args.only_warm_up, capacities_of(args)[:1])
    seconds += warm_up(steps, made_up_prompts(args), args.new_tokens)
    deque(stream(steps, made_up_prompts(args), 2), maxlen=0)
    return {"seconds": seconds, "peak_memory_bytes": peak_memory(args.device)}


def measure(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Every figure of every mode."""
    prompts, capacities, alone = made_up_prompts(args), capacities_of(args), {}
    compiled = args.compile or args.compile_prefill
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        for mode in args.mode:
            print(f"{mode} in a fresh process{', caches empty and filled' if compiled else ''} ...", file=sys.stderr)
            runs = [fresh_process(argv, mode, f"{cache}/{mode}") for _ in range(2 if compiled else 1)]
            if compiled:
                alone[mode] = {
                    f"compile_{name}_s": r["seconds"] for name, r in zip(("cold", "warm"), runs, strict=True)
                }
            alone.setdefault(mode, {})["peak_memory_bytes"] = runs[-1]["peak_memory_bytes"]
        # A model alone is compiled for its own capacity; the second of several would be compiled for any.
        torch._dynamo.config.automatic_dynamic_shapes = len(args.mode) * len(capacities) == 1
        print(f"building {args.model} and warming up ...", file=sys.stderr)
        all_steps = {mode: prepare(args, mode, capacities) for mode in args.mode}
        for steps in sum(all_steps.values(), []):
            warm_up(steps, prompts, args.new_tokens)
    print("measuring ...", file=sys.stderr)
    shape = all_steps[args.mode[0]][0].model.args
    yardstick = Yardstick(shape, args.batch_size * args.prompt_length, *resolve_device(args))
    prefill = {mode: measure_prefill(steps[0], prompts, yardstick, args.repeats) for mode, steps in all_steps.items()}
    decodings = [Decoding(mode, steps, yardstick) for mode in args.mode for steps in all_steps[mode]]
    for _ in range(args.repeats):
        for decoding in decodings:
            decoding.measure(prompts, args.new_tokens)
    modes = [{"mode": mode, **prefill[mode], **alone[mode]} for mode in args.mode]
    return {"modes": modes, "decode": [decoding.figures() for decoding in decodings]}


def print_table(r: dict[str, Any]) -> None:
    def row(*cells: str) -> None:
        print("| {:32} | {:34} | {:40} | {:18} |".format(*cells, *[""] * (4 - len(cells))))

    share = "{:.0%} ({:.0%} to {:.0%})".format
    print(f"{r['model']}, {r['dtype']}, {r['hardware']}, torch {r['torch']}\n")
    row("", "measured", "the device itself", "share of it")
    row("-" * 32, "-" * 34, "-" * 40, "-" * 18)
    for m in r["modes"]:
        prefill = f"{m['prefill_tokens_per_s']:.1f} tokens/s, {m['prefill_gflops_per_s']:.0f} GFLOP/s"
        matmul = f"{m['matmul_gflops_per_s']:.0f} GFLOP/s (F.linear {m['matmul_shape']})"
        name = f"{m['mode']} prefill {r['batch_size']} x {r['prompt_length']}"
        row(name, prefill, matmul, share(*m["prefill_share"]))
    for d in r["decode"]:
        decode = f"{d['tokens_per_s']:.2f} tokens/s, {d['gb_per_s']:.1f} GB/s"
        if d["mode"] != r["decode"][0]["mode"]:
            decode += f" ({d['tokens_per_s'] / r['decode'][0]['tokens_per_s']:.2f} x)"
        read = f"{d['bandwidth_gb_per_s']:.1f} GB/s (plain {'copy' if 'cuda' in r['device'] else 'read'})"
        name = f"{d['mode']} decode {r['batch_size']} x {r['new_tokens']}, cache {d['max_seq_length']}"
        row(name, decode, read, share(*d["share"]))
    for d in r["decode"]:
        row(f"{d['mode']} first token, cache {d['max_seq_length']}", f"{d['first_token_s'] * 1e3:.0f} ms")
    for m in r["modes"]:
        compiled = [f"{name} {m[f'compile_{name}_s']:.1f} s" for name in ("cold", "warm") if f"compile_{name}_s" in m]
        row(f"{m['mode']} compile, with a first run", ", ".join(compiled) or "-")
        row(f"{m['mode']} peak memory", f"{m['peak_memory_bytes'] / 1e9:.2f} GB")
    print()


def hardware(device: str) -> str:
    """The GPU's name, or the CPU's and the number of threads in use."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    return f"{name[1] if name else platform.machine()} x {torch.get_num_threads()}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="a preset of model.py, such as tinyllama-1.1b")
    add("--mode", nargs="+", choices=["bf16", "int8", "int4"], default=["bf16"], help="one or several, taking turns")
    add("--groupsize", type=int, choices=GROUP_SIZES, default=32, help="of int4")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the decode step")
    add("--compile_prefill", action="store_true", help="compile the prefill")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16, float16 on GPUs before Ampere")
    add("--kv_dtype", choices=CACHE_DTYPES, default="auto", help="what the KV cache stores (default: as --dtype)")
    for name, default in {"prompt_length": 128, "new_tokens": 32, "batch_size": 1, "repeats": 5}.items():
        add(f"--{name}", type=int, default=default)
    add(
        "--max_seq_length",
        type=int,
        nargs="+",
        help="capacities of the KV cache, taking turns (default: what it takes)",
    )
    add("--json_path", type=Path, help="write the figures to this file too")
    add("--only_warm_up", help=argparse.SUPPRESS)
    return parser


def run(args: argparse.Namespace, argv: list[str]) -> None:
    if min(args.prompt_length, args.new_tokens - 1, args.batch_size, args.repeats) < 1:
        raise ValueError("--prompt_length, --batch_size and --repeats must be at least 1, --new_tokens at least 2")
    ModelArgs.from_name(args.model)
    device, dtype = resolve_device(args)
    if (args.compile or args.compile_prefill) and (lacking := missing_compiler()):
        print(f"{lacking}: going on without --compile", file=sys.stderr)
        args.compile = args.compile_prefill = False
    set_compile_flags(device)
    if args.only_warm_up:
        return print(json.dumps(warm_up_alone(args)))
    if set(args.mode) != {"bf16"} and (reason := kernels_missing(device, dtype)):
        print(reason, file=sys.stderr)
    asked = {key: value for key, value in vars(args).items() if key not in ("json_path", "only_warm_up")}
    measured = measure(args, argv)
    made = {"hardware": hardware(device), "torch": torch.__version__, "date": date.today().isoformat()}
    result = {**asked, "dtype": str(dtype).removeprefix("torch."), **made, **measured}
    print_table(result)
    if args.json_path:
        write_json(args.json_path, result)
    print(json.dumps(result))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        with torch.no_grad():
            run(build_parser().parse_args(argv), argv)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
