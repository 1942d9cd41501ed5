"""DFlash heads (Chen et al. 2026): a few layers of a Qwen 3 that draft a block of tokens in one pass.

The block is the text's last token and a mask token for each draft. Its queries see each other and the text before it,
of which every layer's keys and values come from the target's states: what the head itself computes of one block is
thrown away. A draft does not know which tokens were drafted before it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.compiling import compile_step
from fast.drafting import MAX_K
from fast.heads import Head, HeadDraft
from fast.metrics import bytes_per_step
from fast.sampling import Sampling
from kernels.gpu import choice
from model import ModelArgs, RMSNorm, Transformer, attention_mask, last_seen


class DFlashHead(Head):
    """As `Head`. mask_id: the token that stands for a draft. max_k: drafts of the blocks that it was trained with.

    from_last: the text's last token predicts the first draft, so that a block has one mask less; else its own
        prediction goes unused. sliding_is_causal: in layers with a sliding window a query sees nothing after it.
    """

    def __init__(
        self,
        args: ModelArgs,
        hidden_at: tuple[int, ...],
        own_vocab_size: int,
        mask_id: int,
        max_k: int,
        from_last: bool = False,
        sliding_is_causal: bool = True,
    ):
        super().__init__(args, args.dim, hidden_at, own_vocab_size)
        self.mask_id, self.max_k, self.from_last = mask_id, max_k, from_last
        self.hidden_norm = RMSNorm(args.dim, args.norm_eps)
        self.is_causal = [bool(kind.sliding_window) and sliding_is_causal for kind in self.kinds]
        for layer, kind in zip(self.layers, self.kind_of_layer, strict=True):
            layer.attention.is_causal = self.is_causal[kind]

    def read(self, idx: Tensor, hidden: Tensor, input_pos: Tensor, kv_pos: Tensor) -> Tensor:
        """Store every layer's keys and values of positions of the text, see `Head`; neither tokens nor slots matter."""
        x, tables = self.hidden_norm(self.fc(hidden)), self._tables(input_pos)
        for layer, kind in zip(self.layers, self.kind_of_layer, strict=True):
            attention = layer.attention
            attention.kv_cache.write(input_pos, *attention.heads(attention.wqkv(x), *tables[kind])[1:])
        return x

    def forward(self, block: Tensor, input_pos: Tensor, kv_pos: Tensor) -> Tensor:
        """What leaves the last layer for the tokens `block [B, S]` from the positions `input_pos [B, 1]` on."""
        positions = input_pos + torch.arange(block.shape[1], device=block.device)
        tables, n_slots, x = self._tables(positions), kv_pos.shape[0], self.embed(block)
        masks = [
            attention_mask(kind, last_seen(positions, is_causal), kv_pos)
            for kind, is_causal in zip(self.kinds, self.is_causal, strict=True)
        ]
        for layer, kind in zip(self.layers, self.kind_of_layer, strict=True):
            x = layer(x, *tables[kind], positions, n_slots, masks[kind])
        return x

    def _tables(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(cos[positions], sin[positions]) for cos, sin in zip(self.cos, self.sin, strict=True)]


class DFlashDraft(HeadDraft):
    """Drafts k tokens at once, or as many as pay for "auto". ValueError for more than the head was trained for."""

    def __init__(
        self, head: DFlashHead, target: Transformer, sampling: Sampling, k: int | str = "auto", compile: bool = False
    ):
        most = min(head.max_k, MAX_K)
        if k != "auto" and k > most:
            raise ValueError(f"--speculate_k {k} must be 1 to {most}, the drafts in a block of this head, or auto")
        several = tuple(sorted({max(min(2, most), n) for n in (most // 4, most // 2, most)}))
        super().__init__(head, target, sampling, several if k == "auto" else (k,), compile)
        any_k = None if target.slots.is_cuda or max(self.ks) == 1 else 1  # a GPU compiles each k for itself
        self._block = compile_step(self._drafted, (any_k, None, 0)) if compile else self._drafted

    def time_kernels(self, n_rows: int) -> None:
        """As `decoding.time_kernels`, for reading the text and for blocks of every length."""
        if self.text.is_cuda:
            zeros, slots = self.text.new_zeros(n_rows, 1), self.model.slots
            with torch.cuda.device_of(zeros):
                choice.measure(self._read_text, zeros, zeros + 1, slots)
                for k in self.ks:
                    choice.measure(self._drafted, self._masked(k, zeros), zeros + 1, slots)

    def _drafts(self, k: int, token: Tensor, input_pos: Tensor, kv_pos: Tensor) -> tuple[Tensor, ...]:
        self._read_step(token, input_pos, kv_pos)
        return self._block(self._masked(k, token), input_pos, kv_pos)

    def _masked(self, k: int, token: Tensor) -> Tensor:
        """The block that drafts k tokens, `[B, k]` or `[B, k + 1]`, after `token [B, 1]`."""
        return F.pad(token, (0, k - self.model.from_last), value=self.model.mask_id)

    def _read_text(self, token: Tensor, input_pos: Tensor, kv_pos: Tensor) -> Tensor:
        # Because the positions are returned, Inductor computes them first and stores all keys and values by one kernel.
        return self._read(token, input_pos, kv_pos)[1]

    def _drafted(self, block: Tensor, input_pos: Tensor, kv_pos: Tensor) -> tuple[Tensor, ...]:
        x = self.model(block, input_pos, kv_pos)
        return self._drawn(self.model.logits(x if self.model.from_last else x[:, 1:]))

    def bytes_per_step(self, k: int, batch_size: int, positions: float) -> float:
        """Bytes that drafting k tokens reads: each weight once, and for reading the text `wqkv` once more."""
        again = (layer.attention.wqkv.state_dict().values() for layer in self.model.layers)
        return bytes_per_step(self.model, batch_size, positions) + sum(t.nbytes for ts in again for t in ts)
