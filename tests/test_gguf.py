"""gguf.py against transformers and the package `gguf`, on tiny files written as llama.cpp's converter writes them.

python -m pytest tests/test_gguf.py
SMOLLM2_GGUF=.../SmolLM2-135M-Instruct.Q4_1.gguf python -m pytest tests/test_gguf.py  # and a real file
"""

import contextlib
import os
import re
import sys
import unicodedata
from io import BytesIO
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from conftest import GREEDY, make_tiny, prompt_of
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf_files import finish, stored, write_bpe, write_model, write_sentencepiece
from test_tokenizer import CORPUS, LLAMA3_SPLIT, NASTY, TEKKEN_SPLIT, random_texts
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

import quantize
from fast import gguf as fast_gguf
from fast import gguf_tokenizer
from fast.checkpoint import load_model, open_checkpoint
from fast.decoding import build_steps, stream
from fast.gguf import read_header, read_tensors
from fast.quantized import GroupedLinear
from fast.tokenizer import load_tokenizer
from scripts.convert_hf_checkpoint import convert

PLAIN = {"rope_type": "default", "rope_theta": 1e4}
SIX_LAYERS = {
    "num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"], "query_pre_attn_scalar": 32,
}  # fmt: skip
GEMMA3 = {
    **SIX_LAYERS, "head_dim": 256, "query_pre_attn_scalar": 256,
    "rope_parameters": {"sliding_attention": PLAIN, "full_attention": {**PLAIN, "rope_theta": 1e6}},
}  # fmt: skip
QWEN3_MOE = {"head_dim": 128, "moe_intermediate_size": 768, "norm_topk_prob": True}
# Architecture in the file, family of conftest, changes. Transformers is known to read the first list's files, too.
READ_BY_TRANSFORMERS = [
    ("llama", "llama", {}),
    ("llama", "llama-tied", {}),
    ("llama", "llama-head-dim", {}),
    ("llama", "mistral", {}),
    ("qwen2", "qwen2", {}),
    ("qwen3", "qwen3", {"head_dim": 128}),
    ("qwen3moe", "qwen3-moe", QWEN3_MOE),
    ("gemma3", "gemma3", GEMMA3),
    ("phi3", "phi3", {"sliding_window": None}),
]
MODELS = READ_BY_TRANSFORMERS + [
    ("llama", "llama-bias", {}),
    ("llama", "llama-linear", {}),
    ("llama", "llama-llama3", {}),
    ("llama", "mixtral", {}),
    ("qwen3", "qwen3-yarn", {}),
    ("gemma3", "gemma3", SIX_LAYERS),
    ("phi3", "phi3", {}),
    ("phi3", "phi3-long", {}),
    ("phi3", "phi3-short", {}),
    ("granite", "granite", {}),
    ("granite", "granite-tied", {}),
    ("smollm3", "smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
]


def logits_of(path: Path, ids: list[int]) -> torch.Tensor:
    model = load_model(path, dtype=torch.float32)
    model.setup_caches(1, 64)
    return model(torch.tensor([ids]), torch.arange(len(ids)))


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("architecture", "family", "changes"), MODELS)
def test_a_file_gives_the_logits_of_the_model_it_was_made_from(tmp_path, architecture, family, changes):
    model, ids = make_tiny(family, **changes), prompt_of(40)
    path = write_model(tmp_path / "m.gguf", model, architecture)
    expected = model(torch.tensor([ids])).logits
    assert_close(logits_of(path, ids), expected)
    if (architecture, family, changes) in READ_BY_TRANSFORMERS:  # which shows that the file is as it should be
        read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
        assert_close(read(torch.tensor([ids])).logits, expected)


PACKED = ("Q4_0", "Q4_1", "Q8_0")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_types_of_tensors(tmp_path, kind):
    for family in ("mixtral", "llama"):
        model = make_tiny(family)
        path = write_model(tmp_path / "m.gguf", model, "llama", Type[kind])
        assert_close(logits_of(path, prompt_of(14)), model(torch.tensor([prompt_of(14)])).logits)
    checkpoint, raw = open_checkpoint(path), read_tensors(path)["blk.1.ffn_down.weight"]
    (part,) = checkpoint.tensors["layers.1.feed_forward.w2.weight"].parts
    assert (raw.type, raw.shape, raw.data.dtype) == (kind, (64, 96), torch.uint8)
    exact = torch.from_numpy(gguf.dequantize(raw.data.numpy(), Type[kind]))
    assert part.is_computed == kind.startswith("Q")
    if kind in PACKED:  # stored as a Linear stores them
        linear = load_model(path, dtype=torch.float32).layers[1].feed_forward.w2
        torch.testing.assert_close(linear.dequantize(torch.float32), exact, rtol=0, atol=1e-6)
        assert (linear.scales.dtype, linear.groupsize) == (torch.float16, 32)
        return
    assert checkpoint.quantization is None
    assert part.rows(3, 50).float().equal(exact[3:50])
    if not part.is_computed:  # a view of the mapped file
        assert part.read().untyped_storage().nbytes() == path.stat().st_size


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q5_1"])
def test_an_output_that_is_tied_keeps_its_type(tmp_path, kind):
    model = make_tiny("llama-tied")
    path = write_model(tmp_path / "m.gguf", model, "llama", Type[kind])
    assert_close(logits_of(path, prompt_of(14)), model(torch.tensor([prompt_of(14)])).logits)
    loaded = load_model(path, dtype=torch.float32)
    assert isinstance(loaded.output, GroupedLinear) == (kind in PACKED)
    table = loaded.tok_embeddings.weight
    if kind not in PACKED:
        assert loaded.output.weight is table
    else:
        torch.testing.assert_close(loaded.output.dequantize(torch.float32), table)


def test_linears_of_several_types(tmp_path):
    """As files have them: 4 bits of two kinds in one stacked Linear, and some weights in more bits."""
    model = make_tiny("llama")
    kinds = {"q_proj": Type.Q4_0, "o_proj": Type.Q8_0, "gate_proj": Type.Q8_0, "down_proj": Type.Q5_1}
    path = write_model(tmp_path / "m.gguf", model, "llama", Type.Q4_1, kinds)
    assert_close(logits_of(path, prompt_of(14)), model(torch.tensor([prompt_of(14)])).logits)
    scheme = open_checkpoint(path).quantization
    assert (scheme["mode"], scheme["bits"], scheme["zeros"], scheme["skip"]) == ("gguf", 4, "lowest", ["w13", "w2"])
    assert {name: given["bits"] for name, given in scheme["others"].items()} == {
        f"layers.{i}.attention.wo": 8 for i in range(2)
    }


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "MXFP4"])
def test_types_that_only_llama_cpp_makes(tmp_path, kind):
    width, n_bytes = gguf.GGML_QUANT_SIZES[Type[kind]]
    writer, rows = GGUFWriter(tmp_path / "m.gguf", "llama"), stored(Type[kind], np.empty((6, 512)), 0)
    writer.add_tensor("a", rows, raw_dtype=Type[kind])
    raw = read_tensors(finish(writer))["a"]
    assert (raw.type, raw.shape, raw.data.shape) == (kind, (6, 512), (6, 512 // width * n_bytes))
    exact = gguf.dequantize(rows, Type[kind])
    assert np.isfinite(exact).all()
    assert fast_gguf._part(raw).rows(2, 5).equal(torch.from_numpy(exact[2:5]))


# --- tokenizers -----------------------------------------------------------------------------------------------------

GPT4O_SPLIT = TEKKEN_SPLIT.replace(r"+|[^\r", r"+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r", 1)
GPT4O_SPLIT = GPT4O_SPLIT.replace(r"*|\p{N}|", r"*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|")
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL])
PRE_TOKENIZERS = {
    "gpt-2": BYTE_LEVEL, "smollm": DIGITS, "refact": DIGITS,
    "llama-bpe": LLAMA3_SPLIT, "dbrx": LLAMA3_SPLIT, "tekken": TEKKEN_SPLIT, "gpt-4o": GPT4O_SPLIT,
    "qwen2": LLAMA3_SPLIT.replace("{1,3}", ""), "deepseek-r1-qwen": LLAMA3_SPLIT.replace("{1,3}", ""),
}  # fmt: skip
WITH_BOS = ("llama-bpe", "tekken")
TEXTS = [*NASTY, *random_texts(100), "1234567 12,345.67 x2y33 ²³½ ٣٤", "It's WE'LL DON'Ts CamelCaseWords HTTPServer"]


def byte_level_bpe(pre: str) -> Tokenizer:
    split, tokenizer = PRE_TOKENIZERS[pre], Tokenizer(models.BPE(ignore_merges=pre in WITH_BOS))
    if isinstance(split, str):
        words, spell = pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
        split = pre_tokenizers.Sequence([words, spell])
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    special, alphabet = ["<|bos|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, "1234567 2024 1999 33 333"] * 3, trainer)
    tokenizer.add_tokens(["<think>"])
    return tokenizer


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_bpe(tmp_path, pre):
    expected = byte_level_bpe(pre)
    tokenizer = load_tokenizer(write_bpe(tmp_path / "m.gguf", expected, pre), 600)
    bos = [0] if pre in WITH_BOS else []
    for text in [*TEXTS, "<|im_start|>Hi <think>so</think><|im_end|> 42", "<|bos|>twice"]:
        ids = expected.encode(text).ids
        assert tokenizer.encode(text, bos=False) == ids
        assert tokenizer.encode(text) == (ids if ids[:1] == bos else bos + ids)
        plain = re.sub(r"<\|\w+\|>", "", text)
        assert tokenizer.decode(ids) == (unicodedata.normalize("NFC", plain) if pre == "qwen2" else plain)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (0, 2, {2, 3})
    assert tokenizer.decode([expected.get_vocab_size()]) == ""  # [PAD]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]) == "<|bos|><|im_start|>Hi<|im_end|>"


@pytest.mark.parametrize("adds_space", [True, False])
def test_sentencepiece(tmp_path, adds_space):
    out = BytesIO()
    user_defined = [] if adds_space else ["\n\n", "\u2581\u2581", "\u2581\u2581\u2581", "<think>"]  # as Gemma
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=out, vocab_size=430, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98, num_threads=1,
        minloglevel=2, add_dummy_prefix=adds_space, user_defined_symbols=user_defined,
    )  # fmt: skip
    expected = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path / "m.gguf", expected, user_defined, adds_space))
    for text in TEXTS:
        ids = expected.encode(text)
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode(ids) == expected.decode(ids)
    assert tokenizer.encode("</s>a", bos=False) == [2, *expected.encode("xa")[-1:]]
    assert (tokenizer.bos_token, tokenizer.stop_ids, tokenizer.vocab_size) == ("<s>", {2}, 430)


# --- what is wrong with a file --------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path) -> Path:
    return write_model(tmp_path / "small.gguf", make_tiny("llama"), "llama")


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        open_checkpoint(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_factors_that_are_none_are_refused(tmp_path, monkeypatch, factor):
    path = write_model(tmp_path / "m.gguf", make_tiny("llama-llama3"), "llama")
    monkeypatch.setattr(fast_gguf, "_floats", lambda raw: [factor] * raw.shape[0])
    assert_refused(path, f"rope_scaling has ({factor}, ")


def test_a_damaged_file_is_refused(small):
    data = small.read_bytes()
    for size in (5, 20, 100, 1000, 2000, len(data) - 33000, len(data) - 100):
        small.write_bytes(data[:size])
        assert_refused(small, "download it again")
    for start, message in [
        (b"GGUX\3\0\0\0", "is not a GGUF file: it begins with b'GGUX', expected b'GGUF'"),
        (b"GGUF\0\0\0\3", "a GGUF file that is big-endian; expected version 2 or 3, little-endian"),
        (b"GGUF\1\0\0\0", "a GGUF file that is of version 1; expected version 2 or 3, little-endian"),
        (b"", "is empty: download it again"),
    ]:
        small.write_bytes(start and start + data[8:])
        assert_refused(small, message)
    for seed in range(100):  # any bytes of the header
        broken, rng = np.frombuffer(data, np.uint8).copy(), np.random.default_rng(seed)
        broken[rng.integers(0, 3000, 3)] = rng.integers(0, 256, 3)
        small.write_bytes(broken.tobytes())
        with contextlib.suppress(ValueError):
            open_checkpoint(small)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported; supported: llama, qwen2, qwen3,"),
        ({"general.architecture": "clip"}, "is a vision projector (mmproj), not a language model: give the .gguf of"),
        ({"general.type": "adapter"}, "is of type 'adapter', not a language model: give the .gguf of the model that"),
        ({"split.count": 3}, "is one of 3 files that hold a model: join them with llama-gguf-split --merge"),
        ({"llama.block_count": None}, "holds no whole model: missing llama.block_count"),
        ({"llama.block_count": 3}, "holds no whole model: missing blk.2.attn_norm.weight"),
        ({"llama.block_count": 2**31}, "holds no whole model: missing blk.2147483647.attn_norm.weight"),
        ({"llama.block_count": 0}, "missing blk.-1.attn_norm.weight"),
        ({"general.architecture": ["llama"]}, "architecture ['llama'] is not supported"),
        ({"split.count": "3"}, "is one of '3' files that hold a model"),
        ({"llama.block_count": 1}, "unexpected tensors: blk.1.attn_k.weight [32, 64], "),
        ({"llama.attention.head_count_kv": [2, 2]}, "llama.attention.head_count_kv is [2, 2]; expected a whole number"),
        ({"llama.rope.dimension_count": 8}, "partial_rotary_factor 0.5 is not supported"),
        ({"llama.rope.scaling.type": "su"}, "rope type 'su' is not supported; supported: default, linear"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path, monkeypatch, changes, message):
    def altered(path):
        header = read_header(path)
        values = {**header.metadata, **changes}
        return header._replace(metadata={key: value for key, value in values.items() if value is not None})

    read_header = fast_gguf.read_header
    monkeypatch.setattr(fast_gguf, "read_header", altered)
    assert_refused(write_model(tmp_path / "m.gguf", make_tiny("llama"), "llama"), message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "bert", "tokenizer 'bert' is not supported; supported: gpt2, llama"),
        ("pre", "falcon", "pre-tokenizer 'falcon' is not supported; supported: gpt-2, smollm, "),
        ("pre", None, "pre-tokenizer None is not supported"),
        ("pre", ["gpt-2"], "pre-tokenizer ['gpt-2'] is not supported"),
        ("token_type", [1], "not a whole tokenizer (ValueError"),
        ("bos_token_id", 9999, "bos_token_id is 9999; expected the number of a token"),
        ("eot_token_id", -5, "eot_token_id is -5; expected the number of a token"),
        ("eos_token_id", "</s>", "eos_token_id is '</s>'; expected a whole number"),
        ("add_bos_token", "no", "add_bos_token is 'no'; expected true or false"),
        ("token_type", [1.5], "token_type.0 is 1.5; expected a whole number"),
        ("tokenizer.chat_template", 5, "tokenizer.chat_template is 5; expected a text"),
        ("merges", ["a bc"], "not a whole tokenizer (Exception"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_refused(tmp_path, monkeypatch, key, value, message):
    path = write_bpe(tmp_path / "m.gguf", byte_level_bpe("gpt-2"), "gpt-2")
    key = key if "." in key else f"tokenizer.ggml.{key}"
    (header := fast_gguf.read_header(path)).metadata[key] = value
    monkeypatch.setattr(gguf_tokenizer, "read_header", lambda path: header)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        load_tokenizer(path)


def test_a_missing_package_is_named_where_it_is_needed(tmp_path, monkeypatch):
    model = make_tiny("llama")
    plain = write_model(tmp_path / "plain.gguf", model, "llama", Type.BF16)
    held = write_model(tmp_path / "held.gguf", model, "llama", Type.Q4_1)
    quantised = write_model(tmp_path / "quantised.gguf", model, "llama", Type.Q5_0)
    monkeypatch.setitem(sys.modules, "gguf", None)
    fast_gguf._block.cache_clear()
    open_checkpoint(plain)
    open_checkpoint(held)
    with pytest.raises(ImportError, match="pip install gguf"):
        open_checkpoint(quantised)
    bpe = write_bpe(tmp_path / "bpe.gguf", byte_level_bpe("gpt-2"), "gpt-2")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        load_tokenizer(bpe)


@pytest.mark.parametrize(("kind", "shape"), [(Type.Q8_0, (64,)), (Type.F32, (0,)), (Type.Q4_0, (0, 32))])
def test_tensors_of_other_shapes(tmp_path, kind, shape):
    """A quantised norm is dequantised; a tensor without elements is damage."""
    raw = stored(kind, np.ones(shape, np.float32), 0)
    writer = GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("output_norm.weight", raw, raw_dtype=kind)
    one = read_header(path := finish(writer))
    if 0 in shape:
        with pytest.raises(ValueError, match="is damaged, or ends before its tensor output_norm.weight"):
            read_tensors(path, one)
    else:
        found = read_tensors(path, one)["output_norm.weight"]
        assert torch.allclose(fast_gguf._part(found).read(), torch.ones(shape), atol=1e-3)


def test_what_is_made_of_a_file_has_its_tokenizer(tmp_path, capsys):
    """Converted beside it, quantised or not, and quantised by quantize.py if it is not."""
    model, ids = make_tiny("llama"), prompt_of(14)
    with_tokenizer = write_bpe(tmp_path / "m.gguf", byte_level_bpe("gpt-2"), "gpt-2")
    expected = load_tokenizer(with_tokenizer).encode("1234 and more")
    (tmp_path / "other").mkdir()
    path = write_model(tmp_path / "other" / "m.gguf", model, "llama", Type.Q4_0)
    converted = convert(path, torch.float32)
    assert_close(logits_of(converted, ids), model(torch.tensor([ids])).logits)
    assert open_checkpoint(converted).quantization == open_checkpoint(path).quantization
    assert quantize.main(["--checkpoint_path", str(path), "--mode", "int8"]) == 2
    assert "is quantised already (gguf): give the unquantised" in capsys.readouterr().err
    path = write_model(path, model, "llama", Type.F16)
    assert quantize.main(["--checkpoint_path", str(path), "--mode", "int8"]) == 0
    assert load_model(path.parent / "model_int8.pth").quantization["mode"] == "int8"
    with_tokenizer.replace(path)
    assert load_tokenizer(path.parent / "model_int8.pth").encode("1234 and more") == expected
    (path.parent / "m2.gguf").touch()  # another file in another type, which lies there too
    assert load_tokenizer(converted).encode("1234 and more") == expected
    with pytest.raises(FileNotFoundError, match="no tokenizer, expected one of tokenizer.json, .* or one .gguf"):
        load_tokenizer(path.parent / "model_int8.pth")


@pytest.mark.skipif("SMOLLM2_GGUF" not in os.environ, reason="SMOLLM2_GGUF names no file")
def test_a_real_file():
    path = Path(os.environ["SMOLLM2_GGUF"])
    tokenizer, expected = load_tokenizer(path), Tokenizer.from_file(str(path.parent / "smollm2" / "tokenizer.json"))
    hf = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    assert tokenizer.chat_template == (path.parent / "smollm2" / "chat_template.jinja").read_text()
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Name 3 rivers, in 1999: Größe, 你好\n\n"}])
    for text in [*TEXTS, prompt]:
        assert tokenizer.encode(text) == tokenizer.encode(text, bos=False) == expected.encode(text).ids
    ids = tokenizer.encode(prompt)
    model = load_model(path, dtype=torch.float32)
    model.setup_caches(1, 128)
    with torch.no_grad():
        logits = hf(torch.tensor([ids])).logits
        tokens = hf.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :].tolist()
    assert_close(model(torch.tensor([ids]), torch.arange(len(ids))), logits)
    assert [row[0] for row in stream(build_steps(model, GREEDY), [ids], len(tokens))] == tokens
