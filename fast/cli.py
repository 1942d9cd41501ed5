"""Shared by the command lines: the demo model, devices, checks of flags, loading, writing files and exit codes.

    device, dtype = resolve_device(args)
    model, tokenizer = load(args.checkpoint_path, device, dtype)

Bad input gives one line on stderr and exit code 2; a file is written whole or not at all.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fast.checkpoint import load_model
from fast.compiling import missing_compiler
from fast.tokenizer import Tokenizer, load_tokenizer
from model import Transformer
from tp import ALONE, Ranks

CACHE_DTYPES = {"auto": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
DEMO = Path(__file__).resolve().parent.parent / "demo" / "target"


def check_device(device: str) -> None:
    """Raise ValueError, in one line, for a device that this machine lacks. A GPU becomes the current one."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from None
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # events and streams are the current device's


def resolve_device(args: argparse.Namespace) -> tuple[str, torch.dtype]:
    """The device and dtype to run in. Raises ValueError for a device this machine lacks."""
    check_device(args.device)
    old_gpu = args.device.startswith("cuda") and torch.cuda.get_device_capability(args.device) < (8, 0)
    return args.device, getattr(torch, args.dtype or ("float16" if old_gpu else "bfloat16"))


def resolve_kv_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """`--kv_dtype` as `setup_caches` takes it. Raises ValueError for a type that this GPU does not support."""
    if args.kv_dtype == "fp8" and args.device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(args.device)
        if (major, minor) < (8, 9):
            raise ValueError(f"--kv_dtype fp8 needs compute capability 8.9, this GPU has {major}.{minor}: use int8")
    return CACHE_DTYPES[args.kv_dtype]


def load(path: Path, device: str, dtype: torch.dtype, ranks: Ranks = ALONE) -> tuple[Transformer, Tokenizer]:
    """The model at `path`, a `.pth` of ours or a Hugging Face directory, and the tokenizer stored with it."""
    model = load_model(path, device=device, dtype=dtype, ranks=ranks)
    return model, load_tokenizer(path)


def drop_compile(args: argparse.Namespace, *flags: str) -> None:
    """Turn these flags off where this machine lacks a compiler, and say so on stderr."""
    if any(getattr(args, flag) for flag in flags) and (lacking := missing_compiler()):
        print(f"{lacking}: not compiling", file=sys.stderr)
        for flag in flags:
            setattr(args, flag, False)


def check_at_least(args: argparse.Namespace, least: int, *flags: str) -> None:
    """Raise ValueError if a flag's value, or one value of its list, is less than `least`; None is not checked."""
    for flag in flags:
        value = getattr(args, flag)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < least:
                raise ValueError(f"--{flag} {number} must be at least {least}")


def check_writable(path: Path) -> None:
    """Raise ValueError if the file `path` cannot be created, before time is spent on its content."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: {folder} is not a directory")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a directory")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write {path}: no permission to write in {folder}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it replaces `path`, otherwise it is deleted."""
    temporary = path.with_name(f"tmp.{os.getpid()}.{path.name}")  # with its suffix, which may decide the format
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write `data` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")


@contextlib.contextmanager
def profiled(path: Path | None):
    """Write a Chrome trace of the `with` block to `path`; do nothing if that is None."""
    if path is None:
        yield
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its start and stop on stderr
    with torch.profiler.profile() as profile:
        yield
    with replacing(path) as temporary:
        profile.export_chrome_trace(str(temporary))
    print(f"trace: {path} (open it at https://ui.perfetto.dev)")


def exit_code(work: Callable[[], Any], ranks: Ranks = ALONE, stopped: str = "stopped") -> int:
    """Run `work` and return the exit code. An error prints one line on stderr and ends the other ranks too.

    stopped: printed on Ctrl-C.
    """
    try:
        work()
    except BrokenPipeError:  # the reader of our output has closed it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        ranks.report_error("")
        return ranks.exit(141) if ranks.world_size > 1 else 0  # exiting with 0 would not end the other ranks
    except (ValueError, OSError, ImportError) as error:
        ranks.report_error(f"error: {error}")
        return ranks.exit(2)
    except torch.OutOfMemoryError as error:
        found = ". ".join(str(error).split(". ")[:2])  # what was asked for; more is about the allocator
        ranks.report_error(f"error: {found}: quantise the model, or make texts or batches smaller")
        return ranks.exit(2)
    except KeyboardInterrupt:
        ranks.report_error(f"\n{stopped}")
        return ranks.exit(130)
    return 0
