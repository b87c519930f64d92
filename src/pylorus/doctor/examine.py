"""All checks, in order, as they come: first what needs no heavy package, meanwhile a second process loads those."""

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pylorus.doctor.check import Check, State, guarded
from pylorus.doctor.extras import AREA as EXTRAS
from pylorus.doctor.extras import check_extras
from pylorus.doctor.loading import AREA as LOADING
from pylorus.doctor.network import check_network
from pylorus.doctor.packages import AREA as PACKAGES
from pylorus.doctor.packages import check_packages
from pylorus.doctor.space import AREA as SPACE
from pylorus.doctor.space import check_space

PATIENCE = 600.0
"""Seconds that the second process has: from a cold network disk torch takes minutes to load."""


@dataclass(frozen=True)
class Question:
    """What is asked of the doctor.

    Attributes:
        weights: Folder of weights that were carried in.
        data: Folder of images to look at; None: none.
        bundle: Folder of a bundle to look at; None: none.
    """

    weights: Path = Path("weights")
    data: Path | None = None
    bundle: Path | None = None

    def as_json(self) -> str:
        """As the second process takes it."""
        named = {"data": self.data, "bundle": self.bundle}
        given = {name: None if path is None else str(path) for name, path in named.items()}
        return json.dumps({"weights": str(self.weights), **given})


def examine(question: Question) -> Iterator[Check]:
    """Looks at everything and gives each check as it is done."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        second = _start(question, said)
        try:
            yield from guarded(PACKAGES, "packages", check_packages)
            yield from guarded(EXTRAS, "extras", check_extras)
            yield from guarded(SPACE, "memory and disk", check_space)
            yield from check_network()
            yield from _from_second(second, said)
        finally:
            second.kill()
            second.wait()


def _start(question: Question, said: IO[str]) -> "subprocess.Popen[str]":
    # -P: a file of the user's folder that is called as a module is none.
    command = [sys.executable, "-P", "-m", "pylorus.doctor.second", question.as_json()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, encoding="utf-8")


def _from_second(second: "subprocess.Popen[str]", said: IO[str]) -> Iterator[Check]:
    """The second process's checks; where it ends before it is done, a line says at what."""
    late = threading.Timer(PATIENCE, second.kill)
    late.daemon = True
    late.start()
    doing = "starting"
    assert second.stdout is not None
    for line in second.stdout:
        if not line.endswith("\n"):
            break  # it ended as it wrote
        content = json.loads(line)
        if "doing" in content:
            doing = content["doing"]
        else:
            yield Check.from_json(line)
    in_time = late.is_alive()
    late.cancel()
    if second.wait() != 0:
        yield broken_off(doing, second.returncode, in_time=in_time, said=_last_line(said))


def _last_line(said: IO[str]) -> str:
    said.seek(0)
    lines = said.read().strip().splitlines()
    return lines[-1].strip() if lines else ""


def broken_off(doing: str, code: int, *, in_time: bool, said: str) -> Check:
    """The line for a second process that ended before it was done.

    Args:
        doing: What it was at.
        code: Of its end; below zero the number of a signal.
        in_time: Whether it had time left.
        said: The last line of its errors.
    """
    if not in_time:
        found = f"not done within {PATIENCE:.0f} s; what comes after it was not looked at"
        return Check(LOADING, doing, State.WRONG, found, "Is the disk of the packages slow, or does a device hang?")
    how = f"exit code {code}"
    if code < 0:
        how = signal.Signals(-code).name
    meaning = {
        "SIGILL": "this processor lacks an instruction that it uses: install an older release or another build",
        "SIGKILL": "most often the memory is used up: end other programs",
    }
    mend = f"Reinstall the package; {meaning[how]}." if how in meaning else "Reinstall the package, then look again."
    told = f" ({said})" if said else ""
    return Check(LOADING, doing, State.WRONG, f"ends Python: {how}{told}; what comes after it was not looked at", mend)
