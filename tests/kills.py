"""Kill converting, quantising and downloading at random moments; the run that follows must work and leave no litter.

    python tests/kills.py --kills 100
    python tests/kills.py --runs compile --kills 12  # a first `generate.py --compile`, which builds the kernels too

Prints counts for each kind of run and signal. Worth knowing: every run is a fork of this process, which has imported
everything, so that a moment drawn from a run's length falls into its work and not into the import of torch.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DRAFT = ROOT / "demo" / "draft"
REPO = "org/model"
CONTEXT = multiprocessing.get_context("fork")
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


def serve(connection, files: dict[str, bytes]) -> None:
    from hub_server import Hub

    with Hub() as hub:
        hub.repos[REPO] = files
        connection.send(hub.url)
        connection.recv()


def work(run: Callable[[], int], log: Path) -> None:
    """In the fork: what a script's process does."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.exit(run())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_unfinished(folder: Path, whole: dict[str, bytes]) -> int:
    """How many unfinished files there are; raises AssertionError if one of them loads, or a finished one is wrong."""
    from fast.checkpoint import open_checkpoint

    unfinished = 0
    for name, data in content(folder).items():
        if name in whole:
            assert data == whole[name], f"{name} is not whole"
        elif name.endswith("archive.pth") and data not in whole.values():
            unfinished += 1
            with contextlib.suppress(ValueError):
                open_checkpoint(folder / name)
                raise AssertionError(f"{name} is unfinished, and loads")
    return unfinished


def kill_runs(name: str, run: Callable[[Path], int], setup: Callable[[Path], None], kills: int, seed: int) -> bool:
    """Print the counts of `kills` killed runs of `run(folder)`, and whether every run that followed worked.

    What "compile" leaves are caches, in which nothing has to be as before.
    """
    rng, is_cache = random.Random(seed), name == "compile"
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        folder, log = Path(place) / "model", Path(place) / "log"

        def start() -> multiprocessing.Process:
            process = CONTEXT.Process(target=work, args=(lambda: run(folder), log))
            process.start()
            return process

        def finish() -> str | None:
            process = start()
            process.join(300)
            found = set(map(str, folder.rglob("*")))
            if process.exitcode != 0:
                return f"the next run ended with {process.exitcode}: {log.read_text()}"
            return None if is_cache or not paths or found == paths else f"left: {sorted(found ^ paths)}"

        setup(folder)
        paths: set[str] = set()
        for _ in range(1 if is_cache else 2):  # the first run is slower
            begin = time.perf_counter()
            assert (problem := finish()) is None, problem
            length = time.perf_counter() - begin
        paths, whole = set(map(str, folder.rglob("*"))), {} if is_cache else content(folder)
        landed = 0
        while landed < kills:
            shutil.rmtree(folder)
            setup(folder)
            kind = rng.choice([signal.SIGTERM, signal.SIGKILL])
            process = start()
            process.join(rng.uniform(0, length))
            if process.is_alive():
                os.kill(process.pid, kind)
            process.join()
            landed += process.exitcode != 0
            counts[{0: "too late", 143: "SIGTERM in a save"}.get(process.exitcode, kind.name)] += 1
            try:
                unfinished = check_unfinished(folder, whole)
                counts["unfinished checkpoints"] += unfinished
                assert not (unfinished and kind == signal.SIGTERM), "SIGTERM left an unfinished checkpoint"
                assert (problem := finish()) is None, problem
                assert is_cache or content(folder) == whole, "the next run wrote something else"
            except AssertionError as error:
                counts["FAILED"] += 1
                print(f"{name}, {kind.name}: {error}")
    print(f"{name}: {kills} kills:", ", ".join(f"{n} {what}" for what, n in sorted(counts.items())), flush=True)
    return not counts["FAILED"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of each kind of run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", nargs="+", default=["convert", "quantise", "download"], help="or compile")
    args = parser.parse_args()

    files = {path.name: path.read_bytes() for path in DRAFT.iterdir() if path.suffix != ".pth"}
    ours, theirs = CONTEXT.Pipe()
    hub = CONTEXT.Process(target=serve, args=(theirs, files), daemon=True)
    hub.start()
    os.environ |= {
        "HF_ENDPOINT": ours.recv(),
        "NO_PROXY": "*",
        "HF_HUB_OFFLINE": "0",
    }  # huggingface_hub reads them once

    import convert_hf_checkpoint
    import download
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    import generate
    import quantize

    torch.set_num_threads(1)  # a fork has no other
    with FakeTensorMode():
        torch.empty(1)  # imports what it needs

    def model(folder: Path) -> None:
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)

    def compile(folder: Path) -> int:
        os.environ |= {"TORCH_EXTENSIONS_DIR": str(folder), "TMPDIR": str(folder)}
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        tempfile.tempdir = None  # so that it is found anew
        return generate.main(["--compile", "--checkpoint_path", str(DRAFT), "--max_new_tokens", "3"])

    def script(main: Callable[[], int], *argv: str | Path) -> int:
        sys.argv[1:] = map(str, argv)
        return main()

    runs = {
        "convert": (lambda folder: script(convert_hf_checkpoint.main, "--checkpoint_dir", folder), model),
        "quantise": (lambda folder: script(quantize.main, "--checkpoint_path", folder, "--mode", "int4"), model),
        "download": (lambda folder: script(download.main, "--checkpoint_dir", folder, REPO), Path.mkdir),
        "compile": (compile, Path.mkdir),
    }
    worked = [kill_runs(name, *runs[name], args.kills, args.seed) for name in args.runs]
    ours.send("stop")
    return int(not all(worked))


if __name__ == "__main__":
    sys.exit(main())
