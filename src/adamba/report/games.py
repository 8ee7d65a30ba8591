"""The table of recipes/games: who played, how it was trained, and what came of it; and games to look at."""

import json
from dataclasses import dataclass
from typing import Any

from adamba.errors import UserError

from .measures import percent
from .reading import Family, Phase

# Kind of run, its way of playing → what the table calls it, in the order of the table.
ARMS = {
    ("sft", "single"): "one agent, untrained",
    ("grpo", "single"): "one agent, GRPO",
    ("sft", "team"): "team, untrained",
    ("shared", "team"): "team, AT-GRPO, one policy",
    ("per_role", "team"): "team, AT-GRPO, a policy a role",
    ("per_role", "team_swapped"): "the same, roles swapped",
}
COLUMNS = ("game", "who", "success", "95 % interval", "turns", "invalid actions", "tokens a game", "RL tokens")


@dataclass(frozen=True)
class Transcript:
    """One game: `lines` are what was said and the boards between."""

    game: str
    who: str
    won: bool
    lines: list[str]


def game_rows(family: Family) -> list[dict[str, str]]:
    """Cells of the table, game by game; empty when the family plays none. Untrained is after the short SFT."""
    rows = []
    for (kind, way), who in ARMS.items():
        for phase in _of_kind(family, kind):
            if phase.number(f"success_rate_{way}") is None:
                continue
            low, high = (phase.number(f"success_{end}_{way}") for end in ("low", "high"))
            tokens = phase.number("num_generated_tokens")
            cells = (
                str(phase.metrics.get("game", "")),
                who,
                percent(phase.number(f"success_rate_{way}")),
                f"{percent(low)} – {percent(high)}",
                _short(phase.number(f"mean_turns_{way}")),
                percent(phase.number(f"invalid_action_rate_{way}")),
                _short(phase.number(f"tokens_per_episode_{way}")),
                "–" if tokens is None else f"{tokens:,.0f}",
            )
            rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return sorted(rows, key=lambda row: row["game"])  # stable: the order of the arms stays


def transcripts(family: Family) -> list[Transcript]:
    """Wins and losses that the evaluations kept.

    Raises:
        UserError: a games.json that cannot be read.
    """
    found = []
    for (kind, way), who in ARMS.items():
        for phase in _of_kind(family, kind):
            content = _read(phase)
            for game in content.get("transcripts", []):
                if game["way"] == way:
                    found.append(Transcript(content["task"], who, game["won"], game["lines"]))
    return sorted(found, key=lambda game: game.game)


def _of_kind(family: Family, kind: str) -> list[Phase]:
    """Runs named `<game>_<place>_<kind>`."""
    return [phase for phase in family.phases if phase.status == "complete" and phase.name.endswith(f"_{kind}")]


def _read(phase: Phase) -> dict[str, Any]:
    path = phase.folder / "games.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); evaluate this run again") from error


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
