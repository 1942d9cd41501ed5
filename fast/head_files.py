"""Reads published heads, `eagle.py`'s and `dflash.py`'s, from the directories in which they are published.

    head = load_head("checkpoints/RedHatAI/Qwen3-8B-speculator.eagle3", target)

EAGLE-3 in SafeAILab's and SpecForge's layout (`midlayer.*`) or that of `speculators` (`layers.0.*`, and the layer's
configuration in `transformer_layer_config`), DFlash in z-lab's (`dflash_config`) or that of `speculators`.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tp
from fast.checkpoint import fill, match, read_hf, weight_files
from fast.config import HfConfig, read
from fast.dflash import DFlashHead
from fast.eagle import EagleHead
from fast.families import HF_MODULES, Naming, args_from_hf, head_kind
from fast.heads import Head
from fast.reading import check, read_json, reading
from fast.stored import Part, Stored
from model import ModelArgs, Transformer


def load_head(
    path: str | os.PathLike,
    target: Transformer,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    ranks: tp.Ranks = tp.ALONE,
) -> Head:
    """The head in the directory `path`, whole on every rank.

    Without embeddings or an output projection of its own it has `target`'s. Raises ValueError if it is not complete, or
    not for such a target.
    """
    path = Path(path)
    with reading(path):
        head, ids, tensors = _open_head(path, target)
    if ranks.world_size > 1 and "output.weight" in tensors:
        tp.connect(head, head, ranks)  # rank 0's logits are broadcast; the target's are the same on every rank
    fill(head, tensors, {}, device, dtype)
    head.ids = ids.to(device)
    head.n_parameters = sum(torch.Size(stored.shape).numel() for stored in tensors.values())
    return head


def _open_head(path: Path, target: Transformer) -> tuple[Head, Tensor, dict[str, Stored]]:
    """The head without its weights, the target's ids of its tokens, and the weights."""
    with reading(path / "config.json"):
        head = _skeleton(read_json(path / "config.json"), target)
    if not (files := weight_files(path)):
        raise ValueError(f"{path} has no *.safetensors and no pytorch_model*.bin")
    found = read_hf(files)
    parts = {name.removeprefix("model."): part for name, part in found.items()}
    if len(parts) < len(found):
        raise ValueError(f"{path}: it has tensors with and without `model.` before the same name")
    own, wide, sizes = head.output.out_features, target.args.dim, f"it is {head.args.dim} wide, its target"
    if "embed_tokens.weight" not in parts:
        if head.args.dim != wide:
            raise ValueError(f"{path} has no embed_tokens.weight, and the target's do not fit: {sizes} {wide}")
        head.share_embeddings(target)
    ids = _target_ids(path, parts, own, target.args.vocab_size)
    if "lm_head.weight" not in parts and (head.args.dim, own) == (wide, target.args.vocab_size):
        head.share_output(target)
    first = "midlayer" if any(name.startswith("midlayer.") for name in parts) else "layers.0"
    return head, ids, match(path, head, parts, _naming(head, first))


def _skeleton(config: dict[str, Any], target: Transformer) -> Head:
    """The head without its weights."""
    args = args_of_head(config)
    if args.vocab_size != target.args.vocab_size:
        sizes = f"{args.vocab_size} embeddings, this one has {target.args.vocab_size}"
        raise ValueError(f"a head for a model with {sizes}; a head serves only the model it was trained for")
    if target.args.logits_scale != 1.0:
        raise ValueError("no head can serve a Granite model here: its hidden states have another scale")
    args = replace(args, context_length=target.args.context_length)  # beyond its own it accepts less
    with torch.device("meta"):
        return (_eagle if head_kind(config) == "EAGLE-3" else _dflash)(config, args, target.args)


def _eagle(config: dict[str, Any], args: ModelArgs, target: ModelArgs) -> EagleHead:
    norms = {name: read(config, name, bool, False) for name in ("norm_before_fc", "fc_norm")}
    if all(norms.values()):
        raise ValueError("norm_before_fc and fc_norm are both true; expected one of them")
    key, eagle = "eagle_aux_hidden_state_layer_ids", config.get("eagle_config") or {}
    # SpecForge names the layers before them, by their outputs.
    found, offset = (eagle[key], 1) if eagle.get(key) is not None else (config.get(key), 0)
    found = [2, target.n_layers // 2, target.n_layers - 3] if found is None else found
    hidden_at = _hidden_at(key, found, offset, target.n_layers)
    return EagleHead(
        args,
        target.dim,
        hidden_at,
        read(config, "draft_vocab_size", int, args.vocab_size),
        read(config, "norm_before_residual", bool, False),
        read(config, "norm_output", bool, False),
        norms["norm_before_fc"] + norms["fc_norm"] * len(hidden_at),
    )


def _dflash(config: dict[str, Any], args: ModelArgs, target: ModelArgs) -> DFlashHead:
    if args.dim != target.dim:
        raise ValueError(f"hidden_size is {args.dim}; expected {target.dim}, its target's")
    options = {**config, **(config.get("dflash_config") or {})}
    for name in ("is_causal", "final_logit_softcapping"):
        if options.get(name):
            raise ValueError(f"{name} is {options[name]!r:.80}, which is not supported; expected none")
    is_z_lab_s = config.get("speculators_model_type") is None  # it names layers by their outputs
    key = "target_layer_ids" if is_z_lab_s else "aux_hidden_state_layer_ids"
    from_last = read(options, "sample_from_anchor", bool, False)
    block_size = read(options, "block_size", int, None, 0 if from_last else 1)
    mask_id = read(options, "mask_token_id", int, None, -1, args.vocab_size - 1)
    scales = {"embedding_scale": "input_embedding_scale", "logits_scale": "output_multiplier"}
    scales = {ours: read(options, theirs, float, 1.0) for ours, theirs in scales.items()}
    return DFlashHead(
        replace(args, qk_norm=True, **scales),  # whatever the type of its layers, they are Qwen 3's
        # Of the last layer's output z-lab takes the norm, others do not.
        _hidden_at(key, options.get(key), int(is_z_lab_s), target.n_layers - is_z_lab_s),
        read(config, "draft_vocab_size", int, args.vocab_size),
        mask_id,
        block_size - (not from_last),
        from_last,
        not read(options, "sliding_window_non_causal", bool, options.get("is_causal") is False),
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


def _hidden_at(key: str, found: Any, offset: int, last: int) -> tuple[int, ...]:
    """The layers of the target whose inputs the head takes: `found` under `key`, plus `offset`, at most `last`."""
    fits = isinstance(found, list) and found and all(type(i) is int and 0 <= i + offset <= last for i in found)
    if not fits or found != sorted(set(found)):
        wanted = f"ascending numbers of the target's layers, up to {last - offset}"
        raise ValueError(f"{key} is {found!r:.80}; expected {wanted}")
    return tuple(i + offset for i in found)


def _target_ids(path: Path, parts: dict[str, Part], own: int, target: int) -> Tensor:
    """The target's ids of the head's `own` tokens: `d2t` holds how much each differs. target: how many that has."""
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


def _naming(head: Head, first: str) -> Naming:
    """The names of a head's tensors; `first`: of an EAGLE-3 head's first layer."""
    modules = {ours: tuple(name.removeprefix("model.") for name in theirs) for ours, theirs in HF_MODULES.items()}
    if isinstance(head, EagleHead):
        for ours, theirs in list(modules.items()):
            inside = tuple(name.replace("layers.{}", first) for name in theirs)
            modules[ours.replace("layers.{}", "layers.{}.block")] = inside
        modules["layers.{}.embedding_norm"] = (f"{first}.input_layernorm",)
        modules["layers.{}.hidden_norm"] = (f"{first}.hidden_norm",)
        modules["last_norm"] = ("norm",)
        modules |= {"fc_norm.0": ("input_norm",)} if len(head.fc_norm) == 1 else {}
    return Naming(modules)
