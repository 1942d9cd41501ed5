"""Tensor parallelism: first within one process, then under torchrun on the CPU, as a user starts it.

The oracle is the same model in one process. Both run in float32, where adding up partial sums changes little.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, GREEDY, make_tiny, prompt_of, tokens_of
from heads import make_dflash, make_head, save, save_dflash
from test_checkpoint import write_meta

import tp
from fast.checkpoint import load_model, open_checkpoint
from fast.decoding import build_steps
from fast.metrics import parameter_bytes
from fast.prompts import DEFAULT
from fast.sampling import Sampling
from model import Sharding
from quantize import quantize
from scripts.bench.presets import preset

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [str(Path(sys.executable).parent / "torchrun")]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
GPTQ = {"mode": "int4-gptq", "groupsize": 32, "percdamp": 0.01, "blocksize": 128, "act_order": True}
SCHEMES = {"int8": {"mode": "int8"}, "int4": {"mode": "int4", "groupsize": 32}, "int4-gptq": GPTQ}


@pytest.fixture(scope="module")
def checkpoints(tiny, tmp_path_factory) -> dict[str, Path]:
    """The checkpoints to divide; "wide", "odd-vocab" and the quantised ones have two key heads of 32 elements."""
    folder = tmp_path_factory.mktemp("tp")
    paths = {name: tiny(name)[1] for name in FAMILIES}
    for name, changes in (("wide", {}), ("odd-vocab", {"vocab_size": 127})):
        paths[name] = folder / name
        make_tiny("llama-head-dim", intermediate_size=128, **changes).save_pretrained(paths[name])
    paths["meta"] = write_meta(tiny("llama")[0], folder / "meta", n_shards=2)
    for mode, scheme in SCHEMES.items():
        paths[mode] = folder / f"{mode}.pth"
        chunks = [prompt_of(64, seed) for seed in range(4)] if scheme is GPTQ else None
        with torch.no_grad():
            quantize(open_checkpoint(paths["wide"]), scheme, paths[mode], "cpu", chunks)
    paths["experts-int4"] = folder / "experts.pth"
    quantize(open_checkpoint(paths["qwen3-moe-mixed"]), SCHEMES["int4"], paths["experts-int4"], "cpu")
    return paths


# ---- In one process: ranks are threads here, or do not run at all.


def in_threads(n_ranks: int, monkeypatch, work) -> list:
    """The results of `work(ranks)` on `n_ranks` threads, whose collectives exchange tensors at a barrier."""
    slots, barrier, here = [None] * n_ranks, threading.Barrier(n_ranks), threading.local()

    def exchange(x: torch.Tensor) -> list[torch.Tensor]:
        slots[here.rank] = x
        barrier.wait(timeout=60)
        everyone = list(slots)
        barrier.wait(timeout=60)
        return everyone

    collectives = {
        ("sum", True): lambda x, world_size: torch.stack(exchange(x)).sum(0),
        ("gather", True): lambda x, world_size: torch.cat(exchange(x), -1),
        ("gather", False): lambda x, world_size: exchange(x)[0],
    }
    monkeypatch.setattr(tp, "COLLECTIVES", collectives)
    results = [None] * n_ranks

    def run(rank: int) -> None:
        here.rank = rank
        with torch.no_grad():
            results[rank] = work(tp.Ranks(rank, n_ranks))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(n_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(
    ("name", "n_ranks"),
    [
        ("llama", 2), ("llama", 4), ("llama-mha", 4), ("llama-tied", 2), ("llama-bias", 4), ("qwen2", 2), ("qwen3", 4),
        ("mistral3", 2), ("ministral", 2), ("phi3", 4), ("phi3-short", 2), ("granite-tied", 2), ("ernie", 4),
        ("gemma3", 2), ("odd-vocab", 2), ("meta", 2), ("meta", 4), ("int8", 4), ("int4", 2), ("int4", 4),
        ("int4-gptq", 2), ("mixtral", 2), ("qwen3-moe-mixed", 4), ("experts-int4", 2),
    ],
)  # fmt: skip
def test_ranks_together_compute_the_logits_of_one(checkpoints, monkeypatch, name, n_ranks):
    idx = torch.tensor([prompt_of(7, seed) for seed in range(3)]) % 127

    def logits(ranks: tp.Ranks) -> torch.Tensor:
        return load_model(checkpoints[name], dtype=torch.float32, ranks=ranks)(idx)

    with torch.no_grad():
        whole = logits(tp.ALONE)
    for result in in_threads(n_ranks, monkeypatch, logits):
        torch.testing.assert_close(result, whole, rtol=1e-4, atol=1e-4)


def test_key_heads_are_shared_by_neighbours_when_there_are_more_ranks():
    sizes = (8, 4, 4), (2, 2, 2)  # query heads, key heads and value heads of one element; two ranks to each key head
    shares = [tp.share_of(*sizes, rank, 4) for rank in range(4)]
    assert [share[0] for share in shares] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert [share[1] for share in shares] == [(8, 10), (8, 10), (10, 12), (10, 12)]
    assert [share[2] for share in shares] == [(12, 14), (12, 14), (14, 16), (14, 16)]


@pytest.mark.parametrize("name", ["llama", "int8", "int4"])
def test_a_rank_holds_its_share_and_what_is_replicated(checkpoints, name):
    whole = load_model(checkpoints[name], dtype=torch.float32)
    share = load_model(checkpoints[name], dtype=torch.float32, ranks=tp.Ranks(1, 2))
    both = sum(t.nbytes for n, t in whole.state_dict().items() if "norm" in n)
    if name == "int8":  # a weight divided along its inputs has the scales of all rows on every rank
        both += sum(t.nbytes for n, t in whole.state_dict().items() if n.endswith(("wo.scales", "w2.scales")))
    assert parameter_bytes(share) == (parameter_bytes(whole) - both) / 2 + both


def test_only_the_share_is_read_from_the_file(checkpoints):
    stored = open_checkpoint(checkpoints["llama"]).tensors["layers.0.feed_forward.w2.weight"]
    share = stored.share(tp.Share(dim=1, ranges=((48, 96),)))
    (part,) = share.parts
    assert part.read().untyped_storage().data_ptr() == stored.parts[0].read().untyped_storage().data_ptr()  # no copy
    assert torch.equal(share.load("cpu", torch.float32), stored.load("cpu", torch.float32)[:, 48:])


@pytest.mark.parametrize(
    ("name", "n_ranks", "message"),
    [
        ("llama", 3, "3 processes cannot share this model: n_heads 4 is not a multiple of 3; .* fit: 1, 2, 4$"),
        ("int4", 8, "n_heads 4 is not a multiple of 8; .* fit: 1, 2, 4$"),
    ],
)
def test_a_world_size_that_does_not_fit_names_those_that_do(checkpoints, name, n_ranks, message):
    with pytest.raises(ValueError, match=message):
        load_model(checkpoints[name], ranks=tp.Ranks(0, n_ranks))


def test_groups_that_do_not_divide_name_the_world_sizes_that_fit(tmp_path):
    make_tiny("llama").save_pretrained(tmp_path)  # w2 has 96 inputs, three groups of 32; wo has 64, two groups
    quantize(open_checkpoint(tmp_path), SCHEMES["int4"], tmp_path / "int4.pth", "cpu")
    with pytest.raises(ValueError, match=r"2 processes .*w2 has 48 inputs, not a multiple of 32.* fit: 1$"):
        load_model(tmp_path / "int4.pth", ranks=tp.Ranks(0, 2))


def test_key_heads_that_do_not_go_with_the_ranks():
    args = dataclasses.replace(preset("llama-3.2-3b"), hidden_dim=1200)  # 24 heads, 8 key heads
    with pytest.raises(ValueError, match="n_kv_heads 8 and 12: neither is a multiple of the other"):
        tp.divided(args, 12)


def test_a_width_that_no_layer_has_need_not_be_divided():
    args = dataclasses.replace(preset("qwen-3-30b-a3b"), hidden_dim=129)
    assert tp.divided(args, 4).expert_dim == 192
    with pytest.raises(ValueError, match="hidden_dim 129 is not a multiple of 4"):
        tp.divided(dataclasses.replace(args, dense_layers=(3,)), 4)
    with pytest.raises(ValueError, match="expert_dim 770 is not a multiple of 4"):
        tp.divided(dataclasses.replace(args, expert_dim=770), 4)


def test_any_module_that_declares_its_sharding_is_divided():
    def make(rows: int) -> torch.nn.Module:
        module = torch.nn.Conv1d(3, rows, kernel_size=1)  # which no model has
        module.sharding = Sharding(parts=(rows // 2, rows // 2))
        return torch.nn.ModuleDict({"any": module})

    shares = tp.connect(make(8), make(4), tp.Ranks(1, 2))
    assert shares == {f"any.{kind}": tp.Share(0, ((2, 4), (6, 8))) for kind in ("weight", "bias")}


# ---- Under torchrun.


def torchrun(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [*TORCHRUN, *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_tokens_are_those_of_one_process(checkpoints, tmp_path, n_ranks):
    one, ragged = [prompt_of(6)], [prompt_of(5), prompt_of(9), prompt_of(2)]
    names = ["llama", "llama-mha", "int8", "int4"] + ["odd-vocab", "llama-tied", "int4-gptq"] * (n_ranks == 2)
    cases = [(name, prompts, 0, False) for name in names for prompts in (one, ragged)]
    cases += [("llama", ragged, 1.0, False)] + [("llama", one, 0, True)] * (n_ranks == 2)
    cases = [
        {"path": str(checkpoints[name]), "prompts": prompts, "n": 8, "temperature": temperature, "compile": compile}
        for name, prompts, temperature, compile in cases
    ]
    for replicate in (False, True):  # the draft: the target, rounded to int8
        draft = {"draft": str(checkpoints["int8"]), "replicate": replicate, "k": 3}
        cases.append({**cases[0], "path": str(checkpoints["wide"]), "prompts": ragged, **draft})
    drafted = cases[-1]
    paths = (
        save(make_head(own_embeddings=False), tmp_path / "eagle", "specforge"),
        save_dflash(make_dflash(), tmp_path / "dflash"),
    )
    heads = [{**cases[0], "path": str(checkpoints["wide"]), "prompts": ragged, "head": str(p), "k": 3} for p in paths]
    cases += heads + [{**case, "temperature": 1.0} for case in (drafted, {**drafted, "k": "auto", "n": 40}, *heads)]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    flags = "--standalone", f"--nproc_per_node={n_ranks}"
    run = torchrun(*flags, "tests/tp_driver.py", str(tmp_path / "cases.json"), str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(n_ranks)]
    assert all(result == results[0] for result in results)
    assert all(result["steps"] < case["n"] for case, result in zip(cases, results[0], strict=True) if "draft" in case)
    for case, result in zip(cases[:-4], results[0], strict=False):  # not the last: their drafts change what is sampled
        model = load_model(case["path"], dtype=torch.float32)
        model.setup_caches(3, 64)
        torch.manual_seed(0)
        sampling = Sampling(case["temperature"], top_k=None) if case["temperature"] else GREEDY
        with torch.no_grad():
            assert result["tokens"] == tokens_of(build_steps(model, sampling), case["prompts"], 8), case["path"]


GENERATE = ("generate.py", "--dtype", "float32", "--temperature", "0", "--max_new_tokens", "20")


def test_two_nodes_print_once_what_one_process_prints(tmp_path):
    metrics = tmp_path / "metrics.json"
    flags = "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{_free_port()}"
    command = [*TORCHRUN, *flags, *GENERATE, "--metrics_path", str(metrics)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    nodes = [subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **pipes) for _ in range(2)]
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    (printed,) = [stdout for stdout, _ in outputs if stdout]
    (told,) = [stderr for _, stderr in outputs if "first token" in stderr]
    assert printed.startswith(DEFAULT)
    assert told.count("first token") == 1
    assert not any("Warning" in stderr for _, stderr in outputs)
    figures = json.loads(metrics.read_text())
    alone, (sample,) = load_model(ROOT / "demo" / "target", dtype=torch.float32), figures["samples"]
    alone.setup_caches(1, 64)
    with torch.no_grad():
        assert [sample["tokens"]] == tokens_of(build_steps(alone, GREEDY), [sample["prompt_tokens"]], 20)
    parallel = figures["parallel"]
    assert parallel["world_size"] == 2
    assert parallel["parameter_bytes"] < 0.51 * parameter_bytes(alone)
    assert 0 < parallel["collectives_share"] < 1
    assert parallel["collectives_s_per_token"] > 0


def test_evaluation_finds_what_one_process_finds(tmp_path, monkeypatch, capsys):
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setitem(ENVIRONMENT, name, "1")
        monkeypatch.setenv(name, "1")
    monkeypatch.setitem(ENVIRONMENT, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    import eval as eval_cli

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    flags = ["--dtype", "float32", "--include_path", "demo/tasks", "--tasks", "demo_continuation", "--limit", "4"]
    flags += ["--perplexity", str(tmp_path / "text"), "--output_path", str(tmp_path / "ranks"), "--log_samples"]
    (tmp_path / "text").write_text((ROOT / "demo" / "heldout.txt").read_text(encoding="utf-8")[:3000])
    run = torchrun("--standalone", "--nproc_per_node=2", "eval.py", *flags)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("demo_continuation") == run.stdout.count("perplexity") == 1
    flags[-2] = str(tmp_path / "alone")
    assert eval_cli.main(flags) == 0
    assert run.stdout.splitlines()[0] == capsys.readouterr().out.splitlines()[0]  # perplexity to four decimals
    found = []
    for run in ("ranks", "alone"):
        (path,) = (tmp_path / run).rglob("samples_demo_continuation_*.jsonl")  # only rank 0 writes
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found.append([float(answer[0][0]) for row in rows for answer in row["resps"]])
    assert len(found[0]) == 16
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_what_fails_everywhere_is_said_once():
    run = torchrun("--standalone", "--nproc_per_node=3", *GENERATE)
    assert run.returncode != 0
    assert run.stdout == ""
    assert run.stderr.count("error: 3 processes cannot share this model") == 1
    assert "fit: 1, 2, 4, 8" in run.stderr


def test_what_fails_on_one_rank_ends_all(tmp_path):
    script = tmp_path / "only_rank_1.py"
    script.write_text(
        "import os, sys, generate\n"
        "bad = ['--checkpoint_path', 'nowhere'] if os.environ['RANK'] == '1' else []\n"
        "sys.exit(generate.main(sys.argv[1:] + bad))\n"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", str(script), *GENERATE[1:]]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode != 0
    assert "error: nowhere: no such file or directory (rank 1 of 2)" in run.stderr
    assert run.stderr.count("error: ") == 1


def started(*flags: str, until: str, script: str = GENERATE[0]) -> tuple[subprocess.Popen, list[Path]]:
    """Start generate.py on two ranks and wait until it says `until`; torchrun, and its ranks' folders in /proc."""
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", script, *GENERATE[1:], *flags]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    agent = subprocess.Popen(command, cwd=ROOT, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, **pipes)
    agent.stdin.write("The list\n")
    agent.stdin.flush()
    while until not in agent.stderr.readline():
        assert agent.poll() is None, agent.stderr.read()
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return agent, [Path("/proc", child) for child in children]


in_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")


@in_proc
def test_a_rank_killed_in_the_middle_ends_all():
    agent, ranks = started("--prompt", "The list", "--num_samples", "100000", until="decode")
    os.kill(int(ranks[1].name), signal.SIGKILL)
    _, stderr = agent.communicate(timeout=20)
    assert agent.returncode != 0
    assert "Signal 9" in stderr
    assert [rank.exists() for rank in ranks] == [False, False]


IMPATIENT = """
import os, signal, sys
import generate, tp
tp.SILENCE = 4
if os.environ["RANK"] == "0" and "{stopped}":
    os.kill(os.getpid(), signal.SIGSTOP)
sys.exit(generate.main(sys.argv[1:]))
"""
NO_SIGN = "error: rank 0 gave no sign of life for 4 s, is it stopped? (rank 1 of 2)\n"


@in_proc
def test_a_rank_that_never_joins_ends_all(tmp_path):
    (script := tmp_path / "impatient.py").write_text(IMPATIENT.format(stopped="yes"))
    agent, (stopped, *_) = started(until=NO_SIGN, script=str(script))
    os.kill(int(stopped.name), signal.SIGCONT)  # torchrun's SIGTERM can end it now
    agent.communicate(timeout=20)
    assert agent.returncode != 0
    assert not stopped.exists()


@in_proc
def test_a_stopped_rank_ends_all(tmp_path):
    (script := tmp_path / "impatient.py").write_text(IMPATIENT.format(stopped=""))
    agent, ranks = started("--prompt", "The list", "--num_samples", "100000", until="decode", script=str(script))
    os.kill(int(ranks[0].name), signal.SIGSTOP)
    while agent.stderr.readline() != NO_SIGN:
        assert agent.poll() is None
    os.kill(int(ranks[0].name), signal.SIGCONT)
    agent.communicate(timeout=20)
    assert agent.returncode != 0
    assert [rank.exists() for rank in ranks] == [False, False]


@in_proc
def test_a_pause_of_all_ends_none_and_ranks_end_with_a_killed_torchrun(tmp_path):
    (script := tmp_path / "impatient.py").write_text(IMPATIENT.format(stopped=""))
    agent, ranks = started("--prompt", "The list", "--num_samples", "100000", until="decode", script=str(script))
    for number, seconds in ((signal.SIGSTOP, 5), (signal.SIGCONT, 1.5)):
        for rank in ranks:
            os.kill(int(rank.name), number)
        time.sleep(seconds)
    assert [rank.exists() for rank in ranks] == [True, True]
    agent.kill()
    _, stderr = agent.communicate(timeout=10)  # until the ranks have closed it
    assert "error: torchrun has ended" in stderr or "error: another process is gone" in stderr


@in_proc
def test_a_conversation_reaches_every_rank_and_ctrl_c_leaves_none():
    agent, ranks = started("--interactive", until="(cut after")  # the first answer came: no rank hangs
    time.sleep(1)  # and all wait for the next line
    agent.send_signal(signal.SIGINT)
    agent.communicate(timeout=20)
    assert agent.returncode != 0
    assert [rank.exists() for rank in ranks] == [False, False]


def _free_port() -> int:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
