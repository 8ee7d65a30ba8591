"""The process that runs a model's code: it gives up every right that the code does not need, then runs it.

Started by `adamba.tools.sandbox` as `python -I -S sandbox_child.py <orders>` with the code on standard input; prints a
null character when the code starts. What of the orders cannot be carried out ends the process before that.
Standard library only, and little of it: `json`, `signal` and `platform` would double the time that a start takes.

After `lock_up` the process, and no right of it can be had back:
- reads the standard library and shared libraries, writes files in its own folder, and opens nothing else (Landlock);
- makes no process and runs no program, opens no socket, signals nobody, changes no owner, mode or time of a file
  (seccomp; Landlock does not cover those);
- holds no capability, and can gain none (no_new_privs);
- is killed when the process that started it dies.
As there is only one process, limits of one process (memory, CPU seconds) are limits of the whole.
"""

import ctypes
import errno
import marshal
import os
import resource
import struct
import sys

REFUSED = 97  # exit code: the orders cannot be carried out here
SIGKILL = 9

# linux/prctl.h, linux/sched.h
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_SET_SECCOMP = 1, 24, 38, 47, 22
PR_CAP_AMBIENT_CLEAR_ALL, SECCOMP_MODE_FILTER = 4, 2
CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC, CLONE_THREAD = 0x10000000, 0x40000000, 0x08000000, 0x00010000

# linux/landlock.h: the rights of a file system, in the order of their bits; the ABI says how many there are
LANDLOCK_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
READ_FILE, READ_DIR, WRITE_FILE, REMOVE_FILE, MAKE_REG, TRUNCATE = 1 << 2, 1 << 3, 1 << 1, 1 << 5, 1 << 8, 1 << 14
LANDLOCK_CALLS = {"create_ruleset": 444, "add_rule": 445, "restrict_self": 446}  # the same on every architecture
RULE_PATH_BENEATH = 1

# System calls refused outright: number on x86_64, on aarch64 (None where it has none).
REFUSED_CALLS: dict[str, tuple[int, int | None]] = {
    # processes and programs
    **{"fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281)},
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272)},
    **{"pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "process_madvise": (440, 440)},
    **{"process_mrelease": (448, 448), "personality": (135, 92), "prctl": (157, 167)},
    # signals
    **{"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138)},
    **{"rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424)},
    # network, and io_uring, which would do all of this unseen
    **{"socket": (41, 198), "socketpair": (53, 199), "io_uring_setup": (425, 425)},
    **{"io_uring_enter": (426, 426), "io_uring_register": (427, 427)},
    # memory and queues that outlive the process or escape its limit
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196)},
    **{"shmctl": (31, 195), "semget": (64, 190), "semctl": (66, 191), "msgget": (68, 186), "msgctl": (71, 187)},
    **{"mq_open": (240, 180), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219)},
    # priorities of this and other processes
    **{"setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setparam": (142, 118)},
    **{"sched_setscheduler": (144, 119), "sched_setattr": (314, 274), "sched_setaffinity": (203, 122)},
    **{"migrate_pages": (256, 238), "move_pages": (279, 239)},
    # owner, mode, times and attributes of files; ways around a path
    **{"chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55)},
    **{"lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None)},
    **{"futimesat": (261, None), "utimensat": (280, 88), "truncate": (76, 45), "setxattr": (188, 5)},
    **{"lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15)},
    **{"fremovexattr": (199, 16), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265)},
    # the machine
    **{"mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "setns": (308, 268)},
    **{"unshare": (272, 97), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430)},
    **{"fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442)},
    **{"swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142), "init_module": (175, 105)},
    **{"finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104)},
    **{"kexec_file_load": (320, 294), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282)},
    **{"fanotify_init": (300, 262), "quotactl": (179, 60), "quotactl_fd": (443, 443), "acct": (163, 89)},
    **{"settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266)},
    **{"sethostname": (170, 161), "setdomainname": (171, 162), "syslog": (103, 116), "vhangup": (153, 58)},
    **{"iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None)},
}
# System calls that look at an argument, and the calls that libraries do without when they seem not to exist.
CLONE, CLONE3, OPEN, OPENAT, OPENAT2 = (56, 220), (435, 435), (2, None), (257, 56), (437, 437)
FCNTL, IOCTL, PRLIMIT = (72, 25), (16, 29), (302, 261)
FIRST_UNKNOWN_CALL = 452  # newer than what was thought of here (and x32's numbers): seem not to exist
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
OWNER_COMMANDS = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: they make the kernel signal another process
HARMLESS_IOCTLS = (0x5401, 0x5450, 0x5451)  # TCGETS, FIONCLEX, FIOCLEX

libc = ctypes.CDLL(None, use_errno=True)


class CannotIsolate(OSError):
    """The kernel refused a step of the isolation."""


def call(name: str, result: int) -> int:
    """The result of a system call.

    Raises:
        CannotIsolate: it failed.
    """
    if result < 0:
        raise CannotIsolate(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def prctl(option: int, *arguments: int) -> int:
    """`prctl` with its unused arguments zero."""
    values = [ctypes.c_ulong(value) for value in (*arguments, *(0,) * (4 - len(arguments)))]
    return libc.prctl(option, *values)


def set_limits(limits: dict[str, int]) -> None:
    """Limits of this process, hard ones: they cannot be raised again."""
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = value + 1 if name == "CPU" else value  # the soft one ends it with a signal that tells why
        resource.setrlimit(kind, (value, hard))


def enter_namespaces() -> None:
    """A network without any interface, own System V objects, and a user without any right over the real ones."""
    uid, gid = os.getuid(), os.getgid()
    call("unshare", libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def drop_capabilities() -> None:
    """Give up all capabilities, for what would be executed too."""
    capability = 0
    while prctl(PR_CAPBSET_DROP, capability) == 0:
        capability += 1
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    call("capset", libc.capset(header, bytes(24)))


def restrict_files(readable: list[str], writable: str) -> None:
    """Landlock (kernel 5.13): below `readable` only reading, in `writable` plain files, elsewhere nothing."""
    abi = libc.syscall(LANDLOCK_CALLS["create_ruleset"], None, ctypes.c_size_t(0), 1)
    call("landlock", abi)
    handled = (1 << LANDLOCK_RIGHTS[min(abi, max(LANDLOCK_RIGHTS))]) - 1
    network = 3 if abi >= 4 else 0  # bind and connect TCP
    scoped = 3 if abi >= 6 else 0  # abstract Unix sockets and signals stay inside
    rules = struct.pack("QQQ", handled, network, scoped)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = call("landlock", libc.syscall(LANDLOCK_CALLS["create_ruleset"], rules, ctypes.c_size_t(len(rules)), 0))
    own = READ_FILE | READ_DIR | WRITE_FILE | REMOVE_FILE | MAKE_REG | TRUNCATE
    for path, rights in [*((path, READ_FILE | READ_DIR) for path in readable), (writable, own)]:
        try:
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if not os.path.isdir(path):
            rights &= READ_FILE | WRITE_FILE | TRUNCATE
        rule = struct.pack("=Qi", rights & handled, folder)
        added = libc.syscall(LANDLOCK_CALLS["add_rule"], ruleset, RULE_PATH_BENEATH, rule, 0)
        call(f"landlock {path}", added)
        os.close(folder)
    call("landlock", libc.syscall(LANDLOCK_CALLS["restrict_self"], ruleset, 0))
    os.close(ruleset)


def system_call_filter(machine: str) -> bytes:
    """The seccomp program (classic BPF) for `machine`: a list of refusals, everything else allowed.

    Raises:
        CannotIsolate: the machine's system call numbers are not known here.
    """
    if machine not in ARCHITECTURES:
        raise CannotIsolate(errno.ENOSYS, f"seccomp: no table of system calls for {machine}")
    column, audit = ARCHITECTURES[machine]
    number, architecture, argument = 0, 4, lambda index: 16 + 8 * index  # offsets in struct seccomp_data
    load, equal, at_least, any_bit, mask, done = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
    allow, kill, refuse, absent = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS

    def when(call_number: int | None, *body: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
        return [] if call_number is None else [(equal, 0, len(body), call_number), *body]

    def unless_one_of(index: int, values: tuple[int, ...], then: int, otherwise: int) -> list:
        tests = [(equal, len(values) - place, 0, value) for place, value in enumerate(values)]
        return [(load, 0, 0, argument(index)), *tests, (done, 0, 0, otherwise), (done, 0, 0, then)]

    def opens_to_truncate(index: int) -> list:  # O_TRUNC without writing: older Landlocks let it pass
        test = (equal, 0, 1, os.O_TRUNC)
        flags = (load, 0, 0, argument(index)), (mask, 0, 0, os.O_TRUNC | os.O_ACCMODE)
        return [*flags, test, (done, 0, 0, refuse), (done, 0, 0, allow)]

    thread = [(load, 0, 0, argument(0)), (any_bit, 1, 0, CLONE_THREAD), (done, 0, 0, refuse), (done, 0, 0, allow)]
    program = [
        (load, 0, 0, architecture),
        (equal, 1, 0, audit),
        (done, 0, 0, kill),
        (load, 0, 0, number),
        (at_least, 0, 1, FIRST_UNKNOWN_CALL),
        (done, 0, 0, absent),
        *when(CLONE[column], *thread),
        *when(CLONE3[column], (done, 0, 0, absent)),
        *when(OPENAT2[column], (done, 0, 0, absent)),
        *when(OPEN[column], *opens_to_truncate(1)),
        *when(OPENAT[column], *opens_to_truncate(2)),
        *when(FCNTL[column], *unless_one_of(1, OWNER_COMMANDS, then=refuse, otherwise=allow)),
        *when(IOCTL[column], *unless_one_of(1, HARMLESS_IOCTLS, then=allow, otherwise=refuse)),
        *when(PRLIMIT[column], *unless_one_of(0, (0,), then=allow, otherwise=refuse)),
    ]
    for numbers in REFUSED_CALLS.values():
        program += when(numbers[column], (done, 0, 0, refuse))
    program.append((done, 0, 0, allow))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def filter_system_calls() -> None:
    """Install the filter. What it forbids is forbidden for good."""
    program = system_call_filter(os.uname().machine)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    address = ctypes.create_string_buffer(header, len(header))
    call("seccomp", prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(address)))


def die_with_parent(parent: int) -> None:
    """Be killed when the process that started this one ends; `parent` is its number, 0 where it is not visible.

    Raises:
        CannotIsolate: it has ended already.
    """
    call("prctl", prctl(PR_SET_PDEATHSIG, SIGKILL))
    if parent and os.getppid() != parent:
        raise CannotIsolate(errno.ESRCH, "the process that started this one is gone")


def lock_up(orders: dict) -> None:
    """Carry out the orders, in the order in which each is still allowed.

    Raises:
        CannotIsolate: the kernel does not have what an order needs.
    """
    set_limits(orders["limits"])
    if orders["isolation"] == "none":
        die_with_parent(orders["parent"])
        return
    if orders["namespaces"]:
        enter_namespaces()
    call("no_new_privs", prctl(PR_SET_NO_NEW_PRIVS, 1))
    drop_capabilities()
    if orders["landlock"]:
        restrict_files(orders["readable"], os.getcwd())
    die_with_parent(orders["parent"])  # late: the kernel forgets it when a process changes its user or rights
    filter_system_calls()


def main() -> None:
    orders = marshal.loads(bytes.fromhex(sys.argv[1]))
    try:
        lock_up(orders)
    except OSError as error:
        print(f"cannot isolate: {error.strerror or error}", file=sys.stderr)
        raise SystemExit(REFUSED) from None
    code = sys.stdin.buffer.read().decode("utf-8", errors="replace")
    sys.argv[1:] = []
    os.environ.clear()
    os.write(1, b"\0")
    names = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        exec(compile(code, "main.py", "exec"), names)
    except Exception as error:
        print(describe(error, code), file=sys.stderr)
        raise SystemExit(1) from None


def describe(error: Exception, code: str) -> str:
    """`line 3: ZeroDivisionError: division by zero`, the line being that of the model's own code."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "main.py":
            line = trace.tb_lineno
        trace = trace.tb_next
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"line {line}: {type(error).__name__}: {text}" if line else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    main()
