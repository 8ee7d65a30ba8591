import pytest
import torch
from peft import get_peft_model

from adamba.errors import UserError
from adamba.model import AdambaForCausalLM
from adamba.training.lora import LoraArguments, peft_config
from models import smallest_config


def hybrid():
    torch.manual_seed(0)
    config = smallest_config(64)
    return AdambaForCausalLM(config).eval()


def test_merged_adapters_compute_the_same_at_every_width():
    adapted = get_peft_model(hybrid(), peft_config(LoraArguments(use_peft=True, lora_r=4))).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    ids = torch.randint(64, (2, 9))
    plain = hybrid()
    for width in (16, 32):
        with torch.no_grad():
            before = adapted(input_ids=ids, width=width).logits
            assert not torch.allclose(before, plain(ids, width=width).logits, atol=1e-3)
    separate = {width: adapted(input_ids=ids, width=width).logits.detach() for width in (16, 32)}
    merged = adapted.merge_and_unload()
    for width, logits in separate.items():
        with torch.no_grad():
            assert torch.allclose(merged(ids, width=width).logits, logits, atol=1e-5)


def test_only_projections_are_adapted():
    adapted = get_peft_model(hybrid(), peft_config(LoraArguments(use_peft=True)))
    names = {name.split(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[-1] for name in names} == {
        f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down", "in", "out")
    }
    assert not [name for name in names if "exit_gates" in name or "router" in name]


def test_no_lora_unless_asked():
    assert peft_config(LoraArguments()) is None
    with pytest.raises(UserError, match="lora_r: 0"):
        LoraArguments(lora_r=0)
