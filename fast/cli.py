"""What the command lines share: the demo model, the device, the dtype, loading.

device, dtype = resolve_device(args)
model, tokenizer = load(args.checkpoint_path, device, dtype)
"""

import argparse
from pathlib import Path

import torch

from fast.checkpoint import load_model
from fast.tokenizer import Tokenizer, load_tokenizer
from model import Transformer
from tp import ALONE, Ranks

CACHE_DTYPES = {"auto": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
DEMO = Path(__file__).resolve().parent.parent / "demo" / "target"


def check_device(device: str) -> None:
    """Raise ValueError, in one line, for a device that this machine lacks."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from None


def resolve_device(args: argparse.Namespace) -> tuple[str, torch.dtype]:
    """The device and dtype to run in. Raises ValueError for a device this machine lacks."""
    check_device(args.device)
    old_gpu = args.device.startswith("cuda") and torch.cuda.get_device_capability(args.device) < (8, 0)
    return args.device, getattr(torch, args.dtype or ("float16" if old_gpu else "bfloat16"))


def resolve_kv_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """What `--kv_dtype` says, for `setup_caches`. Raises ValueError for a type that this GPU lacks."""
    if args.kv_dtype == "fp8" and args.device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(args.device)
        if (major, minor) < (8, 9):
            raise ValueError(f"--kv_dtype fp8 needs compute capability 8.9, this GPU has {major}.{minor}: use int8")
    return CACHE_DTYPES[args.kv_dtype]


def load(path: Path, device: str, dtype: torch.dtype, ranks: Ranks = ALONE) -> tuple[Transformer, Tokenizer]:
    """The model at `path`, a `.pth` of ours or a Hugging Face directory, and the tokenizer that lies with it."""
    model = load_model(path, device=device, dtype=dtype, ranks=ranks)
    return model, load_tokenizer(path)
