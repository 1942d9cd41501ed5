"""Files that others made, read and checked: what is wrong with one is a ValueError, a line that names the file.

    config = read_json(folder / "tokenizer_config.json", TokenizerConfig)
    with reading(path):
        ...  # whatever goes wrong in here is said of `path`

What is no fault of the file passes: a missing package, a full disk, Ctrl-C.
"""

import contextlib
import importlib
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

PASSED_ON = (ImportError, OSError, KeyboardInterrupt, SystemExit, GeneratorExit)  # not the file's fault
WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list", dict: "an object",
    tuple: "a tuple", type(None): "null",
}  # fmt: skip


class FileError(ValueError):
    """What is wrong with a file, in one line that names it."""


def lacks_memory(error: BaseException) -> bool:
    """Whether there was too little memory, which PyTorch says by a RuntimeError."""
    is_said = re.search("(?i)out of memory|can(not|'t) allocate memory", str(error)) is not None
    return isinstance(error, MemoryError) or (isinstance(error, (RuntimeError, OSError)) and is_said)


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Make whatever the `with` block raises over the content of `path` a FileError.

    A ValueError says by itself what is wrong. Any other exception, and a panic of a package in Rust, which is no
    `Exception`, comes from code that met what no such file should hold.
    """
    try:
        yield
    except (FileError, *PASSED_ON):
        raise
    except BaseException as error:
        if lacks_memory(error):
            raise
        words = str(error).partition("\n")[0] or type(error).__name__
        if not isinstance(error, ValueError):
            words = f"damaged, or of a kind that is not known here ({type(error).__name__}: {words:.160})"
        is_named = words.startswith((f"{path}:", f"{path} ", f"{path}/"))
        raise FileError(words if is_named else f"{path}: {words}") from error


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark. Raises ValueError naming the file if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def read_json(path: Path, kind: Any = dict[str, Any], optional: bool = False) -> Any:
    """The JSON value in the file at `path`, which must be of the type `kind`, see `check`.

    optional: {} if there is no such file. Raises FileError for anything else.
    """
    if optional and not path.exists():
        return {}
    with reading(path):
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("not a file")
        try:
            value = json.loads(read_text(path))
        except ValueError as error:
            raise ValueError(f"not JSON: {error}") from None
        check(value, kind)
    return value


def check(value: Any, kind: Any, name: str = "") -> None:
    """Raise ValueError if `value`, as JSON or a pickle holds it, is not of the type `kind`, with the place in it.

    kind: a class; a list, tuple or dict of something; a TypedDict, which may have other keys, too; a dataclass, which
    may be given by the dict of its fields; or a union of these.
    """
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    kind = next((one for one in kinds if one is Any or type(value) in _classes(one)), None)
    if kind is None:
        wanted = " or ".join(dict.fromkeys(WORDS[_classes(one)[0]] for one in kinds))
        raise ValueError(f"{name or 'it'} is {value!r:.80}; expected {wanted}")
    if isinstance(value, dict) and (is_typeddict(kind) or is_dataclass(kind)):
        hints, needed = _fields(kind)
        if is_dataclass(kind) and (unknown := [key for key in value if key not in hints]):
            raise ValueError(f"{name or 'it'} has an unknown field {unknown[0]!r:.80}")
        if missing := [key for key in needed if key not in value]:
            raise ValueError(f"{name or 'it'} has no {missing[0]}")
        inside = [(key, value[key], one) for key, one in hints.items() if key in value]
    else:
        inner = [one for one in get_args(kind) if one is not ...][-1:]  # of list[X], dict[str, X] and tuple[X, ...]: X
        pairs = () if inner in ([], [Any]) else value.items() if isinstance(value, dict) else enumerate(value)
        inside = [(key, one, inner[0]) for key, one in pairs]
    for key, one, its_kind in inside:
        check(one, its_kind, f"{name}.{key}".removeprefix("."))


@cache
def _fields(kind: Any) -> tuple[dict[str, Any], list[str]]:
    """The types of a TypedDict's or a dataclass's fields, and the names of those that it must have."""
    needed = getattr(kind, "__required_keys__", ())
    if is_dataclass(kind):
        needed = [field.name for field in fields(kind) if field.default is MISSING]
    return get_type_hints(kind), sorted(needed)


@cache
def _classes(kind: Any) -> tuple[type, ...]:
    if kind is float:
        return float, int
    if is_dataclass(kind):
        return dict, kind
    return (dict,) if is_typeddict(kind) else (get_origin(kind) or kind,)


def require(module: str, by: str = "tokenizer"):
    """The optional `module`; ImportError says which package to install for what needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"this {by} needs the package {package}: pip install {package}") from error
