"""Generate text on the command line: one prompt, batches of prompts, or a conversation.

    python generate.py --compile --checkpoint_path checkpoints/$MODEL_REPO/model.pth --prompt "Hello, my name is"

Without `--checkpoint_path` the embedded demo model runs. The loop itself is in `fast/decoding.py`.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fast.chat import chat, warm_up_turns
from fast.cli import (
    CACHE_DTYPES,
    DEMO,
    check_at_least,
    check_writable,
    drop_compile,
    exit_code,
    load,
    profiled,
    resolve_device,
    resolve_kv_dtype,
    write_json,
)
from fast.compiling import set_compile_flags
from fast.decoding import Steps, build_steps, stream, warm_up
from fast.layers import kernels_missing
from fast.metrics import bytes_per_step, count_parameters, describe, parameter_bytes, report
from fast.rows import Row, run_rows
from fast.sampling import Sampling
from fast.speculative import (
    MAX_K,
    SPARE,
    Acceptance,
    SpeculativeSteps,
    StepResult,
    candidate_steps,
    choose_fastest,
    load_draft,
    speculate,
    warm_up_speculation,
)
from fast.tokenizer import Tokenizer, read_text
from model import Transformer
from tp import Ranks, measure_collectives

# ---- The command line.


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint_path", type=Path, default=DEMO, help="a .pth of ours or a Hugging Face directory (default: demo)")
    add("--prompt", default="The module", help="text, or a number N for a made-up prompt of N tokens")
    add("--prompt_file", type=Path, help="one prompt per line, generated together in batches of --batch_size")
    add("--batch_size", type=int, help="rows: copies of --prompt (default 1), or lines of --prompt_file (all)")
    add("--num_samples", type=int, default=1, help="generate so often (default: 1)")
    add("--max_new_tokens", type=int, default=200, help="tokens of each text at most (default: 200)")
    add("--max_seq_length", type=int, help="capacity of the KV cache in tokens (default: what the prompts need)")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    add("--top_k", type=int, default=200, help="draw from the k likeliest tokens (default: 200)")
    add("--top_p", type=float, help="draw from the fewest tokens with this probability in all")
    add("--min_p", type=float, help="draw from tokens with this share of the likeliest's probability")
    add("--stop", action="append", default=[], metavar="TEXT", help="end a row before this text; may be repeated")
    add("--seed", type=int, default=1234, help="of the draws (default: 1234)")
    add("--chat", action="store_true", help="put the prompt into the model's chat template")
    add("--system", help="the system message of --chat and --interactive")
    add("--interactive", action="store_true", help="a conversation: Ctrl-C stops an answer, Ctrl-D ends it")
    add("--speculate_k", type=_number_or_auto, metavar="K", help=f"drafts per step, 1 to {MAX_K} (default 5), or auto")
    add("--draft_checkpoint_path", type=Path, help="speculative decoding: the model that drafts")
    add("--replicate_draft", action="store_true", help="under torchrun: keep the whole draft on every rank")
    add("--prompt_lookup", action="store_true", help="speculative decoding: draft what followed in the text so far")
    add("--compare", action="store_true", help="also time plain decoding")
    add("--compile", action="store_true", help="compile the decode step")
    add("--compile_prefill", action="store_true", help="compile the prefill")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda, cpu without a GPU")
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16, float16 on GPUs before Ampere")
    add("--kv_dtype", choices=CACHE_DTYPES, default="auto", help="what the KV cache stores (default: as --dtype)")
    add("--metrics_path", type=Path, help="write every figure to this JSON file")
    add("--profile", type=Path, help="write a Chrome trace of the last sample to this file")
    return parser


def _number_or_auto(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def encode_prompts(args: argparse.Namespace, tokenizer: Tokenizer, vocab_size: int, limit: int) -> list[list[int]]:
    """The prompts' token ids. Raises ValueError for a prompt that is empty, too long or refused by the template."""
    if args.prompt_file is None and args.prompt.isdecimal():
        if not 1 <= int(args.prompt) <= limit:
            raise ValueError(f"--prompt {args.prompt}: a made-up prompt must have 1 to {limit} tokens")
        return [torch.randint(vocab_size, (int(args.prompt),)).tolist()] * (args.batch_size or 1)
    if args.prompt_file is None:
        texts = [args.prompt] * (args.batch_size or 1)
    else:
        texts = [line for line in read_text(args.prompt_file).split("\n") if line.strip()]
        if not texts:
            raise ValueError(f"{args.prompt_file} holds no prompt: write one per line")
    prompts = []
    for text in texts:
        if args.chat:
            messages = [{"role": "user", "content": text}]
            if args.system is not None:
                messages.insert(0, {"role": "system", "content": args.system})
            prompts.append(tokenizer.encode(tokenizer.apply_chat_template(messages), bos=False))
        else:
            prompts.append(tokenizer.encode(text))
    if not all(prompts):
        raise ValueError("the prompt is empty and this model has no begin-of-text token: give at least one word")
    if (longest := max(map(len, prompts))) > limit:
        raise ValueError(f"the prompt has {longest} tokens, but there is room for {limit}: shorten it")
    return prompts


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that are out of range or exclude each other, before anything is loaded."""
    check_at_least(args, 1, "batch_size", "num_samples", "max_new_tokens", "max_seq_length")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed} must be 0 to 2**63 - 1")
    if args.interactive:
        parser = build_parser()
        others = ("prompt_file", "batch_size", "num_samples", "metrics_path", "profile", "compare")
        if unfit := [f"--{name}" for name in others if getattr(args, name) != parser.get_default(name)]:
            raise ValueError(f"--interactive is a conversation of one: leave out {', '.join(unfit)}")
        if sys.stdin is None:
            raise ValueError("--interactive reads from stdin, which is closed")
    check_speculation(args)
    if args.system is not None and not (args.chat or args.interactive):
        raise ValueError("--system needs --chat or --interactive")
    if "" in args.stop:
        raise ValueError("--stop needs a text that is not empty")
    for path in (args.metrics_path, args.profile):
        if path is not None:
            check_writable(path)
    drop_compile(args, "compile", "compile_prefill")


def check_speculation(args: argparse.Namespace) -> None:
    """Check the speculation flags and fill in defaults; `args.speculate_k` stays None without speculation."""
    if args.draft_checkpoint_path and args.prompt_lookup:
        raise ValueError("--draft_checkpoint_path and --prompt_lookup: choose one of them to draft")
    if args.speculate_k is not None and not (args.draft_checkpoint_path or args.prompt_lookup):
        if args.checkpoint_path != DEMO:
            raise ValueError("--speculate_k needs --draft_checkpoint_path DRAFT or --prompt_lookup")
        args.draft_checkpoint_path = DEMO.parent / "draft"
    if args.speculate_k is None and (args.draft_checkpoint_path or args.prompt_lookup):
        args.speculate_k = 5
    if args.compare and args.speculate_k is None:
        raise ValueError("--compare needs speculative decoding: --draft_checkpoint_path DRAFT or --prompt_lookup")
    if args.speculate_k == "auto" and args.interactive:
        raise ValueError("--speculate_k auto measures on a prompt, --interactive has none yet: give a number")
    if isinstance(args.speculate_k, int) and not 1 <= args.speculate_k <= MAX_K:
        raise ValueError(f"--speculate_k {args.speculate_k} must be 1 to {MAX_K}, or auto")


def set_up(
    args: argparse.Namespace,
    sampling: Sampling,
    model: Transformer,
    draft: Transformer | None,
    batches: list[list[list[int]]],
    room: int,
    ranks: Ranks,
) -> tuple[Steps | SpeculativeSteps, float]:
    """Allocate caches of `room` positions; return the steps, compiled as `args` says, and the seconds that took."""
    if draft is not None and room > draft.args.context_length:
        raise ValueError(f"the draft model takes {draft.args.context_length} positions, fewer than {room}")
    spare, kv_dtype = SPARE if args.speculate_k else 0, resolve_kv_dtype(args)
    for part in (model, draft):
        if part is not None:
            part.setup_caches(max(map(len, batches)), room, spare, kv_dtype)
    plain = build_steps(model, sampling, args.compile, args.compile_prefill)
    all_steps = candidate_steps(args.speculate_k, plain, draft, sampling, args.compile) if args.speculate_k else []
    seconds = 0.0
    if args.compile or args.compile_prefill:
        print("compiling ...", file=sys.stderr)
        for batch in batches[:1] + batches[1:][-1:]:
            new_tokens = min(args.max_new_tokens, room + 1 - max(map(len, batch)))
            if args.speculate_k in (None, "auto") or args.compare:
                seconds += warm_up(plain, batch, new_tokens)
            seconds += sum(warm_up_speculation(steps, batch, new_tokens) for steps in all_steps)
    if args.speculate_k != "auto":
        return all_steps[0] if all_steps else plain, seconds
    steps, words = choose_fastest(all_steps, batches[0], args.max_new_tokens)
    print(words)
    chosen = ranks.from_rank_0(lambda: str(steps.k if isinstance(steps, SpeculativeSteps) else 0))  # rank 0's choice
    torch.manual_seed(args.seed)  # `choose_fastest` has used random numbers
    return next((steps for steps in all_steps if steps.k == int(chosen)), plain), seconds


def run_sample(
    steps: Steps | SpeculativeSteps,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    args: argparse.Namespace,
    show_prompt: bool,
    acceptance: Acceptance | None,
) -> dict[str, Any]:
    """Generate one batch and print it: a single row as it is generated, several as each ends. Return the figures."""
    rows = [Row(tokenizer, prompt, args.max_new_tokens, args.stop) for prompt in prompts]
    beginnings = [tokenizer.decode(prompt) if show_prompt else "" for prompt in prompts]

    def show(i: int, text: str) -> None:
        if len(rows) == 1:
            print(text, end="", flush=True)
        elif rows[i].finish_reason:
            print(f"[{i + 1}] {beginnings[i]}{rows[i].text}\n", flush=True)

    if len(rows) == 1:
        print(beginnings[0], end="", flush=True)
    start = time.perf_counter()
    passes = acceptance.n_steps if acceptance else 0
    run_rows(steps, rows, args.max_new_tokens, show, acceptance=acceptance)
    seconds = time.perf_counter() - start
    entries = [row.figures(start) for row in rows]
    ttft = entries[0]["ttft_s"]
    n_steps = max(len(row.tokens) for row in rows) - 1  # that plain decoding would take
    n_tokens = sum(len(row.tokens) - 1 for row in rows)
    nbytes = bytes_per_step(steps.model, len(rows), max(map(len, prompts)) + n_steps / 2)
    if acceptance and n_steps:
        drafting = steps.drafter.bytes_per_step(len(rows), max(map(len, prompts)) + n_steps / 2)
        nbytes = (nbytes + drafting) * (acceptance.n_steps - passes) / n_steps
    figures = {
        "rows": entries,
        "ttft_s": ttft,
        "prefill_tokens_per_s": sum(map(len, prompts)) / ttft,
        "decode_tokens_per_s": n_tokens / (seconds - ttft) if n_steps else None,
        "bytes_per_token": nbytes,
        "bandwidth_gb_s": n_steps * nbytes / (seconds - ttft) / 1e9 if n_steps else None,
    }
    print("\n\n" if len(rows) == 1 else "", f"  {describe(figures)}\n", sep="", flush=True)
    return figures


def plain_rate(plain: Steps, tokenizer: Tokenizer, prompts: list[list[int]], args: argparse.Namespace) -> float | None:
    """Tokens per second of plain decoding of the same batch."""
    rows = [Row(tokenizer, prompt, args.max_new_tokens, args.stop) for prompt in prompts]
    run_rows(plain, rows, args.max_new_tokens, show=lambda i, text: None)
    seconds = max(row.times[-1] for row in rows) - min(row.times[0] for row in rows)
    return sum(len(row.tokens) - 1 for row in rows) / seconds if seconds else None


def run(args: argparse.Namespace, ranks: Ranks) -> None:
    check_args(args)
    args.device = ranks.device(args.device)
    device, dtype = resolve_device(args)
    resolve_kv_dtype(args)  # to fail before anything is loaded
    if args.compile or args.compile_prefill:
        set_compile_flags(device)  # imports the compiler, which takes a second
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    start = time.perf_counter()
    model, tokenizer = load(args.checkpoint_path, device, dtype, ranks)
    draft = load_draft(args.draft_checkpoint_path, model, tokenizer, device, dtype, ranks, args.replicate_draft)
    load_s = time.perf_counter() - start
    kind = str(dtype).removeprefix("torch.") + (f", {model.quantization['mode']}" if model.quantization else "")
    kind += f", {args.kv_dtype} cache" if args.kv_dtype != "auto" else ""
    kind += f", {ranks.world_size} ranks" if ranks.world_size > 1 else ""
    print(f"{args.checkpoint_path}: {count_parameters(model.args) / 1e6:.1f} M parameters, {kind}, {device}")
    if draft is not None:
        print(f"{args.draft_checkpoint_path}: {count_parameters(draft.args) / 1e6:.1f} M parameters to draft")
    if (model.quantization or (device, dtype) != ("cpu", torch.float32)) and (reason := kernels_missing(device, dtype)):
        print(reason, file=sys.stderr)
    torch.manual_seed(args.seed)
    context = min(part.args.context_length for part in (model, draft) if part is not None)
    if args.interactive:
        room = args.max_seq_length or min(context, 4096)
        first = [0] * max(1, min(64, room // 4))  # a made-up turn to compile with
        steps, _ = set_up(args, sampling, model, draft, [[first]], room, ranks)
        if args.compile or args.compile_prefill:
            warm_up_turns(steps, first)
        return chat(steps, tokenizer, args.max_new_tokens, args.stop, args.system, ranks)
    limit = args.max_seq_length or context
    prompts = encode_prompts(args, tokenizer, model.args.vocab_size, limit)
    longest = max(map(len, prompts))
    if longest + args.max_new_tokens - 1 > limit:  # the last token is not cached
        args.max_new_tokens = limit - longest + 1
        print(f"only {args.max_new_tokens} new tokens fit after the prompt's {longest}", file=sys.stderr)
    size = args.batch_size or len(prompts)
    batches = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    room = args.max_seq_length or longest + args.max_new_tokens - 1
    steps, compile_s = set_up(args, sampling, model, draft, batches, room, ranks)
    acceptance = Acceptance(steps.k) if isinstance(steps, SpeculativeSteps) else None
    print()
    samples, show_prompt = [], not args.chat and (args.prompt_file is not None or not args.prompt.isdecimal())
    for n in range(args.num_samples):
        for batch in batches:
            with profiled(args.profile if n == args.num_samples - 1 and ranks.rank == 0 else None):
                samples.append(run_sample(steps, tokenizer, batch, args, show_prompt, acceptance))
            if acceptance and args.compare:
                rate = plain_rate(steps.plain, tokenizer, batch, args)
                acceptance.compare(samples[-1]["decode_tokens_per_s"], rate)
    figures = report(samples, load_s, compile_s, device, acceptance and acceptance.figures())
    figures["parallel"] = report_ranks(steps, batches[0], args.max_new_tokens, ranks) if ranks.world_size > 1 else None
    if args.metrics_path and ranks.rank == 0:
        header = {"model": dataclasses.asdict(model.args), "device": device, "dtype": str(dtype).removeprefix("torch.")}
        header |= {"kv_dtype": str(resolve_kv_dtype(args) or dtype).removeprefix("torch.")}
        write_json(args.metrics_path, {**header, "quantization": model.quantization, **figures})


def report_ranks(
    steps: Steps | SpeculativeSteps, prompts: list[list[int]], max_new_tokens: int, ranks: Ranks
) -> dict[str, Any]:
    """Print and return the bytes that a rank holds, and the time of the collectives over a few more tokens."""

    def decode() -> int:
        return sum(len(step.ids[0]) if isinstance(step, StepResult) else 1 for step in outputs)

    outputs = (speculate if isinstance(steps, SpeculativeSteps) else stream)(steps, prompts, min(9, max_new_tokens))
    next(outputs)  # the prefill is not counted
    costs = measure_collectives(decode, str(steps.model.slots.device)) if max_new_tokens > 1 else {}
    nbytes = parameter_bytes(steps.model)
    line = f"{ranks.world_size} ranks, {nbytes / 1e6:.1f} MB of parameters each"
    if costs:
        share = f"{costs['collectives_share']:.0%} of the time"
        line += f" · {costs['collectives_s_per_token'] * 1e6:.0f} us/token in collectives, {share}"
    print(line + "; bytes and GB/s above are those of one rank")
    return {"world_size": ranks.world_size, "parameter_bytes": nbytes, **costs}


def main(argv: list[str] | None = None) -> int:
    ranks = Ranks.from_torchrun()

    def work() -> None:
        args = build_parser().parse_args(argv)
        with torch.no_grad(), ranks.joined(args.device):
            run(args, ranks)

    return exit_code(work, ranks)


if __name__ == "__main__":
    sys.exit(main())
