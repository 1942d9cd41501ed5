"""tokenizer.py against transformers, SentencePiece and a slow tiktoken, on small tokenizers trained here.

python -m pytest tests/test_tokenizer.py
"""

import base64
import io
import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from fast.tokenizer import IncrementalDecoder, load_tokenizer

LLAMA2 = Path(__file__).parents[2] / "shared" / "data" / "llama2" / "tokenizer.model"
TEKKEN_SPLIT = (  # of Mistral Nemo
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Language models read tokens, not letters: a token is often a word, a syllable or a space.",
    "def add(a, b):\n    return a + b  # 12345 plus 67890",
    "Größere Straßen führen über schöne Brücken. L'été dernier, où étiez-vous?",
    "你好，世界。今天天气很好。 こんにちは世界。 Привет, мир! Как дела?",
    "It's what they'd say; we'll see, I'm sure, they've said it before.",
] * 4
NASTY_TEXTS = (
    "~ ~   ~a~Hello world~ leading space~   three leading spaces~trailing space ~trailing spaces   ~"
    "two  spaces   three    four~\ttab\tand\ttab~\n~line\nline\r\nline\n\n\n~ \n \t \n~it's WE'LL they'D~"
    "emoji 😀 family 👨‍👩‍👧‍👦 flag 🇩🇪 skin 👍🏽~🙂🙂🙂~你好，世界 and こんにちは, 안녕하세요~"
    "\u0301starts with an accent~"
    "combining e\u0301 o\u0308 and z\u0335\u0321\u0350~zero\u200bwidth\ufeffand\u00a0no-break\u3000wide~"
    "control \x01\x02\x1b[0m\x7f~nul \x00 inside \x00~word start \u2581 typed \u2581\u2581~"
    "replacement \ufffd typed~3.14159 and 1234567890~<0xE4> <0xGG> looks like a byte"
)
NASTY = [*NASTY_TEXTS.split("~"), "a" * 1500, " " * 1500 + "x", "é" * 700]
SPECIAL_TEXTS = "<s>~</s>~<s>Hello</s>~Hello<s> world</s>again~Hello <s>world </s> again~<s><s>  </s></s>"
WITH_SPECIAL = [*SPECIAL_TEXTS.split("~"), "a<s>\nb</s>\n", "<unk>what<unk>"]
MESSAGES = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "Wer <b>bist</b> du? 你好 😀"},
    {"role": "assistant", "content": "  A model.  "},
    {"role": "user", "content": 'Say "it\'s" again.'},
]
TEMPLATES = {
    "llama2": """{% if messages[0]['role'] == 'system' %}
{% set intro = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}
{% else %}{% set intro = '' %}{% set turns = messages %}{% endif %}
{%- for turn in turns %}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must take turns, starting with the user') }}
    {%- endif %}
    {%- if turn['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (intro if loop.first else '') + turn['content'] | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + turn['content'] | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}""",
    "llama3": """{{- bos_token }}
{%- if tools is not none or documents is not none %}{{- raise_exception('no tools') }}{%- endif %}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}""",
    "chatml": """{% for m in messages %}
    {% if m.role == 'nobody' %}{% continue %}{% endif %}
<|im_start|>{{ m.role }}
{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}""",
    "mistral": """{%- set ns = namespace(system='') %}
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{%- set ns.system = m.content %}
    {%- elif m.role == 'user' %}
        {{- '[INST] ' + (ns.system ~ '\n\n' if ns.system else '') + m.content + '[/INST]' }}
    {%- set ns.system = '' %}
    {%- else %}{{- ' ' + m.content + eos_token }}
    {%- endif %}
{%- endfor %}""",
    "gemma": """{{ bos_token }}
{%- set first, turns = ('', messages) %}
{%- if messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is string %}{% set first = messages[0]['content'] + '\n\n' %}
    {%- else %}{% set first = messages[0]['content'][0]['text'] + '\n\n' %}{% endif %}
    {%- set turns = messages[1:] %}
{%- endif %}
{%- for turn in turns %}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {{ '<start_of_turn>' + {'assistant': 'model'}.get(turn.role, turn.role) + '\n' + (first if loop.first else '') }}
    {%- if turn['content'] is string %}{{ turn['content'] | trim }}
    {%- elif turn['content'] is iterable %}{% for part in turn['content'] %}{{ part['text'] | trim }}{% endfor %}
    {%- endif %}
    {{ '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
    "json": "{{ messages | tojson }}|{{ messages[0] | tojson(indent=2) }}|{{ strftime_now('%Y') | length }}",
}


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def reference(directory: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def once(text: str, ids: list[int], bos: str | None) -> list[int]:
    """transformers' `ids` of `text`, without the BOS that it adds to a text which begins with it."""
    return ids[1:] if bos and text.startswith(bos) and ids[0] == ids[1] else ids


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Random strings from many ranges of Unicode, without surrogates, with many known words, spaces and newlines."""
    rng = random.Random(seed)
    ranges = [(0, 128), (32, 127), (0x80, 0x500), (0x300, 0x370), (0x2000, 0x2600), (0x4E00, 0xA000)]
    ranges += [(0xE000, 0x10000), (0x1F300, 0x1FB00), (0x10000, 0x110000)]
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 20)):
            kind = rng.random()
            if kind < 0.4:
                parts.append(rng.choice(rng.choice(CORPUS).split(" ")))
            elif kind < 0.6:
                parts.append(rng.choice([" ", "  ", "\n", "\t", " \n", "\r\n"]))
            else:
                parts.append("".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 6))))
        texts.append("".join(parts))
    return texts


TEXTS = NASTY + random_texts(300)


def stream(tokenizer, ids) -> str:
    decoder = IncrementalDecoder(tokenizer)
    return "".join([decoder.put(i) for i in ids] + [decoder.finish()])


def byte_level_encoder(special: list[str], digits: str = "{1,3}") -> tokenizers.Tokenizer:
    encoder = tokenizers.Tokenizer(models.BPE())
    split = tokenizers.Regex(LLAMA3_SPLIT.replace("{1,3}", digits))
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"), spell])
    encoder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    encoder.train_from_iterator(CORPUS, trainer)
    encoder.add_special_tokens(special)
    return encoder


@pytest.fixture(scope="module")
def piece_model() -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.split("\n")),
        model_writer=out,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def write_llama2(directory: Path, model: bytes, **config) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model)
    write_json(directory / "config.json", {"model_type": "llama", "eos_token_id": 2})
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", **config}
    write_json(directory / "tokenizer_config.json", config)
    return directory


@pytest.fixture(scope="module")
def llama2(tmp_path_factory, piece_model) -> Path:
    added = {
        "<s>": {"id": 1, "special": True},
        "</s>": {"id": 2, "special": True},
        "<|end|>": {"id": 420, "special": True, "rstrip": True},
        "<think>": {"id": 421, "special": False},
        "<mask>": {"id": 422, "special": True, "lstrip": True},
    }
    decoder = {str(t["id"]): {"content": text, "normalized": False, **t} for text, t in added.items()}
    for token in decoder.values():
        del token["id"]
    directory = tmp_path_factory.mktemp("llama2")
    return write_llama2(directory, piece_model, added_tokens_decoder=decoder, chat_template=TEMPLATES["llama2"])


@pytest.fixture(scope="module")
def llama3(tmp_path_factory) -> Path:
    """Llama 3 as Hugging Face ships it: byte-level, BOS from the post-processor, several stop ids."""
    directory = tmp_path_factory.mktemp("llama3")
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
    special = [f"<|{name}|>" for name in names]
    encoder = byte_level_encoder(special)
    bos = encoder.token_to_id(special[0])
    template = processors.TemplateProcessing(f"{special[0]} $A", special_tokens=[(special[0], bos)])
    encoder.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    encoder.enable_truncation(8)  # neither may take effect: a prompt is never cut nor padded
    encoder.enable_padding(length=8, pad_token=special[1], pad_id=bos + 1)
    encoder.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[1]}
    write_json(directory / "tokenizer_config.json", {**config, "clean_up_tokenization_spaces": True})
    write_json(directory / "config.json", {"model_type": "llama", "eos_token_id": bos + 1})
    write_json(directory / "generation_config.json", {"eos_token_id": [bos + 1, bos + 4]})
    (directory / "chat_template.jinja").write_text(TEMPLATES["llama3"])
    return directory


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """Qwen: NFC, no BOS, ChatML, a token that is added but not special, the template in a list of several."""
    directory = tmp_path_factory.mktemp("qwen")
    encoder = byte_level_encoder(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], digits="")
    encoder.normalizer = normalizers.NFC()
    encoder.post_processor = processors.ByteLevel(trim_offsets=False)
    encoder.add_tokens(["<think>", "<a tag>"])
    encoder.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": {"content": "<|im_end|>", "special": True, "__type": "AddedToken"},
        "pad_token": "<|endoftext|>",
        "chat_template": [
            {"name": "tool_use", "template": "wrong"},
            {"name": "default", "template": TEMPLATES["chatml"]},
        ],
    }
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "config.json", {"model_type": "qwen2"})
    return directory


@pytest.fixture(scope="module")
def llama2_json(tmp_path_factory, llama2) -> Path:
    """The SentencePiece model again, as a tokenizer.json with byte fallback (TinyLlama, Mistral 7B)."""
    directory = tmp_path_factory.mktemp("llama2_json")
    encoder = reference(llama2).backend_tokenizer
    encoder.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "special_tokens_map.json", {"unk_token": {"content": "<unk>"}, "sep_token": "<sep>"})
    write_json(directory / "config.json", {"model_type": "mistral", "eos_token_id": 2})
    (directory / "chat_template.jinja").write_text(TEMPLATES["mistral"])
    return directory


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Byte-pair ranks as in Llama 3's file: all bytes (in no special order), then the most frequent pairs."""
    text = " ".join(CORPUS).encode()
    words = [[bytes([b]) for b in word] for word in set(re.findall(rb" ?\w+|\W+", text))]
    ranks = [bytes([b]) for b in range(256)]
    random.Random(0).shuffle(ranks)
    while len(ranks) < 399:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.append(b"".join(best))
        words = [merge_pair(word, best) for word in words]
    ranks.append(b"zqxj")  # a whole word that no merges lead to
    assert len(set(ranks)) == 400
    return {token: rank for rank, token in enumerate(ranks)}


def merge_pair(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    out: list[bytes] = []
    for part in word:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


@pytest.fixture(scope="module")
def meta_llama3(tmp_path_factory, ranks) -> Path:
    directory = tmp_path_factory.mktemp("meta_llama3")
    write_ranks(directory / "tokenizer.model", ranks)
    return directory


@pytest.fixture(scope="module")
def tekken(tmp_path_factory, ranks) -> Path:
    """A tekken.json: 400 ranks, one more that its vocabulary size leaves out, and 12 special tokens, 4 with names."""
    names = ["<unk>", "<s>", "</s>", "[INST]"]
    content = {
        "config": {
            "pattern": TEKKEN_SPLIT, "default_vocab_size": 412, "default_num_special_tokens": 12, "version": "v3",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for token, rank in [*ranks.items(), (b"left out", 400)]
        ],
        "special_tokens": [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)],
    }  # fmt: skip
    directory = tmp_path_factory.mktemp("tekken")
    (directory / "tekken.json").write_text(json.dumps(content))
    return directory


def tiktoken_encode(
    ranks: dict[bytes, int], special: dict[str, int], text: str, pattern: str = LLAMA3_SPLIT
) -> list[int]:
    """What tiktoken does, done slowly: merge the leftmost pair of lowest rank until no pair has a rank."""
    import regex

    ids = []
    for section in re.split("(" + "|".join(map(re.escape, special)) + ")", text):
        if section in special:
            ids.append(special[section])
            continue
        for word in regex.findall(pattern, section):
            word = word.encode()
            parts = [word] if word in ranks else [bytes([b]) for b in word]
            while pairs := [
                (ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks
            ]:
                _, i = min(pairs)
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            ids += [ranks[part] for part in parts]
    return ids


# --- the three formats against their oracles


@pytest.mark.parametrize("name", ["llama3", "qwen", "llama2_json"])
def test_tokenizer_json_equals_transformers(name, request):
    directory = request.getfixturevalue(name)
    ours, theirs = load_tokenizer(directory), reference(directory)
    special = [token.content for token in theirs.added_tokens_decoder.values()]
    texts = TEXTS + [f"{t}Hello{t} world {t}\n{t}" for t in special] + WITH_SPECIAL
    for text in texts:
        ids = ours.encode(text)
        assert ids == once(text, theirs.encode(text), ours.bos_token)
        assert ours.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert stream(ours, ids) == ours.decode(ids)
    assert ours.vocab_size == len(theirs)
    assert ours.bos_id == theirs.bos_token_id


def test_sentencepiece_equals_sentencepiece(llama2, piece_model):
    ours = load_tokenizer(llama2)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=piece_model)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == [1, *theirs.encode(text)]
        assert ours.encode(text, bos=False) == ids[1:]
        assert ours.decode(ids) == stream(ours, ids) == theirs.decode(ids)
        assert ours.decode(ids) == text.replace("\u2581", " ")


@pytest.mark.parametrize("legacy", [False, True])
def test_sentencepiece_equals_transformers(tmp_path, llama2, piece_model, legacy):
    config = json.loads((llama2 / "tokenizer_config.json").read_text())
    directory = write_llama2(tmp_path / "model", piece_model, **config | {"legacy": legacy})
    ours, theirs = load_tokenizer(directory), reference(directory)
    texts = TEXTS + WITH_SPECIAL
    texts += ["a<|end|>  \n b <|end|>", "see <think> this</think>", "fill  <mask> in", "<mask><|end|> <mask>"]
    for text in texts:
        # The model that transformers rebuilds puts no word-start space before a space.
        sections = re.split("<s>|</s>|<unk>|<think>|<mask>|<[|]end[|]>\\s*", text) if legacy else [text]
        if any(section.startswith((" ", "\u2581")) for section in sections):
            continue
        ids = ours.encode(text)
        assert ids == once(text, theirs.encode(text), "<s>"), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert stream(ours, ids) == ours.decode(ids)
    assert ours.vocab_size == len(theirs) == 423


@pytest.mark.parametrize("files", ["added_tokens", "special_tokens_map", "tokenizer_config"])
def test_sentencepiece_added_tokens_in_older_files(tmp_path, piece_model, files):
    config = {}
    if files == "added_tokens":
        config["pad_token"] = "<pad>"
        write_json(tmp_path / "added_tokens.json", {"<|im_end|>": 420, "<pad>": 421, "<|im_end|>s": 422})
    elif files == "special_tokens_map":
        value = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "pad_token": "<pad>"}
        write_json(tmp_path / "special_tokens_map.json", value)
    else:
        config |= {"eos_token": "<|im_end|>", "additional_special_tokens": ["<pad>"]}
    ours, theirs = load_tokenizer(write_llama2(tmp_path, piece_model, **config)), reference(tmp_path)
    text = "Hello<|im_end|>\nand <pad> <s><|im_end|>s"
    assert ours.encode(text) == theirs.encode(text)
    assert set(ours.encode(text)) > {420, 421}
    assert (420 in ours.stop_ids) == (files != "added_tokens")
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


def test_llama3_ranks_equal_tiktoken(meta_llama3, ranks):
    ours = load_tokenizer(meta_llama3)
    names = "<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> <|reserved_special_token_1|>"
    names += " <|finetune_right_pad_id|> <|step_id|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|>"
    special = {name: 400 + i for i, name in enumerate(f"{names} <|python_tag|> <|reserved_special_token_2|>".split())}
    special["<|reserved_special_token_246|>"] = 400 + 255
    for text in [*TEXTS, "zqxj azqxj", *(f"{name}Hello {name}\n\n{name}" for name in special)]:
        ids = ours.encode(text)
        expected = tiktoken_encode(ranks, special, text)
        assert ids == expected if text.startswith("<|begin_of_text|>") else [400, *expected]
        assert ours.encode(text, bos=False) == expected
        assert ours.decode(ids) == re.sub("|".join(map(re.escape, special)), "", text)
        assert stream(ours, ids) == ours.decode(ids)
    assert ours.vocab_size == 656
    assert ours.bos_id == 400
    assert ours.stop_ids == {401, 408, 409}


def test_tekken_equals_tiktoken_behind_its_special_tokens(tekken, ranks):
    ours = load_tokenizer(tekken)
    special = {name: i - 12 for i, name in enumerate(["<unk>", "<s>", "</s>", "[INST]", "<SPECIAL_4>"])}
    for text in [*TEXTS, "zqxj azqxj", "left out", "OneTwo THREE", "[INST]Hello</s>", "a<SPECIAL_4>b"]:
        expected = [12 + i for i in tiktoken_encode(ranks, special, text, TEKKEN_SPLIT)]
        assert ours.encode(text, bos=False) == expected
        assert ours.encode(text) == [1, *expected]
        assert ours.decode(ours.encode(text)) == re.sub("|".join(map(re.escape, special)), "", text)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.stop_ids) == (412, 1, 2, {2})


def test_a_tokenizer_json_goes_before_a_tekken_json(tekken, llama3, tmp_path):
    for file in (*llama3.iterdir(), tekken / "tekken.json"):
        shutil.copy(file, tmp_path)
    assert load_tokenizer(tmp_path).encode(TEXTS[0]) == load_tokenizer(llama3).encode(TEXTS[0])


@pytest.mark.parametrize("sizes", [(-3, 412), (3, 412), (10**10, 10**10 + 400), (412, 412), (12, 10**9)])
def test_sizes_that_no_tekken_json_has(tekken, tmp_path, sizes):
    content = json.loads((tekken / "tekken.json").read_text())
    content["config"] |= dict(zip(("default_num_special_tokens", "default_vocab_size"), sizes, strict=True))
    write_json(tmp_path / "tekken.json", content)
    with pytest.raises(
        ValueError, match=f"tekken.json: not a tekken tokenizer .*{sizes[0]} special tokens, of which 4"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"x": {"content": "a"}}, "added_tokens_decoder has the key 'x'; expected a token's number"),
        ({"5": {"content": ""}}, "an added token is '' with id 5; expected a text and 0 or more"),
        ({"5": {"id": 5}}, "added_tokens_decoder.5 has no content"),
        ({"5": {"content": "a", "special": 1}}, "added_tokens_decoder.5.special is 1; expected true or false"),
        ([], "added_tokens_decoder is .*; expected an object"),
    ],
)
def test_added_tokens_that_are_none(tmp_path, piece_model, added, message):
    directory = write_llama2(tmp_path / "model", piece_model, added_tokens_decoder=added)
    with pytest.raises(ValueError, match=f"tokenizer_config.json: {message}"):
        load_tokenizer(directory)


def test_nulls_among_the_special_tokens_are_left_out(tmp_path, piece_model):
    plain = load_tokenizer(write_llama2(tmp_path / "plain", piece_model, additional_special_tokens=["<x>"]))
    nulls = load_tokenizer(write_llama2(tmp_path / "nulls", piece_model, additional_special_tokens=["<x>", None]))
    assert nulls.encode("a<x>b") == plain.encode("a<x>b")


@pytest.mark.parametrize("damage", [b"[]", b"{}", b'{"config": {}}', b"{"])
def test_a_damaged_tekken_json(tmp_path, damage):
    (tmp_path / "tekken.json").write_bytes(damage)
    with pytest.raises(ValueError, match="tekken.json: not a tekken tokenizer .*, download it again"):
        load_tokenizer(tmp_path)


@pytest.mark.skipif(not LLAMA2.is_file(), reason="no Llama 2 tokenizer beside the repository")
def test_llama2_itself(tmp_path):
    directory = write_llama2(tmp_path, LLAMA2.read_bytes())
    ours, theirs = load_tokenizer(directory), reference(directory)
    assert ours.encode("Hello") == [1, 15043]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA2))
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == [1, *pieces.encode(text)]
        assert stream(ours, ids) == text.replace("\u2581", " ")
    for text in TEXTS + WITH_SPECIAL:
        if not re.search("^[ \u2581]|[ \u2581]{2}", text):  # where the rebuilt model errs, see _SentencePiece
            assert ours.encode(text) == once(text, theirs.encode(text), "<s>")
    (tmp_path / "model").mkdir()
    theirs.backend_tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    converted = load_tokenizer(tmp_path / "model")
    rng = random.Random(0)
    for _ in range(100):
        ids = [rng.randrange(3, 400 if rng.random() < 0.5 else 32000) for _ in range(30)]
        assert ours.decode(ids) == pieces.decode(ids) == stream(ours, ids) == converted.decode(ids)


# --- decoding


@pytest.mark.parametrize("name", ["llama2", "llama3", "qwen", "llama2_json", "meta_llama3", "tekken"])
def test_incremental_equals_decode_for_any_ids(name, request):
    tokenizer = load_tokenizer(request.getfixturevalue(name))
    rng = random.Random(1)
    for _ in range(200):  # ids a model may emit: broken characters, special tokens, rows past the vocabulary
        ids = [rng.randrange(tokenizer.vocab_size + 5) for _ in range(rng.randrange(40))]
        assert stream(tokenizer, ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["llama3", "qwen"])
def test_decode_any_ids_equals_transformers(name, request):
    directory = request.getfixturevalue(name)
    ours, theirs = load_tokenizer(directory), reference(directory)
    rng = random.Random(2)
    for _ in range(200):
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(40))]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_decode_any_ids_equals_sentencepiece(llama2, piece_model):
    ours, theirs = load_tokenizer(llama2), sentencepiece.SentencePieceProcessor(model_proto=piece_model)
    rng = random.Random(3)
    for _ in range(200):
        ids = [rng.randrange(3, 420) for _ in range(rng.randrange(40))]
        assert ours.decode(ids) == theirs.decode(ids)


def test_incremental_decoder_emits_text_as_soon_as_it_is_whole(llama2):
    tokenizer = load_tokenizer(llama2)
    decoder = IncrementalDecoder(tokenizer)
    emitted = [decoder.put(i) for i in tokenizer.encode("😀 the")]
    assert emitted[-5:] == ["", "", "", "😀", " the"]
    ids = tokenizer.encode("😀")
    decoder = IncrementalDecoder(tokenizer)
    assert "".join(decoder.put(i) for i in ids[:-1]) == ""
    assert decoder.finish() == "\ufffd" * 3
    decoder = IncrementalDecoder(tokenizer)
    assert [decoder.put(i) for i in tokenizer.encode("  the")] == ["", "", " ", " the"]


def test_incremental_decoder_never_shows_half_a_character(llama2, llama3):
    for directory in (llama2, llama3):
        tokenizer = load_tokenizer(directory)
        for text in TEXTS:
            decoder, shown = IncrementalDecoder(tokenizer), ""
            for token_id in tokenizer.encode(text):
                shown += decoder.put(token_id)
                assert text.replace("\u2581", " ").startswith(shown.replace("\u2581", " "))


def test_words_without_a_decoder(tmp_path):
    """tokenizer.json without a decoder: tokens are words, joined by spaces."""
    vocab = {"<unk>": 0, "<s>": 1, "hello": 2, "world": 3}
    encoder = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    encoder.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder.add_special_tokens(["<s>"])
    encoder.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("<s>hello world <s>hello")
    assert ids == [1, 2, 3, 1, 2]
    assert tokenizer.decode(ids) == stream(tokenizer, ids) == "hello world hello" == encoder.decode(ids)
    assert tokenizer.bos_id is None


# --- stop ids, BOS, preference


def test_stop_ids(llama3, qwen, llama2, tmp_path, piece_model):
    eos = reference(llama3).eos_token_id
    assert load_tokenizer(llama3).stop_ids == {eos, eos + 3}  # config.json and generation_config.json
    assert load_tokenizer(qwen).stop_ids == {reference(qwen).eos_token_id}  # only tokenizer_config.json
    (tmp_path / "tokenizer.model").write_bytes(piece_model)
    assert load_tokenizer(tmp_path).stop_ids == {2}  # only the SentencePiece model itself
    write_json(tmp_path / "config.json", {"eos_token_id": [7, 8]})
    write_json(tmp_path / "generation_config.json", {"temperature": 0.6})
    assert load_tokenizer(tmp_path).stop_ids == {2, 7, 8}
    # This one is right where both name one; some editors begin it with a byte-order mark.
    (tmp_path / "generation_config.json").write_text('\ufeff{"eos_token_id": 9}')
    assert load_tokenizer(tmp_path).stop_ids == {2, 9}
    (tmp_path / "generation_config.json").unlink()
    write_json(tmp_path / "config.json", {"eos_token_id": "</s>"})
    with pytest.raises(ValueError, match="config.json: eos_token_id is '</s>'; expected a whole number or a list"):
        load_tokenizer(tmp_path)


def test_bos_follows_the_configuration(tmp_path, piece_model, llama3, qwen):
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "tokenizer.model").write_bytes(piece_model)
    # Meta's directory has no tokenizer_config.json and its code adds BOS (transformers 5 then adds none).
    assert load_tokenizer(alone).encode("a")[0] == load_tokenizer(alone).bos_id == 1
    without = write_llama2(tmp_path / "without", piece_model, add_bos_token=False)
    assert load_tokenizer(without).encode("a") == reference(without).encode("a")
    assert load_tokenizer(without).bos_id == 1
    assert load_tokenizer(qwen).bos_id is None
    for value in (True, False):  # no effect beside a tokenizer.json, whose post-processor decides
        for directory in (llama3, qwen):
            copy = variant(directory, tmp_path / f"{directory.name}-{value}", add_bos_token=value)
            ids = load_tokenizer(copy).encode("a")
            assert ids == reference(copy).encode("a")
            assert len(ids) == (2 if directory == llama3 else 1)


def variant(directory: Path, copy: Path, **config) -> Path:
    """A copy of a model directory with these entries in its tokenizer_config.json."""
    shutil.copytree(directory, copy)
    write_json(copy / "tokenizer_config.json", json.loads((copy / "tokenizer_config.json").read_text()) | config)
    return copy


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("name", ["llama3", "qwen", "llama2_json"])
def test_add_bos_token_decides_in_llama_classes(tmp_path, name, adds, request):
    """As in transformers 4, with which DeepSeek's models were made: their post-processor adds nothing."""
    config = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": adds}
    if name == "qwen":
        config["bos_token"] = "<|im_start|>"
    tokenizer = load_tokenizer(variant(request.getfixturevalue(name), tmp_path / "copy", **config))
    assert tokenizer.encode("a") == [tokenizer.bos_id] * adds + tokenizer.encode("a", bos=False)
    assert tokenizer.bos_id not in tokenizer.encode("a", bos=False)


@pytest.mark.parametrize("name", ["llama2", "llama3", "llama2_json", "meta_llama3"])
def test_a_text_that_begins_with_bos_gets_no_other(name, request):
    tokenizer = load_tokenizer(request.getfixturevalue(name))
    ids = tokenizer.encode(f"{tokenizer.bos_token}the dog")
    assert ids == tokenizer.encode(f"{tokenizer.bos_token}the dog", bos=False)
    assert ids.count(tokenizer.bos_id) == 1
    twice = tokenizer.encode(f"{tokenizer.bos_token}{tokenizer.bos_token}the")
    assert twice.count(tokenizer.bos_id) == 2  # what is written twice stays


# --- files that disagree


@pytest.mark.parametrize(
    ("in_config", "in_tokenizer_json"),
    [({"rstrip": True}, {}), ({"lstrip": True}, {}), ({}, {"lstrip": True}), ({}, {"special": False})],
)
@pytest.mark.parametrize("listed", [True, False])
def test_tokenizer_config_describes_a_token_before_tokenizer_json_does(
    tmp_path, llama3, in_config, in_tokenizer_json, listed
):
    copy, name = variant(llama3, tmp_path / "copy"), "<|end_of_text|>"
    data = json.loads((copy / "tokenizer.json").read_text())
    config = json.loads((copy / "tokenizer_config.json").read_text())
    if listed:
        rest = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
        config["added_tokens_decoder"] = {str(t["id"]): {"content": t["content"], **rest} for t in data["added_tokens"]}
    else:
        config["eos_token"] = {"content": name, "special": True, "__type": "AddedToken"}
    for tokens, flags in (
        (data["added_tokens"], in_tokenizer_json),
        (config.get("added_tokens_decoder", {}), in_config),
    ):
        for token in tokens if isinstance(tokens, list) else tokens.values():
            if token["content"] == name:
                token.update(flags)
    write_json(copy / "tokenizer.json", data)
    write_json(copy / "tokenizer_config.json", config)
    ours, theirs = load_tokenizer(copy), reference(copy)
    for text in (f"the {name} dog", f"{name} the", f"a{name}"):
        if listed or in_tokenizer_json.get("lstrip") is None:  # 5 drops the flags of a named token, 4 keeps them
            assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True)


def test_the_pre_tokenizer_says_how_the_vocabulary_is_spelt(tmp_path, llama3):
    """A byte-level vocabulary beside the decoder of SentencePiece models, as a conversion of Mistral's has it."""
    data = json.loads((llama3 / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    data["decoder"] = {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    data["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    write_json(variant(llama3, tmp_path / "copy") / "tokenizer.json", data)
    tokenizer = load_tokenizer(tmp_path / "copy")
    for text in ("How are you?", "Größe 你好 😀", " a word's space"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_a_token_that_the_model_lacks_is_refused(name, request):
    directory = request.getfixturevalue(name)
    special = {"llama2": "<mask>", "llama3": "<|eot_id|>"}[name]
    whole = load_tokenizer(directory)
    tokenizer = load_tokenizer(directory, whole.encode(special)[-1])
    assert tokenizer.encode("the dog") == whole.encode("the dog")
    with pytest.raises(ValueError, match=re.escape(f"the text has the token '{special}', number ")):
        tokenizer.encode(f"the {special} dog")


def test_template_args_are_variables_of_the_template(llama2):
    ours, theirs = load_tokenizer(llama2), reference(llama2)
    ours._template = theirs.chat_template = (
        "{{ enable_thinking }} {{ bos_token }} {{ tools }} {{ messages[0].content }}"
    )
    ours.template_args = {"enable_thinking": False, "bos_token": "<b>", "tools": [1]}
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, enable_thinking=False, bos_token="<b>")
    assert ours.apply_chat_template(MESSAGES) == expected.replace("None", "[1]")


def test_tokenizer_json_is_preferred_and_content_tells_models_apart(tmp_path, llama2, llama3, ranks):
    (tmp_path / "tokenizer.model").write_bytes((llama2 / "tokenizer.model").read_bytes())
    assert load_tokenizer(tmp_path).vocab_size == 420
    write_ranks(tmp_path / "tokenizer.model", ranks)
    assert load_tokenizer(str(tmp_path)).vocab_size == 656
    (tmp_path / "tokenizer.json").write_bytes((llama3 / "tokenizer.json").read_bytes())
    assert load_tokenizer(tmp_path).vocab_size == len(reference(llama3))


# --- chat templates


CHATS = [(name, template) for name in ("llama2", "llama3", "llama2_json") for template in TEMPLATES]
CHATS += [("qwen", "chatml"), ("qwen", "json")]  # Qwen has no bos_token, which the other templates write


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize(("name", "template"), CHATS)
def test_chat_template_equals_transformers(name, template, prompt, request):
    directory = request.getfixturevalue(name)
    ours, theirs = load_tokenizer(directory), reference(directory)
    ours._template = TEMPLATES[template]
    theirs.chat_template = TEMPLATES[template]
    rendered = ours.apply_chat_template(MESSAGES, add_generation_prompt=prompt)
    assert rendered == theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt, tokenize=False)
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt, return_dict=False)
    ids = ours.encode(rendered, bos=False)
    assert ids == expected
    if template in ("llama3", "mistral"):  # they write BOS themselves
        assert ids.count(ours.bos_id) == 1


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("llama2", "<s>[INST] <<SYS>>\nAnswer briefly.\n<</SYS>>\n\nWer "),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nAnswer briefly.<|eot_id|>",
        ),
        ("qwen", "<|im_start|>system\nAnswer briefly.<|im_end|>\n<|im_start|>user\nWer "),
        ("llama2_json", "<s>[INST] Answer briefly.\n\nWer "),
    ],
)
def test_chat_template_is_found(name, begins, request):
    """In tokenizer_config.json, as a string (llama2) or in a list (qwen), or in chat_template.jinja."""
    directory = request.getfixturevalue(name)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.has_chat_template
    rendered = tokenizer.apply_chat_template(MESSAGES)
    assert rendered.startswith(begins)
    assert rendered == reference(directory).apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)


def test_chat_template_file_wins(tmp_path, piece_model):
    directory = write_llama2(tmp_path, piece_model, chat_template="config")
    assert load_tokenizer(directory).apply_chat_template(MESSAGES) == "config"
    (directory / "chat_template.jinja").write_text("file")
    assert load_tokenizer(directory).apply_chat_template(MESSAGES) == "file"


def test_messages_keys_that_are_none_are_absent(llama2):
    ours, theirs = load_tokenizer(llama2), reference(llama2)
    ours._template = theirs.chat_template = "{% for m in messages %}{{ m.content is defined }}{{ m }}{% endfor %}"
    messages = [{"role": "assistant", "content": None, "tool_calls": []}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "chat template: roles must alternate"),
        (
            "{{ messages.__class__.__mro__ }}",
            "chat template: access to attribute '__class__' of 'list' object is unsafe",
        ),
        (
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "chat template: access to attribute '__class__' .* is unsafe",
        ),
        ("{{ messages.append(1) }}", "chat template: .*is not safely callable|chat template: .*unsafe"),
        ("{% if %}", "chat template: Expected an expression"),
        ("{{ nothing.here }}", "chat template: 'nothing' is undefined"),
        ("{{ messages[0].role + 1 }}", "chat template: can only concatenate str"),
    ],
)
def test_chat_template_errors(llama2, template, message):
    tokenizer = load_tokenizer(llama2)
    tokenizer._template = template
    with pytest.raises(ValueError, match=message):
        tokenizer.apply_chat_template(MESSAGES)
    assert MESSAGES[0] == {"role": "system", "content": "Answer briefly."}


def test_no_chat_template(tmp_path, piece_model):
    tokenizer = load_tokenizer(write_llama2(tmp_path, piece_model))
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="the model has no chat template: .*add chat_template.jinja"):
        tokenizer.apply_chat_template(MESSAGES)
    tokenizer._template = "x"
    with pytest.raises(ValueError, match="no messages"):
        tokenizer.apply_chat_template([])


# --- damaged files


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match="no tokenizer, expected one of tokenizer.json, tokenizer.model, tekken.json"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_empty(tmp_path, name):
    (tmp_path / name).write_bytes(b"\n")
    with pytest.raises(ValueError, match=f"{name}: the file is empty, download it again"):
        load_tokenizer(tmp_path)


def test_damaged_tokenizer_json(tmp_path, llama3):
    data = (llama3 / "tokenizer.json").read_bytes()
    for damaged in (data[: len(data) // 2], b"<!DOCTYPE html>", b"{}", b"[1]", b"\xff\xfe\x00"):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"tokenizer.json: not a Hugging Face tokenizer \(.+\), download it"):
            load_tokenizer(tmp_path)


def test_a_newer_tokenizer_json_needs_a_newer_package(tmp_path, llama3):
    data = json.loads((llama3 / "tokenizer.json").read_text())
    data["pre_tokenizer"] = {"type": "OfNextYear"}
    write_json(tmp_path / "tokenizer.json", data)
    with pytest.raises(ValueError, match=r"tokenizer.json: not a .*may need a newer .* pip install -U tokenizers"):
        load_tokenizer(tmp_path)


def test_damaged_tokenizer_model(tmp_path, piece_model):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 499723\n"
    for damaged in (piece_model[:-1], piece_model[: len(piece_model) // 2], b"\x00" * 100, pointer):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(ValueError, match="tokenizer.model: not a tokenizer, expected a SentencePiece model or"):
            load_tokenizer(tmp_path)


def test_damaged_llama3_ranks(tmp_path, ranks):
    path = tmp_path / "tokenizer.model"
    write_ranks(path, ranks)
    lines = path.read_bytes().splitlines(keepends=True)
    for line, damaged in (
        (400, b"".join(lines)[:-5]),  # the last line lost its rank
        (3, b"".join(lines[:2]) + b"\n" + b"".join(lines[2:])),
        (2, lines[0] + b"!!!! 1\n"),
        (2, lines[0] + b"AAA 1\n"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"tokenizer.model: line {line} is not 'base64 rank'"):
            load_tokenizer(tmp_path)
    for damaged in (lines[:255], lines[:300] + lines[301:], [*lines[:-1], lines[-1][:-2] + b"\n"]):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(ValueError, match="tokenizer.model: expected ranks 0, 1, 2, ... and every byte among"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json", "generation_config.json"])
def test_json_files_that_are_not(tmp_path, piece_model, name):
    (tmp_path / "tokenizer.model").write_bytes(piece_model)
    (tmp_path / name).write_text('{"eos_token_id": 2')
    with pytest.raises(ValueError, match=f"{name}: not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match=f"{name}: it is ..; expected an object"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("package", "name"),
    [("tokenizers", "llama3"), ("tokenizers", "meta_llama3"), ("sentencepiece", "llama2")],
)
def test_missing_package(package, name, request, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs the package {package}: pip install {package}"):
        load_tokenizer(request.getfixturevalue(name))


def test_missing_jinja2(llama2, monkeypatch):
    tokenizer = load_tokenizer(llama2)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match="needs the package jinja2: pip install jinja2"):
        tokenizer.apply_chat_template(MESSAGES)


def test_import_is_light():
    """Importing the module loads none of the optional packages."""
    code = "import sys, fast.tokenizer; print({'sentencepiece', 'tokenizers', 'jinja2', 'torch'} & set(sys.modules))"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
