"""Activation checkpointing changes memory, not gradients (invariant 10, one process); export with and without."""

import pytest
import torch
from transformers import DynamicCache

from models import hybrid, tokens


def gradients(model, width, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    positions = torch.cat((torch.arange(8), torch.arange(ids.shape[1] - 8)))[None].expand_as(ids)  # packed
    output = model(
        input_ids=ids, labels=ids, position_ids=positions, width=width, output_gates=True, exit_hidden_layers=[1]
    )
    early = model.head(model.model.norm(output.exit_hidden_states[0]))
    (output.loss + early.logsumexp(-1).mean() + output.gate_logits.square().mean()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_gradient_checkpointing_gives_the_same_gradients(seed: int, use_reentrant: bool) -> None:
    model, ids = hybrid(seed).train(), tokens(seed)
    if use_reentrant:
        model.enable_input_require_grads()
    for width in (None, "ghost"):
        plain = gradients(model, width, ids)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        calls = count_recomputations(model)
        checkpointed = gradients(model, width, ids)
        model.gradient_checkpointing_disable()
        assert calls() == 2, "the layer was not computed again in the backward pass"
        assert plain.keys() == checkpointed.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(gradient, checkpointed[name], rtol=1e-5, atol=1e-7, msg=name)


def count_recomputations(model):
    """How often the first MLP has run since."""
    count = [0]

    def see(*_) -> None:
        count[0] += 1

    handle = model.model.layers[0].mlp.register_forward_pre_hook(see)

    def done() -> int:
        handle.remove()
        return count[0]

    return done


@pytest.mark.parametrize("cache", ["asked for", "given"])
def test_gradient_checkpointing_refuses_a_cache(cache: str) -> None:
    """Each layer would write into it again in the backward pass; without gradients there is none."""
    model, ids = hybrid(0).train(), tokens(0)
    model.gradient_checkpointing_enable()
    options = {"use_cache": True} if cache == "asked for" else {"past_key_values": DynamicCache(config=model.config)}
    with pytest.raises(ValueError, match="use_cache: gradient checkpointing"):
        model(ids, labels=ids, **options)
    with torch.no_grad():
        model(ids, **options)


@pytest.mark.parametrize("grad", [False, True])
def test_an_exported_model_computes_the_same(grad: bool) -> None:
    """Also where nobody wrote `torch.no_grad()`; to be run, not trained."""
    model, ids = hybrid(0).eval(), tokens(0, batch=2, length=8)
    with torch.set_grad_enabled(grad):
        exported = torch.export.export(model, (ids,), {"use_cache": False}).module()
        logits, expected = exported(ids, use_cache=False).logits, model(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected)
