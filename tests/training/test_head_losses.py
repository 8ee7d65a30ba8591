"""The head without logits: its plain formulas in value and gradient, whole or in chunks; and never all there."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from adamba.training import head_losses as module
from adamba.training.head_gradients import Weights, reduce_with_gradient
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
@pytest.mark.parametrize("distill_weight", [0.0, 0.7])
def test_all_is_what_the_logits_say_and_the_target_learns_nothing(
    seed: int, distill_weight: float, chunked: bool
) -> None:
    model, inputs = hybrid(seed), labelled(seed)
    ids, labels = inputs["input_ids"], inputs["labels"]
    width, layer = model.config.width_levels["ghost"], model.config.gate_layers[0]
    counted = labels[:, 1:] != -100

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    full, output = run_to_head(model, model, {"input_ids": ids}, labels, [layer])
    weights = Weights(1.5, distill_weight)
    narrow, _ = run_to_head(model, model, {"input_ids": ids}, labels, target=full, weights=weights, width=width)
    early = head_losses(model, output.exit_hidden_states[0], labels)
    found = gradients(0.3 * full.total + narrow.total + 2 * early.total)

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
        + 1.5 * token_losses(plain_narrow, labels).sum()
        + distill_weight * divergence
        + 2 * token_losses(plain_early, labels).sum()
    )
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


class Made(TorchDispatchMode):
    """The sizes of all logits that anything makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[-1] == VOCAB:
            self.sizes.append(out.shape[0])
        return out


@pytest.mark.parametrize("again", [False, True], ids=["gradients at once", "computed again"])
def test_no_more_than_a_chunk_of_logits_is_kept_or_made(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = hybrid(1), labelled(1)
    assert model.config.logit_softcap is None
    monkeypatch.setitem(module.LOGITS_AT_ONCE, "cpu", CHUNK * VOCAB)
    if again:
        monkeypatch.setattr(module, "_is_one_product", lambda model: False)
    products: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, logits: products.append(logits.numel()))
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    batch, labels = {"input_ids": inputs["input_ids"]}, inputs["labels"]
    _, output = run_to_head(model, model, batch, labels)
    hidden, target = output.exit_hidden_states[-1], run_to_head(model, model, batch, labels)[0]
    products.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Made() as seen:
        narrow = head_losses(model, hidden, labels, target, Weights(1.0, 0.5))
        in_forward = len(products)
        narrow.total.backward()
    made = [rows for rows in seen.sizes if rows != model.config.hidden_size]  # a transposed weight is no logits
    assert max(made) == CHUNK
    assert len(products) == (4 * -(-42 // CHUNK) if again else 0) and in_forward == len(products) // 2
    logits_kept = [t for t in kept if t.ndim == 2 and t.shape[-1] == VOCAB and t.shape[0] <= CHUNK]
    assert not logits_kept, "no logits wait for the backward pass"


def test_gradients_that_are_made_at_once_are_those_of_autograd() -> None:
    """Of double precision."""
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 9, 31, generator=generator, dtype=torch.float32)
    labels = torch.randint(0, 31, (9,), generator=generator)
    logits.requires_grad_()
    losses, choices, divergence, gradient = reduce_with_gradient(
        [logits.detach()], labels, [target], torch.tensor(1.5), torch.tensor(0.7)
    )
    log_p, log_t = logits.double().log_softmax(-1), target.double().log_softmax(-1)
    expected_losses = F.nll_loss(log_p, labels, reduction="none")
    expected_divergence = F.kl_div(log_p, log_t, reduction="sum", log_target=True)
    (1.5 * expected_losses.sum() + 0.7 * expected_divergence).backward()
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.double(), expected_losses.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(divergence.double(), expected_divergence.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(choices, logits.argmax(-1))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_its_compiled_twin_says_the_same_whatever_the_weights(backend: str) -> None:
    """With weights as numbers instead of tensors inductor gave other gradients at the second pair of weights."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    torch._dynamo.reset()
    compiled = torch.compile(reduce_with_gradient, backend=backend)
    generator = torch.Generator().manual_seed(1)
    for rows in (16, 8, 16, 5):
        for weights, learns in (((1.0, 0.0), False), ((1.5, 0.7), True), ((1.0, 0.5), True)):
            logits, target = torch.randn(2, rows, 501, generator=generator).bfloat16()
            labels = torch.randint(0, 501, (rows,), generator=generator)
            results = []
            for reduce in (reduce_with_gradient, compiled):
                targets = [target.clone()] if learns else []
                losses, _, divergence, gradient = reduce(
                    [logits.clone()], labels, targets, *map(torch.tensor, weights)
                )
                results.append((losses, divergence, gradient))  # of equally likely tokens either may be chosen
            for found, expected in zip(results[1], results[0], strict=True):
                torch.testing.assert_close(found.float(), expected.float(), rtol=2e-2, atol=1e-4)


def test_halves_and_a_frozen_head_learn_as_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast both ways round to bf16; a head that does not learn has no gradient, its states do."""
    model, inputs = hybrid(1), labelled(1)
    model.lm_head.weight.requires_grad_(False)
    found = []
    for size in (2**24, CHUNK * VOCAB):
        monkeypatch.setitem(module.LOGITS_AT_ONCE, "cpu", size)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            said, _ = run_to_head(model, model, {"input_ids": inputs["input_ids"]}, inputs["labels"])
        said.total.backward()
        assert model.lm_head.weight.grad is None
        learned = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((said.total.item(), torch.cat(learned)))
    (whole, whole_gradient), (total, gradient) = found
    assert total == pytest.approx(whole, rel=1e-3) and whole_gradient.norm() > 1
    assert (gradient - whole_gradient).norm() < 2e-2 * whole_gradient.norm()


def test_rows_without_a_label_run_the_head_and_lose_nothing() -> None:
    model, inputs = hybrid(0), labelled(0)
    nothing = torch.full_like(inputs["labels"], -100)
    said, _ = run_to_head(model, model, {"input_ids": inputs["input_ids"]}, nothing)
    assert not said.losses.any()
    said.total.backward()
    assert model.lm_head.weight.grad is not None, "so that ranks agree on which weights have a gradient"


def test_a_dense_base_has_its_losses_from_logits() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base, inputs = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes)), labelled(0)
    total, losses = next_token_losses(base, base, {"input_ids": inputs["input_ids"]}, inputs["labels"])
    logits = base(inputs["input_ids"]).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(total, expected)
    assert total.requires_grad and not losses.requires_grad
