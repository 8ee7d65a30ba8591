"""A phase trains what it should and nothing else (invariant 12)."""

import pytest
import torch

from adamba.errors import UserError
from adamba.model import AdambaForCausalLM
from adamba.surgery import insert_mamba
from adamba.training.elastic import ElasticArguments
from adamba.training.freezing import PARTS, freeze_all_but
from models import dense_base, hybrid


def parts_of(model: AdambaForCausalLM) -> dict[str, set[str]]:
    """Names of the parameters that each `train_only` should train, found by walking the modules."""
    mamba = {
        f"model.layers.{index}.{name}"
        for index, layer in enumerate(model.model.layers)
        if hasattr(layer, "mixer")
        for name, _ in layer.named_parameters()
    }
    gates = {f"model.exit_gates.{name}" for name, _ in model.model.exit_gates.named_parameters()}
    router = {f"model.router.{name}" for name, _ in model.model.router.named_parameters()}
    gates |= router
    everything = {name for name, _ in model.named_parameters()}
    return {"all": everything, "mamba": mamba, "gates": gates, "router": router, "mamba_and_gates": mamba | gates}


@pytest.mark.parametrize("seed", range(4))
def test_each_part_is_what_its_name_says(seed: int) -> None:
    model = hybrid(seed)
    expected = parts_of(model)
    assert expected.keys() == PARTS.keys()
    for part, names in expected.items():
        learning = freeze_all_but(model, part)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == names, part
        assert learning == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_an_unknown_or_absent_part_is_refused() -> None:
    with pytest.raises(
        UserError, match="train_only: 'attention' is unknown; use all, mamba, gates, router, mamba_and_gates"
    ):
        freeze_all_but(hybrid(0), "attention")
    with pytest.raises(UserError, match="train_only: 'mamba' matches no parameter of this LlamaForCausalLM"):
        freeze_all_but(dense_base("llama"), "mamba")


@pytest.mark.parametrize("kind", ["llama", "nanochat"])
def test_phase_1_leaves_frozen_weights_bit_identical(kind: str, make_trainer) -> None:
    model = insert_mamba(dense_base(kind), mamba_state_size=4, mamba_chunk_size=8)
    freeze_all_but(model, "mamba")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    result = make_trainer(model).train()
    assert result.global_step == 10
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            moved = (parameter != before[name]).float().mean().item()
            assert moved > 0.99, f"{name}: only {moved:.0%} moved"
        else:
            assert torch.equal(parameter, before[name]), f"{name} is frozen, but it moved"


@pytest.mark.parametrize("part", ["gates", "mamba_and_gates"])
def test_elastic_steps_move_each_trainable_weight_and_no_other(part: str, make_trainer) -> None:
    model = hybrid(0, first_exit_layer=2)
    freeze_all_but(model, part)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = ElasticArguments(elastic=True, num_sampled_exits=8, router_tolerance=-100.0)
    make_trainer(model, arguments).train()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != torch.equal(parameter, before[name]), name
