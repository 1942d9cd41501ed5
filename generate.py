"""Generate text: sampling, the compiled steps, the decode loop and the command line.

    python generate.py --compile --checkpoint_path checkpoints/$MODEL_REPO/model.pth --prompt "Hello, my name is"

Without `--checkpoint_path` the embedded demo model runs. A decoded token is one static graph, sampling and the
position's increment inside it; the host never waits in the loop, it reads a token that is already on its way.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import load_model
from metrics import bytes_per_step, describe, report, write_json
from model import Transformer
from sampling import Sampling
from tokenizer import IncrementalDecoder, Tokenizer, load_tokenizer

DEMO = Path(__file__).resolve().parent / "demo" / "target"

# ---- Steps: what runs on the device, built once, compiled or not.


@dataclass(frozen=True)
class Steps:
    """The two functions that generation calls; both return the next token ids, int `[B, 1]`.

    prefill(idx [B, S], input_pos [S], kv_pos [L], last [B, 1]) -> tokens after each row's index `last`
    decode(tokens [B, 1], input_pos [B, 1], kv_pos [L]) -> (tokens, input_pos + 1)
    """

    model: Transformer
    prefill: Callable[..., Tensor]
    decode: Callable[..., tuple[Tensor, Tensor]]


def build_steps(model: Transformer, sampling: Sampling, compile: bool = False, compile_prefill: bool = False) -> Steps:
    """Compile the steps as asked: decode with CUDA graphs on a GPU and C++ on a CPU, prefill for any length."""

    def prefill(idx: Tensor, input_pos: Tensor, kv_pos: Tensor, last: Tensor) -> Tensor:
        return sampling(model(idx, input_pos, kv_pos, logits_at=last))

    def decode(tokens: Tensor, input_pos: Tensor, kv_pos: Tensor) -> tuple[Tensor, Tensor]:
        return sampling(model(tokens, input_pos, kv_pos)), input_pos + 1

    if compile_prefill:
        prefill = _compile(prefill, dynamic_dims=(1, 0, 0, None))
    if compile:
        decode = _compile(decode, dynamic_dims=(None, None, 0), mode="reduce-overhead")
    return Steps(model, prefill, decode)


def _compile(step: Callable, dynamic_dims: tuple[int | None, ...], mode: str | None = None) -> Callable:
    """Compile `step` once for all sizes that the given dimension of each argument may have."""
    compiled = torch.compile(step, mode=mode, fullgraph=True)

    def run(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        for tensor, dim in zip(tensors, dynamic_dims, strict=True):
            if dim is not None and tensor.shape[dim] > 1:
                torch._dynamo.mark_dynamic(tensor, dim)
        out = compiled(*tensors)
        return out.clone() if isinstance(out, Tensor) else tuple(o.clone() for o in out)  # a CUDA graph reuses its own

    return run


def set_compile_flags(device: str) -> None:
    """Inductor's settings for decoding. For a command line's `main` alone: importing a module changes nothing."""
    if device == "cpu":
        torch._inductor.config.cpp.enable_floating_point_contract_flag = "fast"  # fused multiply-add
    else:
        torch._inductor.config.coordinate_descent_tuning = True  # also what lowers a one-row product to a GEMV


def missing_compiler() -> str | None:
    """What `--compile` lacks on this machine, or None. Inductor needs a C++ compiler and Python's headers."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) is installed"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers (Python.h, Debian package python3-dev) are not installed"
    return None


def kv_slots(n: int, capacity: int) -> int:
    """The number of cache slots to attend when `n` are valid: `n` rounded up to a quarter of its octave, at least 128.

    A CUDA graph is recorded per size, so sizes must be few; rounding up reads at most a quarter more than is valid.
    """
    step = max(128, 1 << max(0, (n - 1).bit_length() - 3))
    return min(-(-n // step) * step, capacity)


def stream(steps: Steps, prompts: list[list[int]], max_new_tokens: int, cached: int = 0) -> Iterator[list[int]]:
    """Yield the next token id of every row, `max_new_tokens` times; stop by leaving the loop.

    The rows may differ in length. `cached` leading positions, the same for all rows, are in the KV cache already and
    `prompts` continues them. Raises ValueError when the text would outgrow the cache.
    """
    model = steps.model
    lengths = [len(prompt) for prompt in prompts]
    if not prompts or min(lengths) == 0:
        raise ValueError("a prompt has no tokens: give at least one")
    needed = cached + max(lengths) + max_new_tokens - 1
    if needed > model.max_seq_length or len(prompts) > model.max_batch_size:
        raise ValueError(
            f"{len(prompts)} rows of {needed} tokens ({cached + max(lengths)} in the prompt) do not fit the cache of "
            f"{model.max_batch_size} x {model.max_seq_length}: shorten the prompt or raise --max_seq_length"
        )
    # A GPU runs ahead while the host reads the token before; a CPU has nobody to run ahead.
    yield from _read_behind(_launch(steps, prompts, max_new_tokens, cached), depth=int(model.slots.is_cuda))


def _launch(steps: Steps, prompts: list[list[int]], max_new_tokens: int, cached: int):
    """Enqueue prefill and decode steps; yield each step's tokens as a copy on its way to the host."""
    model, device = steps.model, steps.model.slots.device
    lengths = [len(prompt) for prompt in prompts]
    valid = cached + max(lengths)
    S = min(max(*lengths, 2), model.max_seq_length - cached)  # a row of one would be a shape of its own
    idx = torch.tensor([prompt + [0] * (S - len(prompt)) for prompt in prompts], device=device)
    input_pos = model.slots[cached : cached + S]
    kv_pos = model.slots[: kv_slots(cached + S, model.max_seq_length) if cached else S]
    last = torch.tensor(lengths, device=device)[:, None] - 1
    tokens = steps.prefill(idx, input_pos, kv_pos, last)
    input_pos = cached + last + 1
    for n in range(valid + 1, valid + max_new_tokens):
        yield _copy_to_host(tokens)
        tokens, input_pos = steps.decode(tokens, input_pos, model.slots[: kv_slots(n, model.max_seq_length)])
    yield _copy_to_host(tokens)


def _copy_to_host(tokens: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if not tokens.is_cuda:
        return tokens, None
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True).copy_(tokens, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def _read_behind(copies: Iterator[tuple[Tensor, Any]], depth: int) -> Iterator[list[int]]:
    """Yield each copy's ids once `depth` later ones are under way."""
    under_way: deque = deque()
    for copy in copies:
        under_way.append(copy)
        if len(under_way) > depth:
            yield _wait(*under_way.popleft())
    while under_way:
        yield _wait(*under_way.popleft())


def _wait(host: Tensor, event: torch.cuda.Event | None) -> list[int]:
    if event is not None:
        event.synchronize()
    return host[:, 0].tolist()


def warm_up(steps: Steps, prompts: list[list[int]], max_new_tokens: int) -> float:
    """Compile, and on a GPU record a graph for every cache size these prompts will reach; the seconds it took."""
    start = time.perf_counter()
    model, longest = steps.model, max(map(len, prompts))
    deque(stream(steps, prompts, min(2, max_new_tokens)), maxlen=0)
    if model.slots.is_cuda:
        zeros = torch.zeros(len(prompts), 1, dtype=torch.long, device=model.slots.device)
        for slots in sorted({kv_slots(n, model.max_seq_length) for n in range(longest, longest + max_new_tokens)}):
            for _ in range(3):  # warm-up, recording, replay
                steps.decode(zeros, zeros, model.slots[:slots])
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ---- What comes out: text and figures.


class Row:
    """One row of a batch: turns its token ids into text, ends it at a stop id or stop string, keeps its figures."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop_strings: list[str]):
        self.prompt, self.tokens, self.text = prompt, [], ""
        self.finish_reason = "length"
        self.times: list[float] = []
        self._decoder = IncrementalDecoder(tokenizer)
        for token in prompt:  # the first word after the prompt keeps its space
            self._decoder.put(token)
        self._stop_ids, self._stop_strings = tokenizer.stop_ids, stop_strings
        self._shown = 0

    @property
    def stopped(self) -> bool:
        return self.finish_reason == "stop"

    def put(self, token: int) -> str:
        """Take the next token; return the text that is certain now, without what may begin a stop string."""
        self.tokens.append(token)
        self.times.append(time.perf_counter())
        if token in self._stop_ids:
            self.finish_reason = "stop"
            return self.finish()
        self.text += self._decoder.put(token)
        hits = [at for stop in self._stop_strings if (at := self.text.find(stop, self._shown)) >= 0]
        if hits:
            self.finish_reason, self.text = "stop", self.text[: min(hits)]
            return self._show(len(self.text))
        held = max((n for s in self._stop_strings for n in range(1, len(s)) if self.text.endswith(s[:n])), default=0)
        return self._show(len(self.text) - held)

    def finish(self) -> str:
        """The text that was still held back when the tokens ended."""
        self.text += self._decoder.finish()
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        shown, self._shown = self._shown, max(end, self._shown)
        return self.text[shown:end]

    def figures(self, start: float) -> dict[str, Any]:
        """The row's entry in `--metrics_path`; `start` is when the prefill began. Rates are tokens per second."""
        ttft, decoding = self.times[0] - start, self.times[-1] - self.times[0]
        return {
            "prompt_tokens": self.prompt,
            "tokens": self.tokens,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "ttft_s": ttft,
            "prefill_tokens_per_s": len(self.prompt) / ttft,
            "decode_tokens_per_s": (len(self.tokens) - 1) / decoding if decoding else None,
        }


def run_rows(steps: Steps, rows: list[Row], max_new_tokens: int, show: Callable[[int, str], None], cached: int = 0):
    """Generate until every row has stopped, calling `show(row index, text)` as text becomes certain."""
    prompts = [row.prompt[cached:] for row in rows]
    for tokens in stream(steps, prompts, max_new_tokens, cached):
        for i, row in enumerate(rows):
            if not row.stopped:
                show(i, row.put(tokens[i]))
        if all(row.stopped for row in rows):
            return
    for i, row in enumerate(rows):
        if not row.stopped:
            show(i, row.finish())


# ---- The command line.


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint_path", type=Path, default=DEMO, help="a .pth of ours or a Hugging Face directory (default: demo)")
    add("--prompt", default="The module", help="text, or a number N for a made-up prompt of N tokens")
    add("--prompt_file", type=Path, help="one prompt per line, generated together in batches of --batch_size")
    add("--batch_size", type=int, help="rows: copies of --prompt (default 1), or lines of --prompt_file (all)")
    add("--num_samples", type=int, default=1)
    add("--max_new_tokens", type=int, default=200)
    add("--max_seq_length", type=int, help="capacity of the KV cache in tokens (default: what the prompts need)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    add("--top_k", type=int, default=200)
    add("--top_p", type=float)
    add("--min_p", type=float)
    add("--stop", action="append", default=[], metavar="TEXT", help="end a row before this text; may be repeated")
    add("--seed", type=int, default=1234)
    add("--chat", action="store_true", help="put the prompt into the model's chat template")
    add("--system", help="the system message of --chat and --interactive")
    add("--interactive", action="store_true", help="a conversation: Ctrl-C stops an answer, Ctrl-D ends")
    add("--compile", action="store_true", help="compile the decode step")
    add("--compile_prefill", action="store_true", help="compile the prefill")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16, float16 on GPUs before Ampere")
    add("--metrics_path", type=Path, help="write every figure to this JSON file")
    add("--profile", type=Path, help="write a Chrome trace of the last sample to this file")
    return parser


def resolve_device(args: argparse.Namespace) -> tuple[str, torch.dtype]:
    """The device and dtype to run in. Raises ValueError for a device this machine lacks."""
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} cannot be used here: {str(error).splitlines()[0]}") from None
    old_gpu = args.device.startswith("cuda") and torch.cuda.get_device_capability(args.device) < (8, 0)
    return args.device, getattr(torch, args.dtype or ("float16" if old_gpu else "bfloat16"))


def encode_prompts(args: argparse.Namespace, tokenizer: Tokenizer, vocab_size: int) -> list[list[int]]:
    """The prompts' token ids. Raises ValueError for an empty prompt and what a template refuses."""
    if args.prompt_file is None and args.prompt.isdecimal():
        if int(args.prompt) < 1:
            raise ValueError(f"--prompt {args.prompt}: a made-up prompt needs at least one token")
        return [torch.randint(vocab_size, (int(args.prompt),)).tolist()] * (args.batch_size or 1)
    if args.prompt_file is None:
        texts = [args.prompt] * (args.batch_size or 1)
    else:
        texts = [line for line in args.prompt_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    prompts = []
    for text in texts:
        if args.chat:
            messages = [{"role": "user", "content": text}]
            if args.system is not None:
                messages.insert(0, {"role": "system", "content": args.system})
            prompts.append(tokenizer.encode(tokenizer.apply_chat_template(messages), bos=False))
        else:
            prompts.append(tokenizer.encode(text))
    if not prompts or not all(prompts):
        raise ValueError("the prompt is empty and this model has no token to begin with: give at least one word")
    return prompts


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError for numbers and combinations that make no sense, before anything is loaded."""
    for name in ("batch_size", "num_samples", "max_new_tokens", "max_seq_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    if args.interactive and (args.prompt_file or (args.batch_size or 1) > 1):
        raise ValueError("--interactive is a conversation of one: leave out --prompt_file and --batch_size")
    if "" in args.stop:
        raise ValueError("--stop needs a text that is not empty")
    for path in (args.metrics_path, args.profile):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"cannot write {path}: {path.absolute().parent} is not a directory")
    if (args.compile or args.compile_prefill) and (lacking := missing_compiler()):
        print(f"{lacking}: going on without --compile", file=sys.stderr)
        args.compile = args.compile_prefill = False


def run_sample(
    steps: Steps, tokenizer: Tokenizer, prompts: list[list[int]], args: argparse.Namespace, show_prompt: bool
) -> dict[str, Any]:
    """Generate one batch and print it, a single row as it comes and several as they end; the sample's figures."""
    rows = [Row(tokenizer, prompt, args.stop) for prompt in prompts]
    shown = [tokenizer.decode(prompt) if show_prompt else "" for prompt in prompts]

    def show(i: int, text: str) -> None:
        if len(rows) == 1:
            print(text, end="", flush=True)

    if len(rows) == 1:
        print(shown[0], end="", flush=True)
    start = time.perf_counter()
    run_rows(steps, rows, args.max_new_tokens, show)
    seconds = time.perf_counter() - start
    for i, row in enumerate(rows if len(rows) > 1 else []):
        print(f"[{i + 1}] {shown[i]}{row.text}")
    entries = [row.figures(start) for row in rows]
    ttft = entries[0]["ttft_s"]
    n_steps = max(len(row.tokens) for row in rows) - 1
    n_tokens = sum(len(row.tokens) - 1 for row in rows)
    positions = max(map(len, prompts)) + n_steps / 2
    nbytes = bytes_per_step(steps.model, len(rows), positions)
    figures = {
        "rows": entries,
        "ttft_s": ttft,
        "prefill_tokens_per_s": sum(map(len, prompts)) / ttft,
        "decode_tokens_per_s": n_tokens / (seconds - ttft) if n_steps else None,
        "bytes_per_token": nbytes,
        "bandwidth_gb_s": n_steps * nbytes / (seconds - ttft) / 1e9 if n_steps else None,
    }
    print(f"\n\n  {describe(figures)}\n", flush=True)
    return figures


def run(args: argparse.Namespace) -> None:
    check_args(args)
    device, dtype = resolve_device(args)
    set_compile_flags(device)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    start = time.perf_counter()
    model = load_model(args.checkpoint_path, device=device, dtype=dtype)
    directory = args.checkpoint_path if args.checkpoint_path.is_dir() else args.checkpoint_path.parent
    tokenizer = load_tokenizer(directory)
    load_s = time.perf_counter() - start
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{args.checkpoint_path}: {n_params / 1e6:.1f} M parameters, {str(dtype).removeprefix('torch.')}, {device}")
    steps = build_steps(model, sampling, args.compile, args.compile_prefill)
    torch.manual_seed(args.seed)
    if args.interactive:
        return chat(steps, tokenizer, args)
    prompts = encode_prompts(args, tokenizer, model.args.vocab_size)
    longest, limit = max(map(len, prompts)), args.max_seq_length or model.args.context_length
    if longest > limit:
        raise ValueError(f"the prompt has {longest} tokens, but there is room for {limit}: shorten it")
    if longest + args.max_new_tokens > limit:
        args.max_new_tokens = limit - longest + 1
        print(f"{args.max_new_tokens} new tokens fit behind the prompt's {longest}: stopping there", file=sys.stderr)
    size = args.batch_size or len(prompts)
    batches = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    model.setup_caches(size, args.max_seq_length or longest + args.max_new_tokens - 1)
    compile_s = 0.0
    if args.compile or args.compile_prefill:
        print("compiling ...", file=sys.stderr)
        compile_s = sum(warm_up(steps, batch, args.max_new_tokens) for batch in batches[:1] + batches[1:][-1:])
    print()
    samples, show_prompt = [], not args.chat and (args.prompt_file is not None or not args.prompt.isdecimal())
    for n in range(args.num_samples):
        for batch in batches:
            with profiled(args.profile if n == args.num_samples - 1 else None):
                samples.append(run_sample(steps, tokenizer, batch, args, show_prompt))
    figures = report(samples, load_s, compile_s, device)
    if args.metrics_path:
        header = {"model": dataclasses.asdict(model.args), "device": device, "dtype": str(dtype).removeprefix("torch.")}
        write_json(args.metrics_path, {**header, "quantization": None, **figures})


@contextlib.contextmanager
def profiled(path: Path | None):
    """Write a Chrome trace of what runs inside to `path`; do nothing without one."""
    if path is None:
        yield
        return
    with torch.profiler.profile() as profile:
        yield
    profile.export_chrome_trace(str(path))
    print(f"trace: {path} (open it at https://ui.perfetto.dev)")


def chat(steps: Steps, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Converse until Ctrl-D. The KV cache stays between turns: only what it does not hold yet is prefilled."""
    model = steps.model
    model.setup_caches(1, args.max_seq_length or min(model.args.context_length, 4096))
    if args.compile or args.compile_prefill:
        print("compiling ...", file=sys.stderr)
        warm_up(steps, [[0, 0]], min(args.max_new_tokens, model.max_seq_length - 2))
    if not tokenizer.has_chat_template:
        print("this model has no chat template: it goes on from what you write")
    history = [{"role": "system", "content": args.system}] if args.system is not None else []
    text, cached = "", []  # the conversation so far, as text where there is no template; what the cache holds
    while (line := _ask()) is not None:
        if not line.strip():
            continue
        if tokenizer.has_chat_template:
            turn = [*history, {"role": "user", "content": line}]
            prompt = tokenizer.encode(tokenizer.apply_chat_template(turn), bos=False)
        else:
            prompt = tokenizer.encode(text + line)
        room = model.max_seq_length - len(prompt)
        if room < 1:
            print(f"the conversation fills the cache of {model.max_seq_length} tokens: starting over")
            history, text, cached = history[: args.system is not None], "", []
            continue
        row = Row(tokenizer, prompt, args.stop)
        with contextlib.suppress(KeyboardInterrupt):
            run_rows(steps, [row], min(args.max_new_tokens, room), _print_now, _common_prefix(cached, prompt[:-1]))
        print()
        cached = prompt + row.tokens[:-1]
        text += line + row.text
        history += [{"role": "user", "content": line}, {"role": "assistant", "content": row.text}]


def _ask() -> str | None:
    while True:
        try:
            return input("> ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends)")


def _print_now(_: int, text: str) -> None:
    print(text, end="", flush=True)


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def main(argv: list[str] | None = None) -> int:
    try:
        with torch.no_grad():
            run(build_parser().parse_args(argv))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
