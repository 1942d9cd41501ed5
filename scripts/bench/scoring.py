"""Items per second that eval.py scores, compared with the harness's HFLM at batch size 1 on the same weights and items.

    python -m scripts.bench.scoring --model tinyllama-1.1b

The items imitate hellaswag's sizes: a context of 40 to 110 random tokens and four answers of 10 to 45. The weights are
random. The two take turns, a few items at a time, so that a drift in the machine's speed affects both. Needs lm_eval
and transformers.
"""

import fast.startup  # isort: skip  # noqa: F401 - before the others, see there
import argparse
import random
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from fast.cli import DEMO, check_at_least, exit_code, resolve_device
from fast.compiling import set_compile_flags
from fast.families import hf_weights
from fast.layers import speed_up
from model import Transformer
from scripts.bench.command_line import build_parser, check_files, report
from scripts.bench.presets import preset
from scripts.bench.random_models import textbook_model

Item = list[tuple[None, list[int], list[int]]]  # four requests in the harness's form, without texts


def make_items(n: int, vocab_size: int) -> list[Item]:
    draw = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, vocab_size) for _ in range(draw.randint(low, high))]

    contexts = [ids(40, 110) for _ in range(n)]
    return [[(None, context, ids(10, 45)) for _ in range(4)] for context in contexts]


def to_transformers(model: Transformer):
    """A model of `model.py`'s layers as transformers' Llama, sharing its weights."""
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
    with torch.device("meta"):
        theirs = LlamaForCausalLM(config)
    theirs.load_state_dict(hf_weights(model), strict=not args.tie_embeddings, assign=True)
    theirs.tie_weights()
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
    model = textbook_model(preset(args.model), device, dtype)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)  # unused, since only tokens are scored, but HFLM requires one
    theirs = HFLM(pretrained=to_transformers(model), tokenizer=tokenizer, device=device, batch_size=1)
    speed_up(model, dtype)
    ours = FastLM(model, load_tokenizer(DEMO), batch_size=args.batch_size, compile=args.compile)
    items = make_items(args.items + 1, model.args.vocab_size)
    turns = [items[:1], *(items[i : i + args.per_turn] for i in range(1, len(items), args.per_turn))]
    seconds, scores = {"hflm": 0.0, "ours": 0.0}, {"hflm": [], "ours": []}
    for n, turn in enumerate(tqdm(turns, desc="scoring", file=sys.stderr)):
        requests = [request for item in turn for request in item]
        for name, lm in (("hflm", theirs), ("ours", ours)):
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            start = time.perf_counter()
            scores[name] += lm._loglikelihood_tokens(requests, disable_tqdm=True)
            seconds[name] += (time.perf_counter() - start) * (n > 0)  # the first turn warms up and compiles
    n_timed = sum(map(len, turns[1:]))
    difference = max(abs(a - b) for (a, _), (b, _) in zip(scores["hflm"], scores["ours"], strict=True))
    return {
        "items": n_timed,
        "hflm_items_per_s": n_timed / seconds["hflm"],
        "ours_items_per_s": n_timed / seconds["ours"],
        "ratio": seconds["hflm"] / seconds["ours"],
        "largest_difference": difference,
        "mean_log_likelihood": sum(a for a, _ in scores["hflm"]) / len(scores["hflm"]),
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"HFLM, batch size 1   {result['hflm_items_per_s']:.3f} items/s")
    print(f"ours                 {result['ours_items_per_s']:.3f} items/s, {result['ratio']:.2f} times as many")
    print(
        f"largest difference of a log-likelihood: {result['largest_difference']:.3f} "
        f"(their mean is {result['mean_log_likelihood']:.1f})"
    )


def run(argv: list[str] | None) -> None:
    parser = build_parser(__doc__)
    parser.set_defaults(compile=False)
    add = parser.add_argument
    add("--items", type=int, default=16, help="items to time; one to warm up comes on top")
    add("--per_turn", type=int, default=8, help="items that one model scores before the other's turn")
    add("--batch_size", default="auto", help="ours; HFLM's is 1")
    args = parser.parse_args(argv)
    check_at_least(args, 1, "items", "per_turn")
    check_files(args)
    with torch.no_grad():
        report(args, measure(args), print_table)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
