"""The one table that surgery is read off: every parameter has a role, and its axes have the parameter's sizes."""

import pytest

from adamba.model import AdambaForCausalLM
from adamba.surgery.axes import axis_sections, layer_of, layer_width, role_of
from models import hybrid, random_config


@pytest.mark.parametrize("seed", range(12))
def test_every_parameter_has_a_role_whose_axes_have_its_sizes(seed: int) -> None:
    config = random_config(seed, mlp_bias=seed % 2 == 0, attention_output_bias=seed % 3 == 0)
    model = AdambaForCausalLM(config)
    for name, tensor in model.state_dict().items():
        role = role_of(name)
        if role.axes == ("fixed",):
            continue
        assert len(role.axes) == tensor.ndim, name
        for axis, size in zip(role.axes, tensor.shape, strict=True):
            if axis != "fixed":
                assert sum(axis_sections(axis, config, layer_width(config, layer_of(name)))) == size, (name, axis)


def test_what_grows_with_the_width_is_not_called_fixed() -> None:
    """Each dimension that differs between a model and one of twice its width has an axis; no other has."""
    small = hybrid(0)
    config = random_config(
        0,
        hidden_size=2 * small.config.hidden_size,
        intermediate_size=2 * small.config.intermediate_size,
        num_attention_heads=2 * small.config.num_attention_heads,
        num_key_value_heads=2 * small.config.num_key_value_heads,
        mamba_num_groups=2 * small.config.mamba_num_groups,
        mamba_head_dim=small.config.mamba_head_dim,
        width_levels={"ghost": small.config.hidden_size, "think": 2 * small.config.hidden_size},
    )
    large = AdambaForCausalLM(config).state_dict()
    for name, tensor in small.state_dict().items():
        if "router.down_proj" in name:
            continue  # goes with the number of levels
        axes = role_of(name).axes
        grows = [a != b for a, b in zip(tensor.shape, large[name].shape, strict=True)]
        expected = [False] * tensor.ndim if axes == ("fixed",) else [axis != "fixed" for axis in axes]
        assert grows == expected, name


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="parameter 'model.layers.0.adapter.down' is not known; add it to"):
        role_of("model.layers.0.adapter.down")
