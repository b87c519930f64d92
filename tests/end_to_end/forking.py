"""Runs commands as forks of one process that has imported what they need, so that seconds of imports are paid once.

The jobs of a sweep are forks too; tests/end_to_end/test_runs.py starts them as users do.

`python -m tests.end_to_end.forking` reads a JSON line a command, {"words", "folder", "output", "seconds"}, and answers each with a
line: the exit code. Words are those of the shell: `python train.py …` or `pylorus …`.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .conftest import TRAIN


def main() -> None:
    import pylorus.audit
    import pylorus.launch
    import pylorus.report.write
    import pylorus.train

    pylorus.launch.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": job})
    answers = os.fdopen(os.dup(1), "w")
    while line := sys.stdin.readline():
        task = json.loads(line)
        child = os.fork()
        if child == 0:
            begin(task)
            sys.exit(code_of(partial(run, task["words"])))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def begin(task: dict) -> None:
    """Becomes the process that the shell would have started."""
    signal.alarm(task["seconds"])
    os.chdir(task["folder"])
    output = os.open(task["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for here, there in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(here, there)


def run(words: list[str]) -> None:
    """What the words say."""
    from pylorus.cli import main as pylorus
    from pylorus.launch import register

    if words[0] == "pylorus":
        pylorus(words[1:])
    else:
        register()  # another token for another run's folder
        sys.argv = [str(TRAIN), *words[2:]]
        sys.path.insert(0, str(Path(TRAIN).parent))
        runpy.run_path(str(TRAIN), run_name="__main__")


def job(words: list[str], **more: Any) -> Any:
    """A job of a sweep, in the place of `subprocess.Popen`."""
    if words[1:3] != ["-m", "pylorus.train"] or more:
        return subprocess.Popen(words, **more)
    from pylorus.train import main as train

    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        sys.argv = words[2:]
        code = code_of(train)
        sys.stdout.flush()
        os._exit(code)  # what the sweep has begun is not ended here
    return SimpleNamespace(wait=lambda: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


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
