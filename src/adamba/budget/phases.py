"""A recipe family read as a plan: what each phase trains, on how many tokens, at how many FLOPs a token."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from adamba.errors import UserError, one_line
from adamba.flops import (
    adapter_flops_per_token,
    elastic_flops_per_token,
    flops_per_token,
    num_adapter_parameters,
    num_parameters,
    num_trained,
    training_flops_per_token,
)
from adamba.model.configuration_adamba import AdambaConfig
from adamba.plan_steps import family_steps
from adamba.recipe_file import launch_command, read_recipe

from . import sizes

# What a recipe leaves out, as the trainers default it.
DEFAULTS: dict[str, Any] = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
COUNTS = (*DEFAULTS, "max_steps", "max_length", "max_completion_length")  # what tokens are the product of
DEFAULT_LENGTHS = {"run_pretrain.py": 2048, "run_sft.py": 1024, "run_dpo.py": 1024, "run_grpo.py": 256}
SCRIPTS = (*DEFAULT_LENGTHS, "run_surgery.py")
ELASTIC_KEYS = ("width_weights", "num_sampled_widths", "distill", "num_sampled_exits")


@dataclass(frozen=True)
class Launch:
    """How the recipe's first line spreads a run. `shards`: over how many processes parameters, gradients and optimizer
    state are split (1: whole on each)."""

    num_processes: int = 1
    deepspeed: bool = False
    parameter_shards: int = 1
    gradient_shards: int = 1
    optimizer_shards: int = 1
    offloads_optimizer: bool = False
    offloads_parameters: bool = False
    fsdp: bool = False


@dataclass(frozen=True)
class PlannedPhase:
    """One run of the plan. `config` is that of the model it writes, which for training is also what it reads."""

    name: str
    recipe: Path
    script: str
    values: Mapping[str, Any]
    launch: Launch
    config: Any

    @property
    def is_surgery(self) -> bool:
        return self.script == "run_surgery.py"

    @property
    def checkpoints_activations(self) -> bool:
        """By the key's present name, or the one it had."""
        return bool(self.values.get("activation_checkpointing") or self.values.get("gradient_checkpointing"))

    @property
    def stated_hours(self) -> float:
        """The time that the recipe's second line gives; what a surgery is priced by."""
        second = " ".join(self.recipe.read_text(encoding="utf-8").splitlines()[1:2])
        found = re.search(r"([\d.]+) ?(seconds?|minutes?|hours?|h)\b", second)
        return float(found[1]) / {"s": 3600, "m": 60, "h": 1}[found[2][0]] if found else 0.0

    @property
    def length(self) -> int:
        """Tokens of a row; for GRPO the longest completion."""
        key = "max_completion_length" if self.script == "run_grpo.py" else "max_length"
        return int(self.values.get(key) or DEFAULT_LENGTHS[self.script])

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all processes that the recipe was written for."""
        per_process = self._value("per_device_train_batch_size") * self._value("gradient_accumulation_steps")
        return per_process * self.launch.num_processes

    @property
    def tokens(self) -> int:
        """Tokens learned from; for preferences and GRPO, whose rows are not packed, at most."""
        if self.is_surgery:
            return 0
        return self._value("max_steps") * self.rows_per_step * self.length * (2 if self.script == "run_dpo.py" else 1)

    @property
    def sequential_tokens(self) -> int:
        """Tokens that GRPO decodes one after another, whatever the number of GPUs: each step waits for the longest."""
        return self._value("max_steps") * self.length if self.script == "run_grpo.py" else 0

    @property
    def uses_adapters(self) -> bool:
        return bool(self.values.get("use_peft")) or self.values.get("policy") == "per_role"

    @property
    def is_mixed(self) -> bool:
        """Whether autocast takes products in bf16 or fp16; TRL's configs default to it."""
        bf16 = self.values.get("bf16")
        by_default = bf16 is None and self.script != "run_pretrain.py"
        return bool(bf16 or self.values.get("fp16") or by_default)

    @property
    def in_halves(self) -> bool:
        """Whether matrix products take bf16 or fp16, by autocast or as the weights are."""
        return self.is_mixed or self.values.get("dtype") in ("bfloat16", "float16")

    @property
    def has_reference(self) -> bool:
        """Whether the loss also asks what the model said before it was trained."""
        return self.script == "run_dpo.py" or bool(self.values.get("beta")) and self.script == "run_grpo.py"

    @property
    def is_elastic(self) -> bool:
        return bool(self.values.get("elastic"))

    @cached_property
    def flops_per_token(self) -> float:
        """Training FLOPs a token, forward and backward of everything the recipe asks for."""
        if self.is_surgery:
            return 0.0
        if self.is_elastic:
            options = {key: self.values[key] for key in ELASTIC_KEYS if key in self.values}
            return elastic_flops_per_token(self.config, self.length, **options)
        if self.uses_adapters:
            trained = adapter_flops_per_token(self.config, self.length)
        else:
            trained = training_flops_per_token(self.config, self.length, str(self.values.get("train_only", "all")))
        return trained + (flops_per_token(self.config, None, self.length) if self.has_reference else 0.0)

    @property
    def flops(self) -> float:
        return self.flops_per_token * self.tokens

    @cached_property
    def num_parameters(self) -> int:
        if isinstance(self.config, AdambaConfig):
            return sum(num_parameters(self.config).values())
        # A dense base: all but its embedding, where that is not the head too, are products with weights.
        tied = getattr(self.config, "tie_word_embeddings", False)
        return int(flops_per_token(self.config) / 2) + (
            0 if tied else self.config.vocab_size * self.config.hidden_size
        )

    @cached_property
    def num_trained(self) -> int:
        if self.is_surgery:
            return 0
        if self.uses_adapters:
            adapters = len(self.values.get("roles") or ()) if self.values.get("policy") == "per_role" else 1
            return adapters * num_adapter_parameters(self.config, int(self.values.get("lora_r", 16)))
        if not isinstance(self.config, AdambaConfig):
            return self.num_parameters
        return num_trained(self.config, str(self.values.get("train_only", "all")))

    def _value(self, key: str) -> int:
        return int(self.values.get(key, DEFAULTS.get(key)))


def read_plan(family: Path, without: Collection[str] = ()) -> list[PlannedPhase]:
    """
    Every run of a family in order. A phase in `without` is left out, and who reads its checkpoint reads what it would
    have read.

    Raises:
        UserError: no recipe, one whose script or sizes are unknown, or whose model is written by no phase.
    """
    written: dict[str, Any] = {}
    phases: list[PlannedPhase] = []
    for step in family_steps(family):
        path, script = step.recipe, step.script.name
        if step.evaluation or script not in SCRIPTS:
            continue
        values = read_recipe(path)
        _check_counts(path, script, values)
        try:
            reads = _config_read(values, written)
            config = _config_written(script, values, reads)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: sizes: {one_line(error)}") from None
        if step.name in without:
            written[str(values.get("output_dir"))] = reads
            continue
        written[str(values.get("output_dir"))] = config
        phases.append(PlannedPhase(step.name, path, script, values, read_launch(launch_command(path)), config))
    if not phases:
        raise UserError(f"{family}: no recipe of any phase here, for instance {family / 'phase1.yaml'}")
    return phases


def _check_counts(path: Path, script: str, values: Mapping[str, Any]) -> None:
    if script == "run_surgery.py":
        return
    if values.get("max_steps") is None:
        raise UserError(f"{path}: key 'max_steps': missing; epochs say nothing of the number of tokens")
    for key in COUNTS:
        value = values.get(key)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"{path}: key '{key}': got {value!r}, the plan needs a whole number of 1 or more")


def _config_read(values: Mapping[str, Any], written: Mapping[str, Any]) -> Any:
    name = values.get("model_name_or_path")
    if name is not None:
        return written[name] if name in written else sizes.base_config(name)
    fields = {"vocab_size": values.get("vocab_size", 1024)} | (values.get("model_config") or {})
    if values.get("depth"):
        return AdambaConfig.from_depth(values["depth"], **fields)
    return sizes.config_from(fields)


def _config_written(script: str, values: Mapping[str, Any], reads: Any) -> Any:
    if script != "run_surgery.py":
        return reads
    levels = values.get("width_levels")
    if values["operation"] == "insert":
        return sizes.inserted(reads, values.get("mamba_every", 1), levels, values.get("hybrid_config") or {})
    if values["operation"] == "expand":
        return sizes.expanded(reads, values["hidden_size"], levels)
    return sizes.sliced(reads, values["width"]) if values["operation"] == "slice" else reads


def read_launch(words: list[str]) -> Launch:
    """What a launch command and its accelerate file say about processes and sharding."""
    given = words[words.index("--num_processes") + 1] if "--num_processes" in words else None
    if given is not None and not given.isdecimal():
        raise UserError(f"--num_processes: {given} is no whole number")
    if "--config_file" not in words:
        return Launch(num_processes=int(given or 1))
    path = Path(words[words.index("--config_file") + 1])
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot read this accelerate config: {one_line(error)}") from None
    count = int(given or config.get("num_processes", 1))
    deepspeed = config.get("deepspeed_config") or {}
    stage = int(deepspeed.get("zero_stage", 0))
    fsdp = config.get("distributed_type") == "FSDP"
    if fsdp:
        stage = 3
    return Launch(
        num_processes=count,
        deepspeed=bool(deepspeed),
        parameter_shards=count if stage >= 3 else 1,
        gradient_shards=count if stage >= 2 else 1,
        optimizer_shards=count if stage >= 1 else 1,
        offloads_optimizer=deepspeed.get("offload_optimizer_device", "none") != "none",
        offloads_parameters=deepspeed.get("offload_param_device", "none") != "none",
        fsdp=fsdp,
    )
