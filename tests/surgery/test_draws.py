"""Random numbers of new weights: the normal law, and the same bits in whatever way they are made."""

import pytest
import torch

from adamba.surgery import draws, expand_width
from adamba.surgery.draws import BLOCK, fill_random
from adamba.surgery.expand import root_mean_square
from models import hybrid


def test_the_law_is_normal() -> None:
    numbers = fill_random(torch.empty(2**21), 0.02, seed=1).double() / 0.02
    ordered = numbers.sort().values
    expected = torch.special.ndtr(ordered)
    found = (torch.arange(len(ordered)) + 0.5) / len(ordered)
    assert (expected - found).abs().max() < 1.63 / len(ordered) ** 0.5, "Kolmogorov-Smirnov at 1 %"
    moments = [numbers.pow(power).mean().item() for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.03)
    blocks = numbers.view(-1, BLOCK)
    for first, second in ((numbers[:-1], numbers[1:]), (blocks[:-1].flatten(), blocks[1:].flatten())):
        assert abs((first * second).mean()) < 5 / len(first) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_depend_on_seed_and_shape_alone(dtype: torch.dtype, monkeypatch) -> None:
    shape = (700, 1001)  # several blocks, the last one short
    expected = fill_random(torch.empty(shape, dtype=dtype), 0.5, seed=3)
    assert not torch.equal(fill_random(torch.empty(shape, dtype=dtype), 0.5, seed=4), expected)
    assert torch.equal(fill_random(torch.empty(shape), 0.5, seed=3).to(dtype), expected)
    part = torch.zeros(900, 1500, dtype=dtype)
    fill_random(part[100:800, 200:1201], 0.5, seed=3)
    assert torch.equal(part[100:800, 200:1201], expected) and part.count_nonzero() <= expected.numel()
    for threads in (1, 3, 40):
        monkeypatch.setattr(draws, "THREADS", threads)
        assert torch.equal(fill_random(torch.empty(shape, dtype=dtype), 0.5, seed=3), expected)


def test_a_surgery_has_the_same_bits_in_any_number_of_threads(monkeypatch) -> None:
    model = hybrid(0)
    expected = expand_width(model, 2 * model.config.hidden_size).state_dict()
    before = torch.get_num_threads()
    monkeypatch.setattr(draws, "THREADS", 3)
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        found = expand_width(model, 2 * model.config.hidden_size).state_dict()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_root_mean_square_is_of_the_whole_tensor_and_leaves_it_as_it_is() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        tensor = torch.randn(1000, 321, generator=torch.Generator().manual_seed(0)).to(dtype)
        kept = tensor.clone()
        assert root_mean_square(tensor) == pytest.approx(tensor.double().square().mean().sqrt().item(), rel=1e-5)
        assert torch.equal(tensor, kept)


def test_the_root_mean_square_of_a_large_tensor_is_of_entries_in_every_column() -> None:
    columns = torch.linspace(0.1, 2.0, 2048)
    tensor = (torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)) * columns).bfloat16()
    assert root_mean_square(tensor) == pytest.approx(tensor.double().square().mean().sqrt().item(), rel=5e-3)
