"""Train the demo models on Jane Austen's six novels (`demo/austen.txt.xz`).

    python -m demo.train --steps 9000

Writes a SentencePiece tokenizer, a target model and a smaller draft model for speculative decoding, as ordinary
Hugging Face directories, the held-out text, and a README with this run's figures. It trains on the CPU; stopped and
started again, it goes on from `training.pt`. On a busy machine, set OMP_WAIT_POLICY=PASSIVE so that threads sleep, not
spin, while they wait for each other.
"""

import fast.startup  # isort: skip  # noqa: F401 - before the others, see there
import argparse
import io
import itertools
import json
import lzma
import math
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from fast.cli import Parser, exit_code, replacing
from fast.families import args_from_hf, hf_weights
from fast.metrics import hardware
from model import Transformer

TEXT = Path(__file__).parent / "austen.txt.xz"
BOS, CONTEXT, HEAD_DIM = 1, 512, 32
SHAPES = {
    "target": {"hidden_size": 256, "num_hidden_layers": 7, "num_attention_heads": 8, "intermediate_size": 512},
    "draft": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256},
}
LEARNING_RATE = {"target": 2e-3, "draft": 4e-3}
EVERY = 30  # one chapter in so many is held out
STEPS_BETWEEN_POINTS = 200  # of the loss curve; what is kept of a training is of the last one

README = """# The demo models

Two small Llama models of our own, so that everything in this repository runs without a download: `target/`, and
`draft/` for speculative decoding. Both are ordinary Hugging Face directories in bfloat16, with one tokenizer.
They write in the manner of Jane Austen, and now and then make sense. `train.py` made them and wrote this file:

    {command}

on {date}, with Python {python} and torch {torch}, on {machine}.

| model | parameters | steps | tokens seen | minutes | held-out perplexity per token | held-out bits per byte |
|---|---|---|---|---|---|---|
{rows}
The weights kept are those of the lowest held-out loss seen in training: {best}.
The draft learned from the target's distributions over the training text, not from the text itself. With the target
it agrees on the most likely next token at {agreement} of the held-out positions, and the two distributions overlap
by {overlap}, which is the acceptance rate to expect at temperature 1. All losses are in `training.json`.

## The text

`austen.txt.xz` holds the six novels, a chapter's heading or a paragraph on each line. They are in the public domain;
they were taken from [janeaustenr](https://github.com/juliasilge/janeaustenr) (MIT License), which has them from
Project Gutenberg, and joined to one line a paragraph, without title pages, marks of emphasis and notes in brackets.
{documents:,} chapters are for training ({training_bytes:,} bytes, {training_tokens:,} tokens).

`heldout.txt` ({heldout_bytes:,} bytes, {heldout_tokens:,} tokens) is the {heldout_documents} chapters that were not
trained on, every {every}th. Its perplexity is taken in bfloat16 over windows of {context} tokens that do not overlap;
the first begins with the begin-of-text token.
"""


def read_chapters() -> list[list[str]]:
    """The chapters of the novels, each a list of paragraphs."""
    chapters: list[list[str]] = []
    for line in lzma.decompress(TEXT.read_bytes()).decode().splitlines():
        if line.startswith("# "):
            chapters.append([])
        elif line:
            chapters[-1].append(line)
    return chapters


def split_chapters(chapters: list[list[str]]) -> tuple[list[list[str]], list[list[str]]]:
    """(training, held-out) chapters, every EVERYth held out."""
    heldout = chapters[EVERY // 2 :: EVERY]
    return [chapter for i, chapter in enumerate(chapters) if i % EVERY != EVERY // 2], heldout


def training_text() -> str:
    """The text that the demo models are trained on."""
    training, _ = split_chapters(read_chapters())
    return "\n".join(paragraph for chapter in training for paragraph in chapter)


def train_tokenizer(documents: list[list[str]], vocab_size: int) -> bytes:
    """A byte-pair SentencePiece model with Llama's settings."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(paragraph for document in documents for paragraph in document),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        max_sentence_length=1 << 16,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def hf_config(shape: dict[str, int], vocab_size: int) -> dict[str, Any]:
    """The Hugging Face config of a demo model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        **shape,
        "num_key_value_heads": shape["num_attention_heads"] // 2,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def build(config: dict[str, Any], dropout: float) -> Transformer:
    """A model with random weights. Hooks apply dropout to the embeddings and to all that is added to the residual."""
    model = Transformer(args_from_hf(config))
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            adds = name.endswith(("wo.weight", "w2.weight"))  # to the residual: scaled as in GPT-2
            torch.nn.init.normal_(weight, std=0.02 / math.sqrt(2 * len(model.layers) if adds else 1))

    def drop(module, inputs, output):
        return F.dropout(output, dropout, module.training)

    if dropout:
        for module in [model.tok_embeddings, *(m for x in model.layers for m in (x.attention.wo, x.feed_forward.w2))]:
            module.register_forward_hook(drop)
    return model


def batches(documents: list[list[str]], sp, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless windows `[B, CONTEXT + 1]` of the shuffled documents.

    Each epoch cuts the documents anew at random paragraphs, so that any paragraph may follow the begin-of-text
    token; only the real end of a document gets an end-of-text token.
    """
    rng, size = random.Random(seed), CONTEXT + 1
    stream: list[int] = []
    while True:
        pieces = []
        for document in documents:
            cuts = [0, *(i for i in range(1, len(document)) if rng.random() < 0.2), len(document)]
            pieces += [(document[a:b], b == len(document)) for a, b in itertools.pairwise(cuts)]
        rng.shuffle(pieces)
        encoded = sp.encode(["\n\n".join(paragraphs) for paragraphs, _ in pieces])
        for ids, (_, ended) in zip(encoded, pieces, strict=True):
            stream += [sp.bos_id(), *ids, *([sp.eos_id()] if ended else [])]
        n_batches = len(stream) // (batch_size * size)
        yield from torch.tensor(stream[: n_batches * batch_size * size]).view(n_batches, batch_size, size)
        del stream[: n_batches * batch_size * size]


def windows(ids: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs `[1, S]`, labels `[S]`), windows of CONTEXT that do not overlap; every id but the first is a label."""
    for start in range(0, len(ids) - 1, CONTEXT):
        window = torch.tensor(ids[start : start + CONTEXT + 1])
        yield window[None, :-1], window[1:]


@torch.no_grad()
def heldout_loss(model: Transformer, ids: list[int]) -> float:
    """Mean negative log-likelihood of ids[1:], in nats."""
    model.eval()
    losses = [F.cross_entropy(model(x)[0].float(), labels, reduction="sum").item() for x, labels in windows(ids)]
    model.train()
    return sum(losses) / (len(ids) - 1)


@torch.no_grad()
def likeness(target: Transformer, draft: Transformer, ids: list[int]) -> tuple[float, float]:
    """(share of positions with the same most likely token, mean sum of min(p, q)) of two models over ids."""
    same = overlap = 0.0
    for x, _ in windows(ids):
        p, q = (model.eval()(x)[0].float().softmax(-1) for model in (target, draft))
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        overlap += torch.minimum(p, q).sum().item()
    return same / (len(ids) - 1), overlap / (len(ids) - 1)


def make_optimizer(model: Transformer, lr: float) -> torch.optim.Optimizer:
    """AdamW; weight decay for matrices only."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    gains = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def train(
    model: Transformer,
    data: Iterator[Tensor],
    heldout: list[int],
    steps: int,
    lr: float,
    state: dict[str, Any],
    keep: Callable[[dict[str, Any]], None],
    teacher: Transformer | None = None,
) -> dict[str, Any]:
    """Train with warm-up and cosine decay, and leave the weights of the lowest held-out loss in `model`.

    With a teacher, the label is its distribution in place of the text's next token: the closer to it, the more drafts
    are accepted. `keep` is given the state at every point of the loss curve; given back as `state`, {} at first, the
    training goes on there. Returns the last state: "curve" is a list of (step, training loss, held-out loss).
    """
    optimizer = make_optimizer(model, lr)
    state = {"step": 0, "seconds": 0.0, "curve": []} | state
    if state["step"]:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
    started = time.time() - state["seconds"]
    forward, teach = model, teacher
    if steps > 20:  # below that, compiling takes longer than training
        forward, teach = torch.compile(model), teacher and torch.compile(teacher)
    bar = tqdm(range(state["step"] + 1, steps + 1), initial=state["step"], total=steps, mininterval=10)
    for batch, step in zip(itertools.islice(data, state["step"], None), bar, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / 100) * (0.525 + 0.475 * math.cos(math.pi * step / steps))
        inputs, labels = batch[:, :-1], batch[:, 1:].flatten()  # [B, S], [B * S]
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(inputs).flatten(0, 1)
            if teacher is not None:
                with torch.no_grad():
                    goal = teach(inputs).flatten(0, 1).float().softmax(-1)
        losses = F.cross_entropy(logits.float(), labels if teacher is None else goal, reduction="none")
        loss = losses[labels != BOS].mean()  # no loss for BOS: where it stands is random
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % STEPS_BETWEEN_POINTS == 0 or step == steps:
            point = (step, round(loss.item(), 4), round(heldout_loss(model, heldout), 4))
            bar.set_postfix(train=point[1], heldout=point[2])
            if point[2] < min((lowest for _, _, lowest in state["curve"]), default=math.inf):
                state["best"] = {name: weight.clone() for name, weight in model.state_dict().items()}
            state |= {"step": step, "seconds": time.time() - started, "curve": [*state["curve"], point]}
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
            keep(state)
    model.load_state_dict(state["best"])
    return state


def write(path: Path, text: str | bytes) -> None:
    """Write a file atomically, and create its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(text if isinstance(text, bytes) else text.encode())


def save_hf(folder: Path, model: Transformer, config: dict[str, Any], tokenizer: bytes) -> None:
    """Write an ordinary Hugging Face directory."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    flags = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": False}
    files = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            **special,
            **flags,
            "model_max_length": CONTEXT,
        },
    }
    for name, content in files.items():
        write(folder / name, json.dumps(content, indent=2) + "\n")
    write(folder / "tokenizer.model", tokenizer)
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in hf_weights(model).items()}
    write(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))


def write_report(out: Path, report: dict[str, Any]) -> None:
    """Write README.md, every figure from `report`, and training.json, the report itself."""
    columns = "parameters", "steps", "tokens_seen", "minutes", "perplexity_per_token", "bits_per_byte"
    models = report["models"].items()
    rows = "".join(f"| `{name}/` | " + " | ".join(f"{r[c]:,}" for c in columns) + " |\n" for name, r in models)
    best = " and ".join(f"step {r['best_step']:,} of the {name}" for name, r in models)
    write(out / "README.md", README.format(rows=rows, best=best, context=CONTEXT, **report))
    write(out / "training.json", json.dumps(report, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where the models and the report go")
    parser.add_argument("--steps", type=int, default=9000, help="steps of the target model")
    parser.add_argument("--draft_steps", type=int, help="steps of the draft model (default: half as many)")
    parser.add_argument("--batch_size", type=int, default=4, help=f"windows of {CONTEXT} tokens in a step")
    parser.add_argument("--dropout", type=float, default=0.2, help="in the target's training")
    parser.add_argument("--vocab_size", type=int, default=2048, help="pieces of the tokenizer")
    parser.add_argument("--max_chapters", type=int, help="take only the first chapters, to try the script out")
    parser.add_argument("--seed", type=int, default=1337, help="of weights, batches and dropout")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    stored, settings = args.out / "training.pt", {**vars(args), "out": None, "shapes": SHAPES}
    states = torch.load(stored, weights_only=True) if stored.exists() else {"settings": settings}
    if states["settings"] != settings:
        raise ValueError(f"{stored} is of a run with other settings: delete it to start anew")
    training, heldout = split_chapters(read_chapters()[: args.max_chapters])
    text = "\n\n".join(paragraph for chapter in heldout for paragraph in chapter) + "\n"
    write(args.out / "heldout.txt", text)
    tokenizer = train_tokenizer(training, args.vocab_size)
    sp = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    ids = [sp.bos_id(), *sp.encode(text)]
    report: dict[str, Any] = {
        "command": " ".join(["python -m demo.train", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": hardware("cpu"),
        "documents": len(training),
        "training_bytes": sum(len(p) + 2 for chapter in training for p in chapter),
        "training_tokens": sum(len(sp.encode("\n\n".join(chapter))) + 2 for chapter in training),
        "every": EVERY,
        "heldout_documents": len(heldout),
        "heldout_bytes": len(text.encode()),
        "heldout_tokens": len(ids) - 1,
        "models": {},
    }

    def keep(state: dict[str, Any]) -> None:
        with replacing(stored) as temporary:
            torch.save(states | {name: state}, temporary)

    models: dict[str, Transformer] = {}
    for name, steps in (("target", args.steps), ("draft", args.draft_steps or max(1, args.steps // 2))):
        teacher = models.get("target")
        torch.manual_seed(args.seed)
        config = hf_config(SHAPES[name], args.vocab_size)
        model = build(config, args.dropout if teacher is None else 0.0)
        data = batches(training, sp, args.batch_size, args.seed)
        state = train(model, data, ids, steps, LEARNING_RATE[name], states.get(name, {}), keep, teacher)
        states[name] = state
        save_hf(args.out / name, model, config, tokenizer)
        models[name] = model.to(torch.bfloat16).eval()  # as saved
        nats = heldout_loss(models[name], ids)
        report["models"][name] = {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "steps": steps,
            "best_step": min(state["curve"], key=lambda point: point[2])[0],
            "tokens_seen": steps * args.batch_size * CONTEXT,
            "minutes": round(state["seconds"] / 60, 1),
            "perplexity_per_token": round(math.exp(nats), 2),
            "bits_per_byte": round(nats * (len(ids) - 1) / math.log(2) / len(text.encode()), 3),
            "curve_step_train_heldout": state["curve"],
        }
    same, overlap = likeness(models["target"], models["draft"], ids)
    write_report(args.out, report | {"agreement": f"{same:.1%}", "overlap": f"{overlap:.1%}"})
    stored.unlink()


if __name__ == "__main__":
    sys.exit(exit_code(lambda: run(parse_args())))
