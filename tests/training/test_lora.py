from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from adamba.errors import UserError
from adamba.model import AdambaForCausalLM
from adamba.training.lora import LoraArguments, load_adapter, peft_config
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


def save_adapter(folder: Path) -> torch.Tensor:
    """An adapter away from zero, and the logits that it gives at width 16."""
    adapted = get_peft_model(hybrid(), peft_config(LoraArguments(use_peft=True, lora_r=4))).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
        adapted.save_pretrained(folder)
        return adapted(input_ids=torch.arange(9)[None], width=16).logits


@torch.no_grad()
def test_a_saved_adapter_is_loaded_for_every_width(tmp_path: Path) -> None:
    logits = save_adapter(tmp_path)
    loaded = load_adapter(hybrid(), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=torch.arange(9)[None], width=16).logits, logits)
    with pytest.raises(RuntimeError):  # when PEFT slices by itself, `load_adapter` can go
        PeftModel.from_pretrained(hybrid(), tmp_path).eval()(input_ids=torch.arange(9)[None], width=16)


@torch.no_grad()
def test_dora_below_full_width_is_one_line() -> None:
    adapted = get_peft_model(hybrid(), peft_config(LoraArguments(use_peft=True, lora_r=4, use_dora=True))).eval()
    ids = torch.arange(9)[None]
    torch.testing.assert_close(adapted(input_ids=ids).logits, hybrid()(ids).logits)
    with pytest.raises(UserError, match="use_dora: .* stay at full width"):
        adapted(input_ids=ids, width=16)


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


@pytest.mark.parametrize("name", ["embed_tokens", "model.embed_tokens", "lm_head"])
def test_an_adapter_on_a_tied_weight_is_refused(name: str) -> None:
    """Merged into the weight it would change embedding and head, and was trained beside one of them."""
    args = LoraArguments(use_peft=True, lora_target_modules=["q_proj", name])
    tied = AdambaForCausalLM(smallest_config(64, tie_word_embeddings=True))
    with pytest.raises(UserError, match=f"lora_target_modules: {name} is tied"):
        peft_config(args, tied)
    adapted = get_peft_model(hybrid(), peft_config(args, hybrid())).eval()
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(std=0.1)
        ids = torch.arange(9)[None]
        before = adapted(input_ids=ids).logits
        torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, before, atol=1e-5, rtol=1e-5)
