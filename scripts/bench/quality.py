"""What quantisation costs in quality: size, perplexity and task accuracies of checkpoints, as one table.

    python -m scripts.bench.quality --every_mode
    python -m scripts.bench.quality --every_mode --checkpoint_path DIR --calibration_file train.txt --perplexity test
    python -m scripts.bench.quality --checkpoint_path DIR DIR/model_int8.pth --tasks hellaswag

Takes the flags of eval.py; without --perplexity and --tasks it scores the demo's text and tasks. `--every_mode`
quantises in a temporary folder, one file at a time; GPTQ is calibrated on `--calibration_file`, or on the text that the
demo was trained on.
"""

import fast.startup  # isort: skip  # noqa: F401 - before the others, see there
import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import eval as eval_cli
import quantize
from demo.train import training_text
from fast.checkpoint import open_checkpoint
from fast.cli import DEMO, Parser, exit_code, resolve_device

EVERY_MODE = ["--mode int8"] + [
    f"--mode {mode} --groupsize {groupsize}{more}"
    for groupsize in (32, 128)
    for mode, more in (("int4", ""), ("int4", " --scale_search"), ("int4-gptq", ""), ("int4-gptq", " --act_order"))
]


def quantised(source: Path, calibration: Path | None, device: str) -> Iterator[tuple[str, Path]]:
    """Yield (label, path): `source` itself, then `source` quantised in every way, labelled with quantize.py's flags.

    Each quantised file takes the place of the one before. calibration: the text for GPTQ, None for the demo's.
    """
    yield "as they are", source
    directory = source if source.is_dir() else source.parent
    weights = shutil.ignore_patterns("*.pth", "*.safetensors*", "*.bin*", "original")
    with tempfile.TemporaryDirectory() as folder:
        path = shutil.copytree(directory, Path(folder) / "model", ignore=weights) / "model.pth"
        if calibration is None:
            calibration = Path(folder) / "training.txt"
            calibration.write_text(training_text(), encoding="utf-8")
        for flags in EVERY_MODE:
            argv = ["--checkpoint_path", str(source), "--output_path", str(path), "--device", device, *flags.split()]
            argv += ["--calibration_file", str(calibration)] if "gptq" in flags else []
            path.unlink(missing_ok=True)
            with contextlib.redirect_stdout(sys.stderr), torch.no_grad():
                quantize.run(quantize.build_parser().parse_args(argv))
            yield f"`{flags}`", path


def row_of(name: str, path: Path, args: argparse.Namespace) -> dict[str, str]:
    """Evaluate one checkpoint as the flags say; return its row of the table, cells by column."""
    args = argparse.Namespace(**{**vars(args), "checkpoint_path": path})
    sizes = (torch.Size(t.shape).numel() * t.dtype.itemsize for t in open_checkpoint(path).tensors.values())
    row = {"weights": name, "MB": f"{sum(sizes) / 1e6:.1f}"}
    with contextlib.redirect_stdout(sys.stderr), torch.no_grad():
        found = eval_cli.run(args)
    if score := found.get("perplexity"):
        row |= {"perplexity": f"{score.token_perplexity:.3f}", "lost, %": ""}  # filled in by print_table
        row["bits per byte"] = f"{score.bits_per_byte:.4f}"
    for task, metrics in found.get("tasks", {}).get("results", {}).items():
        for metric, value in metrics.items():
            measure, _, filtered = metric.partition(",")
            if isinstance(value, float) and not measure.endswith("_stderr"):
                column = f"{task} {measure}" + (f" ({filtered})" if filtered != "none" else "")
                row[column] = f"{value:.4f}"
                stderr = metrics.get(f"{measure}_stderr,{filtered}")
                if isinstance(stderr, float):
                    row[f"± {column}"] = f"{stderr:.4f}"
    return row


def print_table(rows: list[dict[str, str]]) -> None:
    """Print a Markdown table. "lost": by how much the perplexity exceeds the first row's."""
    for row in rows if "perplexity" in rows[0] else []:
        row["lost, %"] = f"{100 * (float(row['perplexity']) / float(rows[0]['perplexity']) - 1):+.2f}"
    columns = list(rows[0])
    print(f"| {' | '.join('±' if column.startswith('±') else column for column in columns)} |")
    print(f"|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row.get(column, '') for column in columns)} |")


def build_parser() -> Parser:
    # "resolve": --checkpoint_path below replaces eval.py's
    parser = Parser(__doc__.splitlines()[0], parents=[eval_cli.build_parser()], conflict_handler="resolve")
    add = parser.add_argument
    add("--checkpoint_path", type=Path, nargs="+", default=[DEMO], help="one or several (default: demo)")
    add("--every_mode", action="store_true", help="quantise the checkpoint in every way, and evaluate each")
    add("--calibration_file", type=Path, metavar="TEXT", help="for GPTQ in --every_mode (default: the demo's)")
    return parser


def run(args: argparse.Namespace) -> None:
    paths = args.checkpoint_path
    if args.every_mode and len(paths) > 1:
        raise ValueError(f"--every_mode takes one --checkpoint_path, not {len(paths)}")
    if args.perplexity is None and args.tasks is None:
        args.perplexity, args.include_path = DEMO.parent / "heldout.txt", DEMO.parent / "tasks"
        args.tasks = sorted(path.stem for path in args.include_path.glob("*.yaml"))
    device, _ = resolve_device(args)
    if args.every_mode:
        named, total = quantised(paths[0], args.calibration_file, device), 1 + len(EVERY_MODE)
    else:
        named, total = ((f"`{path}`", path) for path in paths), len(paths)
    with tqdm(named, "checkpoints", total, file=sys.stderr) as bar:
        rows = [row_of(name, path, args) for name, path in bar]
    print_table(rows)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
