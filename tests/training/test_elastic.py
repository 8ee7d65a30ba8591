"""The elastic loss: what a micro-batch draws, each term against its plain formula, and who gets gradient."""

import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from adamba.errors import UserError
from adamba.model import AdambaForCausalLM
from adamba.training import elastic
from adamba.training.elastic import Draw, ElasticArguments, Tally, draw, elastic_loss, exit_loss, router_loss
from adamba.training.head_losses import run_to_head, token_losses
from models import hybrid, labelled, random_config, tokens

LAYERS = ["full_attention", "linear_attention"] * 3
CONFIG = random_config(1, num_hidden_layers=6, layer_types=LAYERS)
ARGS = ElasticArguments(elastic=True)


def draws(args: ElasticArguments, number: int = 3000) -> list[Draw]:
    return [draw(CONFIG, args, seed=7, step=step, micro_step=0) for step in range(number)]


def test_a_draw_depends_on_seed_step_and_micro_step_only() -> None:
    random.seed(1)
    torch.manual_seed(1)
    first = [draw(CONFIG, ARGS, 7, step, micro) for step in range(20) for micro in range(2)]
    random.seed(2)
    torch.manual_seed(2)
    assert first == [draw(CONFIG, ARGS, 7, step, micro) for step in range(20) for micro in range(2)]
    assert first != [draw(CONFIG, ARGS, 8, step, micro) for step in range(20) for micro in range(2)]
    assert first[0::2] != first[1::2], "micro-batches of a step are drawn apart"


def width_of(chosen: Draw) -> int | None:
    """The one width below the full one, if any."""
    assert len(chosen.widths) <= 1
    return next(iter(chosen.widths.values()), None)


def test_widths_are_drawn_by_weight() -> None:
    widths = Counter(width_of(chosen) for chosen in draws(ARGS))
    ghost, normal, think = CONFIG.width_levels.values()
    assert think not in widths and None not in widths, "the full width runs anyway when it distils"
    assert widths[normal] / widths[ghost] == pytest.approx(2, rel=0.15), "each level is one step heavier"
    without = Counter(width_of(chosen) for chosen in draws(ElasticArguments(elastic=True, distill=False)))
    assert without[None] / without[ghost] == pytest.approx(3, rel=0.15)
    own = Counter(width_of(chosen) for chosen in draws(ElasticArguments(width_weights={"ghost": 3.0, "normal": 1.0})))
    assert own[ghost] / own[normal] == pytest.approx(3, rel=0.15) and len(own) == 2
    only = draws(ElasticArguments(width_weights={"ghost": 1.0}, distill=False), 50)
    assert {width_of(chosen) for chosen in only} == {ghost}
    for chosen in draws(ARGS, 50):
        assert all(list(CONFIG.width_levels.values())[level] == width for level, width in chosen.widths.items())


def test_several_widths_are_drawn_without_repeats_and_all_of_them_when_asked() -> None:
    ghost, normal, _ = CONFIG.width_levels.values()
    for number in (2, 5):
        for chosen in draws(ElasticArguments(num_sampled_widths=number), 50):
            assert sorted(chosen.widths.values()) == [ghost, normal]
            assert chosen.exit_level is None or chosen.exit_level in chosen.widths


def test_exits_are_drawn_from_the_gates_the_deeper_the_more_often() -> None:
    exits = Counter(layer for chosen in draws(ARGS) for layer in chosen.exit_layers)
    assert sorted(exits) == CONFIG.gate_layers
    assert exits[4] / exits[1] == pytest.approx(5 / 2, rel=0.2)
    for chosen in draws(ElasticArguments(num_sampled_exits=2), 50):
        assert len(set(chosen.exit_layers)) == 2 and chosen.exit_layers == sorted(chosen.exit_layers)
    everything = draws(ElasticArguments(num_sampled_exits=99), 3)
    assert all(chosen.exit_layers == CONFIG.gate_layers for chosen in everything)


def test_weights_of_widths_are_checked() -> None:
    with pytest.raises(UserError, match="width_weights: ghost=-1 must not be negative"):
        ElasticArguments(width_weights={"ghost": -1})
    with pytest.raises(UserError, match="num_sampled_widths: 0 must be 1 or more"):
        ElasticArguments(num_sampled_widths=0)
    with pytest.raises(UserError, match="num_sampled_widths: 2 needs distill: true"):
        ElasticArguments(num_sampled_widths=2, distill=False)
    with pytest.raises(UserError, match="width_weights: 'tiny' is no level of the model; use ghost, normal, think"):
        draw(CONFIG, ElasticArguments(width_weights={"tiny": 1.0}), 0, 0, 0)
    with pytest.raises(UserError, match="width_loss_weights: ghost=-1 must not be negative"):
        ElasticArguments(width_loss_weights={"ghost": -1})
    model, chosen = hybrid(1), Draw({}, exit_layers=[], exit_level=None)
    args = ElasticArguments(width_loss_weights={"tiny": 1.0})
    with pytest.raises(UserError, match="width_loss_weights: 'tiny' is no level of the model"):
        elastic_loss(model, model, labelled(1), args, chosen, 10, Tally())


def test_a_sliced_checkpoint_is_not_trained_elastically() -> None:
    sliced = random_config(
        1, attention_widths=[CONFIG.width_levels["ghost"]] * 3, num_hidden_layers=6, layer_types=LAYERS
    )
    with pytest.raises(UserError, match="elastic: this checkpoint was sliced"):
        draw(sliced, ARGS, 0, 0, 0)


@pytest.mark.parametrize("exits_at_width", [False, True])
@pytest.mark.parametrize("distill", [False, True])
def test_the_loss_is_the_sum_of_its_formulas(distill: bool, exits_at_width: bool) -> None:
    model, inputs = hybrid(1), labelled(1)
    labels, ids = inputs["labels"], inputs["input_ids"]
    args = ElasticArguments(
        elastic=True, distill=distill, distill_weight=0.7, exit_loss_weight=0.4, width_loss_weights={"ghost": 1.5}
    )
    layer, width = model.config.gate_layers[1], model.config.width_levels["ghost"]
    chosen = Draw({0: width}, exit_layers=[layer], exit_level=0 if exits_at_width else None)
    counted = labels[:, 1:] != -100
    num_items = int(counted.sum())
    loss = elastic_loss(model, model, inputs, args, chosen, num_items, Tally())

    def mean_loss(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    full = model(ids, use_cache=False, exit_hidden_layers=[layer], output_gates=True)
    narrow = model(ids, use_cache=False, width=width, exit_hidden_layers=[layer], output_gates=True)
    expected = 1.5 * mean_loss(narrow.logits)
    if distill:
        log_p, log_q = (logits[:, :-1][counted].log_softmax(-1) for logits in (full.logits, narrow.logits))
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        expected = expected + mean_loss(full.logits) + 0.7 * divergence
        row_losses = [token_losses(output.logits, labels).sum(1) / counted.sum(1) for output in (full, narrow)]
        enough = (row_losses[1] - row_losses[0] <= args.router_tolerance).float()
        prompt = torch.arange(ids.shape[1])[None] < torch.full((3, 1), 4)
        sure = model.model.router(model.model.embed_tokens(ids), prompt)[..., 0].sigmoid()
        row_errors = -(enough[:, None] * sure.log() + (1 - enough[:, None]) * (1 - sure).log()).mean(1)
        expected = expected + args.router_loss_weight * (row_errors * counted.sum(1)).sum() / num_items
    observed = narrow if exits_at_width else full
    if distill or exits_at_width:
        early = model.lm_head(model.model.norm(observed.exit_hidden_states[0]))
        if model.config.logit_softcap is not None:
            early = model.config.logit_softcap * torch.tanh(early / model.config.logit_softcap)
        depth = (layer + 1) / model.config.num_hidden_layers
        agrees = (early.argmax(-1) == observed.logits.argmax(-1))[:, :-1].float()
        sure = observed.gate_logits[:, :-1, 1].sigmoid()
        error = -(agrees * sure.log() + (1 - agrees) * (1 - sure).log())[counted].mean()
        expected = expected + 0.4 * depth * mean_loss(early) + args.gate_loss_weight * error
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_the_loss_at_several_widths_is_the_sum_over_them() -> None:
    model, inputs = hybrid(1), labelled(1)
    widths = dict(enumerate(list(model.config.width_levels.values())[:-1]))
    assert len(widths) > 1

    def loss_at(some: dict[int, int]) -> torch.Tensor:
        chosen = Draw(some, exit_layers=model.config.gate_layers[:1], exit_level=None)
        return elastic_loss(model, model, inputs, ARGS, chosen, 10, Tally())

    alone = sum(loss_at({level: width}) - loss_at({}) for level, width in widths.items())
    torch.testing.assert_close(loss_at(widths), loss_at({}) + alone, rtol=1e-4, atol=1e-5)


def gradient_names(model: AdambaForCausalLM, loss: torch.Tensor) -> set[str]:
    model.zero_grad()
    loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


@pytest.mark.parametrize("seed", range(3))
def test_gates_and_router_never_bend_the_trunk(seed: int) -> None:
    model, inputs = hybrid(seed), labelled(seed)
    ids, labels = inputs["input_ids"], inputs["labels"]
    counted = labels[:, 1:] != -100
    layers = model.config.gate_layers
    final, output = run_to_head(model, model, {"input_ids": ids}, labels, layers, output_gates=True)
    gates_only = ElasticArguments(exit_loss_weight=0.0)
    loss = exit_loss(model, final, output, labels, layers, gates_only, counted.sum(), Tally())
    learned = gradient_names(model, loss)
    assert learned and all(name.startswith("model.exit_gates.") for name in learned)
    assert {int(name.split(".")[2]) for name in learned} == set(layers)

    output = model(ids, use_cache=False)
    full = token_losses(output.logits, labels)
    loss = router_loss(model, {"input_ids": ids}, labels, full, full + 1, counted, 0, 0.05)
    learned = gradient_names(model, loss.sum())
    assert learned and all(name.startswith("model.router.") for name in learned)


def test_the_router_sees_the_prompt_only() -> None:
    model, inputs = hybrid(2), labelled(2, prompt=6)
    changed = {key: value.clone() for key, value in inputs.items()}
    changed["input_ids"][:, 6:] = tokens(99, batch=3)[:, 6:]
    losses = torch.rand(3, 18, generator=torch.Generator().manual_seed(0))
    counted = inputs["labels"][:, 1:] != -100

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = {"input_ids": batch["input_ids"]}
        return router_loss(model, ids, inputs["labels"], losses, losses, counted, 0, 0.05)

    torch.testing.assert_close(loss(inputs), loss(changed), rtol=0, atol=0)
    changed["input_ids"][:, 2] = 5
    assert not torch.equal(loss(inputs), loss(changed))


def test_what_is_logged_is_the_mean_over_tokens() -> None:
    model, inputs = hybrid(1), labelled(1)
    width, layer = model.config.width_levels["ghost"], model.config.gate_layers[0]
    tally = Tally()
    chosen = Draw({0: width}, exit_layers=[layer], exit_level=None)
    elastic_loss(model, model, inputs, ARGS, chosen, 40, tally, sources=["prose", "sums", "prose"])
    means = tally.means()
    ids, labels = inputs["input_ids"], inputs["labels"]
    with torch.no_grad():
        full = token_losses(model(ids, use_cache=False).logits, labels)
        narrow = token_losses(model(ids, use_cache=False, width=width).logits, labels)
    counted = labels[:, 1:] != -100
    assert means["loss_full"] == pytest.approx((full.sum() / counted.sum()).item(), rel=1e-5)
    assert means[f"loss_width_{width}"] == pytest.approx((narrow.sum() / counted.sum()).item(), rel=1e-5)
    assert means["loss_sums"] == pytest.approx((full[1].sum() / counted[1].sum()).item(), rel=1e-5)
    prose = full[[0, 2]].sum() / counted[[0, 2]].sum()
    assert means["loss_prose"] == pytest.approx(prose.item(), rel=1e-5)
    assert 0 <= means[f"agreement_layer_{layer}"] <= 1
    assert tally.means() == {}, "each log starts anew"


@pytest.mark.parametrize("exits_at_width", [False, True])
def test_micro_batches_add_up_to_the_batch(exits_at_width: bool) -> None:
    """Four micro-batches of 2 rows give the gradient of one of 8 (invariant 10), router and gates included."""
    model, inputs = hybrid(1), labelled(1, batch=8)
    num_items = int((inputs["labels"][:, 1:] != -100).sum())
    chosen = Draw(
        dict(enumerate(list(model.config.width_levels.values())[:-1])),
        exit_layers=model.config.gate_layers[:2],
        exit_level=0 if exits_at_width else None,
    )
    gradients = []
    for size in (8, 2):
        model.zero_grad()
        for start in range(0, 8, size):
            part = {key: value[start : start + size] for key, value in inputs.items()}
            loss = elastic_loss(model, model, part, ARGS, chosen, num_items, Tally())
            loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    whole, parts = gradients
    assert any(name.startswith("model.router") for name in whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("elastic_on", [False, True])
def test_gradient_accumulation_equals_the_large_batch(elastic_on, make_trainer, monkeypatch) -> None:
    """The same through the real Trainer: 2 x 4 against 8 x 1, three optimizer steps."""
    fixed = Draw({0: random_config(2).width_levels["ghost"]}, exit_layers=[1], exit_level=None)
    monkeypatch.setattr(elastic, "draw", lambda *_: fixed)
    weights = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = hybrid(2, attention_dropout=0.0)
        trainer = make_trainer(
            model,
            ElasticArguments(elastic=elastic_on),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            optim="sgd",
            learning_rate=0.05,
        )
        trainer.train()
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    start = hybrid(2).state_dict()
    assert not torch.equal(start["lm_head.weight"], weights[0]["lm_head.weight"])
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("elastic_on", [False, True])
def test_a_batch_without_any_label_has_no_loss_and_breaks_nothing(elastic_on, make_trainer) -> None:
    """Packing makes such rows: a document one token longer than a row leaves a row of that token and padding."""
    model = hybrid(2)
    trainer = make_trainer(model, ElasticArguments(elastic=elastic_on), max_steps=2, logging_steps=1)
    trainer.args.logging_nan_inf_filter = False
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"labels": [-100] * len(row["labels"])})
    trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == [0.0, 0.0]
    assert all(weight.isfinite().all() for weight in model.parameters())
