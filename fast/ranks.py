"""Tokenizers that are ranked byte strings: Llama 3's `tokenizer.model` (tiktoken) and Mistral's `tekken.json`.

    encoder = from_tekken(Path("tekken.json").read_bytes(), Path("tekken.json"), tokenizers)

Both are given as a BPE of the `tokenizers` package. tiktoken merges the two neighbours whose concatenation has the
lowest rank. So each split of a token into two tokens is a merge, in order of the token's rank. `ignore_merges`: a word
that is a token is taken whole.
"""

import base64
import json
from pathlib import Path
from types import ModuleType

# The special tokens that follow Llama 3's ranks, 256 in all (3.0 has the same ids, fewer of them named).
# https://github.com/meta-llama/llama-models/blob/main/models/llama3/tokenizer.py
_LLAMA3_NAMES = (
    "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id "
    "step_id start_header_id end_header_id eom_id eot_id python_tag"
)
_LLAMA3_SPECIAL = [f"<|{name}|>" for name in _LLAMA3_NAMES.split()]
_LLAMA3_SPECIAL += [f"<|reserved_special_token_{i}|>" for i in range(2, 258 - len(_LLAMA3_SPECIAL))]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Byte-level BPE spells tokens in printable characters: a printable byte is its own character, the others are
# U+0100 and up (GPT-2's table, https://github.com/openai/gpt-2/blob/master/src/encoder.py).
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
CHAR_TO_BYTE = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}
_BYTE_TO_CHAR = {byte: char for char, byte in CHAR_TO_BYTE.items()}


def from_tiktoken(data: bytes, path: Path, tokenizers: ModuleType):
    """Llama 3's, a line `base64 rank` for each token; the special tokens come last. Raises ValueError naming `path`."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is not 'base64 rank', download it again") from error
    return _bpe(ranks, path, tokenizers, LLAMA3_SPLIT, _LLAMA3_SPECIAL, len(ranks), "<|begin_of_text|>")


def from_tekken(data: bytes, path: Path, tokenizers: ModuleType):
    """Mistral's, whose special tokens come first; those without a name are fillers. Raises ValueError naming `path`.

    The format: https://github.com/mistralai/mistral-common, tokens/tokenizers/tekken.py.
    """
    try:
        content = json.loads(data)
        config = content["config"]
        n_special, size = config["default_num_special_tokens"], config["default_vocab_size"]
        named = content.get("special_tokens") or [{"token_str": name} for name in ("<unk>", "<s>", "</s>")]
        if not len(named) <= n_special < size <= 10**7:
            raise ValueError(f"{n_special} special tokens, of which {len(named)} have names, of {size}")
        special = [token["token_str"] for token in named]
        special += [f"<SPECIAL_{i}>" for i in range(len(special), n_special)]
        vocab = content["vocab"][: size - n_special]  # the file holds more
        ranks = {base64.b64decode(token["token_bytes"], validate=True): token["rank"] for token in vocab}
        split = str(config["pattern"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a tekken tokenizer ({error!r}), download it again") from error
    return _bpe(ranks, path, tokenizers, split, special, 0, "<s>")


def _bpe(
    ranks: dict[bytes, int],
    path: Path,
    tokenizers: ModuleType,
    split: str,
    special: list[str],
    first_special: int,
    bos: str,
):
    """`split`: the pattern of words; the ids of `special` begin at `first_special`, before or after all others."""
    if list(ranks.values()) != list(range(len(ranks))) or sum(len(token) == 1 for token in ranks) != 256:
        raise ValueError(f"{path}: expected ranks 0, 1, 2, ... and every byte among them, download it again")
    name = {token: "".join(map(_BYTE_TO_CHAR.get, token)) for token in ranks}
    splits = ((token[:i], token[i:]) for token in ranks for i in range(1, len(token)))
    merges = [(name[left], name[right]) for left, right in splits if left in ranks and right in ranks]
    offset = 0 if first_special else len(special)
    vocab = {name[token]: rank + offset for token, rank in ranks.items()}
    vocab |= {token: first_special + i for i, token in enumerate(special)}

    encoder = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=True))
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(split), "isolated")
    spell = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, spell])
    encoder.decoder = tokenizers.decoders.ByteLevel()
    encoder.add_special_tokens(special)
    begins = [(bos, encoder.token_to_id(bos))]
    encoder.post_processor = tokenizers.processors.TemplateProcessing(f"{bos} $A", special_tokens=begins)
    return encoder
