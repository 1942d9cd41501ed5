"""The README and docs/: every command and every piece of Python in them runs as it stands; every link leads somewhere.

    python -m pytest tests/test_docs.py

Worth knowing: the commands run in this process, in a folder that holds what they name: a copy of the demo, DIR, DRAFT,
TEXT, checkpoints and made-up datasets. `SMALLER` reduces their sizes. Some kinds run in other tests (`ELSEWHERE`).
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
from test_eval import TEMPLATE, write_datasets

import quantize
from fast import cli

ROOT = Path(cli.__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REPO = "meta-llama/Llama-3.2-1B-Instruct"

# The beginning of a command -> the test that runs it.
ELSEWHERE = {
    "pip install -r requirements": ".ci/run",
    "python -m pytest": ".ci/run",
    'pip install "lm_eval': ".ci/run",
    "./scripts/prepare.sh": "tests/test_checkpoint.py::test_prepare_downloads_then_converts",
    "python scripts/download.py": "tests/test_download.py",
    "python scripts/gpu_report.py": "tests/test_gpu_report.py",
    "python -m scripts.bench.quality --every_mode": "tests/test_bench_quality.py::test_every_mode_by_its_flags",
    "python -m fast.harness": "tests/test_eval.py::test_the_harness_runs_the_registered_model_itself",
    "torchrun --nnodes=2": "tests/test_tp.py::test_two_nodes_print_once_what_one_process_prints",
}
SMALLER = {
    "--model tinyllama-1.1b": "--model stories-15m",
    "scripts.bench.speed": "scripts.bench.speed --no-compile --new_tokens 2 --repeats 1",
    "scripts.bench.speculation": "scripts.bench.speculation --no-compile --new_tokens 8 --repeats 1 --prompt_length 8",
    "scripts.bench.scoring": "scripts.bench.scoring --no-compile",
    "scripts.bench.quality": "scripts.bench.quality --perplexity TEXT",
    "--items 10 --per_turn 5": "--items 1 --per_turn 1",
    "--prompt_length 128 1024 --context_length 128 512 2048": "--prompt_length 8 16 --context_length 8 16 32",
    "--tasks hellaswag winogrande": "--tasks winogrande",
    "--tasks": "--limit 1 --tasks",
    "--limit 100": "",
    "demo/heldout.txt": "TEXT",
    "int4-gptq": "int4-gptq --calibration_seq_length 32 --calibration_limit 24",
    "--nproc_per_node=8": "--nproc_per_node=2",
    "generate.py --compile --checkpoint_path checkpoints/$": "generate.py --checkpoint_path checkpoints/$",
    "--shapes --batch_size 1 6 16": "--shapes",
}


def commands_of(page: Path) -> list[str]:
    """The lines of its bash blocks, and what stands in `backticks` and begins like a command."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = re.findall(r"`((?:python|torchrun|pip|\./scripts/)[^`\n]* [^`\n]*)`", prose)
    return [part for line in "".join(blocks).splitlines() + inline for part in line.split(" && ")]


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working directory of all commands; what one writes, a later one may read."""
    place, tiny = tmp_path_factory.mktemp("docs"), Path("checkpoints") / REPO
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.syspath_prepend(ROOT)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("MODEL_REPO", REPO)
        shutil.copytree(ROOT / "demo", "demo")
        patch.setattr(cli, "DEMO", Path("demo/target").absolute())
        write_datasets()
        Path("prompts.txt").write_text("The module\nReturn the\n")
        Path("TEXT").write_text(Path("demo/heldout.txt").read_text(encoding="utf-8")[:3000], encoding="utf-8")
        for name in ("DIR", "DRAFT", tiny):
            shutil.copytree("demo/draft", name)
            Path(name, "chat_template.jinja").write_text(TEMPLATE)
        for path in ("demo/target", tiny):
            assert quantize.main(["--mode", "int8", "--checkpoint_path", str(path)]) == 0
        shutil.copy(tiny / "model_int8.pth", tiny / "model.pth")
        yield place


def test_there_are_commands():
    assert len(COMMANDS) > 50
    assert {command.split()[0] for command in COMMANDS} >= {"pip", "python", "torchrun"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command(command, folder, monkeypatch, capfd):
    test = next((test for start, test in ELSEWHERE.items() if command.startswith(start)), None)
    if test:
        path, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / path).read_text() if name else (ROOT / path).exists()
        return
    for long, short in SMALLER.items():
        command = command.replace(long, short)
    words = [os.path.expandvars(word) for word in shlex.split(command)]
    settings = torch._inductor.config.save_config()  # what a command line sets is put back
    try:
        code = run(words, monkeypatch)
    finally:
        torch._inductor.config.load_config(settings)
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
    is_module = words[1] == "-m"
    monkeypatch.setattr(sys, "argv", words[1 + is_module :])
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        if is_module:
            monkeypatch.delitem(sys.modules, words[2], raising=False)
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_the_library(folder, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    exec(code, {})
    assert len(capsys.readouterr().out.split()) > 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            assert not anchor or anchor in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles], link
