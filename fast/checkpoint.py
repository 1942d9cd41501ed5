"""Load and save models: loading is memory-mapped and strict, saving is streamed and atomic.

    model = load_model("checkpoints/meta-llama/Llama-3.2-1B", device="cuda")  # or .../model.pth

Worth knowing: nothing is read before it is needed. Opening a checkpoint maps its files, and saving fills a mapped file
tensor by tensor, so neither takes more memory than the largest tensor. On the CPU a weight that is stored as one tensor
in the requested dtype is not copied: it *is* the mapped pages.
"""

import contextlib
import dataclasses
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import tp
from fast import families, gguf, meta, published
from fast.config import make_args
from fast.files import beside
from fast.layers import speed_up
from fast.quantized import Scheme, swap_linears
from fast.reading import check, read_json, reading
from fast.stored import Part, Stored, part_of
from model import ModelArgs, Transformer

FORMAT = 1

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # of weights that are not quantised
IGNORED_TENSORS = ("*.rotary_emb.*", "rope.freqs")  # computed, not learned; older files hold them

# In order of preference: the single file, the index of shards, and a pattern if there is neither.
HF_FILES = (
    ("model.safetensors", "model.safetensors.index.json", "*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin"),
)

# What is often given in place of a checkpoint: how such a file begins, and what a directory without weights may hold.
FOREIGN_BYTES = {
    rb"version https://git-lfs": "a Git LFS pointer, not the file itself: run `git lfs pull` in its directory",
    rb"(?i)\s*<(!doctype|html|\?xml)": "a web page, not the file itself: download it again",
    rb"\x80[\x02-\x05][^\0]": "a pickle, as torch wrote before 1.6: save it again with today's torch.save",
    rb"\Z": "empty: download it again",
}
FOREIGN_FILES = {
    "adapter_*": "a LoRA adapter: merge it into its base model (peft: merge_and_unload) and give that",
    "*.incomplete": "an interrupted download: run scripts/download.py again, it resumes",
    "*.gguf": "to be given by name",
    "*.pth": "to be given by name",
}


class Index(TypedDict):
    """What lists the shards of a Hugging Face directory: the file of every tensor."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. `tensors`: every tensor of the model, by our name, checked against the model's shapes."""

    args: ModelArgs
    quantization: dict[str, Any] | None
    tensors: dict[str, Stored]
    fixed: dict[str, torch.dtype]  # of tensors that keep their dtype: those of quantised Linears


def load_model(
    path: str | os.PathLike,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    ranks: tp.Ranks = tp.ALONE,
    replicate: bool = False,
) -> Transformer:
    """The model stored at `path`, on `device` in `dtype`, in eval mode and without gradients.

    Quantised Linears keep their own dtypes; `model.quantization` is the scheme, or None. `layers.speed_up` has replaced
    its layers: where a CPU has kernels, a bfloat16 Linear has `packed` in place of its `weight`.

    path: as `open_checkpoint` takes it.
    ranks: the processes that share the model; this one reads only its share. replicate: every rank reads the whole
        model, and rank 0's logits are broadcast, so that all ranks sample the same token.
    Raises ValueError if `path` is not a complete checkpoint of a supported model, or the model cannot be divided among
    the ranks; FileNotFoundError if there is no such file.
    """
    checkpoint = open_checkpoint(path)
    model = _skeleton(checkpoint.args, checkpoint.quantization)
    tensors = checkpoint.tensors
    if ranks.world_size > 1:
        whole, model = model, model if replicate else _share_of_skeleton(checkpoint, ranks.world_size)
        shares = tp.connect(whole, model, ranks)
        tensors = {name: stored.share(shares[name]) if name in shares else stored for name, stored in tensors.items()}
    fill(model, tensors, checkpoint.fixed, device, dtype)
    model.quantization = checkpoint.quantization
    return model


def fill(
    model: Transformer,
    tensors: dict[str, Stored],
    fixed: dict[str, torch.dtype],
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Give a model that has no weights its `tensors`, on `device` in `dtype` or what is `fixed`, and fast layers.

    A tensor that is not on `meta` has its values already.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    state |= {name: stored.load(device, fixed.get(name, dtype)) for name, stored in tensors.items()}
    if is_tied := has_tied_output(model):
        state["output.weight"] = state["tok_embeddings.weight"]
    model.load_state_dict(state, assign=True)
    if is_tied:
        model.output.weight = model.tok_embeddings.weight
    del state  # so that each weight is freed once it is packed
    speed_up(model.eval().requires_grad_(False), dtype)


def has_tied_output(model: Transformer) -> bool:
    """Whether the output projection is the embedding table; a quantised one is not."""
    return getattr(model.output, "weight", None) is model.tok_embeddings.weight


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Map the files at `path` and check that they hold exactly the tensors of the model they describe.

    path: a `.pth` of ours; llama.cpp's `.gguf`; a directory with `config.json` and `*.safetensors` or
    `pytorch_model*.bin`, single or sharded; or Meta's `consolidated.*.pth` with `params.json`, there or in its folder
    `original`.
    Raises ValueError, one line, for a damaged or missing shard, an unsupported setting, or tensors that do not fit.
    """
    path = Path(path)
    with reading(path):
        return _open(path)


def _open(path: Path) -> Checkpoint:
    if path.is_file() and not foreign(path) and gguf.is_gguf(path):
        args, parts, packed, naming = gguf.read_gguf(path)
        quantization, parts = published.assign("gguf", packed, parts, _skeleton(args, None), naming)
        return _match(path, args, quantization, parts, naming)
    if not path.is_dir():
        if path.suffix in (".safetensors", ".bin") and path.is_file():
            raise ValueError(f"{path} is part of a checkpoint: give its directory, {path.parent}")
        content = _load_torch(path)
        if content.get("format") == 0:
            raise ValueError(f"{path}: not finished: what wrote it was stopped, and must run again")
        if content.get("format") != FORMAT or not content.keys() >= {"config", "quantization", "model"}:
            raise ValueError(f"{path}: not a checkpoint in this project's format {FORMAT}, and no directory of another")
        check(content["quantization"], Scheme | None, "quantization")
        try:
            args = make_args(content["config"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}; if another version wrote it: convert or quantise again") from error
        parts = _parts(_tensors(path, content["model"]))
        return _match(path, args, content["quantization"], parts, families.OURS)
    config = read_json(path / "config.json") if (path / "config.json").exists() else None
    if files := _hf_files(path):
        if config is None:
            raise ValueError(f"{path} has no config.json")
        return _open_hf(path, config, files)
    args, parts = _read_meta(path, config)
    return _match(path, args, None, parts, meta.NAMING)


def _open_hf(path: Path, config: dict[str, Any], files: list[Path]) -> Checkpoint:
    if kind := families.head_kind(config):
        raise ValueError(f"{path} is no model but a head ({kind}): give it, as it is, to --draft_checkpoint_path")
    with reading(path / "config.json"):
        args, naming, method = families.args_from_hf(config), families.family_of(config).naming, published.check(config)
    quantization = None
    parts, older = read_hf(files), path / "quantize_config.json"  # AutoGPTQ's
    if method is None and any(name.endswith(published.PACKED) for name in parts):
        if not older.is_file():
            raise ValueError(f"{path}: its weights are quantised, but config.json has no quantization_config")
        config = {"quantization_config": {"quant_method": "gptq", **read_json(older)}}
        with reading(older):
            method = published.check(config)
    if method is not None:
        given = config["quantization_config"]
        quantization, parts = published.read(method, given, parts, _skeleton(args, None), naming)
    return _match(path, args, quantization, parts, naming)


def save_checkpoint(
    path: str | os.PathLike,
    args: ModelArgs,
    tensors: Mapping[str, tuple[Iterable[int], torch.dtype, Callable[[Tensor], None]]],
    quantization: dict[str, Any] | None = None,
) -> None:
    """Write a `.pth` for `load_model`, tensor by tensor; it gets its final name only once it is complete.

    tensors: our name -> (shape, dtype, fill); `fill(out)` writes the values into `out`, which is mapped to the file.
    Of a symbolic link, the file it points to is replaced. Raises ValueError if `path` is a device or a pipe, OSError
    naming it, for example if the disk is full, and whatever a `fill` raises; a file already at `path` is kept.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second to import, and loading does not need it

    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise ValueError(f"cannot write {path}: it is not a regular file")
    with FakeTensorMode():  # allocates no memory
        reserved = {name: torch.empty(tuple(shape), dtype=dtype) for name, (shape, dtype, _) in tensors.items()}
        unfinished = torch.empty((), dtype=torch.int64)  # 0 in the file, and so no known format, until all is filled
    content = {
        "format": unfinished,
        "config": dataclasses.asdict(args),
        "quantization": quantization,
        "model": reserved,
    }
    with naming(path), beside(target) as folder:
        temporary = folder / "archive.pth"  # torch.save writes this name into the file
        try:
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(content, temporary)  # by name: Ctrl-C must not interrupt an open file's Python methods
        except RuntimeError:
            _reserve(temporary, sum(tensor.nbytes for tensor in reserved.values()))  # OSError if the disk is full
            raise
        _reserve(temporary, temporary.stat().st_size)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            mapped = torch.load(temporary, mmap=True, weights_only=True)
        for name, (_, _, fill) in tensors.items():
            fill(mapped["model"][name])
        mapped["format"].fill_(FORMAT)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Make an OSError of the `with` block name `path`: by itself it names a temporary file, or none on a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _reserve(path: Path, n_bytes: int) -> None:
    """Allocate `n_bytes` on disk for the file: a full disk raises OSError here, but crashes the process once mapped."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "ab") as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)


def _skeleton(args: ModelArgs, quantization: dict[str, Any] | None) -> Transformer:
    """The model without its weights; its Linears are those of the scheme `quantization`."""
    with torch.device("meta"):
        model = Transformer(args)
    if quantization is not None:
        swap_linears(model, quantization)
    return model


def _share_of_skeleton(checkpoint: Checkpoint, world_size: int) -> Transformer:
    """One rank's share of the model without its weights. ValueError names the world sizes that fit."""
    args, quantization = checkpoint.args, checkpoint.quantization

    def divided(n: int, **changes: Any) -> Transformer:
        return _skeleton(dataclasses.replace(tp.divided(args, n), **changes), quantization)

    def fits(n: int) -> bool:
        with contextlib.suppress(ValueError):
            return bool(divided(n, n_layers=1))
        return False

    try:
        model = divided(world_size)
    except ValueError as error:
        fitting = ", ".join(str(n) for n in range(1, args.n_heads + 1) if args.n_heads % n == 0 and fits(n))
        message = f"{world_size} processes cannot share this model: {error}; world sizes that fit: {fitting}"
        raise ValueError(message) from None
    model.args = args
    return model


def _match(
    path: Path, args: ModelArgs, quantization: dict | None, parts: dict[str, Part], naming: families.Naming
) -> Checkpoint:
    """The checkpoint whose tensors have these parts, see `match`."""
    modules = naming.modules
    head, table = (modules.get(name, (name,))[0] + ".weight" for name in ("output", "tok_embeddings"))
    # As transformers does: an output projection of its own is used, even if the configuration says that it is tied.
    is_float = quantization is None or "output" in quantization.get("skip", ())
    if args.tie_embeddings and is_float and parts.keys() >= {head, table}:
        is_tied = parts[head].shape == parts[table].shape and parts[head].read().equal(parts[table].read())
        args = dataclasses.replace(args, tie_embeddings=is_tied)
    model = _skeleton(args, quantization)
    tensors = match(path, model, parts, naming)
    return Checkpoint(args, quantization, tensors, {name: buffer.dtype for name, buffer in model.named_buffers()})


def match(path: Path, model: Transformer, parts: dict[str, Part], naming: families.Naming) -> dict[str, Stored]:
    """The parts of every tensor that is on `meta`; ValueError lists, by the file's names, those that do not fit.

    Any float does for a weight; the tensors of a quantised Linear have one type each.
    """
    args = model.args
    heads = args.n_heads + args.n_kv_heads
    reordered = {"wqkv": heads * args.head_dim, "q_norm": args.head_dim, "k_norm": args.head_dim}
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items() if t.is_meta}
    ignored = IGNORED_TENSORS + naming.left_out
    if has_tied_output(model):
        expected.pop("output.weight", None)
        ignored += tuple(f"{name}.weight" for name in naming.theirs("output"))
    types = {name: (buffer.dtype,) for name, buffer in model.named_buffers()}
    matched, missing, wrong, other = {}, [], [], []
    unexpected = {name for name in parts if not any(fnmatch(name, pattern) for pattern in ignored)}
    for name, (n_rows, *width) in expected.items():
        module, _, kind = name.rpartition(".")
        theirs = naming.theirs(module, getattr(model.get_submodule(module), "n_experts", 1))
        theirs = [f"{other}.{kind}" for other in (theirs[:1] if kind == "order" else theirs)]
        rows = model.get_submodule(module).sharding.parts if len(theirs) > 1 else [n_rows]
        for part, shape in zip(theirs, [(n, *width) for n in rows], strict=True):
            if part not in parts:
                missing.append(f"{part} {list(shape)}")
            elif parts[part].shape != shape:
                wrong.append(f"{part} is {list(parts[part].shape)}, expected {list(shape)}")
            elif parts[part].dtype not in (wanted := types.get(name, FLOATS)):
                other.append(f"{part} is {parts[part].dtype}, expected {' or '.join(map(str, wanted))}")
        unexpected.difference_update(theirs)
        found = [parts[part] for part in theirs if part in parts]
        if kind != "order" and not (missing or wrong or other) and (n := reordered.get(module.rpartition(".")[2])):
            order = families.head_order(args, naming.pairs)
            found = _reordered(found, order, n) if order else found
        matched[name] = Stored((n_rows, *width), tuple(found))
    problems = {
        "missing tensors": missing,
        "unexpected tensors": [f"{name} {list(parts[name].shape)}" for name in sorted(unexpected)],
        "wrongly shaped tensors": wrong,
        "tensors of another type": other,
    }
    if any(problems.values()):
        lines = [f"{kind}: {_listing(names)}" for kind, names in problems.items() if names]
        raise ValueError(f"{path}: {'; '.join(lines)}")
    if left_out := [name for name in parts if any(fnmatch(name, pattern) for pattern in naming.left_out)]:
        print(f"{path}: only its language model is used; left out: {_listing(left_out, 1)}", file=sys.stderr)
    return matched


def _reordered(parts: list[Part], order: list[int], n_rows: int) -> list[Part]:
    """The `parts` with the elements of each head, in their first `n_rows` rows together, in the given order."""

    def rows(part: Part, n: int, first: int, end: int) -> Tensor:
        whole = part.read()
        heads = whole[:n].unflatten(0, (-1, len(order)))[:, order]
        return torch.cat((heads.flatten(0, 1), whole[n:]))[first:end]

    result = []
    for part in parts:
        n = min(max(n_rows, 0), part.shape[0])
        result.append(Part(part.shape, part.dtype, partial(rows, part, n)) if n else part)
        n_rows -= part.shape[0]
    return result


def _listing(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", ... and {len(names) - limit} more" if len(names) > limit else "")


def _hf_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face directory; ValueError if its index is broken or names a missing shard."""
    for single, index, pattern in HF_FILES:
        if (folder / single).exists():
            return [folder / single]
        if (folder / index).exists():
            shards = sorted(set(read_json(folder / index, Index)["weight_map"].values()))
            for name in shards:
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise ValueError(f"{folder / index} names {name!r}, which is outside of its folder")
                if not (folder / name).is_file():
                    raise ValueError(f"{folder / index} names {name!r}, which is not there")
            return [folder / name for name in shards]
        if files := sorted(file for file in folder.glob(pattern) if not file.name.startswith("adapter_")):
            return files
    return []


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a Hugging Face or Meta directory's weights; ValueError if one of its index is missing."""
    return _hf_files(folder) or sorted(_meta_folder(folder).glob("consolidated*.pth"))


def _meta_folder(folder: Path) -> Path:
    return folder if (folder / "params.json").exists() else folder / "original"


def _parts(tensors: dict[str, Tensor]) -> dict[str, Part]:
    return {name: part_of(tensor.detach()) for name, tensor in tensors.items()}


def read_hf(files: list[Path]) -> dict[str, Part]:
    """The tensors of a Hugging Face directory's `weight_files`. ValueError for a damaged file, or a name in two."""
    parts: dict[str, Part] = {}
    for file in files:
        found = _parts(_tensors(file))
        if twice := sorted(parts.keys() & found.keys()):
            raise ValueError(f"{file} holds tensors that another file holds too: {_listing(twice)}")
        parts.update(found)
    return parts


def _read_meta(folder: Path, config: dict[str, Any] | None) -> tuple[ModelArgs, dict[str, Part]]:
    """Arguments and tensors of Meta's own files, whose model-parallel shards are joined."""
    origin, files = _meta_folder(folder), weight_files(folder)
    if not files:
        held = ((sorted(file.name for file in folder.glob(pattern)), kind) for pattern, kind in FOREIGN_FILES.items())
        but = next((f", but {_listing(names)}, {kind}" for names, kind in held if names), "")
        raise ValueError(f"{folder} has no *.safetensors, no pytorch_model*.bin and no consolidated.*.pth{but}")
    params = read_json(origin / "params.json")
    meta.check_params(params, origin / "params.json")
    shards = [_tensors(file) for file in files]
    types = [{name: tensor.dtype for name, tensor in shard.items()} for shard in shards]
    if any(found != types[0] for found in types):
        raise ValueError(f"{origin}: the consolidated.*.pth hold different tensors")
    parts = {}
    for name, first in shards[0].items():
        dim = meta.SHARD_DIMS.get(".".join(name.split(".")[-2:]))
        if name == "tok_embeddings.weight" and first.shape[1] == params["dim"]:
            dim = 0  # Llama 3 divides the vocabulary, earlier models the width
        shape = list(first.shape)
        if dim is not None:
            shape[dim] = sum(shard[name].shape[dim] for shard in shards)
        pieces = [shard[name] for shard in shards] if dim is not None else [first]
        joined = part_of(first.detach())
        if len(pieces) > 1:
            joined = Part(tuple(shape), first.dtype, lambda a, b, each=pieces, dim=dim: torch.cat(each, dim)[a:b])
        parts[name] = joined
    shapes = {name: part.shape for name, part in parts.items()}
    with reading(folder / "config.json" if config else origin / "params.json"):
        return families.args_from_hf(config) if config else meta.args_from_params(params, shapes), parts


def _tensors(path: Path, content: Any = None) -> dict[str, Tensor]:
    """The tensors of a weight file, mapped, not read (or `content`, if it is already loaded)."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: not a file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ValueError(foreign(path) or f"{path}: not a whole safetensors file: {error}") from error
    content = _load_torch(path) if content is None else content
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ValueError(f"{path}: expected a dict of tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not name.isprintable():
            raise ValueError(f"{path}: a tensor has the name {name!r:.80}")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ValueError(f"{path}: {name} is sparse, without values, or quantised by torch; expected plain numbers")
    return content


def foreign(path: Path) -> str | None:
    """One line that says what the unreadable file at `path` is, None if it does not begin as any of FOREIGN_BYTES."""
    with open(path, "rb") as file:
        start = file.read(64)
    return next((f"{path} is {kind}" for pattern, kind in FOREIGN_BYTES.items() if re.match(pattern, start)), None)


def _load_torch(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: " + ("not a file" if path.exists() else "no such file or directory"))
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).splitlines()[0].partition(". ")[0]
        reason = "it is not a zip archive" if "use_new_zipfile" in reason else reason
        raise ValueError(foreign(path) or f"{path}: not a whole torch file: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of tensors")
    return content
