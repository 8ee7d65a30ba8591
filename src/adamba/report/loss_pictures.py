"""The pictures of training: loss per phase, per source and per width, along the tokens of the whole plan."""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .measures import log_curve, log_sources, main_loss, smooth, surgery_rows, width_curves
from .reading import Family, Phase
from .style import Theme, engineering, label, spread

# Phases whose loss is that of plain next-token prediction, so that their curves may be joined.
LOSS_PHASES = ("base", "phase1", "phase2", "phase3b", "phase4b", "phase5")
SOURCE_COLORS = ("phase2", "phase5", "phase3b", "phase6_grpo", "phase4b", "phase6_dpo")  # of the theme, by source


@dataclass(frozen=True)
class Stretch:
    """The place of one phase on the joined axis, in tokens."""

    phase: Phase
    begin: float
    end: float


def timeline(family: Family) -> tuple[list[Stretch], dict[float, str]]:
    """The trained phases one after the other, and the surgeries between them by their place."""
    stretches: list[Stretch] = []
    surgeries: dict[float, str] = {}
    what = {row.phase.name: row.what for row in surgery_rows(family)}
    place = 0.0
    for phase in family.phases:
        if phase.name in what:
            surgeries[place] = ", ".join(filter(None, (surgeries.get(place), what[phase.name])))
        elif phase.name in LOSS_PHASES and (curve := main_loss(phase)):
            end = place + max(phase.number("tokens_seen") or 0.0, curve[-1][0])
            stretches.append(Stretch(phase, place, end))
            place = end
    return stretches, surgeries


def loss_per_phase(family: Family, theme: Theme) -> Figure | None:
    """Training loss of all phases joined along tokens, surgeries marked, held-out loss at each phase's end."""
    stretches, surgeries = timeline(family)
    if not stretches:
        return None
    figure = Figure(figsize=(10, 5.2))
    axes = figure.subplots()
    for stretch in stretches:
        color = theme.phase(stretch.phase.name)
        _line(axes, main_loss(stretch.phase), stretch.begin, color)
        if held_out := stretch.phase.number("eval_loss"):
            end = (stretch.end, held_out)
            axes.plot(*end, "o", color=color, markeredgecolor=theme.background, markersize=8, zorder=5)
            box = {"facecolor": theme.background, "edgecolor": "none", "pad": 1.0}
            text = label(axes, f"{held_out:.2f}", end, theme.ink, (0, 13), fontweight="bold", bbox=box)
            text.set_zorder(6)
    _joined_axes(axes, stretches, surgeries, theme)
    axes.set_xlim(0, stretches[-1].end * 1.03)
    return figure


def loss_per_source(family: Family, theme: Theme) -> Figure | None:
    """Training loss of every task and dataset of the mix, joined along tokens."""
    stretches, surgeries = timeline(family)
    sources = sorted({source for stretch in stretches for source in log_sources(stretch.phase)
                      if log_curve(stretch.phase, f"loss_{source}")})  # fmt: skip
    if not sources:
        return None
    figure = Figure(figsize=(10, 4.6))
    axes = figure.subplots()
    ends: list[tuple[float, float, str, object]] = []
    for rank, source in enumerate(sources):
        color = theme.phases[SOURCE_COLORS[rank % len(SOURCE_COLORS)]]
        for stretch in stretches:
            if curve := log_curve(stretch.phase, f"loss_{source}"):
                last = _line(axes, curve, stretch.begin, color)
        ends.append((*last, source, color))
    _joined_axes(axes, stretches, surgeries, theme)
    axes.set_xlim(0, stretches[-1].end)
    _end_labels(axes, ends, gap_fraction=0.06, room=0.17)
    return figure


def _line(axes: Axes, curve: list[tuple[float, float]], begin: float, color: object) -> tuple[float, float]:
    """Draw a logged curve, raw and smoothed, from `begin` on; returns its smoothed end."""
    x = [begin + tokens for tokens, _ in curve]
    y = [value for _, value in curve]
    smoothed = smooth(y, span=max(1.0, len(y) / 15))
    axes.plot(x, y, color=color, linewidth=0.8, alpha=0.3)
    axes.plot(x, smoothed, color=color, marker="o" if len(x) == 1 else None)
    return x[-1], smoothed[-1]


def _joined_axes(axes: Axes, stretches: list[Stretch], surgeries: dict[float, str], theme: Theme) -> None:
    """Phases as bands with their names on top, surgeries as dashed lines, loss on a logarithmic scale."""
    axes.set_yscale("log")
    total = stretches[-1].end or 1.0
    for index, stretch in enumerate(stretches):
        if index % 2:
            axes.axvspan(stretch.begin, stretch.end, color=theme.band, linewidth=0, zorder=0)
        # A short phase has no room for the word, nor beside its neighbour.
        is_short = (stretch.end - stretch.begin) / total < 0.07
        axes.annotate(
            stretch.phase.short_name if is_short else stretch.phase.label,
            ((stretch.begin + stretch.end) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 21 if is_short and index % 2 else 8),
            textcoords="offset points",
            ha="center",
            color=theme.phase(stretch.phase.name),
            fontweight="bold",
        )
    for place, what in surgeries.items():
        on_top = _is_free_above(axes, place)
        axes.axvline(place, color=theme.muted, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            what,
            (place, 1 if on_top else 0),
            xycoords=("data", "axes fraction"),
            xytext=(-5, -6 if on_top else 6),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top" if on_top else "bottom",
            color=theme.muted,
            fontsize=8.5,
            zorder=4,  # where the curves fill the height, the words stand before them
            bbox={"facecolor": theme.background, "edgecolor": "none", "pad": 0.5, "alpha": 0.85},
        )
    low, high = axes.get_ylim()
    steps = [base * 10.0**power for power in range(-4, 3) for base in (1, 1.5, 2, 3, 4, 5, 7)]
    axes.yaxis.set_major_locator(FixedLocator([step for step in steps if low <= step <= high]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_formatter(engineering())
    axes.set(xlabel="training tokens, all phases joined", ylabel="loss, nats a token (log scale)")
    axes.grid(axis="x", visible=False)


def _is_free_above(axes: Axes, x: float) -> bool:
    """Whether there is more room above the curves at `x` than below them."""
    heights = []
    for line in axes.get_lines():
        xs, ys = line.get_data()
        if len(xs) > 1 and min(xs) <= x * 1.01 and max(xs) >= x * 0.99:
            heights.append(float(np.interp(x, xs, ys)))
    if not heights:
        return True
    low, high = axes.get_ylim()
    return high / max(heights) >= min(heights) / low  # a logarithmic scale


def loss_per_width(family: Family, theme: Theme) -> Figure | None:
    """Training loss of every width, one panel a phase."""
    phases = [phase for phase in family.phases if len(width_curves(phase)) > 1 and phase.name in LOSS_PHASES]
    if not phases:
        return None
    figure = Figure(figsize=(10, 3.8))
    panels = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    ends: list[list[tuple[float, float, str, object]]] = []
    for axes, phase in zip(panels, phases, strict=True):
        curves = width_curves(phase)
        ends.append([])
        for rank, (width, curve) in enumerate(curves.items()):
            color = theme.width(rank, len(curves))
            y = smooth([value for _, value in curve], span=max(1.0, len(curve) / 10))
            axes.plot([tokens for tokens, _ in curve], y, color=color)
            ends[-1].append((curve[-1][0], y[-1], phase.width_name(width), color))
        axes.set_title(phase.label, color=theme.phase(phase.name))
        axes.xaxis.set_major_formatter(engineering())
    for axes, names in zip(panels, ends, strict=True):  # once the shared scale is settled
        axes.set_xlim(0, max(x for x, *_ in names))
        _end_labels(axes, names, gap_fraction=0.065, room=0.3)
    panels[0].set_ylabel("loss, nats a token")
    figure.supxlabel("training tokens in the phase", color=theme.muted, fontsize=10)
    return figure


def _end_labels(axes: Axes, ends: list[tuple[float, float, str, object]], gap_fraction: float, room: float) -> None:
    """Name curves at their right ends, labels kept apart by a share of the height; makes `room` on the right."""
    right = max(x for x, *_ in ends)
    left, _ = axes.get_xlim()
    axes.set_xlim(left, right + room * (right - left))
    to_fraction = axes.transData + axes.transAxes.inverted()
    heights = [float(to_fraction.transform((x, y))[1]) for x, y, *_ in ends]
    for (_, _, text, color), height in zip(ends, spread(heights, gap_fraction), strict=True):
        y = float(to_fraction.inverted().transform((0, height))[1])
        label(axes, text, (right, y), color, (5, 0), fontweight="bold")
