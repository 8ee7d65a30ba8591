"""
What numbers a recipe's keys may have, for all scripts: libraries take many others and fail on them much later.

Only what one number alone shows is here. What depends on other keys or on the model is checked where those are known.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """From `low` to `high`; `above`, `below`: without the limit itself."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, number: float) -> bool:
        if not math.isfinite(number):
            return False
        return (self.low < number if self.above else self.low <= number) and (
            number < self.high if self.below else number <= self.high
        )

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        if self.above:
            return f"above {self.low:g} and at most {self.high:g}"
        return f"from {self.low:g} to " + (f"below {self.high:g}" if self.below else f"{self.high:.10g}")


COUNT, AMOUNT, POSITIVE, FRACTION = Range(1), Range(0), Range(0, above=True), Range(0, 1)

# A key that means something else to one class has that class before it.
RANGES = {
    # optimizers
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"), AMOUNT),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Range(0, 1, below=True)),
    **dict.fromkeys(("label_smoothing_factor", "lora_dropout"), FRACTION),
    **dict.fromkeys(("lora_alpha", "num_train_epochs"), POSITIVE),
    # batches and rows
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "batch_size"), COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "play_batch_size", "dataloader_prefetch_factor"), COUNT),
    **dict.fromkeys(("max_length", "max_new_tokens", "max_completion_length", "max_generated_tokens"), COUNT),
    **dict.fromkeys(("num_rows", "num_calibration_rows", "num_check_rows", "num_iterations", "num_eval_rows"), COUNT),
    **dict.fromkeys(("dataloader_num_workers", "num_eval_pairs", "num_eval_prompts"), AMOUNT),
    # when things happen
    **dict.fromkeys(("save_steps", "eval_steps", "logging_steps"), POSITIVE),
    **dict.fromkeys(("save_total_limit", "steps_per_generation"), COUNT),
    **dict.fromkeys(("seed", "data_seed"), Range(0, 2**32 - 1)),
    # losses
    **dict.fromkeys(("distill_weight", "exit_loss_weight", "gate_loss_weight", "router_loss_weight"), AMOUNT),
    **dict.fromkeys(("router_tolerance", "num_sampled_exits", "beta"), AMOUNT),
    # sampling and playing
    "temperature": AMOUNT,
    "GRPOConfig.temperature": POSITIVE,  # it divides the logits
    "top_p": Range(0, 1, above=True),
    "min_p": FRACTION,
    "repetition_penalty": POSITIVE,
    **dict.fromkeys(("exit_thresholds", "sweep_thresholds", "exit_threshold"), FRACTION),
    **dict.fromkeys(("num_episodes", "num_sweep_episodes", "num_examples", "first_seed"), AMOUNT),
}


def out_of_range(key: str, value: Any, dataclass_types: Iterable[type]) -> str | None:
    """What is wrong with a value, `key: -1 must be 0 or more`; None when nothing is. Each item of a list or mapping
    counts."""
    own = [f"{base.__name__}.{key}" for kind in dataclass_types for base in kind.__mro__ if hasattr(base, key)]
    allowed = next((RANGES[name] for name in [*own, key] if name in RANGES), None)
    items = {key: value}
    if isinstance(value, dict):
        items = {f"{key}: {name}": item for name, item in value.items()}
    elif isinstance(value, (list, tuple)):
        items = {f"{key}: item {index}": item for index, item in enumerate(value)}
    for name, item in items.items():
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            continue
        if math.isnan(item):
            return f"{name}: nan is no number" + (f"; it must be {allowed}" if allowed else "")
        if allowed is not None and not allowed.holds(item):
            return f"{name}: {item} must be {allowed}"
    return None
