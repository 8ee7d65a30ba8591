"""Runs a command as a step of a longer plan: its output goes to a log file, its last line to the terminal."""

import re
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

# How long an interrupted command may take to write its checkpoint before it is killed.
SECONDS_TO_SAVE = 60

# Colours and cursor moves that progress bars write.
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run_logged(
    command: Iterable[str],
    log: Path,
    *,
    on_line: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run a command to its end and return its exit code.

    Args:
        command: The program and its arguments.
        log: Written anew, in the order the output came. Of a progress bar only its last state is kept.
        on_line: Called with each line and each state of a progress bar, as it comes.
        environment: The command's whole environment; None inherits this one.

    An interrupt (SIGINT, SIGTERM) is passed on, the command's own clean-up awaited, and then raised again as
    `KeyboardInterrupt`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            list(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=None if environment is None else dict(environment),
            start_new_session=True,  # so an interrupt reaches it once, from here
        )
        try:
            assert process.stdout is not None
            pending = b""
            while chunk := process.stdout.read1(65536):  # type: ignore[attr-defined]
                pending = _split_lines(pending + chunk, file.write, on_line)
            _split_lines(pending + b"\n", file.write, on_line)
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            try:
                rest, _ = process.communicate(timeout=SECONDS_TO_SAVE)
                file.write(_TERMINAL_CODES.sub("", rest.decode("utf-8", errors="replace")))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise


def last_lines(log: Path, num_lines: int) -> list[str]:
    """The end of a log, without blank lines."""
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines[-num_lines:]


def terminate_as_interrupt() -> None:
    """Make SIGTERM raise `KeyboardInterrupt`, as Ctrl-C does."""

    def raise_interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, raise_interrupt)


def _split_lines(data: bytes, write: Callable[[str], object], on_line: Callable[[str], None]) -> bytes:
    """Hand every finished line on, keep only complete ones in the log; return the unfinished rest."""
    *finished, rest = data.split(b"\n")
    for raw in finished:
        states = _clean(raw)
        if states:
            on_line(states[-1])
        write((states[-1] if states else "") + "\n")
    if states := _clean(rest):
        on_line(states[-1])
    return rest.split(b"\r")[-1]


def _clean(raw: bytes) -> list[str]:
    text = _TERMINAL_CODES.sub("", raw.decode("utf-8", errors="replace"))
    return [state.strip() for state in text.split("\r") if state.strip()]
