"""decoding.py's steps and loop: against transformers' `generate`, compiled against eager, batched against alone.

    python -m pytest tests/test_decoding.py

Worth knowing: tokens are compared in float32 at temperature 0, where a tie of the top two logits does not happen.
"""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GREEDY, make_tiny, prompt_of, tokens_of
from torch._dynamo.testing import CompileCounterWithBackend

from fast import decoding
from fast.checkpoint import load_model
from fast.compiling import missing_compiler, recorded
from fast.decoding import Steps, build_steps, every_size, kv_slots, record, stream, warm_up
from fast.sampling import Sampling
from kernels import Attention

VARIED = ["ministral", "smollm3", "granite", "gemma3", "qwen3-moe-mixed"]  # by layer, or in scales
MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "full_attention"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def fresh_dynamo():
    """Reset torch.compile before and after, so that tests do not share its limit of recompilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- against transformers, and against itself ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["llama", "llama-tied", "llama-llama3", "mistral-window", "qwen2", "qwen3", "phi3-short", *VARIED]
)
def test_greedy_tokens_equal_transformers(tiny, ours, monkeypatch, family):
    hf, steps, n = tiny(family)[0], build_steps(ours(family), GREEDY), 16
    monkeypatch.setattr(hf.generation_config, "eos_token_id", None)  # else `generate` stops at it
    for length in (1, 2, 7, 40):
        prompt = prompt_of(length)
        theirs = hf.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=n, pad_token_id=0)
        assert tokens_of(steps, [prompt], n) == theirs[:, length:].tolist()


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen3", "mixtral"])
def test_a_ragged_batch_gives_what_each_prompt_gives_alone(ours, family):
    prompts = [prompt_of(length) for length in (9, 1, 20, 2)]
    alone = build_steps(ours(family), GREEDY)
    expected = [tokens_of(alone, [prompt], 20)[0] for prompt in prompts]
    assert tokens_of(build_steps(ours(family, rows=4), GREEDY), prompts, 20) == expected
    assert tokens_of(build_steps(ours(family, rows=6), GREEDY), prompts[:2], 20) == expected[:2]  # 2 of 6 rows


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
@pytest.mark.parametrize("first", [1, 6, 23])
def test_what_is_cached_may_be_left_out_of_the_prompt(ours, family, first):
    prompt = prompt_of(24)
    whole = tokens_of(build_steps(ours(family), GREEDY), [prompt], 20)
    steps = build_steps(ours(family), GREEDY)
    tokens_of(steps, [prompt[:first]], 5)  # the tokens generated here lie beyond `first` and are overwritten
    assert tokens_of(steps, [prompt[first:]], 20, cached=first) == whole


def test_what_is_cached_is_read(ours):
    steps, prompt = build_steps(ours(), GREEDY), prompt_of(24)
    whole = tokens_of(steps, [prompt], 20)
    steps.model.layers[0].attention.kv_cache.v[:, :, 3] += 1
    assert tokens_of(steps, [prompt[12:]], 20, cached=12) != whole


def test_cached_rows_of_different_lengths(ours):
    prefix, ends = prompt_of(10), [prompt_of(5, seed=1), prompt_of(1, seed=2)]
    expected = [tokens_of(build_steps(ours(), GREEDY), [prefix + end], 20)[0] for end in ends]
    steps = build_steps(ours(rows=2), GREEDY)
    tokens_of(steps, [prefix, prefix], 1)
    assert tokens_of(steps, ends, 20, cached=10) == expected


def test_the_cache_can_be_filled_to_its_last_slot(ours):
    prompt = prompt_of(20)
    whole = tokens_of(build_steps(ours(), GREEDY), [prompt], 13)
    assert tokens_of(build_steps(ours(capacity=32), GREEDY), [prompt], 13) == whole
    assert tokens_of(build_steps(ours(capacity=20), GREEDY), [prompt], 1) == [whole[0][:1]]
    assert tokens_of(build_steps(ours(capacity=1), GREEDY), [prompt[:1]], 1)[0]
    full = build_steps(ours(capacity=20), GREEDY)
    tokens_of(full, [prompt[:19]], 1)
    assert tokens_of(full, [prompt[19:]], 1, cached=19) == [whole[0][:1]]


def test_leaving_early_leaves_nothing_behind(ours):
    steps, prompt = build_steps(ours(), GREEDY), prompt_of(5)
    expected = list(stream(steps, [prompt], 20))
    tokens = stream(steps, [prompt], 20)
    assert [next(tokens) for _ in range(3)] == expected[:3]
    tokens.close()
    assert list(stream(steps, [prompt], 20)) == expected


def test_only_what_is_asked_for_is_computed(ours):
    steps, calls = build_steps(ours(), GREEDY), []

    def decode(*args):
        calls.append(args)
        return steps.decode(*args)

    spied = dataclasses.replace(steps, decode=decode)
    assert len(list(stream(spied, [prompt_of(5)], 8))) == 8
    assert len(calls) == 7  # the first token is the prefill's


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_k=20)])
def test_rescoring_a_generation_reproduces_its_log_probabilities(ours, sampling):
    torch.manual_seed(0)
    recorded, n, prompts = [], 24, [prompt_of(11), prompt_of(4)]

    def record(logits):
        recorded.append(logits[:, 0])
        return sampling(logits)

    model = ours(rows=2)
    generated = tokens_of(build_steps(model, record), prompts, n)
    log_probs = torch.stack(recorded, 1).log_softmax(-1)  # [B, n, vocab]
    for row, (prompt, tokens) in enumerate(zip(prompts, generated, strict=True)):
        scored = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = torch.tensor(tokens)[:, None]
        torch.testing.assert_close(scored.gather(1, chosen), log_probs[row].gather(1, chosen), rtol=0, atol=1e-4)


def test_the_same_seed_gives_the_same_tokens(ours):
    steps, drawn = build_steps(ours(), Sampling(1.0)), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(tokens_of(steps, [prompt_of(3)], 20))
    assert drawn[0] == drawn[1] != drawn[2]


# --- compiled --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_row(ours, fresh_dynamo):
    """Compiled and eager steps for one row, with a capacity between two sizes of `kv_slots`."""
    assert kv_slots(640, 10**6) < 700 < kv_slots(700, 10**6)
    return [build_steps(ours(rows=1, capacity=700), GREEDY, compile=on, compile_prefill=on) for on in (True, False)]


@pytest.fixture(scope="module")
def three_rows(ours, fresh_dynamo):
    """Compiled and eager steps for three rows, with a capacity that is a size of `kv_slots`."""
    assert kv_slots(640, 10**6) == 640
    return [build_steps(ours(rows=3, capacity=640), GREEDY, compile=on, compile_prefill=on) for on in (True, False)]


def test_compiled_is_eager_for_any_length_without_recompilation(one_row):
    compiled, eager = one_row
    assert tokens_of(compiled, [prompt_of(5)], 12) == tokens_of(eager, [prompt_of(5)], 12)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (1, 2, 3, 64, 120, 127, 128, 129, 250, 506, 680):  # and 12 tokens more cross 128, 256 and 512
            assert tokens_of(compiled, [prompt_of(length)], 12) == tokens_of(eager, [prompt_of(length)], 12)
        tokens = tokens_of(compiled, [prompt_of(600)], 101)  # to the last slot
    assert tokens == tokens_of(eager, [prompt_of(600)], 101)


def test_cached_prompts_are_compiled_once_more(one_row):
    compiled, eager = one_row
    prompt = prompt_of(300)

    def check(cached, length):
        tokens_of(compiled, [prompt], 1)
        assert tokens_of(compiled, [prompt[cached:length]], 6, cached) == tokens_of(eager, [prompt[:length]], 6)

    check(30, 40)
    with torch.compiler.set_stance("fail_on_recompile"):
        for cached, length in ((100, 101), (3, 300), (1, 3), (120, 130), (255, 300)):
            check(cached, length)


def test_warm_up_compiles_all_that_follows(one_row):
    compiled, eager = one_row
    assert warm_up(compiled, [prompt_of(9)], 8) > 0
    with torch.compiler.set_stance("fail_on_recompile"):
        assert tokens_of(compiled, [prompt_of(200)], 60) == tokens_of(eager, [prompt_of(200)], 60)


def test_compiled_ragged_rows_of_any_length_without_recompilation(three_rows):
    compiled, eager = three_rows

    def check(*lengths):
        prompts = [prompt_of(length, seed) for seed, length in enumerate(lengths)]
        assert tokens_of(compiled, prompts, 12) == tokens_of(eager, prompts, 12)

    check(5, 9, 1)
    with torch.compiler.set_stance("fail_on_recompile"):
        for lengths in ((1, 1, 1), (3, 250, 120), (500, 2, 510), (629, 629, 1)):  # the last fills the cache
            check(*lengths)


@pytest.fixture
def graphs(monkeypatch, fresh_dynamo):
    """Every graph that Dynamo hands to the backend for the compiled steps; the backend runs it uncompiled."""
    torch._dynamo.reset()
    seen, compile = [], torch.compile

    def backend(module, inputs):
        seen.append(module.graph)
        return module

    def spy(function, fullgraph):
        return compile(function, backend=backend, fullgraph=fullgraph)

    monkeypatch.setattr(torch, "compile", spy)
    return seen


@pytest.mark.parametrize(
    "family", ["llama-tied", "llama-bias", "mistral-window", "qwen2", "qwen3", "phi3-long", *VARIED]
)
def test_every_family_is_one_graph_per_step(ours, graphs, family):
    compiled, eager = (
        build_steps(ours(family, capacity=300), GREEDY, True, True),
        build_steps(ours(family), GREEDY),
    )
    for length in (3, 40, 1):
        assert tokens_of(compiled, [prompt_of(length)], 16) == tokens_of(eager, [prompt_of(length)], 16)
    with torch.compiler.set_stance("fail_on_recompile"):
        tokens_of(compiled, [prompt_of(120)], 16)
    assert len(graphs) == 2


@pytest.mark.parametrize(("decode", "prefill"), [(False, False), (True, False), (False, True)])
def test_only_what_is_asked_for_is_compiled(ours, graphs, decode, prefill):
    tokens_of(build_steps(ours(), GREEDY, compile=decode, compile_prefill=prefill), [prompt_of(4)], 3)
    assert len(graphs) == decode + prefill


@pytest.mark.parametrize(
    ("family", "special", "n_bodies"),
    [
        ("llama", {}, (1, 1)),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 0]}, (1, 1)),
        ("ministral", {"layer_types": MIXED}, (2, 1)),  # prefill needs a mask where there is a window, decoding always
    ],
)
def test_layers_of_a_kind_are_compiled_once(graphs, tmp_path, family, special, n_bodies):
    n_layers = 5
    make_tiny(family, num_hidden_layers=n_layers, **special).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    model.setup_caches(1, 64)
    tokens_of(build_steps(model, GREEDY, True, True), [prompt_of(4)], 3)
    assert len(graphs) == 2
    for graph, n in zip(graphs, n_bodies, strict=True):
        calls = graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)
        assert len(calls) == n_layers
        assert len({call.args[1] for call in calls}) == n  # the layers' bodies, by name
        outside = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        assert not [target for target in outside if "scaled_dot_product" in target]


def test_a_kernel_gets_the_window_of_its_layer_when_compiled_too(tmp_path):
    make_tiny("ministral", num_hidden_layers=5, layer_types=MIXED).save_pretrained(tmp_path)
    tokens = []
    for compile in (False, True):
        model = load_model(tmp_path, dtype=torch.bfloat16)  # where a CPU has an attention kernel
        model.setup_caches(1, 64)
        tokens.append(tokens_of(build_steps(model, GREEDY, compile), [prompt_of(20)], 20))
    assert tokens[0] == tokens[1]


FIRST_COMPILE = """
import tempfile, threading
from pathlib import Path
import torch
from fast.compiling import set_compile_flags

def headers():
    return len(list(Path(tempfile.gettempdir()).rglob("precompiled_headers/*.[gp]ch")))

set_compile_flags("cpu")
started = set(threading.enumerate()) - {threading.main_thread()}
for thread in started:
    thread.join()
early = headers()
torch.compile(lambda x: x.sin() + 1)(torch.ones(8))
before = threading.active_count()
set_compile_flags("cpu")
print(len(started), early, headers(), threading.active_count() - before)
"""


@pytest.mark.skipif(missing_compiler() is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize("openssl", [True, False])
def test_the_first_compile_uses_the_precompiled_header(tmp_path, monkeypatch, openssl):
    """Inductor uses the precompiled header; for other flags it would build another. Without openssl there is none."""
    if not openssl:
        for program in [p for folder in os.get_exec_path() for p in Path(folder).glob("*") if p.name != "openssl"]:
            with contextlib.suppress(FileExistsError):
                (tmp_path / program.name).symlink_to(program)
        monkeypatch.setenv("PATH", str(tmp_path))
    elif shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    (empty := tmp_path / "empty").mkdir()
    for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(empty))
    root = Path(__file__).parent.parent
    child = subprocess.run([sys.executable, "-c", FIRST_COMPILE], cwd=root, capture_output=True, text=True)
    assert child.stdout.split() == (["1", "1", "1", "0"] if openssl else ["0"] * 4), child.stderr


@pytest.mark.usefixtures("fresh_dynamo")
def test_what_is_recorded_is_what_was_compiled(ours, monkeypatch):
    """`record` compiles nothing anew at any size of the cache."""
    compile, counter = torch.compile, CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", lambda step, fullgraph: compile(step, backend=counter))
    steps = build_steps(ours(capacity=600), GREEDY, compile=True)
    tokens_of(steps, [prompt_of(3)], 3)
    assert counter.frame_count == 1
    record(steps, 1, range(3, 500))
    assert counter.frame_count == 1


def record_without_a_gpu(step, inputs):
    """As `compiling.record_graph`: no results yet, and a replay reads `inputs` and writes the same outputs."""
    out = step(*inputs)
    each = [out] if isinstance(out, torch.Tensor) else out
    for tensor in each:
        tensor.fill_(-1)

    def replay():
        new = step(*inputs)
        for tensor, value in zip(each, [new] if isinstance(new, torch.Tensor) else new, strict=True):
            tensor.copy_(value)

    return replay, out


def test_a_recording_reads_its_arguments_and_its_results_last():
    calls, buffer = [], torch.arange(10.0)

    def step(x, y, table):
        calls.append((x is not y, table.data_ptr()))
        return x + y + table.sum(), x.clone()

    step = recorded(step, [False, False, True], record_without_a_gpu)
    x, found = torch.tensor([1.0]), []
    for i in range(5):
        found.append(step(x, x, buffer[:4])[0])  # the same tensor twice, as the first speculative step gives
        x = x + 1
        buffer[0] = i
    assert [float(y) for y in found] == [2 + 6, 4 + 6, 6 + 7, 8 + 8, 10 + 9]
    n = len(calls)
    assert set(calls) == {(True, buffer.data_ptr())}
    other = buffer.clone()
    for table, size in ((buffer[:5], 1), (other[:4], 1), (buffer[:4], 2)):  # each is compiled, recorded, replayed
        for value in (3.0, 5.0, 7.0):
            x = torch.full((size,), value)
            total, same = step(x, x, table)
            assert torch.equal(total, 2 * x + table.sum())
            assert torch.equal(same, x)
    assert len(calls) == n + 3 * 4


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_recorded_steps_give_what_eager_ones_give(ours, monkeypatch, family):
    """Every size of the cache is recorded once, in the warm-up; a new cache is recorded anew."""
    recordings = []

    def spy(step, inputs):
        recordings.append(len(inputs[2]))
        return record_without_a_gpu(step, inputs)

    def compile_step(step, dynamic_dims, record=False):
        return recorded(step, [dims is not None for dims in dynamic_dims], spy) if record else step

    expected = tokens_of(build_steps(ours(family, rows=2, capacity=600), GREEDY), prompts := [prompt_of(100), [5]], 400)
    monkeypatch.setattr(decoding, "compile_step", compile_step)
    model = ours(family, rows=2, capacity=600)
    steps = build_steps(model, GREEDY, compile=True)
    record(steps, 2, range(101, 501))
    sizes = [128, 256, 384, 512]
    assert recordings == sizes
    for _ in range(2):
        assert tokens_of(steps, prompts, 400) == expected
    assert recordings == sizes
    model.setup_caches(2, 600)
    assert tokens_of(steps, prompts, 400) == expected
    assert recordings == 2 * sizes


def test_a_kernel_that_finds_the_valid_slots_gets_all(ours):
    model = ours(capacity=600)
    assert [len(slots) for slots in every_size(model, range(1, 300))] == [128, 256, 384]
    for layer in model.layers:
        layer.attention.kv_cache.kernel = Attention(torch.relu, max_positions=16, takes_qkv=True)
    (slots,) = every_size(model, range(1, 300))
    assert slots is model.slots


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("rows", [1, 3])
def test_on_a_gpu_decoding_never_waits_and_equals_eager(ours, rows):
    prompts = [prompt_of(length) for length in (100, 3, 40)[:rows]]
    expected = tokens_of(build_steps(ours(rows=rows, capacity=300, device="cuda"), GREEDY), prompts, 100)
    steps = build_steps(ours(rows=rows, capacity=300, device="cuda"), GREEDY, compile=True, compile_prefill=True)
    warm_up(steps, prompts, 100)  # compiling and recording do wait
    tokens = stream(steps, prompts, 100)
    columns = [next(tokens)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        columns += tokens
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [list(row) for row in zip(*columns, strict=True)] == expected


# --- what a person sees ----------------------------------------------------------------------------------------------


def test_a_prefill_moves_a_bar_over_the_layers(ours, monkeypatch):
    moved, closed = [], []

    class Bar:
        def __init__(self, total, desc, **options):
            moved.append([total, desc, 0])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            closed.append(error[0])

        def update(self):
            moved[-1][2] += 1
            return False  # as tqdm, where nothing was drawn

    model, prompts = ours(rows=2), [prompt_of(9), prompt_of(4)]
    expected = tokens_of(build_steps(model, GREEDY), prompts, 5)
    monkeypatch.setattr(decoding, "tqdm", Bar)
    steps, n = build_steps(model, GREEDY), len(model.layers)
    assert tokens_of(steps, prompts, 5) == expected
    assert moved == [[n, "reading 18 tokens", n]]
    assert not any(layer._forward_hooks for layer in model.layers)
    monkeypatch.setattr(model.layers[1], "forward", lambda *args: [][0])
    with pytest.raises(IndexError):
        tokens_of(steps, prompts, 5)
    assert moved[1:] == [[n, "reading 18 tokens", 1]]
    assert closed == [None, IndexError]
    assert not any(layer._forward_hooks for layer in model.layers)


# --- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, 20), Sampling(0.8, None)])
@pytest.mark.parametrize(
    ("dtype", "remedy"), [(torch.float32, "its weights"), (torch.float16, "they may .* try --dtype bfloat16")]
)
def test_numbers_that_are_none_end_a_text(tiny, sampling, dtype, remedy):
    model = load_model(tiny("llama")[1], dtype=dtype)
    model.setup_caches(2, 64)
    steps = build_steps(model, sampling)
    found = stream(steps, [prompt_of(3), prompt_of(5)], 20)
    for _ in range(4):
        assert min(next(found)) >= 0
    model.layers[1].ffn_norm.weight.data[7] = torch.nan
    with pytest.raises(ValueError, match=f"the model's logits for new token 5 are NaN or infinite: {remedy}"):
        next(found)


def must_not_run(*args):
    raise AssertionError("a step ran")


@pytest.mark.parametrize(
    ("prompts", "n", "cached", "message"),
    [
        ([[1] * 65], 1, 0, r"1 rows of 65 tokens \(65 in the prompt\) do not fit the cache of 2 x 64: .*--max_seq_"),
        ([[1] * 60, [1]], 6, 0, r"2 rows of 65 tokens \(60 in the prompt\) do not fit the cache of 2 x 64"),
        ([[1] * 10], 6, 50, r"1 rows of 65 tokens \(60 in the prompt\) do not fit"),
        ([[1], [1], [1]], 1, 0, r"3 rows of 1 tokens \(1 in the prompt\) do not fit the cache of 2 x 64"),
        ([[1], []], 1, 0, "a prompt has no tokens: give at least one"),
        ([[]], 1, 5, "a prompt has no tokens"),
        ([], 1, 0, "a prompt has no tokens"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error_before_anything_runs(ours, prompts, n, cached, message):
    steps = Steps(ours(rows=2), prefill=must_not_run, decode=must_not_run, prefill_is_compiled=False)
    with pytest.raises(ValueError, match=message):
        next(stream(steps, prompts, n, cached))


@pytest.mark.parametrize("capacity", [1, 100, 128, 300, 640, 1000, 4096, 32768, 100_000])
def test_kv_slots_are_enough_but_few_and_not_many_more(capacity):
    slots = {n: kv_slots(n, capacity) for n in range(1, min(capacity, 32768) + 1)}
    assert all(n <= size <= capacity for n, size in slots.items())
    assert all(size - n < 128 for n, size in slots.items() if n <= 512)
    assert all(size <= 1.25 * n for n, size in slots.items() if n > 512)
    assert list(slots.values()) == sorted(slots.values())
    assert len(set(slots.values())) <= 35
