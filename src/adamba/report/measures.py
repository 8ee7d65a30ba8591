"""Numbers the report derives from the metrics. Pure functions of `Phase` and `Family`; rates are fractions, 0 to 1."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .reading import SURGERIES, Family, Phase

SURGERY_TOLERANCE = 1e-4  # largest logit difference a surgery may make, fp32
LOSS_TOLERANCE = 1e-3  # largest change of the held-out loss a surgery may make
NUM_GATE_BINS = 10


def wilson_interval(rate: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval (95 % by default) of a rate seen over `count` independent trials.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    if count <= 0:
        raise ValueError(f"wilson_interval: count={count}, expected at least one trial")
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Point:
    """One point of a curve against compute; `label` is a width's name or an exit threshold."""

    x: float
    y: float
    label: str


def compute_curve(phase: Phase, measure: str, by: str) -> list[Point]:
    """(forward FLOPs a token, `<measure>_<by>_<n>`) for every n measured; `by` is "width" or "threshold"."""
    flops = phase.series(f"flops_per_token_{by}_")
    values = phase.series(f"{measure}_{by}_")
    if by == "width" and not values:  # a dense base has one width, the whole of it
        whole = [phase.number(key) for key in ("flops_per_token", measure, "hidden_size")]
        return [] if None in whole else [Point(whole[0], whole[1], f"{whole[2]:.0f}")]  # type: ignore[arg-type]
    name = phase.width_name if by == "width" else "{:g}".format
    return [Point(flops[n], values[n], name(n)) for n in values if n in flops]


@dataclass(frozen=True)
class GateBin:
    """One bin of the gates' reliability diagram."""

    confidence: float
    agreement: float
    count: float


def gate_bins(phase: Phase) -> list[GateBin]:
    """The bins that hold at least one prediction, by confidence."""
    bins = []
    for index in range(NUM_GATE_BINS):
        numbers = [phase.number(f"gate_bin_{index}_{part}") for part in ("confidence", "agreement", "count")]
        if None not in numbers and numbers[2] > 0:  # type: ignore[operator]
            bins.append(GateBin(*numbers))  # type: ignore[arg-type]
    return sorted(bins, key=lambda gate_bin: gate_bin.confidence)


@dataclass(frozen=True)
class AgentScore:
    """A rate to be compared between phases. `count_keys` name the metrics that may hold its number of trials."""

    title: str
    key: str
    count_keys: tuple[str, ...]
    higher_is_better: bool = True


AGENT_SCORES = (
    AgentScore("Calculator answers right", "accuracy_calculator", ("episodes_calculator",)),
    AgentScore("Calculator calls valid", "valid_tool_call_rate_calculator", ("tool_calls_calculator",)),
    AgentScore("Tic-tac-toe moves legal", "legal_move_rate_tic_tac_toe", ("moves_tic_tac_toe",)),
    AgentScore("Lost to a perfect player", "loss_rate_tic_tac_toe_perfect", ("episodes_tic_tac_toe_perfect",), False),
    AgentScore("Lost to a random player", "loss_rate_tic_tac_toe_random", ("episodes_tic_tac_toe_random",), False),
    AgentScore("Won against a random player", "win_rate_tic_tac_toe_random", ("episodes_tic_tac_toe_random",)),
)


def trials(phase: Phase, score: AgentScore) -> float | None:
    """How many trials the score was measured over, None when the evaluation did not say."""
    counts = (phase.number(key) for key in score.count_keys)
    return next((count for count in counts if count), None)


def agent_phases(family: Family) -> list[Phase]:
    """The phases to compare before and after RL: the supervised agent and what was made of it."""
    keys = [score.key for score in AGENT_SCORES]
    phases = [family.get(name) for name in ("phase5", "phase6_dpo", "phase6_grpo")]
    return [phase for phase in phases if phase and any(phase.number(key) is not None for key in keys)]


@dataclass(frozen=True)
class SurgeryRow:
    """What one surgery changed. Losses in nats a token; None where not measured."""

    phase: Phase
    what: str
    difference: float | None
    by_width: dict[float, float]
    loss_before: float | None
    loss_after: float | None

    @property
    def largest(self) -> float | None:
        found = [value for value in (self.difference, *self.by_width.values()) if value is not None]
        return max(found) if found else None

    @property
    def is_exact(self) -> bool | None:
        """Within both tolerances; None when nothing was measured."""
        if self.largest is None:
            return None
        losses_known = self.loss_before is not None and self.loss_after is not None
        loss_kept = not losses_known or abs(self.loss_after - self.loss_before) <= LOSS_TOLERANCE  # type: ignore[operator]
        return self.largest <= SURGERY_TOLERANCE and loss_kept


def surgery_rows(family: Family) -> list[SurgeryRow]:
    """One row per surgery that was measured, in order."""
    rows = []
    hidden_size: float | None = None
    for phase in family.phases:
        new_hidden_size = phase.number("hidden_size")
        if phase.name in SURGERIES or phase.number("max_abs_logit_diff") is not None:
            if phase.status == "complete":
                rows.append(
                    SurgeryRow(
                        phase,
                        _surgery_name(phase, hidden_size, new_hidden_size),
                        phase.number("max_abs_logit_diff"),
                        phase.series("max_abs_logit_diff_width_"),
                        phase.number("loss_before"),
                        phase.number("loss_after"),
                    )
                )
        hidden_size = new_hidden_size or hidden_size
    return rows


def _surgery_name(phase: Phase, before: float | None, after: float | None) -> str:
    if phase.name == "phase0":
        return "insert Mamba"
    if before and after and before != after:
        return f"expand {before:.0f}→{after:.0f}"
    return phase.title.removeprefix("surgery: ") or "surgery"


@dataclass(frozen=True)
class Tile:
    """One headline number; `met` is None when the goal could not be checked."""

    title: str
    value: str
    note: str
    met: bool | None = None


def headline(family: Family) -> list[Tile]:
    """The numbers a reader wants first. Only those that were measured."""
    tiles = []
    if losses := [phase for phase in family.with_metric("eval_loss") if phase.name in _LANGUAGE_PHASES]:
        first, last = losses[0], losses[-1]
        note = f"nats a token after {last.label}" + (
            f", {first.label}: {first.number('eval_loss'):.3f}" if first is not last else ""
        )
        tiles.append(Tile("Held-out loss", f"{last.number('eval_loss'):.3f}", note))
    if rows := [row for row in surgery_rows(family) if row.largest is not None]:
        worst = max(row.largest for row in rows)  # type: ignore[type-var]
        exact = all(row.is_exact for row in rows)
        what = "1 surgery" if len(rows) == 1 else f"{len(rows)} surgeries"
        note = f"largest logit change of {what}, {goal('≤', short_power(SURGERY_TOLERANCE))}"
        tiles.append(Tile("Surgery exactness", f"{worst:.1e}" if worst else "0", note, exact))
    tiles += _agent_tiles(family)
    if saving := best_saving(family):
        over = f" over {saving.num_episodes} questions" if saving.num_episodes else ""
        note = (
            f"of layer computations at threshold {saving.threshold:g}, {points(-saving.accuracy_lost)} accuracy{over}"
        )
        note += f", {goal('≥', '25 %')}"
        tiles.append(Tile("Skipped by early exit", percent(saving.skipped), note, saving.skipped >= 0.25))
    if gates := family.with_metric("gate_ece"):
        value = gates[-1].number("gate_ece")
        note = f"expected calibration error, {gates[-1].label}, {goal('≤', '0.05')}"
        tiles.append(Tile("Gate calibration", f"{value:.3f}", note, value <= 0.05))  # type: ignore[operator]
    return tiles


_LANGUAGE_PHASES = ("base", "phase1", "phase2", "phase3b", "phase4b")


def _agent_tiles(family: Family) -> list[Tile]:
    phases = agent_phases(family)
    tiles = []
    if scored := [phase for phase in phases if phase.number("accuracy_calculator") is not None]:
        value = scored[-1].number("accuracy_calculator") or 0.0
        note = f"right answers after {scored[-1].label}, {goal('≥', '98 %')}"
        tiles.append(Tile("Calculator", percent(value), note, value >= 0.98))
    key = "loss_rate_tic_tac_toe_perfect"
    if played := [phase for phase in phases if phase.number(key) is not None]:
        # Ways of phase 6, each beside the agent that it began with, where that was measured too.
        before = next((phase for phase in played if phase.name == "phase5"), None)
        for after in [phase for phase in played if phase is not before] or played:
            rate, note, met = after.number(key), f"of games lost to the perfect opponent after {after.label}", None
            if before is not None and after is not before:
                note += f", {before.label}: {percent(before.number(key))}, goal: lower"
                met = rate < before.number(key)  # type: ignore[operator]
            tiles.append(Tile("Tic-tac-toe", percent(rate), note, met))
    return tiles


@dataclass(frozen=True)
class Saving:
    """What early exit saves at one threshold, as fractions, and over how many questions that was seen (0: unknown)."""

    phase: Phase
    threshold: float
    skipped: float
    accuracy_lost: float
    num_episodes: int


def best_saving(family: Family, max_accuracy_lost: float = 0.01) -> Saving | None:
    """The most that is skipped at an allowed loss of accuracy, in the furthest phase that measured several thresholds.

    Accuracy without exits is that of threshold 1, else that of the full width: the same questions, where measured.
    """
    for phase in reversed(family.with_series("accuracy_calculator_threshold_")):
        accuracy = phase.series("accuracy_calculator_threshold_")
        skipped = phase.series("exit_fraction_threshold_")
        widths = phase.series("accuracy_calculator_width_")
        at_full_width = widths.get(max(widths)) if widths else phase.number("accuracy_calculator")
        reference = accuracy.get(1.0, at_full_width)
        if reference is None:
            continue
        allowed = [t for t in accuracy if t in skipped and reference - accuracy[t] <= max_accuracy_lost + 1e-9]
        if allowed:
            best = max(allowed, key=lambda t: skipped[t])
            count = phase.series("episodes_calculator_threshold_").get(best, 0)
            return Saving(phase, best, skipped[best], reference - accuracy[best], int(count))
    return None


def log_curve(phase: Phase, key: str) -> list[tuple[float, float]]:
    """(tokens seen in this phase, value) of a logged quantity, in order.

    A log without `tokens_seen` is spread over the phase's tokens by its steps; with neither, x is the step.
    """
    entries = [entry for entry in phase.log if _is_number(entry.get(key))]
    if not entries:
        return []
    token_key = next((k for k in ("tokens_seen", "num_input_tokens_seen") if _all_have(entries, k)), None)
    if token_key:
        return [(float(entry[token_key]), float(entry[key])) for entry in entries]
    if not _all_have(entries, "step"):
        return []
    last_step = max(float(entry["step"]) for entry in phase.log if _is_number(entry.get("step"))) or 1.0
    scale = (phase.number("tokens_seen") or last_step) / last_step
    return [(float(entry["step"]) * scale, float(entry[key])) for entry in entries]


def step_curve(phase: Phase, key: str) -> list[tuple[float, float]]:
    """(optimizer step, value) of a logged quantity, in order."""
    entries = [entry for entry in phase.log if _is_number(entry.get(key)) and _is_number(entry.get("step"))]
    return [(float(entry["step"]), float(entry[key])) for entry in entries]


def width_curves(phase: Phase) -> dict[int, list[tuple[float, float]]]:
    """The logged loss of every width, ascending. `loss_full` is the width of the whole model."""
    prefix = "loss_width_"
    keys = {key for entry in phase.log for key in entry if key.startswith(prefix)}
    curves = {int(key.removeprefix(prefix)): log_curve(phase, key) for key in keys if key[len(prefix) :].isdigit()}
    hidden_size = phase.number("hidden_size")
    if hidden_size and (full := log_curve(phase, "loss_full")):
        curves[int(hidden_size)] = full
    return {width: curves[width] for width in sorted(curves) if curves[width]}


def log_sources(phase: Phase) -> list[str]:
    """The tasks and datasets whose loss was logged apart (`loss_calculator`), in order of their first entry."""
    names = (key.removeprefix("loss_") for entry in phase.log for key in entry if key.startswith("loss_"))
    return [name for name in dict.fromkeys(names) if name != "full" and not name.startswith("width_")]


def main_loss(phase: Phase) -> list[tuple[float, float]]:
    """The loss at full width where it was logged: an elastic phase's `loss` holds distillation and exit losses too."""
    full = width_curves(phase).get(int(phase.number("hidden_size") or 0), [])
    return full if len(full) > 1 else log_curve(phase, "loss")


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Gaussian-weighted straight-line fit around every point (no lag, no bend at the ends), about `span` points wide.

    Source: W. S. Cleveland, "Robust locally weighted regression and smoothing scatterplots", JASA 74 (1979).
    """
    sigma = max(span, 1.0) / 2.5
    reach = math.ceil(3 * sigma)
    result = []
    for index in range(len(values)):
        window = range(max(0, index - reach), min(len(values), index + reach + 1))
        weights = [math.exp(-0.5 * ((other - index) / sigma) ** 2) for other in window]
        total = sum(weights)
        mean_x = sum(w * other for w, other in zip(weights, window, strict=True)) / total
        mean_y = sum(w * values[other] for w, other in zip(weights, window, strict=True)) / total
        spread = sum(w * (other - mean_x) ** 2 for w, other in zip(weights, window, strict=True))
        shared = sum(w * (other - mean_x) * values[other] for w, other in zip(weights, window, strict=True))
        result.append(mean_y + (shared / spread * (index - mean_x) if spread else 0.0))
    return result


def percent(rate: float | None) -> str:
    """`98.4 %`, with a second decimal where the first would round to a whole that it is not. Does not break."""
    if rate is None:
        return "–"
    if rate in (0.0, 1.0):
        return f"{100 * rate:.0f}\u00a0%"
    text = f"{100 * rate:.1f}"
    return f"{100 * rate:.2f}\u00a0%" if text in ("0.0", "100.0") else f"{text}\u00a0%"


def goal(relation: str, value: str) -> str:
    """`goal ≥ 98 %` that does not break over two lines."""
    return f"goal {relation} {value}".replace(" ", "\u00a0")


def points(change: float) -> str:
    """A change of a rate in percentage points: `−1.0 points`."""
    text = f"{100 * change:+.1f}".replace("-", "−")
    return "±0 points" if float(f"{100 * change:.1f}") == 0 else f"{text} points"


def short_power(value: float) -> str:
    """`1e−4` for 0.0001."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def _all_have(entries: Sequence[Mapping[str, object]], key: str) -> bool:
    return all(_is_number(entry.get(key)) for entry in entries)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
