"""A team of a planner and an actor, of a few thousand weights, on small boards of `plan_path`."""

import json
from pathlib import Path

import torch

from adamba.data import train_tokenizer
from adamba.model import AdambaForCausalLM
from adamba.tasks import TASKS
from adamba.training.agent_config import AgentConfig
from adamba.training.agent_rows import prompt_rows
from adamba.training.at_grpo import AtGrpoTrainer, TeamSettings
from models import smallest_config

PATH = {"size": 4, "max_steps": 6, "moves_per_call": 2}
TEAM = {"planner": {}, "actor": {}}


def path_tokenizer():
    return train_tokenizer([json.dumps(TASKS["plan_path"].example(seed, "train")) for seed in range(20)], 277)


def tiny_model(tokenizer) -> AdambaForCausalLM:
    torch.manual_seed(0)
    model = AdambaForCausalLM(smallest_config(len(tokenizer), max_position_embeddings=1024))
    model.generation_config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    return model


def path_rows(count: int):
    return prompt_rows({"plan_path": 1.0}, count, split="train", seed=0, settings={"plan_path": PATH})


def config(folder: Path, **changes) -> AgentConfig:
    settings = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 24,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "gradient_checkpointing": False,
    }
    return AgentConfig(**settings | changes)


def team_trainer(tokenizer, folder: Path, team: TeamSettings, model=None, **changes) -> AtGrpoTrainer:
    return AtGrpoTrainer(
        team_settings=team,
        model=model or tiny_model(tokenizer),
        args=config(folder, **changes),
        train_dataset=path_rows(40),
        eval_dataset=path_rows(changes["num_eval_prompts"]) if "num_eval_prompts" in changes else None,
        processing_class=tokenizer,
    )
