"""Evaluate a checkpoint: tasks of EleutherAI's lm-evaluation-harness, and perplexity of a text file.

    python eval.py --checkpoint_path checkpoints/$MODEL_REPO/model.pth --compile --tasks hellaswag winogrande
    python eval.py --perplexity demo/heldout.txt

Without `--checkpoint_path` the embedded demo model is evaluated. Tasks need the package lm_eval, perplexity does not.
"""

import fast.startup  # isort: skip  # noqa: F401 - before the others, see there
import argparse
import codecs
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fast.cli import (
    Parser,
    add_model_flags,
    check_at_least,
    drop_compile,
    find_checkpoint,
    load,
    refuse,
    resolve_device,
    resolve_kv_dtype,
    run_command,
    say,
    template_args,
    warn_beyond,
)
from fast.compiling import set_compile_flags
from fast.perplexity import perplexity
from fast.scoring import parse_batch_size
from fast.tokenizer import Tokenizer
from model import Transformer
from tp import ALONE, Ranks

FOR_TASKS = ("include_path", "num_fewshot", "limit", "apply_chat_template", "fewshot_as_multiturn", "max_seq_length")
FOR_TASKS += ("template_args", "seed", "output_path", "log_samples")


@dataclass(frozen=True)
class TextScore:
    """Perplexity of a text per token and per byte, bits per byte, and the counts and settings behind them."""

    token_perplexity: float
    byte_perplexity: float
    bits_per_byte: float
    tokens_scored: int
    tokens: int
    bytes: int
    window: int
    stride: int


def score_file(
    model: Transformer,
    tokenizer: Tokenizer,
    path: Path,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    kv_dtype: torch.dtype | None = None,
) -> TextScore:
    """Sliding-window perplexity of the UTF-8 text file `path`.

    Defaults: a window of the model's context length, at most 2048, and a stride of half of it. Raises ValueError for
    a file that is not UTF-8 or too short, and for sizes that do not fit.
    """
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    ids = tokenizer.encode(text)
    n_tokens = len(ids) - (tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id])
    window = window or min(model.args.context_length, 2048)
    stride = stride or max(1, window // 2)
    try:
        result = perplexity(model, ids, window, stride, batch_size, progress=True, kv_dtype=kv_dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    bits = result.bits_per_byte(n_tokens / len(data))
    counts = result.n_tokens, n_tokens, len(data), window, stride
    return TextScore(result.perplexity, 2.0**bits if bits < 1000 else float("inf"), bits, *counts)


def describe_text(path: Path, score: TextScore) -> str:
    return (
        f"{path}: perplexity {score.token_perplexity:.4f} per token, {score.byte_perplexity:.4f} per byte, "
        f"{score.bits_per_byte:.4f} bits per byte\n"
        f"{score.tokens_scored} of {score.tokens} tokens scored, {score.bytes} bytes; "
        f"window {score.window}, stride {score.stride}"
    )


# ---- The command line.


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    add = add_model_flags(
        parser, kv_dtype="put all texts through a KV cache that stores this (default: auto, no cache)"
    )
    add("--batch_size", default="auto", metavar="N|auto", help="texts that are computed together, or auto (default)")
    add = parser.add_argument_group("perplexity of a text").add_argument
    add("--perplexity", type=Path, metavar="FILE", help="sliding-window perplexity of this text file")
    add("--window", type=int, help="tokens that a window spans (default: the context length, at most 2048)")
    add("--stride", type=int, help="tokens between the windows' starts (default: half the window)")
    add = parser.add_argument_group("tasks of the lm-evaluation-harness").add_argument
    add("--tasks", nargs="+", metavar="TASK", help="their names, or patterns of names")
    add("--include_path", type=Path, metavar="DIR", help="a directory with tasks of your own")
    add("--num_fewshot", type=int, help="examples before each question (default: as the task says)")
    add("--limit", type=float, help="take only the first X items of a task, or below 1 that share (default: all)")
    add("--apply_chat_template", action="store_true", help="put the prompts into the model's chat template")
    add("--template_args", type=template_args, default={}, metavar="JSON", help="variables of the chat template")
    add("--fewshot_as_multiturn", action="store_true", help="each example becomes a turn of the chat template")
    add("--max_seq_length", type=int, help="cut contexts on the left to this length (default: the context length)")
    add("--seed", type=int, help="of the harness, which draws the examples (default: the harness's own seeds)")
    add("--compile", action="store_true", help="compile the model")
    add("--output_path", type=Path, metavar="DIR", help="write the harness's results file here")
    add("--log_samples", action="store_true", help="write every item with its prompts and answers to --output_path too")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that make no sense, before anything is loaded."""
    if args.perplexity is None and args.tasks is None:
        raise ValueError("nothing to evaluate: give --tasks TASK, --perplexity FILE, or both")
    if args.perplexity is not None and not args.perplexity.is_file():
        raise ValueError(f"--perplexity {args.perplexity}: no such file")
    if args.tasks is None:
        refuse(args, build_parser(), "there are no --tasks", *FOR_TASKS)
    if args.perplexity is None:
        refuse(args, build_parser(), "there is no --perplexity FILE", "window", "stride")
    check_at_least(args, 1, "window", "stride", "max_seq_length")
    parse_batch_size(args.batch_size)
    check_at_least(args, 0, "num_fewshot")
    if args.limit is not None and not (0 < args.limit < 1 or (args.limit >= 1 and args.limit.is_integer())):
        raise ValueError(f"--limit {args.limit:g} must be a whole number of items, or a share between 0 and 1")
    if args.include_path is not None and not args.include_path.is_dir():
        raise ValueError(f"--include_path {args.include_path} is not a directory")
    uses_template = [(name, "apply_chat_template") for name in ("fewshot_as_multiturn", "template_args")]
    for name, needed in (("log_samples", "output_path"), *uses_template):
        if getattr(args, name) and not getattr(args, needed):
            raise ValueError(f"--{name} needs --{needed}")
    if args.output_path is not None:
        args.output_path.mkdir(parents=True, exist_ok=True)
    if args.compile and args.tasks is None:
        say("--compile is for --tasks: --perplexity runs uncompiled")
        args.compile = False
    drop_compile(args, "compile")


def run(args: argparse.Namespace, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Evaluate as the flags say and print; return the harness's results and the `TextScore`, if asked for."""
    check_args(args)
    args.checkpoint_path = find_checkpoint(args.checkpoint_path, args.download, ranks)
    args.device = ranks.device(args.device)
    if ranks.rank > 0:
        args.output_path, args.log_samples = None, False  # rank 0 alone writes
    if args.tasks:
        from fast import harness  # imports lm_eval

        tasks = harness.find_tasks(args.tasks, args.include_path)
    device, dtype = resolve_device(args)
    kv_dtype = resolve_kv_dtype(args)
    if args.compile:
        set_compile_flags(device)
    model, tokenizer = load(args.checkpoint_path, device, dtype, ranks)
    tokenizer.template_args = args.template_args
    for flag, length in (("--window", args.window), ("--max_seq_length", args.max_seq_length)):
        warn_beyond(flag, length or 0, model.args.context_length)
    found: dict[str, Any] = {}
    if args.perplexity:
        batch_size = parse_batch_size(args.batch_size)
        found["perplexity"] = score_file(
            model, tokenizer, args.perplexity, args.window, args.stride, batch_size, kv_dtype
        )
        print(describe_text(args.perplexity, found["perplexity"]))
    if args.tasks:
        name, length = str(args.checkpoint_path), args.max_seq_length
        lm = harness.FastLM(model, tokenizer, name, args.batch_size, length, args.compile, kv_dtype)
        found["tasks"] = harness.evaluate(lm, tasks, args)
    return found


def main(argv: list[str] | None = None) -> int:
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
