"""A phase trains what it should and nothing else (invariant 12)."""

import pytest
import torch
from transformers import TrainerCallback

from adamba.errors import UserError
from adamba.model import AdambaForCausalLM
from adamba.surgery import insert_mamba
from adamba.training.elastic import ElasticArguments
from adamba.training.freezing import PARTS, freeze_all_but, freeze_idle
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


@pytest.mark.parametrize(
    ("elastic", "idle"),
    [
        (None, {"exit_gates", "router"}),
        (ElasticArguments(), {"exit_gates", "router"}),
        (ElasticArguments(elastic=True, distill=False), {"router"}),
        (ElasticArguments(elastic=True, num_sampled_exits=0), {"exit_gates"}),
        (ElasticArguments(elastic=True, gate_loss_weight=0.0), {"exit_gates"}),
        (ElasticArguments(elastic=True, router_loss_weight=0.0), {"router"}),
        (ElasticArguments(elastic=True, width_weights={"think": 1.0}), {"router"}),
        (ElasticArguments(elastic=True, width_weights={"ghost": 1.0}), set()),
        (ElasticArguments(elastic=True), set()),
    ],
)
def test_what_no_loss_reaches_does_not_learn(elastic: ElasticArguments | None, idle: set[str]) -> None:
    model = hybrid(0, first_exit_layer=2)
    freeze_idle(model, elastic)
    frozen = {name.split(".")[1] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == idle


@pytest.mark.parametrize("keys", [{}, {"distill": False}, {"width_weights": {"think": 1.0}}])
def test_every_weight_that_learns_has_a_gradient_in_every_step(keys: dict, make_trainer) -> None:
    # Data parallelism waits for each of them; one without a gradient would stop the run at its second step.
    model = hybrid(0, first_exit_layer=2)
    arguments = ElasticArguments(elastic=True, **keys)
    freeze_idle(model, arguments)
    trainer = make_trainer(model, arguments)
    missing = set()

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *_args, **_kwargs):
            missing.update(n for n, p in model.named_parameters() if p.requires_grad and p.grad is None)

    trainer.add_callback(Watch())
    trainer.train()
    assert not missing
