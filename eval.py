"""Evaluate a checkpoint: perplexity of a text file.

    python eval.py --perplexity demo/heldout.txt

Without `--checkpoint_path` the embedded demo model is evaluated.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint import load_model
from generate import DEMO, resolve_device
from model import Transformer
from perplexity import perplexity
from tokenizer import Tokenizer, load_tokenizer


def load(args: argparse.Namespace) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer that the flags name: the one place where this command loads anything."""
    device, dtype = resolve_device(args)
    model = load_model(args.checkpoint_path, device=device, dtype=dtype)
    directory = args.checkpoint_path if args.checkpoint_path.is_dir() else args.checkpoint_path.parent
    return model, load_tokenizer(directory)


@dataclass(frozen=True)
class TextScore:
    """Perplexity of a text per token and per byte, bits per byte, and what was counted."""

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
) -> TextScore:
    """Sliding-window perplexity of the UTF-8 text file `path`.

    Defaults: a window of the model's context length, at most 2048, and a stride of half of it. Raises ValueError for
    a file that is not UTF-8 or too short, and for sizes that do not fit.
    """
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    ids = tokenizer.encode(text)
    n_tokens = len(ids) - (tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id])
    window = window or min(model.args.context_length, 2048)
    stride = stride or max(1, window // 2)
    try:
        result = perplexity(model, ids, window, stride, batch_size, progress=True)
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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint_path", type=Path, default=DEMO, help="a .pth of ours or a Hugging Face directory (default: demo)")
    add("--perplexity", type=Path, metavar="FILE", help="sliding-window perplexity of this text file")
    add("--window", type=int, help="tokens a window of --perplexity spans (default: the context length, at most 2048)")
    add("--stride", type=int, help="tokens between the windows' starts (default: half the window)")
    add("--batch_size", type=int, help="windows at a time (default: 4096 tokens' worth)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16, float16 on GPUs before Ampere")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that make no sense, before anything is loaded."""
    if args.perplexity is None:
        raise ValueError("nothing to evaluate: give --perplexity FILE")
    if not args.perplexity.is_file():
        raise ValueError(f"--perplexity {args.perplexity}: no such file")
    for name in ("window", "stride", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")


def run(args: argparse.Namespace) -> dict[str, Any]:
    check_args(args)
    model, tokenizer = load(args)
    score = score_file(model, tokenizer, args.perplexity, args.window, args.stride, args.batch_size)
    print(describe_text(args.perplexity, score))
    return {"perplexity": score}


def main(argv: list[str] | None = None) -> int:
    try:
        with torch.no_grad():
            run(build_parser().parse_args(argv))
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
