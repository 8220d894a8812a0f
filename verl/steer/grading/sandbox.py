# SPDX-License-Identifier: Apache-2.0
"""A sandbox for one Python process that nobody trusts: bubblewrap, a filter of system calls, and resource limits.

The process sees Python's library and numpy, read-only, and no other file, process, network or environment. It may start
threads but no process: so the limits of one process bound the whole program, and no cgroup is needed.
docs/code_rewards.md lists what holds and what doesn't.
"""

import contextlib
import json
import math
import os
import platform
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import IO, Any

from verl.steer.options import option, resolve_options

SECTION = "reward.custom_reward_function.reward_kwargs.code"
OTHERWISE = "or set reward.sandbox_fusion.url (docs/code_rewards.md)"
DRIVER = Path(__file__).with_name("code_driver.py")
PACKAGES = ("numpy",)  # what a program may import beside the standard library
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

#: x86-64's numbers of system calls that fail with EPERM: new processes and namespaces, sockets (AF_VSOCK has no
#: namespace), memory that RLIMIT_AS doesn't count, other processes' memory, and what no program here needs.
_DENIED = {
    **{"fork": 57, "vfork": 58, "unshare": 272, "setns": 308, "socket": 41, "memfd_create": 319, "memfd_secret": 447},
    **{"shmget": 29, "msgget": 68, "semget": 64, "mq_open": 240, "ptrace": 101, "process_vm_readv": 310},
    **{"process_vm_writev": 311, "kcmp": 312, "pidfd_getfd": 438, "add_key": 248, "request_key": 249, "keyctl": 250},
    **{"bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425, "modify_ldt": 154},
}
_CLONE, _CLONE3, _CLONE_THREAD, _X32, _X86_64 = 56, 435, 0x10000, 0x40000000, 0xC000003E
_KILL, _ALLOW, _EPERM, _ENOSYS = 0x80000000, 0x7FFF0000, 0x00050001, 0x00050026


@dataclass
class Limits:
    """Limits of one process, keys below `SECTION`.

    Args:
        timeout: seconds of CPU time for one input or call, or for what comes before the calls, rounded up and one more;
            all calls together have ten times as many.
        wall: seconds of wall time for one input or call, for programs that wait instead of computing.
        memory_mb: MiB of address space.
        output_mb: MiB that the process may print, or return from one call.
    """

    timeout: float = option(10.0, above=0.0, at_most=1e6)
    wall: float = option(200.0, above=0.0, at_most=1e6)
    memory_mb: int = option(1024, at_least=256, integer=True)
    output_mb: int = option(8, at_least=1, integer=True)

    def __post_init__(self) -> None:
        resolve_options(self, SECTION)


class SandboxError(RuntimeError):
    """The sandbox itself did not start; says nothing about the program."""


@cache
def _filter() -> bytes:
    """The filter of system calls: a program of classic BPF over number (0), architecture (4) and arguments (16, …)."""
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06

    def step(code: int, k: int, skip_if: int = 0, skip_else: int = 0) -> bytes:
        return struct.pack("=HBBI", code, skip_if, skip_else, k)

    steps = [step(load, 4), step(equal, _X86_64, 1), step(end, _KILL)]
    steps += [step(load, 0), step(at_least, _X32, 0, 1), step(end, _KILL)]
    for number, answer in {**dict.fromkeys(_DENIED.values(), _EPERM), _CLONE3: _ENOSYS}.items():
        steps += [step(equal, number, 0, 1), step(end, answer)]
    steps += [step(equal, _CLONE, 0, 3), step(load, 16), step(any_bit, _CLONE_THREAD, 1), step(end, _EPERM)]
    return b"".join([*steps, step(end, _ALLOW)])


@cache
def _command(root: bool) -> list[str]:
    """bubblewrap with all its words but the filter's descriptor, and the interpreter."""
    if (bwrap := shutil.which("bwrap")) is None:
        raise SandboxError("code rewards: no bwrap: expected `apt-get install bubblewrap` or the like")
    base, python = Path(sys.base_prefix).resolve(), Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{base}/lib", f"{base}/lib64"]
    read_only = {path: path for path in libraries if os.path.isdir(path)} | {str(python): str(python)}
    read_only["/driver.py"] = str(DRIVER)
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found = distribution(package)
            for folder in {file.parts[0] for file in found.files or () if len(file.parts) > 1} - {".."}:
                read_only[f"/packages/{folder}"] = str(found.locate_file(folder))
    words = [bwrap, "--unshare-cgroup-try"]
    words += "--unshare-pid --unshare-net --unshare-ipc --unshare-uts".split()
    # No --new-session: `Process` starts one, whose process group `close` kills. Processes inside that had left it as
    # they started would live on, since they ask to die with the monitor later than that.
    words += "--die-with-parent --hostname sandbox --cap-drop ALL".split()
    # root needs no user namespace; `Process` gives the program a user of its own.
    words += "--cap-add CAP_SETUID --cap-add CAP_SETGID".split() if root else ["--unshare-user"]
    # bubblewrap would make a target's parents for its own user only.
    targets = (*read_only, *DEVICES, "/tmp/program")
    for parent in sorted({parent for target in targets for parent in Path(target).parents} - {Path("/")}):
        words += ["--perms", "0755", "--dir", str(parent)]
    for target, source in read_only.items():
        words += ["--ro-bind", source, target]
    for device in DEVICES:
        words += ["--dev-bind", device, device]
    return [*words, "--remount-ro", "/", "--chdir", "/tmp", str(python), "-S", "-B", "-X", "utf8", "/driver.py"]


class Process:
    """A driver (`code_driver`) in a sandbox of its own, and the program that it runs. Use it in one thread.

    Attributes:
        timed_out: whether it has used up its time.
    """

    def __init__(self, job: dict[str, Any], limits: Limits, stdin: bytes | None = None) -> None:
        """Start it.

        Args:
            job: what the driver does, see `code_driver`.
            limits: its limits.
            stdin: what it finds at its standard input; None: what `send` writes.
        """
        self.limits, self.timed_out = limits, False
        self._buffer, self._ended = bytearray(), False
        root = os.getuid() == 0
        job = {**job, "timeout": math.ceil(limits.timeout), "memory": limits.memory_mb * 2**20}
        # RLIMIT_NPROC counts by user, and does not hold for root.
        job["user"] = random.SystemRandom().randrange(10**9, 2 * 10**9) if root else None
        with _file(_filter()) as rules, _file(json.dumps(job).encode()) as request, _file(stdin or b"") as given:
            bwrap, *words = _command(root)
            self._process = subprocess.Popen(
                [bwrap, "--seccomp", str(rules), *words, str(request)],
                stdin=subprocess.PIPE if stdin is None else given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(rules, request),
                env={"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"},
                bufsize=0,
                start_new_session=True,
            )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, line: bytes) -> None:
        """Write a line; a process that has ended, or doesn't read in its wall time, doesn't get it."""
        pipe, deadline, rest = self._pipe("stdin"), time.monotonic() + self.limits.wall, memoryview(line + b"\n")
        with contextlib.suppress(BrokenPipeError):
            while rest and self._wait(pipe, select.POLLOUT, deadline):
                rest = rest[os.write(pipe.fileno(), rest[: select.PIPE_BUF]) :]

    def line(self) -> bytes | None:
        """The next line that the process writes; None if it ends, exceeds a limit or writes none in its wall time."""
        deadline = time.monotonic() + self.limits.wall
        while (end := self._buffer.find(b"\n")) < 0:
            if not self._receive(deadline):
                return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def output(self) -> bytes | None:
        """All that the process writes until it ends by itself; None if it fails or exceeds a limit."""
        deadline = time.monotonic() + self.limits.wall
        while self._receive(deadline):
            pass
        return bytes(self._buffer) if self.close() == 0 else None

    def close(self) -> int | None:
        """End the process with all in it, and return its exit status, None if it had to be killed.

        Raises:
            SandboxError: the sandbox did not start.
        """
        process, status = self._process, None
        with process:
            if self._ended:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(self.limits.wall)
            if status is None:
                # The monitor and the first process inside; with these the kernel kills the rest.
                os.killpg(process.pid, signal.SIGKILL)
            message = self._pipe("stderr").read().decode(errors="replace")
        if message:  # The driver closes standard error before it runs a program.
            remedy = "expected root with CAP_SYS_ADMIN (in Docker: --privileged), or a user with user namespaces"
            raise SandboxError(f"code rewards: no sandbox: {' '.join(message.split())[-300:]}: {remedy}")
        self.timed_out |= status in (128 + signal.SIGXCPU, 128 + signal.SIGKILL)
        return status

    def _receive(self, deadline: float) -> bool:
        """Wait for output; whether there was some and more is allowed."""
        pipe = self._pipe("stdout")
        if not self._wait(pipe, select.POLLIN, deadline):
            return False
        data = os.read(pipe.fileno(), 2**16)
        self._buffer += data
        self._ended = not data
        return bool(data) and len(self._buffer) <= self.limits.output_mb * 2**20

    def _wait(self, pipe: IO[bytes], event: int, deadline: float) -> bool:
        poll = select.poll()
        poll.register(pipe, event)
        ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        self.timed_out |= not ready
        return bool(ready)

    def _pipe(self, name: str) -> IO[bytes]:
        return getattr(self._process, name)


@contextlib.contextmanager
def _file(content: bytes) -> Iterator[int]:
    """A file in memory, at its beginning."""
    descriptor = os.memfd_create("sandbox")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
            file.seek(0)
        yield descriptor
    finally:
        os.close(descriptor)


def check() -> None:
    """Run a program in the sandbox.

    Raises:
        ValueError: if that isn't possible here; the message names the remedy.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise ValueError(f"code rewards: {sys.platform} {platform.machine()}: expected linux x86_64, {OTHERWISE}")
    try:
        output = Process({"mode": "program", "program": "import numpy; print(6 * 7)"}, Limits(), b"").output()
    except SandboxError as error:
        raise ValueError(f"{error}, {OTHERWISE}") from error
    if output != b"42\n":
        raise ValueError(
            f"code rewards: a program with numpy printed {output!r} in the sandbox: expected 42, {OTHERWISE}"
        )
