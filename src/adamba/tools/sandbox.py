"""Runs a model's Python code in a process of its own that can hurt nothing, within limits, and says what it printed.

Two ways to isolate, the first that works here is taken (each is tried once, with code that attempts what is
forbidden):
- `bubblewrap`, when `bwrap` is installed: an own view of the file system, own process numbers and network, and all of
  the second;
- `kernel`: Landlock, seccomp, no capabilities, and an own network where user namespaces are allowed. Needs Linux 5.13
  with Landlock on x86_64 or aarch64, and no rights.
Where neither works, running is refused unless the user asks for `isolation="none"`: limits only, no protection.

What this does not promise: protection from faults of the kernel itself (run trainings of untrusted models in a virtual
machine), and secrecy of the Python installation and shared libraries, which stay readable.
"""

import marshal
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import psutil

from adamba.errors import UserError
from adamba.tools.sandbox_child import REFUSED

Isolation = Literal["required", "none"]
CHILD = Path(__file__).with_name("sandbox_child.py")
POLL_SECONDS = 0.05
START_SECONDS = 120.0  # for the interpreter to start, on a machine that is busy
INSIDE = "/sandbox"  # the scratch folder as bubblewrap shows it

# Tries everything that must be refused; prints `contained` only if all of it is.
PROBE = """
import os, socket
def refused(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        return True
    return False
with open("probe.txt", "w") as file:
    file.write("a file of one's own works")
attempts = [(open, OUTSIDE), (open, OUTSIDE, "a"), (open, "/proc/1/status"), (os.remove, OUTSIDE)]
attempts += [(socket.socket,), (os.fork,), (os.kill, os.getppid(), 0)]
attempts += [(os.chmod, "probe.txt", 0o600), (os.execv, "/bin/true", ["true"])]
print("contained" if all(refused(*attempt) for attempt in attempts) else "free")
"""


@dataclass(frozen=True)
class Limits:
    """What one run may use. It is always one process; its threads share these.

    Attributes:
        wall_seconds: From the start of the code (not of the interpreter) to its kill.
        cpu_seconds: Processor time, whole seconds.
        memory_bytes: Address space; an allocation beyond it raises MemoryError inside.
        output_bytes: Printed text, standard output and error together.
        file_bytes: Each file it writes.
        scratch_bytes: All files in its folder, looked at every 50 ms. Files that it removed and keeps open are bounded
            by `num_files` and `file_bytes` alone.
        num_files: Files it writes, and (apart) files it has open.
    """

    wall_seconds: float = 5.0
    cpu_seconds: int = 4
    memory_bytes: int = 512 * 2**20
    output_bytes: int = 16 * 2**10
    file_bytes: int = 4 * 2**20
    scratch_bytes: int = 32 * 2**20
    num_files: int = 64

    def as_rlimits(self) -> dict[str, int]:
        """Names of `resource.RLIMIT_*` and their values."""
        return {
            "CPU": self.cpu_seconds,
            "AS": self.memory_bytes,
            "FSIZE": self.file_bytes,
            "NOFILE": self.num_files,
            "CORE": 0,
            "MEMLOCK": 0,
            "MSGQUEUE": 0,
        }


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Result:
    """What became of a run.

    Attributes:
        status: `finished`, `failed` (an exception, a non-zero exit, a signal), or the limit that ended it: `start`,
            `time`, `output`, `files`.
        output: Standard output, cut at the limit.
        error: One line saying what went wrong; empty when finished.
        seconds: Wall time.
    """

    status: str
    output: str
    error: str
    seconds: float


@dataclass(frozen=True)
class Backend:
    """One way to start the child: with bubblewrap at a path or without, with own namespaces or without."""

    name: str
    bwrap: str | None = None
    namespaces: bool = False

    def command(self, limits: Limits, isolation: Isolation) -> list[str]:
        """The command that starts the child in its scratch folder."""
        python = os.path.realpath(sys.executable)
        orders = {
            "isolation": isolation,
            "parent": 0 if self.bwrap else os.getpid(),
            "limits": limits.as_rlimits(),
            "namespaces": self.namespaces,
            "landlock": self.bwrap is None,
            "readable": readable_paths(),
        }
        child = [python, "-I", "-S", str(CHILD), marshal.dumps(orders).hex()]
        if self.bwrap is None:
            return child
        shown = [python, str(CHILD), *readable_paths()]
        binds = [word for path in shown for word in ("--ro-bind-try", path, path)]
        devices = [word for path in ("/dev/null", "/dev/urandom") for word in ("--dev-bind-try", path, path)]
        scratch = ["--size", str(limits.scratch_bytes), "--tmpfs", INSIDE, "--remount-ro", "/", "--chdir", INSIDE]
        own = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--as-pid-1"]
        return [self.bwrap, *own, *binds, *devices, *scratch, "--", *child]


def readable_paths() -> list[str]:
    """Folders that Python needs to import its standard library."""
    libraries = [sysconfig.get_path("stdlib"), sysconfig.get_config_var("LIBDIR") or "/usr/lib"]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
    devices = ["/dev/null", "/dev/urandom"]
    return list(dict.fromkeys(path for path in [*libraries, *system, *devices] if os.path.exists(path)))


@lru_cache
def find_backend(bwrap: str | None = None) -> Backend:
    """The strongest backend that passes the probe on this machine.

    Args:
        bwrap: Path of bubblewrap; None looks for it.

    Raises:
        UserError: none does.
    """
    bwrap = bwrap or shutil.which("bwrap")
    backends = [Backend("bubblewrap", bwrap=bwrap)] if bwrap else []
    backends += [Backend("kernel with namespaces", namespaces=True), Backend("kernel")]
    reason = ""
    for backend in backends:
        result = _run(f"OUTSIDE = {__file__!r}\n{PROBE}", DEFAULT_LIMITS, backend, "required")
        if result.output == "contained\n":
            return backend
        reason = result.error or "the probe was not contained"
    raise UserError(f"code_interpreter: this machine cannot isolate code ({reason}); {_ADVICE}")


_ADVICE = (
    "install bubblewrap, use Linux 5.13 or newer with Landlock, or run it unprotected with isolation: none in "
    "task_settings"
)


def require(isolation: Isolation) -> None:
    """Make sure that code can be run as the user wants it.

    Raises:
        UserError: this is not Linux, isolation is required and this machine has none, or the value is unknown.
    """
    if sys.platform != "linux":  # limits and the end with the parent are Linux's, without isolation too
        raise UserError(f"code_interpreter: runs code on Linux only, not on {sys.platform}")
    if isolation not in ("required", "none"):
        raise UserError(f"isolation: {isolation!r} is unknown; use required or none")
    if isolation == "required":
        find_backend()


def run_python(code: str, limits: Limits = DEFAULT_LIMITS, isolation: Isolation = "required") -> Result:
    """Run `code` and wait for it. When this returns, nothing of it runs or lies around any more.

    Raises:
        UserError: isolation is required and this machine has none.
    """
    require(isolation)
    return _run(code, limits, find_backend() if isolation == "required" else Backend("none"), isolation)


def _run(code: str, limits: Limits, backend: Backend, isolation: Isolation) -> Result:
    with tempfile.TemporaryDirectory(prefix="sandbox-") as scratch, tempfile.TemporaryFile() as source:
        source.write(code.encode("utf-8", errors="replace"))
        source.seek(0)
        started = time.monotonic()
        process = subprocess.Popen(
            backend.command(limits, isolation),
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=scratch,
            env={"PATH": "", "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            status, streams = _watch(process, scratch, limits)
        finally:
            _kill(process)
        output, error = (stream.decode("utf-8", errors="replace") for stream in streams)
        return _judge(status, process.returncode, output, error, limits, time.monotonic() - started)


def _watch(process: subprocess.Popen, scratch: str, limits: Limits) -> tuple[str, tuple[bytearray, bytearray]]:
    """Read what the process prints until it ends or breaks a limit; which one, and both streams."""
    output, error = bytearray(), bytearray()
    deadline = time.monotonic() + START_SECONDS
    has_started = False
    with selectors.DefaultSelector() as selector:
        for stream, buffer in ((process.stdout, output), (process.stderr, error)):
            assert stream is not None
            selector.register(stream, selectors.EVENT_READ, buffer)
        # When its streams are closed, which it may do and go on, its end is looked for instead.
        while selector.get_map() or process.poll() is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return ("time" if has_started else "start"), (output, error)
            if not selector.get_map():
                time.sleep(0.001)
            for key, _ in selector.select(min(left, POLL_SECONDS)) if selector.get_map() else ():
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fileobj)
                if data and not has_started and key.data is output:
                    has_started, data = True, data[1:]  # the null character
                    deadline = time.monotonic() + limits.wall_seconds
                room = limits.output_bytes - len(output) - len(error)
                key.data.extend(data[:room])
                if len(data) > room:
                    return "output", (output, error)
            if _too_many_files(scratch, limits):
                return "files", (output, error)
    return "finished", (output, error)


def _too_many_files(scratch: str, limits: Limits) -> bool:
    """Whether the scratch folder (flat: the child cannot make folders) holds more than it may."""
    num_files = num_bytes = 0
    try:
        entries = os.scandir(scratch)
    except OSError:  # without isolation the code can remove or close its folder
        return False
    with entries:
        for entry in entries:
            num_files += 1
            try:
                num_bytes += entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue
            if num_files > limits.num_files or num_bytes > limits.scratch_bytes:
                return True
    return False


def _kill(process: subprocess.Popen) -> None:
    """End the process and all below it, and reap it."""
    if process.poll() is None:
        try:
            below = psutil.Process(process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            below = []
        for child in below:  # bubblewrap's own child first, so that bubblewrap still reaps it
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        if below:
            try:
                process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                pass
        process.kill()
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    try:
        os.killpg(process.pid, signal.SIGKILL)  # without isolation it may have left children in its group
    except (ProcessLookupError, PermissionError):
        pass


def _judge(status: str, returncode: int, output: str, error: str, limits: Limits, seconds: float) -> Result:
    """The result with one line of explanation."""
    last = error.strip().splitlines()[-1] if error.strip() else ""
    reasons = {
        "start": f"did not start within {START_SECONDS:g} seconds",
        "time": f"stopped after {limits.wall_seconds:g} seconds",
        "output": f"stopped after {limits.output_bytes} bytes of output",
        "files": f"stopped with more than {limits.num_files} files or {limits.scratch_bytes} bytes in them",
    }
    if status in reasons:
        return Result(status, output, reasons[status], seconds)
    # The first limit of processor time sends SIGXCPU, the second, a second later, SIGKILL (the first process of
    # bubblewrap hears only that).
    by_kernel = returncode in (-signal.SIGKILL, 128 + signal.SIGKILL) and seconds > limits.cpu_seconds
    if returncode in (-signal.SIGXCPU, 128 + signal.SIGXCPU) or by_kernel:
        return Result("time", output, f"stopped after {limits.cpu_seconds} seconds of processor time", seconds)
    if returncode < 0 or returncode > 128:
        number = -returncode if returncode < 0 else returncode - 128
        return Result("failed", output, f"killed by signal {number}", seconds)
    if returncode:
        reason = last or f"exit code {returncode}"
        return Result("failed", output, reason if returncode != REFUSED else f"sandbox: {last}", seconds)
    return Result("finished", output, "", seconds)
