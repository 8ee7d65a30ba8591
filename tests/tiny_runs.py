"""Run the real scripts in this process, on checkpoints of a few thousand weights."""

import json
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from adamba.data import train_tokenizer
from adamba.model import AdambaForCausalLM
from adamba.surgery import insert_mamba
from adamba.tasks import TASKS
from models import smallest_config

ROOT = Path(__file__).parents[1]
LEVELS = {"ghost": 8, "normal": 16, "think": 32}
HYBRID = {"mamba_state_size": 4, "mamba_head_dim": 8, "mamba_num_groups": 4, "mamba_chunk_size": 16}
DATA = {"mix": {"calculator": 1.0, "tic_tac_toe": 0.5}, "max_length": 64}
TRAIN = DATA | {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 5.0e-3,
    "logging_steps": 2,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
}
AGENT = {
    "mix": {"calculator": 1.0, "tic_tac_toe": 1.0},
    "max_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1.0e-3,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
}
GRPO = AGENT | {
    "num_prompts": 8,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 48,
    "rewards": {"correctness": 1.0, "format": 0.2, "tool_use": 0.1, "efficiency": 0.1},
}
DPO = AGENT | {"num_pairs": 16, "per_device_train_batch_size": 4, "max_length": 512}
Run = Callable[..., None]


def task_texts() -> Iterable[str]:
    return (
        json.dumps(TASKS[name].example(seed, "train")) for name in ("calculator", "tic_tac_toe") for seed in range(50)
    )


def save_tokenizer(folder: Path, vocab_size: int = 384):
    tokenizer = train_tokenizer(task_texts(), vocab_size)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_base(folder: Path) -> PreTrainedModel:
    """A dense Llama of two layers, with its tokenizer."""
    tokenizer = save_tokenizer(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model


def save_hybrid(folder: Path) -> PreTrainedModel:
    """The base with a Mamba layer after each of its layers, four layers in all; every weight away from zero."""
    model = insert_mamba(save_base(folder), width_levels=LEVELS, first_exit_layer=1, **HYBRID)
    with torch.no_grad():
        for layer in model.model.layers:
            if hasattr(layer, "mixer"):
                layer.mixer.out_proj.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    return model


def save_agent(folder: Path) -> None:
    """A hybrid of two layers that reads the prompts of the tasks, with its tokenizer."""
    tokenizer = save_tokenizer(folder, vocab_size=512)
    torch.manual_seed(0)
    AdambaForCausalLM(smallest_config(len(tokenizer), max_position_embeddings=512)).save_pretrained(folder)


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    path.write_text("# accelerate launch src/run_x.py x.yaml\n" + yaml.safe_dump(values))
    return path


def runner(monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("run_pretrain.py", recipe, "--key", "value")` calls the script's `main` as the command would."""

    def run(script: str, *arguments: str | Path) -> None:
        monkeypatch.setattr("sys.argv", [str(ROOT / "src" / script), *map(str, arguments)])
        import_module(script.removesuffix(".py")).main()

    return run


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
