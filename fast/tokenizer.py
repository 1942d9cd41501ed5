"""Text to token ids and back: one interface over the tokenizer formats that checkpoints come with.

    tokenizer = load_tokenizer("checkpoints/meta-llama/Llama-2-7b-chat-hf")
    ids = tokenizer.encode("Hello")  # [1, 15043]
    text = tokenizer.decode(ids)     # "Hello"

Worth knowing: in every format a token stands for bytes, not characters, and a character may span tokens.
So decoding looks up each token's bytes and feeds them to an incremental UTF-8 decoder. A token costs the same
however long the text is, and a list is decoded as a stream.
"""

import codecs
import contextlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

from fast.ranks import CHAR_TO_BYTE, from_tekken, from_tiktoken
from fast.reading import check, read_json, read_text, reading, require
from fast.template import render

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json")  # the first of them that is there is used
# The codec error handler "surrogateescape" turns an undecodable byte into one of these characters.
_ESCAPED_TO_REPLACEMENT = dict.fromkeys(range(0xDC80, 0xDD00), "\ufffd")
# The tokenizer classes of transformers 4 that replace a tokenizer.json's post-processor by what `add_bos_token` says.
# DeepSeek's models rely on it: their post-processor adds nothing. (transformers 5 does not read `add_bos_token`.)
ADD_BOS_TOKEN_DECIDES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")


class NamedToken(TypedDict):
    content: str


class AddedToken(NamedToken, total=False):
    """A token that texts are split at."""

    lstrip: bool
    rstrip: bool
    single_word: bool
    normalized: bool
    special: bool


class NamedTemplate(TypedDict):
    name: str
    template: str


class TokenizerConfig(TypedDict, total=False):
    """What is read of tokenizer_config.json and, in older directories, special_tokens_map.json."""

    tokenizer_class: str | None
    added_tokens_decoder: dict[str, AddedToken]
    extra_special_tokens: dict[str, str | AddedToken | None] | list[str | AddedToken | None] | None
    additional_special_tokens: dict[str, str | AddedToken | None] | list[str | AddedToken | None] | None
    bos_token: str | AddedToken | None
    eos_token: str | AddedToken | None
    unk_token: str | AddedToken | None
    add_bos_token: bool | None
    legacy: bool | None
    chat_template: str | list[NamedTemplate] | None


class Ends(TypedDict, total=False):
    """What config.json and generation_config.json say of the ends of texts."""

    eos_token_id: int | list[int] | None


class Tokenizer:
    """A tokenizer as the rest of the project uses it; `load_tokenizer` makes one.

    Attributes:
        bos_id, bos_token: the beginning-of-text token and its text, None where the model has none.
        eos_id, eos_token: the end-of-text token and its text, None where the model has none.
        stop_ids: ids that end a generation.
        vocab_size: all ids are below it. A model may have more embedding rows; those decode to no text.
        template_args: further variables of the chat template, such as {"enable_thinking": False}.
    """

    def __init__(
        self,
        backend: "_HuggingFace | _SentencePiece",
        stop_ids: Iterable[int],
        template: str,
        model_vocab_size: int | None = None,
    ):
        self._backend = backend
        self._template = template
        self.template_args: dict[str, Any] = {}
        ids = {name: backend.id_of(token) for name, token in backend.special.items()}
        self.vocab_size: int = backend.vocab_size
        self._n_rows = self.vocab_size if model_vocab_size is None else model_vocab_size
        self.bos_id: int | None = ids.get("bos_token")
        self.bos_token, self.eos_token = (backend.special.get(name) for name in ("bos_token", "eos_token"))
        self.eos_id: int | None = ids.get("eos_token")
        self.stop_ids: frozenset[int] = frozenset({*stop_ids, ids.get("eos_token")} - {None})

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of `text`. A special token's text ("</s>", "<|eot_id|>") becomes that token's id.

        `bos=True` adds what the model's own configuration adds, which for Qwen is nothing, unless `text` begins with
        it. Pass `bos=False` with the output of `apply_chat_template`: it holds its special tokens already.
        Raises ValueError for a text that holds bytes which were not UTF-8 (lone surrogates, as Python reads them from a
        terminal or a pipe), or a token that the model has no embedding for.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"not UTF-8 text: {error.object[error.start]!r} after {error.start} characters") from None
        with reading("the tokenizer"):
            ids = self._backend.encode(text, bos)
        if ids[:2] == [self.bos_id] * 2 and bos and text.startswith(self.bos_token):
            del ids[0]
        if self.vocab_size > self._n_rows and (beyond := [i for i in ids if i >= self._n_rows]):
            raise ValueError(
                f"the text has the token {self.name_of(beyond[0]) or self.decode(beyond[:1])!r}, number {beyond[0]} of "
                f"the tokenizer, but the model has embeddings for {self._n_rows} tokens: write it in other words"
            )
        return ids

    def name_of(self, token_id: int) -> str:
        """The text of a special token, for which `decode` gives none; "" for other tokens."""
        return self._backend.names.get(token_id, "")

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. Special tokens give no text; bytes that are not UTF-8 give U+FFFD."""
        stream = IncrementalDecoder(self)
        return "".join(map(stream.put, ids)) + stream.finish()

    @property
    def chat_template(self) -> str:
        """The source of the model's template, "" where it has none."""
        return self._template

    @property
    def has_chat_template(self) -> bool:
        return bool(self._template)

    def apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt made of `messages`, like [{"role": "user", "content": "Hi"}], special tokens included.

        Raises ValueError if the model has no template, or the template is broken or rejects the messages.
        Equal to `apply_chat_template(tokenize=False)` of transformers.
        """
        if not self._template:
            raise ValueError("the model has no chat template: pass a plain prompt, or add chat_template.jinja")
        if not messages:
            raise ValueError("no messages to apply the chat template to: pass at least one")
        messages = [{key: value for key, value in m.items() if value is not None} for m in messages]
        inputs = {"tools": None, "documents": None, **self._backend.special, **self.template_args}
        return render(self._template, {**inputs, "messages": messages, "add_generation_prompt": add_generation_prompt})


class IncrementalDecoder:
    """Decodes a stream of tokens: the texts from `put`, then `finish`, joined are `tokenizer.decode(ids)`."""

    def __init__(self, tokenizer: Tokenizer):
        self._bytes_of = tokenizer._backend.bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer._backend.utf8_errors)
        self._drop_space = tokenizer._backend.adds_space

    def put(self, token_id: int) -> str:
        """The text that `token_id` completes: "" while a character still lacks bytes."""
        piece = self._bytes_of(int(token_id))
        if self._drop_space and piece:
            self._drop_space = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece).translate(_ESCAPED_TO_REPLACEMENT)

    def finish(self) -> str:
        """What is left at the end: "", or U+FFFD for a character that never got all its bytes."""
        return self._utf8.decode(b"", final=True).translate(_ESCAPED_TO_REPLACEMENT)


def load_tokenizer(path: str | Path, model_vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a model directory, or of the directory of a checkpoint file, or in a GGUF file.

    It is tokenizer.json, else tokenizer.model (SentencePiece or Llama 3), else Mistral's tekken.json.
    Beside it are read, where present: tokenizer_config.json, special_tokens_map.json, added_tokens.json,
    generation_config.json, config.json, chat_template.jinja.
    model_vocab_size: the number of embeddings, if texts are for a model.
    Whether BOS is added: as tokenizer.json's post-processor says, or `add_bos_token` where the model's makers used it
    (`ADD_BOS_TOKEN_DECIDES`); for SentencePiece as `add_bos_token` says, true if absent; else always.
    Which ids end a text: the tokenizer's own, and those of generation_config.json; of config.json if it names none.
    Raises FileNotFoundError if there is no tokenizer, ValueError naming the file if one is damaged, and
    ImportError with the command to run if the package for its format is missing.
    """
    with reading(path):
        return _load(Path(path), model_vocab_size)


def _load(path: Path, model_vocab_size: int | None) -> Tokenizer:
    if path.is_file():
        from fast.gguf import is_gguf  # imports torch

        if is_gguf(path):
            return _read_gguf(path, model_vocab_size)
    given, directory = path, path.parent if path.is_file() else path
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory, expected one that holds a tokenizer")
    path = next((directory / name for name in TOKENIZER_FILES if (directory / name).is_file()), None)
    if path is None and (file := _gguf_beside(given)):
        return _read_gguf(file, model_vocab_size)
    if path is None:
        raise FileNotFoundError(
            f"{directory}: no tokenizer, expected one of {', '.join(TOKENIZER_FILES)}, or one .gguf"
        )
    data = path.read_bytes()
    if not data.strip():
        raise ValueError(f"{path}: the file is empty, download it again")
    config = read_json(directory / "tokenizer_config.json", TokenizerConfig, optional=True)
    with reading(directory / "tokenizer_config.json"):
        special, added = _read_special_tokens(directory, config)
    # As in transformers: a fine-tune's config.json may still name the end of the model that it was made from.
    stop_ids = _read_eos(directory / "generation_config.json") or _read_eos(directory / "config.json")
    with reading(path):
        if path.name == "tekken.json":
            special = {"bos_token": "<s>", "eos_token": "</s>"} | special
            backend = _HuggingFace(from_tekken(data, path, require("tokenizers")), special, added)
            stop_ids.append(backend.id_of("</s>"))
        elif path.suffix == ".json":
            decides = str(config.get("tokenizer_class")).startswith(ADD_BOS_TOKEN_DECIDES)
            adds_bos = config.get("add_bos_token") if decides else None
            backend = _HuggingFace(_parse_tokenizer_json(data, path), special, added, adds_bos)
        elif re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):
            special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"} | special
            backend = _HuggingFace(from_tiktoken(data, path, require("tokenizers")), special, added)
            stop_ids += map(backend.id_of, ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"))
        else:
            backend = _SentencePiece(data, path, config, special, added)
            stop_ids += [backend.model.eos_id()] if backend.model.eos_id() >= 0 else []
    return Tokenizer(backend, stop_ids, _read_template(directory, config), model_vocab_size)


def _read_gguf(path: Path, model_vocab_size: int | None) -> Tokenizer:
    from fast.gguf_tokenizer import read_tokenizer

    parts = read_tokenizer(path)
    if isinstance(parts.model, bytes):
        config = {"add_bos_token": parts.adds_bos}
        backend = _SentencePiece(parts.model, path, config, parts.special, parts.added)
    else:
        backend = _HuggingFace(parts.model, parts.special, parts.added, parts.adds_bos)
    template = parts.template or _read_template(path.parent, {})
    return Tokenizer(backend, parts.stop_ids, template, model_vocab_size)


def _gguf_beside(path: Path) -> Path | None:
    """The file that the `.pth` at `path` was made from: of the same name, or the only one in its directory."""
    files = list((path.parent if path.is_file() else path).glob("*.gguf"))
    named = [file for file in files if file == path.with_suffix(".gguf")]
    return named[0] if named else files[0] if len(files) == 1 else None


class _HuggingFace:
    """A tokenizer of the `tokenizers` package: byte-level BPE, or a SentencePiece model rewritten as BPE."""

    def __init__(self, encoder, special: dict[str, str], added: list[dict[str, Any]], adds_bos: bool | None = None):
        self.encoder, self.special = encoder, special
        encoder.no_truncation()
        encoder.no_padding()
        known = {token.content: token for token in encoder.get_added_tokens_decoder().values()}
        flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
        changed = []  # what tokenizer_config.json says of a token goes before what tokenizer.json says
        for token in added:
            old = known.get(token["content"])
            were = {flag: getattr(old, flag) for flag in flags} if old else None
            given = (were or {}) | {flag: token[flag] for flag in flags if flag in token}
            if given != were:
                changed.append(require("tokenizers").AddedToken(token["content"], **given))
        encoder.add_tokens(changed)
        both = [*known.values(), *encoder.get_added_tokens_decoder().values()]  # special in one file is special
        self.names = {encoder.token_to_id(token.content): token.content for token in both if token.special}
        self.vocab_size = 1 + max(encoder.get_vocab().values(), default=-1)
        self.post_processed = adds_bos is None
        self.bos = [self.id_of(special["bos_token"])] if adds_bos and "bos_token" in special else []

        kind, split = (part.__getstate__() if part else b"" for part in (encoder.decoder, encoder.pre_tokenizer))
        # The pre-tokenizer spells what is in the vocabulary; some files have another kind's decoder.
        self.byte_level, self.byte_fallback = b'"ByteLevel"' in (split or kind), b'"ByteFallback"' in kind
        # If a run of <0x..> tokens is not UTF-8, the package replaces the whole run, SentencePiece only the bad
        # bytes. So does this code: a character that has been shown cannot be taken back.
        self.utf8_errors = "surrogateescape" if self.byte_fallback else "replace"
        self.join = encoder.decoder.decode if encoder.decoder else " ".join
        self.adds_space = not self.byte_level and any(
            self.join([t]) != self.join(["a", t])[1:] for t in ("a", "\u2581a")
        )

    def encode(self, text: str, bos: bool) -> list[int]:
        ids = self.encoder.encode(text, add_special_tokens=bos and self.post_processed).ids
        return self.bos + ids if bos else ids

    def id_of(self, token: str) -> int | None:
        return self.encoder.token_to_id(token)

    def bytes_of(self, token_id: int) -> bytes:
        token = self.encoder.id_to_token(token_id)
        if token is None or token_id in self.names:
            return b""
        if self.byte_level and CHAR_TO_BYTE.keys() >= set(token):
            return bytes(CHAR_TO_BYTE[char] for char in token)
        if self.byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes.fromhex(token[3:5])
        return self.join(["a", token])[1:].encode()  # not at the start, where a space may be dropped


class _SentencePiece:
    """A SentencePiece model and the tokens added to it, tokenizing as Llama's reference code does.

    transformers 5 rebuilds the model in the `tokenizers` package, where spaces can be tokenized differently: it
    adds no word-start space before a space, and merges in the order of the pieces' ids instead of their scores.
    By score, Llama 2's runs of spaces come last.
    """

    utf8_errors = "surrogateescape"  # one U+FFFD for each undecodable byte

    def __init__(self, data: bytes, path: Path, config: dict, special: dict[str, str], added: list[dict]):
        load = require("sentencepiece").SentencePieceProcessor
        try:
            self.model = model = load(model_proto=data)
            # Protobuf messages merge when concatenated: this sets normalizer_spec.add_dummy_prefix to false.
            self.model_without_space = load(model_proto=data + b"\x1a\x02\x18\x00")
        except (RuntimeError, ValueError) as error:
            expected = "expected a SentencePiece model or lines of 'base64 rank'"
            raise ValueError(f"{path}: not a tokenizer, {expected}, download it again") from error
        self.adds_space = model.encode("a") != self.model_without_space.encode("a")
        self.vocab_size = model.get_piece_size()
        control = [i for i in range(self.vocab_size) if model.is_control(i) or model.is_unknown(i)]
        self.added = {model.id_to_piece(i): {"id": i, "special": True} for i in control}
        for token in added:
            known = self.id_of(token["content"])
            token_id = token.get("id", self.vocab_size if known is None else known)
            self.added[token["content"]] = {**token, "id": token_id}
            self.vocab_size = max(self.vocab_size, token_id + 1)
        self.names = {t["id"]: content for content, t in self.added.items() if t.get("special")}
        self.text_of = {t["id"]: "" if t["id"] in self.names else content for content, t in self.added.items()}
        self.pattern = re.compile("|".join(map(re.escape, sorted(self.added, key=len, reverse=True))))
        ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
        self.special = {name: model.id_to_piece(i) for name, i in ids.items() if i >= 0} | special
        bos_token = self.special.get("bos_token") if config.get("add_bos_token") is not False else None
        self.bos = [self.id_of(bos_token)] if bos_token else []
        # The word-start space comes once, at the text's start; with "legacy", after special tokens as well.
        self.legacy = config.get("legacy", False)

    def encode(self, text: str, bos: bool) -> list[int]:
        ids, start = list(self.bos) if bos else [], 0
        for match in self.pattern.finditer(text):
            token, section = self.added[match[0]], text[start : match.start()]
            ids += self._encode_section(section.rstrip() if token.get("lstrip") else section, start == 0)
            ids.append(token["id"])
            start = match.end()
            if token.get("rstrip"):
                start = len(text) - len(text[start:].lstrip())
        return ids + self._encode_section(text[start:], start == 0)

    def _encode_section(self, section: str, at_start: bool) -> list[int]:
        return (self.model if at_start or self.legacy else self.model_without_space).encode(section)

    def id_of(self, token: str) -> int | None:
        if token in self.added:
            return self.added[token]["id"]
        token_id = self.model.piece_to_id(token)  # the id of <unk> if there is no such piece
        return token_id if self.model.id_to_piece(token_id) == token else None

    def bytes_of(self, token_id: int) -> bytes:
        if token_id in self.text_of:
            return self.text_of[token_id].encode()
        if token_id >= self.model.get_piece_size():
            return b""
        piece = self.model.id_to_piece(token_id)
        is_byte = self.model.is_byte(token_id)  # <0xE4>
        return bytes.fromhex(piece[3:5]) if is_byte else piece.replace("\u2581", " ").encode()


def _parse_tokenizer_json(data: bytes, path: Path):
    tokenizers = require("tokenizers")
    try:
        return tokenizers.Tokenizer.from_str(data.decode())
    except Exception as error:  # the package raises nothing narrower
        remedy = "download it again"
        with contextlib.suppress(ValueError, TypeError):
            if "model" in json.loads(data):
                remedy = (
                    f"it may need a newer package than tokenizers {tokenizers.__version__}: pip install -U tokenizers"
                )
        raise ValueError(f"{path}: not a Hugging Face tokenizer ({error}), {remedy}") from error


def _read_special_tokens(directory: Path, config: dict[str, Any]) -> tuple[dict[str, str], list[dict]]:
    """The named special tokens ({"bos_token": "<s>"}), and all tokens listed beside the tokenizer, by id."""
    found: dict[str, dict[str, Any]] = {}
    if "added_tokens_decoder" in config:
        for token_id, token in config["added_tokens_decoder"].items():
            if not token_id.isdecimal():
                raise ValueError(f"added_tokens_decoder has the key {token_id!r:.80}; expected a token's number")
            found[token["content"]] = {**token, "id": int(token_id)}
    else:  # older directories keep them in files of their own
        config = config | read_json(directory / "special_tokens_map.json", TokenizerConfig, optional=True)
        for content, token_id in read_json(directory / "added_tokens.json", dict[str, int], optional=True).items():
            found[content] = {"content": content, "id": token_id}
    for content, token in found.items():
        if not content or not 0 <= token["id"] < 2**31:
            raise ValueError(f"an added token is {content!r:.80} with id {token['id']}; expected a text and 0 or more")
    named = {key: v for key, v in config.items() if key.endswith("_token") and v and isinstance(v, str | dict)}
    check(named, dict[str, str | AddedToken])
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    for value in filter(None, [*named.values(), *(extra.values() if isinstance(extra, dict) else extra)]):
        token = value if isinstance(value, dict) else {"content": value}
        content = token["content"]
        found[content] = {**token, **found.get(content, {}), "special": True}
    special = {key: value if isinstance(value, str) else value["content"] for key, value in named.items()}
    return special, sorted(found.values(), key=lambda token: token.get("id", float("inf")))


def _read_eos(path: Path) -> list[int]:
    value = read_json(path, Ends, optional=True).get("eos_token_id")
    return value if isinstance(value, list) else [] if value is None else [value]


def _read_template(directory: Path, config: dict[str, Any]) -> str:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return read_text(path)
    template = config.get("chat_template") or ""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default", "")
    return template
