import pytest
import torch
from peft import get_peft_model

from adamba.errors import UserError
from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.training.lora import LoraArguments, peft_config


def hybrid():
    torch.manual_seed(0)
    config = AdambaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        layer_types=["full_attention", "linear_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_head_dim=8,
        mamba_state_size=8,
        mamba_num_groups=2,
        width_levels={"ghost": 16, "think": 32},
    )
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
