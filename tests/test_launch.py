"""Ways to launch: what does not fit the machine is refused; configs that need GPUs are parsed and dry-run here."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from adamba import launch
from adamba.budget.memory import memory_gib
from adamba.budget.phases import read_launch, read_plan
from adamba.errors import UserError
from adamba.launch import check_launch, check_precision
from adamba.model import AdambaForCausalLM
from processes import launched

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("environment", "num_gpus", "message"),
    [
        (
            {"LOCAL_WORLD_SIZE": "8"},
            0,
            "8 processes on this machine, which has 0 GPUs; use accelerate_configs/cpu.yaml, or ddp_cpu.yaml with "
            "--use_cpu true",
        ),
        ({"LOCAL_WORLD_SIZE": "8"}, 4, "8 processes on this machine, which has 4 GPUs; use --num_processes 4"),
        ({"ACCELERATE_USE_FSDP": "true"}, 0, "1 processes on this machine, which has 0 GPUs"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_WORLD_SIZE": "8"}, 8, "DeepSpeed is not installed"),
    ],
)
def test_a_launch_that_does_not_fit_is_one_line(environment, num_gpus, message, monkeypatch) -> None:
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"accelerate config: {message}") as error:
        check_launch(environment, num_gpus)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("environment", "num_gpus"),
    [
        ({}, 0),
        ({"LOCAL_WORLD_SIZE": "1"}, 0),
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        ({"LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "True"}, 0),
        ({"LOCAL_WORLD_SIZE": "8", "ACCELERATE_USE_FSDP": "true"}, 8),
    ],
)
def test_a_launch_that_fits_passes(environment, num_gpus) -> None:
    check_launch(environment, num_gpus)


def test_a_recipe_for_the_cpu_needs_no_gpu() -> None:
    check_launch({"LOCAL_WORLD_SIZE": "2"}, 0, use_cpu=True)


def test_scripts_ask_before_anything_else(monkeypatch, capsys) -> None:
    import run_pretrain

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr("sys.argv", ["run_pretrain.py", str(ROOT / "recipes/tiny/phase1.yaml"), "--use_cpu", "false"])
    with pytest.raises(SystemExit) as stopped:
        run_pretrain.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: accelerate config: 64 processes on this machine, which has ")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_becomes_the_environment_of_its_processes(path: Path, monkeypatch) -> None:
    """A dry run: what accelerate would start and hand each process. Those with GPUs start nowhere here."""
    config = load_config_from_file(str(path))
    nodes = ["--main_process_ip", "10.0.0.1", "--machine_rank", "1"] if config.num_machines > 1 else []
    args, environment = launched(path.stem, *nodes)
    if path.stem in ("cpu", "single_gpu"):
        assert args is None and config.num_processes == 1
        assert environment["ACCELERATE_USE_CPU"] == str(path.stem == "cpu")
    else:
        assert int(args.nproc_per_node) * config.num_machines == config.num_processes
        assert int(args.nnodes.partition(":")[0]) == config.num_machines
    assert environment["ACCELERATE_MIXED_PRECISION"] == ("no" if "cpu" in path.stem else "bf16")
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert environment.get("ACCELERATE_USE_FSDP") == ("true" if path.stem == "fsdp2" else None)
    if path.stem == "fsdp2":
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward
        assert set(plugin.transformer_cls_names_to_wrap) == set(AdambaForCausalLM._no_split_modules)
    assert environment.get("ACCELERATE_USE_DEEPSPEED") == ("true" if config.distributed_type == "DEEPSPEED" else None)
    if config.distributed_type == "DEEPSPEED":
        zero = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
        assert zero["stage"] == (int(path.stem[4]) if path.stem.startswith("zero") else 2)
        offload = "cpu" if path.stem.endswith("offload") else "none"
        assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == offload
        # Without it, ZeRO-3 would publish DeepSpeed's shards instead of a checkpoint.
        assert zero["stage"] < 3 or zero["stage3_gather_16bit_weights_on_model_save"]


# Which part of weights and of optimizer state stays on each GPU; all of it where nothing is said.
SHARDED = {
    "zero1": {"optimizer": 1 / 8},
    "zero2": {"optimizer": 1 / 8},
    "multi_node": {"optimizer": 1 / 16},
    "zero3": {"weights": 1 / 8, "optimizer": 1 / 8},
    "zero3_offload": {"weights": 0, "optimizer": 0},
    "fsdp2": {"weights": 1 / 8, "optimizer": 1 / 8},
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_memory_of_the_largest_phase_is_estimated_for_each_config(path: Path) -> None:
    """The shapes of phase 4b (10.8 B parameters) under each config, which no machine here could hold."""
    phase = next(phase for phase in read_plan(ROOT / "recipes") if phase.name == "phase4b")
    launch = read_launch(["accelerate", "launch", "--config_file", str(path)])
    parts = memory_gib(dataclasses.replace(phase, launch=launch))
    weights = phase.num_parameters * (4 if launch.fsdp else 2) / 2**30  # bf16; FSDP keeps what learns in fp32
    assert parts["weights"] == pytest.approx(SHARDED.get(path.stem, {}).get("weights", 1) * weights)
    state = 6 if launch.deepspeed else 2  # moments like the weights; DeepSpeed: in fp32, beside its own copy of them
    assert parts["optimizer"] == pytest.approx(SHARDED.get(path.stem, {}).get("optimizer", 1) * state * weights)


@pytest.mark.parametrize(
    ("theirs", "bf16", "deepspeed", "message"),
    [
        (
            "bf16",
            False,
            "false",
            "mixed_precision is bf16, the recipe's is no; give --bf16 true, or accelerate launch",
        ),
        ("bf16", False, "true", "mixed_precision is bf16, the recipe's is no"),
        ("no", True, "true", "mixed_precision is no, the recipe's is bf16; give accelerate launch --mixed_precision"),
    ],
)
def test_two_precisions_are_one_line(theirs, bf16, deepspeed, message) -> None:
    environment = {"ACCELERATE_MIXED_PRECISION": theirs, "ACCELERATE_USE_DEEPSPEED": deepspeed}
    with pytest.raises(UserError, match=f"accelerate config: {message}"):
        check_precision(bf16, False, environment)


def test_one_precision_passes() -> None:
    check_precision(True, False, {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_DEEPSPEED": "true"})
    check_precision(True, False, {"ACCELERATE_MIXED_PRECISION": "no"})  # the Trainer takes the recipe's
    check_precision(False, False, {"ACCELERATE_MIXED_PRECISION": "no"})
    check_precision(False, False, {})


def test_recipes_have_the_precision_of_their_config() -> None:
    seen = 0
    for recipe in (ROOT / "recipes").rglob("*.yaml"):
        words = recipe.read_text().splitlines()[0].split()
        values = yaml.safe_load(recipe.read_text())
        if "--config_file" in words and "bf16" in values:
            config = load_config_from_file(str(ROOT / words[words.index("--config_file") + 1]))
            environment = {"ACCELERATE_MIXED_PRECISION": config.mixed_precision, "ACCELERATE_USE_DEEPSPEED": "true"}
            check_precision(values["bf16"], False, environment)
            seen += 1
    assert seen >= 10


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload", "multi_node"])
def test_deepspeed_clips_at_the_recipes_own_max_grad_norm(name, monkeypatch) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is for Linux")
    for key, value in launched(name)[1].items():
        monkeypatch.setenv(key, value)
    config = HfTrainerDeepSpeedConfig(DeepSpeedPlugin().deepspeed_config)
    config.fill_match("gradient_clipping", 0.5, "max_grad_norm")  # as the Trainer does before it starts
    assert config.config["gradient_clipping"] == 0.5 and not config.mismatches
