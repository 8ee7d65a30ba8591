"""The elastic hybrid model. This folder ships to the Hub as it is: flat, and it imports nothing else of Adamba."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_adamba import AdambaConfig
from .modeling_adamba import AdambaForCausalLM, AdambaModel

AutoConfig.register("adamba", AdambaConfig, exist_ok=True)
AutoModel.register(AdambaConfig, AdambaModel, exist_ok=True)
AutoModelForCausalLM.register(AdambaConfig, AdambaForCausalLM, exist_ok=True)
AdambaConfig.register_for_auto_class()
AdambaForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["AdambaConfig", "AdambaForCausalLM", "AdambaModel"]
