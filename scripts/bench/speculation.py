"""What speculation costs and gains at a real model's shape. Weights are random, so acceptance is forced.

    python -m scripts.bench.speculation --model tinyllama-1.1b --draft stories-15m --speculate_k 5 --accept 0 2 5

Worth knowing: the speed-up follows from three costs, that of a decoded token, of k drafts and of the pass that verifies
them: tokens per step * decode / (draft + verify). The table has this prediction and what was measured end to end. Plain
and speculative decoding take turns, since a rented machine's bandwidth drifts; figures are medians over the turns.
"""

import fast.startup  # isort: skip  # noqa: F401 - before the others, see there
import argparse
import sys
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fast.cli import check_at_least, drop_compile, exit_code, resolve_device
from fast.compiling import set_compile_flags
from fast.decoding import Steps, build_steps, stream, warm_up
from fast.drafting import SPARE, DraftModel
from fast.sampling import Sampling
from fast.speculative import (
    PromptLookup,
    SpeculativeSteps,
    accept,
    build_speculative_steps,
    speculate,
    warm_up_speculation,
)
from model import Transformer
from scripts.bench import command_line
from scripts.bench.command_line import check_files, report
from scripts.bench.measuring import timed
from scripts.bench.presets import preset
from scripts.bench.random_models import build_model, scheme_of


def forcing(n: int):
    """A `speculative.accept` that does all its work, but always accepts the first `n` drafts."""

    def forced(sampling: Sampling, logits: Tensor, drafts: Tensor, *q: Tensor) -> tuple[Tensor, Tensor]:
        new, accepted = accept(sampling, logits, drafts, *q)
        return new, torch.full_like(accepted, n)

    return forced


def model_of(name: str, scheme: dict[str, Any] | None, args: argparse.Namespace, capacity: int) -> Transformer:
    device, dtype = resolve_device(args)
    shape = preset(name)
    model = build_model(shape, device, dtype, scheme)
    model.setup_caches(args.batch_size, capacity, spare=SPARE)
    return model


def measure(plain: Steps, by_n: dict[int, SpeculativeSteps], prompts: list[list[int]], args) -> list[dict[str, Any]]:
    """For each forced acceptance: the costs in seconds, the speed-up they predict, and the measured speed-up."""
    turns: dict[int, list[tuple[float, ...]]] = {n: [] for n in by_n}
    for _ in range(args.repeats):
        for n, steps in by_n.items():
            rest, seconds = timed(stream(plain, prompts, args.new_tokens))
            decode = seconds / len(rest)
            brought, seconds = timed(speculate(steps, prompts, args.new_tokens))
            costs = median(step.draft_s for step in brought), median(step.verify_s for step in brought)
            tokens = len(brought) * (n + 1)
            turns[n].append((decode, *costs, decode * tokens / seconds, (n + 1) * decode / sum(costs)))
    figures = []
    for n, values in turns.items():
        decode, draft, verify, measured, predicted = (median(column) for column in zip(*values, strict=True))
        ratio = median(turn[2] / turn[0] for turn in values)
        figures.append(
            {"accepted": n, "decode_s": decode, "draft_s": draft, "verify_s": verify, "verify_per_decode": ratio,
             "speed_up": measured, "predicted_speed_up": predicted}
        )  # fmt: skip
    return figures


def print_table(result: dict[str, Any]) -> None:
    by = "prompt lookup" if result["prompt_lookup"] else result["draft"]
    print(f"Drafted by {by}. The weights are random, so how many drafts are accepted is FORCED; costs are measured.\n")
    k = result["speculate_k"]
    line = "| {:>11} | {:>12} | {:>14} | {:>14} | {:>15} | {:>18} | {:>17} |".format
    costs = "decode", f"draft of {k}", f"verify {k + 1} rows"
    print(line("accepted", *costs, "verify / decode", "predicted speed-up", "measured speed-up"))
    print("|" + "|".join("-" * (width + 2) for width in (11, 12, 14, 14, 15, 18, 17)) + "|")
    for row in result["steps"]:
        decode, draft, verify = (f"{row[f'{name}_s'] * 1e3:.2f} ms" for name in ("decode", "draft", "verify"))
        ratios = (f"{row[name]:.2f}" for name in ("verify_per_decode", "predicted_speed_up", "speed_up"))
        print(line(f"{row['accepted']} of {k}", decode, draft, verify, *ratios))


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.build_parser(__doc__)
    add = parser.add_argument
    add("--draft", default="stories-15m", help="the preset that drafts")
    add("--prompt_lookup", action="store_true", help="draft by prompt lookup instead")
    add("--mode", choices=["none", "int8", "int4"], default="none", help="how the target is quantised")
    add("--accept", type=int, nargs="+", default=[2], help="how many drafts a step is forced to accept; one or several")
    add("--speculate_k", type=int, default=5, help="drafts per step")
    add("--prompt_length", type=int, default=64, help="tokens before the first new one")
    add("--new_tokens", type=int, default=33, help="of a run")
    add("--batch_size", type=int, default=1, help="rows")
    add("--repeats", type=int, default=5, help="runs of every case, which take turns")
    return parser


def run(args: argparse.Namespace) -> None:
    k = args.speculate_k
    check_at_least(args, 1, "speculate_k", "prompt_length", "batch_size", "repeats")
    check_at_least(args, 2, "new_tokens")
    check_files(args)
    if unfit := [n for n in args.accept if not 0 <= n <= k]:
        raise ValueError(f"--accept {unfit[0]} must be 0 to --speculate_k, which is {k}")
    shapes = [preset(name).vocab_size for name in (args.model, args.draft)]
    if shapes[0] != shapes[1] and not args.prompt_lookup:
        raise ValueError(f"--draft {args.draft} has a vocabulary of {shapes[1]} tokens, --model {shapes[0]}")
    device, _ = resolve_device(args)
    drop_compile(args, "compile")
    set_compile_flags(device)
    print("building and compiling ...", file=sys.stderr)
    capacity, sampling = args.prompt_length + args.new_tokens - 1, Sampling()
    target = model_of(args.model, scheme_of(args.mode), args, capacity)
    drafter = (
        PromptLookup()
        if args.prompt_lookup
        else DraftModel(model_of(args.draft, None, args, capacity), sampling, compile=args.compile)
    )
    plain = build_steps(target, sampling, args.compile)
    by_n = {n: build_speculative_steps(plain, drafter, sampling, k, args.compile, forcing(n)) for n in args.accept}
    prompts = torch.randint(shapes[0], (args.batch_size, args.prompt_length)).tolist()
    warm_up(plain, prompts, args.new_tokens)
    for steps in by_n.values():
        warm_up_speculation(steps, prompts, args.new_tokens)
    print("measuring ...", file=sys.stderr)
    figures = {"acceptance": "forced", "steps": measure(plain, by_n, prompts, args)}
    report(args, figures, print_table)


def main(argv: list[str] | None = None) -> int:
    with torch.no_grad():
        return exit_code(lambda: run(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
