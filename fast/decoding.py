"""The decode loop: the two compiled steps, the prompts laid out for them, and the stream of tokens that comes back.

    steps = build_steps(model, Sampling(temperature=0), compile=True)
    for tokens in stream(steps, [tokenizer.encode("Hello")], max_new_tokens=50): ...

A decoded token is one static graph, sampling and the position's increment inside it. The host never waits in the loop:
it reads a token that is already on its way. `generate.py`, the benchmark and the tests all run this very loop.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fast.compiling import compile_step
from fast.layers import together
from fast.sampling import Sampling
from kernels.gpu import choice
from model import Transformer


@dataclass(frozen=True)
class Steps:
    """The two functions that generation calls; both return the next token ids, int `[B, 1]`.

    prefill(idx [B, S], input_pos [S], kv_pos [L], last [B, 1]) -> tokens after each row's index `last`
    decode(tokens [B, 1], input_pos [B, 1], kv_pos [L]) -> (tokens, input_pos + 1)
    """

    model: Transformer
    prefill: Callable[..., Tensor]
    decode: Callable[..., tuple[Tensor, Tensor]]
    prefill_is_compiled: bool


def build_steps(model: Transformer, sampling: Sampling, compile: bool = False, compile_prefill: bool = False) -> Steps:
    """Compile the steps as asked: decode with CUDA graphs on a GPU and C++ on a CPU, prefill for any length."""

    def prefill(idx: Tensor, input_pos: Tensor, kv_pos: Tensor, last: Tensor) -> Tensor:
        return sampling(model(idx, input_pos, kv_pos, logits_at=last))

    def decode(tokens: Tensor, input_pos: Tensor, kv_pos: Tensor) -> tuple[Tensor, Tensor]:
        return sampling(model(tokens, input_pos, kv_pos)), input_pos + 1

    if compile_prefill:
        prefill = compile_step(prefill, dynamic_dims=(1, 0, 0, None))
    if compile:
        decode = compile_step(decode, dynamic_dims=(None, None, 0), mode="reduce-overhead")
    return Steps(model, prefill, together(model, decode), compile_prefill)


def kv_slots(n: int, capacity: int) -> int:
    """The number of cache slots to attend when `n` are valid: `n` rounded up to a quarter of its octave, at least 128.

    Rounding up reads at most a quarter more than is valid. Sizes are few because a CUDA graph is recorded for each,
    unless a GPU's kernel attends: that takes the whole cache and finds out on the device how many are valid.
    """
    return min(round_up(n, at_least=128, per_octave=4), capacity)


def round_up(n: int, at_least: int, per_octave: int) -> int:
    """`n` rounded up to one of `per_octave` equal steps between two powers of two, and to a multiple of `at_least`.

    So lengths are few, and what they are above `n` is at most a share of it.
    """
    step = max(at_least, (1 << (n - 1).bit_length()) // (2 * per_octave))
    return -(-n // step) * step


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids the two begin with alike: the cache of one serves the other so far."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def stream(steps: Steps, prompts: list[list[int]], max_new_tokens: int, cached: int = 0) -> Iterator[list[int]]:
    """Yield the next token id of every row, `max_new_tokens` times; stop by leaving the loop.

    The rows may differ in length. `cached` leading positions, the same for all rows, are in the KV cache already and
    `prompts` continues them. Raises ValueError when the text would outgrow the cache.
    """
    check_fit(steps.model, prompts, max_new_tokens, cached)
    # A GPU runs ahead while the host reads the token before; a CPU has nobody to run ahead.
    copies = _launch(steps, prompts, max_new_tokens, cached)
    for tokens in _read_behind(copies, depth=int(steps.model.slots.is_cuda)):
        yield tokens[:, 0].tolist()


def check_fit(model: Transformer, prompts: list[list[int]], max_new_tokens: int, cached: int) -> None:
    """Raise ValueError unless the cache holds every prompt and, but for the last, the tokens that follow it."""
    lengths = [len(prompt) for prompt in prompts]
    if not prompts or min(lengths) == 0:
        raise ValueError("a prompt has no tokens: give at least one")
    needed = cached + max(lengths) + max_new_tokens - 1
    if needed > model.max_seq_length or len(prompts) > model.max_batch_size:
        raise ValueError(
            f"{len(prompts)} rows of {needed} tokens ({cached + max(lengths)} in the prompt) do not fit the cache of "
            f"{model.max_batch_size} x {model.max_seq_length}: shorten the prompt or raise --max_seq_length"
        )


def lay_out(model: Transformer, prompts: list[list[int]], cached: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of `Steps.prefill` for these prompts, padded on the right."""
    device, lengths = model.slots.device, [len(prompt) for prompt in prompts]
    S = min(max(*lengths, 2), model.max_seq_length - cached)  # a row of one would be a shape of its own
    idx = torch.tensor([prompt + [0] * (S - len(prompt)) for prompt in prompts], device=device)
    input_pos = model.slots[cached : cached + S].clone()  # the offset of a view would be compiled in
    kv_pos = model.slots[: kv_slots(cached + S, model.max_seq_length) if cached else S]
    return idx, input_pos, kv_pos, torch.tensor(lengths, device=device)[:, None] - 1


def _launch(steps: Steps, prompts: list[list[int]], max_new_tokens: int, cached: int):
    """Enqueue prefill and decode steps; yield each step's tokens as a copy on its way to the host."""
    model, valid = steps.model, cached + max(map(len, prompts))
    layout = lay_out(model, prompts, cached)
    tokens, input_pos = steps.prefill(*layout), cached + layout[-1] + 1
    for n in range(valid + 1, valid + max_new_tokens):
        yield copy_to_host(tokens)
        tokens, input_pos = steps.decode(tokens, input_pos, model.slots[: kv_slots(n, model.max_seq_length)])
    yield copy_to_host(tokens)


def copy_to_host(tokens: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if not tokens.is_cuda:
        return tokens, None
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True).copy_(tokens, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def _read_behind(copies: Iterator[tuple[Tensor, Any]], depth: int) -> Iterator[Tensor]:
    """Yield each copy once `depth` later ones are under way."""
    under_way: deque = deque()
    for copy in copies:
        under_way.append(copy)
        if len(under_way) > depth:
            yield wait(*under_way.popleft())
    while under_way:
        yield wait(*under_way.popleft())


def wait(host: Tensor, event: torch.cuda.Event | None) -> Tensor:
    """The copy, arrived."""
    if event is not None:
        event.synchronize()
    return host


def time_kernels(model: Transformer, n_rows: int, n_positions: int) -> None:
    """On a GPU, find out which kernels are the fastest for so many positions of each row, unless that is known."""
    if model.slots.is_cuda:
        idx = model.slots.new_zeros(n_rows, n_positions)
        with torch.cuda.device_of(model.slots):
            choice.measure(model, idx, model.slots[:n_positions], model.slots)


def warm_up(steps: Steps, prompts: list[list[int]], max_new_tokens: int) -> float:
    """Compile, and on a GPU time its kernels and record the graph for every cache size these prompts will reach; the
    seconds it took.
    """
    start = time.perf_counter()
    model, longest = steps.model, max(map(len, prompts))
    time_kernels(model, len(prompts), 1)
    if not steps.prefill_is_compiled and not model.slots.is_cuda:
        prompts = [prompt[:2] for prompt in prompts]  # nothing to gain from a whole one
    deque(stream(steps, prompts, min(2, max_new_tokens)), maxlen=0)
    if model.slots.is_cuda:
        record(steps, len(prompts), range(longest, longest + max_new_tokens))
        torch.cuda.synchronize()
    return time.perf_counter() - start


def record(steps: Steps, n_rows: int, valid: Iterable[int]) -> None:
    """Run the decode step until a GPU has recorded it at each size of the cache that so many `valid` slots ask for."""
    model = steps.model
    # Not one tensor for both: torch.compile compiles a step anew for arguments that are the same.
    tokens, input_pos = (torch.zeros(n_rows, 1, dtype=torch.long, device=model.slots.device) for _ in range(2))
    for slots in sorted({kv_slots(n, model.max_seq_length) for n in valid}):
        for _ in range(3):  # warm-up, recording, replay
            steps.decode(tokens, input_pos, model.slots[:slots])
