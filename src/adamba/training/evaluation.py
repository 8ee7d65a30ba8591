"""Held-out measures of a checkpoint: loss at every width, what early exit would cost and save, and played episodes."""

import itertools
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adamba.errors import UserError
from adamba.flops import flops_per_token, head_flops, layer_flops
from adamba.model import AdambaForCausalLM
from adamba.tasks import TASKS
from adamba.training.head_losses import IGNORED, head_losses, next_token_losses, run_to_head
from adamba.training.play import play, score_episodes

logger = logging.getLogger("adamba")

NUM_BINS = 10
Batch = dict[str, torch.Tensor]


@torch.no_grad()
def losses_by_source(
    model: PreTrainedModel, rows: dict[str, list[dict]], batch_size: int, **options
) -> dict[str, float]:
    """Mean next-token loss (nats) of packed rows, for each source and over all, at the given width."""
    sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    for source, batch in _batches(rows, batch_size, model.device):
        labels = batch.pop("labels")
        _, losses = next_token_losses(model, model, batch, labels, **options)
        count = (labels[:, 1:] != IGNORED).sum()
        for key in (source, ""):
            sums[key] += torch.stack((losses.double().sum(), count.double())).cpu()
    return {key: (total / count).item() for key, (total, count) in sums.items()}


def _batches(rows: dict[str, list[dict]], batch_size: int, device) -> Iterable[tuple[str, Batch]]:
    for source, source_rows in rows.items():
        for start in range(0, len(source_rows), batch_size):
            part = source_rows[start : start + batch_size]
            keys = ("input_ids", "labels", "position_ids")
            yield source, {key: torch.tensor([row[key] for row in part], device=device) for key in keys}


@dataclass
class ExitObservations:
    """For each counted token: each gate's probability, whether each exit agrees with the full depth, and each loss."""

    gate_layers: list[int]
    confidence: torch.Tensor  # (tokens, gates)
    agrees: torch.Tensor  # (tokens, gates), bool
    losses: torch.Tensor  # (tokens, gates + 1), the last column being full depth


@torch.no_grad()
def observe_exits(
    model: AdambaForCausalLM, rows: dict[str, list[dict]], batch_size: int, width=None
) -> ExitObservations:
    """Run full depth once and look at every exit on the way."""
    layers = model.config.gate_layers
    confidence, agrees, losses = [], [], []
    for _, batch in _batches(rows, batch_size, model.device):
        labels = batch.pop("labels")
        counted = labels[:, 1:] != IGNORED
        final, output = run_to_head(model, model, batch, labels, layers, width=width, output_gates=True)
        early = [head_losses(model, hidden, labels) for hidden in output.exit_hidden_states[:-1]]
        confidence.append(output.gate_logits[:, :-1].sigmoid()[counted].cpu())
        agrees.append(torch.stack([(exit.choices == final.choices)[counted] for exit in early], -1).cpu())
        losses.append(torch.stack([said.losses[counted] for said in (*early, final)], -1).cpu())
    return ExitObservations(layers, torch.cat(confidence), torch.cat(agrees), torch.cat(losses))


def exit_metrics(
    model: AdambaForCausalLM, seen: ExitObservations, thresholds: Sequence[float], context_length: int
) -> dict[str, float]:
    """
    For each threshold: the share of layer computations skipped, agreement with full depth, loss and FLOPs a token; and
    the calibration of the gates (expected calibration error, 10 bins of equal width; Guo et al., 2017).
    """
    num_layers = model.config.num_hidden_layers
    metrics: dict[str, float] = {}
    exits = [*seen.gate_layers, num_layers - 1]
    each_layer = layer_flops(model.config, context_length=context_length)
    flops = torch.tensor([float(sum(each_layer[: layer + 1])) for layer in exits])
    for threshold in thresholds:
        sure = torch.cat((seen.confidence > threshold, torch.ones(len(seen.confidence), 1, dtype=torch.bool)), dim=1)
        taken = sure.int().argmax(1)
        stops = torch.tensor(exits)[taken]
        agrees = torch.cat((seen.agrees, torch.ones(len(taken), 1, dtype=torch.bool)), dim=1)
        name = f"threshold_{threshold:g}"
        metrics[f"exit_fraction_{name}"] = ((num_layers - 1 - stops).float() / num_layers).mean().item()
        metrics[f"agreement_{name}"] = agrees.gather(1, taken[:, None]).float().mean().item()
        metrics[f"eval_loss_{name}"] = seen.losses.gather(1, taken[:, None]).mean().item()
        metrics[f"flops_per_token_{name}"] = flops[taken].mean().item() + head_flops(model.config)
    metrics |= reliability(seen.confidence.flatten(), seen.agrees.flatten())
    for index, layer in enumerate(seen.gate_layers):
        metrics[f"gate_ece_layer_{layer}"] = reliability(seen.confidence[:, index], seen.agrees[:, index])["gate_ece"]
        metrics[f"exit_loss_layer_{layer}"] = seen.losses[:, index].mean().item()
    return metrics


def reliability(confidence: torch.Tensor, agrees: torch.Tensor) -> dict[str, float]:
    """Expected calibration error, and mean confidence, agreement and count of each bin."""
    bins = (confidence * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    metrics, error = {}, 0.0
    for index in range(NUM_BINS):
        inside = bins == index
        count = int(inside.sum())
        metrics[f"gate_bin_{index}_count"] = count
        if count:
            mean_confidence = confidence[inside].mean().item()
            mean_agreement = agrees[inside].float().mean().item()
            metrics[f"gate_bin_{index}_confidence"] = mean_confidence
            metrics[f"gate_bin_{index}_agreement"] = mean_agreement
            error += count / len(confidence) * abs(mean_confidence - mean_agreement)
    return {"gate_ece": error, **metrics}


def check_tasks(key: str, num_episodes: Mapping[str, int]) -> None:
    """Refuse what is no task, and an odd number of games of tic-tac-toe: one alone would be none.

    Raises:
        UserError: naming the recipe's key and what would work.
    """
    for name, count in num_episodes.items():
        if name not in TASKS:
            raise UserError(f"{key}: {name!r} is no task; use {', '.join(TASKS)}")
        if name == "tic_tac_toe" and count % 2:
            raise UserError(f"{key}: {name}={count} must be even, half of the games are played on each side")


def tell_not_played(mix: Iterable[str], num_episodes: Mapping[str, int]) -> None:
    """One line on tasks of the mix that are not played where others are: a new mix does not change what is."""
    unplayed = [name for name in mix if name in TASKS and not num_episodes.get(name)]
    if unplayed and any(num_episodes.values()):
        more = ",".join(f"{name}={max(num_episodes.values())}" for name in unplayed)
        logger.info("in the mix but not played: %s (--num_episodes %s plays)", ", ".join(unplayed), more)


@dataclass
class GameSettings:
    """How many episodes of each task are played, and against whom."""

    num_episodes: dict[str, int] = field(default_factory=dict)
    max_new_tokens: int = 96
    batch_size: int = 256
    settings: dict[str, dict] = field(default_factory=dict)
    opponents: tuple[str, ...] = ("perfect", "random")


def task_rows(name: str, count: int, games: GameSettings, first_seed: int = 0) -> list[dict]:
    """Held-out instances of a task; of tic-tac-toe `count` for each opponent, half of them on each side."""
    if name != "tic_tac_toe":
        settings = games.settings.get(name, {})
        return [TASKS[name].prompt(seed, "test", **settings) for seed in range(first_seed, first_seed + count)]
    rows = []
    for opponent, mark in itertools.product(games.opponents, ("X", "O")):
        settings = {"opponent": opponent, "mark": mark, "random_start_fraction": 0.0}
        seeds = range(first_seed, first_seed + count // 2)
        rows += [TASKS[name].prompt(seed, "test", **settings) for seed in seeds]
    return rows


def play_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, games: GameSettings, **generate_kwargs
) -> dict[str, float]:
    """
    Scores on held-out instances. Tic-tac-toe is played against each opponent, half the games on each side, from the
    empty board; held out is there only the seed of the opponent's moves. Processes share the episodes; each gets the
    scores of all.
    """
    state = PartialState()
    metrics: dict[str, float] = {}
    for name, count in games.num_episodes.items():
        if not count:
            continue
        rows = task_rows(name, count, games)
        episodes = play(
            model,
            tokenizer,
            rows[state.process_index :: state.num_processes],
            max_new_tokens=games.max_new_tokens,
            batch_size=games.batch_size,
            generate_kwargs=generate_kwargs,
        )
        metrics |= score_episodes(name, gather_object(episodes))
    return metrics


def elastic_metrics(model, tokenizer, rows, args: Any, sweep: GameSettings) -> dict[str, float]:
    """Every width that the checkpoint has (a sliced one has fewer), every threshold. `args`: run_eval.py's."""
    metrics: dict[str, float] = {}
    widest = min(model.config.attention_widths)
    for width in (level for level in model.config.width_levels.values() if level <= widest):
        for source, loss in losses_by_source(model, rows, args.batch_size, width=width).items():
            metrics[f"eval_loss_width_{width}" + (f"_{source}" if source else "")] = loss
        metrics[f"flops_per_token_width_{width}"] = flops_per_token(model.config, width, args.max_length)
        if sweep.num_episodes:
            for key, value in play_tasks(model, tokenizer, sweep, width=width).items():
                metrics[f"{key}_width_{width}"] = value
    if not model.config.gate_layers:
        return metrics
    metrics |= exit_metrics(model, observe_exits(model, rows, args.batch_size), args.exit_thresholds, args.max_length)
    for threshold in args.sweep_thresholds if sweep.num_episodes else ():
        for key, value in play_tasks(model, tokenizer, sweep, exit_threshold=threshold).items():
            metrics[f"{key}_threshold_{threshold:g}"] = value
    return metrics
