"""A real `PretrainTrainer` on a few packed rows of random tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from adamba.training.elastic import ElasticArguments
from adamba.training.pretraining import PretrainConfig, PretrainTrainer
from models import VOCAB


def packed_dataset(num_rows: int, length: int = 16, seed: int = 0) -> Dataset:
    """Rows of two documents each, as `pack_rows` makes them: no label for the first token of a document."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(num_rows):
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        border = 3 + index % 5
        labels = [-100 if place in (0, border) else token for place, token in enumerate(ids)]
        positions = [*range(border), *range(length - border)]
        source = ("prose", "sums")[index % 2]
        rows.append({"input_ids": ids, "labels": labels, "position_ids": positions, "source": source})
    return Dataset.from_list(rows)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., PretrainTrainer]:
    def make(model: PreTrainedModel, elastic_args: ElasticArguments | None = None, **changes) -> PretrainTrainer:
        settings = {
            "output_dir": str(tmp_path / "trainer"),
            "max_steps": 10,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 5,
        }
        return PretrainTrainer(
            model=model,
            args=PretrainConfig(**{**settings, **changes}),
            train_dataset=packed_dataset(40),
            sources=["prose", "sums"],
            elastic_args=elastic_args or ElasticArguments(),
        )

    return make
