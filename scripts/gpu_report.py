"""Check that this GPU computes correctly, and measure how fast. One command, no arguments, under 8 minutes.

    python scripts/gpu_report.py

Each of the seven steps runs in its own process with a time limit, so one that fails or hangs does not stop the others.
Every row of the table is printed as soon as it is measured, and written to gpu_report/report.json; Chrome traces of
decoded tokens and the steps' logs are written beside it. Models have the shapes of Llama-2-7B and Llama-3.1-8B and
random weights; nothing is downloaded. Exit code 0: all is right; 1: a check is wrong or a step failed; 2: no GPU.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import _root  # noqa: F401 - finds the modules of the repository's root
import torch
from tqdm import tqdm

from fast.cli import Parser, exit_code, write_json
from fast.compiling import set_compile_flags
from kernels import gpu
from scripts.bench.gpu_card import LAUNCH, PRODUCT, READ, Card, Part, card_rows, nvidia_smi
from scripts.bench.gpu_correctness import CORRECTNESS
from scripts.bench.gpu_products import PRODUCTS
from scripts.bench.gpu_speed import DECODES, DEMO_PARTS, WAITS, startup_rows

STEPS: dict[str, tuple[list[Part], int]] = {  # a step's parts, and its time limit in s; the next gets what is left
    "card": ([card_rows], 20),
    "correctness": (CORRECTNESS, 90),
    "demo": (DEMO_PARTS, 55),
    "products": (PRODUCTS, 85),
    "decode": (DECODES, 130),
    "waits": (WAITS, 50),
    "startup": ([startup_rows], 45),
}


def run_step(name: str, out: Path) -> None:
    """Run a step, writing each row as a line of JSON to stdout; everything else that is printed goes to stderr.

    A part that fails gives a row that says so; the next part still runs.
    """
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    found = {row["what"]: row.get("measured") for row in json.loads((out / "report.json").read_text())["rows"]}
    per_unit = {"read": (READ, 1e9), "rate": (PRODUCT, 1e12), "launch": (LAUNCH, 1e-6)}
    known = {key: found[what] * unit for key, (what, unit) in per_unit.items() if what in found}
    has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
    card = Card("cuda", torch.bfloat16 if has_bf16 else torch.float16, out, **known)
    set_compile_flags("cuda")
    torch._dynamo.config.recompile_limit = 256  # one function is compiled for every mode, size and batch
    torch._dynamo.config.automatic_dynamic_shapes = False  # compile for each batch size
    os.environ["TRITON_CACHE_DIR"] = triton_cache_dir(0)  # use Inductor's from the start, or some kernels compile twice
    torch.manual_seed(0)
    for part in STEPS[name][0]:
        try:
            with torch.no_grad():
                for row in part(card):
                    print(json.dumps(dataclasses.asdict(row)), file=rows, flush=True)
        except Exception as error:
            traceback.print_exc()
            given = ", ".join(map(str, getattr(part, "keywords", {}).values()))
            what = f"{name} {given}".rstrip() + ": FAILED"
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(json.dumps({"what": what, "failed": reason}), file=rows, flush=True)
        torch.compiler.reset()  # frees the weights
        gpu.OVERLAP = False  # its initial value, which loading a quantised weight changes


def rows_of(command: list[str], log: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the rows that `command` writes, and one more if it failed or took longer than `seconds`.

    After a timeout the log ends with the stack traces of Python's threads.
    """
    env = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    with log.open("w") as file:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True, env=env
        )
    late = threading.Event()

    def stop() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # and its compiler processes

    def abort() -> None:
        late.set()
        child.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(2)
        stop()

    timer = threading.Timer(seconds, abort)
    timer.start()
    try:
        for line in child.stdout:
            if line.endswith("}\n"):  # otherwise the process was stopped while writing it
                yield json.loads(line)
        code = child.wait()
    finally:
        timer.cancel()
        stop()
    if late.is_set():
        yield {"what": f"{log.stem}: OUT OF TIME", "failed": f"stopped after {seconds:.0f} s, the rest is missing"}
    elif code:
        lines = log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
        reason = next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[-1])
        yield {"what": f"{log.stem}: FAILED", "failed": reason}


table_line = "| {:<64} | {:<8} | {:>9} | {:>9} | {:>6} |".format


def describe(row: dict[str, Any]) -> str:
    """A line of the table. Its last column: the verdict of a check, else measured / predicted."""
    if "failed" in row:
        return table_line(row["what"], "", "", "", "")
    predicted, measured, judged = row["predicted"], row["measured"], row["is_right"]
    if judged is not None:
        verdict = "right" if judged else "WRONG"
    else:
        verdict = f"{measured / predicted:.2f}" if predicted else ""
    numbers = ("" if number is None else f"{number:.4g}" for number in (predicted, measured))
    return table_line(row["what"], row["unit"], *numbers, verdict)


def made_with() -> dict[str, str]:
    """The card, the versions of the software and the date."""
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none"
    (driver,) = nvidia_smi("driver_version") or ["unknown"]
    versions = {"torch": torch.__version__, "triton": triton, "CUDA": torch.version.cuda, "driver": driver}
    return {"card": torch.cuda.get_device_name(), **versions, "date": date.today().isoformat()}


def run(out: Path) -> bool:
    """Run every step, print the table and write the report; return whether all was right."""
    if not torch.cuda.is_available():
        why = "sees none" if torch.version.cuda else "was built without CUDA"
        raise ValueError(f"this measures an NVIDIA GPU, and torch {torch.__version__} {why}")
    out.mkdir(parents=True, exist_ok=True)
    made = made_with()
    report: dict[str, Any] = {**made, "seconds": {}, "rows": []}
    write_json(out / "report.json", report)
    print(made["card"], *(f"{key} {value}" for key, value in made.items() if key != "card"), sep=", ", end="\n\n")
    print(table_line("what", "unit", "predicted", "measured", "ratio"))
    print(table_line("-" * 64, "-" * 8, "-" * 8 + ":", "-" * 8 + ":", "-" * 5 + ":"), flush=True)
    started = deadline = time.monotonic()
    for name, (_, seconds) in tqdm(STEPS.items(), file=sys.stderr, unit="step"):
        begin, deadline = time.monotonic(), deadline + seconds
        command = [sys.executable, __file__, "--step", name, "--out", str(out)]
        for row in rows_of(command, out / f"{name}.log", deadline - begin):
            report["rows"].append({"step": name, **row})
            report["seconds"][name] = time.monotonic() - begin
            write_json(out / "report.json", report)
            tqdm.write(describe(row))
            sys.stdout.flush()
    rows = report["rows"]
    judged = [row["is_right"] for row in rows if row.get("is_right") is not None]
    failed = [row for row in rows if "failed" in row]
    print(f"\n{sum(judged)} of {len(judged)} checks are right; {time.monotonic() - started:.0f} s")
    for row in failed:
        print(f"{row['what']}: {row['failed']} (more: {out / row['step']}.log)")
    print(f"every figure: {out / 'report.json'}; traces for https://ui.perfetto.dev beside it")
    return all(judged) and not failed


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_report"), help="the folder that the report goes to")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step:
        run_step(args.step, args.out)
        return 0
    is_right = []
    return exit_code(lambda: is_right.append(run(args.out))) or int(not all(is_right))


if __name__ == "__main__":
    sys.exit(main())
