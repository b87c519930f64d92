"""Start processes as forks of one that has imported their packages, so that imports take their seconds only once.

`ForkServer` is that process, seen from a test; `ForkServer.start` takes what `subprocess.Popen` takes, of the commands that `act_of`
knows, and gives what it gives. What such a process starts itself (a sweep's jobs, the processes of a run of several
devices) are forks too. tests/end_to_end/test_runs.py starts processes as users do.

`python -m tests.forking SOCKET` answers each connection there: a JSON line {"words", "folder", "environment", "session"} with
three files, for input, output and errors, is answered with the number of the process, and at its end with its exit code.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, TextIO

PROJECT = Path(__file__).parents[1]
TRAIN = PROJECT / "train.py"
FIGURES = "PYLORUS_TEST_FIGURES"
"""Environment variable of a fork that renders the figures of its reports; the others write their alternative texts instead."""
REAL_PROCESSES = "PYLORUS_TEST_REAL_PROCESSES"
"""Environment variable of a fork that starts the processes of its run as a user's run does."""


class ForkServer:
    """The process that is forked from."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._address = f"{self._folder.name}/socket"
        self._process = subprocess.Popen([sys.executable, "-m", "tests.forking", self._address], cwd=PROJECT)
        self.started: list[ForkedProcess] = []

    def start(
        self,
        words: list[str],
        *,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: Any = None,
        stdout: Any = None,
        stderr: Any = None,
        text: bool = False,
        start_new_session: bool = False,
    ) -> "ForkedProcess":
        """What `subprocess.Popen` would start."""
        task = {
            "words": [str(word) for word in words],
            "folder": str(cwd or Path.cwd()),
            "environment": dict(os.environ if env is None else env),
            "session": start_new_session,
        }
        self.started.append(ForkedProcess(self._connected(), task, stdin, stdout, stderr, text=text))
        return self.started[-1]

    def run(self, words: list[str], *, timeout: float, **more: Any) -> "subprocess.CompletedProcess[str]":
        """What `subprocess.run` would give, with output and errors as text."""
        process = self.start(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(words, process.wait(), output, errors)

    def stop(self) -> None:
        """Stop at once, with all that was forked here."""
        for process in self.started:
            process.kill()
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def _connected(self) -> socket.socket:
        there = socket.socket(socket.AF_UNIX)
        while True:
            try:
                there.connect(self._address)
                return there
            except (FileNotFoundError, ConnectionRefusedError):
                assert self._process.poll() is None, "the process to fork from ended"
                time.sleep(0.05)


class ForkedProcess:
    """A process, as `subprocess.Popen` shows one.

    Attributes:
        stdin: Text that it reads, if it was started with a pipe.
        stdout: Its output as text, if it reads such text; otherwise `communicate` returns its output.
    """

    def __init__(
        self, answers: socket.socket, task: dict[str, Any], stdin: Any, stdout: Any, stderr: Any, *, text: bool
    ) -> None:
        self.stdin: TextIO | None = None
        self.stdout: TextIO | None = None
        self.args, self.returncode, self._answers, self._text = task["words"], None, answers, text
        self._read: dict[str, bytes] = {}
        self._readers: list[threading.Thread] = []
        read = self._open_input(stdin)
        files = [read, self._file("output", stdout, 1), self._file("errors", stderr, 2)]
        socket.send_fds(answers, [json.dumps(task).encode() + b"\n"], files)
        for file, wanted in zip(files, (subprocess.DEVNULL, stdout, stderr), strict=True):
            if wanted in (subprocess.PIPE, subprocess.DEVNULL):
                os.close(file)
        self.pid = int(self._line())

    def _line(self) -> bytes:
        """An answer; not a byte more is read, so that `select` knows of the next one."""
        found = b""
        while not found.endswith(b"\n") and (byte := self._answers.recv(1)):
            found += byte
        return found

    def _open_input(self, wanted: Any) -> int:
        if wanted != subprocess.PIPE:
            return os.open(os.devnull, os.O_RDONLY)
        read, write = os.pipe()
        self.stdin = os.fdopen(write, "w")
        return read

    def _file(self, name: str, wanted: Any, standard: int) -> int:
        if wanted is None:
            return standard
        if wanted == subprocess.DEVNULL:
            return os.open(os.devnull, os.O_WRONLY)
        if wanted != subprocess.PIPE:
            return wanted if isinstance(wanted, int) else int(wanted.fileno())
        read, write = os.pipe()
        if self.stdin is not None and name == "output":
            self.stdout = os.fdopen(read)
            return write
        self._readers.append(threading.Thread(target=self._gather, args=(name, os.fdopen(read, "rb")), daemon=True))
        self._readers[-1].start()
        return write

    def _gather(self, name: str, file: BinaryIO) -> None:
        with file:
            self._read[name] = file.read()

    def poll(self) -> int | None:
        """The exit code of a process that has ended."""
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._answers], [], [], timeout)[0]:
            self.returncode = int(self._line() or -signal.SIGKILL)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """Output and errors, once the process has ended."""
        if self.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.close()
        self.wait(timeout)
        if self.stdout is not None:
            with self.stdout:
                return self.stdout.read(), None
        for reader in self._readers:
            reader.join(timeout=10)  # a process that it left behind may hold them
        found = [self._read.get(name) for name in ("output", "errors")]
        decoded = [one.decode(errors="replace") if self._text and one is not None else one for one in found]
        return decoded[0], decoded[1]

    def send_signal(self, number: int) -> None:
        """Sends a signal to a process that has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)


class Child:
    """A fork of this very process, as `subprocess.Popen` shows one."""

    def __init__(
        self, words: list[str], *, env: Mapping[str, str] | None = None, start_new_session: bool = False, **_: Any
    ) -> None:
        self.args, self.returncode = words, None
        self.pid = forked(words, dict(os.environ if env is None else env), session=start_new_session)

    def poll(self) -> int | None:
        """The exit code of a process that has ended."""
        return self._ended(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self._ended(0 if deadline is None else os.WNOHANG)) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.02)
        return code

    def _ended(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal to a process that has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def main() -> None:
    """Imports what the commands need, then forks for each connection."""
    load_commands()
    gc.collect()
    gc.freeze()  # no fork copies the pages of these imports when it collects garbage
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    parent, running = os.getppid(), dict[int, socket.socket]()
    while os.getppid() == parent:
        if select.select([listener], [], [], 0.02)[0]:
            connection, _ = listener.accept()
            with contextlib.suppress(ConnectionError):
                running[begun(connection)] = connection
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with contextlib.suppress(BrokenPipeError), running.pop(ended[0]) as connection:
                connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(ended[1]))


def load_commands() -> None:
    """Imports what the commands need, and composes a configuration once: later ones find Hydra's parser warm."""
    import hydra._internal.hydra
    from hydra import compose, initialize_config_dir
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    import pylorus.launch.main
    import pylorus.launch.sweep
    import pylorus.launch.sweep_table
    import pylorus.launch.train
    import pylorus.report.audit_page
    import pylorus.report.page
    import pylorus.training.batch_size
    from pylorus.config.schema import CONF
    from pylorus.deploy import explain_command, export, external, predict  # noqa: F401 for the forks

    for name in ("pandas.core.arrays.arrow.extension_types", "pyarrow.dataset"):  # what reading a table imports
        importlib.import_module(name)
    os.fsync = lambda descriptor: None  # as in tests/conftest.py
    for starting in (pylorus.launch.sweep, pylorus.launch.train):
        starting.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": popen})
    subprocess_handler.Popen = lambda args, **more: popen(list(args), **more)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compose("config", overrides=["experiment=debug", "model=timm"])
    # Hydra would compose everything once more, to look for a key that no configuration here sets.
    hydra._internal.hydra.Hydra.get_mode = lambda self, config_name, overrides: None


def begun(connection: socket.socket) -> int:
    """The number of the process that a connection asks for.

    Raises:
        ConnectionError: If it was closed before it had asked, by a test run that was killed.
    """
    said, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not said.endswith(b"\n"):
        more = connection.recv(1 << 20)
        if not more:
            raise ConnectionError("closed before a process was asked for")
        said += more
    task = json.loads(said)
    pid = forked(
        task["words"],
        task["environment"],
        session=task["session"],
        folder=task["folder"],
        input=files[0],
        output=files[1],
        errors=files[2],
    )
    for file in files:
        os.close(file)
    connection.sendall(b"%d\n" % pid)
    return pid


def popen(words: list[str], **more: Any) -> Any:
    """A fork in the place of a process that `subprocess.Popen` would start, where that is one of ours."""
    is_forked = REAL_PROCESSES not in os.environ and act_of(words) is not None
    return Child(words, **more) if is_forked else subprocess.Popen(words, **more)


def act_of(words: list[str]) -> Callable[[], None] | None:
    """What a command does; None of one that is not known here."""
    if Path(words[0]).name == "pylorus":
        return lambda: run_command(words[1:])
    if words[1:3] == ["-m", "pylorus"]:
        return act_of(["pylorus", *words[3:]])
    if words[1] == "-c":
        return lambda: called(lambda: exec(compile(words[2], "<string>", "exec"), {"__name__": "__main__"}), words[2:])
    if Path(words[1]).name == TRAIN.name:
        return lambda: train(words[2:])
    if words[1:3] in (["-m", "pylorus.launch.train"], ["-m", "pylorus.training.batch_size"]):
        module = sys.modules[words[2]]
        return lambda: called(module.main, words[2:])
    if words[1].endswith(".py"):
        return lambda: called(lambda: runpy.run_path(words[1], run_name="__main__"), words[1:])
    return None


def run_command(words: list[str]) -> None:
    """`pylorus WORDS`."""
    if words[:1] == ["train"]:
        register()
    from pylorus.cli import main

    main(words)


def train(words: list[str]) -> None:
    """`python train.py WORDS`."""
    try:
        register()
    except KeyboardInterrupt:  # as in train.py
        sys.exit(130)
    sys.path.insert(0, str(PROJECT))
    called(lambda: runpy.run_path(str(TRAIN), run_name="__main__"), [str(TRAIN), *words])


def register() -> None:
    """Draw another token for another run's folder."""
    from pylorus.launch.main import register

    register()


def called(act: Callable[[], object], arguments: list[str]) -> None:
    """Acts with such a command line."""
    sys.argv = arguments
    act()


def forked(
    words: list[str],
    environment: dict[str, str],
    *,
    session: bool,
    folder: str | None = None,
    input: int | None = None,
    output: int = 1,
    errors: int = 2,
) -> int:
    """Fork; the number of the process that becomes what the words say."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    given = os.open(os.devnull, os.O_RDONLY) if input is None else input
    for here, there in ((given, 0), (output, 1), (errors, 2)):
        os.dup2(here, there)
    if session:
        os.setsid()
    if folder is not None:
        os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    atexit._clear()  # what was begun before is not ended here
    prepare_imports(environment)
    if FIGURES not in environment:
        skip_rendering()
    act = act_of(words)
    code = code_of(act) if act is not None else 127
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare_imports(environment: dict[str, str]) -> None:
    """Extend Python's path as a start with this environment would, and cut off the network where a test asks for it."""
    added = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    sys.path[:0] = added
    if "PYLORUS_TEST_AIR_GAP" in environment:
        importlib.import_module("tests.end_to_end.air_gap.sitecustomize")


def skip_rendering() -> None:
    """Render no figures: that takes most of a report's time."""
    page = sys.modules["pylorus.report.page"]
    for name in ("render_svg", "render_png"):
        setattr(page, name, lambda drawing: drawing.alt.encode())


def code_of(act: Callable[[], None]) -> int:
    """The exit code that a process has which does this alone."""
    try:
        act()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
