"""scripts/bench/presets.py: the shapes have the published number of parameters.

python -m pytest tests/test_bench_presets.py
"""

import pytest
import torch

from model import Transformer
from scripts.bench.presets import PRESETS, preset

PUBLISHED_PARAMETERS = {
    "stories-15m": 15_191_712,
    "tinyllama-1.1b": 1_100_048_384,
    "open-llama-7b": 6_738_415_616,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "codellama-7b": 6_738_546_688,
    "codellama-34b": 33_743_970_304,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen-2.5-7b": 7_615_616_512,
    "gemma-3-1b": 999_885_952,
    "qwen-3-8b": 8_190_735_360,
    "mixtral-8x7b": 46_702_792_704,
    "qwen-3-30b-a3b": 30_532_122_624,
}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_preset_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = Transformer(preset(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_PARAMETERS[name]


def test_preset_names_are_exact():
    assert set(PRESETS) - {"moe-8x300m"} == set(PUBLISHED_PARAMETERS)  # which nobody has trained
    for near_miss in ("llama-2", "LLAMA-2-7B", "llama-2-7b-chat", ""):
        with pytest.raises(ValueError, match="choose from: stories-15m, .*, qwen-3-8b"):
            preset(near_miss)
