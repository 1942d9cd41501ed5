"""Items per second of eval.py's scoring and of the harness's own HFLM at batch size 1, same weights, same items.

    python scripts/benchmark_eval.py --model tinyllama-1.1b

The items are made up in hellaswag's shape: a context of 40 to 110 random tokens and four answers of 10 to 45. The
weights are random. Both models score in turns, a few items at a time, so that a drift of the machine touches both.
Needs lm_eval and transformers. The last line is every figure as JSON.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import _root  # noqa: F401 - finds the modules of the repository's root
import torch
from benchmark import build_model, hardware

from fast.cli import DEMO, exit_code, resolve_device, write_json
from fast.compiling import set_compile_flags
from fast.families import HF_MODULES, preset
from model import Transformer

Item = list[tuple[None, list[int], list[int]]]  # four requests as the harness hands them to a model, tokens only


def make_items(n: int, vocab_size: int) -> list[Item]:
    draw = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, vocab_size) for _ in range(draw.randint(low, high))]

    contexts = [ids(40, 110) for _ in range(n)]
    return [[(None, context, ids(10, 45)) for _ in range(4)] for context in contexts]


def to_transformers(model: Transformer):
    """The same model in transformers' Llama, on the very same memory."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    args = model.args
    config = LlamaConfig(
        hidden_size=args.dim, num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads, head_dim=args.head_dim, intermediate_size=args.hidden_dim,
        vocab_size=args.vocab_size, max_position_embeddings=args.context_length, rms_norm_eps=args.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        tie_word_embeddings=args.tie_embeddings,
    )  # fmt: skip
    ours, state = model.state_dict(), {}
    for template, names in HF_MODULES.items():
        for layer in range(args.n_layers if "{}" in template else 1):
            tensor = ours.get(f"{template.format(layer)}.weight")
            if tensor is None:
                continue
            kv_rows = args.n_kv_heads * args.head_dim
            sizes = (
                [len(tensor) - 2 * kv_rows, kv_rows, kv_rows]
                if len(names) == 3
                else [len(tensor) // len(names)] * len(names)
            )
            for name, part in zip(names, tensor.split(sizes), strict=True):
                state[f"{name.format(layer)}.weight"] = part
    with torch.device("meta"):
        theirs = LlamaForCausalLM(config)
    theirs.load_state_dict(state, assign=True)
    theirs.model.rotary_emb = LlamaRotaryEmbedding(config).to(model.tok_embeddings.weight.device)
    return theirs.eval().requires_grad_(False)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    try:
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoTokenizer

        from fast.harness import FastLM
    except ImportError as error:
        raise ImportError(f"{error}; pip install -r requirements-dev.txt") from None
    from fast.tokenizer import load_tokenizer

    device, dtype = resolve_device(args)
    set_compile_flags(device)
    print(f"building {args.model} ...", file=sys.stderr)
    model = build_model(preset(args.model), device, dtype)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)  # only tokens are scored; HFLM wants one all the same
    theirs = HFLM(pretrained=to_transformers(model), tokenizer=tokenizer, device=device, batch_size=1)
    ours = FastLM(model, load_tokenizer(DEMO), batch_size=args.batch_size, compile=args.compile)
    items = make_items(args.items + 1, model.args.vocab_size)
    turns = [items[:1], *(items[i : i + args.per_turn] for i in range(1, len(items), args.per_turn))]
    seconds, scores = {"hflm": 0.0, "ours": 0.0}, {"hflm": [], "ours": []}
    for n, turn in enumerate(turns):
        requests = [request for item in turn for request in item]
        for name, lm in (("hflm", theirs), ("ours", ours)):
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            start = time.perf_counter()
            scores[name] += lm._loglikelihood_tokens(requests, disable_tqdm=True)
            seconds[name] += (time.perf_counter() - start) * (n > 0)  # the first warms up and compiles
        print(f"turn {n + 1} of {len(turns)}", file=sys.stderr)
    n_timed = sum(map(len, turns[1:]))
    difference = max(abs(a - b) for (a, _), (b, _) in zip(scores["hflm"], scores["ours"], strict=True))
    return {
        "model": args.model,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "hardware": hardware(device),
        "torch": torch.__version__,
        "compile": args.compile,
        "items": n_timed,
        "hflm_items_per_s": n_timed / seconds["hflm"],
        "ours_items_per_s": n_timed / seconds["ours"],
        "ratio": seconds["hflm"] / seconds["ours"],
        "largest_difference": difference,
        "mean_log_likelihood": sum(a for a, _ in scores["hflm"]) / len(scores["hflm"]),
    }


def run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="a preset of fast/families.py, such as tinyllama-1.1b")
    add("--items", type=int, default=16, help="items to time; one to warm up comes on top")
    add("--per_turn", type=int, default=8, help="items that one model scores before the other's turn")
    add("--batch_size", default="auto", help="ours; HFLM's is 1")
    add("--compile", action="store_true", help="compile ours")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16, float16 on GPUs before Ampere")
    add("--json_path", type=Path, help="write the figures to this file too")
    args = parser.parse_args(argv)
    if min(args.items, args.per_turn) < 1:
        raise ValueError("--items and --per_turn must be at least 1")
    with torch.no_grad():
        result = measure(args)
    print(f"{result['model']}, {result['dtype']}, {result['hardware']}, torch {result['torch']}")
    print(f"HFLM, batch size 1   {result['hflm_items_per_s']:.3f} items/s")
    print(f"ours                 {result['ours_items_per_s']:.3f} items/s, {result['ratio']:.2f} times as many")
    print(
        f"largest difference of a log-likelihood: {result['largest_difference']:.3f} "
        f"(their mean is {result['mean_log_likelihood']:.1f})"
    )
    if args.json_path:
        write_json(args.json_path, result)
    print(json.dumps(result))


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
