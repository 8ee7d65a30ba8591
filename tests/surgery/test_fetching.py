"""Models whose weights are fetched when a module runs, for several calls at the same time."""

from collections import Counter
from functools import partial

import pytest
import torch

from adamba.surgery.fetching import Together, attach
from adamba.surgery.rules import empty_model
from models import hybrid, tokens


class Counted(dict):
    """A mapping that counts what is asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = Counter()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.asked[name] += 1
        return super().__getitem__(name)


@torch.no_grad()
def test_several_widths_at_the_same_time_fetch_each_weight_once() -> None:
    model = hybrid(2)
    weights, together = Counted(model.state_dict()), Together(3)
    fetched = attach(empty_model(model.config), weights, together)
    widths = list(model.config.width_levels.values())[:3]

    @torch.no_grad()
    def logits(of, width: int) -> torch.Tensor:
        return of(tokens(1), width=width).logits

    found = together.run([partial(logits, fetched, width) for width in widths])
    assert set(weights.asked.values()) == {1}
    for width, got in zip(widths, found, strict=True):
        assert torch.equal(got, logits(model, width))
    assert all(parameter.device.type == "meta" for parameter in fetched.parameters())
    assert torch.equal(logits(fetched, widths[0]), found[0]), "alone too"


def test_the_first_failure_ends_all_calls() -> None:
    model, together = hybrid(2), Together(2)
    weights = dict(model.state_dict())
    del weights["model.layers.1.mixer.in_proj.weight"]
    fetched = attach(empty_model(model.config), weights, together)
    widths = list(model.config.width_levels.values())[:2]
    with pytest.raises(KeyError, match=r"layers\.1\.mixer\.in_proj"):
        together.run([partial(fetched, tokens(1), width=width) for width in widths])
