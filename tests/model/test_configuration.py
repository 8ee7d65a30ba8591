"""AdambaConfig: what it refuses and how it says so, its one-dial sizes, its width levels."""

from pathlib import Path

import numpy as np
import pytest
import torch

from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.model.configuration_adamba import default_width_levels
from models import random_config

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "mamba_num_groups": 4,
    "mamba_head_dim": 8,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention"] * 3}, r"layer_types: \['full_attention'.*num_hidden_layers = 4"),
        ({"layer_types": ["full_attention"] * 3 + ["conv"]}, "layer_types: 'conv' is unknown; use one of full_att"),
        ({"norm_base_width": 65}, "norm_base_width: 65 must be at most hidden_size = 64"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types: .* must have an attention layer"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_window: None must be 2 tokens or more"),
        (
            {"layer_types": ["sliding_attention"] * 4, "sliding_window": 1},
            "sliding_window: 1 must be 2 tokens or more",
        ),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 must divide num_attention_heads = 8"),
        ({"hidden_size": 66}, "hidden_size: 66 must be a multiple of num_key_value_heads = 4"),
        ({"mamba_head_dim": 7}, "mamba_head_dim: 7 must divide the 128 / 4 channels"),
        ({"mamba_num_groups": 3}, "mamba_head_dim: 8 must divide the 128 / 3 channels"),
        ({"rope_sign": 2}, "rope_sign: 2 must be 1 or -1"),
        ({"qk_norm": "sometimes"}, "qk_norm: 'sometimes' must be null, before_rope or after_rope"),
        ({"width_levels": {"ghost": 16, "think": 48}}, "width_levels: .*'think': 48.* end at hidden_size = 64"),
        ({"width_levels": {"ghost": 64, "think": 64}}, "width_levels: .* must differ"),
        ({"width_levels": {}}, "width_levels: {} must"),
        ({"width_levels": {"ghost": 24, "think": 64}}, "width_levels: 24 must be a multiple of 16"),
        ({"attention_widths": [64, 40]}, "attention_widths: 40 must be a multiple of 16 up to 64"),
        ({"attention_widths": [64, 80]}, "attention_widths: 80 must be a multiple of 16 up to 64"),
        ({"attention_widths": [64]}, r"attention_widths: \[64\] must have 2 entries"),
        ({"rope_layers": [1, 1]}, r"rope_layers: \[1, 1\] must have 4 entries"),
        ({"width_levels": {"none": 0, "think": 64}}, "width_levels: 0 must be a multiple of 16"),
        ({"width_levels": {"none": -16, "think": 64}}, "width_levels: -16 must be a multiple of 16"),
        ({"num_attention_heads": 0}, "num_attention_heads: 0 must be at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: 0 must be at least 1"),
        ({"mamba_num_groups": 0}, "mamba_num_groups: 0 must be at least 1"),
        ({"mamba_state_size": -4}, "mamba_state_size: -4 must be at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0 must be at least 1"),
        ({"first_exit_layer": 4}, "first_exit_layer: 4 must be from 0 to 3"),
    ],
)
def test_an_impossible_setting_is_named_with_its_value(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"AdambaConfig.{message}") as error:
        AdambaConfig(**{**SIZES, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("key", "value"), [("hidden_size", "wide"), ("layer_types", 3), ("tie_word_embeddings", 2)])
def test_a_value_of_the_wrong_type_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(Exception, match=key):
        AdambaConfig(**{**SIZES, key: value})


@pytest.mark.parametrize("depth", [4, 6, 20])
def test_one_dial_sizes(depth: int) -> None:
    config = AdambaConfig.from_depth(depth, vocab_size=500)
    assert config.num_hidden_layers == depth
    assert config.hidden_size == 64 * depth and config.intermediate_size == 192 * depth
    assert config.head_dim * config.num_attention_heads == config.hidden_size
    assert config.layer_types[:2] == ["full_attention", "linear_attention"]
    assert config.vocab_size == 500
    assert list(config.width_levels.values())[-1] == config.hidden_size


def test_a_model_from_the_dial_has_the_layers_it_says() -> None:
    model = AdambaForCausalLM(AdambaConfig.from_depth(4, vocab_size=50, mamba_state_size=4))
    assert [hasattr(layer, "mixer") for layer in model.model.layers] == [False, True, False, True]
    assert AdambaConfig.from_depth(4, hidden_size=128).hidden_size == 128, "any field can be overridden"


@pytest.mark.parametrize("depth", [-2, 0, 1, 5])
def test_an_impossible_depth_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth: {depth} must be an even number"):
        AdambaConfig.from_depth(depth)


def test_widths_are_resolved_for_each_attention_layer() -> None:
    config = AdambaConfig(**SIZES, width_levels={"ghost": 16, "normal": 32, "think": 64})
    assert config.resolve_width(None) == [64, 64]
    assert config.resolve_width("normal") == config.resolve_width(32) == [32, 32]
    assert config.resolve_width(48) == [48, 48], "any multiple of the head group, not only the levels"
    assert config.resolve_width(["ghost", 64]) == [16, 64]
    assert config.resolve_width(np.int64(32)) == config.resolve_width(torch.tensor([32, 32])) == [32, 32]
    assert config.heads_at(32) == (4, 2) and config.units_at(32) == 48


@pytest.mark.parametrize(
    ("width", "message"),
    [
        ("wide", "unknown level 'wide'; the levels are ghost, normal, think"),
        (40, "40 is not possible here; use a multiple of 16 .* from 16 to 64"),
        (0, "0 is not possible here"),
        (-16, "-16 is not possible here"),
        (80, "80 is not possible here; .* to 64"),
        ([16, 24], "24 is not possible here"),
        ([16], "1 values given for 2 attention layers"),
        (1.5, "1.5 is no number of channels; use a level .ghost, normal, think. or a multiple of 16 from 16 to 64"),
        ([16, 32.0], "32.0 is no number of channels; use"),
        ([None, 32], "None is no number of channels; use"),
    ],
)
def test_an_impossible_width_says_what_would_work(width: object, message: str) -> None:
    config = AdambaConfig(**SIZES, width_levels={"ghost": 16, "normal": 32, "think": 64})
    with pytest.raises(ValueError, match=f"^width: {message}"):
        config.resolve_width(width)


def test_a_sliced_checkpoint_knows_its_limit() -> None:
    config = AdambaConfig(**SIZES, width_levels={"ghost": 16, "think": 64}, attention_widths=[32, 64])
    assert config.resolve_width(None) == config.resolve_width("think") == [32, 64]
    with pytest.raises(ValueError, match="width: 48 is not possible here; .* to 32"):
        config.resolve_width(48)


def test_default_levels() -> None:
    assert default_width_levels(128, 4096) == {"ghost": 128, "whisper": 512, "normal": 1024, "think": 4096}
    assert default_width_levels(64, 256) == {"normal": 64, "think": 256}, "equal widths keep the larger name"
    assert default_width_levels(64, 64) == {"think": 64}
    for step, hidden in [(16, 64), (8, 192), (64, 1280), (80, 1280)]:
        levels = list(default_width_levels(step, hidden).values())
        assert levels == sorted(set(levels)) and levels[-1] == hidden
        assert all(level % step == 0 for level in levels)


def test_json_keeps_the_order_of_the_levels(tmp_path: Path) -> None:
    levels = {"ghost": 16, "whisper": 32, "normal": 48, "think": 64}
    AdambaConfig(**SIZES, width_levels=dict(reversed(levels.items()))).save_pretrained(tmp_path)
    assert list(AdambaConfig.from_pretrained(tmp_path).width_levels.items()) == list(levels.items())


@pytest.mark.parametrize("seed", range(4))
def test_json_keeps_every_field(seed: int, tmp_path: Path) -> None:
    config = random_config(seed)
    config.save_pretrained(tmp_path)
    again = AdambaConfig.from_pretrained(tmp_path)
    differing = {key for key, value in config.to_dict().items() if again.to_dict().get(key) != value}
    assert differing <= {"_name_or_path", "dtype", "architectures", "auto_map", "transformers_version"}


@pytest.mark.parametrize(("hidden", "heads", "head_dim"), [(64, 4, 32), (576, 3, 64), (288, 6, 48), (144, 2, 48)])
def test_mamba_heads_are_at_most_64_channels_that_divide_a_group(hidden: int, heads: int, head_dim: int) -> None:
    sizes = SIZES | {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": heads}
    config = AdambaConfig(**sizes | {"mamba_num_groups": None, "mamba_head_dim": None})
    assert config.mamba_head_dim == head_dim
