"""A cost model of decoding with tensor parallelism, compared with gpt-fast's published figures.

    python -m scripts.bench.scaling

A token at batch size 1 takes the sum of three terms:

    weights of a rank / bandwidth  +  layers * overhead  +  collectives * (base + hop * log2(ranks) + bytes / link)

Worth knowing: four numbers describe a machine in bf16. They are fitted to Llama-2-7B on 1, 2, 4 and 8 GPUs, and then
predict the 70B rows. int8 and int4 have their own bandwidth and overhead, each fitted to two one-GPU rows; their
eight-GPU rows are predictions. The figures for H100s follow from the assumptions in `h100` and were not measured.
"""

import math
from dataclasses import dataclass, replace

import torch

from model import ModelArgs, Transformer
from scripts.bench.presets import preset
from tp import divided

# Tokens per second at batch size 1 on 8 A100-80GB (330 W, hybrid cube mesh), by number of GPUs: gpt-fast's README at
# https://github.com/pytorch-labs/gpt-fast, commit 0f925b5.
PUBLISHED: dict[tuple[str, str], dict[int, float]] = {
    ("llama-2-7b", "bf16"): {1: 104.9, 2: 168.84, 4: 254.02, 8: 328.43},
    ("llama-2-70b", "bf16"): {2: 21.32, 4: 38.01, 8: 62.50},
    ("llama-2-7b", "int8"): {1: 155.58},
    ("llama-2-70b", "int8"): {1: 19.13, 8: 80.44},
    ("llama-2-7b", "int4"): {1: 196.80},
    ("llama-2-70b", "int4"): {1: 25.25, 8: 90.77},
}
WEIGHT_BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.625}  # int4: a scale and a zero in bf16 per group of 32


@dataclass(frozen=True)
class Machine:
    """A machine in the cost model. `bandwidth` (bytes/s) and `overhead` (seconds per layer) are by weight format."""

    bandwidth: dict[str, float]
    overhead: dict[str, float]
    base: float  # seconds per collective, without the hops
    hop: float  # seconds added by each doubling of the ranks
    link: float  # bytes/s that a GPU sends within its node
    node: int = 8  # GPUs per node
    internode: float = 0.0  # seconds added to a collective between nodes
    memory: float = 80e9  # bytes per GPU


@dataclass(frozen=True)
class Cost:
    """The cost of a token: seconds for weights, overhead and collectives, and the bytes of a rank's weights."""

    weights: float
    overhead: float
    collectives: float
    nbytes: float

    @property
    def tokens_per_s(self) -> float:
        return 1 / (self.weights + self.overhead + self.collectives)


def weight_bytes(args: ModelArgs, n_ranks: int, kind: str, shard_vocabulary: bool) -> float:
    """Bytes of weights that a rank reads per token. gpt-fast does not shard the vocabulary (the output projection)."""
    with torch.device("meta"):
        share = Transformer(replace(divided(args, n_ranks), n_layers=1))
    layer = sum(p.numel() for p in share.layers.parameters())
    output = args.dim * (share.output.out_features if shard_vocabulary else args.vocab_size)
    return WEIGHT_BYTES[kind] * (args.n_layers * layer + output)


def collective_bytes(args: ModelArgs, n_ranks: int) -> float:
    """Bytes that a rank sends in a ring all-reduce of one token's activations in bf16."""
    return 2 * (n_ranks - 1) / n_ranks * 2 * args.dim


def predict(machine: Machine, model: str, n_ranks: int, kind: str = "bf16", shard_vocabulary: bool = True) -> Cost:
    """The cost of a token of the preset `model` with weights of `kind` on `n_ranks` GPUs."""
    args = preset(model)
    nbytes = weight_bytes(args, n_ranks, kind, shard_vocabulary)
    collectives = 0.0
    if n_ranks > 1:
        count = 2 * args.n_layers + (2 if shard_vocabulary else 0)  # the embedding's all-reduce, the logits' all-gather
        latency = machine.base + machine.hop * math.log2(n_ranks) + machine.internode * (n_ranks > machine.node)
        collectives = count * (latency + collective_bytes(args, n_ranks) / machine.link)
    return Cost(nbytes / machine.bandwidth[kind], args.n_layers * machine.overhead[kind], collectives, nbytes)


def fit(models: list[str], link: float = 300e9) -> Machine:
    """Fit bf16 to the published rows of `models` by least squares of the relative errors, int8 and int4 exactly."""
    rows, seconds = [], []
    for model in models:
        args = preset(model)
        for n, tokens_per_s in PUBLISHED[model, "bf16"].items():
            count = 2 * args.n_layers * (n > 1)
            rows.append([weight_bytes(args, n, "bf16", False), args.n_layers, count, count * math.log2(n)])
            seconds.append(1 / tokens_per_s - count * collective_bytes(args, n) / link)
    seconds = torch.tensor(seconds, dtype=torch.float64)
    scale = torch.tensor([1e-12, 1e-5, 1e-6, 1e-6], dtype=torch.float64)
    system = torch.tensor(rows, dtype=torch.float64) * scale / seconds[:, None]
    per_byte, overhead, base, hop = (torch.linalg.lstsq(system, torch.ones_like(seconds)).solution * scale).tolist()
    bandwidths, overheads = {"bf16": 1 / per_byte}, {"bf16": overhead}
    for kind in ("int8", "int4"):  # two models on one GPU, two unknowns
        sizes = [preset(model) for model in ("llama-2-7b", "llama-2-70b")]
        system = torch.tensor([[weight_bytes(a, 1, kind, False) * 1e-12, a.n_layers * 1e-5] for a in sizes])
        times = torch.tensor([1 / PUBLISHED[model, kind][1] for model in ("llama-2-7b", "llama-2-70b")])
        per_byte, per_layer = torch.linalg.solve(system.double(), times.double()).tolist()
        bandwidths[kind], overheads[kind] = 1 / (per_byte * 1e-12), per_layer * 1e-5
    return Machine(bandwidths, overheads, base, hop, link)


def h100(a100: Machine) -> Machine:
    """An H100, assumed to be an A100 with faster memory (3350 instead of 2039 GB/s) and links (450 GB/s).

    It is assumed to reach the same share of its nominal bandwidth, with the same overhead per layer and latency per
    collective. Between nodes, over InfiniBand, a collective is assumed to take 20 us more.
    """
    bandwidth = {kind: value * 3350 / 2039 for kind, value in a100.bandwidth.items()}
    return replace(a100, bandwidth=bandwidth, link=450e9, internode=20e-6)


def check_table(machine: Machine) -> list[tuple[str, str, int, float, float]]:
    """Model, weights, GPUs, published and predicted tokens per second, for every published figure."""
    return [
        (model, kind, n, published, predict(machine, model, n, kind, shard_vocabulary=False).tokens_per_s)
        for (model, kind), by_gpus in PUBLISHED.items()
        for n, published in by_gpus.items()
    ]


def describe(machine: Machine) -> str:
    numbers = (f"{k} {b / 1e9:.0f} GB/s and {machine.overhead[k] * 1e6:.0f} us" for k, b in machine.bandwidth.items())
    return f"{', '.join(numbers)} per layer; {machine.base * 1e6:.1f} + {machine.hop * 1e6:.1f} log2(ranks) us"


def main() -> None:
    held_out, every = fit(["llama-2-7b"]), fit(["llama-2-7b", "llama-2-70b"])
    print(f"A100s, bf16 fitted to the 7B rows: {describe(held_out)} per collective\n")
    print("| model | weights | A100s | published | model | difference |\n|---|---|---|---|---|---|")
    for model, kind, n, published, predicted in check_table(held_out):
        difference = f"{predicted / published - 1:+.1%}"
        fitted = model == "llama-2-7b" or kind != "bf16" and n == 1
        remark = "fitted" if fitted else difference
        print(f"| {model} | {kind} | {n} | {published:.1f} | {predicted:.1f} | {remark} |")
    print(f"\nH100s, from a fit to all bf16 rows: {describe(h100(every))} per collective\n")
    print("| model | weights | H100s | GB per GPU | tokens/s | in collectives |\n|---|---|---|---|---|---|")
    for model in ("llama-3.1-70b", "llama-3.1-405b"):
        for kind in WEIGHT_BYTES:
            for n in (8, 16):
                cost = predict(machine := h100(every), model, n, kind)
                gpus = "8" if n == 8 else "2 x 8"
                rate, share = f"{cost.tokens_per_s:.0f}", f"{cost.collectives * cost.tokens_per_s:.0%}"
                if cost.nbytes > 0.9 * machine.memory:
                    rate, share = "does not fit", "-"
                print(f"| {model} | {kind} | {gpus} | {cost.nbytes / 1e9:.1f} | {rate} | {share} |")


if __name__ == "__main__":
    main()
