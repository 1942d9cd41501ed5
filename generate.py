"""Generate text on the command line: one prompt, batches of prompts, or a conversation.

    python generate.py --compile --checkpoint_path checkpoints/$MODEL_REPO/model.pth --prompt "Hello, my name is"

Without `--checkpoint_path` the embedded demo model runs. The loop itself is in `fast/decoding.py`.
"""

import fast.startup  # isort: skip  # noqa: F401 - before the others, see there
import argparse
import dataclasses
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fast.chat import chat, check_system, warm_up_turns
from fast.cli import (
    DEMO,
    Parser,
    add_model_flags,
    check_at_least,
    check_report,
    drop_compile,
    find_checkpoint,
    load,
    profiled,
    refuse,
    resolve_device,
    resolve_kv_dtype,
    run_command,
    say,
    template_args,
    warn_beyond,
    write_json,
)
from fast.compiling import set_compile_flags
from fast.decoding import Steps, build_steps, stream, warm_up
from fast.drafting import MAX_K, SPARE
from fast.heads import Head
from fast.layers import kernels_missing
from fast.metrics import bytes_per_position, count_parameters, describe, free_memory, parameter_bytes, report
from fast.prompts import DEFAULT, encode_prompts, read_prompts
from fast.rows import Row, run_rows
from fast.sampling import COLDEST, Sampling
from fast.speculative import (
    SpeculativeSteps,
    StepResult,
    build_speculative_steps,
    drafter_for,
    load_draft,
    speculate,
    warm_up_speculation,
)
from fast.tokenizer import Tokenizer
from model import Transformer
from tp import Ranks, measure_collectives

MAX_NEW_TOKENS = 200
ONE_SHOT = ("prompt", "prompt_file", "batch_size", "num_samples", "metrics_path", "profile", "compare")

# ---- The command line.


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    add = add_model_flags(parser, kv_dtype="what the KV cache stores (default: auto, which is as --dtype)")
    add("--compile", action="store_true", help="compile the decode step")
    add("--compile_prefill", action="store_true", help="compile the prefill")
    add = parser.add_argument_group("the prompt").add_argument
    add("--prompt", help=f"text, @FILE, - for stdin, or a number for so many made-up tokens (default: {DEFAULT!r})")
    add("--prompt_file", type=Path, help="one prompt per line, or - for stdin, in batches of --batch_size")
    add("--batch_size", type=int, help="copies of --prompt (default: 1) or lines of --prompt_file (default: all)")
    add("--chat", action="store_true", help="put the prompt into the model's chat template")
    add("--interactive", action="store_true", help="a conversation: Ctrl-C stops an answer, Ctrl-D ends it")
    add("--system", help="the system message of --chat and --interactive")
    add(
        "--template_args",
        type=template_args,
        default={},
        metavar="JSON",
        help="variables of the chat template, such as '{\"enable_thinking\": false}'",
    )
    add = parser.add_argument_group("the text").add_argument
    add("--max_new_tokens", type=int, help="the longest text (default: 200; in a conversation what the cache holds)")
    add(
        "--max_seq_length",
        type=int,
        help="tokens that the KV cache holds (default: what is needed; 4096 in a conversation)",
    )
    add("--stop", action="append", default=[], metavar="TEXT", help="end a row before this text; may be repeated")
    add("--temperature", type=float, default=0.6, help="0: always the likeliest token")
    add("--top_k", type=int, default=200, help="draw from the k likeliest tokens; 0: from all")
    add("--top_p", type=float, help="draw from the fewest tokens with this probability in all (default: off)")
    add("--min_p", type=float, help="draw from tokens with this share of the likeliest's probability (default: off)")
    add("--seed", type=int, default=1234, help="of the random draws")
    add("--num_samples", type=int, default=1, help="texts for each prompt, one after the other")
    add = parser.add_argument_group("speculative decoding", "with a draft model or --prompt_lookup").add_argument
    add(
        "--speculate_k",
        type=_number_or_auto,
        metavar="K",
        help=f"drafts per step, 1 to {MAX_K}, or auto: as many as pay (default)",
    )
    add(
        "--draft_checkpoint_path",
        type=Path,
        help="the model, EAGLE-3 or DFlash head that drafts (demo/draft for the demo with --speculate_k)",
    )
    add("--replicate_draft", action="store_true", help="under torchrun: keep the whole draft on every rank")
    add("--prompt_lookup", action="store_true", help="draft what followed in the text so far, without a model")
    add("--compare", action="store_true", help="also time plain decoding")
    add = parser.add_argument_group("figures").add_argument
    add("--stats", action="store_true", help="print figures after each answer of a conversation")
    add("--metrics_path", type=Path, metavar="FILE", help="write every figure to this file, as JSON")
    add("--profile", type=Path, metavar="FILE", help="write a Chrome trace of the last sample to this file")
    return parser


def _number_or_auto(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that are out of range or exclude each other, before anything is loaded."""
    no_use = partial(refuse, args, build_parser())
    check_at_least(args, 1, "batch_size", "num_samples", "max_new_tokens", "max_seq_length")
    if args.num_samples > 10**6:
        raise ValueError(f"--num_samples {args.num_samples} must be at most {10**6}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed} must be 0 to 2**63 - 1")
    if args.interactive:
        no_use("--interactive is a conversation of one", *ONE_SHOT)
        if sys.stdin is None:
            raise ValueError("--interactive reads from stdin, which is closed")
    else:
        no_use("--stats is for --interactive, figures are always printed here", "stats")
    if args.prompt_file is not None:
        no_use("--prompt_file holds the prompts", "prompt")
    check_speculation(args)
    if args.draft_checkpoint_path is None:
        no_use("without --draft_checkpoint_path there is no draft model", "replicate_draft")
    if args.temperature < COLDEST:
        filters = [name for name in ("top_k", "top_p", "min_p") if getattr(args, name)]  # 0 is off
        no_use(f"--temperature {args.temperature:g} takes the likeliest token", *filters)
    if not (args.chat or args.interactive):
        no_use("only --chat and --interactive use the chat template", "system", "template_args")
    if "" in args.stop:
        raise ValueError("--stop needs a text that is not empty")
    for path in (args.metrics_path, args.profile):
        if path is not None:
            check_report(path)
    if args.metrics_path is not None and args.metrics_path == args.profile:
        raise ValueError(f"--metrics_path and --profile are both {args.profile}: name two files")
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
        args.speculate_k = "auto"
    if args.compare and args.speculate_k is None:
        raise ValueError("--compare needs speculative decoding: --draft_checkpoint_path DRAFT or --prompt_lookup")
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
    """Allocate caches of `room` positions; return the steps, compiled as `args` says, and the seconds that took.

    Without `args.max_new_tokens` the texts may fill the caches.
    """
    spare, kv_dtype = SPARE if args.speculate_k else 0, resolve_kv_dtype(args)
    for part in (model, draft):
        if part is not None:
            part.setup_caches(max(map(len, batches)), room, spare, kv_dtype)
    drafter = drafter_for(draft, model, sampling, args.speculate_k, args.compile) if args.speculate_k else None
    steps = plain = build_steps(model, sampling, args.compile, args.compile_prefill, drafter and drafter.run)
    if drafter is not None:
        agree = partial(ranks.agree, device=args.device)
        steps = build_speculative_steps(plain, drafter, sampling, args.speculate_k, args.compile, agree=agree)
    seconds = 0.0
    if args.compile or args.compile_prefill:
        say("compiling ...")
        for batch in batches[:1] + batches[1:][-1:]:
            new_tokens = min(args.max_new_tokens or room, room + 1 - max(map(len, batch)))
            if args.speculate_k in (None, "auto") or args.compare:
                seconds += warm_up(plain, batch, new_tokens)
            if isinstance(steps, SpeculativeSteps):
                seconds += warm_up_speculation(steps, batch, new_tokens)
    return steps, seconds


def run_batch(
    steps: Steps | SpeculativeSteps,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    args: argparse.Namespace,
    beginnings: list[str],
    numbers: range | None,
) -> dict[str, Any]:
    """Generate one batch and print each row after its beginning; return the figures.

    numbers: of the rows, which are printed in this order as they end; None: there is one, printed as it is generated.
    """
    rows = [Row(tokenizer, prompt, args.max_new_tokens, args.stop) for prompt in prompts]
    printed = 0

    def show(_: int, text: str) -> None:
        nonlocal printed
        if numbers is None:
            print(text if printed else beginnings[0] + text, end="", flush=True)
            printed = 1
            return
        while printed < len(rows) and rows[printed].finish_reason:
            print(f"[{numbers[printed]}] {beginnings[printed]}{rows[printed].text}\n", flush=True)
            printed += 1

    try:
        figures = run_rows(steps, rows, args.max_new_tokens, show)
    except ValueError:  # to be said on a line of its own
        if printed:
            print(flush=True)
        raise
    several = numbers is not None or args.num_samples > 1  # texts, on stdout with an empty line after each
    if numbers is None:
        print("\n" if several else "", flush=True)
    say(("" if several else "\n") + f"  {describe(figures)}\n")
    return figures


def check_memory(models: list[Transformer], n_rows: int, room: int, args: argparse.Namespace) -> None:
    """Raise ValueError if `n_rows` rows with caches of `room` positions are more than the device has memory for."""
    needed, free = 16 * n_rows * models[0].args.vocab_size, free_memory(args.device)  # logits, and what is drawn from
    for model in models:
        model.setup_caches(1, 1, kv_dtype=resolve_kv_dtype(args))
        needed += n_rows * room * bytes_per_position(model)
    if needed > free:
        raise ValueError(
            f"a KV cache of {n_rows} x {room} tokens, with logits, takes {needed / 1e9:.1f} GB, {args.device} has "
            f"{free / 1e9:.1f} GB free: lower --batch_size or --max_seq_length, or store less with --kv_dtype int8"
        )


def plain_rate(plain: Steps, tokenizer: Tokenizer, prompts: list[list[int]], args: argparse.Namespace) -> float | None:
    """Tokens per second of plain decoding of the same batch."""
    rows = [Row(tokenizer, prompt, args.max_new_tokens, args.stop) for prompt in prompts]
    return run_rows(plain, rows, args.max_new_tokens, show=lambda i, text: None)["decode_tokens_per_s"]


def acceptance_of(
    steps: SpeculativeSteps, samples: list[dict[str, Any]], plain_rates: list[float | None]
) -> dict[str, Any]:
    """The entry in `--metrics_path`: how the steps went, and how fast plain decoding was, if that was compared."""
    rates = [sample["decode_tokens_per_s"] for sample in samples[: len(plain_rates)]]
    compared = [(rate, plain) for rate, plain in zip(rates, plain_rates, strict=True) if rate and plain]
    figures = steps.pace.figures()
    if compared:
        figures["plain_decode_tokens_per_s"] = median(plain for _, plain in compared)
        figures["speed_up"] = median(rate / plain for rate, plain in compared)
    return figures


def load_models(args: argparse.Namespace, ranks: Ranks) -> tuple[Transformer, Transformer | None, Tokenizer, dict]:
    """Load what `args` names and say what it is: the model, the draft model and the tokenizer, and the seconds."""
    args.checkpoint_path = find_checkpoint(args.checkpoint_path, args.download, ranks)
    if args.draft_checkpoint_path is not None:
        args.draft_checkpoint_path = find_checkpoint(args.draft_checkpoint_path, args.download, ranks)
    device, dtype = resolve_device(args)
    start = time.perf_counter()
    kernels_missing(device, dtype)  # builds the CPU's kernels at the first run
    build_s, start = time.perf_counter() - start, time.perf_counter()
    model, tokenizer = load(args.checkpoint_path, device, dtype, ranks)
    tokenizer.template_args = args.template_args
    draft = load_draft(args.draft_checkpoint_path, model, tokenizer, device, dtype, ranks, args.replicate_draft)
    seconds = {"build_s": build_s, "load_s": time.perf_counter() - start}
    kind = str(dtype).removeprefix("torch.") + (f", {model.quantization['mode']}" if model.quantization else "")
    kind += f", {args.kv_dtype} cache" if args.kv_dtype != "auto" else ""
    kind += f", {ranks.world_size} ranks" if ranks.world_size > 1 else ""
    say(f"{args.checkpoint_path}: {count_parameters(model.args) / 1e6:.1f} M parameters, {kind}, {device}")
    if draft is not None:
        count = draft.n_parameters if isinstance(draft, Head) else count_parameters(draft.args)
        say(f"{args.draft_checkpoint_path}: {count / 1e6:.1f} M parameters to draft")
    return model, draft, tokenizer, seconds


def run(args: argparse.Namespace, ranks: Ranks) -> None:
    check_args(args)
    texts, made_up = ([], 0) if args.interactive else read_prompts(args, ranks)
    args.device = ranks.device(args.device)
    device, dtype = resolve_device(args)
    resolve_kv_dtype(args)  # to fail before anything is loaded
    if args.compile or args.compile_prefill:
        set_compile_flags(device)  # imports the compiler, which takes a second
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    model, draft, tokenizer, seconds = load_models(args, ranks)
    torch.manual_seed(args.seed)
    models = [part for part in (model, draft) if part is not None]
    context = min(part.args.context_length for part in models)
    warn_beyond("--max_seq_length", args.max_seq_length or 0, context)
    if args.interactive:
        room = args.max_seq_length or min(context, 4096)
        check_system(tokenizer, args.system, room)
        check_memory(models, 1, room, args)
        first = [0] * max(1, min(64, room // 4))  # a made-up turn to compile with
        steps, _ = set_up(args, sampling, model, draft, [[first]], room, ranks)
        if args.compile or args.compile_prefill:
            warm_up_turns(steps, first)
        return chat(steps, tokenizer, args.max_new_tokens, args.stop, args.system, args.stats, ranks)
    limit = args.max_seq_length or context
    prompts = encode_prompts(texts, made_up, args, tokenizer, model.args.vocab_size, limit)
    longest, wanted = max(map(len, prompts)), args.max_new_tokens or MAX_NEW_TOKENS
    args.max_new_tokens = min(wanted, limit - longest + 1)  # the last token is not cached
    if args.max_new_tokens < wanted:
        say(f"only {args.max_new_tokens} new tokens fit after the prompt's {longest}")
    room = args.max_seq_length or longest + args.max_new_tokens - 1
    size = args.batch_size or len(prompts)
    if args.prompt_file is not None:
        size = min(size, len(prompts))
    check_memory(models, size, room, args)
    if args.prompt_file is None:
        prompts = prompts * size
    batches = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    steps, compile_s = set_up(args, sampling, model, draft, batches, room, ranks)
    say()
    samples, plain_rates = [], []
    beginnings = [""] * len(prompts) if args.chat or made_up else [tokenizer.decode(prompt) for prompt in prompts]
    for n in range(args.num_samples):
        for i, batch in enumerate(batches):
            numbers = range(1 + i * size, 1 + i * size + len(batch)) if len(prompts) > 1 else None
            with profiled(args.profile if n == args.num_samples - 1 and ranks.rank == 0 else None):
                shown = beginnings[i * size : i * size + len(batch)]
                samples.append(run_batch(steps, tokenizer, batch, args, shown, numbers))
            if args.compare:
                plain_rates.append(plain_rate(steps.plain, tokenizer, batch, args))
    seconds["compile_s"] = compile_s
    acceptance = acceptance_of(steps, samples, plain_rates) if isinstance(steps, SpeculativeSteps) else None
    figures = report(samples, seconds, device, acceptance)
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
    say(line + "; bytes and GB/s above are those of one rank")
    return {"world_size": ranks.world_size, "parameter_bytes": nbytes, **costs}


def main(argv: list[str] | None = None) -> int:
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
