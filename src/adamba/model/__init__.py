"""
The elastic hybrid model. This folder ships to the Hub as it is: flat, and it imports nothing else of Adamba.

`from adamba.model import ...` loads and registers the classes. `adamba.model.configuration_adamba` alone does neither:
who only computes with sizes (`run_plan.py`) does not wait for the modeling code.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_adamba import AdambaConfig
    from .modeling_adamba import AdambaForCausalLM, AdambaModel

__all__ = ["AdambaConfig", "AdambaForCausalLM", "AdambaModel"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from .configuration_adamba import AdambaConfig
    from .modeling_adamba import AdambaForCausalLM, AdambaModel

    AutoConfig.register("adamba", AdambaConfig, exist_ok=True)
    AutoModel.register(AdambaConfig, AdambaModel, exist_ok=True)
    AutoModelForCausalLM.register(AdambaConfig, AdambaForCausalLM, exist_ok=True)
    AdambaConfig.register_for_auto_class()
    AdambaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    classes = {"AdambaConfig": AdambaConfig, "AdambaForCausalLM": AdambaForCausalLM, "AdambaModel": AdambaModel}
    globals().update(classes)
    return classes[name]
