"""The router's own training: what it learns from, and how the budget sets its confidence."""

import random
from types import SimpleNamespace

import pytest
import torch

from adamba.errors import UserError
from adamba.training import routing
from adamba.training.routing import Prompts, RouterArguments, draw_turn, level_costs, prepare_router_run, qualities
from models import dense_base, hybrid, tokens

ARGS = SimpleNamespace(packing=False, assistant_only_loss=True, world_size=1, max_length=64)


def test_a_turn_is_one_run_of_labels_and_its_prompt_all_before() -> None:
    labels = torch.full((2, 12), -100)
    labels[0, 3:5], labels[0, 8:11] = 1, 1
    seen = set()
    for seed in range(20):
        prompt, answer = draw_turn(labels, random.Random(seed))
        first = answer[0].nonzero().flatten().tolist()
        assert first in ([3, 4], [8, 9, 10])
        assert prompt[0].nonzero().flatten().tolist() == list(range(first[0]))
        assert not answer[1].any(), "a row without a label has no answer"
        seen.add(first[0])
    assert seen == {3, 8}


def test_quality_is_how_much_of_the_answer_is_left() -> None:
    model, ids = hybrid(0), tokens(0, batch=3, length=12)
    labels = ids.masked_fill(torch.arange(12) < 6, -100)
    _, answer = draw_turn(labels, random.Random(0))
    found = qualities(model, {"input_ids": ids}, labels, answer, ["ghost", "think"])

    def log_prob(row: int, width: str) -> float:
        with torch.no_grad():
            logits = model(ids[row : row + 1], use_cache=False, width=width).logits[0].log_softmax(-1)
        return sum(logits[place - 1, ids[row, place]].item() for place in range(6, 12))

    for row in range(3):
        expected = min(1.0, torch.tensor(log_prob(row, "ghost") - log_prob(row, "think")).exp().item())
        assert found[row, 0].item() == pytest.approx(expected, abs=1e-4)
        assert found[row, 1].item() == pytest.approx(1.0, abs=1e-5)
    assert found[:, 0].min() < 0.9, "the test needs a width that loses"


def test_the_budget_buys_as_much_confidence_as_it_can(monkeypatch) -> None:
    model = hybrid(1)
    costs = level_costs(model.config, 64)
    assert costs[-1] == 1 and (costs.diff() > 0).all()
    easy = Prompts(torch.tensor([[0.9, 0.95]]).repeat(4, 1), torch.tensor([[0.9, 1.0, 1.0]]).repeat(4, 1))
    hard = Prompts(torch.tensor([[0.1, 0.7]]).repeat(4, 1), torch.tensor([[0.1, 0.8, 1.0]]).repeat(4, 1))
    monkeypatch.setattr(routing, "observe_prompts", lambda trainer: {"easy": easy, "hard": hard})
    trainer = SimpleNamespace(accelerator=SimpleNamespace(unwrap_model=lambda model: model), model=model, args=ARGS)
    between = (costs[0] + costs[1]).item() / 2
    found = routing.set_budget(trainer, between + 1e-6, {"easy": 2.0, "hard": 2.0})
    assert found["router_confidence"] == model.generation_config.router_confidence == 0.7
    assert found["router_cost"] == pytest.approx(between)
    assert found["router_mean_width_easy"] == model.config.width_levels["ghost"]
    assert found["router_mean_width_hard"] == model.config.width_levels["normal"]
    assert found["router_quality_hard"] == pytest.approx(0.8)
    assert routing.set_budget(trainer, 1.0, {"easy": 1.0, "hard": 1.0})["router_confidence"] == 0.99
    mostly_hard = routing.set_budget(trainer, between, {"easy": 1.0, "hard": 9.0})
    assert mostly_hard["router_mean_width_hard"] < found["router_mean_width_hard"], "the mix weighs the prompts"


def test_the_budget_holds_where_no_narrow_width_keeps_anything_of_the_answer(monkeypatch) -> None:
    model = hybrid(1)
    left = torch.tensor([[1e-15, 1e-12], [1e-9, 1e-7]])
    observed = {"long": Prompts(left, torch.nn.functional.pad(left, (0, 1), value=1.0))}
    monkeypatch.setattr(routing, "observe_prompts", lambda trainer: observed)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(unwrap_model=lambda model: model), model=model, args=ARGS)
    for budget in (0.95, *level_costs(model.config, 64)[:2].tolist()):
        found = routing.set_budget(trainer, budget + 1e-6, {"long": 1.0})
        assert 0 < found["router_confidence"] < 0.01 and found["router_cost"] <= budget + 1e-6


def test_a_run_begins_without_a_preference_and_trains_the_router_alone() -> None:
    model = hybrid(2)
    assert model.model.router.down_proj.is_trained
    prepare_router_run(model, RouterArguments(train_router=True, router_budget=0.9), ARGS)
    assert not model.model.router.down_proj.is_trained
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {f"model.router.{name}" for name, _ in model.model.router.named_parameters()}


@pytest.mark.parametrize(
    ("changes", "budget", "message"),
    [
        ({"packing": True}, 0.9, "train_router: needs packing: false and assistant_only_loss: true"),
        ({"assistant_only_loss": False}, 0.9, "train_router: needs packing: false"),
        ({"world_size": 2}, 0.9, "train_router: runs in one process, not 2"),
        ({}, 0.01, "router_budget: 0.01 is less than the narrowest width costs; use at least 0"),
    ],
)
def test_runs_that_cannot_work_are_refused(changes: dict, budget: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_router_run(hybrid(0), RouterArguments(router_budget=budget), SimpleNamespace(**vars(ARGS) | changes))


def test_a_model_without_widths_has_no_router_to_train() -> None:
    for model in (dense_base("llama"), hybrid(0, width_levels={"think": hybrid(0).config.hidden_size})):
        with pytest.raises(UserError, match="train_router: this model has no widths"):
            prepare_router_run(model, RouterArguments(), ARGS)
    for budget in (0.0, 1.5):
        with pytest.raises(UserError, match=f"router_budget: {budget} must be above 0"):
            RouterArguments(router_budget=budget)
