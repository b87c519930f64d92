"""Run all checks and yield each as soon as it is done.

The checks that need no heavy package run first, while a second process loads those packages.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO

from pylorus import __version__
from pylorus.core.formatting import format_count
from pylorus.doctor.checks import MEMORY_AND_DISK as SPACE
from pylorus.doctor.checks import (
    check_bundle,
    check_computing,
    check_fonts,
    check_images,
    check_space,
    list_class_names,
)
from pylorus.doctor.packages import EXTRAS as EXTRAS
from pylorus.doctor.packages import LOADING as LOADING
from pylorus.doctor.packages import PACKAGES as PACKAGES
from pylorus.doctor.packages import (
    Check,
    State,
    check_extras,
    check_loading,
    check_network,
    check_packages,
    get_worst_state,
    run_guarded,
)
from pylorus.doctor.weights import check_weights

COLOURS = {State.OPTIONAL: "2", State.GOOD: "32", State.WARNING: "33", State.WRONG: "31"}
"""ANSI color codes: faint, green, yellow, red."""
LINKS = {State.OPTIONAL: ": ", State.GOOD: "; optional: "}
"""What leads from what was found to the remedy, where nothing has to be fixed."""
STATE_WIDTH, NAME_WIDTH = 8, 15
COLUMN = 2 + STATE_WIDTH + 2 + NAME_WIDTH + 2
"""Column at which the text of a check begins."""


def print_checks(checks: Iterable[Check], output: TextIO = sys.stdout) -> State:
    """Print each check under its area as soon as it is done, then how many are good, warnings and wrong.

    Returns:
        The worst state of all checks.
    """
    width = min(120, shutil.get_terminal_size((100, 24)).columns)
    coloured = output.isatty() and "NO_COLOR" not in os.environ
    print(f"Pylorus {__version__}: what this machine has and lacks", file=output)
    done: list[Check] = []
    for check in checks:
        if not done or done[-1].area != check.area:
            print(f"\n{check.area}", file=output)
        print("\n".join(format_check_lines(check, width=width, coloured=coloured)), file=output, flush=True)
        done.append(check)
    counts = Counter(check.state for check in done)
    absent, good, warnings, wrong = (counts[state] for state in State)
    note = f"; {format_count(absent, 'optional extra')} not installed" if absent else ""
    print(f"\n{good} good, {format_count(warnings, 'warning')}, {wrong} wrong{note}", file=output)
    return get_worst_state(done)


def format_check_lines(check: Check, *, width: int, coloured: bool) -> Iterator[str]:
    """Yield a check as lines of at most `width` characters, with its text and fix in a column of their own."""
    if check.remedy and check.state in LINKS:
        texts = [f"{check.found}{LINKS[check.state]}{check.remedy}"]
    else:
        texts = [check.found, *([f"fix: {check.remedy}"] if check.remedy else [])]
    lines = [line for text in texts for line in _wrap_text(text, width)]
    state = f"{check.state:<{STATE_WIDTH}}"
    if coloured:
        state = f"\x1b[{COLOURS[check.state]}m{state}\x1b[0m"
    prefix = f"  {state}  {check.name:<{NAME_WIDTH}}"
    if len(check.name) <= NAME_WIDTH and lines[0].startswith(" " * COLUMN):
        yield f"{prefix}{lines.pop(0)[COLUMN - 2 :]}"
    else:
        yield prefix.rstrip()
    yield from lines


def _wrap_text(text: str, width: int) -> Iterator[str]:
    """Yield the text wrapped from `COLUMN` on; a long word, such as a hash, starts further left, unbroken."""
    for line in textwrap.wrap(text, width - COLUMN, break_long_words=False, break_on_hyphens=False) or [""]:
        yield " " * min(COLUMN, max(2, width - len(line))) + line


def format_json(checks: Iterable[Check]) -> tuple[str, State]:
    """Return all checks as one JSON object, and the worst state."""
    done = list(checks)
    content = {"pylorus": __version__, "state": get_worst_state(done), "checks": [check.to_dict() for check in done]}
    return json.dumps(content, indent=2, ensure_ascii=False), get_worst_state(done)


def main() -> None:
    """Run the checks and write them to the original standard output; what packages print goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as output:
        os.dup2(2, 1)
        _run_checks(output, **json.loads(sys.argv[1]))


def _run_checks(output: TextIO, *, weights: str, data: str | None, bundle: str | None, trust: list[str]) -> None:
    def write_line(line: str) -> None:
        output.write(f"{line}\n")
        output.flush()

    def report_step(what: str) -> None:
        write_line(json.dumps({"doing": what}))

    def run_check(area: str, what: str, look: Callable[[], Iterable[Check]]) -> None:
        report_step(what)
        for check in run_guarded(area, what, look):
            write_line(check.to_json())

    for check in check_loading(report_step):
        write_line(check.to_json())
    has_torch = "torch" in sys.modules
    if has_torch:
        run_check("Computing", "cores, precision and GPU", check_computing)
        run_check("Weights", "weights of the study's models", lambda: check_weights(Path(weights)))
    run_check("Figures", "fonts", lambda: check_fonts([] if data is None else list_class_names(Path(data))))
    if data is not None:
        run_check("Images", "images", lambda: check_images(Path(data)))
    if bundle is not None and has_torch:
        run_check("Bundle", "bundle", lambda: check_bundle(Path(bundle), [Path(key) for key in trust]))


TIMEOUT = 600.0
"""Time limit of the second process, in seconds: from a cold network disk torch takes minutes to load."""


@dataclass(frozen=True)
class DoctorOptions:
    """What the doctor should check besides the machine.

    Attributes:
        weights: Folder of weight files that were copied to this machine.
        data: Folder of images to check, or None.
        bundle: Folder of a bundle to check, or None.
        trust: Files with public keys of which one must have signed the bundle; empty to accept any.
    """

    weights: Path = Path("weights")
    data: Path | None = None
    bundle: Path | None = None
    trust: tuple[Path, ...] = ()

    def to_json(self) -> str:
        """Return the question as JSON, for the second process."""
        folders = {"data": self.data, "bundle": self.bundle}
        paths = {name: None if path is None else str(path) for name, path in folders.items()}
        return json.dumps({"weights": str(self.weights), **paths, "trust": [str(key) for key in self.trust]})


def run_checks(question: DoctorOptions) -> Iterator[Check]:
    """Run all checks and yield each as soon as it is done."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = _start_process(question, errors)
        try:
            yield from run_guarded(PACKAGES, "packages", check_packages)
            yield from run_guarded(EXTRAS, "extras", check_extras)
            yield from run_guarded(SPACE, "memory and disk", check_space)
            yield from check_network()
            yield from _read_checks(process, errors)
        finally:
            process.kill()
            process.wait()


def _start_process(question: DoctorOptions, errors: IO[str]) -> "subprocess.Popen[str]":
    # -P: a file in the current folder that has the name of a module must not be imported in its place.
    command = [sys.executable, "-P", "-m", "pylorus.doctor.examine", question.to_json()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8")


def _read_checks(process: "subprocess.Popen[str]", errors: IO[str]) -> Iterator[Check]:
    """Yield the second process's checks; if it ends early, also a check that says during which step."""
    timer = threading.Timer(TIMEOUT, process.kill)
    timer.daemon = True
    timer.start()
    step = "starting"
    assert process.stdout is not None
    for line in process.stdout:
        if not line.endswith("\n"):
            break  # the process ended while it wrote this line
        content = json.loads(line)
        if "doing" in content:
            step = content["doing"]
        else:
            yield Check.from_json(line)
    in_time = timer.is_alive()
    timer.cancel()
    if process.wait() != 0:
        yield report_early_end(step, process.returncode, in_time=in_time, said=_read_last_line(errors))


def _read_last_line(errors: IO[str]) -> str:
    errors.seek(0)
    lines = errors.read().strip().splitlines()
    return lines[-1].strip() if lines else ""


def report_early_end(doing: str, code: int, *, in_time: bool, said: str) -> Check:
    """Return the check that reports that the second process ended early.

    Args:
        doing: What it was doing.
        code: Its exit code; negative: the number of the signal that ended it.
        in_time: Whether it ended before the time limit.
        said: The last line of its standard error.
    """
    if not in_time:
        summary = f"not finished within {TIMEOUT:.0f} s; the checks after it were skipped"
        return Check(
            LOADING,
            doing,
            State.WRONG,
            summary,
            "See whether the disk with the Python packages is slow, or whether a device hangs.",
        )
    ending = f"exit code {code}"
    if code < 0:
        ending = signal.Signals(-code).name
    meanings = {
        "SIGILL": "this processor lacks an instruction that it uses: install an older release or another build",
        "SIGKILL": "the usual cause is that memory ran out: close other programs",
    }
    fix = (
        f"Reinstall the package; {meanings[ending]}."
        if ending in meanings
        else "Reinstall the package, then run pylorus doctor again."
    )
    detail = f" ({said})" if said else ""
    return Check(
        LOADING, doing, State.WRONG, f"Python ended with {ending}{detail}; the checks after it were skipped", fix
    )


if __name__ == "__main__":
    main()
