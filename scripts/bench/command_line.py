"""The flags, the checks and the report that the benchmarks' command lines share.

    parser = build_parser(__doc__)
    args = parser.parse_args(argv)
    report(args, figures, print_table)

A report is a line with the model, the hardware and torch's version, a table, and a last line with all figures as JSON.
"""

import argparse
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fast.cli import Parser, check_report, resolve_device, write_json
from fast.metrics import hardware


def build_parser(description: str) -> Parser:
    """A parser with the flags that all benchmarks have. description: a module's docstring; its first line is used."""
    parser = Parser(description.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="a preset of scripts/bench/presets.py, such as tinyllama-1.1b")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile ours")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="such as cpu or cuda:1")
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16, float16 on GPUs before Ampere")
    add("--json_path", type=Path, help="write the figures to this file too")
    return parser


def check_files(args: argparse.Namespace) -> None:
    """Raise ValueError for a file that could not be written, before anything is measured."""
    for path in vars(args).values():
        if isinstance(path, Path):
            check_report(path)


def report(
    args: argparse.Namespace, figures: dict[str, Any], print_table: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Print the flags' values and the figures, as a table and as JSON, and write them to `--json_path`; return them."""
    device, dtype = resolve_device(args)
    asked = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
    made = {"hardware": hardware(device), "torch": torch.__version__, "date": date.today().isoformat()}
    result = {**asked, "dtype": str(dtype).removeprefix("torch."), **made, **figures}
    print("{model}, {dtype}, {hardware}, torch {torch}, {date}\n".format(**result))
    print_table(result)
    print()
    if args.json_path:
        write_json(args.json_path, result)
    print(json.dumps(result))
    return result
