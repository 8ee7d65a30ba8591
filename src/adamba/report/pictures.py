"""The pictures of compute and gates. Each function returns None when the numbers it needs are missing."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from .loss_pictures import LOSS_PHASES
from .measures import Point, compute_curve, gate_bins
from .reading import Family, Phase
from .style import Theme, engineering, label, percent_axis, spread


@dataclass(frozen=True)
class Picture:
    """A picture of the report.

    `needs` says which numbers it is drawn from; `metrics` are prefixes of the metrics, `logged` keys of the log
    entries, that it is drawn from.
    """

    name: str
    title: str
    caption: str
    needs: str
    draw: Callable[[Family, Theme], Figure | None]
    metrics: tuple[str, ...] = ()
    logged: tuple[str, ...] = ()

    def measured_in(self, family: Family) -> list[Phase]:
        """The phases with any of its metrics."""
        return [phase for phase in family.phases if any(key.startswith(self.metrics) for key in phase.metrics)]

    def logged_by(self, family: Family) -> list[Phase]:
        """The phases that logged any of its quantities."""
        return [
            phase for phase in family.phases if any(not entry.keys().isdisjoint(self.logged) for entry in phase.log)
        ]


# Losses above so many times the best are of widths that nobody has trained, and leave the others no room.
UNTRAINED = 2.0


def loss_against_compute(family: Family, theme: Theme) -> Figure | None:
    """Held-out loss against FLOPs a token, one line a phase through its widths, once they are trained."""
    phases = [phase for phase in family.phases if compute_curve(phase, "eval_loss", "width")]
    phases = [phase for phase in phases if phase.name in LOSS_PHASES[:-1]] or phases
    if not phases:
        return None
    curves = [
        (phase, sorted(compute_curve(phase, "eval_loss", "width"), key=lambda point: point.x)) for phase in phases
    ]
    limit = UNTRAINED * min(point.y for _, points in curves for point in points)
    trained = [(phase, points) for phase, points in curves if len(points) == 1 or points[0].y <= limit]
    figure = Figure(figsize=(10, 5))
    axes = figure.subplots()
    for phase, points in trained or curves:
        color = theme.phase(phase.name)
        _curve(axes, points, color, theme, labels_at=(-5, -11) if len(points) > 1 else None)
        last = points[-1]
        label(axes, phase.label, (last.x, last.y), color, (9, 0), fontweight="bold")
    for phase in phases[-1:]:
        exits = sorted(compute_curve(phase, "eval_loss", "threshold"), key=lambda point: point.x)
        if exits:
            _curve(axes, exits, theme.phase(phase.name), theme, hollow=True, labels_at=(0, 9))
    _compute_axis(axes)
    axes.set_ylabel("held-out loss, nats a token")
    return figure


def accuracy_against_compute(family: Family, theme: Theme) -> Figure | None:
    """Calculator accuracy against FLOPs a token: by width (filled) and by exit threshold (hollow), furthest phase."""
    found = [phase for phase in family.phases if compute_curve(phase, "accuracy_calculator", "width")]
    found = found or [phase for phase in family.phases if compute_curve(phase, "accuracy_calculator", "threshold")]
    if not found:
        return None
    phase = found[-1]
    figure = Figure(figsize=(10, 5))
    axes = figure.subplots()
    widths = sorted(compute_curve(phase, "accuracy_calculator", "width"), key=lambda point: point.x)
    exits = sorted(compute_curve(phase, "accuracy_calculator", "threshold"), key=lambda point: point.x)
    width_color, exit_color = theme.phase("phase2"), theme.phase("phase5")
    # A line's name stands by its cheapest point, out of the other line's way.
    for points, color, hollow, name, labels_at in (
        (widths, width_color, False, "narrower", (5, -11)),
        (exits, exit_color, True, "earlier exit", (0, 12)),
    ):
        if points:
            _curve(axes, points, color, theme, hollow, labels_at)
            label(axes, name, (points[0].x, points[0].y), color, (-10, 0), fontweight="bold", fontsize=10)
    _compute_axis(axes, left=0.16)
    axes.yaxis.set_major_formatter(percent_axis())
    axes.set_ylabel(f"calculator answers right, {phase.label}")
    return figure


def _curve(
    axes: Axes,
    points: list[Point],
    color: object,
    theme: Theme,
    hollow: bool = False,
    labels_at: tuple[float, float] | None = None,
) -> None:
    """A line through points, their names `labels_at` typographic points from them; hollow ones are thresholds."""
    axes.plot(
        [point.x for point in points],
        [point.y for point in points],
        "o--" if hollow else "o-",
        color=color,
        markersize=7,
        linewidth=1.6,
        markerfacecolor=theme.background if hollow else color,
        markeredgecolor=color if hollow else theme.background,
        markeredgewidth=1.6 if hollow else 1.0,
    )
    if labels_at is not None:
        for point in points:
            if hollow and point.label == "1":  # no exit at all: the full width's point, which has its name
                continue
            label(axes, point.label, (point.x, point.y), color, labels_at, fontsize=8.5)


def _compute_axis(axes: Axes, left: float = 0.06) -> None:
    """Name the compute axis and leave room for the labels at both ends, above and below."""
    low, high = axes.get_xlim()
    axes.set_xlim(low - left * (high - low), high + 0.10 * (high - low))
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.xaxis.set_major_formatter(engineering())
    axes.set_xlabel("forward FLOPs a token")


def gate_reliability(family: Family, theme: Theme) -> Figure | None:
    """Confidence of the exit gates against how often they were right, with counts, and the error of each layer."""
    phases = [phase for phase in family.phases if gate_bins(phase)]
    if not phases:
        return None
    phase = phases[-1]
    bins = gate_bins(phase)
    layers = phase.series("gate_ece_layer_")
    figure = Figure(figsize=(10, 5.6))
    grid = figure.add_gridspec(2, 2, height_ratios=(3.2, 1), width_ratios=(1.45, 1))
    axes, counts = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    color = theme.phase("phase2")
    axes.plot([0, 1], [0, 1], color=theme.muted, linewidth=1.1, linestyle=(0, (4, 3)))
    label(axes, "dashed: perfectly calibrated", (1, 0), theme.muted, (-8, 12), fontsize=8.5)
    for gate_bin in bins:
        axes.plot([gate_bin.confidence] * 2, [gate_bin.confidence, gate_bin.agreement], color=color, alpha=0.35)
    axes.plot([b.confidence for b in bins], [b.agreement for b in bins], "o-", color=color, markersize=8)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="same token as full depth")
    ece = phase.number("gate_ece")
    title = f"{phase.label}" + (f": calibration error {ece:.3f}" if ece is not None else "")
    axes.set_title(title)
    counts.bar([b.confidence for b in bins], [b.count for b in bins], width=0.06, color=color, alpha=0.75)
    for gate_bin in bins:
        text = engineering().format_eng(round(gate_bin.count, 1))
        label(counts, text, (gate_bin.confidence, gate_bin.count), theme.muted, (0, 7), fontsize=8)
    counts.set(xlim=(0, 1), xlabel="confidence of the gate", ylabel="predictions")
    counts.margins(y=0.3)
    counts.yaxis.set_major_locator(NullLocator())
    for panel in (axes, counts):
        panel.xaxis.set_major_formatter(percent_axis())
    axes.yaxis.set_major_formatter(percent_axis())
    if layers:
        _layer_errors(figure.add_subplot(grid[:, 1]), layers, color, theme)
    return figure


def _layer_errors(axes: Axes, layers: dict[float, float], color: object, theme: Theme) -> None:
    names = [f"layer {int(layer)}" for layer in layers]
    axes.hlines(range(len(layers)), 0, list(layers.values()), color=color, alpha=0.35, linewidth=2)
    axes.plot(list(layers.values()), range(len(layers)), "o", color=color, markersize=8)
    for index, value in enumerate(layers.values()):
        label(axes, f"{value:.3f}", (value, index), theme.ink, (8, 0))
    axes.axvline(0.05, color=theme.muted, linewidth=1.1, linestyle=(0, (4, 3)))
    axes.annotate("goal 0.05", (0.05, 0), xycoords=("data", "axes fraction"), xytext=(4, 6),
                  textcoords="offset points", color=theme.muted, fontsize=8.5)  # fmt: skip
    axes.set_yticks(range(len(layers)), names)
    axes.set(ylim=(len(layers) - 0.5, -0.5), xlim=(0, max(0.06, max(layers.values())) * 1.25))
    axes.set_title("calibration error by layer")
    axes.grid(axis="y", visible=False)


def exit_tradeoff(family: Family, theme: Theme) -> Figure | None:
    """What early exits skip against what they cost: tokens that stay the same, calculator answers that stay right."""
    phases = family.with_series("exit_fraction_threshold_")
    if not phases:
        return None
    phase = phases[-1]
    skipped = phase.series("exit_fraction_threshold_")
    figure = Figure(figsize=(10, 4.6))
    axes = figure.subplots()
    drawn = []
    tops: dict[float, float] = {}
    for prefix, name, color in (
        ("agreement_threshold_", "same token as full depth", theme.phase("phase2")),
        ("accuracy_calculator_threshold_", "calculator answers right", theme.phase("phase5")),
    ):
        values = phase.series(prefix)
        points = sorted((skipped[t], values[t]) for t in values if t in skipped)
        if not points:
            continue
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=color, markersize=7)
        tops |= {t: max(value, tops.get(t, value)) for t, value in values.items() if t in skipped}
        drawn.append((*points[-1], name, color))
    if not drawn:
        return None
    for threshold, top in tops.items():
        label(axes, f"{threshold:g}", (skipped[threshold], top), theme.muted, (0, 12), fontsize=8.5)
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.06 * (high - low), high + 0.1 * (high - low))
    placed = spread([y for _, y, *_ in drawn], 0.09 * (high - low))
    for (x, _, name, color), y in zip(drawn, placed, strict=True):
        label(axes, name, (x, y), color, (11, 0), fontweight="bold")
    axes.axvline(0.25, color=theme.muted, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate("goal: skip 25 %", (0.25, 0), xycoords=("data", "axes fraction"), xytext=(4, 6),
                  textcoords="offset points", color=theme.muted, fontsize=8.5)  # fmt: skip
    most = max(max(skipped.values()), 0.27)
    axes.set_xlim(-0.03 * most, most * 1.36)
    axes.xaxis.set_major_formatter(percent_axis())
    axes.yaxis.set_major_formatter(percent_axis())
    axes.set(
        xlabel="layer computations skipped; numbers are exit thresholds",
        ylabel=f"share of tokens or answers, {phase.label}",
    )
    return figure
