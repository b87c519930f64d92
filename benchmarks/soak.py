"""Kill runs, sweeps and predictions in each of their phases, resume them, and compare with uninterrupted ones.

`python benchmarks/soak.py --each 10` kills commands of a tiny network on a few images until each phase was hit ten
times. The phase is what the run's own timeline says (`benchmarks/tracing`); the moment within it, the signal, and
whether it comes twice are random, from `--seed`. Every file that is the same in two uninterrupted runs must be the
same after kill and resume; no process may be left over; a clean end has no traceback. If one of these fails, the exit
code is 1. Runs have caches of their own, so that what is cached is computed again, too.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from pylorus.data.synthetic import generate_image_set  # noqa: E402
from tests.forking import ForkServer  # noqa: E402

TRAIN = [sys.executable, str(ROOT / "train.py")]
PREDICT = [str(Path(sys.executable).parent / "pylorus"), "predict"]
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that end a run; SIGKILL more often, because it acts like a power failure."""
TWICE = 0.2
"""Fraction of the signals, other than SIGKILL, that are sent twice."""
PATIENCE = 30.0
"""Seconds in which a process must end after a signal, and its children after it."""
TIMEOUT = 240.0
"""Seconds after which a command counts as hanging."""
EXIT_CODES = (0, 130, *(-number for number in SIGNALS))
"""How a command may end that received a signal."""
IN_CHAIN = 2
"""Kills of a case in a row, each of what the one before was resumed to."""
MOMENTS = 0.35
"""The part of a command's time after which it is killed at the latest: enough is left for another kill."""
MOMENT = 0.02
"""Seconds; a phase that comes several times is killed in as much time as it takes when it takes at least so long."""
UNINTERRUPTED = 2
"""Commands of each kind that are not killed: what they have in common is compared."""
WORDS = [
    "data=folders", r"data.group=patient_\d+", "data.image_size=32", "data.workers=0", "trainer=cpu", "model=timm",
    "model.name=test_resnet.r160_in1k", "model.weights=none", "trainer.threads=1", "trainer.batch_size=4",
    "trainer.progress=false", "augment=light", "stages.pretrain.epochs=3", "stages.finetune.epochs=4",
    "stages.finetune.learn=layer3", "cache.images=true", "report=false",
]  # fmt: skip
TIMES = {"status.json", "speed.json", "run.log", "environment.json", "report.html", "sweep.md"}
"""Names of files that hold times, paths or process numbers, which no two runs have in common."""


@dataclass(frozen=True)
class Case:
    """Something to kill.

    Attributes:
        name: Its name in the table.
        kind: What is started: a key of `list_commands`.
        phase: Part of the timeline in which the signal is sent; None: any moment of the command.
        target: Who gets it: `group` (the command and all its processes), `parent` (the command alone), `reporter`
            (the process that is in that phase) or `child` (one of the processes that this one has started).
        signals: The signals to choose from.
        is_real: Whether a new interpreter is started instead of a fork that has imported everything.
    """

    name: str
    kind: str
    phase: str | None
    target: str = "group"
    signals: tuple[signal.Signals, ...] = SIGNALS
    is_real: bool = False


KILL = (signal.SIGKILL,)
CASES = (
    Case("imports", "run", "imports", is_real=True),
    Case("setup", "run", "setup"),
    Case("reading", "run", "reading"),
    Case("features", "run", "features"),
    Case("training of the head", "run", "pretrain"),
    Case("prediction, evaluation", "run", "evaluation"),
    Case("bundle", "run", "bundle"),
    Case("writing a checkpoint", "run", "checkpoint"),
    Case("training of the backbone", "run", "finetune"),
    Case("exit", "run", "exit"),
    Case("report", "report", "report"),
    Case("2 workers", "workers", "finetune"),
    Case("2 workers: one of them", "workers", "finetune", "child", KILL),
    Case("2 workers: their parent alone", "workers", "finetune", "parent"),
    Case("2 devices", "devices", None),
    Case("2 devices: one of them", "devices", "finetune", "reporter", KILL),
    Case("2 devices: their parent alone", "devices", "finetune", "parent"),
    Case("sweep", "sweep", None),
    Case("sweep: its parent alone", "sweep", None, "parent"),
    Case("sweep: one of its jobs", "sweep", "finetune", "reporter"),
    Case("2 jobs at once", "local", None),
    Case("2 jobs at once: their parent alone", "local", None, "parent"),
    Case("2 jobs at once: one of them", "local", "finetune", "reporter"),
    Case("joblib", "joblib", None, is_real=True),
    Case("joblib: its parent alone", "joblib", None, "parent", is_real=True),
    Case("joblib: one of its jobs", "joblib", "finetune", "reporter", is_real=True),
    Case("pylorus predict", "predict", None),
)  # fmt: skip
LATER = ("features", "prediction, evaluation", "bundle")
"""Cases that every second chain has after the training of the backbone, not before."""


@dataclass
class Outcome:
    """What became of the kills of one case."""

    kills: int = 0
    signals: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    phases: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: list[float] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    missed: int = 0


class Soak:
    """The folder of a soak, its fork server, the trace of the phases, and the uninterrupted results."""

    def __init__(self, work: Path, chance: random.Random) -> None:
        self.work, self.chance = work, chance
        self.images = work / "images"
        generate_image_set(self.images, images=10, size=64, seed=3)
        self.expected: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        self.begin = 0.0
        self.awaited: tuple[str, Outcome] | None = None
        self.durations: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.trace = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = work / "trace"
        self.trace.bind(str(address))
        path = os.pathsep.join(
            [str(ROOT / "src"), str(ROOT / "benchmarks" / "tracing"), os.environ.get("PYTHONPATH", "")]
        )
        os.environ.update(PYTHONPATH=path, OMP_NUM_THREADS="1", PYLORUS_TRACE=str(address), HF_HUB_OFFLINE="1")
        self.server = ForkServer()

    def list_commands(self, kind: str, folder: Path) -> tuple[list[str], list[str]]:
        """Return the command of a kind, and the one that resumes it."""
        if kind == "predict":
            command = [*PREDICT, str(self.work / "whole-run" / "model"), str(self.images)]
            command += ["--output", str(folder / "predictions.csv")]
            return command, command
        words = [*WORDS, f"data.root={self.images}", f"cache.folder={folder}-cache"]
        if kind == "report":
            command = [*TRAIN, f"resume={folder}", "report=true"]
            return command, command
        if kind in ("run", "workers", "devices"):
            more = {"workers": ["data.workers=2"], "devices": ["trainer.devices=2"]}.get(kind, [])
            return [*TRAIN, *words, *more, f"hydra.run.dir={folder}"], [*TRAIN, f"resume={folder}"]
        launcher = {
            "local": ["hydra/launcher=local", "hydra.launcher.n_jobs=2"],
            "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        }.get(kind, [])
        command = [
            *TRAIN,
            "-m",
            *words,
            *launcher,
            "stages.pretrain.epochs=2",
            "stages.finetune.epochs=3",
            "seed=0,1",
            f"hydra.sweep.dir={folder}",
        ]
        return command, command

    def create_folder(self, kind: str, name: str) -> Path:
        """Create the folder of a command: a new one, or that of a finished run which has no report yet."""
        folder = self.work / name
        if kind == "report":
            shutil.copytree(self.work / "whole-run", folder)
        else:
            folder.mkdir()
        return folder

    def start(self, command: list[str], folder: Path, *, is_real: bool) -> Any:
        """Start a command in a process group of its own."""
        os.environ["PYLORUS_TRACE_WITHOUT_REPORTS"] = "1" if "-m" in command else ""
        with folder.with_suffix(".log").open("ab") as log:
            if is_real:
                return subprocess.Popen(
                    command, cwd=self.work, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            return self.server.start(command, cwd=self.work, stdout=log, stderr=log, start_new_session=True)

    def read_trace(self, timeout: float) -> tuple[int, str] | None:
        """Return the next process and phase that the trace reports; None if there is none in time."""
        self.trace.settimeout(max(timeout, 1e-6))
        try:
            pid, _, phase = self.trace.recv(256).decode().partition(" ")
        except TimeoutError:
            return None
        if self.awaited is not None and self.awaited[0] == phase:
            self.awaited[1].seconds.append(time.monotonic() - self.begin)
            self.awaited = None
        return int(pid), phase

    def measure(self, kind: str, name: str) -> Path:
        """Run a command without interruption, and record how long it and its phases take."""
        folder = self.create_folder(kind, name)
        begin, since = time.monotonic(), {}
        process = self.start(self.list_commands(kind, folder)[0], folder, is_real=False)
        while process.poll() is None:
            report, now = self.read_trace(0.05), time.monotonic()
            if report is not None:
                if report[0] in since:
                    phase, start = since[report[0]]
                    self.durations[kind, phase].append(now - start)
                since[report[0]] = (report[1], now)
        for phase, start in since.values():
            self.durations[kind, phase].append(time.monotonic() - start)
        if process.returncode:
            sys.exit(f"the uninterrupted command failed: see {folder}.log")
        self.seconds[kind] = time.monotonic() - begin
        return folder

    def kill(self, case: Case, process: Any, outcome: Outcome) -> tuple[str, list[psutil.Process]] | None:
        """Send a signal in the phase of a case; None if the command ended before.

        Returns:
            A text that says which signal was sent when, and the processes that must end now.
        """
        reporter, phases = process.pid, {}
        if case.phase in (None, "imports"):
            moment = time.monotonic() + self.chance.uniform(0.0, self.get_duration(case))
        else:
            found = self.wait_for_moment(case, process, phases)
            if found is None:
                return None
            reporter, moment = found, time.monotonic()
        while (seconds := moment - time.monotonic()) > 0 and process.poll() is None:
            if trace := self.read_trace(min(0.05, seconds)):
                phases[trace[0]] = trace[1]
                if case.phase is None:
                    reporter = trace[0]
        targets, family = [process.pid], list_family(process.pid)
        if case.target == "reporter":
            targets = [reporter]
        elif case.target == "child":
            with suppress(psutil.NoSuchProcess):
                targets = [child.pid for child in psutil.Process(reporter).children()]
        if process.poll() is not None or not targets:
            return None
        number = self.chance.choice(case.signals)
        is_repeated = number != signal.SIGKILL and self.chance.random() < TWICE
        target = self.chance.choice(targets)
        for _ in range(1 + is_repeated):
            with suppress(ProcessLookupError):
                (os.killpg if case.target == "group" else os.kill)(target, number)
            time.sleep(self.chance.uniform(0.0, 0.05) if is_repeated else 0.0)
        name, phase = f"{number.name}{' twice' * is_repeated}", phases.get(reporter, "imports")
        outcome.kills += 1
        outcome.signals[name] += 1
        outcome.phases[phase] += 1
        self.awaited = ("setup" if phase == "imports" else phase, outcome)
        return f"{name} to {case.target} in {phase}", family

    def wait_for_moment(self, case: Case, process: Any, phases: dict[int, str]) -> int | None:
        """Wait until a process has spent a random time in the phase of a case, and return its number.

        Args:
            case: The case.
            process: The command; if it ends before, the result is None.
            phases: The phase of each process, which is updated.
        """
        durations = self.durations[case.kind, str(case.phase)]
        shortest = min((each for each in durations if each > MOMENT), default=max(durations))
        left = self.chance.uniform(0.0, 0.9 * shortest)
        reporter, since, deadline = None, 0.0, time.monotonic() + TIMEOUT
        while since < deadline:
            trace, before = self.read_trace(0.05 if reporter is None else min(0.05, left)), since
            since = time.monotonic()
            left -= since - before if reporter is not None else 0.0
            if trace is not None:
                phases[trace[0]] = trace[1]
                if reporter is None and trace[1] == case.phase:
                    reporter = trace[0]
                elif reporter == trace[0]:
                    reporter = None
                    left = max(left, 1e-4)
            elif process.poll() is not None:
                return None
            if reporter is not None and left <= 0.0:
                return reporter
        return None

    def get_duration(self, case: Case) -> float:
        """Return the seconds from the start of a command within which it is killed, if in no certain phase."""
        imports = 4.0 if case.is_real else 0.0
        return imports if case.phase == "imports" else imports + MOMENTS * self.seconds[case.kind]

    def run_chain(self, cases: list[Case], number: int, outcomes: dict[str, Outcome]) -> None:
        """Start a command, kill and resume it once for each case, let it finish, and compare its results."""
        kind = cases[0].kind
        folder = self.create_folder(kind, f"{kind}-{number}")
        found: list[str] = []
        finished: dict[str, str] = {}
        for index, case in enumerate(cases):
            process = self.resume(kind, folder, is_real=case.is_real)
            sent = self.kill(case, process, outcomes[case.name])
            code = self.wait(process, found)
            if sent is None:
                outcomes[case.name].missed += 1
                continue
            left = list_left_over(sent[1])
            log = folder.with_suffix(".log").read_text(errors="replace")
            is_own = kind != "joblib"  # its resource tracker prints some of its own when a signal ends that
            left += ["a traceback"] * ("Traceback" in log and "SIGKILL" not in sent[0] and is_own)
            left += [f"exit code {code}"] * (code not in EXIT_CODES and case.target in ("group", "parent"))
            folder.with_suffix(".log").rename(folder.with_suffix(f".{index}.log"))
            for run in iter_runs(folder):
                ended = read_status(run)["ended"] if read_status(run)["state"] == "finished" else ""
                left += [f"job {run.name} was trained again"] * (finished.get(run.name, "") not in ("", ended))
                finished[run.name] = ended
            outcomes[case.name].differences += [f"{folder.name}: {sent[0]}: {each}" for each in left]
        for _ in range(3):
            process = self.resume(kind, folder, is_real=False)
            if self.wait(process, found) == 0:
                break
        found += ["did not finish"] if process.returncode else self.compare(kind, folder)
        for case in cases:
            outcomes[case.name].differences += [f"{folder.name}: {each}" for each in found]
        differences = {each for case in cases for each in outcomes[case.name].differences if f"{folder.name}:" in each}
        for each in sorted(differences):
            print(f"* {each}", file=sys.stderr, flush=True)
        if not differences:
            for path in [folder, folder.with_name(f"{folder.name}-cache")]:
                shutil.rmtree(path, ignore_errors=True)
            for path in self.work.glob(f"{folder.name}.*log"):
                path.unlink()

    def resume(self, kind: str, folder: Path, *, is_real: bool) -> Any:
        """Start the command of a folder, or resume it if it has begun."""
        while self.read_trace(0.0):
            pass
        command, again = self.list_commands(kind, folder)
        is_begun = any((run / "config.yaml").is_file() for run in iter_runs(folder))
        self.begin = time.monotonic()
        return self.start(again if is_begun else command, folder, is_real=is_real)

    def wait(self, process: Any, found: list[str]) -> int:
        """Wait for the end of a command, and return its exit code."""
        deadline = time.monotonic() + TIMEOUT
        while process.poll() is None and time.monotonic() < deadline:
            self.read_trace(0.05)
        if process.poll() is None:
            found.append("hangs")
            for each in list_family(process.pid):
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        return int(process.wait(timeout=PATIENCE))

    def compare(self, kind: str, folder: Path) -> list[str]:
        """List what differs from the uninterrupted command."""
        results = fingerprint(folder)
        expected = self.expected[kind]
        differing = [name for name in expected if results.get(name) != expected[name]]
        left = [str(path.relative_to(folder)) for path in folder.rglob(".*") if path.is_file() and path.name != ".lock"]
        return [*(f"{name} differs" for name in differing), *(f"left behind {name}" for name in left)]

    def prepare(self, kinds: list[str]) -> None:
        """Run each kind of command twice without interruption: what is the same in both is compared."""
        for kind in kinds:
            folders = [self.measure(kind, f"{name}-{kind}") for name in ("whole", "again")][:UNINTERRUPTED]
            first, second = map(fingerprint, folders)
            self.expected[kind] = {name: value for name, value in first.items() if second.get(name) == value}
            others = sorted(set(first) - set(self.expected[kind]))
            print(
                f"{kind}: {self.seconds[kind]:.1f} s, compares {len(self.expected[kind])} files; "
                f"differ without a kill: {', '.join(others) or 'none'}",
                file=sys.stderr,
                flush=True,
            )


def list_family(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def list_left_over(family: list[psutil.Process]) -> list[str]:
    """Return which processes of an ended command are still there after some time, and end them."""
    _, alive = psutil.wait_procs([each for each in family if is_alive(each)], timeout=PATIENCE)
    alive = [each for each in alive if is_alive(each)]
    for each in alive:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    return [f"process {each.pid} is left running" for each in alive]


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs: one that has ended may remain until its parent asks for its exit code."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def read_status(run: Path) -> dict[str, Any]:
    """Read the status of a run."""
    return dict(json.loads((run / "status.json").read_text()))


def iter_runs(folder: Path) -> Iterator[Path]:
    """Yield the folder of the run, or those of the jobs of a sweep."""
    yield from (
        [folder] if (folder / "status.json").is_file() else sorted(path.parent for path in folder.glob("*/status.json"))
    )


def fingerprint(folder: Path) -> dict[str, str]:
    """Hash each file of a command's results that can be the same in two folders."""
    readers: dict[str, Callable[[Path], bytes]] = {
        ".parquet": lambda path: pd.read_parquet(path).to_csv().encode(),
        ".sha256": lambda path: b"",
    }
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in TIMES and not path.name.startswith("."):
            content = readers.get(path.suffix, Path.read_bytes)(path)
            if path.name == "sweep.csv":
                content = pd.read_csv(path).drop(columns="minutes").to_csv().encode()
            content = content.replace(str(folder).encode(), b"FOLDER").replace(folder.name.encode(), b"FOLDER")
            hashes[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return hashes


def format_table(outcomes: dict[str, Outcome]) -> str:
    """Format the outcome of each case as a row."""
    lines = ["| killed during | kills | signals | phase when killed | seconds until a resume is there again "
             "| differences |", "| --- | --: | --- | --- | --: | --: |"]  # fmt: skip
    for name, outcome in outcomes.items():
        signals, phases = (
            ", ".join(f"{key} {count}" for key, count in sorted(counts.items()))
            for counts in (outcome.signals, outcome.phases)
        )
        again = f"{median(outcome.seconds):.1f}" if outcome.seconds else "–"
        lines.append(f"| {name} | {outcome.kills} | {signals} | {phases} | {again} | {len(outcome.differences)} |")
    kills = sum(outcome.kills for outcome in outcomes.values())
    differences = {each for outcome in outcomes.values() for each in outcome.differences}
    return "\n".join([*lines, f"| all | {kills} | | | | {len(differences)} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=10, help="kills of each case")
    parser.add_argument("--minutes", type=float, default=30, help="minutes after which no new command is started")
    parser.add_argument("--seed", type=int, default=0, help="random seed of moments and signals")
    kinds = list(dict.fromkeys(case.kind for case in CASES))
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="what to start (default: all)")
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "outputs" / "soak")
    options = parser.parse_args()
    work: Path = options.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name in ("SIGHUP", "SIGINT", "SIGTERM"):  # under nohup, a run would ignore what this sends
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    has_joblib = find_spec("hydra_plugins") is not None and find_spec("hydra_plugins.hydra_joblib_launcher") is not None
    cases = [case for case in CASES if case.kind in options.kinds and (has_joblib or case.kind != "joblib")]
    print(
        f"seed {options.seed}, {len(cases)} cases{'' if has_joblib else ', without joblib: not installed'}", flush=True
    )
    begin = time.monotonic()
    soak = Soak(work, random.Random(options.seed))
    outcomes = {case.name: Outcome() for case in cases}
    try:
        soak.prepare(list(dict.fromkeys(["run", *(case.kind for case in cases)])))
        chains: dict[str, list[Case]] = defaultdict(list)
        for case in cases:
            chains[case.kind].append(case)
        for number in range(2 * options.each):
            for chain in chains.values():
                missing = [case for case in chain if outcomes[case.name].kills < options.each]
                if number % 2:
                    missing.sort(key=lambda case: case.name in LATER)
                if missing and time.monotonic() - begin < 60 * options.minutes:
                    soak.run_chain([case for case in missing for _ in range(IN_CHAIN)], number, outcomes)
            total = sum(outcome.kills for outcome in outcomes.values())
            differences = sum(len(outcome.differences) for outcome in outcomes.values())
            print(f"round {number}: {total} kills, {differences} differences", file=sys.stderr, flush=True)
    finally:
        soak.server.stop()
        print(format_table(outcomes), flush=True)
    lines = sorted({each for outcome in outcomes.values() for each in outcome.differences})
    print("\n".join(f"* {each}" for each in lines))
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
