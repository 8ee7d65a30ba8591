"""The keys of every real script: what numbers they may have, and where a bad one is said to come from."""

from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from adamba.errors import UserError
from adamba.recipe import parse
from adamba.recipe_ranges import RANGES, out_of_range

SCRIPTS = ("run_pretrain", "run_sft", "run_grpo", "run_dpo", "run_eval", "run_surgery", "run_games", "run_rollout")


def dataclasses_of(script: str) -> list[type]:
    """What a script hands to `parse`."""
    found: list[type] = []

    def keep(*types: type, **_: Any) -> None:
        found.extend(types)
        raise UserError("enough")

    module = import_module(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "parse", keep)
        with pytest.raises(SystemExit):
            module.main()
    return found


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("run_sft", "--learning_rate -1", "learning_rate: -1.0 must be 0 or more"),
        ("run_sft", "--learning_rate nan", "learning_rate: nan is no number; it must be 0 or more"),
        ("run_sft", "--weight_decay -1", "weight_decay: -1.0 must be 0 or more"),
        ("run_sft", "--adam_beta2 2", "adam_beta2: 2.0 must be from 0 to below 1"),
        ("run_sft", "--per_device_train_batch_size 0", "per_device_train_batch_size: 0 must be 1 or more"),
        ("run_sft", "--gradient_accumulation_steps 0", "gradient_accumulation_steps: 0 must be 1 or more"),
        ("run_sft", "--save_steps 0", "save_steps: 0.0 must be above 0"),
        ("run_sft", "--logging_steps 0", "logging_steps: 0.0 must be above 0"),
        ("run_sft", "--seed -1", "seed: -1 must be from 0 to 4294967295"),
        ("run_sft", "--seed 99999999999999999999", "seed: 99999999999999999999 must be from 0 to 4294967295"),
        ("run_sft", "--dataloader_num_workers -1", "dataloader_num_workers: -1 must be 0 or more"),
        ("run_sft", "--report_to bogus", "report_to: 'bogus' is unknown; use none, "),
        ("run_sft", "--max_grad_norm -1", "max_grad_norm: -1.0 must be 0 or more"),
        ("run_sft", "--max_length 0", "max_length: 0 must be 1 or more"),
        ("run_sft", "--num_eval_rows 0", "num_eval_rows: 0 must be 1 or more"),
        ("run_pretrain", "--mix a=1 --max_steps 1 --eval_strategy epoch", "eval_strategy: "),
        ("run_dpo", "--mix a=1 --max_steps 1 --eval_strategy epoch", "needs num_eval_pairs above 0"),
        ("run_eval", "--mix a=1 --num_episodes nosuch=2", "num_episodes: 'nosuch' is no task; use calculator, "),
        (
            "run_eval",
            "--mix a=1 --num_episodes tic_tac_toe=1",
            "num_episodes: tic_tac_toe=1 must be even",
        ),
        ("run_eval", "--num_episodes calculator=-2", "num_episodes: calculator: -2 must be 0 or more"),
        ("run_eval", "--max_new_tokens 0", "max_new_tokens: 0 must be 1 or more"),
        ("run_eval", "--batch_size 0", "batch_size: 0 must be 1 or more"),
        ("run_eval", "--num_rows -1", "num_rows: -1 must be 1 or more"),
        ("run_eval", "--exit_thresholds [0.5,2]", "exit_thresholds: item 1: 2.0 must be from 0 to 1"),
        ("run_eval", "--sweep_thresholds [-1]", "sweep_thresholds: item 0: -1.0 must be from 0 to 1"),
        ("run_grpo", "--temperature 0", "temperature: 0.0 must be above 0"),
        ("run_grpo", "--max_completion_length 0", "max_completion_length: 0 must be 1 or more"),
        ("run_grpo", "--beta -1", "beta: -1.0 must be 0 or more"),
        ("run_rollout", "--temperature -1", "temperature: -1.0 must be 0 or more"),
    ],
)
def test_a_number_that_cannot_be_is_one_line_that_says_what_can(script, options, message) -> None:
    model = ["--model_name_or_path", "x", "--output_dir", "y", "--use_cpu", "true", "--bf16", "false"]
    words = [*(model[:2] if script in ("run_eval", "run_rollout") else model), *options.split()]
    with pytest.raises(UserError) as error:
        parse(*dataclasses_of(script), argv=words)
    assert str(error.value).startswith("command line: ") and message in str(error.value)


def test_each_range_is_of_a_key_and_holds_its_default() -> None:
    """A misspelt key would guard nothing."""
    types = [kind for script in SCRIPTS for kind in dataclasses_of(script)]
    fields = {f"{base.__name__}.{name}" for kind in types for base in kind.__mro__ for name in get_fields(base)}
    known = fields | {field.partition(".")[2] for field in fields}
    assert set(RANGES) <= known
    for kind in types:
        for name, found in get_fields(kind).items():
            if found.init and not isinstance(found.default, type(MISSING)):
                assert out_of_range(name, found.default, [kind]) is None, (kind, name)


def get_fields(kind: type) -> dict[str, Any]:
    return {field.name: field for field in fields(kind)} if is_dataclass(kind) else {}


@pytest.mark.parametrize("key", ["max_steps", "warmup_steps", "max_hours", "num_prompts"])
def test_a_value_of_the_command_line_is_not_blamed_on_the_recipe(key, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    good = {"mix": {"calculator": 1.0}, "model_name_or_path": "x", "output_dir": "y", "max_steps": 1}
    path.write_text(yaml.safe_dump(good | {"use_cpu": True, "bf16": False}))
    types = dataclasses_of("run_grpo" if key == "num_prompts" else "run_sft")
    with pytest.raises(UserError, match=f"^command line: {key}: -5"):
        parse(*types, argv=[str(path), f"--{key}", "-5"])
    path.write_text(path.read_text().replace("max_steps: 1\n", "") + f"{key}: -5\nnum_train_epochs: 1\n")
    with pytest.raises(UserError, match=f"^{path}: "):
        parse(*types, argv=[str(path)])


@pytest.mark.parametrize("script", ["run_pretrain", "run_surgery"])
def test_without_a_recipe_the_error_says_that_there_are_recipes(script) -> None:
    with pytest.raises(UserError, match="give a recipe first"):
        parse(*dataclasses_of(script), argv=[])
