"""Writes models and tokenizers as llama.cpp's converter does, with the package `gguf` and its names of tensors.

    path = write_model(Path("m.gguf"), make_tiny("llama"), "llama", GGMLQuantizationType.Q4_0)

The rules: https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

import json
import re
from collections.abc import Container
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import PreTrainedModel

TEMPLATE = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
PERMUTED = ("llama", "granite", "smollm3")


def write_config(writer: GGUFWriter, model: PreTrainedModel) -> None:
    """The metadata that llama.cpp's converter writes for the configuration of `model`."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    if head_dim != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if n_experts := getattr(config, "num_local_experts", 0):
        writer.add_expert_count(n_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    if writer.arch == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if writer.arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_float32("gemma3.rope.freq_base_swa", config.rope_parameters["sliding_attention"]["rope_theta"])
    if writer.arch == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)


def rope_tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    rope = model.config.rope_parameters
    if rope.get("rope_type") == "longrope":
        found = {f"rope_factors_{kind}.weight": rope[f"{kind}_factor"] for kind in ("long", "short")}
    elif rope.get("rope_type") == "llama3":
        scaled = model.model.rotary_emb.inv_freq
        n = len(scaled)
        found = {"rope_freqs.weight": rope["rope_theta"] ** -(torch.arange(n) / n) / scaled}
    else:
        found = {}
    return {name: np.asarray(factors, dtype=np.float32) for name, factors in found.items()}


def permuted(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Halves of a head -> neighbours, as the converter's `permute`."""
    halves = rows.reshape(n_heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def stored(kind: Type, values: np.ndarray, seed: int) -> np.ndarray:
    """`values` in that type; for types that the package cannot make, any blocks with small scales."""
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        width, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        shape = *values.shape[:-1], values.shape[-1] // width, n_bytes
        blocks = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        scales = {Type.Q6_K: (208,), Type.Q3_K: (108,), Type.Q2_K: (80, 82)}.get(kind, (0, 2))
        for at in scales:
            blocks[..., at : at + 2] = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
        return blocks.reshape(*shape[:-2], -1)


def write_model(
    path: Path, model: PreTrainedModel, architecture: str, kind: Type = Type.F32, others: dict[str, Type] | None = None
) -> Path:
    """Write `model` and give it the values that the file holds; `others`: the types of some projections."""
    writer = GGUFWriter(path, architecture)
    write_config(writer, model)
    writer.add_pad_token_id(0)
    writer.add_token_list([f"t{i}" for i in range(model.config.vocab_size)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], model.config.num_hidden_layers)
    for seed, (name, tensor) in enumerate(model.state_dict().items()):
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        raw_type = kind if tensor.dim() > 1 and not name.endswith("mlp.gate.weight") else Type.F32
        raw_type = (others or {}).get(name.split(".")[-2], raw_type)
        raw = stored(raw_type, values, seed)
        tensor.copy_(torch.from_numpy(gguf.dequantize(raw, raw_type).reshape(values.shape)))
        name, _, suffix = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "weight")
        if match := re.search(r"self_attn\.([qk])_proj", name):
            heads = model.config.num_attention_heads if match[1] == "q" else model.config.num_key_value_heads
            raw = permuted(raw, heads) if architecture in PERMUTED else raw
        elif architecture == "gemma3" and name.endswith("norm"):
            raw = raw + 1
        if name.endswith("experts.gate_up_proj"):
            both = zip(("gate_proj", "up_proj"), np.split(raw, 2, axis=1), strict=True)
            pieces = {name.replace("gate_up_proj", part): np.ascontiguousarray(half) for part, half in both}
        else:
            pieces = {name: raw}
        for theirs, piece in pieces.items():
            writer.add_tensor(f"{names.get_name(theirs)}.{suffix}", piece, raw_dtype=raw_type)
    for name, factors in rope_tensors(model).items():
        writer.add_tensor(name, factors)
    return finish(writer)


def write_bpe(path: Path, tokenizer: Tokenizer, pre: str) -> Path:
    writer = GGUFWriter(path, "llama")
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    types = {token.content: 3 if token.special else 4 for token in tokenizer.get_added_tokens_decoder().values()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, "[PAD]"])
    writer.add_token_types([*(types.get(token, 1) for token in tokens), 5])
    writer.add_token_merges([" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    writer.add_chat_template(TEMPLATE)
    return finish(writer)


def write_sentencepiece(
    path: Path, model: SentencePieceProcessor, user_defined: Container[str], adds_space: bool
) -> Path:
    kinds = [(model.is_unknown, 2), (model.is_control, 3), (model.is_byte, 6)]
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    types = [next((kind for test, kind in kinds if test(i)), 1) for i in range(len(pieces))]
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([t.replace("\u2581", " ") if t in user_defined else t for t in pieces])
    writer.add_token_scores([model.get_score(i) for i in range(len(pieces))])
    writer.add_token_types([4 if t in user_defined else kind for t, kind in zip(pieces, types, strict=True)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(adds_space)
    return finish(writer)


def finish(writer: GGUFWriter) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path)
