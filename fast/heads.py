"""What the published heads share that draft for one model from its hidden states: `eagle.py` and `dflash.py`.

    head = load_head("checkpoints/z-lab/Qwen3-8B-DFlash-b16", target)  # head_files.py
    drafter = DFlashDraft(head, target, sampling)
    steps = build_steps(target, sampling, run=drafter.run)

A head takes what some of the target's layers hold at each position, as a rule three to five of them, made one vector by
its `fc`. It may use the target's own embeddings and output projection, and its vocabulary may be a part of the
target's.

Worth knowing: `HeadDraft` keeps the states of the last positions alone, in a ring. Before it drafts, the head reads as
many positions as the longest step brings, whatever a row accepted: so shapes stay the same, and the host need not know.
"""

import torch
from torch import Tensor

from fast.compiling import compile_step
from fast.drafting import Chain
from fast.layers import NormedOutput
from fast.sampling import Sampling, draw
from model import Linear, ModelArgs, Sharding, Transformer


class Head(Transformer):
    """A head for a target's hidden states `hidden_at`, as `Transformer.forward` takes them, each `target_dim` wide.

    args: of its layers; `vocab_size` is the target's. own_vocab_size: what it predicts; `ids` are the target's of it.
    A subclass has `read(idx, hidden, input_pos, kv_pos)`, which stores what drafting needs of these positions: `hidden`
    are the target's states there, `[B, S, len(hidden_at) * target_dim]`, `idx` the tokens after them, `[B, S]`.
    """

    def __init__(self, args: ModelArgs, target_dim: int, hidden_at: tuple[int, ...], own_vocab_size: int):
        super().__init__(args)
        self.hidden_at, self.n_parameters = hidden_at, 0
        self.fc = Linear(len(hidden_at) * target_dim, args.dim, False, Sharding())
        self.output = Linear(args.dim, own_vocab_size, False, Sharding(collective="gather"))
        self.register_buffer("ids", torch.arange(own_vocab_size), persistent=False)

    def share_embeddings(self, target: Transformer) -> None:
        """Use the target's, without its scale, as heads are trained."""
        own, shared = self.tok_embeddings, target.tok_embeddings
        own.weight, own.lookup = shared.weight, shared.lookup

    def share_output(self, target: Transformer) -> None:
        """Use the target's output projection, quantised or divided as it is."""
        self.output = target.output.linear if isinstance(target.output, NormedOutput) else target.output

    def embed(self, idx: Tensor) -> Tensor:
        return self.tok_embeddings(idx.clamp(0, self.args.vocab_size - 1))  # -1 stands for logits that are no numbers

    def logits(self, x: Tensor) -> Tensor:
        """`[B, S, own_vocab_size]`, of what leaves the last layer."""
        logits = self.output(self.norm(x))
        return logits if self.args.logits_scale == 1.0 else logits * self.args.logits_scale


class HeadDraft(Chain):
    """Drafts by a head. The target must be called by `run`; the caches of both are set up with spare slots.

    ks: how many a step may draft. A subclass has `_drafts`, as `Chain` says, and `_read_text`, which calls `_read` and
    returns a tensor; `_read_step` is the latter, compiled if that is asked for.
    """

    def __init__(self, head: Head, target: Transformer, sampling: Sampling, ks: tuple[int, ...], compile: bool = False):
        super().__init__(head, sampling, compile)
        self.target, self.vocab_size = target, target.args.vocab_size
        self.ks, self.window = ks, 1 + max(ks)  # the positions that the head reads at once
        self.size, slots = 2 * self.window, target.slots  # of the ring: drafts that were rejected are in it, too
        shape, weight = (target.max_batch_size, self.size), target.tok_embeddings.weight
        width = len(head.hidden_at) * target.args.dim
        self.register_buffer("text", slots.new_full((*shape, 2), -1))  # ids and their positions
        self.register_buffer("hidden", torch.zeros(*shape, width, device=weight.device, dtype=weight.dtype))
        self.register_buffer("first", slots.new_zeros(()))  # position that the ring may hold; those before it are read
        self._read_step = compile_step(self._read_text, (None, None, 0)) if compile else self._read_text
        self._unread = 0  # positions whose states the head may not have read

    def run(self, idx: Tensor, input_pos: Tensor, kv_pos: Tensor, logits_at: Tensor | None = None) -> Tensor:
        """The target's logits. Its hidden states are noted; those of a prompt (`logits_at`) are read at once.

        The last position's token is not known yet: it is read again.
        """
        logits, hidden = self.target(idx, input_pos, kv_pos, logits_at, self.model.hidden_at)
        positions = input_pos.expand_as(idx)
        if logits_at is not None:
            self.text.fill_(-1)  # no state of an earlier text must be taken for one of this
            self.model.read(idx.roll(-1, 1), hidden, positions, kv_pos)
            last = logits_at + torch.arange(1 - self.window, 1, device=idx.device)
            last = last.clamp(min=0)
            idx, positions, hidden = idx.gather(1, last), positions.gather(1, last), at(hidden, last)
        rows = torch.arange(len(idx), device=idx.device)[:, None]
        self.text[rows, positions % self.size] = torch.stack((idx, positions), -1)
        self.hidden[rows, positions % self.size] = hidden
        return logits

    def begin(self, prompts: list[list[int]], cached: int, layout: tuple[Tensor, ...]) -> None:
        """Read the last positions before `cached`, as far as the ring holds them; `run` reads the prompts."""
        idx, _, kv_pos, _ = layout
        first = min(cached, max(cached - self.window, int(self.first)))
        positions = torch.arange(first, cached, device=idx.device)
        is_held = self.text[: len(idx), positions % self.size, 1].eq(positions).all(0)
        if n_held := int(is_held.flip(0).cumprod(0).sum()):
            self.first.fill_(cached - n_held)
            self._read(idx[:, :1], torch.full_like(idx[:, :1], cached), kv_pos)
        self.first.fill_(cached)
        self._unread = 0

    def follow(self, previous: Tensor, input_pos: Tensor, kv_pos: Tensor) -> None:
        """Note that a step brought the tokens up to `input_pos [B, 1]`, where `previous [B, 1]` is the last but one."""
        self._unread += 1
        if self._unread > self.window:  # else the ring would lose what the head has not read
            self._read_apart(previous, input_pos - 1, kv_pos)
            self._unread = 1

    def draft(self, k: int, token: Tensor, input_pos: Tensor, kv_pos: Tensor) -> tuple[Tensor, ...]:
        """As `DraftModel.draft`."""
        self._unread = k
        return self._chained(k, token, input_pos, kv_pos)

    def _read(self, token: Tensor, input_pos: Tensor, kv_pos: Tensor) -> tuple[Tensor, Tensor]:
        """Read the positions before `token [B, 1]`: what `Head.read` gives, and the positions, `[B, window]`."""
        positions = torch.maximum(input_pos - self.window, self.first) + torch.arange(self.window, device=token.device)
        rows = torch.arange(len(token), device=token.device)[:, None]
        idx = torch.where(positions + 1 == input_pos, token, self.text[rows, (positions + 1) % self.size, 0])
        return self.model.read(idx, self.hidden[rows, positions % self.size], positions, kv_pos), positions

    def _drawn(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Drafts, int `[B, S]`, and unless temperature is 0 their distributions, `[B, S, V]`, by `Head.logits`."""
        ids = self.model.ids
        if self.sampling.temperature == 0:
            own, q = self.sampling(logits), ()
        else:
            own_q = self.sampling.probs(logits)
            own, q = draw(own_q), (own_q.new_zeros(*own_q.shape[:2], self.vocab_size).index_copy(2, ids, own_q),)
        return torch.where(own < 0, own, ids[own.clamp(min=0)]), *q


def at(x: Tensor, index: Tensor) -> Tensor:
    """`x [B, S, n]` at `index [B, N]` along S."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
