"""Make a checkpoint smaller and faster: int8, grouped int4, or int4 rounded by GPTQ.

    python quantize.py --checkpoint_path checkpoints/$MODEL_REPO/model.pth --mode int4 --groupsize 32

Writes `model_int8.pth`, `model_int4.g32.pth` or `model_int4-gptq.g32.pth` beside the input; each works on every device.
Worth knowing: weights are quantised and written one Linear at a time; the file records how it was quantised.
"""

import fast.startup  # isort: skip  # noqa: F401 - before the others, see there
import argparse
import contextlib
import filecmp
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fast.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from fast.cli import (
    INSTALL_LM_EVAL,
    Parser,
    add_model_flags,
    as_argument,
    check_at_least,
    check_device,
    check_writable,
    exit_code,
    find_checkpoint,
    refuse,
    replacing,
    say,
    set_threads,
    warn_beyond,
)
from fast.gptq import check_finite, gptq_linears, read_weight
from fast.metrics import count_parameters
from fast.quantized import GROUP_SIZES, LINEARS, quantized_linears, swap_linears
from fast.reading import read_text
from fast.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from model import ModelArgs, Transformer


def quantize(
    checkpoint: Checkpoint, scheme: dict[str, Any], target: Path, device: str, chunks: list[list[int]] | None = None
) -> None:
    """Write `checkpoint`, quantised as `scheme` says, to `target`; `chunks`: calibration text as token ids, for GPTQ.

    Raises ValueError if the scheme does not fit the model or a weight is not finite, OSError if the disk is full;
    `target` is then left as it was.
    """
    names = linear_names(checkpoint.args, scheme)
    with torch.device("meta"):
        model = Transformer(checkpoint.args)
    swap_linears(model, scheme)
    with tqdm(total=len(names), unit="Linear") as bar:
        if chunks is None:
            modules = rounded_linears(checkpoint, scheme, names, device)
        else:
            modules = gptq_linears(checkpoint, scheme, chunks, device)
        source = TensorSource(checkpoint, names, modules, bar)
        tensors = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            dtype = torch.bfloat16 if isinstance(tensor, nn.Parameter) else tensor.dtype
            tensors[name] = tensor.shape, dtype, partial(source.fill, name)
        if model.output.weight is model.tok_embeddings.weight:  # tied, and not quantised
            del tensors["output.weight"]
        save_checkpoint(target, checkpoint.args, tensors, scheme)


def linears(args: ModelArgs, scheme: dict[str, Any]) -> list[tuple[str, nn.Linear]]:
    """Names and modules, without memory, of the Linears that `scheme` quantises in a model of this shape."""
    with torch.device("meta"):
        return list(quantized_linears(Transformer(args), scheme))


def linear_names(args: ModelArgs, scheme: dict[str, Any]) -> list[str]:
    return [name for name, _ in linears(args, scheme)]


def rounded_linears(
    checkpoint: Checkpoint, scheme: dict[str, Any], names: list[str], device: str
) -> Iterator[tuple[str, None, nn.Module]]:
    """Yield (name, None, the quantised Linear) for `names`, each weight rounded on its own."""
    for name in names:
        weight, bias = read_weight(checkpoint, name, device), checkpoint.tensors.get(f"{name}.bias")
        bias = None if bias is None else bias.load(device, torch.bfloat16)
        yield name, None, LINEARS[scheme["mode"]].from_float(weight, bias, **scheme)


class TensorSource:
    """Fills the new checkpoint's tensors; ask for them in the order in which `modules` yields the Linears."""

    def __init__(self, checkpoint: Checkpoint, names: list[str], modules: Iterator[tuple], bar: tqdm):
        self.checkpoint, self.names, self.modules, self.bar = checkpoint, set(names), modules, bar
        self.name, self.module = "", nn.Module()

    def fill(self, tensor: str, out: Tensor) -> None:
        name, _, part = tensor.rpartition(".")
        if name not in self.names:
            self.checkpoint.tensors[tensor].fill(out)
            check_finite(tensor, out)
            return
        while self.name != name:
            self.bar.set_description(name)
            self.name, error, self.module = next(self.modules)
            self.bar.update()
            if error is not None:
                self.bar.set_postfix_str(f"error {error:.1%}")
        out.copy_(getattr(self.module, part))


# ---- Calibration text.


def task_documents(names: list[str]) -> list[str]:
    """The documents of lm_eval tasks, questions with answers, from the training split where a task has one.

    Raises ValueError for a name that lm_eval does not know.
    """
    from lm_eval.tasks import get_task_dict

    from fast.harness import find_tasks

    found, texts = list(get_task_dict(*find_tasks(names, flag="--calibration_tasks")).values()), []
    while found:
        task = found.pop()
        if isinstance(task, dict):  # a group of tasks
            found += task.values()
            continue
        docs = task.training_docs() if task.has_training_docs() else task.eval_docs
        for doc in docs:
            answer = task.doc_to_target(doc)
            if isinstance(answer, int):
                answer = task.doc_to_choice(doc)[answer]
            texts.append(f"{task.doc_to_text(doc)}{task.config.target_delimiter}{answer}")
    return texts


def calibration_chunks(texts: list[str], tokenizer: Tokenizer, length: int, limit: int, widest: int) -> list[list[int]]:
    """At most `limit` rows of `length` token ids, spread evenly over `texts`.

    Raises ValueError for fewer tokens than `widest`, the most inputs of any Linear: its Hessian would be singular.
    """
    ids = [i for text in tqdm(texts, desc="tokenising", disable=len(texts) < 100) for i in tokenizer.encode(text)]
    chunks = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    step = max(1, len(chunks) // limit)
    chunks = chunks[::step][:limit]
    if len(chunks) * length < widest:
        raise ValueError(
            f"the calibration text gives {len(chunks)} sequences of {length} tokens, but the {widest} inputs of the "
            f"widest Linear need {-(-widest // length)}: give more text, or raise --calibration_limit"
        )
    return chunks


# ---- The command line.


# What a flag means that is not given. None is its default for the parser: a flag that a mode does not use is refused.
DEFAULTS: dict[str, Any] = {"groupsize": 32, "calibration_limit": 128, "percdamp": 0.01, "blocksize": 128}
DEFAULTS["calibration_tasks"] = ["wikitext"]
GPTQ = ("calibration_tasks", "calibration_file", "calibration_limit", "calibration_seq_length", "percdamp")
GPTQ += ("blocksize", "act_order")


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    add_model_flags(parser)
    add = parser.add_argument_group("the result").add_argument
    add("--mode", choices=LINEARS, default="int8", help="how weights are stored")
    add("--groupsize", type=int, choices=GROUP_SIZES, help="inputs that share a scale in int4 (default: 32)")
    add("--scale_search", action="store_true", help="int4: choose each group's scale for the least squared error")
    add("--skip", nargs="+", default=[], metavar="NAME", help="left in bf16, such as `output w2 layers.0.attention.wo`")
    add("--output_path", type=Path, help="a .pth (default: model_MODE.pth beside the input)")
    add = parser.add_argument_group("int4-gptq").add_argument
    add("--calibration_tasks", nargs="+", metavar="TASK", help="calibrate on lm_eval tasks (default: wikitext)")
    add("--calibration_file", type=Path, metavar="TEXT", help="calibrate on a text file instead")
    add("--calibration_limit", type=int, help="sequences at most (default: 128)")
    add("--calibration_seq_length", type=int, help="tokens in each (default: 2048, or what the model was made for)")
    add("--percdamp", type=float, help="damping, as a share of the Hessian's mean diagonal (default: 0.01)")
    add("--blocksize", type=int, help="columns between two updates of the rest (default: 128)")
    add("--act_order", action="store_true", help="round the columns that matter most first")
    return parser


def make_scheme(args: argparse.Namespace, model_args: ModelArgs) -> dict[str, Any]:
    """The scheme that the checkpoint will record. Raises ValueError if a name in --skip is no Linear of the model."""
    scheme: dict[str, Any] = {"mode": args.mode}
    if LINEARS[args.mode].in_groups:
        scheme["groupsize"] = args.groupsize
    if args.mode == "int4":
        scheme["scale_search"] = args.scale_search
    if args.mode == "int4-gptq":
        scheme |= {key: getattr(args, key) for key in ("percdamp", "blocksize", "act_order")}
        scheme["calibration"] = str(args.calibration_file or " ".join(args.calibration_tasks))
    names = linear_names(model_args, {})
    known = {*names, *(name.rpartition(".")[2] for name in names)}
    skip = ["output" if name == "lm_head" else name for name in args.skip]
    if unknown := sorted(set(skip) - known):
        kinds = sorted({name.rpartition(".")[2] for name in names})
        raise ValueError(
            f"--skip {' '.join(unknown)}: no such Linear; use {', '.join(kinds)} or a full name ({names[0]})"
        )
    return {**scheme, "skip": skip}


def check_args(args: argparse.Namespace) -> None:
    """Fill in defaults. Raise ValueError for numbers out of range and flags without effect, ImportError for lm_eval."""
    used = {"groupsize": LINEARS[args.mode].in_groups, "scale_search": args.mode == "int4"}
    used |= dict.fromkeys(GPTQ, args.mode == "int4-gptq")
    ignored = [name for name, is_used in used.items() if not is_used]
    refuse(args, build_parser(), f"--mode {args.mode} does not use everything that is given", *ignored)
    if args.calibration_file and args.calibration_tasks:
        raise ValueError("--calibration_file and --calibration_tasks: choose one of them")
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_at_least(args, 1, "calibration_limit", "calibration_seq_length", "blocksize")
    if not 0 < args.percdamp < 10:
        raise ValueError(f"--percdamp {args.percdamp}: give a share above 0, such as 0.01")
    if args.mode == "int4-gptq" and not args.calibration_file and find_spec("lm_eval") is None:
        raise ImportError(f"--calibration_tasks needs lm_eval: {INSTALL_LM_EVAL}, or give --calibration_file TEXT")


def check_output(target: Path, source: Path, args: ModelArgs, scheme: dict[str, Any]) -> list[Path]:
    """Say what `target` replaces; return the small files of the directory `source` that are missing beside it.

    Raises ValueError if `target` is not to be written: it is no result of this script, or lies beside another model.
    """
    from scripts.download import CONFIG_FILES  # imports huggingface_hub

    if target.suffix != ".pth":
        raise ValueError(f"--output_path {target}: give it a name that ends in .pth")
    check_writable(target)
    old = None
    if target.exists():
        with contextlib.suppress(ValueError, OSError):
            old = open_checkpoint(target)
        if old is None or old.quantization is None:
            raise ValueError(f"{target} is there and was not made by quantize.py: give another --output_path")
    missing = []
    for name in CONFIG_FILES:
        theirs, ours = source / name, target.parent / name
        if not ours.exists():
            missing += [theirs] if theirs.exists() else []
        elif not theirs.exists() or not filecmp.cmp(theirs, ours, shallow=False):
            raise ValueError(f"{ours} is not that of {source}: give another directory in --output_path")
    if old is not None and (old.args, old.quantization) != (args, scheme):
        say(f"replacing {target}, which was {describe(old.quantization)}")
    return missing


def describe(scheme: dict[str, Any]) -> str:
    """The settings in a line, such as `int4, groupsize 32, skip output w2`."""
    words = [scheme["mode"]]
    for key, value in scheme.items():
        if key != "mode" and value not in (False, []):
            words.append(key if value is True else f"{key} {' '.join(value) if isinstance(value, list) else value}")
    return ", ".join(words)


def calibrate(args: argparse.Namespace, model_args: ModelArgs, text: str | None) -> list[list[int]]:
    """The calibration text, or the documents of the tasks that the flags name, as token ids."""
    length = args.calibration_seq_length or min(2048, model_args.context_length)
    tokenizer = load_tokenizer(args.checkpoint_path, model_args.vocab_size)
    texts = task_documents(args.calibration_tasks) if text is None else [text]
    widest = max(linear.in_features for _, linear in linears(model_args, {}) if linear.n_experts == 1)
    chunks = calibration_chunks(texts, tokenizer, length, args.calibration_limit, widest)
    warn_beyond("--calibration_seq_length", length, model_args.context_length)
    return chunks


def run(args: argparse.Namespace) -> None:
    check_args(args)
    check_device(args.device)
    set_threads(args)
    text = read_text(args.calibration_file) if args.calibration_file else None
    args.checkpoint_path = find_checkpoint(args.checkpoint_path, args.download)
    checkpoint = open_checkpoint(args.checkpoint_path)
    if checkpoint.quantization is not None:
        mode = checkpoint.quantization["mode"]
        raise ValueError(f"{args.checkpoint_path} is quantised already ({mode}): give the unquantised checkpoint")
    scheme = make_scheme(args, checkpoint.args)
    directory = args.checkpoint_path if args.checkpoint_path.is_dir() else args.checkpoint_path.parent
    group = f".g{args.groupsize}" if "groupsize" in scheme else ""
    target = args.output_path or directory / f"model_{args.mode}{group}.pth"
    missing = check_output(target, directory, checkpoint.args, scheme)
    chunks = calibrate(args, checkpoint.args, text) if args.mode == "int4-gptq" else None
    quantize(checkpoint, scheme, target, args.device, chunks)
    for file in missing:
        with replacing(target.parent / file.name) as temporary:
            shutil.copyfile(file, temporary)
    report(checkpoint, scheme, target, missing)


def report(checkpoint: Checkpoint, scheme: dict[str, Any], target: Path, copied: list[Path]) -> None:
    n_linears, n_quantised = (len(linear_names(checkpoint.args, which)) for which in ({}, scheme))
    before = sum(math.prod(stored.shape) * stored.dtype.itemsize for stored in checkpoint.tensors.values())
    print(f"wrote {target}")
    print(f"  weights     {describe(scheme)}")
    print(f"  Linears     {n_quantised} quantised, {n_linears - n_quantised} left in bf16")
    print(f"  size        {before / 1e6:.1f} MB before, {target.stat().st_size / 1e6:.1f} MB now")
    print(f"  parameters  {count_parameters(checkpoint.args) / 1e6:.1f} M")
    if copied:
        print(f"  copied too  {', '.join(file.name for file in copied)}")
    if any((target.parent / name).exists() for name in TOKENIZER_FILES):
        script = os.path.relpath(Path(__file__).with_name("generate.py"))
        print(f"next: python {shlex.quote(script)} --compile --checkpoint_path {as_argument(target)}")


def main(argv: list[str] | None = None) -> int:
    with torch.no_grad():
        return exit_code(lambda: run(build_parser().parse_args(argv)), stopped="stopped; no checkpoint was written")


if __name__ == "__main__":
    sys.exit(main())
