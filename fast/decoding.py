"""The decode loop: the prefill and decode steps, their arguments, and the stream of tokens they generate.

    steps = build_steps(model, Sampling(temperature=0), compile=True)
    for tokens in stream(steps, [tokenizer.encode("Hello")], max_new_tokens=50): ...

A decode step is one static graph that includes sampling and the increment of the position. On a GPU the host launches
the next step before it reads a token, so that the GPU need not wait. `generate.py`, benchmarks and tests run this loop.
Worth knowing: logits that are not numbers give the id -1, which the host finds when it reads the token, without a sync.
"""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from fast.compiling import compile_step
from fast.layers import in_one_region
from fast.sampling import Sampling
from kernels.gpu import choice
from model import Transformer


@dataclass(frozen=True)
class Steps:
    """The two functions that generation calls; both return the next token ids, int `[B, 1]`.

    prefill(idx [B, S], input_pos [S], kv_pos [L], last [B, 1]) -> the token that follows index `last` of each row
    decode(tokens [B, 1], input_pos [B, 1], kv_pos [L]) -> (tokens, input_pos + 1)
    """

    model: Transformer
    prefill: Callable[..., Tensor]
    decode: Callable[..., tuple[Tensor, Tensor]]
    prefill_is_compiled: bool


def build_steps(
    model: Transformer,
    sampling: Sampling,
    compile: bool = False,
    compile_prefill: bool = False,
    run: Callable[..., Tensor] | None = None,
) -> Steps:
    """Build the steps, compiled if asked: decode with CUDA graphs on a GPU or C++ on a CPU, prefill for any length.

    run: called in the model's place, for a drafter that looks into it.
    """
    run = run or model

    def prefill(idx: Tensor, input_pos: Tensor, kv_pos: Tensor, last: Tensor) -> Tensor:
        return sampling(run(idx, input_pos, kv_pos, logits_at=last))

    def decode(tokens: Tensor, input_pos: Tensor, kv_pos: Tensor) -> tuple[Tensor, Tensor]:
        return sampling(run(tokens.clamp(min=0), input_pos, kv_pos)), input_pos + 1

    prefill = compile_step(prefill, dynamic_dims=(1, 0, 0, None)) if compile_prefill else with_bar(model, prefill)
    if compile:
        decode = compile_step(decode, dynamic_dims=(None, None, 0), record=True)
    return Steps(model, prefill, in_one_region(model, decode), compile_prefill)


def with_bar(model: Transformer, prefill: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`prefill`, and on a terminal a progress bar over the model's layers if it takes more than two seconds."""

    def run(*layout: Tensor) -> Tensor:
        what = {"desc": f"reading {layout[0].numel()} tokens", "unit": "layer"}
        with tqdm(total=len(model.layers), delay=2, leave=False, disable=None, **what) as bar:

            def count(*_: object) -> None:  # what a hook returns would replace the layer's output
                bar.update()

            hooks = [layer.register_forward_hook(count) for layer in model.layers]
            try:
                return prefill(*layout)
            finally:
                for hook in hooks:
                    hook.remove()

    return run


def kv_slots(n: int, capacity: int) -> int:
    """The number of cache slots to read when `n` are valid: `n` rounded up by `round_up`, at most `capacity`.

    At most 127 slots or a quarter of `n` are read in excess. Sizes must be few: a CUDA graph is recorded for each.
    """
    return min(round_up(n, at_least=128, per_octave=4), capacity)


def slots_to_read(model: Transformer) -> Callable[[int], Tensor]:
    """What gives `kv_pos` of a decode step after which n slots are valid, in as few sizes as `kv_slots` has.

    All slots if a GPU's kernel attends: it finds on the device how many are valid, and one CUDA graph serves them all.
    """
    slots, kernel = model.slots, getattr(model.layers[0].attention.kv_cache, "kernel", None)
    if kernel is not None and kernel.takes_qkv:
        return lambda n: slots
    capacity, view = len(slots), functools.cache(lambda size: slots[:size])  # 20 us, if each step made its own
    return lambda n: view(kv_slots(n, capacity))


def every_size(model: Transformer, counts: Iterable[int]) -> Iterable[Tensor]:
    """The different `slots_to_read` for these numbers of valid slots."""
    return {len(slots): slots for slots in map(slots_to_read(model), counts)}.values()


def round_up(n: int, at_least: int, per_octave: int) -> int:
    """`n` rounded up to one of `per_octave` equal steps between two powers of two, and to a multiple of `at_least`.

    So there are few lengths, and each exceeds `n` by less than `at_least` or by at most 1 / `per_octave` of `n`.
    """
    step = max(at_least, (1 << (n - 1).bit_length()) // (2 * per_octave))
    return -(-n // step) * step


def common_prefix(a: list[int], b: list[int]) -> int:
    """The length of the common prefix: that many positions of one's KV cache serve the other."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def stream(steps: Steps, prompts: list[list[int]], max_new_tokens: int, cached: int = 0) -> Iterator[list[int]]:
    """Yield the next token id of every row, `max_new_tokens` times; stop by leaving the loop.

    The rows may differ in length. `cached` leading positions, the same for all rows, are in the KV cache already and
    `prompts` continues them. Raises ValueError when the text would outgrow the cache, or logits are not numbers.
    """
    check_fit(steps.model, prompts, max_new_tokens, cached)
    model, valid, kv_pos_of = steps.model, cached + max(map(len, prompts)), slots_to_read(steps.model)
    layout, ahead = lay_out(model, prompts, cached), steps_ahead(model)
    tokens, input_pos = steps.prefill(*layout), cached + layout[-1] + 1
    in_flight = deque([copy_to_host(tokens)])
    for n in range(max_new_tokens):
        while len(in_flight) < 1 + ahead and n + len(in_flight) < max_new_tokens:
            tokens, input_pos = steps.decode(tokens, input_pos, kv_pos_of(valid + n + len(in_flight)))
            in_flight.append(copy_to_host(tokens))
        ids = [row[0] for row in wait(*in_flight.popleft()).tolist()]
        if min(ids) < 0:
            raise no_numbers(model, f"new token {n + 1}")
        yield ids


def steps_ahead(model: Transformer) -> int:
    """How many steps the host launches before it reads the one before: on a GPU one, so that it need not wait."""
    return int(model.slots.is_cuda)


def no_numbers(model: Transformer, where: str, whose: str = "the model's") -> ValueError:
    """The error to raise where logits are not finite; `where`: for which tokens they were computed."""
    is_half = model.tok_embeddings.weight.dtype == torch.float16
    damaged = "its weights may be damaged, download or quantise it again"
    remedy = "they may be too large for float16, try --dtype bfloat16" if is_half else damaged
    return ValueError(f"{whose} logits for {where} are NaN or infinite: {remedy}")


def check_fit(model: Transformer, prompts: list[list[int]], max_new_tokens: int, cached: int) -> None:
    """Raise ValueError unless the cache has room for every prompt and its new tokens, except the last one."""
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
    S = min(max(*lengths, 2), model.max_seq_length - cached)  # torch.compile specialises on size 1
    idx = torch.tensor([prompt + [0] * (S - len(prompt)) for prompt in prompts], device=device)
    input_pos = model.slots[cached : cached + S].clone()  # clone, or torch.compile specialises on the view's offset
    kv_pos = model.slots[: kv_slots(cached + S, model.max_seq_length) if cached else S]
    return idx, input_pos, kv_pos, torch.tensor(lengths, device=device)[:, None] - 1


def copy_to_host(tokens: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if not tokens.is_cuda:
        return tokens, None
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True).copy_(tokens, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def wait(host: Tensor, event: torch.cuda.Event | None) -> Tensor:
    """Wait for the copy and return it."""
    if event is not None:
        event.synchronize()
    return host


def time_kernels(model: Transformer, n_rows: int, n_positions: int) -> None:
    """On a GPU, measure which kernels are fastest for `n_positions` of each row, unless that is known already."""
    if model.slots.is_cuda:
        idx = model.slots.new_zeros(n_rows, n_positions)
        with torch.cuda.device_of(model.slots):
            choice.measure(model, idx, model.slots[:n_positions], model.slots)


def warm_up(steps: Steps, prompts: list[list[int]], max_new_tokens: int) -> float:
    """Compile the steps; on a GPU also time kernels and record a graph for every cache size these prompts will reach.
    Returns the seconds that took.
    """
    start = time.perf_counter()
    model, longest = steps.model, max(map(len, prompts))
    time_kernels(model, len(prompts), 1)
    if not steps.prefill_is_compiled and not model.slots.is_cuda:
        prompts = [prompt[:2] for prompt in prompts]  # prefill is not compiled: two tokens will do
    deque(stream(steps, prompts, min(2, max_new_tokens)), maxlen=0)
    if model.slots.is_cuda:
        record(steps, len(prompts), range(longest, longest + max_new_tokens))
        torch.cuda.synchronize()
    return time.perf_counter() - start


def record(steps: Steps, n_rows: int, valid: Iterable[int]) -> None:
    """Run the decode step until its CUDA graph is recorded for every cache size that the `valid` counts need."""
    model = steps.model
    # Two tensors: torch.compile would recompile the step if both arguments were the same tensor.
    tokens, input_pos = (torch.zeros(n_rows, 1, dtype=torch.long, device=model.slots.device) for _ in range(2))
    for kv_pos in every_size(model, valid):
        for _ in range(2):  # the first call compiles
            steps.decode(tokens, input_pos, kv_pos)
