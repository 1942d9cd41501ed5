"""Perplexity and task accuracies of several checkpoints, as one table.

    python scripts/eval_table.py
    python scripts/eval_table.py demo/target demo/target/model_int8.pth --perplexity demo/heldout.txt

Takes `eval.py`'s flags and any number of checkpoints; without these, the demo as it is and quantised in every mode, on
its own text and tasks. The table is Markdown; what each run prints goes to stderr.
"""

import argparse
import contextlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import _root  # noqa: F401 - finds the modules of the repository's root
import torch
from quality import demo_training_text

import eval as eval_cli
import quantize
from fast.checkpoint import open_checkpoint
from fast.cli import DEMO, exit_code
from fast.quantized import LINEARS

TASKS = DEMO.parent / "tasks"
DEMO_FLAGS = ["--perplexity", str(DEMO.parent / "heldout.txt"), "--include_path", str(TASKS), "--tasks"]
DEMO_FLAGS += sorted(path.stem for path in TASKS.glob("*.yaml"))


def make_demo_checkpoints(folder: Path) -> list[Path]:
    """The demo in `folder`, and its quantised forms: GPTQ calibrated on the text that the demo was trained on."""
    demo, text = folder / "demo", folder / "training.txt"
    shutil.copytree(DEMO, demo, ignore=shutil.ignore_patterns("*.pth"))
    text.write_text(demo_training_text(), encoding="utf-8")
    for mode in LINEARS:
        flags = ["--checkpoint_path", str(demo), "--mode", mode, "--calibration_file", str(text)]
        with contextlib.redirect_stdout(sys.stderr), torch.no_grad():
            quantize.run(quantize.build_parser().parse_args(flags))
    return [demo, *sorted(demo.glob("*.pth"), reverse=True)]


def row_of(path: Path, argv: list[str]) -> dict[str, str]:
    """Evaluate one checkpoint; its cells by column."""
    args = eval_cli.build_parser().parse_args(["--checkpoint_path", str(path), *argv])
    checkpoint = open_checkpoint(path)
    with contextlib.redirect_stdout(sys.stderr), torch.no_grad():
        found = eval_cli.run(args)
    row = {"checkpoint": str(path), "weights": describe(checkpoint.quantization, args)}
    if "perplexity" in found:
        row["perplexity"] = f"{found['perplexity'].token_perplexity:.3f}"
        row["bits per byte"] = f"{found['perplexity'].bits_per_byte:.4f}"
    for task, metrics in found.get("tasks", {}).get("results", {}).items():
        for metric, value in metrics.items():
            name, _, filtered = metric.partition(",")
            if isinstance(value, float) and not name.endswith("_stderr"):
                stderr = metrics.get(f"{name}_stderr,{filtered}")
                column = f"{task} {name}" + (f" ({filtered})" if filtered != "none" else "")
                row[column] = f"{value:.4f}" + (f" ± {stderr:.4f}" if isinstance(stderr, float) else "")
    return row


def describe(quantization: dict[str, Any] | None, args: argparse.Namespace) -> str:
    """The mode that the checkpoint records, else the dtype it is run in."""
    if quantization is None:
        return str(eval_cli.resolve_device(args)[1]).removeprefix("torch.")
    groupsize = quantization.get("groupsize")
    return quantization["mode"] + (f", groups of {groupsize}" if groupsize else "")


def run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoints", type=Path, nargs="*", help="as eval.py's --checkpoint_path; its flags follow")
    args, flags = parser.parse_known_args(argv)
    if args.checkpoints:
        rows = [row_of(path, flags) for path in args.checkpoints]
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = [row_of(path, DEMO_FLAGS + flags) for path in make_demo_checkpoints(Path(folder))]
        for row in rows:
            del row["checkpoint"]  # in a folder that is gone
    columns = list(dict.fromkeys(column for row in rows for column in row))
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row.get(column, '') for column in columns)} |")


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
