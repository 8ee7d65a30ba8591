"""
Measure a checkpoint on held-out text and task instances, at every width and several exit thresholds; the figures go
into its metrics.json.

    python src/run_eval.py recipes/tiny/eval.yaml --model_name_or_path checkpoints/tiny/phase2
    python src/run_eval.py recipes/tiny/eval.yaml --model_name_or_path checkpoints/tiny/phase5 \
        --calibrate risk=0.01,confidence=0.95
"""

from adamba.kept_help import print_kept_help

if __name__ == "__main__":
    print_kept_help()  # before the imports below, which take seconds

import itertools
import time
from dataclasses import dataclass, field

import torch
from accelerate import PartialState

from adamba.data import load_mixture, pack_rows
from adamba.data.arguments import DataArguments
from adamba.errors import UserError, user_errors
from adamba.flops import flops_per_token
from adamba.hub import HubArguments, hub_target, push_run
from adamba.loading import ModelArguments, check_length, load_model_and_tokenizer
from adamba.model import AdambaForCausalLM
from adamba.model.decoding_adamba import OPTIONS
from adamba.publish import read_run, update_metrics
from adamba.recipe import parse
from adamba.training.calibration import calibrate_checkpoint, calibration_settings, require_gates
from adamba.training.evaluation import (
    GameSettings,
    check_tasks,
    elastic_metrics,
    losses_by_source,
    play_tasks,
    tell_not_played,
)
from adamba.training.session import logger, setup_logging


@dataclass
class EvalArguments:
    max_length: int = field(default=256, metadata={"help": "Tokens in a packed row."})
    num_rows: int = field(default=48, metadata={"help": "Held-out rows of each source."})
    assistant_only_loss: bool = field(default=False, metadata={"help": "Losses on the assistant's tokens only."})
    batch_size: int = field(default=16, metadata={"help": "Rows in a forward pass."})
    exit_thresholds: list[float] = field(
        default_factory=lambda: [0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99],
        metadata={"help": "Gate probabilities above which a token exits."},
    )
    num_episodes: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Task -> episodes played at full width; 0 or absent: none."}
    )
    num_sweep_episodes: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Task -> episodes played at each narrower width and exit threshold."}
    )
    sweep_thresholds: list[float] = field(
        default_factory=lambda: [0.9, 0.98], metadata={"help": "Exit thresholds at which episodes are played."}
    )
    calibrate: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "Choose the exit threshold that loses at most `risk` with `confidence` on `trials` held-out "
            "episodes of each task in num_episodes (rows of text without one), and write it into the checkpoint."
        },
    )
    play_batch_size: int = field(default=256, metadata={"help": "Episodes played at once."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU, whatever GPUs there are."})
    max_new_tokens: int = field(default=96, metadata={"help": "Tokens in one turn of the model."})

    def __post_init__(self) -> None:
        check_tasks("num_episodes", self.num_episodes)
        check_tasks("num_sweep_episodes", self.num_sweep_episodes)


@user_errors()
def main() -> None:
    model_args, data_args, hub_args, args, recipe = parse(ModelArguments, DataArguments, HubArguments, EvalArguments)
    read_run(model_args.model_name_or_path or "")  # where the figures go: its files are replaced
    target = hub_target(hub_args, model_args.model_name_or_path or "")
    calibration = calibration_settings(args.calibrate)
    # Without `cpu`, accelerate sees one process where several of gloo were launched.
    state = PartialState(cpu=args.use_cpu or not torch.cuda.is_available())
    setup_logging(state.is_main_process)
    started = time.monotonic()
    model, tokenizer = load_model_and_tokenizer(model_args)
    check_length(model, args.max_length)
    if calibration is not None:
        require_gates(model, model_args.model_name_or_path)
    model.to(state.device).eval()
    if isinstance(model, AdambaForCausalLM):
        for option in OPTIONS:  # each is measured by itself, whatever the checkpoint's own choice is
            setattr(model.generation_config, option, None)
    num_rows = args.num_rows + (0 if calibration is None or any(args.num_episodes.values()) else calibration.trials)
    rows = {}
    for source in data_args.mix:
        stream = load_mixture({source: 1.0}, **data_args.mixture_options("test", source))
        packed = pack_rows(
            stream, tokenizer, args.max_length, assistant_only_loss=args.assistant_only_loss, documents_per_batch=256
        )
        rows[source] = list(itertools.islice(packed, num_rows))
        if not rows[source]:
            raise UserError(f"mix: {source!r} has no held-out row")

    spare = [row for source in rows for row in rows[source][args.num_rows :]]
    rows = {source: found[: args.num_rows] for source, found in rows.items()}

    metrics: dict[str, float | str] = {}
    for source, loss in losses_by_source(model, rows, args.batch_size).items():
        metrics["eval_loss" if not source else f"eval_loss_{source}"] = loss
    metrics["flops_per_token"] = flops_per_token(model.config, context_length=args.max_length)
    metrics["num_parameters"] = model.num_parameters()
    metrics["hidden_size"] = model.config.hidden_size
    logger.info("held-out loss %.4f", metrics["eval_loss"])

    tell_not_played(data_args.mix, args.num_episodes)
    games = GameSettings(args.num_episodes, args.max_new_tokens, args.play_batch_size, data_args.task_settings)
    sweep = GameSettings(args.num_sweep_episodes, args.max_new_tokens, args.play_batch_size, data_args.task_settings)
    if games.num_episodes:
        metrics |= play_tasks(model, tokenizer, games)
    if isinstance(model, AdambaForCausalLM):
        metrics |= elastic_metrics(model, tokenizer, rows, args, sweep)
    if not state.is_main_process:
        return
    found: dict[str, float | str] = {}
    if calibration is not None:
        found = calibrate_checkpoint(model, tokenizer, model_args.model_name_or_path, games, spare, calibration)
        update_metrics(model_args.model_name_or_path, found, "calibration")  # they stay as long as what it chose
    metrics["eval_seconds"] = time.monotonic() - started
    update_metrics(model_args.model_name_or_path, metrics, recipe.asked)
    metrics |= found
    if target is not None:
        logger.info("pushed to %s", push_run(model_args.model_name_or_path, target))
    for key in sorted(metrics):
        if not key.startswith("gate_bin"):
            value = metrics[key]
            logger.info("  %s: %s", key, value if isinstance(value, str) else f"{value:.6g}")


if __name__ == "__main__":
    main()
