"""The command line of generate.py as a user runs it, on a tiny random model and on the demo.

    python -m pytest tests/test_cli.py

Worth knowing: importing torch takes seconds, so most tests call `generate.main` in this process. Tests of signals,
of a terminal and of exit codes start a new one.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import importlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import sentencepiece
import torch
from conftest import make_tiny
from tqdm import tqdm

import generate
from fast import chat, cli, compiling, prompts, rows
from fast.checkpoint import load_model
from fast.cli import DEMO, check_device
from fast.decoding import build_steps, stream
from fast.sampling import Sampling
from fast.tokenizer import load_tokenizer

ROOT = Path(generate.__file__).parent
TEXTS = ["A module holds definitions and statements.", "The list is sorted in place, and nothing is returned."] * 8
CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
CONTEXT = 4096


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A Hugging Face directory: a chat template, and a random model whose greedy token is never a special one."""
    directory, pieces, n_pieces = tmp_path_factory.mktemp("cli") / "model", io.BytesIO(), 320
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=pieces, vocab_size=n_pieces, model_type="bpe", byte_fallback=True,
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    hf = make_tiny("llama", vocab_size=n_pieces + 2, max_position_embeddings=CONTEXT)
    hf.lm_head.weight[[0, 1, 2, n_pieces, n_pieces + 1]] = 0
    hf.save_pretrained(directory)
    (directory / "tokenizer.model").write_bytes(pieces.getvalue())
    added = {"1": "<s>", "2": "</s>", str(n_pieces): "<|im_start|>", str(n_pieces + 1): "<|im_end|>"}
    decoder = {i: {"content": text, "normalized": False, "special": True} for i, text in added.items()}
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "added_tokens_decoder": decoder}
    write_json(directory / "tokenizer_config.json", config)
    (directory / "chat_template.jinja").write_text(CHATML)
    return directory


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A copy of that directory, for a test to change."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture
def main(checkpoint, capsys):
    """`main("--flag", value)`: exit code, stdout and stderr of the command line, greedy unless told otherwise."""
    settings = torch._inductor.config.save_config()  # the command line changes them; they are restored after the test

    def call(*flags, checkpoint_path=checkpoint) -> tuple[int, str, str]:
        defaults = ["--checkpoint_path", checkpoint_path, "--device", "cpu", "--dtype", "float32", "--temperature", 0]
        capsys.readouterr()
        code = generate.main([str(flag) for flag in [*defaults, "--max_new_tokens", 12, *flags]])
        return code, *capsys.readouterr()

    yield call
    torch._inductor.config.load_config(settings)


@pytest.fixture
def figures(main, tmp_path):
    """`figures("--flag", value)`: the figures that a run without errors writes to `--metrics_path`."""

    def call(*flags, **options) -> dict:
        path = tmp_path / "figures.json"
        code, _, err = main("--metrics_path", path, *flags, **options)
        assert code == 0, err
        return json.loads(path.read_text(encoding="utf-8"))

    return call


def command(*flags) -> dict:
    """Arguments for `subprocess` that run generate.py from the repository's root."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    return {"args": [sys.executable, "generate.py", *map(str, flags)], "cwd": ROOT, "env": environment}


def run(*flags, given: str | None = None) -> subprocess.CompletedProcess:
    """Run generate.py, with `given` piped in."""
    stdin = {"stdin": subprocess.DEVNULL} if given is None else {"input": given}
    return subprocess.run(**command(*flags), **stdin, capture_output=True, text=True, timeout=300)


# --- one run ---------------------------------------------------------------------------------------------------------


def test_a_run_prints_the_text_on_stdout_and_the_rest_on_stderr(checkpoint, tmp_path):
    flags = ["--checkpoint_path", checkpoint, "--prompt", "The list", "--max_new_tokens", 20, "--device", "cpu"]
    done = run(*flags, "--num_samples", 2, "--metrics_path", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert done.stdout == "".join(f"The list{sample['text']}\n\n" for sample in figures["samples"])
    assert done.stderr.startswith(f"{checkpoint}: 0.1 M parameters, bfloat16, cpu\n\n  first token ")
    assert figures["samples"][0]["tokens"] != figures["samples"][1]["tokens"]  # sampled by default
    for label in ("prefill ", "decode ", "MB/token", "GB/s", "\nmedian of 2: ", "load ", "compile ", "peak memory "):
        assert label in done.stderr


@pytest.mark.parametrize(
    "family", ["llama-yarn", "ministral", "mistral3", "qwen2-mixed", "qwen3-yarn", "phi3", "phi3-short", "smollm3",
               "granite", "granite-4", "gemma3", "gemma3-vision", "seed-oss", "ernie", "helium", "mixtral",
               "qwen3-moe"],
)  # fmt: skip
def test_a_family_gives_the_tokens_that_transformers_gives(copy, figures, family):
    for file in copy.glob("model*"):
        file.unlink()
    hf = make_tiny(family, vocab_size=322)
    hf.get_output_embeddings().weight[[0, 1, 2, 320, 321]] = 0  # so that no special token is the greedy choice
    hf.save_pretrained(copy)
    prompt = load_tokenizer(copy).encode("The list is")
    hf.generation_config.eos_token_id = None
    theirs = hf.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=0)
    (sample,) = figures("--prompt", "The list is", checkpoint_path=copy)["samples"]
    assert sample["tokens"] == theirs[0, len(prompt) :].tolist()


def test_more_positions_than_the_configuration_promises_are_a_warning(main):
    code, _, err = main("--prompt", "The list", "--max_seq_length", CONTEXT + 1, "--max_new_tokens", 2)
    assert code == 0
    assert f"--max_seq_length {CONTEXT + 1}: the model's configuration promises {CONTEXT} positions; more may" in err


@pytest.mark.parametrize("script", ["generate", "quantize", "eval"])
def test_threads(monkeypatch, script):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    assert importlib.import_module(script).main(["--threads", "1", "--checkpoint_path", "no-such-file"]) == 2
    assert chosen == [1]


def test_one_sample_has_its_figures_once(main):
    code, out, err = main("--prompt", "The list")
    assert code == 0
    assert out.startswith("The list")
    assert out.count("\n") == 1
    assert err.count("first token") == 1
    assert "median" not in err


def test_building_the_kernels_is_not_loading(figures, monkeypatch):
    def build(*_):
        time.sleep(1.1)

    monkeypatch.setattr(generate, "kernels_missing", build)
    data = figures()
    assert data["build_s"] > 1.1
    assert data["load_s"] < 1


def test_a_quantized_cache_has_fewer_bytes(figures, main):
    plain, int8 = (figures("--prompt", "The list", "--kv_dtype", kind) for kind in ("auto", "int8"))
    assert (plain["kv_dtype"], int8["kv_dtype"]) == ("float32", "int8")
    positions, layers, kv_heads, head_dim = len(plain["samples"][0]["prompt_tokens"]) + 11 / 2, 2, 2, 16
    saved = positions * layers * 2 * kv_heads * (4 * head_dim - (head_dim + 4))
    assert plain["bytes_per_token"] - int8["bytes_per_token"] == saved
    assert "0.1 M parameters, float32, int8 cache, cpu" in main("--kv_dtype", "int8")[2]


def test_a_cache_in_fp8_needs_a_gpu_that_has_it(main, monkeypatch):
    monkeypatch.setattr(generate, "resolve_device", lambda args: (args.device, torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    code, _, err = main("--kv_dtype", "fp8", "--device", "cuda")
    assert code == 2
    assert_one_error(err, "--kv_dtype fp8 needs compute capability 8.9, this GPU has 8.6: use int8")


def test_metrics_file_keeps_the_contract(figures, checkpoint):
    data = figures("--prompt", "A module", "--batch_size", 2, "--num_samples", 2)
    assert data["model"] == json.loads(json.dumps(dataclasses.asdict(load_model(checkpoint).args)))
    assert (data["device"], data["dtype"], data["quantization"]) == ("cpu", "float32", None)
    assert data["acceptance"] is None
    assert data["compile_s"] == 0.0
    for key in ("load_s", "bytes_per_token", "bandwidth_gb_s"):
        assert isinstance(data[key], float)
        assert data[key] > 0
    assert isinstance(data["peak_memory_bytes"], int)
    assert len(data["samples"]) == 4  # one entry per row
    tokenizer = load_tokenizer(checkpoint)
    for row in data["samples"]:
        assert row["prompt_tokens"] == tokenizer.encode("A module")
        assert len(row["tokens"]) == 12
        assert all(isinstance(token, int) for token in row["tokens"])
        assert tokenizer.decode(row["prompt_tokens"] + row["tokens"]) == "A module" + row["text"]
        assert row["finish_reason"] == "length"
        for key in ("ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s"):
            assert isinstance(row[key], float)
            assert row[key] > 0


def test_a_single_token_has_no_decode_figures(figures):
    data = figures("--max_new_tokens", 1)
    assert len(data["samples"][0]["tokens"]) == 1
    assert data["samples"][0]["decode_tokens_per_s"] is data["bandwidth_gb_s"] is None


def test_temperature_0_is_the_same_text_from_directory_and_pth(main, checkpoint, tmp_path):
    model = load_model(checkpoint, dtype=torch.float32)
    shutil.copytree(checkpoint, tmp_path / "pth", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    content = {"format": 1, "config": dataclasses.asdict(model.args), "quantization": None, "model": model.state_dict()}
    torch.save(content, tmp_path / "pth" / "model.pth")
    outputs = [main("--seed", 1), main("--seed", 2), main(checkpoint_path=tmp_path / "pth" / "model.pth")]
    texts = {out for _, out, _ in outputs}
    assert [code for code, *_ in outputs] == [0, 0, 0]
    assert len(texts) == 1
    assert len(texts.pop()) > len(prompts.DEFAULT) + 1


def test_seed_decides_the_sample(figures):
    rows = [figures("--temperature", 1, "--seed", seed, "--num_samples", 2)["samples"] for seed in (7, 7, 8)]
    first, again, other = [[row["tokens"] for row in sample] for sample in rows]
    assert first == again != other
    assert first[0] != first[1]


def test_rows_of_a_prompt_file_are_what_each_prompt_gives_alone(main, figures, tmp_path):
    prompts, path = ["The list is", "A", "A module holds"], tmp_path / "prompts.txt"
    path.write_text("\n".join([prompts[0], "", prompts[1], "  ", prompts[2]]), encoding="utf-8")
    alone = [figures("--prompt", prompt)["samples"][0] for prompt in prompts]
    for size in ([], ["--batch_size", 2]):
        rows = figures("--prompt_file", path, *size)["samples"]
        for key in ("prompt_tokens", "tokens", "text"):
            assert [row[key] for row in rows] == [row[key] for row in alone]
    for size in ([], ["--batch_size", 2]):  # numbered through, in order, also where the last batch is one row
        out = main("--prompt_file", path, *size)[1]
        assert out == "".join(f"[{i + 1}] {prompts[i]}{row['text']}\n\n" for i, row in enumerate(alone))


def test_rows_are_printed_in_order(main, figures, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("The list is\nA module holds", encoding="utf-8")
    first, second = (row["text"] for row in figures("--prompt_file", path)["samples"])
    stop = next(second[i : i + 2] for i in range(2, len(second)) if second[i : i + 2] not in first)
    out = main("--prompt_file", path, "--stop", stop)[1]  # the second row ends first
    assert out.startswith(f"[1] The list is{first}\n\n[2] A module holds")
    assert len(out) < len(f"[1] The list is{first}\n\n[2] A module holds{second}")


def test_a_number_is_a_made_up_prompt_of_that_length(main, figures):
    row = figures("--prompt", 16)["samples"][0]
    assert len(row["prompt_tokens"]) == 16
    assert len(set(row["prompt_tokens"])) > 8
    out = main("--prompt", 16)[1]
    assert out == row["text"] + "\n"  # a made-up prompt is not shown


@pytest.mark.parametrize("flags", [["--chat", "--prompt", "40"], ["--prompt", "016"], ["--prompt", "\u0663"]])
def test_a_number_that_is_text(figures, flags):
    row = figures(*flags)["samples"][0]
    assert row["prompt_tokens"] == figures(*flags)["samples"][0]["prompt_tokens"]  # not drawn
    assert len(row["prompt_tokens"]) not in (3, 40)


@pytest.fixture
def pipe(monkeypatch, tmp_path):
    """`pipe(content, errors="strict")`: make these bytes the stdin of the next command."""

    def call(content: bytes, errors: str = "strict") -> None:
        (tmp_path / "stdin").write_bytes(content)
        monkeypatch.setattr(sys, "stdin", open(tmp_path / "stdin", encoding="utf-8", errors=errors))  # noqa: SIM115

    return call


def test_stdin_is_the_prompt(main, pipe, checkpoint, tmp_path):
    text = "The list\n\nA module"
    (tmp_path / "prompt.txt").write_text(text + "\n")
    expected = main("--prompt", text)
    assert expected[1].startswith("The list A module")  # as this tokenizer writes it
    (tmp_path / "marked.txt").write_text("\ufeff" + text)  # a byte-order mark is not text
    files = [f"@{tmp_path / name}" for name in ("prompt.txt", "marked.txt")]
    for flags in ([], ["--prompt", "-"], *(["--prompt", file] for file in files)):
        pipe((text if flags else "\ufeff" + text).encode() + b"\n")
        assert main(*flags)[:2] == expected[:2]
    pipe(text.encode())
    lines = main("--prompt_file", "-", "--batch_size", 1)[1]
    assert re.fullmatch(r"\[1\] The list.*\n\n\[2\] A module.*\n\n", lines, re.DOTALL)
    pipe(b"")
    _, out, err = main()
    assert out.startswith(prompts.DEFAULT)
    assert err.startswith("stdin is empty, so the prompt is")
    flags = ["--checkpoint_path", checkpoint, "--max_new_tokens", 3, "--device", "cpu"]
    assert run(*flags, given="The list\n").stdout.startswith("The list")  # through a pipe


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # as Python opens stdin in UTF-8 and in C locales
def test_bytes_that_are_not_utf8(main, pipe, errors):
    pipe(b"caf\xe9\nThe list\n", errors)
    code, out, err = main("--interactive")
    assert code == 0
    assert "ot UTF-8 text" in err
    assert out  # the conversation went on
    for given in ([], ["--prompt", "caf\udce9"]):
        pipe(b"caf\xe9\nThe list\n", errors)
        code, out, err = main(*given)
        assert (code, out) == (2, "")
        assert_one_error(err, "not UTF-8 text")


def test_stderr_closed(checkpoint):
    flags = ["--checkpoint_path", checkpoint, "--prompt", "The list", "--max_new_tokens", 3, "--device", "cpu"]
    arguments = command(*flags)
    arguments["args"] = ["sh", "-c", 'exec "$@" 2>&-', "sh", *arguments["args"]]
    done = subprocess.run(**arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout.startswith("The list")
    assert done.stdout.count("\n") == 1


def test_figures_replace_only_figures(main, copy, tmp_path):
    path = tmp_path / "figures.json"
    for _ in range(2):
        assert main("--metrics_path", path)[0] == 0
    trace = tmp_path / "trace.json"
    for _ in range(2):
        assert main("--profile", trace)[0] == 0
    for name in ("model.safetensors", "config.json", "tokenizer_config.json", "tokenizer.model"):
        before = (copy / name).read_bytes()
        for flag in ("--metrics_path", "--profile"):
            code, _, err = main(flag, copy / name, checkpoint_path=copy)
            assert code == 2
            assert_one_error(err, f"cannot write {copy / name}: it holds neither figures nor a trace; name another")
        assert (copy / name).read_bytes() == before
    code, _, err = main("--metrics_path", path, "--profile", path)
    assert code == 2
    assert_one_error(err, f"--metrics_path and --profile are both {path}: name two files")


def test_a_missing_prompt_is_found_before_loading(main, monkeypatch):
    monkeypatch.setattr(generate, "load", None)
    for flags in (["--prompt_file", "no/such/file"], ["--prompt", "@no/such/file"]):
        code, _, err = main(*flags)
        assert code == 2
        assert_one_error(err, "no/such/file")


def test_stop_text_ends_the_row_and_is_not_shown(main, figures):
    text = figures()["samples"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    row = figures("--stop", "never in it", "--stop", stop)["samples"][0]
    assert row["finish_reason"] == "stop"
    assert row["text"] == text[: text.index(stop)]
    assert len(row["tokens"]) < 12
    assert main("--stop", stop)[1] == f"{prompts.DEFAULT}{row['text']}\n"


def test_stop_id_of_generation_config_ends_the_row(figures, copy):
    tokens = figures()["samples"][0]["tokens"]
    end = tokens[5]
    write_json(copy / "generation_config.json", {"eos_token_id": [2, end]})
    row = figures(checkpoint_path=copy)["samples"][0]
    assert row["finish_reason"] == "stop"
    assert row["tokens"] == tokens[: tokens.index(end) + 1]


def test_chat_and_system_fill_the_template(main, figures, checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    chat = "<|im_start|>user\nSort it<|im_end|>\n<|im_start|>assistant\n"
    system = "<|im_start|>system\nBe brief<|im_end|>\n"
    row = figures("--chat", "--prompt", "Sort it")["samples"][0]
    assert row["prompt_tokens"] == tokenizer.encode(chat, bos=False)
    row = figures("--chat", "--prompt", "Sort it", "--system", "Be brief")["samples"][0]
    assert row["prompt_tokens"] == tokenizer.encode(system + chat, bos=False)
    assert main("--chat", "--prompt", "Sort it", "--system", "Be brief")[1] == row["text"] + "\n"


def test_max_new_tokens_is_cut_to_what_fits(main, checkpoint):
    n = len(load_tokenizer(checkpoint).encode(prompts.DEFAULT))
    code, _, err = main("--max_seq_length", n + 4, "--max_new_tokens", 9)
    assert code == 0
    assert f"\nonly 5 new tokens fit after the prompt's {n}\n" in err  # the last is not cached
    assert "only" not in main("--max_seq_length", n + 4, "--max_new_tokens", 5)[2]


def test_profile_is_a_chrome_trace(main, tmp_path):
    code, _, err = main("--profile", tmp_path / "trace.json", "--num_samples", 2)
    assert code == 0
    assert f"trace: {tmp_path / 'trace.json'}" in err
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert "aten::scaled_dot_product_attention" in names


@pytest.mark.parametrize(
    ("lacking", "reason"),
    [
        ("CXX", "no C++ compiler"),
        ("PATH", "no C++ compiler"),
        ("Python.h", "Python.h"),
        ("C++20", "does not take C++20"),
        ("TORCHINDUCTOR_CACHE_DIR", "cannot be written"),
    ],
)
def test_compile_without_what_it_needs_goes_on(main, monkeypatch, tmp_path, lacking, reason):
    plain = main()[1]
    if lacking == "Python.h":
        monkeypatch.setattr(compiling.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    elif lacking == "C++20":
        monkeypatch.setenv("CXX", "false")  # a command that always fails
    elif lacking == "TORCHINDUCTOR_CACHE_DIR":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv(lacking, str(tmp_path / "file" / "cache"))
    else:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv(lacking, str(tmp_path / "nothing-here"))
    code, out, err = main("--compile", "--compile_prefill")
    assert (code, out) == (0, plain)
    assert err.count("not compiling\n") == 1
    assert reason in err.split("\n")[0]


# --- conversations ---------------------------------------------------------------------------------------------------


@pytest.fixture
def converse(main, monkeypatch):
    """`converse(lines, "--flag", value)`: stdout, stderr, and (prompt, cached) that each turn passed to `stream`."""

    def call(lines, *flags, **options):
        calls, typed = [], iter(lines)

        def spy(steps, prompts, max_new_tokens, cached=0):
            calls.append((prompts[0], cached))
            return stream(steps, prompts, max_new_tokens, cached)

        def ask(prompt=""):
            with contextlib.suppress(StopIteration):
                return next(typed)
            raise EOFError

        monkeypatch.setattr(rows, "stream", spy)
        monkeypatch.setattr("builtins.input", ask)
        code, out, err = main("--interactive", *flags, **options)
        assert code == 0, err
        return out, err.split("cpu\n", 1)[1], calls

    return call


def test_a_conversation_keeps_its_cache_and_says_what_it_would_say_without(converse, checkpoint):
    lines = ["The list", "A module", "sorted"]
    out, err, calls = converse(["", lines[0], "   ", *lines[1:]], "--system", "Be brief")
    model, tokenizer = load_model(checkpoint, dtype=torch.float32), load_tokenizer(checkpoint)
    model.setup_caches(1, 512)
    steps, messages, expected = build_steps(model, Sampling(0)), [{"role": "system", "content": "Be brief"}], ""
    before = []
    for line, (given, cached) in zip(lines, calls, strict=True):
        messages.append({"role": "user", "content": line})
        prompt = tokenizer.encode(tokenizer.apply_chat_template(messages), bos=False)
        with torch.no_grad():
            tokens = [ids[0] for ids in stream(steps, [prompt], 12)]
        answer = tokenizer.decode(prompt + tokens).removeprefix(tokenizer.decode(prompt))
        messages.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
        assert given == prompt[cached:]
        assert cached >= len(before)
        before = prompt
    assert calls[0][1] == 0
    assert out == expected
    assert err == "(cut after 12 tokens: --max_new_tokens)\n" * 3


def test_without_a_template_it_goes_on_from_what_is_written(converse, copy):
    (copy / "chat_template.jinja").unlink()
    out, err, calls = converse(["The list", "is sorted"], checkpoint_path=copy)
    tokenizer = load_tokenizer(copy)
    assert err.startswith("this model has no chat template: it continues your text\n")
    assert calls[0] == (tokenizer.encode("The list"), 0)
    answer = out.split("\n")[0]
    assert calls[1][1] >= len(tokenizer.encode("The list"))
    assert calls[1][0] == tokenizer.encode("The list" + answer + "\n\nis sorted")[calls[1][1] :]


def test_the_last_token_of_an_answer_is_not_taken_for_cached(converse, checkpoint):
    lines = ["The list", "A module"]
    tokenizer = load_tokenizer(checkpoint)
    out, _, calls = converse(lines, "--max_new_tokens", 5)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": lines[0]}])
    prompt = tokenizer.encode(asked, bos=False)
    answered = tokenizer.encode(asked + out.split("\n")[0], bos=False)
    assert answered[: len(prompt)] == prompt
    assert calls[1][1] < len(prompt) + 5  # five tokens were drawn, four of them were put into the cache


def test_an_answer_takes_what_the_cache_holds_and_says_if_it_was_cut(copy, checkpoint):
    flags = ["--device", "cpu", "--temperature", 0, "--max_seq_length", 400, "--interactive"]
    told = run("--checkpoint_path", checkpoint, *flags, given="The list\n").stderr
    (cut,) = re.findall(r"\n\(cut after (\d+) tokens: the cache of 400 tokens is full\)\n$", told)
    assert int(cut) > 300
    (copy / "chat_template.jinja").unlink()
    told = run("--checkpoint_path", copy, *flags, given="The list\n").stderr
    assert told.endswith("\n(cut after 200 tokens: --max_new_tokens)\n")


def test_a_full_cache_forgets_the_oldest_turns(converse, checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    lines = ["The list", "A module", "sorted", "in place", "nothing", "is"]
    out, err, calls = converse(lines, "--max_seq_length", 110, "--system", "Be brief")
    forgot = [int(n) for n in re.findall(r"\(the cache of 110 tokens is full: forgot the (\d+) oldest of", err)]
    assert forgot
    assert len(calls) == len(lines)  # every line was answered
    turns = list(zip(lines, out.split("\n"), strict=False))[sum(forgot) : -1]
    messages = [{"role": "system", "content": "Be brief"}]
    for line, answer in turns:
        messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template([*messages, {"role": "user", "content": lines[-1]}])
    prompt, (given, cached) = tokenizer.encode(text, bos=False), calls[-1]
    assert len(prompt) == len(given) + cached
    assert given == prompt[cached:]


def test_a_line_that_is_too_long_is_refused_alone(converse):
    long = "The list " * 200
    out, err, calls = converse(["The list", long, "The list"], "--max_seq_length", 200)
    assert re.search(r"^this message makes \d+ tokens, the cache takes 200: shorten it$", err, re.MULTILINE)
    assert len(calls) == 2
    assert calls[1][1] >= len(calls[0][0])  # what was said before is still in the cache
    assert converse(["The list", "The list"], "--max_seq_length", 200)[0] == out


def test_commands_of_a_conversation(converse, main):
    alone = converse(["The list"])
    for lines in (["A module", "/reset", "The list"], ["/system Be brief", "A module", "/system", "The list"]):
        out, _, calls = converse(lines)
        assert out.endswith("\n" + alone[0])
        assert len(calls[1][0]) + calls[1][1] == len(alone[2][0][0])
    brief = converse(["The list"], "--system", "Be brief")
    assert converse(["/system Be brief", "The list"])[::2] == brief[::2]
    out, err, calls = converse(["The list", "/exit", "A module"])
    assert len(calls) == 1
    assert converse(["/stats"])[1] == converse(["The list", "/reset", "/stats"])[1].splitlines(True)[-1]
    assert converse(["/stats"])[1] == "no answer yet\n"
    assert (
        converse(["/system Be brief", "/reset"])[1].splitlines()
        == ["(a new conversation, with this system message)"] * 2
    )
    assert re.search(r"first token .* of 4096 tokens in the cache\n", converse(["The list", "/stats"])[1])
    assert re.search(r"first token .* of 4096 tokens in the cache\n", converse(["The list"], "--stats")[1])
    assert "first token" not in converse(["The list"])[1]
    out, err, calls = converse(["/help", "/nonsense", " /nonsense", "/etc/hosts"])
    assert all(command in err for command in ("/exit", "/reset", "/system", "/stats"))
    assert "there is no command /nonsense: /help lists them" in err
    assert len(calls) == 2  # the last two lines are messages


def test_a_template_that_refuses_does_not_end_the_conversation(converse, main, copy):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    (copy / "chat_template.jinja").write_text(refuses)
    _, err, calls = converse(["/system Be brief", "The list"], checkpoint_path=copy)
    assert err.startswith("chat template: no system role\n")
    assert len(calls) == 1
    code, _, err = main("--interactive", "--system", "Be brief", "--compile", checkpoint_path=copy)
    assert code == 2
    assert err.endswith("cpu\nerror: chat template: no system role\n")  # before compiling


def test_ctrl_c_before_the_first_token_takes_the_message_back(converse, monkeypatch):
    size, run_rows, n = ("--max_seq_length", 110), chat.run_rows, 0
    whole = converse(["The list", "A module"], *size)

    def stopped(*args):
        nonlocal n
        n += 1
        if n == 2:
            raise KeyboardInterrupt
        return run_rows(*args)

    monkeypatch.setattr(chat, "run_rows", stopped)
    _, err, calls = converse(["The list", "in place " * 16, "A module"], *size)
    assert "full: forgot the 1 oldest of 1 turns" in err
    assert len(calls) == 2  # the last as if the message before it had not been sent
    assert len(calls[1][0]) + calls[1][1] == len(whole[2][1][0]) + whole[2][1][1]


def test_ctrl_c_while_a_message_is_put_into_tokens(converse, monkeypatch):
    encode, n = chat.Conversation.encode, 0

    def interrupted(self, turns, line):
        nonlocal n
        n += 1
        if n == 2:
            raise KeyboardInterrupt
        return encode(self, turns, line)

    monkeypatch.setattr(chat.Conversation, "encode", interrupted)
    out, err, calls = converse(["The list", "A module", "A module"])
    assert err.count("(stopped)") == 1
    assert len(calls) == 2


def test_ctrl_c_stops_the_answer_and_the_next_is_right(converse, main, monkeypatch):
    row_put, n = rows.Row.put, 0

    def put(self, token):
        nonlocal n
        n += 1
        if n == 5:
            raise KeyboardInterrupt
        return row_put(self, token)

    monkeypatch.setattr(rows.Row, "put", put)
    out, _, calls = converse(["The list", "A module"])
    first, second = out.split("\n")[:2]
    whole = converse(["The list"])[0].split("\n")[0]
    assert whole.startswith(first)
    assert 0 < len(first) < len(whole)
    assert second
    assert len(calls) == 2
    assert calls[1][1] >= len(calls[0][0])


def test_a_conversation_over_a_pipe(checkpoint):
    flags = ["--checkpoint_path", checkpoint, "--interactive", "--device", "cpu", "--max_new_tokens", 10]
    done = run(*flags, "--temperature", 0, given="The list\nA module\n")
    assert done.returncode == 0, done.stderr
    assert "Ctrl-D" not in done.stderr  # there is no keyboard
    assert done.stdout.count("\n") == 2
    assert "> " not in done.stdout


class Terminal:
    """generate.py on a pseudo-terminal, to which a test can send Ctrl-C and Ctrl-D."""

    def __init__(self, *flags):
        self.fd, inside = pty.openpty()
        self.process = subprocess.Popen(
            **command(*flags), stdin=inside, stdout=inside, stderr=inside, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(inside, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(inside)
        self.shown = ""

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def read_until(self, done, key: str = "", seconds: float = 120) -> str:
        """Read until `done(text)`; return the text and forget it. `key` is sent first and after each silent second."""
        end = time.monotonic() + seconds
        while not done(self.shown):
            assert time.monotonic() < end, f"shown so far: {self.shown!r}"
            self.send(key)
            while select.select([self.fd], [], [], 1)[0] and not done(self.shown):
                self.shown += os.read(self.fd, 4096).decode(errors="replace")
        shown, self.shown = self.shown, ""
        return shown

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.fixture
def terminal(checkpoint):
    """A conversation on a terminal, greedy; an answer would fill the cache."""
    with contextlib.closing(Terminal("--checkpoint_path", checkpoint, "--device", "cpu", "--temperature", 0,
                                     "--interactive")) as terminal:  # fmt: skip
        assert "/help lists the commands" in terminal.read_until(lambda shown: shown.endswith("> "))
        yield terminal


def stop_answer(terminal: Terminal) -> str:
    """What was shown: typed text and an answer that has begun, which Ctrl-C then ends."""
    shown = terminal.read_until(lambda shown: len(shown) > 100)
    return shown + terminal.read_until(lambda shown: shown.endswith("> "), key="\x03")


def test_a_conversation_on_a_terminal(terminal):
    for line in ("The list", "A module"):
        terminal.send(line + "\n")
        shown = stop_answer(terminal)
        assert "Traceback" not in shown
        assert "full" not in shown
    terminal.read_until(lambda shown: "(Ctrl-D ends the" in shown and shown.endswith("> "), key="\x03")
    terminal.send("/stats\n")
    assert "the last answer was stopped" in terminal.read_until(lambda shown: shown.endswith("> "))
    terminal.send("\x04")
    assert terminal.process.wait(120) == 0


def test_a_pasted_text_is_one_message(terminal):
    """In brackets, as terminals that know them send a paste, and without."""
    text = "\n".join(f"The list {n} is sorted in place" for n in range(300))
    assert len(text) > 4095  # a terminal's own line editing would cut it there
    terminal.send(f"\x1b[200~{text}\x1b[201~\n")
    assert "this message makes" in terminal.read_until(lambda shown: shown.endswith("> "))  # as one it does not fit
    terminal.send("The list\nis sorted\nin place\n")
    shown = stop_answer(terminal)
    terminal.send("/stats\n")
    shown += terminal.read_until(lambda shown: shown.endswith("> "))
    assert "the last answer was stopped" in shown
    assert shown.count("\x1b[?2004h> ") == 2  # one answer, and the figures


def test_lines_can_be_edited_and_called_back(terminal):
    terminal.send("/stast\x7f\x7fts\n")  # two backspaces
    assert "no answer yet" in terminal.read_until(lambda shown: shown.endswith("> "))
    terminal.send("\x1b[A\n")  # arrow up
    assert "no answer yet" in terminal.read_until(lambda shown: shown.endswith("> "))


def test_ctrl_c_ends_a_run(checkpoint):
    flags = ["--checkpoint_path", checkpoint, "--device", "cpu", "--temperature", 0, "--max_new_tokens", 4000]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(**command(*flags), **pipes, text=True)
    try:
        assert process.stdout.read(30).startswith(prompts.DEFAULT[:20])
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.endswith("\nstopped\n")


@pytest.mark.parametrize(
    "argv",
    [
        ["generate.py"], ["quantize.py"], ["eval.py"], ["scripts/convert_hf_checkpoint.py"],
        ["scripts/gpu_report.py"], ["-m", "fast.harness"], ["-m", "demo.train"],
        *(["-m", f"scripts.bench.{name}"] for name in ("speed", "busy", "speculation", "scoring", "quality")),
    ],
    ids=lambda argv: argv[-1],
)  # fmt: skip
def test_ctrl_c_while_torch_is_imported_is_silent(argv, tmp_path):
    """As a shell reports it, the exit code is 130."""
    code = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    (tmp_path / "torch.py").write_text(code)  # in place of torch
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_ctrl_c_is_python_s_own_while_a_script_works():
    for before, during in ((signal.SIG_DFL, signal.default_int_handler), (signal.SIG_IGN, signal.SIG_IGN)):
        kept, seen = signal.signal(signal.SIGINT, before), []
        try:
            assert cli.exit_code(lambda seen=seen: seen.append(signal.getsignal(signal.SIGINT))) == 0
            assert (seen[0], signal.getsignal(signal.SIGINT)) == (during, before)
        finally:
            signal.signal(signal.SIGINT, kept)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_an_error_is_one_line_and_exit_code_2():
    done = run("--checkpoint_path", "nowhere/at/all")
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_error(done.stderr, "nowhere/at/all")


def test_an_error_ends_the_progress_bars_above_it(capsys):
    def work():
        for _ in tqdm(range(3), desc="outer"):
            for i in tqdm(range(3), desc="inner", leave=False):
                if i:
                    raise ValueError("too bad")

    assert cli.exit_code(work) == 2
    err = capsys.readouterr().err
    assert "outer:   0%" in err
    assert err.endswith("\nerror: too bad\n")


def test_help_says_every_default(capsys):
    parser = cli.Parser("a program")
    for name, options in {
        "number": {"default": 8, "help": "of items"}, "several": {"default": [1, 2], "nargs": "+", "help": "of all"},
        "named": {"default": 8, "help": "of others (default: eight)"}, "none": {"help": "of nobody"},
        "on": {"action": argparse.BooleanOptionalAction, "default": True, "help": "of light"},
        "off": {"action": "store_true", "help": "of dark"}, "bare": {"default": 8},
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", **options)
    lines = [" ".join(line.split()) for line in parser.format_help().splitlines()]
    assert lines[-7:] == [
        "--number TEXT of items (default: 8)",
        "--several TEXT [TEXT ...] of all (default: 1 2)",
        "--named TEXT of others (default: eight)",
        "--none TEXT of nobody",
        "--on, --no-on of light (default: on)",
        "--off of dark",
        "--bare TEXT",
    ]


def test_a_terminal_that_lacks_a_character_gets_a_question_mark(monkeypatch, checkpoint, tmp_path):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    flags = ["--prompt", "A m\u00f6dule", "--max_new_tokens", "2", "--metrics_path", str(tmp_path / "figures.json")]
    assert generate.main(["--checkpoint_path", str(checkpoint), *flags]) == 0
    out.flush()
    assert out.buffer.getvalue().startswith(b"A m?dule")
    assert (tmp_path / "figures.json").exists()


def test_a_closed_stdout_is_no_error(checkpoint):
    with subprocess.Popen(
        **command("--checkpoint_path", checkpoint, "--max_new_tokens", 100),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        told = process.stderr.read().decode()
        assert process.wait(120) == 0
        assert "error" not in told
        assert "Traceback" not in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", 1, "--top_p", 0], "top_p 0.0 must be above 0 and at most 1"),
        (["--temperature", 1, "--min_p", 1.5], "min_p 1.5 must be above 0 and at most 1"),
        (["--temperature", 1, "--top_k", -1], "top_k -1 must be at least 1, or 0 for all tokens"),
        (["--temperature", -1], r"temperature -1.0 must be 0 \(greedy\) or more"),
        (["--batch_size", 0], "--batch_size 0 must be at least 1"),
        (["--num_samples", 0], "--num_samples 0 must be at least 1"),
        (["--max_new_tokens", 0], "--max_new_tokens 0 must be at least 1"),
        (["--max_seq_length", -3], "--max_seq_length -3 must be at least 1"),
        (["--threads", 0], "--threads 0 must be at least 1"),
        (["--threads", 9999], "--threads 9999 is more than this machine's"),
        (["--max_seq_length", 3], "the prompt has [0-9]+ tokens, but there is room for 3: shorten it"),
        (["--prompt", CONTEXT + 1], f"--prompt {CONTEXT + 1}: a made-up prompt must have 1 to {CONTEXT} tokens"),
        (["--prompt", 0], f"--prompt 0: a made-up prompt must have 1 to {CONTEXT} tokens"),
        (["--prompt", 10**20], f"--prompt {10**20}: a made-up prompt must have"),
        (["--device", "no-such-device"], "--device no-such-device cannot be used here"),
        (
            ["--metrics_path", "no/such/folder/x.json"],
            "cannot write no/such/folder/x.json: .*folder is not a directory",
        ),
        (["--profile", "no/such/folder/x.json"], "cannot write no/such/folder/x.json"),
        (["--metrics_path", ROOT], f"cannot write {ROOT}: it is a directory"),
        (["--prompt_file", "no/such/file.txt"], "no/such/file.txt"),
        (["--prompt_file", ROOT], str(ROOT)),
        (["--stop", ""], "--stop needs a text that is not empty"),
        (["--system", "Be brief"], "only --chat and --interactive use the chat template: leave out --system"),
        (["--template_args", '{"a": 1}'], "use the chat template: leave out --template_args"),
        (["--interactive", "--prompt", "Hi"], "--interactive is a conversation of one: leave out --prompt$"),
        (["--prompt_file", __file__, "--prompt", "Hi"], "--prompt_file holds the prompts: leave out --prompt$"),
        (["--stats"], "--stats is for --interactive, .*: leave out --stats$"),
        (["--replicate_draft"], "without --draft_checkpoint_path there is no draft model: leave out --replicate_draft"),
        (["--top_p", 0.5, "--top_k", 5], "--temperature 0 takes the likeliest token: leave out --top_k, --top_p$"),
        (
            ["--batch_size", 10**20],
            rf"a KV cache of {10**20} x [0-9]+ tokens, with logits, takes [0-9.]+ GB, cpu has [0-9.]+ GB free",
        ),
        (["--max_seq_length", 10**15], rf"a KV cache of 1 x {10**15} tokens, with logits, takes [0-9.]+ GB, cpu has"),
        (["--num_samples", 10**20], f"--num_samples {10**20} must be at most 1000000"),
        (["--profile", "a\nb"], r"cannot write a.nb: its name has characters that cannot be printed"),
        (["--interactive", "--batch_size", 2], "--interactive is a conversation of one: leave out --batch_size"),
        (["--interactive", "--profile", "x", "--num_samples", 2], "leave out --num_samples, --profile"),
        (["--interactive", "--prompt_lookup", "--compare"], "leave out --compare"),
        (["--seed", 2**70], f"--seed {2**70} must be 0 to"),
    ],
)
def test_bad_flags(main, flags, message):
    code, _, err = main(*flags)
    assert code == 2
    assert_one_error(err, message)


def test_without_stdin(main, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as under `<&-`
    assert main()[1].startswith(prompts.DEFAULT)
    for flags in (["--interactive"], ["--prompt", "-"], ["--prompt_file", "-"]):
        code, _, err = main(*flags)
        assert code == 2
        assert_one_error(err, "stdin, which is closed")


def assert_one_error(err: str, message: str) -> None:
    *before, last = err.splitlines()
    assert last.startswith("error: ")
    assert not [line for line in before if "rror" in line]
    assert re.search(message, last), err


def test_a_full_gpu_is_an_error_of_one_line(main, monkeypatch):
    def load(*_, **__):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of 1.00 GiB."
        )

    monkeypatch.setattr(generate, "load", load)
    code, out, err = main()
    assert (code, out) == (2, "")
    assert_one_error(err, "CUDA out of memory. Tried to allocate 2.00 GiB: quantise the model, or")


def test_full_memory_is_an_error_of_one_line(main, monkeypatch):
    monkeypatch.setattr(generate, "load", lambda *_, **__: torch.empty(1 << 60, dtype=torch.uint8))
    code, out, err = main()
    assert (code, out) == (2, "")
    assert_one_error(err, "can't allocate memory: you tried to allocate 1152921504606846976 bytes: quantise the model")


def test_another_error_of_torch_is_no_lack_of_memory(main, monkeypatch):
    monkeypatch.setattr(generate, "load", lambda *_, **__: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        main()


def test_a_gpu_becomes_the_current_one(monkeypatch):
    """Its streams and events are then those that torch.cuda means without a device."""
    current = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    check_device("cuda:1")
    check_device("cpu")
    assert current == ["cuda:1"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(main):
    code, _, err = main("--device", "cuda")
    assert code == 2
    assert_one_error(err, "--device cuda cannot be used here")


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"gut \xe4 Latin-1"])
def test_bad_prompt_file(main, tmp_path, content):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    code, _, err = main("--prompt_file", path)
    assert code == 2
    assert_one_error(
        err, f"{path} is not UTF-8" if b"\xe4" in content else f"{path} holds no prompt: write one per line"
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def change_json(path: Path, **change) -> None:
    write_json(path, {**json.loads(path.read_text()), **change})


@pytest.mark.parametrize(
    ("damage", "flags", "message"),
    [
        (lambda d: cut(d / "model.safetensors"), [], "model.safetensors: not a whole safetensors file"),
        (lambda d: (d / "model.safetensors").unlink(), [], "has no .*safetensors"),
        (lambda d: (d / "config.json").unlink(), [], "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), [], "config.json: not"),
        (lambda d: change_json(d / "config.json", hidden_act="gelu"), [], "hidden_act 'gelu' is not supported"),
        (
            lambda d: (d / "tokenizer.model").unlink(),
            [],
            "no tokenizer, expected one of tokenizer.json",
        ),
        (lambda d: (d / "chat_template.jinja").unlink(), ["--chat"], "the model has no chat template"),
        (
            lambda d: (d / "chat_template.jinja").unlink(),
            ["--interactive", "--system", "x"],
            "a system message needs a chat template",
        ),
        (
            lambda d: (d / "chat_template.jinja").write_text("{{ raise_exception('no way') }}"),
            ["--chat"],
            "chat template: no way",
        ),
        (
            lambda d: change_json(d / "tokenizer_config.json", add_bos_token=False),
            ["--prompt", ""],
            "the prompt is empty and this model has no begin-of-text token: give at least one word",
        ),
    ],
)
def test_bad_directory(main, copy, damage, flags, message):
    damage(copy)
    code, _, err = main(*flags, checkpoint_path=copy)
    assert code == 2
    assert_one_error(err, message)


@pytest.mark.parametrize("damaged", [True, False])
@pytest.mark.parametrize("size", [1000, 100_000])
def test_bad_pth(main, copy, damaged, size):
    path = copy / "model.pth"
    torch.save({"weights": torch.zeros(size)}, path)
    if damaged:
        cut(path)
    code, _, err = main(checkpoint_path=path)
    assert code == 2
    assert_one_error(err, "model.pth: not a " + ("whole torch file" if damaged else "checkpoint in this project's"))


def test_an_empty_prompt_begins_with_bos(figures):
    row = figures("--prompt", "")["samples"][0]
    assert row["prompt_tokens"] == [1]
    assert len(row["tokens"]) == 12


@pytest.mark.parametrize(
    "flags",
    [
        ["--no_such_flag"],
        ["--dtype", "int3"],
        ["--top_k", "many"],
        ["--speculate_k", "few"],
        ["--temp", "1"],
        ["--template_args", "{x"],
        ["--template_args", "[1]"],
        ["--template_args", '{"messages": []}'],
    ],
)
def test_argparse_errors_exit_with_2(main, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        main(*flags)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert_one_error(err, f"{flags[0]}.*; --help lists the flags$")
    assert "_number" not in err  # no name of ours


def test_importing_changes_nothing():
    """Importing the modules of the root, `fast` and `kernels`, in a new process, changes no setting of torch or Python.

    The exception is fast/harness.py: lm_eval changes some. eval.py imports it only when tasks are asked for.
    """
    code = """
import importlib, locale, os, signal, sys, warnings
from pathlib import Path
import torch, torch._dynamo.config, torch._inductor.config

def state():
    return {
        "inductor": torch._inductor.config.get_config_copy(), "dynamo": torch._dynamo.config.get_config_copy(),
        "environ": dict(os.environ), "path": list(sys.path), "dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "matmul": torch.get_float32_matmul_precision(), "grad": torch.is_grad_enabled(),
        "seed": torch.initial_seed(), "deterministic": torch.are_deterministic_algorithms_enabled(),
        "device": torch.get_default_device(), "cwd": os.getcwd(), "locale": locale.setlocale(locale.LC_ALL),
        "sigint": signal.getsignal(signal.SIGINT), "warnings": list(warnings.filters),
    }

before = state()
assert len(before["inductor"]) > 100 and len(before["dynamo"]) > 50
paths = [*Path(".").glob("*.py"), *Path("fast").glob("*.py"), *Path("kernels").rglob("*.py")]
names = {str(path.with_suffix("")).replace("/", ".").removesuffix(".__init__") for path in paths}
for name in sorted(names - {"fast.harness"}):
    importlib.import_module(name)
    after = state()
    changed = [key for key in before if before[key] != after[key]]
    assert not changed, f"importing {name} changes {changed}"
    print(name)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert {"fast.checkpoint", "fast.decoding", "generate", "kernels.cpu", "model", "tp"} <= set(run.stdout.split())


# --- the demo --------------------------------------------------------------------------------------------------------


def test_the_demo_compiled_as_the_readme_says(tmp_path):
    flags = ["--compile", "--max_new_tokens", 40, "--num_samples", 2, "--metrics_path", tmp_path / "figures.json"]
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "No CUDA runtime" not in line]  # torch prints it without a GPU
    assert told[0].endswith("cpu")
    assert told[1:3] == ["compiling ...", ""]
    assert done.stdout.startswith(prompts.DEFAULT)
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert figures["compile_s"] > 0
    assert figures["dtype"] in ("bfloat16", "float16")
    for row in figures["samples"]:
        letters = sum(c.isascii() and (c.isalpha() or c.isspace()) for c in row["text"])
        assert letters > 0.6 * len(row["text"]) > 0  # words, not noise


def test_the_demo_plain(main):
    code, out, err = main("--prompt", "She was", checkpoint_path=DEMO)
    assert code == 0, err
    assert out.startswith("She was ")
