"""Write `report.json`, the pictures and one self-contained `report.html` (no script, no other file, no network)."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from .agent_pictures import PICTURES
from .games import game_rows, transcripts
from .measures import (
    SURGERY_TOLERANCE,
    best_saving,
    headline,
    percent,
    short_power,
    surgery_rows,
)
from .pictures import Picture
from .reading import Family, Phase
from .style import DARK, LIGHT, png, styled


@dataclass(frozen=True)
class DrawnPicture:
    """A picture in both dresses as base64, empty when its numbers are missing."""

    picture: Picture
    light: str
    dark: str

    @property
    def file_name(self) -> str:
        return f"{self.picture.name}.png"


def write_report(family: Family, output_dir: str | Path) -> Path:
    """Write the report of `family` into `output_dir` and return the path of its HTML page."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [_draw(family, picture, folder) for picture in PICTURES]
    content = json.dumps(report_content(family, drawn), indent=2, allow_nan=False)
    (folder / "report.json").write_text(content + "\n", encoding="utf-8")
    page = folder / "report.html"
    page.write_text(render_page(family, drawn), encoding="utf-8")
    return page


def _draw(family: Family, picture: Picture, folder: Path) -> DrawnPicture:
    images = {}
    for theme in (LIGHT, DARK):
        with styled(theme):
            figure = picture.draw(family, theme)
            images[theme.name] = png(figure) if figure is not None else b""
    file = folder / f"{picture.name}.png"
    if images["light"]:
        file.write_bytes(images["light"])
    else:
        file.unlink(missing_ok=True)  # a picture of an earlier report must not pass for this one's
    return DrawnPicture(picture, *(base64.b64encode(images[name]).decode() for name in ("light", "dark")))


def report_content(family: Family, drawn: list[DrawnPicture]) -> dict[str, Any]:
    """What report.json holds: every phase's metrics as they are, then what the report derived from them."""
    saving = best_saving(family)
    return {
        "family": family.name,
        "commits": commits(family),
        "hardware": hardware(family),
        "phases": {
            phase.name: {
                "title": phase.title,
                "status": phase.status,
                "folder": str(phase.folder),
                "command": phase.command,
                "metrics": phase.metrics | dict.fromkeys(phase.not_finite),
                "run": phase.run,
            }
            for phase in family.phases
        },
        "missing": [phase.name for phase in family.missing],
        "games": game_rows(family),
        "surgeries": [
            {
                "phase": row.phase.name,
                "what": row.what,
                "max_abs_logit_diff": row.largest,
                "loss_before": row.loss_before,
                "loss_after": row.loss_after,
                "is_exact": row.is_exact,
            }
            for row in surgery_rows(family)
        ],
        "best_saving": saving
        and {
            "phase": saving.phase.name,
            "threshold": saving.threshold,
            "exit_fraction": saving.skipped,
            "accuracy_calculator_lost": saving.accuracy_lost,
            "episodes_calculator": saving.num_episodes,
        },
        "headline": [
            {"title": t.title, "value": t.value, "note": t.note, "goal_met": t.met} for t in headline(family)
        ],
        "pictures": {image.picture.name: image.file_name if image.light else None for image in drawn},
    }


def commits(family: Family) -> list[str]:
    """The commits the runs were made from, in order of first use."""
    return list(dict.fromkeys(phase.commit for phase in family.phases if phase.commit))


def hardware(family: Family) -> list[str]:
    """What the runs ran on, as they recorded it, in order of first use."""
    return list(dict.fromkeys(phase.hardware for phase in family.phases if phase.hardware))


def render_page(family: Family, drawn: list[DrawnPicture]) -> str:
    """The HTML page as text."""
    environment = Environment(
        loader=PackageLoader("adamba.report", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(compact=compact, duration=duration, percent=percent, number=number)
    rows = surgery_rows(family)
    return environment.get_template("page.html.jinja").render(
        family=family,
        tiles=headline(family),
        drawn=drawn,
        phases=family.phases,
        cells={phase.name: phase_cells(phase) for phase in family.phases},
        sources={image.picture.name: _sources(family, image.picture) for image in drawn},
        surgeries=rows,
        surgery_tolerance=short_power(SURGERY_TOLERANCE),
        commits=commits(family),
        hardware=hardware(family),
        finished=[phase for phase in family.phases if phase.status == "complete"],
        total_tokens=_total(family, "tokens_seen"),
        total_seconds=_total(family, "train_seconds"),
        peak_memory=max((phase.number("peak_memory_bytes") or 0.0 for phase in family.phases), default=0.0),
        games=game_rows(family),
        transcripts=transcripts(family),
        colors={name: (color, DARK.phase(name)) for name, color in LIGHT.phases.items()},
    )


def _sources(family: Family, picture: Picture) -> list[str]:
    """The commands that made, or measured, the numbers the picture shows."""
    made = [phase.command for phase in picture.logged_by(family)]
    measured = [phase.evaluation_command or phase.command for phase in picture.measured_in(family)]
    return list(dict.fromkeys(command for command in made + measured if command))


def _total(family: Family, key: str) -> float:
    return sum(phase.number(key) or 0.0 for phase in family.phases)


def compact(value: float | None, unit: str = "") -> str:
    """`1.35 M`; bytes are counted in powers of 1024 and written `2.0 GiB`."""
    if value is None:
        return "–"
    base, names = (1024.0, ["", "Ki", "Mi", "Gi", "Ti"]) if unit == "B" else (1000.0, ["", "k", "M", "G", "T"])
    rank = 0
    while abs(value) >= base and rank < len(names) - 1:
        value /= base
        rank += 1
    return f"{value:.3g} {names[rank]}{unit}".strip()


def duration(seconds: float | None) -> str:
    """`75 s`, `4 min 05 s`, `2 h 10 min`."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number(value: float | None, pattern: str = "{:.3f}") -> str:
    return "–" if value is None else pattern.format(value)


def phase_cells(phase: Phase) -> dict[str, str]:
    """The cells of a phase's row, the same on the page and in the terminal. `–` is not measured."""
    return {
        "hidden": number(phase.number("hidden_size"), "{:.0f}"),
        "parameters": compact(phase.number("num_parameters")),
        "tokens": compact(phase.number("tokens_seen")),
        "time": duration(phase.seconds),
        "train loss": number(phase.number("train_loss")),
        "held-out loss": number(phase.number("eval_loss")),
        "calculator": percent(phase.number("accuracy_calculator")),
        "legal moves": percent(phase.number("legal_move_rate_tic_tac_toe")),
        "lost to perfect": percent(phase.number("loss_rate_tic_tac_toe_perfect")),
    }
