"""Make a checkpoint smaller and faster: int8, grouped int4, or int4 rounded by GPTQ.

    python quantize.py --checkpoint_path checkpoints/$MODEL_REPO/model.pth --mode int4 --groupsize 32

Writes `model_int8.pth`, `model_int4.g32.pth` or `model_int4-gptq.g32.pth` beside the input; each works on every device.
Worth knowing: weights are quantised and written one Linear at a time; the file records how it was quantised.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fast.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from fast.cli import DEMO, check_at_least, check_device, check_writable, exit_code
from fast.gptq import check_finite, gptq_linears, read_weight
from fast.quantized import GROUP_SIZES, LINEARS, quantized_linears, swap_linears
from fast.tokenizer import Tokenizer, load_tokenizer, read_text
from model import ModelArgs, Transformer


def quantize(
    checkpoint: Checkpoint, scheme: dict[str, Any], target: Path, device: str, chunks: list[list[int]] | None = None
) -> None:
    """Write `checkpoint`, quantised as `scheme` says, to `target`; `chunks`: calibration text as token ids, for GPTQ.

    Raises ValueError if the scheme does not fit the model or a weight is not finite, OSError if the disk is full;
    `target` is then left as it was.
    """
    with torch.device("meta"):
        model = Transformer(checkpoint.args)
    names = [name for name, _ in quantized_linears(model, scheme)]
    # A quantised output projection is no longer the embedding table.
    args = dataclasses.replace(checkpoint.args, tie_embeddings=checkpoint.args.tie_embeddings and "output" not in names)
    with torch.device("meta"):
        model = Transformer(args)
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
        if args.tie_embeddings:
            del tensors["output.weight"]
        save_checkpoint(target, args, tensors, scheme)


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

    Raises ImportError without lm_eval, ValueError for a name it does not know.
    """
    try:
        from lm_eval.tasks import TaskManager, get_task_dict
    except ImportError:
        raise ImportError(
            "--calibration_tasks needs lm_eval: pip install 'lm_eval>=0.4.9,<0.5', or give --calibration_file TEXT"
        ) from None
    manager = TaskManager()
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ValueError(
            f"--calibration_tasks: lm_eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists them"
        )
    found, texts = list(get_task_dict(names, manager).values()), []
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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint_path", type=Path, default=DEMO, help="a .pth of ours or a Hugging Face directory (default: demo)")
    add("--mode", choices=LINEARS, default="int8")
    add("--groupsize", type=int, choices=GROUP_SIZES, default=32, help="inputs that share a scale in int4")
    add("--scale_search", action="store_true", help="int4: choose each group's scale for the least squared error")
    add("--skip", nargs="+", default=[], metavar="NAME", help="Linears to leave in bf16, as in `output w2 layers.0.wo`")
    add("--output_path", type=Path, help="default: model_MODE.pth beside the input")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    gptq = parser.add_argument_group("int4-gptq").add_argument
    gptq(
        "--calibration_tasks", nargs="+", default=["wikitext"], metavar="TASK", help="lm_eval tasks (default: wikitext)"
    )
    gptq("--calibration_file", type=Path, metavar="TEXT", help="calibrate on a text file instead")
    gptq("--calibration_limit", type=int, default=128, help="sequences at most (default: 128)")
    gptq("--calibration_seq_length", type=int, help="tokens in each (default: 2048, or what the model was made for)")
    gptq("--percdamp", type=float, default=0.01, help="damping, as a share of the Hessian's mean diagonal")
    gptq("--blocksize", type=int, default=128, help="columns between two updates of the rest")
    gptq("--act_order", action="store_true", help="round the columns that matter most first")
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
    with torch.device("meta"):
        names = [name for name, _ in quantized_linears(Transformer(model_args), {})]
    known = {*names, *(name.rpartition(".")[2] for name in names)}
    skip = ["output" if name == "lm_head" else name for name in args.skip]
    if unknown := sorted(set(skip) - known):
        kinds = sorted({name.rpartition(".")[2] for name in names})
        raise ValueError(
            f"--skip {' '.join(unknown)}: no such Linear; use {', '.join(kinds)} or a full name ({names[0]})"
        )
    return {**scheme, "skip": skip}


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError for a number that is out of range."""
    check_at_least(args, 1, "calibration_limit", "calibration_seq_length", "blocksize")
    if not 0 < args.percdamp < 10:
        raise ValueError(f"--percdamp {args.percdamp}: give a share above 0, such as 0.01")


def calibrate(args: argparse.Namespace, model_args: ModelArgs) -> list[list[int]]:
    """The calibration text that the flags name, as token ids."""
    length = args.calibration_seq_length or min(2048, model_args.context_length)
    if length > model_args.context_length:
        raise ValueError(
            f"--calibration_seq_length {length}: this model takes at most {model_args.context_length} tokens"
        )
    tokenizer = load_tokenizer(args.checkpoint_path)
    texts = [read_text(args.calibration_file)] if args.calibration_file else task_documents(args.calibration_tasks)
    widest = max(model_args.hidden_dim, model_args.dim, model_args.n_heads * model_args.head_dim)
    return calibration_chunks(texts, tokenizer, length, args.calibration_limit, widest)


def run(args: argparse.Namespace) -> None:
    check_args(args)
    check_device(args.device)
    checkpoint = open_checkpoint(args.checkpoint_path)
    if checkpoint.quantization is not None:
        mode = checkpoint.quantization["mode"]
        raise ValueError(f"{args.checkpoint_path} is quantised already ({mode}): give the unquantised checkpoint")
    scheme = make_scheme(args, checkpoint.args)
    directory = args.checkpoint_path if args.checkpoint_path.is_dir() else args.checkpoint_path.parent
    group = f".g{args.groupsize}" if "groupsize" in scheme else ""
    target = args.output_path or directory / f"model_{args.mode}{group}.pth"
    if target.exists() and args.checkpoint_path.exists() and target.samefile(args.checkpoint_path):
        raise ValueError(f"--output_path {target} is the input: name another file")
    check_writable(target)
    chunks = calibrate(args, checkpoint.args) if args.mode == "int4-gptq" else None
    quantize(checkpoint, scheme, target, args.device, chunks)
    print(f"wrote {target}: {target.stat().st_size / 1e6:.1f} MB, {scheme}")
    print(f"next: python generate.py --compile --checkpoint_path {target}")


def main(argv: list[str] | None = None) -> int:
    with torch.no_grad():
        return exit_code(lambda: run(build_parser().parse_args(argv)), stopped="stopped; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
