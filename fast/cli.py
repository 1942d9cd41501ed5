"""Shared by the command lines: the demo model, devices, checks of flags, loading, writing files and exit codes.

    device, dtype = resolve_device(args)
    model, tokenizer = load(args.checkpoint_path, device, dtype)

Bad input gives one line on stderr and exit code 2; a file is written whole or not at all.
"""

import argparse
import contextlib
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fast.checkpoint import foreign, load_model, naming, weight_files
from fast.compiling import missing_compiler
from fast.files import beside
from fast.gguf import is_gguf
from fast.layers import kernels_missing
from fast.reading import lacks_memory
from fast.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from model import Transformer
from tp import ALONE, Ranks

INSTALL_LM_EVAL = "pip install 'lm_eval>=0.4.9,<0.5'"
CACHE_DTYPES = {"auto": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo" / "target"


class Parser(argparse.ArgumentParser):
    """Takes whole flags only; what it cannot parse is one line and exit code 2."""

    def __init__(self, description: str, **options: Any):
        usage = "%(prog)s [--flag ...]"
        super().__init__(
            description=description, usage=usage, allow_abbrev=False, formatter_class=HelpFormatter, **options
        )

    def error(self, message: str) -> None:
        self.exit(2, f"error: {one_line(message)}; --help lists the flags\n")


class HelpFormatter(argparse.HelpFormatter):
    """A flag, what it takes, its meaning and its default on one line."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X", Path: "PATH"}.get(action.type, "TEXT")

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        if isinstance(action, argparse.BooleanOptionalAction):
            default = "on" if default else "off"
        if text is None or "default" in text or default in (None, False, argparse.SUPPRESS, [], {}):
            return text
        return f"{text} (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"


def add_model_flags(parser: Parser, kv_dtype: str | None = None) -> Callable[..., Any]:
    """Add a group of the flags that name a model; return its `add_argument`.

    kv_dtype: what `--kv_dtype` means to a program that runs the model; None: it does not run it.
    """
    add = parser.add_argument_group("the model").add_argument
    add("--checkpoint_path", type=Path, default=DEMO, help=".pth, .gguf, directory or hub's OWNER/NAME (default: demo)")
    add("--download", action="store_true", help="fetch OWNER/NAME from the hub if it is not in checkpoints/")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="such as cpu or cuda:1 (default: cuda, cpu without a GPU)")
    add("--threads", type=int, help="threads that compute on a CPU (default: one a core)")
    if kv_dtype is not None:
        dtypes = ["bfloat16", "float16", "float32"]
        add("--dtype", choices=dtypes, help="default: bfloat16, float16 on GPUs before Ampere")
        add("--kv_dtype", choices=CACHE_DTYPES, default="auto", help=kv_dtype)
    return add


def template_args(text: str) -> dict[str, Any]:
    """The value of `--template_args`."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(text), dict) and not value.keys() & {"messages", "add_generation_prompt"}:
            return value
    raise argparse.ArgumentTypeError(f'{text!r} is no JSON object of variables, like {{"enable_thinking": false}}')


def one_line(text: str) -> str:
    """`text`, which may quote a file or a flag, without what moves a terminal's cursor, and not endless."""
    text = text if len(text) < 2000 else f"{text[:1000]} ... {text[-500:]}"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def say(*words: object) -> None:
    """Print on stderr: stdout is for results, which are written out first to keep the order."""
    print(end="", flush=True)
    print(*words, file=sys.stderr, flush=True)


def warn_beyond(flag: str, length: int, context_length: int) -> None:
    """Say so where the user asks for more positions than the model's configuration promises."""
    if length > context_length:
        say(f"{flag} {length}: the model's configuration promises {context_length} positions; more may give worse text")


def as_argument(path: Path) -> str:
    """`path`, quoted for a shell; in full if it would be taken for a flag."""
    return shlex.quote(str(path.absolute() if str(path).startswith("-") else path))


def set_threads(args: argparse.Namespace) -> None:
    """Compute on `--threads` threads of the CPU. Raises ValueError for less than one or more than it has cores."""
    check_at_least(args, 1, "threads")
    if args.threads is not None:
        if args.threads > (cores := os.cpu_count() or 1):
            raise ValueError(f"--threads {args.threads} is more than this machine's {cores} cores")
        torch.set_num_threads(args.threads)


def check_device(device: str) -> None:
    """Raise ValueError, in one line, for a device that this machine lacks. A GPU becomes the current one."""
    kind, accelerator = device.partition(":")[0], torch.accelerator.current_accelerator(check_available=True)
    here = ["cpu"] + ([accelerator.type] if accelerator else [])
    reason = f"this machine has {' and '.join(here)}"
    if device == "cpu" or kind in ("cuda", *here[1:]):
        try:
            torch.zeros(1, device=device)
            reason = ""
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
    if reason:
        raise ValueError(f"--device {device} cannot be used here: {reason}")
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


def find_checkpoint(path: Path, download: bool = False, ranks: Ranks = ALONE) -> Path:
    """The file or directory that `path` names; if there is none, `OWNER/NAME` is ROOT/checkpoints/OWNER/NAME.

    For a directory whose weights are in one `.pth` of ours, that file (`model.pth`, if there are several).
    download: rank 0 fetches OWNER/NAME from the Hugging Face hub, with progress on stderr. Raises FileNotFoundError
    that names the command which fetches it, OSError and ValueError if that fails.
    """
    name = str(path)
    if not path.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(?<!\.pth|\.bin)(?<!\.gguf)", name):
        path = ROOT / "checkpoints" / name
        if download:
            ranks.from_rank_0(lambda: None if _is_fetched(path) else _fetch(name))
        elif not path.is_dir():
            remedy = f"if it is a model's name on Hugging Face, add --download or run ./scripts/prepare.sh {name}"
            raise FileNotFoundError(f"{name}: no such file or directory; {remedy}")
    if path.is_dir() and not weight_files(path):
        files = [path / "model.pth"] if (path / "model.pth").is_file() else list(path.glob("*.pth"))
        return files[0] if len(files) == 1 else path
    return path


def _is_fetched(folder: Path) -> bool:
    with contextlib.suppress(ValueError):  # a shard is missing
        return bool(weight_files(folder)) and not any(folder.rglob("*.incomplete"))
    return False


def _fetch(repo_id: str) -> None:
    from scripts.download import download  # imports huggingface_hub

    with contextlib.redirect_stdout(sys.stderr):
        download(repo_id, ROOT / "checkpoints")


def load(path: Path, device: str, dtype: torch.dtype, ranks: Ranks = ALONE) -> tuple[Transformer, Tokenizer]:
    """The model at `path`, as `open_checkpoint` takes it, and the tokenizer stored with it.

    Where kernels are missing, which float32 on a CPU does without, it says why.
    """
    model = load_model(path, device=device, dtype=dtype, ranks=ranks)
    if (model.quantization or (device, dtype) != ("cpu", torch.float32)) and (reason := kernels_missing(device, dtype)):
        say(reason)
    for name in () if path.is_file() and is_gguf(path) else TOKENIZER_FILES:
        file = (path.parent if path.is_file() else path) / name
        if file.is_file() and (message := foreign(file)):
            raise ValueError(message)
    return model, load_tokenizer(path, model.args.vocab_size)


def drop_compile(args: argparse.Namespace, *flags: str) -> None:
    """Turn these flags off where this machine lacks a compiler, and say so on stderr."""
    if any(getattr(args, flag) for flag in flags) and (lacking := missing_compiler()):
        say(f"{lacking}: not compiling")
        for flag in flags:
            setattr(args, flag, False)


def check_at_least(args: argparse.Namespace, least: int, *flags: str) -> None:
    """Raise ValueError if a flag's value, or one value of its list, is less than `least`; None is not checked."""
    for flag in flags:
        value = getattr(args, flag)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < least:
                raise ValueError(f"--{flag} {number} must be at least {least}")


def refuse(args: argparse.Namespace, parser: Parser, why: str, *flags: str) -> None:
    """Raise ValueError if one of these flags, which would have no effect, was given."""
    if given := [f"--{flag}" for flag in flags if getattr(args, flag) != parser.get_default(flag)]:
        raise ValueError(f"{why}: leave out {', '.join(given)}")


def check_writable(path: Path) -> None:
    """Raise ValueError if the file `path` cannot be written, before time is spent on its content."""
    folder = Path(os.path.realpath(path)).parent
    if _stream(path) is not None:
        if not os.access(path, os.W_OK):
            raise ValueError(f"cannot write {path}: no permission to write to it")
        return
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: {folder} is not a directory")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a directory")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write {path}: no permission to write in {folder}")


def check_report(path: Path) -> None:
    """Raise ValueError if figures or a trace cannot be written to `path`, or would replace something else."""
    check_writable(path)
    if not str(path).isprintable():  # which the profiler leaves out
        raise ValueError(f"cannot write {path}: its name has characters that cannot be printed")
    if _stream(path) is None and path.is_file():
        with open(path, "rb") as file:
            if not re.match(rb'\s*(\{\s*"(model|schemaVersion)"|\x1f\x8b|\Z)', file.read(64)):
                raise ValueError(f"cannot write {path}: it holds neither figures nor a trace; name another file")


def _stream(path: Path) -> Path | int | None:
    """What to write into if `path` is no file that could be replaced: a device or a pipe, or this process's output."""
    if not path.exists() or path.is_dir():
        return None
    for fd in (1, 2):  # /dev/stdout, or a file that the shell redirects it to
        with contextlib.suppress(OSError):  # closed
            if os.path.samestat(path.stat(), os.fstat(fd)):
                return fd
    return None if path.is_file() else path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it replaces `path`, otherwise it is deleted.

    Of a symbolic link, the file it points to is replaced. A device, a pipe and our own output are written into.
    """
    target, stream = Path(os.path.realpath(path)), _stream(path)
    with naming(path), beside(target if stream is None else Path(tempfile.gettempdir()) / path.name) as folder:
        temporary = folder / ("new.gz" if path.suffix == ".gz" else "new")  # the profiler goes by the suffix
        yield temporary
        if stream is None:
            os.replace(temporary, target)
            return
        sys.stdout.flush()
        with open(temporary, "rb") as source, open(stream, "wb", closefd=stream is path) as sink:
            shutil.copyfileobj(source, sink)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write `data` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


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
        if not _is_whole(temporary):  # it reports no error when the disk is full
            raise OSError(f"the trace {path} could not be written: is the disk full?")
    say(f"trace: {path} (open it at https://ui.perfetto.dev)")


def _is_whole(trace: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), (gzip.open if trace.suffix == ".gz" else open)(trace, "rb") as file:
        return b"".join(deque(file, maxlen=1)).rstrip().endswith(b"}")
    return False


def run_command(parser: Parser, run: Callable[[argparse.Namespace, Ranks], Any], argv: list[str] | None) -> int:
    """Parse `argv` and call `run(args, ranks)`, among the processes of torchrun if it started this one."""
    ranks = Ranks.from_torchrun()

    def work() -> None:
        args = parser.parse_args(argv)
        set_threads(args)
        with torch.no_grad(), ranks.joined(args.device):
            run(args, ranks)

    return exit_code(work, ranks)


@contextlib.contextmanager
def _bars_closed() -> Iterator[None]:
    """Close all progress bars at the end, so that an error has a line of its own."""
    try:
        yield
    finally:
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()


def exit_code(work: Callable[[], Any], ranks: Ranks = ALONE, stopped: str = "stopped") -> int:
    """Run `work` and return the exit code. An error prints one line on stderr and ends the other ranks too.

    stopped: printed on Ctrl-C.
    """
    ends_python = signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # see fast/startup.py
    if ends_python:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):  # an ASCII terminal shows no middle dot, and that is no reason to fail
        sys.stdout.reconfigure(errors="replace")
    if sys.stderr is None:  # closed: what is printed there would go to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    try:
        with _bars_closed():
            work()
    except BrokenPipeError:  # the reader of our output has closed it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        ranks.report_error("")
        return ranks.exit(141) if ranks.world_size > 1 else 0  # exiting with 0 would not end the other ranks
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        words = str(error)
        if lacks_memory(error):
            found = ". ".join(words.split(". ")[:2])  # what was asked for; more is about the allocator
            found = found.rpartition("Allocator: ")[2] or "out of memory"
            words = f"{found}: quantise the model, or make texts or batches smaller"
        elif isinstance(error, RuntimeError):
            raise
        ranks.report_error(f"error: {one_line(words)}")
        return ranks.exit(2)
    except KeyboardInterrupt:
        ranks.report_error(f"\n{stopped}")
        return ranks.exit(130)
    finally:
        if ends_python:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    return 0
