"""The tokenizer in a GGUF file of llama.cpp.

    parts = read_tokenizer("SmolLM2-135M-Instruct.Q4_1.gguf")

Byte-level BPE becomes a tokenizer of the package `tokenizers`; SentencePiece, of which the file holds the pieces, their
scores and types, the bytes of a SentencePiece model again.
"""

import struct
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from fast.gguf import read_header
from fast.ranks import LLAMA3_SPLIT
from fast.reading import check, require

# Names of pre-tokenizers -> the patterns that split a text into words, one after the other.
# https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp names the models.
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2_SPLIT,),
    **dict.fromkeys(("smollm", "refact", "starcoder"), (r"\p{N}", _GPT2_SPLIT)),
    **dict.fromkeys(("llama-bpe", "llama-v3", "llama3", "dbrx", "smaug-bpe"), (LLAMA3_SPLIT,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN2_SPLIT,)),
    "tekken": (_TEKKEN_SPLIT,),
    "gpt-4o": (_GPT4O_SPLIT,),
}
WHOLE_WORDS = ("llama-bpe", "llama-v3", "llama3", "tekken")  # a word that is a token is not merged; BOS by default
UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(2, 7)  # types of tokens, as in SentencePiece; 1: normal
SPLIT_AT = UNKNOWN, CONTROL, USER_DEFINED
SPECIAL = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id", "pad_token": "padding_token_id",
}  # fmt: skip
# Tokens that end a turn or a text, whatever the metadata says: they name one, and chats often end with another.
ENDS = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
)  # fmt: skip


class Vocabulary(TypedDict):
    tokens: list[str]
    token_type: list[int]


class Metadata(Vocabulary, total=False):
    """What is read of a file's metadata, without `tokenizer.ggml.`."""

    scores: list[float]
    merges: list[str]
    add_bos_token: bool
    add_space_prefix: bool
    bos_token_id: int
    eos_token_id: int
    unknown_token_id: int
    padding_token_id: int
    eot_token_id: int
    eom_token_id: int


class TokenizerParts(NamedTuple):
    """What `tokenizer.load_tokenizer` makes a Tokenizer of.

    model: a Tokenizer of the package `tokenizers`, or a SentencePiece model's bytes. special: named tokens, such as
    {"bos_token": "<s>"}. added: tokens that texts are split at, as in tokenizer_config.json. adds_bos: to every text.
    stop_ids: tokens that end a generation. template: the chat template's source, "" if there is none.
    """

    model: Any
    special: dict[str, str]
    added: list[dict[str, Any]]
    adds_bos: bool
    stop_ids: list[int]
    template: str


def read_tokenizer(path: str | Path) -> TokenizerParts:
    """The tokenizer in the file at `path`.

    Raises ValueError, one line, for a damaged file, and a kind of tokenizer or of pre-tokenizer that is not known;
    ImportError with the command to run if the package for it is missing.
    """
    metadata = {key.removeprefix("tokenizer.ggml."): value for key, value in read_header(path).metadata.items()}
    model, pre = metadata.get("model"), metadata.get("pre")
    if str(model) not in ("gpt2", "llama"):
        raise ValueError(f"{path}: tokenizer {model!r:.80} is not supported; supported: gpt2, llama")
    if model == "gpt2" and str(pre) not in PRE_TOKENIZERS:
        supported = ", ".join(PRE_TOKENIZERS)
        raise ValueError(f"{path}: pre-tokenizer {pre!r:.80} is not supported; supported: {supported}")
    # All of an array are of one type.
    check({key: value[:1] if isinstance(value, list) else value for key, value in metadata.items()}, Metadata)
    for key in ("eot_token_id", "eom_token_id", *SPECIAL.values()):
        if not 0 <= metadata.get(key, 0) < len(metadata["tokens"]):
            raise ValueError(f"{path}: {key} is {metadata[key]}; expected the number of a token")
    try:
        tokens = metadata["tokens"]
        special = {name: tokens[metadata[key]] for name, key in SPECIAL.items() if key in metadata}
        if model == "llama":
            made, added = _sentencepiece(metadata, special), []
        else:
            made, added = _byte_level_bpe(metadata)
    except ImportError:
        raise
    except Exception as error:  # the package tokenizers raises nothing narrower
        raise ValueError(f"{path}: not a whole tokenizer ({error!r:.80}): download it again") from error
    stop_ids = [metadata[key] for key in ("eot_token_id", "eom_token_id") if key in metadata]
    stop_ids += [i for i, token in enumerate(tokens) if token in ENDS]
    check(template := metadata.get("tokenizer.chat_template", ""), str, "tokenizer.chat_template")
    adds_bos = metadata.get("add_bos_token", model == "llama" or pre in WHOLE_WORDS)
    return TokenizerParts(made, special, added, adds_bos, stop_ids, template)


def _byte_level_bpe(metadata: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """The tokenizer, of the package `tokenizers`, and the tokens at which it is to split texts."""
    tokenizers = require("tokenizers")
    typed = list(zip(metadata["tokens"], metadata["token_type"], strict=True))
    vocab = {token: i for i, (token, kind) in enumerate(typed) if kind != UNUSED}  # those fill up the embeddings
    merges = [tuple(merge.split(" ")) for merge in metadata["merges"]]
    pre = metadata["pre"]
    encoder = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=pre in WHOLE_WORDS))
    words = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(split), "isolated") for split in PRE_TOKENIZERS[pre]]
    spell = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*words, spell])
    encoder.decoder = tokenizers.decoders.ByteLevel()
    if pre == "qwen2":  # llama.cpp does not, but Qwen's own tokenizer does
        encoder.normalizer = tokenizers.normalizers.NFC()
    added = [{"content": token, "special": kind != USER_DEFINED} for token, kind in typed if kind in SPLIT_AT]
    return encoder, added


def _sentencepiece(metadata: dict[str, Any], special: dict[str, str]) -> bytes:
    """The SentencePiece model that the file was made from, of BPE by scores.

    https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
    """
    pieces = []
    for piece, score, kind in zip(metadata["tokens"], metadata["scores"], metadata["token_type"], strict=True):
        spelled = piece.replace(" ", "\u2581") if kind == USER_DEFINED else piece
        pieces.append(_field(1, _field(1, spelled.encode()) + _field(2, score) + _field(3, kind)))
    trainer = _field(3, 2) + _field(35, int(BYTE in metadata["token_type"]))
    for number, name in ((45, "unk_token"), (46, "bos_token"), (47, "eos_token"), (48, "pad_token")):
        trainer += _field(number, special[name].encode()) if name in special else b""
    normalizer = _field(3, int(metadata.get("add_space_prefix", True))) + _field(4, 0)  # keeps double spaces
    return b"".join(pieces) + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | float | bytes) -> bytes:
    """A field of a protobuf message: https://protobuf.dev/programming-guides/encoding"""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])
