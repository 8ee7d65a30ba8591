"""LoRA by recipe keys alone, with the names that TRL's `ModelConfig` gives them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from adamba.errors import UserError
from adamba.model import AdambaForCausalLM
from adamba.model.layers_adamba import ElasticLinear
from adamba.training.sharding import count_weights

DORA_IS_WHOLE = "use_dora: DoRA and the like scale whole rows of a weight and cannot be sliced to a width"


@dataclass
class LoraArguments:
    use_peft: bool = field(
        default=False,
        metadata={
            "help": "Train LoRA adapters; the published weights have them merged. With elastic, exit gates and router "
            "learn in full beside them."
        },
    )
    lora_r: int = field(default=16, metadata={"help": "Rank."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale: updates are multiplied by alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the linear layers to adapt. Default: all of them."}
    )
    lora_modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train in full."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(rank)."})
    use_dora: bool = field(default=False, metadata={"help": "Decompose updates into magnitude and direction."})

    def __post_init__(self) -> None:
        if self.lora_r < 1:
            raise UserError(f"lora_r: {self.lora_r} must be 1 or more")


def learning_gates(model: nn.Module) -> list[str]:
    """Names of the exit gates and the router of a hybrid, where they learn (`freezing.freeze_idle`)."""
    if not isinstance(model, AdambaForCausalLM):
        return []
    parts = {f"exit_gates.{layer}": gate for layer, gate in model.model.exit_gates.items()}
    parts["router"] = model.model.router
    return [name for name, part in parts.items() if any(weight.requires_grad for weight in part.parameters())]


def peft_config(args: LoraArguments, model: nn.Module | None = None, whole: Sequence[str] = ()) -> PeftConfig | None:
    """
    What TRL's trainers take as `peft_config`; None without `use_peft`.

    Args:
        model: What is adapted, where the adapters will be merged.
        whole: Modules that learn in full beside the adapters, and are kept with them; all others are frozen.

    Raises:
        UserError: an adapter on one of two tied weights: it learns beside one and would be merged into both.
    """
    if not args.use_peft:
        return None
    tied = {"embed_tokens", "lm_head"} if model is not None and model.config.tie_word_embeddings else set()
    for name in args.lora_target_modules or ():
        if name.rsplit(".", 1)[-1] in tied:
            raise UserError(
                f"lora_target_modules: {name} is tied to another layer (tie_word_embeddings), which the merged "
                "adapter would change too; leave it out, or name it in lora_modules_to_save"
            )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules or "all-linear",
        exclude_modules=r".*\b(exit_gates|router)\b.*",  # they are trained whole or not at all
        modules_to_save=[*(args.lora_modules_to_save or ()), *whole] or None,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
    )
    return _sliced(config)


def load_adapter(model: PreTrainedModel, folder: str | Path, name: str = "default") -> PeftModel:
    """
    A saved LoRA adapter on a hybrid, for every width. What it was made with does not stand in its file: loaded by
    `PeftModel.from_pretrained` alone, it has PEFT's own layers, which fail below full width.
    """
    config = LoraConfig.from_pretrained(str(folder))
    return PeftModel.from_pretrained(model, str(folder), adapter_name=name, config=_sliced(config))


def _sliced(config: LoraConfig) -> LoraConfig:
    config._register_custom_module({ElasticLinear: ElasticLoraLinear})
    return config


class ElasticLoraLinear(LoraLinear):
    """LoRA on an `ElasticLinear`: at width `w` adapter and layer use the same prefixes of channels."""

    def forward(self, x: torch.Tensor, out_features: int | None = None, **kwargs: Any) -> torch.Tensor:
        if self.lora_variant:
            if (x.shape[-1], out_features or self.out_features) != (self.in_features, self.out_features):
                raise UserError(f"{DORA_IS_WHOLE}; leave it out, or stay at full width")
            return super().forward(x, out_features, **kwargs)
        result = self.base_layer(x, out_features)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            down, up = self.lora_A[name].weight, self.lora_B[name].weight
            inner = F.linear(self.lora_dropout[name](x).to(down.dtype), down[:, : x.shape[-1]])
            update = F.linear(inner, up[: result.shape[-1]]) * self.scaling[name]
            result = result + update.to(result.dtype)
        return result


def merge_adapters(trainer: Trainer) -> None:
    """
    Fold the adapters into the weights, so that what is published is a plain checkpoint of the same architecture; how
    many weights learned stays in `trainer.num_adapter_weights`.
    """
    if not isinstance(trainer.model, PeftModel):
        return
    trainer.num_adapter_weights = count_weights(trainer.model, only_trainable=True)
    if is_deepspeed_zero3_enabled():
        from deepspeed.runtime.zero import GatheredParameters

        for module in trainer.model.modules():
            if isinstance(module, LoraLayer):  # one at a time: all of them may not fit on one device
                with GatheredParameters(list(module.parameters()), modifier_rank=0):
                    module.merge()
    trainer.model = trainer.model.merge_and_unload()
