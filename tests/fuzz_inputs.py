"""Bad inputs, generated from a seed, for the command lines: each must be one line on stderr and exit code 2, or work.

    python tests/fuzz_inputs.py --cases 5000

Worth knowing: the cases run in worker processes, many in each. A worker that dies or does not answer is a finding, and
another one takes its place. `--case N` repeats one case and shows what it printed.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SECONDS = 30  # for a case, before it counts as a hang
GIGABYTES = 16  # of address space, so that a case which wants more is found out

# What stands in place of a value; of these, BAD_NUMBERS are wrong for every size of a model.
BAD_NUMBERS: list[Any] = [
    None, "", "64", [], [1], {}, {"a": 1}, -1, 0, 2**31, 2**63, 10**30, 1e308, -0.5, float("nan"), float("inf"),
    "a\nb\x1b[31m", [[]],
]  # fmt: skip
VALUES = [
    *BAD_NUMBERS,
    True,
    False,
    1,
    2,
    7,
    1.5,
    "x" * 10_000,
    ["a", 1],
    {"type": "yarn"},
    list(range(1000)),
    "\ud800",
]
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
SIZES += ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "context_length", "norm_eps")  # of our .pth
OPTIONAL = [
    "rope_scaling", "rope_parameters", "layer_types", "sliding_window", "head_dim", "tie_word_embeddings",
    "architectures", "model_type", "quantization_config", "hidden_act", "partial_rotary_factor", "eos_token_id",
    "chat_template", "added_tokens_decoder", "bos_token", "eos_token", "add_bos_token", "legacy",
    "extra_special_tokens",
    "tokenizer_class", "text_config", "torch_dtype", "draft_vocab_size", "attention_bias", "max_window_layers",
]  # fmt: skip
TEMPLATES = [
    '{{ "a" * 10**12 }}', "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ 10**(10**9) }}", "{{ messages[9] }}", "{{ 1 / 0 }}", "{{",
    "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ lipsum(n=10**9) }}", "{{ messages | tojson(indent='x') }}",
    "{{ ('x' * 9999) | center(10**11) }}", "{{ raise_exception([1]) }}", "{% include 'x' %}", "(" * 99999,
    "{{ '\ud800' }}",
    "{{ (" * 5000, "{% set n = namespace(x=7) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}", "",
    "{{ messages[0].content }}",
]  # fmt: skip
FLAGS = {
    "generate": [
        "--prompt", "--batch_size", "--num_samples", "--max_new_tokens", "--max_seq_length", "--temperature", "--top_k",
        "--top_p", "--min_p", "--seed", "--speculate_k", "--device", "--threads", "--dtype", "--kv_dtype", "--stop",
        "--system", "--template_args", "--prompt_file", "--metrics_path", "--profile", "--checkpoint_path",
        "--draft_checkpoint_path", "--prompt_lookup", "--chat", "--compare",
    ],
    "quantize": ["--mode", "--groupsize", "--skip", "--output_path", "--device", "--threads", "--checkpoint_path"],
    "eval": ["--window", "--stride", "--batch_size", "--perplexity", "--kv_dtype", "--device", "--checkpoint_path"],
}  # fmt: skip
WORDS = [
    "", "-1", "0", "1", "3", "10" * 10, str(10**20), "1e400", "nan", "inf", "-inf", "0x10", "1.5", "cpu", "cpu:7",
    "meta",
    "cuda", "mps", "cuda:99", "auto", "a\nb", "\udcff", "\x1b[31m", "x" * 5000, "{}", '{"a": 1}', "[1]", "{", ".", "/",
    "/proc/self/mem", "FIFO", "EMPTY", "BINARY", "DIRECTORY", "MISSING/x.pth", "LOOP", "int8", "float16", "@MISSING",
    "@FIFO", "@EMPTY", "@BINARY", "-", "--", "--help", "--compile=3", "a/b", "../x", "1000000",
]  # fmt: skip


# ---- The directories of tiny random models that are damaged.


def make_bases(folder: Path) -> None:
    """A directory for every kind of file that is read."""
    import torch
    from conftest import make_tiny
    from gguf import GGMLQuantizationType
    from gguf_files import write_model
    from heads import make_head, save
    from safetensors.torch import load_file, save_file
    from test_tokenizer import byte_level_encoder

    import quantize

    demo = ROOT / "demo" / "target"
    config = json.loads((demo / "tokenizer_config.json").read_text())
    template = {"chat_template": "{{ messages[0].content }}"}
    added = {"added_tokens_decoder": {"2047": {"content": "<think>", "special": False}}}
    for family in ("llama", "phi3-long", "gemma3", "qwen3-moe-mixed", "granite", "smollm3"):
        make_tiny(family, vocab_size=2048).save_pretrained(made := folder / family)
        shutil.copy(demo / "tokenizer.model", made)
        (made / "tokenizer_config.json").write_text(json.dumps(config | template | added))
    older = shutil.copytree(
        folder / "llama", folder / "older"
    )  # its tokens in files of their own, its weights in shards
    (older / "tokenizer_config.json").write_text(json.dumps(config))
    (older / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}))
    (older / "added_tokens.json").write_text(json.dumps({"<think>": 2047}))
    tensors = load_file(older / "model.safetensors")
    save_file(tensors, older / "a.safetensors")
    (older / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (older / "model.safetensors.index.json").write_text(json.dumps(index))
    fast = shutil.copytree(folder / "llama", folder / "fast")  # tokenizer.json, and pytorch_model.bin
    (fast / "tokenizer.model").unlink()
    byte_level_encoder(["<|im_start|>", "<|im_end|>"]).save(str(fast / "tokenizer.json"))
    (fast / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", **template}))
    torch.save(tensors, fast / "pytorch_model.bin")
    (fast / "model.safetensors").unlink()
    save(make_head(vocab_size=2048), folder / "head", "specforge")
    ours = ["--mode", "int4", "--output_path", str(folder / "pth" / "m.pth")]
    (folder / "pth").mkdir()
    quantize.main(["--checkpoint_path", str(folder / "llama"), *ours])
    (folder / "gguf").mkdir()
    write_model(folder / "gguf" / "m.gguf", make_tiny("llama"), "llama", GGMLQuantizationType.Q8_0)


# ---- The cases.


class Case(NamedTuple):
    """A command with a bad input, in a folder that holds it; is_bad: whether working is as wrong as a traceback."""

    program: str
    arguments: list[str]
    words: str
    is_bad: bool = False


def make_case(seed: int, number: int, bases: Path, folder: Path) -> Case:
    """Write the files of a case into `folder`."""
    draw = random.Random(f"{seed} {number}")
    kinds = {damage_json: 9, damage_bytes: 2, damage_tensors: 2, damage_pth: 3, misuse_flags: 5, hostile_template: 2}
    kinds[no_files] = 1
    (kind,) = draw.choices(list(kinds), list(kinds.values()))
    return kind(draw, bases, folder)


def run_on(draw: random.Random, folder: Path) -> tuple[str, list[str]]:
    """A program, and its arguments for the model in `folder`."""
    if folder.name == "head":
        target = folder.parent.parent / "bases" / "llama"
        draft = ["--draft_checkpoint_path", str(folder), "--speculate_k", "2"]
        return "generate", ["--checkpoint_path", str(target), *draft, "--prompt", "Emma", "--max_new_tokens", "4"]
    model = ["--checkpoint_path", str(next(folder.glob("m.*"), folder))]
    text = ["--perplexity", str(folder / "text"), "--window", "16"]
    return draw.choice(
        [
            ("generate", [*model, "--prompt", "Emma could", "--max_new_tokens", "3"]),
            ("generate", [*model, "--prompt", "Emma could", "--max_new_tokens", "3", "--chat"]),
            ("quantize", model),
            ("eval", [*model, *text]),
        ]
    )


def base(draw: random.Random, bases: Path, folder: Path, *names: str) -> Path:
    """A copy of one of the directories in `folder`."""
    name = draw.choice(names or sorted(path.name for path in bases.iterdir()))
    made = shutil.copytree(bases / name, folder / name)
    (made / "text").write_text("Emma could not think of it. " * 5)
    return made


def damage_json(draw: random.Random, bases: Path, folder: Path) -> Case:
    folder = base(draw, bases, folder, *(path.name for path in sorted(bases.iterdir()) if any(path.glob("*.json"))))
    files = sorted(folder.glob("*.json"))
    file = draw.choice([*files, *(file for file in files if file.name == "config.json")])
    content, number = json.loads(file.read_text()), draw.random()
    if number < 0.06:
        text = draw.choice(["", "[", "[]", "3", "null", '"a"', "[" * 100_000, "{" + '"a":{' * 50_000, "\x00", "NaN"])
        file.write_text(text)
        return Case(
            *run_on(draw, folder),
            f"{file.name}: {text[:20]}",
            is_bad=file.name == "config.json" and folder.name != "pth",
        )
    where, keys = content, []
    while True:  # go down, to any value
        inside = list(where) if isinstance(where, dict) else list(range(min(len(where), 50)))
        keys.append(draw.choice(inside) if inside else "a")
        if not inside or not isinstance(where[keys[-1]], (dict, list)) or draw.random() < 0.2:
            break
        where = where[keys[-1]]
    if number < 0.45 and isinstance(where, dict):
        keys[-1] = draw.choice(OPTIONAL)
    value = draw.choice(VALUES)
    if isinstance(where, dict) or where:
        where[keys[-1]] = value
    file.write_text(json.dumps(content))
    is_size = file.name == "config.json" and keys[-1] in SIZES and any(value is bad for bad in BAD_NUMBERS)
    is_model = folder.name not in ("head", "pth")  # a head reads fewer sizes
    words = f"{file.name}: {'.'.join(map(str, keys))} = {value!r:.60}"
    return Case(*run_on(draw, folder), words, is_bad=is_size and is_model and len(keys) == 1)


def damage_bytes(draw: random.Random, bases: Path, folder: Path) -> Case:
    """Cut a file, or change a few bytes at its beginning, where headers are."""
    folder = base(draw, bases, folder)
    file = draw.choice(sorted(folder.iterdir()))
    data = bytearray(file.read_bytes())
    if draw.random() < 0.3:
        del data[draw.randrange(len(data)) :]
    else:
        for _ in range(draw.randrange(1, 9)):
            data[min(int(draw.expovariate(1 / 400)), len(data) - 1)] = draw.randrange(256)
    file.write_bytes(data)
    return Case(*run_on(draw, folder), f"bytes of {file.name}")


def damage_tensors(draw: random.Random, bases: Path, folder: Path) -> Case:
    import torch
    from safetensors.torch import load_file, save_file

    folder = base(draw, bases, folder, "llama", "fast", "head", "gemma3")
    file = folder / "model.safetensors"
    tensors = load_file(file) if file.exists() else torch.load(folder / "pytorch_model.bin", weights_only=True)
    name = draw.choice([name for name in tensors if name not in ("t2d", "d2t")])
    tensor, number = tensors[name], draw.randrange(9)
    types = (torch.int16, torch.bool, torch.uint8, torch.complex64, torch.int8, torch.int64, torch.float8_e4m3fn)
    changed = {0: tensor[:-1], 1: tensor[None], 2: tensor.new_zeros(()), 3: tensor.new_zeros(0)}
    changed[4] = tensor.to_sparse() if not file.exists() else tensor[..., :-1]
    changed[5] = tensor.to("meta") if not file.exists() else tensor.flatten()[:3]
    if number == 6:
        tensors[draw.choice(["a\nb", "\x1b[31m", "", "x" * 3000, name + "\u202e"])] = tensors.pop(name)
    else:
        tensors[name] = changed.get(number, tensor.to(draw.choice(types))).clone()
    if file.exists():
        save_file(tensors, file)
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    return Case(*run_on(draw, folder), f"tensors: {name} {number}", is_bad=True)


def damage_pth(draw: random.Random, bases: Path, folder: Path) -> Case:
    import torch

    folder = base(draw, bases, folder, "pth")
    file = folder / "m.pth"
    content, value = torch.load(file, weights_only=True), draw.choice(VALUES)
    part = draw.choice(["config", "config", "config", "quantization", "quantization", "model", "format"])
    key = part
    if part == "format":
        content[draw.choice([*content, "other"])] = value
    elif part == "model":
        key = draw.choice(list(content[part]))
        types = (torch.int16, torch.float32, torch.bfloat16, torch.int64, torch.complex64, torch.uint8)
        content[part][key] = draw.choice([content[part][key].to(draw.choice(types)), content[part][key][:-1], value])
    else:
        key = draw.choice([*content[part], "other"])
        content[part][key] = value
    torch.save(content, file)
    is_bad = part == "config" and key in SIZES and any(value is bad for bad in BAD_NUMBERS)
    return Case(*run_on(draw, folder), f"m.pth: {part}.{key} = {value!r:.60}", is_bad)


def misuse_flags(draw: random.Random, bases: Path, folder: Path) -> Case:
    model = base(draw, bases, folder, "llama")
    program = draw.choice(["generate", "generate", *FLAGS])
    arguments = ["--checkpoint_path", str(model)]
    arguments += ["--perplexity", str(model / "text")] if program == "eval" else []
    arguments += ["--max_new_tokens", "3", "--prompt", "Emma"] if program == "generate" else []
    for flag in draw.sample(FLAGS[program], draw.randrange(1, 3)):
        words = [word for word in WORDS if "FIFO" not in word or flag.endswith("checkpoint_path")]
        arguments += [flag, *(draw.choice(words) for _ in range(draw.choice([0, 1, 1, 1, 1, 2])))]
    return Case(program, arguments, " ".join(arguments[2:]))


def hostile_template(draw: random.Random, bases: Path, folder: Path) -> Case:
    folder = base(draw, bases, folder, "llama", "fast")
    template = draw.choice(TEMPLATES)
    (folder / "chat_template.jinja").write_text(template, errors="surrogatepass")
    chat = ["--chat", "--prompt", "Emma could", "--max_new_tokens", "3"]
    return Case("generate", ["--checkpoint_path", str(folder), *chat], f"template {template[:60]}")


def no_files(draw: random.Random, bases: Path, folder: Path) -> Case:
    """A pipe, a directory, or an empty file in place of one that is read."""
    folder = base(draw, bases, folder)
    file = draw.choice(sorted(folder.iterdir()))
    file.unlink()
    how = draw.choice([os.mkfifo, os.mkdir, Path.touch, lambda path: os.symlink("/proc/self/mem", path)])
    how(file)
    return Case(*run_on(draw, folder), f"{file.name} by {getattr(how, '__name__', 'symlink')}")


# ---- Running them.


def run_case(case: Case, folder: Path) -> tuple[str, str]:
    """A verdict, one of "right", "refused" and "wrong", and what the program printed on stderr."""
    import importlib

    os.mkfifo(folder / "FIFO")
    (folder / "EMPTY").touch()
    (folder / "BINARY").write_bytes(bytes(range(256)))
    (folder / "DIRECTORY").mkdir()
    (folder / "LOOP").symlink_to("LOOP")
    os.chdir(folder)
    code: int | str
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        saved = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            code = importlib.import_module(case.program).main(case.arguments)
        except SystemExit as error:
            code = error.code
        except BaseException as error:  # a traceback, in the process of a user
            code = f"{type(error).__name__}: {str(error)[:300]}"
        sys.stdout.flush()
        for fd, old in enumerate(saved, start=1):
            os.dup2(old, fd)
            os.close(old)
        printed = []
        for file in (out, err):
            file.seek(0)
            printed.append(file.read().decode(errors="replace"))
    lines = printed[1].splitlines() or [""]
    if code == 0 and not case.is_bad:
        return "right", printed[1]
    is_one_line = lines[-1].startswith("error: ") and lines[-1].isprintable() and len(lines[-1]) < 6000
    if code == 2 and is_one_line and sum(line.startswith("error:") for line in lines) == 1 and len(lines) < 5:
        return "refused", printed[1]
    return "wrong", f"exit code {code}\n{printed[1]}"


def work(seed: int, bases: Path) -> None:
    """Read numbers of cases from stdin; print what each is, and then what `run_case` found."""
    import resource

    import torch

    from fast import metrics, template

    torch.set_num_threads(1)
    template.SECONDS = 1
    metrics.measure_bandwidth = lambda device: 1e10  # a tenth of a second, which says nothing here
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES << 30,) * 2)
    answers = os.fdopen(os.dup(1), "w")
    numbers = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for line in numbers:
        with tempfile.TemporaryDirectory(dir=bases.parent) as name:
            case = make_case(seed, int(line), bases, Path(name))
            print(json.dumps([case.program, case.words]), file=answers, flush=True)
            print(json.dumps(run_case(case, Path(name))), file=answers, flush=True)
            os.chdir(ROOT)


def verdicts(seed: int, numbers: range, bases: Path) -> Iterator[tuple[int, str, str, str]]:
    """Number, words, verdict, and what was printed, of every case."""
    process = None
    for number in numbers:
        if process is None:
            command = [sys.executable, __file__, "--seed", str(seed), "--bases", str(bases)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        process.stdin.write(f"{number}\n")
        process.stdin.flush()
        case = process.stdout.readline().strip()
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        answer = process.stdout.readline()
        timer.cancel()
        if answer:
            yield number, case, *json.loads(answer)
            continue
        process.kill()
        yield number, case, "wrong", f"hangs or dies, with {process.wait()}"
        process = None
    if process is not None:
        process.stdin.close()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="show this one")
    parser.add_argument("--bases", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bases:
        work(args.seed, args.bases)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        bases = Path(folder) / "bases"
        bases.mkdir()
        make_bases(bases)
        counts: Counter[str] = Counter()
        numbers = range(args.cases) if args.case is None else range(args.case, args.case + 1)
        for number, case, verdict, printed in verdicts(args.seed, numbers, bases):
            counts[verdict] += 1
            if verdict == "wrong" or args.case is not None:
                print(f"case {number}: {verdict}: {case}\n{printed[-3000:]}", flush=True)
    print(f"{counts['right']} right, {counts['refused']} refused in one line, {counts['wrong']} wrong")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
