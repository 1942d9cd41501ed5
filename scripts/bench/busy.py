"""Decoding on a busy machine: tokens/s by number of threads, alone and beside one busy process per core.

    python -m scripts.bench.busy --model stories-15m --threads 1 2

Worth knowing: all cases take turns. The busy processes run at the same priority, so that the system shares every core
between them and the threads; only decoding is timed, as prefill's threads are PyTorch's own.
"""

import fast.startup  # isort: skip  # noqa: F401 - before the others, see there
import argparse
import contextlib
import os
import subprocess
import sys
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from fast.cli import check_at_least, drop_compile, exit_code, resolve_device
from fast.compiling import set_compile_flags
from fast.decoding import Steps, build_steps, stream, warm_up
from fast.sampling import Sampling
from scripts.bench import command_line
from scripts.bench.command_line import check_files, report
from scripts.bench.measuring import timed
from scripts.bench.presets import preset
from scripts.bench.random_models import build_model, scheme_of, with_caches


@contextlib.contextmanager
def busy_processes(n: int):
    """`n` processes that compute all the time, for as long as the `with` block lasts."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second, medians, by number of other busy processes and number of threads."""
    model = build_model(preset(args.model), *resolve_device(args), scheme_of(args.mode, 32))
    (model,) = with_caches(model, 1, [args.new_tokens + 1])
    steps: dict[int, Steps] = {}
    for n_threads in args.threads:
        torch.set_num_threads(n_threads)
        steps[n_threads] = build_steps(model, Sampling(), args.compile)
        warm_up(steps[n_threads], [[1]], args.new_tokens)
    loads = 0, os.cpu_count()
    seconds: dict[tuple[int, int], list[float]] = {(n, t): [] for n in loads for t in args.threads}
    for _ in tqdm(range(args.repeats), desc="measuring"):
        for n in loads:
            with busy_processes(n):
                for n_threads in args.threads:
                    torch.set_num_threads(n_threads)
                    tokens, elapsed = timed(stream(steps[n_threads], [[1]], args.new_tokens))
                    seconds[n, n_threads].append(elapsed / len(tokens))
    return {"tokens_per_s": {n: {t: 1 / median(seconds[n, t]) for t in args.threads} for n in loads}}


def print_table(result: dict[str, Any]) -> None:
    print("| busy processes |", " | ".join(f"{n} thread{'s' * (n > 1)}" for n in result["threads"]), "|")
    print("|---" * (1 + len(result["threads"])) + "|")
    for n, speeds in result["tokens_per_s"].items():
        print(f"| {n} |", " | ".join(f"{speed:.1f}" for speed in speeds.values()), "|")


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.build_parser(__doc__)
    parser.set_defaults(device="cpu")
    add = parser.add_argument
    add("--mode", choices=["bf16", "int8", "int4"], default="bf16", help="the weights")
    counts = sorted({1, torch.get_num_threads()})
    add("--threads", type=int, nargs="+", default=counts, help="default: 1 and one a core")
    add("--new_tokens", type=int, default=500, help="of a turn")
    add("--repeats", type=int, default=9, help="turns of every case")
    return parser


def run(args: argparse.Namespace) -> None:
    check_at_least(args, 1, "threads", "repeats")
    check_at_least(args, 2, "new_tokens")
    check_files(args)
    if args.device != "cpu":
        raise ValueError(f"--device {args.device}: only a CPU's threads are shared with other processes")
    drop_compile(args, "compile")
    if args.compile:
        set_compile_flags("cpu")
    report(args, measure(args), print_table)


def main(argv: list[str] | None = None) -> int:
    with torch.no_grad():
        return exit_code(lambda: run(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
