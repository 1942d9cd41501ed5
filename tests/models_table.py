"""Print the table of docs/models.md: which models run, and with which of their settings the tests compare them.

    python tests/models_table.py

Worth knowing: the last two columns come from `fast/families.py` and from the tests' models in `conftest.py`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import FAMILIES as TINY_FAMILIES  # noqa: E402

from fast.families import FAMILIES  # noqa: E402

# Architecture -> the models that people know it by, and what is particular about it.
MODELS: dict[str, tuple[str, str]] = {
    "LlamaForCausalLM": (
        "Llama 1 to 3.3, CodeLlama, TinyLlama, Vicuna, SmolLM 1 and 2, DeepSeek's Llama distils",
        "RoPE scaling; biases where the configuration says so",
    ),
    "MistralForCausalLM": ("Mistral 7B, Nemo, Ministral 8B", "sliding window; `head_dim` independent of `dim`"),
    "MinistralForCausalLM": ("Ministral 8B, as newer files name it", "layers with and without the window in one model"),
    "Mistral3ForConditionalGeneration": (
        "Mistral Small 3.1 and 3.2",
        "its vision tower is left out; `tekken.json` as a tokenizer",
    ),
    "Qwen2ForCausalLM": ("Qwen 2 and 2.5, DeepSeek's Qwen distils", "biases on query, key and value"),
    "Qwen3ForCausalLM": ("Qwen 3, dense", "norms on query and key heads"),
    "MixtralForCausalLM": ("Mixtral 8x7B and 8x22B", "[experts](#mixtures-of-experts), 2 of 8 for a token"),
    "Qwen3MoeForCausalLM": (
        "Qwen 3 30B-A3B and 235B-A22B, Qwen3-Coder",
        "experts, 8 of 128 for a token; their weights may not add up to 1; layers without experts",
    ),
    "Phi3ForCausalLM": (
        "Phi-3 and 3.5 mini and medium, Phi-4, Phi-4-mini",
        "stacked projections; only part of a head is rotated; `longrope`",
    ),
    "SmolLM3ForCausalLM": ("SmolLM3", "every fourth layer without RoPE"),
    "GraniteForCausalLM": ("Granite 3", "embedding, attention, residual and logits multipliers"),
    "GraniteMoeHybridForCausalLM": ("Granite 4 without experts and Mamba (micro, 350M, 1B)", "as Granite 3"),
    "SeedOssForCausalLM": ("Seed-OSS", "a bias on the attention's output of its own"),
    "Ernie4_5ForCausalLM": ("Ernie 4.5, dense", "RoPE rotates neighbouring elements"),
    "HeliumForCausalLM": ("Helium", "RoPE rotates neighbouring elements"),
    "Gemma3ForCausalLM": (
        "Gemma 3 (1B, 270M)",
        "five layers of six have a window and a RoPE of their own; four norms a layer; GELU; 262144 ids",
    ),
    "Gemma3ForConditionalGeneration": ("Gemma 3 (4B, 12B, 27B)", "its vision tower is left out"),
}


def settings_of(model_type: str) -> list[str]:
    """What the tests' models of this type set, by the names of config.json."""
    found: dict[str, None] = {}
    for kind, special in TINY_FAMILIES.values():
        if kind == model_type:
            for key, value in special.items():
                if key == "rope_parameters" and "rope_type" not in value:
                    value = value["full_attention"]
                if key == "rope_parameters":
                    key = f"{value['rope_type']} RoPE" if value["rope_type"] != "default" else "rope_theta"
                if key != "pad_token_id":
                    found[key] = None
    return [name if " " in name else f"`{name}`" for name in found]


def table() -> str:
    lines = ["| models | what is particular | `architectures` | tested with |", "|---|---|---|---|"]
    for architecture, (models, particular) in MODELS.items():
        settings = ", ".join(settings_of(FAMILIES[architecture].model_type)) or "those of its text model"
        lines.append(f"| {models} | {particular} | `{architecture}` | {settings} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
