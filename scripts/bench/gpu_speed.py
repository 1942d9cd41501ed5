"""Steps 3 and 5 to 7 of `gpu_report.py`: the demo, whole decode steps, a user's waiting times, start-up.

    for row in demo_rows(card, "bf16"): print(row.what, row.predicted, row.measured, row.unit)

Worth knowing: the numbers of launches (`COUNTED_...`) were counted in the code that Inductor generates, on a machine
without a GPU. Weights are random, except the demo's.
"""

import contextlib
import dataclasses
import gzip
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import quantize
from fast.checkpoint import load_model
from fast.cli import DEMO, profiled
from fast.compiling import compile_step
from fast.decoding import Steps, build_steps, record, slots_to_read, stream, time_kernels, warm_up
from fast.drafting import SPARE
from fast.metrics import bytes_per_step
from fast.sampling import Sampling
from fast.speculative import PromptLookup, build_speculative_steps, speculate, warm_up_speculation
from fast.tokenizer import load_tokenizer
from kernels import gpu
from model import Transformer
from scripts.bench.gpu_card import (
    CONTEXTS,
    MODELS,
    MODES,
    WHOLE_MODELS,
    Card,
    Part,
    Row,
    inverse,
    make_headroom,
    within,
)
from scripts.bench.measuring import Decode, Yardstick, operations, replay_seconds, timed
from scripts.bench.random_models import build_model, with_caches

N_LAYERS = 8  # instead of the 8B shape's 32, for the waits and where 32 do not fit the GPU's memory
NEW_TOKENS = 32
PROMPT_LENGTHS = (200, 517, 1111)

# Launches of a compiled step of Llama-3.1-8B in every mode, counted on 2026-11-27 with torch 2.14.1 in the code that
# Inductor writes for an H100: (per layer, outside the layers), by batch size. That code calls topk once. For one row an
# H100 ran it as 17 kernels (torch 2.11); for more rows it is counted as one.
COUNTED_LAUNCHES = {1: (6, 7 + 17), 8: (6, 7)}
COUNTED_EXPERTS = 3  # more in a layer with experts (torch 2.11): the router is two, and one sums their outputs
COUNTED_VERIFY = 70  # the verify pass over 6 rows, 8 layers (torch 2.11)
COUNTED_DEMO = 48  # a greedy decode step of the demo


# ---- Step 3: the demo.


def trace_tokens(steps: Steps, prompts: list[list[int]], cached: int, path: Path) -> dict[str, float]:
    """Write a Chrome trace of 5 decoded tokens; return kernels and graphs launched, and kernel time, per token."""
    n, tokens = 5, stream(steps, prompts, 12, cached)
    for _ in range(3):
        next(tokens)
    synchronize = torch.cuda.synchronize if steps.model.slots.is_cuda else lambda: None
    synchronize()
    with profiled(path):
        for _ in range(n):
            next(tokens)
        synchronize()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") == "kernel"]
    graphs = sum(event.get("name") == "cudaGraphLaunch" for event in events)
    return {"kernels": len(spans) / n, "busy_us": covered(spans) / n, "graphs": graphs / n}


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of these (start, end), which may overlap."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def regret(model: Transformer, prompt: list[int], tokens: list[int]) -> float:
    """The largest gap between `model`'s highest logit and its logit of the chosen token, in standard deviations."""
    idx = torch.tensor([prompt + tokens], device=model.tok_embeddings.weight.device)
    logits = model(idx)[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    return float(((logits.amax(1) - chosen) / logits.std(1)).max())


def demo_rows(card: Card, mode: str) -> Iterator[Row]:
    """`generate.py --compile` on the demo, at temperature 0."""
    n, prompts = 200, [load_tokenizer(DEMO).encode("She could not")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth" if MODES[mode] else DEMO
        if MODES[mode] and quantize.main(["--mode", mode, "--output_path", str(path), "--device", card.device]):
            raise RuntimeError(f"quantize.py --mode {mode} failed")
        float32, model = (load_model(path, card.device, dtype) for dtype in (torch.float32, card.dtype))
    model.setup_caches(1, 256)
    steps = build_steps(model, Sampling(temperature=0), card.compile)
    compile_s, seconds = warm_up(steps, prompts, n), []
    for _ in range(3):
        tokens, elapsed = timed(stream(steps, prompts, n))
        seconds.append(elapsed / len(tokens))
    predicted = inverse(card.step_seconds(bytes_per_step(model, 1, n / 2), COUNTED_DEMO))
    yield Row(f"demo, {mode}", "tokens/s", predicted, inverse(median(seconds)), None, {"compile_s": compile_s})
    launched = trace_tokens(steps, prompts, 0, card.out / f"demo_{mode}.json.gz")
    yield Row(f"demo, {mode}: kernels", "a token", COUNTED_DEMO, launched["kernels"])
    yield Row(f"demo, {mode}: GPU busy", "%", None, 100 * launched["busy_us"] / 1e6 / median(seconds))
    is_right = launched["graphs"] == 1 if launched["kernels"] else None  # None: the profiler saw nothing
    yield Row(f"demo, {mode}: CUDA graphs launched", "a token", 1, launched["graphs"], is_right)
    worst = regret(float32, prompts[0], [token for (token,) in stream(steps, prompts, n)])
    yield within(f"demo, {mode}: worst greedy token, by float32", "sigma", 0.25, worst)


DEMO_PARTS: list[Part] = [partial(demo_rows, mode=mode) for mode in WHOLE_MODELS]


# ---- Step 5: whole decode steps.


def build(card: Card, name: str, mode: str, n_layers: int) -> Transformer:
    shape = dataclasses.replace(MODELS[name], n_layers=n_layers)
    return build_model(shape, card.device, card.dtype, MODES[mode])


def build_fitting(card: Card, name: str, mode: str, batch: int, room: int) -> Transformer:
    """The model with its KV cache; with N_LAYERS if the GPU's memory does not hold all of its layers."""
    with contextlib.suppress(torch.OutOfMemoryError):
        return with_caches(build(card, name, mode, MODELS[name].n_layers), batch, [room])[0]
    return with_caches(build(card, name, mode, N_LAYERS), batch, [room])[0]


def time_replays(card: Card, model: Transformer, batch: int, context: int) -> float:
    """Seconds of a decode step on the GPU: its graph, replayed back to back without work on the host in between."""
    step = build_steps(model, Sampling()).decode
    step = compile_step(step, dynamic_dims=(None, None, 0)) if card.compile else step
    tokens, position = torch.zeros(2, batch, 1, dtype=torch.long, device=card.device)
    return replay_seconds(card.device, step, tokens, position + context, slots_to_read(model)(context + 1))


def time_stream(steps: Steps, yardstick: Yardstick, mode: str, batch: int, context: int) -> tuple[float, float]:
    """Seconds per step in the generation loop, and its bandwidth as a share of that of plain reads beside it."""
    point = Decode(mode, steps, yardstick, batch, context, NEW_TOKENS)
    record(steps, batch, range(context, context + NEW_TOKENS))
    for _ in range(5):
        point.measure()
    figures = point.figures()
    return batch / figures["tokens_per_s"], figures["share"][0]


def decode_rows(card: Card, name: str, mode: str, batch: int, n_contexts: int = len(CONTEXTS)) -> Iterator[Row]:
    """Decode steps of a whole model after the first `n_contexts` of CONTEXTS, with a Chrome trace of each.

    The time of a layer includes its share of the output projection and of sampling.
    """
    yardstick, contexts = Yardstick(MODELS[name], card.device, card.dtype), CONTEXTS[:n_contexts]
    model = build_fitting(card, name, mode, batch, max(contexts) + NEW_TOKENS)
    n_layers, (per_layer, around) = model.args.n_layers, COUNTED_LAUNCHES[batch]
    per_layer += COUNTED_EXPERTS if model.args.n_experts else 0
    steps, launches = build_steps(model, Sampling(), card.compile), n_layers * per_layer + around
    time_kernels(model, batch, 1)
    for context in contexts:
        what = f"{name}, {mode}, {batch} at {context}"
        what += "" if n_layers == MODELS[name].n_layers else f", {n_layers} layers"
        seconds, share = time_stream(steps, yardstick, mode, batch, context)
        n_bytes = bytes_per_step(model, batch, context + NEW_TOKENS / 2)
        predicted = inverse(card.step_seconds(n_bytes, launches), batch)
        yield Row(what, "tokens/s", predicted, inverse(seconds, batch), None, {"bytes": n_bytes})
        yield Row(f"{what}: share of a plain read's bandwidth", "%", None, 100 * share)
        path = card.out / f"{name}_{mode}_{batch}_at_{context}.json.gz"
        launched = trace_tokens(steps, [[1]] * batch, context - 1, path)["kernels"]
        yield Row(f"{what}: kernels", "a token", launches, launched)
        alone, n_bytes = time_replays(card, model, batch, context), bytes_per_step(model, batch, context + 1)
        yield Row(f"{what}: the graph alone", "tokens/s", predicted, inverse(alone, batch))
        if card.read and card.launch:
            reading, launching = n_bytes / card.read, launches * card.launch
            yield Row(f"{what}: a layer's bytes, plainly read", "us", None, reading / n_layers * 1e6)
            yield Row(
                f"{what}: the rest of a layer", "us", launching / n_layers * 1e6, (alone - reading) / n_layers * 1e6
            )


def overlap_rows(card: Card, mode: str) -> Iterator[Row]:
    """Tokens/s of the model's graph with programmatic dependent launch; as the prediction, without it."""
    if card.device.startswith("cuda") and torch.cuda.get_device_capability(card.device) < (9, 0):
        return
    (model,) = with_caches(build(card, "8B", mode, N_LAYERS), 1, [CONTEXTS[0] + 1])
    time_kernels(model, 1, 1)
    as_loaded = gpu.OVERLAP
    args = *torch.full((2, 1, 1), CONTEXTS[0], device=card.device), model.slots
    rates, logits = [], []
    try:
        for gpu.OVERLAP in (False, True):
            rates.append(1 / replay_seconds(card.device, model, *args))
            logits.append(model(*args))
    finally:
        gpu.OVERLAP = as_loaded
    is_right = None if torch.equal(*logits) else False
    yield Row(f"8B, {mode}, 1 at {CONTEXTS[0]}: overlapping kernels, no sampling", "tokens/s", *rates, is_right)


DECODES: list[Part] = [partial(decode_rows, name="8B", mode=mode, batch=1) for mode in WHOLE_MODELS]
DECODES += [partial(decode_rows, name="7B", mode=mode, batch=1, n_contexts=1) for mode in WHOLE_MODELS]
DECODES += [partial(overlap_rows, mode="int4")]
DECODES += [partial(decode_rows, name="8B", mode=mode, batch=8) for mode in WHOLE_MODELS]
DECODES += [partial(decode_rows, name="30B-A3B", mode="int4", batch=1, n_contexts=1)]


# ---- Step 6: a user's waiting times.


def verify_rows(card: Card, mode: str) -> Iterator[Row]:
    """The time of the pass that verifies five drafts, compared with that of a decoded token."""
    model = build(card, "8B", mode, N_LAYERS)
    prompts = [torch.randint(model.args.vocab_size, (128,)).tolist()]
    model.setup_caches(1, 128 + NEW_TOKENS, spare=SPARE)
    plain = build_steps(model, Sampling(), card.compile)
    steps = build_speculative_steps(plain, PromptLookup(), Sampling(), 5, card.compile)
    warm_up(plain, prompts, NEW_TOKENS)
    warm_up_speculation(steps, prompts, NEW_TOKENS)
    tokens, seconds = timed(stream(plain, prompts, NEW_TOKENS))
    token_s = seconds / len(tokens)
    brought, _ = timed(speculate(steps, prompts, NEW_TOKENS))
    verify_s = median(step.verify_s for step in brought)
    n_bytes = bytes_per_step(model, 1, 128 + NEW_TOKENS / 2)
    predicted = card.step_seconds(n_bytes, COUNTED_VERIFY)
    yield Row(f"8B, {mode}: verifying 6 rows", "ms", predicted and predicted * 1e3, verify_s * 1e3)
    yield Row(f"8B, {mode}: the same in decoded tokens", "tokens", 1, verify_s / token_s)


def first_token_rows(card: Card, how: str) -> Iterator[Row]:
    """Time to the first token of prompts of new lengths, and of the same lengths again.

    how: "eager", "compiled", or "eager with cuDNN", whose attention builds a plan for every new length.
    """
    model, is_compiled = build(card, "8B", "bf16", N_LAYERS), how == "compiled"
    every = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    model.setup_caches(1, 2048)
    make_headroom(card)
    steps = build_steps(model, Sampling(), compile_prefill=is_compiled and card.compile)
    next(stream(steps, [[1] * 64], 1))  # compiles
    for length in PROMPT_LENGTHS:
        predicted, prompts = None, [torch.randint(model.args.vocab_size, (length,)).tolist()]
        if card.read and card.rate:
            n_operations = operations(model.args, 1, length, length * (length + 1) / 2)
            predicted = 1e3 * max(bytes_per_step(model, 1, length) / card.read, n_operations / card.rate)
        for when in ("first", "again"):
            start = time.perf_counter()
            with sdpa_kernel(every) if how == "eager with cuDNN" else contextlib.nullcontext():
                next(stream(steps, prompts, 1))
            seconds = time.perf_counter() - start
            yield Row(f"8B, bf16, {how}: first token after {length}, {when}", "ms", predicted, seconds * 1e3)


def chat_rows(card: Card) -> Iterator[Row]:
    """A turn of 40 tokens after a history of 300, and its answer, after a warm-up like that of `--interactive`."""
    model = build(card, "8B", "bf16", N_LAYERS)
    model.setup_caches(1, 2048)
    steps, blank = build_steps(model, Sampling(), card.compile), [[0] * 64]
    warm_up(steps, blank, 200)
    next(stream(steps, blank, 1, cached=128))
    times = [time.perf_counter()]
    for _ in stream(steps, [[1] * 40], 200, cached=300):
        times.append(time.perf_counter())
    waits = [b - a for a, b in pairwise(times)]
    yield Row("chat, 8B, bf16: first token of a turn", "ms", None, waits[0] * 1e3)
    yield Row("chat, 8B, bf16: longest wait within its answer", "ms", median(waits[1:]) * 1e3, max(waits[1:]) * 1e3)


WAITS: list[Part] = [
    partial(first_token_rows, how="eager"),
    partial(first_token_rows, how="eager with cuDNN"),
    partial(verify_rows, mode="int4"),
    chat_rows,
    partial(first_token_rows, how="compiled"),
    partial(verify_rows, mode="bf16"),
]


# ---- Step 7: the command line, from its start.


def startup_rows(card: Card) -> Iterator[Row]:
    """`generate.py --compile` on the demo with empty compile caches, and again with the filled ones."""
    script = DEMO.parent.parent / "generate.py"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        names = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"
        env = {name: f"{folder}/{name}" for name in names}
        metrics = Path(folder) / "metrics.json"
        command = [sys.executable, script, "--device", card.device, "--max_new_tokens", "20", "--metrics_path", metrics]
        command += ["--compile"] if card.compile else []
        for caches in ("cold", "warm"):
            start = time.perf_counter()
            subprocess.run(command, env={**os.environ, **env}, check=True)
            seconds, compile_s = time.perf_counter() - start, json.loads(metrics.read_text())["compile_s"]
            yield Row(f"generate.py, demo, {caches} caches: compiling", "s", None, compile_s)
            yield Row(f"generate.py, demo, {caches} caches: all of the process", "s", None, seconds)
