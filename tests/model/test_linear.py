"""Products by oneDNN: the numbers of `F.linear`, and taken where they are meant to be and nowhere else."""

import pytest
import torch
import torch.nn.functional as F

from adamba.model import linear_adamba
from adamba.model.layers_adamba import ElasticLinear
from adamba.model.linear_adamba import OneDNNLinear, linear
from models import hybrid, labelled

# Not whether torch has the operation, which has no public name: where oneDNN is, its loss is to be seen.
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an AMD processor, and for weights of any size and any number of tokens."""
    monkeypatch.setattr(linear_adamba, "LARGE", 1)
    monkeypatch.setattr(linear_adamba, "MANY", 0)
    monkeypatch.setattr(linear_adamba, "onednn_is_faster", lambda: True)


def grid(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_onednn(out: torch.Tensor) -> bool:
    return type(out.grad_fn).__name__ == "OneDNNLinearBackward"


@needs_onednn
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(("width", "out_features"), [(96, 160), (64, 160), (96, 40), (24, 40), (1, 1)])
@pytest.mark.parametrize("tokens", [(3, 50), (1, 1), (0, 50), (2, 3, 7)])
def test_values_and_gradients_are_those_of_f_linear(width: int, out_features: int, tokens: tuple[int, ...]) -> None:
    layer = ElasticLinear(96, 160, bias=False)
    x = grid(*tokens, 96, seed=0)[..., :width].requires_grad_()
    to_out = grid(*tokens, out_features, seed=1)

    out = layer(x, out_features)
    assert by_onednn(out)
    gradients = torch.autograd.grad(out, [x, layer.weight], to_out)

    exact_x, exact_weight = x.detach().double().requires_grad_(), layer.weight.detach().double().requires_grad_()
    expected = F.linear(exact_x, exact_weight[:out_features, :width])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for gradient, exact in zip(
        gradients, torch.autograd.grad(expected, [exact_x, exact_weight], to_out.double()), strict=True
    ):
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("seed", range(4))
def test_a_whole_step_has_the_same_gradients_at_every_width(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hybrid(seed).train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        for width in model.config.width_levels.values():
            model(**labelled(seed), width=width, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    ours = gradients()
    monkeypatch.setattr(linear_adamba, "onednn_is_faster", lambda: False)
    theirs = gradients()
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@needs_onednn
@pytest.mark.usefixtures("everywhere")
def test_only_what_needs_a_gradient_gets_one() -> None:
    x, weight = grid(4, 8, seed=0), grid(6, 8, seed=1).requires_grad_()
    assert torch.autograd.grad(linear(x, weight, None, training=True).sum(), weight)[0].shape == weight.shape
    frozen, x = weight.detach(), x.requires_grad_()
    assert torch.autograd.grad(linear(x, frozen, None, training=True).sum(), x)[0].shape == x.shape


@needs_onednn
@pytest.mark.usefixtures("everywhere")
def test_what_is_computed_again_for_the_backward_pass_is_the_same() -> None:
    """Reentrant checkpointing computes without gradients first; another library would round elsewhere."""
    layer, x = ElasticLinear(96, 160, bias=False), grid(50, 96, seed=0).requires_grad_()
    out = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), out)
    assert by_onednn(out)


@needs_onednn
@pytest.mark.usefixtures("everywhere")
def test_evaluation_halves_doubles_autocast_and_biases_stay_with_torch() -> None:
    x, weight = grid(4, 8, seed=0), grid(6, 8, seed=1).requires_grad_()
    assert by_onednn(linear(x, weight, None, training=True))
    assert not by_onednn(linear(x, weight, None, training=False))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, None, training=True).dtype == torch.bfloat16
    assert not by_onednn(linear(x.double(), weight.double(), None, training=True))
    assert not by_onednn(linear(x.bfloat16(), weight.bfloat16(), None, training=True))
    assert not by_onednn(linear(x, weight, grid(6, seed=2), training=True))


def test_compiled_code_stays_with_torch_and_is_not_bound_to_a_number_of_tokens(monkeypatch) -> None:
    monkeypatch.setattr(linear_adamba, "LARGE", 1)
    monkeypatch.setattr(linear_adamba, "onednn_is_faster", lambda: True)
    layer, tokens = ElasticLinear(8, 6, bias=False).train(), torch.export.Dim("tokens")
    exported = torch.export.export(layer, (grid(40, 8, seed=0),), dynamic_shapes=({0: tokens},))
    assert "linear_pointwise" not in str(exported.graph)
    few = grid(3, 8, seed=1)
    assert torch.equal(exported.module()(few), layer(few))


def test_small_weights_few_tokens_and_other_processors_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, int]] = []

    def note(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        taken.append((len(x), len(weight)))
        return F.linear(x, weight)

    monkeypatch.setattr(OneDNNLinear, "apply", note)
    for faster in (False, True):
        monkeypatch.setattr(linear_adamba, "onednn_is_faster", lambda faster=faster: faster)
        for tokens, out_features in ((32, 512), (31, 512), (32, 511)):
            linear(grid(tokens, 256, seed=0), grid(out_features, 256, seed=1), None, training=True)
    assert taken == [(32, 512)]
