"""GGUF, the files of llama.cpp, mapped to memory: the model; `gguf_tokenizer.py` reads the tokenizer beside it.

    args, parts, packed, naming = read_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")

Worth knowing: the header is read here, 20 times as fast as the package `gguf` reads it. The package is needed for
tensors in other types than PACKED and FLOATS. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import re
import struct
import sys
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fast.config import make_args, read
from fast.families import Naming, args_from_hf
from fast.published import Packed
from fast.quantized import pack_nibbles
from fast.reading import require
from fast.stored import Part, part_of
from model import ModelArgs, RopeScaling

MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # as in struct
STRING, ARRAY = 8, 9
FLOATS = {0: ("F32", torch.float32), 1: ("F16", torch.float16), 30: ("BF16", torch.bfloat16)}
DTYPES = dict(FLOATS.values())
PACKED = {2: ("Q4_0", 18), 3: ("Q4_1", 20), 8: ("Q8_0", 34)}  # which Linears hold as they are; bytes of a block
BLOCK = 32  # weights that share a scale in these

# Our module -> llama.cpp's, as `families.HF_MODULES`.
MODULES: dict[str, tuple[str, ...]] = {
    "tok_embeddings": ("token_embd",),
    "layers.{}.attention_norm": ("blk.{}.attn_norm",),
    "layers.{}.attention.wqkv": ("blk.{}.attn_q", "blk.{}.attn_k", "blk.{}.attn_v"),
    "layers.{}.attention.q_norm": ("blk.{}.attn_q_norm",),
    "layers.{}.attention.k_norm": ("blk.{}.attn_k_norm",),
    "layers.{}.attention.wo": ("blk.{}.attn_output",),
    "layers.{}.attention_post_norm": ("blk.{}.post_attention_norm",),
    "layers.{}.ffn_norm": ("blk.{}.ffn_norm",),
    "layers.{}.ffn_post_norm": ("blk.{}.post_ffw_norm",),
    "layers.{}.feed_forward.w13": ("blk.{}.ffn_gate", "blk.{}.ffn_up"),
    "layers.{}.feed_forward.w2": ("blk.{}.ffn_down",),
    "layers.{}.feed_forward.router": ("blk.{}.ffn_gate_inp",),
    "layers.{}.feed_forward.experts.w13": ("blk.{}.ffn_gate.{}", "blk.{}.ffn_up.{}"),
    "layers.{}.feed_forward.experts.w2": ("blk.{}.ffn_down.{}",),
    "norm": ("output_norm",),
}
PHI3_MODULES = {
    **MODULES,
    "layers.{}.attention.wqkv": ("blk.{}.attn_qkv",),
    "layers.{}.feed_forward.w13": ("blk.{}.ffn_up",),
}
# `general.architecture` -> the family, and the naming: llama.cpp rotates neighbours in what descends from its Llama.
ARCHITECTURES: dict[str, tuple[str, Naming]] = {
    "llama": ("LlamaForCausalLM", Naming(MODULES, pairs="neighbours")),  # Mistral and Mixtral, too
    "qwen2": ("Qwen2ForCausalLM", Naming(MODULES)),
    "qwen3": ("Qwen3ForCausalLM", Naming(MODULES)),
    "qwen3moe": ("Qwen3MoeForCausalLM", Naming(MODULES)),
    "gemma3": ("Gemma3ForCausalLM", Naming(MODULES)),
    "phi3": ("Phi3ForCausalLM", Naming(PHI3_MODULES)),
    "granite": ("GraniteForCausalLM", Naming(MODULES, pairs="neighbours")),
    "smollm3": ("SmolLM3ForCausalLM", Naming(MODULES, pairs="neighbours")),
}
# Key of config.json -> of the metadata, after the architecture's name.
REQUIRED_KEYS: dict[str, str] = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
KEYS: dict[str, str] = {
    **REQUIRED_KEYS,
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "rope_local_base_freq": "rope.freq_base_swa",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
ROPE_KEYS: dict[str, str] = {
    "rope_type": "type",
    "factor": "factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
LLAMA3_FACTORS = "rope_freqs.weight"
LONGROPE_FACTORS = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}


class Raw(NamedTuple):
    """A tensor as the file holds it: its GGML type's name, its shape, and uint8 `[rows, bytes per row]`, mapped."""

    type: str
    shape: tuple[int, ...]
    data: Tensor


class Header(NamedTuple):
    """Metadata by key; shape, number of the GGML type and offset of every tensor; and the bytes of the file, mapped."""

    metadata: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], int, int]]
    data: Tensor


def read_gguf(path: str | Path) -> tuple[ModelArgs, dict[str, Part], dict[str, Packed], Naming]:
    """The model's arguments, its tensors by the file's names, weights for `published.assign`, and what the names mean.

    Weights in Q4_0, Q4_1 and Q8_0 are there as they are. In other types, which is said on stderr, a quantised tensor is
    a computed Part in float32: its rows are dequantised when they are read.
    Raises ValueError, one line, for a damaged file, one that holds no whole language model, and an architecture or a
    setting that this Transformer does not compute; ImportError if the package is needed and missing.
    """
    header = read_header(path)
    metadata, tensors = header.metadata, read_tensors(path, header)
    architecture = metadata.get("general.architecture")
    kind = "mmproj" if architecture == "clip" else metadata.get("general.type", "model")
    if kind != "model":
        kind = "a vision projector (mmproj)" if kind == "mmproj" else f"of type {kind!r:.80}"
        raise ValueError(f"{path} is {kind}, not a language model: give the .gguf of the model that it belongs to")
    if (n_files := metadata.get("split.count", 1)) not in (0, 1):
        remedy = "join them with llama-gguf-split --merge and give the result"
        raise ValueError(f"{path} is one of {n_files!r:.80} files that hold a model: {remedy}")
    if str(architecture) not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise ValueError(f"{path}: architecture {architecture!r:.80} is not supported; supported: {supported}")
    missing = [f"{architecture}.{key}" for key in REQUIRED_KEYS.values() if f"{architecture}.{key}" not in metadata]
    n_layers = metadata.get(f"{architecture}.block_count")
    some = ["token_embd.weight", *([f"blk.{n_layers - 1}.attn_norm.weight"] if isinstance(n_layers, int) else [])]
    missing += [name for name in some if name not in tensors]
    if missing:
        raise ValueError(f"{path} holds no whole model: missing {', '.join(missing)}")
    try:
        args = _args(architecture, metadata, tensors)
    except ValueError as error:  # which names the keys of config.json
        theirs = {key: f"{architecture}.{name}" for key, name in KEYS.items()}
        message = re.sub(r"\w+", lambda word: theirs.get(word[0], word[0]), str(error))
        raise ValueError(f"{path}: {message}") from error
    factors = (LLAMA3_FACTORS, *LONGROPE_FACTORS.values())
    parts, packed = {}, {}
    for name, raw in tensors.items():
        if raw.type in dict(PACKED.values()) and len(raw.shape) == 2:
            packed[name.removesuffix(".weight")] = _packed(raw)
        elif name not in factors:
            parts[name] = _part(raw)
    if types := sorted({raw.type for raw in tensors.values()} - DTYPES.keys() - dict(PACKED.values()).keys()):
        print(f"{path}: dequantised, as no Linear here holds such weights: {', '.join(types)}", file=sys.stderr)
    return args, parts, packed, ARCHITECTURES[architecture][1]


def is_gguf(path: Path) -> bool:
    """Whether the file at `path` is one, by its name or by how it begins."""
    with open(path, "rb") as file:
        return path.suffix == ".gguf" or file.read(4) == MAGIC


def read_header(path: str | Path) -> Header:
    """What the file at `path` says of its tensors and its tokenizer. Raises ValueError if it is no whole GGUF file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: " + ("not a file" if Path(path).exists() else "no such file or directory"))
    data = torch.from_file(str(path), size=Path(path).stat().st_size, dtype=torch.uint8)  # private: never written
    cursor = _Cursor(data)
    try:
        magic, version = cursor.unpack("4sI")
        if magic != MAGIC:
            raise ValueError(f"{path} is not a GGUF file: it begins with {magic!r}, expected {MAGIC!r}")
        if version not in (2, 3):
            found = "big-endian" if version >> 16 else f"of version {version}"
            raise ValueError(f"{path}: a GGUF file that is {found}; expected version 2 or 3, little-endian")
        n_tensors, n_keys = cursor.unpack("QQ")
        metadata = {cursor.string(): cursor.value() for _ in range(n_keys)}
        tensors = {cursor.string(): cursor.tensor() for _ in range(n_tensors)}
        start = cursor.at + -cursor.at % int(metadata.get("general.alignment", 32))
    except (struct.error, KeyError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{path} is not a whole GGUF file: download it again") from error
    return Header(metadata, {name: (shape, kind, start + at) for name, (shape, kind, at) in tensors.items()}, data)


def read_tensors(path: str | Path, header: Header | None = None) -> dict[str, Raw]:
    """The tensors as the file holds them; experts one by one, as `blk.{layer}.ffn_gate.{expert}.weight`.

    Raises ValueError for a file that ends too early, and a type that the package `gguf` does not dequantise.
    """
    header = header or read_header(path)
    found = {}
    for name, (shape, number, start) in header.tensors.items():
        try:
            kind, width, n_bytes = _block(number)
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{path}: {name} has GGML type {number}, which cannot be dequantised") from error
        n_rows, row_bytes = prod(shape[:-1]), shape[-1] // width * n_bytes
        end = start + n_rows * row_bytes
        if shape[-1] % width or start % 4 or end > len(header.data) or 0 in shape:
            raise ValueError(f"{path} is damaged, or ends before its tensor {name}: download it again")
        data = header.data[start:end].view(n_rows, row_bytes)
        if len(shape) == 3:  # as older files name experts, which have a tensor each
            names = [name.replace("_exps.", f".{i}.") for i in range(shape[0])]
            found |= {name: Raw(kind, shape[1:], rows) for name, rows in zip(names, data.chunk(shape[0]), strict=True)}
        else:
            found[name] = Raw(kind, shape, data)
    return found


class _Cursor:
    """Reads the values of a header, one after the other; struct.error or KeyError if it is damaged."""

    def __init__(self, data: Tensor):
        self.data, self.at = memoryview(data.numpy()), 0

    def unpack(self, form: str) -> tuple:
        values = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return values

    def string(self) -> str:
        (length,) = self.unpack("Q")
        self.at += length
        if self.at > len(self.data):
            raise struct.error
        return bytes(self.data[self.at - length : self.at]).decode(errors="replace")

    def value(self) -> Any:
        (kind,), n = self.unpack("I"), None
        if kind == ARRAY:
            kind, n = self.unpack("IQ")
        if kind == STRING:
            return self.string() if n is None else [self.string() for _ in range(n)]
        values = self.unpack(f"{1 if n is None else n}{SCALARS[kind]}")
        return values[0] if n is None else list(values)

    def tensor(self) -> tuple[tuple[int, ...], int, int]:
        (n_dims,) = self.unpack("I")
        if not 1 <= n_dims <= 4:
            raise struct.error
        *dims, kind, offset = self.unpack(f"{n_dims}QIQ")
        return tuple(reversed(dims)), kind, offset  # the file has the innermost first


def _args(architecture: str, metadata: dict[str, Any], tensors: dict[str, Raw]) -> ModelArgs:
    """The arguments, by way of the config.json from which the file was made. A value of 0 is as good as absent."""
    found = {key: metadata.get(f"{architecture}.{theirs}") for key, theirs in KEYS.items()}
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture][0]],
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": 1e4,
        "num_key_value_heads": None,
        "norm_topk_prob": True,
        "dtype": "bfloat16",  # of training: only Gemma's code asks, and Gemma's is
        **{key: value for key, value in found.items() if value},
    }
    if architecture == "llama" and "num_local_experts" in config:
        config["architectures"] = ["MixtralForCausalLM"]
    width = read(config, "hidden_size", int) // read(config, "num_attention_heads", int)
    head_dim = config["head_dim"] = read(config, "head_dim", int, width)
    # Gemma 3: llama.cpp, too, recognises the 27B model, whose scores are divided by another number, by its layers.
    config["query_pre_attn_scalar"] = width if config.get("num_hidden_layers") == 62 else head_dim
    rotary_dim = read(metadata, f"{architecture}.rope.dimension_count", int, head_dim)
    config["partial_rotary_factor"] = rotary_dim / head_dim

    rope = {key: metadata.get(f"{architecture}.rope.scaling.{theirs}") for key, theirs in ROPE_KEYS.items()}
    rope = {key: value for key, value in rope.items() if value}
    if factors := {key: _floats(tensors[name]) for key, name in LONGROPE_FACTORS.items() if name in tensors}:
        attention = metadata.get(f"{architecture}.rope.scaling.attn_factor")
        rope |= {"rope_type": "longrope", "attention_factor": attention, **factors}
    if rope.get("rope_type", "linear" if "factor" in rope else "none") != "none":
        config["rope_scaling"] = {"rope_type": "linear", **rope}
    biases = {"qkv_bias": "attn_q", "out_bias": "attn_output", "mlp_bias": "ffn_gate"}
    changes: dict[str, Any] = {name: f"blk.0.{theirs}.bias" in tensors for name, theirs in biases.items()}
    changes["norm_offset"] = 0.0  # Gemma's: files have it in the weights
    if LLAMA3_FACTORS in tensors:
        if len(factors := _floats(tensors[LLAMA3_FACTORS])) != head_dim // 2:
            raise ValueError(f"{LLAMA3_FACTORS} has {len(factors)} numbers, expected {head_dim // 2}")
        changes["rope_scaling"] = RopeScaling(tuple(factors))
    return make_args({**vars(args_from_hf(config)), **changes})


@cache
def _block(number: int) -> tuple[str, int, int]:
    """The name of a GGML type, and elements and bytes of its blocks."""
    if number in FLOATS:
        return FLOATS[number][0], 1, FLOATS[number][1].itemsize
    if number in PACKED:
        return PACKED[number][0], BLOCK, PACKED[number][1]
    gguf = require("gguf", "file")
    kind = gguf.GGMLQuantizationType(number)
    width, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    gguf.dequantize(torch.zeros(1, n_bytes, dtype=torch.uint8).numpy(), kind)  # NotImplementedError, if it cannot
    return kind.name, width, n_bytes


def _part(raw: Raw) -> Part:
    if raw.type in DTYPES:
        return part_of(raw.data.view(DTYPES[raw.type]).view(raw.shape))
    return Part(raw.shape, torch.float32, partial(_dequantize, raw), is_computed=True)


def _packed(raw: Raw) -> Packed:
    """Blocks of 32 weights w: a scale d, in Q4_1 the lowest weight m, and integers q; w = d q in Q8_0, d (q - 8) in
    Q4_0, d q + m in Q4_1. Byte j of 4-bit ones holds weight j in its low half and weight j + 16 in the high one.
    """
    blocks = raw.data.view(raw.shape[0], raw.shape[1] // BLOCK, -1)
    halves = blocks[..., :4].view(torch.float16)
    scales = halves[..., 0]
    if raw.type == "Q8_0":
        weights = blocks[..., 2:].view(torch.int8)
        return Packed(8, raw.shape, lambda o: weights[o].flatten(1), scales, zeros=lambda o: 0 * scales[o])

    def nibbles(outputs: slice | Tensor) -> Tensor:
        q = blocks[outputs][..., -BLOCK // 2 :]
        return pack_nibbles(torch.cat((q & 0xF, q >> 4), dim=-1).flatten(1))

    def lowest(outputs: slice | Tensor) -> Tensor:
        return halves[outputs][..., 1] if raw.type == "Q4_1" else -8 * scales[outputs]

    return Packed(4, raw.shape, nibbles, scales, lowest, "lowest")


def _dequantize(raw: Raw, first: int, end: int) -> Tensor:
    gguf = require("gguf", "file")
    values = gguf.dequantize(raw.data[first:end].numpy(), gguf.GGMLQuantizationType[raw.type])
    return torch.from_numpy(values).view(-1, *raw.shape[1:])


def _floats(raw: Raw) -> list[float]:
    return _part(raw).read().float().tolist()
