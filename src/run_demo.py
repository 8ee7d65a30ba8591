"""Runs a whole recipe family in order: every phase, each followed by its evaluation, and the report at the end.

    python src/run_demo.py recipes/tiny

A phase whose checkpoint is complete and was made by this code, this recipe and these inputs is skipped, so a second
run does only what is missing. Every command's output goes to logs/<family>/<step>.log.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from adamba.errors import UserError, user_errors
from adamba.plan_steps import Step, family_steps
from adamba.progress import last_lines, run_logged, terminate_as_interrupt
from adamba.publish import read_metrics

# The first of these a phase has measured is its headline.
HEADLINES = {
    "loss_rate_tic_tac_toe_perfect": "lost to perfect {:.1%}",
    "accuracy_calculator": "calculator {:.1%}",
    "max_abs_logit_diff": "logit difference {:.1e}",
    "eval_loss": "held-out loss {:.3f}",
}
NUM_LOG_LINES_ON_FAILURE = 25
SECONDS_BETWEEN_PLAIN_LINES = 20


class Board:
    """The table of steps on the terminal; where there is none, one line a change."""

    def __init__(self, steps: list[Step], console: Console) -> None:
        self.rows = {id(step): ("waiting", "", "") for step in steps}
        self.steps = steps
        self.console = console
        self.live_line = ""
        self.started = self.printed = time.monotonic()
        self.running: Step | None = None
        self.live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=False)

    def __enter__(self) -> "Board":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live_line = ""
        if self.console.is_terminal:
            self.live.stop()

    def start(self, step: Step, why: str) -> None:
        self.running, self.started, self.printed = step, time.monotonic(), time.monotonic()
        self.rows[id(step)] = ("running", why, "")
        self._print(f"{title(step)}: {why}; running {' '.join(step.command)}")

    def line(self, line: str) -> None:
        """Show the newest line of the running command."""
        self.live_line = line
        if time.monotonic() - self.printed > SECONDS_BETWEEN_PLAIN_LINES:
            self.printed = time.monotonic()
            self._print(f"  {line[:150]}")

    def finish(self, step: Step, state: str, note: str) -> None:
        seconds = "" if state == "skipped" else f"{time.monotonic() - self.started:.0f} s"
        self.rows[id(step)] = (state, note, seconds)
        self.running, self.live_line = None, ""
        self._print(" ".join(filter(None, [f"{title(step)}: {state}", seconds, note])))

    def _print(self, text: str) -> None:
        if not self.console.is_terminal:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _render(self) -> Group:
        table = Table(box=None, header_style="dim", pad_edge=False)
        for column in ("phase", "state", "time", ""):
            table.add_column(column, justify="right" if column == "time" else "left", no_wrap=True)
        styles = {
            "done": "green",
            "running": "bold yellow",
            "failed": "bold red",
            "skipped": "green",
            "waiting": "dim",
        }
        for step in self.steps:
            state, note, seconds = self.rows[id(step)]
            if step is self.running:
                seconds = f"{time.monotonic() - self.started:.0f} s"
            table.add_row(title(step), Text(state, styles[state]), seconds, Text(note, "dim"))
        return Group(table, Text(self.live_line, "dim", no_wrap=True, overflow="ellipsis"))


def title(step: Step) -> str:
    return f"{step.name} measured" if step.evaluation else step.name


def headline(step: Step) -> str:
    """The phase's first headline metric, for instance `held-out loss 2.310`."""
    metrics = read_metrics(step.checkpoint)
    for key, template in HEADLINES.items():
        if isinstance(metrics.get(key), (int, float)):
            return template.format(metrics[key])
    return ""


def run_steps(steps: list[Step], logs: Path, console: Console) -> None:
    """Run what is missing, in order; stop at the first failure.

    Raises:
        SystemExit: with the failed command's exit code.
    """
    with Board(steps, console) as board:
        for step in steps:
            why = step.why_run()
            if why is None:
                board.finish(step, "skipped", headline(step))
                continue
            board.start(step, why)
            log = logs / f"{step.name}{'_eval' if step.evaluation else ''}.log"
            code = run_logged(step.command, log, on_line=board.line, environment=environment())
            if code == 0:
                step.record()
                board.finish(step, "done", headline(step))
                continue
            board.finish(step, "failed", f"exit code {code}, see {log}")
            break
        else:
            return
    console.print(f"\nThe last lines of {log}:", highlight=False)
    for text in last_lines(log, NUM_LOG_LINES_ON_FAILURE):
        console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"\n{title(step)} failed. Run it alone, with everything on the terminal:", style="bold red")
    console.print(f"  {' '.join(step.command)}", highlight=False, soft_wrap=True)
    raise SystemExit(code if code > 0 else 1)


def environment() -> dict[str, str]:
    """This environment, for a run that needs no network, is of this interpreter, and whose log has no colour."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    plain = {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "150"}
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    return {**os.environ, **offline, **plain, "PATH": path}


@user_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", type=Path, default=Path("recipes/tiny"), help="folder of recipes")
    parser.add_argument("--until", metavar="PHASE", help="stop after this phase, for instance phase2")
    args = parser.parse_args()

    steps = family_steps(args.family)
    if args.until:
        names = [step.name for step in steps]
        if args.until not in names:
            raise UserError(
                f"--until {args.until}: no such phase in {args.family}; it has {', '.join(sorted(set(names)))}"
            )
        steps = steps[: len(names) - names[::-1].index(args.until)]

    terminate_as_interrupt()
    console = Console()
    started = time.monotonic()
    try:
        run_steps(steps, Path("logs") / args.family.name, console)
    except KeyboardInterrupt:
        console.print("\nInterrupted. What is finished is kept; the same command goes on from there.")
        raise SystemExit(130) from None
    report = [sys.executable, str(Path(__file__).with_name("run_report.py")), str(args.family)]
    done = subprocess.run(report, env=environment() | {"NO_COLOR": os.environ.get("NO_COLOR", "")}, check=False)
    minutes = (time.monotonic() - started) / 60
    console.print(f"\n{len(steps)} steps in {minutes:.1f} minutes, commands' output in logs/{args.family.name}")
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
