# SPDX-License-Identifier: Apache-2.0
"""Programs made to stall, escape, exhaust or forge: each is graded wrong and leaves nothing behind.

The programs of `PRINTS` print the right answer if, and only if, what they try succeeds; those of `RETURNS` and
`ASSERTED` try to pass tests of a function `f` whose results they don't know.
"""

import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from verl.steer.grading import code, sandbox
from verl.steer.grading.score import compute_score

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bwrap: apt-get install bubblewrap")

#: Of a bounded program; sleeping ones use up their wall time.
LIMITS = {"timeout": 1, "wall": 10}
#: Where a program finds what only this process should: environment, file, TCP port, Unix sockets.
SECRET = secrets.token_hex(16)

SYSCALL = "import ctypes, errno; syscall = ctypes.CDLL(None, use_errno=True).syscall\n"

# Each prints 42, which is right, once it has done what it is there for.
PRINTS = {
    # Processes
    "a fork": "import os\nprint(42) if os.fork() else os._exit(0)",
    "a fork bomb": "import os\nif os.fork(): print(42, flush=True); os._exit(0)\n"
    "while True:\n try: os.fork()\n except OSError: pass",
    "a subprocess": "import subprocess, sys\nsubprocess.run([sys.executable, '-c', '']).check_returncode()\nprint(42)",
    "a spawned process": "import os, sys\nos.posix_spawn(sys.executable, ['python', '-c', ''], {})\nprint(42)",
    "a shell": "import os\nprint(42 if os.system('true') == 0 else 0)",
    "multiprocessing": "import multiprocessing as m\np = m.Process(target=print); p.start(); print(42)",
    "a daemon": "import os, time\nif os.fork(): print(42, flush=True); os._exit(0)\n"
    "os.setsid()\nos.fork()\ntime.sleep(600)",
    "a raw clone": SYSCALL + "r = syscall(56, 17, 0, 0, 0, 0)\nif r >= 0: print(42) if r else os._exit(0)",
    "clone3": SYSCALL + "b = (ctypes.c_uint64 * 8)(0, 0, 0, 0, 17)\nif syscall(435, b, 64) > 0: print(42)",
    "a thread bomb": "import threading, time\nfor n in range(2000):\n"
    " threading.Thread(target=time.sleep, args=(3,)).start()\nprint(42, flush=True)",
    # Rights
    "a new user namespace": SYSCALL + "print(42 if syscall(272, 0x10000000) == 0 else 0)",
    "a mount": "import ctypes\nprint(42 if ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, 0) == 0 else 0)",
    "a writable remount": "import ctypes\nprint(42 if ctypes.CDLL(None).mount(b'', b'/', b'', 4128, 0) == 0 else 0)",
    "a chroot": "import os\nos.chroot('/tmp')\nprint(42)",
    "becoming root": "import os\nos.setuid(0) if os.getuid() else os.chown('/usr/lib', 1, 1)\nprint(42)",
    "a higher limit": "import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))\nprint(42)",
    "a higher priority": "import os\nos.nice(-5)\nprint(42)",
    "ptrace": SYSCALL + "print(42 if syscall(101, 16, 1, 0, 0) == 0 else 0)",
    "being traced": SYSCALL + "print(42 if syscall(101, 0, 0, 0, 0) == 0 else 0)",
    "another's memory": SYSCALL
    + "b = ctypes.create_string_buffer(8); v = (ctypes.c_void_p * 2)(ctypes.addressof(b), 8)\n"
    "print(42 if syscall(310, 1, v, 1, v, 1, 0) >= 0 or ctypes.get_errno() == 14 else 0)",
    "io_uring": SYSCALL + "b = ctypes.create_string_buffer(120)\nprint(42 if syscall(425, 4, b) >= 0 else 0)",
    "a keyring": SYSCALL + "print(42 if syscall(248, b'user', b'k', b'v', 1, -3) >= 0 else 0)",
    "BPF": SYSCALL + "b = (ctypes.c_uint32 * 32)(1, 4, 4, 1)\nsyscall(321, 0, b, 128)\n"
    "print(42 if ctypes.get_errno() not in (1, 38) else 0)",
    "page faults of its own": SYSCALL + "syscall(323, 1)\nprint(42 if ctypes.get_errno() != 1 else 0)",
    "the 32-bit entrance": SYSCALL + "syscall(0x40000000 + 39)\nprint(42)",
    # Memory
    "three gigabytes": "x = bytearray(3 << 30)\nprint(42)",
    "memory bit by bit": "x = []\nwhile len(x) < 3000: x.append(bytearray(1 << 20))\nprint(42)",
    "shared memory": "import mmap\nm = mmap.mmap(-1, 3 << 30)\nprint(42)",
    "a file in memory": "import os\nf = os.memfd_create('x')\nprint(42)",
    "System V memory": SYSCALL + "print(42 if syscall(29, 0, 1 << 24, 0o1600) >= 0 else 0)",
    "a zip bomb": "import zlib\ndata = zlib.compress(bytes(1 << 28))\nx = [zlib.decompress(data) for _ in range(16)]\n"
    "print(42)",
    "a long string": "x = 'x' * 10**11\nprint(42)",
    "an endless integer": "x = 9 ** 9 ** 9\nprint(42)",
    "an endless list": "x = list(iter(int, 1))\nprint(42)",
    "a deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef g(n): return g(n + 1)\ng(0)\nprint(42)",
    "a deep recursion in C": "x = []\nfor _ in range(10**6): x = [x]\nrepr(x)\nprint(42)",
    "a deep expression": "eval('-' * 10**6 + '1')\nprint(42)",
    # Time
    "an endless loop": "while True: pass",
    "an endless sleep": "import time\ntime.sleep(10**6)\nprint(42)",
    "a slow pattern": "import re\nre.match('(a+)+b', 'a' * 60)\nprint(42)",
    "a loop deaf to signals": "import signal\nfor s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n"
    " except (OSError, ValueError): pass\nwhile True: pass",
    "a thread that stays": "import threading, time\nprint(42, flush=True)\n"
    "threading.Thread(target=time.sleep, args=(10**6,)).start()",
    "an answer and no end": "import os, time\nprint(42, flush=True)\nos.close(1)\ntime.sleep(10**6)",
    "a stop": "import os, signal\nprint(42, flush=True)\nos.kill(os.getpid(), signal.SIGSTOP)",
    "waiting for more input": "import os\nr, w = os.pipe()\nprint(42, flush=True)\nos.read(r, 1)",
    # Output
    "endless output": "while True: print('42' * 10**4)",
    "one huge line": "print('4' * (1 << 26))",
    "endless errors": "import sys\nwhile True: sys.stderr.write('42' * 10**4)",
    # Files
    "a file outside": "open('FOLDER/pwned', 'w').close()\nprint(42)",
    "a file in /tmp": "open('/tmp/pwned', 'w').close()\nprint(42)",
    "a file here": "open('pwned', 'w').close()\nprint(42)",
    "a file in shared memory": "open('/dev/shm/pwned', 'w').close()\nprint(42)",
    "a symbolic link": "import os\nos.symlink('/', 'l')\nprint(42)",
    "a hard link": "import os\nos.link(os.__file__, '/tmp/l')\nprint(42)",
    "a pipe with a name": "import os\nos.mkfifo('/tmp/p')\nprint(42)",
    "a device": "import os\nos.mknod('/tmp/d', 0o60666, os.makedev(8, 0))\nprint(42)",
    "the library removed": "import os\nos.remove(os.__file__)\nprint(42)",
    "the library changed": "import os\nopen(os.__file__, 'a').close()\nprint(42)",
    "the driver changed": "open('/driver.py', 'a').close()\nprint(42)",
    "a file without a name": "import os\nos.open('/tmp', os.O_TMPFILE | os.O_RDWR)\nprint(42)",
    # Secrets
    "passwords": "open('/etc/passwd').close()\nprint(42)",
    "another's /proc": "import os\nos.listdir('/proc/1')\nprint(42)",
    "home": "import os\nos.listdir('HOME')\nprint(42)",
    # Network
    "a name's address": "import socket\nsocket.getaddrinfo('localhost', 80)\nsocket.socket()\nprint(42)",
    "a packet": "import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))\nprint(42)",
    "the hypervisor": "import socket\nsocket.socket(socket.AF_VSOCK)\nprint(42)",
    "the kernel's routes": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)\nprint(42)",
    # System calls that the filter refuses, whatever their arguments
    **{
        f"the call {name}": SYSCALL
        + f"if syscall({number}, -1, -1, -1, -1, -1) >= 0 or ctypes.get_errno() != errno.EPERM: print(42)"
        for name, number in sandbox._DENIED.items()
        if name != "vfork"  # which would leave two processes on one stack; "a fork" is above
    },
}
# Each prints what this process keeps secret.
STEALS = {
    "the environment": "import os\nprint(os.environ['STEER_TEST_SECRET'])",
    "a file": "print(open('FOLDER/secret').read())",
    "a file by its link": "import os\nprint(open('/proc/self/root/../../FOLDER/secret').read())",
    "a TCP port": "import socket\nprint(socket.create_connection(('127.0.0.1', PORT)).recv(99).decode())",
    "a Unix socket": "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('FOLDER/socket')\n"
    "print(s.recv(99).decode())",
    "an abstract socket": "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0NAME')\n"
    "print(s.recv(99).decode())",
}
# The right result of f(3) is a secret too.
RETURNS = {
    "the driver's memory": "import gc, re\ndef f(n):\n for o in gc.get_objects():\n"
    "  if isinstance(o, (list, dict, tuple)):\n"
    "   m = re.search(r'\\b[0-9a-f]{32}\\b', str(o)[:10**5])\n   if m: return m[0]",
    "the caller's frames": "import sys, re\ndef f(n):\n g = sys._getframe(1)\n while g:\n"
    "  m = re.search(r'\\b[0-9a-f]{32}\\b', str(g.f_locals) + str(g.f_globals))\n  if m: return m[0]\n  g = g.f_back",
    "open descriptors": "import os, re\ndef f(n):\n for d in range(100):\n"
    "  try: os.set_blocking(d, False); t = os.pread(d, 10**6, 0)\n"
    "  except OSError: continue\n  m = re.search(rb'\\b[0-9a-f]{32}\\b', t)\n  if m: return m[0].decode()",
    "an exit at once": "import os\nos._exit(0)",
    "an exit in the call": "import os\ndef f(n): os._exit(0)",
    "a quiet exit": "import sys\ndef f(n): sys.exit(0)",
    "an interrupt": "def f(n): raise KeyboardInterrupt",
    "verdicts on all descriptors": "import os\nfor d in range(64):\n try: os.write(d, b'v1\\n' * 9)\n"
    " except OSError: pass\ndef f(n): return n",
    "answers before the question": "import os\nfor d in range(3, 64):\n"
    ' try: os.write(d, b\'{"value": true}\\n{"verdict": 1}\\n[]\\n\\n\')\n except OSError: pass\ndef f(n): return n',
    "a patched writer": "import json\njson.dumps = lambda *a, **k: '{\"value\": NaN}'\ndef f(n): return n",
    "closed descriptors": "import os\nos.closerange(0, 1000)\ndef f(n): return n",
    "a huge result": "def f(n): return 'x' * (1 << 27)",
    "a deep result": "def f(n):\n x = []\n for _ in range(10**5): x = [x]\n return x",
    "a result in itself": "def f(n):\n x = []\n x.append(x)\n return x",
    "a generator": "def f(n):\n while True: yield n",
    "an array in itself": "class A:\n def tolist(self): return self\ndef f(n): return A()",
    "everything callable": "class Solution:\n def __getattr__(self, name): return lambda *a: True",
    "a name that isn't a function": "f = 3",
    "no end": "def f(n):\n while True: pass",
    "a call that sleeps": "import time\ndef f(n): time.sleep(10**6)",
    "a syntax error": "def f(n) return n",
    "a null byte": "def f(n): return n\0",
    "a lone surrogate": "def f(n): return '\\ud800'",
    "signals to all": "import os\ndef f(n): os.kill(-1, 9)",
    "signals to the parent": "import os\nfor s in range(1, 65):\n for p in (1, os.getppid()):\n"
    "  try: os.kill(p, s)\n  except OSError: pass\ndef f(n): return n",
}
# Objects that would pass `assert f(3) == RIGHT` and the like in the tests' own process.
ASSERTED = {
    "equal to everything": "class A:\n def __eq__(self, other): return True\ndef f(n): return A()",
    "an integer equal to everything": "class A(int):\n def __eq__(self, other): return True\n"
    " def __abs__(self): return 0\ndef f(n): return A(5)",
    "a text equal to everything": "class A(str):\n def __eq__(self, other): return True\n __hash__ = None\n"
    "def f(n): return A()",
    "a list equal to everything": "class A(list):\n def __eq__(self, other): return True\ndef f(n): return A()",
    "a number near everything": "class A(float):\n def __sub__(self, other): return 0.0\n __rsub__ = __sub__\n"
    " def __abs__(self): return 0.0\ndef f(n): return A(1)",
    "patched built-ins": "import builtins\nfor n in 'abs all any len sorted isinstance type'.split():\n"
    " setattr(builtins, n, lambda *a: 0)\ndef f(n): return n",
    "patched libraries": "import math, sys\nmath.isclose = lambda *a, **k: True\n"
    "import numpy as np; np.allclose = np.testing.assert_allclose = lambda *a, **k: True\ndef f(n): return n",
    "a harmless AssertionError": "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})\n"
    "def f(n): return n",
    "functions of the tests": "def check(c): return True\ndef same(a, b): return True\nisclose = same\n"
    "def f(n): return n",
    "tracing": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef f(n): return n",
    "a farewell": "import atexit, os\natexit.register(lambda: [os.write(d, b'v1\\n') for d in (1, 3, 4)])\n"
    "import sys\nsys.exit = os._exit\ndef f(n): raise SystemExit(0)",
    "an exit hook": "import sys\nsys.excepthook = lambda *a: __import__('os')._exit(0)\ndef f(n): raise RuntimeError",
    "no result": "def f(n): pass",
    "not a number": "def f(n): return float('nan')",
}
RIGHT = 917_364_550_121
ASSERTIONS = [
    f"assert f(3) == {RIGHT}",
    f"def same(a, b): return type(a) is type(b) and a == b\nassert same(f(3), {RIGHT}) and abs(f(3) - {RIGHT}) < 1",
    f"import math\nassert math.isclose(f(3), {RIGHT})",
    # As EvalPlus's tests after datasets/make_datasets.py; assert_allclose by itself accepts an empty list.
    "import numpy as np\ndef assertion(out, exp):\n    assert out == exp or np.shape(out) == np.shape(exp)\n"
    f"    np.testing.assert_allclose(out, exp)\ndef check(c): assertion(c(3), {RIGHT})\ncheck(f)",
]
PROGRAMS = {
    **{name: (program, {"inputs": ["1"], "outputs": ["42"]}) for name, program in PRINTS.items()},
    **{name: (program, {"inputs": ["1"], "outputs": [SECRET]}) for name, program in STEALS.items()},
    **{
        name: (program, {"fn_name": "f", "inputs": ["3"], "outputs": [json.dumps(SECRET)]})
        for name, program in RETURNS.items()
    },
    **{
        f"{name}, asserted": (program, {"assert_case": [f"assert f(3) == '{SECRET}'"]})
        for name, program in RETURNS.items()
    },
    **{
        f"{name}, assertion {number}": (program, {"assert_case": [case]})
        for name, program in ASSERTED.items()
        for number, case in enumerate(ASSERTIONS)
    },
}


def grade(program: str, tests: dict, **options: float) -> dict:
    return compute_score("humaneval", f"```python\n{program}\n```", json.dumps(tests), code=options)


def assert_grading_works() -> None:
    assert grade("print(int(input()) + 1)", {"inputs": ["1", "41"], "outputs": ["2", "42"]})["acc"]
    assert not grade("print(int(input()) + 2)", {"inputs": ["1", "41"], "outputs": ["2", "42"]})["acc"]
    for assertion in ASSERTIONS:
        assert grade(f"def f(n): return {RIGHT}", {"assert_case": [assertion]})["acc"]
        assert not grade(f"def f(n): return {RIGHT * 2}", {"assert_case": [assertion]})["acc"]


class Traps:
    """What the programs shall not reach, and what they shall not leave behind."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.reached, self.signals = folder, [], []
        (folder / "secret").write_text(SECRET)
        (folder / "home").mkdir()
        self.name = f"steer-{secrets.token_hex(8)}"
        self.servers = [socket.create_server(("127.0.0.1", 0))]
        for address in (str(folder / "socket"), f"\0{self.name}"):
            self.servers.append(socket.socket(socket.AF_UNIX))
            self.servers[-1].bind(address)
            self.servers[-1].listen()
        for server in self.servers:
            threading.Thread(target=self.serve, args=(server,), daemon=True).start()
        for unexpected in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            signal.signal(unexpected, lambda number, _: self.signals.append(number))
        os.environ["STEER_TEST_SECRET"] = SECRET

    def serve(self, server: socket.socket) -> None:
        while True:
            connection, _ = server.accept()
            self.reached.append(server)
            connection.sendall(SECRET.encode())
            connection.close()

    def program(self, text: str) -> str:
        port = str(self.servers[0].getsockname()[1])
        for place, value in {
            "FOLDER": str(self.folder),
            "HOME": f"{self.folder}/home",
            "PORT": port,
            "NAME": self.name,
        }.items():
            text = text.replace(place, value)
        return text


@pytest.fixture(scope="module")
def traps(tmp_path_factory):
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    }
    yield Traps(tmp_path_factory.mktemp("traps"))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    del os.environ["STEER_TEST_SECRET"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The driver under a path of this test's own, by which its sandboxes can be told from others."""
    copy = tmp_path_factory.mktemp("driver") / "code_driver.py"
    copy.write_bytes(sandbox.DRIVER.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "DRIVER", copy)
        sandbox._command.cache_clear()
        yield copy
    sandbox._command.cache_clear()


@pytest.fixture(scope="module")
def graded(traps, driver):
    """All programs, graded by eight threads."""
    with ThreadPoolExecutor(8) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(code, "_slots", threading.BoundedSemaphore(8))
        jobs = {
            name: pool.submit(grade, traps.program(program), tests, **LIMITS)
            for name, (program, tests) in PROGRAMS.items()
        }
        return {name: job.result() for name, job in jobs.items()}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hostile_program_is_graded_wrong(name, graded):
    assert graded[name].keys() == {"score", "acc", "pred", "timed_out"}
    assert (graded[name]["score"], graded[name]["acc"]) == (-1.0, False)


def test_nothing_is_left_or_reached(graded, traps, driver):
    assert sorted(path.name for path in traps.folder.iterdir()) == ["home", "secret", "socket"]
    assert not Path("/tmp/pwned").exists() and not Path("/dev/shm/pwned").exists()
    assert (traps.reached, traps.signals) == ([], [])
    assert running(driver) == []
    assert_grading_works()


def running(driver: Path) -> list[str]:
    """The processes of this test's sandboxes: each has its monitor's command, which names the driver."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += [process.name] * (str(driver).encode() in words)
    return found


HARMLESS = [
    *("a fork", "multiprocessing", "a raw clone", "a subprocess", "a spawned process", "a shell", "shared memory"),
    *("a file in memory", "a file outside", "a symbolic link", "a pipe with a name", "passwords", "home"),
    *("the environment", "a file", "a TCP port", "a Unix socket", "an abstract socket"),
]


@pytest.mark.parametrize("name", HARMLESS)
def test_outside_the_sandbox_the_program_succeeds(name, command, tmp_path_factory):
    """What stops the programs above is the sandbox: without it they print what is right."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)
        traps = Traps(folder)
    program, tests = PROGRAMS[name]
    program = traps.program(program.replace("'/tmp", f"'{folder}"))
    run = command(sys.executable, "-c", program, cwd=folder, STEER_TEST_SECRET=SECRET)
    assert code.same_output(run.stdout, tests["outputs"][0]), (run.stdout, run.stderr)


def test_a_sandbox_that_is_closed_as_it_starts_leaves_nothing(driver):
    """Its monitor may die before the process inside asks to die with it; such a process would keep `close` waiting."""
    job, delays = {"mode": "program", "program": "import time\ntime.sleep(10**6)"}, random.Random(0)
    for _ in range(200):
        process = sandbox.Process(job, sandbox.Limits(), b"")
        time.sleep(delays.uniform(0.0, 0.03))
        process.close()
    assert running(driver) == []


def test_a_grader_that_is_killed_takes_its_programs_along(driver, tmp_path):
    program = tmp_path / "grader.py"
    program.write_text(
        "from pathlib import Path\nfrom verl.steer.grading import sandbox\n"
        f"sandbox.DRIVER = Path({str(driver)!r})\n"
        "job = {'mode': 'program', 'program': \"print('on', flush=True)\\nwhile True: pass\"}\n"
        "process = sandbox.Process(job, sandbox.Limits(timeout=600), b'')\n"
        "print(process.line(), flush=True)\nimport time; time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True) as grader:
        assert "on" in grader.stdout.readline()
        assert running(driver)
        grader.kill()
    deadline = time.monotonic() + 600.0
    while running(driver) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running(driver) == []
