"""Runs commands as forks of one process that has imported what they need, so that seconds of imports are paid once.

`python -m tests.end_to_end.forking` reads a JSON line a command, {"words", "folder", "output", "seconds"}, and answers each with a
line: the exit code. Words are those of the shell: `python train.py …` or `pylorus …`.
"""

import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

from .conftest import TRAIN


def main() -> None:
    import pylorus.audit
    import pylorus.launch
    import pylorus.report.write
    import pylorus.train  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    while line := sys.stdin.readline():
        task = json.loads(line)
        child = os.fork()
        if child == 0:
            begin(task)
            sys.exit(run(task["words"]))
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


def run(words: list[str]) -> int:
    """Its exit code."""
    from pylorus.cli import main as pylorus
    from pylorus.launch import register

    try:
        if words[0] == "pylorus":
            pylorus(words[1:])
        else:
            register()  # another token for another run's folder
            sys.argv = [str(TRAIN), *words[2:]]
            sys.path.insert(0, str(Path(TRAIN).parent))
            runpy.run_path(str(TRAIN), run_name="__main__")
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
