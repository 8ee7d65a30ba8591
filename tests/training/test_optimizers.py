"""Muon beside AdamW as one optimizer, and old weights that move more slowly after an expansion."""

import copy

import pytest
import torch

from adamba.errors import UserError
from adamba.surgery import expand_width
from adamba.training.optimizers import Muon, MuonWithAdamW, old_block, slow_old_weights
from adamba.training.pretraining import PretrainConfig
from models import hybrid, tokens

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


def train_step(model, optimizer: torch.optim.Optimizer, seed: int) -> None:
    ids = tokens(seed)
    output = model(input_ids=ids, labels=ids, output_gates=True)
    (output.loss + output.gate_logits.square().mean()).backward()
    optimizer.step()
    optimizer.zero_grad()


def muon(model) -> MuonWithAdamW:
    return MuonWithAdamW(model.named_parameters(), **SETTINGS)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_muon_gets_the_hidden_matrices_and_adamw_the_rest() -> None:
    model = hybrid(0, tie_word_embeddings=False)
    optimizer = muon(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parts = {
        type(part).__name__: {names[id(p)] for group in part.param_groups for p in group["params"]}
        for part in optimizer.parts
    }
    assert not parts["Muon"] & parts["AdamW"]
    assert parts["Muon"] | parts["AdamW"] == set(names.values()), "each parameter is in exactly one part"
    assert all(name.endswith("_proj.weight") for name in parts["Muon"])
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= parts["AdamW"]
    assert "model.layers.1.mixer.conv1d.weight" in parts["AdamW"]
    for group in optimizer.parts[1].param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"]), "no decay on vectors"


def test_frozen_weights_are_left_out() -> None:
    model = hybrid(0)
    model.model.embed_tokens.requires_grad_(False)
    held = [p for group in muon(model).param_groups for p in group["params"]]
    assert not any(p is model.model.embed_tokens.weight for p in held)


def test_a_schedule_reaches_both_parts() -> None:
    model = hybrid(0)
    optimizer = muon(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 1 else 1.0)
    train_step(model, optimizer, 0)
    schedule.step()
    before = weights(model)
    train_step(model, optimizer, 1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "a rate of 0 moves nothing"
    schedule.step()
    train_step(model, optimizer, 2)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {"model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"} <= moved
    assert {"model.embed_tokens.weight", "model.layers.1.mixer.A_log"} <= moved


def test_saved_and_loaded_it_goes_on_as_if_nothing_had_happened() -> None:
    model = hybrid(1)
    optimizer = muon(model)
    for step in range(3):
        train_step(model, optimizer, step)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for step in range(3, 5):
        train_step(model, optimizer, step)

    other = hybrid(1)
    other.load_state_dict(saved[0])
    resumed = muon(other)
    resumed.load_state_dict(saved[1])
    schedule = torch.optim.lr_scheduler.LambdaLR(resumed, lambda step: 1.0)
    for step in range(3, 5):
        train_step(other, resumed, step)
        schedule.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.state_dict()[name]), name
    schedule.lr_lambdas[:] = [lambda step: 0.0] * len(schedule.lr_lambdas)
    schedule.step()
    before = weights(other)
    train_step(other, resumed, 5)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters()), "the schedule lost its groups"


@pytest.mark.parametrize("make", [muon, lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2)])
def test_at_scale_zero_only_new_weights_move(make) -> None:
    narrow = hybrid(2)
    wide = expand_width(narrow, narrow.config.hidden_size * 5 // 4).train()
    optimizer = make(wide)
    slow_old_weights(optimizer, wide, 0.0)
    before = weights(wide)
    for step in range(3):
        train_step(wide, optimizer, step)
    grown = 0
    for name, parameter in wide.named_parameters():
        if "exit_gates" in name or "router" in name:
            continue
        block = old_block(name, parameter, wide.config)
        if block is None:
            assert torch.equal(parameter, before[name]), f"{name} did not grow: all of it is old"
            continue
        grown += 1
        assert torch.equal(parameter[block], before[name][block]), f"old entries of {name} moved"
        is_new = torch.ones_like(parameter, dtype=torch.bool)
        is_new[block] = False
        assert parameter.numel() - parameter[block].numel() == int(is_new.sum()) > 0
        moved = (parameter != before[name])[is_new].float().mean().item()
        if not name.endswith(("k_proj.bias", "embed_tokens.weight")):  # no gradient; unseen tokens
            assert moved > 0.9, f"{moved:.0%} of the new entries of {name} moved"
    assert grown > 10


def test_old_entries_are_those_of_the_narrow_model() -> None:
    narrow = hybrid(3)
    wide = expand_width(narrow, narrow.config.hidden_size * 2)
    small = dict(narrow.named_parameters())
    for name, parameter in wide.named_parameters():
        block = old_block(name, parameter, wide.config)
        if block is not None and "router" not in name:
            assert torch.equal(parameter[block], small[name]), name
        for part in block or ():  # indices of two dimensions would be as many as there are entries
            assert isinstance(part, slice) or (name.endswith(("in_proj.weight", "conv1d.weight", "conv1d.bias")))
    never = dict(narrow.named_parameters())
    assert all(old_block(name, p, narrow.config) is None for name, p in never.items()), "it was never expanded"


@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_old_entries_move_by_their_share(scale: float) -> None:
    narrow = hybrid(2)
    plain, slowed = (expand_width(narrow, narrow.config.hidden_size * 2).train() for _ in range(2))
    before = weights(plain)
    for model, slow in ((plain, False), (slowed, True)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if slow:
            slow_old_weights(optimizer, model, scale)
        train_step(model, optimizer, 0)
    free = dict(plain.named_parameters())
    for name, parameter in slowed.named_parameters():
        moved, allowed = parameter - before[name], free[name] - before[name]
        if "exit_gates" not in name and "router" not in name:
            block = old_block(name, parameter, slowed.config) or ...
            allowed = allowed.clone()
            allowed[block] *= scale
        torch.testing.assert_close(moved, allowed, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("use_muon", [False, True])
def test_the_trainer_slows_old_weights(use_muon: bool, make_trainer) -> None:
    narrow = hybrid(2)
    wide = expand_width(narrow, narrow.config.hidden_size * 5 // 4)
    before = weights(wide)
    make_trainer(wide, old_weight_lr_scale=0.0, use_muon=use_muon, max_steps=3).train()
    name = "model.layers.0.mlp.up_proj.weight"
    after = wide.model.layers[0].mlp.up_proj.weight
    block = old_block(name, after, wide.config)
    assert torch.equal(after[block], before[name][block]) and not torch.equal(after, before[name])


def test_adamw_alone_decays_no_vector_either(make_trainer) -> None:
    """With the rates of the full plan `A_log` would shrink to a third in phase 1 by decay alone."""
    model = hybrid(0)
    optimizer = make_trainer(model, weight_decay=0.1).create_optimizer()
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert {name for name, parameter in model.named_parameters() if parameter.ndim > 1} == names
    assert not any(name.endswith(("A_log", "D", "dt_bias")) for name in names)


@pytest.mark.parametrize("scale", [-0.1, 1.5])
def test_an_impossible_scale_is_refused(scale: float, tmp_path) -> None:
    with pytest.raises(UserError, match=f"old_weight_lr_scale: {scale} must be from 0 to 1"):
        PretrainConfig(output_dir=str(tmp_path), max_steps=1, old_weight_lr_scale=scale, use_cpu=True, bf16=False)


def test_muon_on_a_cpu_is_torchs_without_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in ((24, 64), (64, 24))]
    gradients = [[torch.randn(start.shape, generator=generator) for start in starts] for _ in range(3)]

    def trained(optimizer_class, **options) -> list[torch.Tensor]:
        weights = [torch.nn.Parameter(start.clone()) for start in starts]
        optimizer = optimizer_class(weights, lr=0.1, weight_decay=0.1, **options)
        for step in gradients:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
        return [weight.detach() for weight in weights]

    ours = trained(Muon)
    for mine, theirs in zip(ours, trained(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=5e-3)  # steps are about 0.02 an entry; bf16 has 3 digits
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's own function, in fp32
    for mine, theirs in zip(ours, trained(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
