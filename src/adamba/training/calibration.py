"""
Choosing the exit threshold on held-out data, with a guarantee: "at most `risk` is lost, with this confidence".

Learn then Test (Angelopoulos, Bates, Candès, Jordan & Lei, 2021), fixed-sequence testing: thresholds are tested from
the most careful one down, each at level 1 - confidence, and the first that fails ends the search. So the chance that
the chosen one loses more than `risk` is at most 1 - confidence, however many were tried.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from adamba.errors import UserError
from adamba.model import AdambaForCausalLM
from adamba.publish import update_generation_config
from adamba.training.evaluation import GameSettings, task_rows
from adamba.training.head_losses import IGNORED
from adamba.training.play import play

FIRST_SEED = 1_000_000  # instances that no evaluation plays
MAX_TEXT_TOKENS = 64
Losses = dict[str, list[float]]  # by source, one loss from 0 to 1 a trial


@dataclass
class CalibrationSettings:
    """What may be lost, how surely, and on how many episodes of each task (rows of text without a task)."""

    risk: float = 0.01
    confidence: float = 0.95
    trials: int = 400
    thresholds: list[float] = field(
        default_factory=lambda: [0.999, 0.998, 0.995, 0.99, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5]
    )

    def __post_init__(self) -> None:
        for key in ("risk", "confidence"):
            if not 0 < getattr(self, key) < 1:
                raise UserError(f"calibrate: {key} is {getattr(self, key)}; it must lie between 0 and 1")
        self.trials = int(self.trials)
        needed = math.ceil(math.log(1 - self.confidence) / math.log(1 - self.risk))
        if self.trials < needed:
            raise UserError(
                f"calibrate: {self.trials} trials cannot show a risk of {self.risk:g} with confidence "
                f"{self.confidence:g} even without one loss; use at least trials={needed}, or a larger risk"
            )


def binomial_cdf(count: int, trials: int, rate: float) -> float:
    """P(at most `count` of `trials`), each happening with probability `rate`, 0 < rate < 1."""
    if count >= trials:
        return 1.0
    log_terms = (
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * math.log(rate)
        + (trials - k) * math.log1p(-rate)
        for k in range(count + 1)
    )
    return min(1.0, math.fsum(map(math.exp, log_terms)))


def risk_p_value(losses: Sequence[float], risk: float) -> float:
    """
    How likely losses as small as these are if their mean were really `risk` or more: for losses of 0 and 1 the exact
    binomial test (its inversion is the bound of Clopper & Pearson, 1934), else that of Hoeffding and Bentkus (Bates,
    Angelopoulos, Lei, Malik & Jordan, 2021, proposition 8).
    """
    trials, mean = len(losses), sum(losses) / len(losses)
    if mean >= risk:
        return 1.0
    if all(loss in (0, 1) for loss in losses):
        return binomial_cdf(round(sum(losses)), trials, risk)
    divergence = (1 - mean) * math.log((1 - mean) / (1 - risk)) + (mean * math.log(mean / risk) if mean else 0.0)
    bentkus = math.e * binomial_cdf(math.ceil(sum(losses) - 1e-9), trials, risk)
    return min(1.0, math.exp(-trials * divergence), bentkus)


def upper_bound(losses: Sequence[float], confidence: float) -> float:
    """The smallest risk that the losses exclude with this confidence: an upper confidence bound of their mean."""
    low, high = sum(losses) / len(losses), 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if risk_p_value(losses, middle) <= 1 - confidence else (middle, high)
    return high


@dataclass
class Calibration:
    """The chosen threshold (1: none was good enough, so no exits) and what was measured at each that was tried."""

    threshold: float
    losses: dict[float, float]
    bounds: dict[float, float]


def calibrate(measure: Callable[[float], Losses], settings: CalibrationSettings) -> Calibration:
    """
    The smallest threshold that passes.

    Args:
        measure: threshold -> losses of each source. Every source must pass by itself.
    """
    found = Calibration(1.0, {}, {})
    for threshold in sorted(settings.thresholds, reverse=True):
        by_source = measure(threshold).values()
        found.losses[threshold] = max(sum(losses) / len(losses) for losses in by_source)
        found.bounds[threshold] = max(upper_bound(losses, settings.confidence) for losses in by_source)
        if max(risk_p_value(losses, settings.risk) for losses in by_source) > 1 - settings.confidence:
            break
        found.threshold = threshold
    return found


def task_measure(
    model: AdambaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    games: GameSettings,
    trials: int,
) -> Callable[[float], Losses]:
    """Losses of episodes: how much of its score at full depth an episode loses by exits; what it gains is not set
    against another's loss."""
    sides = 2 * len(games.opponents)  # tic-tac-toe: as many games against each opponent, on each side
    counts = {task: 2 * -(-trials // sides) if task == "tic_tac_toe" else trials for task in tasks}
    rows = {task: task_rows(task, counts[task], games, FIRST_SEED) for task in tasks}

    def scores(threshold: float) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for task in tasks:
            episodes = play(
                model,
                tokenizer,
                rows[task],
                max_new_tokens=games.max_new_tokens,
                batch_size=games.batch_size,
                generate_kwargs={"exit_threshold": threshold, "exit_mode": "propagate"},
            )
            found[task] = [episode.outcome["score"] for episode in episodes]
        return found

    full = scores(1.0)

    def measure(threshold: float) -> Losses:
        early = scores(threshold)
        return {
            task: [min(1.0, max(0.0, before - after)) for before, after in zip(full[task], early[task], strict=True)]
            for task in tasks
        }

    return measure


def text_measure(
    model: AdambaForCausalLM, rows: Sequence[Mapping[str, Sequence[int]]], batch_size: int
) -> Callable[[float], Losses]:
    """
    Losses of packed rows: the share of predicted tokens, in the second half of a row, at which decoding with exits
    (its cache filled by exits, too) predicts another next token than full depth. What has no label (padding, say) is
    not counted; each row has something that is (`rows_to_calibrate_on`).
    """
    start, end = _window(rows)
    batches = torch.tensor([list(row["input_ids"][:end]) for row in rows], device=model.device).split(batch_size)
    labels = torch.tensor([list(row["labels"][start + 1 : end + 1]) for row in rows], device=model.device)
    counts = (labels != IGNORED).split(batch_size)
    with torch.no_grad():
        full = [model(batch, use_cache=False).logits[:, start:].argmax(-1) for batch in batches]

    @torch.no_grad()
    def measure(threshold: float) -> Losses:
        losses: list[float] = []
        for batch, expected, counted in zip(batches, full, counts, strict=True):
            cache = model(batch[:, :start], use_cache=True, logits_to_keep=1).past_key_values
            wrong = torch.zeros(len(batch), device=batch.device)
            for place in range(start, end):
                step = batch[:, place : place + 1]
                logits = model(step, past_key_values=cache, use_cache=True, exit_threshold=threshold).logits
                wrong += (logits[:, -1].argmax(-1) != expected[:, place - start]) & counted[:, place - start]
            losses += (wrong / counted.sum(1)).tolist()
        return {"text": losses}

    return measure


def rows_to_calibrate_on(rows: Sequence[Mapping[str, Sequence[int]]]) -> list[Mapping[str, Sequence[int]]]:
    """The packed rows that have something to predict where exits are measured."""
    if not rows:
        return []
    start, end = _window(rows)
    return [row for row in rows if any(label != IGNORED for label in row["labels"][start + 1 : end + 1])]


def _window(rows: Sequence[Mapping[str, Sequence[int]]]) -> tuple[int, int]:
    """Places of a row at which the next token is predicted: the first ones of its second half."""
    length = len(rows[0]["input_ids"])
    return length // 2, min(length - 1, length // 2 + MAX_TEXT_TOKENS)


def calibration_metrics(found: Calibration, settings: CalibrationSettings, unit: str) -> dict[str, float | str]:
    """Flat metrics; the losses and bounds of a threshold are those of its worst source."""
    metrics: dict[str, float | str] = {
        "calibrated_exit_threshold": found.threshold,
        "calibration_risk": settings.risk,
        "calibration_confidence": settings.confidence,
        "calibration_trials": settings.trials,
        "calibration_unit": unit,
    }
    for threshold, loss in found.losses.items():
        metrics[f"calibration_loss_threshold_{threshold:g}"] = loss
        metrics[f"calibration_bound_threshold_{threshold:g}"] = found.bounds[threshold]
    return metrics


def calibration_settings(given: Mapping[str, float]) -> CalibrationSettings | None:
    """The recipe's `calibrate`; `None` when it is empty."""
    known = {setting.name for setting in dataclasses.fields(CalibrationSettings)} - {"thresholds"}
    for key in given:
        if key not in known:
            raise UserError(f"calibrate: {key!r} is unknown; use {', '.join(sorted(known))}")
    return CalibrationSettings(**given) if given else None  # type: ignore[arg-type]


def require_gates(model, name: str) -> None:
    """
    Raises:
        UserError: there is nothing to calibrate.
    """
    if not isinstance(model, AdambaForCausalLM) or not model.gates_are_trained():
        raise UserError(f"calibrate: {name} has no trained exit gates; phase 2 trains them")


def calibrate_checkpoint(
    model, tokenizer, folder: str, games: GameSettings, text_rows: Sequence[Mapping[str, Sequence[int]]], settings
) -> dict[str, float | str]:
    """Choose the threshold on episodes, or without a task on text, and write it beside the weights."""
    tasks = [name for name, count in games.num_episodes.items() if count]
    text_rows = rows_to_calibrate_on(text_rows)
    if tasks:
        measure = task_measure(model, tokenizer, tasks, games, settings.trials)
    elif len(text_rows) >= settings.trials:
        measure = text_measure(model, text_rows, games.batch_size)
    else:
        raise UserError(f"calibrate: the mix has only {len(text_rows)} further held-out rows; lower trials")
    found = calibrate(measure, settings)
    update_generation_config(folder, {"exit_threshold": found.threshold, "exit_mode": "propagate"})
    return calibration_metrics(found, settings, "episodes" if tasks else "rows")
