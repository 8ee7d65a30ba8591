"""A model whose weights accelerate fetches from elsewhere, module by module, computes what it did: GPUs are small."""

import pytest
import torch
from accelerate import cpu_offload

from models import hybrid, tokens

OPTIONS = ({}, {"exit_threshold": 0.5}, {"exit_mode": "verify"}, {"width": "auto"})


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_offloaded_generation(options: dict, rows: int) -> None:
    model, prompt = hybrid(0), tokens(1, batch=rows, length=6)
    offloaded = cpu_offload(hybrid(0), execution_device=torch.device("cpu"))
    assert offloaded.model.layers[1].mixer.conv1d.weight.is_meta
    decoding = {"max_new_tokens": 3, "do_sample": False, **options}
    assert torch.equal(offloaded.generate(prompt, **decoding), model.generate(prompt, **decoding))
    assert torch.equal(offloaded(prompt).logits, model(prompt).logits)
