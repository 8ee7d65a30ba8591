"""One LoRA adapter a role on a shared base: made, chosen, published beside the base, loaded again."""

from collections.abc import Sequence
from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from adamba.loading import ADAPTERS, role_folders
from adamba.training.lora import load_adapter


def add_role_adapters(model: PreTrainedModel, config: PeftConfig, roles: Sequence[str]) -> PeftModel:
    """An adapter of every role, each of them trainable and writing nothing yet."""
    adapted = get_peft_model(model, config, adapter_name=roles[0])
    for role in roles[1:]:
        adapted.add_adapter(role, config)
    train_all_roles(adapted)
    return adapted


def train_all_roles(model: PeftModel) -> None:
    """Let every adapter learn. PEFT freezes all but the active one when adapters are loaded or switched on again."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def role_weights(model: PeftModel, role: str) -> list[nn.Parameter]:
    """Weights of one role's adapter."""
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name and f".{role}." in name]


def activate(model: PeftModel, role: str) -> None:
    """Let one role's adapter speak. `PeftModel.set_adapter` would also freeze the others, which train with it."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module._active_adapter = [role]


def save_roles(model: PeftModel, folder: Path) -> None:
    """The base as a plain checkpoint, and `adapters/<role>/` beside it."""
    model.save_pretrained(folder / ADAPTERS)
    base = model.unload()
    base.save_pretrained(folder)


def load_roles(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel | PeftModel:
    """The model with the adapters published beside it; unchanged where there are none."""
    folders = role_folders(folder)
    if not folders:
        return model
    first, *others = folders
    adapted = load_adapter(model, first, first.name)
    for path in others:
        adapted.load_adapter(path, adapter_name=path.name)
    return adapted
