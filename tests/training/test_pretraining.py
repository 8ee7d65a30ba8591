"""What happens to a model before it is pretrained."""

import pytest
import torch

from adamba.surgery.permute import importance_order
from adamba.training import pretraining
from adamba.training.pretraining import sort_where_it_trains
from models import hybrid, tokens


def test_importance_is_measured_where_the_run_trains_and_one_process_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each of eight processes with one CPU core would, and GPUs that round differently would not agree."""
    model, rows, device = hybrid(0), tokens(0).repeat(5, 1), torch.device("cpu")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    reverse = {place: index.flip(0) for place, index in importance_order(model, rows.split(8)).items()}
    moved = []
    monkeypatch.setattr(model, "to", lambda place: moved.append(place) or model)
    monkeypatch.setattr(pretraining, "broadcast_object_list", lambda orders: [reverse for _ in orders])
    sort_where_it_trains(model, rows, device)
    assert moved == [device]
    index = reverse["channel", None]
    assert torch.equal(model.model.norm.weight, before["model.norm.weight"][index])
