"""The sandbox: what a model's code may not do is refused, what has no end is ended, and nothing is left behind."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from adamba.errors import UserError
from adamba.tools import code_interpreter, sandbox
from adamba.tools.code_interpreter import interpret
from adamba.tools.sandbox import Backend, Limits, Result, find_backend, run_python
from isolation import NO_ISOLATION, isolated

PATIENT = Limits(wall_seconds=300.0, cpu_seconds=60, memory_bytes=256 * 2**20)  # for what must end by itself
SHORT = Limits(wall_seconds=1.0, cpu_seconds=1, memory_bytes=256 * 2**20)

BACKENDS = [Backend("kernel with namespaces", namespaces=True), Backend("kernel")]
if shutil.which("bwrap"):
    BACKENDS.append(Backend("bubblewrap", bwrap=shutil.which("bwrap")))


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Every backend that this machine has, not only the one that would be taken."""
    if NO_ISOLATION:
        pytest.skip(NO_ISOLATION)
    probed = sandbox._run(f"OUTSIDE = {__file__!r}\n{sandbox.PROBE}", PATIENT, request.param, "required")
    if probed.output != "contained\n":
        pytest.skip(f"{request.param.name}: {probed.error}")
    monkeypatch.setattr(sandbox, "find_backend", lambda: request.param)
    return request.param


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No child process, no zombie, no file, no open descriptor after a test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    yield
    assert psutil.Process().children() == []
    assert not list(tmp_path.glob("sandbox-*"))
    assert descriptors == (len(os.listdir("/proc/self/fd")) if descriptors else 0)


def run(code: str, limits: Limits = PATIENT) -> Result:
    return run_python(code, limits)


def test_code_runs_and_its_own_files_work(backend: Backend) -> None:
    code = "import math\nopen('a.txt', 'w').write('x' * 9)\nprint(math.pi, len(open('a.txt').read()))"
    assert run(code).output == "3.141592653589793 9\n"
    assert run("import threading as t\na = t.Thread(target=print, args=(1,))\na.start()\na.join()").output == "1\n"
    assert run("def f(n):\n    return 1 if n < 2 else n * f(n - 1)\nprint(f(5))").output == "120\n"


REFUSED = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "programs": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'echo hi'])",
    "a daemon": "import os\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\n    while True: pass",
    "reading a file outside": "print(open({secret!r}).read())",
    "writing a file outside": "open({secret!r}, 'w')",
    "truncating a file outside": "import os\nos.open({secret!r}, os.O_RDONLY | os.O_TRUNC)",
    "removing a file outside": "import os\nos.remove({secret!r})",
    "changing the mode of a file outside": "import os\nos.chmod({secret!r}, 0)",
    "a link to a file outside": "import os\nos.symlink({secret!r}, 'link')\nprint(open('link').read())",
    "this process's memory": "print(open('/proc/{parent}/environ', 'rb').read())",
    "a folder above": "open('../escaped.txt', 'w')",
    "a socket": "import socket\nsocket.create_connection(('127.0.0.1', 1))",
    "a Unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('x')",
    "a pair of sockets": "import socket\nsocket.socketpair()",
    "killing its parent": "import os\nos.kill(os.getppid(), 9)",
    "killing this process": "import os\nos.kill({parent}, 9)",
    "killing everybody": "import os\nos.kill(-1, 9)",
    "signals by file owner": "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, {parent})",
    "another's limits": "import resource\nresource.prlimit({parent}, resource.RLIMIT_CPU, (1, 1))",
    "another's priority": "import os\nos.setpriority(os.PRIO_PROCESS, {parent}, 19)",
    "raising its limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    "10 GB at once": "x = bytearray(10 * 2**30)",
    "10 GB bit by bit": "x = []\nwhile True: x.append(bytearray(2**22))",
    "10 GB in memory files": "import os\nos.memfd_create('x')",
    "a huge file": "f = open('x', 'wb')\nwhile True: f.write(bytes(2**20))",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_forbidden_is_refused(backend: Backend, name: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    secret.chmod(0o644)
    code = REFUSED[name].format(secret=str(secret), parent=os.getpid())
    result = run("print('begun', flush=True)\n" + code, PATIENT)
    assert result.status == "failed" and result.output == "begun\n", result
    assert "Error" in result.error  # refused with an exception that the code, and the model, can read
    assert secret.read_text() == "secret" and secret.stat().st_mode & 0o777 == 0o644
    assert psutil.Process().is_running()


ENDED = {
    "endless loop": ("while True: pass", "time"),
    "endless sleep": ("import time\ntime.sleep(1000)", "time"),
    "silent loop": ("import os\nos.close(1)\nos.close(2)\nwhile True: pass", "time"),
    "deaf loop": (
        "import signal\nfor n in (1, 2, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "time",
    ),
    "endless output": ("while True: print('x' * 1000)", "output"),
    "endless errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "output"),
    "endless files": ("i = 0\nwhile True:\n    i += 1\n    open(str(i), 'w').close()", "files"),
}


@pytest.mark.parametrize("name", ENDED)
def test_what_has_no_end_is_ended(backend: Backend, name: str) -> None:
    code, status = ENDED[name]
    result = run(code, SHORT)
    if name == "endless files" and backend.bwrap:  # its files are in a file system of their own, which fills up
        status = "time"
    assert result.status == status and "stopped after" in result.error or "stopped with" in result.error
    assert len(result.output) <= SHORT.output_bytes


@isolated
def test_processor_time_is_limited_apart_from_wall_time() -> None:
    result = run("while True: pass", Limits(wall_seconds=300.0, cpu_seconds=1))
    assert result.status == "time" and result.error == "stopped after 1 seconds of processor time"


def test_code_dies_with_the_process_that_started_it(backend: Backend) -> None:
    options = f"bwrap={backend.bwrap!r}, namespaces={backend.namespaces}"
    program = (
        "from adamba.tools.sandbox import Backend, Limits, _run\n"
        f"_run('import time\\ntime.sleep(1000)', Limits(wall_seconds=1000.0), Backend('b', {options}), 'required')"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    watched: list[psutil.Process] = []
    try:
        while not watched and trainer.poll() is None:
            watched = psutil.Process(trainer.pid).children(recursive=True)
            time.sleep(0.01)
    finally:
        trainer.kill()
        trainer.wait()
    deadline = time.monotonic() + 120
    while not all(map(has_ended, watched)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert watched and all(map(has_ended, watched))


def has_ended(process: psutil.Process) -> bool:
    """Gone, or waiting for whoever inherits orphans here to notice."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@isolated
def test_threads_are_bounded_by_memory() -> None:
    code = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
    assert run(code, SHORT).status in ("failed", "time")


@isolated
def test_a_crash_of_the_interpreter_is_told() -> None:
    assert run("import ctypes\nctypes.string_at(0)").error.startswith("killed by signal 11")


@isolated
@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("print(2 + 3)", "5"),
        ("x = 1", "(it printed nothing)"),
        ("print(1)\n1 / 0", "1\nerror: line 2: ZeroDivisionError: division by zero"),
        ("print(1, end='')\n1 / 0", "1\nerror: line 2: ZeroDivisionError: division by zero"),
        ("x = (", "error: line 1: SyntaxError: '(' was never closed"),
        ("print(input())", "error: line 1: EOFError: EOF when reading a line"),
        ("raise SystemExit(3)", "error: exit code 3"),
        ("print('\ud800')", "?"),
        ("import numpy", "error: line 1: ModuleNotFoundError: No module named 'numpy'"),
        ("x" * 8001, "error: the code is longer than 8000 characters"),
        (5, "error: the code must be text"),
    ],
)
def test_the_tool_answers_with_text(code: str, answer: str) -> None:
    assert code_interpreter(code) == answer


def test_a_machine_without_isolation_refuses_in_one_line_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sandbox._run

    def not_contained(code: str, limits: Limits, backend: Backend, isolation: sandbox.Isolation) -> Result:
        if isolation == "required":
            return Result("finished", "free\n", "", 0.0)
        return real(code, limits, backend, isolation)

    monkeypatch.setattr(sandbox, "_run", not_contained)
    find_backend.cache_clear()
    try:
        with pytest.raises(UserError, match="cannot isolate code.*bubblewrap.*isolation: none") as error:
            run_python("print(1)")
        assert "\n" not in str(error.value)
        assert interpret("print(1)", isolation="none") == ("1", True)
        assert run_python("x = bytearray(10 * 2**30)", PATIENT, "none").error.endswith("MemoryError:")
        assert run_python("import os\nos.fork()\nwhile True: pass", SHORT, "none").status == "time"
    finally:
        find_backend.cache_clear()


@pytest.mark.parametrize("action", ["os.rmdir(os.getcwd())", "os.chmod('.', 0)"])
def test_code_that_takes_its_own_folder_away_ends_as_any_other(action: str) -> None:
    assert run_python(f"import os\n{action}\nprint(1)", PATIENT, "none").output == "1\n"


@pytest.mark.parametrize("isolation", ["required", "none"])
def test_another_system_than_linux_is_refused_in_one_line(isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(UserError, match="runs code on Linux only, not on darwin$"):
        run_python("print(1)", PATIENT, isolation)


def test_an_unknown_isolation_is_refused() -> None:
    with pytest.raises(UserError, match="'some' is unknown; use required or none"):
        run_python("print(1)", isolation="some")  # type: ignore[arg-type]
