"""The report as one compact table on the terminal."""

from rich.console import Console
from rich.table import Table

from .games import COLUMNS as GAME_COLUMNS
from .games import game_rows
from .measures import headline
from .page import phase_cells
from .reading import Family

COLUMNS = {
    "hidden": "hidden",
    "tokens": "tokens",
    "time": "time",
    "held-out loss": "held-out\nloss",
    "calculator": "calcu-\nlator",
    "legal moves": "legal\nmoves",
    "lost to perfect": "lost to\nperfect",
}


def print_report(family: Family, console: Console | None = None) -> None:
    """Print a row per phase and a line per headline number."""
    console = console or Console()
    table = Table(title=f"Adamba · {family.name}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("phase", style="bold", header_style="dim", no_wrap=True)
    for header in COLUMNS.values():
        table.add_column(header, justify="right", header_style="dim", no_wrap=True)
    for phase in family.phases:
        if phase.status == "complete":
            cells = phase_cells(phase)
            table.add_row(phase.name, *(cells[column] for column in COLUMNS))
        else:
            table.add_row(phase.name, phase.status, style="dim")
    console.print(table)
    console.print()
    if games := game_rows(family):
        table = Table(box=None, pad_edge=False)
        for column in GAME_COLUMNS:
            table.add_column(column, justify="left" if column in ("game", "who") else "right", header_style="dim")
        for row in games:
            table.add_row(*row.values())
        console.print(table)
        console.print()
    for tile in headline(family):
        mark = {True: "[green]✓[/]", False: "[red]✗[/]", None: "·"}[tile.met]
        line = f"{mark} {tile.title} [bold]{tile.value}[/] [dim]{tile.note}[/]"
        console.print(line, highlight=False, soft_wrap=True)
    for phase in family.phases:
        if phase.not_finite:
            names = ", ".join(phase.not_finite)
            console.print(f"[red]✗[/] {phase.folder / 'metrics.json'}: not finite: {names}", soft_wrap=True)
