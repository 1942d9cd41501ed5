"""Shared fixtures: tiny random models of every family, made by Hugging Face transformers, the tests' oracle.

    def test_something(tiny):
        hf_model, directory = tiny("qwen3")

Worth knowing: norms start as ones and biases as zeros, which would hide a model that skips them; small random weights
give almost uniform attention, which would hide errors in it. So all of them are drawn from wide distributions.
"""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from fast.checkpoint import load_model
from fast.decoding import Steps, stream
from fast.sampling import Sampling
from kernels.cpu import build
from model import Transformer

build.load()  # compiles the CPU's kernels now: it prints a line, which tests of stderr would see
torch.set_num_threads(1)  # tiny models lose more by synchronising threads than they gain, most of all on busy cores

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 3.0], "long_factor": [1.0, 1.5, 3.0, 6.0, 12.0, 24.0],
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 1, "head_dim": 16, "patch_size": 2, "image_size": 8,
}  # fmt: skip
GEMMA3 = {
    "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 5, "tie_word_embeddings": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
    },
}  # fmt: skip
SEES = {"mistral3": ("mistral", "pixtral"), "gemma3": ("gemma3_text", "siglip_vision_model")}
GRANITE = {
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1, "logits_scaling": 10.0,
    "rms_norm_eps": 0.1,
}  # fmt: skip

# Name -> transformers' model type and what differs from SIZES.
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-head-dim": ("llama", {"head_dim": 32}),
    "mistral": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen2-mixed": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN}),
    "llama-yarn": ("llama", {"rope_parameters": {**YARN, "truncate": False, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    "ministral": (
        "ministral",
        {"head_dim": 16, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "mistral3": ("mistral3", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "qwen3_moe",
        {"num_local_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "head_dim": 32},
    ),
    "qwen3-moe-mixed": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "head_dim": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
            "intermediate_size": 128,
        },
    ),
    "phi3": ("phi3", {"pad_token_id": 0, "sliding_window": 5}),
    "phi3-long": ("phi3", {"pad_token_id": 0, "original_max_position_embeddings": 16, "rope_parameters": LONGROPE}),
    "phi3-short": ("phi3", {"pad_token_id": 0, "original_max_position_embeddings": 64, "rope_parameters": LONGROPE}),
    "smollm3": ("smollm3", {"pad_token_id": 0, "no_rope_layers": [1, 0]}),
    "granite": ("granite", GRANITE),
    "granite-tied": ("granite", {**GRANITE, "tie_word_embeddings": True, "attention_bias": True}),
    "granite-4": (
        "granitemoehybrid",
        {
            **GRANITE,
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
            "layer_types": ["full_attention"] * 2,
            "position_embedding_type": "rope",
        },
    ),
    "granite-4-nope": (
        "granitemoehybrid",
        {
            **GRANITE,
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
            "layer_types": ["full_attention"] * 2,
            "position_embedding_type": "nope",
        },
    ),
    "seed-oss": ("seed_oss", {"attention_out_bias": True, "head_dim": 32}),
    "ernie": ("ernie4_5", {"use_bias": True, "head_dim": 32}),
    "gemma3": ("gemma3_text", GEMMA3),
    "gemma3-vision": ("gemma3", GEMMA3),
    "helium": ("helium", {"head_dim": 16, "attention_bias": True}),
}


def make_tiny(family: str, **overrides) -> PreTrainedModel:
    """A float32 model of `family` in eval mode; the same weights at every call."""
    model_type, special = FAMILIES[family]
    sizes = copy.deepcopy({**SIZES, **special, **overrides})  # a config writes into what it is given
    if model_type in SEES:
        text, vision = SEES[model_type]
        vision = {**VISION, "model_type": vision}
        sizes = {"text_config": {"model_type": text, **sizes}, "vision_config": vision}
    config = AutoConfig.for_model(model_type, **sizes)
    generator = torch.Generator().manual_seed(0)
    auto = AutoModelForImageTextToText if model_type in SEES else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
                if "gemma3" in model_type:  # which adds one
                    parameter -= 1
            else:
                parameter.normal_(std=0.2, generator=generator)
    return model.requires_grad_(False)


# Code for a separate process: `growth(action)` is the peak growth of anonymous memory during `action()`, in MiB.
GROWTH = """
import threading, torch
from pathlib import Path
from torch._subclasses.fake_tensor import FakeTensorMode

def anonymous_mb():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024

def growth(action):
    base, done, peak = anonymous_mb(), threading.Event(), [0]
    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_mb())
    threading.Thread(target=watch, daemon=True).start()
    result = action()
    done.set()
    return round(max(peak[0], anonymous_mb()) - base)

torch.set_num_threads(1)
with FakeTensorMode():
    torch.empty(1)  # imports what it needs
import torch._dynamo  # which loading no longer imports, but something later may
"""

GREEDY = Sampling(temperature=0)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(approximate: torch.Tensor, exact: torch.Tensor) -> float:
    return float((approximate - exact).float().norm() / exact.float().norm())


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(128, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


def tokens_of(steps: Steps, prompts: list[list[int]], n: int, cached: int = 0) -> list[list[int]]:
    """`n` tokens for every row."""
    return [list(row) for row in zip(*stream(steps, prompts, n, cached), strict=True)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """`tiny(family)`: a Hugging Face model and the directory it is saved in, shared by all tests: do not change it."""
    made: dict[str, tuple[PreTrainedModel, Path]] = {}

    def make(family: str) -> tuple[PreTrainedModel, Path]:
        if family not in made:
            model, directory = make_tiny(family), tmp_path_factory.mktemp(family)
            model.save_pretrained(directory)
            made[family] = model, directory
        return made[family]

    return make


@pytest.fixture(scope="session")
def ours(tiny) -> Callable[..., Transformer]:
    """`ours(family, rows, capacity)`: our model in float32 with a new KV cache; its context length is `capacity`."""

    def make(family: str = "llama", rows: int = 1, capacity: int = 64, device: str = "cpu") -> Transformer:
        model = load_model(tiny(family)[1], device=device, dtype=torch.float32)
        model.args = dataclasses.replace(model.args, context_length=capacity)
        model.setup_caches(rows, capacity)
        return model

    return make


@pytest.fixture(scope="session")
def read_config() -> Callable[[Path], dict]:
    return lambda directory: json.loads((directory / "config.json").read_text())


@pytest.fixture(scope="session")
def deep(tmp_path_factory) -> tuple[PreTrainedModel, Path]:
    """A target of eight layers."""
    hf, path = make_tiny("llama", num_hidden_layers=8), tmp_path_factory.mktemp("deep")
    hf.save_pretrained(path)
    return hf, path
