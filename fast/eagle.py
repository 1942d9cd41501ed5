"""EAGLE-3 heads (Li et al. 2025): one layer of a Llama that drafts a chain of tokens, each from the one before.

At each position a head takes the target's states there and the token after it, and predicts the token after that one;
to draft on, it takes what leaves its own layer in the states' place. Its vocabulary is the target's most frequent
tokens. Here it drafts a chain, not a tree.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fast.compiling import compile_step
from fast.heads import Head, HeadDraft, at
from fast.metrics import bytes_per_step
from fast.sampling import Sampling
from kernels.gpu import choice
from model import Linear, ModelArgs, RMSNorm, Transformer, TransformerBlock


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


class EagleHead(Head):
    """As `Head`. n_fc_norms: of the states before `fc`: 0, 1 over all of them, or one for each.

    norm_output: the last norm comes before what leaves the head, not after.
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
        super().__init__(args, target_dim, hidden_at, own_vocab_size)
        self.layers[0] = FirstLayer(args, norm_before_residual)
        width = self.fc.in_features
        self.fc_norm = nn.ModuleList(RMSNorm(width // n_fc_norms, args.norm_eps) for _ in range(n_fc_norms))
        self.last_norm = nn.Identity()
        if norm_output:
            self.last_norm, self.norm = self.norm, nn.Identity()

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
        both = torch.cat((self.embed(idx), hidden), -1)
        return self.last_norm(self.run_layers(both, input_pos, kv_pos)[0])

    def read(self, idx: Tensor, hidden: Tensor, input_pos: Tensor, kv_pos: Tensor) -> Tensor:
        """What leaves the head at positions of the text, see `Head`."""
        return self(idx, self.fuse(hidden), input_pos, kv_pos)


class EagleDraft(HeadDraft):
    """Drafts k tokens, or as many as pay for "auto": the first from the text, the others from the one before each."""

    def __init__(
        self, head: EagleHead, target: Transformer, sampling: Sampling, k: int | str = "auto", compile: bool = False
    ):
        super().__init__(head, target, sampling, self.ks if k == "auto" else (k,), compile)
        self._first, self._next = self._first_draft, self._next_draft
        if compile:
            self._first = compile_step(self._first_draft, (None,))
            self._next = compile_step(self._next_draft, (None, None, None, 0))

    def time_kernels(self, n_rows: int) -> None:
        """As `decoding.time_kernels`, for reading the text and for the drafts after the first."""
        if self.text.is_cuda:
            zeros, slots = self.text.new_zeros(n_rows, 1), self.model.slots
            with torch.cuda.device_of(zeros):
                x = self.hidden.new_zeros(n_rows, 1, self.model.args.dim)
                choice.measure(self._read_text, zeros, zeros + 1, slots)
                choice.measure(self._next_draft, zeros, x, zeros + 1, slots)

    def _drafts(self, k: int, token: Tensor, input_pos: Tensor, kv_pos: Tensor) -> tuple[Tensor, ...]:
        x = self._read_step(token, input_pos, kv_pos)
        found = [self._first(x)]
        for i in range(k - 1):
            x, *drawn = self._next(found[-1][0], x, input_pos + i, kv_pos)
            found.append(drawn)
        return tuple(torch.cat(parts, 1) for parts in zip(*found, strict=True))

    def _read_text(self, token: Tensor, input_pos: Tensor, kv_pos: Tensor) -> Tensor:
        """What leaves the head, `[B, 1, dim]`, where the text's last `token` follows."""
        x, positions = self._read(token, input_pos, kv_pos)
        return at(x, input_pos - 1 - positions[:, :1])

    def _first_draft(self, x: Tensor) -> tuple[Tensor, ...]:
        """The first draft, `[B, 1]`, and its distribution, `[B, 1, V]`."""
        return self._drawn(self.model.logits(x))

    def _next_draft(self, draft: Tensor, x: Tensor, input_pos: Tensor, kv_pos: Tensor) -> tuple[Tensor, ...]:
        """What left the head, `[B, 1, dim]`, and as `_first_draft`."""
        x = self.model(draft, x, input_pos, kv_pos)
        return x, *self._drawn(self.model.logits(x))

    def bytes_per_step(self, k: int, batch_size: int, positions: float) -> float:
        """Bytes that drafting k tokens reads; `fc` is read once."""
        fc = sum(tensor.nbytes for tensor in self.model.fc.state_dict().values())
        return k * bytes_per_step(self.model, batch_size, positions) - max(0, k - 1) * fc
