"""Convert a downloaded model to this project's format: one file, `DIR/model.pth`, which is memory-mapped when loaded.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/meta-llama/Llama-3.2-1B

Worth knowing: tensors are read, converted and written one at a time, so a model larger than the memory can be
converted too. The file gets its name only once it is complete.
"""

import math
import sys
from pathlib import Path

import _root  # noqa: F401 - finds the modules of the repository's root
import torch
from tqdm import tqdm

from fast.checkpoint import open_checkpoint, save_checkpoint
from fast.cli import Parser, as_argument, exit_code
from fast.gguf import is_gguf
from fast.metrics import count_parameters
from fast.stored import Stored

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def convert(directory: Path, dtype: torch.dtype) -> Path:
    """Write `model.pth` into the directory, or `X.pth` beside an `X.gguf`, print its size and return its path.

    dtype: of every tensor but those of quantised Linears. Raises ValueError if `open_checkpoint` cannot read the
    checkpoint, OSError if the file cannot be written.
    """
    if not directory.is_dir() and not (directory.is_file() and is_gguf(directory)):
        raise ValueError(f"{directory} is neither a directory nor a GGUF file")
    checkpoint = open_checkpoint(directory)
    target = directory / "model.pth" if directory.is_dir() else directory.with_suffix(".pth")
    dtypes = {name: checkpoint.fixed.get(name, dtype) for name in checkpoint.tensors}
    sizes = {name: math.prod(stored.shape) for name, stored in checkpoint.tensors.items()}
    total = sum(n * dtypes[name].itemsize for name, n in sizes.items())
    with tqdm(total=total, unit="B", unit_scale=True, desc=str(target)) as bar:

        def filler(stored: Stored):
            def fill(out: torch.Tensor) -> None:
                stored.fill(out)
                bar.update(out.nbytes)

            return fill

        tensors = {name: (stored.shape, dtypes[name], filler(stored)) for name, stored in checkpoint.tensors.items()}
        save_checkpoint(target, checkpoint.args, tensors, checkpoint.quantization)
    size = f"{count_parameters(checkpoint.args):,} parameters, {target.stat().st_size / 1e9:.3f} GB"
    print(f"wrote {target}: {size}" + (f", {checkpoint.quantization['mode']}" if checkpoint.quantization else ""))
    return target


def main() -> int:
    parser = Parser("Convert a Hugging Face, Meta or llama.cpp checkpoint to DIR/model.pth.")
    parser.add_argument(
        "--checkpoint_dir", type=Path, required=True, metavar="DIR", help="directory of the model, or a .gguf"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights")
    args = parser.parse_args()

    def work() -> None:
        target = convert(args.checkpoint_dir, DTYPES[args.dtype])
        print(f"next: python generate.py --checkpoint_path {as_argument(target)}")

    return exit_code(work, stopped="stopped; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
