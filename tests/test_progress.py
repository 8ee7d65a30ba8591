"""A logged command: what the log keeps, what the terminal is told, how it ends."""

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from adamba.progress import last_lines, run_logged, terminate_as_interrupt


def run(code: str, log: Path) -> tuple[int, list[str]]:
    seen: list[str] = []
    return run_logged([sys.executable, "-u", "-c", code], log, on_line=seen.append), seen


def test_log_keeps_lines_of_both_streams_and_the_exit_code(tmp_path):
    code, seen = run("import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)", tmp_path / "a/b.log")
    assert code == 3
    assert (tmp_path / "a/b.log").read_text().split() == ["one", "two"]
    assert "one" in seen and "two" in seen
    assert last_lines(tmp_path / "a/b.log", 1) == ["two"]


def test_progress_bar_is_shown_live_and_logged_once(tmp_path):
    program = (
        "import sys, time\n"
        "for i in range(4):\n"
        "    sys.stdout.write(f'\\r\\x1b[32m{i}/3\\x1b[0m'); sys.stdout.flush(); time.sleep(0.05)\n"
        "print(); print('end', end='')"
    )
    code, seen = run(program, tmp_path / "x.log")
    assert code == 0
    assert [line for line in (tmp_path / "x.log").read_text().splitlines() if line] == ["3/3", "end"]
    assert list(dict.fromkeys(seen)) == ["0/3", "1/3", "2/3", "3/3", "end"]


def test_undecodable_output_is_no_obstacle(tmp_path):
    code, _ = run("import sys; sys.stdout.buffer.write(b'\\xff\\xfe ok\\n')", tmp_path / "x.log")
    assert code == 0 and "ok" in (tmp_path / "x.log").read_text()


def test_interrupt_lets_the_command_clean_up(tmp_path):
    program = (
        "import signal, sys, time\n"
        f"def save(*_):\n    open({str(tmp_path / 'saved')!r}, 'w').close(); print('x' * 200000); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('ready'); time.sleep(30)"
    )
    previous = signal.getsignal(signal.SIGTERM)
    terminate_as_interrupt()

    seen: list[str] = []

    def interrupt(line: str) -> None:
        if not seen:  # once: on a busy machine one line may come in two pieces
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        seen.append(line)

    try:
        with pytest.raises(KeyboardInterrupt):
            run_logged([sys.executable, "-u", "-c", program], tmp_path / "x.log", on_line=interrupt)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert (tmp_path / "saved").exists()
    assert "x" * 1000 in (tmp_path / "x.log").read_text()
