"""Tiny random heads of transformers' own modules, the oracle of the heads' tests, and the files they come in.

head = make_head(target_dim=64, hidden_at=(0, 1, 2))
save(head, directory, "specforge")
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from conftest import SIZES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3 import modeling_qwen3 as qwen3

MODULES = {
    "llama": (LlamaConfig, llama.LlamaDecoderLayer, llama.LlamaRotaryEmbedding),
    "qwen3": (Qwen3Config, qwen3.Qwen3DecoderLayer, qwen3.Qwen3RotaryEmbedding),
}
FLAGS = ("norm_before_residual", "norm_output", "norm_before_fc", "fc_norm")


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Let `change` edit the tensors of the head saved in `path`."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


class Head(nn.Module):
    """A head as it is published, without a cache: each draft reads the whole text anew."""

    def __init__(self, target_dim: int, hidden_at: tuple[int, ...], kind: str, own_embeddings: bool, **sizes):
        super().__init__()
        flags = {name: sizes.pop(name, False) for name in FLAGS}
        own = torch.tensor(sizes.pop("own_vocab", range(1, 128, 2)))
        config_class, layer_class, rope_class = MODULES[kind]
        self.config = config_class(**{**SIZES, "num_hidden_layers": 1, "head_dim": 16, **sizes})
        self.config._attn_implementation = "eager"
        self.hidden_at, self.flags, self.kind = hidden_at, flags, kind
        dim, eps, n = self.config.hidden_size, self.config.rms_norm_eps, len(hidden_at)
        self.embed_tokens = nn.Embedding(self.config.vocab_size, dim) if own_embeddings else None
        self.layers = nn.ModuleList(layer_class(self.config, i) for i in range(self.config.num_hidden_layers))
        first = self.layers[0]
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = getattr(first.self_attn, name).out_features
            setattr(first.self_attn, name, nn.Linear(2 * dim, rows, bias=self.config.attention_bias))
        first.hidden_norm = llama.LlamaRMSNorm(dim, eps)
        if flags["norm_before_fc"]:
            self.input_norm = llama.LlamaRMSNorm(n * target_dim, eps)
        if flags["fc_norm"]:
            self.fc_norm = nn.ModuleList(llama.LlamaRMSNorm(target_dim, eps) for _ in hidden_at)
        self.fc = nn.Linear(n * target_dim, dim, bias=False)
        self.norm = llama.LlamaRMSNorm(dim, eps)
        self.lm_head = nn.Linear(dim, len(own), bias=False)
        self.rotary = rope_class(self.config)
        self.register_buffer("d2t", own - torch.arange(len(own)))

    def drafts(self, states: Tensor, tokens: Tensor, n: int, embed: nn.Embedding) -> Tensor:
        """Logits of `n` drafts, `[n, own_vocab]`, after the target's `states [S, n * target_dim]`.

        tokens: those that follow each position, `[S + n - 1]`; the last n - 1 are what is drafted, whatever is likely.
        """
        embed = embed if self.embed_tokens is None else self.embed_tokens
        if self.flags["norm_before_fc"]:
            states = self.input_norm(states)
        if self.flags["fc_norm"]:
            parts = states.chunk(len(self.fc_norm), -1)
            states = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        hidden, found = self.fc(states), []
        for _ in range(n):
            S = len(hidden)
            distance = torch.arange(S)[:, None] - torch.arange(S)
            seen = (distance >= 0) & (distance < (getattr(self.config, "sliding_window", None) or S))
            mask = torch.zeros(S, S).masked_fill(~seen, -torch.inf)[None, None]
            rope = self.rotary(hidden, torch.arange(S)[None])
            first, *others = self.layers
            normed = first.hidden_norm(hidden)
            residual = normed if self.flags["norm_before_residual"] else hidden
            x = torch.cat((first.input_layernorm(embed(tokens[:S])), normed), -1)[None]
            x = residual + first.self_attn(x, position_embeddings=rope, attention_mask=mask)[0]
            x = x + first.mlp(first.post_attention_layernorm(x))
            for layer in others:
                x = layer(x, attention_mask=mask, position_embeddings=rope)
            x = self.norm(x) if self.flags["norm_output"] else x
            found.append(self.lm_head(x if self.flags["norm_output"] else self.norm(x))[0, -1])
            hidden = torch.cat((hidden, x[0, -1:]))
        return torch.stack(found)


def make_head(
    target_dim: int = 64, hidden_at: tuple[int, ...] = (0, 1, 2), kind: str = "llama", own_embeddings=True, **sizes
) -> Head:
    """The same weights at every call. sizes: what differs from the tests' models, FLAGS, and `own_vocab`, ids."""
    return randomised(Head(target_dim, hidden_at, kind, own_embeddings, **sizes))


def randomised(head: nn.Module) -> nn.Module:
    """The head with the same weights at every call."""
    head, generator = head.float().eval().requires_grad_(False), torch.Generator().manual_seed(0)
    for name, parameter in head.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(std=0.2, generator=generator)
    return head


def save(head: Head, folder: Path, layout: str) -> Path:
    """Write the head as SafeAILab does ("safeailab"), SpecForge ("specforge"), or speculators ("speculators")."""
    folder.mkdir(exist_ok=True, parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in head.state_dict().items() if "rotary" not in name}
    vocab_size, n_own, at = head.config.vocab_size, len(head.d2t), list(head.hidden_at)
    tensors["t2d"] = torch.zeros(vocab_size, dtype=torch.bool)
    tensors["t2d"][head.d2t + torch.arange(n_own)] = True
    config = head.config.to_dict()
    if layout == "speculators":
        config = {
            "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3",
            "transformer_layer_config": config, "eagle_aux_hidden_state_layer_ids": at,
        }  # fmt: skip
    else:
        tensors = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}
        config["architectures"] = ["LlamaForCausalLM" if layout == "safeailab" else "LlamaForCausalLMEagle3"]
    if layout == "specforge":
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [i - 1 for i in at]}
    config |= {"draft_vocab_size": n_own, **{name: on for name, on in head.flags.items() if on}}
    (folder / "config.json").write_text(json.dumps(config))
    if layout == "safeailab":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


DFLASH_OPTIONS = ("mask_token_id", "block_size", "sample_from_anchor", "input_embedding_scale", "output_multiplier")


class DFlash(nn.Module):
    """A DFlash head as it is published, without a cache: each block reads the whole text anew."""

    def __init__(self, target_dim: int, hidden_at: tuple[int, ...], own_vocab: list[int] | None, **sizes):
        super().__init__()
        self.options = {name: sizes.pop(name) for name in DFLASH_OPTIONS if name in sizes}
        self.config = Qwen3Config(**{**SIZES, "head_dim": 16, "hidden_size": target_dim, **sizes})
        self.config._attn_implementation = "eager"
        self.hidden_at, dim, eps = hidden_at, target_dim, self.config.rms_norm_eps
        self.fc = nn.Linear(len(hidden_at) * dim, dim, bias=False)
        self.hidden_norm, self.norm = (qwen3.Qwen3RMSNorm(dim, eps) for _ in range(2))
        layers = range(self.config.num_hidden_layers)
        self.layers = nn.ModuleList(qwen3.Qwen3DecoderLayer(self.config, i) for i in layers)
        self.rotary = qwen3.Qwen3RotaryEmbedding(self.config)
        if own_vocab is not None:
            self.lm_head = nn.Linear(dim, len(own_vocab), bias=False)
            self.register_buffer("d2t", torch.tensor(own_vocab) - torch.arange(len(own_vocab)))

    def drafts(self, states: Tensor, token: int, n: int, hf: nn.Module) -> Tensor:
        """Logits of `n` drafts, `[n, own_vocab]`, after `token`, which follows the positions of `states [S, ...]`."""
        from_last, S = self.options.get("sample_from_anchor", False), len(states)
        block = torch.tensor([token] + [self.options["mask_token_id"]] * (n - from_last))
        x = hf.get_input_embeddings().weight[block] * self.options.get("input_embedding_scale", 1.0)
        context, at = self.hidden_norm(self.fc(states)), torch.arange(S + len(block))
        cos, sin = self.rotary(x, at[None])
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            both = torch.cat((context, normed))

            def heads(rows: Tensor, linear: nn.Linear) -> Tensor:
                return linear(rows).unflatten(-1, (-1, self.config.head_dim))

            q = attention.q_norm(heads(normed, attention.q_proj)).transpose(0, 1)[None]
            k = attention.k_norm(heads(both, attention.k_proj)).transpose(0, 1)[None]
            v = heads(both, attention.v_proj).transpose(0, 1)[None]
            q = qwen3.apply_rotary_pos_emb(q, q, cos[:, S:], sin[:, S:])[0]
            k = qwen3.apply_rotary_pos_emb(k, k, cos, sin)[0]
            seen = torch.ones(len(block), len(at), dtype=torch.bool)
            if kind == "sliding_attention":
                distance = at[S:, None] - at
                seen = (distance >= 0) & (distance < self.config.sliding_window)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)[0]
            x = x + attention.o_proj(y.transpose(0, 1).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        head = getattr(self, "lm_head", hf.get_output_embeddings())
        logits = head(self.norm(x)) * self.options.get("output_multiplier", 1.0)
        return logits if from_last else logits[1:]


def make_dflash(
    target_dim: int = 64, hidden_at: tuple[int, ...] = (0, 1), own_vocab: list[int] | None = None, **sizes
) -> DFlash:
    """The same weights at every call. sizes: what differs from the tests' models, and DFLASH_OPTIONS."""
    head = DFlash(target_dim, hidden_at, own_vocab, **{"mask_token_id": 5, "block_size": 16, **sizes})
    return randomised(head)


def save_dflash(head: DFlash, folder: Path, layout: str = "z-lab") -> Path:
    """Write the head as z-lab does ("z-lab", or "older": with `block_size` outside), or "speculators"."""
    folder.mkdir(exist_ok=True, parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in head.state_dict().items() if "rotary" not in name}
    config, options, at = head.config.to_dict(), dict(head.options), list(head.hidden_at)
    if layout == "speculators":
        config = {
            "architectures": ["DFlashSpeculator"], "speculators_model_type": "dflash",
            "transformer_layer_config": config, "aux_hidden_state_layer_ids": at, **options,
        }  # fmt: skip
        config["draft_vocab_size"] = len(head.d2t) if hasattr(head, "d2t") else head.config.vocab_size
    else:
        outside = {"block_size": options.pop("block_size")} if layout == "older" else {}
        options["target_layer_ids"] = [i - 1 for i in at]
        config |= {"architectures": ["DFlashDraftModel"], "dflash_config": options, **outside}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder
