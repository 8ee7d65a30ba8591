"""A made-up family of runs, in the files the real scripts write."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from adamba.report.reading import PHASES

WIDTHS = {"phase2": (16, 32, 48, 64), "phase3b": (16, 32, 48, 64, 96), "phase4b": (32, 64, 96, 128)}
HIDDEN_SIZES = {"phase3a": 96, "phase3b": 96, "phase4a": 128}
THRESHOLDS = (0.8, 0.9, 0.95, 0.99, 1.0)
LM_PHASES = {
    "base": (8.3, 3.4),
    "phase1": (3.4, 3.1),
    "phase2": (3.1, 2.6),
    "phase3b": (2.6, 2.3),
    "phase4b": (2.3, 2.05),
}


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _log(start: float, end: float, tokens: int, widths: tuple[int, ...], rng: random.Random) -> list[dict]:
    entries: list[dict] = []
    for step in range(1, 81):
        loss = end + (start - end) * math.exp(-step / 14) + rng.gauss(0, 0.05)
        entry = {"step": step * 5, "loss": loss, "learning_rate": 1e-3}
        entry |= {"loss_pydoc_topics": loss * 1.6, "loss_calculator": loss * 0.6, "loss_tic_tac_toe": loss * 0.55}
        for rank, width in enumerate(reversed(widths)):
            key = "loss_full" if rank == 0 else f"loss_width_{width}"
            if rank == 0 or (step + rank) % 3:  # a width that was not sampled since the last log is not in it
                entry[key] = loss * (1 + 0.06 * rank) + rng.gauss(0, 0.02)
        entries.append(entry)
    return entries + [{"step": 400, "train_loss": (start + end) / 2, "train_runtime": 12.0}]


def _elastic(name: str, loss: float) -> dict[str, float]:
    widths = WIDTHS.get(name, WIDTHS["phase4b"])
    metrics: dict[str, float] = {}
    for rank, width in enumerate(reversed(widths)):
        metrics[f"eval_loss_width_{width}"] = loss * (1 + 0.055 * rank)
        metrics[f"flops_per_token_width_{width}"] = 1.2e6 * (width / 64) ** 1.5 + 4e5
    full = metrics[f"flops_per_token_width_{widths[-1]}"]
    for threshold in THRESHOLDS:
        skipped = 0.52 * (1 - threshold) ** 0.33
        metrics[f"exit_fraction_threshold_{threshold}"] = skipped
        metrics[f"agreement_threshold_{threshold}"] = 1 - 0.16 * (1 - threshold) ** 0.9
        metrics[f"eval_loss_threshold_{threshold}"] = loss * (1 + 0.1 * skipped**2)
        metrics[f"flops_per_token_threshold_{threshold}"] = full * (1 - 0.9 * skipped)
    for index in range(10):
        confidence = 0.05 + 0.1 * index
        metrics[f"gate_bin_{index}_confidence"] = confidence
        metrics[f"gate_bin_{index}_agreement"] = min(1.0, confidence + 0.03 * math.sin(index))
        metrics[f"gate_bin_{index}_count"] = [210, 340, 390, 420, 510, 640, 900, 1500, 3300, 9100][index]
    return metrics | {
        "gate_ece": 0.021,
        "gate_ece_layer_3": 0.034,
        "gate_ece_layer_5": 0.02,
        "gate_ece_layer_7": 0.013,
    }


def _agent(name: str) -> dict[str, float]:
    after = name != "phase5"
    metrics: dict[str, float] = {
        "accuracy_calculator": 0.992 if after else 0.984,
        "episodes_calculator": 500,
        "valid_tool_call_rate_calculator": 1.0 if after else 0.996,
        "legal_move_rate_tic_tac_toe": 0.999 if after else 0.996,
    }
    for opponent, lost, won in (("perfect", 0.14, 0.0), ("random", 0.06, 0.83)):
        lost, won = (lost * 0.35, won * 1.08) if after else (lost, won)
        metrics[f"loss_rate_tic_tac_toe_{opponent}"] = lost
        metrics[f"win_rate_tic_tac_toe_{opponent}"] = won
        metrics[f"draw_rate_tic_tac_toe_{opponent}"] = 1 - lost - won
        metrics[f"episodes_tic_tac_toe_{opponent}"] = 300
    for rank, width in enumerate(reversed(WIDTHS["phase4b"])):
        metrics[f"accuracy_calculator_width_{width}"] = metrics["accuracy_calculator"] - 0.035 * rank**1.6
    for threshold in THRESHOLDS:
        metrics[f"episodes_calculator_threshold_{threshold}"] = 100
        metrics[f"accuracy_calculator_threshold_{threshold}"] = metrics["accuracy_calculator"] - 0.1 * (1 - threshold)
    return metrics


def write_family(root: Path) -> Path:
    """Write all phases of a tiny family under `root` and return `root`. A phase unknown here is a training phase."""
    rng = random.Random(0)
    hidden_size, loss = 64, 8.3
    names = ("base", "phase0", "phase1", "phase2", "phase3a", "phase3b", "phase4a", "phase4b", "phase5")
    known = (*names, "phase6_grpo", "phase6_dpo")
    for name in (*known, *(phase for phase in PHASES if phase not in known)):
        folder = root / name
        hidden_size = HIDDEN_SIZES.get(name, hidden_size)
        metrics: dict[str, float] = {"hidden_size": hidden_size, "num_parameters": 21_000 * hidden_size}
        if name in ("phase0", "phase3a", "phase4a"):
            metrics |= {
                "max_abs_logit_diff": 2.4e-6,
                "loss_before": loss,
                "loss_after": loss + 1e-6,
                "eval_loss": loss,
            }
            widths = {"phase0": (64,), "phase3a": WIDTHS["phase2"], "phase4a": WIDTHS["phase3b"]}[name]
            metrics |= {f"max_abs_logit_diff_width_{width}": 1e-8 * width for width in widths}
            write_json(folder / "log_history.json", [])
        else:
            start, end = LM_PHASES.get(name, (2.4, 0.31))
            loss = end + 0.06
            tokens = {"base": 4_000_000, "phase5": 2_500_000}.get(name, 1_500_000 if name in known else 0)
            metrics |= {"tokens_seen": tokens, "train_seconds": 75.0, "train_loss": end, "eval_loss": loss}
            metrics |= {"peak_memory_bytes": 2.1e9}
            log = _log(start, end, tokens, WIDTHS.get(name, ()), rng)
            if name == "phase6_grpo":
                log = [
                    {"step": s, "loss": 0.01, "reward": 0.9 - 0.5 * math.exp(-s / 20) + rng.gauss(0, 0.04)}
                    for s in range(1, 61)
                ]
            write_json(folder / "log_history.json", log)
            if name not in ("base", "phase1"):
                metrics |= _elastic(name, loss)
            if name in ("phase5", "phase6_grpo", "phase6_dpo"):
                metrics |= _agent(name)
            else:
                metrics |= {"flops_per_token": 1.6e6} if name in ("base", "phase1") else {}
        write_json(folder / "metrics.json", metrics)
        script = {"phase5": "run_sft.py", "phase6_grpo": "run_grpo.py", "phase6_dpo": "run_dpo.py"}.get(
            name, "run_pretrain.py"
        )
        write_json(
            folder / "run.json",
            {"script": script, "commit": "0123abcd" * 5, "platform": "Linux-test", "packages": {"torch": "2.13.0"}},
        )
        levels = {"ghost": 32, "whisper": 64, "normal": 96, "think": 128} if hidden_size == 128 else {}
        write_json(folder / "config.json", {"model_type": "adamba", "width_levels": levels})
    return root


@pytest.fixture(scope="session", name="write_family")
def write_family_fixture() -> Callable[[Path], Path]:
    return write_family


@pytest.fixture
def family_dir(tmp_path: Path) -> Path:
    return write_family(tmp_path / "checkpoints" / "tiny")
