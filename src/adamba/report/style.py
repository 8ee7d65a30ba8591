"""One matplotlib style for every picture, in a light and a dark dress.

Colours are Okabe and Ito's colour-blind-safe set ("Color Universal Design", 2008), each phase keeping its own
everywhere; widths use a single-hue ramp, so that wider reads as stronger.
"""

from dataclasses import dataclass
from io import BytesIO

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import EngFormatter, FuncFormatter


@dataclass(frozen=True)
class Theme:
    """Colours of one dress. `phases` falls back to `ink` for a phase it does not name."""

    name: str
    background: str
    ink: str
    muted: str
    grid: str
    band: str
    phases: dict[str, str]
    ramp: tuple[str, str]

    def phase(self, name: str) -> str:
        return self.phases.get(name, self.ink)

    def width(self, rank: int, count: int) -> tuple[float, float, float]:
        """Colour of the rank-th of `count` widths, narrow to wide."""
        share = rank / (count - 1) if count > 1 else 1.0
        start, end = (to_rgb(color) for color in self.ramp)
        red, green, blue = ((1 - share) * a + share * b for a, b in zip(start, end, strict=True))
        return red, green, blue


LIGHT = Theme(
    name="light",
    background="#ffffff",
    ink="#1f2430",
    muted="#667085",
    grid="#e6e9ef",
    band="#f5f7fa",
    phases={
        "base": "#667085",
        "phase1": "#3b9fdc",
        "phase2": "#0065a8",
        "phase3b": "#00875f",
        "phase4b": "#c77700",
        "phase5": "#cf4f00",
        "phase6_grpo": "#a8447f",
        "phase6_dpo": "#5b4bb5",
    },
    ramp=("#74b3dd", "#00355c"),
)
DARK = Theme(
    name="dark",
    background="#161b22",
    ink="#e6e9ef",
    muted="#9aa4b2",
    grid="#2a313c",
    band="#1b212a",
    phases={
        "base": "#9aa4b2",
        "phase1": "#7cc7f2",
        "phase2": "#4a9fe0",
        "phase3b": "#2fc295",
        "phase4b": "#f0b340",
        "phase5": "#f08044",
        "phase6_grpo": "#dd8fbf",
        "phase6_dpo": "#a79bf0",
    },
    ramp=("#4b83ad", "#c4e7ff"),
)
THEMES = (LIGHT, DARK)


def settings(theme: Theme) -> dict[str, object]:
    """matplotlib rc values of the style."""
    return {
        "figure.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "axes.labelsize": 10,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.grid,
        "ytick.color": theme.grid,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "text.color": theme.ink,
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "lines.linewidth": 2.0,
        "lines.solid_capstyle": "round",
        "lines.markersize": 6,
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.h_pad": 0.09,
        "figure.constrained_layout.w_pad": 0.09,
    }


def styled(theme: Theme) -> rc_context:  # type: ignore[valid-type]
    """Context in which pictures of this theme are drawn and saved."""
    return rc_context(settings(theme))


def png(figure: Figure) -> bytes:
    buffer = BytesIO()
    # No software or date entry: the same numbers give the same bytes.
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def label(
    axes: Axes,
    text: str,
    xy: tuple[float, float],
    color: object,
    offset: tuple[float, float] = (6, 0),
    **kwargs: object,
) -> Annotation:
    """Write `text` beside a point given in data coordinates, `offset` in typographic points."""
    options = {"ha": "left" if offset[0] >= 0 else "right", "va": "center", "fontsize": 9, **kwargs}
    if offset[0] == 0:
        options["ha"] = kwargs.get("ha", "center")
    return axes.annotate(text, xy, xytext=offset, textcoords="offset points", color=color, **options)  # type: ignore[arg-type]


def engineering() -> EngFormatter:
    """Axis numbers such as `3.2 M`."""
    return EngFormatter(sep=" ")


def percent_axis() -> FuncFormatter:
    """Axis numbers of a fraction, such as `97.5 %`, with the digits they need."""
    return FuncFormatter(lambda value, _: f"{100 * value:.4g} %")


def spread(positions: list[float], gap: float) -> list[float]:
    """Move label positions apart to at least `gap`, keeping their order and their middle."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    placed = [positions[index] for index in order]
    for _ in range(50):
        for lower in range(len(placed) - 1):
            overlap = gap - (placed[lower + 1] - placed[lower])
            if overlap > 0:
                placed[lower] -= overlap / 2
                placed[lower + 1] += overlap / 2
    result = [0.0] * len(positions)
    for index, position in zip(order, placed, strict=True):
        result[index] = position
    return result
