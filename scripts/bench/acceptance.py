"""What speculation gains on real text: summaries, edits, code and free answers, beside plain decoding.

    python -m scripts.bench.acceptance --compile --checkpoint_path DIR --prompt_lookup --temperature 0

Takes the flags of generate.py. Each prompt is answered by plain and by speculative decoding in turn, since a rented
machine's speed drifts. The ratio of a prompt's speeds is the median over the repeats; a row of the table has the median
and the lowest over the prompts. A model with a chat template answers; another one continues the text of the prompt.
"""

import fast.startup  # isort: skip  # noqa: F401 - before the others, see there
import argparse
import heapq
import inspect
import shlex
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

import generate
from fast.cli import DEMO, Parser, check_at_least, check_report, exit_code, resolve_device
from fast.compiling import set_compile_flags
from fast.decoding import Steps
from fast.prompts import encode_chat
from fast.reading import read_text
from fast.rows import Row, run_rows
from fast.sampling import Sampling
from fast.speculative import SpeculativeSteps, pace_of
from fast.tokenizer import Tokenizer
from scripts.bench.command_line import report
from tp import ALONE

CODE = [inspect.getsource(function) for function in (heapq.merge, textwrap.fill, textwrap.dedent, shlex.join)]
QUESTIONS = [
    "Why is the sky blue?",
    "Write a short story about a robot who learns to paint.",
    "Give me advice for a job interview.",
    "Explain how a bicycle stays upright.",
]


def prompts_of(text: str) -> dict[str, list[str]]:
    """The tasks, and four prompts for each, with passages of 500 to 1100 characters of `text`. Raises ValueError."""
    passages = [line for line in text.splitlines() if 500 < len(line) < 1100]
    if len(passages) < 8:
        raise ValueError(f"--text has {len(passages)} lines of 500 to 1100 characters, 8 are needed")
    return {
        "summarise": [f"Summarise this text, quoting its main facts:\n\n{passage}" for passage in passages[:4]],
        "edit": [f"Rewrite this text in the present tense:\n\n{passage}" for passage in passages[4:8]],
        "code": [f"Add type hints to this function and return all of it:\n\n```python\n{code}```" for code in CODE],
        "free": QUESTIONS,
    }


def answer(steps: Steps | SpeculativeSteps, tokenizer: Tokenizer, prompts: list[list[int]], args: Any) -> float | None:
    """Tokens per second of a batch's longest row, with which it ends; None if no row has a second token."""
    rows = [Row(tokenizer, prompt, args.max_new_tokens, args.stop) for prompt in prompts]
    torch.manual_seed(args.seed)
    rate = run_rows(steps, rows, args.max_new_tokens, lambda row, text: None)["decode_tokens_per_s"]
    lengths = [len(row.tokens) - 1 for row in rows]
    return rate and rate * max(lengths) / sum(lengths)


def measure(steps: SpeculativeSteps, tokenizer: Tokenizer, batches: list[list[list[int]]], args: Any) -> dict[str, Any]:
    """How the steps went over these batches, and their speed as a multiple of plain decoding's, batch by batch.

    Each answer begins with a pace that has learned nothing.
    """
    ratios, tallies = [[] for _ in batches], Counter()
    for n in range(args.repeats):
        for batch, of_batch in zip(batches, ratios, strict=True):
            fresh = replace(steps, pace=pace_of(steps.drafter, args.speculate_k))
            pair = (fresh, steps.plain) if n % 2 else (steps.plain, fresh)
            rates = {isinstance(one, SpeculativeSteps): answer(one, tokenizer, batch, args) for one in pair}
            if all(rates.values()):
                of_batch.append(rates[True] / rates[False])
            for tally in fresh.pace.tallies.values():
                n_rows = sum(tally.counts)
                tallies += {"steps": n_rows, "drafting": n_rows * (tally.k > 0), "accepted": tally.mean() * n_rows}
    medians = [median(of_batch) for of_batch in ratios if of_batch]
    return {
        "share_of_steps_that_draft": tallies["drafting"] / tallies["steps"],
        "accepted_per_drafting_step": tallies["accepted"] / max(1, tallies["drafting"]),
        "speed_up": median(medians),
        "lowest_speed_up": min(medians),
    }


def print_table(result: dict[str, Any]) -> None:
    print("| task | rows | steps that draft | accepted of these | times plain decoding | the lowest |")
    print("|---|---|---|---|---|---|")
    for row in result["tasks"]:
        share, accepted, speed_up, lowest = (row[name] for name in list(row)[2:])
        print(f"| {row['task']} | {row['rows']} | {share:.0%} | {accepted:.2f} | {speed_up:.2f} | {lowest:.2f} |")


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0], parents=[generate.build_parser()], conflict_handler="resolve")
    add = parser.add_argument
    add("--text", type=Path, default=DEMO.parent / "heldout.txt", help="of the tasks (default: the demo's held-out)")
    add("--batch_size", type=int, nargs="+", default=[1, 4], help="rows answered at once (default: 1 4)")
    add("--repeats", type=int, default=3, help="of every answer")
    add("--json_path", type=Path, help="write the figures to this file too")
    return parser


def run(args: argparse.Namespace) -> None:
    rows, args.batch_size = args.batch_size, None
    generate.check_args(args)
    if args.speculate_k is None:
        raise ValueError("nothing speculates: give --prompt_lookup or --draft_checkpoint_path DRAFT")
    check_at_least(args, 1, "repeats")
    check_at_least(args, 2, "max_new_tokens")
    if args.json_path is not None:
        check_report(args.json_path)
    if unfit := [n for n in rows if not 1 <= n <= 4]:
        raise ValueError(f"--batch_size {unfit[0]} must be 1 to 4, a task has four prompts")
    tasks = prompts_of(read_text(args.text))
    device, _ = resolve_device(args)
    set_compile_flags(device)
    model, draft, tokenizer, _ = generate.load_models(args, ALONE)
    encode = partial(encode_chat, tokenizer, None, []) if tokenizer.has_chat_template else tokenizer.encode
    encoded = {task: [encode(text) for text in texts] for task, texts in tasks.items()}
    args.max_new_tokens = args.max_new_tokens or generate.MAX_NEW_TOKENS
    longest = max(len(prompt) for prompts in encoded.values() for prompt in prompts)
    sampling, found = Sampling(args.temperature, args.top_k, args.top_p, args.min_p), []
    for n in rows:
        batches = {task: [prompts[i : i + n] for i in range(0, 4, n)] for task, prompts in encoded.items()}
        room = longest + args.max_new_tokens
        steps, _ = generate.set_up(args, sampling, model, draft, batches["free"], room, ALONE)
        for task in tqdm(tasks, f"{n} rows", file=sys.stderr):
            found.append({"task": task, "rows": n, **measure(steps, tokenizer, batches[task], args)})
    args.model = args.checkpoint_path.name
    report(args, {"tasks": found}, print_table)


def main(argv: list[str] | None = None) -> int:
    with torch.no_grad():
        return exit_code(lambda: run(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
