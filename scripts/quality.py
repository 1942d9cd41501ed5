"""What quantising costs in quality: a model in every mode, its size and its perplexity on a text, as one table.

    python scripts/quality.py
    python scripts/quality.py --checkpoint_path DIR --text test.txt --calibration_file train.txt

Without flags the demo model on its held-out text, calibrated on the text that it was trained on. Worth knowing: "lost"
is the perplexity above that of the weights as they were; what GPTQ is for is to lose less of it than rounding does.
"""

import argparse
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _root  # noqa: F401 - finds the modules of the repository's root
import torch

import quantize
from demo.corpus import read_documents, split_corpus
from fast.checkpoint import load_model, open_checkpoint
from fast.cli import check_device, exit_code
from fast.perplexity import perplexity
from fast.tokenizer import load_tokenizer, read_text

ROOT = Path(__file__).resolve().parent.parent
GPTQ = {"percdamp": 0.01, "blocksize": 128, "act_order": False}


def schemes() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, what `quantize.quantize` takes) for every row of the table but the first."""
    yield "int8", {"mode": "int8"}
    for groupsize in (32, 128):
        int4 = {"groupsize": groupsize}
        yield f"int4 g{groupsize}", {"mode": "int4", **int4}
        yield f"int4 g{groupsize} --scale_search", {"mode": "int4", **int4, "scale_search": True}
        yield f"int4-gptq g{groupsize}", {"mode": "int4-gptq", **int4, **GPTQ}
        yield f"int4-gptq g{groupsize} --act_order", {"mode": "int4-gptq", **int4, **GPTQ, "act_order": True}


def demo_training_text() -> str:
    """What the demo models were trained on, as this installation of Python carries it."""
    training, _ = split_corpus(read_documents(Path(sysconfig.get_path("stdlib"))))
    return "\n".join(paragraph for document in training for paragraph in document)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint_path", type=Path, default=quantize.DEMO, help="a directory or .pth (default: demo)")
    add("--text", type=Path, default=ROOT / "demo" / "heldout.txt", help="text to score (default: demo/heldout.txt)")
    add("--calibration_file", type=Path, help="text for GPTQ (default: the demo's training text)")
    add("--calibration_limit", type=int, default=128, help="sequences at most")
    add("--window", type=int, default=512, help="tokens of a window of text, and of a calibration sequence")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def run(args: argparse.Namespace) -> None:
    check_device(args.device)
    checkpoint, tokenizer = open_checkpoint(args.checkpoint_path), load_tokenizer(args.checkpoint_path)
    ids = tokenizer.encode(read_text(args.text))
    calibration = read_text(args.calibration_file) if args.calibration_file else demo_training_text()
    sizes = checkpoint.args
    widest = max(sizes.hidden_dim, sizes.dim, sizes.n_heads * sizes.head_dim)
    chunks = quantize.calibration_chunks([calibration], tokenizer, args.window, args.calibration_limit, widest)

    def score(path: Path) -> float:
        model = load_model(path, args.device)
        return perplexity(model, ids, args.window, args.window, progress=True).perplexity

    exact, lost = score(args.checkpoint_path), {}
    print(f"{args.checkpoint_path} on {args.text}, {len(ids)} tokens in windows of {args.window}\n")
    print("| weights | MB | perplexity | lost | of what rounding loses |")
    print("|---|---|---|---|---|")
    print(f"| bf16 | {sum(stored_bytes(t) for t in checkpoint.tensors.values()) / 1e6:.1f} | {exact:.3f} | | |")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        for name, scheme in schemes():
            quantize.quantize(checkpoint, scheme, path, args.device, chunks if scheme["mode"] == "int4-gptq" else None)
            found = score(path)
            lost[name] = found - exact
            rounded = lost.get(f"int4 g{scheme.get('groupsize')}", 0)
            share = f"{lost[name] / rounded:.0%}" if rounded and lost[name] != rounded else ""
            size = path.stat().st_size / 1e6
            print(f"| {name} | {size:.1f} | {found:.3f} | {lost[name]:+.3f} ({lost[name] / exact:+.2%}) | {share} |")


def stored_bytes(stored) -> int:
    return torch.Size(stored.shape).numel() * stored.dtype.itemsize


def main(argv: list[str] | None = None) -> int:
    with torch.no_grad():
        return exit_code(lambda: run(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
