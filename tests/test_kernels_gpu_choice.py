"""choice.py with fake clocks: the fastest way to compute a product wins and is remembered, failures are survived.

    python -m pytest tests/test_kernels_gpu_choice.py

`gpu_checks.py` tests which ways the GPU's operators offer, and that each gives the right result.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import GREEDY, prompt_of
from heads import make_dflash, make_head, save, save_dflash

from fast import decoding, drafting, speculative
from fast.decoding import time_kernels
from fast.dflash import DFlashDraft
from fast.drafting import SPARE
from fast.eagle import EagleDraft
from fast.head_files import load_head
from kernels.gpu import choice

pytest.importorskip("triton", reason="needs the package triton")
ROOT = Path(__file__).resolve().parent.parent
KEY = "1 x 64 to 64"
WAYS = {"first": 1, "second": 2, "third": 3}


class Operator:
    """An operator that asks which of WAYS to take and records it in `taken`; a way in `fails` raises."""

    def __init__(self, fails: tuple[str, ...] = ()):
        self.fails, self.taken = fails, []

    def __call__(self, layer: int = 0) -> int:
        way = choice.fastest(KEY, WAYS, again=lambda: self(layer))
        name = next(name for name in WAYS if WAYS[name] == way)
        if name in self.fails:
            raise RuntimeError("out of resources")
        self.taken.append((name, layer))
        return way

    def clock(self, **seconds: float) -> Callable[..., float]:
        """A fake clock: a call takes the `seconds` given for the way that it took."""

        def tell(function, *args) -> float:
            function(*args)
            return seconds[self.taken[-1][0]]

        return tell


@pytest.fixture(autouse=True)
def new_process(monkeypatch, tmp_path) -> Callable[[], None]:
    """An empty cache folder; calling the fixture makes this process forget what it measured, as a new one would."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "_fastest", {})
    return choice._fastest.clear


def kept(folder: Path) -> list[Path]:
    return list((folder / "fast-llm").iterdir())


def test_the_fastest_is_taken_from_then_on(new_process, tmp_path, capsys):
    """All calls that asked are timed together; the next process reads the winner from the file and times nothing.

    Both end with a call of the winner: nothing may be compiled for the first time while a step is recorded.
    """
    operator = Operator()
    assert operator() == 1  # the first, as nothing is measured
    operator.taken.clear()
    choice.measure(
        lambda n: [operator(layer) for layer in range(n)], 2, seconds=operator.clock(first=3, second=1, third=2)
    )
    assert operator.taken == [(name, layer) for name in ("first", *WAYS, "second") for layer in range(2)]
    assert "timing kernels on this GPU, once: 100%" in capsys.readouterr().err
    assert operator() == 2
    new_process()
    assert operator() == 1
    operator.taken.clear()
    choice.measure(operator, seconds=operator.clock())
    assert operator.taken == [("first", 0), ("second", 0)]
    assert operator() == 2
    assert capsys.readouterr().err == ""
    (path,) = kept(tmp_path)
    assert json.loads(path.read_text()) == {KEY: "second"}


def test_another_size_joins_what_is_kept(tmp_path):
    operator = Operator()
    choice._write({"of another process": "x"})
    choice.measure(operator, seconds=operator.clock(first=3, second=1, third=2))
    assert json.loads(kept(tmp_path)[0].read_text()) == {KEY: "second", "of another process": "x"}


def test_a_way_that_fails_has_lost():
    operator = Operator(fails=("second",))
    choice.measure(operator, seconds=operator.clock(first=3, third=2))
    assert operator() == 3


def test_where_all_fail_nothing_is_known():
    operator = Operator()

    def clock(function, *args) -> float:
        raise RuntimeError("no clock")

    choice.measure(operator, seconds=clock)
    assert operator() == 1
    choice.measure(operator, seconds=operator.clock(first=3, second=1, third=2))
    assert operator() == 2


def test_ways_are_compiled_all_at_once(monkeypatch):
    """All but Inductor's, which compiles on several cores itself and times what it compiles."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    operator = Operator(fails=("second",))
    choice._compile_together([*WAYS, choice.INDUCTOR], operator)
    assert set(operator.taken) == {("first", 0), ("third", 0)}


def test_the_caches_are_cleared_before_a_call(monkeypatch):
    other = torch.ones(4)
    monkeypatch.setattr(torch, "empty", lambda *size, **named: other)
    monkeypatch.setattr(choice, "replay_seconds", lambda function: function()[1])
    assert choice.cold_seconds(lambda x: float(x + other.sum()), 5.0) == 5.0


def test_being_stopped_leaves_no_trace(tmp_path):
    def clock(function, *args) -> float:
        raise KeyboardInterrupt

    operator = Operator()
    with pytest.raises(KeyboardInterrupt):
        choice.measure(operator, seconds=clock)
    operator.taken.clear()
    assert operator() == 1
    assert operator.taken == [("first", 0)]
    assert not (tmp_path / "fast-llm").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"{", b"[1]", b"null", b'{"1 x 64 to 64": ["second"]}', b'{"1 x 64 to 64": "gone"}']
)
def test_a_broken_file_is_measured_anew(new_process, content):
    choice._write({})
    choice._file().write_bytes(content)
    new_process()
    operator = Operator()
    assert operator() == 1
    choice.measure(operator, seconds=operator.clock(first=3, second=1, third=2))
    assert operator() == 2
    new_process()
    choice.measure(operator, seconds=operator.clock(first=1, second=2, third=3))
    assert operator() == 2


def test_other_versions_have_other_files(new_process, monkeypatch):
    choice._write({KEY: "third"})
    operator = Operator()
    for version, way in ((torch.__version__, 3), ("2.99.0", 2)):
        monkeypatch.setattr(torch, "__version__", version)
        new_process()
        choice.measure(operator, seconds=operator.clock(first=3, second=1, third=2))
        assert operator() == way


def test_without_a_folder_to_write_to_it_is_known_until_the_end(new_process, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    operator = Operator()
    choice.measure(operator, seconds=operator.clock(first=3, second=1, third=2))
    assert operator() == 2


def test_a_step_that_asks_nothing_is_no_matter(tmp_path, capsys):
    choice.measure(lambda: None)
    assert not (tmp_path / "fast-llm").exists()
    assert capsys.readouterr().err == ""


RANK = f"""
import sys
import torch.distributed as dist
from kernels.gpu import choice
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
if rank == 1:
    choice._write({{"{KEY}": "third"}})
times = iter([3.0, 1.0, 2.0])
ask = lambda: choice.fastest("{KEY}", {WAYS}, again=lambda: None)
for _ in range(2):
    choice.measure(ask, seconds=lambda *args: next(times))
print(ask(), list(times))
dist.destroy_process_group()
"""


def test_ranks_agree(tmp_path):
    """Rank 0 measures; rank 1 takes its result, although its own file says otherwise."""
    commands = [[sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")] for rank in range(2)]
    environments = [
        {**os.environ, "XDG_CACHE_HOME": str(tmp_path / str(rank)), "GLOO_SOCKET_IFNAME": "lo"} for rank in range(2)
    ]
    ranks = [
        subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for command, env in zip(commands, environments, strict=True)
    ]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["2 []\n", "2 [3.0, 1.0, 2.0]\n"]


class OnGpu(torch.Tensor):
    """A CPU tensor that claims to be on a GPU."""

    is_cuda = True


def test_a_pass_of_the_model_is_what_is_measured(ours, monkeypatch):
    model, passes = ours(rows=3), []
    monkeypatch.setattr(choice, "measure", lambda model, *args: passes.append(model(*args).shape))
    time_kernels(model, 3, 2)
    assert passes == []
    model.slots = model.slots.as_subclass(OnGpu)
    with torch.no_grad():
        time_kernels(model, 3, 2)
    assert passes == [(3, 2, 128)]


def test_warming_up_times_the_kernels(ours, monkeypatch):
    """For every number of rows and positions that the steps will have."""
    timed, (target, draft) = [], (ours(rows=2) for _ in range(2))
    for model in (target, draft):
        model.setup_caches(2, 64, spare=SPARE)
    for module in (decoding, drafting, speculative):
        monkeypatch.setattr(module, "time_kernels", lambda model, *sizes: timed.append((model, *sizes)))
    steps, prompts = decoding.build_steps(target, GREEDY), [prompt_of(5), prompt_of(3)]
    with torch.no_grad():
        decoding.warm_up(steps, prompts, 4)
        assert timed == [(target, 2, 1)]
        timed.clear()
        drafter = drafting.DraftModel(draft, GREEDY)
        speculative.warm_up_speculation(speculative.build_speculative_steps(steps, drafter, GREEDY, 5), prompts, 4)
    assert timed == [(draft, 2, 2), (draft, 2, 1), (target, 2, 6)]


def test_a_head_s_reading_and_its_next_draft_are_timed(ours, tmp_path, monkeypatch):
    target, measured = ours(), []
    target.setup_caches(3, 64, spare=SPARE)
    head = load_head(save(make_head(), tmp_path, "specforge"), target, dtype=torch.float32)
    head.setup_caches(3, 64, spare=SPARE)
    monkeypatch.setattr(choice, "measure", lambda step, *args: measured.append(step(*args)))
    with torch.no_grad():
        drafter = EagleDraft(head, target, GREEDY, 4)
        drafter.time_kernels(2)
        assert measured == []
        drafter.text = drafter.text.as_subclass(OnGpu)
        drafter.time_kernels(2)
    read, (x, drafts) = measured
    assert [part.shape for part in (read, x, drafts)] == [(2, 1, 64), (2, 1, 64), (2, 1)]


def test_a_dflash_head_s_reading_and_its_blocks_are_timed(ours, tmp_path, monkeypatch):
    target, measured = ours(), []
    target.setup_caches(3, 64, spare=SPARE)
    head = load_head(save_dflash(make_dflash(block_size=8), tmp_path), target, dtype=torch.float32)
    head.setup_caches(3, 64, spare=SPARE)
    monkeypatch.setattr(choice, "measure", lambda step, idx, *others: measured.append((step, idx.shape[1])))
    for k, expected in (("auto", {3, 4, 8}), (5, {6})):
        drafter, measured[:] = DFlashDraft(head, target, GREEDY, k), []
        drafter.text = drafter.text.as_subclass(OnGpu)
        drafter.time_kernels(2)
        assert measured.pop(0) == (drafter._read_text, 1)
        assert {step for step, _ in measured} == {drafter._drafted}
        assert {n for _, n in measured} == expected
