"""Measurements of a run: bytes per token, bandwidth, peak memory, and the lines that report them.

    print(describe(figures))

Decoding is bound by memory bandwidth: it is judged by the bytes it reads per second, as a share of the device's own.
"""

import os
import platform
import re
import resource
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fast.reading import lacks_memory
from kernels.cpu.packing import in_huge_pages
from kernels.gpu.choice import seconds_by_events
from model import ModelArgs, Transformer


def bytes_per_step(model: Transformer, batch_size: int, positions: float, n_tokens: int = 1) -> float:
    """Bytes a step must read: all weights but the embedding table, and `positions` of KV cache in every row.

    Of experts, those of one token; of several, `n_tokens` in every row, as many as if each chose at random.
    """
    tensors = model.state_dict()
    del tensors["tok_embeddings.weight"]  # a token reads one row of it; if tied, it is counted as the output projection
    unread = (1 - share_of_experts(model.args)) ** (batch_size * n_tokens)
    weights = sum(t.nbytes * (1 - unread if ".experts." in name else 1) for name, t in tensors.items())
    return weights + batch_size * positions * bytes_per_position(model)


def share_of_experts(args: ModelArgs) -> float:
    """The share of a layer's experts that compute a token; 1 in a model without experts."""
    return args.experts_per_token / args.n_experts if args.n_experts else 1.0


def bytes_per_position(model: Transformer) -> int:
    """Bytes of KV cache that one position of one row takes: keys, values and, if quantised, scales."""
    cache = model.layers[0].attention.kv_cache
    return model.args.n_layers * sum(t[0, :, 0].nbytes for t in cache.buffers())


def parameter_bytes(model: Transformer) -> int:
    """Bytes of the weights that this process holds, scales and zeros included."""
    return sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())  # a tied weight counts once


def count_parameters(args: ModelArgs) -> int:
    """The number of parameters of a model of this shape, however they are stored."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(args).parameters())


def memory_to_read(device: str) -> Tensor:
    """The tensor that `measure_bandwidth` sums: on a CPU 256 MiB in huge pages, the fastest; on a GPU 1 GiB, or half of
    what is free. Raises MemoryError if that is less than 256 MiB, of which the GPU's cache would hold a good part.
    """
    if device.startswith("cuda"):
        n_bytes = min(1 << 30, free_memory(device) // 2)
        if n_bytes < 1 << 28:
            raise MemoryError(f"too little memory is left on {device}")
        return torch.ones(n_bytes // 4, device=device)
    return in_huge_pages(1 << 28).view(torch.float32).fill_(1)


def measure_bandwidth(device: str) -> float | None:
    """Bytes per second of a plain read on this device right now, the best of 5; None if too little memory is left."""
    try:
        source, seconds = memory_to_read(device), []
    except (MemoryError, OSError, RuntimeError) as error:
        if lacks_memory(error):
            return None
        raise
    for _ in range(5):
        start = time.perf_counter()
        source.sum()
        seconds.append(seconds_by_events(3, source.sum) if source.is_cuda else time.perf_counter() - start)
    return source.nbytes / min(seconds)


def hardware(device: str) -> str:
    """The GPU's name, or the CPU's and the number of threads in use: `AMD EPYC x 2`."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    return f"{name[1] if name else platform.machine()} x {torch.get_num_threads()}"


def free_memory(device: str) -> int:
    """Bytes that can still be allocated on a GPU, or in the machine; where only Linux says what is free, all of it."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return 1024 * int(re.search(r"MemAvailable:\s*(\d+)", meminfo.read_text())[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device: str) -> int:
    """The peak so far, in bytes: of the GPU's allocator, or of this process's resident memory."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe(figures: dict[str, Any]) -> str:
    line = f"first token {figures['ttft_s'] * 1e3:.0f} ms · prefill {figures['prefill_tokens_per_s']:.1f} tokens/s"
    if figures["decode_tokens_per_s"] is not None:
        line += f" · decode {figures['decode_tokens_per_s']:.1f} tokens/s"
        line += f" · {figures['bytes_per_token'] / 1e6:.1f} MB/token · {figures['bandwidth_gb_s']:.1f} GB/s"
    return line


def describe_acceptance(acceptance: dict[str, Any]) -> str:
    lines = []
    for tally in acceptance["by_k"]:
        draft, verify = (f"{tally[name] * 1e3:.2f} ms" for name in ("draft_s", "verify_s"))
        if tally["k"] == 0:
            lines.append(f"{tally['steps']} plain steps of {verify}")
            continue
        accepted = f"{tally['k']} drafts, {tally['mean']:.2f} accepted"
        lines.append(f"{tally['steps']} steps of {accepted} · draft {draft} · verify {verify}")
    if "speed_up" in acceptance:
        plain, speed_up = acceptance["plain_decode_tokens_per_s"], acceptance["speed_up"]
        lines.append(f"{speed_up:.2f} times plain decoding's {plain:.1f} tokens/s")
    return "\n".join(lines)


def report(
    samples: list[dict[str, Any]], seconds: dict[str, float], device: str, acceptance: dict[str, Any] | None
) -> dict[str, Any]:
    """Print the medians over the samples on stderr; return the figures for `--metrics_path`, with those of each row.

    seconds: "build_s", of building or loading the CPU's kernels, "load_s" and "compile_s".
    acceptance: `Pace.figures()` of speculative decoding, and what `--compare` found; None without it.
    """
    medians = {key: _median([s[key] for s in samples]) for key in samples[0] if key != "rows"}
    lines = [f"median of {len(samples)}: {describe(medians)}"] if len(samples) > 1 else []
    if acceptance is not None:
        lines.append(describe_acceptance(acceptance))
    peak, bandwidth = peak_memory(device), measure_bandwidth(device)  # in this order: the second allocates memory
    if bandwidth is None:
        lines.append("too little memory is left to measure the bandwidth")
    else:
        share = ""
        if medians["bandwidth_gb_s"] is not None:
            share = f", so decoding reached {medians['bandwidth_gb_s'] * 1e9 / bandwidth:.0%} of it"
            if medians["bytes_per_token"] < 1e8 and device == "cpu":
                share = "; a model this small is read from the caches"
        lines.append(f"this device moves {bandwidth / 1e9:.1f} GB/s{share}")
    built = f"build {seconds['build_s']:.1f} s · " if seconds["build_s"] >= 1 else ""
    rest = "load {load_s:.1f} s · compile {compile_s:.1f} s".format(**seconds)
    lines.append(f"{built}{rest} · peak memory {peak / 1e9:.2f} GB")
    print("\n".join(lines), file=sys.stderr, flush=True)
    return {
        **seconds,
        "samples": [row for sample in samples for row in sample["rows"]],
        "bytes_per_token": medians["bytes_per_token"],
        "bandwidth_gb_s": medians["bandwidth_gb_s"],
        "measured_bandwidth_gb_s": bandwidth and bandwidth / 1e9,
        "peak_memory_bytes": peak,
        "acceptance": acceptance,
    }


def _median(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return median(present) if present else None
