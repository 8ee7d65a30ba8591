"""The head without logits: its plain formulas in value and gradient, whole or in chunks; and never all there."""

import pytest
import torch
import torch.nn.functional as F

from adamba.training import head_losses as module
from adamba.training.head_losses import head_losses, next_token_losses, run_to_head, token_losses
from models import VOCAB, hybrid, labelled

CHUNK = 7  # tokens; the rows of `labelled` have 42 with a label


@pytest.fixture(params=["whole", "chunks", "chunks of other ranks"])
def chunked(request, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param != "whole":
        monkeypatch.setitem(module.LOGITS_AT_ONCE, "cpu", CHUNK * VOCAB)
    if request.param == "chunks of other ranks":
        monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", lambda: True)
        monkeypatch.setattr(module, "largest_of_all", lambda number, device: number + 2)
    return request.param != "whole"


def test_token_losses_are_plain_cross_entropy() -> None:
    inputs = labelled(0)
    logits = torch.randn(3, 19, 97, generator=torch.Generator().manual_seed(0))
    losses = token_losses(logits, inputs["labels"])
    for row in range(3):
        for place in range(18):
            label = int(inputs["labels"][row, place + 1])
            expected = 0.0 if label == -100 else -logits[row, place].softmax(-1)[label].log().item()
            assert losses[row, place].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))  # soft-capped, tied and other heads
def test_all_is_what_the_logits_say_and_the_target_learns_nothing(seed: int, chunked: bool) -> None:
    model, inputs = hybrid(seed), labelled(seed)
    ids, labels = inputs["input_ids"], inputs["labels"]
    width, layer = model.config.width_levels["ghost"], model.config.gate_layers[0]
    counted = labels[:, 1:] != -100

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    full, output = run_to_head(model, model, {"input_ids": ids}, labels, [layer])
    narrow, _ = run_to_head(model, model, {"input_ids": ids}, labels, target=full, width=width)
    early = head_losses(model, output.exit_hidden_states[0], labels)
    weighted = (
        0.3 * full.losses.sum() + narrow.losses.sum() + 0.7 * narrow.divergence + 2 * early.losses.square().sum()
    )
    found = gradients(weighted)

    plain = model(ids, use_cache=False, exit_hidden_layers=[layer])
    plain_early = model.head(model.model.norm(plain.exit_hidden_states[0]))
    plain_narrow = model(ids, use_cache=False, width=width).logits
    for said, logits in ((full, plain.logits), (narrow, plain_narrow), (early, plain_early)):
        torch.testing.assert_close(said.losses, token_losses(logits, labels), rtol=1e-5, atol=1e-5)
        assert torch.equal(said.choices[counted], logits[:, :-1].argmax(-1)[counted])
        assert not said.losses[~counted].any() and not said.choices[~counted].any()
    p, q = (logits[:, :-1][counted].softmax(-1) for logits in (plain.logits.detach(), plain_narrow))
    divergence = (p * (p / q).log()).sum()
    torch.testing.assert_close(narrow.divergence, divergence, rtol=1e-4, atol=1e-5)
    expected = gradients(
        0.3 * token_losses(plain.logits, labels).sum()
        + token_losses(plain_narrow, labels).sum()
        + 0.7 * divergence
        + 2 * token_losses(plain_early, labels).square().sum()
    )
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_no_more_than_a_chunk_of_logits_is_kept_or_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = hybrid(1), labelled(1)
    monkeypatch.setitem(module.LOGITS_AT_ONCE, "cpu", CHUNK * VOCAB)
    made, kept = [], []
    model.lm_head.register_forward_hook(lambda _, __, logits: made.append(logits.numel()))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        full, _ = run_to_head(model, model, {"input_ids": inputs["input_ids"]}, inputs["labels"])
        narrow, _ = run_to_head(
            model, model, {"input_ids": inputs["input_ids"]}, inputs["labels"], target=full, width=16
        )
        loss = full.losses.sum() + narrow.losses.sum() + narrow.divergence
    in_forward = len(made)
    loss.backward()
    assert len(made) > in_forward, "the backward pass makes them again"
    assert max(made) == CHUNK * VOCAB
    outside_of_the_model = [t for t in kept if t.ndim == 2 and t.shape[-1] == VOCAB and t.shape[0] <= CHUNK]
    assert not outside_of_the_model, "no logits wait for the backward pass"


def test_rows_without_a_label_run_the_head_and_lose_nothing() -> None:
    model, inputs = hybrid(0), labelled(0)
    nothing = torch.full_like(inputs["labels"], -100)
    said, _ = run_to_head(model, model, {"input_ids": inputs["input_ids"]}, nothing)
    assert not said.losses.any()
    (said.losses.sum() + said.divergence).backward()
    assert model.lm_head.weight.grad is not None, "so that ranks agree on which weights have a gradient"


def test_a_dense_base_has_its_losses_from_logits() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base, inputs = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes)), labelled(0)
    losses = next_token_losses(base, base, {"input_ids": inputs["input_ids"]}, inputs["labels"])
    logits = base(inputs["input_ids"]).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(losses.sum(), expected)
