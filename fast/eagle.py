"""EAGLE-3 heads (Li et al. 2025), published drafts that read the hidden states of the model they draft for.

    head = load_head("checkpoints/lmsys/sglang-EAGLE3-LLaMA3.1-Instruct-8B", target)
    drafter = EagleDraft(head, target, sampling)
    steps = build_steps(target, sampling, run=drafter.run)

A head is one layer of a Llama. At each position it takes what some of the target's layers hold there, three as a rule,
and the token after it, and predicts the token after that one; to draft on, it takes what leaves its own layer in the
states' place. Its vocabulary is the target's most frequent tokens. Here it drafts a chain, not a tree.

Worth knowing: `EagleDraft` keeps the states of the last positions alone, in a ring. Before it drafts, the head reads as
many positions as the longest step brings, whatever a row accepted: so shapes stay the same, and the host need not know.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tp
from fast.checkpoint import fill, match, read_hf, weight_files
from fast.compiling import compile_step
from fast.config import HfConfig, read
from fast.drafting import Chain
from fast.families import HF_MODULES, Naming, args_from_hf
from fast.metrics import bytes_per_step
from fast.reading import check, read_json, reading
from fast.sampling import Sampling, draw
from fast.stored import Part, Stored
from kernels.gpu import choice
from model import Linear, ModelArgs, RMSNorm, Sharding, Transformer, TransformerBlock


class FirstLayer(nn.Module):
    """A layer whose attention sees a token's embedding beside a hidden state: `[B, S, 2 dim]` to `[B, S, dim]`."""

    def __init__(self, args: ModelArgs, norm_before_residual: bool):
        super().__init__()
        self.embedding_norm, self.hidden_norm = (RMSNorm(args.dim, args.norm_eps) for _ in range(2))
        self.norm_before_residual = norm_before_residual
        self.block = TransformerBlock(args)
        self.block.attention_norm = nn.Identity()
        wqkv = self.attention.wqkv
        self.attention.wqkv = Linear(2 * args.dim, wqkv.out_features, args.qkv_bias, wqkv.sharding)

    @property
    def attention(self) -> nn.Module:
        return self.block.attention

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        embedding, hidden = x.chunk(2, -1)
        normed = self.hidden_norm(hidden)
        both = torch.cat((self.embedding_norm(embedding), normed), -1)
        residual = normed if self.norm_before_residual else hidden.contiguous()  # kernels read nothing else
        return self.block(both, *others, residual=residual)


class EagleHead(Transformer):
    """The head for a target's hidden states `hidden_at`, as `Transformer.forward` takes them, each `target_dim` wide.

    args: of its layers; `vocab_size` is the target's. own_vocab_size: what it predicts.
    n_fc_norms: of the states before `fc`: 0, 1 over all of them, or one for each. norm_output: the last norm comes
        before what leaves the head, not after.
    """

    def __init__(
        self,
        args: ModelArgs,
        target_dim: int,
        hidden_at: tuple[int, ...],
        own_vocab_size: int,
        norm_before_residual: bool = False,
        norm_output: bool = False,
        n_fc_norms: int = 0,
    ):
        super().__init__(args)
        self.hidden_at, self.n_parameters = hidden_at, 0
        self.layers[0] = FirstLayer(args, norm_before_residual)
        width = len(hidden_at) * target_dim
        self.fc_norm = nn.ModuleList(RMSNorm(width // n_fc_norms, args.norm_eps) for _ in range(n_fc_norms))
        self.fc = Linear(width, args.dim, False, Sharding())
        self.output = Linear(args.dim, own_vocab_size, False, Sharding(collective="gather"))
        self.last_norm = nn.Identity()
        if norm_output:
            self.last_norm, self.norm = self.norm, nn.Identity()
        self.register_buffer("ids", torch.arange(own_vocab_size), persistent=False)  # the target's, of its own tokens

    def fuse(self, hidden: Tensor) -> Tensor:
        """The target's hidden states side by side, `[B, S, len(hidden_at) * target_dim]`, as one, `[B, S, dim]`."""
        if self.fc_norm:
            parts = hidden.chunk(len(self.fc_norm), -1)
            hidden = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        return self.fc(hidden)

    def forward(self, idx: Tensor, hidden: Tensor, input_pos: Tensor | None = None, kv_pos: Tensor | None = None):
        """What leaves the head, `[B, S, dim]`: see `logits`; it is the next position's `hidden` if that is a draft's.

        idx: the tokens after the positions `input_pos`, `[B, S]`. hidden: of the positions, from `fuse`, `[B, S, dim]`.
        """
        embeddings = self.tok_embeddings(idx.clamp(0, self.args.vocab_size - 1))
        return self.last_norm(self.run_layers(torch.cat((embeddings, hidden), -1), input_pos, kv_pos)[0])

    def logits(self, x: Tensor) -> Tensor:
        """`[B, S, own_vocab_size]`, of the token that follows `idx`."""
        return self.output(self.norm(x))


def load_head(
    path: str | os.PathLike,
    target: Transformer,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    ranks: tp.Ranks = tp.ALONE,
) -> EagleHead:
    """The EAGLE-3 head in the directory `path`, whole on every rank; without embeddings of its own it has `target`'s.

    SafeAILab's and SpecForge's layout (`midlayer.*`), or that of `speculators` (`layers.0.*`, and the layer's
    configuration in `transformer_layer_config`). Raises ValueError if it is not complete, or not for such a target.
    """
    path = Path(path)
    with reading(path):
        head, ids, tensors = _open_head(path, target)
    if ranks.world_size > 1:
        tp.connect(head, head, ranks)  # rank 0's logits are broadcast
    fill(head, tensors, {}, device, dtype)
    head.ids = ids.to(device)
    head.n_parameters = sum(torch.Size(stored.shape).numel() for stored in tensors.values())
    return head


def _open_head(path: Path, target: Transformer) -> tuple[EagleHead, Tensor, dict[str, Stored]]:
    """The head without its weights, the target's ids of its tokens, and the weights."""
    with reading(path / "config.json"):
        head = _skeleton(read_json(path / "config.json"), target)
    if not (files := weight_files(path)):
        raise ValueError(f"{path} has no *.safetensors and no pytorch_model*.bin")
    found = read_hf(files)
    parts = {name.removeprefix("model."): part for name, part in found.items()}
    if len(parts) < len(found):
        raise ValueError(f"{path}: it has tensors with and without `model.` before the same name")
    if "embed_tokens.weight" not in parts:
        if head.args.dim != target.args.dim:
            sizes = f"{head.args.dim} wide, its target {target.args.dim}"
            raise ValueError(f"{path} has no embed_tokens.weight, and the target's do not fit: it is {sizes}")
        shared, own = target.tok_embeddings, head.tok_embeddings  # without the target's scale, as it was trained
        own.weight, own.lookup = shared.weight, shared.lookup
    ids = _target_ids(path, parts, head)
    first = "midlayer" if any(name.startswith("midlayer.") for name in parts) else "layers.0"
    return head, ids, match(path, head, parts, _naming(first, len(head.fc_norm) == 1))


def _skeleton(config: dict[str, Any], target: Transformer) -> EagleHead:
    """The head without its weights."""
    args = args_of_head(config)
    if args.vocab_size != target.args.vocab_size:
        sizes = f"{args.vocab_size} embeddings, this one has {target.args.vocab_size}"
        raise ValueError(f"a head for a model with {sizes}; a head serves only the model it was trained for")
    if target.args.logits_scale != 1.0:
        raise ValueError("no head can serve a Granite model here: its hidden states have another scale")
    hidden_at = _hidden_at(config, target.args.n_layers)
    norms = {name: read(config, name, bool, False) for name in ("norm_before_fc", "fc_norm")}
    if all(norms.values()):
        raise ValueError("norm_before_fc and fc_norm are both true; expected one of them")
    with torch.device("meta"):
        return EagleHead(
            replace(args, context_length=target.args.context_length),  # beyond its own it accepts less
            target.args.dim,
            hidden_at,
            read(config, "draft_vocab_size", int, args.vocab_size),
            read(config, "norm_before_residual", bool, False),
            read(config, "norm_output", bool, False),
            norms["norm_before_fc"] + norms["fc_norm"] * len(hidden_at),
        )


def args_of_head(config: dict[str, Any]) -> ModelArgs:
    """The arguments of a head's layers, whose `vocab_size` is the target's. Raises ValueError as `args_from_hf`."""
    check(config, HfConfig)
    inner = config.get("transformer_layer_config", config)
    if (found := inner.get("model_type")) not in ("llama", "qwen3"):
        raise ValueError(f"the head's layers are of type {found!r:.80}; supported: llama, qwen3")
    if config.get("quantization_config"):
        raise ValueError("a quantised head (quantization_config) is not supported")
    args = args_from_hf({**inner, "architectures": None, "tie_word_embeddings": False})
    types = inner.get("layer_types") or []  # of llama, too: `speculators` makes it slide
    if sliding := tuple(i for i, kind in enumerate(types) if kind == "sliding_attention"):
        window = read(inner, "sliding_window", int)
        args = replace(args, sliding_window=window, sliding_layers=sliding if len(sliding) < len(types) else None)
    return args


def _hidden_at(config: dict[str, Any], n_layers: int) -> tuple[int, ...]:
    """The layers of the target whose inputs the head takes; SpecForge names those before them, by their outputs."""
    key, eagle = "eagle_aux_hidden_state_layer_ids", config.get("eagle_config") or {}
    found, offset = (eagle[key], 1) if eagle.get(key) is not None else (config.get(key), 0)
    found = [2, n_layers // 2, n_layers - 3] if found is None else found
    fits = isinstance(found, list) and found and all(type(i) is int and 0 <= i + offset <= n_layers for i in found)
    if not fits or found != sorted(set(found)):
        wanted = f"ascending numbers of the target's {n_layers} layers"
        raise ValueError(f"{key} is {found!r:.80}; expected {wanted}")
    return tuple(i + offset for i in found)


def _target_ids(path: Path, parts: dict[str, Part], head: EagleHead) -> Tensor:
    """The target's ids of the head's own tokens: `d2t` holds how much each differs."""
    own, target = head.output.out_features, head.args.vocab_size
    parts.pop("t2d", None)
    d2t = parts.pop("d2t", None)
    if d2t is None and own == target:
        return torch.arange(target)
    if d2t is None or d2t.shape != (own,) or d2t.dtype not in (torch.int64, torch.int32):
        found = "no d2t" if d2t is None else f"a d2t of {list(d2t.shape)} in {d2t.dtype}"
        raise ValueError(f"{path} has {found}; expected integers, one for each of its {own} tokens")
    ids = torch.arange(own) + d2t.read()
    if ids.amin() < 0 or ids.amax() >= target or len(ids.unique()) < own:
        raise ValueError(f"{path}: d2t does not lead to {own} different tokens of the target's {target}")
    return ids


def _naming(first: str, one_fc_norm: bool) -> Naming:
    """The names of a head's tensors; `first`: of its first layer."""
    modules = {}
    for ours, theirs in HF_MODULES.items():
        modules[ours] = tuple(name.removeprefix("model.") for name in theirs)
        inside = tuple(name.replace("layers.{}", first) for name in modules[ours])
        modules[ours.replace("layers.{}", "layers.{}.block")] = inside
    modules["layers.{}.embedding_norm"] = (f"{first}.input_layernorm",)
    modules["layers.{}.hidden_norm"] = (f"{first}.hidden_norm",)
    return Naming({**modules, "last_norm": ("norm",), **({"fc_norm.0": ("input_norm",)} if one_fc_norm else {})})


class EagleDraft(Chain):
    """Drafts by a head. The target must be called by `run`; the caches of both are set up with spare slots.

    k: the drafts of a step, or "auto".
    """

    def __init__(
        self, head: EagleHead, target: Transformer, sampling: Sampling, k: int | str = "auto", compile: bool = False
    ):
        super().__init__(head, sampling, compile)
        self.target, self.vocab_size = target, target.args.vocab_size
        self.window = 1 + (max(self.ks) if k == "auto" else k)  # positions that the head reads at once
        self.size, slots = 2 * self.window, target.slots  # of the ring: drafts that were rejected are in it, too
        shape, weight = (target.max_batch_size, self.size), target.tok_embeddings.weight
        width = len(head.hidden_at) * target.args.dim
        self.register_buffer("text", slots.new_full((*shape, 2), -1))  # ids and their positions
        self.register_buffer("hidden", torch.zeros(*shape, width, device=weight.device, dtype=weight.dtype))
        self._unread = 0  # positions whose states the head may not have read
        self._first, self._next = self._first_draft, self._next_draft
        if compile:
            self._first = compile_step(self._first_draft, (None, None, 0))
            self._next = compile_step(self._next_draft, (None, None, None, 0))

    def run(self, idx: Tensor, input_pos: Tensor, kv_pos: Tensor, logits_at: Tensor | None = None) -> Tensor:
        """The target's logits. Its hidden states are noted; those of a prompt (`logits_at`) are read at once.

        The last position's token is not known yet: it is read again.
        """
        logits, hidden = self.target(idx, input_pos, kv_pos, logits_at, self.model.hidden_at)
        positions = input_pos.expand_as(idx)
        if logits_at is not None:
            self.model(idx.roll(-1, 1), self.model.fuse(hidden), positions, kv_pos)
            last = logits_at + torch.arange(1 - self.window, 1, device=idx.device)
            last = last.clamp(min=0)
            idx, positions, hidden = idx.gather(1, last), positions.gather(1, last), _at(hidden, last)
        rows = torch.arange(len(idx), device=idx.device)[:, None]
        self.text[rows, positions % self.size] = torch.stack((idx, positions), -1)
        self.hidden[rows, positions % self.size] = hidden
        return logits

    def time_kernels(self, n_rows: int) -> None:
        """As `decoding.time_kernels`, for the first draft and those after it."""
        if self.text.is_cuda:
            zeros, slots = self.text.new_zeros(n_rows, 1), self.model.slots
            with torch.cuda.device_of(zeros):
                x = self.hidden.new_zeros(n_rows, 1, self.model.args.dim)
                choice.measure(self._first_draft, zeros, zeros + 1, slots)
                choice.measure(self._next_draft, zeros, x, zeros + 1, slots)

    def begin(self, prompts: list[list[int]], cached: int, layout: tuple[Tensor, ...]) -> None:
        """Read the last positions before `cached`, if the ring holds them; `run` reads the prompts."""
        idx, _, kv_pos, _ = layout
        positions = torch.arange(max(0, cached - self.window), cached, device=idx.device)
        if cached and self.text[: len(idx), positions % self.size, 1].eq(positions).all():
            self._read(idx[:, :1], torch.full_like(idx[:, :1], cached), kv_pos)
        self._unread = 0

    def follow(self, previous: Tensor, input_pos: Tensor, kv_pos: Tensor) -> None:
        """Note that a step brought the tokens up to `input_pos [B, 1]`, where `previous [B, 1]` is the last but one."""
        self._unread += 1
        if self._unread > self.window:  # else the ring would lose what the head has not read
            self._first(previous, input_pos - 1, kv_pos)
            self._unread = 1

    def draft(self, k: int, token: Tensor, input_pos: Tensor, kv_pos: Tensor) -> tuple[Tensor, ...]:
        """As `DraftModel.draft`."""
        self._unread = k
        return self._chained(k, token, input_pos, kv_pos)

    def _drafts(self, k: int, token: Tensor, input_pos: Tensor, kv_pos: Tensor) -> tuple[Tensor, ...]:
        x, *drawn = self._first(token, input_pos, kv_pos)
        found = [drawn]
        for i in range(k - 1):
            x, *drawn = self._next(found[-1][0], x, input_pos + i, kv_pos)
            found.append(drawn)
        return tuple(torch.cat(parts, 1) for parts in zip(*found, strict=True))

    def _read(self, token: Tensor, input_pos: Tensor, kv_pos: Tensor) -> Tensor:
        """Read the positions before `token [B, 1]`; what leaves the head at the last of them, `[B, 1, dim]`."""
        positions = (input_pos - self.window).clamp(min=0) + torch.arange(self.window, device=token.device)
        rows = torch.arange(len(token), device=token.device)[:, None]
        idx = torch.where(positions + 1 == input_pos, token, self.text[rows, (positions + 1) % self.size, 0])
        x = self.model(idx, self.model.fuse(self.hidden[rows, positions % self.size]), positions, kv_pos)
        return _at(x, input_pos - 1 - positions[:, :1])

    def _first_draft(self, token: Tensor, input_pos: Tensor, kv_pos: Tensor) -> tuple[Tensor, ...]:
        """Read up to the text's last `token`, then draft as `_next_draft` does."""
        return self._drawn(self._read(token, input_pos, kv_pos))

    def _next_draft(self, draft: Tensor, x: Tensor, input_pos: Tensor, kv_pos: Tensor) -> tuple[Tensor, ...]:
        """What left the head, `[B, 1, dim]`, the next draft, `[B, 1]`, and its distribution, `[B, 1, V]`."""
        return self._drawn(self.model(draft, x, input_pos, kv_pos))

    def _drawn(self, x: Tensor) -> tuple[Tensor, ...]:
        logits, ids = self.model.logits(x), self.model.ids
        if self.sampling.temperature == 0:
            own, q = self.sampling(logits), ()
        else:
            own_q = self.sampling.probs(logits)
            own, q = draw(own_q), (own_q.new_zeros(*own_q.shape[:2], self.vocab_size).index_copy(2, ids, own_q),)
        return x, torch.where(own < 0, own, ids[own.clamp(min=0)]), *q

    def bytes_per_step(self, k: int, batch_size: int, positions: float) -> float:
        """Bytes that drafting k tokens reads; `fc` is read once."""
        fc = sum(tensor.nbytes for tensor in self.model.fc.state_dict().values())
        return k * bytes_per_step(self.model, batch_size, positions) - max(0, k - 1) * fc


def _at(x: Tensor, index: Tensor) -> Tensor:
    """`x [B, S, n]` at `index [B, N]` along S."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
